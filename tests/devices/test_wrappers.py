"""Wrappers: each does its one thing, they go together, and the device is the same without them."""

import re

import pytest
import structlog
from structlog.testing import capture_logs

from devices import NumpyDevice
from devices.logged import Entry, Logged, load, replay, save
from devices.ops import DeviceError
from devices.wrappers import Counting, Limited, Wrapper
from mm import PAGE_SIZE, InvalidArgument, Machine
from tests.world import mapped_range


class Plain(NumpyDevice):
    """Has the four functions and no other."""

    clear = None


class Failing(NumpyDevice):
    """Fails to copy anything back."""

    def copy_out(self, pages, system, rows):
        raise DeviceError("the bus is on fire")


def wrapped(wrap, pages=8, driver=NumpyDevice, **options):
    """A world whose device is wrapped: the world, and the wrapper."""
    world = mapped_range(pages=pages, driver=driver, **options)
    return world, wrap(world.gpu)


def to_device(world, gpu, first=0, pages=None):
    return gpu.to_device(
        world.process, world.at(first), (world.pages if pages is None else pages) * PAGE_SIZE
    )


def there_and_back(world, gpu):
    """Everything to the device, a part by the CPU's fault, the rest on request."""
    to_device(world, gpu)
    assert [0, 1] == [world.process.read(world.at(page), 1)[0] for page in (0, 1)]
    gpu.to_system(world.process, world.addr, world.nbytes)
    assert world.intact()


class TestWrapper:
    def test_the_device_shows_through(self):
        """What a wrapper does not do itself, the device does."""
        world, gpu = wrapped(Wrapper)

        to_device(world, gpu)

        assert gpu.device is world.gpu
        assert (gpu.name, gpu.npages, gpu.stats) == ("numpy0", 1024, world.gpu.stats)
        assert bytes(range(8)) == gpu.read(world.process, world.addr, world.nbytes)[::PAGE_SIZE]

    def test_lacks_what_the_device_lacks(self):
        """A function that the driver has not, its wrapper has not either."""
        assert wrapped(Wrapper, driver=Plain)[1].clear is None
        assert wrapped(Wrapper)[1].clear is not None
        assert wrapped(Wrapper)[1].prefetch is None

    def test_no_such_thing(self):
        """Nor does it have what no device has."""
        with pytest.raises(AttributeError, match="warp_drive"):
            _ = wrapped(Wrapper)[1].warp_drive

    def test_taken_off(self):
        """A wrapper that is taken off is asked no more."""
        world, gpu = wrapped(Counting)
        with gpu:
            to_device(world, gpu, pages=3)
        to_device(world, world.gpu)

        assert {"allocate": 3, "copy_in": 3} == gpu.pages
        assert world.gpu.ops is world.gpu

    def test_only_the_last_can_be_taken_off(self):
        """One that is wrapped itself stays."""
        _, inner = wrapped(Counting)
        outer = Logged(inner)

        with pytest.raises(InvalidArgument, match="Counting is wrapped by <Logged of <Counting"):
            inner.take_off()

        outer.take_off()
        inner.take_off()

    def test_close(self):
        """A wrapped device closes as any other."""
        world, gpu = wrapped(Counting)
        to_device(world, gpu)

        gpu.close()

        assert gpu.closed
        assert world.intact()
        assert 0 == gpu.in_use


