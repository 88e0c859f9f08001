"""Device memory of a driver that knows hmm_devmem and migrate_vma(), and nothing else of ours."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from hmm import (
    MIGRATE_PFN_LOCKED,
    HmmDevmem,
    MigrateVmaSelect,
    Resource,
    hmm_devmem_add,
    hmm_devmem_add_resource,
    hmm_devmem_page_get_drvdata,
    hmm_devmem_page_set_drvdata,
    hmm_devmem_remove,
    hmm_vma_alloc_locked_page,
    migrate_pfn,
    migrate_pfn_to_pfn,
    migrate_vma,
)
from hmm.devmem import PA_SECTION_SIZE
from hmm.migrate_pfn import is_migrating, is_valid
from mm import (
    PAGE_SIZE,
    Busy,
    Deadlock,
    InvalidArgument,
    Machine,
    OutOfMemory,
    OutOfRange,
)
from mm.filemap import lock_page, page_locked, unlock_page
from mm.swap import get_page, put_page
from mm.types import MemoryType, VmFault
from tests.interleave import explore
from tests.world import mapped_range

TO_DEVICE, TO_SYSTEM = object(), object()
SECTION_PAGES = PA_SECTION_SIZE // PAGE_SIZE


class Card:
    """A device: its pages lie in a list when free, and in a dict of bytes when used."""

    name = "card"

    def __init__(self, mem, size=1):
        self.mem = mem
        self.freed = []
        self.faults = []
        self.hook = lambda: None
        self.devmem = hmm_devmem_add(mem, self, self, size)
        self.unused = list(range(self.devmem.pfn_first, self.devmem.pfn_last))
        self.contents = {}

    def free(self, devmem, pfns):
        self.freed += pfns.tolist()
        self.unused += pfns.tolist()

    def fault(self, devmem, vma, addrs, pfns, *, write):
        self.faults.append((addrs.tolist(), pfns.tolist(), write))
        for addr in addrs.tolist():
            self.migrate(vma, addr, addr + PAGE_SIZE, TO_SYSTEM)
        return VmFault(0)

    def migrate(self, vma, start, end, direction):
        kinds = {TO_DEVICE: MigrateVmaSelect.SYSTEM, TO_SYSTEM: MigrateVmaSelect.DEVICE_PRIVATE}
        src, dst = np.zeros((2, (end - start) // PAGE_SIZE), dtype=np.uint64)
        owner = self.devmem.owner
        return migrate_vma(
            self, vma, start, end, src, dst, direction, select=kinds[direction], pgmap_owner=owner
        )

    def to_device(self, world, first=0, count=None):
        count = world.pages if count is None else count
        with world.process.mm.mmap_sem.read():
            return self.migrate(world.vma, world.at(first), world.at(first + count), TO_DEVICE)

    def alloc_and_copy(self, vma, src, dst, start, end, private):
        self.hook()
        for i in np.flatnonzero(is_migrating(src)).tolist():
            frm = migrate_pfn_to_pfn(src[i : i + 1])
            if private is TO_DEVICE:
                to = np.array([self.unused.pop(0)])
                get_page(self.mem, to)
                lock_page(self.mem, to)
                self.contents[to.item()] = (
                    self.mem.payload[frm.item()].copy() if is_valid(src[i : i + 1]).item() else 0
                )
            else:
                to = hmm_vma_alloc_locked_page(vma, np.array([start + i * PAGE_SIZE]))
                if not to.size:
                    return
                self.mem.payload[to] = self.contents.pop(frm.item())
            dst[i] = migrate_pfn(to)[0] | MIGRATE_PFN_LOCKED

    def finalize_and_map(self, vma, src, dst, start, end, private):
        """It has no page table."""


@pytest.fixture
def world():
    """Three pages, and `world.card`, a device with one section of memory."""
    world = mapped_range(pages=3)
    world.card = Card(world.machine.mem)
    yield world
    world.card.hook = lambda: None
    world.let_go()
    hmm_devmem_remove(world.card.devmem)


class TestAdd:
    def test_whole_sections(self, world):
        """A byte takes 128 MiB of physical addresses."""
        devmem = world.card.devmem

        assert SECTION_PAGES == devmem.pfn_last - devmem.pfn_first == devmem.zone.managed_pages
        assert (devmem.pfn_first * PAGE_SIZE, devmem.pfn_last * PAGE_SIZE - 1) == devmem.resource[
            :2
        ]
        assert MemoryType.DEVICE_PRIVATE is devmem.resource.desc is devmem.type
        assert "card" == devmem.name

    def test_no_hole(self):
        """ERANGE where physical address space has none that is large enough."""
        mem = Machine(("16MiB",), payload=False, max_physmem="128MiB").mem
        with pytest.raises(OutOfRange):
            hmm_devmem_add(mem, object(), "card", 1)

    @pytest.mark.parametrize("size", [0, -1, "much"])
    def test_no_size(self, world, size):
        """EINVAL."""
        with pytest.raises(InvalidArgument):
            hmm_devmem_add(world.machine.mem, world.card, "card", size)


class TestAddResource:
    @pytest.fixture
    def mem(self):
        return Machine(("16MiB",), payload=False, max_physmem="256MiB").mem

    def test_where_it_is(self, mem):
        """Public memory has the physical addresses that its bus gave it."""
        resource = Resource(64 << 20, (80 << 20) - 1, MemoryType.DEVICE_PUBLIC)

        devmem = hmm_devmem_add_resource(mem, object(), "card", resource)

        assert resource == devmem.resource
        assert (16384, 20480) == (devmem.pfn_first, devmem.pfn_last)
        assert mem.is_device_public_page(np.array([16384, 20479])).all()
        hmm_devmem_remove(devmem)

    def test_collision(self, mem):
        """EBUSY, be it a device or the system's memory that is there."""
        resource = Resource(64 << 20, (80 << 20) - 1, MemoryType.DEVICE_PUBLIC)
        devmem = hmm_devmem_add_resource(mem, object(), "card", resource)
        with pytest.raises(Busy, match="card"):
            hmm_devmem_add_resource(mem, object(), "other", resource._replace(start=79 << 20))
        with pytest.raises(Busy, match="zone"):
            hmm_devmem_add_resource(mem, object(), "other", resource._replace(start=0))

        hmm_devmem_remove(devmem)
        hmm_devmem_add_resource(mem, object(), "other", resource)

    def test_beyond_physical_memory(self, mem):
        """ERANGE."""
        resource = Resource(200 << 20, (300 << 20) - 1, MemoryType.DEVICE_PUBLIC)
        with pytest.raises(OutOfRange, match="max_physmem"):
            hmm_devmem_add_resource(mem, object(), "card", resource)

    @pytest.mark.parametrize(
        "resource",
        [
            Resource(64 << 20, (80 << 20) - 1, MemoryType.DEVICE_PRIVATE),
            Resource(64 << 20, (80 << 20), MemoryType.DEVICE_PUBLIC),
            Resource(64 << 20, (64 << 20) - 1, MemoryType.DEVICE_PUBLIC),
        ],
        ids=["private", "half a page", "empty"],
    )
    def test_wrong_resource(self, mem, resource):
        """EINVAL for what is not public, and for what is no range of pages."""
        with pytest.raises(InvalidArgument):
            hmm_devmem_add_resource(mem, object(), "card", resource)


