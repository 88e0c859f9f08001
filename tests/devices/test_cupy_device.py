"""The CuPy device over a CuPy without a GPU (fake_cupy.py); over a real one: test_gpu.py."""

import builtins
import gc
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import migrate_between
from devices.conformance import RULES, check
from devices.cupy_plan import STAGING_PAGES, WORTH_A_COPY, copy_runs, staging_blocks
from devices.ops import DeviceError
from mm import PAGE_SIZE, InvalidArgument, Machine, OutOfMemory
from mm.errors import NoDevice, TimedOut
from tests.devices import fake_cupy
from tests.world import mapped_range

PERMUTED = st.integers(1, 60).flatmap(lambda n: st.permutations(range(n)))


@pytest.fixture
def cupy_device():
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture
def runtime(cupy_device):
    return cupy_device.runtime


class TestPlan:
    @given(order=PERMUTED, shift=st.integers(0, 100))
    def test_runs(self, order, shift):
        """Runs name every pair once, in order; or there are none, and many short ones."""
        pages = np.array(order)
        rows = pages + shift
        runs = copy_runs(pages, rows)

        pairs = [(r.page + i, r.row + i) for r in runs for i in range(r.npages)]
        if runs:
            assert list(zip(order, rows.tolist(), strict=True)) == pairs
            assert len(runs) == 1 or len(runs) * WORTH_A_COPY <= pages.size
        else:
            breaks = 1 + np.count_nonzero(np.diff(pages) != 1)
            assert breaks * WORTH_A_COPY > pages.size

    @pytest.mark.parametrize("npages", [1, 4095, 4096, 4097, 8193, 65536])
    def test_blocks(self, npages):
        """Blocks are about equal, no larger than a buffer, and cover every page."""
        sizes = [block.stop - block.start for block in staging_blocks(npages)]

        assert npages == sum(sizes)
        assert max(sizes) <= STAGING_PAGES
        assert max(sizes) - min(sizes) <= len(sizes)


class TestConformance:
    def test_every_rule_is_kept(self, cupy_device):
        """With whatever CuPy refuses, and copies that take their time, every promise is kept."""
        verdicts = list(check(cupy_device.CupyDevice))

        assert [] == [(v.rule, v.evidence) for v in verdicts if v.outcome != "pass"]
        assert len(RULES) == len(verdicts)


class TestCopies:
    def device(self, cupy_device, memory="4MiB"):
        machine = Machine(("16MiB",), max_physmem="256MiB")
        return cupy_device.CupyDevice(machine, memory), machine.mem.payload

    def test_one_dma_for_a_run(self, cupy_device, runtime):
        """A range that lies in a row on both sides is one DMA each way."""
        world = mapped_range(pages=200, driver=cupy_device.CupyDevice)

        world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert 1 == runtime.copies
        world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert 2 == runtime.copies
        assert world.intact()

    def test_one_dma_for_scattered_pages(self, cupy_device, runtime):
        """Scattered pages go together, not one by one."""
        gpu, system = self.device(cupy_device)
        rng = np.random.default_rng(1)
        pages, rows = rng.permutation(500), 1000 + rng.permutation(500)
        system[rows] = rng.integers(0, 256, (500, PAGE_SIZE), dtype=np.uint8)
        expected = system[rows]

        gpu.copy_in(pages, system, rows).wait(1)
        system[rows] = 0
        assert gpu.copy_out(pages, system, rows) is None

        assert 2 == runtime.copies
        assert np.array_equal(expected, system[rows])

    def test_many_blocks(self, cupy_device, monkeypatch):
        """More than fits the buffers goes block by block."""
        monkeypatch.setattr("devices.cupy_plan.STAGING_PAGES", 7)
        gpu, system = self.device(cupy_device)
        rng = np.random.default_rng(2)
        pages, rows = rng.permutation(100), rng.permutation(200)[:100]
        expected = system[rows] = rng.integers(0, 256, (100, PAGE_SIZE), dtype=np.uint8)

        gpu.copy_in(pages, system, rows).wait(1)
        system[rows] = 0
        gpu.copy_out(pages, system, rows)

        assert np.array_equal(expected, system[rows])

    def test_run_is_a_view(self, cupy_device):
        """A kernel gets the device's memory itself where the pages follow one another."""
        machine = Machine(("16MiB",), max_physmem="256MiB")
        gpu, process = cupy_device.CupyDevice(machine, "4MiB"), machine.spawn("train")
        a, seen = process.array(5000, dtype="int64"), []
        a[:] = np.arange(5000)

        gpu.run(seen.append, a)

        assert isinstance(seen[0], fake_cupy.Array)
        assert np.shares_memory(seen[0].host, gpu.memory.host)

    def test_between(self, cupy_device):
        """Two GPUs hand pages over by way of a buffer."""
        world = mapped_range(pages=30, driver=cupy_device.CupyDevice)
        other = cupy_device.CupyDevice(world.machine, "1MiB", device=1)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (
            30
            == migrate_between(world.gpu, other, world.process, world.addr, world.nbytes).migrated
        )
        assert world.intact()


