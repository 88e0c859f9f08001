"""Buffers: pages of a file as blocks of a device, against the bytes of the device."""

import errno

import numpy as np
import pytest

from mm.blkdev import blkdev_open, blkdev_put
from mm.blockfs_extents import Extents
from mm.buffer import (
    block_commit_write,
    block_invalidatepage,
    block_prepare_write,
    block_read_full_page,
    block_write_full_page,
    page_has_private,
    set_page_dirty_buffers,
    try_to_free_buffers,
    try_to_release_page,
)
from mm.buffer_head import BH_Dirty, BH_Mapped, BH_New, BH_Uptodate, BH_Write_EIO, BufferHeads
from mm.filemap import unlock_page
from mm.fs import File, FileOperations, Inode, InodeOperations
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.page_alloc import alloc_pages_bulk
from mm.page_cache import (
    add_to_page_cache_lru,
    delete_from_page_cache,
    find_lock_pages,
    set_page_dirty,
)
from mm.page_flags import PG_dirty, PG_private, PG_uptodate, PG_writeback
from mm.swap import lru_add_drain_all, put_page
from mm.types import AddressSpaceOperations
from mm.typing import PAGE_SIZE, pages
from mm.writeback import (
    clear_page_dirty_for_io,
    file_check_and_advance_wb_err,
    filemap_check_errors,
)
from mm.xarray import MAX_INDEX
from tests.world import mapped_range

EIO, ENOSPC = -errno.EIO, -errno.ENOSPC
DISK_BLOCKS = 64


class TinyFs:
    """A file whose blocks are handed out one after the other, while there are any."""

    def __init__(self, mem, path, block_size, first=32, room=DISK_BLOCKS):
        path.write_bytes(b"".join(bytes([n]) * block_size for n in range(DISK_BLOCKS)))
        self.path, self.block_size, self.next, self.room = path, block_size, first, room
        self.s_bdev = blkdev_open(path, mem.vmstat)
        aops = AddressSpaceOperations(set_page_dirty=set_page_dirty_buffers)
        iops = InodeOperations(setattr=lambda inode, size: None, evict_inode=self.evict)
        inode = Inode(mem, iops, FileOperations(), aops)
        inode.i_sb, inode.i_blkbits = self, block_size.bit_length() - 1
        self.extents, self.file, self.mapping = Extents.none(), File(inode, "f"), inode.i_mapping

    def get_block(self, inode, blocks, create):
        found = self.extents.lookup(blocks)
        new = np.zeros(blocks.size, dtype=bool)
        if create:
            holes = np.unique(blocks[found < 0])[: self.room]
            self.extents.insert(holes, np.arange(self.next, self.next + holes.size))
            self.next, self.room = self.next + holes.size, self.room - holes.size
            new = (found < 0) & (self.extents.lookup(blocks) >= 0)
        return self.extents.lookup(blocks), new

    def lay_out(self, *numbers):
        """Let the file's blocks be *numbers* of the device; -1 is a hole."""
        at = np.flatnonzero(np.array(numbers) >= 0)
        self.extents.insert(at, np.array(numbers)[at])
        self.file.f_inode.i_size = len(numbers) * self.block_size

    def pages(self, *indexes):
        """Fresh pages of the file, locked and with a reference."""
        mem = self.mapping.mem
        pfns = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, 0, len(indexes))
        assert add_to_page_cache_lru(self.mapping, pfns, pages(*indexes)).all()
        lru_add_drain_all(mem)
        mem.payload[pfns] = 0xEE
        return pfns

    def read(self, *indexes):
        pfns = self.pages(*indexes)
        return pfns, block_read_full_page(self.mapping, pfns, self.get_block).tolist()

    def write(self, pfns, pos, nbytes):
        """Fill a range with 0xA5, as write(2) does; what each page came to."""
        status = block_prepare_write(self.mapping, pfns, pos, nbytes, self.get_block)
        if not status.any():
            memory = self.mapping.mem.payload[pfns].reshape(-1)
            start = pos - self.mapping.mem.index.item(pfns[0]) * PAGE_SIZE
            memory[start : start + nbytes] = 0xA5
            self.mapping.mem.payload[pfns] = memory.reshape(-1, PAGE_SIZE)
            block_commit_write(self.mapping, pfns, pos, nbytes)
            inode = self.file.f_inode
            inode.i_size = max(inode.i_size, pos + nbytes)
        return status.tolist()

    def write_out(self, pfns):
        clear_page_dirty_for_io(self.mapping, pfns)
        block_write_full_page(self.mapping, pfns, self.get_block)

    def drop(self, pfns):
        """Unlock *pfns* and let go of them."""
        unlock_page(self.mapping.mem, pfns)
        put_page(self.mapping.mem, pfns)

    def first_bytes(self, pfns):
        """Of each block of *pfns*."""
        return self.mapping.mem.payload[pfns].reshape(-1, self.block_size)[:, 0].tolist()

    def on_disk(self, block):
        """The bytes of a block of the device that occur, each once."""
        raw = self.path.read_bytes()[block * self.block_size : (block + 1) * self.block_size]
        return sorted(set(raw))

    def evict(self, inode):
        """Nobody has the file any more."""
        mem = inode.mem
        indexes, _ = inode.i_mapping.i_pages.find(0, MAX_INDEX)
        pfns = find_lock_pages(inode.i_mapping, indexes)
        block_invalidatepage(inode.i_mapping, pfns, 0, PAGE_SIZE)
        delete_from_page_cache(mem, pfns)
        self.drop(pfns)


