"""Pins and references: what holds pages in place, whatever becomes of their mapping."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import NumpyDevice
from mm import BusError, InputOutputError, InvalidArgument, OutOfMemory, SegmentationFault
from mm.gup import mm_populate
from mm.page_alloc import nr_free_pages
from mm.page_flags import PG_anon_exclusive, PG_dirty, PG_referenced
from mm.pgtable import pte_dirty, pte_present, pte_soft_dirty, pte_special, pte_write
from mm.rmap import page_mapped
from mm.swap import GUP_PIN_COUNTING_BIAS, lru_add_drain_all, page_maybe_dma_pinned
from mm.swapops import SWP_SOFT_DIRTY, is_device_private_entry, is_write_device_private_entry
from mm.types import VM_IO, VM_MAYREAD, VM_MAYWRITE, VM_PFNMAP, VM_SOFTDIRTY
from mm.typing import PAGE_SIZE
from tests.files import mapped_file
from tests.interleave import explore
from tests.mm.test_rmap import migrating
from tests.reference import gup as twin
from tests.world import ended_worlds, mapped_range


def contents(world, pin):
    """The first byte of each pinned page, as a device reads it by DMA."""
    return world.machine.mem.payload[pin.pfns, 0].tolist()


def faults_of(world, call):
    """How many minor faults *call* takes."""
    before = world.process.min_flt
    call()
    return world.process.min_flt - before


def own(world):
    """Which pages of the range are the process's alone."""
    mem, pfns = world.machine.mem, world.pfns()
    return [pfn >= 0 and bool(mem.flags[pfn] & PG_anon_exclusive) for pfn in pfns.tolist()]


