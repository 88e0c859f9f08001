"""Migration entries become mappings again, of the page that has come or of the one that stayed.

How they came about is in mm/rmap.py, unmap_to_migration_entries(). Linux: mm/migrate.c.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.page_flags import PG_anon_exclusive
from mm.page_vma_mapped import page_vma_mapped_walk
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DEVMAP,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    mk_pte,
)
from mm.rmap import add_mm_counter, page_add_anon_rmap, page_dup_rmap, rmap_walk
from mm.swap import get_page
from mm.swapops import (
    SWP_WATCHED,
    alike,
    is_write_migration_entry,
    make_device_private_entry,
    make_hwpoison_entry,
    pte_swp_exclusive,
    pte_swp_soft_dirty,
    pte_swp_uffd_wp,
)
from mm.types import VM_WRITE, MemMap, Vma
from mm.typing import Pfns, Ptes, word
from mm.vectors import chosen, every, rows, some

_NOT_ACCESSED: Final = word(~_PAGE_ACCESSED)
_NOT_EXCLUSIVE: Final = word(~PG_anon_exclusive)


def remove_migration_ptes(mem: MemMap, old: Pfns, new: Pfns) -> None:
    """Let every migration entry for old[i] become a mapping of new[i] (often the same page).

    Both vectors are locked by the caller; new pages carry the mapping and index of the old. A page
    is exclusive still where its entry says so: the process may have forked meanwhile.
    Linux: remove_migration_ptes(), mm/migrate.c.
    """
    for vma, pages, addrs in rmap_walk(mem, new):
        which = rows(pages)
        with vma.vm_mm.page_table_lock:
            at, found = page_vma_mapped_walk(vma, old[which], addrs, migration=True)
            at, replaced = chosen(at, found), chosen(new[which], found)
            if replaced.size:
                get_page(mem, replaced)
                here = rows(at)
                entries = mem.tables.entries[here]
                waiting = alike(entries)
                exclusive = pte_swp_exclusive(waiting)
                if not every(exclusive):
                    with mem.locks.atomic:
                        mem.flags[chosen(replaced, ~exclusive)] &= _NOT_EXCLUSIVE
                mem.tables.entries[here] = _mapping_entries(vma, waiting, replaced)
                if vma.vm_file is None:
                    page_add_anon_rmap(vma, replaced)
                else:
                    page_dup_rmap(vma, replaced)


def _mapping_entries(vma: Vma, waiting: Ptes, pfns: Pfns) -> Ptes:
    """What migration entries become now that *pfns* are in place. Linux: remove_migration_pte().

    Unlike Linux v4.20, an entry of device memory stays soft-dirty (as in 5.9).
    """
    mem = vma.vm_mm.mem
    writable = is_write_migration_entry(waiting)
    if not vma.vm_flags & VM_WRITE:
        writable = np.zeros_like(writable)

    device = mem.is_zone_device_page(pfns)
    if every(device) and every(mem.is_device_private_page(pfns)):
        return make_device_private_entry(pfns, writable) | waiting & SWP_WATCHED
    entries = mk_pte(pfns, vma.vm_page_prot) & _NOT_ACCESSED
    entries |= writable * _PAGE_RW | pte_swp_soft_dirty(waiting) * _PAGE_SOFT_DIRTY
    if vma.vm_mm.uffd_wp:
        entries |= (pte_swp_uffd_wp(waiting) & ~writable) * _PAGE_UFFD_WP
    if some(device):
        theirs = make_device_private_entry(pfns, writable) | waiting & SWP_WATCHED
        entries |= device * _PAGE_DEVMAP
        entries = np.where(mem.is_device_private_page(pfns), theirs, entries)
    return entries


def poison_migration_ptes(mem: MemMap, pfns: Pfns) -> None:
    """Let every migration entry for *pfns* answer with SIGBUS from now on: their bytes are lost.

    Unlike Linux v4.20, which promises this for MIGRATE_PFN_ERROR and does nothing about it.
    """
    for vma, pages, addrs in rmap_walk(mem, pfns):
        mm = vma.vm_mm
        with mm.page_table_lock:
            at, waiting = page_vma_mapped_walk(vma, pfns[pages], addrs, migration=True)
            mem.tables.entries[at[waiting]] = make_hwpoison_entry(pfns[pages[waiting]])
            add_mm_counter(vma, pfns[pages[waiting]], -1)
