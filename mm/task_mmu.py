"""What /proc/PID shows of an address space. Linux: fs/proc/task_mmu.c."""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.mmap import vmas_in
from mm.page_flags import BIT
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_soft_dirty, pte_special
from mm.swapops import (
    MAX_SWAPFILES_SHIFT,
    is_swap_pte,
    non_swap_entry,
    pte_swp_soft_dirty,
    swp_offset,
    swp_type,
)
from mm.types import VM_SOFTDIRTY, MmStruct, page_anon
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Pfns, Ptes, word

PM_PFRAME_BITS: Final = 55
PM_PFRAME_MASK: Final = word((1 << PM_PFRAME_BITS) - 1)
PM_SOFT_DIRTY: Final = BIT(55)
PM_MMAP_EXCLUSIVE: Final = BIT(56)
PM_UFFD_WP: Final = BIT(57)
PM_FILE: Final = BIT(61)
PM_SWAP: Final = BIT(62)
PM_PRESENT: Final = BIT(63)

_SWAP_SHIFT: Final = word(MAX_SWAPFILES_SHIFT)


def pagemap(mm: MmStruct, addr: int, npages: int) -> Ptes:
    """A word for each page of [*addr*, *addr* + *npages* pages), uint64[npages]; 0 where none is.

         63 62 61 60    58 57 56 55 54                                        0
        +--+--+--+--------+--+--+--+-------------------------------------------+
        | P| S| F|    0   |UW|EX|SD|  PFN, or swap type | offset << 5          |
        +--+--+--+--------+--+--+--+-------------------------------------------+

    P present, S swapped or another entry that is not present, F file or shared anonymous, UW
    write-protected by userfaultfd, EX mapped by this entry alone, SD soft-dirty.

    Linux: pagemap_read(), fs/proc/task_mmu.c; Documentation/admin-guide/mm/pagemap.rst.
    """
    mem = mm.mem
    with mm.page_table_lock:
        at = pte_offset(mem.tables, mm.pgd, addr + np.arange(npages) * PAGE_SIZE)
        ptes = mem.tables.entries[at]
    present, swapped = pte_present(ptes), is_swap_pte(ptes)
    pfns = entry_pfns(ptes)
    paged = pfns >= 0

    words = np.zeros(npages, dtype=np.uint64)
    words[present] = pte_pfn(ptes[present]).view(np.uint64) | PM_PRESENT
    words[swapped] = _swap_frames(ptes[swapped]) | PM_SWAP
    words |= np.where(present, pte_soft_dirty(ptes), pte_swp_soft_dirty(ptes)) * PM_SOFT_DIRTY
    words[paged] |= ~page_anon(mem, pfns[paged]) * PM_FILE
    words[paged] |= (present[paged] & (mem.mapcount[pfns[paged]] == 1)) * PM_MMAP_EXCLUSIVE
    for vma in vmas_in(mm, addr, addr + (npages << PAGE_SHIFT)):
        if vma.vm_flags & VM_SOFTDIRTY:
            first = max(vma.vm_start - addr, 0) >> PAGE_SHIFT
            words[first : (vma.vm_end - addr) >> PAGE_SHIFT] |= PM_SOFT_DIRTY
    return words


def _swap_frames(ptes: Ptes) -> Ptes:
    """Swap type and offset as pagemap has them."""
    return swp_type(ptes) | (swp_offset(ptes).view(np.uint64) << _SWAP_SHIFT)


def entry_pfns(ptes: Ptes) -> Pfns:
    """The page that each entry maps, or stands for while it is away; -1 where that is none.

    Linux: vm_normal_page(), mm/memory.c, and pfn_swap_entry_to_page(), linux/swapops.h.
    """
    pfns = np.full(ptes.size, -1, dtype=np.int64)
    normal = pte_present(ptes) & ~pte_special(ptes)
    special = is_swap_pte(ptes) & non_swap_entry(ptes)
    pfns[normal] = pte_pfn(ptes[normal])
    pfns[special] = swp_offset(ptes[special])
    return pfns
