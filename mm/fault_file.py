"""Faults in mappings of files. Linux: do_fault() and what is around it, mm/memory.c.

    load                     do_read_fault     the file's page, and those around it that are there
    store, private mapping   do_cow_fault      a copy of it, the process's own
    store, shared mapping    do_shared_fault   the file's page, dirty; its file hears of it before
    store to what a load     wp_page_shared    the same
        has mapped

What the file has at an offset is asked of `vma.vm_ops`, which may read it, make it, or say that
nothing is there.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.anon_vma import anon_vma_prepare
from mm.filemap import lock_page, trylock_page, unlock_page
from mm.fs import i_pages_end
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.highmem import copy_highpages
from mm.mempolicy import alloc_charged_pages
from mm.page_cache import find_get_pages, pages_at, set_page_dirty
from mm.page_flags import PG_uptodate
from mm.pgtable import PTRS_PER_PTE, mk_pte, pte_none, pte_pfn, pte_present, pte_write
from mm.rmap import add_mm_counter, page_add_file_rmap, page_add_new_anon_rmap
from mm.sched import current_task
from mm.swap import get_page, lru_cache_add_active, put_page
from mm.types import VM_SHARED, Vma, VmFault, linear_page_index, maybe_mkwrite
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Faults, Indices, Mask, Pfns, Ptes, word
from mm.vectors import every, has, places
from mm.writeback import balance_dirty_pages

FAULT_AROUND_BYTES: Final = 16 * PAGE_SIZE  # a load maps what is in memory of a window so large


def do_fault(vma: Vma, addrs: Addresses, at: Indices, *, write: bool) -> Faults:
    """Serve faults at *addrs* (ascending) of *vma*, whose entries, at places *at*, are empty.

    Linux: do_fault(), mm/memory.c.
    """
    if not write:
        return do_read_fault(vma, addrs, at)
    if vma.vm_flags & VM_SHARED:
        return do_shared_fault(vma, addrs, at)
    return do_cow_fault(vma, addrs, at)


def do_read_fault(vma: Vma, addrs: Addresses, at: Indices) -> Faults:
    """Map the pages of the file, and what is in memory around them.

    VM_FAULT_RETRY where a fault on another of *addrs* has mapped the page: whoever comes back does
    not fault any more. Linux: do_read_fault(), mm/memory.c.
    """
    assert vma.vm_ops is not None
    faults = np.zeros(addrs.size, dtype=np.uint16)
    left = np.arange(addrs.size)
    if vma.vm_ops.map_pages is not None:
        mapped, by_others = do_fault_around(vma, addrs, at)
        faults[by_others] = VmFault.RETRY
        left = places(~mapped)
    if left.size:
        pgoffs = linear_page_index(vma, addrs[left])
        pfns, faults[left] = vma.vm_ops.fault(vma, addrs[left], pgoffs, False)
        _finish_faults(vma, at[left], pfns)
    return faults


def do_fault_around(vma: Vma, addrs: Addresses, at: Indices) -> tuple[Mask, Mask]:
    """Map what is in memory around *addrs*: which of them are mapped now, which by others' faults.

    A window begins at a multiple of its size, or with *vma*: then it reaches into the next one,
    where only what it has left unmapped faults. Linux: do_fault_around(), mm/memory.c.
    """
    begin = _window(addrs[:1]).item()
    if begin >= vma.vm_start:
        return _map_around(vma, addrs, at)
    mapped, by_others = np.zeros((2, addrs.size), dtype=np.bool_)
    near = slice(0, int(addrs.searchsorted(vma.vm_start + FAULT_AROUND_BYTES)))
    first = np.arange(near.stop) == 0
    mapped[near] = _map_windows(vma, addrs[near], at[near], first, np.array([vma.vm_start]))
    by_others[1:] = mapped[1:]
    rest = places(~mapped & (addrs >= begin + FAULT_AROUND_BYTES))
    if rest.size:
        mapped[rest], by_others[rest] = _map_around(vma, addrs[rest], at[rest])
    return mapped, by_others


def _window(addrs: Addresses) -> Addresses:
    return addrs // FAULT_AROUND_BYTES * FAULT_AROUND_BYTES


def _map_around(vma: Vma, addrs: Addresses, at: Indices) -> tuple[Mask, Mask]:
    """As do_fault_around(), where no window is cut short at its beginning."""
    starts = _window(addrs)
    first = np.ones(addrs.size, dtype=np.bool_)
    first[1:] = starts[1:] != starts[:-1]
    mapped = _map_windows(vma, addrs, at, first, starts[first])
    return mapped, mapped & ~first


def _map_windows(vma: Vma, addrs: Addresses, at: Indices, first: Mask, starts: Addresses) -> Mask:
    """Map what is in memory of the windows at *starts*, each of which *addrs* reach *first*.

    A window ends with *vma*, or with its page table. True for those of *addrs* that are mapped.
    """
    assert vma.vm_ops is not None
    assert vma.vm_ops.map_pages is not None
    begin = at[first] - ((addrs[first] - starts) >> PAGE_SHIFT)
    pages = np.arange(FAULT_AROUND_BYTES >> PAGE_SHIFT)
    near = begin[:, np.newaxis] + pages
    around = starts[:, np.newaxis] + (pages << PAGE_SHIFT)
    inside = (around < vma.vm_end) & (near // PTRS_PER_PTE == begin[:, np.newaxis] // PTRS_PER_PTE)
    around, near = around[inside], near[inside]
    mapped = np.zeros(addrs.size, dtype=np.bool_)
    reached = addrs <= around[-1]
    there = vma.vm_ops.map_pages(vma, around, near)
    mapped[reached] = there[around.searchsorted(addrs[reached])]
    return mapped


def filemap_map_pages(vma: Vma, addrs: Addresses, at: Indices) -> Mask:
    """Map those pages at *addrs* (ascending) that are in the page cache, up to date and unlocked.

    Only where the entries, at places *at*, are empty. Linux: filemap_map_pages(), mm/filemap.c.
    """
    mem, mapping = vma.vm_mm.mem, vma.vm_file.f_mapping
    pgoffs = linear_page_index(vma, addrs)
    mapped = np.zeros(addrs.size, dtype=np.bool_)
    found = places((mapping.i_pages.load(pgoffs) > 0) & pte_none(mem.tables.entries[at]))
    if not found.size:
        return mapped
    pfns = find_get_pages(mapping, pgoffs[found])
    found, pfns = found[pfns >= 0], pfns[pfns >= 0]
    locked = trylock_page(mem, pfns)
    put_page(mem, pfns[~locked])
    found, pfns = found[locked], pfns[locked]
    usable = pages_at(mapping, pfns, pgoffs[found]) & has(mem.flags[pfns], PG_uptodate)
    usable &= pgoffs[found] < i_pages_end(mapping.host)
    _release(vma, pfns[~usable])
    mapped[found[usable]] = _finish_faults(vma, at[found[usable]], pfns[usable])
    return mapped


def _finish_faults(vma: Vma, at: Indices, pfns: Pfns, *, write: bool = False) -> Mask:
    """Map pfns[i], locked and with a reference, at places *at*, where nothing is; True where done.

    -1 is no page. All are unlocked then, and what is not mapped loses the reference.
    Linux: finish_fault() and alloc_set_pte(), mm/memory.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    mapped = pfns >= 0
    with mm.page_table_lock:
        mapped &= pte_none(mem.tables.entries[at])
        mine = pfns if every(mapped) else pfns[mapped]
        page_add_file_rmap(vma, mine)
        add_mm_counter(vma, mine, 1)
        mem.tables.entries[at[mapped]] = _file_entries(vma, mine, write=write)
    if write:
        set_page_dirty(mem, mine)
    unlock_page(mem, mine)
    _release(vma, pfns[~mapped & (pfns >= 0)])
    return mapped


