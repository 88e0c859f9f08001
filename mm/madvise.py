"""madvise(): what a process knows about its memory and the core does not. Linux: mm/madvise.c.

flags        the advice is a bit of the VMA, for those to read who act on it
contents     the bytes may go: at once, or when memory is short
use          the pages are not needed now, and may go to swap; or soon, and come from there
presence     pages are faulted in
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from mm.errors import (
    AccessDenied,
    Busy,
    InputOutputError,
    InvalidArgument,
    NotMapped,
    OutOfMemory,
)
from mm.filemap import trylock_page, unlock_page
from mm.filemap_io import force_page_cache_readahead
from mm.fs import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    fput,
    get_file,
    vfs_fallocate,
)
from mm.gup import faultin_page_range, get_user_pages
from mm.memory_failure import memory_failure, soft_offline_page
from mm.mmap import find_vma, page_align
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.page_flags import (
    PG_active,
    PG_dirty,
    PG_lru,
    PG_referenced,
    PG_swapcache,
    PG_workingset,
)
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import _PAGE_ACCESSED, _PAGE_DIRTY, pte_pfn, pte_present, pte_special
from mm.sched import current_task
from mm.shmem import shmem_mapping, shmem_swapin_range
from mm.swap import deactivate_page, lru_add_drain, mark_page_lazyfree
from mm.swap_state import lookup_swap_cache
from mm.swapfile import free_swap_and_cache, try_to_free_swap
from mm.swapin import read_swap_cache_async
from mm.swapops import is_hwpoison_entry, is_swap_entry, swp_offset
from mm.types import (
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_HUGEPAGE,
    VM_IO,
    VM_LOCKED,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_SPECIAL,
    VM_WIPEONFORK,
    MemMap,
    MmStruct,
    Vma,
    vma_is_anonymous,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices, Mask, Pfns, Ptes, word
from mm.userfaultfd_k import userfaultfd_remove
from mm.vectors import has, joined, places, some
from mm.vma import vma_modify_flags
from mm.vmscan import reclaim_pages
from mm.zap import zap_page_range

_CACHED_OR_DIRTY: Final = word(PG_swapcache | PG_dirty)
_NOT_DIRTY: Final = word(~PG_dirty)
_NOT_REFERENCED: Final = word(~PG_referenced)
_OLD: Final = word(~_PAGE_ACCESSED)
_NEITHER_YOUNG_NOR_DIRTY: Final = word(~(_PAGE_ACCESSED | _PAGE_DIRTY))

# Acts on a range of a VMA; the VMA that the range is in then.
Visit: TypeAlias = Callable[[Vma, int, int], Vma]


class Flags(NamedTuple):
    """Advice that is a bit of the VMA: what it clears, what it sets, which VMAs refuse it."""

    clear: int
    set: int
    refused: int = 0


_FLAGS: Final = {
    "normal": Flags(VM_RAND_READ | VM_SEQ_READ, 0),
    "sequential": Flags(VM_RAND_READ, VM_SEQ_READ),
    "random": Flags(VM_SEQ_READ, VM_RAND_READ),
    "dontfork": Flags(0, VM_DONTCOPY),
    "dofork": Flags(VM_DONTCOPY, 0, refused=VM_IO),
    "wipeonfork": Flags(0, VM_WIPEONFORK, refused=VM_SHARED),
    "keeponfork": Flags(VM_WIPEONFORK, 0),
    "dontdump": Flags(0, VM_DONTDUMP),
    "dodump": Flags(VM_DONTDUMP, 0, refused=VM_SPECIAL),
    "hugepage": Flags(VM_NOHUGEPAGE, VM_HUGEPAGE),
    "nohugepage": Flags(VM_HUGEPAGE, VM_NOHUGEPAGE),
    "mergeable": Flags(0, VM_MERGEABLE),
    "unmergeable": Flags(VM_MERGEABLE, 0),
}


def do_madvise(mm: MmStruct, start: int, length: int, advice: str) -> None:
    """Take *advice*, a word of madvise(2) without MADV_, on [*start*, *start* + *length*).

    Takes mmap_sem. Raises InvalidArgument for advice that there is not, or that a VMA refuses;
    NotMapped where the range has holes, with the advice taken on the rest (but the populating
    ones, which stop there). Linux: do_madvise(), mm/madvise.c.
    """
    if start % PAGE_SIZE:
        raise InvalidArgument(f"madvise: addr {start:#x} is not a multiple of {PAGE_SIZE:#x}")
    end = start + page_align(length)
    if advice in _FLAGS:
        with mm.mmap_sem.write():
            _walk_vmas(mm, start, end, _madvise_flags(advice))
    elif advice in _READERS:
        if mm.userfaultfds and advice in _REMOVERS:
            userfaultfd_remove(mm, start, end)
        with mm.mmap_sem.read():
            _walk_vmas(mm, start, end, _READERS[advice])
    elif advice in ("hwpoison", "soft_offline"):
        madvise_inject_error(mm, start, end, advice)
    elif advice == "remove":
        _remove_from_files(mm, start, end)
    elif advice in ("populate_read", "populate_write"):
        faultin_page_range(mm, start, end, write=advice == "populate_write")
    else:
        raise InvalidArgument(f"madvise: no advice is named {advice!r}; {', '.join(ADVICE)}")


def madvise_inject_error(mm: MmStruct, start: int, end: int, advice: str) -> None:
    """Let the frames behind [*start*, *end*) fail ("hwpoison"), or go out of use ("soft_offline").

    Pages are faulted in first, from private device memory too. What cannot be done raises
    SegmentationFault, Busy, InputOutputError or OutOfMemory, with the other pages done.
    Linux: madvise_inject_error(), mm/madvise.c, which stops at the first.
    """
    with get_user_pages(mm, start, end - start, 0) as pin:
        pfns = pin.pfns
    inject = memory_failure if advice == "hwpoison" else soft_offline_page
    status = inject(mm.mem, pfns)
    failed = places(status)
    if failed.size:
        at = failed.item(0)
        raise _INJECTED[-status.item(at)](
            f"madvise: {advice} of [{start:#x}, {end:#x}): page {pfns[at]:#x} at "
            f"{start + at * PAGE_SIZE:#x} cannot be taken out of use: somebody holds it, it is "
            f"device memory or the zero page, or no frame is left for what is in it"
        )


def _walk_vmas(mm: MmStruct, start: int, end: int, visit: Visit) -> None:
    """Call *visit* for each VMA, with its part of the range. Linux: madvise_walk_vmas(), v5.17."""
    addr, hole = start, None
    while addr < end:
        vma = find_vma(mm, addr)
        if vma is None or vma.vm_start > addr:
            hole = addr if hole is None else hole
        if vma is None or vma.vm_start >= end:
            break
        addr = visit(vma, max(addr, vma.vm_start), min(vma.vm_end, end)).vm_end
    if hole is not None:
        raise NotMapped(f"madvise: nothing is mapped at {hole:#x}")


def _madvise_flags(advice: str) -> Visit:
    """Linux: madvise_behavior(), mm/madvise.c; madvise_update_vma(), v5.17."""
    flags = _FLAGS[advice]

    def visit(vma: Vma, start: int, end: int) -> Vma:
        if vma.vm_flags & flags.refused or (advice == "wipeonfork" and not vma_is_anonymous(vma)):
            raise InvalidArgument(f"madvise: {vma!r} cannot be advised to {advice}")
        if advice == "mergeable" and vma.vm_flags & (VM_SHARED | VM_MAYSHARE | VM_SPECIAL):
            return vma  # ksmd would not look at it
        vm_flags = vma.vm_flags & ~flags.clear | flags.set
        if vm_flags == vma.vm_flags:
            return vma
        return vma_modify_flags(vma, start, end, vm_flags)

    return visit


def _madvise_dontneed(vma: Vma, start: int, end: int) -> Vma:
    """Drop the contents, unless they are locked in memory. Linux: madvise_dontneed_free()."""
    _refuse(vma, VM_LOCKED, "dontneed")
    return _madvise_dontneed_locked(vma, start, end)


def _madvise_dontneed_locked(vma: Vma, start: int, end: int) -> Vma:
    """Drop the contents. Linux: madvise_dontneed_single_vma(), mm/madvise.c."""
    _refuse(vma, VM_PFNMAP, "dontneed_locked")
    zap_page_range(vma, start, end, MmuNotifyEvent.CLEAR)
    return vma


def _madvise_free(vma: Vma, start: int, end: int) -> Vma:
    """Let reclaim drop the contents, unless the process stores to the pages first.

    Pages in device memory stay as they are. Linux: madvise_free_single_vma(), mm/madvise.c.
    """
    _refuse(vma, VM_LOCKED | VM_PFNMAP, "free")
    if not vma_is_anonymous(vma):
        raise InvalidArgument(f"madvise: {vma!r} has a file, which keeps its contents")
    mm = vma.vm_mm
    lru_add_drain(mm.mem, current_task().cpu)
    with mmu_notifier_range(mm, start, end, MmuNotifyEvent.CLEAR):
        for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
            with mm.page_table_lock:
                _madvise_free_run(mm, run)
    return vma


def _madvise_free_run(mm: MmStruct, run: Run) -> None:
    """What is in swap goes at once, and what is lost reads as zeros again.

    Linux: madvise_free_pte_range(), mm/madvise.c.
    """
    mem, ptes = mm.mem, run.ptes
    swapped = places(is_swap_entry(ptes))
    free_swap_and_cache(mem, ptes[swapped])
    mm.swapents -= swapped.size
    ptes[swapped] = 0
    ptes[is_hwpoison_entry(ptes)] = 0

    at = _normal_pages(mem, ptes)
    pfns = pte_pfn(ptes[at])
    given = ~has(mem.flags[pfns], _CACHED_OR_DIRTY)
    given[~given] = _clean_pages(mem, pfns[~given])
    ptes[at[given]] &= _NEITHER_YOUNG_NOR_DIRTY
    mark_page_lazyfree(mem, pfns[given], current_task().cpu)


def _clean_pages(mem: MemMap, pfns: Pfns) -> Mask:
    """Make *pfns* clean, and free their slots; False for one that others map, hold or have locked.

    Linux: the middle of madvise_free_pte_range(), mm/madvise.c.
    """
    clean = mem.mapcount[pfns] == 1
    clean[clean] = trylock_page(mem, pfns[clean])
    locked = pfns[clean]
    try_to_free_swap(mem, locked)
    freed = ~has(mem.flags[locked], PG_swapcache)
    with mem.locks.atomic:
        mem.flags[locked[freed]] &= _NOT_DIRTY
    unlock_page(mem, locked)
    clean[clean] = freed
    return clean


def _normal_pages(mem: MemMap, ptes: Ptes) -> Indices:
    """Which of *ptes* map a page that reclaim may know of. Linux: vm_normal_page(), mm/memory.c."""
    at = places(pte_present(ptes) & ~pte_special(ptes))
    return at[~mem.is_zone_device_page(pte_pfn(ptes[at]))]


def _madvise_cold(vma: Vma, start: int, end: int) -> Vma:
    """Let reclaim look at the pages soon. Linux: madvise_cold(), mm/madvise.c, v5.4."""
    mem = vma.vm_mm.mem
    deactivate_page(mem, _take_for_reclaim(vma, start, end, "cold"), current_task().cpu)
    return vma


def _madvise_pageout(vma: Vma, start: int, end: int) -> Vma:
    """Swap the pages out now. Linux: madvise_pageout(), mm/madvise.c, v5.4."""
    reclaim_pages(vma.vm_mm.mem, _take_for_reclaim(vma, start, end, "pageout"))
    return vma


def _take_for_reclaim(vma: Vma, start: int, end: int, advice: str) -> Pfns:
    """The pages on LRU lists that this mapping alone has, counted as unused from now on.

    Linux: madvise_cold_or_pageout_pte_range(), mm/madvise.c, v5.4.
    """
    _refuse(vma, VM_LOCKED | VM_PFNMAP, advice)
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    lru_add_drain(mem, current_task().cpu)
    found = []
    for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
        with mm.page_table_lock:
            at = _normal_pages(mem, run.ptes)
            pfns = pte_pfn(run.ptes[at])
            ours = has(mem.flags[pfns], PG_lru) & (mem.mapcount[pfns] == 1)
            at, pfns = at[ours], pfns[ours]
            run.ptes[at] &= _OLD
            with mem.locks.atomic:
                active = pfns[has(mem.flags[pfns], PG_active)]
                mem.flags[active] |= PG_workingset
                mem.flags[pfns] &= _NOT_REFERENCED
            found.append(pfns)
    return joined(found)


def _madvise_willneed(vma: Vma, start: int, end: int) -> Vma:
    """Read what is in swap into the swap cache, and what is on disk into the page cache.

    Linux: madvise_willneed(), mm/madvise.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    if vma.vm_file is not None:
        pgoff = vma.vm_pgoff + ((start - vma.vm_start) >> PAGE_SHIFT)
        stop = pgoff + ((end - start) >> PAGE_SHIFT)
        swapped = shmem_mapping(vma.vm_file.f_mapping)
        read_ahead = shmem_swapin_range if swapped else force_page_cache_readahead
        read_ahead(vma.vm_file.f_mapping, pgoff, stop)
    for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
        away = places(is_swap_entry(run.ptes))
        slots, first = np.unique(swp_offset(run.ptes[away]), return_index=True)
        absent = lookup_swap_cache(mem, slots) == 0
        if some(absent):
            addrs = run.addrs[away[first[absent]]]
            read_swap_cache_async(vma, addrs, slots[absent])
    lru_add_drain(mem, current_task().cpu)
    return vma


