"""Faults on pages in swap: what they cost, what they find, and what they leave.

What Linux 6.12 did is in the comments: line for line the answers to scripts of memory operations.
"""

import numpy as np
import pytest

from mm import PAGE_SIZE
from mm.errors import BusError, KernelBug, OutOfMemory
from mm.memory import handle_mm_fault
from mm.page_flags import PG_active, PG_anon_exclusive, PG_swapcache
from mm.pgtable import pte_dirty, pte_present, pte_soft_dirty, pte_write
from mm.swapin import read_swap_cache_async
from mm.swapops import make_swap_entry, swp_entry
from mm.types import VM_LOCKED, VM_SOFTDIRTY, VmFault
from mm.typing import pages
from tests.interleave import explore
from tests.world import mapped_range

SWAP = "256KiB"


def swapped(count=3, **options):
    """A world whose pages are all in swap."""
    world = mapped_range(pages=count, swap=SWAP, **options)
    world.pageout()
    assert world.slots().all()
    return world


def cost_of(world, act):
    """(minor faults, major faults, pages read) of *act*."""
    process = world.process
    before = process.min_flt, process.maj_flt
    with world.machine.vmstat.counting("pswpin") as delta:
        act()
    return process.min_flt - before[0], process.maj_flt - before[1], delta["pswpin"]


def states(world):
    """A letter for each page: in swap, present and writable, present and not; nothing."""
    ptes = world.ptes()
    kinds = np.where(pte_present(ptes), np.where(pte_write(ptes), "W", "R"), ".")
    return "".join(np.where(world.slots() > 0, "S", kinds))


def flags_of(world, flag):
    """Which pages, all of them mapped, have *flag*."""
    return (world.machine.mem.flags[world.pfns()] & flag != 0).tolist()


class TestSoleOwner:
    def test_load(self):
        """A major fault; the page is the process's own again, and its slot is free."""
        world = swapped()

        # read A 2: minflt 0, majflt 1, pswpin 1; then AnonExclusive, refcount 1, no swap cache
        assert (0, 1, 1) == cost_of(world, lambda: world.process.read(world.at(1), 1))

        assert "SWS" == states(world)
        assert not pte_dirty(world.ptes())[1]
        assert 2 == world.machine.mem.swap.inuse_pages == world.process.mm.swapents
        assert world.machine.mem.flags[world.pfns()[1]] & PG_anon_exclusive
        assert world.intact()

    def test_store(self):
        """One fault serves both the read from swap and the right to store."""
        world = swapped()

        # write A 3: minflt 0, majflt 1, pswpin 1
        assert (0, 1, 1) == cost_of(world, lambda: world.process.write(world.at(1), b"x"))

        assert "SWS" == states(world)
        assert pte_dirty(world.ptes())[1]
        assert b"x\1" == world.process.read(world.at(1), 2)

    def test_range(self):
        """Each page is a fault, all of them one vector; that of zeros is not read."""
        world = swapped(count=20)

        assert (0, 20, 19) == cost_of(world, world.intact)
        assert world.intact()

    def test_mixture(self):
        """Pages of every kind are served in one vector, each its way."""
        world = mapped_range(pages=6, swap=SWAP)
        world.pageout(1, 2)
        world.gpu.to_device(world.process, world.at(4), PAGE_SIZE)
        world.process.munmap(world.at(5), PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, addr=world.at(5))

        faults = handle_mm_fault(world.vma, world.addrs[:5], write=True)

        assert [0, VmFault.MAJOR, VmFault.MAJOR, 0, 0] == faults.tolist()
        assert [0, 1, 2, 3, 4, 0] == world.contents()

    def test_read_only_mapping(self):
        """No entry is writable in a VMA that is not."""
        world = swapped(count=1)
        world.protect("r")

        assert world.intact()

        assert "R" == states(world)


