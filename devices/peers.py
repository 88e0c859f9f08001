"""Straight from the memory of one device to that of another, in one migrate_vma() call.

Nothing in migrate_vma() forbids that source and destination are both device memory: it takes the
pages of any device where no owner is named. Both devices hear of it as of any other's migration,
and forget what they had mapped. Two devices of one class whose driver has copy_peer() reach one
another; else, what one copies out the other copies in, by way of a buffer. The pages never lie in
frames of the system. Linux: v4.20 could, later kernels select by owner, and drm_pagemap (v7.0)
brought it back for devices that reach one another.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from devices.dma_fence import DmaFence, answer_of
from devices.in_flight import InFlight
from devices.memory import SELECT_OWN, DeviceMemory, Direction
from devices.moved import Moved
from devices.ranges import vma_spans
from hmm.migrate import migrate_vma
from hmm.migrate_pfn import MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, MigratePfns, migrate_pfn_to_pfn
from mm.errors import InvalidArgument
from mm.memparse import Size, memparse
from mm.pagewalk import walk_page_range
from mm.process import Process
from mm.sched import running
from mm.types import MmStruct, Vma
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices, Mask, word
from mm.vectors import places, some

TRANSFER_PAGES: Final = 1 << 12  # that lie in the buffer at a time

_PAGE: Final = word(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)


def migrate_between(
    source: DeviceMemory, target: DeviceMemory, process: Process, addr: int, nbytes: Size
) -> Moved:
    """Migrate what is in *source*'s memory of [*addr*, *addr* + *nbytes*) to *target*'s.

    *target* evicts its oldest pages to make room; what does not fit stays where it is. The result
    counts pages of *source* alone. Raises InvalidRange where something in the range is not mapped,
    InvalidArgument for devices that are closed, of two machines, or the same.
    """
    if source.zone is target.zone or source.machine is not target.machine:
        raise InvalidArgument(f"{source.name} and {target.name} are not two devices of a machine")
    if source.closed or target.closed:
        raise InvalidArgument(f"{source.name} or {target.name} is closed")
    moved, mm, peers = Moved(), process.mm, Peers(source, target)
    with running(process), mm.mmap_sem.read():
        spans = vma_spans(mm, addr, memparse(nbytes))
        target.make_room(sum(int(np.count_nonzero(peers.of(mm, *span[1:]))) for span in spans))
        for vma, start, end in spans:
            step = TRANSFER_PAGES << PAGE_SHIFT
            for piece in range(start, end, step):
                peers.migrate(vma, piece, min(piece + step, end), moved)
    return moved


class Peers:
    """The callbacks of such a migration, from *source* to *target*."""

    def __init__(self, source: DeviceMemory, target: DeviceMemory) -> None:
        self.source = source
        self.target = target
        self.reach = _reach(source, target)

    def of(self, mm: MmStruct, start: int, end: int) -> Mask:
        """Which pages of [*start*, *end*) are in *source*'s memory."""
        here = np.zeros((end - start) >> PAGE_SHIFT, dtype=np.bool_)
        for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
            here[run.slice] = self.source.own(run.ptes)[0]
        return here

    def migrate(self, vma: Vma, start: int, end: int, moved: Moved) -> None:
        """One migrate_vma() over [*start*, *end*)."""
        wanted = self.of(vma.vm_mm, start, end)
        if some(wanted):
            src, dst = np.zeros((2, wanted.size), dtype=np.uint64)
            select = SELECT_OWN[self.source.type]
            moved.add(migrate_vma(self, vma, start, end, src, dst, select=select, wanted=wanted))

    def alloc_and_copy(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> InFlight | None:
        """Linux: alloc_and_copy() of struct migrate_vma_ops."""
        if self.target.stranded:
            self.target.stranded.reap()
        first, last = self.source.zone.start_pfn, self.source.zone.end_pfn
        entries = places((src & _PAGE) == _PAGE)
        pfns = migrate_pfn_to_pfn(src[entries])
        still = (first <= pfns) & (pfns < last)  # what moved elsewhere since we looked is not ours
        entries, pages = self.target.take(vma.vm_mm, dst, entries[still])
        rows = pfns[still][: pages.size] - first
        if self.source.mem.payload is None or not pages.size:
            return None
        self.target.stats.bytes_to_device += pages.size * PAGE_SIZE
        direct = self.source.ops.copy_peer if self.reach else None
        if direct is not None:
            answer = direct(rows, self.target.ops, pages)
            if isinstance(answer, DmaFence):
                return InFlight(self.target, answer, dst, entries)
            if answer is not None and some(answer):
                self.target.give_up(dst, entries[answer])
            return None
        self._copy_by_buffer(rows, pages, dst, entries)
        return None

    def _copy_by_buffer(
        self, rows: Indices, pages: Indices, dst: MigratePfns, entries: Indices
    ) -> None:
        """Out of the one, into the other."""
        buffer, slots = np.empty((pages.size, PAGE_SIZE), dtype=np.uint8), np.arange(pages.size)
        lost = answer_of(self.source.ops.copy_out(rows, buffer, slots), self.source.timeout)
        fence = self.target.ops.copy_in(pages, buffer, slots)
        if fence is not None:
            InFlight(self.target, fence, dst, entries)()
        if lost is not None and some(lost):
            self.target.give_up(dst, entries[lost])

    def finalize_and_map(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> None:
        """Linux: finalize_and_map() of struct migrate_vma_ops."""
        self.target.finalize_and_map(vma, src, dst, start, end, Direction.TO_DEVICE)


def _reach(source: DeviceMemory, target: DeviceMemory) -> bool:
    """Two devices of a class with copy_peer(), and nothing in between that should see the copies.

    A class that derives from such a one and copies in ways of its own has to say how it copies to a
    peer as well.
    """
    cls = type(source)
    if source.ops is not source or target.ops is not target or type(target) is not cls:
        return False
    depth = {name: _depth(cls, name) for name in ("copy_peer", "copy_in", "copy_out")}
    return depth["copy_peer"] <= min(depth.values())


def _depth(cls: type, name: str) -> int:
    """How far up from *cls* the class is that says what *name* is."""
    return next(depth for depth, base in enumerate(cls.__mro__) if name in vars(base))