class TestCallbacks:
    def test_round_trip(self, world):
        """What the process wrote comes back when the CPU touches it."""
        world.card.to_device(world)
        pfns = world.pfns().tolist()
        assert [True] * 3 == world.on_device()

        assert world.intact()
        assert [(world.addrs.tolist(), pfns, False)] == world.card.faults
        assert pfns == world.card.freed

    def test_store(self, world):
        """The driver hears whether the CPU wants to store."""
        world.card.to_device(world)
        world.process.write(world.at(1), b"x")

        assert [True] == [write for *_, write in world.card.faults]

    def test_unmapping(self, world):
        """A page that nobody maps any more is the driver's again."""
        world.card.to_device(world)
        pfns = world.pfns().tolist()
        world.process.munmap(world.at(1), 2 * PAGE_SIZE)

        assert (pfns[1:], []) == (world.card.freed, world.card.faults)

    def test_drvdata(self, world):
        """The driver's word for a page stays with it, also while the page is free."""
        devmem, pfns = world.card.devmem, world.card.devmem.pfn_first + np.array([0, 5, 2])
        hmm_devmem_page_set_drvdata(devmem, pfns, np.array([7, 8, 1 << 63], dtype=np.uint64))
        world.card.to_device(world)
        world.process.munmap(world.addr, world.nbytes)

        found = hmm_devmem_page_get_drvdata(devmem, devmem.pfn_first + np.arange(6))
        assert [7, 0, 1 << 63, 0, 0, 8] == found.tolist()

    def test_locked_frames(self, world):
        """A frame for each address, locked by who asked; fewer where memory is short."""
        mem = world.machine.mem
        pfns = hmm_vma_alloc_locked_page(world.vma, world.addrs)
        assert ([True] * 3, [1] * 3) == (
            page_locked(mem, pfns).tolist(),
            mem.refcount[pfns].tolist(),
        )
        unlock_page(mem, pfns)
        put_page(mem, pfns)

        more = hmm_vma_alloc_locked_page(world.vma, np.zeros(1 << 20, dtype=np.int64))
        assert 0 < more.size < 1 << 20
        unlock_page(mem, more)
        put_page(mem, more)


