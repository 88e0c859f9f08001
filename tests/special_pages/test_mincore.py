"""What is in memory. Linux: mm/mincore.c."""

import numpy as np
import pytest

from mm import PAGE_SIZE
from mm.errors import NotMapped
from mm.typing import pages
from tests.special_pages.scenes import MAKERS, PLACES, away, in_place, kinds
from tests.world import mapped_range


class TestMincore:
    """mm/mincore.c, mincore_pte_range()."""

    @pytest.mark.parametrize("kind", MAKERS)
    def test_entry_that_is_no_swap(self, kind):
        """Whatever hides among the swap entries counts as being in memory."""
        world = mapped_range(2, filled=False)
        world.process.touch(world.at(0), 1, write=False)
        words = world.ptes().tolist()
        world.rewrite([0], lambda ptes: MAKERS[kind](pages(0x77)))

        resident = world.process.mincore(world.addr, world.nbytes)
        world.rewrite([0], lambda ptes: np.array(words[:1], dtype=np.uint64))

        assert [True, False] == resident.tolist()

    @pytest.mark.parametrize("where", PLACES)
    def test_pages(self, where):
        """So do the pages themselves, and nobody waits or faults."""
        with in_place(where) as world, world.machine.vmstat.counting() as delta:
            assert [True] * 3 == world.process.mincore(world.addr, world.nbytes).tolist()

        assert "pgfault" not in delta

    def test_swap(self):
        """A page in swap is not in memory, unless the swap cache has it."""
        world = mapped_range(3, swap="1MiB")
        world.pageout()
        assert ["swap"] * 3 == kinds(world)
        before = world.process.mincore(world.addr, world.nbytes).tolist()
        world.process.madvise(world.at(1), PAGE_SIZE, "willneed")

        assert [False] * 3 == before
        assert [False, True, False] == world.process.mincore(world.addr, world.nbytes).tolist()

    def test_hole(self):
        """Device memory is no excuse for a hole in the range."""
        world = away()
        world.process.munmap(world.at(1), PAGE_SIZE)

        with pytest.raises(NotMapped):
            world.process.mincore(world.addr, world.nbytes)
