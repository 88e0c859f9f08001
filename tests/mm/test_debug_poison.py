"""verify() about frames that are out of use: each rule is broken in turn, and named."""

import pytest

from mm.page_flags import PG_hwpoison, PG_lru
from tests.mm.test_debug import complaints, named, spoiled, spoiled_attribute
from tests.world import mapped_range


@pytest.fixture
def world():
    """Page 0 is lost, and its frame out of use; page 1 is well."""
    world = mapped_range(pages=2)
    world.pfn, world.well = world.pfns().tolist()
    world.machine.memory_failure(world.pfn)
    world.machine.verify()
    return world


class TestPoisonedFrames:
    @pytest.mark.parametrize("change", [-1, 1])
    def test_reference(self, world, change):
        """It has one reference, that of the failure."""
        count = world.machine.mem.refcount
        with spoiled(count, world.pfn, count[world.pfn] + change):
            assert "refcount" in named(world.machine)

    def test_count(self, world):
        """Their number is known."""
        with spoiled_attribute(world.machine.mem, "num_poisoned_pages", 2):
            assert {"num_poisoned_pages"} == named(world.machine)

    def test_mapped(self, world):
        """Nobody maps one."""
        flags = world.machine.mem.flags
        with spoiled(flags, world.well, flags[world.well] | PG_hwpoison):
            assert any("poisoned, and yet mapped" in line for line in complaints(world.machine))

    def test_list(self, world):
        """None is on an LRU list."""
        flags = world.machine.mem.flags
        with spoiled(flags, world.pfn, flags[world.pfn] | PG_lru):
            assert any("poisoned, yet on" in line for line in complaints(world.machine))
