"""From one device's memory straight to another's, whatever kinds the two are."""

import numpy as np
import pytest

from devices import NumpyDevice, Wrapper, migrate_between
from mm import PAGE_SIZE, BusError, InvalidArgument, InvalidRange, Machine
from mm.pgtable import pte_present
from tests.world import in_step, mapped_range

KINDS = [(a, b) for a in ("private", "public") for b in ("private", "public")]


def two_devices(source, target, pages=5, memory="64KiB", **options):
    """A range in the memory of `world.gpu`, of kind *source*, and `world.other`, of *target*."""
    world = mapped_range(pages, kind=source, **options)
    world.other = NumpyDevice(world.machine, memory, target, name="other", chunk="64KiB")
    world.gpu.to_device(world.process, world.addr, world.nbytes)
    return world


class Forgets(Wrapper):
    """Loses the second page of each copy out."""

    def call(self, op, *args):
        answer = super().call(op, *args)
        return np.arange(args[0].size) == 1 if op == "copy_out" else answer


def between(world):
    """Migrate the whole range to the other device."""
    return migrate_between(world.gpu, world.other, world.process, world.addr, world.nbytes)


def places(world, seen=None):
    """Where each page is, as *seen* by the process of another world: gpu, other, system or none."""
    names = {world.gpu.zone.index: "gpu", world.other.zone.index: "other"}
    zones = world.machine.mem.zone
    pfns = (seen or world).pfns().tolist()
    return [names.get(zones[pfn], "system") if pfn >= 0 else "none" for pfn in pfns]


class TestBetween:
    @pytest.mark.parametrize(("source", "target"), KINDS)
    def test_contents(self, source, target):
        """Everything is there afterwards, no frame was used, and nobody faulted."""
        world = two_devices(source, target)
        free, faults = world.machine.nr_free_pages, world.process.min_flt

        assert 5 == between(world).migrated

        assert ["other"] * 5 == places(world)
        assert [target == "public"] * 5 == pte_present(world.ptes()).tolist()
        assert (free, faults) == (world.machine.nr_free_pages, world.process.min_flt)
        assert (1024, 16 - 5) == (world.gpu.chunks.free_pages, world.other.chunks.free_pages)
        assert in_step(world.other)
        assert b"\3" == world.other.read(world.process, world.at(3), 1)
        assert 0 == world.other.stats.device_faults
        world.machine.verify()
        assert world.intact()

    @pytest.mark.parametrize(("source", "target"), KINDS)
    def test_what_a_device_had_mapped(self, source, target):
        """The first device forgets the pages, and reaches them where they are if it can."""
        world = two_devices(source, target)
        world.gpu.write(world.process, world.at(1), b"\x11")
        between(world)

        assert in_step(world.gpu)
        assert b"\x11" == world.gpu.read(world.process, world.at(1), 1)
        assert 1 == world.gpu.stats.device_faults

    @pytest.mark.parametrize(("source", "target"), KINDS)
    def test_every_process(self, source, target):
        """What two processes share moves for both."""
        world = two_devices(source, target)
        child = world.seen_by(world.process.fork())
        child.process.write(child.at(0), b"\x77")

        moved = between(world)

        assert moved.migrated == places(world).count("other")
        assert places(world)[1:] == places(world, child)[1:]
        assert world.intact()
        assert [0x77, 1, 2, 3, 4] == child.contents()

    @pytest.mark.parametrize(("source", "target"), KINDS)
    def test_rights(self, source, target):
        """What may not be stored to may not be there either."""
        world = two_devices(source, target)
        world.process.mprotect(world.addr, world.nbytes, "r")
        between(world)

        assert ["other"] * 5 == places(world)
        with pytest.raises(OSError, match="not allowed"):
            world.other.write(world.process, world.addr, b"x")

    def test_only_what_the_source_has(self):
        """Pages of the system, holes and pages of third devices stay."""
        world = two_devices("private", "private", pages=6)
        third = NumpyDevice(world.machine, "64KiB", name="third")
        world.gpu.to_system(world.process, world.at(0), 3 * PAGE_SIZE)
        third.to_device(world.process, world.at(1), PAGE_SIZE)
        world.process.madvise(world.at(2), PAGE_SIZE, "dontneed")

        moved = between(world)

        assert (3, {}) == (moved.migrated, {k: n for k, n in moved.stayed.items() if n})
        assert ["system", "system", "none", "other", "other", "other"] == places(world)
        assert [0, 1, 0, 3, 4, 5] == world.contents()

    def test_room(self):
        """The target evicts its oldest; what does not fit stays with the source."""
        world = two_devices("private", "private", pages=20)
        world.other.to_device(world.process, world.process.mmap(16 * PAGE_SIZE), 16 * PAGE_SIZE)
        assert 0 == world.other.chunks.free_pages

        moved = between(world)

        assert (16, {"not_chosen": 4}) == (moved.migrated, moved.stayed)
        assert ["other"] * 16 + ["gpu"] * 4 == places(world)
        assert world.intact()

    def test_held_page(self):
        """A page that somebody pins stays where it is."""
        world = two_devices("public", "private")
        world.pin(2)

        moved = between(world)

        assert (4, {"pinned": 1}) == (moved.migrated, moved.stayed)
        assert "gpu" == places(world)[2]
        assert world.intact()

    def test_contents_that_are_lost(self):
        """What the source cannot read is lost, and only that."""
        world = two_devices("private", "private")
        with Forgets(world.gpu):
            moved = between(world)

        assert (4, {"lost": 1}) == (moved.migrated, moved.stayed)
        with pytest.raises(BusError):
            world.process.read(world.at(1), 1)
        assert b"\2" == world.process.read(world.at(2), 1)

    def test_without_contents(self):
        """Pages move on a machine that keeps no bytes."""
        world = mapped_range(5, payload=False, filled=False)
        world.process.touch(world.addr, world.nbytes)
        world.other = NumpyDevice(world.machine, "64KiB", name="other")
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert 5 == between(world).migrated

    def test_large_range(self):
        """More than lies in the buffer at a time, over the border of page tables."""
        world = mapped_range(4500, memory="32MiB", nodes=("64MiB",))
        world.other = NumpyDevice(world.machine, "32MiB", "public", name="other")
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert 4500 == between(world).migrated
        assert world.intact()


class TestWrongCalls:
    def test_devices(self):
        """Two devices of one machine, both open."""
        world = two_devices("private", "private")
        far = NumpyDevice(Machine(("16MiB",), max_physmem="64MiB"), "64KiB")

        for source, target in ((world.gpu, world.gpu), (world.gpu, far)):
            with pytest.raises(InvalidArgument, match="not two devices of a machine"):
                migrate_between(source, target, world.process, world.addr, PAGE_SIZE)
        world.other.close()
        with pytest.raises(InvalidArgument, match="closed"):
            between(world)

    def test_range(self):
        """All of it is mapped."""
        world = two_devices("private", "private")
        with pytest.raises(InvalidRange):
            migrate_between(world.gpu, world.other, world.process, world.at(4), 2 * PAGE_SIZE)
