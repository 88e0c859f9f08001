"""verify(): each rule about buffers, writeback and mounted devices is broken in turn, and named."""

import numpy as np
import pytest

from mm import PAGE_SIZE
from mm.blockfs_extents import Extents
from mm.buffer_head import BH_Async_Write, BH_Dirty, BH_Mapped, BH_Uptodate
from mm.fs import PAGECACHE_TAG_WRITEBACK
from mm.page_flags import PG_dirty, PG_private, PG_uptodate, PG_writeback
from mm.swap import lru_add_drain_all
from mm.typing import pages
from mm.writeback import WritebackControl, write_cache_pages
from tests.mm.test_debug import complaints, named, spoiled, spoiled_attribute
from tests.world import mapped_range


class Disk:
    """A file of four pages of four blocks: 0 and 1 clean, 2 dirty, 3 a hole that was read."""

    def __init__(self, machine, path):
        self.machine, self.mem = machine, machine.mem
        self.fs = machine.mount(path, "1KiB", "1MiB")
        self.file = self.fs.create("f")
        self.file.write(0, b"x" * 3 * PAGE_SIZE)
        self.file.truncate(4 * PAGE_SIZE)
        self.file.fsync()
        self.file.read(0, 4 * PAGE_SIZE)
        self.file.write(2 * PAGE_SIZE, b"dirty")
        lru_add_drain_all(machine.mem)
        machine.verify()
        self.mapping, self.super = self.file.f_mapping, self.fs.super
        self.pfns = self.mapping.i_pages.load(np.arange(4))
        self.rows = self.mem.private[self.pfns]
        self.disk_inode = self.super.files[self.file.f_inode.i_ino]


@pytest.fixture
def disk(tmp_path):
    disk = Disk(mapped_range(pages=1).machine, tmp_path / "disk")
    yield disk
    disk.file.close()
    disk.fs.unmount()


class TestBuffers:
    @pytest.mark.parametrize("row", [0, 999])
    def test_no_row(self, disk, row):
        """A page that says it has buffers has some."""
        with spoiled(disk.mem.private, disk.pfns[0], row):
            lines = complaints(disk.machine)

        assert any(line.startswith(f"private: page {disk.pfns[0]:#x}") for line in lines)

    def test_private_without_buffers(self, disk):
        """And one that does not say so has none."""
        flags, pfn = disk.mem.flags, disk.pfns[0]
        with spoiled(flags, pfn, flags[pfn] & ~PG_private):
            assert {"private", "b_page", "refcount"} == named(disk.machine)

    def test_row_of_another_page(self, disk):
        """Two pages have not the same."""
        with spoiled(disk.mem.private, disk.pfns[0], disk.rows[1]):
            lines = complaints(disk.machine)

        assert f"b_page: page {disk.pfns[0]:#x}: its row of buffers is another page's" in lines

    def test_row_of_no_page(self, disk):
        """What is in use is used."""
        disk.mem.buffers.alloc(pages(7))
        row = disk.mem.buffers.b_page.tolist().index(7)
        lines = complaints(disk.machine)
        disk.mem.buffers.free(pages(row))

        assert ["b_page: 5 rows are in use, 5 rows name a page, 4 pages a row"] == lines

    @pytest.mark.parametrize(
        ("page", "bit", "rule"),
        [
            (0, BH_Dirty, "a dirty buffer of a clean page"),
            (0, BH_Async_Write, "a buffer under way of a page that is not"),
        ],
    )
    def test_state(self, disk, page, bit, rule):
        """Buffers and their page agree."""
        states, row = disk.mem.buffers.b_state, disk.rows[page]
        with spoiled(states, (row, 1), states[row, 1] | bit):
            lines = complaints(disk.machine)

        assert f"b_state: page {disk.pfns[page]:#x}: {rule}" in lines

    def test_mapped_to_no_block(self, disk):
        """A mapped buffer is of a block, another of none."""
        states, numbers = disk.mem.buffers.b_state, disk.mem.buffers.b_blocknr
        with spoiled(numbers, (disk.rows[0], 1), -1):
            assert "b_blocknr" in named(disk.machine)
        with spoiled(states, (disk.rows[0], 1), BH_Uptodate):
            assert "b_blocknr" in named(disk.machine)
        with spoiled(states, (disk.rows[3], 1), BH_Mapped | BH_Uptodate):
            assert "b_blocknr" in named(disk.machine)

    def test_another_block(self, disk):
        """It is the block that the file has there."""
        numbers, row = disk.mem.buffers.b_blocknr, disk.rows[2]
        with spoiled(numbers, (row, 1), numbers[row, 1] + 1):
            (line,) = complaints(disk.machine)

        assert line.startswith(f"b_blocknr: page {disk.pfns[2]:#x}: not where <Inode")

    def test_contents(self, disk):
        """A clean block is as the device has it; a dirty one need not be."""
        with spoiled(disk.mem.payload, (disk.pfns[1], 1500), 7):
            (line,) = complaints(disk.machine)
        with spoiled(disk.mem.payload, (disk.pfns[2], 1500), 7):
            disk.machine.verify()

        number = disk.mem.buffers.b_blocknr[disk.rows[1], 1]
        what = f"clean, yet block {number:#x} holds something else"
        assert f"contents: page {disk.pfns[1]:#x}: {what}" == line

    def test_contents_that_are_not_there(self, disk):
        """What is not up to date may be anything."""
        flags, pfn = disk.mem.flags, disk.pfns[1]
        with (
            spoiled(flags, pfn, flags[pfn] & ~PG_uptodate),
            spoiled(disk.mem.payload, (pfn, 1500), 7),
        ):
            disk.machine.verify()

    def test_dirty_page(self, disk):
        """A page that is dirty is so in its buffers."""
        flags, pfn = disk.mem.flags, disk.pfns[2]
        with spoiled(flags, pfn, flags[pfn] & ~PG_dirty):
            assert {"b_state", "i_pages"} <= named(disk.machine)


