"""fork(): a second process with the same memory, copied only as the two come to differ.

    VMAs       each is copied, but for what VM_DONTCOPY keeps back; nobody's is VM_LOCKED
    anon_vma   the copy is listed wherever its parent is, so that the rmap finds both, and has an
               anon_vma of its own for the pages that only it will have
    entries    both get the same ones, which neither may store through

A page that both map is nobody's own any more: the first store by either takes a copy, or the page
as it is when the other has let go of it. What is pinned is copied at once, as whoever has it
pinned means the parent's page. Memory without an anon_vma has nothing that a fault would not
bring: nothing at all, or pages of a file.
Linux: dup_mmap(), kernel/fork.c; copy_page_range(), mm/memory.c.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.anon_vma import anon_vma_fork
from mm.device_exclusive import remove_device_exclusive_entry
from mm.errors import OutOfMemory
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.memcontrol import mem_cgroup_oom_synchronize
from mm.mempolicy import alloc_charged_pages
from mm.migrate import migration_entry_wait
from mm.mmap import exit_mmap, vm_stat_account
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.overcommit import vm_enough_memory
from mm.page_flags import PG_anon_exclusive, PG_uptodate
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_RW,
    _PAGE_UFFD_WP,
    mk_pte,
    pte_alloc_each,
    pte_mkuffd_wp,
    pte_offset,
    pte_pfn,
    pte_present,
    pte_special,
    pte_uffd_wp,
)
from mm.rmap import add_mm_counter, page_add_new_anon_rmap, page_dup_rmap
from mm.sched import current_task
from mm.swap import get_page, lru_cache_add_active, page_maybe_dma_pinned, put_page
from mm.swap_slots import swap_duplicate
from mm.swapops import (
    SWP_EXCLUSIVE,
    SWP_UFFD_WP,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_pte_marker,
    is_swap_entry,
    make_readable,
    swp_offset,
)
from mm.types import (
    VM_ACCOUNT,
    VM_DONTCOPY,
    VM_LOCKED_MASK,
    VM_WIPEONFORK,
    MmStruct,
    Vma,
    maybe_mkwrite,
    vma_pages,
)
from mm.typing import Addresses, Indices, Mask, Ptes, word
from mm.userfaultfd_k import (
    dup_userfaultfd,
    dup_userfaultfd_fail,
    userfaultfd_complete,
    userfaultfd_wp,
)
from mm.vectors import has, places, some
from mm.vma import insert_vma, vma_inherit

_NOT_EXCLUSIVE: Final = word(~PG_anon_exclusive)
_NOT_ACCESSED: Final = word(~_PAGE_ACCESSED)
_NOT_WRITABLE: Final = word(~_PAGE_RW)
_SHARED_SLOT: Final = word(~SWP_EXCLUSIVE)
_NOT_UFFD_WP: Final = word(~_PAGE_UFFD_WP)
_NOT_SWP_UFFD_WP: Final = word(~SWP_UFFD_WP)


def dup_mmap(mm: MmStruct, oldmm: MmStruct) -> None:
    """Let *mm*, which is empty, have what *oldmm* has. Takes both mmap_sems.

    Raises OutOfMemory, and Deadlock where this thread is just at work for *oldmm*; then *mm* is
    gone, and *oldmm* has what it had. Linux: dup_mmap(), kernel/fork.c.
    """
    with mm.mmap_sem.write():
        try:
            with oldmm.mmap_sem.write():
                mm.memcg = oldmm.memcg
                for vma in oldmm.vmas:
                    if not vma.vm_flags & VM_DONTCOPY:
                        _dup_vma(mm, vma)
        except BaseException:
            dup_userfaultfd_fail(mm, oldmm)
            exit_mmap(mm)
            raise
    if oldmm.uffd_events:
        userfaultfd_complete(oldmm)


def _dup_vma(mm: MmStruct, vma: Vma) -> None:
    """Linux: the loop of dup_mmap(); vm_area_dup(), kernel/fork.c."""
    if vma.vm_flags & VM_ACCOUNT:
        vm_enough_memory(mm.mem, vma_pages(vma), "fork")
    copy = Vma(mm, vma.vm_start, vma.vm_end, vma.vm_flags & ~VM_LOCKED_MASK, vma.vm_pgoff)
    vma_inherit(copy, vma)
    dup_userfaultfd(copy, vma)
    insert_vma(copy, vma)
    vm_stat_account(mm, copy.vm_flags, vma_pages(copy))
    if not vma.vm_flags & VM_WIPEONFORK:
        anon_vma_fork(copy, vma)
        copy_page_range(copy, vma)


def copy_page_range(dst: Vma, src: Vma) -> None:
    """Let *dst*, a copy of *src*, map the same pages, and neither store to what both have.

    Unlike Linux v4.20, pages that are pinned are copied (v5.9), and a device gives back those that
    it has for itself (v5.14). Raises OutOfMemory, with some of it done.
    Linux: copy_page_range(), mm/memory.c.
    """
    if src.anon_vma is None and not userfaultfd_wp(dst):
        return
    mm, start, end = src.vm_mm, src.vm_start, src.vm_end
    with mmu_notifier_range(mm, start, end, MmuNotifyEvent.PROTECTION_PAGE):
        for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
            copy_pte_range(dst, src, run)


def copy_pte_range(dst: Vma, src: Vma, run: Run) -> None:
    """Copy the entries of *run*, of *src*, to *dst*. Raises OutOfMemory.

    mmap_sem keeps faults away, so that no entry comes; reclaim and migrations may change those
    that are there. Linux: copy_pte_range(), mm/memory.c.
    """
    used = places(run.ptes)
    if not used.size:
        return
    mem, mm, addrs = src.vm_mm.mem, dst.vm_mm, run.addrs[used]
    with mm.page_table_lock:
        pte_alloc_each(mem.tables, mm.pgd, addrs)
    at = pte_offset(mem.tables, mm.pgd, addrs)
    while True:
        with src.vm_mm.page_table_lock, mm.page_table_lock:
            ptes = run.ptes[used]
            taken, busy = is_device_exclusive_entry(ptes), _pinned_in_motion(src, ptes)
            if not some(taken | busy):
                run.ptes[used], pinned = _copy_ptes(dst, src, at, ptes)
                break
        if some(taken):
            remove_device_exclusive_entry(src, addrs[taken], ptes[taken])
        if some(busy):
            migration_entry_wait(mem, swp_offset(ptes[busy]))
    if pinned.size:
        _copy_pinned(dst, addrs[pinned], at[pinned], ptes[pinned])


def _pinned_in_motion(src: Vma, ptes: Ptes) -> Mask:
    """True where a page is pinned that somebody tries to move, and will put back."""
    moving = is_migration_entry(ptes)
    moving[moving] = page_maybe_dma_pinned(src.vm_mm.mem, swp_offset(ptes[moving]))
    return moving


def _copy_ptes(dst: Vma, src: Vma, at: Indices, ptes: Ptes) -> tuple[Ptes, Indices]:
    """Put copies of the entries *ptes* at places *at*; what *ptes* become, and which stay as is.

    Those are of pages that are pinned; they get another reference here, and no copy yet. Called
    with both page-table locks held. As the recorded kernel has it, a device-private entry loses its
    soft-dirty bit with the right to store. A child without the userfaultfd of *src* has none of its
    bits.
    Linux: copy_one_pte(), mm/memory.c; copy_present_pte(), copy_nonpresent_pte() since v5.9.
    """
    mem = dst.vm_mm.mem
    present, private = pte_present(ptes), is_device_private_entry(ptes)
    swapped, moving = is_swap_entry(ptes), is_migration_entry(ptes)
    mapped = present & ~pte_special(ptes)
    pfns = np.where(mapped, pte_pfn(ptes), np.where(private, swp_offset(ptes), 0))
    pinned = mapped & has(mem.flags[pfns], PG_anon_exclusive) & page_maybe_dma_pinned(mem, pfns)

    mapped = (mapped | private) & ~pinned
    get_page(mem, pfns[mapped | pinned])
    page_dup_rmap(dst, pfns[mapped])
    with mem.locks.atomic:
        mem.flags[pfns[mapped]] &= _NOT_EXCLUSIVE
    swap_duplicate(mem.swap, swp_offset(ptes[swapped]))
    dst.vm_mm.swapents += int(np.count_nonzero(swapped))
    add_mm_counter(dst, np.where(moving, swp_offset(ptes), pfns)[mapped | moving], 1)

    shared = np.where(present, ptes & _NOT_WRITABLE, make_readable(ptes) & _SHARED_SLOT)
    copied = np.where(present, shared & _NOT_ACCESSED, shared)
    if src.vm_mm.uffd_wp and not userfaultfd_wp(dst):
        copied &= np.where(present, _NOT_UFFD_WP, _NOT_SWP_UFFD_WP)
        copied[is_pte_marker(ptes)] = 0
    copied[pinned], shared[pinned] = 0, ptes[pinned]
    mem.tables.entries[at] = copied
    return shared, places(pinned)


def _copy_pinned(dst: Vma, addrs: Addresses, at: Indices, ptes: Ptes) -> None:
    """Give *dst* copies of the pages of *ptes* at *addrs*, and drop a reference to each of those.

    Raises OutOfMemory. Linux: copy_present_page(), mm/memory.c, v5.9.
    """
    mm, mem, cpu = dst.vm_mm, dst.vm_mm.mem, current_task().cpu
    pfns = pte_pfn(ptes)
    try:
        new = alloc_charged_pages(dst, addrs, GFP_HIGHUSER_MOVABLE)
        if new.size < pfns.size:
            put_page(mem, new, cpu)
            mem_cgroup_oom_synchronize()
            payer = "" if mm.memcg is None else f" for {mm.memcg}"
            raise OutOfMemory(
                f"fork: {pfns.size} pages of {mm.name} are copied as they are pinned, and "
                f"{new.size} frames are free{payer}; unpin or unmap something"
            )
        if mem.payload is not None:
            mem.payload[new] = mem.payload[pfns]
        with mm.page_table_lock:
            mem.flags[new] |= PG_uptodate
            page_add_new_anon_rmap(dst, new, addrs)
            entries = mk_pte(new, dst.vm_page_prot) | maybe_mkwrite(dst)
            if userfaultfd_wp(dst):
                entries = np.where(pte_uffd_wp(ptes), pte_mkuffd_wp(entries), entries)
            mem.tables.entries[at] = entries
            mm.anon_rss += new.size
            lru_cache_add_active(mem, new, cpu)
    finally:
        put_page(mem, pfns, cpu)
