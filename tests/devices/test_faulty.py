"""A device that fails on demand, and what becomes of memory then: it is all in one place, intact.

The oracle is a dict of what each page of each process must hold.
"""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import NumpyDevice
from devices.faulty import HOW, DeviceLost, Fault, Faulty
from devices.ops import DeviceError
from devices.wrappers import Counting, Limited
from mm import PAGE_SIZE, BusError, Busy, InvalidArgument
from mm.errors import MmError, TimedOut
from mm.pgtable import pte_offset, pte_pfn, pte_present
from mm.swapops import is_device_private_entry, swp_offset
from tests.world import ended_worlds, in_step, mapped_range

PAGES = 24
PLACES = [(op, how) for op, ways in HOW.items() for how in ways]


class Memory:
    """Processes that share a range page by page, a device too small for it, and what they hold."""

    def __init__(self, memory="64KiB", **faults):
        self.world = mapped_range(pages=PAGES, memory=memory, filled=False)
        self.gpu = Faulty(self.world.gpu, **faults)
        self.counting = Counting(self.gpu)
        self.world.gpu.timeout = 0.001
        self.holds = {self.world.process: [0] * PAGES}
        self.failed = 0

    @property
    def processes(self):
        return list(self.holds)

    def tried(self, work):
        """Do *work*; False where the device failed or had lost the page."""
        try:
            work()
        except (DeviceError, BusError, TimedOut):
            self.failed += 1
            return False
        return True

    def move(self, way, first, pages, who=0):
        process = self.processes[who % len(self.holds)]
        first, pages = first % PAGES, min(pages, PAGES - first % PAGES)
        self.tried(lambda: getattr(self.gpu, way)(process, self.world.at(first), pages * PAGE_SIZE))

    def store(self, side, page, value, who=0):
        """A whole page is stored, or nothing of it is."""
        process = self.processes[who % len(self.holds)]
        data = bytes([value]) * PAGE_SIZE
        if side == "cpu":
            done = self.tried(lambda: process.write(self.world.at(page), data))
        else:
            done = self.tried(lambda: self.gpu.write(process, self.world.at(page), data))
        if done:
            self.holds[process][page] = value

    def load(self, side, page, who=0):
        process = self.processes[who % len(self.holds)]
        found = []
        if side == "cpu":
            self.tried(lambda: found.append(process.read(self.world.at(page), PAGE_SIZE)))
        else:
            self.tried(lambda: found.append(self.gpu.read(process, self.world.at(page), PAGE_SIZE)))
        assert set(found) <= {bytes([self.holds[process][page]]) * PAGE_SIZE}

    def drop(self, page, who=0):
        process = self.processes[who % len(self.holds)]
        process.madvise(self.world.at(page), PAGE_SIZE, "dontneed")
        self.holds[process][page] = 0

    def evict(self):
        self.tried(lambda: self.gpu.make_room(self.gpu.npages))

    def fork(self):
        if len(self.holds) < 3:
            parent = self.processes[0]
            self.holds[parent.fork("child")] = list(self.holds[parent])

    def play(self, steps):
        """Do all of *steps*, and look after each."""
        for name, *args in steps:
            getattr(self, name)(*args)
            self.check()

    def check(self):
        """Nothing leaks, and each page in device memory is in use there, once."""
        self.world.machine.verify()
        assert in_step(self.world.gpu)
        used = set()
        for process in self.holds:
            pool = self.world.machine.mem.tables
            ptes = pool.entries[pte_offset(pool, process.mm.pgd, self.world.addrs)]
            assert not (pte_present(ptes) & is_device_private_entry(ptes)).any()
            used |= set(swp_offset(ptes[is_device_private_entry(ptes)]).tolist())
            assert not self.world.gpu.own(ptes)[0][pte_present(ptes)].any()
            assert (pte_pfn(ptes[pte_present(ptes)]) < self.world.machine.mem.max_pfn).all()
        in_use = len(used) + self.stranded()
        assert in_use == self.gpu.npages - self.gpu.chunks.free_pages == self.counting.in_use

    def stranded(self):
        """Pages of the device that a copy which hangs may still write to."""
        zones = [self.gpu.mem.zone[pin.pfns] for pin in self.gpu.mem.pins]
        return sum(int((zone == self.gpu.zone.index).sum()) for zone in zones)

    def end(self):
        """Nothing fails any more: all is readable but what was lost; how many pages were."""
        self.gpu.armed = False
        self.check()
        lost = 0
        for process, holds in self.holds.items():
            for page, value in enumerate(holds):
                try:
                    found = process.read(self.world.at(page), PAGE_SIZE)
                except BusError:
                    lost += 1
                else:
                    assert bytes([value]) * PAGE_SIZE == found
        self.check()
        self.gpu.let_go()
        assert [] == self.gpu.mem.pins
        self.check()
        self.counting.take_off()
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
    memory.move("to_device", 2, 18, who=1)
    memory.move("to_system", 0, 12)
    memory.load("device", 6)
    memory.evict()
    memory.move("to_device", 0, PAGES)
    memory.load("cpu", 21, who=1)


