"""What /proc shows. Linux: fs/proc/task_mmu.c."""

import pytest

from mm import PAGE_SIZE
from tests.special_pages.scenes import PLACES, away, frames, in_place


class TestTaskMmu:
    """fs/proc/task_mmu.c."""

    @pytest.mark.parametrize("where", PLACES)
    def test_smaps(self, where):
        """Rss and Pss count a page wherever it is."""
        with in_place(where) as world:
            stats = world.process.smaps()[0]

            assert (3 * PAGE_SIZE, 3 * PAGE_SIZE) == (stats.resident, stats.pss)
            assert (3 * PAGE_SIZE, 0) == (stats.anonymous, stats.swap)

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_smaps_of_shared_pages(self, where):
        """Pss has half of what two processes map."""
        world = away(2, where)
        world.fork(0)

        assert (8192, 6144) == (world.process.smaps()[0].resident, world.process.smaps()[0].pss)

    @pytest.mark.parametrize(("where", "kind"), [("private", 30), ("moving", 29)])
    def test_pagemap_of_swap(self, where, kind):
        """PM_SWAP, with the type of the entry below its PFN; never the bit of a sole mapping."""
        with in_place(where) as world:
            expected = [1 << 62 | 1 << 55 | pfn << 5 | kind for pfn in frames(world).tolist()]

            words = world.process.pagemap(world.addr, 3).tolist()
            assert expected == [word | 1 << 55 for word in words]

    def test_pagemap_of_a_public_page(self):
        """PM_PRESENT, with the PFN of the device's page."""
        world = away(kind="public")
        words = world.process.pagemap(world.addr, 3).tolist()

        assert frames(world).tolist() == [word & (1 << 55) - 1 for word in words]
        assert [2] * 3 == [word >> 62 for word in words]


class TestNumaMaps:
    """fs/proc/task_mmu.c, can_gather_numa_stats()."""

    @pytest.mark.parametrize("where", PLACES)
    def test_pages(self, where):
        """vm_normal_page() without public pages: only what is in memory of the system counts."""
        with in_place(where) as world:
            (md,) = world.process.numa_maps()
            expected = 3 if where == "system" else 0

            assert (expected, expected) == (md.pages, md.nodes.get(0, 0))

    def test_mixture(self):
        """A mapping that is partly on a device shows the rest."""
        world = away(4, "public")
        world.gpu.to_system(world.process, world.at(1), 2 * PAGE_SIZE)

        assert {0: 2} == world.process.numa_maps()[0].nodes