def states(mem, pfns, bit, parts=4):
    return (mem.buffers.b_state[mem.private[pfns], :parts] & bit != 0).tolist()


@pytest.fixture
def mem():
    return mapped_range(pages=1).machine.mem


@pytest.fixture
def make(mem, tmp_path):
    """Makes a TinyFs; its file is closed when the test ends."""
    made = []

    def a_file(block_size=1024, **options):
        made.append(TinyFs(mem, tmp_path / f"disk{len(made)}", block_size, **options))
        return made[-1]

    yield a_file
    for fs in made:
        fs.s_bdev.faults.clear()
        blkdev_put(fs.s_bdev)
        fs.file.close()


class TestBufferHeads:
    def test_rows_are_blank(self):
        """Each page gets a row of its own; what is given back comes back blank."""
        heads = BufferHeads()
        rows = heads.alloc(pages(7, 8, 9))
        heads.b_state[rows], heads.b_blocknr[rows] = BH_Dirty, 5
        heads.free(rows[:2])
        again = heads.alloc(np.arange(100, 120))

        assert 0 not in rows
        assert 21 == heads.in_use == np.unique([*rows[2:], *again]).size
        assert not heads.b_state[again].any()
        assert (heads.b_blocknr[again] == -1).all()
        assert list(range(100, 120)) == heads.b_page[again].tolist()


class TestRead:
    @pytest.mark.parametrize("block_size", [1024, 2048, 4096])
    def test_blocks_and_holes(self, mem, make, block_size):
        """A page is its blocks, wherever they are; holes and what is past the end are zeros."""
        fs, of_a_page = make(block_size), PAGE_SIZE // block_size
        fs.lay_out(9, 3, -1, 4, 5, 6)
        count = 6 // of_a_page + 1

        pfns, filled = fs.read(*range(count))

        expected = [9, 3, 0, 4, 5, 6] + [0] * 8
        assert expected[: count * of_a_page] == fs.first_bytes(pfns)
        assert [True] * count == filled
        assert mem.flags[pfns].all()
        assert page_has_private(mem, pfns).all()
        assert [3] * count == mem.refcount[pfns].tolist()
        fs.drop(pfns)

    def test_in_few_system_calls(self, make):
        """Blocks that follow one another are read at once, of however many pages."""
        fs = make()
        fs.lay_out(*range(10, 26))
        pfns, _ = fs.read(0, 1, 2, 3)

        assert 1 == fs.s_bdev.ios["read"]
        fs.drop(pfns)

    def test_block_that_cannot_be_read(self, mem, make):
        """Its page is not up to date; the next attempt reads what is missing only."""
        fs = make()
        fs.lay_out(*range(10, 18))
        fault = fs.s_bdev.fail("read", sectors=[2 * 15])
        pfns, filled = fs.read(0, 1)
        assert [True, False] == filled
        assert [[True] * 4, [True, False, True, True]] == states(mem, pfns, BH_Uptodate)

        fs.s_bdev.faults.remove(fault)
        before = mem.vmstat["pgpgin"]
        assert [True] == block_read_full_page(fs.mapping, pfns[1:], fs.get_block).tolist()
        assert 1 == mem.vmstat["pgpgin"] - before
        assert [14, 15, 16, 17] == fs.first_bytes(pfns[1:])
        fs.drop(pfns)


