"""The base class of all drivers: what a device does with memory that processes lend it.

Derive from `Driver` and write allocate, free, copy_in and copy_out; its docstring is the tutorial,
docs/writing-a-driver.md builds a driver step by step, and `hmm check` says whether it is right.
Everything else is here: the device's page table, faults from the device, eviction, and bringing
pages back when a CPU touches them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from devices.memory import DeviceMemory, Direction
from devices.moved import Moved
from hmm.device_pgtable import DevicePageTable
from mm.array import ProcessArray
from mm.errors import (
    BusError,
    InvalidArgument,
    InvalidRange,
    OutOfMemory,
    SegmentationFault,
)
from mm.highmem import copy_highpages, memcpy_from_pages, memcpy_to_pages
from mm.locking import cond_resched
from mm.memory import handle_mm_fault
from mm.mmap import TASK_SIZE_MAX, find_vma
from mm.page_cache import set_page_dirty
from mm.pgtable import (
    _PAGE_PRESENT,
    _PAGE_RW,
    PMD_SHIFT,
    PMD_SIZE,
    pte_offset,
    pte_pfn,
    pte_present,
    pte_special,
    pte_write,
)
from mm.process import Process
from mm.trace import TracePoint
from mm.types import VM_FAULT_ERROR, VM_FAULT_USERFAULT, MmStruct, Vma, VmFault
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Indices, Mask, Payload, Pfns, Ptes
from mm.uaccess import access_error, page_range, served_in_vain
from mm.vectors import every, has, pieces, places, some, stretches

gpu_fault: Final = TracePoint("gpu_fault")

STREAM_PAGES: Final = 1 << 12  # that read() and write() move at a time
MAX_ROUNDS: Final = 1000  # of faults that leave a page out of reach, before we call it a lockup


class Driver(DeviceMemory):
    """A device that computes on memory of processes: derive from it to write a driver.

    A driver has its memory, and moves contents. Pages of it are numbers from 0 to npages - 1, and
    come as vectors (int64[n], n > 0). Four methods must be there:

        def allocate(self, npages):            # free pages; fewer, or none, when it is full
        def free(self, pages):                 # they are not used any more
        def copy_in(self, pages, system, rows):    # row rows[i] of system memory to pages[i]
        def copy_out(self, pages, system, rows):   # and back; None, or True where it is lost

    `system` is the machine's memory, uint8[frames, 4096], or a buffer like it. Whoever calls has
    locked both sides, so nobody else reads or writes them. A copy that fails raises `DeviceError`:
    what was under way is put back, as copies leave their source alone. What is gone for good
    copy_out() reports, and whoever touches that memory gets a BusError.

    A driver may have more, and is used without what it lacks:

        memory                          # uint8[npages, 4096]; read(), write() and run() need it
        def clear(self, pages):         # zeros; else the zero page is copied in
        def prefetch(self, addrs, start, end):  # faults at addrs: what to bring along as well
        def power_off(self):            # it is empty and goes
        kinds = ("private", "public")   # public: the CPU reaches its memory too

    The constructor begins with super().__init__(machine, memory, kind, ...) and then makes what the
    methods need. From then on processes may use the device: to_device() and to_system() migrate,
    read(), write(), exchange() and run() compute.

    machine: where it is plugged in. memory: its size. chunk: what it evicts at a time, 64 KiB to
    2 MiB. neighbours: how much memory around a page to bring back when a CPU touches the page.
    """

    memory: Payload | None = None  # contents of the device's pages, uint8[npages, 4096]

    def read(self, process: Process, addr: int, nbytes: int) -> bytes:
        """Load *nbytes* at *addr* from the device's side; pages that it lacks migrate here.

        Raises SegmentationFault, BusError, OutOfMemory.
        """
        _check_range(self.name, addr, nbytes)
        out = np.empty(nbytes, dtype=np.uint8)
        self.readinto(process, addr, out)
        return out.tobytes()

    def readinto(self, process: Process, addr: int, buffer: Any) -> None:
        """As read(), filling *buffer*, anything with a buffer that may be written."""
        out = np.frombuffer(buffer, dtype=np.uint8)
        if not out.flags.writeable:
            raise InvalidArgument(f"{self.name}: readinto: the buffer is read-only")
        _check_range(self.name, addr, out.size)

        def load(memory: Payload, begin: int, rows: Pfns) -> None:
            last = begin + (rows.size << PAGE_SHIFT) - begin % PAGE_SIZE
            memcpy_from_pages(out[begin - addr : last - addr], memory, rows, begin % PAGE_SIZE)

        self._stream(process.mm, addr, out.size, load, write=False)

    def write(self, process: Process, addr: int, data: Any) -> None:
        """Store *data* at *addr* from the device's side. Raises as read()."""
        raw = np.frombuffer(data, dtype=np.uint8)
        _check_range(self.name, addr, raw.size)

        def store(memory: Payload, begin: int, rows: Pfns) -> None:
            last = begin + (rows.size << PAGE_SHIFT) - begin % PAGE_SIZE
            memcpy_to_pages(memory, rows, begin % PAGE_SIZE, raw[begin - addr : last - addr])

        self._stream(process.mm, addr, raw.size, store, write=True)

    def resident(self, process: Process, addrs: Addresses, write: Mask) -> Mask:
        """True for *addrs* that the device reaches without a fault, to store where *write*."""
        with process.mm.page_table_lock:
            return _reachable(self.table_of(process.mm).lookup(addrs), write)

    def exchange(
        self, process: Process, addrs: Addresses, words: NDArray[np.uint64], write: Mask
    ) -> NDArray[np.uint64]:
        """Load the 64-bit word at each of *addrs*, then store words[i] there where write[i].

        The addresses are distinct multiples of 8. The pages that the device lacks are one batch
        of faults; where they are more than it has memory, what fits is served and used first.
        Returns what was loaded. Raises SegmentationFault, BusError, OutOfMemory.
        """
        if some(addrs & 7):
            raise InvalidArgument(f"{self.name}: exchange: an address is no multiple of 8")
        if addrs.size:
            _check_range(self.name, int(addrs.min()), int(addrs.max() - addrs.min()) + 8)
        mm = process.mm
        table = self.table_of(mm)
        loaded = np.zeros(addrs.size, dtype=np.uint64)
        rest, rounds = np.arange(addrs.size), 0
        while rest.size:
            with mm.page_table_lock:
                ptes = table.lookup(addrs[rest])
                ready = _reachable(ptes, write[rest])
                now = rest[ready]
                if now.size:
                    self._swap_words(pte_pfn(ptes[ready]), addrs, words, write, now, loaded)
            rounds = 0 if now.size else rounds + 1
            rest = rest[~ready]
            if rest.size:
                self._check_progress(mm, rounds, addrs[rest])
                frames, which = np.unique(addrs[rest] & ~(PAGE_SIZE - 1), return_inverse=True)
                stores = np.zeros(frames.size, dtype=np.bool_)
                np.logical_or.at(stores, which, write[rest])
                self.fault(process, frames, stores)
        return loaded

    def run(
        self,
        kernel: Callable[..., Any],
        *arrays: ProcessArray,
        out: ProcessArray | None = None,
    ) -> None:
        """Run *kernel* on *arrays*, in device memory, through the device's page table.

        It gets an array of the device's kind for each of *arrays*, which it may change in place;
        what it returns, if anything, is stored in *out* (default: the first of *arrays*). Pages
        that do not fit are reached in system memory.
        """
        if not arrays:
            raise InvalidArgument("run: the kernel needs at least one array")
        target = arrays[0] if out is None else out
        used = list(dict.fromkeys((*arrays, target)))
        mm = used[0].mm
        if any(a.mm is not mm for a in used):
            raise InvalidArgument("run: the arrays belong to different processes")
        spans = [page_range(a.addr, a.nbytes) for a in used]
        addrs = np.unique(np.concatenate(spans))
        table = self.table_of(mm)
        everywhere = np.ones(addrs.size, dtype=np.bool_)
        for rounds in range(MAX_ROUNDS + 1):
            with mm.page_table_lock:
                ptes = table.lookup(addrs)
                ready = _reachable(ptes, everywhere)
                if every(ready):
                    self._launch(kernel, arrays, target, used, addrs, pte_pfn(ptes))
                    return
            self._check_progress(mm, rounds, addrs[~ready])
            # All must be there at once: what does not fit is reached where it is.
            self._fault_mm(mm, addrs[~ready], everywhere[~ready], evict=rounds == 0)

    def fault(self, process: Process, addrs: Addresses, write: Mask) -> None:
        """Serve one batch of device faults at *addrs* (ascending page addresses).

        Pages migrate here in order, a 2 MiB block at a time, as many as the device has memory;
        what cannot migrate is mapped where it is. Raises SegmentationFault, BusError,
        OutOfMemory.
        """
        self._fault_mm(process.mm, addrs[: self.limit], write[: self.limit])

    def _fault_mm(self, mm: MmStruct, addrs: Addresses, write: Mask, *, evict: bool = True) -> None:
        self._check_open()
        self.stats.fault_batches += 1
        self.stats.device_faults += addrs.size
        if gpu_fault:
            gpu_fault(device=self.name, process=mm.name, addrs=addrs, write=write)
        if evict:
            self.make_room(addrs.size)
        blocks = addrs >> PMD_SHIFT
        for block in pieces(blocks[1:] != blocks[:-1], blocks.size):
            self._fault_block(mm, addrs[block], write[block])

    def _fault_block(self, mm: MmStruct, addrs: Addresses, write: Mask) -> None:
        """The faults in one 2 MiB block."""
        table = self.table_of(mm)
        with mm.mmap_sem.read():
            for sel in _by_vma(self.name, mm, addrs, write):
                here, stores = addrs[sel], write[sel]
                away = here[~self._map(table, here, stores)]
                if not away.size:
                    continue
                self._migrate_addrs(mm, away, Direction.TO_DEVICE, Moved())
                if self.ops.prefetch is not None:
                    self._bring_along(mm, away, self.ops.prefetch)
                left = ~self._map(table, here, stores)
                if some(left):
                    self._map_remote(table, here[left], stores[left])

    def _bring_along(
        self,
        mm: MmStruct,
        faulted: Addresses,
        prefetch: Callable[[Addresses, int, int], Addresses],
    ) -> None:
        """Migrate what the driver wants with pages that *faulted*, as far as memory is free."""
        vma = find_vma(mm, faulted.item(0))
        assert vma is not None
        block = faulted.item(0) & ~(PMD_SIZE - 1)
        start, end = max(block, vma.vm_start), min(block + PMD_SIZE, vma.vm_end)
        wanted = np.unique(prefetch(faulted, start, end) & ~(PAGE_SIZE - 1))
        wanted = wanted[(wanted >= start) & (wanted < end)]
        more = np.setdiff1d(wanted, faulted, assume_unique=True)[: max(0, self.free_pages)]
        self._migrate_addrs(mm, more, Direction.TO_DEVICE, Moved())

    def _map(self, table: DevicePageTable, addrs: Addresses, write: Mask) -> Mask:
        """Map what the CPU's page table says is in this device's memory; True where it is."""
        mm, pool = table.mm, self.mem.tables
        while True:
            table.settle(addrs.item(0), addrs.item(-1) + PAGE_SIZE)
            with mm.page_table_lock:
                ptes = pool.entries[pte_offset(pool, mm.pgd, addrs)]
                mine, pfns, writable = self.own(ptes)
                mine &= writable | ~write
                if table.map(addrs[mine], pfns[mine], writable[mine]):
                    return mine

    def _map_remote(self, table: DevicePageTable, addrs: Addresses, write: Mask) -> None:
        """Pages that could not migrate: fault them into system memory and map them there."""
        for stores in (True, False):
            left = addrs[write == stores]
            rounds = 0
            while left.size:
                self._check_progress(table.mm, rounds, left)
                rounds += 1
                left = left[~self._map_system(table, left, stores)]
                wanted = np.full(left.size, stores)
                for sel in _by_vma(self.name, table.mm, left, wanted):
                    vma = find_vma(table.mm, left.item(sel.start))
                    assert vma is not None
                    faults = handle_mm_fault(vma, left[sel], write=stores)
                    self._check_faults(left[sel], faults)

    def _map_system(self, table: DevicePageTable, addrs: Addresses, stores: bool) -> Mask:
        """Map what the CPU's page table says is in system memory; True where it is.

        What the device may store to is dirty from now on: no CPU will see its stores.
        """
        mm, pool = table.mm, self.mem.tables
        table.settle(addrs.item(0), addrs.item(-1) + PAGE_SIZE)
        with mm.page_table_lock:
            ptes = pool.entries[pte_offset(pool, mm.pgd, addrs)]
            ready = pte_present(ptes) & (pte_write(ptes) | (not stores))
            writable = pte_write(ptes[ready]) & ~pte_special(ptes[ready])
            if table.map(addrs[ready], pte_pfn(ptes[ready]), writable):
                return ready
        return np.zeros_like(ready)

    def _check_faults(self, addrs: Addresses, faults: NDArray[np.uint16]) -> None:
        bad = places(faults & VM_FAULT_ERROR)
        if bad.size:
            addr = addrs.item(bad[0])
            if faults[bad[0]] & VmFault.OOM:
                raise OutOfMemory(f"{self.name}: no frame for the page at {addr:#x}")
            if faults[bad[0]] & VM_FAULT_USERFAULT:
                raise BusError(addr, f"{self.name}: no device waits for userland at {addr:#x}")
            raise BusError(addr, f"{self.name}: the contents of the page at {addr:#x} are lost")

    def _check_progress(self, mm: MmStruct, rounds: int, addrs: Addresses) -> None:
        if rounds >= MAX_ROUNDS:
            raise served_in_vain(mm, addrs.item(0), f"fault of {self.name}")
        if rounds > 1:
            cond_resched()

    # The device's own loads and stores.

    def _sides(self, pfns: Pfns) -> list[tuple[Payload, Mask, Pfns]]:
        """Contents behind *pfns*: the device's memory, the system's; which; and their rows."""
        if self.mem.payload is None:
            raise InvalidArgument(f"{self.name}: this machine keeps no contents")
        if self.memory is None:
            raise InvalidArgument(f"{self.name}: this driver has no `memory` to compute on")
        local = pfns >= self.zone.start_pfn
        local &= pfns < self.zone.end_pfn
        if every(local):
            return [(self.memory, local, pfns - self.zone.start_pfn)]
        sides = [(self.mem.payload, ~local, pfns[~local])]
        if some(local):
            sides.append((self.memory, local, pfns[local] - self.zone.start_pfn))
        return sides

    def _swap_words(
        self,
        pfns: Pfns,
        addrs: Addresses,
        words: NDArray[np.uint64],
        write: Mask,
        now: Indices,
        loaded: NDArray[np.uint64],
    ) -> None:
        """exchange() for the places *now*, whose pages are *pfns*."""
        for memory, side, rows in self._sides(pfns):
            which = now[side]
            flat = memory.view(np.uint64).reshape(-1)
            at = (rows << (PAGE_SHIFT - 3)) + ((addrs[which] & (PAGE_SIZE - 1)) >> 3)
            loaded[which] = flat[at]
            stores = write[which]
            flat[at[stores]] = words[which[stores]]
        set_page_dirty(self.mem, pfns[write[now]])

    def _stream(
        self,
        mm: MmStruct,
        addr: int,
        nbytes: int,
        move: Callable[[Payload, int, Pfns], None],
        *,
        write: bool,
    ) -> None:
        """Let *move*(memory, address, rows) see every page of a range in order."""
        table = self.table_of(mm)
        addrs = page_range(addr, nbytes)
        need = _PAGE_RW if write else _PAGE_PRESENT
        batch = max(1, min(self.limit, PMD_SIZE >> PAGE_SHIFT))  # of faults
        done, rounds = 0, 0
        while done < addrs.size:
            near = addrs[done : done + STREAM_PAGES]
            with mm.page_table_lock:
                ptes = table.lookup(near)
                ready = has(ptes, need)
                used = near.size if every(ready) else int(np.argmin(ready))
                pfns = pte_pfn(ptes[:used])
                self._move_prefix(addr, near[:used], pfns, move, write=write)
                if write:
                    set_page_dirty(self.mem, pfns)
            done += used
            rounds = 0 if used else rounds + 1
            if used < min(batch, near.size):
                missing = near[:batch][~ready[:batch]]
                self._check_progress(mm, rounds, missing)
                self._fault_mm(mm, missing, np.full(missing.size, write))

    def _move_prefix(
        self,
        addr: int,
        addrs: Addresses,
        pfns: Pfns,
        move: Callable[[Payload, int, Pfns], None],
        *,
        write: bool,
    ) -> None:
        """Let *move* see *pfns*, at *addrs*; it changes what it sees where it is to *write*."""
        for run in stretches(pfns):
            for memory, _, rows in self._sides(pfns[run]):
                move(memory, max(addr, addrs.item(run.start)), rows)

    def _launch(
        self,
        kernel: Callable[..., Any],
        arrays: Sequence[ProcessArray],
        target: ProcessArray,
        used: Sequence[ProcessArray],
        addrs: Addresses,
        pfns: Pfns,
    ) -> None:
        """Run *kernel* on views of the pages at *addrs*, and put back what it changed.

        Arrays that touch or share pages are views of one piece of memory.
        """
        areas = [(addrs[run], pfns[run]) for run in stretches(addrs, PAGE_SIZE)]
        contents = [self._gather(frames) for _, frames in areas]
        starts = np.array([where.item(0) for where, _ in areas])
        views = {}
        for array in used:
            area = int(np.searchsorted(starts, array.addr, side="right")) - 1
            first = array.addr - starts.item(area)
            flat = contents[area].reshape(-1)[first : first + array.nbytes]
            views[array] = flat.view(array.dtype).reshape(array.shape)
        result = kernel(*(views[array] for array in arrays))
        if result is not None and result is not views[target]:
            views[target][...] = result
        for (_, frames), memory in zip(areas, contents, strict=True):
            self._scatter(memory, frames)
        set_page_dirty(self.mem, pfns)

    def _gather(self, pfns: Pfns) -> Payload:
        """The contents of *pfns* in a row: a view where they lie so, else a copy."""
        sides = self._sides(pfns)
        if len(sides) == 1 and len(stretches(pfns)) == 1:
            memory, _, rows = sides[0]
            return memory[rows[0] : rows[0] + rows.size]
        pages = np.empty((pfns.size, PAGE_SIZE), dtype=np.uint8)
        for memory, side, rows in sides:
            copy_highpages(pages, places(side), memory, rows)
        return pages

    def _scatter(self, pages: Payload, pfns: Pfns) -> None:
        for memory, side, rows in self._sides(pfns):
            if not np.shares_memory(pages, memory):
                copy_highpages(memory, rows, pages, places(side))


