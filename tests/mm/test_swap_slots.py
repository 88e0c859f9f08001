"""Slots of the swap area, against a dictionary of counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import KernelBug
from mm.locking import Locks
from mm.swap_slots import (
    SCAN,
    SWAP_HAS_CACHE,
    SWAP_MAP_BAD,
    SwapInfo,
    get_swap_pages,
    nr_swap_pages,
    put_swap_page,
    swap_count,
    swap_duplicate,
    swap_free,
    vm_swap_full,
)
from mm.typing import pages


def area(slots, payload=False):
    return SwapInfo(slots, Locks(), payload=payload)


class TestGetSwapPages:
    def test_first_slot_holds_the_header(self):
        """An area of 8 pages has 7 slots, from 1 on."""
        si = area(8)

        assert (7, 7) == (si.pages, nr_swap_pages(si))
        assert list(range(1, 8)) == get_swap_pages(si, 100).tolist()
        assert SWAP_MAP_BAD == si.swap_map[0]

    def test_slots_follow_one_another(self):
        """One call goes on where the last one ended, whatever was freed meanwhile."""
        si = area(100)
        first = get_swap_pages(si, 10)
        put_swap_page(si, first[:5])

        assert list(range(11, 21)) == get_swap_pages(si, 10).tolist()

    def test_search_begins_anew_at_the_end(self):
        """Past the last slot come the first ones that are free."""
        si = area(30)
        first = get_swap_pages(si, 20)
        put_swap_page(si, first[[3, 4, 9]])

        assert [*range(21, 30), 4, 5] == get_swap_pages(si, 11).tolist()
        assert [10] == get_swap_pages(si, 11).tolist()
        assert [] == get_swap_pages(si, 1).tolist()

    def test_search_that_looks_far(self):
        """What is free beyond one look is found in the next."""
        si = area(4 * SCAN)
        taken = get_swap_pages(si, 4 * SCAN)
        put_swap_page(si, taken[[5, 2 * SCAN, 4 * SCAN - 3]])

        assert [6, 2 * SCAN + 1, 4 * SCAN - 2] == get_swap_pages(si, 3).tolist()

    def test_no_swap(self):
        """An area without slots gives none, and is never full."""
        si = area(0)

        assert 0 == get_swap_pages(si, 5).size
        assert not vm_swap_full(si)


class TestCounts:
    def test_slot_is_free_when_nobody_holds_it(self):
        """The cache's claim and each entry hold a slot on their own."""
        si = area(10)
        slots = get_swap_pages(si, 2)
        swap_duplicate(si, slots[[0, 0, 1]])
        assert [2, 1] == swap_count(si, slots).tolist()

        put_swap_page(si, slots)
        swap_free(si, slots)
        assert [1, 0] == si.swap_map[slots].tolist()
        swap_free(si, slots[:1])

        assert 0 == si.inuse_pages
        assert [0, 0] == si.swap_map[slots].tolist()

    def test_freed_slot_forgets(self):
        """A shadow goes with the last entry."""
        si = area(10)
        slots = get_swap_pages(si, 1)
        swap_duplicate(si, slots)
        put_swap_page(si, slots)
        si.cache[slots] = ~5

        swap_free(si, slots)

        assert 0 == si.cache[slots]

    def test_full_at_more_than_half(self):
        """Half is not yet full."""
        si = area(11)
        get_swap_pages(si, 5)
        assert not vm_swap_full(si)

        get_swap_pages(si, 1)

        assert vm_swap_full(si)

    @pytest.mark.parametrize(
        ("call", "complaint"),
        [
            (swap_free, r"no entry was left for slot 0x1 \(0x3fffffff\)"),
            (swap_duplicate, r"nobody holds slot 0x2 \(0x0\)"),
            (put_swap_page, r"not the swap cache's: slot 0x2 \(0x0\)"),
        ],
    )
    def test_slot_that_is_not_held(self, call, complaint):
        """A count that would be wrong is a bug, and the message names the slot."""
        si = area(10)
        slots = get_swap_pages(si, 1)
        wrong = slots if call is swap_free else pages(2)

        with pytest.raises(KernelBug, match=complaint):
            call(si, wrong)

    @given(st.lists(st.tuples(st.sampled_from("gdfp"), st.integers(1, 6)), max_size=40))
    def test_against_a_dictionary(self, steps):
        """Any sequence of calls leaves the counts that plain Python leaves."""
        si, claimed, entries = area(16), set(), {}
        for what, count in steps:
            if what == "g":
                claimed |= set(get_swap_pages(si, count).tolist())
            known = sorted(claimed | entries.keys())[:count]
            held = sorted(entries)[:count]
            if what == "d":
                swap_duplicate(si, np.array(known + known[:1], dtype=np.int64))
                for slot in known + known[:1]:
                    entries[slot] = entries.get(slot, 0) + 1
            if what == "f":
                swap_free(si, np.array(held, dtype=np.int64))
                for slot in held:
                    entries[slot] -= 1
                entries = {slot: n for slot, n in entries.items() if n}
            if what == "p":
                gone = sorted(claimed)[:count]
                put_swap_page(si, np.array(gone, dtype=np.int64))
                claimed -= set(gone)

        expected = [
            entries.get(slot, 0) + (SWAP_HAS_CACHE if slot in claimed else 0)
            for slot in range(1, 16)
        ]
        assert expected == si.swap_map[1:].tolist()
        assert len(claimed | entries.keys()) == si.inuse_pages
