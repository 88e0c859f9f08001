"""Taking mappings away. Linux: zap_pte_range() and what is around it, mm/memory.c."""

from __future__ import annotations

import numpy as np

from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import (
    pte_pfn,
    pte_present,
    pte_special,
)
from mm.rmap import (
    page_remove_rmap,
)
from mm.swapfile import free_pages_and_swap_cache, free_swap_and_cache
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_swap_entry,
    swp_offset,
)
from mm.types import Vma
from mm.typing import Pfns


def zap_pte_range(vma: Vma, start: int, end: int) -> None:
    """Take every mapping in [*start*, *end*) of *vma* away and drop its reference.

    The caller has told the notifiers. Linux: zap_pte_range(), mm/memory.c.
    """
    mm = vma.vm_mm
    for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
        with mm.page_table_lock:
            gone = _zap_run(vma, run)
        free_pages_and_swap_cache(mm.mem, gone)


def _zap_run(vma: Vma, run: Run) -> Pfns:
    """Empty the entries of *run*; the pages that lose a reference by it."""
    mm, ptes = vma.vm_mm, run.ptes
    mapped = pte_present(ptes) & ~pte_special(ptes)
    private = is_device_private_entry(ptes)
    moving = is_migration_entry(ptes)
    exclusive = swp_offset(ptes[is_device_exclusive_entry(ptes)])
    if mm.swapents:
        swapped = ptes[is_swap_entry(ptes)]
        free_swap_and_cache(mm.mem, swapped)
        mm.swapents -= swapped.size
    pfns = np.concatenate((pte_pfn(ptes[mapped]), swp_offset(ptes[private])))
    ptes[:] = 0
    page_remove_rmap(vma, pfns)
    gone = np.concatenate((pfns, exclusive))  # which are not mapped, and yet referenced
    mm.anon_rss -= gone.size + int(np.count_nonzero(moving))
    return gone


def zap_page_range(vma: Vma, start: int, end: int, event: MmuNotifyEvent) -> None:
    """Unmap [*start*, *end*) of *vma* and let *event* be known.

    Linux: zap_page_range(), mm/memory.c.
    """
    with mmu_notifier_range(vma.vm_mm, start, end, event):
        zap_pte_range(vma, start, end)
