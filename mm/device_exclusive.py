"""Pages that a device has for itself, for atomic operations on system memory.

    make_device_exclusive            entries that map the page become exclusive ones: the device
                                     may map it, and no CPU reaches it
    remove_device_exclusive_entry    the next CPU that touches it takes it back

The page stays where it is. It loses its mappings but not their references, so that it can neither
migrate nor be freed. Whoever watches the address space hears both times that the range changes,
and at the second the device forgets the page.

Unlike Linux v4.20, which lets a device do without: this is of v5.14. Linux: mm/rmap.c,
mm/memory.c, v6.12.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.filemap import lock_page, trylock_page, unlock_page
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.page_flags import PG_dirty
from mm.page_vma_mapped import page_vma_mapped_walk
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DEVMAP,
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    mk_pte,
    pte_dirty,
    pte_offset,
    pte_present,
    pte_soft_dirty,
    pte_uffd_wp,
    pte_write,
)
from mm.rmap import page_add_anon_rmap, page_mapped, page_remove_rmap, rmap_walk
from mm.swap import get_page, put_page
from mm.swapops import (
    SWP_SOFT_DIRTY,
    SWP_UFFD_WP,
    is_device_exclusive_entry,
    is_write_device_exclusive_entry,
    make_device_exclusive_entry,
    pte_swp_soft_dirty,
    pte_swp_uffd_wp,
    swp_offset,
)
from mm.types import MemMap, MmStruct, Vma, maybe_mkwrite, page_anon
from mm.typing import PAGE_SIZE, Addresses, Indices, Mask, Pfns, Ptes, word
from mm.vectors import places, stretches

_NOT_ACCESSED: Final = word(~_PAGE_ACCESSED)


def make_device_exclusive(mm: MmStruct, addrs: Addresses, pfns: Pfns, owner: object) -> Mask:
    """Take *pfns* (locked, with a reference each) at *addrs* of *mm* away from every CPU.

    False where *mm* does not map the page there any more, or may not store to it, or somebody
    still maps it, and for pages of files, which others reach without a mapping. *owner* is told to
    whoever watches, so that the device knows its own doing.
    Linux: folio_make_device_exclusive(), mm/rmap.c.
    """
    mem = mm.mem
    taken = np.zeros(pfns.size, dtype=np.bool_)
    anon = places(page_anon(mem, pfns))
    for vma, found_pages, found_addrs in rmap_walk(mem, pfns[anon]):
        order = np.argsort(found_addrs)
        which, where = anon[found_pages[order]], found_addrs[order]
        for run in stretches(where, PAGE_SIZE):
            start, end = where[run].item(0), where[run].item(-1) + PAGE_SIZE
            with (
                mmu_notifier_range(vma.vm_mm, start, end, MmuNotifyEvent.EXCLUSIVE, owner),
                vma.vm_mm.page_table_lock,
            ):
                writable = _make_exclusive(vma, where[run], pfns[which[run]])
            if vma.vm_mm is mm:
                taken[which[run]] |= writable & (where[run] == addrs[which[run]])
    return taken & ~page_mapped(mem, pfns)


def _make_exclusive(vma: Vma, addrs: Addresses, pfns: Pfns) -> Mask:
    """Replace the entries that map *pfns* at *addrs*; True where one was writable.

    Linux: page_make_device_exclusive_one(), mm/rmap.c.
    """
    mem = vma.vm_mm.mem
    at, mapped = page_vma_mapped_walk(vma, pfns, addrs)
    ptes = mem.tables.entries[at]
    mapped &= pte_present(ptes)
    writable = mapped & pte_write(ptes)
    with mem.locks.atomic:
        mem.flags[pfns[mapped & pte_dirty(ptes)]] |= PG_dirty
    kept_bits = pte_soft_dirty(ptes) * SWP_SOFT_DIRTY | pte_uffd_wp(ptes) * SWP_UFFD_WP
    entries = make_device_exclusive_entry(pfns, writable) | kept_bits
    mem.tables.entries[at[mapped]] = entries[mapped]
    page_remove_rmap(vma, pfns[mapped])
    return writable


def remove_device_exclusive_entry(vma: Vma, addrs: Addresses, ptes: Ptes) -> None:
    """A CPU touched *addrs*, where it found exclusive entries *ptes*: map the pages again.

    Waits until the device that takes a page has done so. An entry that has changed meanwhile
    stays as it is. Linux: remove_device_exclusive_entry(), mm/memory.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    at, pfns = pte_offset(mem.tables, mm.pgd, addrs), swp_offset(ptes)
    with mm.page_table_lock:
        there = mem.tables.entries[at] == ptes
        held = pfns[there]
        get_page(mem, held)
    try:
        lock_page(mem, held)
        try:
            for near in stretches(addrs, PAGE_SIZE):
                start, end = addrs[near].item(0), addrs[near].item(-1) + PAGE_SIZE
                with (
                    mmu_notifier_range(mm, start, end, MmuNotifyEvent.EXCLUSIVE),
                    mm.page_table_lock,
                ):
                    same = there[near] & (mem.tables.entries[at[near]] == ptes[near])
                    restore_exclusive_pte(vma, at[near][same], ptes[near][same])
        finally:
            unlock_page(mem, held)
    finally:
        put_page(mem, held)


