"""Device memory that the CPU reaches: migrations, CPU accesses, pins, and the device's own side."""

import numpy as np
import pytest

import devices
from devices import NumpyDevice
from mm import PAGE_SIZE, Busy, InvalidArgument
from mm.mmu_notifier import MmuNotifyEvent
from mm.mmzone import Lru
from mm.page_flags import PG_anon_exclusive, PG_lru
from mm.pgtable import pte_devmap, pte_present, pte_write
from mm.rmap import page_mapped
from mm.swap import lru_add_drain_all
from mm.swapops import is_device_exclusive_entry
from tests.hmm.callbacks import migrate
from tests.hmm.ranges import reasons
from tests.mm.test_device_exclusive import Listener, faults_of
from tests.world import in_step, mapped_range


def public_range(pages=5, **options):
    """As mapped_range(), with a device whose memory is public."""
    return mapped_range(pages, kind="public", **options)


def borrowed(pages=5, **options):
    """The same, all of it in the device's memory."""
    world = public_range(pages, **options)
    assert pages == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
    return world


class TestToDevice:
    def test_entries(self):
        """The pages are mapped where they are, and the CPU reaches them [coh01, i=5 to 10]."""
        world = borrowed()
        ptes = world.ptes()

        assert [True] * 5 == world.on_device()
        assert (pte_present(ptes) & pte_devmap(ptes) & pte_write(ptes)).all()
        assert 0 == faults_of(world, lambda: world.process.write(world.at(1), b"\x63"))
        assert 0 == faults_of(world, world.contents)
        assert [0, 0x63, 2, 3, 4] == world.contents()
        world.machine.verify()

    def test_pages(self):
        """Each keeps its owner, has a reference for its mapping, and is on no list."""
        world = public_range()
        mem = world.machine.mem
        lru_add_drain_all(mem)

        with world.machine.vmstat.counting() as delta:
            world.gpu.to_device(world.process, world.addr, world.nbytes)

        pfns = world.pfns()
        assert [2] * 5 == mem.refcount[pfns].tolist()
        assert [1] * 5 == mem.mapcount[pfns].tolist()
        assert ((mem.flags[pfns] & PG_anon_exclusive) != 0).all()
        assert not (mem.flags[pfns] & PG_lru).any()
        assert -5 == delta[f"nr_{Lru.ACTIVE_ANON.name.lower()}"]
        assert "pgmigrate_success" not in delta

    def test_untouched_pages(self):
        """Holes and the zero page become pages of zeros [coh01, i=4]."""
        world = public_range(filled=False)
        world.process.write(world.at(0), b"\1")
        world.process.touch(world.at(1), PAGE_SIZE, write=False)
        world.gpu.memory[:8] = 0xEE  # what somebody left there

        moved = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert 5 == moved.migrated
        assert bytes(PAGE_SIZE * 4) == world.process.read(world.at(1), 4 * PAGE_SIZE)
        assert 5 == world.process.mm.anon_rss

    def test_read_only(self):
        """A page keeps its rights, a hole gets those of the area."""
        world = public_range(pages=3)
        world.protect("r")
        world.process.munmap(world.at(2), PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, "r", addr=world.at(2))

        world.gpu.to_device(world.process, world.addr, 3 * PAGE_SIZE)

        assert [True] * 3 == world.on_device()
        assert not pte_write(world.ptes()).any()

    def test_once_more(self):
        """What is there already is passed over [coh01, i=15]."""
        world = borrowed()

        moved = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (0, {"skipped": 5}) == (moved.migrated, moved.stayed)

    def test_larger_than_the_device(self):
        """The end of the range stays in system memory."""
        world = public_range(pages=20, memory="64KiB")

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [True] * 16 + [False] * 4 == world.on_device()
        assert world.intact()


