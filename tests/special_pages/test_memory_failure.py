"""Frames that fail, and those of devices. Linux: mm/memory-failure.c."""

import errno

import pytest

from mm import BusError, Busy, InputOutputError
from tests.special_pages.scenes import away, frames, in_place, kinds
from tests.world import mapped_range

EVERYWHERE = ("private", "public")


class TestMemoryFailure:
    """mm/memory-failure.c, memory_failure() and memory_failure_dev_pagemap()."""

    @pytest.mark.parametrize("where", EVERYWHERE)
    def test_device_page(self, where):
        """-EBUSY, and nothing happens: it is for the driver to say that it is lost."""
        world = away(3, where)
        before = world.ptes().tolist()

        assert [-errno.EBUSY] * 3 == world.machine.memory_failure(frames(world)).tolist()
        assert before == world.ptes().tolist()
        assert world.intact()

    @pytest.mark.parametrize("where", EVERYWHERE)
    def test_mixture(self, where):
        """The page of the system is lost; its neighbours on the device are not touched."""
        world = mapped_range(3, kind=where)
        world.gpu.to_device(world.process, world.at(1), 2 * 4096)

        assert [0, -errno.EBUSY, -errno.EBUSY] == (
            world.machine.memory_failure(frames(world)).tolist()
        )
        assert ["poison", True, True] == [kinds(world)[0], *world.on_device()[1:]]

    def test_advice(self):
        """MADV_HWPOISON brings private pages back first; public ones are EBUSY."""
        world = away()
        world.process.madvise(world.at(0), 4096, "hwpoison")
        assert ["poison", "private rw", "private rw"] == kinds(world)

        public = away(kind="public")
        with pytest.raises(Busy):
            public.process.madvise(public.at(0), 4096, "hwpoison")
        assert public.intact()

    def test_contents_that_a_device_lost(self):
        """A driver's answer looks as hardware's does, and takes no frame out of use."""
        world = away(1)
        world.gpu.copy_out = lambda pages, system, rows: pages >= 0

        with pytest.raises(BusError):
            world.process.read(world.addr, 1)
        assert (["poison"], 0) == (kinds(world), world.machine.mem.num_poisoned_pages)


class TestSoftOfflinePage:
    """mm/memory-failure.c, soft_offline_page()."""

    @pytest.mark.parametrize("where", EVERYWHERE)
    def test_device_page(self, where):
        """-EIO, for all ZONE_DEVICE."""
        world = away(3, where)

        assert [-errno.EIO] * 3 == world.machine.soft_offline_page(frames(world)).tolist()
        assert [True] * 3 == world.on_device()

    def test_advice(self):
        """MADV_SOFT_OFFLINE says so of public pages."""
        world = away(kind="public")

        with pytest.raises(InputOutputError):
            world.process.madvise(world.addr, 4096, "soft_offline")
        assert world.intact()


class TestHwpoisonEntries:
    """Who meets an entry whose page is lost: it is of no type that stands for a page."""

    def test_rss(self):
        """It does not count, when it comes nor when it goes."""
        with in_place("system") as world:
            world.machine.memory_failure(frames(world)[:1])
            assert 2 == world.process.mm.anon_rss
            world.process.munmap(world.addr, world.nbytes)

        assert 0 == world.process.mm.anon_rss

    def test_other_rights_and_places(self):
        """It stays what it is through mprotect and mremap."""
        world = mapped_range(2)
        world.machine.memory_failure(frames(world)[:1])
        before = world.ptes().item(0)
        world.process.mprotect(world.addr, 4096, "r")
        assert before == world.ptes().item(0)

        target = world.addr + (1 << 24)
        world.process.mremap(world.addr, 4096, 4096, "maymove|fixed", target)
        with pytest.raises(BusError):
            world.process.read(target, 1)

    def test_free(self):
        """MADV_FREE takes it away, as in v6.12: zeros are there next."""
        world = mapped_range(2)
        world.machine.memory_failure(frames(world)[:1])
        world.process.madvise(world.addr, 4096, "free")

        assert "none" == kinds(world)[0]

    def test_migration_of_its_neighbours(self):
        """move_pages says that nothing is there."""
        world = mapped_range(2, nodes=("16MiB", "16MiB"))
        world.machine.memory_failure(frames(world)[:1])

        assert [-errno.ENOENT, 1] == world.process.move_pages(world.addrs, 1).tolist()
