"""Device-public memory under every system call: mapped like other memory, and yet not reclaimed."""

import errno

import numpy as np
import pytest

from devices import NumpyDevice
from mm import PAGE_SIZE, Busy, SegmentationFault
from mm.errors import OutOfMemory
from mm.page_flags import PG_anon_exclusive, PG_lru, PG_mlocked, PG_swapcache
from mm.pgtable import pte_devmap, pte_present, pte_write
from mm.swap import lru_add_drain_all
from mm.swapops import is_swap_entry
from mm.vmscan import reclaim_pages, try_to_free_pages
from tests.devices.test_public import borrowed, public_range
from tests.mm.test_device_exclusive import faults_of
from tests.world import in_step

FAR = 1 << 24


def devmap(world):
    """Which pages are mapped as device memory."""
    return (pte_present(world.ptes()) & pte_devmap(world.ptes())).tolist()


class TestProtect:
    def test_read_only(self):
        """Neither CPU nor device may store; both still load, where the page is."""
        world = borrowed()
        world.gpu.read(world.process, world.addr, world.nbytes)
        world.process.mprotect(world.addr, world.nbytes, "r")

        assert in_step(world.gpu)
        for access in (world.process.write, lambda a, b: world.gpu.write(world.process, a, b)):
            with pytest.raises(SegmentationFault):
                access(world.at(1), b"x")
        assert b"\1" == world.gpu.read(world.process, world.at(1), 1)
        assert 0 == faults_of(world, world.contents)
        assert [True] * 5 == devmap(world)

    def test_writable_again(self):
        """The process's own pages are so at once (5.19), shared ones by a copy."""
        world = borrowed()
        child = world.fork(0)
        world.process.mprotect(world.addr, world.nbytes, "r")
        world.process.mprotect(world.addr, world.nbytes, "rw")

        assert [False, True, True, True, True] == pte_write(world.ptes()).tolist()
        assert 1 == faults_of(world, world.fill)
        assert [False, True, True, True, True] == devmap(world)
        assert b"\0" == child.read(world.addr, 1)

    def test_none(self):
        """PROT_NONE keeps the entry and the page, for whoever may look again."""
        world = borrowed()
        world.process.mprotect(world.addr, world.nbytes, "-")

        assert [True] * 5 == devmap(world) == world.on_device()
        with pytest.raises(SegmentationFault):
            world.process.read(world.addr, 1)
        with pytest.raises(SegmentationFault):
            world.gpu.read(world.process, world.addr, 1)
        world.process.mprotect(world.addr, world.nbytes, "r")
        assert world.intact()

    def test_close_when_nobody_may_look(self):
        """The pages go to system memory with the rights that they have."""
        world = borrowed()
        world.process.mprotect(world.addr, world.nbytes, "-")
        world.gpu.close()
        world.process.mprotect(world.addr, world.nbytes, "rw")

        assert [False] * 5 == world.on_device()
        assert world.intact()


class TestRemap:
    @pytest.mark.parametrize("flags", ["maymove|fixed", "maymove|fixed|dontunmap"])
    def test_other_address(self, flags):
        """The entries move as they are; the device finds the pages at the new address."""
        world = borrowed()
        world.gpu.read(world.process, world.addr, world.nbytes)
        pfns = world.pfns().tolist()
        old = world.addr
        world.addr = world.process.mremap(old, world.nbytes, world.nbytes, flags, old + FAR)

        assert (pfns, [True] * 5) == (world.pfns().tolist(), devmap(world))
        assert in_step(world.gpu)
        assert b"\3" == world.gpu.read(world.process, world.at(3), 1)
        assert (pfns, True) == (world.pfns().tolist(), world.intact())

    def test_shrink(self):
        """What is cut off goes back to the device."""
        world = borrowed()
        world.process.mremap(world.addr, world.nbytes, 2 * PAGE_SIZE)

        assert world.gpu.npages - 2 == world.gpu.chunks.free_pages

    def test_migration_of_what_has_moved(self):
        """The reverse mapping leads to the new address, in each process."""
        world = borrowed()
        child = world.seen_by(world.process.fork())
        child.addr = child.process.mremap(
            child.addr, child.nbytes, child.nbytes, "maymove|fixed", child.addr + FAR
        )
        world.gpu.to_system(child.process, child.addr, child.nbytes)

        assert [False] * 5 == world.on_device() == child.on_device()
        assert world.intact()
        assert child.intact()


