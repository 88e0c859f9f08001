"""Memory of the reference driver, in chunks that come as they are needed.

The mirrors that processes open are in hmm/dmirror.py. A page remembers in `MemMap.private` which
of them migrated it, as its mirror is the one that forgets it when a CPU takes it back.
Linux: lib/test_hmm.c, v6.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from hmm.migrate import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from hmm.migrate_device import (
    migrate_device_finalize,
    migrate_device_pages,
    migrate_device_range,
)
from hmm.migrate_pfn import (
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MigratePfns,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from hmm.migration import MigrateVma, MigrateVmaSelect
from mm.device_exclusive import restore_exclusive_pages
from mm.errors import Busy, OutOfRange
from mm.filemap import lock_new_page
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.highmem import copy_highpages, reserve_payload
from mm.machine import Machine
from mm.memparse import Size, memparse
from mm.mempolicy import alloc_pages_vma
from mm.memremap import devm_memremap_pages, devm_memunmap_pages, pages_in_use
from mm.mmzone import PageStack, Zone
from mm.page_alloc import alloc_pages_bulk
from mm.pgtable import PMD_SIZE
from mm.sched import current_task
from mm.swap import get_page
from mm.types import MemMap, MemoryType, MmStruct, Vma, VmFault
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Mask, Payload, Pfns, word
from mm.vectors import distinct, pieces, places

CHUNK: Final = 256 << 20  # bytes of device memory that come at a time

_PAGE: Final = word(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)


class Mirror(Protocol):
    """What the device knows of the mirror of one address space."""

    number: int

    def forget(self, addrs: Addresses) -> None:
        """The pages at *addrs* go back to system memory."""


@dataclass(slots=True)
class MigrationRecord:
    """One run of the stages, as the driver saw it.

    kind: "d" to the device, "s" to system memory, "f" for a CPU fault. src0 is src after setup,
    dst what the driver chose, src1 src after migrate_vma_pages(); uint64[npages] each.
    """

    kind: str
    device: int
    mm: MmStruct
    start: int
    npages: int
    errno: int = 0  # of migrate_vma_setup()
    cpages: int = 0
    src0: MigratePfns | None = None
    dst: MigratePfns | None = None
    src1: MigratePfns | None = None


class DmirrorChunk:
    """Device memory that came in one piece. Linux: struct dmirror_chunk."""

    def __init__(self, device: DmirrorDevice) -> None:
        self.device = device
        self.owner: object = device
        self.name = f"hmm_dmirror{device.number}"
        self.type = MemoryType.DEVICE_PUBLIC if device.public else MemoryType.DEVICE_PRIVATE
        mem = device.mem
        self.zone: Zone = devm_memremap_pages(mem, self, device.chunk_pages)
        self.memory: Payload | None = None  # of private pages; public ones are in mem.payload
        if mem.payload is not None and not device.public:
            self.memory = reserve_payload(device.chunk_pages)

    def page_fault(self, vma: Vma, addrs: Addresses, pfns: Pfns, *, write: bool) -> VmFault:
        """Linux: dmirror_devmem_fault()."""
        return self.device.devmem_fault(vma, addrs, pfns)

    def page_free(self, pfns: Pfns) -> None:
        """Linux: dmirror_devmem_free()."""
        self.device.free_pages.push(pfns[::-1])


class DmirrorDevice:
    """One of the reference driver's devices; *public* is what later kernels call coherent.

    chunk: how much memory it adds whenever it has none left. Linux: struct dmirror_device.
    """

    def __init__(
        self, machine: Machine, number: int, *, public: bool = False, chunk: Size = CHUNK
    ) -> None:
        self.mem: MemMap = machine.mem
        self.number = number
        self.public = public
        self.chunk_pages = memparse(chunk) >> PAGE_SHIFT
        self.chunks: list[DmirrorChunk] = []
        self.free_pages = PageStack()
        self.fail_next_alloc = False  # HMM_DMIRROR_FLAG_FAIL_ALLOC: one allocation fails
        self.mirrors: dict[int, Mirror] = {}  # by the number that `private` of a page holds
        self.records: list[MigrationRecord] = []

    @property
    def select(self) -> MigrateVmaSelect:
        """The kind of page that is this device's. Linux: dmirror_select_device()."""
        if self.public:
            return MigrateVmaSelect.DEVICE_COHERENT
        return MigrateVmaSelect.DEVICE_PRIVATE

    def add_mirror(self, mirror: Mirror) -> int:
        """The number for a new *mirror*, above 0."""
        number = 1 + max(self.mirrors, default=0)
        self.mirrors[number] = mirror
        return number

    def alloc_pages(self, count: int, mirror: Mirror) -> Pfns:
        """At most *count* device pages, locked and referenced, for *mirror*'s migration.

        Linux: dmirror_devmem_alloc_page().
        """
        if self.fail_next_alloc:
            self.fail_next_alloc = False
            count -= 1
        while self.free_pages.size < count and self._allocate_chunk():
            pass
        pfns = self.free_pages.pop(count)[::-1]
        self.mem.private[pfns] = mirror.number
        get_page(self.mem, pfns)
        lock_new_page(self.mem, pfns)
        return pfns

    def _allocate_chunk(self) -> bool:
        """Linux: dmirror_allocate_chunk()."""
        try:
            chunk = DmirrorChunk(self)
        except OutOfRange:
            return False
        self.chunks.append(chunk)
        below = self.free_pages.pop(self.free_pages.size)
        self.free_pages.push(np.arange(chunk.zone.start_pfn, chunk.zone.end_pfn)[::-1])
        self.free_pages.push(below)  # what was free before goes first
        return True

    def backing(self, pfns: Pfns) -> Iterator[tuple[Payload, Pfns, Mask]]:
        """Where the contents of *pfns* are, of any memory: array, rows of it, which of *pfns*.

        Linux: BACKING_PAGE().
        """
        mem = self.mem
        assert mem.payload is not None
        private = mem.is_device_private_page(pfns)
        if not private.all():
            yield mem.payload, pfns[~private], ~private
        zones = mem.zone[pfns]
        for index in distinct(zones[private]):
            zone = mem.zones[index]
            assert zone is not None
            here = zones == index
            yield zone.pgmap.memory, pfns[here] - zone.start_pfn, here

    def load(self, pfns: Pfns, out: Payload) -> None:
        """Copy the contents of *pfns*, of any memory, to *out*, uint8[n, 4096]."""
        for memory, rows, here in self.backing(pfns):
            copy_highpages(out, places(here), memory, rows)

    def store(self, pfns: Pfns, data: Payload) -> None:
        """Copy *data*, uint8[n, 4096], to *pfns* of any memory."""
        for memory, rows, here in self.backing(pfns):
            copy_highpages(memory, rows, data, places(here))

    def copy(self, to: Pfns, frm: Pfns) -> None:
        """Copy the contents of frm[i] to to[i]. Linux: copy_highpage()."""
        if self.mem.payload is None:
            return
        for source, frm_rows, here in self.backing(frm):
            for target, to_rows, there in self.backing(to[here]):
                copy_highpages(target, to_rows, source, frm_rows[there])

    def clear(self, pfns: Pfns) -> None:
        """Fill *pfns* with zeros. Linux: clear_highpage()."""
        if self.mem.payload is not None and pfns.size:
            for memory, rows, _ in self.backing(pfns):
                memory[rows] = 0

    # Back to system memory.

    def devmem_fault(self, vma: Vma, addrs: Addresses, pfns: Pfns) -> VmFault:
        """A CPU touched *addrs*, which hold *pfns*: migrate each back.

        The kernel's driver runs the stages once for each page; here one run does those that lie
        close, and each still gets its record. Linux: dmirror_devmem_fault().
        """
        served = VmFault(0)
        for near in pieces(addrs[1:] > addrs[:-1] + PMD_SIZE, addrs.size):
            start, end = addrs[near].item(0), addrs[near].item(-1) + PAGE_SIZE
            wanted = np.zeros((end - start) >> PAGE_SHIFT, dtype=np.bool_)
            wanted[(addrs[near] - start) >> PAGE_SHIFT] = True
            migrate = self.migration(vma, start, end, self.select, wanted)
            migrate_vma_setup(migrate)
            src0 = migrate.src.copy()
            chosen = self.copy_to_system(migrate)
            migrate_vma_pages(migrate)
            migrate_vma_finalize(migrate)
            for i in places(wanted).tolist():
                one = slice(i, i + 1)
                self.records.append(
                    MigrationRecord(
                        "f",
                        self.number,
                        vma.vm_mm,
                        start + (i << PAGE_SHIFT),
                        1,
                        0,
                        int(np.count_nonzero(src0[one] & MIGRATE_PFN_MIGRATE)),
                        src0[one],
                        migrate.dst[one],
                        migrate.src[one],
                    )
                )
            if not chosen:
                served = VmFault.OOM
        return served

    def migration(
        self, vma: Vma, start: int, end: int, select: MigrateVmaSelect, wanted: Mask | None = None
    ) -> MigrateVma:
        """The arguments of one run of the stages."""
        src, dst = np.zeros((2, (end - start) >> PAGE_SHIFT), dtype=np.uint64)
        return MigrateVma(vma, start, end, src, dst, int(select), self, wanted)

    def copy_to_system(self, migrate: MigrateVma) -> bool:
        """Give every device page that can move a frame; False where some got none.

        The mirror that has it forgets it. Linux: dmirror_devmem_fault_alloc_and_copy().
        """
        entries = places((migrate.src & _PAGE) == _PAGE)
        addrs = migrate.start + (entries << PAGE_SHIFT)
        frames = alloc_pages_vma(migrate.vma, addrs, GFP_HIGHUSER_MOVABLE)
        got = entries[: frames.size]
        lock_new_page(self.mem, frames)
        pfns = migrate_pfn_to_pfn(migrate.src[got])
        self._forget(pfns, addrs[: frames.size])
        self.copy(frames, pfns)
        migrate.dst[got] = migrate_pfn(
            frames, MIGRATE_PFN_LOCKED | (migrate.src[got] & MIGRATE_PFN_WRITE)
        )
        return frames.size == entries.size

    def _forget(self, pfns: Pfns, addrs: Addresses) -> None:
        """Let the mirrors that migrated *pfns* forget them."""
        numbers = self.mem.private[pfns]
        for number in distinct(numbers):
            if number in self.mirrors:
                self.mirrors[number].forget(addrs[numbers == number])

    def evict(self) -> None:
        """Migrate every page to system memory, whoever maps it; what is pinned stays.

        Linux: dmirror_device_evict_chunk().
        """
        for chunk in self.chunks:
            pfns = np.arange(chunk.zone.start_pfn, chunk.zone.end_pfn)
            migrate = migrate_device_range(self.mem, chunk.zone, pfns)
            entries = migrate.entries
            task = current_task()
            nid = self.mem.cpu_to_node[task.cpu]
            frames = alloc_pages_bulk(self.mem, GFP_HIGHUSER_MOVABLE, nid, entries.size, task.cpu)
            lock_new_page(self.mem, frames)
            self.copy(frames, migrate.pfns[: frames.size])
            migrate.dst[entries[: frames.size]] = migrate_pfn(frames, MIGRATE_PFN_LOCKED)
            migrate_device_pages(migrate)
            migrate_device_finalize(migrate)

    def remove_chunks(self) -> None:
        """Evict everything and give the chunks back; the next allocation makes new ones.

        What devices have for themselves of it, they give back first. Raises Busy where a page
        cannot leave; then all is as before, but for what was evicted.
        Linux: dmirror_device_remove_chunks().
        """
        for chunk in self.chunks if self.public else ():
            restore_exclusive_pages(self.mem, pages_in_use(self.mem, chunk.zone))
        self.evict()
        npages = len(self.chunks) * self.chunk_pages
        if self.free_pages.size != npages:
            raise Busy(
                f"hmm_dmirror{self.number}: "
                f"{npages - self.free_pages.size} device pages are held by "
                f"somebody; drop those references first"
            )
        self.free_pages.pop(self.free_pages.size)
        for chunk in self.chunks:
            devm_memunmap_pages(self.mem, chunk.zone)
        self.chunks.clear()
