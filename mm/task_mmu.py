"""What /proc/PID shows of an address space, and forgets of it. Linux: fs/proc/task_mmu.c.

pagemap      a word for each page: where it is
smaps        a record for each VMA: how much of it is where
clear_refs   forget who touched what, so that what follows can be seen
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from mm.errors import InvalidArgument, InvalidRange
from mm.gup import is_cow_mapping
from mm.mmap import TASK_SIZE_MAX, vmas_in
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.page_flags import BIT, PG_dirty, PG_referenced, PG_swapbacked
from mm.pagewalk import walk_page_range
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    pte_dirty,
    pte_offset,
    pte_pfn,
    pte_present,
    pte_soft_dirty,
    pte_special,
    pte_uffd_wp,
    pte_write,
)
from mm.shmem import shmem_mapping, shmem_swap_usage
from mm.swap import page_maybe_dma_pinned
from mm.swapops import (
    MAX_SWAPFILES_SHIFT,
    SWP_SOFT_DIRTY,
    is_device_private_entry,
    is_pfn_swap_entry,
    is_pte_marker,
    is_swap_entry,
    is_swap_pte,
    pte_swp_soft_dirty,
    pte_swp_uffd_wp,
    swp_offset,
    swp_type,
)
from mm.types import (
    VM_ACCOUNT,
    VM_DONTCOPY,
    VM_DONTEXPAND,
    VM_EXEC,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_IO,
    VM_LOCKED,
    VM_LOCKONFAULT,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_MERGEABLE,
    VM_MIXEDMAP,
    VM_NOHUGEPAGE,
    VM_NORESERVE,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WIPEONFORK,
    VM_WRITE,
    MmStruct,
    Vma,
    page_anon,
    vma_is_anonymous,
    vma_set_page_prot,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Mask, Pfns, Ptes, word
from mm.vectors import has, some

PM_PFRAME_MASK: Final = word((1 << 55) - 1)
PM_SOFT_DIRTY: Final = BIT(55)
PM_MMAP_EXCLUSIVE: Final = BIT(56)
PM_UFFD_WP: Final = BIT(57)
PM_FILE: Final = BIT(61)
PM_SWAP: Final = BIT(62)
PM_PRESENT: Final = BIT(63)

PSS_SHIFT: Final = 12  # binary places of a byte in the sum of shares

_SWAP_SHIFT: Final = word(MAX_SWAPFILES_SHIFT)
_WATCHED: Final = word(~(_PAGE_RW | _PAGE_SOFT_DIRTY))  # what clear_refs leaves of a present entry
_UNWATCHED_SWAP: Final = word(~SWP_SOFT_DIRTY)
_NOT_ACCESSED: Final = word(~_PAGE_ACCESSED)
_NOT_REFERENCED: Final = word(~PG_referenced)

# Letters of VmFlags, in the order of the bits.
_MNEMONICS: Final = (
    (VM_READ, "rd"),
    (VM_WRITE, "wr"),
    (VM_EXEC, "ex"),
    (VM_SHARED, "sh"),
    (VM_MAYREAD, "mr"),
    (VM_MAYWRITE, "mw"),
    (VM_MAYEXEC, "me"),
    (VM_MAYSHARE, "ms"),
    (VM_UFFD_MISSING, "um"),
    (VM_PFNMAP, "pf"),
    (VM_UFFD_WP, "uw"),
    (VM_LOCKED, "lo"),
    (VM_IO, "io"),
    (VM_DONTCOPY, "dc"),
    (VM_DONTEXPAND, "de"),
    (VM_LOCKONFAULT, "lf"),
    (VM_ACCOUNT, "ac"),
    (VM_NORESERVE, "nr"),
    (VM_HUGETLB, "ht"),
    (VM_WIPEONFORK, "wf"),
    (VM_SOFTDIRTY, "sd"),
    (VM_MIXEDMAP, "mm"),
    (VM_HUGEPAGE, "hg"),
    (VM_NOHUGEPAGE, "nh"),
    (VM_MERGEABLE, "mg"),
)


def entry_pfns(ptes: Ptes) -> Pfns:
    """The page that each entry maps, or stands for while it is away, int64[n]; -1 for none.

    Linux: vm_normal_page(), mm/memory.c; pfn_swap_entry_to_page(), linux/swapops.h, v5.14.
    """
    pfns = np.full(ptes.size, -1, dtype=np.int64)
    normal = pte_present(ptes) & ~pte_special(ptes)
    special = is_pfn_swap_entry(ptes)
    pfns[normal] = pte_pfn(ptes[normal])
    pfns[special] = swp_offset(ptes[special])
    return pfns


def pagemap(mm: MmStruct, addr: int, npages: int) -> Ptes:
    """A word for each of *npages* pages from *addr* on, uint64[npages]; 0 where nothing is.

         63 62 61      57 56 55 54                                     5 4    0
        +--+--+--+----+--+--+--+----------------------------------------+------+
        | P| S| F|    |UW| X|SD|            PFN, or offset              | type |
        +--+--+--+----+--+--+--+----------------------------------------+------+

    P present: below is the PFN. S not present: below are offset and type of the swap entry. F of a
    file or shared anonymous, UW write-protected by userfaultfd, X mapped nowhere else, SD
    soft-dirty. Unlike Linux v4.20, X is set only for present pages (6.12 does so).

    Raises InvalidRange. Linux: pagemap_read(), fs/proc/task_mmu.c.
    """
    end = addr + (npages << PAGE_SHIFT)
    if addr % PAGE_SIZE or not 0 <= addr <= end <= TASK_SIZE_MAX:
        raise InvalidRange(
            f"pagemap: [{addr:#x}, {end:#x}) is not made of pages below {TASK_SIZE_MAX:#x}"
        )
    mem = mm.mem
    with mm.mmap_sem.read():
        with mm.page_table_lock:
            at = pte_offset(mem.tables, mm.pgd, np.arange(addr, end, PAGE_SIZE))
            ptes = mem.tables.entries[at]
        words = _pagemap_entries(ptes)
        pfns = entry_pfns(ptes)
        paged = pfns >= 0
        words[paged] |= ~page_anon(mem, pfns[paged]) * PM_FILE
        alone = pte_present(ptes[paged]) & (mem.mapcount[pfns[paged]] == 1)
        words[paged] |= alone * PM_MMAP_EXCLUSIVE
        for vma in vmas_in(mm, addr, end):
            if vma.vm_flags & VM_SOFTDIRTY:
                first = max(vma.vm_start - addr, 0) >> PAGE_SHIFT
                words[first : (vma.vm_end - addr) >> PAGE_SHIFT] |= PM_SOFT_DIRTY
    return words


def _pagemap_entries(ptes: Ptes) -> Ptes:
    """What the entries alone say. Linux: pte_to_pagemap_entry()."""
    present, swapped = pte_present(ptes), is_swap_pte(ptes)
    words = np.zeros(ptes.size, dtype=np.uint64)
    words[present] = pte_pfn(ptes[present]).view(np.uint64) | PM_PRESENT
    words[present] |= pte_soft_dirty(ptes[present]) * PM_SOFT_DIRTY
    words[present] |= pte_uffd_wp(ptes[present]) * PM_UFFD_WP
    swap = ptes[swapped]
    words[swapped] = (swp_offset(swap).view(np.uint64) << _SWAP_SHIFT) | swp_type(swap) | PM_SWAP
    words[swapped] |= pte_swp_soft_dirty(swap) * PM_SOFT_DIRTY
    words[swapped] |= (pte_swp_uffd_wp(swap) | is_pte_marker(swap)) * PM_UFFD_WP
    return words


@dataclass(slots=True)
class MemSizeStats:
    """One VMA as /proc/PID/smaps has it; sizes in bytes. Linux: struct mem_size_stats.

    pss: each page divided by the entries that map it. A page whose entry is not present counts as
    shared, unless it is in device-private memory. perms: "rw-p"; vmflags: "rd wr mr mw me ac".
    """

    start: int
    end: int
    perms: str
    vmflags: str
    resident: int = 0
    pss: int = 0
    shared_clean: int = 0
    shared_dirty: int = 0
    private_clean: int = 0
    private_dirty: int = 0
    anonymous: int = 0
    lazyfree: int = 0
    swap: int = 0
    pss_locked: int = 0


def smaps(mm: MmStruct) -> list[MemSizeStats]:
    """A record for each VMA, ascending. Linux: show_smap(), fs/proc/task_mmu.c."""
    with mm.mmap_sem.read():
        return [_smap_gather_stats(vma) for vma in mm.vmas]


def _smap_gather_stats(vma: Vma) -> MemSizeStats:
    mm = vma.vm_mm
    mss = MemSizeStats(vma.vm_start, vma.vm_end, _perms(vma), show_smap_vma_flags(vma))
    pss = 0
    for run in walk_page_range(mm.mem.tables, mm.pgd, vma.vm_start, vma.vm_end, holes=False):
        with mm.page_table_lock:
            pss += _smaps_account(mss, vma, run.ptes)
    if vma.vm_file is not None and shmem_mapping(vma.vm_file.f_mapping):
        mss.swap += shmem_swap_usage(vma) << PAGE_SHIFT
    mss.pss = pss >> PSS_SHIFT
    if vma.vm_flags & VM_LOCKED:
        mss.pss_locked = mss.pss
    return mss


def _smaps_account(mss: MemSizeStats, vma: Vma, ptes: Ptes) -> int:
    """Add what *ptes* hold to *mss*; the proportional part is returned, in fixed point.

    Linux: smaps_pte_entry() and smaps_account().
    """
    mem = vma.vm_mm.mem
    mss.swap += int(np.count_nonzero(is_swap_entry(ptes))) << PAGE_SHIFT
    pfns = entry_pfns(ptes)
    paged = pfns >= 0
    if not some(paged):
        return 0
    ptes, pfns = ptes[paged], pfns[paged]
    mapcount, flags = mem.mapcount[pfns], mem.flags[pfns]
    present, anon = pte_present(ptes), page_anon(mem, pfns)
    dirty = (present & pte_dirty(ptes)) | has(flags, PG_dirty)
    there = present | is_device_private_entry(ptes)
    private = there & (mapcount < 2)
    lazyfree = anon & ~has(flags, PG_swapbacked) & ~dirty

    for name, pages in (
        ("resident", there | ~there),
        ("shared_clean", ~private & ~dirty),
        ("shared_dirty", ~private & dirty),
        ("private_clean", private & ~dirty),
        ("private_dirty", private & dirty),
        ("anonymous", anon),
        ("lazyfree", lazyfree),
    ):
        size = int(np.count_nonzero(pages)) << PAGE_SHIFT
        setattr(mss, name, getattr(mss, name) + size)
    parts = np.where(there, np.maximum(mapcount, 1), 1).astype(np.int64)
    return int((np.int64(PAGE_SIZE << PSS_SHIFT) // parts).sum())


def _perms(vma: Vma) -> str:
    """The four letters of /proc/PID/maps. Linux: show_vma_header_prefix()."""
    rights = ((VM_READ, "r"), (VM_WRITE, "w"), (VM_EXEC, "x"))
    letters = "".join(letter if vma.vm_flags & bit else "-" for bit, letter in rights)
    return letters + ("s" if vma.vm_flags & VM_SHARED else "p")


def show_smap_vma_flags(vma: Vma) -> str:
    """VmFlags of smaps. Linux: show_smap_vma_flags(), fs/proc/task_mmu.c."""
    return " ".join(letters for bit, letters in _MNEMONICS if vma.vm_flags & bit)


class ClearRefs(IntEnum):
    """What clear_refs() forgets. Linux: enum clear_refs_types."""

    ALL = 1  # that pages were accessed
    ANON = 2  # the same, of anonymous VMAs
    MAPPED = 3  # the same, of files
    SOFT_DIRTY = 4  # that pages were stored to


def clear_refs(mm: MmStruct, what: int) -> None:
    """Forget accesses (1 to 3) or stores (4) until now, so that later ones can be told.

    For stores, entries lose the right to store as well: the next one faults, and leaves its mark.
    Device-private entries keep theirs, as the device's stores are not watched.
    Raises InvalidArgument. Linux: clear_refs_write(), fs/proc/task_mmu.c.
    """
    try:
        kind = ClearRefs(what)
    except ValueError:
        raise InvalidArgument(f"clear_refs: {what} is not 1, 2, 3 or 4") from None
    if kind == ClearRefs.SOFT_DIRTY:
        with (
            mm.mmap_sem.write(),
            mmu_notifier_range(mm, 0, TASK_SIZE_MAX, MmuNotifyEvent.SOFT_DIRTY),
        ):
            for vma in mm.vmas:
                vma.vm_flags &= ~VM_SOFTDIRTY
                vma_set_page_prot(vma)
                _clear_soft_dirty(vma)
        return
    with mm.mmap_sem.read():
        for vma in mm.vmas:
            if kind == ClearRefs.ALL or (kind == ClearRefs.ANON) == vma_is_anonymous(vma):
                _clear_accessed(vma)


def _clear_soft_dirty(vma: Vma) -> None:
    """Linux: clear_soft_dirty(), fs/proc/task_mmu.c.

    Unlike Linux v4.20, a pinned page stays writable and soft-dirty (as in v5.11): whoever has it
    pinned stores to it without a fault.
    """
    mm = vma.vm_mm
    for run in walk_page_range(mm.mem.tables, mm.pgd, vma.vm_start, vma.vm_end, holes=False):
        with mm.page_table_lock:
            present, swapped = pte_present(run.ptes), is_swap_pte(run.ptes)
            run.ptes[present & ~_pte_is_pinned(vma, run.ptes, present)] &= _WATCHED
            run.ptes[swapped] &= _UNWATCHED_SWAP


def _pte_is_pinned(vma: Vma, ptes: Ptes, present: Mask) -> Mask:
    """True where the page must not get a copy behind the back of who has it pinned.

    Linux: pte_is_pinned(), fs/proc/task_mmu.c, v5.11.
    """
    pinned = present & pte_write(ptes)
    if not is_cow_mapping(vma):
        return np.zeros_like(pinned)
    pinned[pinned] = page_maybe_dma_pinned(vma.vm_mm.mem, pte_pfn(ptes[pinned]))
    return pinned


def _clear_accessed(vma: Vma) -> None:
    """Linux: clear_refs_pte_range(), fs/proc/task_mmu.c."""
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    for run in walk_page_range(mem.tables, mm.pgd, vma.vm_start, vma.vm_end, holes=False):
        with mm.page_table_lock:
            normal = pte_present(run.ptes) & ~pte_special(run.ptes)
            run.ptes[normal] &= _NOT_ACCESSED
            with mem.locks.atomic:
                mem.flags[pte_pfn(run.ptes[normal])] &= _NOT_REFERENCED