class TestReclaim:
    def test_memory_is_short(self):
        """Whoever looks for pages to reclaim finds none of a device's."""
        world = borrowed(5, nodes=("2MiB",), swap="4MiB")
        before = world.ptes().tolist()
        with world.machine.spawn("hog") as hog:
            addr = hog.mmap("2MiB")
            hog.touch(addr, "2MiB")
            assert 0 < world.machine.mem.swap.inuse_pages
            assert before == world.ptes().tolist()

        assert world.intact()

    def test_nothing_else_is_there(self):
        """Direct reclaim frees nothing, and no list has such a page."""
        world = borrowed(swap="1MiB")
        lru_add_drain_all(world.machine.mem)

        assert 0 == try_to_free_pages(world.machine.mem, [0], 32)
        assert 0 == reclaim_pages(world.machine.mem, world.pfns())
        assert not (world.machine.mem.flags[world.pfns()] & (PG_lru | PG_swapcache)).any()
        assert 0 == world.machine.mem.swap.inuse_pages

    def test_out_of_memory(self):
        """Where system memory and swap are full a copy cannot be had; the page stays shared."""
        world = borrowed(2, nodes=("1MiB",))
        child = world.fork(0)
        with world.machine.spawn("hog") as hog:
            addr = hog.mmap("1MiB", flags="anon|private|noreserve")
            with pytest.raises(OutOfMemory):
                hog.touch(addr, "1MiB")
            with pytest.raises(OutOfMemory):
                child.write(world.addr, b"x")

        assert [True, True] == devmap(world)
        assert world.intact()

    def test_page_in_the_swap_cache(self):
        """It leaves the cache and moves, once nobody needs its slot (5.18)."""
        world = public_range(3, swap="1MiB")
        child = world.seen_by(world.process.fork())
        world.pageout()
        world.process.touch(world.addr, world.nbytes, write=False)
        assert is_swap_entry(child.ptes()).all()

        stays = world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert (0, {"busy": 3}) == (stays.migrated, stays.stayed)
        child.process.exit()
        assert 3 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
        assert 0 == world.machine.mem.swap.inuse_pages
        assert world.intact()

    def test_page_that_was_given_up(self):
        """A page that MADV_FREE gave up migrates, and is kept if the device stores to it."""
        world = public_range(3, swap="1MiB")
        lru_add_drain_all(world.machine.mem)
        world.process.madvise(world.addr, world.nbytes, "free")
        lru_add_drain_all(world.machine.mem)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.gpu.write(world.process, world.at(1), b"\x11")
        world.gpu.to_system(world.process, world.addr, world.nbytes)
        lru_add_drain_all(world.machine.mem)
        world.pageout()

        assert [0, 0x11, 0] == world.contents()


class TestLock:
    def test_mlock(self):
        """The pages stay with the device, unfaulted, and are not PG_mlocked."""
        world = borrowed()

        assert 0 == faults_of(world, lambda: world.process.mlock(world.addr, world.nbytes))
        assert [True] * 5 == world.on_device()
        assert not (world.machine.mem.flags[world.pfns()] & PG_mlocked).any()
        assert 0 == world.machine.vmstat["nr_mlock"]

    def test_there_and_back(self):
        """Where a locked page goes it is not mlocked; when it is back it is."""
        world = public_range()
        world.process.mlock(world.addr, world.nbytes)
        assert 5 == world.machine.vmstat["nr_mlock"]
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert 0 == world.machine.vmstat["nr_mlock"]
        world.gpu.to_system(world.process, world.addr, 2 * PAGE_SIZE)
        lru_add_drain_all(world.machine.mem)

        assert 2 == world.machine.vmstat["nr_mlock"]
        world.machine.verify()

    def test_munlock(self):
        """A device's page has nothing to unlock."""
        world = borrowed()
        world.process.mlock(world.addr, world.nbytes)
        world.process.munlock(world.addr, world.nbytes)
        world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert 0 == world.machine.vmstat["nr_mlock"]

    def test_store_to_a_shared_page(self):
        """The copy that a locked process gets is mlocked."""
        world = borrowed()
        world.process.mlock(world.addr, world.nbytes)
        world.fork(1)
        world.process.write(world.at(1), b"\1")
        lru_add_drain_all(world.machine.mem)

        assert 1 == world.machine.vmstat["nr_mlock"]
        world.machine.verify()


class TestNodes:
    def test_no_node(self):
        """Nobody moves such a page between nodes, nor says that it is on one."""
        world = borrowed(nodes=("16MiB", "16MiB"))

        assert [-errno.ENOENT] * 5 == world.process.move_pages(world.addrs, 1).tolist()
        assert [-1] * 5 == world.machine.mem.page_to_nid(world.pfns()).tolist()

    def test_way_back(self):
        """The policy of the process says to which node pages go."""
        world = borrowed(nodes=("16MiB", "16MiB"))
        world.process.mbind(world.addr, world.nbytes, "bind", [1])
        world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert [1] * 5 == world.process.move_pages(world.addrs).tolist()


