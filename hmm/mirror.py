"""Mirrors of an address space, and snapshots of its page tables for them: the HMM of v4.20.

A driver registers one HmmMirror for each address space that it mirrors, and hears there what to
forget. To learn what to map it asks for a range:

    hmm_vma_get_pfns(range)        or hmm_vma_fault(range, block), with mmap_sem held
    take the lock that sync_cpu_device_pagetables() takes
    hmm_vma_range_done(range)      False: let go of the lock and begin again
    map what range.pfns says

Linux: include/linux/hmm.h and mm/hmm.c, v4.20. The walk over the page tables is that of
hmm/range.py, which took its place.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from typing_extensions import override

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
from mm.errors import (
    Busy,
    Deadlock,
    DriverBug,
    InvalidArgument,
    InvalidRange,
    PermissionDenied,
    WouldBlock,
)
from mm.filemap import page_locked
from mm.locking import RwSemaphore, current
from mm.memory import Faults
from mm.mmu_notifier import (
    MmuNotifierRange,
    call_each,
    mmu_notifier_register,
    mmu_notifier_unregister,
)
from mm.swapops import is_device_private_entry, is_migration_entry, swp_offset
from mm.types import VM_HUGETLB, VM_READ, VM_SPECIAL, MemMap, MmStruct, Vma, VmFault
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Indices, Mask, Pfns, Ptes, word
from mm.vectors import every, has, some

HMM_UPDATE_INVALIDATE: Final = 0


class HmmUpdate(NamedTuple):
    """What a mirror has to forget. Linux: struct hmm_update.

    blockable: the mirror may wait.
    """

    start: int
    end: int
    event: int = HMM_UPDATE_INVALIDATE
    blockable: bool = True


class HmmMirrorOps(Protocol):
    """What a driver does about its mirrors. Linux: struct hmm_mirror_ops."""

    def sync_cpu_device_pagetables(self, mirror: HmmMirror, update: HmmUpdate) -> int:
        """Forget the range, under the driver's lock; 0.

        -EAGAIN, with nothing forgotten, where that would mean to wait and the update is not
        *blockable*. May not register or unregister mirrors.
        """

    def release(self, mirror: HmmMirror) -> None:
        """The address space goes: forget all of it. The mirror is not registered any more."""


@dataclass(slots=True, eq=False)
class HmmMirror:
    """A driver's side of an address space. Linux: struct hmm_mirror."""

    ops: HmmMirrorOps
    hmm: Hmm | None = None  # while it is registered


