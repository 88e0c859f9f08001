"""Loads and stores through the page table, against a plain bytearray."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import InvalidArgument, InvalidRange, SegmentationFault
from mm.machine import Machine
from mm.mmap import TASK_SIZE_MAX
from mm.pgtable import PMD_SIZE, PUD_SIZE
from mm.types import VM_EXEC, VM_READ, VM_WRITE
from mm.typing import PAGE_SIZE
from mm.uaccess import (
    BLOCK,
    access_error,
    access_pages,
    copy_from_user,
    copy_to_user,
    gather_from_user,
    page_range,
    scatter_to_user,
    touch_pages,
)
from tests.world import mapped_range

PAGES = 1100  # more than two page tables' worth
HALF = PAGES * PAGE_SIZE // 2
borders = st.sampled_from([5 * PMD_SIZE, 3 * PUD_SIZE])

# A place near the border, near a page's edge or anywhere in the range, and a length.
places = st.integers(-3, 3).map(lambda n: HALF + n) | st.integers(0, 2 * HALF - 1)
lengths = st.integers(0, 3 * PAGE_SIZE) | st.just(PMD_SIZE + 5)
stores = st.lists(st.tuples(places, lengths, st.integers(0, 255)), max_size=4)


def straddling(border):
    """A range of which half lies below *border*."""
    return mapped_range(
        PAGES, filled=False, addr=border - HALF // PAGE_SIZE * PAGE_SIZE, memory="64KiB"
    )


def pattern(nbytes, seed):
    """Bytes that tell where they are."""
    return ((np.arange(nbytes) * 7 + seed) % 251).astype(np.uint8).tobytes()


class TestReadAndWrite:
    @settings(max_examples=25)
    @given(border=borders, stores=stores, load=st.tuples(places, lengths))
    def test_as_a_bytearray(self, border, stores, load):
        """Whatever is stored in whatever pieces, a load sees what a bytearray would hold."""
        world, model = straddling(border), bytearray(2 * HALF)
        for offset, nbytes, seed in stores:
            data = pattern(min(nbytes, 2 * HALF - offset), seed)
            world.process.write(world.addr + offset, data)
            model[offset : offset + len(data)] = data
        offset, nbytes = load[0], min(load[1], 2 * HALF - load[0])

        seen = world.process.read(world.addr + offset, nbytes)

        assert model[offset : offset + nbytes] == seen

    def test_more_than_a_block(self):
        """A long range is faulted in block by block."""
        process = Machine(("320MiB",), payload=False).spawn()
        addr = process.mmap((BLOCK + 100) * PAGE_SIZE)

        process.touch(addr, (BLOCK + 100) * PAGE_SIZE)

        assert BLOCK + 100 == process.mm.anon_rss

    def test_frames_out_of_order(self):
        """Pages that lie anywhere in memory read as one stretch."""
        world = mapped_range(pages=40, filled=False)
        for page in np.random.default_rng(1).permutation(40).tolist():
            world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)

        seen = world.process.read(world.addr + 100, world.nbytes - 200)

        expected = b"".join(bytes([page]) * PAGE_SIZE for page in range(40))
        assert expected[100:-100] == seen

    @pytest.mark.parametrize(
        "data",
        [
            b"bytes",
            bytearray(b"bytearray"),
            memoryview(b"memoryview"),
            np.arange(6, dtype=">f4").reshape(2, 3),
            np.float64(1.5),
        ],
    )
    def test_anything_with_a_buffer(self, data):
        """What has bytes can be stored."""
        world = mapped_range(pages=1)
        raw = memoryview(data).tobytes()

        world.process.write(world.addr + 3, data)

        assert raw == world.process.read(world.addr + 3, len(raw))

    def test_through_the_device(self):
        """Pages in device memory come back with what they held."""
        world = mapped_range(pages=20)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.process.write(world.at(3) - 1, b"abc")

        seen = world.process.read(world.at(2), 3 * PAGE_SIZE)

        model = bytearray(b"".join(bytes([page]) * PAGE_SIZE for page in (2, 3, 4)))
        model[PAGE_SIZE - 1 : PAGE_SIZE + 2] = b"abc"
        assert model == seen

    @pytest.mark.parametrize("offset", [0, 1, PAGE_SIZE - 1])
    def test_nothing(self, offset):
        """No bytes are no access: nothing faults, whatever is mapped there."""
        world = mapped_range(pages=1, filled=False)

        with world.machine.vmstat.counting() as delta:
            for addr in (world.addr + offset, 0x5000 + offset):
                assert b"" == world.process.read(addr, 0)
                world.process.write(addr, b"")
                world.process.touch(addr, 0)

        assert {} == delta


class TestSegmentationFault:
    @pytest.mark.parametrize("prot", [None, "-", "r", "x"])
    def test_store(self, prot):
        """What comes before the bad page is stored, the error says where it is."""
        world = mapped_range(pages=2)
        bad = world.addr + world.nbytes
        world.process.mmap(PAGE_SIZE, addr=bad)
        world.process.munmap(bad, PAGE_SIZE)
        if prot is not None:
            world.process.mmap(PAGE_SIZE, prot, addr=bad)

        with pytest.raises(SegmentationFault, match=f"train: write to {bad:#x}") as error:
            world.process.write(bad - 6, b"stored, and not")

        assert bad == error.value.address
        assert b"stored" == world.process.read(bad - 6, 6)

    @pytest.mark.parametrize(("prot", "why"), [(None, "nothing is mapped"), ("-", "not allowed")])
    def test_load(self, prot, why):
        """Nothing comes of a load that reaches a bad page."""
        world = mapped_range(pages=2)
        bad = world.at(1)
        world.process.munmap(bad, PAGE_SIZE)
        if prot is not None:
            world.process.mmap(PAGE_SIZE, prot, addr=bad)

        with pytest.raises(SegmentationFault, match=f"read of {bad:#x}.*{why}") as error:
            world.process.read(bad - 6, 12)

        assert bad == error.value.address
        assert 1 == world.process.mm.anon_rss

    @pytest.mark.parametrize("prot", ["r", "w", "x", "rw", "rx", "wx"])
    def test_what_can_be_read(self, prot):
        """On x86 any right is a right to read."""
        world = mapped_range(pages=1, prot=prot, filled=False)

        assert b"\0" == world.process.read(world.addr, 1)

    def test_first_bad_page_of_many(self):
        """The lowest address is named, however many blocks come before it."""
        process = Machine(("320MiB",), payload=False).spawn()
        addr = process.mmap((BLOCK + 20) * PAGE_SIZE)
        hole = addr + (BLOCK + 10) * PAGE_SIZE
        process.munmap(hole, PAGE_SIZE)

        with pytest.raises(SegmentationFault) as error:
            process.touch(addr, (BLOCK + 20) * PAGE_SIZE)

        assert hole == error.value.address
        assert BLOCK + 10 == process.mm.anon_rss

    def test_null_pointer(self):
        """The first page is never mapped."""
        with pytest.raises(SegmentationFault, match="read of 0x0, where nothing is mapped"):
            mapped_range(pages=1).process.read(0, 8)


class TestRange:
    @pytest.mark.parametrize(
        ("addr", "nbytes"), [(-1, 1), (0, -1), (TASK_SIZE_MAX, 1), (1 << 64, 1), (5, 1 << 60)]
    )
    def test_no_such_addresses(self, addr, nbytes):
        """A range outside the address space is a wrong call, not a fault."""
        process = mapped_range(pages=1).process
        for call in (process.read, process.touch, process.pin):
            with pytest.raises((InvalidRange, InvalidArgument), match=r"not inside \[0, |negative"):
                call(addr, nbytes)

    def test_store_outside(self):
        """The same of a store."""
        with pytest.raises(InvalidRange, match=r"write: .* is not inside"):
            mapped_range(pages=1).process.write(-1, b"x")


class TestTouch:
    def test_bytes_stay(self):
        """A touch faults pages in and changes nothing in them."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.process.touch(world.at(1), PAGE_SIZE)

        assert [True, False, True] == world.on_device()
        assert [0, 1, 2] == world.contents()

    def test_pages_that_a_range_touches(self):
        """Two bytes may touch two pages."""
        world = mapped_range(pages=3, filled=False)

        touch_pages(world.process.mm, world.at(1) - 1, 2, write=True)

        assert [True, True, False] == (world.pfns() > 0).tolist()

    def test_works_without_contents(self):
        """A machine without contents has faults, and no bytes to read."""
        world = mapped_range(pages=3, payload=False)

        world.process.touch(world.addr, world.nbytes)

        assert 3 == world.process.mm.anon_rss
        for access in (
            lambda: world.process.read(world.addr, 1),
            lambda: world.process.write(world.addr, b"x"),
        ):
            with pytest.raises(InvalidArgument, match="keeps no contents; boot it with payload"):
                access()