class TestToSystem:
    def test_and_back(self):
        """Bytes and rights are as they were, and the device's memory is free."""
        world = borrowed()
        world.process.write(world.at(3), b"\x77")

        assert 5 == world.gpu.to_system(world.process, world.addr, world.nbytes).migrated

        assert [False] * 5 == world.on_device()
        assert [0, 1, 2, 0x77, 4] == world.contents()
        assert not pte_devmap(world.ptes()).any()
        assert pte_write(world.ptes()).all()
        assert world.gpu.npages == world.gpu.chunks.free_pages

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_pages_of_another_device(self, kind):
        """They are left to it, in both directions [coh01, i=16 to 19]."""
        world = borrowed()
        other = NumpyDevice(world.machine, "64KiB", kind, name="other")

        to = other.to_device(world.process, world.addr, world.nbytes)
        back = other.to_system(world.process, world.addr, world.nbytes)

        assert ({"skipped": 5}, {"skipped": 5}) == (to.stayed, back.stayed)
        assert [True] * 5 == world.on_device()

    def test_by_way_of_private_memory(self):
        """From device to device by way of the system, and on."""
        world = borrowed()
        other = NumpyDevice(world.machine, "64KiB", name="other")
        world.gpu.to_system(world.process, world.addr, 3 * PAGE_SIZE)

        other.to_device(world.process, world.addr, world.nbytes)

        assert [False] * 3 + [True] * 2 == pte_present(world.ptes()).tolist()
        assert world.intact()

    def test_straight_to_private_memory(self):
        """A migration without an owner takes pages of any device, as in v4.20."""
        world = mapped_range(pages=4)
        public = NumpyDevice(world.machine, "64KiB", "public", name="public")
        public.to_device(world.process, world.at(1), 2 * PAGE_SIZE)

        result = migrate(world, select=7, pgmap_owner=None)

        assert 4 == result.cpages
        assert not pte_present(world.ptes()).any()
        assert 16 == public.chunks.free_pages


class TestTwoProcesses:
    def test_store_after_fork(self):
        """The copy is in ordinary memory; the other keeps the device's page [coh02, i=8 to 11]."""
        world = borrowed()
        child = world.fork(0, 1)

        assert 1 == faults_of(world, lambda: world.process.write(world.at(1), b"\x11"))

        assert [True, False, True, True, True] == world.on_device()
        assert b"\1" == child.read(world.at(1), 1)
        assert [0, 0x11, 2, 3, 4] == world.contents()

    def test_store_to_a_page_of_one(self):
        """A page that others have left stays where it is."""
        world = borrowed()
        world.fork(1).exit()

        assert 1 == faults_of(world, lambda: world.process.write(world.at(1), b"\1"))
        assert [True] * 5 == world.on_device()

    def test_migration_of_a_shared_page(self):
        """It moves for both of them [coh02, i=16]."""
        world = borrowed()
        child = world.fork(0, 1)
        shared = world.pfns()[:2].copy()

        world.gpu.to_system(world.process, world.addr, 2 * PAGE_SIZE)

        assert not page_mapped(world.machine.mem, shared).any()
        assert b"\1" == child.read(world.at(1), 1) == world.process.read(world.at(1), 1)
        assert 0 == child.min_flt

    def test_munmap(self):
        """The device gets its pages back from the last who maps them."""
        world = borrowed()
        child = world.fork(0)
        world.process.munmap(world.addr, world.nbytes)

        assert world.gpu.npages - 1 == world.gpu.chunks.free_pages
        child.exit()
        assert world.gpu.npages == world.gpu.chunks.free_pages