class TestPin:
    def test_each_page_once(self):
        """A range that begins and ends within pages holds those too."""
        world = mapped_range(pages=5)
        before = world.machine.mem.refcount[world.pfns()]

        with world.process.pin(world.at(2) - 1, PAGE_SIZE + 2) as pin:
            held = (world.machine.mem.refcount[world.pfns()] - before) // GUP_PIN_COUNTING_BIAS
            world.machine.verify()

        assert [0, 1, 1, 1, 0] == held.tolist()
        assert world.pfns()[1:4].tolist() == pin.pfns.tolist()
        assert before.tolist() == world.machine.mem.refcount[world.pfns()].tolist()

    def test_told_from_references(self):
        """A pin raises the count by so much that it is seen: 1024, as in Linux."""
        world = mapped_range(pages=3)
        mem, before = world.machine.mem, world.machine.mem.refcount[world.pfns()]

        with (
            world.process.pin(world.at(0), PAGE_SIZE),
            world.process.pin(world.at(1), PAGE_SIZE, plain=True),
        ):
            assert [1024, 1, 0] == (mem.refcount[world.pfns()] - before).tolist()
            assert [True, False, False] == page_maybe_dma_pinned(mem, world.pfns()).tolist()

    def test_counters(self):
        """Every pin is counted when it is taken and when it is let go."""
        world = mapped_range(pages=3)

        with world.machine.vmstat.counting() as delta:
            world.process.pin(world.addr, 2 * PAGE_SIZE).release()
            world.process.pin(world.addr, world.nbytes, plain=True).release()

        assert {"nr_foll_pin_acquired": 2, "nr_foll_pin_released": 2} == delta

    def test_faults_in_what_is_missing(self):
        """A pin for writing leaves every page as one that can be written."""
        world = mapped_range(pages=3, filled=False)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)

        with world.process.pin(world.addr, world.nbytes) as pin:
            assert pte_write(world.ptes()).all()
            assert world.pfns().tolist() == pin.pfns.tolist()

    def test_pages_in_device_memory_come_back(self):
        """A pin is a CPU access: one fault for each of them."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        pins = []
        assert 1 == faults_of(world, lambda: pins.append(world.process.pin(world.at(1), PAGE_SIZE)))

        with pins.pop() as pin:
            assert [True, False, True] == is_device_private_entry(world.ptes()).tolist()
            assert [1] == contents(world, pin)

    def test_pinned_twice(self):
        """Each pin has its own references."""
        world = mapped_range(pages=1)
        one, two = (world.process.pin(world.addr, PAGE_SIZE) for _ in range(2))

        one.release()
        world.process.munmap(world.addr, PAGE_SIZE)

        assert [0] == contents(world, two)
        two.release()

    def test_no_page(self):
        """A pin of nothing holds nothing."""
        world = mapped_range(pages=1)

        with world.process.pin(world.addr, 0) as pin:
            assert 0 == pin.pfns.size

    def test_several_areas(self):
        """A range may cross borders between areas with other rights."""
        world = mapped_range(pages=3)
        world.process.mmap(PAGE_SIZE, "r", addr=world.at(1))

        with world.process.pin(world.addr, world.nbytes, write=False) as pin:
            assert world.pfns().tolist() == pin.pfns.tolist()

    def test_plain_reference_that_lasts(self):
        """Only pins may last long."""
        world = mapped_range(pages=1)

        with pytest.raises(InvalidArgument, match="FOLL_LONGTERM goes with a pin"):
            world.process.pin(world.addr, PAGE_SIZE, longterm=True, plain=True)


class TestUnsharing:
    def test_zero_page_for_a_while(self):
        """It stays anyway, so a pin does not count it; a plain reference does."""
        world = mapped_range(pages=3, filled=False)
        world.process.write(world.at(1), b"x")
        mem = world.machine.mem

        with world.process.pin(world.addr, world.nbytes, write=False) as pin:
            assert [True, False, True] == pte_special(world.ptes()).tolist()
            assert world.pfns().tolist() == pin.pfns.tolist()
            assert 1 == mem.refcount[mem.zero_pfn]
        with world.process.pin(world.addr, world.nbytes, write=False, plain=True):
            assert 3 == mem.refcount[mem.zero_pfn]
            world.machine.verify()

    def test_zero_page_for_long(self):
        """The process gets pages of its own, still read-only, by two faults each."""
        world = mapped_range(pages=2, filled=False)
        pins = []

        def pin():
            pins.append(world.process.pin(world.addr, world.nbytes, write=False, longterm=True))

        assert 4 == faults_of(world, pin)
        assert [True, True] == own(world)
        assert not pte_write(world.ptes()).any()
        assert not pte_special(world.ptes()).any()
        pins.pop().release()

    def test_zero_page_that_cannot_be_stored_to(self):
        """A mapping that will never be writable keeps the zero page for good."""
        world = mapped_range(pages=1, prot="r", filled=False)
        world.vma.vm_flags &= ~VM_MAYWRITE

        with world.process.pin(world.addr, PAGE_SIZE, write=False, longterm=True):
            assert pte_special(world.ptes()).all()

    @pytest.mark.parametrize(("plain", "faults"), [(False, 1), (True, 0)])
    def test_shared_page_for_reading(self, plain, faults):
        """A pin gets a copy, so that it sees what the process stores later."""
        world = mapped_range(pages=2)
        world.fork(0, 1)
        shared = world.pfns().tolist()
        pins = []

        assert faults == faults_of(
            world,
            lambda: pins.append(world.process.pin(world.addr, PAGE_SIZE, write=False, plain=plain)),
        )

        assert plain == (shared[0] == world.pfns()[0])
        assert [not plain, False] == own(world)
        assert [False, False] == pte_write(world.ptes()).tolist()
        world.process.write(world.addr, b"\7")
        assert [0 if plain else 7] == contents(world, pins[0])
        pins.pop().release()

    def test_pages_of_a_file_for_long(self):
        """A private mapping that was only read is copied, as the file is not to be pinned."""
        world = mapped_file(pages=3).private()
        assert world.intact()

        with world.process.pin(world.addr, world.nbytes, write=False, longterm=True) as pin:
            assert world.pfns().tolist() == pin.pfns.tolist()
            assert [True] * 3 == own(world)
            assert not set(pin.pfns.tolist()) & set(world.cache().tolist())
        assert world.intact()

    def test_sole_owner(self):
        """A page that others have left is the process's own again, without a copy."""
        world = mapped_range(pages=1)
        world.fork(0).exit()
        before = world.pfns()

        with world.process.pin(world.addr, PAGE_SIZE, write=False) as pin:
            assert before.tolist() == pin.pfns.tolist()
            assert [True] == own(world)
            assert not pte_write(world.ptes()).any()


