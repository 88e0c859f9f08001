"""Writeback: what is dirty gets to the device, what is under way is waited for."""

import threading

import numpy as np
import pytest

from mm import PAGE_SIZE
from mm.errors import BusError, Deadlock, InputOutputError, KernelBug, NoSpace
from mm.filemap import lock_page, unlock_page
from mm.fs import PAGECACHE_TAG_DIRTY, PAGECACHE_TAG_TOWRITE, PAGECACHE_TAG_WRITEBACK
from mm.page_flags import PG_active, PG_dirty, PG_private, PG_writeback
from mm.pgtable import pte_dirty, pte_offset, pte_write
from mm.swap import lru_add_drain_all, put_page
from mm.typing import pages
from mm.vmscan import reclaim_pages
from mm.writeback import (
    AS_EIO,
    WB_SYNC_ALL,
    WritebackControl,
    balance_dirty_pages,
    clear_page_dirty_for_io,
    end_page_writeback,
    filemap_check_errors,
    filemap_fdatawait_range,
    filemap_write_and_wait_range,
    find_get_pages_tag,
    global_dirty_limits,
    mapping_set_error,
    set_page_writeback,
    wait_on_page_writeback,
    write_cache_pages,
)
from tests.world import mapped_range

PAGES = 8


def pattern(page):
    return bytes([page + 1]) * PAGE_SIZE


class Disk:
    """A mounted disk with one file of eight pages, on the disk and not in memory."""

    def __init__(self, world, path):
        self.world, self.machine, self.mem = world, world.machine, world.machine.mem
        with self.machine.mount(path, "1KiB", "1MiB") as fs, fs.create("f") as file:
            file.write(0, b"".join(pattern(page) for page in range(PAGES)))
        self.path, self.fs = path, self.machine.mount(path)
        self.file, self.device = self.fs.open("f"), self.fs.device
        self.mapping, self.process = self.file.f_mapping, world.process

    def pfns(self):
        """PFN of each page of the file, 0 where it is not in memory."""
        return self.mapping.i_pages.load(np.arange(PAGES))

    def flagged(self, bit):
        """Which pages have a flag."""
        pfns = self.pfns()
        return np.flatnonzero((self.mem.flags[pfns] & bit != 0) & (pfns > 0)).tolist()

    def tagged(self, tag):
        return self.mapping.i_pages.find(0, PAGES, tag)[0].tolist()

    def store(self, page, data=b"new"):
        """write(2) to a page."""
        self.file.write(page * PAGE_SIZE, data)

    def on_disk(self, page, nbytes=3):
        """What the device has of a page, by its extents."""
        found = self.fs.super.files[self.file.f_inode.i_ino].extents.lookup(pages(page * 4))
        at = found.item() * 1024
        return self.path.read_bytes()[at : at + nbytes]

    def mmap(self, flags="shared", prot="rw"):
        return self.process.mmap(PAGES * PAGE_SIZE, prot, f"file|{flags}", file=self.file)

    def entry(self, addr, page=0):
        at = pte_offset(self.mem.tables, self.process.mm.pgd, pages(addr + page * PAGE_SIZE))
        return self.mem.tables.entries[at]

    def end(self):
        self.device.faults.clear()
        self.device.holding = False
        self.device.complete()
        for mm in tuple(self.mem.mms):
            for vma in tuple(mm.vmas):
                if vma.vm_file is not None:
                    self.process.munmap(vma.vm_start, vma.vm_end - vma.vm_start)
        for file in tuple(self.mem.files):
            file.close()
        self.fs.unmount()


@pytest.fixture
def disk(tmp_path):
    disk = Disk(mapped_range(pages=1, nodes=("16MiB", "16MiB")), tmp_path / "disk")
    yield disk
    disk.end()


