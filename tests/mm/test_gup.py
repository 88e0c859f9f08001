"""Pins: references that hold pages in place, whatever becomes of their mapping."""

import pytest

from devices import NumpyDevice
from mm import BusError, OutOfMemory, SegmentationFault
from mm.page_alloc import nr_free_pages
from mm.pgtable import pte_special, pte_write
from mm.rmap import page_mapped
from mm.swapops import is_device_private_entry
from mm.typing import PAGE_SIZE
from tests.interleave import explore
from tests.mm.test_rmap import migrating
from tests.world import mapped_range


def contents(world, pin):
    """The first byte of each pinned page, as a device reads it by DMA."""
    return world.machine.mem.payload[pin.pfns, 0].tolist()


class TestPin:
    def test_one_reference_a_page(self):
        """A range that begins and ends within pages holds those too."""
        world = mapped_range(pages=5)
        before = world.machine.mem.refcount[world.pfns()]

        with world.process.pin(world.at(2) - 1, PAGE_SIZE + 2) as pin:
            held = world.machine.mem.refcount[world.pfns()] - before
            world.machine.verify()

        assert [0, 1, 1, 1, 0] == held.tolist()
        assert world.pfns()[1:4].tolist() == pin.pfns.tolist()
        assert before.tolist() == world.machine.mem.refcount[world.pfns()].tolist()

    def test_faults_in_what_is_missing(self):
        """A pin for writing leaves every page as one that can be written."""
        world = mapped_range(pages=3, filled=False)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)

        with world.process.pin(world.addr, world.nbytes) as pin:
            assert pte_write(world.ptes()).all()
            assert 3 == pin.pfns.size

    def test_for_reading(self):
        """The zero page needs no reference: it stays anyway."""
        world = mapped_range(pages=3, filled=False)
        world.process.write(world.at(1), b"x")

        with world.process.pin(world.addr, world.nbytes, write=False) as pin:
            assert [world.pfns()[1]] == pin.pfns.tolist()
            assert [True, False, True] == pte_special(world.ptes()).tolist()

    def test_pages_in_device_memory_come_back(self):
        """A pin is a CPU access."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        with world.process.pin(world.at(1), PAGE_SIZE) as pin:
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

    @pytest.mark.parametrize("prot", ["r", "-"])
    def test_rights(self, prot):
        """A pin for writing needs the right to write."""
        world = mapped_range(pages=1, prot=prot, filled=False)

        with pytest.raises(SegmentationFault):
            world.process.pin(world.addr, PAGE_SIZE)

    def test_out_of_memory(self):
        """What was held until then is let go."""
        world = mapped_range(pages=512, filled=False, nodes=("1MiB",))

        with pytest.raises(OutOfMemory):
            world.process.pin(world.addr, world.nbytes)

        assert [] == world.machine.mem.pins
        world.machine.verify()

    def test_lost_page(self):
        """Contents that are lost cannot be pinned."""

        class Losing(NumpyDevice):
            def copy_out(self, pages, system, rows):
                return rows >= 0

        world = mapped_range(pages=2)
        Losing(world.machine, "64KiB").to_device(world.process, world.at(1), PAGE_SIZE)

        with pytest.raises(BusError):
            world.process.pin(world.addr, world.nbytes)

        assert [] == world.machine.mem.pins


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
            assert [2] == (world.machine.mem.refcount[pin.pfns] - in_pagevec(world, pin)).tolist()
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
