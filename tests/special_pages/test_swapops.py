"""What the entries are. Linux: include/linux/swap.h and swapops.h."""

import numpy as np
import pytest

from mm.errors import KernelBug
from mm.swapops import (
    is_device_private_entry,
    is_migration_entry,
    is_swap_entry,
    is_write_device_private_entry,
    is_write_migration_entry,
    make_device_private_entry,
    make_readable,
    swp_offset,
)
from mm.typing import pages
from tests.hmm.callbacks import migrate
from tests.mm.test_rmap import migrating
from tests.special_pages.scenes import LOCKED, MAKERS, NO, TYPES, decoded, flagged, in_place, kinds
from tests.world import mapped_range


class TestSwapTypes:
    """include/linux/swap.h."""

    def test_order(self):
        """Poison, migration read and write, device write and read end the five bits of types.

        As since v5.14, entries that a device has for itself take two more, below them.
        """
        order = sorted(MAKERS, key=lambda name: int(MAKERS[name](pages(9))[0]) >> 59)

        assert list(TYPES.values()) == order
        assert [31] == [int(make_device_private_entry(pages(9), NO)[0]) >> 59]

    @pytest.mark.parametrize("where", ["private", "moving"])
    def test_no_swap_area(self, where):
        """free_swap_and_cache() of a kernel without swap takes such entries."""
        with in_place(where) as world:
            assert 0 == world.machine.mem.swap.max
            world.process.munmap(world.addr, world.nbytes)

        assert 0 == world.process.mm.anon_rss


class TestSwapOps:
    """include/linux/swapops.h."""

    @pytest.mark.parametrize("name", MAKERS)
    @pytest.mark.parametrize("pfn", [0, 1, 0x1234, (1 << 40) - 1])
    def test_what_is_what(self, name, pfn):
        """An entry is of one kind, keeps its PFN, and says whether it may be written."""
        entry = MAKERS[name](pages(pfn))

        assert (name, pfn) == decoded(int(entry[0]))
        assert [pfn] == swp_offset(entry).tolist()
        assert ["moving" in name] == is_migration_entry(entry).tolist()
        assert ["private" in name] == is_device_private_entry(entry).tolist()
        assert [name == "moving rw"] == is_write_migration_entry(entry).tolist()
        assert [name == "private rw"] == is_write_device_private_entry(entry).tolist()
        assert [False] == is_swap_entry(entry).tolist()

    @pytest.mark.parametrize("name", MAKERS)
    def test_make_read(self, name):
        """Each becomes its own read-only kind, of the same page."""
        entry = make_readable(MAKERS[name](pages(0x77)))

        assert (name.replace("rw", "r"), 0x77) == decoded(int(entry[0]))

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_page_of_a_migration_entry_is_locked(self, kind):
        """While a driver copies, whatever has a migration entry has its page locked."""
        world = mapped_range(3, kind=kind)
        seen = []

        migrate(world, after=lambda src, dst: seen.append((kinds(world), flagged(world, LOCKED))))

        assert [(["moving rw"] * 3, [True] * 3)] == seen

    def test_unlocked_page_of_a_migration_entry(self):
        """The kernel's BUG_ON(!PageLocked) is one of verify()."""
        world = mapped_range(1)
        with migrating(world) as (mem, pfns):
            mem.flags[pfns] &= ~np.uint64(LOCKED)
            with pytest.raises(KernelBug):
                world.machine.verify()
            mem.flags[pfns] |= np.uint64(LOCKED)
