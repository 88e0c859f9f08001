"""Whether buffers, and pages under way to disk, are what their pages say: part of mm/debug.py."""

from __future__ import annotations

import os

import numpy as np

from mm.blockfs_inode import BlockInode
from mm.blockfs_super import BlockSuper
from mm.buffer_head import NO_BLOCK, BH_Async_Write, BH_Dirty, BH_Mapped, BH_Uptodate
from mm.census import Census, Complaints, complain, dirty_in_tables
from mm.fs import PAGECACHE_TAG_WRITEBACK
from mm.page_cache import page_in_cache
from mm.page_flags import PG_dirty, PG_locked, PG_private, PG_uptodate, PG_writeback
from mm.types import AddressSpace, MemMap
from mm.typing import PAGE_SIZE, Pfns
from mm.vectors import has, joined
from mm.xarray import MAX_INDEX


def check_buffers(mem: MemMap, census: Census) -> Complaints:
    """A PG_private page of the page cache and its row of buffers name one another.

    What is dirty in a buffer is so in the page; a clean one holds what its block does.
    """
    heads, pages = mem.buffers, census.pages
    private = pages[has(mem.flags[pages], PG_private)]
    rows = mem.private[private]
    stray = (rows <= 0) | (rows >= heads.b_page.size) | ~page_in_cache(mem, private)
    yield from complain("private", private, stray, "no such row of buffers, or no page of a file")
    private, rows = private[~stray], rows[~stray]
    wrong = heads.b_page[rows] != private
    yield from complain("b_page", private, wrong, "its row of buffers is another page's")
    private, rows = private[~wrong], rows[~wrong]
    used = int(np.count_nonzero(heads.b_page >= 0))
    if not heads.in_use == used == private.size:
        what = f"{used} rows name a page, {private.size} pages a row"
        yield f"b_page: {heads.in_use} rows are in use, {what}"
    states, flags = heads.b_state[rows], mem.flags[private]
    unmapped = ((states & BH_Mapped) == 0) != (heads.b_blocknr[rows] == NO_BLOCK)
    yield from complain("b_blocknr", private, unmapped.any(axis=1), "mapped and a block differ")
    free = ~has(flags, PG_locked)
    lost = ((states & BH_Dirty) != 0).any(axis=1) & ~has(flags, PG_dirty) & free
    yield from complain("b_state", private, lost, "a dirty buffer of a clean page")
    going = ((states & BH_Async_Write) != 0).any(axis=1) & ~has(flags, PG_writeback)
    yield from complain("b_state", private, going, "a buffer under way of a page that is not")
    for mapping in mem.mappings.values():
        yield from _check_contents(mapping, private[mem.mapping[private] == mapping.number << 2])


def _check_contents(mapping: AddressSpace, pfns: Pfns) -> Complaints:
    """Clean buffers that are up to date hold the bytes of their blocks."""
    mem = mapping.mem
    clean = has(mem.flags[pfns], PG_uptodate) & ~dirty_in_tables(mem)[pfns]
    pfns = pfns[clean & ~has(mem.flags[pfns], PG_dirty | PG_locked | PG_writeback)]
    if not pfns.size or mem.payload is None:
        return
    rows, size = mem.private[pfns], 1 << mapping.host.i_blkbits
    states = mem.buffers.b_state[rows, : PAGE_SIZE // size]
    numbers = mem.buffers.b_blocknr[rows, : PAGE_SIZE // size]
    good = (states & (BH_Mapped | BH_Uptodate)) == BH_Mapped | BH_Uptodate
    good &= numbers != NO_BLOCK
    found = mem.payload[pfns].reshape(*good.shape, size)[good]
    fd, pages = mapping.host.i_sb.s_bdev.fd, pfns[good.nonzero()[0]]
    for number, page, block in zip(numbers[good].tolist(), pages, found, strict=True):
        if os.pread(fd, size, number * size) != block.tobytes():
            yield f"contents: page {page:#x}: clean, yet block {number:#x} holds something else"


def check_writeback(mem: MemMap, census: Census) -> Complaints:
    """Tags say which pages are on their way to disk."""
    pages = census.pages
    count = int(np.count_nonzero(has(mem.flags[pages], PG_writeback)))
    tagged = 0
    for mapping in mem.mappings.values():
        indexes, pfns = mapping.i_pages.find(0, MAX_INDEX, PAGECACHE_TAG_WRITEBACK)
        idle = (pfns <= 0) | ~has(mem.flags[pfns], PG_writeback)
        yield from complain("i_pages", indexes, idle, "tagged writeback, and not so", "index")
        tagged += indexes.size
    if not mem.vmstat["nr_writeback"] == tagged == count:
        what = f"{count} pages are under writeback, {tagged} tagged so"
        yield f"nr_writeback: says {mem.vmstat['nr_writeback']}, {what}"


def check_super_blocks(mem: MemMap, census: Census) -> Complaints:
    """Each block of a mounted device has one owner, if any; buffers name the blocks of their file.

    What is in memory of a file has the size that the next commit gives it.
    """
    for fs in mem.super_blocks:
        sb: BlockSuper = fs.super
        files = sb.files.values()
        taken = [np.arange(sb.layout.data), *sb.freed]
        taken += [blocks for file in files for blocks in (file.extents.blocks(), file.chain)]
        owners = np.bincount(joined(taken), minlength=sb.used.size)
        blocks = np.arange(owners.size)
        yield from complain("used", blocks, owners > 1, f"more than one owner in {fs!r}", "block")
        yield from complain("used", blocks, sb.used != (owners > 0), f"of {fs!r}", "block")
        lost = [n for n, ino in sb.names.items() if ino not in sb.files or sb.files[ino].name != n]
        if lost:
            yield f"names: {fs!r} has no files {lost}"
        for ino, inode in fs.inodes.items():
            if inode.i_size != sb.files[ino].size:
                yield f"i_size: {inode!r} of {fs!r} is to have {sb.files[ino].size:#x} bytes"
            yield from _check_numbers(inode)


def _check_numbers(inode: BlockInode) -> Complaints:
    mem, heads = inode.mem, inode.mem.buffers
    _, pfns = inode.i_mapping.i_pages.find(0, MAX_INDEX)
    pfns = pfns[pfns > 0]
    pfns = pfns[has(mem.flags[pfns], PG_private) & ~has(mem.flags[pfns], PG_locked)]
    pfns = pfns[(mem.private[pfns] >= 0) & (mem.private[pfns] < heads.b_page.size)]
    of_a_page = PAGE_SIZE >> inode.i_blkbits
    numbers = heads.b_blocknr[mem.private[pfns], :of_a_page]
    blocks = mem.index[pfns][:, None] * of_a_page + np.arange(of_a_page)
    found = inode.i_sb.files[inode.i_ino].extents.lookup(blocks.reshape(-1)).reshape(blocks.shape)
    wrong = ((numbers != NO_BLOCK) & (numbers != found)).any(axis=1)
    yield from complain("b_blocknr", pfns, wrong, f"not where {inode!r} has that block")