class TestSoftDirty:
    @pytest.mark.parametrize(
        ("watched", "soft_dirty", "write", "expected", "cost"),
        [
            (False, False, False, "W", (0, 1, 1)),
            (True, True, False, "W", (0, 1, 1)),
            (True, False, False, "R", (0, 1, 1)),
            (True, False, True, "W", (0, 1, 1)),
        ],
    )
    def test_bit_goes_to_swap_and_comes_back(self, watched, soft_dirty, write, expected, cost):
        """Where somebody watches for stores, the first one must fault, and then be seen."""
        world = mapped_range(pages=2, swap=SWAP)
        world.vma.vm_flags |= VM_SOFTDIRTY
        if watched:
            world.vma.vm_flags &= ~VM_SOFTDIRTY
        if not soft_dirty:
            world.clear_refs(1)
        world.pageout()

        assert cost == cost_of(world, lambda: world.process.touch(world.at(1), 1, write=write))

        assert f"S{expected}" == states(world)
        assert (soft_dirty or write) == pte_soft_dirty(world.ptes())[1]


class TestSharedSlots:
    """Linux 6.12: six pages are paged out, then the process forks."""

    @pytest.fixture
    def both(self):
        world = swapped(count=6)
        return world, world.seen_by(world.fork(*range(6)))

    def test_first_reader_leaves_the_page_in_the_cache(self, both):
        """It reads, and maps the page read-only; the slot is still needed."""
        world, child = both

        # read A 0: majflt 1, pswpin 1; then 2/1, swap cache, not exclusive; child: S
        assert (0, 1, 1) == cost_of(world, lambda: world.process.read(world.at(1), 1))

        assert ("SRSSSS", "SSSSSS") == (states(world), states(child))
        mem, pfn = world.machine.mem, world.pfns().item(1)
        assert (1, 1) == (mem.mapcount.item(pfn), mem.swap.swap_map[child.slots()[1]] & 0xFF)
        assert not mem.flags[pfn] & PG_anon_exclusive

    def test_second_reader_finds_it(self, both):
        """A minor fault: nothing is read, and both map the same page."""
        world, child = both
        world.process.read(world.at(0), 1)

        # c: read A 0: minflt 1, majflt 0; then 3/2
        assert (1, 0, 0) == cost_of(child, lambda: child.process.read(child.at(0), 1))

        assert world.pfns()[0] == child.pfns()[0]
        assert 2 == world.machine.mem.mapcount[world.pfns()[0]]

    def test_writer_gets_a_copy(self, both):
        """In the same fault; what was read stays in the swap cache for the other."""
        world, child = both

        # c: write A 2 5: minflt 0, majflt 1, pswpin 1; later the parent reads it: minor
        assert (0, 1, 1) == cost_of(child, lambda: child.process.write(child.at(2), b"\5"))
        assert ("SSSSSS", "SSWSSS") == (states(world), states(child))

        assert (1, 0, 0) == cost_of(world, lambda: world.process.read(world.at(2), 1))
        assert [2, 5] == [world.contents()[2], child.contents()[2]]

    def test_reader_when_the_other_is_gone(self, both):
        """A page that was read for both and is now found by the last one becomes its own."""
        world, child = both
        child.process.read(child.at(3), 1)
        child.process.exit()

        assert (1, 0, 0) == cost_of(world, lambda: world.process.write(world.at(3), b"\7"))

        assert "SSSWSS" == states(world)
        assert 5 == world.machine.mem.swap.inuse_pages

    def test_store_after_the_other_is_gone(self, both):
        """The page stays in the swap cache until somebody stores; then it is reused as it is."""
        world, child = both
        world.process.read(world.at(1), 1)
        child.process.exit()
        (before,) = world.pfns()[1:2]
        assert world.machine.mem.flags[before] & PG_swapcache

        with world.machine.vmstat.counting("cow_faults") as delta:
            world.process.write(world.at(1), b"\1")

        assert {"cow_faults": 0} == delta
        assert before == world.pfns()[1]
        assert not world.machine.mem.flags[before] & PG_swapcache

    def test_page_out_again(self, both):
        """Both entries become swap entries of one slot; the clean page is not written again."""
        world, child = both
        assert world.intact()
        assert child.intact()

        with world.machine.vmstat.counting("pswpout") as delta:
            assert 6 == child.pageout()

        assert {"pswpout": 0} == delta
        assert ("SSSSSS", "SSSSSS") == (states(world), states(child))
        assert world.slots().tolist() == child.slots().tolist()
        assert world.intact()
        assert child.intact()


