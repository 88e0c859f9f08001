"""mremap(): memory gets another address, or another size. Linux: mm/mremap.c.

The pages stay where they are; their page-table entries move, whatever they stand for: frames,
pages in device memory or in swap, pages on their way. A page still finds them by the rmap, as the
new VMA has the page offsets of the old one.
"""

from __future__ import annotations

from contextlib import nullcontext
from enum import IntFlag
from typing import Final

import numpy as np

from mm.anon_vma import anon_vma_clone, unlink_anon_vmas
from mm.cred import mlock_future_check
from mm.errors import InvalidArgument, OutOfMemory, SegmentationFault
from mm.gup import mm_populate
from mm.mmap import (
    TASK_SIZE_MAX,
    check_fixed,
    do_munmap,
    find_vma,
    get_unmapped_area,
    page_align,
    vm_stat_account,
    vmas_in,
)
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.overcommit import check_map_count, vm_enough_memory
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import (
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    PMD_SHIFT,
    PMD_SIZE,
    PTRS_PER_PTE,
    PUD_SIZE,
    pmd_alloc,
    pmd_offset,
    pte_alloc_each,
    pte_offset,
    pte_present,
)
from mm.swapops import SWP_SOFT_DIRTY, SWP_UFFD_WP, is_pte_marker
from mm.types import (
    VM_ACCOUNT,
    VM_DONTEXPAND,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_MAYSHARE,
    VM_PFNMAP,
    VM_UFFD_FLAGS,
    MmStruct,
    Vma,
    vma_is_anonymous,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Ptes, word
from mm.userfaultfd_k import (
    mremap_userfaultfd_prep,
    userfaultfd_complete,
    vma_has_uffd_without_event_remap,
)
from mm.vectors import places
from mm.vma import VmaMerge, insert_vma, vma_inherit, vma_merge, vma_modify_flags, vmg_of

_NOT_UFFD_WP: Final = word(~_PAGE_UFFD_WP)
_NOT_SWP_UFFD_WP: Final = word(~SWP_UFFD_WP)


class Mremap(IntFlag):
    """How memory may move. Linux: MREMAP_*, include/uapi/linux/mman.h."""

    MAYMOVE = 1  # to another address, where it cannot grow
    FIXED = 2  # to the address given, in place of what is there
    DONTUNMAP = 4  # and the old address stays mapped, empty; since v5.7


def do_mremap(
    mm: MmStruct, addr: int, old_len: int, new_len: int, flags: Mremap, new_addr: int | None = None
) -> int:
    """Let the memory at [*addr*, *addr* + *old_len*) have *new_len* bytes; where it is then.

    *new_addr*: with FIXED, where it goes; with DONTUNMAP alone, where it should go if that is
    free. Takes mmap_sem for write; faults in what is new of VM_LOCKED memory.
    Raises InvalidArgument, InvalidRange; SegmentationFault where *addr* is not mapped, or by more
    than one VMA; OutOfMemory where it cannot grow and may not move; TryAgain where VM_LOCKED
    memory would grow past what the task may lock.
    Linux: mremap() and do_mremap(), mm/mremap.c.
    """
    _check_arguments(addr, old_len, new_len, flags)
    old_len, new_len = page_align(old_len), page_align(new_len)
    try:
        with mm.mmap_sem.write():
            vma = _vma_lookup(mm, addr)
            vm_flags = vma.vm_flags
            to = _resize(mm, addr, old_len, new_len, flags, new_addr)
    finally:
        if mm.uffd_events:
            userfaultfd_complete(mm)
    if vm_flags & VM_LOCKED and new_len > old_len:
        mm_populate(mm, to + old_len, new_len - old_len)
    return to


def _resize(
    mm: MmStruct, addr: int, old_len: int, new_len: int, flags: Mremap, new_addr: int | None
) -> int:
    if flags & (Mremap.FIXED | Mremap.DONTUNMAP):
        return _mremap_to(mm, addr, old_len, new_len, flags, new_addr)
    if old_len < new_len:
        return _grow(mm, addr, old_len, new_len, flags)
    if old_len > new_len:
        do_munmap(mm, addr + new_len, old_len - new_len)
    return addr


def _check_arguments(addr: int, old_len: int, new_len: int, flags: Mremap) -> None:
    if addr % PAGE_SIZE:
        raise InvalidArgument(f"mremap: addr {addr:#x} is not a multiple of {PAGE_SIZE:#x}")
    if flags & (Mremap.FIXED | Mremap.DONTUNMAP) and not flags & Mremap.MAYMOVE:
        raise InvalidArgument("mremap: fixed and dontunmap are ways to move; add maymove")
    if flags & Mremap.DONTUNMAP and old_len != new_len:
        raise InvalidArgument(
            f"mremap: dontunmap keeps the size; got {old_len:#x} and {new_len:#x} bytes"
        )
    if new_len <= 0:
        raise InvalidArgument(f"mremap: the new length must be positive, got {new_len}")


def _vma_lookup(mm: MmStruct, addr: int) -> Vma:
    """Linux: vma_lookup(), include/linux/mm.h, v5.14."""
    vma = find_vma(mm, addr)
    if vma is None or vma.vm_start > addr:
        raise SegmentationFault(addr, f"mremap: nothing is mapped at {addr:#x}")
    return vma


def _mremap_to(
    mm: MmStruct, addr: int, old_len: int, new_len: int, flags: Mremap, new_addr: int | None
) -> int:
    """Linux: mremap_to(), mm/mremap.c."""
    if new_addr is not None:
        _check_target(addr, old_len, new_len, new_addr)
        if flags & Mremap.FIXED:
            do_munmap(mm, new_addr, new_len)
    elif flags & Mremap.FIXED:
        raise InvalidArgument("mremap: fixed needs new_addr=")
    if old_len > new_len:
        do_munmap(mm, addr + new_len, old_len - new_len)
        old_len = new_len
    vma = _vma_to_resize(mm, addr, old_len, new_len, flags)
    if new_addr is None or vmas_in(mm, new_addr, new_addr + new_len):
        new_addr = get_unmapped_area(mm, new_len)
    return move_vma(vma, addr, old_len, new_len, new_addr, flags)


def _check_target(addr: int, old_len: int, new_len: int, new_addr: int) -> None:
    check_fixed("mremap", new_addr, new_len)
    if addr < new_addr + new_len and new_addr < addr + old_len:
        raise InvalidArgument(
            f"mremap: [{addr:#x}, {addr + old_len:#x}) and [{new_addr:#x}, "
            f"{new_addr + new_len:#x}) overlap"
        )


def _vma_to_resize(mm: MmStruct, addr: int, old_len: int, new_len: int, flags: Mremap) -> Vma:
    """The VMA of the range, if it can be moved or grow. Linux: vma_to_resize(), mm/mremap.c."""
    vma = _vma_lookup(mm, addr)
    if not old_len and not vma.vm_flags & VM_MAYSHARE:
        raise InvalidArgument("mremap: the old length must be positive, got 0")
    if flags & Mremap.DONTUNMAP and vma.vm_flags & (VM_DONTEXPAND | VM_PFNMAP):
        raise InvalidArgument(f"mremap: {vma!r} cannot be mapped twice")
    if old_len > vma.vm_end - addr:
        raise SegmentationFault(
            vma.vm_end, f"mremap: [{addr:#x}, {addr + old_len:#x}) is not inside {vma!r}"
        )
    if new_len > old_len and vma.vm_flags & (VM_DONTEXPAND | VM_PFNMAP):
        raise SegmentationFault(addr, f"mremap: {vma!r} cannot grow")
    if vma.vm_flags & VM_LOCKED and new_len > old_len:
        mlock_future_check(mm, (new_len - old_len) >> PAGE_SHIFT, "mremap")
    if vma.vm_flags & VM_ACCOUNT:
        vm_enough_memory(mm.mem, (new_len - old_len) >> PAGE_SHIFT, "mremap")
    return vma


def _grow(mm: MmStruct, addr: int, old_len: int, new_len: int, flags: Mremap) -> int:
    """Grow where it is if there is room, elsewhere if it may; the address."""
    vma = _vma_to_resize(mm, addr, old_len, new_len, flags)
    end = addr + new_len
    room = addr + old_len == vma.vm_end and end <= TASK_SIZE_MAX
    room = room and not vmas_in(mm, vma.vm_end, end)
    if room and vma_merge(vmg_of(vma, vma.vm_end, end)):
        vm_stat_account(mm, vma.vm_flags, (new_len - old_len) >> PAGE_SHIFT)
        return addr
    if not flags & Mremap.MAYMOVE:
        raise OutOfMemory(f"mremap: {vma!r} cannot grow to {new_len:#x} bytes; add maymove")
    return move_vma(vma, addr, old_len, new_len, get_unmapped_area(mm, new_len), flags)


def move_vma(
    vma: Vma, old_addr: int, old_len: int, new_len: int, new_addr: int, flags: Mremap
) -> int:
    """Move [*old_addr*, *old_addr* + *old_len*) of *vma* to *new_addr*, where all is free.

    Raises OutOfMemory where no page table can be had, or there are too many VMAs; then all is
    where it was. Linux: move_vma(), mm/mremap.c.
    """
    mm, vm_flags = vma.vm_mm, vma.vm_flags
    check_map_count(mm, "mremap", 3)  # it may be cut twice, before it is unmapped
    new_vma, vma = copy_vma(vma, old_addr, new_addr, new_len)
    vm_stat_account(mm, vm_flags, new_len >> PAGE_SHIFT)
    try:
        if old_len:
            move_page_tables(vma, old_addr, new_vma, new_addr, old_len)
    except OutOfMemory:
        move_page_tables(new_vma, new_addr, vma, old_addr, old_len)
        do_munmap(mm, new_addr, new_len)
        raise
    if vma_has_uffd_without_event_remap(vma):
        _clear_uffd_wp(new_vma, new_addr, new_addr + old_len)
    else:
        mremap_userfaultfd_prep(new_vma, old_addr, new_addr, old_len)
    if flags & Mremap.DONTUNMAP:
        _keep_mapped(vma, old_addr, old_addr + old_len, new_vma)
    elif old_len:  # else a second mapping of shared memory was wanted
        do_munmap(mm, old_addr, old_len)
    return new_addr


def copy_vma(vma: Vma, old_addr: int, addr: int, length: int) -> tuple[Vma, Vma]:
    """A VMA at *addr* for what *vma* has at *old_addr*, and *vma* itself.

    The first may be a neighbour that goes on there, and even *vma*, if that is next to itself.
    Linux: copy_vma(), mm/mmap.c.
    """
    vmg = vmg_of(vma, old_addr, old_addr)
    vmg.start, vmg.end = addr, addr + length
    if vma_has_uffd_without_event_remap(vma):
        vmg.uffd_ctx, vmg.vm_flags = None, vmg.vm_flags & ~VM_UFFD_FLAGS
    if vma_is_anonymous(vma) and vma.anon_vma is None:
        vmg.pgoff = addr >> PAGE_SHIFT  # no page knows its offset yet: the better it may merge
    merged = vma_merge(vmg)
    if merged is not None:
        return merged, merged if merged.vm_start <= old_addr < merged.vm_end else vma
    return _dup_vma(vma, vmg), vma


def _dup_vma(vma: Vma, vmg: VmaMerge) -> Vma:
    """Linux: vm_area_dup(), kernel/fork.c."""
    new_vma = Vma(vmg.mm, vmg.start, vmg.end, vmg.vm_flags, vmg.pgoff)
    vma_inherit(new_vma, vma)
    new_vma.vm_userfaultfd_ctx = vmg.uffd_ctx
    anon_vma_clone(new_vma, vma)
    insert_vma(new_vma)
    return new_vma


def _clear_uffd_wp(vma: Vma, start: int, end: int) -> None:
    """Forget what a userfaultfd protects that stays behind.

    Linux: move_ptes(), mm/mremap.c, v6.13, which does so entry by entry as they move.
    """
    mm = vma.vm_mm
    if not mm.uffd_wp:
        return
    for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
        with mm.page_table_lock:
            run.ptes[is_pte_marker(run.ptes)] = 0
            run.ptes[:] &= np.where(pte_present(run.ptes), _NOT_UFFD_WP, _NOT_SWP_UFFD_WP)


def _keep_mapped(vma: Vma, start: int, end: int, new_vma: Vma) -> None:
    """[*start*, *end*) of *vma* stays mapped, empty and not VM_LOCKED.

    Unlike Linux v4.20, which cannot do so, and v5.7, which unlocks all of *vma*: the rest of it has
    its locked pages still, and `locked_vm` counts them.
    """
    if vma.vm_flags & VM_LOCKED:
        vma = vma_modify_flags(vma, start, end, vma.vm_flags & ~VM_LOCKED_MASK)
        vma.vm_mm.locked_vm -= (end - start) >> PAGE_SHIFT
    if vma is not new_vma and (vma.vm_start, vma.vm_end) == (start, end):
        unlink_anon_vmas(vma)  # no page of it is mapped here any more


def move_page_tables(vma: Vma, old_addr: int, new_vma: Vma, new_addr: int, length: int) -> None:
    """Move the entries of *length* bytes at *old_addr* of *vma* to *new_addr* of *new_vma*.

    Each becomes soft-dirty, but whole page tables move as they are. The caller holds mmap_sem for
    write. Raises OutOfMemory where a page table is missing, with some entries moved.
    Linux: move_page_tables(), mm/mremap.c.
    """
    mm, end = vma.vm_mm, old_addr + length
    # The rmap would miss an entry that goes from where it looks next to where it has looked.
    locked = vma.anon_vma.rwsem.write() if vma.anon_vma else nullcontext()
    filed = vma.vm_file.f_mapping.i_mmap_rwsem.write() if vma.vm_file else nullcontext()
    with mmu_notifier_range(mm, old_addr, end, MmuNotifyEvent.UNMAP), filed, locked:
        if not (old_addr ^ new_addr) % PMD_SIZE:
            first = (old_addr + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
            with mm.page_table_lock:
                _move_pte_tables(mm, first, end & ~(PMD_SIZE - 1), new_addr - old_addr)
        for run in walk_page_range(mm.mem.tables, mm.pgd, old_addr, end, holes=False):
            with mm.page_table_lock:
                _move_ptes(mm, run, new_addr - old_addr)


def _move_pte_tables(mm: MmStruct, start: int, end: int, offset: int) -> None:
    """Let whole PTE tables of [*start*, *end*) be those of the addresses *offset* away.

    One whose place is taken stays. Linux: move_normal_pmd(), mm/mremap.c, v5.0.
    """
    pool, addr = mm.mem.tables, start
    while addr < end:
        new = addr + offset
        stop = min(end, (addr | (PUD_SIZE - 1)) + 1, (new | (PUD_SIZE - 1)) + 1 - offset)
        pmd = pmd_offset(pool, mm.pgd, addr)
        if pmd:
            old_entries = _pmd_entries(mm, pmd, addr, stop)
            new_entries = _pmd_entries(mm, pmd_alloc(pool, mm.pgd, new), new, stop + offset)
            moves = places((old_entries != 0) & (new_entries == 0))
            new_entries[moves] = old_entries[moves]
            old_entries[moves] = 0
        addr = stop


def _pmd_entries(mm: MmStruct, pmd: int, start: int, end: int) -> Ptes:
    first = pmd * PTRS_PER_PTE + ((start >> PMD_SHIFT) & (PTRS_PER_PTE - 1))
    return mm.mem.tables.entries[first : first + ((end - start) >> PMD_SHIFT)]


def _move_ptes(mm: MmStruct, run: Run, offset: int) -> None:
    """Move the entries of *run* by *offset* bytes. Linux: move_ptes(), mm/mremap.c."""
    used = places(run.ptes)
    if not used.size:
        return
    pool, addrs = mm.mem.tables, run.addrs[used] + offset
    pte_alloc_each(pool, mm.pgd, addrs)
    ptes = run.ptes[used]
    dirty = np.where(pte_present(ptes), _PAGE_SOFT_DIRTY, SWP_SOFT_DIRTY)
    pool.entries[pte_offset(pool, mm.pgd, addrs)] = ptes | dirty
    run.ptes[used] = 0
