"""mincore(): a bit for each page, whatever stands for it."""

import pytest

from mm import InvalidArgument
from mm.errors import NotMapped
from mm.page_flags import PG_uptodate
from mm.pgtable import PMD_SIZE
from mm.swap_state import lookup_swap_cache
from mm.typing import PAGE_SIZE
from tests.mm.test_rmap import migrating
from tests.world import mapped_range


def resident(world, first=0, count=None):
    count = world.pages if count is None else count
    return world.process.mincore(world.at(first), count * PAGE_SIZE).tolist()


class TestMincore:
    def test_every_kind(self):
        """A frame, zeros and a device page are in memory; what was never touched is not."""
        world = mapped_range(pages=4, filled=False)
        world.process.touch(world.at(0), PAGE_SIZE)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)
        world.process.touch(world.at(2), PAGE_SIZE)
        world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)

        assert [True, True, True, False] == resident(world)

    def test_page_on_its_way(self):
        """It counts, and nobody waits for it."""
        world = mapped_range(pages=2)

        with migrating(world):
            assert [True, True] == resident(world)

    def test_page_that_is_being_read(self):
        """It is in the swap cache, but its contents are not there yet."""
        world = mapped_range(pages=2, swap="1MiB")
        world.pageout()
        world.process.madvise(world.addr, world.nbytes, "willneed")
        pfns = lookup_swap_cache(world.machine.mem, world.slots())
        assert [True, True] == resident(world)

        world.machine.mem.flags[pfns[:1]] &= ~PG_uptodate
        answer = resident(world)
        world.machine.mem.flags[pfns[:1]] |= PG_uptodate

        assert [False, True] == answer

    def test_no_fault(self):
        """Asking brings nothing."""
        world = mapped_range(pages=2, filled=False)

        with world.machine.vmstat.counting() as delta:
            resident(world)

        assert {} == delta

    def test_over_tables_and_areas(self):
        """One vector for all of it."""
        world = mapped_range(pages=6, addr=5 * PMD_SIZE - 3 * PAGE_SIZE)
        world.process.mprotect(world.at(2), 2 * PAGE_SIZE, "-")
        world.process.madvise(world.at(4), PAGE_SIZE, "dontneed")

        assert [True, True, True, True, False, True] == resident(world)
        assert [True, False] == resident(world, 3, 2)

    def test_bytes_of_a_page(self):
        """The length is rounded up."""
        world = mapped_range(pages=2)

        assert 2 == world.process.mincore(world.addr, PAGE_SIZE + 1).size
        assert 0 == world.process.mincore(world.addr, 0).size

    def test_hole(self):
        """No answer for a range that is not all mapped."""
        world = mapped_range(pages=3)
        world.process.munmap(world.at(1), PAGE_SIZE)

        with pytest.raises(NotMapped, match=f"nothing is mapped at {world.at(1):#x}"):
            resident(world)

    def test_not_at_a_page(self):
        """An address is a multiple of the page size."""
        world = mapped_range(pages=1)

        with pytest.raises(InvalidArgument, match="is not a multiple of 0x1000"):
            world.process.mincore(world.addr + 8, PAGE_SIZE)
