"""mlock(): memory that stays in memory. Linux: mm/mlock.c.

A range is locked in two steps: its VMAs become VM_LOCKED, and the pages there PG_mlocked
(mm/unevictable.py); then what is missing is faulted in, and is PG_mlocked from the start. Pages in
device memory come back by that. They may be migrated again: being locked keeps a page from
reclaim, not from moving.
"""

from __future__ import annotations

from mm.cred import check_mlock
from mm.errors import BusError, NotMapped, OutOfMemory, SegmentationFault, TryAgain
from mm.gup import mm_populate
from mm.mmap import find_vma, page_align, vmas_in
from mm.pagewalk import walk_page_range
from mm.pgtable import pte_pfn, pte_present, pte_special
from mm.sched import current_task
from mm.swap import lru_add_drain
from mm.types import (
    VM_HUGETLB,
    VM_IO,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_SPECIAL,
    MmStruct,
    Vma,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE
from mm.unevictable import mlock_page, munlock_page
from mm.vma import vma_modify, vmg_of


def do_mlock(mm: MmStruct, start: int, length: int, vm_flags: int) -> None:
    """Lock the pages that [*start*, *start* + *length*) touches in memory.

    *vm_flags*: VM_LOCKED, and VM_LOCKONFAULT to lock pages as they come instead of faulting them
    in now. Takes mmap_sem. Raises NotMapped at a hole, or where the VMA allows no access at all,
    and TryAgain where memory is short; what came before is locked then. PermissionDenied or
    OutOfMemory where the task may not lock so much.     Linux: do_mlock(), mm/mlock.c.
    """
    length = page_align(length + start % PAGE_SIZE)
    start &= ~(PAGE_SIZE - 1)
    with mm.mmap_sem.write():
        check_mlock(mm, (length >> PAGE_SHIFT) - count_mm_mlocked_page_nr(mm, start, length))
        apply_vma_lock_flags(mm, start, length, vm_flags)
    try:
        mm_populate(mm, start, length, ignore_errors=False)
    except (SegmentationFault, BusError) as error:
        raise NotMapped(f"mlock: {error.strerror}") from error
    except OutOfMemory as error:
        raise TryAgain(f"mlock: {error.strerror}") from error


def count_mm_mlocked_page_nr(mm: MmStruct, start: int, length: int) -> int:
    """Pages of a range that are VM_LOCKED already. Linux: count_mm_mlocked_page_nr()."""
    end = start + length
    return sum(
        (min(vma.vm_end, end) - max(vma.vm_start, start)) >> PAGE_SHIFT
        for vma in vmas_in(mm, start, end)
        if vma.vm_flags & VM_LOCKED
    )


def do_munlock(mm: MmStruct, start: int, length: int) -> None:
    """Undo do_mlock() of these pages. Raises NotMapped. Linux: munlock(), mm/mlock.c."""
    length = page_align(length + start % PAGE_SIZE)
    start &= ~(PAGE_SIZE - 1)
    with mm.mmap_sem.write():
        apply_vma_lock_flags(mm, start, length, 0)


def apply_vma_lock_flags(mm: MmStruct, start: int, length: int, vm_flags: int) -> None:
    """Let the VMAs of a range have *vm_flags* of VM_LOCKED_MASK.

    The caller holds mmap_sem for write. Raises NotMapped, when those before the hole have them.
    Linux: apply_vma_lock_flags(), mm/mlock.c.
    """
    addr, end = start, start + length
    while addr < end:
        vma = find_vma(mm, addr)
        if vma is None or vma.vm_start > addr:
            raise NotMapped(f"mlock: nothing is mapped at {addr:#x}")
        new_flags = vma.vm_flags & ~VM_LOCKED_MASK | vm_flags
        addr = mlock_fixup(vma, addr, min(vma.vm_end, end), new_flags).vm_end


def mlock_fixup(vma: Vma, start: int, end: int, vm_flags: int) -> Vma:
    """Let [*start*, *end*) of *vma* have *vm_flags*; the VMA that it is in then.

    Linux: mlock_fixup(), mm/mlock.c.
    """
    old_flags = vma.vm_flags
    if vm_flags == old_flags or old_flags & (VM_SPECIAL | VM_HUGETLB):
        return vma
    vmg = vmg_of(vma, start, end)
    vmg.vm_flags = vm_flags
    vma = vma_modify(vma, vmg)
    change = bool(vm_flags & VM_LOCKED) - bool(old_flags & VM_LOCKED)
    vma.vm_mm.locked_vm += change * ((end - start) >> PAGE_SHIFT)
    if change:
        mlock_vma_pages_range(vma, start, end, vm_flags)
    else:
        vma.vm_flags = vm_flags
    return vma


def mlock_vma_pages_range(vma: Vma, start: int, end: int, vm_flags: int) -> None:
    """Let *vma* have *vm_flags*, and count its present pages in [*start*, *end*) accordingly.

    While they are counted the VMA is VM_IO as well, so that a page which just comes back from
    somewhere is not counted twice. Linux: mlock_vma_pages_range(), mm/mlock.c, v5.18.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    count = mlock_page if vm_flags & VM_LOCKED else munlock_page
    vma.vm_flags = vm_flags | VM_IO if vm_flags & VM_LOCKED else vm_flags
    lru_add_drain(mem, current_task().cpu)
    for run in walk_page_range(mem.tables, mm.pgd, start, end, holes=False):
        with mm.page_table_lock:
            pfns = pte_pfn(run.ptes[pte_present(run.ptes) & ~pte_special(run.ptes)])
            count(mem, pfns[~mem.is_zone_device_page(pfns)])
    vma.vm_flags = vm_flags
