"""Snapshots of page tables for mirrors, in words that the device understands: HMM of v4.20.

To learn what to map of a VMA, a driver with a mirror (hmm/mirror.py)

    hmm_vma_get_pfns(range)        or hmm_vma_fault(range, block), with mmap_sem held
    takes the lock that sync_cpu_device_pagetables() takes
    hmm_vma_range_done(range)      False: lets go of the lock and begins again
    maps what range.pfns says

Linux: include/linux/hmm.h and mm/hmm.c, v4.20. The walk over the page tables is that of
hmm/range.py, which took its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import override

from hmm.mirror import Hmm
from hmm.range import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmPfns,
    HmmVmaWalk,
    check_pfns,
    hmm_pfn_to_pfn,
    hmm_walk,
)
from mm.errors import Busy, InvalidArgument, InvalidRange, PermissionDenied, WouldBlock
from mm.filemap import page_locked
from mm.swapops import is_device_private_entry, is_migration_entry, swp_offset
from mm.types import VM_HUGETLB, VM_READ, VM_SPECIAL, MemMap, Vma, VmFault
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Faults, Indices, Mask, Pfns, Ptes, word
from mm.vectors import every, has, some


class HmmPfnFlags(NamedTuple):
    """The device's bits for a page. Linux: enum hmm_pfn_flag_e."""

    valid: int
    write: int
    device_private: int


class HmmPfnValues(NamedTuple):
    """Words for what is no page; distinct. Linux: enum hmm_pfn_value_e."""

    error: int
    none: int
    special: int


@dataclass(slots=True, eq=False)
class HmmVmaRange:
    """Pages of one VMA, in words that the device understands. Linux: struct hmm_range, v4.20.

    pfns: uint64[npages]. A page is its PFN << pfn_shift and `flags`; what is none is one of
    `values`. In: flags.valid asks for a page to be faulted in, with flags.write for a store, and
    with flags.device_private to be brought back from device memory. Out: what is there.
    stale: pages that were invalidated since a walk last looked at them.
    """

    vma: Vma
    start: int
    end: int
    pfns: HmmPfns
    flags: HmmPfnFlags
    values: HmmPfnValues
    pfn_shift: int
    valid: bool = False
    stale: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.stale = np.zeros(self.pfns.size, dtype=np.bool_)

    def pages(self, start: int, end: int) -> slice:
        """Where the pages of [*start*, *end*) are in the vectors."""
        return slice((start - self.start) >> PAGE_SHIFT, (end - self.start) >> PAGE_SHIFT)

    def forget(self, start: int, end: int) -> None:
        """What was read of [*start*, *end*) is not true any more."""
        if start < end:
            self.valid = False
            self.stale[self.pages(start, end)] = True
            self.pfns[self.pages(start, end)] = 0

    def encode(self, words: HmmPfns, mem: MemMap) -> HmmPfns:
        """*words* of hmm/range.py as the device wants them.

        Linux: hmm_pfn_from_pfn(), include/linux/hmm.h; pte_to_hmm_pfn_flags(), mm/hmm.c.
        """
        flags, values = self.flags, self.values
        nothing = np.where(has(words, HMM_PFN_ERROR), word(values.error), word(values.none))
        valid = has(words, HMM_PFN_VALID)
        if not some(valid):
            return nothing
        pfns = hmm_pfn_to_pfn(words) * valid
        found = (pfns.view(np.uint64) << word(self.pfn_shift)) | word(flags.valid)
        found |= has(words, HMM_PFN_WRITE) * word(flags.write)
        found |= mem.is_device_private_page(pfns) * word(flags.device_private)
        return found if every(valid) else np.where(valid, found, nothing)


def hmm_vma_get_pfns(range: HmmVmaRange) -> None:
    """Answer in range.pfns for every page of *range*, as it is, faulting nothing.

    From then on `range.valid` tells whether that is still true, until hmm_vma_range_done(), to be
    called once. Called with mmap_sem held. Raises InvalidRange, InvalidArgument (where there is
    no mirror; and for VMAs that HMM cannot mirror, with pfns filled with values.special) and
    PermissionDenied (VMA that may not be read; values.none).
    Linux: hmm_vma_get_pfns(), mm/hmm.c.
    """
    _begin("hmm_vma_get_pfns", range)
    _run(_MirrorWalk(range))


def hmm_vma_fault(range: HmmVmaRange, block: bool) -> None:
    """As hmm_vma_get_pfns(), faulting in the pages that range.pfns asks for.

    Where it raises, the page that failed reads values.error, those after it values.none, and
    the range is not tracked. Without *block* it raises WouldBlock (EAGAIN) rather than wait for
    a page. Raises Busy (EBUSY) where a fault has to be tried again, PermissionDenied (EPERM) for
    a store to a VMA that may not be written, BusError (EFAULT) for a page that cannot be had.
    Linux: hmm_vma_fault(), mm/hmm.c.

    Unlike Linux v4.20, *block* is heeded; mmap_sem stays held in any case; a page that another's
    fault has touched is still asked for what it was; and a store copies nothing in a VMA that may
    not be written (EPERM, as in v5.4).
    """
    _begin("hmm_vma_fault", range, block=block)
    walk = _MirrorWalk(range, block=block)
    walk.take_requests()
    _run(walk)


