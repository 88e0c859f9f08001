"""Several processes that share memory and files, and the reference driver's devices, at random.

Processes fork and exit in any order; what they do to their memory is mixed with what the devices,
reclaim, control groups, files that change their size, userland's own faults and the kernel's
migrations do to the pages behind it. What each process must find is kept beside it
(tests/hmm/families.py), and after each step the machine verifies.
"""

from __future__ import annotations

from contextlib import suppress

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

from mm import PAGE_SIZE, Busy, InvalidArgument, SegmentationFault
from mm.errors import Exists, MmError, NoEntry, OutOfMemory
from tests.hmm.families import GROUPS, PAGES, ZEROS, Families, Member, Object, Page, at, span

MEMBERS = 4  # processes at a time, at most

ADVICE = ["dontneed", "free", "cold", "pageout", "willneed", "populate_read", "populate_write"]
FORK_ADVICE = ["dontfork", "dofork", "wipeonfork", "keeponfork"]
DEVICES = st.integers(0, 3)
WHO = st.integers(0, MEMBERS - 1)
PROTS = st.sampled_from(["rw", "rw", "rw", "r", "-"])
PAGE = st.integers(0, PAGES - 1)
FILES = st.integers(0, 2)
OFFSETS = st.integers(0, PAGES * PAGE_SIZE - 1)
SIZES = st.integers(1, 3 * PAGE_SIZE) | st.integers(1, 12 * PAGE_SIZE)
PARTS = st.sampled_from([(0, PAGE_SIZE), (0, PAGE_SIZE), (8, 100), (1000, 2500)])


@st.composite
def ranges(draw: st.DrawFn) -> range:
    """Pages next to one another."""
    first = draw(PAGE)
    return range(first, draw(st.integers(first + 1, min(PAGES, first + 10))))


