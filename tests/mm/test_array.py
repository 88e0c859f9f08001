"""Arrays in process memory, against the same NumPy array beside them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mm import InvalidArgument, Machine, SegmentationFault
from mm.pgtable import PMD_SIZE
from mm.typing import PAGE_SIZE
from tests.world import mapped_range

DTYPES = st.sampled_from(["u1", "<i2", ">i4", "f8", "c16", "S3", "?", "i4,f8"])
SHAPES = hnp.array_shapes(max_dims=4, max_side=7)


def process(memory="1MiB"):
    return Machine((memory,), max_physmem=memory).spawn("train")


def numbered(shape, dtype):
    """An array of *shape* whose bytes are all different, as far as they can be."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (np.arange(size) * 7 % 251 + 1).astype(np.uint8)
    return raw.view(dtype).reshape(shape) if dtype != "?" else (raw % 2 == 0).reshape(shape)


def twins(shape, dtype):
    """An array in the memory of a process, and an ordinary one, with the same contents."""
    model = numbered(shape, dtype)
    array = process().array(shape, dtype)
    array[...] = model
    return array, model


def same(expected, got):
    """True if both have the same type, shape and bytes; a single element may be a scalar."""
    kind = np.asarray(expected).dtype
    assert kind.newbyteorder("=") == np.asarray(got).dtype.newbyteorder("=")
    assert np.shape(expected) == np.shape(got)
    return np.asarray(expected).tobytes() == np.asarray(got, dtype=kind).tobytes()


@st.composite
def basic_cases(draw):
    shape = draw(SHAPES)
    key = draw(hnp.basic_indices(shape, allow_newaxis=True))
    return shape, draw(DTYPES), key


@st.composite
def fancy_cases(draw):
    shape = draw(SHAPES)
    return shape, draw(DTYPES), draw(hnp.integer_array_indices(shape))


class TestGet:
    @given(case=basic_cases())
    def test_slices(self, case):
        """Numbers, slices of any step and sign, ellipsis and newaxis, as in NumPy."""
        shape, dtype, key = case
        array, model = twins(shape, dtype)

        assert same(model[key], array[key])

    @given(case=fancy_cases())
    def test_vectors(self, case):
        """Integer arrays, broadcast against one another."""
        shape, dtype, key = case
        array, model = twins(shape, dtype)

        assert same(model[key], array[key])

    @given(shape=SHAPES, dtype=DTYPES, data=st.data())
    def test_masks(self, shape, dtype, data):
        """Boolean arrays."""
        array, model = twins(shape, dtype)
        mask = data.draw(hnp.arrays(np.bool_, shape))

        assert same(model[mask], array[mask])

    @pytest.mark.parametrize("key", [True, False, np.True_, (True, 1), (None, 2, False)])
    def test_truth_values(self, key):
        """True and False are masks, not numbers."""
        array, model = twins((4, 3), "i4")

        assert same(model[key], array[key])

    @pytest.mark.parametrize(
        "key",
        [
            ([0, 2], slice(None, None, -1)),
            (slice(1, None), [2, 0, 2]),
            (np.int8(-1), Ellipsis, np.array([0, 1])),
            [[0, 1], [3, 3]],
            (),
        ],
    )
    def test_mixtures(self, key):
        """Vectors beside slices."""
        array, model = twins((4, 3), "i4")

        assert same(model[key], array[key])

    @pytest.mark.parametrize("key", [4, -5, (0, 3), (0, 0, 0), 1.5, "x", [7]])
    def test_what_numpy_refuses(self, key):
        """A wrong index is NumPy's error."""
        array, _ = twins((4, 3), "i4")

        with pytest.raises(IndexError):
            array[key]

    def test_copy(self):
        """What comes back is a copy: changing it changes nothing here."""
        array, model = twins((4, 3), "i4")

        array[1][:] = 0

        assert same(model, array[...])


class TestSet:
    @given(case=basic_cases())
    def test_slices(self, case):
        """The elements that NumPy would store, and no others."""
        shape, dtype, key = case
        array, model = twins(shape, dtype)
        value = numbered(np.shape(model[key]), dtype)

        array[key] = value
        model[key] = value

        assert same(model, array[...])

    @given(case=fancy_cases())
    def test_vectors(self, case):
        """Of an element that is named twice, the last value stays."""
        shape, dtype, key = case
        array, model = twins(shape, dtype)
        value = numbered(np.shape(model[key]), dtype)

        array[key] = value
        model[key] = value

        assert same(model, array[...])

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            (slice(None), 7),
            (1, [1, 2, 3]),
            ((slice(None), 1), np.arange(4)),
            (slice(None, None, 2), 1.9),
            ([0, 0, 1], [[1], [2], [3]]),
            (Ellipsis, np.arange(12.0).reshape(4, 3)),
        ],
    )
    def test_values_are_cast_and_broadcast(self, key, value):
        """As in NumPy."""
        array, model = twins((4, 3), "i4")

        array[key] = value
        model[key] = value

        assert same(model, array[...])

    def test_wrong_shape(self):
        """What cannot be broadcast is refused, and nothing is stored."""
        array, model = twins((4, 3), "i4")

        with pytest.raises(ValueError, match="broadcast"):
            array[1] = [1, 2]

        assert same(model, array[...])


