"""Sparse arrays of pages and values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.typing import pages
from mm.xarray import XArray, xa_is_value, xa_mk_value, xa_to_value


def xarray(entries):
    """An array that holds *entries*, a dict."""
    array = XArray()
    array.store(np.array(list(entries), dtype=np.int64), np.array(list(entries.values())))
    return array


def held(array):
    """What *array* holds, as a dict."""
    indexes, entries = array.find(0, 1 << 52)
    return dict(zip(indexes.tolist(), entries.tolist(), strict=True))


class TestValue:
    def test_is_no_page(self):
        """A value, 0 included, can be told from a page and from nothing, and comes back."""
        entries = np.concatenate((xa_mk_value(pages(0, 7)), pages(0, 7)))

        assert [True, True, False, False] == xa_is_value(entries).tolist()
        assert [0, 7] == xa_to_value(entries[:2]).tolist()


class TestStore:
    def test_far_apart(self):
        """Only the nodes that hold something are there."""
        array = xarray({0: 5, 511: 6, 512: 7, 1 << 40: 8})

        assert 3 == array.nodes
        assert [5, 6, 7, 8, 0, 0] == array.load(pages(0, 511, 512, 1 << 40, 1, 1 << 41)).tolist()

    def test_in_place_of_another(self):
        """What was there is gone; its marks are the new entry's."""
        array = xarray({3: 5})
        array.set_mark(pages(3), 2)

        array.store(pages(3), pages(9))

        assert {3: 9} == held(array)
        assert array.get_mark(pages(3), 2).all()


class TestErase:
    def test_last_entry_of_a_node(self):
        """Its row is given to the next node, and is empty."""
        array = xarray({3: 5, 600: 6})
        array.set_mark(pages(3), 1)

        array.erase(pages(3))
        array.store(pages(5000), pages(8))

        assert {600: 6, 5000: 8} == held(array)
        assert not array.marked(1)
        assert 2 == array.nodes

    def test_everything(self):
        """An array that holds nothing has no nodes."""
        array = xarray({3: 5, 600: 6})

        array.erase(pages(3, 600, 7, 9000))

        assert array.empty


class TestFind:
    @pytest.mark.parametrize(
        ("start", "end", "found"), [(0, 4, [3]), (4, 600, [511, 512]), (4, 512, [511]), (5, 5, [])]
    )
    def test_range(self, start, end, found):
        """Its end is not in it."""
        array = xarray({3: 5, 511: 6, 512: 7, 600: 8})

        assert found == array.find(start, end)[0].tolist()

    def test_marked(self):
        """With a mark, what has another or none is passed over."""
        array = xarray({3: 5, 511: 6, 512: 7})
        array.set_mark(pages(3, 512), 1)
        array.set_mark(pages(511), 4)
        array.clear_mark(pages(3), 1)

        assert [512] == array.find(0, 9999, mark=1)[0].tolist()
        assert array.marked(4)
        assert not array.marked(2)


operations = st.tuples(
    st.sampled_from(["store", "erase", "set", "clear"]),
    st.lists(st.integers(0, 3000), min_size=1, max_size=9, unique=True),
    st.integers(-5, 5).filter(bool),
)


class TestAgainstADict:
    @given(st.lists(operations, max_size=20), st.integers(0, 3000), st.integers(0, 3000))
    def test_same(self, steps, start, end):
        """Whatever is stored, erased and marked, it holds what a dict holds."""
        array, entries, marks = XArray(), {}, set()
        for step, indexes, entry in steps:
            there = [index for index in indexes if index in entries]
            if step == "store":
                array.store(np.array(indexes), np.full(len(indexes), entry))
                entries |= dict.fromkeys(indexes, entry)
            elif step == "erase":
                array.erase(np.array(indexes))
                entries = {i: e for i, e in entries.items() if i not in indexes}
                marks -= set(indexes)
            elif step == "set":
                array.set_mark(np.array(there, dtype=np.int64), 2)
                marks |= set(there)
            else:
                array.clear_mark(np.array(there, dtype=np.int64), 2)
                marks -= set(there)

        assert dict(sorted(entries.items())) == held(array)
        assert sorted(i for i in entries if start <= i < end) == array.find(start, end)[0].tolist()
        assert sorted(marks) == array.find(0, 9999, mark=2)[0].tolist()
        assert len({index >> 9 for index in entries}) == array.nodes
