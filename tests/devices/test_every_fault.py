"""Whatever of a device fails, wherever: each page is in one place afterwards, and intact.

One scenario has the device do everything that it does; each of its calls fails once in each way,
with private and with public memory, with copies by threads where there is more than a page. Then
hypothesis draws scenarios and faults of its own. The oracle is a list of what each page of each
process must hold.
"""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import NumpyDevice, migrate_between
from devices.dma_fence import DmaFence
from devices.faulty import HOW, Fault, Faulty
from devices.ops import DeviceError
from devices.wrappers import Counting
from mm import PAGE_SIZE, BusError, Busy
from mm.errors import TimedOut
from mm.pgtable import pte_offset
from mm.swapops import is_device_exclusive_entry, swp_offset
from tests.world import ended_worlds, in_step, mapped_range

PAGES = 24
SMALL = 16 * PAGE_SIZE  # of device memory
PLACES = [(op, how) for op, ways in HOW.items() for how in ways]
FAILS = ("raise", "torn", "fail", "hang")  # the caller hears of it
HANGS = 0.001  # seconds, after which a copy that hangs is given up; others have all their time
KIND = pytest.mark.parametrize("kind", ["private", "public"])


@pytest.fixture(autouse=True, scope="module")
def _engines() -> Iterator[None]:
    """Engines copy what is more than a page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("devices.numpy_device.ENGINE_PAGES", 2)
        yield


class Impatient(Counting):
    """Counts, and waits for copies that hang a shorter time than for others."""

    def call(self, op, *args):
        result = super().call(op, *args)
        hangs = type(result) is DmaFence and result in self.inner.hung
        self.device.timeout = HANGS if hangs else NumpyDevice.timeout
        return result


class Memory:
    """Processes that share a range page by page, devices too small for it, and what they hold."""

    def __init__(self, kind="private", **faults):
        self.kind, self.faults = kind, faults
        self.world = mapped_range(pages=PAGES, memory=SMALL, kind=kind, filled=False)
        self.plug_in(self.world.gpu)
        self.other = NumpyDevice(self.world.machine, SMALL // 2, name="other")
        self.holds = {self.world.process: [0] * PAGES}
        self.failed = 0

    def plug_in(self, gpu):
        self.gpu = Faulty(gpu, **self.faults)
        self.counting = Impatient(self.gpu)

    def who(self, number):
        """A process."""
        processes = list(self.holds)
        return processes[number % len(processes)]

    def span(self, who, first, pages):
        """A process, and a part of its range."""
        return self.who(who), self.world.at(first), min(pages, PAGES - first) * PAGE_SIZE

    def tried(self, work):
        """Do *work*; False where the device failed, hangs, or had lost the page."""
        try:
            work()
        except (DeviceError, BusError, TimedOut, Busy):
            self.failed += 1
            return False
        return True

    # What may happen.

    def move(self, way, first, pages, who=0):
        self.tried(lambda: getattr(self.gpu, way)(*self.span(who, first, pages)))

    def between(self, back, first, pages, who=0):
        """From one device to the other, or back."""
        ends = (self.other, self.gpu.device) if back else (self.gpu.device, self.other)
        self.tried(lambda: migrate_between(*ends, *self.span(who, first, pages)))

    def store(self, side, page, value, who=0):
        """A whole page is stored, or nothing of it is."""
        process, data = self.who(who), bytes([value]) * PAGE_SIZE
        if side == "cpu":
            done = self.tried(lambda: process.write(self.world.at(page), data))
        else:
            done = self.tried(lambda: self.gpu.write(process, self.world.at(page), data))
        if done:
            self.holds[process][page] = value

    def load(self, side, page, who=0):
        process, found = self.who(who), []
        if side == "cpu":
            self.tried(lambda: found.append(process.read(self.world.at(page), PAGE_SIZE)))
        else:
            self.tried(lambda: found.append(self.gpu.read(process, self.world.at(page), PAGE_SIZE)))
        assert set(found) <= {bytes([self.holds[process][page]]) * PAGE_SIZE}

    def exclusive(self, first, pages, who=0):
        """A device takes pages for itself, which come back from this one for it."""
        seen = self.world.seen_by(self.who(who))
        self.tried(lambda: seen.make_exclusive(*range(first, min(first + pages, PAGES))))

    def drop(self, page, who=0):
        process = self.who(who)
        process.madvise(self.world.at(page), PAGE_SIZE, "dontneed")
        self.holds[process][page] = 0

    def remap(self, first, pages, who=0):
        """Unmapped, and mapped anew."""
        process, addr, nbytes = self.span(who, first, pages)
        process.munmap(addr, nbytes)
        process.mmap(nbytes, addr=addr)
        self.holds[process][first : first + pages] = [0] * (nbytes // PAGE_SIZE)

    def evict(self):
        self.tried(lambda: self.gpu.make_room(self.gpu.npages))

    def fork(self):
        if len(self.holds) < 3:
            self.holds[self.who(0).fork("child")] = list(self.holds[self.who(0)])

    def exit(self):
        if len(self.holds) > 1:
            process = self.who(-1)
            process.exit()
            del self.holds[process]

    def close(self, *, again=True):
        """The device goes if it can, and another comes."""
        if self.tried(self.gpu.close) and again:
            name = f"{self.gpu.name}'"
            self.plug_in(NumpyDevice(self.world.machine, SMALL, self.kind, name=name))

    # What must be.

    def play(self, steps):
        """Do all of *steps*, and look after each."""
        for name, *args in steps:
            getattr(self, name)(*args)
            self.check()

    def check(self):
        """Nothing leaks, and each page in device memory is in use there, once."""
        self.world.machine.verify()
        for gpu in (self.gpu.device, self.other):
            assert in_step(gpu)
            in_use = len(self.mapped(gpu)) + self.stranded(gpu)
            assert in_use == gpu.npages - gpu.chunks.free_pages
        assert self.counting.in_use == self.gpu.npages - self.gpu.chunks.free_pages

    def mapped(self, gpu):
        """The pages of a device that somebody maps."""
        pool, found = gpu.mem.tables, set()
        for process in self.holds:
            ptes = pool.entries[pte_offset(pool, process.mm.pgd, self.world.addrs)]
            own, pfns, _ = gpu.own(ptes)
            taken = swp_offset(ptes[is_device_exclusive_entry(ptes)])
            taken = taken[gpu.mem.zone[taken] == gpu.zone.index]
            found |= set(pfns[own].tolist()) | set(taken.tolist())
        return found

    def stranded(self, gpu):
        """How many of its pages a copy that hangs may still write to."""
        zones = [gpu.mem.zone[pin.pfns] for pin in gpu.mem.pins]
        return sum(int((zone == gpu.zone.index).sum()) for zone in zones)

    def end(self):
        """Nothing fails any more: all is readable but what was lost; how many pages were."""
        self.gpu.armed = False
        self.check()
        lost = sum(self.lost(process) for process in self.holds)
        self.gpu.let_go()
        assert [] == self.gpu.mem.pins
        self.check()
        self.counting.take_off()
        return lost

    def lost(self, process):
        """How many pages of *process* are lost, now that all others must be intact."""
        lost = 0
        for page, value in enumerate(self.holds[process]):
            try:
                found = process.read(self.world.at(page), PAGE_SIZE)
            except BusError:
                lost += 1
            else:
                assert bytes([value]) * PAGE_SIZE == found
        return lost


def everything(memory):
    """A run in which every function of a device is called, many times."""
    for page in range(PAGES - 4):
        memory.store("cpu", page, page + 1)
    memory.move("to_device", 0, 10)
    memory.move("to_device", 14, 10)
    memory.load("cpu", 3)
    memory.store("device", 20, 99)
    memory.store("device", 22, 98)
    memory.fork()
    memory.store("cpu", 4, 50, who=1)
    memory.store("device", 5, 51, who=1)
    memory.drop(15)
    memory.between(False, 14, 6)
    memory.move("to_device", 2, 18, who=1)
    memory.exclusive(3, 4)
    memory.between(True, 14, 4)
    memory.move("to_system", 0, 12)
    memory.load("device", 6)
    memory.evict()
    memory.remap(8, 2)
    memory.exit()
    memory.move("to_device", 0, PAGES)
    memory.load("cpu", 21)
    memory.fork()
    memory.close(again=False)


def calls_of_everything(kind):
    """How often each function is called when nothing fails."""
    memory = Memory(kind)
    everything(memory)
    calls = Counter(memory.counting.calls)
    assert 0 == memory.end() == memory.failed
    assert memory.gpu.closed
    return calls


class TestEveryPlace:
    @KIND
    @pytest.mark.parametrize(("op", "how"), PLACES, ids=[f"{op}-{how}" for op, how in PLACES])
    def test_one_fault(self, op, how, kind):
        """Wherever one call fails, in whatever way, each page is in one place and intact."""
        calls, all_lost = calls_of_everything(kind)[op], 0
        assert calls >= 2
        for number in range(1, calls + 1):
            with ended_worlds():
                memory = Memory(kind, **{op: {"fail_at": number, "how": how, "delay": 0}})
                everything(memory)

                lost = memory.end()

                (injected,) = memory.gpu.injected
                assert lost <= how.startswith("lose") * 2 * int(
                    injected.split(" of ")[1].split()[0]
                )
                assert how == "lose" or (how in FAILS) == bool(memory.failed)
                all_lost += lost
        assert bool(all_lost) == (how == "lose")

    @KIND
    @pytest.mark.parametrize(("op", "how"), PLACES, ids=[f"{op}-{how}" for op, how in PLACES])
    def test_all_calls_fail(self, op, how, kind):
        """A function that always fails leaves memory where it is, and intact."""
        memory = Memory(kind, **{op: {"share": 1.0, "how": how, "delay": 0}})
        everything(memory)

        assert memory.gpu.injected
        assert bool(memory.end()) == (how == "lose")

    @KIND
    def test_lost_device(self, kind):
        """Whenever a device is lost, what it held answers with BusError; the rest is intact."""
        calls = sum(calls_of_everything(kind)[op] for op in HOW)
        for number in range(1, calls + 1):
            with ended_worlds():
                memory = Memory(kind, lost_at=number)
                everything(memory)

                assert memory.gpu.lost
                assert memory.end() <= 2 * SMALL // PAGE_SIZE


FAULTS = st.fixed_dictionaries(
    {},
    optional={
        op: st.builds(
            Fault,
            fail_at=st.lists(st.integers(1, 12), max_size=3).map(tuple),
            share=st.sampled_from([0.0, 0.1, 0.5]),
            how=st.sampled_from([way for way in ways if way not in ("lose", "delay")]),
            delay=st.just(0.0),
        )
        for op, ways in HOW.items()
    },
)
KINDS = st.sampled_from(["private", "public"])
PAGE, COUNT, WHO = st.integers(0, PAGES - 1), st.integers(1, PAGES), st.integers(0, 2)
SIDE, VALUE = st.sampled_from(["cpu", "device"]), st.integers(1, 255)
WAY = st.sampled_from(["to_device", "to_system"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("move"), WAY, PAGE, COUNT, WHO),
        st.tuples(st.just("between"), st.booleans(), PAGE, COUNT, WHO),
        st.tuples(st.just("store"), SIDE, PAGE, VALUE, WHO),
        st.tuples(st.just("load"), SIDE, PAGE, WHO),
        st.tuples(st.just("exclusive"), PAGE, st.integers(1, 4), WHO),
        st.tuples(st.just("drop"), PAGE, WHO),
        st.tuples(st.just("remap"), PAGE, st.integers(1, 4), WHO),
        st.tuples(st.sampled_from(["evict", "fork", "fork", "exit", "close"])),
    ),
    max_size=25,
)


class TestSchedules:
    @given(kind=KINDS, faults=FAULTS, steps=STEPS, seed=st.integers(0, 99))
    def test_nothing_is_lost(self, kind, faults, steps, seed):
        """Whatever fails, however often: all data is in one place afterwards, and readable."""
        with ended_worlds():
            memory = Memory(kind, seed=seed, **faults)
            memory.play(steps)

            assert 0 == memory.end()

    @given(kind=KINDS, steps=STEPS, lost_at=st.integers(1, 30))
    def test_device_lost(self, kind, steps, lost_at):
        """A device that is lost takes with it what it held, and nothing else."""
        with ended_worlds():
            memory = Memory(kind, lost_at=lost_at)
            memory.play(steps)

            lost = memory.end()

            assert memory.gpu.lost or not lost or ("close",) in steps
