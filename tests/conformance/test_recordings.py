"""Scripts whose answers a real kernel gave: Linux 6.12, with its own HMM test driver."""

from pathlib import Path

RECORDINGS = Path(__file__).parent / "recordings"
