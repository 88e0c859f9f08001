"""verify(): each rule about swap is broken in turn, and named."""

import pytest

from mm.page_flags import PG_anon_exclusive, PG_dirty, PG_swapbacked, PG_swapcache
from mm.pgtable import pte_offset
from mm.swapin import read_swap_cache_async
from mm.swapops import SWP_EXCLUSIVE, make_swap_entry
from mm.typing import pages
from tests.mm.test_debug import complaints, named, spoiled, spoiled_attribute
from tests.world import mapped_range


@pytest.fixture
def world():
    """Page 0 in swap, 1 in swap and in the swap cache, 2 mapped and in the swap cache, 3 mapped."""
    world = mapped_range(pages=4, swap="64KiB")
    world.pageout(0, 1, 2)
    world.fork(0, 2)
    read_swap_cache_async(world.vma, world.addrs[1:2], world.slots()[1:2])
    world.process.read(world.at(2), 1)
    world.machine.verify()
    return world


@pytest.fixture
def si(world):
    return world.machine.mem.swap


def entry_of(world, page):
    return pte_offset(world.machine.mem.tables, world.process.mm.pgd, world.addrs[page : page + 1])


def cached(world):
    """PFN of page 2, and its slot."""
    pfn = world.pfns().item(2)
    return pfn, world.machine.mem.private.item(pfn)


class TestSlots:
    @pytest.mark.parametrize("slot", [1, 2, 3, 9])
    def test_count(self, world, si, slot):
        """Entries and the page in the cache are all that hold a slot, free ones nobody."""
        with spoiled(si.swap_map, slot, si.swap_map[slot] + 1):
            lines = complaints(world.machine)

        assert f"swap_map: slot {slot:#x}: not its entries and the swap cache" in lines

    def test_used_slots(self, world, si):
        """They are counted."""
        with spoiled_attribute(si, "inuse_pages", 7):
            assert ["inuse_pages: says 7, 3 slots are used"] == complaints(world.machine)

    def test_shadow_of_a_free_slot(self, world, si):
        """Nobody could come back to it."""
        with spoiled(si.cache, 9, ~5):
            assert {"swap cache"} == named(world.machine)

    def test_shadow_of_a_used_slot(self, world, si):
        """That is what a shadow is for."""
        assert si.cache[1] < 0


class TestCache:
    def test_page_that_is_not_known(self, world, si):
        """The slot names the page that names it."""
        _, slot = cached(world)

        with spoiled(si.cache, slot, world.pfns().item(3)):
            assert {"private", "refcount"} <= named(world.machine)

    def test_slot_that_is_not_known(self, world):
        """The page names the slot that names it."""
        pfn, _ = cached(world)

        with spoiled(world.machine.mem.private, pfn, 9):
            assert "private" in named(world.machine)
        with spoiled(world.machine.mem.private, pfn, 1 << 40):
            assert f"private: page {pfn:#x}: no such slot" in complaints(world.machine)

    def test_page_outside_that_has_a_slot(self, world):
        """`private` is for pages of the swap cache."""
        pfn = world.pfns().item(3)

        with spoiled(world.machine.mem.private, pfn, 2):
            (line,) = complaints(world.machine)

        assert f"private: page {pfn:#x}: neither a driver, nor swap, nor buffers use it" == line

    def test_number_of_pages(self, world):
        """It is counted twice."""
        world.machine.vmstat.add("nr_swapcached", 3)
        found = complaints(world.machine)
        world.machine.vmstat.add("nr_swapcached", -3)

        assert "nr_swapcached: says 5, 2 slots have pages, 2 pages have slots" == found[0]

    def test_page_that_is_said_to_be_outside(self, world):
        """The flag goes with the slot."""
        flags, (pfn, _) = world.machine.mem.flags, cached(world)

        with spoiled(flags, pfn, flags[pfn] & ~PG_swapcache):
            assert {"private", "nr_swapcached"} <= named(world.machine)

    def test_page_that_is_not_swapbacked(self, world):
        """What MADV_FREE gave up has no slot."""
        flags, (pfn, _) = world.machine.mem.flags, cached(world)

        with spoiled(flags, pfn, flags[pfn] & ~PG_swapbacked):
            found = complaints(world.machine)

        assert f"flags: page {pfn:#x}: in the swap cache, not swapbacked" in found

    def test_clean_page_whose_slot_differs(self, world, si):
        """Reclaim would drop the page, and its bytes with it."""
        mem, (pfn, slot) = world.machine.mem, cached(world)

        with spoiled(si.contents, (slot, 7), 99):
            line = f"contents: page {pfn:#x}: clean, yet its slot holds something else"
            assert [line] == complaints(world.machine)
            with spoiled(mem.flags, pfn, mem.flags[pfn] | PG_dirty):
                world.machine.verify()

    def test_reference_of_the_cache(self, world):
        """The swap cache holds one."""
        pfn, _ = cached(world)
        refcount = world.machine.mem.refcount

        with spoiled(refcount, pfn, refcount[pfn] - 1):
            assert {"refcount"} == named(world.machine)


class TestEntries:
    @pytest.mark.parametrize("slot", [0, 16, 1 << 30])
    def test_slot_that_there_is_not(self, world, slot):
        """An entry names a slot of the area."""
        entry = make_swap_entry(pages(slot))

        with spoiled(world.machine.mem.tables.entries, entry_of(world, 0), entry):
            assert "an entry of no kind" in " ".join(complaints(world.machine))

    def test_slot_that_others_hold(self, world):
        """What is exclusive has one entry."""
        entries, at = world.machine.mem.tables.entries, entry_of(world, 0)

        with spoiled(entries, at, entries[at] | SWP_EXCLUSIVE):
            (line,) = complaints(world.machine)

        assert f"page table: page {world.at(0):#x}: others hold the slot too" in line

    def test_entries_of_a_process(self, world):
        """They are counted."""
        with spoiled_attribute(world.process.mm, "swapents", 9):
            assert ["swapents: train says 9, its page tables hold 2"] == complaints(world.machine)

    def test_entry_that_is_gone(self, world):
        """Its slot and its process miss it."""
        with spoiled(world.machine.mem.tables.entries, entry_of(world, 0), 0):
            assert {"swap_map", "swapents"} == named(world.machine)

    def test_page_of_one_process_alone(self, world):
        """A page that another process has in swap may be exclusive to nobody; its entry tells."""
        assert not world.machine.mem.flags[cached(world)[0]] & PG_anon_exclusive
