"""Faults, and taking mappings away. Linux: mm/memory.c.

handle_mm_fault() gets a vector of addresses of one VMA that a thread touched and could not
reach. By what the page table holds there each goes one way:

    nothing                    do_anonymous_page   the zero page for a read, a frame for a write
                               do_fault            of a file: its page, or a copy of that
    not present                do_swap_page        in swap, with a device, on its way, or lost
    present, wants to store    do_wp_page          its own copy, or the page as it is if unshared
             or to be its own

A fault may end well and yet leave the entry as it was: the caller looks again and comes back,
as a CPU runs its instruction again. One that userland has asked for (userfaultfd) ends with RETRY
and a reason: the caller lets go of mmap_sem, waits for the answer, and comes back.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.anon_vma import anon_vma_prepare
from mm.device_exclusive import remove_device_exclusive_entry
from mm.errors import KernelBug
from mm.fault_file import do_fault, wp_page_shared
from mm.filemap import page_locked
from mm.gfp import GFP_HIGHUSER_MOVABLE, Gfp
from mm.locking import preempt
from mm.mempolicy import alloc_charged_pages
from mm.migrate import migration_entry_wait
from mm.mmu_notifier import (
    MmuNotifyEvent,
    mmu_notifier_change_pte,
    mmu_notifier_invalidate_range,
    mmu_notifier_range,
)
from mm.page_flags import PG_anon_exclusive, PG_uptodate
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DEVMAP,
    _PAGE_DIRTY,
    _PAGE_SOFT_DIRTY,
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    PTRS_PER_PTE,
    mk_pte,
    pte_alloc_each,
    pte_mkuffd_wp,
    pte_none,
    pte_offset,
    pte_pfn,
    pte_present,
    pte_special,
    pte_uffd_wp,
    pte_write,
)
from mm.rmap import (
    add_mm_counter,
    page_add_new_anon_rmap,
    page_move_anon_rmap,
    page_remove_rmap,
)
from mm.sched import current_task
from mm.swap import lru_cache_add_active, put_page
from mm.swapfile import free_pages_and_swap_cache, reuse_swap_page
from mm.swapin import do_swap_in
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_hwpoison_entry,
    is_migration_entry,
    is_pte_marker,
    is_swap_entry,
    make_device_private_entry,
    pte_none_mostly,
    pte_swp_uffd_wp,
    swp_offset,
)
from mm.trace import TracePoint
from mm.types import (
    VM_FAULT_ERROR,
    VM_SHARED,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    MemMap,
    MmStruct,
    Vma,
    VmFault,
    maybe_mkwrite,
    page_anon,
)
from mm.typing import PAGE_SIZE, Addresses, Faults, Indices, Mask, Pfns, Ptes, pages, word
from mm.userfaultfd_k import (
    handle_userfault,
    userfaultfd_missing,
    userfaultfd_pte_wp,
    userfaultfd_wp,
    userfaultfd_wp_async,
)
from mm.vectors import every, has, pieces, places, some, stretches

_WRITTEN: Final = word(_PAGE_ACCESSED | _PAGE_DIRTY | _PAGE_SOFT_DIRTY)
_WATCHED: Final = word(_PAGE_SOFT_DIRTY | _PAGE_UFFD_WP)  # what a copy keeps that is not stored to
_NOT_UFFD_WP: Final = word(~_PAGE_UFFD_WP)

page_fault_user: Final = TracePoint("page_fault_user")


def handle_mm_fault(vma: Vma, addrs: Addresses, *, write: bool, unshare: bool = False) -> Faults:
    """Serve faults at *addrs* (page addresses inside *vma*, ascending); a VmFault word for each.

    unshare: a read that wants a page which is the process's own and stays so, as a pin does.
    Called with mmap_sem held for read; the caller has checked that *vma* allows the access, or
    may pass over that (FOLL_FORCE). Linux: handle_mm_fault(), mm/memory.c.
    """
    preempt("handle_mm_fault")
    mm = vma.vm_mm
    if vma.vm_userfaultfd_ctx is None:
        faults = _handle_pte_faults(vma, addrs, write=write, unshare=unshare)
    else:
        faults = _handle_userfaults(vma, addrs, write=write, unshare=unshare)
    mm_account_fault(mm.mem, faults)
    return faults


def mm_account_fault(mem: MemMap, faults: Faults) -> None:
    """Count *faults* for the machine, and those that ended well for the task that runs.

    Linux: mm_account_fault(), mm/memory.c, v5.9; before, each architecture's fault handler, which
    never saw those of get_user_pages().
    """
    task = current_task()
    if not some(faults):
        mem.vmstat.add("pgfault", faults.size)
        task.min_flt += faults.size
        return
    faults = faults[(faults & VmFault.RETRY) == 0]  # the others will be, when they come back
    served = faults[(faults & VM_FAULT_ERROR) == 0]
    nr_major = int(np.count_nonzero(served & VmFault.MAJOR))
    mem.vmstat.add("pgfault", faults.size)
    mem.vmstat.add("pgmajfault", nr_major)
    task.maj_flt += nr_major
    task.min_flt += served.size - nr_major


def _handle_userfaults(vma: Vma, addrs: Addresses, *, write: bool, unshare: bool) -> Faults:
    """Serve faults up to the first that is userland's; those after it are not due yet (RETRY)."""
    mm = vma.vm_mm
    ptes = mm.mem.tables.entries[pte_offset(mm.mem.tables, mm.pgd, addrs)]
    asked = pte_none_mostly(ptes) & userfaultfd_missing(vma)
    if write and userfaultfd_wp(vma) and not userfaultfd_wp_async(vma):
        asked |= pte_present(ptes) & ~pte_write(ptes) & pte_uffd_wp(ptes)
        asked |= is_swap_entry(ptes) & pte_swp_uffd_wp(ptes)
    due = places(asked)[0] + 1 if some(asked) else addrs.size
    faults = np.full(addrs.size, VmFault.RETRY, dtype=np.uint16)
    faults[:due] = _handle_pte_faults(vma, addrs[:due], write=write, unshare=unshare)
    return faults


