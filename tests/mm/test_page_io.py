"""Bytes to the slots of swap and back, and slots that fail."""

import numpy as np
import pytest

from mm import PAGE_SIZE
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
    for page in range(3 if request.param else 0):
        world.process.write(world.at(page), bytes([page + 1]) * PAGE_SIZE)
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
            assert [1, 2, 3] == mem.swap.contents[mem.private[pfns], 17].tolist()

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
        assert mem.payload is None or [1, 2, 3] == world.contents()

    def test_slot_that_fails(self, world):
        """That page is not up to date."""
        mem, pfns = world.machine.mem, world.pfns()
        mem.swap.read_errors |= set(mem.private[pfns[:2]].tolist())
        mem.flags[pfns] &= ~PG_uptodate

        assert [False, False, True] == swap_readpage(mem, pfns).tolist()

        assert [False, False, True] == (mem.flags[pfns] & PG_uptodate != 0).tolist()
        mem.flags[pfns] |= np.uint64(PG_uptodate)


class TestZeros:
    @pytest.mark.parametrize("world", [True], indirect=True)
    def test_page_of_zeros_takes_no_room(self, world):
        """It is neither written nor read; whatever the slot held before, zeros come back."""
        mem, pfns = world.machine.mem, world.pfns()
        swap_writepage(mem, pfns)
        mem.payload[pfns[:2]] = 0
        mem.payload[pfns[1], 5] = 1

        with mem.vmstat.counting() as delta:
            assert swap_writepage(mem, pfns).all()
            mem.payload[pfns] = 99
            assert swap_readpage(mem, pfns).all()

        assert {"pswpout": 2, "pswpin": 2} == delta
        assert [0, 1, 3 * PAGE_SIZE] == mem.payload[pfns].astype(int).sum(axis=1).tolist()

    @pytest.mark.parametrize("world", [True], indirect=True)
    def test_page_that_is_none_any_more(self, world):
        """What is written later counts."""
        mem, pfns = world.machine.mem, world.pfns()[:1]
        mem.payload[pfns] = 0
        swap_writepage(mem, pfns)
        mem.payload[pfns] = 7
        swap_writepage(mem, pfns)
        mem.payload[pfns] = 99

        swap_readpage(mem, pfns)

        assert b"\7" * PAGE_SIZE == mem.payload[pfns].tobytes()
