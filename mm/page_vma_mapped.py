"""Does the page table at an address still hold this page? Linux: mm/page_vma_mapped.c."""

from __future__ import annotations

import numpy as np

from mm.pgtable import pte_offset, pte_pfn, pte_present
from mm.swapops import alike, is_device_private_entry, is_migration_entry, swp_offset
from mm.types import Vma
from mm.typing import Addresses, Indices, Mask, Pfns
from mm.vectors import every, rows


def page_vma_mapped_walk(
    vma: Vma, pfns: Pfns, addrs: Addresses, *, migration: bool = False
) -> tuple[Indices, Mask]:
    """Where in the table pool the entries for *addrs* are, and which of them hold *pfns*.

    A present or device-private entry counts; with *migration*, only migration entries do.
    Called with the page-table lock held. Linux: page_vma_mapped_walk(), PVMW_MIGRATION.
    """
    pool = vma.vm_mm.mem.tables
    at = pte_offset(pool, vma.vm_mm.pgd, addrs)
    ptes = pool.entries[rows(at)]
    if migration:
        return at, is_migration_entry(alike(ptes)) & (swp_offset(ptes) == pfns)
    present = pte_present(ptes)
    if every(present):
        return at, pte_pfn(ptes) == pfns
    held = np.where(present, pte_pfn(ptes), swp_offset(ptes))
    return at, (present | is_device_private_entry(ptes)) & (held == pfns)
