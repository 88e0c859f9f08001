"""Two processes of a family, and pages in private, public and system memory and in swap, at random.

Pages move between all kinds of memory, straight from device to device too; devices come and go,
frames fail or go out of use, processes share pages and part again. What each page holds is kept in
a list; only a frame that fails may lose it, and then who had it gets SIGBUS, never another byte.
"""

from __future__ import annotations

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

from devices import Driver, NumpyDevice, migrate_between
from mm import PAGE_SIZE, BusError, Busy, SegmentationFault
from mm.errors import MmError
from mm.pgtable import pte_pfn, pte_present
from tests.world import World, ended_worlds, in_step, mapped_range

PAGES = 12  # across a border of 2 MiB
KINDS = ("private", "private", "public", "public")
CHUNK = "64KiB"

WHO = st.integers(0, 1)
GPU = st.integers(0, len(KINDS) - 1)
BYTES = st.integers(1, 255)
PAGE = st.integers(0, PAGES - 1)


@st.composite
def ranges(draw: st.DrawFn) -> range:
    """Pages next to one another."""
    first = draw(PAGE)
    return range(first, draw(st.integers(first + 1, min(PAGES, first + 6))))


class Memory:
    """What a process must find: the byte of each page, its rights, and whether it may be lost."""

    def __init__(self, seen: World) -> None:
        self.seen = seen
        self.bytes = [0] * PAGES
        self.prot = ["rw"] * PAGES
        self.doubtful = [False] * PAGES

    def forked(self) -> Memory:
        child = Memory(self.seen.seen_by(self.seen.process.fork()))
        child.bytes, child.prot = self.bytes.copy(), self.prot.copy()
        child.doubtful = self.doubtful.copy()
        return child

    def at(self, pages: range) -> tuple[int, int]:
        """Address and length of *pages*."""
        return self.seen.at(pages.start), len(pages) * PAGE_SIZE


