"""Reverse mapping: from pages to the page-table entries that hold them. Linux: mm/rmap.c.

A page knows its anon_vma, or the page cache of its file, and its page offset there; either lists
the VMAs in which such pages may be mapped; each VMA turns the offset into an address. All of it is
done for a vector of pages with one loop over VMAs.

The two ends of a migration stand here as well, unlike in Linux (`mm/migrate.c`): they walk the
rmap, and reclaim and compaction need them from below: try_to_unmap() puts migration entries in
place of a page, remove_migration_ptes() puts the page, or the one that replaces it, back.
try_to_unmap_to_swap() is its sibling for reclaim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from mm.errors import KernelBug
from mm.mmu_notifier import (
    MmuNotifyEvent,
    mmu_notifier_clear_flush_young,
    mmu_notifier_range,
)
from mm.page_cache import set_page_dirty
from mm.page_flags import PG_anon_exclusive, PG_dirty, PG_swapbacked, PG_swapcache
from mm.page_vma_mapped import page_vma_mapped_walk
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_RW,
    pte_dirty,
    pte_present,
    pte_soft_dirty,
    pte_uffd_wp,
    pte_write,
    pte_young,
)
from mm.swap import page_maybe_dma_pinned, put_page
from mm.swap_slots import swap_duplicate
from mm.swapops import (
    SWP_EXCLUSIVE,
    SWP_SOFT_DIRTY,
    SWP_UFFD_WP,
    SWP_WATCHED,
    alike,
    is_write_device_private_entry,
    make_hwpoison_entry,
    make_migration_entry,
    make_swap_entry,
)
from mm.types import (
    PAGE_MAPPING_ANON,
    VM_LOCKED,
    VM_SHARED,
    MemMap,
    Vma,
    linear_page_index,
    page_anon,
    vma_pages,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Indices, Mask, Pfns, Ptes, number, word
from mm.unevictable import mlock_new_page, mlock_vma_page, munlock_vma_page
from mm.vectors import add_at, chosen, distinct, every, has, places, rows, some, stretches, uniform

_ONE: Final = np.array(1, dtype=np.int32)
_ZERO: Final = np.array(0, dtype=np.int32)
_NEW_ANON: Final = word(PG_swapbacked | PG_anon_exclusive)
_NOT_ACCESSED: Final = word(~_PAGE_ACCESSED)
_NOT_EXCLUSIVE: Final = word(~PG_anon_exclusive)
_CLEAN_READONLY: Final = word(~(_PAGE_DIRTY | _PAGE_RW))
_SHIFT: Final = number(PAGE_SHIFT)


def page_move_anon_rmap(vma: Vma, pfns: Pfns) -> None:
    """*pfns* are mapped by *vma* alone from now on, and the process's own.

    Walks for them look no more where its parent and its siblings are.
    Linux: page_move_anon_rmap(), mm/rmap.c, and SetPageAnonExclusive(), v5.19.
    """
    mem = vma.vm_mm.mem
    assert vma.anon_vma is not None
    with mem.locks.atomic:
        mem.mapping[pfns] = vma.anon_vma.number << 2 | PAGE_MAPPING_ANON
        mem.flags[pfns] |= PG_anon_exclusive


def page_add_new_anon_rmap(vma: Vma, pfns: Pfns, addrs: Addresses) -> None:
    """First mapping of fresh *pfns* at *addrs*. Linux: page_add_new_anon_rmap(), mm/rmap.c."""
    mem = vma.vm_mm.mem
    assert vma.anon_vma is not None
    mem.flags[pfns] |= _NEW_ANON
    mem.mapcount[pfns] = 1
    mem.mapping[pfns] = (vma.anon_vma.number << 2) | PAGE_MAPPING_ANON
    mem.index[pfns] = linear_page_index(vma, addrs)
    mem.vmstat.add("nr_anon_pages", pfns.size)
    if vma.vm_flags & VM_LOCKED:
        mlock_new_page(mem, pfns[~mem.is_zone_device_page(pfns)])


def page_add_anon_rmap(vma: Vma, pfns: Pfns) -> None:
    """One more mapping, by *vma*, of each of *pfns*, which may repeat.

    Linux: page_add_anon_rmap(), mm/rmap.c.
    """
    _count_anon_mappings(vma.vm_mm.mem, pfns)
    mlock_vma_page(vma, pfns)


def _count_anon_mappings(mem: MemMap, pfns: Pfns) -> None:
    with mem.locks.atomic:
        which = rows(pfns)
        before = int(np.count_nonzero(mem.mapcount[which]))
        add_at(mem.mapcount, which, 1)
    mem.vmstat.add("nr_anon_pages", pfns.size - before)


def page_add_file_rmap(vma: Vma, pfns: Pfns) -> None:
    """One more mapping, by *vma*, of each of *pfns*, which are in the page cache and may repeat.

    Linux: page_add_file_rmap(), mm/rmap.c.
    """
    mem = vma.vm_mm.mem
    with mem.locks.atomic:
        which = rows(pfns)
        before = int(np.count_nonzero(mem.mapcount[which]))
        add_at(mem.mapcount, which, 1)
    mem.vmstat.add("nr_mapped", pfns.size - before)
    mlock_vma_page(vma, pfns)


def page_dup_rmap(vma: Vma, pfns: Pfns) -> None:
    """One more mapping, by *vma*, of each of *pfns*, whatever they are.

    Linux: page_dup_rmap(), include/linux/rmap.h.
    """
    if vma.vm_file is None:
        page_add_anon_rmap(vma, pfns)
        return
    anon = page_anon(vma.vm_mm.mem, pfns)
    page_add_anon_rmap(vma, pfns[anon])
    page_add_file_rmap(vma, pfns[~anon])


def add_mm_counter(vma: Vma, pfns: Pfns, sign: int) -> None:
    """Count *pfns*, that *vma* has from now on, or with *sign* -1 has no more, in its mm.

    Linux: add_mm_counter() of mm_counter(), include/linux/mm.h.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    filed = 0
    if vma.vm_file is not None:
        files = pfns[~page_anon(mem, pfns)]
        filed = files.size
        shmem = int(np.count_nonzero(mem.flags[files] & PG_swapbacked))
        mm.shmem_rss += sign * shmem
        mm.file_rss += sign * (filed - shmem)
    mm.anon_rss += sign * (pfns.size - filed)


