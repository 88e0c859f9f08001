"""How hypothesis draws: `quick` by default, `slow` with --hypothesis-profile=slow.

No deadline in either: the first example of a test pays for booting a machine. Where CI is set,
every run draws the same examples, so that a change is judged by what it changed.

Every world that a test makes (tests/world.py) is ended after it: nothing may leak.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.world import ended_worlds

settings.register_profile(
    "quick", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("slow", deadline=None, max_examples=2_000)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _worlds_end_well() -> Iterator[None]:
    with ended_worlds():
        yield
