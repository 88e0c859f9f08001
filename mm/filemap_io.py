"""Reading and writing files by way of the page cache, and faults of files on disk.

    generic_file_read        bytes from pages, reading those that are not in memory
    generic_perform_write    bytes to pages, which writeback stores later
    filemap_fault            the pages that a mapping wants

Pages that are missing are read in one go: `readpages` of the file gets all of them.
Linux: mm/filemap.c.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.errors import InputOutputError, MmError, NotExecutable, OutOfMemory
from mm.fault_file import filemap_map_pages
from mm.filemap import unlock_page
from mm.fs import File, i_pages_end
from mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_READAHEAD
from mm.highmem import memcpy_from_pages, memcpy_to_pages
from mm.mempolicy import alloc_pages_current
from mm.page_cache import (
    add_to_page_cache_lru,
    charge_cache_pages,
    delete_from_page_cache,
    find_get_pages,
    find_lock_pages,
)
from mm.page_flags import PG_uptodate
from mm.sched import current_task
from mm.swap import mark_page_accessed, put_page
from mm.types import (
    VM_RAND_READ,
    VM_SEQ_READ,
    AddressSpace,
    MemMap,
    Vma,
    VmFault,
    VmOperations,
    payload_of,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Faults, Indices, Payload, Pfns, pages
from mm.vectors import every, has, places, some, stretches

VM_READAHEAD_PAGES: Final = 32  # that are read with the one that is wanted
_BLOCK: Final = 1 << 11  # pages that one step reads or writes


def read_cache_pages(mapping: AddressSpace, indexes: Indices) -> tuple[Pfns, Faults]:
    """The page at each of *indexes* (distinct), up to date, locked, with a reference; or -1.

    In the second vector MAJOR for what was read, and why a page is not there: SIGBUS where it
    cannot be read, OOM, RETRY. Linux: read_cache_pages(), mm/readahead.c.
    """
    pfns, faults = _find_or_create_pages(mapping, indexes)
    got = places(pfns >= 0)
    stale = got[~has(mapping.mem.flags[pfns[got]], PG_uptodate)]
    if stale.size:
        faults[stale] = VmFault.MAJOR
        _read_locked(mapping, pfns, faults, stale)
    return pfns, faults


def _find_or_create_pages(mapping: AddressSpace, indexes: Indices) -> tuple[Pfns, Faults]:
    """As read_cache_pages(), with fresh pages as they come. Linux: pagecache_get_page()."""
    mem, cpu = mapping.mem, current_task().cpu
    faults = np.zeros(indexes.size, dtype=np.uint16)
    pfns = find_lock_pages(mapping, indexes)
    absent = places(pfns < 0)
    if absent.size:
        frames = alloc_pages_current(mem, GFP_HIGHUSER_MOVABLE, absent.size)
        frames = charge_cache_pages(mem, frames, current_task().mm)
        faults[absent] = VmFault.RETRY if frames.size else VmFault.OOM
        absent = absent[: frames.size]
        added = add_to_page_cache_lru(mapping, frames, indexes[absent])
        put_page(mem, frames[~added], cpu)
        pfns[absent[added]] = frames[added]
    return pfns, faults


def grab_cache_pages(mapping: AddressSpace, indexes: Indices) -> Pfns:
    """The pages at *indexes* (distinct), locked, with a reference, to be written to.

    Only the first of them where memory is short; none where there is none. Their contents need
    not be there. Linux: grab_cache_page_write_begin(), mm/filemap.c.
    """
    while True:
        pfns, faults = _find_or_create_pages(mapping, indexes)
        count = int((pfns < 0).argmax()) if some(pfns < 0) else pfns.size
        beyond = pfns[count:][pfns[count:] >= 0]
        unlock_page(mapping.mem, beyond)
        put_page(mapping.mem, beyond)
        if count or not faults.item(0) & VmFault.RETRY:
            return pfns[:count]


def read_mapping_page(file: object, mapping: AddressSpace, index: int) -> Pfns:
    """The page at *index*, up to date, locked, with a reference, for *file*.

    Raises InputOutputError, OutOfMemory. Linux: read_mapping_page(), include/linux/pagemap.h.
    """
    while True:
        pfns, faults = read_cache_pages(mapping, pages(index))
        if pfns.item() >= 0:
            return pfns
        if not faults.item() & VmFault.RETRY:
            raise _failure("read", file, VmFault(faults.item()))


def force_page_cache_readahead(mapping: AddressSpace, first: int, stop: int) -> None:
    """Read page offsets [*first*, *stop*) of a file, as far as it goes, ahead of their use.

    What cannot be read now is left to who needs it. Linux: force_page_cache_readahead().
    """
    stop = min(stop, i_pages_end(mapping.host))
    for block in range(first, stop, _BLOCK):
        pfns, _ = read_cache_pages(mapping, np.arange(block, min(block + _BLOCK, stop)))
        unlock_page(mapping.mem, pfns[pfns >= 0])
        put_page(mapping.mem, pfns[pfns >= 0])


def _read_locked(mapping: AddressSpace, pfns: Pfns, faults: Faults, stale: Indices) -> None:
    """Fill those of *pfns* at places *stale*; -1 and SIGBUS for what cannot be read."""
    mem = mapping.mem
    assert mapping.a_ops.readpages is not None
    good = mapping.a_ops.readpages(mapping, pfns[stale])
    with mem.locks.atomic:
        mem.flags[pfns[stale[good]]] |= PG_uptodate
    bad = pfns[stale[~good]]
    if bad.size:
        delete_from_page_cache(mem, bad)
        unlock_page(mem, bad)
        put_page(mem, bad)
        pfns[stale[~good]], faults[stale[~good]] = -1, VmFault.SIGBUS


def filemap_fault(vma: Vma, addrs: Addresses, pgoffs: Indices, write: bool) -> tuple[Pfns, Faults]:
    """The pages that faults at *addrs* want of a file on disk. Linux: filemap_fault()."""
    mapping = vma.vm_file.f_mapping
    pfns = np.full(pgoffs.size, -1)
    faults = np.full(pgoffs.size, VmFault.SIGBUS, dtype=np.uint16)
    inside = places(pgoffs < i_pages_end(mapping.host))
    missing = mapping.i_pages.load(pgoffs[inside]) <= 0
    if some(missing):
        do_sync_mmap_readahead(vma, pgoffs[inside][missing])
    pfns[inside], faults[inside] = read_cache_pages(mapping, pgoffs[inside])
    faults[inside[missing & (pfns[inside] >= 0)]] = VmFault.MAJOR
    late = (pgoffs >= i_pages_end(mapping.host)) & (pfns >= 0)  # truncated while we read
    if some(late):
        unlock_page(mapping.mem, pfns[late])
        put_page(mapping.mem, pfns[late])
        pfns[late], faults[late] = -1, VmFault.SIGBUS
    return pfns, faults


def filemap_page_mkwrite(vma: Vma, pfns: Pfns) -> Faults:
    """Locked *pfns* are about to be stored to: a file that needs to do nothing about it.

    RETRY for what it has no more. Linux: filemap_page_mkwrite(), mm/filemap.c.
    """
    mapping = vma.vm_file.f_mapping
    gone = mapping.mem.mapping[pfns] != mapping.number << 2
    return gone * np.uint16(VmFault.RETRY)


generic_file_vm_ops: Final = VmOperations(
    fault=filemap_fault, map_pages=filemap_map_pages, page_mkwrite=filemap_page_mkwrite
)


def generic_file_mmap(file: File, vma: Vma) -> None:
    """Map a file on disk. Raises NotExecutable. Linux: generic_file_mmap(), mm/filemap.c."""
    if file.f_mapping.a_ops.readpages is None:
        raise NotExecutable(f"mmap: {file!r} cannot be read by pages")
    vma.vm_ops = generic_file_vm_ops


# Ahead of their use -----------------------------------------------------------------------------


def do_sync_mmap_readahead(vma: Vma, pgoffs: Indices) -> None:
    """A mapping wants what is not in memory: read what is around it, or after it, as well.

    Linux: do_sync_mmap_readahead(), mm/filemap.c.
    """
    mapping = vma.vm_file.f_mapping
    if vma.vm_flags & VM_RAND_READ:
        return
    before = 0 if vma.vm_flags & VM_SEQ_READ else VM_READAHEAD_PAGES // 2
    for run in stretches(pgoffs):
        first = max(pgoffs.item(run.start) - before, 0)
        stop = pgoffs.item(run.stop - 1) + VM_READAHEAD_PAGES - before
        do_page_cache_readahead(mapping, first, stop)


def page_cache_sync_readahead(file: File, first: int, stop: int) -> None:
    """read(2) wants page offsets [*first*, *stop*), not all of which are in memory.

    Read in order, as from the beginning on, a file is read a window further.
    Linux: page_cache_sync_readahead(), mm/readahead.c.
    """
    ahead = VM_READAHEAD_PAGES if first in (0, file.f_ra_prev) else 0
    do_page_cache_readahead(file.f_mapping, first, stop + ahead)


def do_page_cache_readahead(mapping: AddressSpace, first: int, stop: int) -> None:
    """Read what of page offsets [*first*, *stop*) is not in memory, as far as the file goes.

    No page is reclaimed for that; what cannot be read now is left to who needs it.
    Linux: __do_page_cache_readahead(), mm/readahead.c.
    """
    mem, cpu = mapping.mem, current_task().cpu
    indexes = np.arange(first, min(stop, i_pages_end(mapping.host)))
    indexes = indexes[mapping.i_pages.load(indexes) <= 0]
    frames = alloc_pages_current(mem, GFP_READAHEAD, indexes.size)
    frames = charge_cache_pages(mem, frames, current_task().mm, GFP_READAHEAD)
    if not frames.size:
        return
    added = add_to_page_cache_lru(mapping, frames, indexes[: frames.size])
    put_page(mem, frames[~added], cpu)
    pfns = frames[added]
    _read_locked(mapping, pfns, np.zeros(pfns.size, dtype=np.uint16), np.arange(pfns.size))
    pfns = pfns[pfns >= 0]
    unlock_page(mem, pfns)
    put_page(mem, pfns, cpu)


# read(2) and write(2) ---------------------------------------------------------------------------


def generic_file_read(file: File, pos: int, out: Payload) -> int:
    """Fill *out*, uint8[n], from *pos* on; how many bytes that gave.

    Fewer than all where one cannot be had; raises InputOutputError, OutOfMemory where it is the
    first. Linux: generic_file_read_iter(), mm/filemap.c.
    """
    first, stop = pos >> PAGE_SHIFT, (pos + out.size + PAGE_SIZE - 1) >> PAGE_SHIFT
    at = first
    while at < stop:
        indexes = np.arange(at, min(at + _BLOCK, stop))
        pfns, fault = _get_pages_to_read(file, indexes)
        here = indexes[: pfns.size]
        copy_pages_to(out, pos, file.f_inode.mem, pfns, here)
        mark_page_accessed(file.f_inode.mem, pfns)
        put_page(file.f_inode.mem, pfns)
        at += pfns.size
        if fault:
            if at == first:
                raise _failure("read", file, fault)
            break
    file.f_ra_prev = at
    return min((at << PAGE_SHIFT) - pos, out.size)


def _get_pages_to_read(file: File, indexes: Indices) -> tuple[Pfns, VmFault]:
    """The first of the pages at *indexes*, up to date and with a reference; if none, why.

    What is in memory need not be locked.
    """
    mapping, mem = file.f_mapping, file.f_inode.mem
    pfns = find_get_pages(mapping, indexes)
    ready = has(mem.flags[pfns], PG_uptodate) & (pfns >= 0)
    if every(ready):
        return pfns, VmFault(0)
    put_page(mem, pfns[pfns >= 0])
    page_cache_sync_readahead(file, indexes.item(0), indexes.item(-1) + 1)
    pfns, faults = read_cache_pages(mapping, indexes)
    there = pfns >= 0
    count = pfns.size if every(there) else int(there.argmin())
    unlock_page(mem, pfns[there])
    put_page(mem, pfns[count:][there[count:]])
    fault = VmFault(0 if count else faults.item(0))
    return pfns[:count], VmFault(0) if fault & VmFault.RETRY else fault


def _failure(call: str, file: object, fault: VmFault) -> MmError:
    if fault & VmFault.OOM:
        return OutOfMemory(f"{call}: no frame for a page of {file!r}; unmap something")
    return InputOutputError(f"{call}: a page of {file!r} cannot be read from where it is stored")


def copy_pages_to(out: Payload, pos: int, mem: MemMap, pfns: Pfns, indexes: Indices) -> None:
    """Copy what *pfns*, at the ascending page offsets *indexes*, have of a buffer for the file.

    *out*, uint8[n], is for the bytes from *pos* on. Linux: copy_page_to_iter(), lib/iov_iter.c.
    """
    payload = payload_of(mem)
    for run in stretches(indexes):
        start = (indexes.item(run.start) << PAGE_SHIFT) - pos
        end = min(((indexes.item(run.stop - 1) + 1) << PAGE_SHIFT) - pos, out.size)
        memcpy_from_pages(out[max(start, 0) : end], payload, pfns[run], max(-start, 0))


def generic_perform_write(file: File, pos: int, data: Payload) -> int:
    """Store *data*, uint8[n], from *pos* on in the page cache; how many bytes.

    Fewer than all where memory or room ran out in the middle; what `write_begin` raises where not
    one was stored. The caller holds i_rwsem. Linux: generic_perform_write(), mm/filemap.c.
    """
    a_ops, mem = file.f_mapping.a_ops, file.f_inode.mem
    assert a_ops.write_begin is not None
    assert a_ops.write_end is not None
    payload, done = payload_of(mem), 0
    while done < data.size:
        at = pos + done
        room = (_BLOCK << PAGE_SHIFT) - at % PAGE_SIZE
        try:
            pfns = a_ops.write_begin(file, at, min(room, data.size - done))
        except MmError:
            if done:
                return done
            raise
        count = min((pfns.size << PAGE_SHIFT) - at % PAGE_SIZE, data.size - done)
        memcpy_to_pages(payload, pfns, at % PAGE_SIZE, data[done : done + count])
        a_ops.write_end(file, at, count, pfns)
        done += count
    return done