def do_page_add_anon_rmap(vma: Vma, pfns: Pfns, addrs: Addresses, exclusive: Mask) -> None:
    """One more mapping of each of *pfns* (distinct), which come from swap, at *addrs* of *vma*.

    Where it is *exclusive*, the page is the process's own. A page that is just read belongs to
    nobody yet: then the anon_vma is the oldest of *vma*, where all who may share the page are; and
    a VM_LOCKED VMA does not lock it in memory before reclaim sees it, as in v6.12.
    Linux: do_page_add_anon_rmap() and __page_set_anon_rmap(), mm/rmap.c.
    """
    mem = vma.vm_mm.mem
    assert vma.anon_vma is not None
    oldest, own = (a.number << 2 | PAGE_MAPPING_ANON for a in (vma.anon_vma_chain[0], vma.anon_vma))
    fresh = mem.mapping[pfns] == 0
    mem.mapping[pfns[fresh]] = np.where(exclusive[fresh], own, oldest)
    mem.index[pfns[fresh]] = linear_page_index(vma, addrs[fresh])
    with mem.locks.atomic:
        mem.flags[pfns[exclusive]] |= PG_anon_exclusive
    _count_anon_mappings(mem, pfns)
    mlock_vma_page(vma, pfns[~fresh])


def page_remove_rmap(vma: Vma, pfns: Pfns) -> None:
    """One mapping, by *vma*, less of each of *pfns* (distinct).

    Linux: page_remove_rmap(), mm/rmap.c; as in v5.18 it knows the VMA, which may be VM_LOCKED.
    """
    mem = vma.vm_mm.mem
    with mem.locks.atomic:
        which = rows(pfns)
        left = mem.mapcount[which] - _ONE
        mem.mapcount[which] = left
    if some(left < _ZERO):
        raise KernelBug(f"page {pfns[left < 0][0]:#x} is unmapped more often than it was mapped")
    unmapped = pfns.size - int(np.count_nonzero(left))
    if vma.vm_file is not None and unmapped:
        filed = int(np.count_nonzero(~page_anon(mem, pfns[left == 0])))
        mem.vmstat.add("nr_mapped", -filed)
        unmapped -= filed
    mem.vmstat.add("nr_anon_pages", -unmapped)
    munlock_vma_page(vma, pfns)


