"""Other rights. Linux: mm/mprotect.c."""

import numpy as np
import pytest

from tests.mm.test_device_exclusive import Listener
from tests.special_pages.scenes import SWP_SOFT_DIRTY, away, bits, in_place, kinds


class TestChangePteRange:
    """mm/mprotect.c, change_pte_range()."""

    @pytest.mark.parametrize(
        ("where", "before", "after", "soft_dirty"),
        [
            ("moving", "moving rw", "moving r", True),
            ("private", "private rw", "private r", False),
        ],
    )
    def test_write_becomes_read(self, where, before, after, soft_dirty):
        """A page on its way keeps its soft-dirty bit, one in device memory loses it."""
        with in_place(where) as world:
            world.rewrite(range(3), lambda ptes: ptes | np.uint64(SWP_SOFT_DIRTY))
            assert [before] * 3 == kinds(world)
            world.process.mprotect(world.addr, world.nbytes, "r")

            assert ([after] * 3, [soft_dirty] * 3) == (kinds(world), bits(world, SWP_SOFT_DIRTY))

    @pytest.mark.parametrize("where", ["moving", "private"])
    def test_read_stays_read(self, where):
        """Rights that come back do not make the entry writable; a store faults."""
        with in_place(where) as world:
            world.process.mprotect(world.addr, world.nbytes, "r")
            before = world.ptes().tolist()
            world.process.mprotect(world.addr, world.nbytes, "rw")

            assert before == world.ptes().tolist()
        world.process.write(world.addr, b"\7")
        assert b"\7" == world.process.read(world.addr, 1)

    def test_device_hears(self):
        """The entries count as changed: the device may not store to its page any more."""
        world = away()
        listener = Listener(world)

        world.process.mprotect(world.addr, world.nbytes, "r")

        assert [(world.addr, world.addr + world.nbytes)] == [heard[1:3] for heard in listener.heard]