def _handle_pte_faults(vma: Vma, addrs: Addresses, *, write: bool, unshare: bool) -> Faults:
    """Linux: handle_pte_fault(), mm/memory.c."""
    mm = vma.vm_mm
    if page_fault_user:
        page_fault_user(process=mm.name, addrs=addrs, write=write)
    at = pte_offset_alloc(mm, addrs)
    ptes = mm.mem.tables.entries[at]

    none = pte_none(ptes)
    if every(none):
        return do_pte_missing(vma, addrs, at, write=write)
    present = pte_present(ptes)
    if not some(none | present):
        return do_swap_page(vma, addrs, at, ptes, write=write)
    faults = np.zeros(addrs.size, dtype=np.uint16)
    away = ~none & ~present
    kept = present & ~pte_write(ptes) if write or unshare else np.zeros_like(none)
    if some(away):  # first: what comes back from a device can be reclaimed for the others
        faults[away] = do_swap_page(vma, addrs[away], at[away], ptes[away], write=write)
    if some(none):
        faults[none] = do_pte_missing(vma, addrs[none], at[none], write=write)
    if some(kept):
        faults[kept] = do_wp_page(vma, addrs[kept], at[kept], unshare=unshare)
    held = present & ~kept
    if some(held):
        ptep_set_access_flags(mm, at[held], ptes[held], write=write)
    return faults


def do_pte_missing(vma: Vma, addrs: Addresses, at: Indices, *, write: bool) -> Faults:
    """Faults where nothing is mapped. Linux: do_pte_missing(), mm/memory.c, v6.4."""
    missing = do_anonymous_page if vma.vm_ops is None else do_fault
    return missing(vma, addrs, at, write=write)


def ptep_set_access_flags(mm: MmStruct, at: Indices, ptes: Ptes, *, write: bool) -> None:
    """Note a fault on entries that allow the access already, where they are still *ptes*.

    A device that asks for a range faults on all of it. Linux: arch/x86/mm/pgtable.c, and the end
    of handle_pte_fault(), mm/memory.c.
    """
    entries = mm.mem.tables.entries
    with mm.page_table_lock:
        same = entries[at] == ptes
        entries[at[same]] |= _WRITTEN if write else _PAGE_ACCESSED


def pte_offset_alloc(mm: MmStruct, addrs: Addresses) -> Indices:
    """As pte_offset(), making the page tables that *addrs* (ascending) lack.

    Linux: pte_alloc_map(), include/linux/mm.h.
    """
    at = pte_offset(mm.mem.tables, mm.pgd, addrs)
    if some(at < PTRS_PER_PTE):  # in the table that stands for those that are missing
        with mm.page_table_lock:
            pte_alloc_each(mm.mem.tables, mm.pgd, addrs)
        at = pte_offset(mm.mem.tables, mm.pgd, addrs)
    return at


