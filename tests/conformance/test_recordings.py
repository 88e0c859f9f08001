"""Scripts whose answers a real kernel gave: Linux 6.12, with its own HMM test driver."""

from pathlib import Path

import pytest

from hmm.script import check_script, recorded_scripts

RECORDINGS = Path(__file__).parent / "recordings"
