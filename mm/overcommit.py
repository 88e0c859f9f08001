"""How much address space a process may ask for: more than there is memory, but not any amount.

Memory is promised, not given: only a single call that wants more than the machine could ever hold
is refused. Linux: mm/util.c, overcommit_memory of 0; max_map_count, mm/mmap.c.
"""

from __future__ import annotations

from mm.errors import OutOfMemory
from mm.memparse import format_size
from mm.types import VM_NORESERVE, VM_SHARED, VM_WRITE, MemMap, MmStruct
from mm.typing import PAGE_SHIFT


def accountable_mapping(vm_flags: int) -> bool:
    """True where a mapping with *vm_flags* may come to need memory of its own.

    Linux: accountable_mapping(), mm/mmap.c.
    """
    return vm_flags & (VM_NORESERVE | VM_SHARED | VM_WRITE) == VM_WRITE


def vm_enough_memory(mem: MemMap, npages: int, call: str) -> None:
    """Raise OutOfMemory where *call* wants *npages*, and the machine has not so many at all.

    Unlike Linux v4.20, which looks at what is free just now, all of memory and swap counts (v5.3).
    Linux: __vm_enough_memory(), mm/util.c.
    """
    if npages > mem.max_pfn + mem.swap.pages:
        raise OutOfMemory(
            f"{call}: {format_size(npages << PAGE_SHIFT)} are more than the machine can hold, "
            f"{format_size(mem.max_pfn << PAGE_SHIFT)} of memory and "
            f"{format_size(mem.swap.pages << PAGE_SHIFT)} of swap; ask for less, or for memory "
            f"that is not accounted for (noreserve)"
        )


def check_map_count(mm: MmStruct, call: str, spare: int = 0) -> None:
    """Raise OutOfMemory where *call* may make no further VMA, or none of the next *spare* either.

    Linux: sysctl_max_map_count, mm/mmap.c.
    """
    if len(mm.vmas) >= mm.mem.max_map_count - spare:
        raise OutOfMemory(
            f"{call}: {mm.name} has {len(mm.vmas)} VMAs, and may have {mm.mem.max_map_count}; "
            f"unmap something, or map what has the same rights side by side"
        )