class TestWriteback:
    def test_flag_and_tag(self, disk):
        """A page under way is tagged so, and counted."""
        flags, pfn = disk.mem.flags, disk.pfns[0]
        with spoiled(flags, pfn, flags[pfn] | PG_writeback):
            assert {"nr_writeback"} == named(disk.machine)
        disk.mapping.i_pages.set_mark(pages(0), PAGECACHE_TAG_WRITEBACK)
        found = named(disk.machine)
        disk.mapping.i_pages.clear_mark(pages(0), PAGECACHE_TAG_WRITEBACK)
        assert {"nr_writeback", "i_pages"} == found

    def test_count(self, disk):
        """The counter is what there is."""
        with disk.fs.device.hold():
            write_cache_pages(disk.mapping, WritebackControl())
            disk.machine.verify()
            disk.machine.vmstat.add("nr_writeback", 1)
            found = named(disk.machine)
            disk.machine.vmstat.add("nr_writeback", -1)
        assert {"nr_writeback"} == found


class TestSuperBlocks:
    def test_block_of_nobody(self, disk):
        """A used block has an owner, and a free one has none."""
        for block in (disk.super.layout.data, disk.super.layout.blocks - 1):
            with spoiled(disk.super.used, block, not disk.super.used[block]):
                (line,) = complaints(disk.machine)
            assert line.startswith(f"used: block {block:#x}")

    def test_block_of_two(self, disk):
        """Nor has it two."""
        blocks = disk.disk_inode.extents.blocks()[:1]
        with spoiled_attribute(disk.disk_inode, "chain", blocks):
            (line,) = complaints(disk.machine)
        assert f"used: block {blocks[0]:#x}: more than one owner in {disk.fs!r}" == line

    def test_lost_blocks(self, disk):
        """A file that has lost its blocks, and not given them back."""
        with spoiled_attribute(disk.disk_inode, "extents", Extents.none()):
            assert {"used", "b_blocknr"} == named(disk.machine)

    def test_name(self, disk):
        """A name is that of a file."""
        disk.super.names["ghost"] = 5
        lines = complaints(disk.machine)
        del disk.super.names["ghost"]
        assert [f"names: {disk.fs!r} has no files ['ghost']"] == lines

    def test_size(self, disk):
        """A file has the size that it will have on the device."""
        with spoiled_attribute(disk.disk_inode, "size", 77):
            (line,) = complaints(disk.machine)
        assert line.endswith("is to have 0x4d bytes")