class Processes(Families, RuleBasedStateMachine):
    """What all of them may do."""

    def __init__(self) -> None:
        super().__init__()
        self.mmap(0, range(2, 28), "rw")

    def teardown(self) -> None:
        self.end_all()

    # Families, and the groups that they are in.

    @precondition(lambda self: len(self.members) < MEMBERS)
    @rule(who=WHO)
    def fork(self, who: int) -> None:
        with self.member(who) as member:
            try:
                child = member.process.fork(str(self.born))
            except self.limited:
                return
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
        self.end(member)

    @rule(who=WHO, group=st.none() | st.integers(0, len(GROUPS) - 1), along=st.booleans())
    def join_group(self, who: int, group: int | None, along: bool) -> None:
        to = None if group is None else self.groups[group]
        with self.member(who) as member:
            was = member.process.cgroup
            if to is not None:
                to.move_charge_at_immigrate = along
            try:
                member.process.move_to(to)
            except OutOfMemory:
                assert member.process.cgroup is was

    @rule(
        group=st.integers(0, len(GROUPS) - 1),
        pages=st.none() | st.integers(10, 80),
        slots=st.none() | st.integers(0, 40),
    )
    def limit_group(self, group: int, pages: int | None, slots: int | None) -> None:
        memcg = self.groups[group]
        memcg.swap_limit = None if slots is None else slots * PAGE_SIZE
        with suppress(Busy):
            memcg.limit = None if pages is None else pages * PAGE_SIZE

    # What a process maps.

    @rule(who=WHO, pages=ranges(), prot=PROTS)
    def mmap(self, who: int, pages: range, prot: str) -> None:
        with self.member(who) as member:
            member.process.mmap(len(pages) * PAGE_SIZE, prot, addr=at(pages.start))
            member.pages |= {n: Page(prot) for n in pages}

    @rule(who=WHO, pages=ranges(), prot=PROTS)
    def mmap_shared(self, who: int, pages: range, prot: str) -> None:
        with self.member(who) as member:
            member.process.mmap(len(pages) * PAGE_SIZE, prot, "anon|shared", addr=at(pages.start))
            behind = Object(len(pages) * PAGE_SIZE)
            for index, n in enumerate(pages):
                member.pages[n] = Page(prot, behind, index, shared=True)

    @rule(who=WHO, pages=ranges(), prot=PROTS, which=FILES, offset=PAGE, shared=st.booleans())
    def mmap_file(
        self, who: int, pages: range, prot: str, which: int, offset: int, shared: bool
    ) -> None:
        pages, behind = pages[: PAGES - offset], self.files[which]
        with self.member(who) as member:
            member.process.mmap(
                len(pages) * PAGE_SIZE,
                prot,
                "file|shared" if shared else "file|private",
                file=behind.file,
                addr=at(pages.start),
                offset=offset * PAGE_SIZE,
            )
            for index, n in enumerate(pages, offset):
                member.pages[n] = Page(prot, behind, index, shared=shared)

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
                for page in member.own(pages):
                    page.prot = prot
                    page.maybe_copied()  # where it is locked

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
                    page = member.pages.pop(old)
                    if keep:
                        member.pages[old] = page.emptied()
                    member.pages[new] = page.moved()
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
            for page in member.own(pages):
                if advice == "dontneed" and not page.shared:
                    page.may = page.may | {None} if refused else {None}
                    page.guarded &= refused
                elif advice == "free" and page.behind is None:
                    page.may = page.may | {None}
                elif advice == "populate_write":
                    page.maybe_copied()

    @rule(who=WHO, page=PAGE)
    def madvise_remove(self, who: int, page: int) -> None:
        """Only shared memory that has no disk can be given up everywhere."""
        with self.member(who) as member, suppress(MmError):
            member.process.madvise(at(page), PAGE_SIZE, "remove")
            found = member.pages[page]
            assert found.shared
            found.behind.holds(found.index, {ZEROS})

    @rule(who=WHO, pages=ranges(), advice=st.sampled_from(FORK_ADVICE))
    def madvise_fork(self, who: int, pages: range, advice: str) -> None:
        with self.member(who) as member:
            for n in sorted(member.pages.keys() & set(pages)):
                page = member.pages[n]
                if advice == "wipeonfork" and page.behind is not None:
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
            for page in member.own(pages):
                page.maybe_copied()
            if lock:
                member.process.mlock(*span(pages), onfault=onfault)
            else:
                member.process.munlock(*span(pages))

    # Loads and stores.

    @rule(who=WHO, page=PAGE, part=PARTS)
    def write(self, who: int, page: int, part: tuple[int, int]) -> None:
        offset, size = part
        with self.member(who) as member:
            data = self.fresh(size)
            with self.access(member, range(page, page + 1), write=True) as access:
                member.process.write(at(page) + offset, data)
            if access.done:
                member.pages[page].stored(data, offset)
                member.pages[page].guarded = False

    @rule(who=WHO, page=PAGE)
    def read(self, who: int, page: int) -> None:
        with self.member(who) as member, self.access(member, range(page, page + 1), write=False):
            data = member.process.read(at(page), PAGE_SIZE)
            member.pages[page].saw(data)

    @rule(who=WHO, page=PAGE)
    def mem_read(self, who: int, page: int) -> None:
        with self.member(who) as member, self.forced(member, page, write=False):
            data = member.process.mem_read(at(page), PAGE_SIZE)
            member.pages[page].saw(data)

    @rule(who=WHO, page=PAGE, part=PARTS)
    def mem_write(self, who: int, page: int, part: tuple[int, int]) -> None:
        offset, size = part
        with self.member(who) as member:
            data = self.fresh(size)
            with self.forced(member, page, write=True) as access:
                member.process.mem_write(at(page) + offset, data)
            if access.done:
                member.pages[page].stored(data, offset)
                member.pages[page].guarded = False

    @rule(who=WHO, pages=ranges(), write=st.booleans(), longterm=st.booleans(), plain=st.booleans())
    def pin(self, who: int, pages: range, write: bool, longterm: bool, plain: bool) -> None:
        longterm = longterm and not plain
        with self.member(who) as member, suppress(MmError):
            for page in member.own(pages):
                page.maybe_copied()
            hold = member.process.pin
            self.pins.append(hold(*span(pages), write=write, longterm=longterm, plain=plain))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop(0).release()

    # Files.

    @rule(which=FILES, pos=OFFSETS, nbytes=SIZES)
    def file_write(self, which: int, pos: int, nbytes: int) -> None:
        file, data = self.files[which], self.fresh(min(nbytes, PAGES * PAGE_SIZE - pos))
        done = 0
        with suppress(*self.limited):
            done = file.file.write(pos, data)
        assert done == len(data) or self.limited
        if done:
            file.write(pos, data[:done])

    @rule(which=FILES, pos=OFFSETS, nbytes=SIZES)
    def file_read(self, which: int, pos: int, nbytes: int) -> None:
        file = self.files[which]
        with suppress(*self.limited):
            data = file.file.read(pos, nbytes)
            assert len(data) == max(min(nbytes, file.size - pos), 0) or self.limited
            file.read(pos, data)

    @rule(which=FILES, size=st.integers(0, PAGES * PAGE_SIZE))
    def truncate(self, which: int, size: int) -> None:
        file = self.files[which]
        try:
            file.file.truncate(size)
        except self.limited:
            return
        file.resize(size)
        for member in self.members:
            for page in member.pages.values():
                if page.behind is file and page.beyond:
                    page.may = {None}

    @rule(pos=OFFSETS, nbytes=SIZES)
    def punch_hole(self, pos: int, nbytes: int) -> None:
        file = self.files[0]
        nbytes = max(min(nbytes, file.size - pos), 0)
        if nbytes:
            file.file.fallocate("punch_hole|keep_size", pos, nbytes)
            file.write(pos, bytes(nbytes))

    @rule(which=FILES)
    def fsync(self, which: int) -> None:
        self.files[which].file.fsync()

    @rule(caches=st.booleans())
    def sync(self, caches: bool) -> None:
        self.machine.sync()
        if caches:
            self.machine.drop_caches()

    @rule(which=FILES)
    def renew_file(self, which: int) -> None:
        """It has no name any more, and stays for those who map it; another one takes its place."""
        old = self.files[which].file
        if which:
            disk = self.disks[which - 1]
            disk.unlink("file")
            new = disk.create("file")
        else:
            new = self.machine.memfd_create("memory")
        old.close()
        self.files[which].file = None
        self.files[which] = Object(file=new)

    # What userland serves.

    @rule(who=WHO, pages=ranges(), modes=st.sampled_from(["missing", "wp", "missing|wp", ""]))
    def register(self, who: int, pages: range, modes: str) -> None:
        """Its fd says that nobody is to be asked, and faults end with SIGBUS."""
        with self.member(who) as member, suppress(InvalidArgument):
            if member.fd is None:
                member.fd = member.process.userfaultfd("sigbus")
            if modes:
                member.fd.register(*span(pages), modes)
            else:
                member.fd.unregister(*span(pages))
            asked = frozenset(modes.split("|")) - {""}
            for page in member.own(pages):
                if not (asked and asked <= page.uffd):
                    page.uffd = asked
                    page.guarded &= "wp" in asked

    @rule(who=WHO, page=PAGE, zeros=st.booleans())
    def bring(self, who: int, page: int, zeros: bool) -> None:
        with self.member(who) as member:
            if member.fd is None:
                return
            data, found = self.fresh(), member.pages.get(page)
            with suppress(NoEntry, Exists, *self.limited):
                if zeros:
                    member.fd.zeropage(at(page), PAGE_SIZE)
                else:
                    member.fd.copy(at(page), data)
                assert found.uffd
                assert None in found.may
                found.saw(ZEROS)
                found.stored(ZEROS if zeros else data)

    @rule(who=WHO, pages=ranges(), on=st.booleans())
    def guard(self, who: int, pages: range, on: bool) -> None:
        with self.member(who) as member:
            if all("wp" in page.uffd for page in member.own(pages)) and member.own(pages):
                member.fd.writeprotect(*span(pages), on)
                for page in member.own(pages):
                    page.guarded = on

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
        with (
            self.mirror(who, device) as (member, mirror),
            self.access(member, pages, write=False),
        ):
            answer = mirror.read(at(pages.start), len(pages))
            for page, data in zip(member.own(pages), answer.data, strict=True):
                page.saw(data.tobytes())

    @rule(who=WHO, device=DEVICES, pages=ranges())
    def device_write(self, who: int, device: int, pages: range) -> None:
        """It may be refused pages of its own that are read-only, and stop anywhere."""
        stopped, data = True, self.fresh()
        with self.mirror(who, device) as (member, mirror):
            whole = np.frombuffer(data * len(pages), dtype=np.uint8).reshape(-1, PAGE_SIZE)
            with suppress(MmError):
                mirror.write(at(pages.start), len(pages), whole)
                stopped = False
            assert stopped or len(pages) == len(member.own(pages))
            for page in member.own(pages):
                due = page.due(write=True)
                assert stopped or not due
                if not due:
                    page.maybe_copied()
                    page.stored(data, sure=not stopped)
                    page.guarded &= stopped

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
        with self.mirror(who, device) as (member, mirror), suppress(MmError):
            for page in member.own(pages):
                page.maybe_copied()
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
        self.check()


class TestFamilies:
    def test_any_sequence(self):
        """Each process finds what it stored, or had when it was forked, whatever follows what."""
        run_state_machine_as_test(
            Processes, settings=settings(max_examples=12, stateful_step_count=40)
        )

    @pytest.mark.slow
    def test_ten_thousand_steps(self):
        """As above, for 10,000 steps and more."""
        run_state_machine_as_test(
            Processes, settings=settings(max_examples=100, stateful_step_count=120)
        )
