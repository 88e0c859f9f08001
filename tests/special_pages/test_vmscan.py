"""Who works on LRU lists meets no special page. Linux: mm/vmscan.c, mm/mlock.c."""

import pytest

from mm import PAGE_SIZE
from mm.mmzone import Lru
from mm.page_flags import PG_mlocked
from mm.swap import lru_add_drain_all, lru_pages
from mm.vmscan import reclaim_pages, shrink_page_list, try_to_free_pages
from tests.mm.test_device_exclusive import faults_of
from tests.special_pages.scenes import away, frames, in_place, kinds


class TestReclaim:
    """mm/vmscan.c: no case for device memory, as none is on a list."""

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_short_memory(self, where):
        """When system memory goes to swap, what a device has stays there."""
        world = away(3, where, nodes=("2MiB",), swap="4MiB")
        with world.machine.spawn("hog") as hog:
            hog.touch(hog.mmap("2MiB"), "2MiB")
            assert world.machine.mem.swap.inuse_pages
            assert [True] * 3 == world.on_device()

        assert world.intact()

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_lists(self, where):
        """No list has them, and to be asked to reclaim them does nothing."""
        world = away(3, where, swap="1MiB")
        mem = world.machine.mem
        lru_add_drain_all(mem)
        listed = {p for lru in Lru for p in lru_pages(mem, mem.nodes[0].lruvec[lru]).tolist()}

        assert not listed & set(frames(world).tolist())
        assert (0, 0) == (reclaim_pages(mem, frames(world)), try_to_free_pages(mem, [0], 32))

    def test_page_that_moves(self):
        """It is locked, so that reclaim passes over it."""
        with in_place("moving", swap="1MiB") as world:
            lru_add_drain_all(world.machine.mem)
            assert 0 == reclaim_pages(world.machine.mem, frames(world))
            assert ["moving rw"] * 3 == kinds(world)

    def test_page_that_a_device_has_for_itself(self):
        """Its entry keeps a reference: it stays, in the swap cache at most, and is not lost."""
        world = away(3, swap="1MiB")
        world.gpu.to_system(world.process, world.addr, world.nbytes)
        world.make_exclusive(0, 1)
        world.pageout()

        assert ["exclusive rw", "exclusive rw", "swap"] == kinds(world)
        assert world.intact()

    def test_nothing(self):
        """An empty vector of pages is a page of none."""
        world = away()

        assert 0 == shrink_page_list(world.machine.mem, frames(world)[:0])


class TestMlock:
    """mm/mlock.c: no case either; gup, which populates, brings back what is private."""

    @pytest.mark.parametrize(("where", "faults"), [("private", 3), ("public", 0)])
    def test_mlock(self, where, faults):
        """Private pages come back to be locked; public ones stay, and are not PG_mlocked."""
        world = away(3, where)

        assert faults == faults_of(world, lambda: world.process.mlock(world.addr, world.nbytes))
        assert [where == "public"] * 3 == world.on_device()
        assert faults == world.machine.vmstat["nr_mlock"]
        flags = world.machine.mem.flags[frames(world)] & PG_mlocked
        assert [where == "private"] * 3 == (flags != 0).tolist()

    def test_munlock(self):
        """Nothing is to be unlocked of a page that is away."""
        world = away(3)
        world.process.mlock(world.addr, world.nbytes)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert 0 == world.machine.vmstat["nr_mlock"]
        world.process.munlock(world.addr, PAGE_SIZE)
        world.gpu.to_system(world.process, world.addr, world.nbytes)
        lru_add_drain_all(world.machine.mem)

        assert 2 == world.machine.vmstat["nr_mlock"]
        world.machine.verify()
