"""Files on disk, by way of the page cache."""

import errno
from dataclasses import replace

import pytest

from mm import PAGE_SIZE, BusError, Machine
from mm.errors import InputOutputError, InvalidArgument, NotExecutable, OutOfMemory
from mm.filemap_io import generic_file_mmap
from mm.fs import PAGECACHE_TAG_DIRTY
from mm.page_flags import PG_active, PG_referenced
from mm.swap import lru_add_drain_all
from mm.vectors import some
from mm.vmscan import reclaim_pages
from mm.writeback import WB_SYNC_ALL, WritebackControl, write_cache_pages
from mm.xarray import MAX_INDEX
from tests.files import disk_file
from tests.world import mapped_range

DATA = bytes(range(256)) * 50  # three pages and a part of the fourth


@pytest.fixture
def world():
    return mapped_range(pages=1, nodes=("16MiB",))


@pytest.fixture
def on_disk(world):
    return disk_file(world.machine, DATA)


def cached(file):
    """Offsets and PFNs of the pages of *file* in memory."""
    indexes, entries = file.f_mapping.i_pages.find(0, MAX_INDEX)
    return indexes[entries > 0].tolist(), entries[entries > 0]


class TestRead:
    @pytest.mark.parametrize(("pos", "n"), [(0, 12800), (5000, 7), (4090, 10), (12790, 99), (0, 0)])
    def test_bytes(self, on_disk, pos, n):
        """What is there, and no more than there is."""
        assert DATA[pos : pos + n] == on_disk[0].read(pos, n)

    def test_missing_pages_come_in_one_go(self, on_disk):
        """And those that are in memory are not read again."""
        file, disk = on_disk
        file.read(PAGE_SIZE, 1)

        file.read(0, len(DATA))

        assert [[1], [0, 2, 3]] == disk.reads

    def test_page_that_cannot_be_read(self, on_disk):
        """What comes before it is given; there it fails, and the page is not in memory."""
        file, disk = on_disk
        disk.bad = {2}

        assert DATA[: 2 * PAGE_SIZE] == file.read(0, len(DATA))
        with pytest.raises(InputOutputError, match="cannot be read from where it is stored"):
            file.read(2 * PAGE_SIZE, 1)

        assert [0, 1, 3] == cached(file)[0]

    def test_used_twice(self, world, on_disk):
        """The second read makes a page active."""
        file, _ = on_disk
        mem = world.machine.mem
        file.read(0, 1)
        lru_add_drain_all(mem)
        pfn, *ahead = cached(file)[1].tolist()
        assert mem.flags[pfn] & PG_referenced
        assert not some(mem.flags[ahead] & PG_referenced)

        file.read(0, 1)

        assert mem.flags[pfn] & PG_active
        assert not mem.flags[pfn] & PG_referenced

    def test_no_frame(self):
        """It says so, and leaves nothing behind."""
        machine = Machine(("1MiB",))
        process = machine.spawn()
        with pytest.raises(OutOfMemory):
            process.touch(process.mmap("2MiB", flags="anon|private|noreserve"), "2MiB")
        file, _ = disk_file(machine, DATA)

        with pytest.raises(OutOfMemory, match="read: no frame for a page"):
            file.read(0, 1)

        machine.verify()


class TestWrite:
    def test_is_dirty_until_stored(self, world, on_disk):
        """The page is tagged, and reclaim stores it before it takes it."""
        file, disk = on_disk
        mem = world.machine.mem

        file.write(PAGE_SIZE + 5, b"new")

        assert [1] == file.f_mapping.i_pages.find(0, 9, PAGECACHE_TAG_DIRTY)[0].tolist()
        assert 1 == mem.vmstat["nr_dirty"]
        lru_add_drain_all(mem)
        assert 1 == reclaim_pages(mem, cached(file)[1])
        assert b"new" == disk.data[1, 5:8].tobytes()
        assert 0 == mem.vmstat["nr_dirty"]
        assert DATA[PAGE_SIZE : PAGE_SIZE + 5] + b"new" == file.read(PAGE_SIZE, 8)

    def test_page_that_comes_back_early(self, world, on_disk):
        """It left a shadow, and is active."""
        file, _ = on_disk
        mem = world.machine.mem
        file.read(0, 1)
        lru_add_drain_all(mem)
        reclaim_pages(mem, cached(file)[1])

        with mem.vmstat.counting("workingset_refault") as delta:
            file.read(2 * PAGE_SIZE, 1)  # out of order: nothing is read ahead

        assert {"workingset_refault": 1} == delta


