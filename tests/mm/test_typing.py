"""The vectors that every function takes."""

import numpy as np
import pytest

from mm.typing import PAGE_SHIFT, PAGE_SIZE, number, pages, word


class TestPages:
    def test_vector_of_a_few(self):
        """PFN vectors are int64, also empty ones."""
        assert [5, 7] == pages(5, 7).tolist()
        assert (np.int64, 0) == (pages().dtype, pages().size)

    def test_size(self):
        """4 KiB, as x86 has them."""
        assert 4096 == PAGE_SIZE == 1 << PAGE_SHIFT


class TestConstants:
    @pytest.mark.parametrize(("constant", "dtype"), [(word, np.uint64), (number, np.int64)])
    def test_a_vector_stays_what_it_is(self, constant, dtype):
        """Combined with a vector of their kind they change neither its type nor its shape."""
        combined = np.arange(3, dtype=dtype) + constant(2)

        assert ([2, 3, 4], dtype) == (combined.tolist(), combined.dtype)

    @pytest.mark.parametrize("constant", [word, number])
    def test_nobody_changes_them(self, constant):
        """An assignment in place is refused."""
        shared = constant(1)
        with pytest.raises(ValueError, match="read-only"):
            shared += shared
