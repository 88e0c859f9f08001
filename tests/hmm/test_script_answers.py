"""Forms of an answer, against plain Python and recorded lines."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmm.script.answers import contents, error_name, fnv, pages_of_words, runs, status_name
from mm.errors import Busy, Deadlock, InvalidArgument, MmError


class TestRuns:
    @given(st.lists(st.sampled_from([0, 1, "x"])))
    def test_unrolled(self, values):
        """Runs hold what was given, and neighbours differ."""
        found = runs(values)

        assert values == [value for value, count in found for _ in range(count)]
        assert all(a[0] != b[0] for a, b in pairwise(found))


class TestContents:
    @pytest.mark.parametrize(
        ("words", "hashed"),
        [
            ([0, 0, 0], "6ab05ef9aa8b9b25"),  # hand/02_holes, line 17
            ([1, 0, 0], "b05a8fd2df458324"),  # line 16: page 0 was written 1 in its first word
        ],
    )
    def test_recorded_hash(self, words, hashed):
        """The hash of pages with these first words is what a kernel's script printed."""
        data = np.zeros((3, 4096), dtype=np.uint8)
        data.view(np.uint64)[:, 0] = words

        assert {"w": [f"{word:x}" for word in words], "h": hashed} == contents(data)

    @given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    def test_hash(self, firsts):
        """Each word is folded in by xor, then multiplication."""
        data = np.zeros((1, 4096), dtype=np.uint8)
        data.view(np.uint64)[0, : len(firsts)] = firsts
        expected = 14695981039346656037
        for word in [*firsts, *[0] * (512 - len(firsts))]:
            expected = (expected ^ word) * 1099511628211 % 2**64

        assert f"{expected:016x}" == fnv(data)

    def test_many_pages(self):
        """Of more than 64 pages only the hash is shown."""
        assert ["h"] == list(contents(np.zeros((65, 4096), dtype=np.uint8)))

    def test_pages_of_words(self):
        """Each page holds its own word; after the largest comes 0."""
        words = pages_of_words(2**64 - 1, 2).view(np.uint64)

        assert [[2**64 - 1] * 512, [0] * 512] == words.tolist()


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "name"),
        [(InvalidArgument, "EINVAL"), (Busy, "EBUSY"), (Deadlock, "EDEADLK")],
    )
    def test_name(self, error, name):
        """An errno has the name that the C library gives it."""
        assert name == error_name(error("what"))

    def test_unsupported(self):
        """Of two names for one errno, that of Linux."""
        error = MmError("what")
        error.code = 95

        assert "EOPNOTSUPP" == error_name(error)

    def test_status(self):
        """A status is a node or a negative errno."""
        assert [1, "ENOENT"] == [status_name(1), status_name(-2)]
