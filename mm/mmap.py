"""Address spaces: mapping, unmapping, splitting and merging VMAs. Linux: mm/mmap.c."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from mm.errors import InvalidArgument, InvalidRange, OutOfMemory
from mm.memory import zap_page_range
from mm.mempolicy import Mempolicy, mpol_equal
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_release
from mm.pagewalk import free_pgtables
from mm.rmap import anon_vma_clone, unlink_anon_vmas
from mm.trace import TracePoint
from mm.types import VM_SOFTDIRTY, MmStruct, Vma, vma_pages
from mm.typing import PAGE_SHIFT, PAGE_SIZE, pages

TASK_SIZE_MAX: Final = (1 << 56) - PAGE_SIZE  # what five levels reach when asked by address
MMAP_BASE: Final = 0x7FFF_F7FF_F000  # below the stack; areas grow down from here
MMAP_MIN_ADDR: Final = 0x10000

mm_mmap: Final = TracePoint("mm_mmap")
mm_munmap: Final = TracePoint("mm_munmap")


def page_align(nbytes: int) -> int:
    """*nbytes* rounded up to whole pages. Linux: PAGE_ALIGN(), include/linux/mm.h."""
    return (nbytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def find_vma(mm: MmStruct, addr: int) -> Vma | None:
    """The first VMA that ends above *addr*; it need not hold it. Linux: find_vma(), mm/mmap.c."""
    at = bisect_right(mm.vmas, addr, key=_vm_end)
    return mm.vmas[at] if at < len(mm.vmas) else None


def _vm_end(vma: Vma) -> int:
    return vma.vm_end


def do_mmap(mm: MmStruct, addr: int | None, length: int, vm_flags: int) -> int:
    """Map *length* bytes of anonymous private memory; the address.

    With *addr* the area goes there and replaces what was there (MAP_FIXED); without, it goes
    to the highest gap below MMAP_BASE. The caller holds mmap_sem for write.
    Raises InvalidArgument, InvalidRange, OutOfMemory. Linux: do_mmap(), mm/mmap.c.
    """
    if length <= 0:
        raise InvalidArgument(f"mmap: length must be positive, got {length}")
    length = page_align(length)
    if addr is None:
        addr = get_unmapped_area(mm, length)
    else:
        _check_fixed(addr, length)
        do_munmap(mm, addr, length)
    vma = Vma(mm, addr, addr + length, vm_flags | VM_SOFTDIRTY, addr >> PAGE_SHIFT)
    _insert_vma(mm, vma)
    mm.total_vm += vma_pages(vma)
    if mm_mmap:
        mm_mmap(process=mm.name, start=addr, end=addr + length)
    _vma_merge_around(mm, addr)
    return addr


def _check_fixed(addr: int, length: int) -> None:
    if addr % PAGE_SIZE:
        raise InvalidArgument(f"mmap: addr {addr:#x} is not a multiple of {PAGE_SIZE:#x}")
    if addr < MMAP_MIN_ADDR or addr + length > TASK_SIZE_MAX:
        raise InvalidRange(
            f"mmap: [{addr:#x}, {addr + length:#x}) is not inside "
            f"[{MMAP_MIN_ADDR:#x}, {TASK_SIZE_MAX:#x})"
        )


def get_unmapped_area(mm: MmStruct, length: int) -> int:
    """The highest address below MMAP_BASE with *length* free bytes.

    Linux: arch_get_unmapped_area_topdown(), arch/x86/kernel/sys_x86_64.c.
    """
    top = MMAP_BASE
    for vma in reversed(mm.vmas):
        if vma.vm_start >= top:
            continue
        if top - vma.vm_end >= length:
            return top - length
        top = min(top, vma.vm_start)
    if top - length < MMAP_MIN_ADDR:
        raise OutOfMemory(f"mmap: no gap of {length:#x} bytes below {MMAP_BASE:#x}")
    return top - length


def _insert_vma(mm: MmStruct, vma: Vma) -> None:
    mm.vmas.insert(bisect_right(mm.vmas, vma.vm_start, key=_vm_end), vma)


def _can_merge(before: Vma, after: Vma) -> bool:
    """Linux: can_vma_merge_before(), can_vma_merge_after(), mm/mmap.c."""
    anon = before.anon_vma is None or after.anon_vma is None or before.anon_vma is after.anon_vma
    return (
        before.vm_end == after.vm_start
        and not (before.vm_flags ^ after.vm_flags) & ~VM_SOFTDIRTY
        and before.vm_file is after.vm_file
        and after.vm_pgoff == before.vm_pgoff + vma_pages(before)
        and mpol_equal(before.vm_policy, after.vm_policy)
        and anon
        and max(len(before.anon_vma_chain), len(after.anon_vma_chain)) <= 1
    )


def _vma_merge_around(mm: MmStruct, addr: int) -> None:
    """Merge the VMA at *addr* with the neighbours that it continues. Linux: vma_merge()."""
    at = bisect_right(mm.vmas, addr, key=_vm_end)
    for left in (at, at - 1):
        if 0 <= left < len(mm.vmas) - 1 and _can_merge(mm.vmas[left], mm.vmas[left + 1]):
            before, after = mm.vmas[left], mm.vmas.pop(left + 1)
            if before.anon_vma is None:
                anon_vma_clone(before, after)
            before.vm_end = after.vm_end
            before.vm_flags |= after.vm_flags & VM_SOFTDIRTY
            unlink_anon_vmas(after)


def split_vma(mm: MmStruct, vma: Vma, addr: int) -> Vma:
    """Cut *vma* at *addr*; the part from there on is returned. Linux: __split_vma()."""
    rest = Vma(mm, addr, vma.vm_end, vma.vm_flags, vma.vm_pgoff)
    rest.vm_pgoff += (addr - vma.vm_start) >> PAGE_SHIFT
    rest.vm_file = vma.vm_file
    rest.vm_policy = vma.vm_policy
    anon_vma_clone(rest, vma)
    vma.vm_end = addr
    _insert_vma(mm, rest)
    return rest


def vma_modify_policy(vma: Vma, start: int, end: int, policy: Mempolicy | None) -> Vma:
    """Give [*start*, *end*) of *vma* another policy; the VMA that it is in then.

    It is split where it must be, and merged with what it continues. The caller holds mmap_sem for
    write. Linux: vma_modify_policy(), mm/vma.c, v6.12; vma_replace_policy(), mm/mempolicy.c.
    """
    mm = vma.vm_mm
    inner = split_vma(mm, vma, start) if vma.vm_start < start else vma
    if inner.vm_end > end:
        split_vma(mm, inner, end)
    inner.vm_policy = policy
    _vma_merge_around(mm, start)
    return mm.vmas[bisect_right(mm.vmas, start, key=_vm_end)]


def vmas_in(mm: MmStruct, start: int, end: int) -> list[Vma]:
    """The VMAs that touch [*start*, *end*), ascending."""
    at = bisect_right(mm.vmas, start, key=_vm_end)
    found = []
    while at < len(mm.vmas) and mm.vmas[at].vm_start < end:
        found.append(mm.vmas[at])
        at += 1
    return found


def do_munmap(mm: MmStruct, start: int, length: int) -> None:
    """Unmap [*start*, *start* + *length*); parts that nothing maps are skipped.

    The caller holds mmap_sem for write. Raises InvalidArgument, InvalidRange.
    Linux: do_munmap(), mm/mmap.c.
    """
    if start % PAGE_SIZE:
        raise InvalidArgument(f"munmap: addr {start:#x} is not a multiple of {PAGE_SIZE:#x}")
    if length <= 0:
        raise InvalidArgument(f"munmap: length must be positive, got {length}")
    end = start + page_align(length)
    if start < 0 or end > TASK_SIZE_MAX:
        raise InvalidRange(f"munmap: [{start:#x}, {end:#x}) is not below {TASK_SIZE_MAX:#x}")
    for vma in vmas_in(mm, start, end):
        inner = split_vma(mm, vma, start) if vma.vm_start < start else vma
        if inner.vm_end > end:
            split_vma(mm, inner, end)
        _remove_vma(mm, inner)
    if mm_munmap:
        mm_munmap(process=mm.name, start=start, end=end)


def _remove_vma(mm: MmStruct, vma: Vma) -> None:
    """Linux: unmap_region() and remove_vma(), mm/mmap.c."""
    zap_page_range(mm, vma.vm_start, vma.vm_end, MmuNotifyEvent.UNMAP)
    unlink_anon_vmas(vma)
    mm.vmas.remove(vma)
    mm.total_vm -= vma_pages(vma)
    with mm.page_table_lock:
        free_pgtables(mm.mem.tables, mm.pgd, vma.vm_start, vma.vm_end)


def exit_mmap(mm: MmStruct) -> None:
    """Take a whole address space down. The caller holds mmap_sem for write.

    Whoever comes too late finds the empty table where the top of this one was.
    Linux: exit_mmap(), mm/mmap.c.
    """
    mm.exited = True
    mmu_notifier_release(mm)
    for vma in tuple(mm.vmas):
        _remove_vma(mm, vma)
    with mm.page_table_lock:
        pgd, mm.pgd = mm.pgd, 0
        mm.mem.tables.release(pages(pgd))
    mm.mem.mms.remove(mm)