def _file_entries(vma: Vma, pfns: Pfns, *, write: bool) -> Ptes:
    prot = word(vma.vm_page_prot | maybe_mkwrite(vma)) if write else vma.vm_page_prot
    return mk_pte(pfns, prot)


def _release(vma: Vma, pfns: Pfns) -> None:
    """Unlock *pfns*, and drop a reference to each."""
    unlock_page(vma.vm_mm.mem, pfns)
    put_page(vma.vm_mm.mem, pfns)


def do_cow_fault(vma: Vma, addrs: Addresses, at: Indices) -> Faults:
    """Copy the pages of the file for the process alone. Linux: do_cow_fault(), mm/memory.c."""
    assert vma.vm_ops is not None
    mm, mem, cpu = vma.vm_mm, vma.vm_mm.mem, current_task().cpu
    anon_vma_prepare(vma)
    new = alloc_charged_pages(vma, addrs, GFP_HIGHUSER_MOVABLE)
    faults = np.full(addrs.size, VmFault.RETRY if new.size else VmFault.OOM, dtype=np.uint16)
    addrs, at = addrs[: new.size], at[: new.size]
    try:
        pfns, faults[: new.size] = vma.vm_ops.fault(vma, addrs, linear_page_index(vma, addrs), True)
    except BaseException:
        put_page(mem, new, cpu)
        raise
    found = pfns >= 0
    if mem.payload is not None:
        copy_highpages(mem.payload, new[found], mem.payload, pfns[found])
    with mm.page_table_lock:
        found &= pte_none(mem.tables.entries[at])
        mine = new[found]
        mem.flags[mine] |= PG_uptodate
        page_add_new_anon_rmap(vma, mine, addrs[found])
        mem.tables.entries[at[found]] = _file_entries(vma, mine, write=True)
        mm.anon_rss += mine.size
        lru_cache_add_active(mem, mine, cpu)
    _release(vma, pfns[pfns >= 0])
    put_page(mem, new[~found], cpu)
    return faults