class TestRemove:
    def test_pages_come_back_first(self, world):
        """Those of every process, with what is in them."""
        other = world.machine.spawn("other")
        addr = other.mmap(2 * PAGE_SIZE)
        other.write(addr, b"other" * 500)
        with other.mm.mmap_sem.read():
            world.card.migrate(other.find_vma(addr), addr, addr + 2 * PAGE_SIZE, TO_DEVICE)
        world.card.to_device(world)

        hmm_devmem_remove(world.card.devmem)

        assert world.intact()
        assert b"other" * 500 == other.read(addr, 2500)
        assert 5 == len(world.card.freed)
        world.machine.verify()

    def test_twice(self, world):
        """A second call does nothing."""
        for _ in range(2):
            hmm_devmem_remove(world.card.devmem)

    def test_page_that_somebody_holds(self, world):
        """EBUSY: the memory stays, until it is let go."""
        world.card.to_device(world)
        held = world.hold(world.pfns().item(1))
        world.process.munmap(world.addr, world.nbytes)
        with pytest.raises(Busy, match="in use"):
            hmm_devmem_remove(world.card.devmem)
        assert not world.card.devmem.removed
        held.release()

        hmm_devmem_remove(world.card.devmem)

    def test_driver_that_brings_nothing_back(self, world):
        """EBUSY as well, and no endless loop."""
        world.card.to_device(world)
        world.card.fault = lambda devmem, vma, addrs, pfns, write: VmFault(0)
        with pytest.raises(Busy, match="3 device pages"):
            hmm_devmem_remove(world.card.devmem)
        del world.card.fault

        assert world.intact()

    def test_no_room_in_system_memory(self, world):
        """ENOMEM, and what has not come back is still there."""
        world.card.to_device(world)
        world.card.fault = lambda devmem, vma, addrs, pfns, write: VmFault.OOM
        with pytest.raises(OutOfMemory, match="card"):
            hmm_devmem_remove(world.card.devmem)
        del world.card.fault

        assert world.intact()

    def test_inside_a_migration(self, world):
        """From its own alloc_and_copy() a driver would wait for itself, and is told so."""
        world.card.to_device(world)
        world.card.hook = lambda: hmm_devmem_remove(world.card.devmem)
        with pytest.raises(Deadlock):
            world.process.read(world.addr, 1)
        world.card.hook = lambda: None

        assert world.intact()

    def test_during_a_migration(self, world):
        """It waits for that, or says EBUSY: no byte is lost and no page is left."""
        mem, process = world.machine.mem, world.process

        def scenario(together):
            card = Card(mem)
            vma = world.vma
            with process.mm.mmap_sem.read():
                card.migrate(vma, world.addr, world.at(2), TO_DEVICE)

            def touch():
                return process.read(world.at(1), 1)

            def remove():
                with suppress(Busy):
                    hmm_devmem_remove(card.devmem)

            touched, _ = together(touch, remove)
            hmm_devmem_remove(card.devmem)
            assert b"\1" == touched
            world.machine.verify()

        hmm_devmem_remove(world.card.devmem)
        explore(scenario, preemptions=1)


class TestName:
    def test_device_without_a_name(self):
        """Any object stands for the device; messages say what it calls itself."""
        mem = Machine(("16MiB",), payload=False, max_physmem="256MiB").mem

        assert "pci 0000:01:00.0" == HmmDevmem(mem, None, "pci 0000:01:00.0", 1).name
