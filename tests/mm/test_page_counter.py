"""Counters with limits, one inside the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import PAGE_SIZE, InvalidArgument
from mm.errors import KernelBug
from mm.page_counter import (
    PAGE_COUNTER_MAX,
    PageCounter,
    page_counter_memparse,
    page_counter_set_max,
    page_counter_try_charge,
    page_counter_uncharge,
)


def tree(*limits):
    """Counters inside one another, the outermost first."""
    counters = []
    for limit in limits:
        counters.append(PageCounter(counters[-1] if counters else None))
        counters[-1].max = limit
    return counters


def usages(counters):
    return [counter.usage for counter in counters]


class TestTryCharge:
    def test_every_ancestor_is_charged(self):
        """What one counts, all that it stands in count too."""
        counters = tree(100, 100, 100)

        assert (7, None) == page_counter_try_charge(counters[1], 7)
        assert [7, 7, 0] == usages(counters)

    def test_as_many_as_fit(self):
        """The one with the least room says how many, and is named."""
        counters = tree(100, 5, 100)

        assert (5, counters[1]) == page_counter_try_charge(counters[2], 7)
        assert [5, 5, 5] == usages(counters)
        assert [0, 1, 0] == [counter.failcnt for counter in counters]

    def test_the_outermost_refuses(self):
        """A limit far out binds as one close by."""
        counters = tree(4, 100, 100)

        assert (4, counters[0]) == page_counter_try_charge(counters[2], 9)
        assert (0, counters[0]) == page_counter_try_charge(counters[1], 1)

    def test_just_enough_is_no_failure(self):
        """The last page that fits is charged, and nobody has refused."""
        (counter,) = tree(3)

        assert (3, None) == page_counter_try_charge(counter, 3)
        assert (0, counter) == page_counter_try_charge(counter, 1)
        assert (0, None) == page_counter_try_charge(counter, 0)

    def test_watermark(self):
        """The most that there ever was stays known."""
        outer, inner = tree(100, 100)

        page_counter_try_charge(inner, 7)
        page_counter_uncharge(inner, 5)
        page_counter_try_charge(outer, 1)

        assert [(3, 7), (2, 7)] == [(c.usage, c.watermark) for c in (outer, inner)]


class TestUncharge:
    def test_more_than_is_charged(self):
        """What was never charged cannot be taken off."""
        outer, inner = tree(100, 100)
        page_counter_try_charge(outer, 3)

        with pytest.raises(KernelBug, match="0x2 pages less, 0x2 too many"):
            page_counter_uncharge(inner, 2)


class TestLimit:
    def test_room(self):
        """The room of a counter is the least of its own and of those around it."""
        outer, inner = tree(10, 5)
        page_counter_try_charge(outer, 7)

        assert [3, 3] == [outer.margin, inner.margin]
        outer.max = 4
        assert 0 == inner.margin

    def test_below_what_is_used(self):
        """A limit cannot be set that is broken already."""
        (counter,) = tree(10)
        page_counter_try_charge(counter, 6)

        assert not page_counter_set_max(counter, 5)
        assert page_counter_set_max(counter, 6)
        assert 6 == counter.max

    @pytest.mark.parametrize(
        ("size", "pages"),
        [
            ("64MiB", 16_384),
            (PAGE_SIZE, 1),
            (2 * PAGE_SIZE - 1, 1),
            (0, 0),
            ("max", PAGE_COUNTER_MAX),
            (None, PAGE_COUNTER_MAX),
            ("100000P", PAGE_COUNTER_MAX),
        ],
    )
    def test_sizes(self, size, pages):
        """Whole pages count, and no limit is a word."""
        assert pages == page_counter_memparse(size)

    def test_no_size(self):
        """The error says which word would do."""
        with pytest.raises(InvalidArgument, match='"max" is no limit'):
            page_counter_memparse("much")


class TestAgainstAModel:
    @given(
        limits=st.lists(st.integers(0, 20), min_size=1, max_size=4),
        calls=st.lists(st.tuples(st.integers(0, 3), st.integers(-8, 8)), max_size=30),
    )
    def test_page_by_page(self, limits, calls):
        """A charge of many pages is as many charges of one, until one is refused."""
        counters = tree(*limits)
        held = [0] * len(limits)
        for which, amount in calls:
            at = which % len(limits)
            inside = range(at + 1)
            change = 0
            if amount < 0:
                own = held[at] - (held[at + 1] if at + 1 < len(held) else 0)
                change = -min(-amount, own)
                page_counter_uncharge(counters[at], -change)
            else:
                while change < amount and all(held[i] + change < limits[i] for i in inside):
                    change += 1
                charged, refuses = page_counter_try_charge(counters[at], amount)
                assert (change, change < amount) == (charged, refuses is not None)
            for i in inside:
                held[i] += change
            assert held == usages(counters)
