"""Sizes, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import InvalidArgument
from mm.memparse import format_size, memparse

UNITS = ["", "K", "M", "G", "T", "P"]


class TestMemparse:
    @given(nbytes=st.integers(0, 2**70))
    def test_int_is_bytes(self, nbytes):
        """An int, or its digits, is a number of bytes."""
        assert nbytes == memparse(nbytes) == memparse(str(nbytes)) == memparse(f"{nbytes}B")

    @given(
        number=st.integers(0, 10**6),
        power=st.integers(1, 5),
        ending=st.sampled_from(["", "iB"]),
        lower=st.booleans(),
        space=st.sampled_from(["", " ", "\t"]),
    )
    def test_units_are_powers_of_1024(self, number, power, ending, lower, space):
        """K to P, with or without iB, in either case, with space around."""
        text = f"{space}{number}{space}{UNITS[power]}{ending}{space}"

        assert number * 1024**power == memparse(text.lower() if lower else text)

    @given(eighths=st.integers(0, 2**16), power=st.integers(1, 5))
    def test_fractions_are_exact(self, eighths, power):
        """A fraction of a unit is fine where it is a whole number of bytes."""
        text = f"{eighths // 8}.{eighths % 8 * 125:03d}{UNITS[power]}"

        assert eighths * 1024**power // 8 == memparse(text)

    @pytest.mark.parametrize(
        ("size", "complaint"),
        [
            (-1, "a size cannot be negative, got -1"),
            ("64 MB", "'64 MB' is no size; write bytes as an int, or \"64MiB\""),
            ("-1K", "is no size"),
            ("", "is no size"),
            ("K", "is no size"),
            ("1e6", "is no size"),
            ("0x10", "is no size"),
            ("1.5", "'1.5' is not a whole number of bytes"),
            ("0.3K", "is not a whole number of bytes"),
            (1.5, "1.5 is no size"),
            (True, "True is no size"),
            (None, "None is no size"),
            (b"1K", "is no size"),
        ],
    )
    def test_what_is_no_size(self, size, complaint):
        """The message says what was written and what can be."""
        with pytest.raises(InvalidArgument, match=complaint):
            memparse(size)


class TestFormatSize:
    @pytest.mark.parametrize(
        ("nbytes", "text"),
        [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            (1 << 40, "1 TiB"),
            (1 << 50, "1 PiB"),
            (5 << 60, "5120 PiB"),
        ],
    )
    def test_largest_unit_that_keeps_it_short(self, nbytes, text):
        """People read it at a glance."""
        assert text == format_size(nbytes)

    @given(number=st.integers(1, 1023), power=st.integers(0, 5))
    def test_can_be_read_back(self, number, power):
        """What is printed can be typed."""
        assert number * 1024**power == memparse(format_size(number * 1024**power))