class TestDirty:
    def test_counted_once(self, disk):
        """A page is dirty or not, however often it is written to; its tag says so."""
        with disk.machine.vmstat.counting("nr_dirty", "nr_dirtied", "nr_written") as delta:
            for page in (2, 2, 5):
                disk.store(page)
            assert [2, 5] == disk.tagged(PAGECACHE_TAG_DIRTY) == disk.flagged(PG_dirty)
            disk.file.fsync()
        assert {"nr_dirty": 0, "nr_dirtied": 2, "nr_written": 2} == delta
        assert [b"new", b"\4\4\4", b"new"] == [disk.on_disk(page) for page in (2, 3, 5)]

    def test_part_of_a_page(self, disk):
        """Only the blocks that have changed are written."""
        with disk.machine.vmstat.counting("pgpgout") as delta:
            disk.store(2)
            write_cache_pages(disk.mapping, WritebackControl(WB_SYNC_ALL))
        assert {"pgpgout": 1} == delta

    def test_range(self, disk):
        """Pages outside it stay dirty."""
        for page in range(PAGES):
            disk.store(page)
        assert 0 == filemap_write_and_wait_range(disk.mapping, 2, 5)
        assert [0, 1, 5, 6, 7] == disk.tagged(PAGECACHE_TAG_DIRTY)

    def test_some(self, disk):
        """As many as are asked for, unless it is a sync."""
        for page in range(PAGES):
            disk.store(page)
        wbc = WritebackControl(nr_to_write=3)
        write_cache_pages(disk.mapping, wbc)
        assert (3, 5) == (wbc.nr_written, disk.machine.vmstat["nr_dirty"])

    def test_find_get_pages_tag(self, disk):
        """The first pages with a tag, and a reference to each."""
        for page in (1, 4, 6):
            disk.store(page)
        before = disk.mem.refcount[disk.pfns()[4]]
        indexes, pfns = find_get_pages_tag(disk.mapping, 2, 99, PAGECACHE_TAG_DIRTY, 1)
        assert ([4], before + 1) == (indexes.tolist(), disk.mem.refcount[pfns])
        put_page(disk.mem, pfns)

    def test_locked_page(self, disk):
        """The flusher goes on without it; a sync would wait for ever for this thread."""
        disk.store(1)
        disk.store(2)
        held = disk.pfns()[1:2]
        lock_page(disk.mem, held)
        write_cache_pages(disk.mapping, WritebackControl())
        assert [1] == disk.flagged(PG_dirty)
        with pytest.raises(Deadlock):
            disk.file.fsync()
        unlock_page(disk.mem, held)
        disk.file.fsync()
        assert [] == disk.flagged(PG_dirty)