class TestPins:
    def test_for_long(self):
        """The page goes to system memory first, without a fault [coh03, i=4 and 5]."""
        world = borrowed()
        listener = Listener(world)
        world.process.min_flt = 0

        with world.process.pin(world.at(1), PAGE_SIZE, longterm=True) as pin:
            assert [True, False, True, True, True] == world.on_device()
            assert [1] == world.machine.mem.payload[pin.pfns, 0].tolist()
            assert [world.pfns()[1]] == pin.pfns.tolist()
            world.machine.verify()
        assert 0 == world.process.min_flt
        assert [(MmuNotifyEvent.CLEAR, world.at(1), world.at(2), None)] == listener.heard
        assert world.intact()

    def test_mixture(self):
        """Wherever the pages are, all are pinned in system memory."""
        world = borrowed(pages=6)
        world.gpu.to_system(world.process, world.at(1), PAGE_SIZE)
        NumpyDevice(world.machine, "64KiB", name="private").to_device(
            world.process, world.at(1), PAGE_SIZE
        )
        world.gpu.to_system(world.process, world.at(4), PAGE_SIZE)

        with world.process.pin(world.addr, world.nbytes, longterm=True) as pin:
            assert [False] * 6 == world.on_device()
            assert world.pfns().tolist() == pin.pfns.tolist()
        assert world.intact()

    def test_for_a_while(self):
        """The page stays, and cannot leave as long as it is pinned."""
        world = borrowed()

        with world.process.pin(world.at(1), PAGE_SIZE):
            moved = world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert (4, {"pinned": 1}) == (moved.migrated, moved.stayed)
        assert [False, True, False, False, False] == world.on_device()
        assert world.intact()

    def test_plain_reference(self):
        """One passes every check but the last [coh03, i=9]."""
        world = borrowed()

        with world.process.pin(world.at(2), PAGE_SIZE, plain=True):
            moved = world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert (4, {"busy": 1}) == (moved.migrated, moved.stayed)
        assert 5 == moved.collected
        assert world.intact()

    def test_two_plain_references(self):
        """Two are too many from the beginning."""
        world = borrowed()
        pins = [world.process.pin(world.at(2), PAGE_SIZE, plain=True) for _ in range(2)]

        moved = world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert {"pinned": 1} == moved.stayed
        for pin in pins:
            pin.release()

    def test_store_while_it_is_copied(self):
        """Who held the page until the copy was made may have stored to it: the page stays."""
        world = borrowed()
        pin = world.process.pin(world.at(2), PAGE_SIZE, plain=True)

        def store_late(src, dst):
            world.machine.mem.payload[pin.pfns] = 0x22
            pin.release()

        result = migrate(world, after=store_late, back=True, select=4)

        assert ["NO", "NO", "BUSY", "NO", "NO"] == reasons(result)
        assert [0, 1, 0x22, 3, 4] == world.contents()

    def test_for_long_while_somebody_holds_it(self):
        """The pin fails as a whole [coherent-pin/k5088, i=122]; pages before the one moved."""
        world = borrowed()

        with (
            world.process.pin(world.at(2), PAGE_SIZE, plain=True),
            pytest.raises(Busy, match="cannot be pinned for long"),
        ):
            world.process.pin(world.addr, world.nbytes, longterm=True)

        assert [] == world.machine.mem.pins
        assert [False, False, True, True, True] == world.on_device()
        assert world.intact()

    def test_for_long_without_room(self):
        """Where the system has no frame the page stays, and cannot be pinned."""
        world = borrowed(pages=2, nodes=("1MiB",))
        with world.machine.spawn("hog") as hog:
            addr = hog.mmap("1MiB")
            with pytest.raises(OSError, match="no frame"):
                hog.write(addr, bytes(1 << 20))

            with pytest.raises(Busy, match="no frame is free"):
                world.process.pin(world.addr, world.nbytes, longterm=True)

        assert [True, True] == world.on_device()
        assert world.intact()


