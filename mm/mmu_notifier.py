"""Tells those who keep copies of page tables what changes in the original.

Between start and end of a range no copy may answer for it. Linux: mm/mmu_notifier.c; events and
owner are as in v5.9, where a driver learned to pass over the migrations that it asked for.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

from mm.types import MmStruct


class MmuNotifyEvent(Enum):
    """Why a range is invalidated. Linux: enum mmu_notifier_event."""

    UNMAP = "unmap"  # munmap, mremap
    CLEAR = "clear"  # entries replaced one by one: COW, reclaim, migration by others
    PROTECTION_VMA = "protection_vma"  # mprotect: the whole range gets other rights
    MIGRATE = "migrate"  # migrate_vma; `owner` says for whom
    RELEASE = "release"  # the address space goes


class MmuNotifierRange(NamedTuple):
    """What a notifier hears. Linux: struct mmu_notifier_range."""

    mm: MmStruct
    start: int
    end: int
    event: MmuNotifyEvent
    owner: object = None


class MmuNotifier(Protocol):
    """A listener on one address space. Linux: struct mmu_notifier_ops."""

    def invalidate_range_start(self, invalid: MmuNotifierRange) -> None:
        """Entries of the range are about to change: forget them."""

    def invalidate_range_end(self, invalid: MmuNotifierRange) -> None:
        """The change is done."""

    def release(self, mm: MmStruct) -> None:
        """The address space is about to go: forget all of it."""


def mmu_notifier_register(notifier: MmuNotifier, mm: MmStruct) -> None:
    """Let *notifier* hear of every change in *mm*. Linux: mmu_notifier_register()."""
    mm.notifiers.append(notifier)


def mmu_notifier_unregister(notifier: MmuNotifier, mm: MmStruct) -> None:
    """Stop that. Linux: mmu_notifier_unregister()."""
    mm.notifiers.remove(notifier)


class mmu_notifier_range:  # noqa: N801 - used as a function is: with mmu_notifier_range(...):
    """Invalidate [*start*, *end*) around the block.

    Linux: mmu_notifier_invalidate_range_start() and _end().
    """

    __slots__ = ("invalid", "listeners")

    def __init__(
        self, mm: MmStruct, start: int, end: int, event: MmuNotifyEvent, owner: object = None
    ) -> None:
        self.invalid = MmuNotifierRange(mm, start, end, event, owner)
        self.listeners: tuple[MmuNotifier, ...] = ()

    def __enter__(self) -> None:
        self.invalid.mm.invalidating.append(self.invalid)
        self.listeners = tuple(self.invalid.mm.notifiers)
        for notifier in self.listeners:
            notifier.invalidate_range_start(self.invalid)

    def __exit__(self, *exc: object) -> None:
        mm = self.invalid.mm
        for i, invalid in enumerate(mm.invalidating):
            if invalid is self.invalid:
                del mm.invalidating[i]
                break
        for notifier in self.listeners:
            notifier.invalidate_range_end(self.invalid)
        if mm.mem.locks.waiting:
            with mm.mem.locks.atomic:
                mm.mem.locks.wake_up()


def mmu_notifier_release(mm: MmStruct) -> None:
    """Tell every listener that *mm* goes, and forget them. Linux: __mmu_notifier_release()."""
    while mm.notifiers:
        mm.notifiers.pop().release(mm)
