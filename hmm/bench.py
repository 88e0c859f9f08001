"""What this machine reaches, as ratios to a plain copy of the same bytes in the same run.

Rounds of the copy and of the measured work alternate, and the fastest of each counts, so that a
busy machine disturbs both alike. All memory is touched before, so that no round pays for the
host's own page faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

import numpy as np

from hmm.offload.replay import machine_for, replay
from hmm.offload.traces import load_trace
from hmm.range import HmmRange, hmm_range_fault
from hmm.registry import Verdict, load_driver, load_suite
from mm.errors import InvalidArgument
from mm.machine import Machine
from mm.memparse import Size, format_size
from mm.mmu_notifier import (
    MmuIntervalNotifier,
    MmuNotifierRange,
    mmu_interval_notifier_insert,
    mmu_interval_read_begin,
    mmu_interval_set_seq,
)
from mm.pgtable import pte_offset, pte_pfn
from mm.process import Process
from mm.typing import PAGE_SHIFT, PAGE_SIZE
from mm.vmscan import reclaim_pages

SIZE: Final = 256 << 20
RESIDENT: Final = 64 << 20
ROUNDS: Final = 7

Work: TypeAlias = Callable[[Process, int], object]  # on a range at an address


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    against: what it is held against, with what that took in the same run; ratio: how it compares,
    for a copy so that 1 is as fast as the copy and more is faster; None where it stands alone.
    """

    name: str
    value: float
    unit: str
    against: str
    ratio: float | None


def figures(names: Iterable[str] | None = None) -> Iterator[Figure]:
    """Measure the figures called *names*, by default all, in order.

    Raises InvalidArgument for a name that is none, before anything is measured.
    """
    chosen = list(FIGURES) if names is None else list(names)
    for name in chosen:
        if name not in FIGURES:
            raise InvalidArgument(f"no figure is called {name!r}; there are {', '.join(FIGURES)}")
    return (FIGURES[name](name) for name in chosen)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _open_numpy(machine: Machine, memory: Size) -> Any:
    """A numpy device, whose package this one does not know."""
    return load_driver("numpy")(machine, memory)


class _Bench:
    """A machine and a device with room for *size* bytes, all their memory touched."""

    def __init__(self, swap: Size = "0", size: int = SIZE) -> None:
        self.size = size
        self.machine = Machine(("1GiB",), swap)
        if self.machine.mem.swap.contents is not None:
            self.machine.mem.swap.contents[:] = 1
        self.gpu = _open_numpy(self.machine, self.size)
        assert self.machine.mem.payload is not None
        self.machine.mem.payload[: self.machine.mem.max_pfn] = 1
        self.gpu.memory[:] = 1

    def against_copy(self, name: str, prepare: Work, work: Work) -> Figure:
        """Time work(process, addr) on its bytes after prepare(process, addr), and a copy."""
        source, target = np.ones((2, self.size), dtype=np.uint8)
        copy = spent = float("inf")
        for _ in range(ROUNDS):
            copy = min(copy, _seconds(lambda: np.copyto(target, source)))
            with self.machine.spawn("bench") as process:
                addr = process.mmap(self.size)
                prepare(process, addr)
                spent = min(spent, _seconds(partial(work, process, addr)))
        against = f"np.copyto of {format_size(self.size)}: {copy * 1e3:.1f} ms"
        return Figure(name, spent * 1e3, "ms", against, copy / spent)

    def touch(self, process: Process, addr: int) -> None:
        """Give every page of the range a frame, by a CPU store."""
        process.touch(addr, self.size)

    def store(self, process: Process, addr: int) -> None:
        """Fill every page of the range."""
        process.write(addr, np.ones(self.size, dtype=np.uint8))

    def touch_scattered(self, process: Process, addr: int) -> None:
        """The same, and then deal the frames out among the pages at random."""
        self.touch(process, addr)
        mem, pages = self.machine.mem, np.arange(self.size >> PAGE_SHIFT)
        at = pte_offset(mem.tables, process.mm.pgd, addr + pages * PAGE_SIZE)
        dealt = np.random.default_rng(1).permutation(pages)
        mem.index[pte_pfn(mem.tables.entries[at])[dealt]] = (addr >> PAGE_SHIFT) + pages
        mem.tables.entries[at] = mem.tables.entries[at][dealt]

    def to_device(self, process: Process, addr: int) -> None:
        """Migrate the range to the device."""
        self.gpu.to_device(process, addr, self.size)

    def to_system(self, process: Process, addr: int) -> None:
        """Migrate it back."""
        self.gpu.to_system(process, addr, self.size)

    def page_out(self, process: Process, addr: int) -> None:
        """Have the range reclaimed."""
        mem, pages = self.machine.mem, np.arange(addr, addr + self.size, PAGE_SIZE)
        at = pte_offset(mem.tables, process.mm.pgd, pages)
        reclaim_pages(mem, pte_pfn(mem.tables.entries[at]))

    def on_device(self, process: Process, addr: int) -> None:
        """Give every page of the range a page of the device."""
        self.touch(process, addr)
        self.to_device(process, addr)


