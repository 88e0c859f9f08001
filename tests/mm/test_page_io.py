"""Bytes to the slots of swap and back, and slots that fail."""

import numpy as np
import pytest

from mm.filemap import lock_page, unlock_page
from mm.page_flags import PG_dirty, PG_uptodate
from mm.page_io import swap_readpage, swap_writepage
from mm.swap_state import add_to_swap, delete_from_swap_cache
from tests.world import mapped_range


@pytest.fixture(params=[True, False], ids=["contents", "no contents"])
def world(request):
    """Three locked pages in the swap cache."""
    world = mapped_range(pages=3, swap="64KiB", payload=request.param, filled=False)
    world.process.touch(world.addr, world.nbytes)
    if request.param:
        world.fill()
    mem, pfns = world.machine.mem, world.pfns()
    lock_page(mem, pfns)
    add_to_swap(mem, pfns)
    yield world
    delete_from_swap_cache(mem, pfns)
    unlock_page(mem, pfns)


class TestWrite:
    def test_pages_are_clean_then(self, world):
        """Their bytes are in their slots."""
        mem, pfns = world.machine.mem, world.pfns()

        with mem.vmstat.counting() as delta:
            assert swap_writepage(mem, pfns).all()

        assert {"pswpout": 3} == delta
        assert not (mem.flags[pfns] & PG_dirty).any()
        if mem.payload is not None:
            assert [0, 1, 2] == mem.swap.contents[mem.private[pfns], 17].tolist()

    def test_slot_that_fails(self, world):
        """That page stays dirty; the others are written."""
        mem, pfns = world.machine.mem, world.pfns()
        mem.swap.write_errors.add(mem.private.item(pfns[1]))

        assert [True, False, True] == swap_writepage(mem, pfns).tolist()

        assert [False, True, False] == (mem.flags[pfns] & PG_dirty != 0).tolist()


class TestRead:
    def test_bytes_come_back(self, world):
        """What was written is read."""
        mem, pfns = world.machine.mem, world.pfns()
        swap_writepage(mem, pfns)
        if mem.payload is not None:
            mem.payload[pfns] = 99
        mem.flags[pfns] &= ~PG_uptodate

        with mem.vmstat.counting() as delta:
            assert swap_readpage(mem, pfns).all()

        assert {"pswpin": 3} == delta
        assert (mem.flags[pfns] & PG_uptodate).all()
        assert mem.payload is None or world.intact()

    def test_slot_that_fails(self, world):
        """That page is not up to date."""
        mem, pfns = world.machine.mem, world.pfns()
        mem.swap.read_errors |= set(mem.private[pfns[:2]].tolist())
        mem.flags[pfns] &= ~PG_uptodate

        assert [False, False, True] == swap_readpage(mem, pfns).tolist()

        assert [False, False, True] == (mem.flags[pfns] & PG_uptodate != 0).tolist()
        mem.flags[pfns] |= np.uint64(PG_uptodate)
