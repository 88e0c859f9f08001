"""mprotect(): other rights for a range of memory. Linux: mm/mprotect.c."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

import numpy as np

from mm.errors import AccessDenied, InvalidArgument, NotMapped
from mm.gup import mm_populate
from mm.mmap import find_vma, page_align
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.overcommit import vm_enough_memory
from mm.page_flags import PG_anon_exclusive
from mm.pagewalk import walk_page_range
from mm.pgtable import (
    _PAGE_PRESENT,
    _PAGE_RW,
    _PAGE_UFFD_WP,
    pte_alloc,
    pte_mkuffd_wp,
    pte_modify,
    pte_none,
    pte_pfn,
    pte_present,
    pte_soft_dirty,
    pte_special,
)
from mm.swapops import SWP_UFFD_WP, is_pte_marker, make_pte_marker, make_readable
from mm.types import (
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_LOCKED,
    VM_NORESERVE,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_UFFD_WP,
    VM_WRITE,
    MmStruct,
    Vma,
    vma_is_anonymous,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Mask, Ptes, word
from mm.userfaultfd_k import userfaultfd_pte_wp, userfaultfd_wp_use_markers
from mm.vectors import has, places, some
from mm.vma import vma_modify_flags

MM_CP_UFFD_WP: Final = 1 << 2  # userfaultfd wants to know of stores; since v5.7
MM_CP_UFFD_WP_RESOLVE: Final = 1 << 3  # and no longer

_NOT_UFFD_WP: Final = word(~_PAGE_UFFD_WP)
_NOT_SWP_UFFD_WP: Final = word(~SWP_UFFD_WP)
_MAYS: Final = 4  # VM_MAYREAD is VM_READ << 4, and so on


def do_mprotect(mm: MmStruct, start: int, length: int, prot: int) -> None:
    """Let [*start*, *start* + *length*) have the rights *prot*, of VM_READ, VM_WRITE, VM_EXEC.

    What is VM_LOCKED and becomes writable is faulted in writable. Takes mmap_sem for write.
    Raises InvalidArgument; NotMapped, AccessDenied or OutOfMemory, after the part before the hole,
    or before the VMA that may not have those rights, has got them. Linux: do_mprotect_pkey().
    """
    if start % PAGE_SIZE:
        raise InvalidArgument(f"mprotect: addr {start:#x} is not a multiple of {PAGE_SIZE:#x}")
    end = start + page_align(length)
    locked: list[tuple[int, int]] = []
    try:
        with mm.mmap_sem.write():
            addr = start
            while addr < end:
                vma = find_vma(mm, addr)
                if vma is None or vma.vm_start > addr:
                    raise NotMapped(f"mprotect: nothing is mapped at {addr:#x}")
                addr = mprotect_fixup(vma, addr, min(vma.vm_end, end), prot, locked).vm_end
    finally:
        for first, last in locked:
            mm_populate(mm, first, last - first)


def mprotect_fixup(vma: Vma, start: int, end: int, prot: int, locked: list[tuple[int, int]]) -> Vma:
    """Let [*start*, *end*) of *vma* have the rights *prot*; the VMA that it is in then.

    What has to be faulted in is added to *locked*: a fault wants mmap_sem for read, and Linux
    serves it under the caller's. Linux: mprotect_fixup(), mm/mprotect.c.
    """
    old_flags = vma.vm_flags
    vm_flags = old_flags & ~VM_ACCESS_FLAGS | prot
    if vm_flags & ~(vm_flags >> _MAYS) & VM_ACCESS_FLAGS:
        raise AccessDenied(f"mprotect: {vma!r} may not have the rights that are asked for")
    if vm_flags == old_flags:
        return vma
    if vm_flags & VM_WRITE:
        if not old_flags & (VM_ACCOUNT | VM_WRITE | VM_SHARED | VM_NORESERVE):
            vm_enough_memory(vma.vm_mm.mem, (end - start) >> PAGE_SHIFT, "mprotect")
            vm_flags |= VM_ACCOUNT
    elif vma_is_anonymous(vma) and vma.anon_vma is None:
        # Unlike Linux v4.20, memory that was never written to is not accounted for any more (6.7).
        vm_flags &= ~VM_ACCOUNT

    vma = vma_modify_flags(vma, start, end, vm_flags)
    change_protection(vma, start, end)
    if old_flags & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED and vm_flags & VM_WRITE:
        locked.append((start, end))
    return vma


def change_protection(vma: Vma, start: int, end: int, cp_flags: int = 0) -> None:
    """Rewrite the entries of [*start*, *end*) as the rights of *vma* are now.

    With MM_CP_UFFD_WP they become write-protected by userfaultfd, with MM_CP_UFFD_WP_RESOLVE they
    are so no longer. Raises OutOfMemory where markers need a page table, with nothing changed.
    Linux: change_protection(), mm/mprotect.c.
    """
    mm = vma.vm_mm
    if cp_flags & MM_CP_UFFD_WP and userfaultfd_wp_use_markers(vma):
        with mm.page_table_lock:
            pte_alloc(mm.mem.tables, mm.pgd, start, end)
    runs = list(walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False))
    with (
        mmu_notifier_range(mm, start, end, MmuNotifyEvent.PROTECTION_VMA) if runs else nullcontext()
    ):
        for run in runs:
            with mm.page_table_lock:
                _change_pte_range(vma, run.ptes, cp_flags)


def _change_pte_range(vma: Vma, ptes: Ptes, cp_flags: int) -> None:
    """Linux: change_pte_range(), mm/mprotect.c."""
    protect, resolve = cp_flags & MM_CP_UFFD_WP, cp_flags & MM_CP_UFFD_WP_RESOLVE
    present, none = pte_present(ptes), pte_none(ptes)
    if some(present):
        changed = pte_modify(ptes[present], vma.vm_page_prot)
        if protect:
            changed = pte_mkuffd_wp(changed)
        elif resolve:
            changed &= _NOT_UFFD_WP
        if vma.vm_flags & VM_WRITE and not protect:
            changed |= can_change_pte_writable(vma, changed) * _PAGE_RW
        ptes[present] = changed
    away = ~present & ~none
    if some(away):
        changed = make_readable(ptes[away])
        if protect:
            changed |= SWP_UFFD_WP
        elif resolve:
            changed[is_pte_marker(changed)] = 0
            changed &= _NOT_SWP_UFFD_WP
        ptes[away] = changed
    if protect and userfaultfd_wp_use_markers(vma):
        untouched = places(none)
        ptes[untouched] = make_pte_marker(untouched.size)


def can_change_pte_writable(vma: Vma, ptes: Ptes) -> Mask:
    """True where a store to the entry, of a private VMA that may be written, needs no fault.

    That is so for a page that nobody shares, unless the store must be seen: for its soft-dirty bit,
    or by userfaultfd.
    Unlike Linux v4.20, which leaves it to a fault for each page (5.19 does not).
    Linux: can_change_pte_writable(), mm/mprotect.c, v6.0.
    """
    normal = has(ptes, _PAGE_PRESENT) & ~pte_special(ptes)
    flags = vma.vm_mm.mem.flags[np.where(normal, pte_pfn(ptes), 0)]
    ours = normal & has(flags, PG_anon_exclusive)
    if vma.vm_flags & VM_UFFD_WP:
        ours &= ~userfaultfd_pte_wp(vma, ptes)
    return ours if vma.vm_flags & VM_SOFTDIRTY else ours & pte_soft_dirty(ptes)
