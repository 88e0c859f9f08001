"""A small machine with one process and one device, with sane defaults: where tests begin.

Every world is ended when its test ends (tests/conftest.py): pins and locks are dropped, processes
exit, devices close, `verify()` holds, and every page is free again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from devices import Driver, NumpyDevice
from mm import PAGE_SIZE, Machine, Process
from mm.anon_vma import anon_vma_clone
from mm.filemap import unlock_page
from mm.gup import Pin, make_device_exclusive_range
from mm.memory import pte_offset_alloc
from mm.mmap import exit_mmap
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.page_flags import PG_anon_exclusive, PG_locked
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DEVMAP,
    _PAGE_DIRTY,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    _PAGE_SPECIAL,
    PTE_PFN_MASK,
    pte_offset,
    pte_pfn,
    pte_present,
    pte_write,
)
from mm.rmap import page_add_anon_rmap
from mm.sched import running
from mm.swap import get_page, isolate_lru_page, lru_add_drain_all, put_page, putback_lru_page
from mm.swap_slots import swap_duplicate
from mm.swapops import (
    SWP_EXCLUSIVE,
    SWP_SOFT_DIRTY,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_swap_entry,
    is_write_device_private_entry,
    make_device_exclusive_entry,
    make_device_private_entry,
    swp_offset,
)
from mm.types import VM_EXEC, VM_READ, VM_WRITE, Vma, vm_get_page_prot
from mm.typing import Addresses, Payload, Pfns, Ptes
from mm.vmscan import reclaim_pages

SOMEBODY_ELSE = 60_000  # number of a thread that does not run
_worlds: list[World] = []


@dataclass
class World:
    """A range of *pages* pages at *addr* of *process*, and a device to migrate them to."""

    machine: Machine
    process: Process
    gpu: Driver
    addr: int
    pages: int
    free_at_boot: int
    pins: list[Pin] = field(default_factory=list)
    locked: list[int] = field(default_factory=list)
    isolated: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.pages * PAGE_SIZE

    @property
    def vma(self) -> Vma:
        vma = self.process.find_vma(self.addr)
        assert vma is not None
        return vma

    @property
    def addrs(self) -> Addresses:
        return self.addr + np.arange(self.pages) * PAGE_SIZE

    def at(self, page: int) -> int:
        """Address of *page* of the range."""
        return self.addr + page * PAGE_SIZE

    def ptes(self) -> Ptes:
        """The CPU's page-table entry of each page."""
        pool = self.machine.mem.tables
        return pool.entries[pte_offset(pool, self.process.mm.pgd, self.addrs)]

    def pfns(self) -> Pfns:
        """PFN of each page, wherever it is; -1 where there is none."""
        ptes = self.ptes()
        away = is_device_private_entry(ptes) | is_device_exclusive_entry(ptes)
        return np.where(pte_present(ptes), pte_pfn(ptes), np.where(away, swp_offset(ptes), -1))

    def on_device(self) -> list[bool]:
        """Which pages are in device memory."""
        return self.machine.mem.is_zone_device_page(self.pfns()).tolist()

    def fill(self) -> None:
        """Write each page's own number all over it; see written()."""
        self.process.write(self.addr, self.written())

    def written(self) -> Payload:
        """What fill() writes, uint8[pages, 4096]: a page's number, all over it."""
        raw = np.repeat(np.arange(self.pages) % 251, PAGE_SIZE).astype(np.uint8)
        return raw.reshape(self.pages, PAGE_SIZE)

    def contents(self) -> list[int]:
        """What fill() wrote, by CPU loads: the first byte of each page."""
        return [self.process.read(self.at(page), 1)[0] for page in range(self.pages)]

    def intact(self) -> bool:
        """True if the CPU still reads what fill() wrote, all over each page."""
        return self.written().tobytes() == self.process.read(self.addr, self.nbytes)

    def slots(self) -> Pfns:
        """Slot of each page in swap, 0 where it is elsewhere."""
        ptes = self.ptes()
        return np.where(is_swap_entry(ptes), swp_offset(ptes), 0)

    def pageout(self, *pages: int) -> int:
        """Have *pages*, by default all, reclaimed; how many frames that freed."""
        pfns = self.pfns()[list(pages) if pages else slice(None)]
        return reclaim_pages(self.machine.mem, pfns[pfns >= 0])

    def seen_by(self, process: Process) -> World:
        """The same range of another process, which shares it."""
        return replace(self, process=process, pins=[], locked=[], isolated=[])

    def pin(self, page: int) -> Pin:
        """Hold a reference to *page*, as direct I/O does."""
        pin = self.process.pin(self.at(page), PAGE_SIZE)
        self.pins.append(pin)
        return pin

    def lock(self, page: int) -> None:
        """Let another thread hold the page lock of *page*."""
        pfn = self.pfns().item(page)
        self.machine.mem.flags[pfn] |= PG_locked
        self.machine.mem.lock_owner[pfn] = SOMEBODY_ELSE
        self.locked.append(pfn)

    def unlock(self, page: int) -> None:
        """Let that thread unlock it."""
        pfn = self.pfns().item(page)
        self.locked.remove(pfn)
        unlock_page(self.machine.mem, np.array([pfn]))

    def hold(self, *pfns: int) -> Pin:
        """Take a reference to each of *pfns*, wherever they are, as a driver may."""
        pin = Pin(self.machine.mem)
        pin.pfns = np.array(pfns, dtype=np.int64)
        get_page(self.machine.mem, pin.pfns)
        self.pins.append(pin)
        return pin

    def isolate(self, page: int) -> None:
        """Let somebody else take *page* off the LRU."""
        pfns = self.pfns()[page : page + 1]
        lru_add_drain_all(self.machine.mem)
        assert isolate_lru_page(self.machine.mem, pfns).all()
        self.isolated.extend(pfns.tolist())

    def rewrite(self, pages: Sequence[int], change: Callable[[Ptes], Ptes]) -> None:
        """Let *change* rewrite the entries of *pages*, as other system calls do."""
        pool, mm = self.machine.mem.tables, self.process.mm
        with mmu_notifier_range(mm, self.addr, self.addr + self.nbytes, MmuNotifyEvent.CLEAR):
            at = pte_offset(pool, mm.pgd, self.addrs[list(pages)])
            at = at[pool.entries[at] != 0]
            pool.entries[at] = change(pool.entries[at])

    def write_protect(self, *pages: int) -> None:
        """Take the right to store away from the entries of *pages*, as fork does."""

        def readonly(ptes: Ptes) -> Ptes:
            kinds = (
                (is_device_private_entry, make_device_private_entry),
                (is_device_exclusive_entry, make_device_exclusive_entry),
            )
            found = np.where(pte_present(ptes), ptes & ~_PAGE_RW, ptes)
            for is_entry, make_entry in kinds:
                entries = make_entry(swp_offset(ptes), np.zeros(ptes.size, np.bool_))
                found = np.where(is_entry(ptes), entries | (ptes & SWP_SOFT_DIRTY), found)
            return found

        self.rewrite(pages, readonly)

    def protect(self, prot: str) -> None:
        """Give the whole range other rights, as mprotect does."""
        vma = self.vma
        vma.vm_flags &= ~(VM_READ | VM_WRITE | VM_EXEC)
        for letter in prot:
            vma.vm_flags |= {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC, "-": 0}[letter]
        vma.vm_page_prot = vm_get_page_prot(vma.vm_flags)
        self.write_protect(*range(self.pages))
        kept = PTE_PFN_MASK | _PAGE_SPECIAL | _PAGE_DEVMAP | _PAGE_DIRTY | _PAGE_SOFT_DIRTY
        self.rewrite(
            range(self.pages),
            lambda ptes: np.where(pte_present(ptes), ptes & kept | vma.vm_page_prot, ptes),
        )

    def fork(self, *pages: int) -> Process:
        """A second process that maps *pages* too, read-only as in the first; what fork leaves."""
        mem, child = self.machine.mem, self.machine.spawn("child")
        child.mmap(self.nbytes, addr=self.addr)
        vma = child.find_vma(self.addr)
        assert vma is not None
        anon_vma_clone(vma, self.vma)
        self.write_protect(*pages)
        self.rewrite(pages, lambda ptes: np.where(is_swap_entry(ptes), ptes & ~SWP_EXCLUSIVE, ptes))
        which = list(pages)
        slots, shared = self.slots()[which], self.pfns()[which]
        slots, shared = slots[slots > 0], shared[shared >= 0]
        mem.tables.entries[pte_offset_alloc(child.mm, self.addrs[which])] = self.ptes()[which]
        get_page(mem, shared)
        page_add_anon_rmap(vma, shared)
        mem.flags[shared] &= ~PG_anon_exclusive
        swap_duplicate(mem.swap, slots)
        child.mm.anon_rss += shared.size
        child.mm.swapents += slots.size
        return child

    def make_exclusive(self, *pages: int) -> Pfns:
        """Let a device take *pages* for itself; those that it got, -1 for the others."""
        mem = self.machine.mem
        with running(self.process), self.process.mm.mmap_sem.read():
            pfns = make_device_exclusive_range(self.process.mm, self.addrs[list(pages)], None)
        unlock_page(mem, pfns[pfns >= 0])
        put_page(mem, pfns[pfns >= 0])
        return pfns

    def clear_refs(self, *pages: int) -> None:
        """Forget of *pages* that the CPU has used and changed them."""
        seen = _PAGE_ACCESSED | _PAGE_DIRTY | _PAGE_SOFT_DIRTY
        self.rewrite(pages, lambda ptes: np.where(pte_present(ptes), ptes & ~seen, ptes))

    def let_go(self) -> None:
        """Nobody pins, locks or isolates a page any more."""
        unlock_page(self.machine.mem, np.array(self.locked, dtype=np.int64))
        putback_lru_page(self.machine.mem, np.array(self.isolated, dtype=np.int64))
        self.locked.clear()
        self.isolated.clear()
        for pin in self.pins:
            pin.release()

    def end(self) -> None:
        """Undo everything; all memory must be free and well afterwards."""
        self.let_go()
        self.machine.verify()
        for device in [zone.pgmap for zone in self.machine.mem.zones if zone and zone.pgmap]:
            assert isinstance(device, Driver)
            assert in_step(device), f"{device.name} reaches what no CPU does"
            device.close()
        for mm in tuple(self.machine.mem.mms):
            with mm.mmap_sem.write():
                exit_mmap(mm)
        for file in tuple(self.machine.mem.files):
            file.close()
        for fs in tuple(self.machine.mem.super_blocks):
            fs.unmount()
        self.machine.verify()
        assert ([], {}) == (self.machine.mem.files, self.machine.mem.mappings)
        poisoned = self.machine.mem.num_poisoned_pages
        assert self.free_at_boot == self.machine.nr_free_pages + poisoned
        assert 0 == self.machine.vmstat["nr_page_table_pages"]
        assert 0 == self.machine.mem.swap.inuse_pages
        assert {} == self.machine.mem.anon_vmas
        assert all(0 == g.usage == g.swap_usage for g in self.machine.mem.memcgs.values())