class TestTheEndOfProcesses:
    def test_exit(self):
        """The last process that maps a page gives it back."""
        world = borrowed()
        child, grandchild = world.process.fork("a"), world.process.fork("b")
        for process in (child, world.process):
            process.exit()
            assert world.gpu.npages - 5 == world.gpu.chunks.free_pages
        grandchild.exit()

        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_exit_in_the_midst_of_a_pin(self):
        """A pin keeps the page for whoever has it."""
        world = borrowed()
        pin = world.process.pin(world.at(1), PAGE_SIZE)
        world.process.exit()
        assert world.gpu.npages - 1 == world.gpu.chunks.free_pages
        with pytest.raises(Busy):
            world.gpu.close()

        pin.release()
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_close_with_a_family(self):
        """Each page of each process goes to system memory: shared once, and copies."""
        world = borrowed()
        child = world.seen_by(world.process.fork())
        child.process.write(child.at(0), b"\x0c")
        world.process.write(world.at(1), b"\x0d")
        grandchild = child.seen_by(child.process.fork())
        world.gpu.to_device(grandchild.process, grandchild.addr, grandchild.nbytes)

        world.gpu.close()

        family = (world, child, grandchild)
        assert [[False] * 5] * 3 == [one.on_device() for one in family]
        assert [[0, 0x0D, 2, 3, 4]] + [[0x0C, 1, 2, 3, 4]] * 2 == [one.contents() for one in family]
        assert [3] * 3 == world.machine.mem.mapcount[world.pfns()[2:]].tolist()

    def test_close_with_a_page_that_stays(self):
        """One pinned page keeps the device; all the others have gone, and it goes on."""
        world = borrowed()
        kept = world.process.pin(world.at(3), PAGE_SIZE)
        child = world.seen_by(world.process.fork())
        pin = child.process.pin(child.at(2), PAGE_SIZE)  # a copy of its own, in system memory
        with pytest.raises(Busy):
            world.gpu.close()

        assert [False, False, False, True, False] == world.on_device()
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        kept.release()
        pin.release()
        world.gpu.close()
        assert world.intact()
        assert child.intact()


class TestCopyOnWrite:
    def test_both_store(self):
        """The first who stores has the copy; the other the page, as it is, on the device."""
        world = borrowed(2)
        child = world.seen_by(world.process.fork())
        child.fill()
        assert [False, False] == child.on_device()

        assert 2 == faults_of(world, world.fill)
        assert [True, True] == world.on_device()
        assert ((world.machine.mem.flags[world.pfns()] & PG_anon_exclusive) != 0).all()

    def test_device_stores_for_one(self):
        """The copy of a device's store is in its memory; the other process keeps the page."""
        world = borrowed(2)
        child = world.seen_by(world.process.fork())
        world.gpu.write(child.process, child.at(0), b"\x09")

        assert ([0, 1], [9, 1]) == (world.contents(), child.contents())
        assert [True, True] == world.on_device()
        assert in_step(world.gpu)

    def test_two_devices(self):
        """A shared page of one device, stored to through another."""
        world = borrowed(2)
        other = NumpyDevice(world.machine, "64KiB", "public", name="other")
        child = world.seen_by(world.process.fork())
        other.write(child.process, child.at(1), b"\x08")

        assert ([0, 1], [0, 8]) == (world.contents(), child.contents())
        assert in_step(world.gpu)
        assert in_step(other)

    def test_unshare(self):
        """A pin for reading gets a page of the process's own first."""
        world = borrowed(2)
        child = world.seen_by(world.process.fork())
        with child.process.pin(child.at(0), PAGE_SIZE, write=False) as pin:
            assert [False, True] == child.on_device()
            assert [child.pfns()[0]] == pin.pfns.tolist()
        assert [True, True] == world.on_device()


class TestWhatOthersSee:
    def test_debugger(self):
        """/proc/PID/mem reads and writes where the page is."""
        world = borrowed()
        world.process.mprotect(world.addr, world.nbytes, "r")

        assert b"\2" == world.process.mem_read(world.at(2), 1)
        assert 1 == world.process.mem_write(world.at(2), b"\x77")
        assert [True] * 5 == world.on_device()
        assert [0, 1, 0x77, 3, 4] == world.contents()

    def test_soft_dirty(self):
        """A store after clear_refs is seen."""
        world = borrowed()
        world.process.clear_refs(4)
        world.process.write(world.at(1), b"\1")

        words = world.process.pagemap(world.addr, 5)
        assert [False, True, False, False, False] == ((words >> np.uint64(55)) & 1 == 1).tolist()
        assert [True] * 5 == world.on_device()

    def test_resident(self):
        """mincore says that it is in memory, as it is."""
        world = borrowed()

        assert world.process.mincore(world.addr, world.nbytes).all()
