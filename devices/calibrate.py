"""Measure the device at hand: `hmm calibrate DEVICE` writes what devices/timing.py reads.

The fastest of several rounds counts. Sizes double from a page on; a size that seems to take less
than a smaller one takes as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from devices.conformance.rule import Device, Opener
from devices.dma_fence import answer_of
from devices.timing import Profile, Transfers
from hmm.offload.device import OpenDevice
from mm.errors import InvalidArgument
from mm.machine import Machine
from mm.memparse import Size, format_size, memparse
from mm.pgtable import pte_offset, pte_pfn
from mm.process import Process
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Indices, Payload, Pfns

ROUNDS: Final = 7
LARGEST: Final = 32 << 20
BATCHES: Final = (1, 64)  # faults in a batch
_DUPLEX: Final = 0.75  # of the time of one after the other, below which two copies go at once


def calibrate(
    driver: OpenDevice, name: str, largest: Size = LARGEST, rounds: int = ROUNDS
) -> Profile:
    """The profile of the device that *driver* opens, called *name*, with copies up to *largest*.

    Raises InvalidArgument for what is no driver, or copies of less than 256 KiB, and what the
    driver raises.
    """
    if memparse(largest) < BATCHES[-1] * PAGE_SIZE:
        raise InvalidArgument(
            f"calibrate: copies up to {largest!r} say nothing; measure up to "
            f"{format_size(BATCHES[-1] * PAGE_SIZE)} or more"
        )
    return _Bench(driver, memparse(largest) >> PAGE_SHIFT, rounds).profile(name)


class _Bench:
    """A machine with a device of twice *npages*, and as much memory of a process."""

    def __init__(self, driver: OpenDevice, npages: int, rounds: int) -> None:
        self.rounds = rounds
        size = 2 * npages * PAGE_SIZE
        self.machine = Machine((f"{(2 * size >> 20) + 16}MiB",))
        self.gpu: Device = Opener(driver)(self.machine, size)
        self.process: Process = self.machine.spawn("calibrate")
        self.npages = npages
        addr = self.process.mmap(size)
        self.process.touch(addr, size)
        self.addrs: Addresses = addr + np.arange(2 * npages) * PAGE_SIZE
        tables = self.machine.mem.tables
        at = pte_offset(tables, self.process.mm.pgd, self.addrs)
        self.rows: Pfns = np.sort(pte_pfn(tables.entries[at]))
        assert self.machine.mem.payload is not None
        self.payload: Payload = self.machine.mem.payload

    def profile(self, name: str) -> Profile:
        """Measure everything."""
        pages = np.sort(self.gpu.ops.allocate(2 * self.npages))
        try:
            to_device = self._transfers(pages, back=False)
            to_system = self._transfers(pages, back=True)
            duplex = self._duplex(pages)
        finally:
            self.gpu.ops.free(pages)
        batch_us, page_us = self._faults(to_device)
        engines = max(1, self.gpu.engines)
        self.gpu.close()
        self.process.exit()
        return Profile(name, to_device, to_system, duplex, engines, batch_us, page_us)

    def _fastest(self, work: Callable[[], object]) -> float:
        """Microseconds of the fastest round of *work*."""
        spent = float("inf")
        for _ in range(self.rounds):
            begin = time.perf_counter()
            work()
            spent = min(spent, time.perf_counter() - begin)
        return spent * 1e6

    def _copy(self, pages: Indices, rows: Pfns, *, back: bool) -> None:
        copy = self.gpu.ops.copy_out if back else self.gpu.ops.copy_in
        answer_of(copy(pages, self.payload, rows), self.gpu.timeout)

    def _transfers(self, pages: Indices, *, back: bool) -> Transfers:
        sizes = [1 << n for n in range(self.npages.bit_length())]
        us = [
            self._fastest(lambda: self._copy(pages[:n], self.rows[:n], back=back))  # noqa: B023
            for n in sizes
        ]
        ascending = np.maximum.accumulate(us)
        return Transfers(tuple(n * PAGE_SIZE / 1024 for n in sizes), tuple(ascending.tolist()))

    def _duplex(self, pages: Indices) -> bool:
        """Whether a copy in and a copy out take less together than one after the other."""
        half, ops = self.npages, self.gpu.ops

        def both() -> None:
            begun = (
                ops.copy_in(pages[:half], self.payload, self.rows[:half]),
                ops.copy_out(pages[half:], self.payload, self.rows[half:]),
            )
            for answer in begun:
                answer_of(answer, self.gpu.timeout)

        alone = self._fastest(lambda: self._copy(pages[:half], self.rows[:half], back=False))
        alone += self._fastest(lambda: self._copy(pages[half:], self.rows[half:], back=True))
        return self._fastest(both) < _DUPLEX * alone

    def _faults(self, transfers: Transfers) -> tuple[float, float]:
        """What a batch of faults costs, and each page of it, besides the copies."""
        costs = []
        for npages in BATCHES:
            addrs = self.addrs[:npages]
            spent = float("inf")
            for _ in range(self.rounds):
                begin = time.perf_counter()
                self.gpu.fault(self.process, addrs, np.ones(npages, dtype=np.bool_))
                spent = min(spent, time.perf_counter() - begin)
                self.gpu.to_system(self.process, int(addrs[0]), npages * PAGE_SIZE)
            costs.append(max(0.0, spent * 1e6 - transfers.us_of(npages * PAGE_SIZE)))
        page_us = max(0.0, (costs[1] - costs[0]) / (BATCHES[1] - BATCHES[0]))
        return max(0.0, costs[0] - page_us), page_us
