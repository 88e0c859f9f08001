"""Memory of a device as pages, for a driver that wants no more than that: hmm_devmem of v4.20.

hmm_devmem_add() finds a hole in physical address space for it and gives it PFNs. The driver hears
of its pages in two callbacks, free() and fault(), and moves them with migrate_vma(). All in the
form of v4.20, with vectors in place of single pages; `Driver` (devices/driver.py) is built on
the same parts and does more. Linux: include/linux/hmm.h and mm/hmm.c, v4.20.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mm.device_exclusive import restore_exclusive_pages
from mm.errors import InvalidArgument, OutOfMemory
from mm.filemap import lock_new_page, page_locked, wait_on_page_locked
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.locking import cond_resched
from mm.memparse import Size, memparse
from mm.memremap import devm_memremap_pages, devm_memunmap_pages, pages_in_use
from mm.migrate_device import migrate_device_coherent_page
from mm.mmap import vmas_in
from mm.page_alloc import alloc_pages_bulk
from mm.pgtable import pte_offset
from mm.rmap import rmap_walk
from mm.sched import current_task
from mm.swap import get_page
from mm.swapops import is_device_private_entry, swp_offset
from mm.types import MemMap, MemoryType, MmStruct, Vma, VmFault
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Pfns
from mm.vectors import some

PA_SECTION_SIZE: Final = 128 << 20  # what memory is added in; x86-64
MAX_TRIES: Final = 10  # to bring back what stays, before it counts as held


class Resource(NamedTuple):
    """A stretch of physical addresses. Linux: struct resource, include/linux/ioport.h.

    end: its last byte; desc: what it is.
    """

    start: int
    end: int
    desc: MemoryType


class HmmDevmemOps(Protocol):
    """What a driver does about its memory. Linux: struct hmm_devmem_ops."""

    def free(self, devmem: HmmDevmem, pfns: Pfns) -> None:
        """Nobody refers to *pfns* any more; they are the driver's alone."""

    def fault(
        self, devmem: HmmDevmem, vma: Vma, addrs: Addresses, pfns: Pfns, *, write: bool
    ) -> VmFault:
        """The CPU touched *pfns* at *addrs* (ascending) of *vma*: migrate them to system memory.

        Called with mmap_sem held for read. *pfns* is what the page table said; it may have
        changed. VmFault.SIGBUS means that the device lost them, OOM that no frame was left.
        """


class HmmDevmem:
    """A device's memory. Linux: struct hmm_devmem.

    pfn_first, pfn_last: its first PFN, and the first after it, as v4.20 has it. drvdata:
    uint64[npages], the driver's word for each page.
    """

    def __init__(self, mem: MemMap, ops: HmmDevmemOps, device: object, kind: MemoryType) -> None:
        self.mem = mem
        self.ops = ops
        self.device = device
        self.type = kind
        self.name = str(getattr(device, "name", device))
        self.owner: object = self
        self.removed = False

    def add(self, size: int, start: int | None) -> None:
        """Give it *size* bytes of PFNs, from physical address *start* on if that is given."""
        first = None if start is None else start >> PAGE_SHIFT
        self.zone = devm_memremap_pages(self.mem, self, size >> PAGE_SHIFT, first)
        self.pfn_first, self.pfn_last = self.zone.start_pfn, self.zone.end_pfn
        self.resource = Resource(
            self.pfn_first << PAGE_SHIFT, (self.pfn_last << PAGE_SHIFT) - 1, self.type
        )
        self.drvdata: NDArray[np.uint64] = np.zeros(size >> PAGE_SHIFT, dtype=np.uint64)

    def page_fault(self, vma: Vma, addrs: Addresses, pfns: Pfns, *, write: bool) -> VmFault:
        """Linux: hmm_devmem_fault(), mm/hmm.c."""
        return self.ops.fault(self, vma, addrs, pfns, write=write)

    def page_free(self, pfns: Pfns) -> None:
        """Linux: hmm_devmem_free(), mm/hmm.c."""
        self.ops.free(self, pfns)


def hmm_devmem_add(mem: MemMap, ops: HmmDevmemOps, device: object, size: Size) -> HmmDevmem:
    """Private memory of *device*, *size* bytes or what whole sections of 128 MiB make of it.

    Raises OutOfRange where physical address space has no hole of that size.
    Linux: hmm_devmem_add(), mm/hmm.c.
    """
    nbytes = memparse(size)
    if nbytes <= 0:
        raise InvalidArgument(f"hmm_devmem_add: {size!r} is no size")
    devmem = HmmDevmem(mem, ops, device, MemoryType.DEVICE_PRIVATE)
    devmem.add(_section_align(nbytes), None)
    return devmem