class TestRights:
    @pytest.mark.parametrize("prot", ["r", "-"])
    def test_writing(self, prot):
        """A pin for writing needs the right to write."""
        world = mapped_range(pages=1, prot=prot, filled=False)

        with pytest.raises(SegmentationFault):
            world.process.pin(world.addr, PAGE_SIZE)

    @pytest.mark.parametrize("prot", ["w", "x", "-"])
    def test_reading(self, prot):
        """A pin for reading needs the right to read, where a CPU reads what it may write."""
        world = mapped_range(pages=1, prot=prot, filled=False)

        with pytest.raises(SegmentationFault, match="is not allowed by"):
            world.process.pin(world.addr, PAGE_SIZE, write=False)

    @pytest.mark.parametrize("flag", [VM_IO, VM_PFNMAP])
    def test_memory_of_a_driver(self, flag):
        """There is no page behind it, whoever asks."""
        world = mapped_range(pages=1)
        world.vma.vm_flags |= flag

        for force in (False, True):
            with pytest.raises(SegmentationFault):
                world.process.pin(world.addr, PAGE_SIZE, force=force)

    @pytest.mark.parametrize(("flag", "write"), [(VM_MAYREAD, False), (VM_MAYWRITE, True)])
    def test_what_nobody_may(self, flag, write):
        """Force passes over what a mapping forbids now, not over what it can never allow."""
        world = mapped_range(pages=1, prot="-", filled=False)
        world.vma.vm_flags &= ~flag

        with pytest.raises(SegmentationFault):
            world.process.pin(world.addr, PAGE_SIZE, write=write, force=True)

    def test_force_for_reading(self):
        """A debugger reads what the process may not."""
        world = mapped_range(pages=2)
        world.protect("-")

        with world.process.pin(world.addr, world.nbytes, write=False, force=True) as pin:
            assert [0, 1] == contents(world, pin)


class TestRelease:
    def test_twice(self):
        """The second call does nothing."""
        world = mapped_range(pages=2)
        pin = world.process.pin(world.addr, world.nbytes)

        pin.release()
        pin.release()

        world.machine.verify()

    def test_last_reference(self):
        """A pinned page outlives its mapping, bytes and all, until it is released."""
        world = mapped_range(pages=3)
        free = nr_free_pages(world.machine.mem)
        pin = world.process.pin(world.addr, world.nbytes)
        world.process.munmap(world.addr, world.nbytes)

        assert [0, 1, 2] == contents(world, pin)
        assert not page_mapped(world.machine.mem, pin.pfns).any()
        world.machine.verify()
        pin.release()

        assert free + 3 == world.machine.nr_free_pages

    def test_outlives_the_process(self):
        """Also where the process has gone."""
        world = mapped_range(pages=2)
        pin = world.process.pin(world.addr, world.nbytes)

        world.process.exit()

        assert [0, 1] == contents(world, pin)
        world.machine.verify()
        pin.release()

    @pytest.mark.parametrize(
        ("how", "dirty", "marked"),
        [({}, True, True), ({}, False, False), ({"write": False}, True, False)],
    )
    def test_what_was_stored(self, how, dirty, marked):
        """Pages held for writing have changed, unless who held them knows better."""
        world = mapped_range(pages=1)

        world.process.pin(world.addr, PAGE_SIZE, **how).release(dirty=dirty)

        assert marked == bool(world.machine.mem.flags[world.pfns()[0]] & PG_dirty)

    def test_touched(self):
        """A plain reference counts as use of the page, a pin does not."""
        world = mapped_range(pages=2)

        world.process.pin(world.at(0), PAGE_SIZE, plain=True, write=False).release()
        world.process.pin(world.at(1), PAGE_SIZE, write=False).release()

        used = (world.machine.mem.flags[world.pfns()] & PG_referenced) != 0
        assert [True, False] == used.tolist()