class TestUnderWay:
    def test_held_back(self, disk):
        """A page is PG_writeback and tagged until the device is done."""
        disk.store(2)
        disk.store(5)
        with disk.device.hold():
            write_cache_pages(disk.mapping, WritebackControl())
            assert [2, 5] == disk.flagged(PG_writeback) == disk.tagged(PAGECACHE_TAG_WRITEBACK)
            assert [] == disk.flagged(PG_dirty) == disk.tagged(PAGECACHE_TAG_DIRTY)
            assert (0, 2) == tuple(disk.machine.vmstat[n] for n in ("nr_dirty", "nr_writeback"))
            assert b"\3\3\3" == disk.on_disk(2)
            disk.machine.verify()
        assert [] == disk.flagged(PG_writeback) == disk.tagged(PAGECACHE_TAG_WRITEBACK)
        assert b"new" == disk.on_disk(2)

    def test_written_to_meanwhile(self, disk):
        """It is dirty again, and the flusher leaves it alone until the first write is done."""
        disk.store(2)
        with disk.device.hold():
            write_cache_pages(disk.mapping, WritebackControl())
            disk.store(2, b"two")
            assert [2] == disk.flagged(PG_dirty) == disk.flagged(PG_writeback)
            write_cache_pages(disk.mapping, WritebackControl())
            assert 1 == len(disk.device.queue)
            disk.machine.verify()
        assert [2] == disk.flagged(PG_dirty)
        disk.file.fsync()
        assert b"two" == disk.on_disk(2)

    @pytest.mark.parametrize("wait", ["fsync", "truncate", "sync", "wait"])
    def test_alone(self, disk, wait):
        """Who waits for a device that nobody lets go on is told so."""
        disk.store(2)
        calls = {
            "fsync": disk.file.fsync,
            "truncate": lambda: disk.file.truncate(0),
            "sync": disk.machine.sync,
            "wait": lambda: wait_on_page_writeback(disk.mem, disk.pfns()[2:3]),
        }
        with disk.device.hold():
            write_cache_pages(disk.mapping, WritebackControl())
            with pytest.raises(Deadlock, match="its device holds that back"):
                calls[wait]()

    def test_waits_in_a_thread(self, disk):
        """fsync comes back when the device is done."""
        disk.store(2)
        disk.device.holding = True
        done = threading.Event()

        def store():
            disk.file.fsync()
            done.set()

        thread = threading.Thread(target=store)
        thread.start()
        while not disk.device.queue:
            pass
        assert not done.wait(0.02)
        disk.device.holding = False
        disk.device.complete()
        thread.join(5)
        assert done.is_set()
        assert b"new" == disk.on_disk(2)

    def test_truncated_by_another_thread(self, disk):
        """Pages under way stay until they are there."""
        disk.store(2)
        disk.device.holding = True
        write_cache_pages(disk.mapping, WritebackControl())
        thread = threading.Thread(target=disk.file.truncate, args=(0,))
        thread.start()
        thread.join(0.02)
        assert thread.is_alive()
        assert disk.pfns()[2]
        disk.device.complete()
        thread.join(5)
        assert not disk.pfns().any()

    def test_twice(self, disk):
        """A page is under way once."""
        disk.file.read(0, PAGE_SIZE)
        pfns = disk.pfns()[:1]
        set_page_writeback(disk.mapping, pfns)
        with pytest.raises(KernelBug, match="twice at a time"):
            set_page_writeback(disk.mapping, pfns)
        end_page_writeback(disk.mapping, pfns)
        with pytest.raises(KernelBug, match="not being written"):
            end_page_writeback(disk.mapping, pfns)

    def test_wait_for_a_range(self, disk):
        """Only pages of the range count."""
        disk.store(5)
        with disk.device.hold():
            write_cache_pages(disk.mapping, WritebackControl())
            filemap_fdatawait_range(disk.mapping, 0, 5)
            with pytest.raises(Deadlock):
                filemap_fdatawait_range(disk.mapping, 0, 6)
            assert [] == disk.tagged(PAGECACHE_TAG_TOWRITE)


class TestErrors:
    def test_check(self, disk):
        """AS_EIO and AS_ENOSPC are told once, EIO first."""
        mapping_set_error(disk.mapping, -28)
        mapping_set_error(disk.mapping, -5)
        assert disk.mapping.flags & AS_EIO
        assert [-5, 0] == [filemap_check_errors(disk.mapping) for _ in range(2)]
        for kind in (InputOutputError, None):
            if kind is None:
                disk.file.fsync()
            else:
                with pytest.raises(kind):
                    disk.file.fsync()

    def test_sync(self, disk):
        """Also by who has the file not open at all."""
        disk.store(2)
        disk.device.fail("write", nth=1)
        with pytest.raises(InputOutputError):
            disk.machine.sync()
        disk.machine.sync()
        with pytest.raises(InputOutputError):
            disk.file.fsync()
        disk.file.fsync()

    def test_no_room(self, disk):
        """Fullness of the device is another error."""
        disk.store(2)
        disk.device.fail("write", nth=1, error=28)
        with pytest.raises(NoSpace):
            disk.file.fsync()


