"""A device whose memory is a NumPy array: the default, and the example of a driver."""

from __future__ import annotations

import numpy as np

from devices.driver import Driver
from mm.highmem import copy_highpages, reserve_payload
from mm.machine import Machine
from mm.memparse import Size
from mm.mmzone import PageStack
from mm.typing import PAGE_SIZE, Indices, Mask, Payload, Pfns


class NumpyDevice(Driver):
    """Device memory in host memory, private or public; copies are those of NumPy."""

    kinds = ("private", "public")

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
        self._free = PageStack(self.npages)
        self._free.push(np.arange(self.npages)[::-1])
        payload = machine.mem.payload
        if payload is not None and kind == "public":
            self.memory = payload[self.zone.start_pfn : self.zone.end_pfn]
        elif payload is not None:
            self.memory = reserve_payload(self.npages)

    def allocate(self, npages: int) -> Indices:
        """Free pages, lowest first and in a row where they are."""
        return np.sort(self._free.pop(npages))

    def free(self, pages: Indices) -> None:
        """Those freed last are used first, while the caches still know them."""
        self._free.push(np.sort(pages)[::-1])

    def copy_in(self, pages: Indices, system: Payload, rows: Pfns) -> None:
        """System memory to device memory."""
        assert self.memory is not None
        copy_highpages(self.memory, pages, system, rows)

    def copy_out(self, pages: Indices, system: Payload, rows: Pfns) -> Mask | None:
        """Device memory to system memory; nothing is ever lost."""
        assert self.memory is not None
        copy_highpages(system, rows, self.memory, pages)
        return None

    def clear(self, pages: Indices) -> None:
        """Zeros need no copy here."""
        assert self.memory is not None
        self.memory[pages] = 0
