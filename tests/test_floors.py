"""Imports go down only, and every file of mm stands on a floor. Floors: pyproject.toml."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def contracts() -> list[dict]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return pyproject["tool"]["importlinter"]["contracts"]


def files_on_floors() -> dict[str, bool]:
    """Module name to whether it stands there without brackets, for every file that has a floor."""
    floors = next(c for c in contracts() if c["id"] == "floors")
    named = [name.strip() for row in floors["layers"] for name in row.replace("|", ":").split(":")]
    return {name.strip("()"): not name.startswith("(") for name in named}


def files_of_mm() -> set[str]:
    return {path.stem for path in (ROOT / "mm").iterdir() if path.suffix == ".py"} - {"__init__"}


class TestFloors:
    @pytest.mark.parametrize("contract", [c["id"] for c in contracts()])
    def test_contract_is_kept(self, contract):
        """No import goes up a floor, and none closes a cycle."""
        lint = "from importlinter.cli import lint_imports_command as lint; lint()"
        options = ["--config", "pyproject.toml", "--no-logo", "--no-cache", "--contract", contract]

        answer = subprocess.run(
            [sys.executable, "-c", lint, *options],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )

        assert 0 == answer.returncode, answer.stdout + answer.stderr

    def test_every_file_has_a_floor(self):
        """A file of mm that no floor names could import whatever it likes."""
        assert set() == files_of_mm() - files_on_floors().keys()

    def test_brackets_are_for_files_to_come(self):
        """Brackets say that a file may be missing, so they come off when it is written."""
        written = {name for name, unbracketed in files_on_floors().items() if unbracketed}

        assert files_of_mm() == written