class TestFailure:
    def test_hole_in_the_range(self):
        """A pin is whole or not at all: nothing stays held."""
        world = mapped_range(pages=3)
        world.process.munmap(world.at(1), PAGE_SIZE)
        before = world.machine.mem.refcount.tolist()

        with pytest.raises(SegmentationFault) as error:
            world.process.pin(world.addr, world.nbytes)

        assert world.at(1) == error.value.address
        assert [] == world.machine.mem.pins
        assert before == world.machine.mem.refcount.tolist()

    def test_pages_before_it_are_faulted_in(self):
        """As by a CPU that went there page by page."""
        world = mapped_range(pages=3, filled=False)
        world.process.munmap(world.at(2), PAGE_SIZE)

        with pytest.raises(SegmentationFault):
            world.process.pin(world.addr, world.nbytes)

        assert [True, True, False] == pte_present(world.ptes()).tolist()

    def test_out_of_memory(self):
        """What was held until then is let go."""
        world = mapped_range(pages=512, filled=False, nodes=("1MiB",))

        with pytest.raises(OutOfMemory):
            world.process.pin(world.addr, world.nbytes)

        assert [] == world.machine.mem.pins
        world.machine.verify()

    def test_lost_page(self):
        """Contents that are lost cannot be pinned; what follows them is let go."""

        class Losing(NumpyDevice):
            def copy_out(self, pages, system, rows):
                return rows >= 0

        world = mapped_range(pages=3)
        Losing(world.machine, "64KiB").to_device(world.process, world.at(1), PAGE_SIZE)

        with pytest.raises(BusError) as error:
            world.process.pin(world.addr, world.nbytes)

        assert world.at(1) == error.value.address
        assert [] == world.machine.mem.pins

    def test_process_that_is_gone(self):
        """It has no memory to hold."""
        world = mapped_range(pages=1)
        world.process.exit()

        with pytest.raises(InvalidArgument, match="has exited"):
            world.process.pin(world.addr, PAGE_SIZE)


class TestPopulate:
    def test_without_references(self):
        """Pages that shall only be there are held by nobody."""
        world = mapped_range(pages=3, filled=False)

        mm_populate(world.process.mm, world.addr, world.nbytes)

        lru_add_drain_all(world.machine.mem)
        assert [1, 1, 1] == world.machine.mem.refcount[world.pfns()].tolist()
        assert [] == world.machine.mem.pins

    def test_what_cannot_be_there_is_passed_over(self):
        """Holes, and memory that nobody may access."""
        world = mapped_range(pages=5, filled=False)
        world.process.munmap(world.at(1), PAGE_SIZE)
        world.process.mprotect(world.at(3), PAGE_SIZE, "-")

        mm_populate(world.process.mm, world.addr, world.nbytes)

        assert [True, False, True, False, True] == pte_present(world.ptes()).tolist()

    def test_what_cannot_be_there_is_told(self):
        """The same for who wants to know: it ends there."""
        world = mapped_range(pages=3, filled=False)
        world.process.mprotect(world.at(1), PAGE_SIZE, "-")

        with pytest.raises(SegmentationFault, match="is not allowed by"):
            mm_populate(world.process.mm, world.addr, world.nbytes, ignore_errors=False)

        assert [True, False, False] == pte_present(world.ptes()).tolist()

    @pytest.mark.parametrize("flag", [VM_IO, VM_PFNMAP])
    def test_memory_of_a_driver(self, flag):
        """It has no pages to bring, and no fault goes there."""
        world = mapped_range(pages=2, filled=False)
        world.vma.vm_flags |= flag

        mm_populate(world.process.mm, world.addr, world.nbytes, ignore_errors=False)

        assert not pte_present(world.ptes()).any()

    def test_changed_for_reclaim(self):
        """What is there for stores counts as changed: reclaim may not drop it."""
        world = mapped_range(pages=1)
        world.clear_refs(0)
        world.machine.mem.flags[world.pfns()] &= ~PG_dirty

        mm_populate(world.process.mm, world.addr, world.nbytes)

        assert (world.machine.mem.flags[world.pfns()] & PG_dirty).all()


