"""A device whose memory is a NumPy array: the default, and the example of a driver."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np

from devices.dma_fence import DmaFence, DmaFenceArray
from devices.driver import Driver
from devices.engines import CopyEngines
from devices.ops import DeviceOps
from mm.highmem import copy_highpages, reserve_payload
from mm.machine import Machine
from mm.memparse import Size
from mm.mmzone import PageStack
from mm.typing import PAGE_SIZE, Indices, Payload, Pfns
from mm.vectors import ascending, rows

ENGINE_PAGES: Final = 1 << 10  # of a copy that is worth an engine: handing 4 MiB over takes a tenth
STREAM_PAGES: Final = 3 << 14  # of a run that memcpy() is sure to store past the caches: 192 MiB


class NumpyDevice(Driver):
    """Device memory in host memory, private or public; copies are those of NumPy.

    Large ones are done by *engines*, threads of which each has one copy under way; a class that
    derives from this one and wants none sets it to 0.
    """

    kinds = ("private", "public")
    engines = 2

    def __init__(
        self,
        machine: Machine,
        memory: Size = "64MiB",
        kind: str = "private",
        *,
        name: str | None = None,
        chunk: Size | None = None,
        neighbours: Size = PAGE_SIZE,
    ) -> None:
        name = name or f"numpy{self.count(machine)}"
        super().__init__(machine, memory, kind, name=name, chunk=chunk, neighbours=neighbours)
        self._engines = CopyEngines(self.name, self.engines)
        self._free = PageStack(self.npages)
        self._free.push(np.arange(self.npages)[::-1])
        payload = machine.mem.payload
        if payload is not None and kind == "public":
            self.memory = payload[self.zone.start_pfn : self.zone.end_pfn]
        elif payload is not None:
            self.memory = reserve_payload(self.npages)

    def allocate(self, npages: int) -> Indices:
        """Free pages, lowest first and in a row where they are."""
        return ascending(self._free.pop(npages)[::-1])

    def free(self, pages: Indices) -> None:
        """Those freed last are used first, while the caches still know them."""
        self._free.push(ascending(pages)[::-1])

    def copy_in(self, pages: Indices, system: Payload, rows: Pfns) -> DmaFence | None:
        """System memory to device memory."""
        assert self.memory is not None
        return self._copy("copy_in", self.memory, pages, system, rows)

    def copy_out(self, pages: Indices, system: Payload, rows: Pfns) -> DmaFence | None:
        """Device memory to system memory; nothing is ever lost."""
        assert self.memory is not None
        return self._copy("copy_out", system, rows, self.memory, pages)

    def copy_peer(self, pages: Indices, peer: DeviceOps, theirs: Indices) -> DmaFence | None:
        """From this device's memory to that of another one of this class."""
        assert isinstance(peer, NumpyDevice)
        assert self.memory is not None
        assert peer.memory is not None
        return self._copy("copy_peer", peer.memory, theirs, self.memory, pages)

    def _copy(self, op: str, dst: Payload, to: Pfns, src: Payload, frm: Pfns) -> DmaFence | None:
        """Rows *frm* of *src* to rows *to* of *dst*, by the engines where there are many."""
        if to.size < ENGINE_PAGES or not self.engines:
            copy_highpages(dst, to, src, frm)
            return None
        what = f"{self.name}: {op} of {to.size} pages, PFN or page {frm[0]:#x} to {to[0]:#x},"
        one_run = isinstance(rows(to), slice) and isinstance(rows(frm), slice)
        fences = [
            self._engines.submit(partial(copy_highpages, dst, to[part], src, frm[part]), what)
            for part in _shares(to.size, self.engines, one_run)
        ]
        return fences[0] if len(fences) == 1 else DmaFenceArray(what, fences)

    def clear(self, pages: Indices) -> None:
        """Zeros need no copy here."""
        assert self.memory is not None
        self.memory[pages] = 0


def _shares(npages: int, engines: int, one_run: bool) -> list[slice]:
    """What of a copy of *npages* each of *engines* does.

    Equal parts, but that the first of one run is long enough to be stored past the caches, which
    equal parts might not be.
    """
    first = -(-npages // engines)
    if one_run and first < STREAM_PAGES <= npages:
        first = STREAM_PAGES
    rest = -(-(npages - first) // max(1, engines - 1)) or 1
    starts = [0, *range(first, npages, rest)]
    return [slice(start, end) for start, end in pairwise([*starts, npages])]
