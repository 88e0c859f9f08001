"""What a CPU does with an address: translate, fault where it must, touch the bytes.

The entries are looked up and the bytes moved under the page-table lock, as one instruction sees
one translation: nobody can take the page away in between. Linux: arch/x86/mm/fault.c,
include/asm/uaccess.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from mm.errors import (
    BusError,
    KernelBug,
    MmError,
    OutOfMemory,
    PageHeld,
    SegmentationFault,
)
from mm.highmem import byte_places, memcpy_from_pages, memcpy_to_pages
from mm.locking import cond_resched
from mm.memcontrol import mem_cgroup_oom_synchronize
from mm.memory import handle_mm_fault
from mm.memremap import FREE_REFCOUNT
from mm.mmap import find_vma
from mm.page_alloc import nr_free_pages
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_PRESENT,
    _PAGE_RW,
    pte_offset,
    pte_pfn,
)
from mm.swapops import is_device_private_entry, swp_offset
from mm.types import (
    VM_EXEC,
    VM_FAULT_ERROR,
    VM_READ,
    VM_WRITE,
    MmStruct,
    Vma,
    VmFault,
    payload_of,
)
from mm.typing import PAGE_SIZE, Addresses, Payload, Pfns, pages, word
from mm.userfaultfd_k import Userfault, userfault
from mm.vectors import every, places, some

# Told of pages that are there and may not leave: (place of the first in the vector, PFNs).
Use: TypeAlias = Callable[[int, Pfns], None]

BLOCK: Final = (
    1 << 16
)  # pages that one pass faults in and touches; memset() is at its best on 256 MiB
_STORE: Final = word(_PAGE_PRESENT | _PAGE_RW)  # what a store needs of an entry, and leaves in it
_STORED: Final = word(_PAGE_ACCESSED | _PAGE_DIRTY)  # by hardware; faults mark soft-dirty
MAX_RETRIES: Final = 1000  # faults that changed nothing, in a row, before we call it a lockup


def access_pages(mm: MmStruct, addrs: Addresses, use: Use, *, write: bool) -> None:
    """Let *use* have the pages at *addrs* (ascending page addresses), faulting them in.

    *use* is called for stretches of *addrs* in order, with accessed and dirty bits set, and runs
    under the page-table lock. Where an address cannot be reached, those before it are used, then
    SegmentationFault, BusError, OutOfMemory or PageHeld is raised; or userland is asked, and
    TimedOut raised if it does not answer.
    """
    done, block, step, retries = 0, BLOCK, BLOCK, 0
    limit, failure = addrs.size, None
    while done < limit or failure is not None:
        if failure is not None and done == limit:
            if not isinstance(failure, Userfault):
                raise failure
            failure.wait()
            limit, failure = addrs.size, None
            block = step = 1  # more page by page, unless userland has brought more
        near = addrs[done : min(done + block, limit)]
        used, missing = _use_ready(mm, near, done, use, write=write)
        done += used
        if used:
            if step < BLOCK:
                step *= 2
            block, retries = step, 0
        if missing.size:
            failed_at, error = _fault_in(mm, missing, write=write)
            if error is not None:
                limit, failure = int(np.searchsorted(addrs, failed_at)), error
            if not used:
                # Under memory pressure faulting in the end of a block can evict its beginning.
                block, retries = max(1, block // 2), retries + 1
                if retries > 1:
                    cond_resched()
            if retries > MAX_RETRIES:
                raise served_in_vain(mm, missing.item(0), "page fault")


def _use_ready(
    mm: MmStruct, addrs: Addresses, place: int, use: Use, *, write: bool
) -> tuple[int, Addresses]:
    """Use the leading pages that need no fault; how many, and which of the others do."""
    need, mark = (_STORE, _STORED) if write else (_PAGE_PRESENT, _PAGE_ACCESSED)
    pool = mm.mem.tables
    with mm.page_table_lock:
        at = pte_offset(pool, mm.pgd, addrs)
        ptes = pool.entries[at]
        ready = (ptes & need) == need
        if every(ready):
            pool.entries[at] = ptes | mark
            use(place, pte_pfn(ptes))
            return addrs.size, addrs[:0]
        used = int(ready.argmin())
        if used:
            pool.entries[at[:used]] = ptes[:used] | mark
            use(place, pte_pfn(ptes[:used]))
    return used, addrs[~ready]


def _fault_in(
    mm: MmStruct, addrs: Addresses, *, write: bool
) -> tuple[int, MmError | Userfault | None]:
    """Serve faults at *addrs* until one fails; that address and the error, or 0 and None."""
    done = 0
    with mm.mmap_sem.read():
        while done < addrs.size:
            addr = addrs.item(done)
            vma = find_vma(mm, addr)
            if vma is None or vma.vm_start > addr or access_error(vma, write=write):
                return addr, bad_area(mm, vma, addr, write=write)
            inside = addrs.item(-1) < vma.vm_end
            here = addrs[done : None if inside else int(addrs.searchsorted(vma.vm_end))]
            faults = handle_mm_fault(vma, here, write=write)
            if some(faults):
                failed = places(faults & VM_FAULT_ERROR)
                if failed.size:
                    addr, fault = here.item(failed[0]), VmFault(faults.item(failed[0]))
                    asked = userfault(vma, addr, fault, write=write)
                    return addr, asked or mm_fault_error(mm, addr, fault)
            done += here.size
    return 0, None


def access_error(vma: Vma, *, write: bool) -> bool:
    """True where *vma* forbids the access. Linux: access_error(), arch/x86/mm/fault.c."""
    if write:
        return not vma.vm_flags & VM_WRITE
    return not vma.vm_flags & (VM_READ | VM_EXEC | VM_WRITE)


def bad_area(mm: MmStruct, vma: Vma | None, addr: int, *, write: bool) -> SegmentationFault:
    """What an access gets that *vma*, the first to end above *addr*, does not allow.

    Linux: bad_area(), bad_area_access_error(), arch/x86/mm/fault.c.
    """
    what = "write to" if write else "read of"
    if vma is None or vma.vm_start > addr:
        return SegmentationFault(addr, f"{mm.name}: {what} {addr:#x}, where nothing is mapped")
    return SegmentationFault(addr, f"{mm.name}: {what} {addr:#x} is not allowed by {vma!r}")


def mm_fault_error(mm: MmStruct, addr: int, fault: VmFault) -> MmError:
    """What an access gets whose *fault* could not be served.

    Linux: mm_fault_error(), arch/x86/mm/fault.c.
    """
    if fault & VmFault.OOM:
        memcg = mem_cgroup_oom_synchronize()
        if memcg is not None:
            return OutOfMemory(
                f"{mm.name}: no room for the page at {addr:#x} in control group {memcg.name}, "
                f"which uses {memcg.used}, and nothing of that can be reclaimed; unmap something, "
                f"raise its limit, or boot with a larger swap="
            )
        return OutOfMemory(
            f"{mm.name}: no frame for the page at {addr:#x}, {nr_free_pages(mm.mem)} pages are "
            f"free and kept in reserve; unmap something or boot with larger nodes="
        )
    if fault & VmFault.SIGSEGV:
        return SegmentationFault(addr, f"{mm.name}: the fault handler refused {addr:#x}")
    if fault & VmFault.HWPOISON:
        return BusError(addr, f"{mm.name}: the contents of the page at {addr:#x} are lost")
    vma = find_vma(mm, addr)
    if vma is not None and vma.vm_userfaultfd_ctx is not None:
        what = f"{addr:#x} is userland's to serve, and nobody waits for it"
    else:
        what = (
            f"the contents of the page at {addr:#x} cannot be had: they are lost, or beyond the "
            f"end of the file"
        )
    return BusError(addr, f"{mm.name}: {what}")


def served_in_vain(mm: MmStruct, addr: int, what: str) -> PageHeld | KernelBug:
    """Why *what* at *addr* of *mm* was served over and over and changed nothing.

    A device page that somebody holds cannot come back: then it is PageHeld.
    """
    pte = mm.mem.tables.entries[pte_offset(mm.mem.tables, mm.pgd, pages(addr))]
    if is_device_private_entry(pte)[0]:
        pfn = swp_offset(pte).item()
        held = mm.mem.refcount.item(pfn) - mm.mem.mapcount.item(pfn) - FREE_REFCOUNT
        if held > 0:
            return PageHeld(
                f"{mm.name}: {what} at {addr:#x}: device page {pfn:#x} cannot leave, as somebody "
                f"holds {held} references to it; drop those first"
            )
    return KernelBug(f"{mm.name}: {what} at {addr:#x} is served in vain")


def page_range(addr: int, nbytes: int) -> Addresses:
    """Addresses of the pages that [*addr*, *addr* + *nbytes*) touches."""
    return np.arange(addr & ~(PAGE_SIZE - 1), addr + nbytes if nbytes else 0, PAGE_SIZE)


def copy_from_user(mm: MmStruct, addr: int, out: Payload) -> None:
    """Load uint8[n] *out* from [*addr*, *addr* + n). Linux: copy_from_user(), asm/uaccess.h."""
    payload = payload_of(mm.mem)
    first = addr & ~(PAGE_SIZE - 1)

    def load(place: int, pfns: Pfns) -> None:
        begin = max(first + place * PAGE_SIZE, addr)
        end = first + (place + pfns.size) * PAGE_SIZE
        memcpy_from_pages(out[begin - addr : end - addr], payload, pfns, begin % PAGE_SIZE)

    access_pages(mm, page_range(addr, out.size), load, write=False)


def copy_to_user(mm: MmStruct, addr: int, data: Payload) -> None:
    """Store uint8[n] *data* at *addr*. Linux: copy_to_user(), asm/uaccess.h."""
    payload = payload_of(mm.mem)
    first = addr & ~(PAGE_SIZE - 1)

    def store(place: int, pfns: Pfns) -> None:
        begin = max(first + place * PAGE_SIZE, addr)
        end = first + (place + pfns.size) * PAGE_SIZE
        memcpy_to_pages(payload, pfns, begin % PAGE_SIZE, data[begin - addr : end - addr])

    access_pages(mm, page_range(addr, data.size), store, write=True)


def gather_from_user(mm: MmStruct, addrs: Addresses) -> Payload:
    """The byte at each of *addrs*, int64[n] in any order; uint8[n]."""
    flat = payload_of(mm.mem).reshape(-1)
    out = np.empty(addrs.size, dtype=np.uint8)
    frames, page_of = np.unique(addrs & ~(PAGE_SIZE - 1), return_inverse=True)

    def load(place: int, pfns: Pfns) -> None:
        here = places((page_of >= place) & (page_of < place + pfns.size))
        out[here] = flat[byte_places(pfns, addrs[here], page_of[here] - place)]

    access_pages(mm, frames, load, write=False)
    return out


def scatter_to_user(mm: MmStruct, addrs: Addresses, data: Payload) -> None:
    """Store data[i] at addrs[i]; of an address that repeats, the last one stays."""
    flat = payload_of(mm.mem).reshape(-1)
    frames, page_of = np.unique(addrs & ~(PAGE_SIZE - 1), return_inverse=True)

    def store(place: int, pfns: Pfns) -> None:
        here = places((page_of >= place) & (page_of < place + pfns.size))
        flat[byte_places(pfns, addrs[here], page_of[here] - place)] = data[here]

    access_pages(mm, frames, store, write=True)


def touch_pages(mm: MmStruct, addr: int, nbytes: int, *, write: bool) -> None:
    """Access every page of [*addr*, *addr* + *nbytes*) and leave the bytes as they are.

    Works without contents too. Linux: fault_in_pages_writeable(), include/linux/pagemap.h.
    """
    access_pages(mm, page_range(addr, nbytes), lambda place, pfns: None, write=write)