class TestGatherAndScatter:
    @given(
        stores=st.lists(st.tuples(st.integers(0, 2 * HALF - 1), st.integers(0, 255)), max_size=30),
        loads=st.lists(st.integers(0, 2 * HALF - 1), max_size=30),
        border=borders,
    )
    @settings(max_examples=25)
    def test_as_a_bytearray(self, stores, loads, border):
        """Bytes at any places in any order; of a place that repeats, the last store stays."""
        world, model = straddling(border), bytearray(2 * HALF)
        for offset, byte in stores:
            model[offset] = byte
        at = world.addr + np.array([offset for offset, _ in stores], dtype=np.int64)
        scatter_to_user(world.process.mm, at, np.array([b for _, b in stores], dtype=np.uint8))
        asked = [offset for offset, _ in stores] + loads

        seen = gather_from_user(world.process.mm, world.addr + np.array(asked, dtype=np.int64))

        assert [model[offset] for offset in asked] == seen.tolist()

    def test_bad_page(self):
        """What lies below the bad page is stored, wherever it stood in the vector."""
        world = mapped_range(pages=3)
        world.process.munmap(world.at(1), PAGE_SIZE)
        at, data = np.array([world.at(2), world.at(1), world.at(0)]), np.array([7, 8, 9], np.uint8)

        with pytest.raises(SegmentationFault) as error:
            scatter_to_user(world.process.mm, at, data)

        assert world.at(1) == error.value.address
        assert [9, 2] == [world.process.read(world.at(page), 1)[0] for page in (0, 2)]