class TestMappings:
    def test_store_is_seen(self, disk):
        """read(2) sees what is stored in a shared mapping, the device after fsync."""
        addr = disk.mmap()
        assert pattern(3) == disk.process.read(addr + 3 * PAGE_SIZE, PAGE_SIZE)
        disk.process.write(addr + 3 * PAGE_SIZE, b"mapped")
        assert b"mapped\4" == disk.file.read(3 * PAGE_SIZE, 7)
        assert [3] == disk.flagged(PG_dirty)
        disk.file.fsync()
        assert b"map" == disk.on_disk(3)
        disk.machine.verify()

    def test_write_is_seen(self, disk):
        """A mapping sees what write(2) stores."""
        addr = disk.mmap(prot="r")
        disk.process.read(addr, 1)
        disk.store(0)
        assert b"new\1" == disk.process.read(addr, 4)

    def test_store_after_fsync(self, disk):
        """It takes a fault, and makes the page dirty again."""
        addr = disk.mmap()
        disk.process.write(addr, b"one")
        assert pte_write(disk.entry(addr))
        disk.file.fsync()
        assert not pte_write(disk.entry(addr))
        assert not pte_dirty(disk.entry(addr))
        with disk.machine.vmstat.counting("pgfault", "nr_dirty") as delta:
            disk.process.write(addr, b"two")
        assert {"pgfault": 1, "nr_dirty": 1} == delta
        disk.file.fsync()
        assert b"two" == disk.on_disk(0)

    def test_load_does_not_make_dirty(self, disk):
        """Nor does it give the right to store."""
        addr = disk.mmap()
        disk.process.read(addr, PAGES * PAGE_SIZE)
        assert [] == disk.flagged(PG_dirty)
        assert not pte_write(disk.entry(addr))

    def test_private(self, disk):
        """What is stored in a private mapping is the process's alone."""
        addr = disk.mmap("private")
        disk.process.write(addr, b"mine")
        assert b"mine" == disk.process.read(addr, 4)
        disk.machine.sync()
        assert pattern(0) == disk.file.read(0, PAGE_SIZE)
        assert b"\1\1\1" == disk.on_disk(0)

    def test_unmapped(self, disk):
        """The page remembers that it was stored to."""
        addr = disk.mmap()
        disk.process.write(addr + PAGE_SIZE, b"one")
        disk.process.munmap(addr, PAGES * PAGE_SIZE)
        disk.file.fsync()
        assert b"one" == disk.on_disk(1)

    def test_truncated(self, disk):
        """Beyond the new end is SIGBUS; the rest of the last page is zeros."""
        addr = disk.mmap()
        disk.process.write(addr, noise := np.full(PAGES * PAGE_SIZE, 7, np.uint8).tobytes())
        disk.file.truncate(PAGE_SIZE + 10)
        assert noise[:10] + bytes(20) == disk.process.read(addr + PAGE_SIZE, 30)
        for access in (lambda a: disk.process.read(a, 1), lambda a: disk.process.write(a, b"x")):
            with pytest.raises(BusError):
                access(addr + 2 * PAGE_SIZE)
        disk.machine.verify()

    def test_cannot_be_read(self, disk):
        """EIO of the device is SIGBUS; it goes away with the failure."""
        addr = disk.mmap()
        disk.device.fail("read")
        with pytest.raises(BusError):
            disk.process.read(addr, 1)
        disk.machine.verify()
        disk.device.faults.clear()
        assert pattern(0)[:1] == disk.process.read(addr, 1)

    def test_hole(self, disk):
        """A store to a hole finds its blocks at once; where there is no room it is SIGBUS."""
        disk.file.truncate(2 * PAGES * PAGE_SIZE)
        addr = disk.process.mmap(2 * PAGES * PAGE_SIZE, file=disk.file)
        room = disk.fs.free_bytes
        assert bytes(10) == disk.process.read(addr + PAGES * PAGE_SIZE, 10)
        assert room == disk.fs.free_bytes
        disk.process.write(addr + PAGES * PAGE_SIZE, b"x")
        assert room - PAGE_SIZE == disk.fs.free_bytes

        with disk.fs.create("full") as other:
            other.write(0, bytes(room))
        with pytest.raises(BusError):
            disk.process.write(addr + (PAGES + 1) * PAGE_SIZE, b"x")
        assert bytes(9) == disk.process.read(addr + (PAGES + 1) * PAGE_SIZE, 9)
        disk.machine.verify()


