"""Dirty pages on their way to disk. Linux: mm/page-writeback.c, and what mm/filemap.c has of it.

    set_page_dirty_*          PG_dirty, tag DIRTY, nr_dirty                       (mm/page_cache.py)
    clear_page_dirty_for_io   the page is write-protected and clean: what is stored to it from now
                              on makes it dirty again
    set_page_writeback        PG_writeback, tag WRITEBACK, nr_writeback
    (the device)
    end_page_writeback        the other way round; who waits goes on

Who writes: write_cache_pages() for fsync() and sync(), which wait, and for the flusher, which does
not and which a process runs that has made too much dirty (balance_dirty_pages()). An error is noted
in the mapping, for everyone who has the file open to hear of once.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

import numpy as np

from mm.errors import Deadlock, InputOutputError, KernelBug, MmError, NoSpace
from mm.errseq import errseq_check, errseq_check_and_advance, errseq_set
from mm.filemap import lock_page, trylock_page, unlock_page
from mm.fs import (
    PAGECACHE_TAG_DIRTY,
    PAGECACHE_TAG_TOWRITE,
    PAGECACHE_TAG_WRITEBACK,
    File,
)
from mm.locking import alone, preempt, wait_event_timeout
from mm.page_alloc import nr_free_pages
from mm.page_cache import cancel_dirty_page, pages_at, set_page_dirty
from mm.page_flags import PG_dirty, PG_writeback
from mm.rmap import page_mapped, page_mkclean
from mm.swap import get_page, put_page
from mm.types import AddressSpace, MemMap
from mm.typing import Indices, Mask, Pfns, word
from mm.vectors import every, has, some
from mm.xarray import MAX_INDEX

WB_SYNC_NONE: Final = 0  # what can be written without waiting
WB_SYNC_ALL: Final = 1  # all that was dirty when it began

AS_EIO: Final = 1 << 0  # an error that filemap_check_errors() has not told yet
AS_ENOSPC: Final = 1 << 1

_BATCH: Final = 1 << 13  # pages that are locked and written at a time
_NOT_WRITEBACK: Final = word(~PG_writeback)


@dataclass(slots=True)
class WritebackControl:
    """What is to be written. Linux: struct writeback_control, include/linux/writeback.h.

    [start, end): page offsets; nr_to_write: pages that are enough, of WB_SYNC_NONE.
    """

    sync_mode: int = WB_SYNC_NONE
    start: int = 0
    end: int = MAX_INDEX
    nr_to_write: int = MAX_INDEX
    nr_written: int = 0


# A page's way ------------------------------------------------------------------------------------


def clear_page_dirty_for_io(mapping: AddressSpace, pfns: Pfns) -> Mask:
    """Let locked *pfns* be clean, for they are about to be written; False where they were.

    What any process has stored so far counts; its next store takes a fault, and makes the page
    dirty again. Linux: clear_page_dirty_for_io(), mm/page-writeback.c.
    """
    mem = mapping.mem
    mapped = page_mapped(mem, pfns)
    if some(mapped):
        stored = pfns[mapped]
        set_page_dirty(mem, stored[page_mkclean(mem, stored)])
    dirty = has(mem.flags[pfns], PG_dirty)
    cancel_dirty_page(mapping, pfns[dirty])
    return dirty


def set_page_writeback(mapping: AddressSpace, pfns: Pfns) -> None:
    """Locked *pfns* are on their way to disk. Linux: set_page_writeback(), mm/page-writeback.c."""
    mem = mapping.mem
    with mem.locks.atomic:
        if some(has(mem.flags[pfns], PG_writeback)):
            raise KernelBug(f"page {pfns[0]:#x} or one after it is written twice at a time")
        mem.flags[pfns] |= PG_writeback
        indexes = mem.index[pfns]
        mapping.i_pages.set_mark(indexes, PAGECACHE_TAG_WRITEBACK)
        mapping.i_pages.clear_mark(indexes, PAGECACHE_TAG_TOWRITE)
    mem.vmstat.add("nr_writeback", pfns.size)


def end_page_writeback(mapping: AddressSpace, pfns: Pfns) -> None:
    """*pfns* have got there, or failed to; wakes whoever waits.

    Linux: end_page_writeback(), mm/filemap.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        if not every(has(mem.flags[pfns], PG_writeback)):
            raise KernelBug(f"page {pfns[0]:#x} or one after it is not being written")
        mem.flags[pfns] &= _NOT_WRITEBACK
        mapping.i_pages.clear_mark(mem.index[pfns], PAGECACHE_TAG_WRITEBACK)
        mem.locks.wake_up()
    mem.vmstat.add("nr_writeback", -pfns.size)
    mem.vmstat.add("nr_written", pfns.size)
    preempt("end_page_writeback")


