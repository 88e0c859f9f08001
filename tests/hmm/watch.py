"""Notifiers, mirrors and ranges for tests of what a device may map."""

from __future__ import annotations

import numpy as np

from hmm import HmmMirror, HmmRange, hmm_mirror_register, hmm_range_fault
from mm import PAGE_SIZE, Busy
from mm.mmu_notifier import (
    MmuIntervalNotifier,
    MmuNotifyEvent,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
    mmu_notifier_range,
)
from tests.world import World

EVERYWHERE = 1 << 57


class Watch(MmuIntervalNotifier):
    """Watches [start, end) of an address space; *deaf*: tells no reader of what it hears."""

    def __init__(self, mm, start=0, end=EVERYWHERE, *, deaf=False):
        self.heard = []
        self.deaf = deaf
        self.answer = True
        mmu_interval_notifier_insert(self, mm, start, end)

    def invalidate(self, invalid, cur_seq):
        self.heard.append((invalid.event.value, invalid.start, invalid.end))
        if not self.deaf:
            mmu_interval_set_seq(self, cur_seq)
        return self.answer

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        mmu_interval_notifier_remove(self)


def hmm_range_of(world: World, watch: Watch, first=0, count=None, **options) -> HmmRange:
    """Pages *first* and on of *world*; nothing is asked of them."""
    count = world.pages - first if count is None else count
    words = np.zeros(count, dtype=np.uint64)
    start, end = world.at(first), world.at(first) + count * PAGE_SIZE
    return HmmRange(watch, mmu_interval_read_begin(watch), start, end, words, **options)


def look(hmm_range: HmmRange) -> np.ndarray:
    """hmm_range_fault(), once; the words."""
    with hmm_range.notifier.mm.mmap_sem.read():
        hmm_range_fault(hmm_range)
    return hmm_range.hmm_pfns


def look_until_true(hmm_range: HmmRange) -> np.ndarray:
    """As a driver does: again and again until nobody interfered."""
    watch = hmm_range.notifier
    asked = hmm_range.hmm_pfns.copy()
    while True:
        hmm_range.notifier_seq = mmu_interval_read_begin(watch)
        hmm_range.hmm_pfns[:] = asked
        try:
            words = look(hmm_range)
        except Busy:
            continue
        if not mmu_interval_read_retry(watch, hmm_range.notifier_seq):
            return words


class MirrorOps:
    """Ops that note what they hear; *answer*: what they say to an update, or raise."""

    def __init__(self):
        self.heard = []
        self.answer = 0

    def sync_cpu_device_pagetables(self, mirror, update):
        self.heard.append(update)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def release(self, mirror):
        self.heard.append("release")


def mirror_of(mm, ops=None):
    mirror = HmmMirror(MirrorOps() if ops is None else ops)
    with mm.mmap_sem.write():
        hmm_mirror_register(mirror, mm)
    return mirror


def change(mm, start, end, **options):
    with mmu_notifier_range(mm, start, end, MmuNotifyEvent.CLEAR, **options):
        pass
