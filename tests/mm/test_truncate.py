"""Pages of files go: cut off, punched out, or to be read again."""

import numpy as np
import pytest

from mm import PAGE_SIZE, BusError
from mm.swap import lru_add_drain_all
from mm.truncate import (
    EVERYTHING,
    invalidate_inode_pages2_range,
    partial_pages,
    truncate_inode_pages_range,
    unmap_mapping_range,
)
from mm.vmscan import reclaim_pages
from tests.files import disk_file, mapped_file
from tests.hmm.watch import Watch
from tests.world import mapped_range

DATA = bytes(range(256)) * 64  # four pages


@pytest.fixture
def on_disk():
    world = mapped_range(pages=1)
    return world, *disk_file(world.machine, DATA)


class TestPartialPages:
    @pytest.mark.parametrize(
        ("start", "end", "parts"),
        [
            (0, 4096, []),
            (100, 200, [(100, 100)]),
            (100, 4096, [(100, 3996)]),
            (0, 100, [(0, 100)]),
            (100, 5000, [(100, 3996), (4096, 904)]),
            (100, EVERYTHING, [(100, 3996)]),
            (8192, 8192, []),
        ],
    )
    def test_ends(self, start, end, parts):
        """What is not whole pages, by page."""
        assert parts == partial_pages(start, end)

    def test_cover_the_range(self):
        """Whole pages and parts make up every range, once."""
        for start in range(0, 3 * PAGE_SIZE, 1000):
            for end in range(start, 4 * PAGE_SIZE, 777):
                covered = np.zeros(5 * PAGE_SIZE, dtype=int)
                first, stop = -(-start // PAGE_SIZE), end // PAGE_SIZE
                covered[first * PAGE_SIZE : max(stop, first) * PAGE_SIZE] += 1
                for offset, nbytes in partial_pages(start, end):
                    covered[offset : offset + nbytes] += 1
                assert [end - start] == [covered.sum()], (start, end)
                assert (covered[start:end] == 1).all()


class TestTruncate:
    def test_dirty_pages_are_lost(self, on_disk):
        """Nobody stores what is cut off."""
        world, file, _disk = on_disk
        file.write(0, b"x" * len(DATA))

        file.truncate(PAGE_SIZE)

        assert 1 == world.machine.vmstat["nr_dirty"] == world.machine.vmstat["nr_file_pages"]
        assert b"x" * PAGE_SIZE == file.read(0, 1 << 20)

    def test_shadows_go(self, on_disk):
        """Nothing is left in the cache of what is cut off."""
        world, file, _disk = on_disk
        file.read(0, len(DATA))
        lru_add_drain_all(world.machine.mem)
        mapping = file.f_mapping
        entries = mapping.i_pages.find(0, 9)[1]
        assert 4 == reclaim_pages(world.machine.mem, entries)
        assert not mapping.i_pages.empty

        truncate_inode_pages_range(mapping, 0, EVERYTHING)

        assert mapping.i_pages.empty

    def test_mapped_here_and_there(self, on_disk):
        """All who map it lose it, at whatever offset they do."""
        world, file, _disk = on_disk
        whole = world.process.mmap(len(DATA), "r", file=file)
        part = world.process.mmap(PAGE_SIZE, "r", file=file, offset=2 * PAGE_SIZE)
        assert DATA[8192:8200] == world.process.read(part, 8) == world.process.read(whole + 8192, 8)

        file.truncate(PAGE_SIZE)

        for addr in (part, whole + 8192):
            with pytest.raises(BusError):
                world.process.read(addr, 8)


class TestDevicePages:
    """Private copies in device memory, which a walk without even_cows passes over."""

    def away(self):
        world = mapped_file(pages=3).private()
        world.process.write(world.at(1), b"mine")
        assert 1 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
        return world

    def test_hole(self):
        """They stay where they are, as does what they hold."""
        world = self.away()

        world.file.fallocate("punch_hole|keep_size", 0, world.nbytes)

        assert [False, True, False] == world.on_device()
        assert b"mine" == world.process.read(world.at(1), 4)

    def test_truncation(self):
        """They are free."""
        world = self.away()
        free = world.gpu.chunks.free_pages

        world.file.truncate(PAGE_SIZE)

        assert free + 1 == world.gpu.chunks.free_pages
        assert 0 == world.process.mm.anon_rss


class TestUnmap:
    def test_listeners_hear_it(self):
        """Each mapping that has some of the range; the others are left alone."""
        world = mapped_file(pages=4)
        other = world.process.mmap(PAGE_SIZE, file=world.file)
        assert b"\0" == world.process.read(other, 1)

        with Watch(world.process.mm) as watch:
            unmap_mapping_range(world.file.f_mapping, 2 * PAGE_SIZE, 3 * PAGE_SIZE, even_cows=False)

        assert [True, True, False, True] == (world.ptes() != 0).tolist()
        assert [("clear", world.at(2), world.at(3))] == watch.heard
        assert world.intact()


class TestInvalidate:
    def test_clean_pages_go(self, on_disk):
        """They are read again; what is mapped of them is unmapped first."""
        world, file, disk = on_disk
        addr = world.process.mmap(len(DATA), "r", file=file)
        world.process.read(addr, len(DATA))
        lru_add_drain_all(world.machine.mem)
        disk.data[1] = 7

        assert invalidate_inode_pages2_range(file.f_mapping, PAGE_SIZE, PAGE_SIZE + 1)

        assert bytes([7] * 8) == world.process.read(addr + PAGE_SIZE, 8)
        assert [1] == disk.reads[-1]

    def test_dirty_page_stays(self, on_disk):
        """It says that it did not get all."""
        _world, file, _disk = on_disk
        file.write(0, b"new")

        assert not invalidate_inode_pages2_range(file.f_mapping, 0, EVERYTHING)

        assert b"new" == file.read(0, 3)
