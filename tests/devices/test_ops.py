"""What a driver may have or not: each is used where it exists, and not missed where it does not."""

import numpy as np
import pytest

from devices import Driver, NumpyDevice
from devices.ops import OPTIONAL
from mm import PAGE_SIZE
from tests.world import in_step, mapped_range

BLOCK = 16 * PAGE_SIZE


class Bare(Driver):
    """The four methods and nothing else."""

    def __init__(self, machine, memory="64MiB", kind="private", **options):
        super().__init__(machine, memory, kind, **options)
        self.used = np.zeros(self.npages, dtype=np.bool_)
        self.vram = np.full((self.npages, PAGE_SIZE), 0xEE, dtype=np.uint8)

    def allocate(self, npages):
        pages = np.flatnonzero(~self.used)[:npages]
        self.used[pages] = True
        return pages

    def free(self, pages):
        self.used[pages] = False

    def copy_in(self, pages, system, rows):
        assert pages.size
        self.vram[pages] = system[rows]

    def copy_out(self, pages, system, rows):
        assert pages.size
        system[rows] = self.vram[pages]


class Eager(NumpyDevice):
    """Brings a block of 64 KiB along, and what is outside of it too."""

    asked = ()

    def prefetch(self, addrs, start, end):
        self.asked = (*self.asked, (addrs.tolist(), start, end))
        first = addrs[0] // BLOCK * BLOCK
        return np.concatenate([[0, end + PAGE_SIZE], np.arange(first, first + BLOCK, PAGE_SIZE)])


class Mortal(NumpyDevice):
    """Says when it goes, and who is still there."""

    def power_off(self):
        self.last = (self.closed, self.chunks.free_pages == self.npages)


class TestBare:
    def test_has_no_more(self):
        """A driver that writes four methods has what the base class gives, and lacks the rest."""
        gpu = mapped_range(driver=Bare).gpu

        assert [None] * len(OPTIONAL) == [getattr(gpu, name) for name in OPTIONAL]
        assert gpu.memory is None
        assert "bare0" == gpu.name

    def test_there_and_back(self):
        """It migrates all the same; holes are zeros without clear()."""
        world = mapped_range(driver=Bare)
        world.process.madvise(world.at(2), PAGE_SIZE, "dontneed")

        assert 5 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated

        assert [0, 1, 0, 3, 4] == world.contents()
        assert bytes(PAGE_SIZE) == world.process.read(world.at(2), PAGE_SIZE)

    def test_full(self):
        """A device without a free page is asked to copy nothing."""
        world = mapped_range(driver=Bare, memory="8KiB")
        world.gpu.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        world.hold(*world.pfns()[:2].tolist())

        assert 0 == world.gpu.to_device(world.process, world.at(2), 2 * PAGE_SIZE).migrated

    def test_names(self):
        """Devices of one class are numbered."""
        world = mapped_range(driver=Bare)

        assert "bare1" == Bare(world.machine, "64KiB").name


class TestPrefetch:
    def fault(self, pages=40, **options):
        world = mapped_range(pages=pages, driver=Eager, addr=1 << 30, **options)
        world.gpu.read(world.process, world.at(20), 1)
        return world

    def test_brings_more(self):
        """A fault brings what the driver wants with it, as far as the memory reaches."""
        world = self.fault()

        assert [16 <= page < 32 for page in range(40)] == world.on_device()
        assert (([world.at(20)], world.addr, world.addr + world.nbytes),) == world.gpu.asked
        assert in_step(world.gpu)
        assert world.intact()

    def test_no_further_fault(self):
        """What came along needs no fault of its own."""
        world = self.fault()

        got = world.gpu.read(world.process, world.at(16), BLOCK)

        assert bytes(range(16, 32)) == got[::PAGE_SIZE]
        assert 1 == world.gpu.stats.device_faults

    def test_full(self):
        """It evicts nothing: what finds no free memory does not come."""
        world = self.fault(memory="16KiB")

        assert 4 == sum(world.on_device())
        assert world.on_device()[20]
        assert 0 == world.gpu.stats.evicted_pages

    def test_pinned(self):
        """What cannot move stays, and no harm is done."""
        world = mapped_range(pages=40, driver=Eager, addr=1 << 30)
        world.pin(18)

        world.gpu.write(world.process, world.at(20), b"x")

        assert [16 <= page < 32 and page != 18 for page in range(40)] == world.on_device()
        world.machine.verify()


class TestPowerOff:
    def test_last(self):
        """It is called once, when everything has left."""
        world = mapped_range(driver=Mortal)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.gpu.close()
        first, world.gpu.last = world.gpu.last, None
        world.gpu.close()

        assert (True, True) == first
        assert world.gpu.last is None
        assert world.intact()

    def test_failure(self):
        """A device that fails to go quietly is gone all the same."""

        class Loud(NumpyDevice):
            def power_off(self):
                raise RuntimeError("it still hums")

        world = mapped_range(driver=Loud)

        with pytest.raises(RuntimeError, match="hums"):
            world.gpu.close()

        assert world.gpu.closed
        assert world.intact()