def calls_of_everything():
    """How often each function is called when nothing fails."""
    memory = Memory()
    everything(memory)
    calls = dict(memory.counting.calls)
    assert 0 == memory.end() == memory.failed
    return calls


class TestEveryPlace:
    @pytest.mark.parametrize(("op", "how"), PLACES, ids=[f"{op}-{how}" for op, how in PLACES])
    def test_one_fault(self, op, how):
        """Wherever one call fails, in whatever way, each page is in one place and intact."""
        calls = calls_of_everything()[op]
        assert calls >= 2
        for number in range(1, calls + 1):
            with ended_worlds():
                memory = Memory(**{op: {"fail_at": number, "how": how, "delay": 0}})
                everything(memory)

                lost = memory.end()

                assert 1 == len(memory.gpu.injected)
                assert (lost > 0) == (how == "lose")
                assert how in ("raise", "torn", "lose", "fail", "hang") or not memory.failed

    @pytest.mark.parametrize("op", HOW)
    def test_all_calls_fail(self, op):
        """A function that always fails leaves memory where it is, and intact."""
        memory = Memory(**{op: {"share": 1.0}})
        everything(memory)

        assert 0 == memory.end()

    def test_lost_device(self):
        """Whenever a device is lost, what it held answers with BusError; the rest is intact."""
        calls = sum(calls_of_everything()[op] for op in HOW)
        for number in range(1, calls + 1):
            with ended_worlds():
                memory = Memory(lost_at=number)
                everything(memory)

                held = len(set(memory.world.pfns()[memory.world.on_device()]))
                assert held <= memory.end() <= 2 * 16
                memory.gpu.close()


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
PAGE, WHO = st.integers(0, PAGES - 1), st.integers(0, 2)
WAY = st.sampled_from(["to_device", "to_system"])
SIDE, VALUE = st.sampled_from(["cpu", "device"]), st.integers(1, 255)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("move"),
            st.sampled_from(["to_device", "to_system"]),
            PAGE,
            st.integers(1, 24),
            WHO,
        ),
        st.tuples(st.just("store"), SIDE, PAGE, VALUE, WHO),
        st.tuples(st.just("load"), SIDE, PAGE, WHO),
        st.tuples(st.just("drop"), PAGE, WHO),
        st.tuples(st.just("evict")),
        st.tuples(st.just("fork")),
    ),
    max_size=25,
)


class TestSchedules:
    @given(faults=FAULTS, steps=STEPS, seed=st.integers(0, 99))
    def test_nothing_is_lost(self, faults, steps, seed):
        """Whatever fails, however often: all data is in one place afterwards, and readable."""
        with ended_worlds():
            memory = Memory(seed=seed, **faults)
            memory.play(steps)

            assert 0 == memory.end()

    @given(steps=STEPS, lost_at=st.integers(1, 30))
    def test_device_lost(self, steps, lost_at):
        """A device that is lost takes with it what it held, and nothing else."""
        with ended_worlds():
            memory = Memory(lost_at=lost_at)
            memory.play(steps)

            lost = memory.end()

            assert memory.gpu.lost or not lost