class TestMemRead:
    def test_whatever_the_rights(self):
        """A debugger reads memory that the process may not touch."""
        world = mapped_range(pages=3)
        world.protect("-")

        assert bytes([0, 1]) == world.process.mem_read(world.at(1) - 1, 2)

    def test_device_memory(self):
        """Pages come back one by one, by a fault each [hand/25, i=4]."""
        world = mapped_range(pages=4)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert 1 == faults_of(world, lambda: world.process.mem_read(world.at(0), 8))
        assert [False, True, True, True] == is_device_private_entry(world.ptes()).tolist()

    def test_untouched(self):
        """A hole reads as zeros."""
        world = mapped_range(pages=2, filled=False)

        assert bytes(world.nbytes) == world.process.mem_read(world.addr, world.nbytes)
        assert pte_special(world.ptes()).all()

    def test_more_than_it_holds_at_once(self):
        """A long range is read in pieces, each with its own bytes."""
        world = mapped_range(pages=1_030)

        data = world.process.mem_read(world.addr + 5, world.nbytes - 7)

        assert world.process.read(world.addr + 5, world.nbytes - 7) == data
        assert [] == world.machine.mem.pins

    def test_up_to_a_hole(self):
        """What came before it is the answer."""
        world = mapped_range(pages=3)
        world.process.munmap(world.at(2), PAGE_SIZE)

        assert bytes([1] * 10) == world.process.mem_read(world.at(2) - 10, 20)

    def test_nothing_there(self):
        """EIO where not one byte is to be had, and no bytes where none are asked for."""
        world = mapped_range(pages=1)
        world.process.munmap(world.addr, PAGE_SIZE)

        with pytest.raises(InputOutputError, match="has no page to use"):
            world.process.mem_read(world.addr, 8)
        assert b"" == world.process.mem_read(world.addr, 0)

    def test_without_contents(self):
        """There is nothing to read on a machine that keeps no bytes."""
        world = mapped_range(pages=1, payload=False)

        with pytest.raises(InvalidArgument, match="keeps no contents"):
            world.process.mem_read(world.addr, 8)


