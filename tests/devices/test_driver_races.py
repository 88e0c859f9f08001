"""A device and others at work at once, in every order that few preemptions allow."""

import pytest

from devices import NumpyDevice
from tests.interleave import explore
from tests.world import in_step, mapped_range


def load(world, page, nbytes=3):
    return world.gpu.read(world.process, world.at(page), nbytes)


def store(world, page, data):
    world.gpu.write(world.process, world.at(page), data)


def full_device():
    """A range of two pages; the device's only page holds the first, which cannot leave."""
    world = mapped_range(pages=2, memory="4KiB", filled=False)
    store(world, 0, b"held")
    world.hold(world.pfns().item(0))
    return world


class TestDeviceStores:
    @pytest.mark.parametrize("way", ["to_system", "CPU load", "evict"])
    def test_page_on_its_way_back(self, way):
        """A device's store is not lost, however it falls into its page's way back."""

        def scenario(together):
            world = mapped_range(pages=1, filled=False)
            store(world, 0, b"old")
            back = {
                "to_system": lambda: world.gpu.to_system(world.process, world.addr, 1),
                "CPU load": lambda: world.process.read(world.addr, 1),
                "evict": lambda: world.gpu.make_room(world.gpu.npages),
            }

            together(lambda: store(world, 0, b"new"), back[way])

            assert b"new" == world.process.read(world.addr, 3)

        explore(scenario, preemptions=1)

    def test_page_on_its_way_in(self):
        """A device's store to system memory is not lost when the page comes meanwhile."""

        def scenario(together):
            world = mapped_range(pages=1, filled=False)
            pin = world.pin(0)
            store(world, 0, b"old")
            pin.release()

            together(
                lambda: store(world, 0, b"new"),
                lambda: world.gpu.to_device(world.process, world.addr, 1),
            )

            assert b"new" == world.process.read(world.addr, 3)

        explore(scenario, preemptions=1)

    def test_cpu_stores_beside_it(self):
        """Device and CPU that store to one page at once both find their bytes."""

        def scenario(together):
            world = mapped_range(pages=1, filled=False)

            together(
                lambda: store(world, 0, b"device"),
                lambda: world.process.write(world.addr + 6, b"CPU"),
            )

            assert b"deviceCPU" == load(world, 0, 9)
            assert in_step(world.gpu)

        explore(scenario, preemptions=1)


class TestDeviceMaps:
    def test_page_that_another_device_takes(self):
        """A page of the system that another device takes is out of this one's table after."""

        def scenario(together):
            world = full_device()
            world.process.write(world.at(1), b"old")
            other = NumpyDevice(world.machine, "4KiB", name="numpy1")

            together(
                lambda: load(world, 1),
                lambda: other.to_device(world.process, world.at(1), 1),
            )

            assert in_step(world.gpu)
            other.write(world.process, world.at(1), b"new")
            assert b"new" == load(world, 1)

        explore(scenario, preemptions=1)

    def test_zero_page_that_a_cpu_replaces(self):
        """A CPU's first store is seen by a device that was mapping the zero page."""

        def scenario(together):
            world = full_device()
            world.process.read(world.at(1), 1)

            together(
                lambda: load(world, 1),
                lambda: world.process.write(world.at(1), b"new"),
            )

            assert in_step(world.gpu)
            assert b"new" == load(world, 1)

        explore(scenario, preemptions=1)

    def test_memory_that_goes(self):
        """Memory that is unmapped is out of the device's table after."""

        def scenario(together):
            world = mapped_range(pages=2, filled=False)

            together(
                lambda: load(world, 1),
                lambda: world.process.munmap(world.at(0), 4096),
            )

            assert in_step(world.gpu)
            assert b"\0\0\0" == load(world, 1)

        explore(scenario, preemptions=1)


class TestTwoDevices:
    def test_both_store(self):
        """Two devices that store to one page at once both find their bytes."""

        def scenario(together):
            world = mapped_range(pages=1, filled=False)
            other = NumpyDevice(world.machine, "4KiB", name="numpy1")

            together(
                lambda: store(world, 0, b"one"),
                lambda: other.write(world.process, world.addr + 3, b"two"),
            )

            assert b"onetwo" == world.process.read(world.addr, 6)

        explore(scenario, preemptions=1)
