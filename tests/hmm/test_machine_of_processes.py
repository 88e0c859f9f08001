"""Several processes that share memory, and the reference driver's four devices, at random.

Processes fork and exit in any order; what they do to their memory is mixed with what the devices,
reclaim and the kernel's own migrations do to the pages behind it. What each process must find is
kept in dicts, and after each step the machine verifies and no device reaches more than its CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

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
from mm import PAGE_SIZE, Busy, InvalidArgument, Process, SegmentationFault
from mm.errors import InputOutputError, MmError, NoEntry
from mm.gup import Pin
from mm.machine import Machine
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_write
from mm.sched import running
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_write_device_private_entry,
    swp_offset,
)

PAGES = 32  # of address space, across a border of 2 MiB
BASE = 0x1000_0020_0000 - 16 * PAGE_SIZE
MEMBERS = 4  # processes at a time, at most

ADVICE = ["dontneed", "free", "cold", "pageout", "willneed", "populate_read", "populate_write"]
FORK_ADVICE = ["dontfork", "dofork", "wipeonfork", "keeponfork"]
DEVICES = st.integers(0, 3)
WHO = st.integers(0, MEMBERS - 1)
PROTS = st.sampled_from(["rw", "rw", "rw", "r", "-"])
VALUES = st.integers(1, 1 << 60)
PAGE = st.integers(0, PAGES - 1)


@st.composite
def ranges(draw: st.DrawFn) -> range:
    """Pages next to one another."""
    first = draw(PAGE)
    return range(first, draw(st.integers(first + 1, min(PAGES, first + 10))))


@dataclass
class Page:
    """A mapped page: its rights, the words that it may begin with, and what a fork does with it.

    Where memory is shared, all who map it have one and the same `words`.
    """

    prot: str
    words: set[int] = field(default_factory=lambda: {0})
    shared: bool = False
    dontfork: bool = False
    wipeonfork: bool = False

    def forked(self) -> Page:
        """What a child has of it."""
        if self.shared:
            return replace(self)
        return replace(self, words={0} if self.wipeonfork else set(self.words))

    def left_empty(self) -> Page:
        """What is at its address when it has moved away, and the mapping has stayed."""
        return replace(self) if self.shared else replace(self, words={0})

    def holds(self, words: Iterable[int]) -> None:
        """It has been stored to."""
        new = set(words)
        self.words.clear()
        self.words |= new


@dataclass(eq=False)
class Member:
    """A process, what it has mapped, and the devices that it has open."""

    process: Process
    pages: dict[int, Page]
    mirrors: dict[int, Dmirror] = field(default_factory=dict)


def at(page: int) -> int:
    return BASE + page * PAGE_SIZE


def span(pages: range) -> tuple[int, int]:
    return at(pages.start), len(pages) * PAGE_SIZE


def words_of(value: int, count: int = 1) -> np.ndarray:
    """*count* pages of *value* in every word."""
    return np.full((count, PAGE_SIZE // 8), value, dtype=np.uint64).view(np.uint8)


class Processes(RuleBasedStateMachine):
    """members: those that live; a rule names one by a number that may be too large."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(("4MiB", "4MiB"), swap="8MiB", debug=True)
        self.free = self.machine.nr_free_pages
        self.devices = [DmirrorDevice(self.machine, n, public=n > 1) for n in range(4)]
        self.pins: list[Pin] = []
        self.file = self.machine.memfd_create("shared")
        self.file.truncate(PAGES * PAGE_SIZE)
        self.file_words: list[set[int]] = [{0} for _ in range(PAGES)]
        self.members = [Member(self.machine.spawn("0"), {})]
        self.born = 1
        self.mmap(0, range(2, 28), "rw")

    def teardown(self) -> None:
        for pin in self.pins:
            pin.release()
        while self.members:
            for page in self.members[0].pages:
                self.mem_read(0, page)
            self._exit(self.members[0])
        self.file.close()
        self.machine.verify()
        for device in self.devices:
            device.remove_chunks()
        assert self.free == self.machine.nr_free_pages
        assert 0 == self.machine.mem.swap.inuse_pages

    @contextmanager
    def member(self, who: int) -> Iterator[Member]:
        """The member that *who* names; it runs inside the block."""
        member = self.members[who % len(self.members)]
        with running(member.process):
            yield member

    @contextmanager
    def mirror(self, who: int, device: int) -> Iterator[tuple[Member, Dmirror]]:
        """The same, and what it sees of *device*, which it opens if need be."""
        with self.member(who) as member:
            if device not in member.mirrors:
                member.mirrors[device] = Dmirror(self.devices[device], member.process)
            yield member, member.mirrors[device]

    def saw(self, member: Member, page: int, word: int) -> None:
        """The page holds *word*, which it may, and nothing else until it is changed."""
        assert word in member.pages[page].words
        member.pages[page].holds({word})

    # Families.

    @precondition(lambda self: len(self.members) < MEMBERS)
    @rule(who=WHO)
    def fork(self, who: int) -> None:
        with self.member(who) as member:
            child = member.process.fork(str(self.born))
            self.born += 1
            kept = {n: page for n, page in member.pages.items() if not page.dontfork}
            self.members.append(Member(child, {n: page.forked() for n, page in kept.items()}))

    @precondition(lambda self: len(self.members) > 1)
    @rule(who=WHO, close_first=st.booleans())
    def exit(self, who: int, close_first: bool) -> None:
        member = self.members[who % len(self.members)]
        if close_first:
            for device in list(member.mirrors):
                member.mirrors.pop(device).close()
        self._exit(member)

    def _exit(self, member: Member) -> None:
        member.process.exit()
        for mirror in member.mirrors.values():
            mirror.close()
        self.members.remove(member)

    # What a process does.

    @rule(who=WHO, pages=ranges(), prot=PROTS)
    def mmap(self, who: int, pages: range, prot: str) -> None:
        with self.member(who) as member:
            member.process.mmap(len(pages) * PAGE_SIZE, prot, addr=at(pages.start))
            member.pages |= {n: Page(prot) for n in pages}

    @rule(who=WHO, pages=ranges(), prot=PROTS)
    def mmap_shared(self, who: int, pages: range, prot: str) -> None:
        with self.member(who) as member:
            member.process.mmap(len(pages) * PAGE_SIZE, prot, "anon|shared", addr=at(pages.start))
            member.pages |= {n: Page(prot, shared=True) for n in pages}

    @rule(who=WHO, pages=ranges(), prot=PROTS, offset=PAGE)
    def mmap_file(self, who: int, pages: range, prot: str, offset: int) -> None:
        pages = pages[: PAGES - offset]
        with self.member(who) as member:
            member.process.mmap(
                len(pages) * PAGE_SIZE,
                prot,
                addr=at(pages.start),
                file=self.file,
                offset=offset * PAGE_SIZE,
            )
            for n, words in zip(pages, self.file_words[offset:], strict=False):
                member.pages[n] = Page(prot, words, shared=True)

    @rule(page=PAGE, value=VALUES)
    def file_write(self, page: int, value: int) -> None:
        self.file.write(page * PAGE_SIZE, words_of(value).tobytes())
        self.file_words[page].clear()
        self.file_words[page].add(value)

    @rule(page=PAGE)
    def file_read(self, page: int) -> None:
        word = int.from_bytes(self.file.read(page * PAGE_SIZE, 8), "little")
        assert word in self.file_words[page]

    @rule(who=WHO, pages=ranges())
    def munmap(self, who: int, pages: range) -> None:
        with self.member(who) as member:
            member.process.munmap(*span(pages))
            for n in pages:
                member.pages.pop(n, None)

    @rule(who=WHO, pages=ranges(), prot=PROTS)
    def mprotect(self, who: int, pages: range, prot: str) -> None:
        with self.member(who) as member:
            if member.pages.keys() >= set(pages):
                member.process.mprotect(*span(pages), prot)
                for n in pages:
                    member.pages[n].prot = prot

    @rule(who=WHO, pages=ranges(), shift=st.integers(-PAGES, PAGES), keep=st.booleans())
    def mremap(self, who: int, pages: range, shift: int, keep: bool) -> None:
        target = range(pages.start + shift, pages.stop + shift)
        apart = target.start >= pages.stop or target.stop <= pages.start
        if not (apart and 0 <= target.start and target.stop <= PAGES):
            return
        flags = "maymove|fixed|dontunmap" if keep else "maymove|fixed"
        addr, size = span(pages)
        with self.member(who) as member:
            if not member.pages.keys() >= set(pages):
                return
            with suppress(SegmentationFault):  # the range is of several VMAs
                member.process.mremap(addr, size, size, flags, new_addr=at(target.start))
                for old, new in zip(pages, target, strict=True):
                    moved = member.pages.pop(old)
                    if keep:
                        member.pages[old] = moved.left_empty()
                    member.pages[new] = moved
                return
            for n in target:  # made way before the call found out
                if member.process.find_vma(at(n)) is None:
                    member.pages.pop(n, None)

    @rule(who=WHO, pages=ranges(), advice=st.sampled_from(ADVICE))
    def madvise(self, who: int, pages: range, advice: str) -> None:
        refused = True
        with self.member(who) as member:
            with suppress(MmError):
                member.process.madvise(*span(pages), advice)
                refused = False
            if advice in ("dontneed", "free"):
                for n in member.pages.keys() & set(pages):
                    kept, page = refused or advice == "free", member.pages[n]
                    if not page.shared:
                        page.holds(page.words | {0} if kept else {0})

    @rule(who=WHO, pages=ranges(), advice=st.sampled_from(FORK_ADVICE))
    def madvise_fork(self, who: int, pages: range, advice: str) -> None:
        with self.member(who) as member:
            for n in sorted(member.pages.keys() & set(pages)):
                page = member.pages[n]
                if advice == "wipeonfork" and page.shared:
                    with pytest.raises(InvalidArgument):
                        member.process.madvise(at(n), PAGE_SIZE, advice)
                    continue
                member.process.madvise(at(n), PAGE_SIZE, advice)
                if advice in ("dontfork", "dofork"):
                    page.dontfork = advice == "dontfork"
                else:
                    page.wipeonfork = advice == "wipeonfork"

    @rule(who=WHO, pages=ranges(), lock=st.booleans(), onfault=st.booleans())
    def mlock(self, who: int, pages: range, lock: bool, onfault: bool) -> None:
        with self.member(who) as member, suppress(MmError):
            if lock:
                member.process.mlock(*span(pages), onfault=onfault)
            else:
                member.process.munlock(*span(pages))

    @rule(who=WHO, page=PAGE, value=VALUES)
    def write(self, who: int, page: int, value: int) -> None:
        with self.member(who) as member:
            if page in member.pages and member.pages[page].prot == "rw":
                member.process.write(at(page), words_of(value))
                member.pages[page].holds({value})
            else:
                with pytest.raises(SegmentationFault):
                    member.process.write(at(page), words_of(value))

    @rule(who=WHO, page=PAGE)
    def read(self, who: int, page: int) -> None:
        with self.member(who) as member:
            if page in member.pages and member.pages[page].prot != "-":
                data = np.frombuffer(member.process.read(at(page), PAGE_SIZE), dtype=np.uint64)
                assert (data == data[0]).all()
                self.saw(member, page, int(data[0]))
            else:
                with pytest.raises(SegmentationFault):
                    member.process.read(at(page), 8)

    @rule(who=WHO, page=PAGE)
    def mem_read(self, who: int, page: int) -> None:
        with self.member(who) as member:
            if page in member.pages:
                word = int.from_bytes(member.process.mem_read(at(page), 8), "little")
                self.saw(member, page, word)

    @rule(who=WHO, page=PAGE, value=VALUES)
    def mem_write(self, who: int, page: int, value: int) -> None:
        with self.member(who) as member:
            if page not in member.pages:
                return
            if member.pages[page].shared and member.pages[page].prot != "rw":
                with pytest.raises(InputOutputError):
                    member.process.mem_write(at(page), words_of(value))
            else:
                member.process.mem_write(at(page), words_of(value))
                member.pages[page].holds({value})

    @rule(who=WHO, pages=ranges(), write=st.booleans(), longterm=st.booleans(), plain=st.booleans())
    def pin(self, who: int, pages: range, write: bool, longterm: bool, plain: bool) -> None:
        longterm = longterm and not plain
        with self.member(who) as member, suppress(MmError):
            hold = member.process.pin
            self.pins.append(hold(*span(pages), write=write, longterm=longterm, plain=plain))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop(0).release()

    # What the kernel does.

    @rule(size=st.sampled_from(["2MiB", "6MiB", "9MiB"]))
    def pressure(self, size: str) -> None:
        """Somebody wants much memory, and goes."""
        with self.machine.spawn("hog") as hog, suppress(MmError):
            hog.touch(hog.mmap(size), size)

    @rule(who=WHO, pages=ranges(), node=st.integers(0, 1), shared=st.booleans())
    def move_pages(self, who: int, pages: range, node: int, shared: bool) -> None:
        with self.member(who) as member:
            flags = "moveall" if shared else "move"
            member.process.move_pages([at(page) for page in pages], node, flags)

    @rule(who=WHO, source=st.integers(0, 1))
    def migrate_pages(self, who: int, source: int) -> None:
        with self.member(who) as member:
            member.process.migrate_pages([source], [1 - source])

    @rule(who=WHO, pages=ranges(), mode=st.sampled_from(["default", "bind", "interleave"]))
    def mbind(self, who: int, pages: range, mode: str) -> None:
        with self.member(who) as member, suppress(MmError):
            member.process.mbind(*span(pages), mode, () if mode == "default" else (1,), "moveall")

    @rule(who=WHO)
    def clear_refs(self, who: int) -> None:
        with self.member(who) as member:
            member.process.clear_refs(4)

    # What the devices do.

    @rule(who=WHO, device=DEVICES, pages=ranges())
    def device_read(self, who: int, device: int, pages: range) -> None:
        with self.mirror(who, device) as (member, mirror):
            if all(n in member.pages and member.pages[n].prot != "-" for n in pages):
                answer = mirror.read(at(pages.start), len(pages))
                for n, data in zip(pages, answer.data.view(np.uint64), strict=True):
                    assert (data == data[0]).all()
                    self.saw(member, n, int(data[0]))
            else:
                with suppress(SegmentationFault):
                    mirror.read(at(pages.start), len(pages))

    @rule(who=WHO, device=DEVICES, pages=ranges(), value=VALUES)
    def device_write(self, who: int, device: int, pages: range, value: int) -> None:
        with self.mirror(who, device) as (member, mirror):
            stopped = True
            with suppress(MmError):
                mirror.write(at(pages.start), len(pages), words_of(value, len(pages)))
                stopped = False
            assert stopped or all(member.pages[n].prot == "rw" for n in pages)
            for n in member.pages.keys() & set(pages):
                page = member.pages[n]
                page.holds(page.words | {value} if stopped else {value})

    @rule(who=WHO, device=DEVICES, pages=ranges())
    def migrate_to_device(self, who: int, device: int, pages: range) -> None:
        with self.mirror(who, device) as (_, mirror), suppress(NoEntry, InvalidArgument):
            mirror.migrate_to_device(at(pages.start), len(pages))

    @rule(who=WHO, device=DEVICES, pages=ranges())
    def migrate_to_system(self, who: int, device: int, pages: range) -> None:
        with self.mirror(who, device) as (_, mirror), suppress(InvalidArgument):
            mirror.migrate_to_system(at(pages.start), len(pages))

    @rule(who=WHO, device=DEVICES, pages=ranges())
    def exclusive(self, who: int, device: int, pages: range) -> None:
        with self.mirror(who, device) as (_, mirror), suppress(MmError):
            mirror.exclusive(at(pages.start), len(pages))

    @rule(who=WHO, device=DEVICES)
    def close(self, who: int, device: int) -> None:
        with self.member(who) as member:
            if device in member.mirrors:
                member.mirrors.pop(device).close()

    @rule(device=DEVICES)
    def release(self, device: int) -> None:
        with suppress(Busy):
            self.devices[device].remove_chunks()

    @invariant()
    def whole(self) -> None:
        self.machine.verify()

    @invariant()
    def no_device_sees_more_than_the_cpu(self) -> None:
        tables = self.machine.mem.tables
        for member in self.members:
            for mirror in member.mirrors.values():
                addrs, theirs = mirror.table.mapped()
                ours = tables.entries[pte_offset(tables, member.process.mm.pgd, addrs)]
                private, exclusive = is_device_private_entry(ours), is_device_exclusive_entry(ours)
                pfns = np.where(private | exclusive, swp_offset(ours), pte_pfn(ours))
                assert ((pte_present(ours) | private | exclusive) & (pfns == pte_pfn(theirs))).all()
                writable = np.where(private, is_write_device_private_entry(ours), pte_write(ours))
                assert (writable | exclusive | ~pte_write(theirs)).all()


class TestFamilies:
    def test_any_sequence(self):
        """Each process finds what it stored, or had when it was forked, whatever follows what."""
        run_state_machine_as_test(
            Processes, settings=settings(max_examples=15, stateful_step_count=40)
        )

    @pytest.mark.slow
    def test_ten_thousand_steps(self):
        """As above, for 10,000 steps and more."""
        run_state_machine_as_test(
            Processes, settings=settings(max_examples=120, stateful_step_count=100)
        )