def do_anonymous_page(
    vma: Vma, addrs: Addresses, at: Indices, *, write: bool, marked: bool = False
) -> Faults:
    """First touch: map the zero page for reads, zeroed frames for writes.

    Where userland brings the pages, it is asked. marked: there are markers, and the pages that
    come are write-protected by userfaultfd. Linux: do_anonymous_page(), mm/memory.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    if vma.vm_flags & VM_UFFD_MISSING:
        return _missing(vma, at, write=write, marked=marked)
    untouched_is = is_pte_marker if marked else pte_none
    if not write:
        zero = mk_pte(pages(mem.zero_pfn), vma.vm_page_prot)[0] | _PAGE_SPECIAL
        if marked:
            zero = pte_mkuffd_wp(zero)
        with mm.page_table_lock:
            untouched = at[untouched_is(mem.tables.entries[at])]
            mem.tables.entries[untouched] = zero
        mem.vmstat.add("zeropage_read_faults", addrs.size)
        return np.zeros(addrs.size, dtype=np.uint16)

    cpu = current_task().cpu
    pfns, faults = _alloc_zeroed_pages(vma, addrs)
    with mm.page_table_lock:
        here = at[: pfns.size]
        empty = untouched_is(mem.tables.entries[here])
        mine = pfns if every(empty) else pfns[empty]
        entries = anon_entries(vma, mine)
        if marked:
            entries = pte_mkuffd_wp(entries)
        _map_new_pages(vma, addrs[: pfns.size][empty], here[empty], mine, entries)
        mm.anon_rss += mine.size
        lru_cache_add_active(mem, mine, cpu)  # before anybody can take them away again
    if mine.size < pfns.size:
        put_page(mem, pfns[~empty], cpu)  # another thread was first
    return faults


def _missing(vma: Vma, at: Indices, *, write: bool, marked: bool) -> Faults:
    """Leave what still has no page at places *at* to userland.

    As in Linux, a store finds that out when all is ready for a page.
    """
    if write:
        anon_vma_prepare(vma)
    with vma.vm_mm.page_table_lock:
        ptes = vma.vm_mm.mem.tables.entries[at]
    untouched = is_pte_marker(ptes) if marked else pte_none(ptes)
    return untouched * np.uint16(handle_userfault(vma, VmFault.UFFD_MISSING))


def _alloc_zeroed_pages(vma: Vma, addrs: Addresses) -> tuple[Pfns, Faults]:
    """Zeroed frames for *addrs*, or the first of them, and what each fault comes to by that.

    Some are better than none: once those are mapped, reclaim may swap them out for the others.
    """
    anon_vma_prepare(vma)
    pfns = alloc_charged_pages(vma, addrs, GFP_HIGHUSER_MOVABLE | Gfp.ZERO)
    faults = np.zeros(addrs.size, dtype=np.uint16)
    faults[pfns.size :] = VmFault.RETRY if pfns.size else VmFault.OOM
    return pfns, faults


def _map_new_pages(vma: Vma, addrs: Addresses, at: Indices, pfns: Pfns, entries: Ptes) -> None:
    """Put *entries* for fresh anonymous *pfns* in place, under the page-table lock."""
    mem = vma.vm_mm.mem
    mem.flags[pfns] |= PG_uptodate
    page_add_new_anon_rmap(vma, pfns, addrs)
    mem.tables.entries[at] = entries


def anon_entries(vma: Vma, pfns: Pfns) -> Ptes:
    """Entries for fresh anonymous *pfns*: writable and dirty where *vma* may be written.

    Device-private pages, which are all of *pfns* or none, get the entries that stand for them.
    """
    mem = vma.vm_mm.mem
    writable = bool(vma.vm_flags & VM_WRITE)
    if pfns.size and mem.is_device_private_page(pfns[:1])[0]:
        return make_device_private_entry(pfns, np.full(pfns.size, writable))
    prot = vma.vm_page_prot
    if writable:
        prot = word(prot | maybe_mkwrite(vma))
    if pfns.size and mem.is_device_public_page(pfns[:1])[0]:
        prot = word(prot | _PAGE_DEVMAP)
    return mk_pte(pfns, prot)


def do_wp_page(vma: Vma, addrs: Addresses, at: Indices, *, unshare: bool = False) -> Faults:
    """A store to read-only entries: use the page, or of a private mapping copy it.

    A page that is the process's own is made writable as it is. The zero page, and one that
    others may reach too, is copied. With *unshare* the entry stays read-only, and only whose page
    it maps changes. What userfaultfd protects is userland's to allow.
    Linux: do_wp_page(), mm/memory.c.
    """
    if vma.vm_flags & VM_SHARED:
        return wp_page_shared(vma, addrs, at)
    mem = vma.vm_mm.mem
    faults = np.zeros(addrs.size, dtype=np.uint16)
    with vma.vm_mm.page_table_lock:
        ptes = mem.tables.entries[at]
        readonly = pte_present(ptes) & ~pte_write(ptes)
        if vma.vm_flags & VM_UFFD_WP and not unshare:
            guarded = readonly & userfaultfd_pte_wp(vma, ptes)
            if userfaultfd_wp_async(vma):
                ptes[guarded] &= _NOT_UFFD_WP
                mem.tables.entries[at[guarded]] = ptes[guarded]
            else:
                faults[guarded] = handle_userfault(vma, VmFault.UFFD_WP)
                readonly &= ~guarded
        sole = readonly & ~pte_special(ptes)
        sole[sole] = _can_reuse(vma, pte_pfn(ptes[sole]))
        if not unshare:
            mem.tables.entries[at[sole]] |= maybe_mkwrite(vma)
    shared = readonly & ~sole
    if some(shared):
        faults[shared] = wp_page_copy(vma, addrs[shared], at[shared], ptes[shared], unshare=unshare)
    return faults


def _can_reuse(vma: Vma, pfns: Pfns) -> Mask:
    """True for those of *pfns* that are the process's own, or have become so by now."""
    mem = vma.vm_mm.mem
    own = has(mem.flags[pfns], PG_anon_exclusive)
    if not every(own):
        shared = places(~own if vma.vm_file is None else ~own & page_anon(mem, pfns))
        own[shared] = reuse_swap_page(mem, pfns[shared])
        reused = pfns[shared[own[shared]]]
        if reused.size:
            page_move_anon_rmap(vma, reused)
    return own