def hmm_devmem_add_resource(
    mem: MemMap, ops: HmmDevmemOps, device: object, resource: Resource
) -> HmmDevmem:
    """Memory of *device* that the CPU reaches at physical addresses *resource*.

    Raises InvalidArgument unless *resource* is MemoryType.DEVICE_PUBLIC and whole pages, Busy
    where something else is there. Linux: hmm_devmem_add_resource(), mm/hmm.c.
    """
    start, end = resource.start, resource.end + 1
    if resource.desc is not MemoryType.DEVICE_PUBLIC:
        raise InvalidArgument(
            f"hmm_devmem_add_resource: {resource.desc!r} is no public memory; hmm_devmem_add() "
            f"adds private memory"
        )
    if start % PAGE_SIZE or end % PAGE_SIZE or not 0 <= start < end:
        raise InvalidArgument(
            f"hmm_devmem_add_resource: [{start:#x}, {end:#x}) is no range of whole pages"
        )
    devmem = HmmDevmem(mem, ops, device, MemoryType.DEVICE_PUBLIC)
    devmem.add(end - start, start)
    return devmem


def _section_align(nbytes: int) -> int:
    return (nbytes + PA_SECTION_SIZE - 1) & ~(PA_SECTION_SIZE - 1)


def hmm_devmem_remove(devmem: HmmDevmem) -> None:
    """Have every page brought back to system memory, and take the PFNs away; a second call does
    nothing.

    Waits for migrations under way. Raises Deadlock inside one, OutOfMemory where system memory
    has no room, and Busy where a page cannot leave; then the memory stays. Unlike Linux v4.20,
    which leaves that to the driver, and waits for it for ever.
    Linux: hmm_devmem_remove(), mm/hmm.c.
    """
    if devmem.removed:
        return
    mem, left, tries = devmem.mem, -1, 0
    while (used := pages_in_use(mem, devmem.zone)).size and tries < MAX_TRIES:
        tries = tries + 1 if used.size == left else 0
        left = used.size
        if tries:
            cond_resched()  # somebody may be about to let go of them
        locked = used[page_locked(mem, used)]
        if locked.size:
            wait_on_page_locked(mem, locked.item(0))
        else:
            _bring_back(devmem, used)
    devm_memunmap_pages(mem, devmem.zone)
    devmem.removed = True


def _bring_back(devmem: HmmDevmem, pfns: Pfns) -> None:
    """Migrate those of *pfns* that are mapped to system memory, whoever maps them.

    Private pages by way of the driver, as if CPUs touched them; public ones without its help.
    """
    mem = devmem.mem
    if devmem.type is MemoryType.DEVICE_PUBLIC:
        restore_exclusive_pages(mem, pfns)
        mapped = pfns[mem.mapcount[pfns] > 0]
        get_page(mem, mapped)
        migrate_device_coherent_page(mem, mapped)
        return
    where: dict[MmStruct, list[Addresses]] = {}
    for vma, _, addrs in rmap_walk(mem, pfns[mem.mapcount[pfns] > 0]):
        where.setdefault(vma.vm_mm, []).append(addrs)
    for mm, found in where.items():
        addrs = np.unique(np.concatenate(found))
        with mm.mmap_sem.read():
            for vma in vmas_in(mm, addrs.item(0), addrs.item(-1) + PAGE_SIZE):
                _bring_back_vma(devmem, vma, addrs)


def _bring_back_vma(devmem: HmmDevmem, vma: Vma, addrs: Addresses) -> None:
    addrs = addrs[(addrs >= vma.vm_start) & (addrs < vma.vm_end)]
    pool = devmem.mem.tables
    ptes = pool.entries[pte_offset(pool, vma.vm_mm.pgd, addrs)]
    here = is_device_private_entry(ptes)
    here[here] = devmem.mem.zone[swp_offset(ptes[here])] == devmem.zone.index
    if some(here):
        addrs, pfns = addrs[here], swp_offset(ptes[here])
        fault = devmem.ops.fault(devmem, vma, addrs, pfns, write=False)
        if fault & VmFault.OOM:
            raise OutOfMemory(
                f"{devmem.name}: no frame is free for the pages that come back; the first is at "
                f"{addrs[0]:#x} of {vma.vm_mm.name}"
            )


def hmm_devmem_page_set_drvdata(devmem: HmmDevmem, pfns: Pfns, data: NDArray[np.uint64]) -> None:
    """Keep a word of the driver's for each of *pfns*. Linux: hmm_devmem_page_set_drvdata()."""
    devmem.drvdata[pfns - devmem.pfn_first] = data


def hmm_devmem_page_get_drvdata(devmem: HmmDevmem, pfns: Pfns) -> NDArray[np.uint64]:
    """That word of each of *pfns*. Linux: hmm_devmem_page_get_drvdata(), include/linux/hmm.h."""
    return devmem.drvdata[pfns - devmem.pfn_first]


def hmm_vma_alloc_locked_page(vma: Vma, addrs: Addresses) -> Pfns:
    """A locked frame for each of *addrs* of *vma*, for a driver's fault(); fewer where memory is
    short. Linux: hmm_vma_alloc_locked_page(), mm/hmm.c."""
    mem, cpu = vma.vm_mm.mem, current_task().cpu
    nid = mem.cpu_to_node[cpu]
    pfns = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, nid, addrs.size, cpu)
    lock_new_page(mem, pfns)
    return pfns
