"""References, and slots of swap. Linux: mm/swap.c, mm/swapfile.c and mm/swap_state.c."""

import pytest

from mm import PAGE_SIZE
from mm.swap import lru_add_drain_all
from tests.special_pages.scenes import away, in_place, kinds
from tests.world import mapped_range


class TestPutPage:
    """mm/swap.c, __put_page() and release_pages()."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_device_page(self, kind):
        """The last user's reference gives it to its driver, not to the allocator or a list."""
        world = away(kind=kind)
        lru_add_drain_all(world.machine.mem)
        free, device = world.machine.nr_free_pages, world.gpu.chunks.free_pages
        with world.machine.vmstat.counting() as delta:
            world.process.madvise(world.addr, world.nbytes, "dontneed")

        assert (free, device + 3) == (world.machine.nr_free_pages, world.gpu.chunks.free_pages)
        assert [] == [name for name in delta if name.startswith(("pgfree", "nr_inactive"))]

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_kinds_in_one_call(self, kind):
        """Frames go to the allocator and device pages to their driver, from one range."""
        world = mapped_range(4, kind=kind)
        world.gpu.to_device(world.process, world.at(1), 2 * PAGE_SIZE)
        lru_add_drain_all(world.machine.mem)
        free, device = world.machine.nr_free_pages, world.gpu.chunks.free_pages
        world.process.madvise(world.addr, world.nbytes, "dontneed")

        assert (free + 2, device + 2) == (world.machine.nr_free_pages, world.gpu.chunks.free_pages)


class TestSwapfile:
    """mm/swapfile.c, free_swap_and_cache(); mm/swap_state.c, readahead."""

    @pytest.mark.parametrize("where", ["private", "moving"])
    def test_no_slot(self, where):
        """Entries that are gone let go of no slot, though their PFN may be the number of one."""
        with in_place(where, swap="1MiB") as world:
            other = world.machine.spawn("other")
            addr = other.mmap(4 * PAGE_SIZE)
            other.write(addr, b"\1" * (4 * PAGE_SIZE))
            other.madvise(addr, 4 * PAGE_SIZE, "pageout")
            used = world.machine.mem.swap.inuse_pages
            world.process.madvise(world.addr, world.nbytes, "dontneed")

            assert 4 == used == world.machine.mem.swap.inuse_pages
        assert b"\1" * (4 * PAGE_SIZE) == other.read(addr, 4 * PAGE_SIZE)

    def test_readahead(self):
        """MADV_WILLNEED reads what is in swap, and nothing for a page in device memory."""
        world = mapped_range(4, swap="1MiB")
        world.gpu.to_device(world.process, world.at(1), 2 * PAGE_SIZE)
        world.pageout(0, 3)
        assert ["swap", "private rw", "private rw", "swap"] == kinds(world)

        with world.machine.vmstat.counting() as delta:
            world.process.madvise(world.addr, world.nbytes, "willneed")

        assert 1 == delta["pswpin"]  # page 0 is zeros, which take no reading
        assert [False, True, True, False] == world.on_device()
