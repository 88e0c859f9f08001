"""The swap cache: a page stands for its slot, and the slot for its page."""

import pytest

from mm import PAGE_SIZE
from mm.errors import KernelBug
from mm.filemap import lock_page, unlock_page
from mm.page_flags import PG_dirty, PG_swapcache
from mm.swap import put_page
from mm.swap_slots import SWAP_HAS_CACHE
from mm.swap_state import (
    add_to_swap,
    delete_from_swap_cache,
    find_get_pages,
    lookup_swap_cache,
)
from mm.typing import pages
from tests.world import mapped_range


@pytest.fixture
def world():
    """Three mapped pages, which the test has locked, and seven slots."""
    world = mapped_range(pages=3, swap="32KiB")
    world.clear_refs(0, 1, 2)
    pfns = world.pfns()
    lock_page(world.machine.mem, pfns)
    yield world
    mem = world.machine.mem
    delete_from_swap_cache(mem, pfns[mem.flags[pfns] & PG_swapcache != 0])
    unlock_page(mem, pfns)


class TestAddToSwap:
    def test_page_gets_a_slot(self, world):
        """It is dirty, knows its slot, and has a reference more; the slot knows the page."""
        mem, pfns = world.machine.mem, world.pfns()
        before = mem.refcount[pfns].tolist()

        with mem.vmstat.counting() as delta:
            assert [True] * 3 == add_to_swap(mem, pfns).tolist()

        assert [1, 2, 3] == mem.private[pfns].tolist()
        assert pfns.tolist() == lookup_swap_cache(mem, pages(1, 2, 3)).tolist()
        assert [count + 1 for count in before] == mem.refcount[pfns].tolist()
        assert (mem.flags[pfns] & PG_dirty != 0).all()
        assert {"nr_file_pages": 3, "nr_swapcached": 3} == delta
        assert [SWAP_HAS_CACHE] * 3 == mem.swap.swap_map[1:4].tolist()

    def test_last_ones_get_none(self, world):
        """Where slots run out the first pages have them."""
        mem, pfns = world.machine.mem, world.pfns()
        mem.swap.swap_map[1:6] = SWAP_HAS_CACHE
        mem.swap.inuse_pages = 5

        assert [True, True, False] == add_to_swap(mem, pfns).tolist()

        assert 0 == mem.flags[pfns[2]] & PG_swapcache
        mem.swap.swap_map[1:6] = mem.swap.inuse_pages = 0
        mem.swap.inuse_pages = 2


class TestLookup:
    def test_empty_slots_and_shadows_are_no_pages(self, world):
        """A shadow tells when a page went, not where it is."""
        mem = world.machine.mem
        add_to_swap(mem, world.pfns()[:1])
        mem.swap.cache[2] = ~7

        assert [world.pfns().item(0), 0, 0] == lookup_swap_cache(mem, pages(1, 2, 3)).tolist()

        mem.swap.cache[2] = 0

    def test_reference_to_what_is_found(self, world):
        """Whoever finds a page holds it."""
        mem, pfns = world.machine.mem, world.pfns()[:1]
        add_to_swap(mem, pfns)
        before = mem.refcount[pfns].item()

        found = find_get_pages(mem, pages(1, 2))

        assert [pfns.item(), 0] == found.tolist()
        assert before + 1 == mem.refcount[pfns].item()
        put_page(mem, pfns)


class TestDelete:
    def test_slot_is_free_again(self, world):
        """Where no entry holds it, the slot goes with its page, and so does the shadow."""
        mem, pfns = world.machine.mem, world.pfns()
        add_to_swap(mem, pfns)

        delete_from_swap_cache(mem, pfns, pages(5, 6, 7))

        assert 0 == mem.swap.inuse_pages == mem.vmstat["nr_swapcached"]
        assert [0, 0, 0] == mem.private[pfns].tolist() == mem.swap.cache[1:4].tolist()
        assert world.intact()

    def test_page_that_is_not_there(self, world):
        """To take a page out twice is a bug."""
        with pytest.raises(KernelBug, match=f"page {world.pfns()[0]:#x}"):
            delete_from_swap_cache(world.machine.mem, world.pfns()[:1])


class TestMigration:
    @pytest.fixture
    def halves(self):
        """A page in the swap cache, mapped by one process and in swap for the other."""
        world = mapped_range(pages=1, swap="64KiB")
        world.pageout()
        child = world.seen_by(world.fork(0))
        assert world.intact()
        return world, child

    def test_to_device_while_another_needs_the_slot(self, halves):
        """Device memory has no swap cache: the page stays, and both read it."""
        world, child = halves

        result = world.gpu.to_device(world.process, world.addr, PAGE_SIZE)

        assert (1, 0) == (result.collected, result.migrated)
        assert [False] == world.on_device()
        assert child.intact()
        assert world.pfns().tolist() == child.pfns().tolist()

    def test_to_device_once_nobody_does(self, halves):
        """The page leaves the swap cache and moves."""
        world, child = halves
        child.process.exit()

        result = world.gpu.to_device(world.process, world.addr, PAGE_SIZE)

        assert 1 == result.migrated
        assert 0 == world.machine.mem.swap.inuse_pages
        assert world.intact()

    def test_between_nodes(self):
        """The new page stands for the slot, where the other process finds it."""
        world = mapped_range(pages=2, swap="64KiB", nodes=("8MiB", "8MiB"))
        world.pageout()
        child = world.seen_by(world.fork(0, 1))
        assert world.intact()
        before = world.pfns().tolist()

        assert [1, 1] == world.process.move_pages(world.addrs, [1, 1]).tolist()

        with world.machine.vmstat.counting("pswpin", "nr_swapcached") as delta:
            assert child.intact()
        assert {"pswpin": 0, "nr_swapcached": 0} == delta
        assert world.pfns().tolist() == child.pfns().tolist() != before
