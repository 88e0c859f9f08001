"""Processes in control groups, against a plain model of groups as sets of pages."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mm import PAGE_SIZE, Machine, OutOfMemory
from mm.swap import lru_add_drain_all
from tests.world import mapped_range

PAGES = 12
GROUPS = ("/a", "/a/b", "/a/b/c", "/a/d", "/e")
SPANS = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES))
WHO = st.integers(0, 3)
WHERE = st.sampled_from(GROUPS)


@dataclass(eq=False)
class Page:
    """A page of the model: the group that pays for it, wherever it is, and its first byte."""

    group: str | None
    byte: int


@dataclass(eq=False)
class Member:
    """A process, and what the model has it map, page by page."""

    process: object
    addr: int
    group: str | None = None
    pages: dict[int, Page] = field(default_factory=dict)


class ControlGroups(RuleBasedStateMachine):
    """Stores, forks, moves and migrations without limits: every page is its group's."""

    @initialize()
    def boot(self):
        self.world = mapped_range(PAGES, filled=False, nodes=("4MiB",), memory="256KiB")
        self.machine, self.gpu = self.world.machine, self.world.gpu
        self.groups = {path: self.machine.cgroup(path) for path in GROUPS}
        self.members = [Member(self.world.process, self.world.addr)]
        self.stored = 0

    def member(self, who):
        return self.members[who % len(self.members)]

    def shared(self, page):
        return sum(page in member.pages.values() for member in self.members) > 1

    @rule(who=WHO, span=SPANS, device=st.booleans())
    def store(self, who, span, device):
        member = self.member(who)
        self.stored = self.stored % 250 + 1
        for index in range(span[0], min(sum(span), PAGES)):
            page = member.pages.get(index)
            if page is None or self.shared(page):
                page = member.pages[index] = Page(member.group, 0)
            page.byte = self.stored
            addr, data = member.addr + index * PAGE_SIZE, bytes([self.stored])
            if device:
                self.gpu.write(member.process, addr, data)
            else:
                member.process.write(addr, data)

    @rule(who=WHO, span=SPANS)
    def load(self, who, span):
        member = self.member(who)
        for index in range(span[0], min(sum(span), PAGES)):
            byte = member.pages[index].byte if index in member.pages else 0
            assert byte == member.process.read(member.addr + index * PAGE_SIZE, 1)[0]

    @rule(who=WHO, span=SPANS)
    def to_device(self, who, span):
        member = self.member(who)
        first, last = span[0], min(sum(span), PAGES)
        addr, nbytes = member.addr + first * PAGE_SIZE, (last - first) * PAGE_SIZE
        assert set(self.gpu.to_device(member.process, addr, nbytes).stayed) <= {"skipped"}
        for index in range(first, last):
            member.pages.setdefault(index, Page(member.group, 0))

    @rule(who=WHO, span=SPANS)
    def to_system(self, who, span):
        member = self.member(who)
        addr, nbytes = member.addr + span[0] * PAGE_SIZE, min(span[1], PAGES - span[0]) * PAGE_SIZE
        self.gpu.to_system(member.process, addr, nbytes)

    @rule(who=WHO, span=SPANS)
    def give_back(self, who, span):
        member = self.member(who)
        first, last = span[0], min(sum(span), PAGES)
        addr = member.addr + first * PAGE_SIZE
        member.process.madvise(addr, (last - first) * PAGE_SIZE, "dontneed")
        for index in range(first, last):
            member.pages.pop(index, None)

    @precondition(lambda self: len(self.members) < 4)
    @rule(who=WHO)
    def fork(self, who):
        parent = self.member(who)
        child = Member(parent.process.fork(), parent.addr, parent.group, dict(parent.pages))
        self.members.append(child)

    @precondition(lambda self: len(self.members) > 1)
    @rule(who=WHO)
    def exit(self, who):
        member = self.member(who)
        member.process.exit()
        self.members.remove(member)

    @rule(who=WHO, to=st.none() | WHERE, along=st.booleans())
    def move(self, who, to, along):
        member, group = self.member(who), self.groups.get(to)
        if group is not None:
            group.move_charge_at_immigrate = along
        member.process.move_to(group)
        if group is None or along:
            for page in member.pages.values():
                if page.group == member.group:
                    page.group = to
        member.group = to

    @rule(path=WHERE)
    def make_anew(self, path):
        """Take a group away where that may be, whatever it is charged with, and make another."""
        inside = [other for other in GROUPS if other.startswith(path + "/")]
        if inside or path in [member.group for member in self.members]:
            return
        self.groups[path].remove()
        self.groups[path] = self.machine.cgroup(path)
        pages = {page for member in self.members for page in member.pages.values()}
        for page in pages:
            if page.group == path:
                page.group = f"{path}/gone"  # not in the new one, but in what that is in

    @invariant()
    def every_page_is_its_groups(self):
        lru_add_drain_all(self.machine.mem)
        self.machine.verify()
        pages = {page for member in self.members for page in member.pages.values()}
        for path, group in self.groups.items():
            gone = f"{path}/gone"
            inside = [p for p in pages if p.group and f"{p.group}/".startswith(f"{path}/")]
            assert group.usage == PAGE_SIZE * sum(p.group != gone for p in inside)


TestControlGroups = ControlGroups.TestCase
TestControlGroups.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)


