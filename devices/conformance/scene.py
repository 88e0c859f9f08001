"""The world in which a rule is tried: a small machine with a process, and what must be in memory.

A driver that wants to be judged by a rule of its own finds here what the others use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from devices.conformance.rule import Broken, Device, NotJudged, Opener
from devices.dma_fence import answer_of
from mm.machine import Machine
from mm.memparse import Size
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_write
from mm.process import Process
from mm.swapops import is_device_private_entry, is_write_device_private_entry, swp_offset
from mm.typing import PAGE_SIZE, Addresses, Indices, Mask, Payload, Pfns, Ptes
from mm.vectors import places


def pattern(npages: int, seed: int) -> Payload:
    """Pages of which no two words are equal, nor equal to those of another *seed*."""
    words = np.arange(1, npages * PAGE_SIZE // 8 + 1, dtype=np.uint64) + np.uint64(seed << 32)
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):  # odd, so that words stay different
        words *= np.uint64(factor)
        words ^= words >> np.uint64(32)
    return words.view(np.uint8).reshape(npages, PAGE_SIZE)


def expect_bytes(expected: Payload, found: Payload | bytes, what: str) -> None:
    """Raise Broken where *found* is not *expected*, at the first byte that differs."""
    got = np.frombuffer(found, dtype=np.uint8) if isinstance(found, bytes) else found.reshape(-1)
    want = expected.reshape(-1)
    wrong = places(got != want)
    if wrong.size:
        page, byte = divmod(wrong.item(0), PAGE_SIZE)
        raise Broken(
            f"{what}: page {page}, byte {byte} is {got[wrong[0]]:#04x} where "
            f"{want[wrong[0]]:#04x} belongs; {wrong.size} of {want.size} bytes differ"
        )


def expect(holds: bool, evidence: str) -> None:
    """Raise Broken with *evidence* unless *holds*."""
    if not holds:
        raise Broken(evidence)


@dataclass
class Area:
    """Anonymous memory of a process, and what its bytes must be."""

    process: Process
    addr: int
    contents: Payload

    @property
    def npages(self) -> int:
        """Its size in pages."""
        return self.contents.shape[0]

    @property
    def nbytes(self) -> int:
        """And in bytes."""
        return self.contents.nbytes

    @property
    def addrs(self) -> Addresses:
        """Addresses of its pages."""
        return self.addr + np.arange(self.npages) * PAGE_SIZE

    def at(self, page: int) -> int:
        """Address of a page."""
        return self.addr + page * PAGE_SIZE

    def store(self, page: int, data: bytes, byte: int = 0) -> None:
        """A CPU stores *data*."""
        self.process.write(self.at(page) + byte, data)
        self.stored(page, data, byte)

    def stored(self, page: int, data: bytes, byte: int = 0) -> None:
        """Somebody has stored *data*."""
        first = page * PAGE_SIZE + byte
        self.contents.reshape(-1)[first : first + len(data)] = np.frombuffer(data, np.uint8)

    def expect_cpu(self, when: str) -> None:
        """A CPU that reads all of it finds what belongs there."""
        expect_bytes(self.contents, self.process.read(self.addr, self.nbytes), f"CPU, {when}")

    def expect_device(self, gpu: Device, when: str) -> None:
        """The same of a device."""
        found = gpu.read(self.process, self.addr, self.nbytes)
        expect_bytes(self.contents, found, f"{gpu.name}, {when}")

    def ptes(self) -> Ptes:
        """The CPU's page-table entry of each page."""
        pool = self.process.mm.mem.tables
        return pool.entries[pte_offset(pool, self.process.mm.pgd, self.addrs)]

    def pfns(self) -> Pfns:
        """PFN of each page, which is in memory somewhere."""
        ptes = self.ptes()
        return np.where(pte_present(ptes), pte_pfn(ptes), swp_offset(ptes))

    def on_device(self, gpu: Device) -> Mask:
        """Which pages are in the device's memory."""
        return gpu.own(self.ptes())[0]

    def fork(self, process: Process) -> Area:
        """The same memory of a child."""
        return Area(process, self.addr, self.contents.copy())


class Scene:
    """A machine of 16 MiB, a process on it, and a device of *memory*."""

    def __init__(
        self,
        opener: Opener,
        memory: Size = "4MiB",
        *,
        nodes: tuple[str, ...] = ("16MiB",),
        payload: bool = True,
    ) -> None:
        self.machine = Machine(nodes, payload=payload, debug=True, max_physmem="256MiB")
        self.process = self.machine.spawn("train")
        self.free_at_boot = self.machine.nr_free_pages
        self.gpu = opener(self.machine, memory)
        self._seed = 0

    @property
    def payload(self) -> Payload:
        """The contents of all frames."""
        payload = self.machine.mem.payload
        assert payload is not None
        return payload

    def area(self, npages: int, *, process: Process | None = None, filled: bool = True) -> Area:
        """New memory, each word of it different; or *filled* is False, and it is zeros."""
        process = process or self.process
        area = Area(
            process, process.mmap(npages * PAGE_SIZE), np.zeros((npages, PAGE_SIZE), dtype=np.uint8)
        )
        if filled:
            self._seed += 1
            area.contents[:] = pattern(npages, self._seed)
            process.write(area.addr, area.contents)
        return area

    def area_on_device(self, npages: int, *, process: Process | None = None) -> Area:
        """The same, migrated to the device."""
        area = self.area(npages, process=process)
        self.gpu.to_device(area.process, area.addr, area.nbytes)
        return area

    def copy_in(self, pages: Indices, rows: Pfns) -> None:
        """Have frames *rows* copied to *pages* of the device, and done."""
        answer_of(self.gpu.ops.copy_in(pages, self.payload, rows), self.gpu.timeout)

    def copy_out(self, pages: Indices, rows: Pfns) -> Mask | None:
        """Have *pages* copied to frames *rows*, and done."""
        return answer_of(self.gpu.ops.copy_out(pages, self.payload, rows), self.gpu.timeout)

    def computing(self) -> Device:
        """The device, which can load and store. Raises NotJudged for one that cannot."""
        if self.gpu.memory is None:
            raise NotJudged("the driver has no `memory` to compute on")
        return self.gpu


def expect_in_step(gpu: Device, when: str) -> None:
    """The device reaches nothing but what CPUs do, with no more rights; else Broken."""
    for mm, table in gpu.tables.items():
        if mm.exited:
            continue
        addrs, ptes = table.mapped()
        cpu = mm.mem.tables.entries[pte_offset(mm.mem.tables, mm.pgd, addrs)]
        private = is_device_private_entry(cpu)
        pfns = np.where(private, swp_offset(cpu), pte_pfn(cpu))
        writable = np.where(private, is_write_device_private_entry(cpu), pte_write(cpu))
        stale = places(~((pte_present(cpu) | private) & (pfns == pte_pfn(ptes))))
        if stale.size:
            raise Broken(
                f"{when}: {stale.size} entries of the device's page table are stale, the first at "
                f"{addrs[stale[0]]:#x} of {mm.name}: {ptes[stale[0]]:#x}, the CPU's is "
                f"{cpu[stale[0]]:#x}"
            )
        beyond = places(pte_write(ptes) & ~writable)
        if beyond.size:
            raise Broken(
                f"{when}: the device may store to {beyond.size} pages that the CPU may not store "
                f"to, the first at {addrs[beyond[0]]:#x} of {mm.name}"
            )


def numbers(*values: int) -> Indices:
    """A vector of page numbers."""
    return np.array(values, dtype=np.int64)
