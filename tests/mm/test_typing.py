"""The vectors that every function takes."""

import numpy as np

from mm.typing import PAGE_SHIFT, PAGE_SIZE, pages


class TestPages:
    def test_vector_of_a_few(self):
        """PFN vectors are int64, also empty ones."""
        assert [5, 7] == pages(5, 7).tolist()
        assert (np.int64, 0) == (pages().dtype, pages().size)

    def test_size(self):
        """4 KiB, as x86 has them."""
        assert 4096 == PAGE_SIZE == 1 << PAGE_SHIFT