def wait_on_page_writeback(mem: MemMap, pfns: Pfns) -> None:
    """Sleep until none of *pfns* is on its way to disk.

    Raises Deadlock where the device holds its completions back and no other thread is there that
    could let it go on. Linux: wait_on_page_writeback(), include/linux/pagemap.h.
    """
    for pfn in pfns[has(mem.flags[pfns], PG_writeback)].tolist():

        def written(pfn: int = pfn) -> bool:
            return not mem.flags.item(pfn) & int(PG_writeback)

        if not written() and alone():
            raise Deadlock(
                f"page {pfn:#x} is being written, and its device holds that back: let it "
                f"complete() first, or wait in a thread of its own"
            )
        mem.locks.wait_until(written, f"writeback of page {pfn:#x}")


# Errors -----------------------------------------------------------------------------------------


def mapping_set_error(mapping: AddressSpace, err: int) -> None:
    """Pages of *mapping* could not be written: *err* is a negative errno.

    Linux: mapping_set_error(), include/linux/pagemap.h.
    """
    with mapping.mem.locks.atomic:
        mapping.wb_err = errseq_set(mapping.wb_err, err)
        mapping.flags |= AS_ENOSPC if err == -errno.ENOSPC else AS_EIO


def filemap_check_errors(mapping: AddressSpace) -> int:
    """The error that nobody has been told, a negative errno, or 0; it is told now.

    Linux: filemap_check_errors(), mm/filemap.c.
    """
    with mapping.mem.locks.atomic:
        flags, mapping.flags = mapping.flags, mapping.flags & ~(AS_EIO | AS_ENOSPC)
    if flags & AS_EIO:
        return -errno.EIO
    return -errno.ENOSPC if flags & AS_ENOSPC else 0


def file_check_and_advance_wb_err(file: File) -> int:
    """The last error since *file* was opened or last asked, a negative errno, or 0.

    Linux: file_check_and_advance_wb_err(), mm/filemap.c.
    """
    mapping = file.f_mapping
    if not errseq_check(mapping.wb_err, file.f_wb_err):
        return 0
    with mapping.mem.locks.atomic:
        err, file.f_wb_err = errseq_check_and_advance(mapping.wb_err, file.f_wb_err)
        mapping.wb_err = file.f_wb_err
        mapping.flags &= ~(AS_EIO | AS_ENOSPC)
    return err


def writeback_error(err: int, what: object) -> MmError:
    """What a call raises that ends with *err*, a negative errno, about *what*.

    Linux: fsync(2), the errors.
    """
    if err == -errno.ENOSPC:
        return NoSpace(f"{what!r}: the device has no room for what was stored")
    return InputOutputError(f"{what!r}: what was stored could not be written to the device")


# Who writes -------------------------------------------------------------------------------------


def write_cache_pages(mapping: AddressSpace, wbc: WritebackControl) -> None:
    """Have the dirty pages of a range written, and do not wait for the device.

    With WB_SYNC_ALL all that are dirty now, after waiting for those that are on their way already;
    else those that nobody has locked or is writing. A file that has no writepage() stays dirty.
    Raises Deadlock. Linux: write_cache_pages(), mm/page-writeback.c.
    """
    if mapping.a_ops.writepage is None:
        return
    tag, start = PAGECACHE_TAG_DIRTY, wbc.start
    if wbc.sync_mode == WB_SYNC_ALL:
        tag_pages_for_writeback(mapping, wbc.start, wbc.end)
        tag = PAGECACHE_TAG_TOWRITE
    while start < wbc.end and wbc.nr_written < wbc.nr_to_write:
        most = min(_BATCH, wbc.nr_to_write - wbc.nr_written)
        indexes, pfns = find_get_pages_tag(mapping, start, wbc.end, tag, most)
        if not indexes.size:
            break
        start = indexes.item(-1) + 1
        try:
            wbc.nr_written += _write_batch(mapping, indexes, pfns, wbc.sync_mode)
        finally:
            put_page(mapping.mem, pfns)


