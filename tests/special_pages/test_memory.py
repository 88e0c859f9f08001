"""Entries taken away and looked behind. Linux: mm/memory.c."""

import pytest

from mm import PAGE_SIZE
from mm.migration_ptes import remove_migration_ptes
from mm.pgtable import _PAGE_ACCESSED, _PAGE_DIRTY
from tests.mm.test_rmap import begin_migration, end_migration, migrating
from tests.special_pages.scenes import PLACES, away, bits, frames, in_place, kinds
from tests.world import mapped_range


class TestVmNormalPage:
    """mm/memory.c, _vm_normal_page()."""

    def test_public_page_for_who_zaps(self):
        """With with_public_device it is a page: unmapping drops its mapping and frees it."""
        world = away(kind="public")
        pfns, free = frames(world), world.gpu.chunks.free_pages

        world.process.munmap(world.addr, world.nbytes)

        assert [0] * 3 == world.machine.mem.mapcount[pfns].tolist()
        assert free + 3 == world.gpu.chunks.free_pages

    @pytest.mark.parametrize("advice", ["cold", "pageout", "free"])
    def test_public_page_for_all_others(self, advice):
        """Without it there is none, so reclaim cannot be told of it.

        As since v6.1, MADV_FREE passes over it too; that of v4.20 made its entry clean.
        """
        world = away(kind="public", swap="1MiB")
        world.fill()
        before = world.ptes().tolist()
        assert [True] * 3 == bits(world, _PAGE_DIRTY) == bits(world, _PAGE_ACCESSED)

        world.process.madvise(world.addr, world.nbytes, advice)

        assert before == world.ptes().tolist()
        assert ([True] * 3, True) == (world.on_device(), world.intact())


class TestZapPteRange:
    """mm/memory.c, zap_pte_range()."""

    @pytest.mark.parametrize("where", PLACES)
    def test_rss(self, where):
        """Wherever the page is, the process has one less."""
        with in_place(where) as world:
            before = world.process.mm.anon_rss
            world.process.munmap(world.at(0), 2 * PAGE_SIZE)

            assert (3, 1) == (before, world.process.mm.anon_rss)

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_device_page(self, kind):
        """It loses its mapping and the reference of that, and is free with the one that is left."""
        world = away(kind=kind)
        mem, pfns = world.machine.mem, frames(world)

        world.process.madvise(world.addr, PAGE_SIZE, "dontneed")

        assert [1, 2, 2] == mem.refcount[pfns].tolist()
        assert [0, 1, 1] == mem.mapcount[pfns].tolist()
        assert "none" == kinds(world)[0]

    def test_page_that_moves(self):
        """Only rss changes: the page stays locked and referenced for whoever migrates it."""
        world = mapped_range(2)
        with migrating(world) as (mem, pfns):
            before = mem.refcount[pfns].tolist(), mem.flags[pfns].tolist()
            world.process.madvise(world.addr, world.nbytes, "dontneed")

            assert ["none"] * 2 == kinds(world)
            assert before == (mem.refcount[pfns].tolist(), mem.flags[pfns].tolist())
            assert 0 == world.process.mm.anon_rss

    def test_end_of_such_a_migration(self):
        """It maps nothing where the entry is gone, and frees the page."""
        world = away(2)
        free = world.gpu.chunks.free_pages
        mem, pfns = begin_migration(world)
        world.process.madvise(world.addr, world.nbytes, "dontneed")
        remove_migration_ptes(mem, pfns, pfns)
        end_migration(mem, pfns)

        assert ["none"] * 2 == kinds(world)
        assert free + 2 == world.gpu.chunks.free_pages