class Mapping(NamedTuple):
    """A VMA in which some of the pages asked for may be mapped.

    pages: places in the vector asked for; addrs: where *vma* would have each of them.
    """

    vma: Vma
    pages: Indices
    addrs: Addresses


def rmap_walk(mem: MemMap, pfns: Pfns) -> Iterator[Mapping]:
    """Every VMA that may map any of *pfns*, with the addresses; one step per VMA.

    A Mapping says where the page would be, not that it is there: ask page_vma_mapped_walk().
    Linux: rmap_walk_anon() and rmap_walk_file(), mm/rmap.c.
    """
    which = rows(pfns)
    mapping, index = mem.mapping[which], mem.index[which]
    owners = distinct(mapping)
    for owner in owners:
        if owner & PAGE_MAPPING_ANON:
            anon_vma = mem.anon_vmas.get(owner >> 2)
            if anon_vma is None:
                continue
            rwsem, vmas = anon_vma.rwsem, anon_vma.vmas
        else:
            cache = mem.mappings.get(owner >> 2)
            if cache is None:
                continue  # a page of nobody
            rwsem, vmas = cache.i_mmap_rwsem, cache.i_mmap
        with rwsem.read():
            for vma in tuple(vmas):
                offset = index - vma.vm_pgoff
                inside = offset.view(np.uint64) < word(vma_pages(vma))  # negative is huge
                if len(owners) > 1:
                    inside &= mapping == owner
                at = places(inside)
                if at.size:
                    yield Mapping(vma, at, vma.vm_start + (chosen(offset, inside) << _SHIFT))


def unmap_to_migration_entries(vma: Vma, ptes: Ptes, pfns: Pfns) -> Ptes:
    """Unmap locked *pfns* from the entries *ptes* of *vma*; the migration entries to store there.

    Called with the page-table lock held. The reference of each mapping passes to the caller.
    Unlike Linux v4.20, the entry's dirty bit goes to the page (6.1 does so): reclaim would take
    the page for clean and drop it. And a device page keeps its write permission, which v4.20
    loses in every process but the one that migrates (gone by 5.14).
    Linux: try_to_unmap_one() with TTU_MIGRATION, mm/rmap.c.
    """
    mem, asked = vma.vm_mm.mem, alike(ptes)
    present = pte_present(asked)
    if every(present):
        dirty = pte_dirty(asked)
        if some(dirty):
            set_page_dirty(mem, chosen(pfns, dirty))
        writable, watched = pte_write(asked), pte_soft_dirty(asked) * SWP_SOFT_DIRTY
        if vma.vm_mm.uffd_wp:
            watched |= pte_uffd_wp(asked) * SWP_UFFD_WP
    elif not some(present):
        writable, watched = is_write_device_private_entry(asked), asked & SWP_WATCHED
    else:
        entries = np.empty_like(ptes)
        for kind in (present, ~present):
            entries[kind] = unmap_to_migration_entries(vma, ptes[kind], pfns[kind])
        return entries
    exclusive = has(uniform(mem.flags[rows(pfns)]), PG_anon_exclusive)
    page_remove_rmap(vma, pfns)
    return make_migration_entry(pfns, writable) | (watched | exclusive * SWP_EXCLUSIVE)