class TestArray:
    def test_fresh_array_is_zeros(self):
        """New memory is empty, and takes no frame before it is written."""
        array = process().array((3, 5), "i8")

        assert same(np.zeros((3, 5), "i8"), array[...])
        assert 0 == array.mm.anon_rss

    def test_attributes(self):
        """Those of an ndarray that make sense without its memory."""
        array, model = twins((4, 3), ">i4")

        for name in ("shape", "dtype", "size", "nbytes"):
            assert getattr(model, name) == getattr(array, name)
        assert 4 == len(array)
        assert f"<ProcessArray (4, 3) >i4 at {array.addr:#x} of train>" == repr(array)

    def test_numpy_functions(self):
        """np.asarray() reads all of it, with a cast where one is asked for."""
        array, model = twins((4, 3), "i4")

        assert same(model, np.asarray(array))
        assert same(model.astype("f4"), np.asarray(array, dtype="f4"))
        assert model.sum() == np.sum(array)

    def test_no_view(self):
        """There is no memory here that a view could be of."""
        array, _ = twins((4, 3), "i4")

        with pytest.raises(ValueError, match="can only be copied out"):
            np.asarray(array, copy=False)

    @pytest.mark.parametrize("shape", [(), 1, 7, (5,), (2, 3), [2, 2]])
    def test_shapes(self, shape):
        """A number is one dimension, () is none."""
        array = process().array(shape, "i2")

        expected = np.zeros(shape, "i2")
        assert expected.shape == array.shape
        assert same(expected, array[...])

    @pytest.mark.parametrize(
        ("shape", "dtype"), [((0,), "i4"), ((3, -1), "i4"), (5, "O"), (5, "V0"), (5, "U0")]
    )
    def test_what_no_memory_holds(self, shape, dtype):
        """Empty arrays and Python objects are refused."""
        with pytest.raises(InvalidArgument, match="no memory holds shape"):
            process().array(shape, dtype)

    def test_two_arrays(self):
        """Each has memory of its own."""
        owner = process()
        one, two = owner.array(5, "i4"), owner.array(5, "i4")

        one[:] = 1
        two[:] = 2

        assert [1] * 5 == one[:].tolist()

    def test_memory_that_is_gone(self):
        """An array does not keep its mapping."""
        owner = process()
        array = owner.array(4, "i4")
        owner.munmap(array.addr, array.nbytes)

        with pytest.raises(SegmentationFault):
            array[0]


class TestFaults:
    def test_only_what_is_touched(self):
        """A row faults in the pages of that row; a column a page of every row."""
        array = process().array((16, PAGE_SIZE), "u1")

        array[3] = 1
        one_row = array.mm.anon_rss
        array[:, 5] = 1

        assert (1, 16) == (one_row, array.mm.anon_rss)

    def test_across_page_tables(self):
        """Elements lie on both sides of a 2 MiB border, one of them in two pages."""
        owner = process("4MiB")
        array = owner.array((PMD_SIZE // 3 + 1000,), "S3")
        array[-5:] = array[:5] = [b"abc", b"def", b"ghi", b"jkl", b"mno"]

        assert [b"mno", b"abc"] == array[[-1, 0]].tolist()
        assert [b"jkl", b"ghi"] == array[-2:-4:-1].tolist()

    def test_huge_array(self):
        """An array may be as large as all memory, of which it takes what is touched."""
        array = process("1GiB").array((1 << 14, 1 << 14), "f4")

        array[5, 7] = 1.0
        array[-1, :: 1 << 12] = 2.0

        assert (1.0, 8.0) == (array[5, 5:9].sum(), array[-1, :: 1 << 12].sum())
        assert 5 == array.mm.anon_rss

    def test_through_the_device(self):
        """The CPU sees what the device has."""
        world = mapped_range(pages=1)
        array = world.process.array((8, 1024), "i4")
        array[...] = np.arange(8 * 1024).reshape(8, 1024)
        world.gpu.to_device(world.process, array.addr, array.nbytes)

        assert list(range(5, 8 * 1024, 1024)) == array[:, 5].tolist()
