"""The short forms of any(), all() and flatnonzero()."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.typing import every, pages, places, some

masks = st.lists(st.booleans(), max_size=20)


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


class TestPages:
    def test_vector_of_a_few(self):
        """PFN vectors are int64, also empty ones."""
        assert [5, 7] == pages(5, 7).tolist()
        assert (np.int64, 0) == (pages().dtype, pages().size)
