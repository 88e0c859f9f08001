"""Taking mappings away. Linux: zap_pte_range() and what is around it, mm/memory.c."""

from __future__ import annotations

import numpy as np

from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.page_cache import set_page_dirty
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import (
    pte_dirty,
    pte_pfn,
    pte_present,
    pte_special,
    pte_young,
)
from mm.rmap import add_mm_counter, page_remove_rmap
from mm.swap import mark_page_accessed, put_page
from mm.swapfile import free_pages_and_swap_cache, free_swap_and_cache
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_swap_entry,
    swp_offset,
)
from mm.types import VM_SEQ_READ, Vma, page_anon
from mm.typing import NO_PAGES, Pfns
from mm.vectors import places


def zap_pte_range(vma: Vma, start: int, end: int, *, even_cows: bool = True) -> None:
    """Take every mapping in [*start*, *end*) of *vma* away and drop its reference.

    Without *even_cows* only those of the file's pages, and not of private copies. The caller has
    told the notifiers. Linux: zap_pte_range(), mm/memory.c.
    """
    mm = vma.vm_mm
    for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
        with mm.page_table_lock:
            if vma.vm_file is not None:
                _zap_file_pages(vma, run)
            gone = _zap_run(vma, run) if even_cows else NO_PAGES
        free_pages_and_swap_cache(mm.mem, gone)


def _zap_file_pages(vma: Vma, run: Run) -> None:
    """Empty those of the entries of *run* that hold pages of the file.

    What the CPU has stored and used is the page's to remember now.
    """
    mem, ptes = vma.vm_mm.mem, run.ptes
    moving = is_migration_entry(ptes)
    at = places((pte_present(ptes) & ~pte_special(ptes)) | moving)
    pfns = np.where(moving[at], swp_offset(ptes[at]), pte_pfn(ptes[at]))
    at, pfns = at[~page_anon(mem, pfns)], pfns[~page_anon(mem, pfns)]
    if not at.size:
        return
    add_mm_counter(vma, pfns, -1)
    mapped = ~moving[at]
    entries, pfns = ptes[at[mapped]], pfns[mapped]
    set_page_dirty(mem, pfns[pte_dirty(entries)])
    if not vma.vm_flags & VM_SEQ_READ:
        mark_page_accessed(mem, pfns[pte_young(entries)])
    ptes[at] = 0
    page_remove_rmap(vma, pfns)
    put_page(mem, pfns)


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


def zap_page_range(
    vma: Vma, start: int, end: int, event: MmuNotifyEvent, *, even_cows: bool = True
) -> None:
    """Unmap [*start*, *end*) of *vma*, as zap_pte_range() does, and let *event* be known.

    Linux: zap_page_range(), mm/memory.c.
    """
    with mmu_notifier_range(vma.vm_mm, start, end, event):
        zap_pte_range(vma, start, end, even_cows=even_cows)
