"""The way from pages to entries. Linux: mm/rmap.c and mm/page_vma_mapped.c."""

import numpy as np
import pytest

from mm.migration_ptes import remove_migration_ptes
from mm.pgtable import _PAGE_DIRTY
from mm.rmap import page_referenced
from tests.mm.test_rmap import migrating
from tests.special_pages.scenes import DIRTY, away, bits, flagged, frames, in_place, kinds
from tests.world import mapped_range


class TestTryToUnmapOne:
    """mm/rmap.c, try_to_unmap_one()."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    @pytest.mark.parametrize("write", [False, True])
    def test_device_page(self, kind, write):
        """A migration entry takes its place with the rights that it had, and it loses its mapping.

        v4.20 makes the entry of a private page read-only (until 5.14), and leaves a public page
        mapped (until 6.0).
        """
        world = away(2, kind)
        if not write:
            world.write_protect(0, 1)
        before = frames(world).tolist()
        with migrating(world) as (mem, pfns):
            assert [f"moving {'rw' if write else 'r'}"] * 2 == kinds(world)
            assert before == frames(world).tolist()
            assert ([0] * 2, [2] * 2) == (mem.mapcount[pfns].tolist(), mem.refcount[pfns].tolist())

    def test_rss(self):
        """A page on its way is still the process's."""
        with in_place("private") as world, migrating(world):
            assert 3 == world.process.mm.anon_rss

    def test_dirty(self):
        """The dirty bit of the entry goes to the page (6.1); a private entry has none."""
        world = mapped_range(1)
        world.machine.mem.flags[frames(world)] &= ~np.uint64(DIRTY)
        assert [True] == bits(world, _PAGE_DIRTY)

        with migrating(world):
            assert [True] == flagged(world, DIRTY)


class TestPageVmaMapped:
    """mm/page_vma_mapped.c, map_pte() and check_pte()."""

    def test_private_entry_is_a_mapping(self):
        """Who unmaps a device page finds the entries of every process."""
        world = away(2)
        child = world.seen_by(world.fork(0, 1))

        with migrating(world):
            assert ["moving r"] * 2 == kinds(world) == kinds(child)

        assert ["private r"] * 2 == kinds(world) == kinds(child)

    def test_migration_entry_is_none(self):
        """Who asks for mappings passes over a page on its way, who ends a migration over others."""
        world = mapped_range(3)
        pfns = frames(world)
        with migrating(world) as (mem, _):
            assert [False] * 3 == page_referenced(mem, pfns).tolist()
        remove_migration_ptes(mem, pfns, pfns)

        assert (["mapped rw"] * 3, [1] * 3) == (kinds(world), mem.mapcount[pfns].tolist())