class Kinds(RuleBasedStateMachine):
    """A parent and a child, and for each its `Memory`."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.stack.enter_context(ended_worlds())
        addr = 0x7F00_0020_0000 - 5 * PAGE_SIZE
        self.world = mapped_range(
            PAGES, filled=False, memory="64KiB", chunk=CHUNK, addr=addr, swap="1MiB"
        )
        self.machine = self.world.machine
        self.opened = 0
        self.gpus: list[Driver] = [self.world.gpu, *(self.open(kind) for kind in KINDS[1:])]
        parent = Memory(self.world)
        self.family = [parent, parent.forked()]

    def open(self, kind: str) -> Driver:
        self.opened += 1
        name = f"device {self.opened}"
        return NumpyDevice(self.machine, "32KiB", kind, name=name, chunk=CHUNK)

    def teardown(self) -> None:
        for pin in self.world.pins:
            pin.release()
        for who in range(2):
            self.load(who, range(PAGES))
        self.stack.close()

    # Accesses.

    @rule(who=WHO, pages=ranges(), byte=BYTES, gpu=st.one_of(st.none(), GPU))
    def store(self, who: int, pages: range, byte: int, gpu: int | None) -> None:
        """By a CPU, or by a device."""
        memory = self.family[who]
        for page in pages:
            with self.expected(memory, page, write=True):
                data = bytes([byte]) * PAGE_SIZE
                if gpu is None:
                    memory.seen.process.write(memory.seen.at(page), data)
                else:
                    self.gpus[gpu].write(memory.seen.process, memory.seen.at(page), data)
                memory.bytes[page], memory.doubtful[page] = byte, False

    @rule(who=WHO, pages=ranges(), gpu=st.one_of(st.none(), GPU))
    def load(self, who: int, pages: range, gpu: int | None = None) -> None:
        memory = self.family[who]
        for page in pages:
            with self.expected(memory, page, write=False):
                addr = memory.seen.at(page)
                if gpu is None:
                    data = memory.seen.process.read(addr, PAGE_SIZE)
                else:
                    data = self.gpus[gpu].read(memory.seen.process, addr, PAGE_SIZE)
                assert bytes([memory.bytes[page]]) * PAGE_SIZE == data

    def expected(self, memory: Memory, page: int, *, write: bool) -> Expected:
        """What an access may raise."""
        allowed = memory.prot[page] == "rw" or (memory.prot[page] == "r" and not write)
        return Expected(allowed=allowed, doubtful=memory.doubtful[page])

    # Between kinds of memory.

    @rule(who=WHO, gpu=GPU, pages=ranges(), back=st.booleans())
    def migrate(self, who: int, gpu: int, pages: range, back: bool) -> None:
        memory, device = self.family[who], self.gpus[gpu]
        move = device.to_system if back else device.to_device
        move(memory.seen.process, *memory.at(pages))

    @rule(who=WHO, source=GPU, to=GPU, pages=ranges())
    def between(self, who: int, source: int, to: int, pages: range) -> None:
        if source != to:
            memory = self.family[who]
            devices = self.gpus[source], self.gpus[to]
            migrate_between(*devices, memory.seen.process, *memory.at(pages))

    @rule(who=WHO, pages=ranges())
    def pageout(self, who: int, pages: range) -> None:
        self.family[who].seen.pageout(*pages)

    @rule(gpu=GPU)
    def close(self, gpu: int) -> None:
        """A device goes, unless somebody holds a page of it, and another comes."""
        try:
            self.gpus[gpu].close()
        except Busy:
            zone = self.gpus[gpu].zone
            held = np.concatenate([pin.pfns for pin in self.world.pins])
            assert ((zone.start_pfn <= held) & (held < zone.end_pfn)).any()
        else:
            self.gpus[gpu] = self.open(KINDS[gpu])

    # Frames that fail.

    @rule(who=WHO, page=PAGE)
    def fail(self, who: int, page: int) -> None:
        """Whoever shares the page may have lost it; swap may have a copy."""
        pfn = self.frame(who, page)
        if pfn is not None:
            self.machine.memory_failure(pfn)
            for memory in self.family:
                memory.doubtful[page] = True

    @rule(who=WHO, page=PAGE)
    def retire(self, who: int, page: int) -> None:
        pfn = self.frame(who, page)
        if pfn is not None:
            self.machine.soft_offline_page(pfn)

    def frame(self, who: int, page: int) -> int | None:
        """The page that is mapped there, if any."""
        pte = self.family[who].seen.ptes()[page : page + 1]
        return pte_pfn(pte).item() if pte_present(pte)[0] else None

    # System calls.

    @rule(who=WHO, pages=ranges(), prot=st.sampled_from(["rw", "r", "-"]))
    def mprotect(self, who: int, pages: range, prot: str) -> None:
        memory = self.family[who]
        memory.seen.process.mprotect(*memory.at(pages), prot)
        for page in pages:
            memory.prot[page] = prot

    @rule(who=WHO, pages=ranges())
    def dontneed(self, who: int, pages: range) -> None:
        memory = self.family[who]
        memory.seen.process.madvise(*memory.at(pages), "dontneed")
        for page in pages:
            memory.bytes[page], memory.doubtful[page] = 0, False

    @rule(who=WHO, pages=ranges())
    def exclusive(self, who: int, pages: range) -> None:
        self.family[who].seen.make_exclusive(*pages)

    @rule(who=WHO)
    def fork(self, who: int) -> None:
        """One of the two exits, and the other has a child."""
        self.family[1 - who].seen.process.exit()
        self.family[1 - who] = self.family[who].forked()

    @rule(who=WHO, pages=ranges(), write=st.booleans(), longterm=st.booleans())
    def pin(self, who: int, pages: range, write: bool, longterm: bool) -> None:
        memory = self.family[who]
        with suppress(MmError):
            pin = memory.seen.process.pin(*memory.at(pages), write=write, longterm=longterm)
            self.world.pins.append(pin)

    @precondition(lambda self: self.world.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.world.pins.pop(data.draw(st.integers(0, len(self.world.pins) - 1))).release()

    # What always holds.

    @invariant()
    def all_is_well(self) -> None:
        self.machine.verify()

    @invariant()
    def devices_are_in_step(self) -> None:
        assert all(in_step(gpu) for gpu in self.gpus)


class Expected(ExitStack):
    """An access that is *allowed* or not, to a page that may be lost where it is *doubtful*."""

    def __init__(self, *, allowed: bool, doubtful: bool) -> None:
        super().__init__()
        if not allowed:
            self.enter_context(pytest.raises(SegmentationFault))
        elif doubtful:
            self.enter_context(suppress(BusError))


class TestKinds:
    def test_short(self) -> None:
        """A dozen random programs of a few dozen steps."""
        run_state_machine_as_test(
            Kinds, settings=settings(max_examples=12, stateful_step_count=25, deadline=None)
        )

    @pytest.mark.slow
    def test_long(self) -> None:
        """Hundreds of programs of a hundred steps."""
        run_state_machine_as_test(
            Kinds, settings=settings(max_examples=300, stateful_step_count=100, deadline=None)
        )