class FullGroups(RuleBasedStateMachine):
    """Two processes with limits and swap, beside plain arrays: what is stored is read again."""

    @initialize(limits=st.tuples(st.integers(4, 30), st.integers(4, 30), st.integers(8, 40)))
    def boot(self, limits):
        self.world = mapped_range(64, filled=False, nodes=("2MiB",), memory="64KiB", swap="2MiB")
        self.machine = self.world.machine
        paths = ("/a/b", "/a/c", "/a")
        self.groups = [
            self.machine.cgroup(path, limit=limit * PAGE_SIZE)
            for path, limit in zip(paths, limits, strict=True)
        ]
        other = self.machine.spawn("other")
        self.areas = [(self.world.process, self.world.addr), (other, other.mmap(64 * PAGE_SIZE))]
        for (process, _), group in zip(self.areas, self.groups, strict=False):
            process.move_to(group)
        self.twins = [np.zeros((64, PAGE_SIZE), dtype=np.uint8) for _ in self.areas]
        self.stored = 0

    @rule(who=st.integers(0, 1), first=st.integers(0, 63), count=st.integers(1, 64))
    def store(self, who, first, count):
        process, addr = self.areas[who]
        self.stored += 1
        data = self.twins[who][first : first + count]
        before = data.copy()
        data[:] = (
            np.arange(data.size, dtype=np.uint32).reshape(data.shape) * 7 + self.stored
        ) % 251
        try:
            process.write(addr + first * PAGE_SIZE, data.tobytes())
        except OutOfMemory:
            assert self.device_pages()
            read = self.read(who, first, data.shape[0])
            here = (read == before).all(axis=1) | (read == data).all(axis=1)
            assert here.all()
            data[:] = read

    def read(self, who, first, count):
        """Page by page, bringing device pages back where there is no room otherwise."""
        process, addr = self.areas[who]
        self.world.gpu.to_system(*self.areas[0], 64 * PAGE_SIZE)
        self.world.gpu.to_system(*self.areas[1], 64 * PAGE_SIZE)
        raw = process.read(addr + first * PAGE_SIZE, count * PAGE_SIZE)
        return np.frombuffer(raw, dtype=np.uint8).reshape(count, PAGE_SIZE)

    def device_pages(self):
        return sum(group.stat["device"] for group in self.groups[:2])

    @rule(who=st.integers(0, 1), first=st.integers(0, 63), count=st.integers(1, 64))
    def load(self, who, first, count):
        expected = self.twins[who][first : first + count]
        assert expected.tobytes() == self.read(who, first, expected.shape[0]).tobytes()

    @rule(who=st.integers(0, 1), first=st.integers(0, 63), count=st.integers(1, 10))
    def to_device(self, who, first, count):
        process, addr = self.areas[who]
        count = min(count, 64 - first)
        stayed = self.world.gpu.to_device(
            process, addr + first * PAGE_SIZE, count * PAGE_SIZE
        ).stayed
        assert set(stayed) <= {"over_limit", "skipped", "not_chosen"}

    @rule(who=st.integers(0, 1), first=st.integers(0, 63), count=st.integers(1, 64))
    def give_back(self, who, first, count):
        process, addr = self.areas[who]
        count = min(count, 64 - first)
        process.madvise(addr + first * PAGE_SIZE, count * PAGE_SIZE, "dontneed")
        self.twins[who][first : first + count] = 0

    @rule(which=st.integers(0, 2), limit=st.integers(12, 40))
    def change_limit(self, which, limit):
        self.world.gpu.to_system(*self.areas[0], 64 * PAGE_SIZE)
        self.world.gpu.to_system(*self.areas[1], 64 * PAGE_SIZE)
        self.groups[which].limit = limit * PAGE_SIZE
        assert limit * PAGE_SIZE == self.groups[which].limit

    @rule()
    def swap_groups(self):
        (one, _), (two, _) = self.areas
        first, second = one.cgroup, two.cgroup
        if self.device_pages():
            return
        first.move_charge_at_immigrate = second.move_charge_at_immigrate = False
        one.move_to(second)
        two.move_to(first)

    @invariant()
    def all_is_well(self):
        self.machine.verify()
        assert all(group.usage <= group.limit for group in self.groups)


TestFullGroups = FullGroups.TestCase
TestFullGroups.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


@pytest.fixture
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switch_often")
class TestThreads:
    def test_processes_of_one_group(self):
        """Three threads use four times what their group may have; each finds its bytes."""
        machine = Machine(("4MiB",), "8MiB", debug=True, max_physmem="4MiB")
        group, errors = machine.cgroup("/a", limit=200 * PAGE_SIZE), []

        def work(number):
            try:
                with machine.spawn(f"process {number}", cgroup=group) as process:
                    addr = process.mmap(260 * PAGE_SIZE)
                    for turn in range(3):
                        byte = bytes([number * 10 + turn])
                        process.write(addr, byte * 260 * PAGE_SIZE)
                        assert byte * 260 * PAGE_SIZE == process.read(addr, 260 * PAGE_SIZE)
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert [] == errors
        assert not any(thread.is_alive() for thread in threads)
        lru_add_drain_all(machine.mem)
        machine.verify()
        assert group.peak <= 200 * PAGE_SIZE