class TestFault:
    def test_major_then_minor(self, world, on_disk):
        """Who waits for the disk takes a major fault; what is around it is mapped with the next."""
        file, _disk = on_disk
        process = world.process
        addr = process.mmap(len(DATA), "r", file=file)

        assert DATA[:10] == process.read(addr, 10)
        file.read(0, len(DATA))
        before = process.min_flt, process.maj_flt
        assert DATA[PAGE_SIZE : PAGE_SIZE + 10] == process.read(addr + PAGE_SIZE, 10)
        assert DATA[2 * PAGE_SIZE :] == process.read(addr + 2 * PAGE_SIZE, len(DATA) - 8192)

        assert (1, 0) == (process.min_flt - before[0], process.maj_flt - before[1])
        assert (4, 4) == (process.mm.file_rss, world.machine.vmstat["nr_mapped"])

    def test_page_that_cannot_be_read(self, world, on_disk):
        """SIGBUS; its neighbours are fine."""
        file, disk = on_disk
        disk.bad = {1}
        addr = world.process.mmap(len(DATA), "r", file=file)

        with pytest.raises(BusError):
            world.process.read(addr + PAGE_SIZE, 1)
        assert DATA[:1] == world.process.read(addr, 1)

    def test_first_store_asks_the_file(self, world, on_disk):
        """Once for each page, whether it was mapped for a load before or not."""
        file, disk = on_disk
        addr = world.process.mmap(len(DATA), file=file)
        world.process.read(addr, 1)

        for _ in range(2):
            world.process.write(addr, b"xx")
            world.process.write(addr + 2 * PAGE_SIZE, b"yy")

        assert [[0], [2]] == disk.mkwrites
        assert [0, 2] == file.f_mapping.i_pages.find(0, 9, PAGECACHE_TAG_DIRTY)[0].tolist()
        assert 2 == world.machine.vmstat["nr_dirty"]
        assert b"xx" + DATA[2:4] == file.read(0, 4)

    def test_file_that_refuses(self, world, on_disk):
        """The store gets SIGBUS, and the page stays clean."""
        file, disk = on_disk
        addr = world.process.mmap(len(DATA), file=file)
        world.process.read(addr, 1)
        disk.bad = {0}

        with pytest.raises(BusError):
            world.process.write(addr, b"x")

        assert 0 == world.machine.vmstat["nr_dirty"]
        assert DATA[:1] == world.process.read(addr, 1)

    def test_willneed(self, world, on_disk):
        """MADV_WILLNEED reads what the file has, and the fault finds it."""
        file, disk = on_disk
        addr = world.process.mmap("64KiB", "r", file=file)

        world.process.madvise(addr, "64KiB", "willneed")

        assert [[0, 1, 2, 3]] == disk.reads
        assert [True] * 4 + [False] * 12 == world.process.mincore(addr, "64KiB").tolist()


class TestReadAhead:
    def test_from_the_beginning(self, world):
        """Who reads a file in order gets a window more each time."""
        file, disk = disk_file(world.machine, bytes(100 * PAGE_SIZE))

        for page in range(40):
            file.read(page * PAGE_SIZE, PAGE_SIZE)

        assert [list(range(33)), list(range(33, 66))] == disk.reads

    def test_out_of_order(self, world):
        """Who jumps about gets what is asked for."""
        file, disk = disk_file(world.machine, bytes(100 * PAGE_SIZE))

        for page in (50, 7, 90):
            file.read(page * PAGE_SIZE, 2 * PAGE_SIZE)

        assert [[50, 51], [7, 8], [90, 91]] == disk.reads

    @pytest.mark.parametrize(
        ("advice", "pages"),
        [("normal", range(34, 66)), ("sequential", range(50, 82)), ("random", range(50, 51))],
    )
    def test_fault(self, world, advice, pages):
        """A mapping's fault reads what is around it, or after it, or nothing else."""
        file, disk = disk_file(world.machine, bytes(100 * PAGE_SIZE))
        addr = world.process.mmap(100 * PAGE_SIZE, file=file)
        world.process.madvise(addr, 100 * PAGE_SIZE, advice)

        world.process.read(addr + 50 * PAGE_SIZE, 1)

        assert [list(pages)] == disk.reads
        assert 1 == world.process.maj_flt

    def test_page_that_cannot_be_read(self, world):
        """Read ahead it is nobody's trouble."""
        file, disk = disk_file(world.machine, bytes(100 * PAGE_SIZE))
        disk.bad = {7}

        assert bytes(PAGE_SIZE) == file.read(0, PAGE_SIZE)
        assert 7 not in cached(file)[0]
        world.machine.verify()

    def test_readinto(self, world, on_disk):
        """A buffer is filled as far as the file goes; one that cannot be written is refused."""
        buffer = bytearray(len(DATA) + 10)
        assert len(DATA) - 100 == on_disk[0].readinto(100, buffer)
        assert DATA[100:] + bytes(110) == buffer
        assert 0 == on_disk[0].readinto(len(DATA) + 5, buffer)
        with pytest.raises(InvalidArgument):
            on_disk[0].readinto(0, b"constant")


