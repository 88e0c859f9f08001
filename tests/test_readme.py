"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
FIRST, SECOND = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class TestReadme:
    def test_ten_lines_print_what_it_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The first example is ten lines, and prints which page stayed."""
        exec(FIRST, {})

        printed = capsys.readouterr().out.strip()
        assert f"It prints `{printed}`." in README
        assert 10 >= len([line for line in FIRST.splitlines() if line.strip()])

    def test_computed_values_come_back(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The second goes on from it: square roots computed on the device, read by the CPU."""
        exec(FIRST + SECOND, {})

        assert "[2. 2. 2. 2.]" in capsys.readouterr().out
