"""Flag words."""

import numpy as np
import pytest

from mm.page_flags import BIT, FLAG_NAMES, PG_dirty, PG_locked, PG_lru, describe_flags


class TestFlags:
    @pytest.mark.parametrize("n", [0, 31, 32, 63])
    def test_bit(self, n):
        """Each flag is a word, and so is what it leaves of another."""
        assert 1 << n == int(BIT(n))
        assert (np.uint64, np.uint64) == (BIT(n).dtype, (~BIT(n)).dtype)
        assert (1 << 64) - 1 - (1 << n) == int(~BIT(n))

    def test_each_is_a_bit_of_its_own(self):
        """No two names for one bit."""
        words = [int(word) for word in FLAG_NAMES.values()]

        assert {1} == {word.bit_count() for word in words}
        assert len(words) == len(set(words))

    @pytest.mark.parametrize(
        ("word", "text"),
        [(0, "none"), (PG_lru, "lru"), (PG_dirty | PG_lru | PG_locked, "locked|dirty|lru")],
    )
    def test_describe(self, word, text):
        """By name, as a kernel dump prints them."""
        assert text == describe_flags(int(word))