class TestTables:
    def file(self, world, **changes):
        """A file on disk whose operations are changed."""
        file, disk = disk_file(world.machine, DATA)
        file.f_mapping.a_ops = replace(file.f_mapping.a_ops, **changes)
        return file, disk

    def test_no_readpages(self, world):
        """A file that cannot be read by pages cannot be mapped."""
        file, _ = self.file(world, readpages=None)
        file.f_op = replace(file.f_op, mmap=generic_file_mmap)

        with pytest.raises(NotExecutable) as caught:
            world.process.mmap(PAGE_SIZE, file=file)

        assert errno.ENOEXEC == caught.value.errno
        assert 1 == file.f_count

    def test_generic_mmap(self, world, on_disk):
        """A mapping of the usual kind: loads, stores, and the page is dirty."""
        file, _ = on_disk
        file.f_op = replace(file.f_op, mmap=generic_file_mmap)
        addr = world.process.mmap(len(DATA), file=file)

        world.process.write(addr + 5, b"new")

        assert DATA[:5] + b"new" == file.read(0, 8)
        assert [0] == file.f_mapping.i_pages.find(0, 9, PAGECACHE_TAG_DIRTY)[0].tolist()

    def test_no_writepage(self, world):
        """What is dirty stays so: neither sync nor reclaim nor migration can do anything."""
        file, _ = self.file(world, writepage=None)
        addr = world.process.mmap(len(DATA), file=file)
        world.process.write(addr, b"new")
        mem = world.machine.mem
        lru_add_drain_all(mem)

        write_cache_pages(file.f_mapping, WritebackControl(WB_SYNC_ALL))
        assert len(cached(file)[0]) - 1 == reclaim_pages(mem, cached(file)[1])
        assert [0] == cached(file)[0]
        assert mem.flags[cached(file)[1]] & PG_active
        assert 1 == mem.vmstat["nr_dirty"]


class TestFallbackMigratePage:
    @pytest.fixture
    def world(self):
        return mapped_range(pages=1, nodes=("16MiB", "16MiB"))

    def test_dirty_pages_are_written_first(self, world, on_disk):
        """Then they move as clean ones do."""
        file, disk = on_disk
        addr = world.process.mmap(len(DATA), file=file)
        world.process.read(addr, len(DATA))
        world.process.write(addr, b"new")

        assert [1, 1] == world.process.move_pages([addr, addr + PAGE_SIZE], [1, 1]).tolist()

        assert b"new" == disk.data[0, :3].tobytes()
        assert 0 == world.machine.vmstat["nr_dirty"]
        assert b"new" == world.process.read(addr, 3)
        world.machine.verify()

    def test_no_writepage(self, world, on_disk):
        """A dirty page of a file that cannot be written stays; a clean one moves."""
        file, _ = on_disk
        file.f_mapping.a_ops = replace(file.f_mapping.a_ops, writepage=None)
        addr = world.process.mmap(len(DATA), file=file)
        world.process.read(addr, len(DATA))
        world.process.write(addr, b"new")

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            world.process.move_pages([addr, addr + PAGE_SIZE], [1, 1])

        _, pfns = cached(file)
        assert [0, 1] == world.machine.mem.page_to_nid(pfns[:2]).tolist()
        assert {"pgmigrate_success": 1, "pgmigrate_fail": 1} == delta
        assert b"new" == world.process.read(addr, 3)
        world.machine.verify()
