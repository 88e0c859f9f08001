"""Ages of chunks, against a list of chunks in the order in which they came into use."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from devices.chunks import Chunks

STEPS = st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 99), min_size=1)), max_size=12)


def numbers(*pages):
    return np.array(pages, dtype=np.int64)


class TestChunks:
    @given(npages=st.integers(1, 100), size=st.sampled_from([1, 16, 32, 512]), steps=STEPS)
    def test_any_sequence(self, npages, size, steps):
        """Whatever is taken and given, chunks in use are ordered by when they were last empty."""
        chunks, used, order = Chunks(npages, size), set(), []
        for take, picked in steps:
            pages = {page for page in picked if page < npages}
            pages = sorted(pages - used if take else pages & used)
            if take:
                chunks.take(numbers(*pages))
                used.update(pages)
                order += sorted({page // size for page in pages} - set(order))
            else:
                chunks.give(numbers(*pages))
                used.difference_update(pages)
                order = [chunk for chunk in order if any(p // size == chunk for p in used)]

            assert order == chunks.oldest_first().tolist()
            assert npages - len(used) == chunks.free_pages

    @given(npages=st.integers(1, 3000), size=st.sampled_from([16, 128, 512]))
    def test_pages_of(self, npages, size):
        """Each page is in exactly one chunk; the last chunk may be short."""
        chunks = Chunks(npages, size)

        parts = [chunks.pages_of(chunk) for chunk in range(chunks.used.size)]

        assert list(range(npages)) == np.concatenate(parts).tolist()
        assert all(part.size == size for part in parts[:-1])

    def test_use_makes_no_younger(self):
        """More pages of a chunk that is in use leave its age as it is."""
        chunks = Chunks(64, 16)
        chunks.take(numbers(16, 0, 32))

        chunks.take(numbers(1, 2, 3))

        assert [0, 1, 2] == chunks.oldest_first().tolist()

    def test_emptied_chunk_is_young(self):
        """A chunk that was empty in between is as old as its new pages."""
        chunks = Chunks(64, 16)
        chunks.take(numbers(0, 16))

        chunks.give(numbers(0))
        chunks.take(numbers(5))

        assert [1, 0] == chunks.oldest_first().tolist()

    def test_nothing(self):
        """Of an unused device no chunk is in use, and taking nothing changes nothing."""
        chunks = Chunks(40, 16)

        chunks.take(numbers())
        chunks.give(numbers())

        assert [] == chunks.oldest_first().tolist()
        assert 40 == chunks.free_pages