class TestLeavingTheCache:
    def cached(self, **options):
        """A page of one process that stays in the swap cache when it is read."""
        world = swapped(count=1, **options)
        vma, slots = world.vma, world.slots()
        read_swap_cache_async(vma, world.addrs, slots)
        return world

    def test_load(self):
        """It is mapped, with the rights of its owner, and keeps its slot."""
        world = self.cached()

        # a page that somebody held while it was paged out: minflt 1; then 2/1 AEB, swap cache
        assert (1, 0, 0) == cost_of(world, lambda: world.process.read(world.addr, 1))

        assert [True] == flags_of(world, PG_swapcache) == flags_of(world, PG_anon_exclusive)
        assert "W" == states(world)

    def test_store(self):
        """It leaves, and its slot is free."""
        world = self.cached()

        assert (1, 0, 0) == cost_of(world, lambda: world.process.write(world.addr, b"x"))

        assert [False] == flags_of(world, PG_swapcache)
        assert 0 == world.machine.mem.swap.inuse_pages

    def test_load_in_locked_memory(self):
        """A page that may not be swapped out needs no slot."""
        world = self.cached()
        world.vma.vm_flags |= VM_LOCKED
        world.process.read(world.addr, 1)
        world.vma.vm_flags &= ~VM_LOCKED

        assert [False] == flags_of(world, PG_swapcache)

    def test_load_while_swap_is_short(self):
        """Slots are wanted by others then."""
        world = self.cached()
        world.machine.mem.swap.inuse_pages += 40
        world.process.read(world.addr, 1)
        world.machine.mem.swap.inuse_pages -= 40

        assert [False] == flags_of(world, PG_swapcache)

    def test_page_that_somebody_holds(self):
        """A reference does not make it less the process's own."""
        world = swapped(count=1)
        read_swap_cache_async(world.vma, world.addrs, world.slots())
        world.hold(world.machine.mem.swap.cache.item(world.slots().item()))

        world.process.write(world.addr, b"x")

        assert [True] == flags_of(world, PG_swapcache) == flags_of(world, PG_anon_exclusive)
        assert "W" == states(world)


class TestAhead:
    def test_pages_are_read_and_not_mapped(self):
        """The faults that follow are minor."""
        world = swapped(count=3)

        assert (0, 0, 2) == cost_of(
            world, lambda: read_swap_cache_async(world.vma, world.addrs[1:], world.slots()[1:])
        )

        assert "SSS" == states(world)
        assert (2, 1, 0) == cost_of(world, world.intact)  # page 0 is zeros

    def test_slot_that_two_addresses_share(self):
        """One page is read for both, one after the other."""
        world = swapped(count=2)
        slots = world.slots()[[0, 0]]

        read_swap_cache_async(world.vma, world.addrs, slots)

        assert 1 == world.machine.vmstat["nr_swapcached"]
        assert world.intact()