def hmm_vma_range_done(range: HmmVmaRange) -> bool:
    """Stop tracking *range*; True where all that it says is still true.

    Called under the lock that sync_cpu_device_pagetables() takes. False for a range that is not
    tracked. Linux: hmm_vma_range_done(), mm/hmm.c.
    """
    hmm: Hmm | None = range.vma.vm_mm.hmm
    if hmm is None:
        return False
    with hmm.lock:
        if range not in hmm.ranges:
            return False
        hmm.ranges.remove(range)
        return range.valid


def _begin(call: str, range: HmmVmaRange, *, block: bool = True) -> None:
    """Raise unless *range* can be read, and track it."""
    vma, start, end = range.vma, range.start, range.end
    mm = vma.vm_mm
    if start % PAGE_SIZE or end % PAGE_SIZE or not vma.vm_start <= start < end <= vma.vm_end:
        raise InvalidRange(
            f"{call}: [{start:#x}, {end:#x}) is no range of whole pages inside its VMA "
            f"[{vma.vm_start:#x}, {vma.vm_end:#x})"
        )
    check_pfns(call, range.pfns, (end - start) >> PAGE_SHIFT)
    hmm: Hmm | None = mm.hmm
    if hmm is None:
        raise InvalidArgument(f"{call}: nobody mirrors {mm.name}; register a mirror first")
    if not mm.mmap_sem.held():
        raise InvalidArgument(f"{call}: hold mmap_sem of {mm.name}")
    if vma.vm_flags & (VM_SPECIAL | VM_HUGETLB):
        range.pfns[:] = range.values.special
        raise InvalidArgument(f"{call}: {vma!r} is hugetlb or a driver's own (VM_SPECIAL)")
    if not vma.vm_flags & VM_READ:
        range.pfns[:] = range.values.none
        raise PermissionDenied(f"{call}: {vma!r} may not be read")
    if range in hmm.ranges:
        raise InvalidArgument(f"{call}: call hmm_vma_range_done() before the next one")
    hmm.track(range, block=block)


def _run(walk: _MirrorWalk) -> None:
    """Walk to the end. Where that fails, say what is not known, and track the range no more.

    Unlike Linux v4.20, which promises an error for the page that failed and overwrites it.
    """
    tracked = walk.range
    try:
        while walk.last < walk.end:
            tracked.stale[:] = False
            hmm_walk(walk)
    except BaseException as error:
        hmm_vma_range_done(tracked)
        tracked.pfns[tracked.pages(walk.last, walk.end)] = tracked.values.none
        failed = getattr(error, "address", walk.last)
        tracked.pfns[tracked.pages(failed, failed + PAGE_SIZE)] = tracked.values.error
        raise


class _MirrorWalk(HmmVmaWalk):
    """The walk as v4.20 had it: anybody's device pages stay, unless they are recalled.

    recalled: pages that are asked to come back; None where none are.
    """

    poison = HMM_PFN_ERROR

    def __init__(self, range: HmmVmaRange, *, block: bool = True) -> None:
        super().__init__(range.vma.vm_mm, range.start, range.end, range.pfns)
        self.range = range
        self.block = block
        self.recalled: Mask | None = None

    def take_requests(self) -> None:
        """What the device asks of each page. Linux: hmm_pte_need_fault(), mm/hmm.c."""
        flags = self.range.flags
        fault = has(self.pfns, word(flags.valid))
        write = fault & has(self.pfns, word(flags.write))
        self.asked = fault * HMM_PFN_REQ_FAULT | write * HMM_PFN_REQ_WRITE
        self.recalled = fault & has(self.pfns, word(flags.device_private))

    @override
    def answer(self, words: Any, end: int) -> None:
        where = self.range.pages(self.last, end)
        found = np.broadcast_to(np.asarray(words, dtype=np.uint64), where.stop - where.start)
        found = self.range.encode(found, self.mm.mem)
        with self.mm.mem.locks.atomic:
            super().answer(np.where(self.range.stale[where], 0, found), end)

    @override
    def fine(self, where: Indices, pfns: Pfns) -> Mask:
        return (
            np.ones_like(where, dtype=np.bool_) if self.recalled is None else ~self.recalled[where]
        )

    @override
    def fault(self, vma: Vma, addrs: Addresses, ptes: Ptes, *, write: bool) -> Faults:
        if not self.block:
            self._check_ready(addrs, ptes)
        faults = super().fault(vma, addrs, ptes, write=write)
        if some(faults & VmFault.RETRY):
            raise Busy(f"hmm_vma_fault: a fault at {addrs[0]:#x} or after it has to be tried again")
        return faults

    @override
    def wait(self, pfns: Pfns) -> None:
        if not self.block:
            raise WouldBlock(f"hmm_vma_fault: the page at {self.last:#x} is on its way")
        super().wait(pfns)

    def _check_ready(self, addrs: Addresses, ptes: Ptes) -> None:
        """Raise WouldBlock where a fault would wait for a page."""
        busy = is_migration_entry(ptes)
        private = is_device_private_entry(ptes)
        busy[private] = page_locked(self.mm.mem, swp_offset(ptes[private]))
        if some(busy):
            raise WouldBlock(f"hmm_vma_fault: the page at {addrs[busy][0]:#x} is on its way")
