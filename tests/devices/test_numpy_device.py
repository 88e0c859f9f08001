"""The NumPy device's four hooks: which pages it gives, and what it copies."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from devices import NumpyDevice
from devices.numpy_device import STREAM_PAGES, _shares
from mm import PAGE_SIZE, Machine
from tests.world import mapped_range


def device(memory="64KiB", **options):
    machine = Machine(("1MiB",), max_physmem="8MiB", **options)
    return NumpyDevice(machine, memory)


def numbers(*pages):
    return np.array(pages, dtype=np.int64)


class TestAllocate:
    def test_in_a_row(self):
        """A fresh device gives its pages from the lowest on."""
        gpu = device()

        first, second = gpu.allocate(5), gpu.allocate(3)

        assert [0, 1, 2, 3, 4] == first.tolist()
        assert [5, 6, 7] == second.tolist()

    def test_full(self):
        """A device gives what it has, and then nothing."""
        gpu = device(memory="16KiB")

        assert [0, 1, 2, 3] == gpu.allocate(9).tolist()
        assert [] == gpu.allocate(9).tolist()

    def test_freed_last(self):
        """The pages that were freed last are given first."""
        gpu = device()
        gpu.allocate(8)

        gpu.free(numbers(6, 2))

        assert [2, 6] == gpu.allocate(2).tolist()

    @given(steps=st.lists(st.one_of(st.integers(0, 20), st.sets(st.integers(0, 15)))))
    def test_any_sequence(self, steps):
        """However pages come and go, no page is given twice and none is lost."""
        gpu, used = device(), set()
        for step in steps:
            if isinstance(step, int):
                given = gpu.allocate(step).tolist()
                assert min(step, 16 - len(used)) == len(given) == len(set(given) - used)
                assert sorted(given) == given
                used.update(given)
            else:
                gpu.free(numbers(*(step & used)))
                used -= step
        assert 16 - len(used) == gpu.allocate(16).size


class TestCopy:
    @given(pages=st.permutations(range(16)), rows=st.permutations(range(40)))
    def test_there_and_back(self, pages, rows):
        """copy_in takes row rows[i] to page pages[i], and copy_out the same way back."""
        gpu = device()
        system = np.arange(40, dtype=np.uint8).repeat(PAGE_SIZE).reshape(40, PAGE_SIZE)
        back = np.zeros_like(system)

        gpu.copy_in(numbers(*pages), system, numbers(*rows[:16]))
        lost = gpu.copy_out(numbers(*pages), back, numbers(*rows[16:32]))

        assert lost is None
        assert rows[:16] == gpu.memory[pages, 7].tolist()
        assert np.array_equal(system[rows[:16]], back[rows[16:32]])
        assert not back[rows[:16] + rows[32:]].any()

    def test_clear(self):
        """Cleared pages are zero, and no others."""
        gpu = device()
        gpu.memory[:] = 7

        gpu.clear(numbers(3, 5))

        assert [3, 5] == np.flatnonzero(gpu.memory[:, 0] == 0).tolist()
        assert 14 * PAGE_SIZE == np.count_nonzero(gpu.memory)

    def test_without_contents(self):
        """On a machine that keeps no contents the device keeps none either."""
        assert device(payload=False).memory is None

    def test_fresh_memory_does_not_show_what_was_there(self):
        """A page that others have used holds zeros when a hole migrates to it."""
        world = mapped_range(pages=4, memory="16KiB")
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.process.munmap(world.addr, world.nbytes)
        fresh = world.process.mmap(world.nbytes)

        world.gpu.to_device(world.process, fresh, world.nbytes)

        assert bytes(world.nbytes) == world.process.read(fresh, world.nbytes)
        world.machine.verify()


class TestShares:
    @given(npages=st.integers(1, 1 << 17), engines=st.integers(1, 5), one_run=st.booleans())
    def test_shares(self, npages, engines, one_run):
        """They tile the copy, one for an engine; of a long run, one is stored past the caches."""
        shares = _shares(npages, engines, one_run)

        assert (0, npages) == (shares[0].start, shares[-1].stop)
        assert all(a.stop == b.start for a, b in pairwise(shares))
        sizes = [share.stop - share.start for share in shares]
        assert len(sizes) <= engines
        assert all(sizes)
        assert max(sizes) >= STREAM_PAGES or not one_run or npages < STREAM_PAGES
        assert max(sizes) <= max(-(-npages // engines), STREAM_PAGES * one_run)
