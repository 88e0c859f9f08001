"""A device and others at work at once, in every order that few preemptions allow.

The world is made once, and each schedule gets a mapping of its own: booting takes longer than
what is tried here. What CPUs and migrations do to one another is in
tests/hmm/test_interleavings.py.
"""

import pytest

from devices import NumpyDevice
from mm import PAGE_SIZE
from tests.interleave import explore
from tests.world import in_step, mapped_range


class NoRoom(NumpyDevice):
    """Has no page for anybody, so that it maps all pages where they are."""

    def allocate(self, npages):
        return super().allocate(0)


def small_world(driver=NumpyDevice):
    """A process without memory but one page, and a device that knows the process."""
    world = mapped_range(pages=1, nodes=("2MiB",), memory="64KiB", filled=False, driver=driver)
    world.gpu.read(world.process, world.addr, 1)
    return world


def another(world):
    return NumpyDevice(world.machine, "64KiB", name="numpy1")


def every_order(process, scenario, *, preemptions=1):
    """Run *scenario*(together, address of a fresh page) under every schedule."""

    def one(together):
        addr = process.mmap(PAGE_SIZE)
        scenario(together, addr)
        process.munmap(addr, PAGE_SIZE)

    explore(one, preemptions=preemptions)


class TestDeviceStores:
    @pytest.mark.parametrize("way", ["to_system", "CPU load", "evict"])
    def test_page_on_its_way_back(self, way):
        """A device's store is not lost, however it falls into its page's way back."""
        world = small_world()
        gpu, process = world.gpu, world.process
        back = {
            "to_system": lambda addr: gpu.to_system(process, addr, 1),
            "CPU load": lambda addr: process.read(addr, 1),
            "evict": lambda addr: gpu.make_room(gpu.npages),
        }

        def scenario(together, addr):
            gpu.write(process, addr, b"old")

            together(lambda: gpu.write(process, addr, b"new"), lambda: back[way](addr))

            assert b"new" == process.read(addr, 3)

        every_order(process, scenario)

    def test_page_on_its_way_in(self):
        """A device's store to system memory is not lost when the page comes meanwhile."""
        world = small_world()
        gpu, process = world.gpu, world.process

        def scenario(together, addr):
            with process.pin(addr, 1):
                gpu.write(process, addr, b"old")

            together(
                lambda: gpu.write(process, addr, b"new"),
                lambda: gpu.to_device(process, addr, 1),
            )

            assert b"new" == process.read(addr, 3)

        every_order(process, scenario)

    def test_cpu_stores_beside_it(self):
        """Device and CPU that store to one page at once both find their bytes."""
        world = small_world()
        gpu, process = world.gpu, world.process

        def scenario(together, addr):
            together(
                lambda: gpu.write(process, addr, b"device"),
                lambda: process.write(addr + 6, b"CPU"),
            )

            assert b"deviceCPU" == gpu.read(process, addr, 9)
            assert in_step(gpu)

        every_order(process, scenario)

    def test_another_device_stores_beside_it(self):
        """Two devices that store to one page at once both find their bytes."""
        world = small_world()
        gpu, process, other = world.gpu, world.process, another(world)

        def scenario(together, addr):
            together(
                lambda: gpu.write(process, addr, b"one"),
                lambda: other.write(process, addr + 3, b"two"),
            )

            assert b"onetwo" == process.read(addr, 6)

        every_order(process, scenario)


class TestDeviceMaps:
    def test_page_that_another_device_takes(self):
        """A page that another device takes is out of this one's table after."""
        world = small_world(NoRoom)
        gpu, process, other = world.gpu, world.process, another(world)

        def scenario(together, addr):
            process.write(addr, b"old")

            together(lambda: gpu.read(process, addr, 3), lambda: other.to_device(process, addr, 1))

            assert in_step(gpu)
            other.write(process, addr, b"new")
            assert b"new" == gpu.read(process, addr, 3)

        every_order(process, scenario)

    def test_first_page_of_a_process(self):
        """The same where it is the first page that the device maps of a process."""
        world = small_world(NoRoom)
        gpu, other = world.gpu, another(world)

        def scenario(together):
            with world.machine.spawn("new") as process:
                addr = process.mmap(PAGE_SIZE)
                process.write(addr, b"old")

                together(
                    lambda: gpu.read(process, addr, 3),
                    lambda: other.to_device(process, addr, 1),
                )

                assert in_step(gpu)

        explore(scenario, preemptions=1)

    def test_zero_page_that_a_cpu_replaces(self):
        """A CPU's first store is seen by a device that was about to map the zero page."""
        world = small_world(NoRoom)
        gpu, process = world.gpu, world.process

        def scenario(together, addr):
            process.touch(addr, PAGE_SIZE, write=False)

            together(lambda: gpu.read(process, addr, 3), lambda: process.write(addr, b"new"))

            assert in_step(gpu)
            assert b"new" == gpu.read(process, addr, 3)

        every_order(process, scenario, preemptions=2)

    def test_memory_that_goes(self):
        """Memory that is unmapped is out of the device's table after."""
        world = small_world()
        gpu, process = world.gpu, world.process

        def scenario(together, addr):
            neighbour = process.mmap(PAGE_SIZE)

            together(lambda: gpu.read(process, addr, 3), lambda: process.munmap(neighbour, 1))

            assert in_step(gpu)
            assert bytes(3) == gpu.read(process, addr, 3)

        every_order(process, scenario)