class TestReclaim:
    def test_clean_pages(self, disk):
        """They go, buffers and all, and are read again."""
        disk.file.read(0, PAGES * PAGE_SIZE)
        lru_add_drain_all(disk.mem)
        assert PAGES == reclaim_pages(disk.mem, disk.pfns())
        assert 0 == disk.mem.buffers.in_use
        assert (disk.pfns() <= 0).all()
        assert pattern(4) == disk.file.read(4 * PAGE_SIZE, PAGE_SIZE)

    def test_dirty_pages(self, disk):
        """They are written first."""
        addr = disk.mmap()
        disk.process.write(addr + PAGE_SIZE, b"one")
        disk.store(2)
        lru_add_drain_all(disk.mem)
        pfns = disk.pfns()
        assert np.count_nonzero(pfns) == reclaim_pages(disk.mem, pfns[pfns > 0])
        assert [b"one", b"new"] == [disk.on_disk(page) for page in (1, 2)]
        assert b"one" == disk.process.read(addr + PAGE_SIZE, 3)

    def test_under_way(self, disk):
        """They stay, and become active."""
        disk.store(2)
        lru_add_drain_all(disk.mem)
        pfn = disk.pfns()[2:3]
        with disk.device.hold():
            assert 0 == reclaim_pages(disk.mem, pfn)
            assert disk.mem.flags[pfn] & PG_writeback
            assert 0 == reclaim_pages(disk.mem, pfn)
            assert disk.mem.flags[pfn] & PG_active
        assert 1 == reclaim_pages(disk.mem, pfn)

    def test_cannot_be_written(self, disk):
        """What could not be written is lost with its page, and fsync says so."""
        disk.store(2)
        lru_add_drain_all(disk.mem)
        disk.device.fail("write", nth=1)
        assert 1 == reclaim_pages(disk.mem, disk.pfns()[2:3])
        assert pattern(2) == disk.file.read(2 * PAGE_SIZE, PAGE_SIZE)
        with pytest.raises(InputOutputError):
            disk.file.fsync()

    def test_short_memory(self, tmp_path):
        """A file larger than memory is written and read."""
        disk = Disk(mapped_range(pages=1, nodes=("1MiB",), memory="256KiB"), tmp_path / "disk")
        with disk.machine.mount(tmp_path / "large", size="4MiB") as fs, fs.create("f") as file:
            data = np.random.default_rng(1).integers(0, 255, 3 << 20, dtype=np.uint8).tobytes()
            assert len(data) == file.write(0, data)
            assert data == file.read(0, len(data))
            disk.machine.verify()
        disk.end()


