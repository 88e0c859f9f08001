"""Memory of a driver of v4.20 that CPUs reach: hmm_devmem_add_resource() and its end."""

import pytest

from hmm import Resource, hmm_devmem_add_resource, hmm_devmem_remove
from mm import PAGE_SIZE, Busy
from mm.mmu_notifier import MmuNotifyEvent
from mm.pgtable import pte_devmap
from mm.types import MemoryType
from tests.hmm.test_devmem import Card
from tests.mm.test_device_exclusive import Listener, faults_of
from tests.world import mapped_range


class Bytes(dict):
    """Contents by PFN, which are rows of the machine's."""

    def __init__(self, payload):
        self.payload = payload

    def __setitem__(self, pfn, data):
        self.payload[pfn] = data

    def pop(self, pfn):
        return self.payload[pfn]


class PublicCard(Card):
    """A card whose memory has physical addresses that its bus gave it."""

    def __init__(self, mem):
        super().__init__(mem)
        hmm_devmem_remove(self.devmem)
        resource = Resource(64 << 20, (65 << 20) - 1, MemoryType.DEVICE_PUBLIC)
        self.devmem = hmm_devmem_add_resource(mem, self, self, resource)
        self.unused = list(range(self.devmem.pfn_first, self.devmem.pfn_last))
        self.contents = Bytes(mem.payload)


@pytest.fixture
def world():
    """Three pages, and `world.card`, a device with public memory."""
    world = mapped_range(pages=3)
    world.card = PublicCard(world.machine.mem)
    yield world
    world.let_go()
    hmm_devmem_remove(world.card.devmem)


class TestRemove:
    def test_pages_go_back_without_the_driver(self, world):
        """There is no fault that it could serve: the core moves them, for all who map them."""
        world.card.to_device(world)
        assert pte_devmap(world.ptes()).all()
        child = world.seen_by(world.process.fork())

        assert 0 == faults_of(world, lambda: hmm_devmem_remove(world.card.devmem))

        assert [False] * 3 == world.on_device() == child.on_device()
        assert ([], True, True) == (world.card.faults, world.intact(), child.intact())
        assert 3 == len(world.card.freed)

    def test_page_that_a_device_has_for_itself(self, world):
        """It is given back first."""
        world.card.to_device(world)
        world.make_exclusive(1)
        listener = Listener(world)

        hmm_devmem_remove(world.card.devmem)

        assert [False] * 3 == world.on_device()
        assert world.intact()
        assert MmuNotifyEvent.EXCLUSIVE == listener.heard[0][0]

    def test_page_that_somebody_holds(self, world):
        """EBUSY, and the memory stays."""
        world.card.to_device(world)
        pin = world.pin(2)

        with pytest.raises(Busy):
            hmm_devmem_remove(world.card.devmem)

        assert [False, False, True] == world.on_device()
        assert world.intact()
        pin.release()

    def test_nobody_maps_it(self, world):
        """What is unmapped is free already."""
        world.card.to_device(world)
        world.process.munmap(world.at(1), PAGE_SIZE)

        assert 1 == len(world.card.freed)
