"""References to the pages behind an address range, for those who bypass page tables.

Linux: mm/gup.c.
"""

from __future__ import annotations

import numpy as np

from mm.errors import BusError, HwPoison, InvalidArgument, MmError, NotMapped
from mm.mmap import find_vma
from mm.swap import put_page
from mm.types import (
    VM_IO,
    VM_LOCKONFAULT,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    MemMap,
    MmStruct,
    Vma,
)
from mm.typing import Pfns
from mm.uaccess import access_pages, page_range, touch_pages
from mm.vectors import add_at


class Pin:
    """References to pages that keep them where they are, until release(); `with` releases.

    A machine lists its pins, so that verify() can account for every reference.
    """

    def __init__(self, mem: MemMap) -> None:
        self.mem = mem
        self.pfns: Pfns = np.empty(0, dtype=np.int64)
        mem.pins.append(self)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Drop the references; a second call does nothing. Linux: release_pages(), mm/swap.c."""
        if self in self.mem.pins:
            self.mem.pins.remove(self)
            put_page(self.mem, self.pfns)


def pin_user_pages(mm: MmStruct, addr: int, nbytes: int, *, write: bool = True) -> Pin:
    """Fault in the pages of [*addr*, *addr* + *nbytes*) and hold a reference to each.

    A page in device memory comes back first; the zero page is not counted.
    Raises SegmentationFault, BusError, OutOfMemory, and then holds nothing.
    Linux: get_user_pages(), mm/gup.c.
    """
    pin = Pin(mm.mem)

    def hold(place: int, pfns: Pfns) -> None:
        pfns = pfns[pfns != mm.mem.zero_pfn]
        with mm.mem.locks.atomic:
            add_at(mm.mem.refcount, pfns, 1)
        pin.pfns = np.concatenate((pin.pfns, pfns))

    try:
        access_pages(mm, page_range(addr, nbytes), hold, write=write)
    except BaseException:
        pin.release()
        raise
    return pin


def populate_vma_page_range(vma: Vma, start: int, end: int) -> None:
    """Fault in [*start*, *end*) of *vma*, pages in device memory too; none if VM_LOCKONFAULT.

    Private memory that may be written is faulted in as for a store, so that none of it is shared
    afterwards. The caller holds mmap_sem for read. Raises SegmentationFault where the VMA allows
    no access at all, BusError, OutOfMemory. Linux: populate_vma_page_range(), mm/gup.c.
    """
    if not vma.vm_flags & VM_LOCKONFAULT:
        write = vma.vm_flags & (VM_WRITE | VM_SHARED) == VM_WRITE
        touch_pages(vma.vm_mm, start, end - start, write=write)


def mm_populate(mm: MmStruct, start: int, length: int, *, ignore_errors: bool = True) -> None:
    """Fault in what is mapped of [*start*, *start* + *length*). Takes mmap_sem for read.

    Where *ignore_errors*, a VMA that cannot be faulted in is passed over; else raises what
    populate_vma_page_range() does. Linux: __mm_populate(), mm/gup.c.
    """
    addr, end = start, start + length
    while addr < end:
        with mm.mmap_sem.read():
            vma = find_vma(mm, addr)
            if vma is None or vma.vm_start >= end:
                return
            addr, first = min(vma.vm_end, end), max(vma.vm_start, addr)
            if vma.vm_flags & (VM_IO | VM_PFNMAP):
                continue
            try:
                populate_vma_page_range(vma, first, addr)
            except MmError:
                if not ignore_errors:
                    raise


def faultin_page_range(mm: MmStruct, start: int, end: int, *, write: bool) -> None:
    """Fault in [*start*, *end*) as loads or stores of the process would. Takes mmap_sem for read.

    What comes before a place where that fails is faulted in. Raises NotMapped at a hole,
    InvalidArgument where the VMA forbids it, HwPoison, OutOfMemory.
    Linux: faultin_page_range(), mm/gup.c, v6.10.
    """
    need, addr = VM_WRITE if write else VM_READ, start
    while addr < end:
        with mm.mmap_sem.read():
            vma = find_vma(mm, addr)
            if vma is None or vma.vm_start > addr:
                raise NotMapped(f"{mm.name}: nothing is mapped at {addr:#x}")
            if vma.vm_flags & (VM_IO | VM_PFNMAP) or not vma.vm_flags & need:
                what = "write to" if write else "read of"
                raise InvalidArgument(f"{mm.name}: {what} {addr:#x} is not allowed by {vma!r}")
            stop = min(vma.vm_end, end)
            try:
                touch_pages(mm, addr, stop - addr, write=write)
            except BusError as error:
                raise HwPoison(f"populate: {error.strerror}") from error
            addr = stop