def mapped_range(  # noqa: PLR0913 - each a default that some test varies
    pages: int = 5,
    *,
    filled: bool = True,
    nodes: tuple[str, ...] = ("16MiB",),
    memory: str = "4MiB",
    prot: str = "rw",
    cpus: int = 2,
    payload: bool = True,
    swap: str = "0",
    addr: int | None = None,
    chunk: str | None = None,
    neighbours: int | str = PAGE_SIZE,
    driver: Callable[..., Driver] = NumpyDevice,
    kind: str | None = None,
) -> World:
    """A process with *pages* anonymous pages, each filled with its number, and a device.

    More of them than the machine could hold are not accounted for.
    """
    machine = Machine(nodes, swap, payload, cpus, debug=True, max_physmem="256MiB")
    free = machine.nr_free_pages
    options = {} if kind is None else {"kind": kind}
    gpu = driver(machine, memory, chunk=chunk, neighbours=neighbours, **options)
    process = machine.spawn("train")
    fits = pages <= machine.mem.max_pfn + machine.mem.swap.pages
    flags = "anon|private" if fits else "anon|private|noreserve"
    start = process.mmap(pages * PAGE_SIZE, prot, flags, addr=addr)
    world = World(machine, process, gpu, start, pages, free)
    _worlds.append(world)
    if filled and payload:
        world.fill()
    return world


def track(world: World) -> World:
    """End *world* in place of the last one that was made, of which it is a view."""
    _worlds[-1] = world
    return world


def in_step(gpu: Driver) -> bool:
    """True if the device reaches nothing but what CPUs do, with no more rights."""
    entries = gpu.mem.tables.entries
    for mm, table in gpu.tables.items():
        if not mm.exited:
            addrs, ptes = table.mapped()
            cpu = entries[pte_offset(gpu.mem.tables, mm.pgd, addrs)]
            private = is_device_private_entry(cpu)
            pfns = np.where(private, swp_offset(cpu), pte_pfn(cpu))
            writable = np.where(private, is_write_device_private_entry(cpu), pte_write(cpu))
            there = (pte_present(cpu) | private) & (pfns == pte_pfn(ptes))
            if not (there & (writable | ~pte_write(ptes))).all():
                return False
    return True


@contextmanager
def ended_worlds() -> Iterator[None]:
    """End every world that the block made, if the block itself succeeded."""
    outside = tuple(_worlds)
    _worlds.clear()
    try:
        yield
    finally:
        worlds = tuple(_worlds)
        _worlds[:] = outside
    for world in worlds:
        world.end()