def _remove_from_files(mm: MmStruct, start: int, end: int) -> None:
    """Punch holes into the files behind shared mappings. Takes mmap_sem for read, and lets it go
    for each, as the pages are then taken out of this mm too. Linux: madvise_remove(), mm/madvise.c.
    """
    addr, hole = start, None
    while addr < end:
        with mm.mmap_sem.read():
            vma = find_vma(mm, addr)
            if vma is None or vma.vm_start > addr:
                hole = addr if hole is None else hole
            if vma is None or vma.vm_start >= end:
                break
            first, addr = max(addr, vma.vm_start), min(vma.vm_end, end)
            _refuse(vma, VM_LOCKED, "remove")
            if vma.vm_file is None:
                raise InvalidArgument(f"madvise: {vma!r} has no file to remove from")
            if vma.vm_flags & (VM_SHARED | VM_MAYWRITE) != VM_SHARED | VM_MAYWRITE:
                raise AccessDenied(f"madvise: {vma!r} is private, or its file may not be written")
            file, pos = vma.vm_file, (vma.vm_pgoff << PAGE_SHIFT) + first - vma.vm_start
            get_file(file)
        try:
            vfs_fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pos, addr - first)
        finally:
            fput(file)
    if hole is not None:
        raise NotMapped(f"madvise: nothing is mapped at {hole:#x}")


def _refuse(vma: Vma, vm_flags: int, advice: str) -> None:
    if vma.vm_flags & vm_flags:
        raise InvalidArgument(f"madvise: {vma!r} cannot be advised to {advice}")


_READERS: Final[dict[str, Visit]] = {
    "dontneed": _madvise_dontneed,
    "dontneed_locked": _madvise_dontneed_locked,
    "free": _madvise_free,
    "cold": _madvise_cold,
    "pageout": _madvise_pageout,
    "willneed": _madvise_willneed,
}
_REMOVERS: Final = ("dontneed", "dontneed_locked", "free")  # that userland may want to hear of
_INJECTED: Final = {error.code: error for error in (Busy, InputOutputError, OutOfMemory)}
ADVICE: Final = (
    *_FLAGS,
    *_READERS,
    "remove",
    "populate_read",
    "populate_write",
    "hwpoison",
    "soft_offline",
)