class TestFailures:
    @pytest.mark.parametrize("pages", [3, 40])
    def test_hang(self, cupy_device, pages):
        """A GPU that hangs is a timeout that names the copy, and nothing is lost."""
        world = mapped_range(pages=pages, driver=cupy_device.CupyDevice)
        world.gpu.timeout = 0.01
        fake_cupy.Event.hang = True

        with pytest.raises(TimedOut, match=rf"cupy0: copy_in of {pages} pages from PFN 0x"):
            world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.machine.verify()
        assert world.intact()
        fake_cupy.Event.hang = False
        world.gpu.timeout = 1
        for _ in range(2):
            world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert world.intact()
        world.gpu.stranded.reap()

    def test_error(self, cupy_device):
        """What the GPU reports is a DeviceError, and every page is where it was."""
        world = mapped_range(pages=5, driver=cupy_device.CupyDevice)
        fake_cupy.Event.fail = True

        with pytest.raises(DeviceError, match=r"copy_in of 5 pages.*cudaErrorIllegalAddress"):
            world.gpu.to_device(world.process, world.addr, world.nbytes)

        fake_cupy.Event.fail = False
        assert world.intact()

    def test_no_driver(self, cupy_device, runtime):
        """Without a driver the message says what to install; nothing is plugged in."""
        runtime.gpus = fake_cupy.CUDARuntimeError("cudaErrorInsufficientDriver: too old")
        machine = Machine(("1MiB",), max_physmem="64MiB")

        with pytest.raises(NoDevice, match=r"InsufficientDriver.*install NVIDIA's driver"):
            cupy_device.CupyDevice(machine, "64KiB")

        assert 0 == cupy_device.CupyDevice.count(machine)

    @pytest.mark.parametrize("number", [2, "7", -1, "first"])
    def test_no_such_gpu(self, cupy_device, number):
        """A GPU that there is not is refused by number."""
        with pytest.raises(InvalidArgument, match="is none of the 2 GPUs"):
            cupy_device.CupyDevice(Machine(("1MiB",), max_physmem="64MiB"), device=number)

    def test_device_memory(self, cupy_device):
        """More than the GPU has is refused with figures, and what was plugged in goes."""
        machine = Machine(("1MiB",), max_physmem="1GiB")

        with pytest.raises(OutOfMemory, match=r"wanted 256 MiB of device memory, .* are free"):
            cupy_device.CupyDevice(machine, "256MiB")

        assert 0 == cupy_device.CupyDevice.count(machine)
        machine.verify()

    def test_pinning(self, cupy_device, runtime):
        """A host that does not pin the machine's memory says what to do about it."""
        runtime.refuses_to_pin = True

        with pytest.raises(OutOfMemory, match=r"cannot be pinned .*ulimit -l"):
            cupy_device.CupyDevice(Machine(("1MiB",), max_physmem="64MiB"), "64KiB")

    def test_kind(self, cupy_device):
        """A GPU's memory is private."""
        with pytest.raises(InvalidArgument, match='device memory is "private"'):
            cupy_device.CupyDevice(Machine(("1MiB",), max_physmem="64MiB"), "64KiB", "public")


class TestLife:
    def test_pinned_once(self, cupy_device, runtime):
        """Two devices of a machine pin its memory once; the last one to go lets it go."""
        machine = Machine(("1MiB",), max_physmem="64MiB")
        first, second = (cupy_device.CupyDevice(machine, "64KiB") for _ in range(2))
        assert [256 * PAGE_SIZE] == list(runtime.registered.values())

        first.close()
        assert 1 == len(runtime.registered)
        second.close()

        assert {} == runtime.registered

    def test_forgotten(self, cupy_device, runtime):
        """A device that nobody closes lets go of everything when it is forgotten."""
        used = fake_cupy.Memory.used
        cupy_device.CupyDevice(Machine(("1MiB",), max_physmem="64MiB"), "64KiB")
        gc.collect()

        assert {} == runtime.registered
        assert used == fake_cupy.Memory.used

    def test_without_contents(self, cupy_device, runtime):
        """A machine without contents needs no memory of the GPU."""
        machine = Machine(("1MiB",), payload=False, max_physmem="64MiB")
        gpu = cupy_device.CupyDevice(machine, "64KiB")
        assert gpu.memory is None
        gpu.close()
        assert {} == runtime.registered


class TestMissing:
    def test_no_cupy(self, monkeypatch):
        """Without CuPy the message says what to install."""
        real = builtins.__import__

        def absent(name, *args, **options):
            if name.split(".")[0] == "cupy":
                raise ModuleNotFoundError("No module named 'cupy'")
            return real(name, *args, **options)

        monkeypatch.delitem(sys.modules, "devices.cupy_device", raising=False)
        monkeypatch.setattr(builtins, "__import__", absent)
        with pytest.raises(ImportError, match=r"pip install 'hmm-migrate\[cupy\]'"):
            import devices.cupy_device  # noqa: F401, PLC0415 - the import is what fails