class TestMemWrite:
    def test_read_only_page(self):
        """The page stays read-only for the process [hand/25, i=9 and 13]."""
        world = mapped_range(pages=2)
        world.protect("r")
        before = world.pfns().tolist()

        assert 3 == world.process.mem_write(world.at(1), b"abc")

        assert b"abc\1" == world.process.read(world.at(1), 4)
        assert before == world.pfns().tolist()
        assert not pte_write(world.ptes()).any()

    def test_device_page_without_a_right(self):
        """One fault brings it back; the second look needs none [hand/25, i=13]."""
        world = mapped_range(pages=1)
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)
        world.protect("-")

        assert 1 == faults_of(world, lambda: world.process.mem_write(world.addr, b"x"))
        assert not pte_write(world.ptes()).any()
        world.protect("r")
        assert b"x" == world.process.read(world.addr, 1)

    def test_shared_page(self):
        """The process gets a copy; who else maps the page keeps it."""
        world = mapped_range(pages=1)
        child = world.fork(0)
        world.protect("r")

        world.process.mem_write(world.addr, b"mine")

        assert b"mine" == world.process.read(world.addr, 4)
        assert bytes(4) == child.read(world.addr, 4)
        assert [True] == own(world)

    def test_zero_page(self):
        """It is never stored to."""
        world = mapped_range(pages=1, prot="r", filled=False)
        world.process.read(world.addr, 1)

        world.process.mem_write(world.addr, b"x")

        assert b"x" == world.process.read(world.addr, 1)
        assert not world.machine.mem.payload[world.machine.mem.zero_pfn].any()
        assert pte_dirty(world.ptes()).all()

    @pytest.mark.parametrize(("watched", "faults"), [(False, 1), (True, 2)])
    def test_untouched_page_of_a_read_only_mapping(self, watched, faults):
        """A second fault notes the change where somebody watches for changes."""
        world = mapped_range(pages=1, prot="r", filled=False)
        if watched:
            world.vma.vm_flags &= ~VM_SOFTDIRTY

        assert faults == faults_of(world, lambda: world.process.mem_write(world.addr, b"x"))
        assert watched == bool(pte_soft_dirty(world.ptes()).all())

    def test_changed(self):
        """Reclaim may not take the page for clean, nor drop it."""
        world = mapped_range(pages=1)
        world.clear_refs(0)

        world.process.mem_write(world.addr, b"x")

        assert world.machine.mem.flags[world.pfns()[0]] & PG_dirty

    def test_up_to_a_hole(self):
        """What fits before it is written, and counted."""
        world = mapped_range(pages=3)
        world.process.munmap(world.at(2), PAGE_SIZE)

        assert 10 == world.process.mem_write(world.at(2) - 10, b"x" * 20)
        assert b"\1" + b"x" * 10 == world.process.read(world.at(2) - 11, 11)

    def test_nothing_there(self):
        """EIO where not one byte can be written."""
        world = mapped_range(pages=1)
        world.process.munmap(world.addr, PAGE_SIZE)

        with pytest.raises(InputOutputError):
            world.process.mem_write(world.addr, b"x")
        assert 0 == world.process.mem_write(world.addr, b"")


SPOTS = st.sampled_from(["none", "zero", "own", "own ro", "clean", "shared", "device", "device ro"])
WISHES = st.builds(
    twin.Wish,
    write=st.booleans(),
    pin=st.booleans(),
    longterm=st.booleans(),
    force=st.booleans(),
).filter(lambda wish: wish.pin or not wish.longterm)


class TestAgainstTwin:
    """Every mixture of pages, rights and wishes, against tests/reference/gup.py."""

    @given(
        spots=st.lists(SPOTS, min_size=1, max_size=8),
        prot=st.sampled_from(["rw", "r", "-"]),
        unwatched=st.booleans(),
        wish=WISHES,
    )
    def test_each_page_is_held_as_it_should(self, spots, prot, unwatched, wish):
        """Faults, entries, owners and bytes are what the kernel's loop makes of each page."""
        with ended_worlds():
            world = populate(spots, prot, unwatched)
            hold_and_compare(world, twin.Area("r" in prot, "w" in prot, unwatched), wish)


def populate(spots, prot, unwatched):
    """A range with a page of each kind in *spots*, whose contents are its place."""
    world = mapped_range(pages=len(spots), filled=False)
    for page, spot in enumerate(spots):
        if spot == "zero":
            world.process.touch(world.at(page), PAGE_SIZE, write=False)
        elif spot != "none":
            world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)
        if spot.startswith("device"):
            world.gpu.to_device(world.process, world.at(page), PAGE_SIZE)
        if spot.endswith("ro"):
            world.write_protect(page)
        if spot == "clean":
            world.write_protect(page)
            world.clear_refs(page)
    if "shared" in spots:
        world.fork(*(page for page, spot in enumerate(spots) if spot == "shared"))
    if prot != "rw":
        world.protect(prot)
    if not unwatched:
        world.vma.vm_flags &= ~VM_SOFTDIRTY
    return world


