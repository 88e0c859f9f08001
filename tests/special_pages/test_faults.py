"""Faults. Linux: do_swap_page(), mm/memory.c."""

import numpy as np
import pytest

from devices import NumpyDevice
from mm import BusError, Deadlock
from mm.errors import KernelBug
from mm.migration_ptes import remove_migration_ptes
from mm.swapops import make_hwpoison_entry, swp_entry
from mm.typing import pages
from tests.hmm.callbacks import look_on
from tests.mm.test_rmap import begin_migration, end_migration
from tests.special_pages.scenes import LOCKED, away, frames, kinds, waiter
from tests.world import mapped_range


class Recorder(NumpyDevice):
    """A device that notes the faults it is asked to serve, and in what state its pages were."""

    def page_fault(self, vma, addrs, pfns, *, write):
        found = [(self.mem.flags[pfns] & np.uint64(LOCKED)).any(), self.mem.refcount[pfns].tolist()]
        self.__dict__.setdefault("faults", []).append((addrs.tolist(), pfns.tolist(), write, found))
        return super().page_fault(vma, addrs, pfns, write=write)


class TestDoSwapPage:
    """mm/memory.c, do_swap_page()."""

    @pytest.mark.parametrize("write", [False, True])
    def test_migration_entry(self, write):
        """The fault waits, ends well, and comes again when the page is there."""
        world = mapped_range(1)
        faults = world.process.min_flt
        mem, pfns = begin_migration(world)
        with waiter(world, lambda: world.process.touch(world.addr, 1, write=write)) as heard:
            assert ([], ["moving rw"]) == (heard, kinds(world))
            remove_migration_ptes(mem, pfns, pfns)
            end_migration(mem, pfns)

        assert ([None], ["mapped rw"]) == (heard, kinds(world))
        assert pfns.tolist() == frames(world).tolist()
        assert faults < world.process.min_flt
        assert 0 == world.process.maj_flt

    def test_fault_of_who_migrates(self):
        """A driver that waits for the page which it migrates itself is told so."""
        world = mapped_range(1)

        with pytest.raises(Deadlock):
            look_on(world, lambda src, dst: world.process.read(world.addr, 1))

        assert world.intact()

    @pytest.mark.parametrize("write", [False, True])
    def test_device_private_entry(self, write):
        """The pagemap's page_fault is called, with a page that nobody has locked or taken."""
        world = away(3, driver=Recorder)
        pfn = frames(world).item(1)

        world.process.touch(world.at(1), 1, write=write)

        assert [([world.at(1)], [pfn], write, [False, [2]])] == world.gpu.faults
        assert ["private rw", "mapped rw", "private rw"] == kinds(world)
        assert world.intact()

    def test_public_page(self):
        """It is present: the driver is not asked."""
        world = away(3, "public", driver=Recorder)

        assert world.intact()
        assert "faults" not in world.gpu.__dict__

    def test_private_entry_of_a_locked_page(self):
        """The CPU waits for the lock (7.0); v4.20 calls the driver, which can do nothing."""
        world = away(1, driver=Recorder)
        world.lock(0)
        with waiter(world, lambda: world.process.read(world.addr, 1)):
            assert "faults" not in world.gpu.__dict__
            world.unlock(0)

        assert 1 == len(world.gpu.faults)
        assert ["mapped rw"] == kinds(world)

    def test_entry_that_changed(self):
        """Two threads that want the page: it comes back once, and both find it."""
        world = away(1)
        world.lock(0)
        with waiter(world, lambda: world.process.read(world.addr, 1)) as heard:
            world.unlock(0)
            assert b"\0" == world.process.read(world.addr, 1)

        assert ([b"\0"], ["mapped rw"]) == (heard, kinds(world))
        assert 1 == world.process.mm.anon_rss

    def test_hwpoison(self):
        """VM_FAULT_HWPOISON, which the process sees as SIGBUS; its neighbours are well."""
        world = mapped_range(2)
        word = world.ptes().item(0)
        world.rewrite([0], lambda ptes: make_hwpoison_entry(pages(7)))

        with pytest.raises(BusError):
            world.process.read(world.at(0), 1)
        assert b"\1" == world.process.read(world.at(1), 1)
        world.rewrite([0], lambda ptes: ptes * 0 + np.uint64(word))

    @pytest.mark.parametrize("kind", [1, 5, 24])
    def test_bad_entry(self, kind):
        """An entry of no area is a bug: where v4.20 logs it and sends SIGBUS, we stop."""
        world = mapped_range(1)
        word = world.ptes().item(0)
        world.rewrite([0], lambda ptes: swp_entry(kind, pages(3)))

        with pytest.raises(KernelBug, match=f"bad page table entry .* at {world.addr:#x}"):
            world.process.read(world.addr, 1)
        world.rewrite([0], lambda ptes: ptes * 0 + np.uint64(word))