class TestFaulty:
    def small(self, **faults):
        world = mapped_range()
        return world, Faulty(world.gpu, **faults)

    def test_third_copy(self):
        """The copy that was named fails, in whichever direction, and no other."""
        world, gpu = self.small(copy={"fail_at": 3})
        gpu.to_device(world.process, world.addr, PAGE_SIZE)
        world.process.read(world.addr, 1)

        with pytest.raises(DeviceError, match="numpy0: copy_in 3 of 5 pages: raise"):
            gpu.to_device(world.process, world.addr, world.nbytes)

        assert 5 == gpu.to_device(world.process, world.addr, world.nbytes).migrated
        assert ["numpy0: copy_in 3 of 5 pages: raise"] == gpu.injected

    def test_short_allocation(self):
        """By default an allocation that fails gives nothing; with how="half", half."""
        world, gpu = self.small(allocate=Fault(fail_at=1))
        assert 0 == gpu.to_device(world.process, world.addr, world.nbytes).migrated
        gpu.take_off()

        with Faulty(world.gpu, allocate={"fail_at": 1, "how": "half"}) as again:
            moved = again.to_device(world.process, world.addr, world.nbytes)

        assert (2, {"not_chosen": 3}) == (moved.migrated, moved.stayed)

    def test_seed(self):
        """One seed fails the same calls each time, another one others."""

        def injected(seed):
            world, gpu = self.small(allocate={"share": 0.4}, seed=seed)
            for page in range(world.pages):
                gpu.to_device(world.process, world.at(page), PAGE_SIZE)
            return gpu.injected

        assert injected(1) == injected(1)
        assert 1 < len({tuple(injected(seed)) for seed in range(5)})

    def test_delay(self):
        """A call that is delayed takes its time, and is done."""
        world, gpu = self.small(copy_in={"fail_at": 1, "how": "delay", "delay": 0.05})
        begin = time.perf_counter()

        moved = gpu.to_device(world.process, world.addr, world.nbytes)

        assert time.perf_counter() - begin >= 0.05
        assert 5 == moved.migrated
        assert world.intact()

    def test_hang(self):
        """A copy that never ends is a timeout that names it; its pages come back when it does."""
        world, gpu = self.small(copy={"fail_at": (1, 3), "how": "hang"})
        world.gpu.timeout = 0.01
        free = world.gpu.free_pages

        with pytest.raises(TimedOut, match=r"copy_in 1 of 5 pages: .* not done after 0.01 s"):
            gpu.to_device(world.process, world.addr, world.nbytes)

        assert [False] * 5 == world.on_device()
        assert free - 5 == world.gpu.free_pages
        world.machine.verify()
        assert 5 == gpu.to_device(world.process, world.addr, world.nbytes).migrated
        with pytest.raises(TimedOut, match="numpy0: copy_out 3 of 1 pages"):
            world.process.read(world.addr, 1)
        assert world.intact()
        with pytest.raises(Busy):
            gpu.close()
        gpu.let_go()
        assert world.gpu.npages == world.gpu.free_pages
        gpu.close()

    def test_late(self):
        """A copy that ends late is waited for, and one that fails late is put back."""
        world, gpu = self.small(
            copy_in={"fail_at": 1, "how": "late", "delay": 0.02},
            copy_out={"fail_at": 1, "how": "fail"},
        )

        assert 5 == gpu.to_device(world.process, world.addr, world.nbytes).migrated
        with pytest.raises(DeviceError, match="copy_out 1 of 5 pages: fail"):
            gpu.to_system(world.process, world.addr, world.nbytes)

        assert [True] * 5 == world.on_device()
        assert world.intact()

    def test_too_late(self):
        """Late by more than anybody waits is a timeout, and the copy ends some other time."""
        world, gpu = self.small(copy={"fail_at": 1, "how": "late", "delay": 0.02})
        world.gpu.timeout = 0.015

        with pytest.raises(TimedOut):
            gpu.to_device(world.process, world.addr, world.nbytes)

        assert world.intact()
        gpu.let_go()
        assert 5 == gpu.to_device(world.process, world.addr, world.nbytes).migrated

    def test_disarmed(self):
        """Disarmed it neither fails nor counts."""
        world, gpu = self.small(copy={"fail_at": 1})
        gpu.armed = False
        assert 5 == gpu.to_device(world.process, world.addr, world.nbytes).migrated

        gpu.armed = True

        with pytest.raises(DeviceError, match="copy_out 1 of 1 pages"):
            world.process.read(world.addr, 1)

    def test_lost(self):
        """A lost device takes nothing in, and what it held is gone; it can be closed."""
        world, gpu = self.small()
        gpu.to_device(world.process, world.addr, 2 * PAGE_SIZE)

        gpu.lose()

        assert 0 == gpu.to_device(world.process, world.at(2), 2 * PAGE_SIZE).migrated
        with pytest.raises(BusError):
            world.process.read(world.addr, 1)
        with pytest.raises(DeviceLost, match="numpy0: copy_in of 1 pages: the device is lost"):
            gpu.copy_in(np.zeros(1, dtype=np.int64), world.machine.mem.payload, np.zeros(1, int))
        gpu.close()
        assert b"\4" == world.process.read(world.at(4), 1)

    def test_under_and_above_others(self):
        """Faults below a limit and above it are the same to the user."""
        for wrap in (
            lambda gpu: Faulty(Limited(gpu, "8KiB"), copy_in={"fail_at": 2}),
            lambda gpu: Limited(Faulty(gpu, copy_in={"fail_at": 2}), "8KiB"),
        ):
            world = mapped_range()
            gpu = wrap(world.gpu)
            assert 2 == gpu.to_device(world.process, world.addr, world.nbytes).migrated
            with pytest.raises(MmError, match="copy_in 2 of 2 pages"):
                gpu.to_device(world.process, world.at(3), 2 * PAGE_SIZE)
            assert world.intact()

    @pytest.mark.parametrize(
        ("faults", "says"),
        [
            ({"copy": {"fails": 3}}, r"copy= has no fails; it takes fail_at, share, how, delay"),
            ({"copy": {"how": "lose"}}, "copy cannot fail by 'lose'; it can by raise, torn, delay"),
            ({"allocate": {"how": "torn"}}, "allocate cannot fail by 'torn'"),
            ({"clear": {"fail_at": 0}}, "fails at calls from 1 on"),
            ({"clear": {"share": 1.5}}, "or a share from 0 to 1"),
            ({"copy": {"fail_at": 1}, "copy_in": {"fail_at": 1}}, "give it alone"),
        ],
    )
    def test_wrong_plan(self, faults, says):
        """A plan that makes no sense is refused, and says what would."""
        gpu = NumpyDevice(mapped_range().machine, "64KiB", name="other")

        with pytest.raises(InvalidArgument, match=says):
            Faulty(gpu, **faults)

        assert gpu.ops is gpu
