"""Copies between rows, against one row or byte at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.highmem import (
    byte_places,
    copy_highpages,
    memcpy_from_pages,
    memcpy_to_pages,
)
from mm.typing import PAGE_SIZE, pages

ROWS = 300
PAYLOAD = (np.arange(ROWS * PAGE_SIZE, dtype=np.uint32) % 65521 % 253).astype(np.uint8)
PAYLOAD = PAYLOAD.reshape(ROWS, PAGE_SIZE)

# Rows in stretches, some long and some of one, in any order, each row once.
runs = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 30)), max_size=8, unique_by=lambda r: r[0]
)
row_vectors = runs.map(
    lambda runs: np.array([30 * i + k for i, n in runs for k in range(n)], dtype=np.int64)
)


class TestCopyHighpages:
    @given(to=row_vectors, frm=row_vectors, repeat=st.booleans())
    def test_row_by_row(self, to, frm, repeat):
        """Any rows to any other rows, in stretches or not; the source may repeat."""
        size = min(to.size, frm.size)
        to, frm = to[:size], frm[:size] // 2 if repeat else frm[:size]
        dst = np.zeros_like(PAYLOAD)
        expected = dst.copy()
        for i in range(size):
            expected[to[i]] = PAYLOAD[frm[i]]

        copy_highpages(dst, to, PAYLOAD, frm)

        assert (expected == dst).all()

    @pytest.mark.parametrize("order", ["in a row", "scattered", "gathered", "shuffled"])
    def test_many_rows(self, order):
        """More rows than one staging copy holds, by each of the ways."""
        rows, mixed = np.arange(ROWS), np.random.default_rng(2).permutation(ROWS)
        to = mixed if order in ("scattered", "shuffled") else rows
        frm = mixed[::-1] if order in ("gathered", "shuffled") else rows
        dst = np.zeros_like(PAYLOAD)

        copy_highpages(dst, to, PAYLOAD, frm)

        assert (PAYLOAD[frm] == dst[to]).all()

    def test_same_memory(self):
        """Rows of one memory to others of it."""
        memory = PAYLOAD.copy()

        copy_highpages(memory, np.arange(100, 200), memory, np.arange(100))

        assert (PAYLOAD[:100] == memory[100:200]).all()


class TestMemcpy:
    @given(rows=row_vectors.filter(lambda rows: rows.size), data=st.data())
    def test_from_pages(self, rows, data):
        """Bytes of rows in a row, from anywhere in the first to anywhere in the last."""
        whole = PAYLOAD[rows].reshape(-1)
        offset = data.draw(st.integers(0, PAGE_SIZE - 1))
        end = data.draw(st.integers(max(offset, whole.size - PAGE_SIZE), whole.size))
        out = np.zeros(end - offset, dtype=np.uint8)

        memcpy_from_pages(out, PAYLOAD, rows, offset)

        assert (whole[offset:end] == out).all()

    @given(rows=row_vectors.filter(lambda rows: rows.size), data=st.data())
    def test_to_pages(self, rows, data):
        """And into them; nothing beside them changes."""
        memory, expected = PAYLOAD.copy(), PAYLOAD.copy()
        offset = data.draw(st.integers(0, PAGE_SIZE - 1))
        end = data.draw(
            st.integers(max(offset, (rows.size - 1) * PAGE_SIZE), rows.size * PAGE_SIZE)
        )
        fresh = np.arange(end - offset).astype(np.uint8)
        for i in range(rows.size):
            first, last = max(i * PAGE_SIZE, offset), min((i + 1) * PAGE_SIZE, end)
            piece = fresh[first - offset : last - offset]
            expected[rows[i], first % PAGE_SIZE :][: piece.size] = piece

        memcpy_to_pages(memory, rows, offset, fresh)

        assert (expected == memory).all()


class TestBytePlaces:
    def test_flat(self):
        """Place of the page times its size, and the offset in it."""
        places = byte_places(pages(7, 3), pages(0x5001, 0x9FFF, 0x5002), pages(0, 1, 0))

        assert [7 * 4096 + 1, 3 * 4096 + 4095, 7 * 4096 + 2] == places.tolist()
