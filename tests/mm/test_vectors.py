"""Small questions about vectors, against plain Python."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import vectors
from mm.typing import pages, word
from mm.vectors import (
    add_at,
    ascending,
    chosen,
    distinct,
    every,
    frozen,
    has,
    joined,
    keep_bits,
    nr_pieces,
    parted,
    pieces,
    places,
    rows,
    set_bits,
    some,
    stretches,
    uniform,
    unique,
)

masks = st.lists(st.booleans(), max_size=20)
numbers = st.lists(st.integers(0, 30), max_size=20)

# Stretches of numbers that follow one another, as PFNs do, and a few that do not.
stretched = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=6).map(
    lambda runs: [first + i for first, count in runs for i in range(count)]
)


class TestMasks:
    @given(mask=masks)
    def test_some_and_every(self, mask):
        """As any() and all(), also of nothing."""
        vector = np.array(mask, dtype=np.bool_)

        assert (any(mask), all(mask)) == (some(vector), every(vector))

    @pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.uint64])
    @given(mask=masks)
    def test_places(self, dtype, mask):
        """Where a vector is not 0, as int64."""
        found = places(np.array(mask, dtype=dtype))

        assert [i for i, true in enumerate(mask) if true] == found.tolist()
        assert np.int64 == found.dtype

    @given(words=st.lists(st.integers(0, 2**64 - 1)), bits=st.integers(0, 2**64 - 1))
    def test_has(self, words, bits):
        """Any of several bits, the topmost too."""
        mask = has(np.array(words, dtype=np.uint64), np.uint64(bits))

        assert [word & bits != 0 for word in words] == mask.tolist()

    @given(most=st.integers(0, 15), one=st.integers(0, 15), bits=st.integers(0, 15))
    def test_has_of_many(self, most, one, bits):
        """A long vector whose words are mostly the same, as the flags of pages are."""
        words = np.full(5000, most, dtype=np.uint64)
        words[3] = one

        assert np.array_equal(words & np.uint64(bits) != 0, has(words, word(bits)))

    @given(which=stretched, bits=st.integers(0, 2**64 - 1), filled=st.integers(0, 2**64 - 1))
    def test_set_and_keep_bits(self, which, bits, filled):
        """Of the words that are named, and of no others."""
        words = np.full(40, filled, dtype=np.uint64)
        kept = words.copy()

        set_bits(words, rows(pages(*which)), word(bits))
        keep_bits(kept, rows(pages(*which)), word(bits))

        named = [n in which for n in range(40)]
        assert [filled | bits if there else filled for there in named] == words.tolist()
        assert [filled & bits if there else filled for there in named] == kept.tolist()


class TestNumbers:
    @given(values=numbers)
    def test_distinct(self, values):
        """The values that occur, ascending, as plain ints."""
        assert sorted(set(values)) == distinct(pages(*values))

    @given(values=numbers)
    def test_unique(self, values):
        """Each value once, in the order in which they come first."""
        assert list(dict.fromkeys(values)) == unique(pages(*values)).tolist()

    @given(values=stretched, times=st.sampled_from([1, 100]))
    def test_ascending(self, values, times):
        """In order, whether they come as a few long stretches or in disorder."""
        numbers = [times * value + i for value in values for i in range(times)]

        assert sorted(numbers) == ascending(pages(*numbers)).tolist()

    @given(values=stretched)
    def test_rows(self, values):
        """Whatever selects them selects them: a slice only where they ascend without gaps."""
        column = np.arange(100) * 7

        assert [7 * value for value in values] == column[rows(pages(*values))].tolist()

    @given(values=stretched, times=st.sampled_from([1, 100]))
    def test_frozen(self, values, times):
        """What is frozen selects as before, stays as it is, and is forgotten when it goes."""
        numbers = pages(*(times * value + i for value in values for i in range(times)))
        selected, known = rows(numbers), len(vectors._runs)

        assert numbers is frozen(numbers)
        assert isinstance(selected, slice) == isinstance(rows(numbers), slice)
        assert np.array_equal(np.arange(10_000)[selected], np.arange(10_000)[rows(numbers)])
        if len(vectors._runs) > known:
            with pytest.raises(ValueError, match="read-only"):
                numbers[0] = 7
        del numbers, selected
        assert known == len(vectors._runs)

    @pytest.mark.parametrize(
        ("values", "a_slice"),
        [
            ([3, 4, 5], True),
            ([3, 5, 4], False),
            ([5, 4, 3], False),
            ([3, 3, 5], False),
            ([], False),
        ],
    )
    def test_rows_that_are_a_slice(self, values, a_slice):
        """First and last alone do not make a run."""
        assert a_slice == isinstance(rows(pages(*values)), slice)

    @given(values=stretched, amount=st.integers(-3, 3))
    def test_add_at(self, values, amount):
        """A number that repeats counts each time."""
        column = np.zeros(40, dtype=np.int32)

        add_at(column, rows(pages(*values)), amount)

        assert [amount * values.count(i) for i in range(40)] == column.tolist()

    @given(parts=st.lists(numbers, max_size=4))
    def test_joined(self, parts):
        """One after the other; of none, an empty vector of PFNs."""
        whole = joined([pages(*part) for part in parts])

        assert [value for part in parts for value in part] == whole.tolist()
        assert np.int64 == whole.dtype

    @given(values=numbers, data=st.data())
    def test_parted(self, values, data):
        """Nothing is lost and the order stays, on both sides."""
        mask = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))

        those, others = parted(pages(*values), np.array(mask, dtype=np.bool_))

        assert [v for v, kept in zip(values, mask, strict=True) if kept] == those.tolist()
        assert [v for v, kept in zip(values, mask, strict=True) if not kept] == others.tolist()
        assert those.tolist() == chosen(pages(*values), np.array(mask, dtype=np.bool_)).tolist()

    @given(value=st.integers(0, 2**64 - 1), other=st.integers(0, 2**64 - 1), at=st.integers(0, 99))
    def test_uniform(self, value, other, at):
        """One of many words speaks for all of them, where they are all the same."""
        words = np.full(100, value, dtype=np.uint64)
        words[at] = other

        assert ([value] if value == other else words.tolist()) == uniform(words).tolist()

    @given(values=numbers, kept=st.booleans())
    def test_chosen_by_one(self, values, kept):
        """A mask of one element is for all of them."""
        assert (values if kept else []) == chosen(pages(*values), np.array([kept])).tolist()


class TestPieces:
    @given(values=stretched, step=st.sampled_from([1, 4096]))
    def test_stretches(self, values, step):
        """They tile the vector, each ascends by steps, and no two of them could be one."""
        vector = pages(*values) * step

        found = [vector[run].tolist() for run in stretches(vector, step)]

        assert vector.tolist() == [value for run in found for value in run]
        for run in found:
            assert list(range(run[0], run[0] + len(run) * step, step)) == run
        for run, following in pairwise(found):
            assert run[-1] + step != following[0]

    @given(breaks=masks)
    def test_pieces(self, breaks):
        """A cut for each break, and none else."""
        found = pieces(np.array(breaks, dtype=np.bool_), len(breaks) + 1)

        cuts = [i + 1 for i, broken in enumerate(breaks) if broken]
        assert cuts == [piece.start for piece in found[1:]]
        assert cuts == [piece.stop for piece in found[:-1]]
        assert (0, len(breaks) + 1) == (found[0].start, found[-1].stop)
        assert len(found) == nr_pieces(np.array(breaks, dtype=np.bool_))

    def test_no_pieces(self):
        """Nothing is in no piece."""
        assert [] == pieces(np.zeros(0, dtype=np.bool_), 0)