class TestCopy:
    def test_to_and_from_a_vector(self):
        """The vectors of the caller are filled and read in place."""
        world = mapped_range(pages=2)
        out = np.zeros(6, dtype=np.uint8)

        copy_to_user(world.process.mm, world.at(1) - 3, np.arange(6, dtype=np.uint8))
        copy_from_user(world.process.mm, world.at(1) - 3, out)

        assert [0, 1, 2, 3, 4, 5] == out.tolist()


class TestAccessPages:
    def test_places_are_in_order(self):
        """Each page is used once, with its place in the vector, however scattered they are."""
        world = mapped_range(PAGES, filled=False)
        wanted = world.addrs[[3, 4, 5, 100, 513, 1024, 1025]]
        used = []

        access_pages(
            world.process.mm,
            wanted,
            lambda place, pfns: used.extend(enumerate(pfns.tolist(), place)),
            write=True,
        )

        there = world.pfns()[[3, 4, 5, 100, 513, 1024, 1025]]
        assert list(enumerate(there.tolist())) == used

    def test_pages_are_there_while_they_are_used(self):
        """The page-table lock is held: nobody can take them away."""
        world = mapped_range(pages=2)
        mm, holders = world.process.mm, []

        access_pages(
            mm, world.addrs, lambda *_: holders.append(mm.page_table_lock.holder), write=False
        )

        assert [True] == [holder != 0 for holder in holders]


class TestAccessError:
    @pytest.mark.parametrize(
        ("vm_flags", "read", "write"),
        [
            (0, False, False),
            (VM_READ, True, False),
            (VM_EXEC, True, False),
            (VM_WRITE, True, True),
            (VM_READ | VM_WRITE, True, True),
        ],
    )
    def test_rights(self, vm_flags, read, write):
        """A store needs the right to write, a load any right."""
        vma = mapped_range(pages=1).vma
        vma.vm_flags = vm_flags

        allowed = [not access_error(vma, write=flag) for flag in (False, True)]

        vma.vm_flags = VM_READ | VM_WRITE
        assert [read, write] == allowed


class TestPageRange:
    @given(addr=st.integers(0, 3 * PAGE_SIZE), nbytes=st.integers(0, 3 * PAGE_SIZE))
    def test_pages_of_the_bytes(self, addr, nbytes):
        """Each page that a byte of the range lies in, and of no bytes none."""
        pages = {byte // PAGE_SIZE * PAGE_SIZE for byte in range(addr, addr + nbytes)}

        assert sorted(pages) == page_range(addr, nbytes).tolist()
