"""Drivers whose hooks raise, lose pages, or give pages that they may not give: nothing is lost."""

import numpy as np
import pytest

from devices import NumpyDevice
from mm import PAGE_SIZE, BusError, DriverBug
from tests.world import in_step, mapped_range

GROUP = 16  # pages of a chunk of 64 KiB


class FailingDevice(NumpyDevice):
    """Raises in the hook that `failing` names, once its work is done."""

    failing = None

    def allocate(self, npages):
        return self._done("allocate", super().allocate(npages))

    def copy_in(self, pages, system, rows):
        self._done("copy_in", super().copy_in(pages, system, rows))

    def copy_out(self, pages, system, rows):
        return self._done("copy_out", super().copy_out(pages, system, rows))

    def clear(self, pages):
        self._done("clear", super().clear(pages))

    def _done(self, hook, result):
        if self.failing == hook:
            raise RuntimeError(f"{hook}: link down")
        return result


class ForgetfulDevice(NumpyDevice):
    """Loses the pages with the numbers in `lost`."""

    lost = ()

    def copy_out(self, pages, system, rows):
        super().copy_out(pages, system, rows)
        return np.isin(pages, self.lost)


class WrongDevice(NumpyDevice):
    """Gives pages that are *wrong* in place of the free ones."""

    wrong = None

    def allocate(self, npages):
        pages = super().allocate(npages).tolist()
        return np.array(self.wrong(pages) if self.wrong else pages, dtype=np.int64)


WRONG_PAGES = {
    "twice": lambda pages: [pages[0], *pages[:-1]],
    "in use": lambda pages: [0, *pages[1:]],
    "too many": lambda pages: [*pages, 12],
    "outside": lambda pages: [*pages[:-1], 16],
    "negative": lambda pages: [-1, *pages[1:]],
}


def to_device(world, first=0, pages=None):
    count = world.pages if pages is None else pages
    return world.gpu.to_device(world.process, world.at(first), count * PAGE_SIZE)


def to_system(world):
    return world.gpu.to_system(world.process, world.addr, world.nbytes)


class TestFailingHook:
    @pytest.mark.parametrize("hook", ["allocate", "copy_in", "clear"])
    def test_on_the_way_in(self, hook):
        """What a hook raises reaches the caller, and every page is back where it was."""
        world = mapped_range(pages=8, driver=FailingDevice)
        world.process.munmap(world.at(3), PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, addr=world.at(3))  # a hole among the pages
        world.gpu.failing = hook

        with pytest.raises(RuntimeError, match=f"{hook}: link down"):
            to_device(world)

        assert [False] * 8 == world.on_device()
        assert world.gpu.npages == world.gpu.chunks.free_pages
        assert [0, 1, 2, 0, 4, 5, 6, 7] == world.contents()
        world.machine.verify()

    @pytest.mark.parametrize("way", ["to_system", "cpu", "evict", "close"])
    def test_on_the_way_back(self, way):
        """What copy_out raises reaches the caller; the pages stay where they are."""
        world = mapped_range(driver=FailingDevice)
        to_device(world)
        world.gpu.failing = "copy_out"
        back = {
            "to_system": lambda: to_system(world),
            "cpu": world.contents,
            "evict": lambda: world.gpu.make_room(world.gpu.npages),
            "close": world.gpu.close,
        }

        with pytest.raises(RuntimeError, match="copy_out: link down"):
            back[way]()

        assert [True] * 5 == world.on_device()
        world.machine.verify()
        world.gpu.failing = None
        assert world.intact()

    def test_while_making_room(self):
        """Where an eviction fails the newcomer stays where it is, and so does the oldest."""
        world = mapped_range(pages=2 * GROUP, memory="64KiB", driver=FailingDevice)
        to_device(world, pages=GROUP)
        world.gpu.failing = "copy_out"

        with pytest.raises(RuntimeError, match="copy_out: link down"):
            to_device(world, first=GROUP, pages=GROUP)

        assert [True] * GROUP + [False] * GROUP == world.on_device()
        world.machine.verify()
        world.gpu.failing = None
        assert world.intact()


class TestLostPages:
    @pytest.mark.parametrize("way", ["to_system", "cpu", "evict"])
    def test_bus_error(self, way):
        """Pages that the device lost give a BusError; the others come back."""
        world = mapped_range(driver=ForgetfulDevice)
        to_device(world)
        world.gpu.lost = (1, 4)
        if way == "to_system":
            to_system(world)
        elif way == "evict":
            world.gpu.make_room(world.gpu.npages)

        for page in (1, 4):
            with pytest.raises(BusError, match=f"contents.*{world.at(page):#x} are lost"):
                world.process.read(world.at(page), 1)

        assert [0, 2, 3] == [world.process.read(world.at(page), 1)[0] for page in (0, 2, 3)]
        world.machine.verify()

    def test_result(self):
        """The result says how many were lost, and their memory is the device's again."""
        world = mapped_range(driver=ForgetfulDevice)
        to_device(world)
        world.gpu.lost = (1, 4)

        result = to_system(world)

        assert (5, 3, {"lost": 2}) == (result.collected, result.migrated, result.stayed)
        assert world.gpu.npages == world.gpu.chunks.free_pages
        world.machine.verify()

    def test_device_loses_it_too(self):
        """The device cannot reach what it lost: the page behind it may be somebody else's."""
        world = mapped_range(driver=ForgetfulDevice)
        to_device(world)
        world.gpu.lost = (1,)

        to_system(world)

        assert in_step(world.gpu)
        with pytest.raises(BusError, match=f"numpy0.*{world.at(1):#x} are lost"):
            world.gpu.read(world.process, world.at(1), 1)

    def test_no_way_back_to_the_device(self):
        """A lost page cannot be migrated."""
        world = mapped_range(driver=ForgetfulDevice)
        to_device(world)
        world.gpu.lost = (1,)
        to_system(world)

        result = to_device(world)

        assert (4, {"skipped": 1}) == (result.migrated, result.stayed)
        assert [True, False, True, True, True] == world.on_device()
        world.machine.verify()

    def test_unmapped(self):
        """Where the lost page was there can be a new one."""
        world = mapped_range(driver=ForgetfulDevice)
        to_device(world)
        world.gpu.lost = (1,)
        to_system(world)

        world.process.mmap(PAGE_SIZE, addr=world.at(1))

        assert [0, 0, 2, 3, 4] == world.contents()
        world.machine.verify()


class TestWrongAllocate:
    @pytest.mark.parametrize("wrong", list(WRONG_PAGES.values()), ids=list(WRONG_PAGES))
    def test_driver_bug(self, wrong):
        """A driver that gives pages which it may not give is told so, and nothing is lost."""
        world = mapped_range(memory="64KiB", driver=WrongDevice)
        to_device(world, pages=1)
        world.gpu.wrong = wrong

        with pytest.raises(DriverBug):
            to_device(world, first=1, pages=4)

        assert [True] + [False] * 4 == world.on_device()
        world.machine.verify()
        assert world.intact()
