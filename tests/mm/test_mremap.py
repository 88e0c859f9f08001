"""mremap(), as recorded in 23_mremap of Linux 6.12, and against a dict of pages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import InvalidArgument, InvalidRange, OutOfMemory, SegmentationFault
from mm.mmap import MMAP_BASE
from mm.mmu_notifier import MmuNotifyEvent
from mm.page_flags import PG_mlocked
from mm.pgtable import (
    _PAGE_SOFT_DIRTY,
    PMD_SIZE,
    PUD_SIZE,
    pte_none,
    pte_offset,
    pte_present,
    pte_soft_dirty,
    pte_special,
)
from mm.swapops import SWP_SOFT_DIRTY, is_migration_entry, pte_swp_soft_dirty
from mm.types import VM_DONTEXPAND, VM_LOCKED, VM_SOFTDIRTY
from mm.typing import PAGE_SHIFT, PAGE_SIZE
from tests.interleave import explore
from tests.mm.test_mprotect import Listener
from tests.mm.test_rmap import migrating
from tests.world import mapped_range

FAR = 1 << 40  # where nothing is
MOVE = {"flags": "maymove|fixed"}


def move(world, first, count, to, flags="maymove|fixed", new_count=None):
    new_count = count if new_count is None else new_count
    sizes = count * PAGE_SIZE, new_count * PAGE_SIZE
    return world.process.mremap(world.at(first), *sizes, flags, to)


def entries(world, addr, count):
    pool, mm = world.machine.mem.tables, world.process.mm
    return pool.entries[pte_offset(pool, mm.pgd, addr + np.arange(count) * PAGE_SIZE)]


def first_bytes(world, addr, count):
    return [world.process.read(addr + i * PAGE_SIZE, 1)[0] for i in range(count)]


def areas(world, base=None):
    """[first page, last page] of every VMA, from *base* on."""
    base = world.addr if base is None else base
    return [
        [(vma.vm_start - base) // PAGE_SIZE, (vma.vm_end - base) // PAGE_SIZE - 1]
        for vma in world.process.mm.vmas
    ]


class TestMove:
    @pytest.mark.parametrize("first", [0, 2, 4])
    def test_part_of_an_area(self, first):
        """The bytes are at the new address; at the old one nothing is mapped."""
        world = mapped_range(pages=8)

        assert FAR == move(world, first, 4, FAR)

        assert list(range(first, first + 4)) == first_bytes(world, FAR, 4)
        assert 8 == world.process.mm.total_vm == world.process.mm.anon_rss
        with pytest.raises(SegmentationFault):
            world.process.read(world.at(first), 1)

    def test_entries_move_as_they_are(self):
        """A frame, the zero page, a device page, nothing: each is there what it was here."""
        world = mapped_range(pages=4, filled=False)
        world.process.touch(world.at(0), PAGE_SIZE)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)
        world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)
        before = world.ptes()

        move(world, 0, 4, FAR)

        after, soft = entries(world, FAR, 4), pte_present(before)
        assert (before[:2] | _PAGE_SOFT_DIRTY).tolist() == after[:2].tolist()
        assert [before[2] | SWP_SOFT_DIRTY, 0] == after[2:].tolist()
        assert [True, True, False, False] == soft.tolist()
        assert pte_special(after[1:2]).all()
        assert pte_none(world.ptes()).all()

    def test_page_on_its_way(self):
        """A migration finds the entry where it is now."""
        world = mapped_range(pages=2)

        with migrating(world):
            move(world, 0, 2, FAR)
            assert is_migration_entry(entries(world, FAR, 2)).all()

        assert [0, 1] == first_bytes(world, FAR, 2)

    def test_device_finds_its_pages(self):
        """Device pages come back at the new address, by a fault and by the device's doing."""
        world = mapped_range(pages=4)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        move(world, 0, 4, FAR)

        assert b"\1" == world.gpu.read(world.process, FAR + PAGE_SIZE, 1)
        world.gpu.to_system(world.process, FAR + 2 * PAGE_SIZE, PAGE_SIZE)

        assert [0, 1, 2, 3] == first_bytes(world, FAR, 4)

    def test_to_tables_at_another_place(self):
        """Over the ends of page tables, on both sides."""
        world = mapped_range(pages=8, addr=5 * PMD_SIZE - 3 * PAGE_SIZE)
        target = 3 * PUD_SIZE - 5 * PAGE_SIZE

        move(world, 0, 8, target)

        assert list(range(8)) == first_bytes(world, target, 8)

    def test_what_was_there_is_replaced(self):
        """As with mmap() at a fixed address."""
        world = mapped_range(pages=4)
        other = world.process.mmap(4 * PAGE_SIZE, addr=FAR)
        world.process.write(other, b"x" * 4 * PAGE_SIZE)

        move(world, 0, 2, FAR + PAGE_SIZE)

        assert [ord("x"), 0, 1, ord("x")] == first_bytes(world, FAR, 4)
        assert 6 == world.process.mm.total_vm

    def test_back_and_forth(self):
        """Moved to where it was, memory is one area again."""
        world = mapped_range(pages=6)
        move(world, 2, 2, FAR)

        world.process.mremap(FAR, 2 * PAGE_SIZE, 2 * PAGE_SIZE, "maymove|fixed", world.at(2))

        assert [[0, 5]] == areas(world)
        assert world.intact()

    def test_untouched_memory_beside_itself(self):
        """An area that no page knows moves into what it goes on in, itself included."""
        world = mapped_range(pages=4, filled=False, addr=FAR)

        move(world, 0, 4, world.at(4))

        assert [[4, 7]] == areas(world)
        assert world.at(4) >> PAGE_SHIFT == world.process.mm.vmas[0].vm_pgoff

    def test_smaller(self):
        """What is cut off is unmapped; the rest moves."""
        world = mapped_range(pages=6)

        move(world, 1, 4, FAR, new_count=2)

        assert [1, 2] == first_bytes(world, FAR, 2)
        assert [[0, 0], [5, 5]] == [area for area in areas(world) if abs(area[0]) < 10]

    def test_larger(self):
        """What is new reads as zeros."""
        world = mapped_range(pages=2)

        move(world, 0, 2, FAR, new_count=4)

        assert [0, 1, 0, 0] == first_bytes(world, FAR, 4)

    def test_announced(self):
        """Whoever watches hears of it twice: entries move, and the old address is unmapped."""
        world = mapped_range(pages=6)
        heard = Listener(world)

        move(world, 2, 2, FAR)

        assert [(MmuNotifyEvent.UNMAP, 2, 4)] * 2 == heard.events


