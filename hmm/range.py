"""What a device may map: the CPU's page tables of a range, with faults where the device asks.

hmm_range_fault() answers for each page of a range with one word, and takes in the same word what
the device wants of that page. Linux: include/linux/hmm.h and mm/hmm.c, v6.12. Unlike Linux v4.20,
a range may cross VMAs, and names whose device pages are fine where they are; the calls of v4.20
are in hmm/vma_range.py.

        63 62 61 60      56 55                                                       0
       +--+--+--+----------+----------------------------------------------------------+
       | V| W| E|     0    |                           PFN                            |
       +--+--+--+----------+----------------------------------------------------------+

V valid: the CPU may load from the page; asked: fault it in. W: the CPU may store; asked: make it
so. E error: nobody can map what is there. 0 is a page that the CPU has not got: a hole, swapped
out, on its way, or in the private memory of somebody else's device.

The walk answers page after page, up to the first that has to fault. Then every page from there to
the end of that page table faults, whether or not it needs to, and the walk goes on at the page
that did. So a fault also brings back the device's own pages that come after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mm.errors import (
    BusError,
    Busy,
    InvalidArgument,
    InvalidRange,
    MmError,
    PermissionDenied,
    SegmentationFault,
)
from mm.locking import cond_resched, preempt
from mm.memory import handle_mm_fault
from mm.migrate import migration_entry_wait
from mm.mmap import find_vma
from mm.mmu_notifier import MmuIntervalNotifier, mmu_interval_check_retry
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import (
    _PAGE_PRESENT,
    _PAGE_RW,
    PMD_SHIFT,
    PMD_SIZE,
    PTE_PFN_MASK,
    PTRS_PER_PTE,
    UPPER_SHIFTS,
    pte_offset,
    pte_present,
)
from mm.swapops import (
    is_device_private_entry,
    is_hwpoison_entry,
    is_migration_entry,
    is_write_device_private_entry,
    swp_offset,
)
from mm.types import (
    VM_FAULT_ERROR,
    VM_FAULT_USERFAULT,
    VM_IO,
    VM_PFNMAP,
    VM_READ,
    VM_WRITE,
    MmStruct,
    Vma,
    VmFault,
)
from mm.typing import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Addresses,
    Faults,
    Indices,
    Mask,
    Pfns,
    Ptes,
    Word,
    word,
)
from mm.uaccess import served_in_vain
from mm.vectors import distinct, every, has, places, some

HmmPfns: TypeAlias = NDArray[np.uint64]  # a word for each page, as drawn above

HMM_PFN_VALID: Final = word(1 << 63)
HMM_PFN_WRITE: Final = word(1 << 62)
HMM_PFN_ERROR: Final = word(1 << 61)
HMM_PFN_FLAGS: Final = word(0xFF << 56)
HMM_PFN_REQ_FAULT: Final = HMM_PFN_VALID
HMM_PFN_REQ_WRITE: Final = HMM_PFN_WRITE

MAX_ROUNDS: Final = 1000  # of faults that leave a page as it was, before we call it a lockup

_REQUEST: Final = word(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
_NO_FLAGS: Final = word(~HMM_PFN_FLAGS)
_PFN_SHIFT: Final = word(PAGE_SHIFT)
_VALID_SHIFT: Final = word(63)  # from _PAGE_PRESENT
_WRITE_SHIFT: Final = word(61)  # from _PAGE_RW
_ONE: Final = word(1)
_WORD: Final = np.dtype(np.uint64)


def hmm_pfn_to_pfn(words: HmmPfns) -> Pfns:
    """The PFN in each word; only where the word is valid. Linux: hmm_pfn_to_page()."""
    return (words & _NO_FLAGS).view(np.int64)


@dataclass(slots=True, eq=False)
class HmmRange:
    """What to look at, and what for. Linux: struct hmm_range, include/linux/hmm.h.

    notifier, notifier_seq: watches the range; from mmu_interval_read_begin(). start, end: page
    addresses, within its interval. hmm_pfns: uint64[npages], in: what is asked of each page, as
    far as pfn_flags_mask lets it through; out: what is there. default_flags: what is asked of
    every page. dev_private_owner: whose device pages to answer for where they are.
    """

    notifier: MmuIntervalNotifier
    notifier_seq: int
    start: int
    end: int
    hmm_pfns: HmmPfns
    default_flags: int | HmmPfns = 0
    pfn_flags_mask: int | HmmPfns = 0
    dev_private_owner: object = None


def hmm_range_fault(range: HmmRange) -> None:
    """Answer in range.hmm_pfns for every page of *range*, faulting in those that are asked for.

    Called with mmap_sem held. Where it raises, the words of the pages before the one that failed
    are answers, the others are what they were. Raises Busy (EBUSY) where the range was
    invalidated since notifier_seq: begin again; PermissionDenied (EPERM) for a store to a VMA
    that may not be written; SegmentationFault (EFAULT) for a page that no VMA has or that may not
    be read, BusError (EFAULT) for one that cannot be had; InvalidArgument, InvalidRange.
    Linux: hmm_range_fault(), mm/hmm.c.
    """
    _check_arguments(range)
    walk = HmmVmaWalk(range.notifier.mm, range.start, range.end, range.hmm_pfns)
    walk.owner = range.dev_private_owner
    walk.ask(range.default_flags, range.pfn_flags_mask)
    while walk.last < walk.end:
        if mmu_interval_check_retry(range.notifier, range.notifier_seq):
            raise Busy(
                f"hmm_range_fault: [{range.start:#x}, {range.end:#x}) was invalidated meanwhile; "
                f"begin again at mmu_interval_read_begin()"
            )
        hmm_walk(walk)


def _check_arguments(range: HmmRange) -> None:
    start, end, notifier = range.start, range.end, range.notifier
    if start % PAGE_SIZE or end % PAGE_SIZE or start >= end:
        raise InvalidRange(f"hmm_range_fault: [{start:#x}, {end:#x}) is no range of whole pages")
    if not notifier.invalidate_seq:
        raise InvalidArgument("hmm_range_fault: the notifier is not inserted")
    if start < notifier.start or end > notifier.end:
        raise InvalidRange(
            f"hmm_range_fault: [{start:#x}, {end:#x}) is not inside what the notifier watches, "
            f"[{notifier.start:#x}, {notifier.end:#x})"
        )
    check_pfns("hmm_range_fault", range.hmm_pfns, (end - start) >> PAGE_SHIFT)
    if not notifier.mm.mmap_sem.held():
        raise InvalidArgument(f"hmm_range_fault: hold mmap_sem of {notifier.mm.name}")


def check_pfns(call: str, pfns: object, npages: int) -> None:
    """Raise InvalidArgument unless *pfns* is a writable uint64[npages]."""
    fits = isinstance(pfns, np.ndarray) and pfns.dtype == _WORD and pfns.shape == (npages,)
    if not fits or not pfns.flags.writeable:  # type: ignore[attr-defined]
        raise InvalidArgument(f"{call}: pfns must be a writable NumPy array uint64[{npages}]")


@dataclass(slots=True, eq=False)
class HmmVmaWalk:
    """One walk, and how far it has come. Linux: struct hmm_vma_walk, mm/hmm.c.

    pfns: uint64[npages], answers for the pages before `last`, as they came from there on.
    asked: what is asked of each page, REQ_FAULT, that and REQ_WRITE, or 0; None where nothing is
    asked at all. owner: whose device-private pages are fine where they are. poison: the answer
    for a page whose contents are lost.
    """

    poison: ClassVar[Word] = word(0)

    mm: MmStruct
    start: int
    end: int
    pfns: HmmPfns
    asked: HmmPfns | None = None
    owner: object = None
    last: int = field(init=False)
    rounds: int = field(init=False, default=0)  # of faults at `last`

    def __post_init__(self) -> None:
        self.last = self.start

    def ask(self, default_flags: Any, pfn_flags_mask: Any) -> None:
        """Take what `pfns` holds as requests. Linux: hmm_pte_need_fault(), mm/hmm.c."""
        default, mask = word(default_flags), word(pfn_flags_mask)
        if (default | mask) & HMM_PFN_REQ_FAULT:
            asked = ((self.pfns & mask) | default) & _REQUEST
            asked[~has(asked, HMM_PFN_REQ_FAULT)] = 0
            self.asked = asked

    def index(self, addr: int) -> int:
        """Which page of the range *addr* is."""
        return (addr - self.start) >> PAGE_SHIFT

    def asked_in(self, start: int, end: int) -> HmmPfns | None:
        """What is asked of the pages of [*start*, *end*); None where it is nothing."""
        if self.asked is None:
            return None
        asked = self.asked[self.index(start) : self.index(end)]
        return asked if some(asked) else None

    def answer(self, words: Any, end: int) -> None:
        """Write *words* for the pages from `last` to *end*, and be there."""
        if end > self.last:
            self.pfns[self.index(self.last) : self.index(end)] = words
            self.last, self.rounds = end, 0

    def fine(self, where: Indices, pfns: Pfns) -> Mask:
        """True for device-private *pfns*, of the pages *where* of the range, that may stay."""
        mem = self.mm.mem
        ours = np.zeros(len(mem.zones), dtype=np.bool_)
        for index in distinct(mem.zone[pfns]):
            zone = mem.zones[index]
            ours[index] = zone is not None and zone.pgmap.owner is self.owner
        return ours[mem.zone[pfns]]

    def fault(self, vma: Vma, addrs: Addresses, ptes: Ptes, *, write: bool) -> Faults:
        """Serve the faults at *addrs*, whose entries are *ptes*, one after the other."""
        faults = handle_mm_fault(vma, addrs, write=write)
        if vma.vm_file is not None:
            around = places(faults == VmFault.RETRY)  # mapped by the fault of a neighbour
            if around.size:
                faults[around] = handle_mm_fault(vma, addrs[around], write=write)
        return faults

    def wait(self, pfns: Pfns) -> None:
        """Wait for *pfns*, which are on their way."""
        migration_entry_wait(self.mm.mem, pfns)

    def count_round(self) -> None:
        """One more fault where the walk stands; too many in vain raise PageHeld, or a KernelBug."""
        self.rounds += 1
        if self.rounds > MAX_ROUNDS:
            raise served_in_vain(self.mm, self.last, "fault")
        if self.rounds > 1:
            cond_resched()


class _Fault(NamedTuple):
    """Pages from *addr* to *stop* that fault together, for a store or for a load."""

    addr: int
    stop: int
    write: bool


def hmm_walk(walk: HmmVmaWalk) -> None:
    """Answer from `last` to the end of a VMA or hole there; or up to a fault, and serve it.

    Linux: walk_page_range() with hmm_walk_ops, mm/hmm.c.
    """
    preempt("hmm_walk")
    vma = find_vma(walk.mm, walk.last)
    if vma is None or vma.vm_start > walk.last:
        end = walk.end if vma is None else min(walk.end, vma.vm_start)
        _refuse(walk, end, "nothing is mapped there")
    elif vma.vm_flags & (VM_IO | VM_PFNMAP) or not vma.vm_flags & VM_READ:
        _refuse(walk, min(walk.end, vma.vm_end), f"{vma!r} may not be read, or has no pages")
    else:
        _walk_vma(walk, vma, min(walk.end, vma.vm_end))


def _refuse(walk: HmmVmaWalk, end: int, why: str) -> None:
    """Linux: hmm_vma_walk_test() and, without a VMA, hmm_vma_walk_hole(), mm/hmm.c."""
    asked = walk.asked_in(walk.last, end)
    if asked is not None:
        addr = walk.last + (places(asked).item(0) << PAGE_SHIFT)
        raise SegmentationFault(addr, f"{walk.mm.name}: no device reaches {addr:#x}: {why}")
    walk.answer(HMM_PFN_ERROR, end)


def _walk_vma(walk: HmmVmaWalk, vma: Vma, end: int) -> None:
    """Linux: hmm_vma_walk_pmd(), mm/hmm.c."""
    for run in walk_page_range(walk.mm.mem.tables, walk.mm.pgd, walk.last, end):
        walk_run = _walk_table if run.ptes.flags.writeable else _walk_hole
        fault = walk_run(walk, run, end)
        if fault is not None:
            _serve(walk, vma, fault)
            return


def _walk_hole(walk: HmmVmaWalk, run: Run, end: int) -> _Fault | None:
    """Pages without a page table: all that the missing table would cover fault, if one does.

    Linux: hmm_vma_walk_hole(), mm/hmm.c.
    """
    stop = run.addr + (run.ptes.size << PAGE_SHIFT)
    while walk.asked is not None and walk.last < stop:
        shift = _missing_level(walk.mm, walk.last)
        table_end = min(end, ((walk.last >> shift) + 1) << shift)
        asked = walk.asked_in(walk.last, table_end)
        if asked is not None:
            return _Fault(walk.last, table_end, some(has(asked, HMM_PFN_REQ_WRITE)))
        walk.answer(0, min(table_end, stop))
    walk.answer(0, stop)
    return None


def _missing_level(mm: MmStruct, addr: int) -> int:
    """log2 of what the topmost table that *addr* lacks would cover."""
    entries, row = mm.mem.tables.entries, mm.pgd
    for shift in UPPER_SHIFTS:
        entry = entries.item(row * PTRS_PER_PTE + ((addr >> shift) & (PTRS_PER_PTE - 1)))
        if not entry:
            return shift
        row = entry >> PAGE_SHIFT
    return PMD_SHIFT


def _walk_table(walk: HmmVmaWalk, run: Run, end: int) -> _Fault | None:
    """Answer for the entries of *run*, up to the first that has to fault.

    Linux: hmm_vma_handle_pte(), mm/hmm.c.
    """
    with walk.mm.page_table_lock:
        ptes = run.ptes.copy()
    stop = run.addr + (ptes.size << PAGE_SHIFT)
    words = _present_words(ptes)
    own = None
    if not every(present := pte_present(ptes)):
        words[~present] = 0
        own = _device_pages(walk, run.addr, ptes, words)
    asked = walk.asked_in(run.addr, stop)
    if asked is not None:
        lacking = asked & ~words
        if own is not None:
            lacking[own] = 0
        missing = places(lacking)
        if missing.size:
            first = missing.item(0)
            addr = run.addr + (first << PAGE_SHIFT)
            walk.answer(words[:first], addr)
            table_end = min(end, (addr | (PMD_SIZE - 1)) + 1)
            return _Fault(addr, table_end, some(has(lacking[first], HMM_PFN_REQ_WRITE)))
    walk.answer(words, stop)
    return None


def _present_words(ptes: Ptes) -> HmmPfns:
    """The words of present entries; PROT_NONE reads as a PFN that is not valid.

    Linux: pte_to_hmm_pfn_flags(), mm/hmm.c.
    """
    valid = (ptes & _PAGE_PRESENT) << _VALID_SHIFT
    write = (ptes & (ptes << _ONE) & _PAGE_RW) << _WRITE_SHIFT
    return ((ptes & PTE_PFN_MASK) >> _PFN_SHIFT) | valid | write


def _device_pages(walk: HmmVmaWalk, addr: int, ptes: Ptes, words: HmmPfns) -> Indices:
    """Where *ptes*, from *addr* on, hold device pages that may stay.

    Their *words* are filled in, and those of poisoned pages.
    """
    if walk.poison:
        words[is_hwpoison_entry(ptes)] = walk.poison
    at = places(is_device_private_entry(ptes))
    if at.size:
        pfns = swp_offset(ptes[at])
        fine = walk.fine(at + walk.index(addr), pfns)
        at, pfns = at[fine], pfns[fine]
        write = is_write_device_private_entry(ptes[at]) * HMM_PFN_WRITE
        words[at] = pfns.view(np.uint64) | HMM_PFN_VALID | write
    return at


def _serve(walk: HmmVmaWalk, vma: Vma, fault: _Fault) -> None:
    """Fault the pages of *fault* in. Linux: hmm_vma_fault(), mm/hmm.c."""
    mm, pool = walk.mm, walk.mm.mem.tables
    addrs = np.arange(fault.addr, fault.stop, PAGE_SIZE)
    ptes = pool.entries[pte_offset(pool, mm.pgd, addrs)]
    walk.count_round()
    if some(is_migration_entry(ptes[:1])):
        walk.wait(swp_offset(ptes[:1]))
        return
    lost = places(is_hwpoison_entry(ptes))
    if lost.size and not lost[0]:
        raise _fault_error(mm, fault.addr, VmFault.HWPOISON)
    if fault.write and not vma.vm_flags & VM_WRITE:
        raise PermissionDenied(f"{mm.name}: a store at {fault.addr:#x} is not allowed by {vma!r}")
    if lost.size:  # the faults end with the first of them
        addrs, ptes = addrs[: lost.item(0) + 1], ptes[: lost.item(0) + 1]
    faults = walk.fault(vma, addrs, ptes, write=fault.write)
    failed = places(faults & VM_FAULT_ERROR)
    if failed.size:
        raise _fault_error(mm, addrs.item(failed[0]), VmFault(faults.item(failed[0])))


def _fault_error(mm: MmStruct, addr: int, fault: VmFault) -> MmError:
    if fault & VmFault.SIGSEGV:
        return SegmentationFault(addr, f"{mm.name}: the fault handler refused {addr:#x}")
    if fault & VM_FAULT_USERFAULT:
        return BusError(addr, f"{mm.name}: no device waits for userland, which serves {addr:#x}")
    what = "no frame is free for" if fault & VmFault.OOM else "lost are the contents of"
    return BusError(addr, f"{mm.name}: {what} the page at {addr:#x}")