def migrate_to_device(name: str) -> Figure:
    """256 MiB of touched pages, contents and all, into device memory."""
    bench = _Bench()
    return bench.against_copy(name, bench.touch, bench.to_device)


def migrate_overlapped(name: str) -> Figure:
    """512 MiB into device memory, in two pieces that its engines copy beside the bookkeeping."""
    bench = _Bench(size=2 * SIZE)
    return bench.against_copy(name, bench.touch, bench.to_device)


def migrate_to_system(name: str) -> Figure:
    """The same way back."""
    bench = _Bench()
    return bench.against_copy(name, bench.on_device, bench.to_system)


def migrate_scattered(name: str) -> Figure:
    """256 MiB into device memory, from frames in random order."""
    bench = _Bench()
    return bench.against_copy(name, bench.touch_scattered, bench.to_device)


def touch(name: str) -> Figure:
    """First store to each page of 256 MiB: a zeroed frame for every fault."""
    bench = _Bench()
    return bench.against_copy(name, lambda process, addr: None, bench.touch)


def reclaim(name: str) -> Figure:
    """256 MiB of pages, contents and all, out to swap."""
    bench = _Bench(swap=2 * SIZE + PAGE_SIZE)
    return bench.against_copy(name, bench.store, bench.page_out)


def _cost_per_page(pages: int) -> float:
    """Nanoseconds that a page's migration to the device costs without its contents."""
    machine = Machine(("1GiB",), payload=False)
    gpu = _open_numpy(machine, SIZE)
    spent = float("inf")
    for _ in range(3 * ROUNDS):
        with machine.spawn("bench") as process:
            addr = process.mmap(pages * PAGE_SIZE)
            process.touch(addr, pages * PAGE_SIZE)
            work = partial(gpu.to_device, process, addr, pages * PAGE_SIZE)
            spent = min(spent, _seconds(work))
    return spent / pages * 1e9


def cost_per_page_512(name: str) -> Figure:
    """What is left of a migration of 2 MiB when nothing is copied, for each page."""
    return Figure(name, _cost_per_page(512), "ns", "alone", None)


def cost_per_page_65536(name: str) -> Figure:
    """The same of 256 MiB; ratio: its cost as a multiple of that of 2 MiB."""
    small, large = _cost_per_page(512), _cost_per_page(65536)
    return Figure(name, large, "ns", f"a page of 512: {small:.0f} ns", large / small)


def fork(name: str) -> Figure:
    """fork() of a process with 256 MiB of touched pages, for each page.

    ratio: its cost as a multiple of that of a page's migration, in which nothing is copied either.
    """
    pages, machine = SIZE >> PAGE_SHIFT, Machine(("1GiB",), payload=False)
    spent = float("inf")
    for _ in range(3 * ROUNDS):
        with machine.spawn("bench") as process:
            process.touch(process.mmap(SIZE), SIZE)
            children: list[Process] = []
            spent = min(spent, _seconds(lambda: children.append(process.fork())))  # noqa: B023
            children[0].exit()
    cost, moving = spent / pages * 1e9, _cost_per_page(pages)
    return Figure(name, cost, "ns", f"a page's migration: {moving:.0f} ns", cost / moving)