def try_to_unmap(mem: MemMap, pfns: Pfns) -> None:
    """Replace every mapping of *pfns* (locked by the caller) by a migration entry.

    Where that fails a page stays mapped; the caller sees its mapcount.
    Linux: try_to_unmap(), TTU_MIGRATION | TTU_IGNORE_MLOCK | TTU_IGNORE_ACCESS, mm/rmap.c.
    """

    def migrate(vma: Vma, at: Indices, found: Pfns) -> Pfns:
        entries = mem.tables.entries
        entries[at] = unmap_to_migration_entries(vma, entries[at], found)
        return found

    for vma, which, addrs in _rmap_walk_mapped(mem, pfns):
        _unmap_from(vma, pfns[which], addrs, migrate)


def _rmap_walk_mapped(mem: MemMap, pfns: Pfns) -> Iterator[Mapping]:
    """As rmap_walk(), without the pages that the caller has unmapped from all VMAs by then.

    Whoever listens to the others hears nothing. Linux: page_mapcount_is_zero(), mm/rmap.c.
    """
    for mapping in rmap_walk(mem, pfns):
        mapped = page_mapped(mem, pfns[mapping.pages])
        if every(mapped):
            yield mapping
        elif some(mapped):
            yield Mapping(mapping.vma, mapping.pages[mapped], mapping.addrs[mapped])


def _unmap_from(
    vma: Vma, pfns: Pfns, addrs: Addresses, unmap: Callable[[Vma, Indices, Pfns], Pfns]
) -> None:
    """Let *unmap* change the entries at *addrs* (in any order) that still map *pfns*.

    It gets their places in the table pool and the pages, with the page-table lock held, and says
    which pages lost a mapping by it; the references of those go.
    """
    mm = vma.vm_mm
    if not every(addrs[1:] > addrs[:-1]):
        order = np.argsort(addrs)
        pfns, addrs = pfns[order], addrs[order]
    for run in stretches(addrs, PAGE_SIZE):
        start, end = addrs[run].item(0), addrs[run].item(-1) + PAGE_SIZE
        with (
            mmu_notifier_range(mm, start, end, MmuNotifyEvent.CLEAR),
            mm.page_table_lock,
        ):
            at, mapped = page_vma_mapped_walk(vma, pfns[run], addrs[run])
            gone = unmap(vma, at[mapped], pfns[run][mapped])
        put_page(mm.mem, gone)


def try_to_unmap_to_swap(mem: MemMap, pfns: Pfns, *, ignore_mlock: bool = False) -> None:
    """Replace every mapping of *pfns* (locked, isolated) by an entry for its slot in swap.

    A page that MADV_FREE gave up has no slot: its mapping goes, if it is still clean, or stays and
    the page is an anonymous one as others again. Where a mapping stays, as those of VM_LOCKED
    memory do unless *ignore_mlock*, the caller sees it in mapcount. A page of a file leaves nothing
    behind: whoever wants it finds it by its offset.
    Linux: try_to_unmap(), TTU_BATCH_FLUSH and TTU_IGNORE_MLOCK, mm/rmap.c.
    """
    for vma, which, addrs in _rmap_walk_mapped(mem, pfns):
        if ignore_mlock or not vma.vm_flags & VM_LOCKED:
            anon = vma.vm_file is None or page_anon(mem, pfns[which[:1]]).item()
            _unmap_from(
                vma, pfns[which], addrs, unmap_to_swap_entries if anon else _unmap_file_pages
            )


def _unmap_file_pages(vma: Vma, at: Indices, pfns: Pfns) -> Pfns:
    """Empty the entries at places *at*, which map *pfns* of the page cache."""
    mem = vma.vm_mm.mem
    set_page_dirty(mem, pfns[pte_dirty(mem.tables.entries[at])])
    mem.tables.entries[at] = 0
    page_remove_rmap(vma, pfns)
    add_mm_counter(vma, pfns, -1)
    return pfns