class TestLimited:
    def test_never_above(self):
        """A device with a limit evicts to stay below it, and loses nothing."""
        world, gpu = wrapped(lambda gpu: Limited(gpu, "64KiB"), pages=100, memory="1MiB")
        counting = Counting(gpu)

        for first in range(0, 100, 10):
            to_device(world, gpu, first, pages=10)
            gpu.write(world.process, world.at(first), bytes([first % 251]))

        assert 16 >= counting.peak
        assert world.gpu.stats.evicted_pages > 0
        assert world.intact()

    def test_larger_than_the_limit(self):
        """Of what is larger, as much as fits goes to the device."""
        world, gpu = wrapped(lambda gpu: Limited(gpu, "16KiB"))

        assert 4 == to_device(world, gpu).migrated
        assert 0 == gpu.free_pages
        assert world.intact()

    def test_of_a_limit(self):
        """The lower of two limits holds; without it, the other does."""
        world, outer = wrapped(lambda gpu: Limited(Limited(gpu, "16KiB"), "8KiB"))
        assert 2 == to_device(world, outer).migrated

        outer.take_off()

        assert 4 == to_device(world, outer, 4, pages=4).migrated

    @pytest.mark.parametrize("size", ["0", "4095", "5MiB"])
    def test_wrong_size(self, size):
        """A limit is at least a page, and no more than there is."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match=r"numpy0: a limit of .* is not between"):
            Limited(world.gpu, size)

        assert world.gpu.ops is world.gpu


class TestCounting:
    def test_counts(self):
        """Calls and pages by function; pages in use, and the most that ever were."""
        world, gpu = wrapped(Counting)
        world.process.madvise(world.at(2), 2 * PAGE_SIZE, "dontneed")

        to_device(world, gpu)
        gpu.to_system(world.process, world.addr, 3 * PAGE_SIZE)

        assert {"allocate": 1, "copy_in": 1, "clear": 1, "copy_out": 1, "free": 1} == gpu.calls
        assert {"allocate": 8, "copy_in": 6, "clear": 2, "copy_out": 3, "free": 3} == gpu.pages
        assert (5, 8) == (gpu.in_use, gpu.peak)

    def test_failures(self):
        """A call that raises is counted as one, and not its pages."""
        world, gpu = wrapped(Counting, driver=Failing)
        to_device(world, gpu)

        with pytest.raises(DeviceError, match="on fire"):
            gpu.to_system(world.process, world.addr, world.nbytes)

        assert {"copy_out": 1} == gpu.failed
        assert 0 == gpu.pages["copy_out"]
        world.process.munmap(world.addr, world.nbytes)  # nothing comes back from this device

    def test_device_in_use(self):
        """A device that was in use before is counted as it was."""
        world = mapped_range()
        to_device(world, world.gpu)

        assert 5 == Counting(world.gpu).in_use


class TestLogged:
    def test_log(self):
        """Every call is in the log, with its pages."""
        world, gpu = wrapped(Logged)

        to_device(world, gpu, pages=3)
        gpu.to_system(world.process, world.at(1), PAGE_SIZE)

        assert [
            Entry("allocate", [0, 1, 2], asked=3),
            Entry("copy_in", [0, 1, 2]),
            Entry("copy_out", [1]),
            Entry("free", [1]),
        ] == gpu.log

    def test_structlog(self):
        """And goes through structlog."""
        world, gpu = wrapped(Logged, driver=Failing)
        structlog.reset_defaults()
        with capture_logs() as logs:
            to_device(world, gpu)
            with pytest.raises(DeviceError):
                gpu.to_system(world.process, world.addr, world.nbytes)
        world.process.munmap(world.addr, world.nbytes)

        assert ["allocate", "copy_in", "copy_out"] == [log["op"] for log in logs]
        assert {"device_op"} == {log["event"] for log in logs}
        assert logs[2]["error"].endswith("the bus is on fire")

    def test_file(self, tmp_path):
        """A log comes back from a file as it was."""
        world, gpu = wrapped(Logged)
        there_and_back(world, gpu)

        save(gpu.log, tmp_path / "log.jsonl")

        assert gpu.log == load(tmp_path / "log.jsonl")

    @pytest.mark.parametrize("line", ["copy_in 3", '{"op": "reboot"}', '{"what": 1}', "[]"])
    def test_no_log(self, tmp_path, line):
        """A file that is no log is refused, with the line."""
        (tmp_path / "log.jsonl").write_text(f'{{"op": "allocate", "asked": 3}}\n{line}\n')

        with pytest.raises(InvalidArgument, match=r"log.jsonl, line 2"):
            load(tmp_path / "log.jsonl")


def log_of_a_run():
    """What a device is asked in a run with holes, evictions and a process that goes."""
    world, gpu = wrapped(Logged, pages=40, memory="64KiB")
    world.process.madvise(world.at(14), 4 * PAGE_SIZE, "dontneed")
    for first in (0, 12, 24, 6):
        to_device(world, gpu, first, pages=12)
    world.process.munmap(world.at(20), 20 * PAGE_SIZE)
    return gpu.log


def fresh(driver=NumpyDevice, memory="64KiB"):
    return driver(Machine(("1MiB",), max_physmem="64MiB"), memory)


class LosesATail(NumpyDevice):
    """Copies all bytes of a page but the last."""

    def copy_out(self, pages, system, rows):
        system[rows, :-1] = self.memory[pages, :-1]


class ClearsNothing(NumpyDevice):
    """Leaves what was there."""

    def clear(self, pages):
        """Nothing."""


class TestReplay:
    def test_same_driver(self):
        """The same device does the same again, and is empty afterwards."""
        gpu = fresh()

        assert [] == replay(log_of_a_run(), gpu)
        assert 16 == gpu.allocate(16).size

    def test_other_pages(self):
        """A device that gives other pages does as well."""
        gpu = fresh(memory="128KiB")
        gpu.allocate(5)

        assert [] == replay(log_of_a_run(), gpu)

    @pytest.mark.parametrize(
        ("driver", "says"),
        [
            (LosesATail, "copy_out of .* pages: pages .* do not hold what was copied there"),
            (ClearsNothing, "copy_out of .* pages: pages .* do not hold what was copied there"),
            (Failing, "copy_out of .* pages: DeviceError: .*on fire"),
        ],
    )
    def test_wrong_driver(self, driver, says):
        """A device that does otherwise is found out, at the entry where it did."""
        differences = replay(log_of_a_run(), fresh(driver))

        assert differences
        assert all(re.match(f"entry [0-9]+, {says}", difference) for difference in differences)

    def test_smaller_device(self):
        """One that is too small is told so, and replays what it can."""
        differences = replay(log_of_a_run(), fresh(memory="32KiB"))

        assert "entry 0, allocate of 12 pages: 8 pages of 12 asked for" == differences[0]

    def test_recorded_failure(self):
        """What failed the first time may fail again; where it does not, that is said."""
        log = [
            Entry("allocate", [3], asked=1),
            Entry("copy_in", [3]),
            Entry("copy_out", [3], error="DeviceError: on fire"),
        ]

        assert [] == replay(log, fresh(Failing))
        assert ["entry 2, copy_out of 1 pages: no error, where there was DeviceError: on fire"] == (
            replay(log, fresh())
        )

    def test_recorded_loss(self):
        """A page that was lost the first time, and not now, is a difference."""
        log = [
            Entry("allocate", [3, 4], asked=2),
            Entry("copy_in", [3, 4]),
            Entry("copy_out", [3, 4], lost=[4]),
        ]

        assert ["entry 2, copy_out of 2 pages: pages [] are lost, not [4]"] == replay(log, fresh())