def _cost_per_mapping(processes: int) -> float:
    """Nanoseconds that a migration to the device costs for each page and process that maps it."""
    machine = Machine(("256MiB",), payload=False)
    gpu = _open_numpy(machine, RESIDENT)
    spent = float("inf")
    for _ in range(3 * ROUNDS):
        process = machine.spawn("bench")
        addr = process.mmap(RESIDENT)
        process.touch(addr, RESIDENT)
        family = [process, *(process.fork() for _ in range(processes - 1))]
        spent = min(spent, _seconds(partial(gpu.to_device, process, addr, RESIDENT)))
        for member in family:
            member.exit()
    return spent / (RESIDENT >> PAGE_SHIFT) / processes * 1e9


def rmap_shared(name: str) -> Figure:
    """64 MiB that eight processes share migrate, for each page and process.

    ratio: its cost as a multiple of what it is where one process has the pages.
    """
    alone, shared = _cost_per_mapping(1), _cost_per_mapping(8)
    return Figure(name, shared, "ns", f"of one process: {alone:.0f} ns", shared / alone)


def fault_back_1(name: str) -> Figure:
    """The CPU loads from a page in device memory: fault, migration and load."""
    machine = Machine(("64MiB",))
    gpu = _open_numpy(machine, "16MiB")
    process = machine.spawn("bench")
    pages = 512
    addr = process.mmap(pages * PAGE_SIZE)
    spent = []
    for _ in range(3 * ROUNDS):
        process.touch(addr, pages * PAGE_SIZE)
        gpu.to_device(process, addr, pages * PAGE_SIZE)
        loads = [partial(process.read, addr + page * PAGE_SIZE, 8) for page in range(0, pages, 4)]
        spent.append(np.median([_seconds(load) for load in loads]))
    return Figure(name, float(min(spent)) * 1e6, "us", "alone", None)


class _Interval(MmuIntervalNotifier):
    """Watches everything, and lets readers collide."""

    def invalidate(self, invalid: MmuNotifierRange, cur_seq: int) -> bool:
        mmu_interval_set_seq(self, cur_seq)
        return True


def hmm_range_512(name: str) -> Figure:
    """hmm_range_fault() on 512 pages that are there: a snapshot of one page table."""
    machine, pages = Machine(("64MiB",), payload=False), 512
    process, watch = machine.spawn("bench"), _Interval()
    addr = process.mmap(pages * PAGE_SIZE)
    process.touch(addr, pages * PAGE_SIZE)
    end = addr + pages * PAGE_SIZE
    mmu_interval_notifier_insert(watch, process.mm, addr, end)
    words = np.zeros(pages, dtype=np.uint64)
    spent = float("inf")
    with process.mm.mmap_sem.read():
        for _ in range(100 * ROUNDS):
            snapshot = HmmRange(watch, mmu_interval_read_begin(watch), addr, end, words)
            spent = min(spent, _seconds(partial(hmm_range_fault, snapshot)))
    return Figure(name, spent * 1e6, "us", "alone", None)


def _device_access(name: str, access: str) -> Figure:
    """*access*(process, addr, buffer) of a device to RESIDENT bytes that it holds."""
    machine = Machine(("256MiB",))
    gpu, process = _open_numpy(machine, RESIDENT), machine.spawn("bench")
    addr = process.mmap(RESIDENT)
    process.touch(addr, RESIDENT)
    gpu.to_device(process, addr, RESIDENT)
    source, target, buffer = np.ones((3, RESIDENT), dtype=np.uint8)
    work = partial(getattr(gpu, access), process, addr, buffer)
    copy = spent = float("inf")
    for _ in range(3 * ROUNDS):
        copy = min(copy, _seconds(partial(np.copyto, target, source)))
        spent = min(spent, _seconds(work))
    against = f"np.copyto of {format_size(RESIDENT)}: {copy * 1e3:.1f} ms"
    return Figure(name, spent * 1e3, "ms", against, copy / spent)


def device_read_resident(name: str) -> Figure:
    """The device loads 64 MiB of its own memory, through its page table, into a buffer."""
    return _device_access(name, "readinto")


def device_write_resident(name: str) -> Figure:
    """It stores as much."""
    return _device_access(name, "write")


