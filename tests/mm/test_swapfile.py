"""Who may let go of a slot, and of the page that stands for it."""

import numpy as np
import pytest

from mm import PAGE_SIZE, Machine
from mm.errors import InvalidArgument
from mm.page_flags import PG_dirty, PG_swapcache
from mm.swapfile import (
    free_swap_and_cache,
    free_swap_cache,
    page_swapcount,
    reuse_swap_page,
    swapon,
    try_to_free_swap,
)
from mm.typing import NO_PAGES
from tests.world import mapped_range


@pytest.fixture
def shared():
    """Two pages in the swap cache: mapped here, in swap in another process."""
    world = mapped_range(pages=2, swap="64KiB")
    world.pageout()
    child = world.seen_by(world.fork(0, 1))
    assert world.intact()
    return world, child


class TestSwapon:
    def test_size(self):
        """The first page is a header, the others are slots."""
        machine = Machine(("1MiB",), "1MiB", max_physmem="1MiB")

        assert (256, 255) == (machine.mem.swap.max, machine.mem.swap.pages)
        assert (256, PAGE_SIZE) == machine.mem.swap.contents.shape

    def test_no_contents(self):
        """Without payload there is nothing to keep."""
        machine = Machine(("1MiB",), "1TiB", payload=False, max_physmem="1MiB")

        assert machine.mem.swap.contents is None

    @pytest.mark.parametrize("size", ["4KiB", 4097, "1KiB"])
    def test_wrong_size(self, size):
        """The message says what a swap area can be."""
        with pytest.raises(InvalidArgument, match="its size must be a multiple of 4 KiB"):
            swapon(Machine(("1MiB",), max_physmem="1MiB").mem, size)


class TestTryToFreeSwap:
    def test_slot_that_an_entry_holds(self, shared):
        """The page stays in the swap cache, for whoever has the entry."""
        world, _ = shared
        mem, pfns = world.machine.mem, world.pfns()

        assert [1, 1] == page_swapcount(mem, pfns).tolist()
        assert [False, False] == try_to_free_swap(mem, pfns).tolist()
        assert (mem.flags[pfns] & PG_swapcache != 0).all()

    def test_slot_that_nobody_holds(self, shared):
        """The page leaves and is dirty: no copy of it is left."""
        world, child = shared
        child.process.munmap(child.at(1), PAGE_SIZE)
        mem, pfns = world.machine.mem, world.pfns()
        mem.flags[pfns] &= ~PG_dirty

        assert [False, True] == try_to_free_swap(mem, pfns).tolist()

        assert [False, True] == (mem.flags[pfns] & PG_dirty != 0).tolist()
        assert [0, 0] == try_to_free_swap(mem, pfns).tolist()

    def test_no_page(self, shared):
        """An empty vector is fine."""
        assert 0 == try_to_free_swap(shared[0].machine.mem, NO_PAGES).size


class TestFreeSwapAndCache:
    def test_mapped_page_stays_in_the_cache(self, shared):
        """When the other process goes, the page is as it was."""
        world, child = shared

        child.process.exit()

        assert [0, 0] == page_swapcount(world.machine.mem, world.pfns()).tolist()
        assert 2 == world.machine.vmstat["nr_swapcached"] == world.machine.mem.swap.inuse_pages

    def test_unless_swap_is_short(self, shared):
        """Where more than half of the slots are used, those two are free."""
        world, child = shared
        many = world.process.mmap(10 * PAGE_SIZE)
        world.process.touch(many, 10 * PAGE_SIZE)
        extra = world.seen_by(world.process)
        extra.addr, extra.pages = many, 10
        assert 10 == extra.pageout()

        child.process.exit()

        assert 10 == world.machine.mem.swap.inuse_pages
        assert world.intact()

    def test_unmapped_page_goes(self, shared):
        """The last entry takes the page with it, which only the swap cache held."""
        world, child = shared
        free = world.machine.nr_free_pages
        world.process.munmap(world.addr, world.nbytes)
        assert 2 == world.machine.vmstat["nr_swapcached"]

        child.process.munmap(child.addr, child.nbytes)

        assert 0 == world.machine.vmstat["nr_swapcached"]
        assert free + 2 <= world.machine.nr_free_pages

    def test_locked_page_is_left_to_its_owner(self, shared):
        """Whoever has the lock will find that nobody needs the page."""
        world, child = shared
        world.lock(0)
        child.process.exit()
        world.process.munmap(world.at(1), PAGE_SIZE)
        pfns = world.pfns()[:1]

        free_swap_cache(world.machine.mem, pfns)

        assert world.machine.mem.flags[pfns] & PG_swapcache

    def test_no_entry(self):
        """An empty vector is fine."""
        mem = mapped_range(pages=1, swap="64KiB").machine.mem

        free_swap_and_cache(mem, np.empty(0, dtype=np.uint64))


class TestReuseSwapPage:
    def test_page_in_the_cache_alone(self, shared):
        """It leaves the swap cache, and then the mapping's is its only reference."""
        world, child = shared
        child.process.exit()

        assert [True, True] == reuse_swap_page(world.machine.mem, world.pfns()).tolist()
        assert 0 == world.machine.mem.swap.inuse_pages

    def test_page_that_others_will_look_for(self, shared):
        """An entry that holds the slot is as good as a mapping."""
        world, _ = shared

        assert [False, False] == reuse_swap_page(world.machine.mem, world.pfns()).tolist()

    def test_references_count(self):
        """Whoever holds a page may look at it; one that waits in a pagevec is found out."""
        world = mapped_range(pages=3)
        world.hold(world.pfns().item(1))

        assert [True, False, True] == reuse_swap_page(world.machine.mem, world.pfns()).tolist()

    def test_locked_page_in_the_cache(self, shared):
        """Another thread is about to decide what becomes of it."""
        world, child = shared
        child.process.exit()
        world.lock(0)

        assert [False, True] == reuse_swap_page(world.machine.mem, world.pfns()).tolist()