class Hmm:
    """What HMM knows of an address space while it has mirrors. Linux: struct hmm, mm/hmm.c."""

    def __init__(self, mm: MmStruct) -> None:
        self.mm = mm
        self.mirrors: list[HmmMirror] = []
        self.mirrors_sem = RwSemaphore(mm.mem.locks, f"mirrors_sem of {mm.name}")
        self.ranges: list[HmmVmaRange] = []  # that somebody reads
        self.lock = mm.mem.locks.atomic  # of `ranges`

    def invalidate_range_start(self, invalid: MmuNotifierRange) -> None:
        """Linux: hmm_invalidate_range_start(), mm/hmm.c."""
        self._invalidate_ranges(invalid)
        update = HmmUpdate(invalid.start, invalid.end, blockable=invalid.blockable)
        with self.mirrors_sem.read():
            for mirror in self.mirrors:
                self._sync(mirror, update)

    def _sync(self, mirror: HmmMirror, update: HmmUpdate) -> None:
        answer = mirror.ops.sync_cpu_device_pagetables(mirror, update)
        if answer:
            what = f"[{update.start:#x}, {update.end:#x}) of {self.mm.name}"
            if answer == -errno.EAGAIN and not update.blockable:
                raise WouldBlock(f"a mirror would have to wait to forget {what}")
            raise DriverBug(
                f"sync_cpu_device_pagetables() answered {answer} for {what}; it may answer 0, "
                f"or -EAGAIN where the update is not blockable"
            )

    def invalidate_range_end(self, invalid: MmuNotifierRange) -> None:
        """What was read while the change went on is no better. Linux: as _start()."""
        self._invalidate_ranges(invalid)

    def _invalidate_ranges(self, invalid: MmuNotifierRange) -> None:
        """Linux: hmm_invalidate_range(), mm/hmm.c.

        Unlike Linux v4.20, a change that ends where a range begins leaves it valid.
        """
        with self.lock:
            for tracked in self.ranges:
                tracked.forget(max(invalid.start, tracked.start), min(invalid.end, tracked.end))

    def release(self, mm: MmStruct) -> None:
        """Linux: hmm_release(), mm/hmm.c.

        Unlike Linux v4.20, ranges that are still read become invalid (as in v5.2): nobody tells
        them of the unmapping that follows.
        """
        mm.hmm = None
        self.drop_ranges()
        call_each(self._releases())

    def _releases(self) -> Iterator[Callable[[], object]]:
        """A call of release() for each mirror, made without mirrors_sem."""
        while True:
            with self.mirrors_sem.write():
                if not self.mirrors:
                    return
                mirror = self.mirrors.pop()
            mirror.hmm = None
            yield partial(mirror.ops.release, mirror)

    def track(self, tracked: HmmVmaRange, *, block: bool) -> None:
        """Let *tracked* hear of changes from now on, at a moment when none of it is under way.

        Unlike Linux v4.20, where a range may be read between start and end of a change, after the
        mirror forgot it, and count as valid (v5.2 waits too).
        """
        while True:
            with self.lock:
                under_way = self._under_way(tracked)
                if under_way is None:
                    tracked.valid = True
                    self.ranges.append(tracked)
                    return
            what = f"invalidation of [{under_way.start:#x}, {under_way.end:#x}) of {self.mm.name}"
            if under_way.thread == current():
                raise Deadlock(f"a range would wait for the {what}, which this thread is at")
            if not block:
                raise WouldBlock(f"a range would have to wait for the {what}")
            self.mm.mem.locks.wait_until(lambda: self._under_way(tracked) is None, what)

    def _under_way(self, tracked: HmmVmaRange) -> MmuNotifierRange | None:
        for invalid in tuple(self.mm.invalidating):
            if invalid.start < tracked.end and tracked.start < invalid.end:
                return invalid
        return None

    def drop_ranges(self) -> None:
        """Whatever is read of the address space is not true any more."""
        with self.lock:
            for tracked in self.ranges:
                tracked.forget(tracked.start, tracked.end)
            self.ranges.clear()


def hmm_mirror_register(mirror: HmmMirror, mm: MmStruct) -> None:
    """Let *mirror* hear of every change in *mm*, whose mmap_sem is held for write.

    Raises InvalidArgument. Linux: hmm_mirror_register(), mm/hmm.c.
    """
    if mirror.hmm is not None:
        raise InvalidArgument(f"hmm_mirror_register: it mirrors {mirror.hmm.mm.name} already")
    if mm.exited:
        raise InvalidArgument(f"hmm_mirror_register: {mm.name} has exited")
    if mm.mmap_sem.writer != current():
        raise InvalidArgument(f"hmm_mirror_register: hold mmap_sem of {mm.name} for write")
    hmm: Hmm = mm.hmm or Hmm(mm)
    with hmm.mirrors_sem.write():
        hmm.mirrors.append(mirror)
        mirror.hmm = hmm
    if mm.hmm is None:
        mm.hmm = hmm
        mmu_notifier_register(hmm, mm)


def hmm_mirror_unregister(mirror: HmmMirror) -> None:
    """Stop that; a second call does nothing. Linux: hmm_mirror_unregister(), mm/hmm.c.

    Unlike Linux v4.20, the other mirrors of the address space go on as before (as in v5.2).
    """
    hmm = mirror.hmm
    if hmm is None:
        return
    with hmm.mirrors_sem.write():
        if mirror.hmm is None:
            return  # the address space went meanwhile
        hmm.mirrors.remove(mirror)
        mirror.hmm = None
        last = not hmm.mirrors and hmm.mm.hmm is hmm
        if last:
            hmm.mm.hmm = None
            mmu_notifier_unregister(hmm, hmm.mm)
    if last:
        hmm.drop_ranges()


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

        Linux: hmm_pfn_from_pfn() and pte_to_hmm_pfn_flags(), mm/hmm.c.
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

    Unlike Linux v4.20, *block* is heeded; mmap_sem stays held in any case; and a page that
    another's fault has touched is still asked for what it was.
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