class TestDeviceSide:
    def test_one_memory(self):
        """What one side stores the other loads, without a fault of either."""
        world = borrowed()

        world.gpu.write(world.process, world.at(1), b"device")
        world.process.write(world.at(2), b"host")

        assert b"device" == world.process.read(world.at(1), 6)
        assert b"host" == world.gpu.read(world.process, world.at(2), 4)
        assert 0 == world.gpu.stats.device_faults
        assert in_step(world.gpu)

    def test_device_fault(self):
        """What the device lacks migrates to it, as with private memory."""
        world = public_range()

        assert bytes([1]) == world.gpu.read(world.process, world.at(1), 1)

        assert [False, True, False, False, False] == world.on_device()
        assert 1 == world.gpu.stats.device_faults

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_memory_of_another(self, kind):
        """A device reaches another's public memory where it is [coh01, i=24]."""
        world = borrowed()
        other = NumpyDevice(world.machine, "64KiB", kind, name="other")

        other.write(world.process, world.at(3), b"\x55")

        assert [True] * 5 == world.on_device()
        assert 16 == other.chunks.free_pages
        assert [0, 1, 2, 0x55, 4] == world.contents()
        assert in_step(other)

    def test_page_that_the_device_may_not_store_to(self):
        """A shared page is copied before the device stores [coh02, i=13]."""
        world = borrowed()
        child = world.fork(2)

        world.gpu.write(world.process, world.at(2), b"\x07")

        assert b"\2" == child.read(world.at(2), 1)
        assert b"\x07" == world.process.read(world.at(2), 1)

    def test_kernel(self):
        """A kernel runs on arrays in its memory."""
        world = public_range(pages=1)
        a = world.process.array(3_000)
        a[:] = np.arange(3_000)
        world.gpu.to_device(world.process, a.addr, a.nbytes)

        world.gpu.run(np.sqrt, a)

        assert np.allclose(np.sqrt(np.arange(3_000)), a[:])
        assert 0 == world.gpu.stats.device_faults

    def test_eviction(self):
        """A full device makes room by sending the oldest back."""
        world = public_range(pages=32, memory="64KiB", chunk="64KiB")
        world.gpu.to_device(world.process, world.addr, 16 * PAGE_SIZE)

        world.gpu.to_device(world.process, world.at(16), 16 * PAGE_SIZE)

        assert [False] * 16 + [True] * 16 == world.on_device()
        assert 16 == world.gpu.stats.evicted_pages
        assert world.intact()

    def test_close(self):
        """Everything goes back, whoever maps it, without a fault [coh01, i=26]."""
        world = borrowed()
        child = world.fork(0)

        assert 0 == faults_of(world, world.gpu.close)

        assert [False] * 5 == world.on_device()
        assert world.intact()
        assert b"\0" == child.read(world.addr, 1)

    def test_close_with_a_pinned_page(self):
        """The device stays while somebody holds a page of it."""
        world = borrowed()
        pin = world.process.pin(world.at(1), PAGE_SIZE)

        with pytest.raises(Busy):
            world.gpu.close()

        assert [False, True, False, False, False] == world.on_device()
        pin.release()
        world.gpu.close()
        assert world.intact()

    def test_without_contents(self):
        """Pages move on a machine that keeps no bytes."""
        world = public_range(payload=False, filled=False)
        world.process.touch(world.addr, world.nbytes)

        assert 5 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
        world.process.pin(world.addr, world.nbytes, longterm=True).release()
        assert [False] * 5 == world.on_device()


class TestExclusive:
    def test_taken_and_given_back(self):
        """A page may be a device's own and in a device's memory."""
        world = borrowed()
        world.make_exclusive(1, 2)
        world.machine.verify()

        moved = world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert (3, {"skipped": 2}) == (moved.migrated, moved.stayed)
        assert world.intact()
        assert [False, True, True, False, False] == world.on_device()
        assert [False, True, True, False, False] == pte_devmap(world.ptes()).tolist()

    def test_close(self):
        """When the device goes, what was taken is given back, and goes to system memory."""
        world = borrowed()
        world.make_exclusive(1)
        child = world.seen_by(world.process.fork())
        child.make_exclusive(3)
        assert is_device_exclusive_entry(child.ptes())[3]

        assert 0 == faults_of(world, world.gpu.close)

        assert [False] * 5 == world.on_device() == child.on_device()
        assert world.intact()
        assert child.intact()


class TestOpen:
    def test_by_name(self):
        """The kind is a word of open()."""
        world = mapped_range()
        gpu = devices.open("numpy", world.machine, "1MiB", "public")

        gpu.to_device(world.process, world.addr, world.nbytes)

        assert world.machine.mem.is_device_public_page(world.pfns()).all()
        assert 0 == faults_of(world, world.contents)

    def test_wrong_kind(self):
        """There are two kinds of memory."""
        with pytest.raises(InvalidArgument, match="kind='mixed': device memory is \"private\" or"):
            NumpyDevice(mapped_range().machine, "1MiB", "mixed")

    def test_bytes_of_its_own(self):
        """Two devices and the system never share a row of contents."""
        world = borrowed()
        other = NumpyDevice(world.machine, "64KiB", "public", name="other")

        other.memory[:] = 0xAA

        assert world.intact()
        assert not np.shares_memory(other.memory, world.gpu.memory)