def seen(world):
    """The pages of *world* as the twin describes them."""
    ptes, present = world.ptes(), pte_present(world.ptes())
    found = []
    for i, page_is_own in enumerate(own(world)):
        pte = ptes[i : i + 1]
        if not pte[0]:
            found.append(twin.Spot("none"))
        elif not present[i]:
            write = bool(is_write_device_private_entry(pte)[0])
            soft = bool(pte[0] & SWP_SOFT_DIRTY)
            found.append(twin.Spot("device", write, soft_dirty=soft, own=page_is_own))
        elif pte_special(pte)[0]:
            found.append(twin.Spot("zero"))
        else:
            bits = (bool(bit(pte)[0]) for bit in (pte_write, pte_dirty, pte_soft_dirty))
            found.append(twin.Spot("mapped", *bits, own=page_is_own))
    return found


def hold_and_compare(world, area, wish):
    before, pfns, faults = seen(world), world.pfns().tolist(), world.process.min_flt
    how = {"longterm": wish.longterm, "force": wish.force, "plain": not wish.pin}
    if not twin.allowed(area, wish):
        with pytest.raises(SegmentationFault):
            world.process.pin(world.addr, world.nbytes, write=wish.write, **how)
        assert (before, faults) == (seen(world), world.process.min_flt)
        return
    expected = [twin.get_page(spot, area, wish) for spot in before]
    with world.process.pin(world.addr, world.nbytes, write=wish.write, **how) as pin:
        after = [
            replace(spot, new=pfn != was)
            for spot, pfn, was in zip(seen(world), pin.pfns.tolist(), pfns, strict=True)
        ]
        assert [spot for spot, _ in expected] == after
        assert sum(count for _, count in expected) == world.process.min_flt - faults
        full = [spot.kind not in ("none", "zero") for spot in before]
        assert [page * stored for page, stored in enumerate(full)] == contents(world, pin)
        world.machine.verify()


class TestRaces:
    """Every schedule of a few preemptions."""

    def test_pin_against_munmap(self):
        """Either the pin has the page, with its bytes, or the range is gone."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            free = world.machine.nr_free_pages
            process = world.machine.spawn("racer")
            addr = process.mmap(PAGE_SIZE)
            process.write(addr, b"x" * PAGE_SIZE)

            pin, _ = together(
                lambda: pin_or_none(process, addr), lambda: process.munmap(addr, PAGE_SIZE)
            )

            outcomes.add(pin and bytes(contents(world, pin)))
            if pin is not None:
                pin.release()
            process.exit()
            assert free == world.machine.nr_free_pages

        outcomes = set()
        assert 20 < explore(scenario)
        assert {b"x", None} == outcomes

    def test_pin_against_first_touch(self):
        """The page that is pinned is the page that is mapped."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            process = world.machine.spawn("racer")
            addr = process.mmap(PAGE_SIZE)

            pin, _ = together(
                lambda: process.pin(addr, PAGE_SIZE), lambda: process.write(addr, b"x")
            )

            assert [ord("x")] == contents(world, pin)
            assert [1025] == (
                world.machine.mem.refcount[pin.pfns] - in_pagevec(world, pin)
            ).tolist()
            pin.release()
            process.exit()

        assert 20 < explore(scenario)

    def test_pinned_page_under_migration(self):
        """Pages that are on the move are waited for; here, by nobody."""
        world = mapped_range(pages=2)

        with migrating(world), pytest.raises(OSError, match="is locked by the thread that waits"):
            world.process.pin(world.addr, world.nbytes)

        assert [] == world.machine.mem.pins


def pin_or_none(process, addr):
    try:
        return process.pin(addr, PAGE_SIZE)
    except SegmentationFault:
        return None


def in_pagevec(world, pin):
    waiting = world.machine.mem.pagevecs[0].live().tolist()
    return [waiting.count(pfn) for pfn in pin.pfns.tolist()]