def _write_batch(mapping: AddressSpace, indexes: Indices, pfns: Pfns, sync_mode: int) -> int:
    """Write those of *pfns* that are dirty and at *indexes* still; how many."""
    mem = mapping.mem
    if sync_mode == WB_SYNC_ALL:
        lock_page(mem, pfns)
    else:
        free = trylock_page(mem, pfns)
        indexes, pfns = indexes[free], pfns[free]
    try:
        dirty = pages_at(mapping, pfns, indexes) & has(mem.flags[pfns], PG_dirty)
        if sync_mode == WB_SYNC_ALL:
            wait_on_page_writeback(mem, pfns[dirty])
        else:
            dirty &= ~has(mem.flags[pfns], PG_writeback)
        assert mapping.a_ops.writepage is not None
        mapping.a_ops.writepage(mapping, pfns[dirty])
    finally:
        unlock_page(mem, pfns)
    return int(np.count_nonzero(dirty))


def find_get_pages_tag(
    mapping: AddressSpace, start: int, end: int, tag: int, most: int
) -> tuple[Indices, Pfns]:
    """Where in [*start*, *end*) pages have *tag*, the first *most* of them, with a reference each.

    Linux: find_get_pages_range_tag(), mm/filemap.c.
    """
    with mapping.mem.locks.atomic:
        indexes, pfns = (found[:most] for found in mapping.i_pages.find(start, end, tag))
        get_page(mapping.mem, pfns)
    return indexes, pfns


def tag_pages_for_writeback(mapping: AddressSpace, start: int, end: int) -> None:
    """What is dirty now is to be written, and not what becomes dirty meanwhile.

    Linux: tag_pages_for_writeback(), mm/page-writeback.c.
    """
    with mapping.mem.locks.atomic:
        indexes, _ = mapping.i_pages.find(start, end, PAGECACHE_TAG_DIRTY)
        mapping.i_pages.set_mark(indexes, PAGECACHE_TAG_TOWRITE)


def filemap_fdatawait_range(mapping: AddressSpace, start: int = 0, end: int = MAX_INDEX) -> None:
    """Wait for the pages of a range that are on their way to disk. Raises Deadlock.

    Linux: __filemap_fdatawait_range(), mm/filemap.c.
    """
    with mapping.mem.locks.atomic:
        _, pfns = mapping.i_pages.find(start, end, PAGECACHE_TAG_WRITEBACK)
    wait_on_page_writeback(mapping.mem, pfns)


def filemap_write_and_wait_range(
    mapping: AddressSpace, start: int = 0, end: int = MAX_INDEX
) -> int:
    """Have a range written, and wait for that; the error that nobody was told, or 0.

    Linux: filemap_write_and_wait_range(), mm/filemap.c.
    """
    write_cache_pages(mapping, WritebackControl(WB_SYNC_ALL, start, end))
    filemap_fdatawait_range(mapping, start, end)
    return filemap_check_errors(mapping)


def file_write_and_wait_range(file: File, start: int = 0, end: int = MAX_INDEX) -> int:
    """The same for who has *file* open, who hears of each error once.

    Linux: file_write_and_wait_range(), mm/filemap.c.
    """
    write_cache_pages(file.f_mapping, WritebackControl(WB_SYNC_ALL, start, end))
    filemap_fdatawait_range(file.f_mapping, start, end)
    return file_check_and_advance_wb_err(file)


# How much may be dirty --------------------------------------------------------------------------


def global_dirty_limits(mem: MemMap) -> tuple[int, int]:
    """Pages that may be dirty before they are written, and before who dirties them has to wait.

    A share of what could be: free memory and that of files.
    Linux: global_dirty_limits() and global_dirtyable_memory(), mm/page-writeback.c.
    """
    dirtyable = nr_free_pages(mem)
    dirtyable += mem.vmstat["nr_active_file"] + mem.vmstat["nr_inactive_file"]
    background = dirtyable * mem.dirty_background_ratio // 100
    limit = dirtyable * mem.vm_dirty_ratio // 100
    return (background if background < limit else limit // 2), limit


def balance_dirty_pages(mem: MemMap) -> None:
    """A process has made pages dirty: if they are too many, it writes some, as the flusher would.

    Above the upper limit it waits for the device, for a tenth of a second. The flusher runs in the
    thread that wakes it, so that the same calls write the same pages.
    Linux: balance_dirty_pages(), mm/page-writeback.c; wb_workfn(), fs/fs-writeback.c.
    """
    background, limit = global_dirty_limits(mem)
    if mem.vmstat["nr_dirty"] <= background:
        return
    for mapping in tuple(mem.mappings.values()):
        surplus = mem.vmstat["nr_dirty"] - background
        if surplus <= 0:
            break
        write_cache_pages(mapping, WritebackControl(nr_to_write=surplus))

    def below() -> bool:
        return mem.vmstat["nr_dirty"] + mem.vmstat["nr_writeback"] <= limit

    wait_event_timeout(below)
