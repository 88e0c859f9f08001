"""One process and the reference driver's four devices, driven at random.

Everything that a process does to its memory is mixed with everything that the devices do. What
each page may hold is kept in a dict, and after each step the machine verifies and no device's
table shows what the CPU's does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hmm.dmirror import Dmirror
from hmm.dmirror_device import DmirrorDevice
from mm import PAGE_SIZE, Busy, InvalidArgument, SegmentationFault
from mm.errors import MmError, NoEntry
from mm.machine import Machine
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_write
from mm.sched import running
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_write_device_private_entry,
    swp_offset,
)

PAGES = 40  # of address space, across a border of 2 MiB
BASE = 0x1000_0020_0000 - 20 * PAGE_SIZE

ADVICE = ["dontneed", "free", "cold", "pageout", "willneed", "populate_read", "populate_write"]
DEVICES = st.integers(0, 3)
PROTS = st.sampled_from(["rw", "rw", "r", "-"])
VALUES = st.integers(1, 1 << 60)
PAGE = st.integers(0, PAGES - 1)


@st.composite
def ranges(draw: st.DrawFn) -> range:
    """Pages next to one another."""
    first = draw(PAGE)
    return range(first, draw(st.integers(first + 1, min(PAGES, first + 12))))


class Mirrors(RuleBasedStateMachine):
    """prot: rights of each page that is mapped; may_hold: the words that it may begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.machine = Machine(("16MiB", "16MiB"), swap="2MiB", debug=True)
        self.free = self.machine.nr_free_pages
        self.process = self.machine.spawn("task")
        self.stack.enter_context(running(self.process))
        self.mirrors = [
            Dmirror(DmirrorDevice(self.machine, n, public=n > 1), self.process) for n in range(4)
        ]
        self.prot: dict[int, str] = {}
        self.may_hold: dict[int, set[int]] = {}
        self.pins: list = []
        self.mmap(range(4, 36), "rw")

    def teardown(self) -> None:
        for pin in self.pins:
            pin.release()
        for page in self.prot:
            self.mem_read(page)
        for mirror in self.mirrors:
            mirror.close()
        self.process.exit()
        self.stack.close()
        self.machine.verify()
        for mirror in self.mirrors:
            mirror.device.remove_chunks()
        assert self.free == self.machine.nr_free_pages

    def at(self, page: int) -> int:
        return BASE + page * PAGE_SIZE

    def span(self, pages: range) -> tuple[int, int]:
        return self.at(pages.start), len(pages) * PAGE_SIZE

    def mapped(self, pages: Iterable[int]) -> bool:
        return all(page in self.prot for page in pages)

    def saw(self, page: int, word: int) -> None:
        """The page holds *word*, which it may, and nothing else until it is changed."""
        assert word in self.may_hold[page]
        self.may_hold[page] = {word}

    # What the process does.

    @rule(pages=ranges(), prot=PROTS)
    def mmap(self, pages: range, prot: str) -> None:
        self.process.mmap(len(pages) * PAGE_SIZE, prot, addr=self.at(pages.start))
        for page in pages:
            self.prot[page], self.may_hold[page] = prot, {0}

    @rule(pages=ranges())
    def munmap(self, pages: range) -> None:
        self.process.munmap(*self.span(pages))
        for page in pages:
            self.prot.pop(page, None)

    @rule(pages=ranges(), prot=PROTS)
    def mprotect(self, pages: range, prot: str) -> None:
        if self.mapped(pages):
            self.process.mprotect(*self.span(pages), prot)
            self.prot.update(dict.fromkeys(pages, prot))

    @rule(pages=ranges(), shift=st.integers(-PAGES, PAGES), keep=st.booleans())
    def mremap(self, pages: range, shift: int, keep: bool) -> None:
        target = range(pages.start + shift, pages.stop + shift)
        apart = target.start >= pages.stop or target.stop <= pages.start
        if not (apart and 0 <= target.start and target.stop <= PAGES and self.mapped(pages)):
            return
        flags = "maymove|fixed|dontunmap" if keep else "maymove|fixed"
        addr, size = self.span(pages)
        with suppress(SegmentationFault):  # the range is of several VMAs
            self.process.mremap(addr, size, size, flags, new_addr=self.at(target.start))
            for old, new in zip(pages, target, strict=True):
                self.prot[new], self.may_hold[new] = self.prot[old], self.may_hold[old]
                if keep:
                    self.may_hold[old] = {0}
                else:
                    del self.prot[old]
            return
        for page in target:  # made way before the call found out
            if self.process.find_vma(self.at(page)) is None:
                self.prot.pop(page, None)

    @rule(
        pages=ranges(),
        advice=st.sampled_from(ADVICE),
    )
    def madvise(self, pages: range, advice: str) -> None:
        refused = True
        with suppress(MmError):
            self.process.madvise(*self.span(pages), advice)
            refused = False
        for page in pages:
            if page in self.prot and advice in ("dontneed", "free"):
                kept = refused or advice == "free"
                self.may_hold[page] = self.may_hold[page] | {0} if kept else {0}

    @rule(pages=ranges(), onfault=st.booleans())
    def mlock(self, pages: range, onfault: bool) -> None:
        with suppress(MmError):
            self.process.mlock(*self.span(pages), onfault=onfault)

    @rule(pages=ranges())
    def munlock(self, pages: range) -> None:
        with suppress(MmError):
            self.process.munlock(*self.span(pages))

    @rule(page=PAGE, value=VALUES)
    def write(self, page: int, value: int) -> None:
        data = np.array([value], dtype=np.uint64)
        if self.prot.get(page) == "rw":
            self.process.write(self.at(page), data)
            self.may_hold[page] = {value}
        else:
            with pytest.raises(SegmentationFault):
                self.process.write(self.at(page), data)

    @rule(page=PAGE)
    def read(self, page: int) -> None:
        if self.prot.get(page, "-") == "-":
            with pytest.raises(SegmentationFault):
                self.process.read(self.at(page), 8)
        else:
            self.saw(page, int.from_bytes(self.process.read(self.at(page), 8), "little"))

    @rule(page=PAGE)
    def mem_read(self, page: int) -> None:
        if page in self.prot:
            self.saw(page, int.from_bytes(self.process.mem_read(self.at(page), 8), "little"))

    @rule(page=PAGE, value=VALUES)
    def mem_write(self, page: int, value: int) -> None:
        if page in self.prot:
            self.process.mem_write(self.at(page), np.array([value], dtype=np.uint64))
            self.may_hold[page] = {value}

    @rule(pages=ranges(), node=st.integers(0, 1))
    def move_pages(self, pages: range, node: int) -> None:
        self.process.move_pages([self.at(page) for page in pages], node)

    @rule(pages=ranges(), mode=st.sampled_from(["default", "bind", "preferred", "interleave"]))
    def mbind(self, pages: range, mode: str) -> None:
        with suppress(MmError):
            self.process.mbind(*self.span(pages), mode, () if mode == "default" else (1,), "move")

    @rule()
    def clear_refs(self) -> None:
        self.process.clear_refs(4)

    @rule(pages=ranges(), write=st.booleans(), longterm=st.booleans(), plain=st.booleans())
    def pin(self, pages: range, write: bool, longterm: bool, plain: bool) -> None:
        longterm = longterm and not plain
        with suppress(MmError):
            pin = self.process.pin(*self.span(pages), write=write, longterm=longterm, plain=plain)
            self.pins.append(pin)

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop(0).release()

    # What the devices do.

    @rule(device=DEVICES, pages=ranges())
    def device_read(self, device: int, pages: range) -> None:
        if all(self.prot.get(page, "-") != "-" for page in pages):
            answer = self.mirrors[device].read(self.at(pages.start), len(pages))
            for page, word in zip(pages, answer.data.view(np.uint64)[:, 0].tolist(), strict=True):
                self.saw(page, word)
        else:
            with suppress(SegmentationFault):
                self.mirrors[device].read(self.at(pages.start), len(pages))

    @rule(device=DEVICES, pages=ranges(), value=VALUES)
    def device_write(self, device: int, pages: range, value: int) -> None:
        data = np.full((len(pages), PAGE_SIZE // 8), value, dtype=np.uint64).view(np.uint8)
        stopped = True
        with suppress(MmError):
            self.mirrors[device].write(self.at(pages.start), len(pages), data)
            stopped = False
        assert stopped or all(self.prot[page] == "rw" for page in pages)
        for page in pages:
            if page in self.prot:
                self.may_hold[page] = (self.may_hold[page] if stopped else set()) | {value}

    @rule(device=DEVICES, pages=ranges())
    def migrate_to_device(self, device: int, pages: range) -> None:
        with suppress(NoEntry, InvalidArgument):
            self.mirrors[device].migrate_to_device(self.at(pages.start), len(pages))

    @rule(device=DEVICES, pages=ranges())
    def migrate_to_system(self, device: int, pages: range) -> None:
        with suppress(InvalidArgument):
            self.mirrors[device].migrate_to_system(self.at(pages.start), len(pages))

    @rule(device=DEVICES, pages=ranges())
    def exclusive(self, device: int, pages: range) -> None:
        with suppress(MmError):
            self.mirrors[device].exclusive(self.at(pages.start), len(pages))

    @rule(device=DEVICES, pages=ranges())
    def snapshot(self, device: int, pages: range) -> None:
        perm = self.mirrors[device].snapshot(self.at(pages.start), len(pages)).perm
        hidden = [self.prot.get(page, "-") == "-" for page in pages]
        assert hidden == (perm == 0xFF).tolist()

    @rule(device=DEVICES)
    def release(self, device: int) -> None:
        with suppress(Busy):
            self.mirrors[device].release()

    @invariant()
    def whole(self) -> None:
        self.machine.verify()

    @invariant()
    def no_device_sees_more_than_the_cpu(self) -> None:
        tables = self.machine.mem.tables
        for mirror in self.mirrors:
            addrs, theirs = mirror.table.mapped()
            ours = tables.entries[pte_offset(tables, self.process.mm.pgd, addrs)]
            private, exclusive = is_device_private_entry(ours), is_device_exclusive_entry(ours)
            pfns = np.where(private | exclusive, swp_offset(ours), pte_pfn(ours))
            assert ((pte_present(ours) | private | exclusive) & (pfns == pte_pfn(theirs))).all()
            writable = np.where(private, is_write_device_private_entry(ours), pte_write(ours))
            assert (writable | ~pte_write(theirs)).all()


class TestOneProcess:
    def test_any_sequence(self):
        """No byte is lost, whatever follows what."""
        run_state_machine_as_test(
            Mirrors, settings=settings(max_examples=15, stateful_step_count=40)
        )

    @pytest.mark.slow
    def test_ten_thousand_steps(self):
        """As above, for 10,000 steps and more."""
        run_state_machine_as_test(
            Mirrors, settings=settings(max_examples=120, stateful_step_count=100)
        )
