"""Tells those who keep copies of page tables what changes in the original.

Between start and end of a range no copy may answer for it. Two kinds of listeners:

    MmuNotifier          hears start and end of every change in an address space
    MmuIntervalNotifier  hears the start of those that touch its interval, and lends a reader a
                         sequence count that tells whether what he read is still true

A reader of the second kind never stops a change; he looks whether one came in between:

    seq = mmu_interval_read_begin(n)      waits while the interval is being invalidated
    read the page tables
    take the lock that invalidate() takes
    mmu_interval_read_retry(n, seq)       True: let go of the lock and begin again
    use what was read

`mm.invalidate_seq` is odd while a change is under way that an interval hears of, and even
otherwise. invalidate() stores the odd number in its notifier, so the two are equal until the
change ends.

A device that has its own page tables may also lend an ear to single entries, and tell which pages
it has used, by methods that a MmuNotifier need not have: see `EXTRAS`. Who has them is known from
registration on, so that an address space without such a listener does not ask.

Linux: mm/mmu_notifier.c. Unlike Linux v4.20, a range has an event and an owner (as in
v5.9), by which a driver passes over the migrations that it asked for, and there are intervals (as
in v5.5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from typing import Final, NamedTuple, Protocol

import numpy as np

from mm.errors import Deadlock, DriverBug, InvalidArgument, KernelBug, Overflow, WouldBlock
from mm.locking import NOBODY, current
from mm.types import MmStruct
from mm.typing import Addresses, Mask, Ptes

ULONG_MAX: Final = (1 << 64) - 1


class MmuNotifyEvent(Enum):
    """Why a range is invalidated. Linux: enum mmu_notifier_event."""

    UNMAP = "unmap"  # munmap, mremap
    CLEAR = "clear"  # entries replaced one by one: COW, reclaim, migration by others
    PROTECTION_VMA = "protection_vma"  # mprotect: the whole range gets other rights
    PROTECTION_PAGE = "protection_page"  # entries lose rights one by one: fork
    SOFT_DIRTY = "soft_dirty"  # clear_refs: entries become read-only to see the next store
    RELEASE = "release"  # the address space goes
    MIGRATE = "migrate"  # migrate_vma; `owner` says for whom
    EXCLUSIVE = "exclusive"  # a device takes the page for itself; `owner` says which


class MmuNotifierRange(NamedTuple):
    """What a notifier hears. Linux: struct mmu_notifier_range.

    blockable: the listener may wait; thread: which one makes the change.
    """

    mm: MmStruct
    start: int
    end: int
    event: MmuNotifyEvent
    owner: object = None
    blockable: bool = True
    thread: int = NOBODY


class MmuNotifier(Protocol):
    """A listener on one address space. Linux: struct mmu_notifier_ops."""

    def invalidate_range_start(self, invalid: MmuNotifierRange) -> None:
        """Entries of the range are about to change: forget them.

        May raise WouldBlock where the range is not *blockable*.
        """

    def invalidate_range_end(self, invalid: MmuNotifierRange) -> None:
        """The change is done."""

    def release(self, mm: MmStruct) -> None:
        """The address space is about to go, or the listener is: forget all of it. Called once."""


class MmuNotifierExtras(MmuNotifier, Protocol):
    """What a listener may have besides, any or all of it; called with the page-table lock held.

    clear_young() and test_young() of Linux are asked by nobody here.
    """

    def invalidate_range(self, mm: MmStruct, start: int, end: int) -> None:
        """Entries of [*start*, *end*) have changed: flush what a shared page table has cached."""

    def change_pte(self, mm: MmStruct, addrs: Addresses, ptes: Ptes) -> None:
        """The entries at *addrs* are about to become *ptes*."""

    def clear_flush_young(self, mm: MmStruct, addrs: Addresses) -> Mask:
        """True for *addrs* that the device has used since it was last asked."""


EXTRAS: Final = ("invalidate_range", "change_pte", "clear_flush_young")


class MmuIntervalNotifier(ABC):
    """A listener on [start, end) of one address space; derive and write invalidate().

    Linux: struct mmu_interval_notifier.
    """

    mm: MmStruct
    start: int
    end: int
    invalidate_seq: int = 0  # odd while it is inserted, 0 while it is not

    @abstractmethod
    def invalidate(self, invalid: MmuNotifierRange, cur_seq: int) -> bool:
        """Entries of *invalid*, which overlaps the interval, are about to change.

        Under the lock under which the driver reads the notifier: forget them, and call
        mmu_interval_set_seq(self, cur_seq), unless the change is the driver's own and it knows
        better. False, with nothing forgotten, where that would mean to wait and the range is not
        *blockable*.
        """


def mmu_notifier_register(notifier: MmuNotifier, mm: MmStruct) -> None:
    """Let *notifier* hear of every change in *mm* that begins from now on.

    Raises InvalidArgument where *mm* is gone, or has it already. Linux: mmu_notifier_register().
    """
    if mm.exited:
        raise InvalidArgument(f"mmu_notifier_register: {mm.name} has exited")
    with mm.mem.locks.atomic:
        if any(other is notifier for other in mm.notifiers):
            raise InvalidArgument(f"mmu_notifier_register: it listens to {mm.name} already")
        mm.notifiers.append(notifier)
        _note_extras(mm)


def mmu_notifier_unregister(notifier: MmuNotifier, mm: MmStruct) -> None:
    """Release *notifier*, and stop that; nothing happens where *mm* has released it.

    From a callback too: it hears the end of what it heard the start of.
    Linux: mmu_notifier_unregister().
    """
    if _forget(notifier, mm):
        notifier.release(mm)


def mmu_notifier_unregister_no_release(notifier: MmuNotifier, mm: MmStruct) -> None:
    """The same, for a listener that knows. Linux: mmu_notifier_unregister_no_release()."""
    _forget(notifier, mm)


def _forget(notifier: MmuNotifier, mm: MmStruct) -> bool:
    """True for who does so first: exit, or whoever unregisters it."""
    with mm.mem.locks.atomic:
        for i, other in enumerate(mm.notifiers):
            if other is notifier:
                del mm.notifiers[i]
                _note_extras(mm)
                return True
    return False


def _note_extras(mm: MmStruct) -> None:
    """Note who has which of EXTRAS, with `atomic` held."""
    found = {name: [n for n in mm.notifiers if hasattr(n, name)] for name in EXTRAS}
    mm.notifier_extras = {name: listeners for name, listeners in found.items() if listeners}


def mmu_notifier_invalidate_range(mm: MmStruct, start: int, end: int) -> None:
    """Entries of [*start*, *end*) have just changed, between start and end of an invalidation.

    Called with the page-table lock held. Linux: mmu_notifier_invalidate_range().
    """
    for notifier in mm.notifier_extras.get("invalidate_range", ()):
        notifier.invalidate_range(mm, start, end)


def mmu_notifier_change_pte(mm: MmStruct, addrs: Addresses, ptes: Ptes) -> None:
    """The entries at *addrs*, empty by now, become *ptes*; with the page-table lock held.

    Linux: mmu_notifier_change_pte(), as set_pte_at_notify() calls it.
    """
    for notifier in mm.notifier_extras.get("change_pte", ()):
        notifier.change_pte(mm, addrs, ptes)


def mmu_notifier_clear_flush_young(mm: MmStruct, addrs: Addresses) -> Mask:
    """True for *addrs* that some device has used since this was last asked; all are asked.

    Called with the page-table lock held. Linux: mmu_notifier_clear_flush_young(), as
    ptep_clear_flush_young_notify() calls it.
    """
    young = np.zeros(addrs.size, dtype=np.bool_)
    for notifier in mm.notifier_extras.get("clear_flush_young", ()):
        young |= notifier.clear_flush_young(mm, addrs)
    return young


def mmu_interval_notifier_insert(
    notifier: MmuIntervalNotifier, mm: MmStruct, start: int, end: int
) -> None:
    """Let *notifier* hear of every change that touches [*start*, *end*) of *mm*.

    Raises Overflow for a range that is empty or wraps, InvalidArgument where *mm* is gone or the
    notifier is in use. Linux: mmu_interval_notifier_insert(), with a length in place of the end.
    """
    if not 0 <= start < end <= ULONG_MAX + 1:
        raise Overflow(
            f"mmu_interval_notifier_insert: [{start:#x}, {end:#x}) is empty or leaves "
            f"[0, {ULONG_MAX:#x}]"
        )
    if mm.exited:
        raise InvalidArgument(f"mmu_interval_notifier_insert: {mm.name} has exited")
    if notifier.invalidate_seq:
        raise InvalidArgument(
            f"mmu_interval_notifier_insert: the notifier watches {notifier.mm.name} already; "
            f"remove it first"
        )
    notifier.mm, notifier.start, notifier.end = mm, start, end
    with mm.mem.locks.atomic:
        if mm.invalidating:  # whoever reads has to wait for those changes
            mm.invalidate_seq |= 1
            notifier.invalidate_seq = mm.invalidate_seq
        else:
            notifier.invalidate_seq = mm.invalidate_seq - 1
        insort(mm.interval_notifiers, notifier, key=_start)


def _start(notifier: MmuIntervalNotifier) -> int:
    return notifier.start


def mmu_interval_notifier_remove(notifier: MmuIntervalNotifier) -> None:
    """Stop that; when it returns, invalidate() runs in no thread and is not called again.

    Raises InvalidArgument where it is not inserted, Deadlock where this thread is invalidating.
    Linux: mmu_interval_notifier_remove().
    """
    if not notifier.invalidate_seq:
        raise InvalidArgument("mmu_interval_notifier_remove: the notifier is not inserted")
    mm = notifier.mm
    _check_not_invalidating(mm, "mmu_interval_notifier_remove")
    with mm.mem.locks.atomic:
        mm.interval_notifiers.remove(notifier)
        seq = mm.invalidate_seq
    if seq & 1:
        _wait_for_end(mm, seq)
    notifier.invalidate_seq = 0


def mmu_interval_read_begin(notifier: MmuIntervalNotifier) -> int:
    """The sequence count to read under; waits while somebody invalidates the interval.

    Raises Deadlock where this thread does. Linux: mmu_interval_read_begin().
    """
    mm = notifier.mm
    seq = notifier.invalidate_seq
    if seq == mm.invalidate_seq:
        _check_not_invalidating(mm, "mmu_interval_read_begin")
        _wait_for_end(mm, seq)
    return seq


def mmu_interval_read_retry(notifier: MmuIntervalNotifier, seq: int) -> bool:
    """True where the interval was invalidated since mmu_interval_read_begin() gave *seq*.

    Called under the lock that invalidate() takes. Linux: mmu_interval_read_retry().
    """
    return notifier.invalidate_seq != seq


def mmu_interval_check_retry(notifier: MmuIntervalNotifier, seq: int) -> bool:
    """As mmu_interval_read_retry(), a hint that needs no lock: go no further if it is True.

    Linux: mmu_interval_check_retry().
    """
    return notifier.invalidate_seq != seq


def mmu_interval_set_seq(notifier: MmuIntervalNotifier, cur_seq: int) -> None:
    """Let readers of the interval collide; from invalidate() only.

    Linux: mmu_interval_set_seq().
    """
    notifier.invalidate_seq = cur_seq


def _check_not_invalidating(mm: MmStruct, call: str) -> None:
    me = current()
    for invalid in tuple(mm.invalidating):
        if invalid.thread == me:
            raise Deadlock(
                f"{call}: this thread itself invalidates [{invalid.start:#x}, {invalid.end:#x}) "
                f"of {mm.name} ({invalid.event.value}) and would wait for the end of that"
            )


def _wait_for_end(mm: MmStruct, seq: int) -> None:
    mm.mem.locks.wait_until(
        lambda: mm.invalidate_seq != seq, f"end of the invalidations in {mm.name}"
    )


class mmu_notifier_range:  # noqa: N801 - used as a function is: with mmu_notifier_range(...):
    """Invalidate [*start*, *end*) around the block.

    Raises WouldBlock where *blockable* is False and a listener would have to wait. Then, and
    where a listener raises, the block does not run, and whoever heard the start hears the end.
    only_end: the block itself calls mmu_notifier_invalidate_range() for what it changes.

    A thread's ranges nest: KernelBug for one that ends before another that began later, or that
    is not under way. Linux: mmu_notifier_invalidate_range_start(), _start_nonblock(), _end() and
    _only_end().
    """

    __slots__ = ("flush", "invalid", "listeners")

    def __init__(
        self,
        mm: MmStruct,
        start: int,
        end: int,
        event: MmuNotifyEvent,
        owner: object = None,
        *,
        blockable: bool = True,
        only_end: bool = False,
    ) -> None:
        self.invalid = MmuNotifierRange(mm, start, end, event, owner, blockable, current())
        self.flush = not only_end
        self.listeners: tuple[MmuNotifier, ...] = ()

    def __enter__(self) -> None:
        listeners = tuple(self.invalid.mm.notifiers)
        heard = 0
        intervals, seq = _invalidation_starts(self.invalid)
        try:
            for interval in intervals:
                _invalidate(interval, self.invalid, seq)
            for notifier in listeners:
                notifier.invalidate_range_start(self.invalid)
                heard += 1
        except BaseException:
            self.listeners = listeners[:heard]
            self.__exit__()
            raise
        self.listeners = listeners

    def __exit__(self, *exc: object) -> None:
        _invalidation_ends(self.invalid)
        if self.listeners:
            call_each(self._ends())

    def _ends(self) -> Iterator[Callable[[], object]]:
        """What each listener hears at the end. Linux: __mmu_notifier_invalidate_range_end()."""
        invalid = self.invalid
        extras = invalid.mm.notifier_extras
        flushed = extras.get("invalidate_range", ()) if extras and self.flush else ()
        for notifier in self.listeners:
            if notifier in flushed:
                yield partial(notifier.invalidate_range, *invalid[:3])  # type: ignore[attr-defined]
            yield partial(notifier.invalidate_range_end, invalid)


def _invalidation_starts(invalid: MmuNotifierRange) -> tuple[list[MmuIntervalNotifier], int]:
    """The notifiers that *invalid* touches, and the sequence count for them.

    Linux: mn_itree_inv_start_range(), mm/mmu_notifier.c.
    """
    mm = invalid.mm
    with mm.mem.locks.atomic:
        mm.invalidating.append(invalid)
        if not mm.interval_notifiers:
            return [], mm.invalidate_seq
        touched = [
            notifier
            for notifier in mm.interval_notifiers
            if notifier.start < invalid.end and invalid.start < notifier.end
        ]
        if touched:
            mm.invalidate_seq |= 1
        return touched, mm.invalidate_seq


def _invalidate(notifier: MmuIntervalNotifier, invalid: MmuNotifierRange, seq: int) -> None:
    if notifier.invalidate(invalid, seq):
        return
    what = f"[{invalid.start:#x}, {invalid.end:#x}) of {invalid.mm.name}"
    if invalid.blockable:
        raise DriverBug(f"invalidate() of {notifier!r} refused {what}, where it may wait")
    raise WouldBlock(f"{notifier!r} would have to wait to invalidate {what}")


def _invalidation_ends(invalid: MmuNotifierRange) -> None:
    """Linux: mn_itree_inv_end(), mm/mmu_notifier.c."""
    mm = invalid.mm
    with mm.mem.locks.atomic:
        for i in range(len(mm.invalidating) - 1, -1, -1):
            other = mm.invalidating[i]
            if other is invalid:
                del mm.invalidating[i]
                break
            if other.thread == invalid.thread:
                raise KernelBug(_out_of_order(invalid, other))
        else:
            raise KernelBug(_out_of_order(invalid, None))
        if not mm.invalidating:
            mm.invalidate_seq += mm.invalidate_seq & 1
        mm.mem.locks.wake_up()


def _out_of_order(invalid: MmuNotifierRange, later: MmuNotifierRange | None) -> str:
    what = f"invalidation of [{invalid.start:#x}, {invalid.end:#x}) of {invalid.mm.name}"
    if later is None:
        return f"{what} ends, and never started, or ended before"
    return f"{what} ends before [{later.start:#x}, {later.end:#x}), which started later"


def mmu_notifier_release(mm: MmStruct) -> None:
    """Tell every listener that *mm* goes, and forget those that are no intervals.

    All are told, though one may raise; that is raised then. Linux: __mmu_notifier_release().
    """
    released = MmuNotifierRange(mm, 0, ULONG_MAX, MmuNotifyEvent.RELEASE, thread=current())
    call_each(_releases(mm, released))


def _releases(mm: MmStruct, released: MmuNotifierRange) -> Iterator[Callable[[], object]]:
    intervals, seq = _invalidation_starts(released)
    for interval in intervals:
        yield partial(_invalidate, interval, released, seq)
    yield partial(_invalidation_ends, released)
    while mm.notifiers:
        last = mm.notifiers[-1]
        yield partial(mmu_notifier_unregister, last, mm)


def call_each(calls: Iterable[Callable[[], object]]) -> None:
    """Make every one of *calls*, though one may raise; then raise what was raised first."""
    first: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised below
            first = first or error
    if first is not None:
        raise first