class TestSoftDirty:
    def test_moved_entries(self):
        """Who watches stores sees that something is new at the new address."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)
        world.clear_refs(0, 1)
        world.rewrite([2], lambda ptes: ptes & ~SWP_SOFT_DIRTY)
        world.vma.vm_flags &= ~VM_SOFTDIRTY

        move(world, 0, 3, FAR)

        ptes = entries(world, FAR, 3)
        assert pte_soft_dirty(ptes[:2]).all()
        assert pte_swp_soft_dirty(ptes[2:]).all()

    def test_whole_tables(self):
        """A page table that moves whole is not looked into."""
        world = mapped_range(pages=514, filled=False, addr=7 * PMD_SIZE - PAGE_SIZE)
        world.process.touch(world.addr, world.nbytes)
        world.clear_refs(*range(514))

        move(world, 0, 514, FAR - PAGE_SIZE)

        marked = pte_soft_dirty(entries(world, FAR - PAGE_SIZE, 514))
        assert [0, 513] == np.flatnonzero(marked).tolist()


class TestWholeTables:
    def test_no_table_is_made(self):
        """Tables change their place in the tree, and nothing is copied."""
        world = mapped_range(pages=2 * 512, filled=False, addr=16 * PMD_SIZE)
        world.process.touch(world.addr, world.nbytes)
        world.process.mmap(PAGE_SIZE, addr=world.at(2 * 512))  # keeps the upper tables in use
        tables = world.machine.mem.tables.in_use

        move(world, 0, 2 * 512, 64 * PMD_SIZE)

        assert tables == world.machine.mem.tables.in_use
        assert 2 * 512 == np.count_nonzero(entries(world, 64 * PMD_SIZE, 2 * 512))

    @pytest.mark.parametrize("offset", [0, 1])
    def test_some_are_missing(self, offset):
        """Ranges without tables stay without, across the border of 1 GiB on either side."""
        addr, pages = PUD_SIZE - 2 * PMD_SIZE, 5 * 512
        world = mapped_range(pages=pages, filled=False, addr=addr)
        for page in (3, 2 * 512 + 7, pages - 1):
            world.process.write(world.at(page), b"here")
        target = 9 * PUD_SIZE - 3 * PMD_SIZE + offset * PAGE_SIZE

        move(world, 0, pages, target)

        for page in (3, 2 * 512 + 7, pages - 1):
            assert b"here" == world.process.read(target + page * PAGE_SIZE, 4)
        assert 3 == world.process.mm.anon_rss

    def test_place_is_taken(self):
        """Where an empty table stands already, entries are moved one by one."""
        world = mapped_range(pages=512, filled=False, addr=16 * PMD_SIZE)
        world.process.write(world.at(5), b"here")
        move(world, 0, 512, 32 * PMD_SIZE + PAGE_SIZE, "maymove|fixed|dontunmap")  # leaves tables

        world.process.mremap(
            32 * PMD_SIZE + PAGE_SIZE, PAGE_SIZE * 512, PAGE_SIZE * 512, "maymove|fixed", world.addr
        )

        assert b"here" == world.process.read(world.at(5), 4)


class TestDontUnmap:
    def test_old_address_reads_zeros(self):
        """The bytes are at the new address only; the old area is there, and empty."""
        world = mapped_range(pages=4)

        move(world, 0, 4, FAR, "maymove|fixed|dontunmap")

        assert [0, 1, 2, 3] == first_bytes(world, FAR, 4)
        assert [0, 0, 0, 0] == first_bytes(world, world.addr, 4)
        assert (8, 4) == (world.process.mm.total_vm, world.process.mm.anon_rss)

    def test_anywhere(self):
        """Without an address the memory goes to the highest gap."""
        world = mapped_range(pages=2, addr=FAR)

        to = world.process.mremap(FAR, 2 * PAGE_SIZE, 2 * PAGE_SIZE, "maymove|dontunmap")

        assert MMAP_BASE - 2 * PAGE_SIZE == to
        assert [0, 1] == first_bytes(world, to, 2)

    @pytest.mark.parametrize(("taken", "there"), [(False, True), (True, False)])
    def test_where_it_would_like_to_be(self, taken, there):
        """An address alone is a wish, and what is mapped there stays."""
        world = mapped_range(pages=1, addr=FAR)
        if taken:
            world.process.mmap(PAGE_SIZE, addr=2 * FAR)

        to = world.process.mremap(FAR, PAGE_SIZE, PAGE_SIZE, "maymove|dontunmap", 2 * FAR)

        assert there == (to == 2 * FAR)

    def test_device_pages(self):
        """They go along; the old area is empty."""
        world = mapped_range(pages=2)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        move(world, 0, 2, FAR, "maymove|fixed|dontunmap")

        assert pte_none(world.ptes()).all()
        assert [0, 1] == first_bytes(world, FAR, 2)

    def test_locked(self):
        """The lock goes with the pages; only what moved loses it."""
        world = mapped_range(pages=6)
        world.process.mlock(world.addr, world.nbytes)

        move(world, 2, 2, FAR, "maymove|fixed|dontunmap")

        locked = [bool(v.vm_flags & VM_LOCKED) for v in world.process.mm.vmas]
        starts = [v.vm_start for v in world.process.mm.vmas]
        assert (6, 6) == (world.process.mm.locked_vm, world.machine.vmstat["nr_mlock"])
        assert {world.at(0): True, world.at(2): False, world.at(4): True, FAR: True} == dict(
            zip(starts, locked, strict=True)
        )


class TestResize:
    def test_shrink(self):
        """The end is unmapped."""
        world = mapped_range(pages=5)

        assert world.addr == move(world, 0, 5, None, "", 2)

        assert [[0, 1]] == areas(world)
        assert [0, 1] == first_bytes(world, world.addr, 2)

    def test_shrink_in_the_middle(self):
        """Of several areas too: all after the new end goes."""
        world = mapped_range(pages=6)
        world.process.mprotect(world.at(3), PAGE_SIZE, "r")

        move(world, 0, 5, None, "", 2)

        assert [[0, 1], [5, 5]] == areas(world)

    def test_grow_in_place(self):
        """There is room behind it: the area is longer, and stays one."""
        world = mapped_range(pages=3, addr=FAR)

        assert FAR == move(world, 0, 3, None, "", 5)

        assert [[0, 4]] == areas(world)
        assert [0, 1, 2, 0, 0] == first_bytes(world, FAR, 5)
        assert 5 == world.process.mm.total_vm

    @pytest.mark.parametrize(("filled", "left"), [(False, [[0, 3]]), (True, [[0, 2], [3, 3]])])
    def test_grow_up_to_the_next(self, filled, left):
        """An untouched area that follows becomes part of one without pages, as by mmap()."""
        world = mapped_range(pages=2, addr=FAR, filled=filled)
        world.process.mmap(PAGE_SIZE, addr=FAR + 3 * PAGE_SIZE)

        move(world, 0, 2, None, "", 3)

        assert left == areas(world)

    def test_grow_elsewhere(self):
        """No room: it moves, if it may."""
        world = mapped_range(pages=2, addr=FAR)
        world.process.mmap(PAGE_SIZE, "r", addr=FAR + 2 * PAGE_SIZE)

        with pytest.raises(OutOfMemory, match="cannot grow to 0x3000 bytes; add maymove"):
            move(world, 0, 2, None, "", 3)
        to = move(world, 0, 2, None, "maymove", 3)

        assert MMAP_BASE - 3 * PAGE_SIZE == to
        assert [0, 1, 0] == first_bytes(world, to, 3)

    def test_grow_from_the_middle(self):
        """Only the end of an area has room behind it."""
        world = mapped_range(pages=4, addr=FAR)

        with pytest.raises(OutOfMemory):
            move(world, 1, 2, None, "", 3)
        to = move(world, 1, 2, None, "maymove", 3)

        assert [1, 2, 0] == first_bytes(world, to, 3)

    def test_same_size(self):
        """Nothing to do."""
        world = mapped_range(pages=2)

        assert world.addr == move(world, 0, 2, None, "")

    @pytest.mark.parametrize("place", ["here", "elsewhere"])
    def test_locked_memory_grows(self, place):
        """What is new is faulted in and locked."""
        world = mapped_range(pages=2, addr=FAR)
        world.process.mlock(world.addr, world.nbytes)
        if place == "elsewhere":
            world.process.mmap(PAGE_SIZE, "r", addr=FAR + 2 * PAGE_SIZE)

        to = move(world, 0, 2, None, "maymove", 4)

        pfns = (entries(world, to, 4) >> np.uint64(12)).astype(np.int64) & ((1 << 40) - 1)
        assert (world.machine.mem.flags[pfns] & PG_mlocked).all()
        assert (4, 4) == (world.process.mm.locked_vm, world.machine.vmstat["nr_mlock"])


class TestRefused:
    @pytest.mark.parametrize(
        ("how", "error", "complaint"),
        [
            ({"old_addr": FAR + 5}, InvalidArgument, "is not a multiple of 0x1000"),
            ({"new_length": 0}, InvalidArgument, "new length must be positive, got 0"),
            ({"old_length": 0}, InvalidArgument, "old length must be positive, got 0"),
            ({"flags": "fixed"}, InvalidArgument, "add maymove"),
            ({"flags": "dontunmap"}, InvalidArgument, "add maymove"),
            ({"flags": "sideways"}, InvalidArgument, "flags 'sideways' are not of maymove, fixed"),
            ({"flags": "maymove|fixed"}, InvalidArgument, "fixed needs new_addr="),
            ({"flags": "maymove|dontunmap"}, InvalidArgument, "got 0x4000 and 0x5000 bytes"),
            (MOVE | {"new_addr": FAR + 2 * PAGE_SIZE}, InvalidArgument, r"02000, .*000\) overlap"),
            (MOVE | {"new_addr": 2 * FAR + 1}, InvalidArgument, "is not a multiple of 0x1000"),
            (MOVE | {"new_addr": 1 << 60}, InvalidRange, "is not inside"),
            ({"old_addr": FAR - PAGE_SIZE}, SegmentationFault, "nothing is mapped at"),
            ({"old_addr": FAR + 2 * PAGE_SIZE}, SegmentationFault, "is not inside"),
        ],
    )
    def test_wrong_arguments(self, how, error, complaint):
        """Nothing moves, and the message says why."""
        world = mapped_range(pages=4, addr=FAR)
        sizes = {"old_length": 4 * PAGE_SIZE, "new_length": 5 * PAGE_SIZE}

        with pytest.raises(error, match=complaint):
            world.process.mremap(**{"old_addr": FAR} | sizes | how)

        assert [[0, 3]] == areas(world)

    def test_more_than_one_area(self):
        """A range of two areas cannot move."""
        world = mapped_range(pages=4)
        world.process.mprotect(world.at(2), PAGE_SIZE, "r")

        with pytest.raises(SegmentationFault, match="is not inside"):
            move(world, 0, 4, FAR)

    def test_memory_that_cannot_grow(self):
        """What a driver has mapped has the size that he gave it."""
        world = mapped_range(pages=1, addr=FAR)
        world.vma.vm_flags |= VM_DONTEXPAND

        with pytest.raises(SegmentationFault, match="cannot grow"):
            move(world, 0, 1, None, "maymove", 2)
        with pytest.raises(InvalidArgument, match="cannot be mapped twice"):
            move(world, 0, 1, 2 * FAR, "maymove|fixed|dontunmap")

    def test_no_page_table(self):
        """Everything is where it was."""
        world = mapped_range(pages=1024, filled=False, addr=16 * PMD_SIZE)
        world.fill()
        pool = world.machine.mem.tables
        spare = pool.alloc(pool.rows - 1 - pool.in_use - 4)  # for the upper levels, and one more

        with pytest.raises(OutOfMemory, match="page-table pages"):
            move(world, 0, 1024, FAR + PAGE_SIZE)

        pool.release(spare)
        assert [[0, 1023]] == areas(world)
        assert world.intact()


class TestRaces:
    def test_against_a_fault(self):
        """A load sees the bytes at one address or the other, or none; never at both."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            process = world.machine.spawn("racer")
            process.mmap(PAGE_SIZE, addr=FAR)
            process.write(FAR, b"mine")

            seen, _ = together(
                lambda: attempt(lambda: process.read(FAR, 4)),
                lambda: process.mremap(FAR, PAGE_SIZE, PAGE_SIZE, "maymove|fixed", 2 * FAR),
            )

            outcomes.add(seen)
            assert b"mine" == process.read(2 * FAR, 4)
            process.exit()

        outcomes = set()
        assert 10 < explore(scenario)
        assert {b"mine", None} == outcomes

    def test_against_a_migration(self):
        """A page that is on its way to a device arrives at the new address."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            process = world.machine.spawn("racer")
            process.mmap(2 * PAGE_SIZE, addr=FAR)
            process.write(FAR, b"mine")

            together(
                lambda: attempt(lambda: world.gpu.to_device(process, FAR, PAGE_SIZE)),
                lambda: process.mremap(FAR, PAGE_SIZE, PAGE_SIZE, "maymove|fixed", 2 * FAR),
            )

            world.machine.verify()
            assert b"mine" == process.read(2 * FAR, 4)
            process.exit()

        assert 10 < explore(scenario, preemptions=1)


def attempt(access):
    try:
        return access()
    except OSError:
        return None


moves = st.tuples(
    st.integers(0, 11), st.integers(1, 6), st.integers(0, 11), st.integers(1, 6), st.booleans()
)


class TestAgainstPages:
    @settings(max_examples=40)
    @given(moves=st.lists(moves, max_size=6), device=st.sets(st.integers(0, 11)))
    def test_every_byte_is_where_it_went(self, moves, device):
        """Any moves of parts of areas, with pages in device memory; the model is a dict."""
        world = mapped_range(pages=12, addr=3 * PUD_SIZE - 5 * PAGE_SIZE)
        model = {page: page for page in range(12)}
        for page in device:
            world.gpu.to_device(world.process, world.at(page), PAGE_SIZE)

        for first, count, to, new_count, keep in moves:
            vma = world.process.find_vma(world.at(first))
            if vma is None:
                continue
            inside = min(count, (vma.vm_end - world.at(first)) // PAGE_SIZE)
            size = inside if keep else new_count
            if first < to + size and to < first + inside:
                continue
            flags = "maymove|fixed|dontunmap" if keep else "maymove|fixed"
            move(world, first, inside, world.at(to), flags, size)
            moved = [model.pop(first + i) for i in range(inside)]
            left = dict.fromkeys(range(first, first + inside), 0) if keep else {}
            model |= left | {to + i: moved[i] if i < inside else 0 for i in range(size)}

        world.machine.verify()
        assert len(model) == world.process.mm.total_vm
        for page, byte in model.items():
            assert byte == world.process.read(world.at(page), 1)[0]