def wp_page_copy(
    vma: Vma, addrs: Addresses, at: Indices, ptes: Ptes, *, unshare: bool = False
) -> Faults:
    """Frames of their own in place of the pages in *ptes*, with the same contents.

    An entry that has changed meanwhile stays as it is. Linux: wp_page_copy(), mm/memory.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    cpu = current_task().cpu
    new, faults = _alloc_zeroed_pages(vma, addrs)
    addrs, at, ptes = addrs[: new.size], at[: new.size], ptes[: new.size]
    old, zero = pte_pfn(ptes), pte_special(ptes)
    if mem.payload is not None and not every(zero):
        mem.payload[new[~zero]] = mem.payload[old[~zero]]
    kept = ptes & _WATCHED if unshare else maybe_mkwrite(vma)
    entries = mk_pte(new, vma.vm_page_prot) | kept

    for near in stretches(addrs, PAGE_SIZE):
        start, end = addrs[near].item(0), addrs[near].item(-1) + PAGE_SIZE
        with (
            mmu_notifier_range(mm, start, end, MmuNotifyEvent.CLEAR, only_end=True),
            mm.page_table_lock,
        ):
            same = mem.tables.entries[at[near]] == ptes[near]
            used = new[near][same]
            if mm.notifier_extras:
                replace_ptes_notify(mm, addrs[near][same], at[near][same], entries[near][same])
            _map_new_pages(vma, addrs[near][same], at[near][same], used, entries[near][same])
            replaced = old[near][same & ~zero[near]]
            mm.anon_rss += used.size
            add_mm_counter(vma, replaced, -1)
            page_remove_rmap(vma, replaced)
            lru_cache_add_active(mem, used, cpu)
        free_pages_and_swap_cache(mem, replaced, cpu)
        put_page(mem, new[near][~same], cpu)
    mem.vmstat.add("cow_faults", new.size)
    return faults


def replace_ptes_notify(mm: MmStruct, addrs: Addresses, at: Indices, ptes: Ptes) -> None:
    """Empty the entries at *addrs*, which are about to become *ptes*, and tell who listens to that.

    Called with the page-table lock held. Linux: ptep_clear_flush_notify() and the first half of
    set_pte_at_notify(), include/linux/mmu_notifier.h.
    """
    mm.mem.tables.entries[at] = 0
    for near in stretches(addrs, PAGE_SIZE):
        mmu_notifier_invalidate_range(mm, addrs[near].item(0), addrs[near].item(-1) + PAGE_SIZE)
    mmu_notifier_change_pte(mm, addrs, ptes)


def do_swap_page(vma: Vma, addrs: Addresses, at: Indices, ptes: Ptes, *, write: bool) -> Faults:
    """Accesses to pages that are not there: read, take, wait, or have the device bring them.

    Linux: do_swap_page(), mm/memory.c.
    """
    mem = vma.vm_mm.mem
    private = is_device_private_entry(ptes)
    if every(private):
        return _device_private_entry_fault(vma, addrs, swp_offset(ptes), write=write)
    faults = np.zeros(addrs.size, dtype=np.uint16)
    moving, lost = is_migration_entry(ptes), is_hwpoison_entry(ptes)
    exclusive = is_device_exclusive_entry(ptes)
    faults[lost] = VmFault.HWPOISON
    if some(private):
        pfns = swp_offset(ptes[private])
        faults[private] = _device_private_entry_fault(vma, addrs[private], pfns, write=write)
    if some(exclusive):
        remove_device_exclusive_entry(vma, addrs[exclusive], ptes[exclusive])
    if some(moving):
        migration_entry_wait(mem, swp_offset(ptes[moving]))
    swapped = is_swap_entry(ptes)
    if some(swapped):
        faults[swapped] = _swap_in(vma, addrs[swapped], at[swapped], ptes[swapped], write=write)
    unknown = ~(moving | private | lost | exclusive | swapped)
    if vma.vm_mm.uffd_wp and some(marked := is_pte_marker(ptes)):
        faults[marked] = _handle_pte_marker(vma, addrs[marked], at[marked], write=write)
        unknown &= ~marked
    if some(unknown):
        raise KernelBug(
            f"bad page table entry {ptes[unknown][0]:#x} at {addrs[unknown][0]:#x} of {vma!r}"
        )
    return faults


def _handle_pte_marker(vma: Vma, addrs: Addresses, at: Indices, *, write: bool) -> Faults:
    """First touch of what userfaultfd protects; one that it has left is an ordinary first touch.

    Linux: pte_marker_handle_uffd_wp(), mm/memory.c, v5.19.
    """
    if userfaultfd_wp(vma):
        return do_anonymous_page(vma, addrs, at, write=write, marked=True)
    entries = vma.vm_mm.mem.tables.entries
    with vma.vm_mm.page_table_lock:
        entries[at[is_pte_marker(entries[at])]] = 0
    return np.zeros(addrs.size, dtype=np.uint16)


def _swap_in(vma: Vma, addrs: Addresses, at: Indices, ptes: Ptes, *, write: bool) -> Faults:
    """Bring pages from swap; a store to one that others have too gets a copy in the same fault."""
    faults = do_swap_in(vma, addrs, at, ptes, write=write)
    if write:
        there = places((faults & ~np.uint16(VmFault.MAJOR)) == 0)
        faults[there] |= do_wp_page(vma, addrs[there], at[there])
    return faults


def _device_private_entry_fault(vma: Vma, addrs: Addresses, pfns: Pfns, *, write: bool) -> Faults:
    """Ask each device to migrate its pages back. Linux: device_private_entry_fault().

    Unlike Linux v4.20, a page that somebody has locked is waited for (7.0 does so): the driver
    could not lock it either, and the CPU would fault on it until the other is done.
    """
    mem = vma.vm_mm.mem
    locked = page_locked(mem, pfns)
    if some(locked):
        migration_entry_wait(mem, pfns[locked])
        return np.zeros(addrs.size, dtype=np.uint16)
    mem.vmstat.add("device_private_faults", addrs.size)
    faults = np.zeros(addrs.size, dtype=np.uint16)
    owners = mem.zone[pfns]
    for near in pieces(owners[1:] != owners[:-1], owners.size):  # in the order of the addresses
        zone = mem.zones[owners.item(near.start)]
        if zone is None or zone.pgmap is None:
            pfn = pfns.item(near.start)
            raise KernelBug(f"device-private entry for PFN {pfn:#x}, which no device has")
        faults[near] = zone.pgmap.page_fault(vma, addrs[near], pfns[near], write=write)
    return faults
