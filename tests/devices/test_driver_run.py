"""Driver.run(): kernels on arrays of a process, in device memory.

The oracle is the same kernel on an ordinary NumPy array.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import PAGE_SIZE, InvalidArgument, SegmentationFault
from mm.array import ProcessArray
from tests.world import in_step, mapped_range

WORDS = PAGE_SIZE // 8  # in a page


class TestRun:
    def test_in_place(self):
        """A kernel changes its array in device memory."""
        world = mapped_range(pages=1)
        array = world.process.array((100, 30), dtype="int32")
        array[:] = 3

        def kernel(a):
            a[:, 1] += 1

        world.gpu.run(kernel, array)

        expected = np.full((100, 30), 3)
        expected[:, 1] = 4
        assert 3 == world.gpu.stats.pages_to_device
        assert np.array_equal(expected, array)
        world.machine.verify()

    @given(
        shape=st.sampled_from([(), (1,), (511,), (513,), (3, 700), (2, 3, 400)]),
        dtype=st.sampled_from(["uint8", "int16", "float32", "float64", "complex128"]),
        pinned=st.sets(st.integers(0, 8)),
    )
    def test_any_array(self, shape, dtype, pinned):
        """A kernel sees the array that the process sees, whatever its shape and its pins."""
        world = mapped_range(pages=1)
        array = world.process.array(shape, dtype=dtype)
        array[...] = model = np.arange(array.size).reshape(shape).astype(dtype)
        for page in pinned:
            if page * PAGE_SIZE < array.nbytes:
                world.pins.append(world.process.pin(array.addr + page * PAGE_SIZE, 1))

        world.gpu.run(lambda a: a * 3 + 1, array)

        assert np.array_equal((model * 3 + 1).astype(dtype), array)
        assert in_step(world.gpu)
        world.machine.verify()

    def test_result(self):
        """What a kernel returns is stored in the first array, cast to its type."""
        world = mapped_range(pages=1)
        one, two = (world.process.array(1_000, dtype="int64") for _ in range(2))
        one[:] = np.arange(1_000)
        two[:] = 2

        world.gpu.run(np.divide, one, two)

        assert np.array_equal(np.arange(1_000) // 2, one)
        assert np.array_equal(np.full(1_000, 2), two)
        world.machine.verify()

    def test_out(self):
        """With out= the result goes there, and the arguments stay as they are."""
        world = mapped_range(pages=1)
        one, out = (world.process.array(1_000) for _ in range(2))
        one[:] = np.arange(1_000)

        world.gpu.run(np.sqrt, one, out=out)

        assert np.array_equal(np.arange(1_000), one)
        assert np.array_equal(np.sqrt(np.arange(1_000)), out)
        world.machine.verify()

    def test_one_array_twice(self):
        """An array may be given twice."""
        world = mapped_range(pages=1)
        array = world.process.array(600)
        array[:] = np.arange(600)

        world.gpu.run(np.multiply, array, array, out=array)

        assert np.array_equal(np.arange(600) ** 2, array)

    def test_result_that_looks_into_the_array(self):
        """A result may be another view of the array that it goes to."""
        world = mapped_range(pages=1)
        array = world.process.array(2_000, dtype="int32")
        array[:] = np.arange(2_000)

        world.gpu.run(lambda a: a[::-1], array)

        assert np.array_equal(np.arange(2_000)[::-1], array)

    def test_bytes_around(self):
        """What shares a page with the end of an array stays as it is."""
        world = mapped_range(pages=1)
        array = world.process.array(10, dtype="uint8")
        world.process.write(array.addr + 10, b"tail")

        world.gpu.run(lambda a: a + 7, array)

        assert b"\7\7tail" == world.process.read(array.addr + 8, 6)

    @pytest.mark.parametrize("pinned", [None, 1])
    def test_arrays_that_share_a_page(self, pinned):
        """Two arrays with a page in common both get what the kernel stores."""
        world = mapped_range(pages=3)
        if pinned is not None:
            world.pin(pinned)
        byte = np.dtype("uint8")
        one = ProcessArray(world.process.mm, world.addr, (2 * PAGE_SIZE + 100,), byte)
        two = ProcessArray(world.process.mm, world.addr + one.nbytes, (100,), byte)

        def kernel(a, b):
            a[:], b[:] = 7, 8

        world.gpu.run(kernel, one, two)

        assert {7} == set(np.asarray(one).tolist())
        assert {8} == set(np.asarray(two).tolist())
        assert b"\x08\x02" == world.process.read(two.addr + 99, 2)
        world.machine.verify()

    @pytest.mark.parametrize("there", [0, 10, 16])
    def test_larger_than_the_device(self, there):
        """A kernel reaches in system memory what finds no room, wherever it was before."""
        world = mapped_range(pages=1, memory="64KiB")
        array = world.process.array(20 * WORDS, dtype="int64")
        array[:] = np.arange(20 * WORDS)
        if there:
            world.gpu.to_device(world.process, array.addr, there * PAGE_SIZE)

        world.gpu.run(np.negative, array)

        assert np.array_equal(-np.arange(20 * WORDS), array)
        assert in_step(world.gpu)
        world.machine.verify()

    def test_pages_out_of_order(self):
        """An array whose pages lie anywhere in device memory is whole for a kernel."""
        world = mapped_range(pages=1)
        array = world.process.array(8 * WORDS, dtype="int64")
        array[:] = np.arange(8 * WORDS)
        for page in (5, 2, 7, 0, 3):
            world.gpu.to_device(world.process, array.addr + page * PAGE_SIZE, PAGE_SIZE)

        world.gpu.run(np.negative, array)

        assert np.array_equal(-np.arange(8 * WORDS), array)
        world.machine.verify()

    def test_untouched(self):
        """A kernel finds zeros in an array that nobody has touched."""
        world = mapped_range(pages=1)
        array = world.process.array(3_000)

        world.gpu.run(np.cos, array)

        assert np.array_equal(np.ones(3_000), array)

    @pytest.mark.parametrize("pinned", [False, True])
    def test_kernel_that_raises(self, pinned):
        """What a kernel raises reaches the caller, and everything is well."""
        world = mapped_range(pages=1)
        array = world.process.array(3 * WORDS)
        array[:] = 5
        if pinned:
            world.pins.append(world.process.pin(array.addr + PAGE_SIZE, 1))

        with pytest.raises(ZeroDivisionError):
            world.gpu.run(lambda a: 1 // 0, array)

        world.machine.verify()
        assert np.array_equal(np.full(3 * WORDS, 5.0), array)
        world.gpu.run(np.negative, array)
        assert -5.0 == array[0]

    def test_result_that_does_not_fit(self):
        """A result of a wrong shape is NumPy's error, and the array stays."""
        world = mapped_range(pages=1)
        array = world.process.array(10)

        with pytest.raises(ValueError, match="broadcast"):
            world.gpu.run(lambda a: np.zeros(11), array)

        assert not np.asarray(array).any()
        world.machine.verify()

    def test_two_processes(self):
        """Arrays of different processes do not go together."""
        world = mapped_range()
        one = world.process.array(8)
        two = world.machine.spawn("other").array(8)

        with pytest.raises(InvalidArgument, match="different processes"):
            world.gpu.run(np.add, one, two)

        world.machine.verify()

    def test_no_array(self):
        """A kernel without an array is a wrong call."""
        world = mapped_range()

        with pytest.raises(InvalidArgument):
            world.gpu.run(np.sqrt)

    def test_unmapped(self):
        """An array whose memory is gone is out of reach."""
        world = mapped_range()
        array = world.process.array(2 * WORDS)
        world.process.munmap(array.addr + PAGE_SIZE, PAGE_SIZE)

        with pytest.raises(SegmentationFault, match=f"{array.addr + PAGE_SIZE:#x}"):
            world.gpu.run(np.sqrt, array)

        world.machine.verify()