class TestMigration:
    def nodes(self, disk):
        pfns = disk.pfns()
        return disk.mem.page_to_nid(pfns[pfns > 0]).tolist()

    def test_buffers_go_along(self, disk):
        """A page moves to another node with its buffers, clean or dirty."""
        addr = disk.mmap()
        disk.process.read(addr, PAGES * PAGE_SIZE)
        disk.process.write(addr + 3 * PAGE_SIZE, b"mapped")
        disk.store(5)
        addrs = addr + np.arange(PAGES) * PAGE_SIZE
        assert [1] * PAGES == disk.process.move_pages(addrs, [1] * PAGES).tolist()
        assert [1] * PAGES == self.nodes(disk)
        assert list(range(PAGES)) == disk.flagged(PG_private)
        assert [3, 5] == disk.flagged(PG_dirty) == disk.tagged(PAGECACHE_TAG_DIRTY)
        disk.machine.verify()
        disk.file.fsync()
        assert [b"map", b"new"] == [disk.on_disk(page) for page in (3, 5)]
        assert b"mapped\4" == disk.process.read(addr + 3 * PAGE_SIZE, 7)

    def test_under_way(self, disk):
        """A page on its way to disk is waited for; with nobody to end that, it is an error."""
        addr = disk.mmap()
        disk.process.read(addr, PAGES * PAGE_SIZE)
        disk.store(3)
        with disk.device.hold():
            write_cache_pages(disk.mapping, WritebackControl())
            with pytest.raises(Deadlock):
                disk.process.move_pages([addr + 3 * PAGE_SIZE], [1])
            disk.machine.verify()
        assert [1] == disk.process.move_pages([addr + 3 * PAGE_SIZE], [1]).tolist()

    def test_under_way_and_completed(self, disk):
        """When the device is done it moves."""
        addr = disk.mmap()
        disk.process.read(addr, PAGES * PAGE_SIZE)
        disk.store(3)
        disk.device.holding = True
        write_cache_pages(disk.mapping, WritebackControl())
        status = []
        move = lambda: status.extend(disk.process.move_pages([addr + 3 * PAGE_SIZE], [1]))  # noqa: E731
        thread = threading.Thread(target=move)
        thread.start()
        thread.join(0.02)
        assert thread.is_alive()
        disk.device.complete()
        thread.join(5)
        assert [1] == status

    def test_to_a_device(self, disk):
        """A device does not get pages of files, and reads and writes them where they are."""
        addr = disk.mmap()
        disk.process.write(addr, b"mine")
        disk.process.read(addr, PAGES * PAGE_SIZE)
        gpu = disk.world.gpu

        moved = gpu.to_device(disk.process, addr, PAGES * PAGE_SIZE)

        assert (0, {"refused": PAGES}) == (moved.migrated, dict(moved.stayed))
        assert b"mine" == gpu.read(disk.process, addr, 4)
        disk.file.fsync()
        gpu.write(disk.process, addr, b"ours")
        assert [0] == disk.flagged(PG_dirty)
        disk.file.fsync()
        assert b"our" == disk.on_disk(0)

    def test_pinned(self, disk):
        """A page that a device writes to stays, with its buffers."""
        addr = disk.mmap()
        disk.process.write(addr, b"x")
        disk.world.pins.append(disk.process.pin(addr, PAGE_SIZE))
        disk.process.move_pages([addr + page * PAGE_SIZE for page in range(3)], [1] * 3)
        assert 0 == disk.mem.page_to_nid(disk.pfns())[0]
        disk.machine.verify()
        disk.world.let_go()


class TestBalance:
    def test_background(self, disk):
        """Above the lower limit the oldest files are written until it is reached."""
        disk.mem.dirty_background_ratio = 0
        for page in range(PAGES):
            disk.store(page)
        assert 0 == disk.machine.vmstat["nr_dirty"]
        assert b"new" == disk.on_disk(7)

    def test_below(self, disk):
        """Below it nothing is written."""
        for page in range(PAGES):
            disk.store(page)
        balance_dirty_pages(disk.mem)
        assert PAGES == disk.machine.vmstat["nr_dirty"]

    def test_limits(self, disk):
        """They are shares of what could be dirty, the lower one the smaller."""
        background, limit = global_dirty_limits(disk.mem)
        assert 0 < background < limit < disk.machine.nr_free_pages // 4
        disk.mem.dirty_background_ratio = 50
        assert limit // 2 == global_dirty_limits(disk.mem)[0]

    def test_stores_through_a_mapping(self, disk):
        """They count as well, when the next one comes."""
        addr = disk.mmap()
        disk.mem.dirty_background_ratio = 0
        disk.process.write(addr, b"one")
        disk.process.write(addr + PAGE_SIZE, b"two")
        assert [1] == disk.flagged(PG_dirty)
        assert b"one" == disk.on_disk(0)

    def test_clear_page_dirty_for_io(self, disk):
        """It says which pages were dirty."""
        disk.file.read(0, 2 * PAGE_SIZE)
        disk.store(1)
        pfns = disk.pfns()[:2]
        lock_page(disk.mem, pfns)
        assert [False, True] == clear_page_dirty_for_io(disk.mapping, pfns).tolist()
        assert [False, False] == clear_page_dirty_for_io(disk.mapping, pfns).tolist()
        disk.mapping.a_ops.set_page_dirty(disk.mapping, pfns)
        unlock_page(disk.mem, pfns)
