"""docs/writing-a-driver.md does what it says, and is samples/my_driver.py."""

import re
from pathlib import Path

import pytest

from hmm.cli import main

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "writing-a-driver.md").read_text()
SAMPLE = ROOT / "samples" / "my_driver.py"


def blocks(heading):
    """The Python of the section called *heading*."""
    section = DOC.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


class TestWritingADriver:
    def test_sample_is_what_is_shown(self):
        """The pieces put together are the sample, of about sixty lines."""
        assert "\n".join(blocks("Build it")) == SAMPLE.read_text()
        assert 70 >= len(SAMPLE.read_text().splitlines())

    def test_what_is_printed(self, capsys, monkeypatch):
        """Using it, and seeing it fail, prints what is said there."""
        monkeypatch.chdir(ROOT)

        exec("".join(blocks("Use it") + blocks("See it fail")), {})

        printed = [*capsys.readouterr().out.splitlines()]
        assert printed == re.findall(r"`([^`]+)`", " ".join(re.findall("It prints (.*:)", DOC)))

    @pytest.mark.parametrize("only", [[], ["--only", "fork"]])
    def test_passes(self, capsys, only):
        """The sample keeps every rule."""
        assert 0 == main(["check", f"{SAMPLE}:MyDriver", *only]), capsys.readouterr().out