def restore_exclusive_pages(mem: MemMap, pfns: Pfns) -> None:
    """Map those of *pfns* (distinct) again that devices have for themselves, for every process.

    For who must have the pages and cannot wait for a CPU to touch them. What somebody has locked
    stays as it is. Linux: remove_device_exclusive_entry(), mm/memory.c, which waits for a CPU.
    """
    with mem.locks.atomic:
        held = pfns[mem.refcount[pfns] > mem.is_zone_device_page(pfns)]
        get_page(mem, held)
    locked = held[trylock_page(mem, held)]
    try:
        remove_device_exclusive_ptes(mem, locked)
    finally:
        unlock_page(mem, locked)
        put_page(mem, held)


def remove_device_exclusive_ptes(mem: MemMap, pfns: Pfns) -> None:
    """Let every exclusive entry for *pfns*, locked by the caller, map its page again.

    Linux: remove_device_exclusive_entry(), mm/memory.c, of one entry.
    """
    for vma, which, addrs in rmap_walk(mem, pfns):
        mm = vma.vm_mm
        taken = places(_exclusive_for(mm, addrs, pfns[which])[1])
        taken = taken[np.argsort(addrs[taken])]
        where, wanted = addrs[taken], pfns[which[taken]]
        for run in stretches(where, PAGE_SIZE):
            start, end = where[run].item(0), where[run].item(-1) + PAGE_SIZE
            with (
                mmu_notifier_range(mm, start, end, MmuNotifyEvent.EXCLUSIVE),
                mm.page_table_lock,
            ):
                at, there = _exclusive_for(mm, where[run], wanted[run])
                restore_exclusive_pte(vma, at[there], mem.tables.entries[at[there]])


def _exclusive_for(mm: MmStruct, addrs: Addresses, pfns: Pfns) -> tuple[Indices, Mask]:
    """Where the entries of *addrs* are, and which are exclusive ones for *pfns*."""
    pool = mm.mem.tables
    at = pte_offset(pool, mm.pgd, addrs)
    ptes = pool.entries[at]
    return at, is_device_exclusive_entry(ptes) & (swp_offset(ptes) == pfns)


def restore_exclusive_pte(vma: Vma, at: Indices, ptes: Ptes) -> None:
    """Let the exclusive entries *ptes*, at places *at* of the table pool, map their pages again.

    Called with the pages locked and the page-table lock held. The page keeps the reference that
    the entry has had all the time. Linux: restore_exclusive_pte(), mm/memory.c.
    """
    mem, pfns = vma.vm_mm.mem, swp_offset(ptes)
    entries = mk_pte(pfns, vma.vm_page_prot) & _NOT_ACCESSED
    entries |= is_write_device_exclusive_entry(ptes) * maybe_mkwrite(vma)
    entries |= mem.is_device_public_page(pfns) * _PAGE_DEVMAP
    entries |= pte_swp_soft_dirty(ptes) * _PAGE_SOFT_DIRTY
    mem.tables.entries[at] = entries | pte_swp_uffd_wp(ptes) * _PAGE_UFFD_WP
    page_add_anon_rmap(vma, pfns)
