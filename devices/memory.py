"""A device's memory as the mm core sees it: the two callbacks, faults from the CPU, eviction.

`Driver` (devices/driver.py) is the class to derive from; this half of it moves pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, ClassVar, Final

import numpy as np

from devices.chunks import Chunks, chunk_pages
from devices.dma_fence import DmaFence
from devices.in_flight import InFlight, Stranded
from devices.moved import Moved, Stats
from devices.ops import DeviceOps
from devices.ranges import page_mask, vma_spans
from hmm.device_pgtable import DevicePageTable, migrated_entries
from hmm.migrate import migrate_vma
from hmm.migrate_pfn import (
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MigratePfns,
    is_migrating,
    is_valid,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from hmm.migrate_pieces import migrate_vma_pieces
from hmm.migration import MigrateVmaSelect
from mm.device_exclusive import restore_exclusive_pages
from mm.errors import DriverBug, InvalidArgument
from mm.filemap import lock_new_page, unlock_page
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.machine import Machine
from mm.memparse import Size, memparse
from mm.mempolicy import alloc_pages_vma
from mm.memremap import (
    FREE_REFCOUNT,
    devm_memremap_pages,
    devm_memunmap_pages,
    pages_in_use,
)
from mm.mmap import vmas_in
from mm.pagewalk import walk_page_range
from mm.pgtable import PMD_SIZE, pte_devmap, pte_pfn, pte_present, pte_write
from mm.process import Process
from mm.rmap import rmap_walk
from mm.sched import running
from mm.swap import get_page, put_page
from mm.swapops import is_device_private_entry, is_write_device_private_entry, swp_offset
from mm.types import MemoryType, MmStruct, Vma, VmFault
from mm.typing import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Addresses,
    Indices,
    Mask,
    Payload,
    Pfns,
    Ptes,
    number,
    word,
)
from mm.vectors import chosen, distinct, every, frozen, pieces, places, rows, some

TRANSFER_PAGES: Final = 1 << 16  # of one migrate_vma() call: memcpy() is at its best on 256 MiB

_SERVED: Final = VmFault(0)
_SHIFT: Final = number(PAGE_SHIFT)
_PAGE_TO_MOVE: Final = word(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)


class Direction(Enum):
    """What a migration is for; travels as `private` of migrate_vma()."""

    TO_DEVICE = "to device"
    TO_SYSTEM = "to system"


KINDS: Final = {"private": MemoryType.DEVICE_PRIVATE, "public": MemoryType.DEVICE_PUBLIC}
SELECT_OWN: Final = {
    MemoryType.DEVICE_PRIVATE: int(MigrateVmaSelect.DEVICE_PRIVATE),
    MemoryType.DEVICE_PUBLIC: int(MigrateVmaSelect.DEVICE_COHERENT),
}
_SELECT_SYSTEM: Final = int(MigrateVmaSelect.SYSTEM)


class DeviceMemory(ABC):
    """Pages of a device, registered as ZONE_DEVICE memory.

    kind: "private", memory that only the device can touch, or "public", which the CPU maps and
    touches as its own; its contents are the device's rows of the machine's. limit: how many pages
    may be in use at a time; npages unless somebody sets it lower. ops: what is asked to allocate
    and copy; the driver itself, unless it is wrapped (devices/wrappers.py). timeout: for how many
    seconds a copy that is under way is waited for.
    """

    kinds: ClassVar[tuple[str, ...]] = ("private",)  # that the driver can be opened with
    engines = 0  # how many copies can be under way while others begin
    timeout = 10.0

    # What a driver has or has not (devices/ops.py).
    clear: Callable[[Indices], None] | None = None
    copy_peer: Callable[[Indices, DeviceOps, Indices], Mask | DmaFence | None] | None = None
    prefetch: Callable[[Addresses, int, int], Addresses] | None = None
    power_off: Callable[[], None] | None = None

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
        self.name = name or f"{type(self).__name__.lower()}{self.count(machine)}"
        if kind not in self.kinds:
            has = " or ".join(f'"{one}"' for one in self.kinds)
            raise InvalidArgument(f"{self.name}: kind={kind!r}: device memory is {has}")
        self.type = KINDS[kind]
        self.owner: object = self
        self.machine = machine
        self.mem = machine.mem
        self.npages = memparse(memory) >> PAGE_SHIFT
        if not self.npages:
            raise InvalidArgument(
                f"{self.name}: memory={memory!r} is less than a page of {PAGE_SIZE}"
            )
        self.limit = self.npages
        self.chunk_pages = chunk_pages(self.name, chunk, self.npages)
        self.neighbour_pages = max(1, memparse(neighbours) >> PAGE_SHIFT)
        self.zone = devm_memremap_pages(self.mem, self, self.npages)
        self.chunks = Chunks(self.npages, self.chunk_pages)
        self.tables: dict[MmStruct, DevicePageTable] = {}
        self.stats = Stats()
        self.closed = False
        self.stranded = Stranded(self.mem)
        self.ops: DeviceOps = self

    @classmethod
    def count(cls, machine: Machine) -> int:
        """How many devices of this class are plugged into *machine*."""
        zones = [zone for zone in machine.mem.zones if zone is not None]
        return sum(isinstance(zone.pgmap, cls) for zone in zones)

    # What a driver writes.

    @abstractmethod
    def allocate(self, npages: int) -> Indices:
        """Up to *npages* free pages, as numbers from 0; fewer, or none, when the device is full."""

    @abstractmethod
    def free(self, pages: Indices) -> None:
        """*pages* are not used any more."""

    @abstractmethod
    def copy_in(self, pages: Indices, system: Payload, rows: Pfns) -> DmaFence | None:
        """Copy row rows[i] of *system* memory, uint8[n, 4096], to device page pages[i]."""

    @abstractmethod
    def copy_out(self, pages: Indices, system: Payload, rows: Pfns) -> Mask | DmaFence | None:
        """Copy device page pages[i] to row rows[i] of *system*.

        Returns None, or True for pages whose contents are lost for good.
        """

    # What a user calls.

    def to_device(self, process: Process, addr: int, nbytes: Size) -> Moved:
        """Migrate the pages of [*addr*, *addr* + *nbytes*) here, evicting others to make room.

        Where the range is larger than the device, its end stays in system memory.
        Raises InvalidRange where something in the range is not mapped.
        """
        self._check_open()
        moved = Moved()
        mm = process.mm
        with running(process), mm.mmap_sem.read():
            spans = vma_spans(mm, addr, memparse(nbytes))
            self._make_room_for(mm, spans)
            for vma, start, end in spans:
                self._migrate(vma, start, end, Direction.TO_DEVICE, moved)
        return moved

    def _make_room_for(self, mm: MmStruct, spans: Sequence[tuple[Vma, int, int]]) -> None:
        """make_room() for what is not here of *spans*; what it evicts may be of them too."""
        if sum(end - start for _, start, end in spans) >> PAGE_SHIFT <= self.free_pages:
            return
        asked = -1
        missing = sum(self._missing(mm, start, end) for _, start, end in spans)
        while missing > asked:
            self.make_room(missing)
            asked = missing
            missing = sum(self._missing(mm, start, end) for _, start, end in spans)

    def _missing(self, mm: MmStruct, start: int, end: int) -> int:
        """Pages of a range that are not in this device's memory."""
        here = 0
        for run in walk_page_range(self.mem.tables, mm.pgd, start, end, holes=False):
            here += int(np.count_nonzero(self.own(run.ptes)[0]))
        return ((end - start) >> PAGE_SHIFT) - here

    def own(self, ptes: Ptes) -> tuple[Mask, Pfns, Mask]:
        """Which of a CPU's entries *ptes* are for pages of this device, which pages, and which of
        them may be stored to; the last two mean nothing for the others."""
        if self.type is MemoryType.DEVICE_PRIVATE:
            there, writable = is_device_private_entry(ptes), is_write_device_private_entry(ptes)
            pfns = swp_offset(ptes)
        else:
            there, writable = pte_present(ptes) & pte_devmap(ptes), pte_write(ptes)
            pfns = pte_pfn(ptes)
        there[there] = self.mem.zone[pfns[there]] == self.zone.index
        return there, pfns, writable

    def to_system(self, process: Process, addr: int, nbytes: Size) -> Moved:
        """Migrate the pages of [*addr*, *addr* + *nbytes*) that are here back."""
        moved = Moved()
        mm = process.mm
        with running(process), mm.mmap_sem.read():
            for vma, start, end in vma_spans(mm, addr, memparse(nbytes)):
                self._migrate(vma, start, end, Direction.TO_SYSTEM, moved)
        return moved

    @property
    def free_pages(self) -> int:
        """Pages that nobody uses and somebody may."""
        return self.chunks.free_pages - (self.npages - self.limit)

    def make_room(self, npages: int) -> None:
        """Evict the oldest chunks until *npages*, or all pages, are free or nothing moves."""
        if self.stranded:
            self.stranded.reap()
        wanted = min(npages, self.limit)
        for chunk in self.chunks.oldest_first().tolist():
            if self.free_pages >= wanted:
                return
            self.evict(self.chunks.pages_of(chunk))

    def evict(self, pages: Indices) -> Moved:
        """Migrate those of *pages* that are in use to system memory, whoever maps them."""
        moved = Moved()
        pfns = self.zone.start_pfn + pages
        mapped = pfns[self.mem.mapcount[pfns] > 0]
        where: dict[MmStruct, list[Addresses]] = {}
        for vma, _, addrs in rmap_walk(self.mem, mapped):
            where.setdefault(vma.vm_mm, []).append(addrs)
        for mm, addrs_of_mm in where.items():
            self._migrate_addrs(
                mm, np.unique(np.concatenate(addrs_of_mm)), Direction.TO_SYSTEM, moved
            )
        self.stats.evicted_pages += moved.migrated
        return moved

    def close(self) -> None:
        """Evict everything and take the device away; a second call does nothing.

        What devices have for themselves of its memory, they give back first. Raises Busy, and the
        device stays, where a page cannot leave, or is just coming, or a copy that hangs may write
        to somebody's frames yet.
        """
        if self.closed:
            return
        with self.mem.locks.atomic:
            self.closed = True  # from now on nothing comes here
        try:
            self.stranded.reap()
            if self.type is MemoryType.DEVICE_PUBLIC:
                restore_exclusive_pages(self.mem, pages_in_use(self.mem, self.zone))
            self.evict(np.arange(self.npages))
            self.stranded.check_none(self.name)
            devm_memunmap_pages(self.mem, self.zone)
        except BaseException:
            self.closed = False
            raise
        tables, self.tables = self.tables, {}
        for table in tables.values():
            if not table.mm.exited:
                table.close()
        if self.ops.power_off is not None:
            self.ops.power_off()

    # What the mm core calls.

    def page_fault(self, vma: Vma, addrs: Addresses, pfns: Pfns, *, write: bool) -> VmFault:
        """A CPU touched *addrs*: bring those pages back, then their neighbours if wanted."""
        moved = Moved()
        self._migrate_in(vma, addrs, Direction.TO_SYSTEM, moved)
        if moved.stayed["not_chosen"]:
            return VmFault.OOM
        if self.neighbour_pages > 1:
            size = self.neighbour_pages << PAGE_SHIFT
            for block in distinct(addrs // size):
                start, end = max(block * size, vma.vm_start), min((block + 1) * size, vma.vm_end)
                self._migrate(vma, start, end, Direction.TO_SYSTEM, moved)
        return _SERVED

    def page_free(self, pfns: Pfns) -> None:
        """The mm core lets go of *pfns*."""
        pages = pfns - self.zone.start_pfn
        self.chunks.give(pages)
        self.ops.free(pages)

    def alloc_and_copy(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> InFlight | None:
        """Linux: alloc_and_copy() of struct migrate_vma_ops."""
        if self.stranded:
            self.stranded.reap()
        # What is about to be copied may not change under the copy.
        table = self.tables.get(vma.vm_mm)
        if table is not None:
            table.unmap(start + (places(src & MIGRATE_PFN_MIGRATE) << _SHIFT))
        if private is Direction.TO_DEVICE:
            return self._copy_to_device(vma.vm_mm, src, dst)
        return self._copy_to_system(vma, start, src, dst)

    def finalize_and_map(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> None:
        """Linux: finalize_and_map() of struct migrate_vma_ops."""
        moved = places(is_migrating(src) & is_valid(dst))
        if private is Direction.TO_DEVICE:
            mm, addrs = vma.vm_mm, start + (moved << PAGE_SHIFT)
            here = rows(moved)
            table, words = self.table_of(mm), dst[here]
            with mm.page_table_lock:
                there, writable = migrated_entries(mm, addrs, src[here], words)
                if not every(there):
                    addrs, words, writable = addrs[there], words[there], writable[there]
                table.map(addrs, migrate_pfn_to_pfn(words), writable)
            self.stats.pages_to_device += moved.size
        else:
            self.stats.pages_to_system += moved.size

    # How it is done.

    def _check_open(self) -> None:
        if self.closed:
            raise InvalidArgument(f"{self.name} is closed")

    def table_of(self, mm: MmStruct) -> DevicePageTable:
        """The device's page table for *mm*, made at first use."""
        table = self.tables.get(mm)
        if table is None:
            with self.mem.locks.atomic:
                self._check_open()
                self.tables = {m: table for m, table in self.tables.items() if not m.exited}
                table = self.tables.setdefault(mm, DevicePageTable(mm, self.owner))
        return table

    def _copy_to_device(self, mm: MmStruct, src: MigratePfns, dst: MigratePfns) -> InFlight | None:
        entries, pages = self.take(mm, dst, places(is_migrating(src)))
        if self.mem.payload is None or not pages.size:
            return None
        words = src[rows(entries)]
        full = is_valid(words)
        fence = None
        if every(full):
            fence = self.ops.copy_in(pages, self.mem.payload, migrate_pfn_to_pfn(words))
        else:
            fence = self._clear(pages[~full])
            if fence is not None:
                InFlight(self, fence, dst, entries[~full])()
                fence = None
            if some(full):
                frames = migrate_pfn_to_pfn(words[full])
                fence = self.ops.copy_in(pages[full], self.mem.payload, frames)
                entries = entries[full]
        self.stats.bytes_to_device += int(np.count_nonzero(full)) * PAGE_SIZE
        return None if fence is None else InFlight(self, fence, dst, entries)

    def take(self, mm: MmStruct, dst: MigratePfns, entries: Indices) -> tuple[Indices, Indices]:
        """Name free pages in *dst* for *entries*, or for the first of them, of a range of *mm*.

        Which entries got one, and the pages, as numbers from 0.
        """
        with self.mem.locks.atomic:  # a device that closes finds no page here, or it in use
            self._check_open()
            self.table_of(mm)
            pages = self.ops.allocate(entries.size)
            pfns = frozen(self.zone.start_pfn + pages)
            self._check_allocated(pages, pfns, entries.size)
            self.chunks.take(pages)
            entries = entries[: pages.size]
            self._hand_over(dst, entries, pfns)
        return entries, pages

    def _clear(self, pages: Indices) -> DmaFence | None:
        """Fill *pages* with zeros, by copies of the zero page where the driver knows no better."""
        if self.ops.clear is not None:
            self.ops.clear(pages)
            return None
        assert self.mem.payload is not None
        zeros = np.full(pages.size, self.mem.zero_pfn)
        return self.ops.copy_in(pages, self.mem.payload, zeros)

    def _check_allocated(self, pages: Indices, pfns: Pfns, wanted: int) -> None:
        """Raise DriverBug unless *pages*, which are *pfns*, are free ones of this device."""
        outside = (pages < 0) | (pages >= self.npages)
        used = self.mem.refcount[rows(chosen(pfns, ~outside))] != FREE_REFCOUNT
        unordered = not isinstance(rows(pfns), slice) and some(pages[1:] <= pages[:-1])
        repeated = unordered and np.unique(pages).size < pages.size
        if pages.size > wanted or some(outside) or some(used) or repeated:
            raise DriverBug(
                f"{self.name}: allocate({wanted}) returned {pages.size} pages, of which "
                f"{np.count_nonzero(outside)} are not the device's, {np.count_nonzero(used)} are "
                f"in use and {pages.size - np.unique(pages).size} are there twice"
            )

    def _copy_to_system(
        self, vma: Vma, start: int, src: MigratePfns, dst: MigratePfns
    ) -> InFlight | None:
        entries = places((src & _PAGE_TO_MOVE) == _PAGE_TO_MOVE)
        pfns = alloc_pages_vma(vma, start + (entries << _SHIFT), GFP_HIGHUSER_MOVABLE)
        entries = entries[: pfns.size]
        self._hand_over(dst, entries, pfns, referenced=True)
        if self.mem.payload is None or not pfns.size:
            return None
        pages = migrate_pfn_to_pfn(src[rows(entries)]) - self.zone.start_pfn
        lost = self.ops.copy_out(pages, self.mem.payload, pfns)
        self.stats.bytes_to_system += entries.size * PAGE_SIZE
        if isinstance(lost, DmaFence):
            return InFlight(self, lost, dst, entries)
        if lost is not None and some(lost):
            self.give_up(dst, entries[lost])
        return None

    def _hand_over(
        self, dst: MigratePfns, entries: Indices, pfns: Pfns, *, referenced: bool = False
    ) -> None:
        """Name *pfns* in *dst* before anything is copied, so that an error cannot leak them."""
        if not referenced:
            get_page(self.mem, pfns)
        lock_new_page(self.mem, pfns)
        dst[rows(entries)] = migrate_pfn(pfns, MIGRATE_PFN_LOCKED)

    def give_up(self, dst: MigratePfns, entries: Indices) -> None:
        """The contents of *entries* are lost: say so, and free their destinations."""
        pfns = migrate_pfn_to_pfn(dst[entries])
        unlock_page(self.mem, pfns)
        put_page(self.mem, pfns)
        dst[entries] = MIGRATE_PFN_ERROR

    def _migrate(
        self,
        vma: Vma,
        start: int,
        end: int,
        direction: Direction,
        moved: Moved,
        wanted: Mask | None = None,
    ) -> None:
        """migrate_vma() over [*start*, *end*), in pieces whose copies may overlap."""
        to_device = direction is Direction.TO_DEVICE
        select = _SELECT_SYSTEM if to_device else SELECT_OWN[self.type]
        npages = (end - start) >> PAGE_SHIFT
        owner = self.owner
        if npages <= TRANSFER_PAGES:
            src, dst = np.zeros((2, npages), dtype=np.uint64)
            moved.add(
                migrate_vma(
                    self,
                    vma,
                    start,
                    end,
                    src,
                    dst,
                    direction,
                    select=select,
                    pgmap_owner=owner,
                    wanted=wanted,
                )
            )
            return
        bounds = [*range(start, end, TRANSFER_PAGES << PAGE_SHIFT), end]
        for piece in migrate_vma_pieces(
            self, vma, bounds, direction, select=select, pgmap_owner=owner, wanted=wanted
        ):
            moved.add(piece)

    def _migrate_addrs(
        self, mm: MmStruct, addrs: Addresses, direction: Direction, moved: Moved
    ) -> None:
        """Migrate the pages at *addrs* (ascending), wherever they are mapped."""
        with mm.mmap_sem.read():
            for vma in vmas_in(mm, addrs.item(0), addrs.item(-1) + PAGE_SIZE) if addrs.size else ():
                here = addrs[(addrs >= vma.vm_start) & (addrs < vma.vm_end)]
                self._migrate_in(vma, here, direction, moved)

    def _migrate_in(self, vma: Vma, addrs: Addresses, direction: Direction, moved: Moved) -> None:
        """Migrate the pages at *addrs* (ascending) of *vma*, one call for those that lie close."""
        for piece in pieces(addrs[1:] > addrs[:-1] + PMD_SIZE, addrs.size):
            here = addrs[piece]
            start, end = here.item(0), here.item(-1) + PAGE_SIZE
            self._migrate(vma, start, end, direction, moved, page_mask(here, start, end))
