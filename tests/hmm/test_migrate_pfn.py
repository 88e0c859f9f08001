"""The words of src and dst, bit by bit, against their picture in include/linux/migrate.h."""

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hmm
from hmm.migrate_pfn import STAYED_ERRNO, is_migrating, is_valid

PFNS = st.lists(st.integers(0, (1 << 40) - 1), max_size=20)
WORDS = st.lists(st.integers(0, (1 << 46) - 1), max_size=20)


class TestWords:
    @pytest.mark.parametrize(
        ("name", "bit"),
        [("VALID", 0), ("MIGRATE", 1), ("LOCKED", 2), ("WRITE", 3), ("DEVICE", 4), ("ERROR", 5)],
    )
    def test_flags_are_the_kernels(self, name, bit):
        """Each flag is the bit that it is in v4.20, as a word that stays uint64 in arithmetic."""
        flag = getattr(hmm, f"MIGRATE_PFN_{name}")

        assert (1 << bit, np.uint64) == (flag, (flag | flag).dtype)

    @given(PFNS)
    def test_word_of_a_pfn(self, pfns):
        """migrate_pfn() shifts by six and sets VALID."""
        words = hmm.migrate_pfn(np.array(pfns, dtype=np.int64))

        assert [pfn << 6 | 1 for pfn in pfns] == words.tolist()
        assert np.uint64 == words.dtype

    @given(PFNS, st.integers(0, 63))
    def test_pfn_of_a_word(self, pfns, flags):
        """Whatever flags are set, the PFN comes back, as an index."""
        words = hmm.migrate_pfn(np.array(pfns, dtype=np.int64)) | np.uint64(flags)

        assert pfns == hmm.migrate_pfn_to_pfn(words).tolist()
        assert np.int64 == hmm.migrate_pfn_to_pfn(words).dtype

    @given(WORDS)
    def test_page_of_a_word(self, numbers):
        """A word without VALID names no page: -1, whatever else is in it."""
        words = np.array(numbers, dtype=np.uint64)

        expected = [number >> 6 if number & 1 else -1 for number in numbers]
        assert expected == hmm.migrate_pfn_to_page(words).tolist()

    @given(WORDS)
    def test_questions(self, numbers):
        """is_valid() asks for bit 0, is_migrating() for bit 1."""
        words = np.array(numbers, dtype=np.uint64)

        assert [number % 2 == 1 for number in numbers] == is_valid(words).tolist()
        assert [number // 2 % 2 == 1 for number in numbers] == is_migrating(words).tolist()


class TestStayed:
    def test_every_reason_has_an_errno(self):
        """Zero for a page that moved, a negative errno that the platform knows for the rest."""
        codes = {reason: reason.errno for reason in hmm.Stayed}

        assert [hmm.Stayed.NO] == [reason for reason, code in codes.items() if code == 0]
        assert all(-code in errno.errorcode for code in codes.values() if code)

    def test_the_vector_agrees(self):
        """Indexing by reasons gives the same errnos, for a whole range at once."""
        assert [reason.errno for reason in hmm.Stayed] == STAYED_ERRNO[list(hmm.Stayed)].tolist()
