"""Mirrors of an address space, for drivers of v4.20.

A driver registers one HmmMirror for each address space that it mirrors, and hears there what to
forget. An address space with mirrors has one `Hmm`, which hears for all of them, and for the
ranges that somebody reads (hmm/vma_range.py). Linux: include/linux/hmm.h and mm/hmm.c, v4.20.
Later drivers have a MmuIntervalNotifier each (mm/mmu_notifier.py) and read with hmm/range.py.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, Protocol

from mm.errors import Deadlock, DriverBug, InvalidArgument, WouldBlock
from mm.locking import RwSemaphore, current
from mm.mmu_notifier import (
    MmuNotifierRange,
    call_each,
    mmu_notifier_register,
    mmu_notifier_unregister_no_release,
)
from mm.types import MmStruct

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


class Tracked(Protocol):
    """A range that somebody reads: an HmmVmaRange."""

    start: int
    end: int
    valid: bool

    def forget(self, start: int, end: int) -> None:
        """What was read of [*start*, *end*) is not true any more."""


class Hmm:
    """What HMM knows of an address space while it has mirrors. Linux: struct hmm, mm/hmm.c."""

    def __init__(self, mm: MmStruct) -> None:
        self.mm = mm
        self.mirrors: list[HmmMirror] = []
        self.mirrors_sem = RwSemaphore(mm.mem.locks, f"mirrors_sem of {mm.name}")
        self.ranges: list[Tracked] = []  # that somebody reads
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

    def track(self, tracked: Tracked, *, block: bool) -> None:
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

    def _under_way(self, tracked: Tracked) -> MmuNotifierRange | None:
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
            mmu_notifier_unregister_no_release(hmm, hmm.mm)
    if last:
        hmm.drop_ranges()
