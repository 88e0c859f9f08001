"""Replay a program's page accesses as accesses of a device, on memory that really moves.

fill      the host maps the footprint where the program had it, and writes known words
replay    the device loads, and stores where the program wrote, epoch by epoch
read      the CPU reads every page back
compare   what was loaded and what is left, against a plain NumPy replay of the trace
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Final, TypeAlias

import numpy as np

from hmm.offload.contents import (
    EPOCHS_APART,
    WORD_BYTES,
    WORDS,
    Expected,
    expected,
    initial_words,
    stored_words,
    word_of,
)
from hmm.offload.device import Device, DeviceStats, Words
from hmm.offload.traces import Trace
from mm.errors import InvalidArgument
from mm.machine import Machine
from mm.memparse import format_size
from mm.mmap import MMAP_MIN_ADDR
from mm.pgtable import PMD_SHIFT
from mm.process import Process
from mm.trace import TracePoint
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Mask, Pfns

BLOCK_PAGES: Final = 1 << (PMD_SHIFT - PAGE_SHIFT)  # a page table maps so many
MOST_AHEAD: Final = EPOCHS_APART // 2  # epochs in one vector, at most

Progress: TypeAlias = Callable[[int, int], object]  # events done, events in all

replay_differs = TracePoint("replay_differs")


@dataclass(frozen=True)
class Report:
    """What a replay did. Its fields are the keys of `hmm run --json`.

    Counters cover the whole run, from the first page that the host fills to the last one that it
    reads back. `wall_s` is the device's part alone: its accesses, with the faults, migrations and
    evictions that they caused.
    """

    trace: str
    device: str
    policy: str
    pages: int  # the program touched so many
    accesses: int  # touches of a page by the device
    device_memory_pages: int
    device_faults: int  # touches that found the page elsewhere
    fault_batches: int  # times that it stopped for them, once an epoch unless it is too small
    pages_to_device: int
    pages_to_system: int
    evicted_pages: int
    bytes_to_device: int
    bytes_to_system: int
    wall_s: float
    verified: bool  # every word loaded, and every byte left, is that of the plain replay
    vmstat: dict[str, int]  # counters of the machine that changed


@dataclass(frozen=True)
class Accesses:
    """The events of a trace as a device is asked for them; `start` says where epochs begin."""

    addrs: Addresses  # int64[E]: byte address of the word
    stored: Words  # uint64[E]: what is stored there, where the event writes
    write: Mask  # bool[E]
    loads: Words  # uint64[E]: what the device found, filled in as it goes

    @classmethod
    def of(cls, trace: Trace) -> Accesses:
        """Compute them for *trace*, with nothing loaded yet."""
        addrs = (trace.page << PAGE_SHIFT) + word_of(trace.epoch) * WORD_BYTES
        stored = stored_words(trace.page, trace.epoch)
        return cls(addrs, stored, trace.write, np.zeros_like(stored))

    def hits(self, gpu: Device, process: Process, start: list[int], at: int, until: int) -> int:
        """The first epoch from *at* that would fault, or *until*."""
        first, stop = start[at], start[until]
        hit = gpu.resident(process, self.addrs[first:stop], self.write[first:stop])
        if hit.all():
            return until
        return bisect_right(start, first + int(hit.argmin())) - 1

    def exchange(self, gpu: Device, process: Process, first: int, stop: int) -> None:
        """Let the device load and store what the events from *first* to *stop* tell."""
        some = slice(first, stop)
        self.loads[some] = gpu.exchange(
            process, self.addrs[some], self.stored[some], self.write[some]
        )


def machine_for(trace: Trace) -> Machine:
    """A machine with memory for the footprint of *trace*, its copies in flight and its tables."""
    mib = ceil(3 * trace.footprint.size * PAGE_SIZE / (1 << 20))
    return Machine(nodes=(f"{mib + 64}MiB",))


def replay(
    trace: Trace,
    machine: Machine,
    process: Process,
    gpu: Device,
    progress: Progress | None = None,
) -> Report:
    """Let *gpu* touch the memory of *process* as *trace* tells, check every byte, and report.

    What *process* had mapped in the 2 MiB blocks that the trace touches is replaced, and the new
    memory stays. *progress* is called with the events done and the events in all. What differs
    from the plain replay goes to the trace event `replay_differs`. Raises InvalidArgument where
    the machine keeps no contents, and what mm and the driver raise.
    """
    if machine.mem.payload is None:
        raise InvalidArgument("replay: the machine keeps no contents; boot it with payload=True")
    before = _counts(gpu.stats)
    with machine.vmstat.counting() as vmstat:
        fill(trace, process)
        started = time.perf_counter()
        loads = access(trace, process, gpu, progress)
        wall_s = time.perf_counter() - started
        words = read_back(trace, process)
    counts = _counts(gpu.stats)
    return Report(
        trace=trace.name,
        device=gpu.name,
        policy=policy(gpu),
        pages=trace.footprint.size,
        accesses=trace.events,
        device_memory_pages=gpu.npages,
        **{name: counts[name] - before[name] for name in counts},
        wall_s=wall_s,
        verified=compare(trace, Expected(loads, words)),
        vmstat=vmstat,
    )


def policy(gpu: Device) -> str:
    """How *gpu* decides what to move, in words."""
    return f"fault-driven, oldest chunk first ({format_size(gpu.chunk_pages * PAGE_SIZE)})"


def fill(trace: Trace, process: Process) -> None:
    """Map the 2 MiB blocks that *trace* touches, and write the pages of its footprint."""
    for first, stop in _runs(np.unique(trace.footprint // BLOCK_PAGES)):
        start = max(first << PMD_SHIFT, MMAP_MIN_ADDR)
        process.mmap((stop << PMD_SHIFT) - start, addr=start)
    for first, stop in _runs(trace.footprint):
        words = initial_words(np.arange(first, stop, dtype=np.int64))
        process.write(first << PAGE_SHIFT, words)


def access(trace: Trace, process: Process, gpu: Device, progress: Progress | None = None) -> Words:
    """Make the device's accesses in the order of *trace*; what it loaded, uint64[E].

    One epoch is one batch of faults; but a window of epochs that the device answers without a
    fault goes to it as one vector, with the loads, stores and final state of one epoch after the
    other. For an epoch lists a page once, and two epochs meet in a word only when they are a
    multiple of 512 apart: a window of at most 256 holds no word twice, so nothing that it loads
    was stored in it. And hits move no page, so what hits when the window begins hits throughout.

    An epoch that faults goes alone, and so, unasked, does the one after it; then windows double.
    """
    accesses = Accesses.of(trace)
    start, number = trace.epoch_start.tolist(), trace.epoch[trace.epoch_start[:-1]].tolist()
    at, ahead = 0, 1
    while at < len(number):
        asked = bisect_left(number, number[at] + ahead, at)
        hits = asked if ahead == 1 else accesses.hits(gpu, process, start, at, asked)
        until = max(hits, at + 1)
        batches = gpu.stats.fault_batches
        accesses.exchange(gpu, process, start[at], start[until])
        all_hit = hits == asked and gpu.stats.fault_batches == batches
        at, ahead = until, min(2 * ahead, MOST_AHEAD) if all_hit else 1
        if progress is not None:
            progress(start[at], trace.events)
    return accesses.loads


def read_back(trace: Trace, process: Process) -> Words:
    """What the CPU finds in the pages of the footprint, uint64[pages, 512]."""
    stretches = [
        process.read(first << PAGE_SHIFT, (stop - first) << PAGE_SHIFT)
        for first, stop in _runs(trace.footprint)
    ]
    return np.frombuffer(b"".join(stretches), dtype=np.uint64).reshape(-1, WORDS)


def compare(trace: Trace, found: Expected) -> bool:
    """True where *found* is what the plain replay of *trace* loads and leaves.

    How many loads and how many words of memory differ, and the first of each, go to the trace
    event `replay_differs`: *at* counts events there, or words of the footprint.
    """
    want, same = expected(trace), True
    page_of_load, page_of_word = trace.page, np.repeat(trace.footprint, WORDS)
    for what, page, got, wanted in (
        ("load", page_of_load, found.loads, want.loads),
        ("memory", page_of_word, found.words.reshape(-1), want.words.reshape(-1)),
    ):
        wrong = np.flatnonzero(got != wanted)
        same = same and not wrong.size
        if wrong.size and replay_differs:
            at = int(wrong[0])
            values = {"found": hex(got[at]), "expected": hex(wanted[at])}
            replay_differs(what=what, count=wrong.size, at=at, page=hex(page[at]), **values)
    return same


def _runs(numbers: Pfns) -> Iterator[tuple[int, int]]:
    """Stretches of consecutive *numbers*, which ascend: first, and the one after the last."""
    ends = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.concatenate(([0], ends + 1))]
    lasts = numbers[np.concatenate((ends, [numbers.size - 1]))]
    yield from zip(firsts.tolist(), (lasts + 1).tolist(), strict=True)


def _counts(stats: DeviceStats) -> dict[str, int]:
    return {
        "device_faults": stats.device_faults,
        "fault_batches": stats.fault_batches,
        "pages_to_device": stats.pages_to_device,
        "pages_to_system": stats.pages_to_system,
        "evicted_pages": stats.evicted_pages,
        "bytes_to_device": stats.bytes_to_device,
        "bytes_to_system": stats.bytes_to_system,
    }
