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

from mm.errors import InputOutputError, MmError, OutOfMemory
from mm.filemap import unlock_page
from mm.fs import File, i_pages_end
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.highmem import memcpy_from_pages, memcpy_to_pages
from mm.mempolicy import alloc_pages_current
from mm.page_cache import (
    add_to_page_cache_lru,
    charge_cache_pages,
    delete_from_page_cache,
    find_lock_pages,
)
from mm.page_flags import PG_uptodate
from mm.sched import current_task
from mm.swap import mark_page_accessed, put_page
from mm.types import AddressSpace, MemMap, Vma, VmFault, payload_of
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Faults, Indices, Payload, Pfns
from mm.vectors import has, places, stretches

_BLOCK: Final = 1 << 11  # pages that one step reads or writes


def read_cache_pages(mapping: AddressSpace, indexes: Indices) -> tuple[Pfns, Faults]:
    """The page at each of *indexes* (distinct), up to date, locked, with a reference; or -1.

    In the second vector MAJOR for what was read, and why a page is not there: SIGBUS where it
    cannot be read, OOM, RETRY. Linux: read_cache_pages(), mm/readahead.c.
    """
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
    got = places(pfns >= 0)
    stale = got[~has(mem.flags[pfns[got]], PG_uptodate)]
    if stale.size:
        faults[stale] = VmFault.MAJOR
        _read_locked(mapping, pfns, faults, stale)
    return pfns, faults


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
    pfns[inside], faults[inside] = read_cache_pages(mapping, pgoffs[inside])
    return pfns, faults


def generic_file_read(file: File, pos: int, nbytes: int) -> bytes:
    """Up to *nbytes* from *pos* on. Raises InputOutputError and OutOfMemory where not one is had.

    Linux: generic_file_read_iter(), mm/filemap.c.
    """
    mapping, mem = file.f_mapping, file.f_inode.mem
    out = np.empty(max(min(nbytes, file.size - pos), 0), dtype=np.uint8)
    first, stop = pos >> PAGE_SHIFT, (pos + out.size + PAGE_SIZE - 1) >> PAGE_SHIFT
    while out.size and first < stop:
        indexes = np.arange(first, min(first + _BLOCK, stop))
        pfns, faults = read_cache_pages(mapping, indexes)
        there = pfns >= 0
        count = int(there.argmin()) if not there.all() else pfns.size
        copy_pages_to(out, pos, mem, pfns[:count], indexes[:count])
        unlock_page(mem, pfns[there])
        mark_page_accessed(mem, pfns[:count])
        put_page(mem, pfns[there])
        first += count
        if count < pfns.size and not faults.item(count) & VmFault.RETRY:
            if first == pos >> PAGE_SHIFT:
                raise _failure("read", file, VmFault(faults.item(count)))
            return out[: (first << PAGE_SHIFT) - pos].tobytes()
    return out.tobytes()


def _failure(call: str, file: File, fault: VmFault) -> MmError:
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
