"""Pages of files go, mapped or not. Linux: mm/truncate.c, and unmap_mapping_range(), mm/memory.c.

    truncate      what is cut off a file: nothing of it is left, in the cache or in page tables
    punch a hole  the same in the middle; private copies stay
    invalidate    what is stored elsewhere, so that it is read again

Offsets and lengths are bytes; a range ends before *end*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from mm.filemap import trylock_page, unlock_page
from mm.fs import MAX_LFS_FILESIZE, Inode
from mm.mmu_notifier import MmuNotifyEvent
from mm.page_cache import (
    cancel_dirty_page,
    delete_from_page_cache,
    find_lock_pages,
)
from mm.page_flags import PG_dirty, PG_writeback
from mm.swap import get_page, lru_add_drain_all, put_page
from mm.types import AddressSpace, vma_pages
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices, Mask, Pfns, pages
from mm.vectors import every, has, some, stretches
from mm.writeback import wait_on_page_writeback
from mm.xarray import MAX_INDEX, Entries, xa_is_value
from mm.zap import zap_page_range

# Forgets entries that are values, at their indexes.
Forget: TypeAlias = Callable[[AddressSpace, Indices, Entries], None]

EVERYTHING = MAX_LFS_FILESIZE + 1


def unmap_mapping_range(mapping: AddressSpace, start: int, end: int, *, even_cows: bool) -> None:
    """Take [*start*, *end*) of a file, in whole pages, out of every page table.

    With *even_cows* private copies go too. Linux: unmap_mapping_range(), mm/memory.c.
    """
    first, stop = start >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT
    with mapping.i_mmap_rwsem.read():
        for vma in tuple(mapping.i_mmap):
            near = max(first - vma.vm_pgoff, 0)
            far = min(stop - vma.vm_pgoff, vma_pages(vma))
            if near < far:
                addr = vma.vm_start + (near << PAGE_SHIFT)
                last = vma.vm_start + (far << PAGE_SHIFT)
                zap_page_range(vma, addr, last, MmuNotifyEvent.CLEAR, even_cows=even_cows)


def truncate_inode_pages_range(mapping: AddressSpace, start: int, end: int) -> None:
    """Drop the pages of [*start*, *end*), and zero what the range has of pages at its ends.

    What was dirty of it is lost. Linux: truncate_inode_pages_range(), mm/truncate.c.
    """
    truncate_whole_pages(mapping, start, end, clear_shadow_entries)
    for offset, nbytes in partial_pages(start, end):
        pfns = find_lock_pages(mapping, pages(offset >> PAGE_SHIFT))
        zero_partial_page(mapping, pfns[pfns >= 0], offset % PAGE_SIZE, nbytes)


def partial_pages(start: int, end: int) -> list[tuple[int, int]]:
    """Offset and length of the ends of [*start*, *end*) that are not whole pages.

    Linux: partial_start and partial_end of truncate_inode_pages_range(), mm/truncate.c.
    """
    if end - start < PAGE_SIZE and start >> PAGE_SHIFT == (end - 1) >> PAGE_SHIFT:
        return [(start, end - start)] if (end - start) else []
    ends = [(start, -start % PAGE_SIZE), (end - end % PAGE_SIZE, end % PAGE_SIZE)]
    return [(offset, nbytes) for offset, nbytes in ends if nbytes]


def zero_partial_page(mapping: AddressSpace, pfns: Pfns, offset: int, nbytes: int) -> None:
    """Zero a part of each of *pfns*, locked and with a reference; both go.

    Linux: zero_user_segment() and what follows in truncate_inode_pages_range(), mm/truncate.c.
    """
    mem = mapping.mem
    if not pfns.size:
        return
    try:
        wait_on_page_writeback(mem, pfns)
        if mem.payload is not None:
            mem.payload[pfns, offset : offset + nbytes] = 0
        if mapping.a_ops.invalidatepage is not None:
            mapping.a_ops.invalidatepage(mapping, pfns, offset, nbytes)
    finally:
        unlock_page(mem, pfns)
        put_page(mem, pfns)


def truncate_whole_pages(mapping: AddressSpace, start: int, end: int, forget: Forget) -> None:
    """Drop every page that is all inside [*start*, *end*); *forget* what is no page.

    Looks again until there is nothing. Linux: truncate_inode_pages_range() and
    shmem_undo_range(), mm/truncate.c, mm/shmem.c.
    """
    first, stop = (start + PAGE_SIZE - 1) >> PAGE_SHIFT, end >> PAGE_SHIFT
    if mapping.i_pages.empty or first >= stop:
        return
    while True:
        with mapping.mem.locks.atomic:
            indexes, entries = mapping.i_pages.find(first, stop)
        if not indexes.size:
            return
        values = xa_is_value(entries)
        if some(values):
            forget(mapping, indexes[values], entries[values])
        found = find_lock_pages(mapping, indexes[~values])
        truncate_pages(mapping, found[found >= 0])


def truncate_pages(mapping: AddressSpace, pfns: Pfns) -> None:
    """Drop *pfns*, locked and with a reference, from *mapping*, mapped or not; both go.

    Linux: truncate_inode_page(), mm/truncate.c.
    """
    mem = mapping.mem
    if not pfns.size:
        return
    try:
        unmap_mapping_pages(mapping, pfns)
        wait_on_page_writeback(mem, pfns)
        if mapping.a_ops.invalidatepage is not None:
            mapping.a_ops.invalidatepage(mapping, pfns, 0, PAGE_SIZE)
        cancel_dirty_page(mapping, pfns)
        delete_from_page_cache(mem, pfns)
    finally:
        unlock_page(mem, pfns)
        put_page(mem, pfns)


def unmap_mapping_pages(mapping: AddressSpace, pfns: Pfns) -> None:
    """Take locked *pfns* of *mapping* out of every page table.

    Linux: unmap_mapping_pages(), mm/memory.c.
    """
    mem = mapping.mem
    mapped = np.sort(mem.index[pfns[mem.mapcount[pfns] > 0]])
    for run in stretches(mapped):
        start, end = mapped.item(run.start), mapped.item(run.stop - 1) + 1
        unmap_mapping_range(mapping, start << PAGE_SHIFT, end << PAGE_SHIFT, even_cows=False)


def clear_shadow_entries(mapping: AddressSpace, indexes: Indices, entries: Entries) -> None:
    """Forget when the pages at *indexes* went. Linux: clear_shadow_entry(), mm/truncate.c."""
    with mapping.mem.locks.atomic:
        mapping.i_pages.erase(indexes[mapping.i_pages.load(indexes) == entries])


def truncate_setsize(inode: Inode, newsize: int) -> None:
    """Let *inode* have *newsize* bytes, and drop the pages beyond. The caller holds i_rwsem.

    A Deadlock, where the thread has locked one of those itself, leaves the file its size.
    Linux: truncate_setsize() and truncate_pagecache(), mm/truncate.c.
    """
    oldsize, inode.i_size = inode.i_size, newsize
    hole = (newsize + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
    try:
        # Twice: a fault that saw the old size may have brought private copies while pages went.
        unmap_mapping_range(inode.i_mapping, hole, EVERYTHING, even_cows=True)
        truncate_inode_pages_range(inode.i_mapping, newsize, EVERYTHING)
        unmap_mapping_range(inode.i_mapping, hole, EVERYTHING, even_cows=True)
    except BaseException:
        inode.i_size = oldsize
        raise


def invalidate_inode_pages2_range(mapping: AddressSpace, start: int, end: int) -> bool:
    """Drop the pages that [*start*, *end*) touches, so that they are read again.

    False where one stays: it is dirty, or somebody holds it.
    Linux: invalidate_inode_pages2_range(), mm/truncate.c.
    """
    mem = mapping.mem
    first, stop = start >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT
    with mem.locks.atomic:
        indexes, entries = mapping.i_pages.find(first, stop)
    values = xa_is_value(entries)
    clear_shadow_entries(mapping, indexes[values], entries[values])
    found = find_lock_pages(mapping, indexes[~values])
    pfns = found[found >= 0]
    try:
        unmap_mapping_pages(mapping, pfns)
        wait_on_page_writeback(mem, pfns)
        free = invalidate_complete_pages(mapping, pfns)
    finally:
        unlock_page(mem, pfns)
        put_page(mem, pfns)
    return every(free)


def invalidate_complete_pages(mapping: AddressSpace, pfns: Pfns) -> Mask:
    """Drop those of *pfns*, locked and with a reference, that are clean and that nobody holds.

    True where one is gone. Linux: invalidate_complete_page(), mm/truncate.c.
    """
    mem = mapping.mem
    free = ~has(mem.flags[pfns], PG_dirty)
    if mapping.a_ops.releasepage is not None:
        free[free] = mapping.a_ops.releasepage(mapping, pfns[free])
    with mem.locks.atomic:
        free &= mem.refcount[pfns] == 2  # the cache's and ours
        delete_from_page_cache(mem, pfns[free])
    return free


def invalidate_mapping_pages(mapping: AddressSpace) -> int:
    """Drop the pages of a file that nobody needs at the moment; how many those were.

    What is dirty, under way, mapped, locked or held otherwise stays.
    Linux: invalidate_mapping_pages(), mm/truncate.c, as drop_caches calls it.
    """
    mem = mapping.mem
    lru_add_drain_all(mem)
    with mem.locks.atomic:
        indexes, entries = mapping.i_pages.find(0, MAX_INDEX)
        indexes, pfns = indexes[entries > 0], entries[entries > 0]
        pfns = pfns[trylock_page(mem, pfns)]
        get_page(mem, pfns)
    idle = (mem.mapcount[pfns] == 0) & ~has(mem.flags[pfns], PG_writeback)
    gone = invalidate_complete_pages(mapping, pfns[idle])
    unlock_page(mem, pfns)
    put_page(mem, pfns)
    return int(np.count_nonzero(gone))
