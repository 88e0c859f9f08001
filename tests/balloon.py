"""A driver that keeps frames for itself, and lets others move them: where tests of those begin."""

from __future__ import annotations

import numpy as np

from mm import PAGE_SIZE, Machine
from mm.filemap import lock_page, unlock_page
from mm.fs import alloc_anon_inode, iput
from mm.gfp import GFP_KERNEL
from mm.movable import clear_page_movable, set_page_movable
from mm.page_alloc import alloc_pages_bulk
from mm.swap import get_page, put_page
from mm.types import AddressSpace, AddressSpaceOperations
from mm.typing import Errnos, Indices, Mask, Payload, Pfns


class Balloon:
    """*size* frames of node 0, each filled with the number of its place, until close().

    `pfns` has the frame at each place, 0 where there is none; a page's `private` is its place.
    `calls` are the names of the callbacks, with the places that they were for.
    `refuses` are places that isolate_page() does not part with; `answers` what migratepage() says
    of a place, in turn, before it does what it shall; `breaks` is what it raises instead.
    """

    def __init__(self, machine: Machine, size: int) -> None:
        self.mem = machine.mem
        self.inode = alloc_anon_inode(
            machine.mem,
            AddressSpaceOperations(
                isolate_page=self.isolate_page,
                migratepage=self.migratepage,
                putback_page=self.putback_page,
            ),
        )
        self.pfns = np.zeros(size, dtype=np.int64)
        self.aside = np.zeros(size, dtype=np.bool_)
        self.calls: list[tuple[str, list[int]]] = []
        self.refuses: set[int] = set()
        self.answers: dict[int, list[int]] = {}
        self.breaks: Exception | None = None
        fresh = alloc_pages_bulk(self.mem, GFP_KERNEL, 0, size)
        lock_page(self.mem, fresh)
        self._put_in(np.arange(size), fresh)
        unlock_page(self.mem, fresh)
        if self.mem.payload is not None:
            self.mem.payload[fresh] = self.filling()

    def filling(self) -> Payload:
        """What is in the frames, uint8[size, 4096]: the number of each place plus one."""
        places = np.arange(1, self.pfns.size + 1) % 251
        return np.repeat(places, PAGE_SIZE).astype(np.uint8).reshape(-1, PAGE_SIZE)

    def intact(self) -> bool:
        """True if each place that has a frame still has what was in it."""
        there = self.pfns > 0
        return bool((self.mem.payload[self.pfns[there]] == self.filling()[there]).all())

    def release(self, *places: int) -> None:
        """Give the frames at *places* back, by default all, whether somebody moves them or not.

        A frame that another took the place of while we waited for it is left to that.
        """
        for place in places or range(self.pfns.size):
            while self.pfns[place]:
                with self.mem.locks.atomic:
                    pfn = self.pfns[place : place + 1].copy()
                    get_page(self.mem, pfn)
                lock_page(self.mem, pfn)
                ours = pfn.item() == self.pfns[place]
                if ours:
                    self._take_out(np.array([place]))
                unlock_page(self.mem, pfn)
                put_page(self.mem, pfn, refs=1 + ours)

    def close(self) -> None:
        """Give all frames back, and end."""
        self.release()
        iput(self.inode)

    def _put_in(self, places: Indices, pfns: Pfns) -> None:
        self.pfns[places] = pfns
        self.mem.private[pfns] = places
        set_page_movable(self.mem, pfns, self.inode.i_mapping)

    def _take_out(self, places: Indices) -> None:
        pfns = self.pfns[places]
        clear_page_movable(self.mem, pfns)
        self.mem.private[pfns] = 0
        self.pfns[places] = 0
        self.aside[places] = False

    def _called(self, name: str, pfns: Pfns) -> Indices:
        places = self.mem.private[pfns]
        assert (self.pfns[places] == pfns).all()
        assert (self.mem.lock_owner[pfns] != 0).all()
        self.calls.append((name, places.tolist()))
        return places

    def isolate_page(self, mapping: AddressSpace, pfns: Pfns) -> Mask:
        places = self._called("isolate", pfns)
        willing = ~np.isin(places, list(self.refuses))
        assert not self.aside[places].any()
        self.aside[places[willing]] = True
        return willing

    def putback_page(self, mapping: AddressSpace, pfns: Pfns) -> None:
        places = self._called("putback", pfns)
        assert self.aside[places].all()
        self.aside[places] = False

    def migratepage(self, mapping: AddressSpace, new: Pfns, old: Pfns) -> Errnos:
        places = self._called("migrate", old)
        assert self.aside[places].all()
        if self.breaks is not None:
            raise self.breaks
        said = [self.answers[p].pop(0) if self.answers.get(p) else 0 for p in places.tolist()]
        status = np.array(said, dtype=np.int32)
        places, new, old = places[status == 0], new[status == 0], old[status == 0]
        if self.mem.payload is not None:
            self.mem.payload[new] = self.mem.payload[old]
        get_page(self.mem, new)
        self._take_out(places)
        self._put_in(places, new)
        put_page(self.mem, old)
        return status
