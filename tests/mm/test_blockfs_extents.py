"""Extents, against a dictionary from blocks of a file to blocks of a device."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mm.blockfs_extents import Extents, spread


def columns(extents):
    return [
        *zip(*(c.tolist() for c in (extents.logical, extents.start, extents.count)), strict=True)
    ]


class TestExtents:
    def test_neighbours_join(self):
        """What follows in the file and on the device is one extent."""
        extents = Extents.none()
        extents.insert(np.array([0, 1, 5]), np.array([10, 11, 15]))
        extents.insert(np.array([2, 4]), np.array([12, 14]))

        assert [(0, 10, 3), (4, 14, 2)] == columns(extents)
        assert 6 == extents.end

    def test_holes(self):
        """Nothing is where nothing was put."""
        assert [-1, -1] == Extents.none().lookup(np.array([0, 7])).tolist()
        assert 0 == Extents.none().end

    def test_cut_in_the_middle(self):
        """An extent may lose its end."""
        extents = Extents(*np.array([[0, 8], [100, 300], [4, 4]]))

        assert [102, 103, 300, 301, 302, 303] == extents.truncate(2).tolist()
        assert [(0, 100, 2)] == columns(extents)

    def test_sound(self):
        """They ascend, do not overlap, are not empty and lie on the device."""
        for extents, sound in (
            ([[0, 4], [10, 20], [4, 4]], True),
            ([[0, 3], [10, 20], [4, 4]], False),
            ([[4, 0], [10, 20], [4, 4]], False),
            ([[0, 4], [10, 20], [4, 0]], False),
            ([[0, 4], [9, 20], [4, 4]], False),
            ([[0, 4], [10, 27], [4, 4]], False),
        ):
            assert sound == Extents(*np.array(extents)).sound(10, 30)

    @given(
        steps=st.lists(
            st.tuples(st.sets(st.integers(0, 40), min_size=1), st.integers(0, 45)), max_size=5
        )
    )
    def test_dictionary(self, steps):
        """Whatever is put in and cut off, each block is where it was put."""
        extents, twin, fresh = Extents.none(), {}, 0
        for blocks, cut in steps:
            new = sorted(blocks - twin.keys())
            extents.insert(np.array(new, dtype=np.int64), np.arange(len(new)) + fresh)
            twin |= {block: fresh + i for i, block in enumerate(new)}
            fresh += len(new)
            freed = extents.truncate(cut)
            assert sorted(b for at, b in twin.items() if at >= cut) == sorted(freed.tolist())
            twin = {at: b for at, b in twin.items() if at < cut}

            found = extents.lookup(np.arange(50)).tolist()
            assert [twin.get(at, -1) for at in range(50)] == found
            assert [twin[at] for at in sorted(twin)] == extents.blocks().tolist()
            assert extents.sound(0, fresh)


class TestSpread:
    def test_numbers(self):
        """Each stretch in full, in order; an empty one gives none."""
        assert [5, 6, 9, 1] == spread(np.array([5, 7, 9, 1]), np.array([2, 0, 1, 1])).tolist()