def _check_range(name: str, addr: int, nbytes: int) -> None:
    if nbytes < 0 or addr < 0 or addr + nbytes > TASK_SIZE_MAX:
        raise InvalidRange(
            f"{name}: [{addr:#x}, {addr + nbytes:#x}) is not inside [0, {TASK_SIZE_MAX:#x})"
        )


def _reachable(ptes: Ptes, write: Mask) -> Mask:
    return pte_present(ptes) & (pte_write(ptes) | ~write)


def _by_vma(name: str, mm: MmStruct, addrs: Addresses, write: Mask) -> list[slice]:
    """Places in *addrs* (ascending) by VMA; raises SegmentationFault where one may not be used."""
    spans, at = [], 0
    while at < addrs.size:
        addr = addrs.item(at)
        vma: Vma | None = find_vma(mm, addr)
        if vma is None or vma.vm_start > addr:
            raise SegmentationFault(addr, f"{name}: nothing is mapped at {addr:#x} of {mm.name}")
        end = int(np.searchsorted(addrs, vma.vm_end))
        stores = some(write[at:end])
        if access_error(vma, write=stores):
            what = "a store" if stores else "a load"
            addr = addrs.item(at + int(np.argmax(write[at:end])))
            raise SegmentationFault(addr, f"{name}: {what} at {addr:#x} is not allowed by {vma!r}")
        spans.append(slice(at, end))
        at = end
    return spans
