"""A device and others at work at once, in every order that few preemptions allow."""

import pytest

from devices import NumpyDevice
from mm import PAGE_SIZE
from tests.interleave import explore
from tests.world import in_step, mapped_range


def load(world, page, nbytes=3):
    return world.gpu.read(world.process, world.at(page), nbytes)


def store(world, page, data):
    world.gpu.write(world.process, world.at(page), data)


def full_device():
    """A device whose only page is in use, and locked by somebody: it cannot leave."""
    world = mapped_range(pages=1, memory="4KiB", filled=False)
    store(world, 0, b"x")
    world.lock(0)
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
    """The device's only page cannot leave, so it maps all others where they are."""

    def test_page_that_another_device_takes(self):
        """A page that another device takes is out of this one's table after."""
        world = full_device()
        other = NumpyDevice(world.machine, "64KiB", name="numpy1")
        process = world.process

        def scenario(together):
            addr = process.mmap(PAGE_SIZE)
            process.write(addr, b"old")

            together(
                lambda: world.gpu.read(process, addr, 3),
                lambda: other.to_device(process, addr, 1),
            )

            assert in_step(world.gpu)
            other.write(process, addr, b"new")
            assert b"new" == world.gpu.read(process, addr, 3)
            process.munmap(addr, PAGE_SIZE)

        explore(scenario, preemptions=1)

    def test_first_page_of_a_process(self):
        """The same where it is the first page that the device maps of a process."""
        world = full_device()
        other = NumpyDevice(world.machine, "64KiB", name="numpy1")

        def scenario(together):
            with world.machine.spawn("both") as process:
                addr = process.mmap(PAGE_SIZE)
                process.write(addr, b"old")

                together(
                    lambda: world.gpu.read(process, addr, 3),
                    lambda: other.to_device(process, addr, 1),
                )

                assert in_step(world.gpu)

        explore(scenario, preemptions=1)

    @pytest.mark.slow
    def test_zero_page_that_a_cpu_replaces(self):
        """A CPU's first store is seen by a device that was about to map the zero page."""
        world = full_device()

        process = world.process

        def scenario(together):
            addr = process.mmap(PAGE_SIZE)
            process.touch(addr, PAGE_SIZE, write=False)

            together(
                lambda: world.gpu.read(process, addr, 3),
                lambda: process.write(addr, b"new"),
            )

            assert in_step(world.gpu)
            assert b"new" == world.gpu.read(process, addr, 3)
            process.munmap(addr, PAGE_SIZE)

        explore(scenario, preemptions=2)

    def test_memory_that_goes(self):
        """Memory that is unmapped is out of the device's table after."""

        def scenario(together):
            world = mapped_range(pages=2, filled=False)

            together(
                lambda: load(world, 1),
                lambda: world.process.munmap(world.at(0), PAGE_SIZE),
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
