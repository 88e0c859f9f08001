"""Memory that comes where a device has its PFNs. Linux: mm/memory_hotplug.c."""

import pytest

from devices import NumpyDevice
from hmm import Resource, hmm_devmem_add_resource
from mm import Busy, Exists, Machine
from mm.types import MemoryType
from tests.special_pages.scenes import away


class TestRegisterMemoryResource:
    """mm/memory_hotplug.c, register_memory_resource()."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_conflict(self, kind):
        """-EEXIST: even private memory, which nobody addresses, keeps others from its addresses."""
        world = away(kind=kind)
        free = world.machine.nr_free_pages

        with pytest.raises(Exists, match=f"is memory of {world.gpu.name}"):
            world.machine.add_memory("240MiB")

        assert free == world.machine.nr_free_pages
        world.machine.verify()
        assert world.intact()

    def test_beside_a_device(self):
        """What fits below is added, and the device's pages stay the device's."""
        world = away()
        world.machine.add_memory("236MiB")
        world.free_at_boot += (236 << 20) // 4096

        assert [True] * 3 == world.on_device()
        world.machine.verify()
        assert world.intact()

    def test_after_the_device(self):
        """When it is closed its addresses are free."""
        machine = Machine(("16MiB",), payload=False, max_physmem="32MiB")
        gpu = NumpyDevice(machine, "4MiB")
        with pytest.raises(Exists):
            machine.add_memory("16MiB")
        gpu.close()
        machine.add_memory("16MiB")

        machine.verify()

    def test_device_where_memory_is(self):
        """The other way round it is -EBUSY, also of memory that came late."""
        machine = Machine(("16MiB",), payload=False, max_physmem="64MiB")
        machine.add_memory("16MiB")
        resource = Resource(20 << 20, (24 << 20) - 1, MemoryType.DEVICE_PUBLIC)

        with pytest.raises(Busy, match="zone"):
            hmm_devmem_add_resource(machine.mem, object(), "card", resource)