def invalidate(name: str) -> Figure:
    """munmap() of 64 MiB that a device maps: it forgets them, and all pages are free."""
    machine = Machine(("256MiB",), payload=False)
    gpu, process = _open_numpy(machine, RESIDENT), machine.spawn("bench")
    spent = float("inf")
    for _ in range(3 * ROUNDS):
        addr = process.mmap(RESIDENT)
        process.touch(addr, RESIDENT)
        gpu.to_device(process, addr, RESIDENT)
        spent = min(spent, _seconds(partial(process.munmap, addr, RESIDENT)))
    return Figure(name, spent / (RESIDENT >> PAGE_SHIFT) * 1e9, "ns", "alone", None)


def _read_file(name: str, *, cached: bool) -> Figure:
    """read(2) of a file of RESIDENT bytes on a disk, a file of the host, into a buffer."""
    machine = Machine(("256MiB",))
    source, target, buffer = np.ones((3, RESIDENT), dtype=np.uint8)
    copy = spent = float("inf")
    with (
        TemporaryDirectory() as folder,
        machine.mount(Path(folder) / "disk", size="96MiB") as fs,
        fs.create("file") as file,
    ):
        file.write(0, source)
        file.fsync()
        for _ in range(3 * ROUNDS if cached else ROUNDS):
            copy = min(copy, _seconds(partial(np.copyto, target, source)))
            if not cached:
                machine.drop_caches()
            spent = min(spent, _seconds(partial(file.readinto, 0, buffer)))
    against = f"np.copyto of {format_size(RESIDENT)}: {copy * 1e3:.1f} ms"
    return Figure(name, spent * 1e3, "ms", against, copy / spent)


def file_read(name: str) -> Figure:
    """read(2) of 64 MiB of a file that is in the page cache."""
    return _read_file(name, cached=True)


def file_read_cold(name: str) -> Figure:
    """The same when nothing of it is in memory, but all in the host's."""
    return _read_file(name, cached=False)


def run_sqlite_50(name: str) -> Figure:
    """Page touches in a second of `hmm run sqlite --memory 50%`."""
    trace = load_trace("sqlite")
    spent = float("inf")
    for _ in range(2):
        machine = machine_for(trace)
        gpu = _open_numpy(machine, trace.footprint.size // 2 * PAGE_SIZE)
        report = replay(trace, machine, machine.spawn(trace.name), gpu)
        spent = min(spent, report.wall_s)
    return Figure(name, trace.events / spent, "touches/s", "alone", None)


def conformance_suite(name: str) -> Figure:
    """All rules of `hmm check` on the numpy device."""
    suite, driver = load_suite(), load_driver("numpy")
    verdicts: list[Verdict] = []
    spent = _seconds(lambda: verdicts.extend(suite(driver)))
    kept = sum(verdict.outcome == "pass" for verdict in verdicts)
    return Figure(name, spent, "s", f"{kept} of {len(verdicts)} rules kept", None)


def boot_1tib(name: str) -> Figure:
    """Boot of a machine with 1 TiB and no contents."""
    booted = []
    spent = _seconds(lambda: booted.append(Machine(("1TiB",), payload=False)))
    return Figure(name, spent, "s", "alone", None)


def boot_1tib_bytes_per_page(name: str) -> Figure:
    """What the columns take for each page of such a machine; struct page takes 64 bytes."""
    machine = Machine(("1TiB",), payload=False)
    size = machine.metadata_bytes_per_page
    return Figure(name, size, "bytes", "struct page: 64 bytes", 64 / size)


FIGURES: Final[dict[str, Callable[[str], Figure]]] = {
    measure.__name__: measure
    for measure in (
        migrate_to_device,
        migrate_overlapped,
        migrate_to_system,
        migrate_scattered,
        touch,
        reclaim,
        cost_per_page_512,
        cost_per_page_65536,
        fork,
        rmap_shared,
        fault_back_1,
        hmm_range_512,
        device_read_resident,
        device_write_resident,
        invalidate,
        file_read,
        file_read_cold,
        run_sqlite_50,
        conformance_suite,
        boot_1tib,
        boot_1tib_bytes_per_page,
    )
}
