"""A device that fails on demand: which calls fail, how, and what its user sees of it.

That nothing is lost, whatever fails, is in test_every_fault.py.
"""

import time

import numpy as np
import pytest

from devices import NumpyDevice
from devices.faulty import DeviceLost, Fault, Faulty
from devices.ops import DeviceError
from devices.wrappers import Limited
from mm import PAGE_SIZE, BusError, Busy, InvalidArgument
from mm.errors import MmError, TimedOut
from tests.world import mapped_range


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
