"""Device-public pages that leave without their driver's help."""

import numpy as np
import pytest

from mm.errors import Deadlock
from mm.filemap import page_locked, trylock_page, unlock_page
from mm.migrate_device import migrate_device_coherent_page
from mm.mmu_notifier import MmuNotifyEvent
from mm.page_flags import PG_anon_exclusive, PG_dirty
from mm.swap import get_page, lru_add_drain_all
from mm.typing import NO_PAGES, PAGE_SIZE
from tests.mm.test_device_exclusive import Listener, Probe
from tests.world import mapped_range


def borrowed(pages=4):
    """A range in a device's public memory."""
    world = mapped_range(pages, kind="public")
    world.gpu.to_device(world.process, world.addr, world.nbytes)
    return world


def leave(world, *pages):
    """Let *pages* leave the device, in that order; which did."""
    pfns = world.pfns()[list(pages)]
    get_page(world.machine.mem, pfns)
    return migrate_device_coherent_page(world.machine.mem, pfns).tolist()


class TestMoved:
    def test_in_any_order(self):
        """Bytes, owner and flags go along, and nothing stays locked or held."""
        world = borrowed()
        mem = world.machine.mem
        mem.flags[world.pfns()[2]] |= PG_dirty

        assert [True, True, True] == leave(world, 2, 0, 1)

        assert [False, False, False, True] == world.on_device()
        assert world.intact()
        flags = mem.flags[world.pfns()[:3]]
        assert ((flags & PG_anon_exclusive) != 0).all()
        assert [True] * 3 == ((flags & PG_dirty) != 0).tolist()
        assert not page_locked(mem, np.arange(mem.limit_pfn)).any()
        lru_add_drain_all(mem)
        assert [1] * 3 == mem.refcount[world.pfns()[:3]].tolist()
        world.machine.verify()

    def test_page_of_two_processes(self):
        """Both find it at its new place."""
        world = borrowed()
        child = world.fork(0)

        assert [True] == leave(world, 0)

        assert 2 == world.machine.mem.mapcount[world.pfns()[0]]
        assert b"\0" == child.read(world.addr, 1)

    def test_page_of_nobody(self):
        """A page that is mapped no more goes back to its device."""
        world = borrowed()
        pfns = world.pfns()[:1]
        get_page(world.machine.mem, pfns)
        world.process.munmap(world.addr, PAGE_SIZE)

        migrate_device_coherent_page(world.machine.mem, pfns)

        assert world.gpu.npages - 3 == world.gpu.chunks.free_pages

    def test_none(self):
        """No pages, no work."""
        world = borrowed()

        assert 0 == migrate_device_coherent_page(world.machine.mem, NO_PAGES).size


class TestStays:
    def test_from_the_first_that_somebody_holds(self):
        """Page by page; that one is unmapped and mapped again [coherent-pin/k5088, i=122]."""
        world = borrowed()
        world.hold(world.pfns().item(2))
        listener = Listener(world)

        assert [True, True, False, False] == leave(world, 0, 1, 2, 3)

        assert [False, False, True, True] == world.on_device()
        assert [(MmuNotifyEvent.CLEAR, world.at(0), world.at(3), None)] == listener.heard
        world.machine.verify()

    def test_without_frames(self):
        """As far as the frames go."""
        world = mapped_range(40, nodes=("1MiB",), kind="public", memory="160KiB")
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        hog = world.machine.spawn("hog")
        addr = hog.mmap("1MiB")
        with pytest.raises(OSError, match="no frame"):
            hog.write(addr, bytes(1 << 20))
        hog.munmap(addr, 8 * PAGE_SIZE)

        moved = leave(world, *range(40))

        assert 0 < sum(moved) < 40
        assert sorted(moved, reverse=True) == moved
        assert [not gone for gone in moved] == world.on_device()
        hog.exit()
        assert world.intact()

    def test_locked_by_the_caller(self):
        """A thread that waits for itself is told so, and holds nothing afterwards."""
        world = borrowed()
        mem, pfns = world.machine.mem, world.pfns()
        trylock_page(mem, pfns[:1])

        with pytest.raises(Deadlock):
            leave(world, 1, 0)

        unlock_page(mem, pfns[:1])
        assert [2] * 4 == mem.refcount[pfns].tolist()

    def test_listener_that_fails(self):
        """Everything is where it was."""
        world = borrowed()
        Probe(world)

        with pytest.raises(ZeroDivisionError):
            leave(world, 0, 1)

        world.process.mm.notifiers.clear()
        world.machine.verify()
        assert [True] * 4 == world.on_device()
        assert world.intact()