def unmap_to_swap_entries(vma: Vma, at: Indices, pfns: Pfns) -> Pfns:
    """Put swap entries at places *at*, which map *pfns*; the pages that lost a mapping by it.

    Called with the page-table lock held. Unlike Linux v4.20, an entry says whether the slot is
    the process's own, as the page was; one that is pinned stays mapped (v5.19).
    Linux: try_to_unmap_one(), mm/rmap.c.
    """
    mm = vma.vm_mm
    mem, entries = mm.mem, mm.mem.tables.entries
    ptes = entries[at]
    with mem.locks.atomic:
        mem.flags[pfns[pte_dirty(ptes)]] |= PG_dirty
        flags = mem.flags[pfns]
        slotted, exclusive = has(flags, PG_swapcache), has(flags, PG_anon_exclusive)
        spare = ~slotted & ~has(flags, PG_dirty)
        spare &= mem.refcount[pfns] == 1 + mem.mapcount[pfns]  # isolated, and mapped, is all it is
        mem.flags[pfns[~slotted & ~spare]] |= PG_swapbacked
        slotted &= ~(exclusive & page_maybe_dma_pinned(mem, pfns))
        mem.flags[pfns[slotted]] &= _NOT_EXCLUSIVE

    entries[at[spare]] = 0
    slots = mem.private[pfns[slotted]]
    swap_duplicate(mem.swap, slots)
    kept_bits = pte_soft_dirty(ptes) * SWP_SOFT_DIRTY | exclusive * SWP_EXCLUSIVE
    if mm.uffd_wp:
        kept_bits |= pte_uffd_wp(ptes) * SWP_UFFD_WP
    entries[at[slotted]] = make_swap_entry(slots) | kept_bits[slotted]
    gone = pfns[slotted | spare]
    page_remove_rmap(vma, gone)
    mm.anon_rss -= gone.size
    mm.swapents += slots.size
    return gone


def try_to_unmap_poisoned(mem: MemMap, pfns: Pfns) -> None:
    """Let every mapping of *pfns* (locked, isolated) answer with SIGBUS: their bytes are lost.

    Linux: try_to_unmap() of PageHWPoison pages, mm/rmap.c.
    """

    def poison(vma: Vma, at: Indices, found: Pfns) -> Pfns:
        mem.tables.entries[at] = make_hwpoison_entry(found)
        page_remove_rmap(vma, found)
        vma.vm_mm.anon_rss -= found.size
        return found

    for vma, which, addrs in _rmap_walk_mapped(mem, pfns):
        _unmap_from(vma, pfns[which], addrs, poison)


def page_referenced(mem: MemMap, pfns: Pfns) -> Mask:
    """Has any mapping of each of *pfns* (locked) been used since this was last asked?

    What a VM_LOCKED mapping needs counts as used; devices that keep count of what they use are
    asked too. Linux: page_referenced(), mm/rmap.c.
    """
    referenced = np.zeros(pfns.size, dtype=np.bool_)
    for vma, which, addrs in rmap_walk(mem, pfns):
        entries = mem.tables.entries
        with vma.vm_mm.page_table_lock:
            at, mapped = page_vma_mapped_walk(vma, pfns[which], addrs)
            used = mapped & (pte_young(entries[at]) | bool(vma.vm_flags & VM_LOCKED))
            if vma.vm_mm.notifier_extras:
                used[mapped] |= mmu_notifier_clear_flush_young(vma.vm_mm, addrs[mapped])
            entries[at[mapped]] &= _NOT_ACCESSED
        referenced[which[used]] = True
    return referenced


def page_mkclean(mem: MemMap, pfns: Pfns) -> Mask:
    """Let every store to *pfns* (locked, of files) through a shared mapping fault first.

    True where one may have come through a mapping since the last time.
    Linux: page_mkclean(), mm/rmap.c.
    """
    cleaned = np.zeros(pfns.size, dtype=np.bool_)

    def clean(vma: Vma, at: Indices, found: Pfns) -> Pfns:
        entries = mem.tables.entries
        open_to_stores = pte_dirty(entries[at]) | pte_write(entries[at])
        entries[at] &= _CLEAN_READONLY
        cleaned[np.isin(pfns, found[open_to_stores])] = True
        return found[:0]

    for vma, which, addrs in rmap_walk(mem, pfns):
        if vma.vm_flags & VM_SHARED:
            _unmap_from(vma, pfns[which], addrs, clean)
    return cleaned


def page_mapped(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages that some page table maps. Linux: page_mapped(), include/linux/mm.h."""
    return mem.mapcount[rows(pfns)] > 0
