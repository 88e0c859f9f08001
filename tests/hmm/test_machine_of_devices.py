"""Whole processes and three small devices, driven at random: no byte is lost, all stays well.

The devices are so small that they evict all the time; the memory of the last is public. What every
page holds is kept in a dict, and after each step the machine verifies and the devices reach nothing
but what the CPUs do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from devices import NumpyDevice
from mm import PAGE_SIZE, Busy, SegmentationFault
from mm.filemap import unlock_page
from mm.gup import FOLL_LONGTERM, make_device_exclusive_range
from mm.pgtable import pte_offset
from mm.swap import put_page
from mm.swapops import is_device_exclusive_entry, swp_offset
from tests.world import ended_worlds, in_step, mapped_range

PAGES = 20  # of address space that each process uses, across a border of 2 MiB
BASE = 0x7F00_0020_0000 - 12 * PAGE_SIZE
CHUNK = "64KiB"

PROCESSES = st.integers(0, 1)
DEVICES = st.integers(0, 2)
BYTES = st.integers(1, 255)


@st.composite
def ranges(draw: st.DrawFn) -> range:
    """Pages next to one another."""
    first = draw(st.integers(0, PAGES - 1))
    return range(first, draw(st.integers(first + 1, min(PAGES, first + 8))))


class Devices(RuleBasedStateMachine):
    """Two processes, and for each a dict: the byte of each page that is mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.stack.enter_context(ended_worlds())
        self.world = mapped_range(1, filled=False, memory="64KiB", chunk=CHUNK, addr=1 << 30)
        self.machine = self.world.machine
        other = NumpyDevice(
            self.machine, "32KiB", name="numpy1", chunk=CHUNK, neighbours=4 * PAGE_SIZE
        )
        public = NumpyDevice(self.machine, "32KiB", "public", name="public", chunk=CHUNK)
        self.gpus = [self.world.gpu, other, public]
        self.processes = [self.machine.spawn(f"process {i}", cpu=i) for i in range(2)]
        self.bytes: list[dict[int, int]] = [{}, {}]
        self.writable: list[dict[int, bool]] = [{}, {}]

    def teardown(self) -> None:
        for pin in self.world.pins:
            pin.release()
        for i, process in enumerate(self.processes):
            assert self.bytes[i] == {page: self.look(i, page) for page in self.bytes[i]}
            process.exit()
        self.stack.close()

    def at(self, page: int) -> int:
        return BASE + page * PAGE_SIZE

    def look(self, i: int, page: int) -> int:
        """The byte all over a page, by a CPU load; -1 if it is not one."""
        data = self.processes[i].read(self.at(page), PAGE_SIZE)
        return data[0] if data == data[:1] * PAGE_SIZE else -1

    def stretches(self, i: int, pages: range) -> Iterator[range]:
        """Those of *pages* that are mapped, as ranges."""
        mapped = [page for page in pages if page in self.bytes[i]]
        while mapped:
            length = next((n for n, p in enumerate(mapped) if p != mapped[0] + n), len(mapped))
            yield range(mapped[0], mapped[0] + length)
            mapped = mapped[length:]

    # System calls.

    @initialize()
    def both_have_memory(self) -> None:
        for i in range(2):
            self.mmap(i, range(PAGES), "rw")

    @rule(i=PROCESSES, pages=ranges(), prot=st.sampled_from(["rw", "rw", "r"]))
    def mmap(self, i: int, pages: range, prot: str) -> None:
        self.processes[i].mmap(len(pages) * PAGE_SIZE, prot, addr=self.at(pages.start))
        self.bytes[i].update(dict.fromkeys(pages, 0))
        self.writable[i].update(dict.fromkeys(pages, prot == "rw"))

    @rule(i=PROCESSES, pages=ranges())
    def munmap(self, i: int, pages: range) -> None:
        self.processes[i].munmap(self.at(pages.start), len(pages) * PAGE_SIZE)
        for page in pages:
            self.bytes[i].pop(page, None)

    @rule(i=PROCESSES)
    def exit_and_spawn_anew(self, i: int) -> None:
        self.processes[i].exit()
        self.processes[i] = self.machine.spawn(f"process {i} again", cpu=i)
        self.bytes[i] = {}

    # CPUs.

    @rule(i=PROCESSES, pages=ranges(), byte=BYTES)
    def cpu_store(self, i: int, pages: range, byte: int) -> None:
        """Where it may not store, it faults, and what came before is stored."""
        process = self.processes[i]
        stored = self.reachable(i, pages, write=True)
        data = bytes([byte]) * len(pages) * PAGE_SIZE
        if len(stored) == len(pages):
            process.write(self.at(pages.start), data)
        else:
            with pytest.raises(SegmentationFault) as caught:
                process.write(self.at(pages.start), data)
            assert self.at(stored.stop) == caught.value.address
        self.bytes[i].update(dict.fromkeys(stored, byte))

    @rule(i=PROCESSES, pages=ranges())
    def cpu_load(self, i: int, pages: range) -> None:
        found = {page: self.look(i, page) for page in self.reachable(i, pages, write=False)}

        assert found == {page: self.bytes[i][page] for page in found}

    def reachable(self, i: int, pages: range, *, write: bool) -> range:
        """The leading pages that process *i* may access."""
        for page in pages:
            if page not in self.bytes[i] or (write and not self.writable[i][page]):
                return range(pages.start, page)
        return pages

    # Devices.

    @rule(i=PROCESSES, gpu=DEVICES, pages=ranges(), byte=BYTES)
    def gpu_store(self, i: int, gpu: int, pages: range, byte: int) -> None:
        stored = self.reachable(i, pages, write=True)
        if stored:
            data = bytes([byte]) * len(stored) * PAGE_SIZE
            self.gpus[gpu].write(self.processes[i], self.at(stored.start), data)
            self.bytes[i].update(dict.fromkeys(stored, byte))

    @rule(i=PROCESSES, gpu=DEVICES, pages=ranges())
    def gpu_load(self, i: int, gpu: int, pages: range) -> None:
        there = self.reachable(i, pages, write=False)
        data = self.gpus[gpu].read(self.processes[i], self.at(there.start), len(there) * PAGE_SIZE)

        assert data == b"".join(bytes([self.bytes[i][page]]) * PAGE_SIZE for page in there)

    @rule(i=PROCESSES, gpu=DEVICES, page=st.integers(0, PAGES - 1))
    def gpu_access_where_it_may_not(self, i: int, gpu: int, page: int) -> None:
        if self.reachable(i, range(page, page + 1), write=True):
            return
        with pytest.raises(SegmentationFault):
            self.gpus[gpu].write(self.processes[i], self.at(page), b"x")

    @rule(i=PROCESSES, gpu=DEVICES, pages=ranges())
    def to_device(self, i: int, gpu: int, pages: range) -> None:
        for stretch in self.stretches(i, pages):
            self.gpus[gpu].to_device(
                self.processes[i], self.at(stretch.start), len(stretch) * PAGE_SIZE
            )

    @rule(i=PROCESSES, gpu=DEVICES, pages=ranges())
    def to_system(self, i: int, gpu: int, pages: range) -> None:
        for stretch in self.stretches(i, pages):
            self.gpus[gpu].to_system(
                self.processes[i], self.at(stretch.start), len(stretch) * PAGE_SIZE
            )

    @rule(gpu=DEVICES)
    def make_room(self, gpu: int) -> None:
        device = self.gpus[gpu]
        device.make_room(device.npages)

        zone = device.zone
        kept = {pfn for pfn in self.kept() if zone.start_pfn <= pfn < zone.end_pfn}
        assert device.npages - len(kept) == device.chunks.free_pages

    def kept(self) -> set[int]:
        """Pages that cannot leave a device: pinned, or of a device for itself."""
        kept = {pfn for pin in self.world.pins for pfn in pin.pfns.tolist()}
        pool = self.machine.mem.tables
        for process in self.processes:
            ptes = pool.entries[
                pte_offset(pool, process.mm.pgd, BASE + np.arange(PAGES) * PAGE_SIZE)
            ]
            kept |= set(swp_offset(ptes[is_device_exclusive_entry(ptes)]).tolist())
        return kept

    @rule(i=PROCESSES, pages=ranges())
    def exclusive(self, i: int, pages: range) -> None:
        """A device takes what the process may store to, up to the first page that it may not."""
        mm, mem = self.processes[i].mm, self.machine.mem
        wanted = self.reachable(i, pages, write=True)
        with mm.mmap_sem.read():
            taken = make_device_exclusive_range(
                mm, BASE + np.array(pages) * PAGE_SIZE, self.gpus[0]
            )
        assert len(wanted) == np.count_nonzero(taken >= 0)
        unlock_page(mem, taken[taken >= 0])
        put_page(mem, taken[taken >= 0])

    @rule(i=PROCESSES, pages=ranges(), byte=BYTES)
    def debugger_store(self, i: int, pages: range, byte: int) -> None:
        """Through /proc/PID/mem, up to the first page that is not mapped."""
        stored = next((range(pages.start, p) for p in pages if p not in self.bytes[i]), pages)
        if stored:
            data = bytes([byte]) * len(pages) * PAGE_SIZE
            written = self.processes[i].mem_write(self.at(pages.start), data)
            assert len(stored) * PAGE_SIZE == written
            self.bytes[i].update(dict.fromkeys(stored, byte))

    # Pins.

    @rule(i=PROCESSES, pages=ranges(), write=st.booleans(), longterm=st.booleans())
    def pin(self, i: int, pages: range, write: bool, longterm: bool) -> None:
        pinned = self.reachable(i, pages, write=write)
        if not pinned:
            return
        addr, nbytes = self.at(pinned.start), len(pinned) * PAGE_SIZE
        try:
            pin = self.processes[i].pin(addr, nbytes, write=write, longterm=longterm)
        except Busy:  # pinned already, or of a device for itself, in public memory
            assert longterm
        else:
            self.world.pins.append(pin)

    @precondition(lambda self: self.world.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin = data.draw(st.sampled_from(self.world.pins))
        self.world.pins.remove(pin)
        pin.release()

    # What always holds.

    @invariant()
    def all_is_well(self) -> None:
        self.machine.verify()

    @invariant()
    def devices_are_in_step(self) -> None:
        assert all(in_step(gpu) for gpu in self.gpus)

    @invariant()
    def pinned_pages_are_in_memory_that_the_cpu_reaches(self) -> None:
        mem = self.machine.mem
        for pin in self.world.pins:
            assert not mem.is_device_private_page(pin.pfns).any()
            if pin.gup_flags & FOLL_LONGTERM:
                assert not mem.is_zone_device_page(pin.pfns).any()


class TestDevices:
    def test_short(self):
        """A dozen random programs of a few dozen steps."""
        run_state_machine_as_test(
            Devices, settings=settings(max_examples=12, stateful_step_count=25, deadline=None)
        )

    @pytest.mark.slow
    def test_long(self):
        """Hundreds of programs of a hundred steps."""
        run_state_machine_as_test(
            Devices, settings=settings(max_examples=400, stateful_step_count=100, deadline=None)
        )
