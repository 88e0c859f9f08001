"""Address spaces: mapping and unmapping. Linux: mm/mmap.c."""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from typing import Final

from mm.cred import can_do_mlock, mlock_future_check
from mm.errors import (
    AccessDenied,
    BadFile,
    InvalidArgument,
    InvalidRange,
    NoDevice,
    OutOfMemory,
    Overflow,
)
from mm.fs import FMODE_READ, FMODE_WRITE, MAX_LFS_FILESIZE, File
from mm.mmu_notifier import (
    ULONG_MAX,
    MmuNotifyEvent,
    call_each,
    mmu_notifier_range,
    mmu_notifier_release,
)
from mm.overcommit import accountable_mapping, check_map_count, vm_enough_memory
from mm.pagewalk import free_pgtables
from mm.shmem import shmem_zero_setup
from mm.trace import TracePoint
from mm.types import (
    VM_ACCOUNT,
    VM_LOCKED,
    VM_MAYWRITE,
    VM_NORESERVE,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
    MmStruct,
    Vma,
    vma_pages,
    vma_set_page_prot,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, pages
from mm.userfaultfd_k import userfaultfd_exit, userfaultfd_unmap_prep
from mm.vma import VmaMerge, insert_vma, remove_vma, split_vma, vma_merge
from mm.zap import zap_pte_range

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


def do_mmap(
    mm: MmStruct,
    addr: int | None,
    length: int,
    vm_flags: int,
    file: File | None = None,
    offset: int = 0,
) -> int:
    """Map *length* bytes of *file* from *offset* on, or of memory without a name; the address.

    With *addr* the area goes there and replaces what was there (MAP_FIXED); without, it goes
    to the highest gap below MMAP_BASE. Stores to a VM_SHARED mapping are seen by all who share
    it, those to another by the process alone. The caller holds mmap_sem for write, and populates
    the area where that is wanted. Raises InvalidArgument, InvalidRange, OutOfMemory; AccessDenied
    where *file* is not open for that; PermissionDenied or TryAgain where it is VM_LOCKED and the
    task may not lock so much. Linux: do_mmap() and mmap_region(), mm/mmap.c.
    """
    if length <= 0:
        raise InvalidArgument(f"mmap: length must be positive, got {length}")
    length = page_align(length)
    if file is not None:
        vm_flags = _check_file(file, offset, length, vm_flags)
    check_map_count(mm, "mmap", -1)
    fixed = addr is not None
    if addr is None:
        addr = get_unmapped_area(mm, length)
    else:
        check_fixed("mmap", addr, length)
    if vm_flags & VM_LOCKED:
        can_do_mlock("mmap")
        mlock_future_check(mm, length >> PAGE_SHIFT, "mmap")
    if accountable_mapping(vm_flags):
        vm_enough_memory(mm.mem, length >> PAGE_SHIFT, "mmap")
        vm_flags |= VM_ACCOUNT
    elif file is None and vm_flags & (VM_SHARED | VM_NORESERVE) == VM_SHARED:  # shmem_acct_size()
        vm_enough_memory(mm.mem, length >> PAGE_SHIFT, "mmap")
    if fixed:
        do_munmap(mm, addr, length)
    end, pgoff = addr + length, addr >> PAGE_SHIFT
    if file is not None:
        pgoff = offset >> PAGE_SHIFT
    vma = None
    if file is not None or not vm_flags & VM_SHARED:
        vma = vma_merge(VmaMerge(mm, addr, end, pgoff, vm_flags, file))
    if vma is None:
        vma = Vma(mm, addr, end, vm_flags, pgoff)
        _map_file(vma, file)
    vma.vm_flags |= VM_SOFTDIRTY
    vma_set_page_prot(vma)
    vm_stat_account(mm, vm_flags, length >> PAGE_SHIFT)
    if mm_mmap:
        mm_mmap(process=mm.name, start=addr, end=end)
    return addr


def _check_file(file: File, offset: int, length: int, vm_flags: int) -> int:
    """Raise where *file* cannot be mapped so; *vm_flags* with what it forbids taken out."""
    if offset % PAGE_SIZE or offset < 0:
        raise InvalidArgument(f"mmap: offset {offset:#x} is not a multiple of {PAGE_SIZE:#x}")
    if offset + length > MAX_LFS_FILESIZE + 1:
        raise Overflow(f"mmap: no file has bytes up to {offset + length:#x}")
    if file.closed:
        raise BadFile(f"mmap: {file!r} is closed")
    if file.f_op.mmap is None:
        raise NoDevice(f"mmap: {file!r} is of a kind that cannot be mapped")
    if not file.f_mode & FMODE_READ:
        raise AccessDenied(f"mmap: {file!r} is not open for reading")
    if vm_flags & VM_SHARED and not file.f_mode & FMODE_WRITE:
        if vm_flags & VM_WRITE:
            raise AccessDenied(f"mmap: {file!r} is not open for writing")
        vm_flags &= ~(VM_MAYWRITE | VM_SHARED)
    return vm_flags


def _map_file(vma: Vma, file: File | None) -> None:
    """Enter *vma*, with *file* behind it, or one of its own if it is shared without a name.

    Linux: call_mmap() and shmem_zero_setup() in mmap_region(), mm/mmap.c.
    """
    zeros = None
    if file is None and vma.vm_flags & VM_SHARED:
        vma.vm_pgoff = 0
        file = zeros = shmem_zero_setup(vma)
    if file is not None:
        assert file.f_op.mmap is not None
        vma.vm_file = file
        file.f_op.mmap(file, vma)
    insert_vma(vma)
    if zeros is not None:
        zeros.close()  # the VMA has it


def vm_stat_account(mm: MmStruct, vm_flags: int, npages: int) -> None:
    """Count *npages* more, or fewer, that VMAs with *vm_flags* span.

    Linux: vm_stat_account(), mm/mmap.c, and what its callers do about locked_vm.
    """
    mm.total_vm += npages
    if vm_flags & VM_LOCKED:
        mm.locked_vm += npages


def check_fixed(call: str, addr: int, length: int) -> None:
    """Raise InvalidArgument or InvalidRange where *call* can map nothing at *addr*.

    Linux: get_unmapped_area() with MAP_FIXED, mm/mmap.c.
    """
    if addr % PAGE_SIZE:
        raise InvalidArgument(f"{call}: addr {addr:#x} is not a multiple of {PAGE_SIZE:#x}")
    if addr < MMAP_MIN_ADDR or addr + length > TASK_SIZE_MAX:
        raise InvalidRange(
            f"{call}: [{addr:#x}, {addr + length:#x}) is not inside "
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

    The caller holds mmap_sem for write, and calls userfaultfd_complete() when it has let go of it.
    Raises InvalidArgument, InvalidRange; OutOfMemory, with nothing unmapped, where it would cut a
    hole into a VMA and there are too many. Linux: do_munmap(), mm/mmap.c.
    """
    if start % PAGE_SIZE:
        raise InvalidArgument(f"munmap: addr {start:#x} is not a multiple of {PAGE_SIZE:#x}")
    if length <= 0:
        raise InvalidArgument(f"munmap: length must be positive, got {length}")
    end = start + page_align(length)
    if start < 0 or end > TASK_SIZE_MAX:
        raise InvalidRange(f"munmap: [{start:#x}, {end:#x}) is not below {TASK_SIZE_MAX:#x}")
    vmas = vmas_in(mm, start, end)
    if len(vmas) == 1 and vmas[0].vm_start < start and end < vmas[0].vm_end:
        check_map_count(mm, "munmap")
    if mm.userfaultfds:
        userfaultfd_unmap_prep(vmas, start, end)
    for vma in vmas:
        inner = split_vma(vma, start) if vma.vm_start < start else vma
        if inner.vm_end > end:
            split_vma(inner, end)
        _remove_vma(mm, inner)
    if mm_munmap:
        mm_munmap(process=mm.name, start=start, end=end)


def _remove_vma(mm: MmStruct, vma: Vma) -> None:
    """Linux: unmap_region(), mm/mmap.c."""
    with mmu_notifier_range(mm, vma.vm_start, vma.vm_end, MmuNotifyEvent.UNMAP):
        _unmap_vma(mm, vma)


def _unmap_vma(mm: MmStruct, vma: Vma) -> None:
    """Linux: unmap_vmas(), mm/memory.c, and remove_vma(), mm/mmap.c."""
    zap_pte_range(vma, vma.vm_start, vma.vm_end)
    remove_vma(vma)
    vm_stat_account(mm, vma.vm_flags, -vma_pages(vma))
    with mm.page_table_lock:
        free_pgtables(mm.mem.tables, mm.pgd, vma.vm_start, vma.vm_end)


def exit_mmap(mm: MmStruct) -> None:
    """Take a whole address space down. The caller holds mmap_sem for write.

    Whoever comes too late finds the empty table where the top of this one was. A listener that
    raises keeps nothing alive; what it raised is raised at the end.
    Linux: exit_mmap(), mm/mmap.c.
    """
    mm.exited = True
    userfaultfd_exit(mm)
    everything = mmu_notifier_range(mm, 0, ULONG_MAX, MmuNotifyEvent.UNMAP)
    call_each(
        (
            partial(mmu_notifier_release, mm),
            everything.__enter__,
            partial(_unmap_all, mm),
            everything.__exit__,
        )
    )


def _unmap_all(mm: MmStruct) -> None:
    for vma in tuple(mm.vmas):
        _unmap_vma(mm, vma)
    with mm.page_table_lock:
        pgd, mm.pgd = mm.pgd, 0
        mm.mem.tables.release(pages(pgd))
    mm.mem.mms.remove(mm)