class TestWrite:
    def test_whole_blocks_are_not_read(self, mem, make):
        """Nothing is read where all of a block is written; the others stay unknown."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns = fs.pages(0)

        assert [0] == fs.write(pfns, 1024, 2048)

        assert 0 == fs.s_bdev.ios["read"]
        assert [[False, True, True, False]] == states(mem, pfns, BH_Dirty)
        assert not mem.flags[pfns] & PG_uptodate
        assert 1 == mem.vmstat["nr_dirty"]
        fs.write_out(pfns)
        assert [[10], [0xA5], [0xA5], [13]] == [fs.on_disk(n) for n in (10, 11, 12, 13)]
        assert 2 == mem.vmstat["pgpgout"]
        fs.drop(pfns)

    def test_what_is_around_the_bytes(self, mem, make):
        """The rest of a block is read before part of it is written."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns = fs.pages(0)

        assert [0] == fs.write(pfns, 1500, 100)
        fs.write_out(pfns)

        assert [11, 0xA5] == fs.on_disk(11)
        assert 1 == mem.vmstat["pgpgin"]
        fs.drop(pfns)

    def test_hole(self, mem, make):
        """It gets a block, zeros around the bytes."""
        fs = make()
        fs.lay_out(-1, -1, -1, -1)
        pfns = fs.pages(0)

        assert [0] == fs.write(pfns, 1500, 1000)
        fs.write_out(pfns)

        assert [-1, 32, 33, -1] == fs.extents.lookup(np.arange(4)).tolist()
        assert [[0, 0xA5], [0, 0xA5]] == [fs.on_disk(32), fs.on_disk(33)]
        assert [[False] * 4] == states(mem, pfns, BH_New)
        assert 0 == fs.s_bdev.ios["read"]
        fs.drop(pfns)

    def test_hole_that_was_read(self, mem, make):
        """All of its new block goes to the device, for the device has something else there."""
        fs = make()
        fs.lay_out(-1, -1, -1, -1)
        pfns, _ = fs.read(0)

        fs.write(pfns, 0, 10)
        fs.write_out(pfns)

        assert [0, 0xA5] == fs.on_disk(32)
        assert [33] == fs.on_disk(33)
        fs.drop(pfns)

    def test_no_room(self, mem, make):
        """The pages before the one that fails are ready; blocks made for that are zeros."""
        fs = make(room=6)
        fs.lay_out(*[-1] * 12)
        pfns = fs.pages(0, 1, 2)

        status = block_prepare_write(fs.mapping, pfns, 0, 3 * PAGE_SIZE, fs.get_block)

        assert [0, ENOSPC, ENOSPC] == status.tolist()
        assert [[True, True, False, False], [False] * 4] == states(mem, pfns[1:], BH_Dirty)
        assert [False, True, False] == (mem.flags[pfns] & PG_dirty != 0).tolist()
        assert [0, 0, 0xEE, 0xEE] == fs.first_bytes(pfns[1:2])
        fs.drop(pfns)

    def test_no_room_for_all_of_a_hole_that_was_read(self, mem, make):
        """The blocks that it got are to be written: the device has something else there."""
        fs = make(room=2)
        fs.lay_out(-1, -1, -1, -1)
        pfns, _ = fs.read(0)

        status = block_prepare_write(fs.mapping, pfns, 0, PAGE_SIZE, fs.get_block)

        assert [ENOSPC] == status.tolist()
        assert [[True, True, False, False]] == states(mem, pfns, BH_Dirty)
        fs.write_out(pfns)
        assert [[0], [0]] == [fs.on_disk(32), fs.on_disk(33)]
        fs.drop(pfns)

    def test_surroundings_that_cannot_be_read(self, make):
        """Then the bytes cannot be written."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        fs.s_bdev.fail("read")
        pfns = fs.pages(0)

        assert [EIO] == fs.write(pfns, 100, 10)
        assert [0] == fs.write(pfns, 1024, 1024)
        fs.drop(pfns)


class TestWriteFullPage:
    def test_end_of_file(self, mem, make):
        """What lies past the end is not written, and zeros in the block that the end is in."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns, _ = fs.read(0)
        set_page_dirty(mem, pfns)
        fs.file.f_inode.i_size = 1030

        fs.write_out(pfns)

        assert [[10], [0, 11], [12]] == [fs.on_disk(n) for n in (10, 11, 12)]
        assert 2 == mem.vmstat["pgpgout"]
        assert [6, 0] == [
            np.count_nonzero(mem.payload[pfns][0, 1024:2048]),
            mem.payload[pfns[0], -1],
        ]
        fs.drop(pfns)

    def test_page_past_the_end(self, mem, make):
        """It is not written at all, and clean."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns, _ = fs.read(0)
        set_page_dirty(mem, pfns)
        fs.file.f_inode.i_size = 0

        fs.write_out(pfns)

        assert 0 == mem.vmstat["pgpgout"] == mem.vmstat["nr_dirty"]
        assert not page_has_private(mem, pfns).any()
        fs.drop(pfns)

    def test_held_back(self, mem, make):
        """Until the device has it, a page is PG_writeback, and keeps its buffers."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns, _ = fs.read(0)
        fs.write(pfns, 0, PAGE_SIZE)
        with fs.s_bdev.hold():
            fs.write_out(pfns)
            assert 1 == mem.vmstat["nr_writeback"]
            assert mem.flags[pfns] & PG_writeback
            assert [False] == try_to_free_buffers(fs.mapping, pfns).tolist()
            assert [10] == fs.on_disk(10)

        assert [0xA5] == fs.on_disk(10)
        assert not mem.flags[pfns] & PG_writeback
        assert (0, 1) == (mem.vmstat["nr_writeback"], mem.vmstat["nr_written"])
        fs.drop(pfns)

    @pytest.mark.parametrize("err", [errno.EIO, errno.ENOSPC])
    def test_device_that_fails(self, mem, make, err):
        """The page is clean, its block not up to date; who has the file open hears of it."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns, _ = fs.read(0)
        fs.write(pfns, 0, PAGE_SIZE)
        fs.s_bdev.fail("write", sectors=[25], error=err)

        fs.write_out(pfns)

        assert 0 == mem.vmstat["nr_dirty"]
        assert [[False, False, True, False]] == states(mem, pfns, BH_Write_EIO)
        assert [[True, True, False, True]] == states(mem, pfns, BH_Uptodate)
        assert [[0xA5], [12]] == [fs.on_disk(11), fs.on_disk(12)]
        assert [-err, 0] == [file_check_and_advance_wb_err(fs.file) for _ in range(2)]
        assert 0 == filemap_check_errors(fs.mapping)
        fs.drop(pfns)

    def test_no_room_for_a_hole(self, mem, make):
        """What was stored through a mapping finds no block: it is lost, and that is told."""
        fs = make(room=1)
        fs.lay_out(-1, -1, 12, 13)
        pfns, _ = fs.read(0)
        set_page_dirty(mem, pfns)

        fs.write_out(pfns)

        assert [ENOSPC, 0] == [filemap_check_errors(fs.mapping) for _ in range(2)]
        assert [[True, False, True, True]] == states(mem, pfns, BH_Mapped)
        assert 0 == mem.vmstat["nr_dirty"]
        fs.drop(pfns)


class TestFree:
    def test_clean_buffers(self, mem, make):
        """A page loses them, and their reference."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns, _ = fs.read(0)

        assert [True] == try_to_release_page(fs.mapping, pfns).tolist()

        assert 0 == mem.private[pfns] == mem.flags[pfns] & PG_private
        assert (2, 0) == (mem.refcount[pfns], mem.buffers.in_use)
        fs.drop(pfns)

    def test_dirty_buffers(self, mem, make):
        """They stay."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns, _ = fs.read(0)
        fs.write(pfns, 0, 1)

        assert [False] == try_to_free_buffers(fs.mapping, pfns).tolist()
        fs.drop(pfns)

    def test_part_of_a_page(self, mem, make):
        """The blocks that lie in it are forgotten, and not written."""
        fs = make()
        fs.lay_out(10, 11, 12, 13)
        pfns, _ = fs.read(0)
        set_page_dirty(mem, pfns)

        block_invalidatepage(fs.mapping, pfns, 1500, PAGE_SIZE - 1500)

        assert [[True, True, False, False]] == states(mem, pfns, BH_Mapped)
        assert [[True, True, False, False]] == states(mem, pfns, BH_Dirty)
        fs.drop(pfns)