class TestFailures:
    def test_slot_that_cannot_be_read(self):
        """SIGBUS there, nowhere else; once the slot can be read again so can the page."""
        world = swapped()
        errors = world.machine.mem.swap.read_errors
        errors.add(world.slots().item(1))

        with pytest.raises(BusError) as error:
            world.process.read(world.addr, world.nbytes)
        assert world.at(1) == error.value.address
        assert "WSW" == states(world)
        assert 0 == world.machine.vmstat["nr_swapcached"]

        errors.clear()
        assert world.intact()

    def test_no_frame(self):
        """Where memory and swap are full a load fails, and the page stays in swap."""
        world = mapped_range(pages=1, swap="8KiB", nodes=("1MiB",), memory="64KiB")
        world.pageout()
        addr = world.process.mmap("1MiB")

        with pytest.raises(OutOfMemory):
            world.process.touch(addr, "1MiB")
        with pytest.raises(OutOfMemory):
            world.process.read(world.addr, 1)

        assert "S" == states(world)
        world.process.munmap(addr, "1MiB")
        assert world.intact()

    @pytest.mark.parametrize("entry", [swp_entry(1, pages(1)), make_swap_entry(pages(64))])
    def test_entry_of_no_slot(self, entry):
        """An entry that no slot stands behind is a bug, and the message shows it."""
        world = mapped_range(pages=1, swap=SWAP)
        (before,) = world.ptes()
        world.rewrite([0], lambda ptes: entry)

        with pytest.raises(KernelBug, match=f"bad page table entry {entry[0]:#x} at"):
            world.process.read(world.addr, 1)

        world.rewrite([0], lambda ptes: np.array([before]))


class TestLru:
    def test_page_that_went_long_ago_comes_back_inactive(self):
        """Its place among the active ones it has to earn."""
        world = swapped(count=2)
        world.machine.mem.nodes[0].inactive_age += 1000
        world.process.read(world.at(0), 1)

        assert not world.machine.mem.flags[world.pfns()[0]] & PG_active


class TestInterleavings:
    def in_every_order(self, scenario, **options):
        """Run scenario(world, child, together) under all schedules with one preemption."""

        def one(together):
            world = swapped(count=2, nodes=("2MiB",), memory="64KiB")
            scenario(world, together)
            world.machine.verify()

        explore(one, preemptions=1, **options)

    def test_two_loads_of_one_process(self):
        """Two CPUs fault on the same page: it is read, and each sees its bytes."""

        def scenario(world, together):
            contents = together(world.contents, world.contents)
            assert [[0, 1], [0, 1]] == contents

        self.in_every_order(scenario)

    def test_loads_of_two_processes(self):
        """Both end with the same page, read once."""

        def scenario(world, together):
            child = world.seen_by(world.fork(0, 1))
            with world.machine.vmstat.counting("pswpin") as delta:
                assert [[0, 1], [0, 1]] == together(world.contents, child.contents)
            assert {"pswpin": 1} == delta  # page 0 is zeros
            assert world.pfns().tolist() == child.pfns().tolist()
            child.process.exit()

        self.in_every_order(scenario)

    def test_stores_of_two_processes(self):
        """Each has its own bytes in the end."""

        def scenario(world, together):
            child = world.seen_by(world.fork(0, 1))
            together(
                lambda: world.process.write(world.addr, b"a"),
                lambda: child.process.write(child.addr, b"b"),
            )
            assert [b"a\0", b"b\0"] == [w.process.read(w.addr, 2) for w in (world, child)]
            child.process.exit()

        self.in_every_order(scenario)

    def test_store_beside_page_out(self):
        """A store is not lost, whether it comes before, between or after."""

        def scenario(world, together):
            world.process.read(world.addr, world.nbytes)
            together(lambda: world.process.write(world.addr, b"x"), world.pageout)
            assert b"x\0" == world.process.read(world.addr, 2)
            assert [ord("x"), 1] == world.contents()

        self.in_every_order(scenario)

    def test_load_beside_munmap_of_the_other(self):
        """The slot goes with the last who needs it, and the page stays whole."""

        def scenario(world, together):
            child = world.seen_by(world.fork(0, 1))
            contents, _ = together(world.contents, child.process.exit)
            assert [0, 1] == contents

        self.in_every_order(scenario)

    def test_migration_beside_page_out(self):
        """A page goes to the device or to swap; its bytes come back from there."""

        def scenario(world, together):
            world.process.read(world.addr, world.nbytes)
            together(
                lambda: world.gpu.to_device(world.process, world.addr, world.nbytes),
                world.pageout,
            )
            assert world.intact()

        self.in_every_order(scenario)