def do_shared_fault(vma: Vma, addrs: Addresses, at: Indices) -> Faults:
    """Map the pages of the file, for stores. Linux: do_shared_fault(), mm/memory.c."""
    assert vma.vm_ops is not None
    _fault_dirty_shared_page(vma)
    pfns, faults = vma.vm_ops.fault(vma, addrs, linear_page_index(vma, addrs), True)
    got = places(pfns >= 0)
    faults[got] |= _do_page_mkwrite(vma, pfns[got])
    refused = got[(faults[got] & ~np.uint16(VmFault.MAJOR)) != 0]
    if refused.size:
        _release(vma, pfns[refused])
        pfns[refused] = -1
    _finish_faults(vma, at, pfns, write=True)
    return faults


def _fault_dirty_shared_page(vma: Vma) -> None:
    """Pages are about to become dirty: write some, if they are too many already.

    Not after that, as in Linux: the flusher runs in this thread, and would take the right to store
    away again before the store. Linux: fault_dirty_shared_page(), mm/memory.c.
    """
    if vma.vm_ops is not None and vma.vm_ops.page_mkwrite is not None:
        balance_dirty_pages(vma.vm_mm.mem)


def _do_page_mkwrite(vma: Vma, pfns: Pfns) -> Faults:
    """Let the file know that locked *pfns* will be stored to. Linux: do_page_mkwrite()."""
    assert vma.vm_ops is not None
    if vma.vm_ops.page_mkwrite is None or not pfns.size:
        return np.zeros(pfns.size, dtype=np.uint16)
    return vma.vm_ops.page_mkwrite(vma, pfns)


def wp_page_shared(vma: Vma, addrs: Addresses, at: Indices) -> Faults:
    """Stores to read-only entries of a shared mapping: writable from now on, and the pages dirty.

    Linux: wp_page_shared(), mm/memory.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    _fault_dirty_shared_page(vma)
    with mm.page_table_lock:
        readonly = places(pte_present(mem.tables.entries[at]) & ~pte_write(mem.tables.entries[at]))
        at = at[readonly]
        ptes = mem.tables.entries[at]
        pfns = pte_pfn(ptes)
        get_page(mem, pfns)
    faults = np.zeros(addrs.size, dtype=np.uint16)
    try:
        lock_page(mem, pfns)
        try:
            refused = _do_page_mkwrite(vma, pfns)
            faults[readonly] = refused
            with mm.page_table_lock:
                same = (mem.tables.entries[at] == ptes) & (refused == 0)
                mem.tables.entries[at[same]] |= maybe_mkwrite(vma)
            set_page_dirty(mem, pfns[same])
        finally:
            unlock_page(mem, pfns)
    finally:
        put_page(mem, pfns)
    return faults
