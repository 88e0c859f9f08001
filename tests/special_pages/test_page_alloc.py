"""Frames of devices. Linux: mm/page_alloc.c."""

import pytest

from mm import OutOfMemory
from tests.special_pages.scenes import RESERVED
from tests.world import mapped_range


class TestMemmapInitZoneDevice:
    """mm/page_alloc.c, memmap_init_zone_device()."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_page(self, kind):
        """Reserved, with one reference, its pagemap, no data of the driver, and no other state."""
        world = mapped_range(1, kind=kind)
        mem, zone = world.machine.mem, world.gpu.zone
        rows = slice(zone.start_pfn, zone.end_pfn)

        assert {RESERVED} == set(mem.flags[rows].tolist())
        assert ({1}, {0}) == (set(mem.refcount[rows].tolist()), set(mem.mapcount[rows].tolist()))
        assert {0} == set(mem.private[rows].tolist())
        assert world.gpu is mem.pagemap_of(zone.start_pfn) is mem.pagemap_of(zone.end_pfn - 1)

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_no_zone_of_the_allocator(self, kind):
        """When frames run out, nobody gets a page of a device instead."""
        world = mapped_range(1, nodes=("4MiB",), memory="8MiB", kind=kind)
        free = world.gpu.chunks.free_pages
        addr = world.process.mmap("8MiB", flags="anon|private|noreserve")

        with pytest.raises(OutOfMemory):
            world.process.touch(addr, "8MiB")

        assert free == world.gpu.chunks.free_pages
        world.process.munmap(addr, "8MiB")
