"""migrate_vma() by scenario: what moves, what stays and why, and that no byte is ever lost."""

import errno

import numpy as np
import pytest

from devices import NumpyDevice
from devices.memory import Direction
from hmm import (
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MigrateVma,
    MigrateVmaSelect,
    Stayed,
    migrate_pfn,
    migrate_vma,
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from hmm.migrate import migrate_vma_collect, migrate_vma_prepare, migrate_vma_unmap
from mm import (
    PAGE_SIZE,
    BusError,
    Deadlock,
    InvalidArgument,
    InvalidRange,
)
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_register
from mm.page_alloc import alloc_pages_bulk
from mm.page_flags import PG_active, PG_dirty, PG_locked
from mm.trace import listen
from mm.types import PAGE_MAPPING_ANON, VM_DONTEXPAND, VM_HUGETLB, VM_IO, VM_MIXEDMAP, VM_PFNMAP
from tests.hmm.callbacks import Callbacks, instead, look_on, migrate, migrate_with, raises
from tests.reference.state import Entry, decode, page_table_word
from tests.world import SOMEBODY_ELSE, mapped_range

ALL_KINDS = 6  # pages of mixed_range()


def entries(world) -> list[Entry]:
    """The decoded page-table entry of each page of the range."""
    mem = world.machine.mem
    words = [page_table_word(mem, world.process.mm.pgd, addr) for addr in world.addrs.tolist()]
    return [decode(word, mem.zero_pfn) if word else Entry("none") for word in words]


def mapped(world) -> list[tuple[str, int, bool]]:
    """What each entry of the range is, which page it names, and whether stores may use it."""
    return [(entry.kind, entry.pfn, entry.write) for entry in entries(world)]


def kinds(world) -> list[str]:
    return [entry.kind for entry in entries(world)]


def reasons(result: MigrateVma) -> list[str]:
    return [Stayed(reason).name for reason in result.stayed.tolist()]


def mixed_range():
    """Pages 0 to 5: a hole, the zero page, touched, touched read-only, device page, touched."""
    world = mapped_range(pages=ALL_KINDS)
    world.process.munmap(world.addr, world.nbytes)
    world.process.mmap(world.nbytes, addr=world.addr)
    world.process.touch(world.at(1), PAGE_SIZE, write=False)
    for page in (2, 3, 4, 5):
        world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)
    world.write_protect(3)
    world.gpu.to_device(world.process, world.at(4), PAGE_SIZE)
    return world


MIXED_CONTENTS = [0, 0, 2, 3, 4, 5]


class TestArguments:
    @pytest.mark.parametrize(
        ("start", "end"),
        [(-1, 3), (2, 6), (-2, -1), (5, 6), (-1, 6), (0, 1 << 52), (0, 1 << 70), (-(1 << 60), 3)],
    )
    def test_range_outside_its_vma(self, start, end):
        """A range that leaves its VMA, however far, is refused with both ranges in hex."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 5), dtype=np.uint64)
        ops = Callbacks(world)

        with pytest.raises(InvalidRange, match=f"{world.at(end):#x}.*{world.vma.vm_start:#x}"):
            migrate_vma(ops, world.vma, world.at(start), world.at(end), src, dst)

        assert [] == ops.calls

    @pytest.mark.parametrize(("start", "end"), [(0, 0), (4, 4), (3, 1), (5, 0)])
    def test_empty_or_inverted_range(self, start, end):
        """A range without a page is refused."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 5), dtype=np.uint64)

        with pytest.raises(InvalidRange, match=f"{world.at(start):#x}, {world.at(end):#x}"):
            migrate_vma(Callbacks(world), world.vma, world.at(start), world.at(end), src, dst)

    def test_range_of_less_than_a_page(self):
        """Both ends are rounded down, so that a piece of one page is an empty range."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 1), dtype=np.uint64)

        with pytest.raises(InvalidRange):
            migrate_vma(Callbacks(world), world.vma, world.addr + 8, world.addr + 100, src, dst)

    def test_unaligned_range_is_rounded_down(self):
        """[start, end) loses what is below a page at both ends, as in v4.20."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 2), dtype=np.uint64)

        migrate_vma(Callbacks(world), world.vma, world.at(1) + 9, world.at(3) + 4095, src, dst)

        assert [False, True, True, False, False] == world.on_device()
        assert [0, 1, 2, 3, 4] == world.contents()

    @pytest.mark.parametrize("name", ["src", "dst"])
    @pytest.mark.parametrize(
        "vector",
        [
            np.zeros(4, dtype=np.uint64),
            np.zeros(6, dtype=np.uint64),
            np.zeros((5, 1), dtype=np.uint64),
            np.zeros(5, dtype=np.int64),
            np.zeros(5, dtype=np.uint32),
            [0] * 5,
            None,
        ],
    )
    def test_vector_that_does_not_fit(self, name, vector):
        """src and dst are uint64 vectors of one word for each page, and nothing else."""
        world = mapped_range(pages=5)
        vectors = {"src": np.zeros(5, np.uint64), "dst": np.zeros(5, np.uint64)} | {name: vector}

        with pytest.raises(InvalidArgument, match=rf"{name} must be .*uint64\[5\], got"):
            migrate_vma(
                Callbacks(world), world.vma, world.addr, world.addr + world.nbytes, **vectors
            )

    def test_one_vector_for_both(self):
        """src and dst may not share memory: what the driver answers would be the question."""
        world = mapped_range(pages=5)
        words = np.zeros(5, dtype=np.uint64)

        with pytest.raises(InvalidArgument, match="src"):
            migrate_vma(
                Callbacks(world), world.vma, world.addr, world.addr + world.nbytes, words, words
            )

        assert [0, 1, 2, 3, 4] == world.contents()

    @pytest.mark.parametrize("wanted", [np.ones(4, np.bool_), np.ones(5, np.uint8), [True] * 5])
    def test_wanted_that_does_not_fit(self, wanted):
        """`wanted` is one truth value for each page."""
        world = mapped_range(pages=5)

        with pytest.raises(InvalidArgument, match=r"wanted must be .*bool\[5\], got"):
            migrate(world, wanted=wanted)

    @pytest.mark.parametrize("flag", [VM_IO, VM_DONTEXPAND, VM_PFNMAP, VM_MIXEDMAP, VM_HUGETLB])
    def test_special_vma(self, flag):
        """Memory that is a driver's own, or hugetlb, never migrates."""
        world = mapped_range(pages=5)
        world.vma.vm_flags |= flag

        with pytest.raises(InvalidArgument, match="VM_SPECIAL") as caught:
            migrate(world)

        assert errno.EINVAL == caught.value.errno

    def test_refused_call_changes_nothing(self):
        """A wrong call leaves vectors, entries and counters as they are."""
        world = mapped_range(pages=5)
        src, dst = np.full((2, 5), 7, dtype=np.uint64)
        before = mapped(world)

        with world.machine.vmstat.counting() as delta, pytest.raises(InvalidRange):
            migrate_vma(Callbacks(world), world.vma, world.addr, world.at(6), src, dst)

        assert {} == delta
        assert ([7] * 5, [7] * 5, before) == (src.tolist(), dst.tolist(), mapped(world))

    def test_stages_want_the_lock(self):
        """Who runs the stages by hand must hold mmap_sem all the while."""
        world = mapped_range(pages=5)
        migration, _ = in_hand(world)

        with pytest.raises(InvalidArgument, match="mmap_sem"):
            migrate_vma_setup(migration)


class TestCallbacks:
    def test_they_are_called_in_order(self):
        """First alloc_and_copy(), then finalize_and_map(), with the same arguments."""
        world = mapped_range(pages=5)
        ops = Callbacks(world)

        migrate_with(ops, private="mine")

        arguments = (world.vma, world.addr, world.at(5), "mine")
        assert [("alloc_and_copy", *arguments), ("finalize_and_map", *arguments)] == ops.calls

    def test_nothing_can_move(self):
        """No callback is called for a range where every page is pinned."""
        world = mapped_range(pages=3)
        for page in range(3):
            world.pin(page)
        ops = Callbacks(world)

        result = migrate_with(ops)

        assert ([], 0) == (ops.calls, result.cpages)
        assert ["PINNED"] * 3 == reasons(result)

    def test_nothing_is_collected(self):
        """No callback is called where no page is of the kind that was selected."""
        world = mapped_range(pages=3)
        ops = Callbacks(world)

        result = migrate_with(ops, select=MigrateVmaSelect.DEVICE_PRIVATE)

        assert ([], 0) == (ops.calls, result.cpages)
        assert ["SKIPPED"] * 3 == reasons(result)

    def test_driver_sees_what_stands_behind_each_page(self):
        """src tells holes, system and device pages apart, and where the process may store."""
        world = mixed_range()
        pfns = world.pfns()
        seen = []

        look_on(world, lambda src, dst: seen.extend(src.tolist()))

        hole = int(MIGRATE_PFN_MIGRATE)
        page = int(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE | MIGRATE_PFN_LOCKED)
        write, device = int(MIGRATE_PFN_WRITE), int(MIGRATE_PFN_DEVICE)
        flags = [page | write, page, page | write | device, page | write]
        words = [pfn << 6 | bits for pfn, bits in zip(pfns[2:].tolist(), flags, strict=True)]
        assert [hole, hole, *words] == seen
        assert MIXED_CONTENTS == world.contents()

    def test_pages_are_locked_and_unmapped_while_it_copies(self):
        """During alloc_and_copy() nobody can reach the pages: each waits behind its lock."""
        world = mapped_range(pages=3)
        mem, pfns, seen = world.machine.mem, world.pfns(), []

        def look(src, dst):
            seen.append((kinds(world), (mem.flags[pfns] & PG_locked != 0).all()))
            seen.append(mem.mapcount[pfns].tolist())

        migrate(world, before=look)

        assert [(["migration"] * 3, True), [0, 0, 0]] == seen

    def test_finalize_and_map_sees_what_moved(self):
        """MIGRATE is still set exactly where dst has taken over; both pages are locked."""
        world = mapped_range(pages=3)
        mem, seen = world.machine.mem, []

        def look(src, dst):
            pages = np.concatenate((src[[0, 2]], dst[[0, 2]])) >> np.uint64(6)
            seen.append((src & MIGRATE_PFN_MIGRATE != 0).tolist())
            seen.append((mem.flags[pages.astype(np.int64)] & PG_locked != 0).all())

        migrate(world, after=instead(world, {1: 0}), mapping=look)

        assert [[True, False, True], True] == seen

    def test_driver_need_not_take_everything(self):
        """A page without a destination stays where it is, the others go."""
        world = mapped_range(pages=5)

        result = migrate(world, after=instead(world, {1: 0, 4: 0}))

        assert [True, False, True, True, False] == world.on_device()
        assert ["NO", "NOT_CHOSEN", "NO", "NO", "NOT_CHOSEN"] == reasons(result)
        assert [0, -errno.ENOMEM, 0, 0, -errno.ENOMEM] == result.status.tolist()
        assert [0, 1, 2, 3, 4] == world.contents()

    def test_destination_for_a_page_that_cannot_move(self):
        """A destination that nobody asked for is given back to the driver."""
        world = mapped_range(pages=3)
        world.pin(1)

        def offer(src, dst):
            page = world.gpu.allocate(1)
            world.gpu.chunks.take(page)
            world.gpu._hand_over(dst, np.array([1]), world.gpu.zone.start_pfn + page)

        result = migrate(world, after=offer)

        assert [True, False, True] == world.on_device()
        assert 2 == result.cpages
        assert world.gpu.npages - 2 == world.gpu.chunks.free_pages


class TestHoles:
    @pytest.mark.parametrize("access", ["none", "read"])
    @pytest.mark.parametrize("prot", ["r", "rw", "rx", "-"])
    def test_hole_or_zero_page_is_filled(self, prot, access):
        """A page that was never written gets device memory, writable exactly if its VMA is."""
        world = mapped_range(pages=3, filled=False, prot=prot)
        if access == "read" and prot != "-":
            world.process.touch(world.addr, world.nbytes, write=False)

        with world.machine.vmstat.counting("nr_anon_pages") as delta:
            result = migrate(world)

        assert 3 == result.cpages
        assert [("device", prot == "rw")] * 3 == [(e.kind, e.write) for e in entries(world)]
        assert ({"nr_anon_pages": 3}, 3) == (delta, world.process.mm.anon_rss)

    @pytest.mark.parametrize("prot", ["r", "rw"])
    def test_filled_hole_reads_as_zeros(self, prot):
        """The CPU finds zeros where the device filled a hole, and with the same rights."""
        world = mapped_range(pages=3, filled=False, prot=prot)

        migrate(world)

        assert bytes(world.nbytes) == world.process.read(world.addr, world.nbytes)
        assert [("present", prot == "rw")] * 3 == [(e.kind, e.write) for e in entries(world)]

    def test_hole_that_the_driver_leaves(self):
        """A hole without a destination is a hole afterwards."""
        world = mapped_range(pages=3, filled=False)

        result = migrate(world, after=instead(world, {0: 0, 1: int(MIGRATE_PFN_ERROR)}))

        assert ["none", "none", "device"] == kinds(world)
        assert ["NOT_CHOSEN", "NOT_CHOSEN", "NO"] == reasons(result)
        assert [0, 0, 0] == world.contents()

    def test_cpu_stores_to_a_hole_meanwhile(self):
        """The CPU was first: its page stays, and what the driver prepared is given back."""
        world = mapped_range(pages=3, filled=False)

        result = migrate(world, before=lambda src, dst: world.process.write(world.at(1), b"\x07"))

        assert ["NO", "RACED", "NO"] == reasons(result)
        assert [0, -errno.EEXIST, 0] == result.status.tolist()
        assert [0, 7, 0] == world.contents()
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_cpu_loads_from_a_hole_meanwhile(self):
        """The zero page is no obstacle: the device's page takes its place."""
        world = mapped_range(pages=3, filled=False)

        result = migrate(world, after=lambda src, dst: world.process.read(world.at(1), 1))

        assert (3, [True] * 3) == (result.cpages, world.on_device())

    def test_filled_from_system_memory_and_device_at_once(self):
        """Each hole gets the kind of page that the driver chose for it."""
        world = mapped_range(pages=4, filled=False)
        mem = world.machine.mem

        def half(src, dst):
            instead(world, {1: 0, 2: 0})(src, dst)
            frames = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, 0, 2)
            mem.payload[frames] = 9
            world.gpu._hand_over(dst, np.array([1, 2]), frames, referenced=True)

        migrate(world, after=half, pgmap_owner=None)

        assert ["device", "present", "present", "device"] == kinds(world)
        assert [0, 9, 9, 0] == world.contents()

    def test_huge_range_with_a_few_pages(self):
        """A gigabyte of holes around three pages: the device takes what fits, from the start."""
        world = mapped_range(pages=1 << 18, filled=False)
        for page in (0, 1_000, 200_000):
            world.process.write(world.at(page), bytes([page % 251]) * PAGE_SIZE)

        result = migrate(world)

        assert 1_024 == result.cpages == np.count_nonzero(world.on_device())
        assert [0, 1_000 % 251] == [world.process.read(world.at(p), 1)[0] for p in (0, 1_000)]
        assert 200_000 % 251 == world.process.read(world.at(200_000), 1)[0]
        assert "NOT_CHOSEN" == Stayed(result.stayed[-1]).name

    def test_wanted_pages_of_a_huge_range(self):
        """Of scattered pages only those that were asked for are looked at."""
        world = mapped_range(pages=1 << 18, filled=False)
        wanted = np.zeros(world.pages, dtype=np.bool_)
        wanted[[5, 600, 70_000, 262_143]] = True
        world.process.write(world.at(600), b"x")

        result = migrate(world, wanted=wanted)

        assert [5, 600, 70_000, 262_143] == np.flatnonzero(world.on_device()).tolist()
        assert b"x" == world.process.read(world.at(600), 1)
        assert {"NO", "SKIPPED"} == {Stayed(reason).name for reason in set(result.stayed.tolist())}

    def test_no_page_table_is_left(self):
        """Holes that would need a table stay where none can be had; the pages move."""
        world = mapped_range(pages=1_024, filled=False, addr=0x7F00_0000_0000)
        for page in range(3):
            world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)
        world.gpu.table_of(world.process.mm)
        tables = world.machine.mem.tables
        spare = tables.alloc(tables.rows - 1 - tables.in_use)
        wanted = np.zeros(1_024, dtype=np.bool_)
        wanted[[0, 1, 2, 600]] = True

        try:
            result = migrate(world, mapping=lambda src, dst: tables.release(spare), wanted=wanted)
        finally:
            if tables.in_use == tables.rows - 1:
                tables.release(spare)

        assert [0, 1, 2] == np.flatnonzero(world.on_device()).tolist()
        assert 0 > Stayed(result.stayed[600]).errno
        assert [0, 1, 2] == world.contents()[:3]


class TestToSystem:
    def test_contents_come_back(self):
        """Pages of the device become frames again, with every byte."""
        world = mapped_range(pages=5)
        migrate(world)

        result = migrate(world, back=True)

        assert (5, ["present"] * 5) == (result.cpages, kinds(world))
        assert [0, 1, 2, 3, 4] == world.contents()
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_frames_are_freed_on_the_way_there(self):
        """A page in device memory occupies no frame."""
        world = mapped_range(pages=5)
        free = world.machine.nr_free_pages

        migrate(world)

        assert free + 5 == world.machine.nr_free_pages

    def test_only_the_kind_that_was_selected(self):
        """With select, system pages or device pages stay as they are; holes always count."""
        world = mixed_range()

        result = migrate(world, select=MigrateVmaSelect.SYSTEM)

        assert ["NO", "NO", "NO", "NO", "SKIPPED", "NO"] == reasons(result)
        assert MIXED_CONTENTS == world.contents()

    def test_only_the_owners_pages(self):
        """A device brings back its own pages and leaves another's."""
        world = mapped_range(pages=4)
        other = NumpyDevice(world.machine, "64KiB", name="numpy1")
        world.gpu.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        other.to_device(world.process, world.at(2), 2 * PAGE_SIZE)

        result = migrate(world, back=True, select=MigrateVmaSelect.DEVICE_PRIVATE)

        assert ["NO", "NO", "SKIPPED", "SKIPPED"] == reasons(result)
        assert ["present", "present", "device", "device"] == kinds(world)
        assert [0, 1, 2, 3] == world.contents()

    def test_anybodys_pages(self):
        """Without an owner the device pages of all drivers are collected, as in v4.20."""
        world = mapped_range(pages=2)
        other = NumpyDevice(world.machine, "64KiB", name="numpy1")
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)
        other.to_device(world.process, world.at(1), PAGE_SIZE)
        seen = []

        look_on(world, lambda src, dst: seen.extend(src.tolist()))

        assert [int(MIGRATE_PFN_DEVICE)] * 2 == [word & int(MIGRATE_PFN_DEVICE) for word in seen]
        assert [0, 1] == world.contents()


class TestInTheWay:
    def test_pinned_page_in_the_middle_stays(self):
        """A pinned page stays in system memory; its neighbours migrate."""
        world = mapped_range(pages=5)
        world.pin(page=2)

        result = migrate(world)

        assert [True, True, False, True, True] == world.on_device()
        assert ("PINNED", -errno.EBUSY) == (reasons(result)[2], result.status[2])
        assert [0, 1, 2, 3, 4] == world.contents()

    def test_pin_that_comes_while_it_is_copied(self):
        """A reference taken during alloc_and_copy() keeps the page, and the copy is wasted."""
        world = mapped_range(pages=3)
        pfn = world.pfns().item(1)

        result = migrate(world, after=lambda src, dst: world.hold(pfn))

        assert [True, False, True] == world.on_device()
        assert ("BUSY", -errno.EAGAIN) == (reasons(result)[1], result.status[1])
        assert [0, 1, 2] == world.contents()
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_device_page_that_its_driver_holds(self):
        """A device page with one reference more stays in device memory until it is dropped."""
        world = mapped_range(pages=2)
        migrate(world)
        pin = world.hold(world.pfns().item(0))

        result = migrate(world, back=True)
        pin.release()

        assert ["BUSY", "NO"] == reasons(result)
        assert [True, False] == world.on_device()
        assert [0, 1] == world.contents()

    def test_locked_page_stays(self):
        """A page that another thread has locked stays; nobody waits for it."""
        world = mapped_range(pages=3)
        world.lock(page=1)

        result = migrate(world)

        assert [True, False, True] == world.on_device()
        assert ("LOCKED", -errno.EAGAIN) == (reasons(result)[1], result.status[1])
        assert SOMEBODY_ELSE == world.machine.mem.lock_owner[world.pfns()[1]]
        assert [0, 1, 2] == world.contents()

    def test_lock_that_comes_free_between_collect_and_prepare(self):
        """A page that collect found locked is tried once more, and then unmapped by its rmap."""
        world = mapped_range(pages=3)
        world.lock(page=1)
        seen = []
        migration, _ = in_hand(world)

        with world.process.mm.mmap_sem.read():
            migrate_vma_collect(migration)
            seen.append(kinds(world))
            world.unlock(1)
            migrate_vma_prepare(migration)
            migrate_vma_unmap(migration)
            seen.append(kinds(world))
            migrate_vma_pages(migration)
            migrate_vma_finalize(migration)

        assert [["migration", "present", "migration"], ["migration"] * 3] == seen
        assert [0, 1, 2] == world.contents()

    def test_isolated_page_stays(self):
        """A page that somebody has taken off the LRU is somebody's who moves it himself."""
        world = mapped_range(pages=3)
        world.isolate(page=1)

        result = migrate(world)

        assert [True, False, True] == world.on_device()
        assert ("ISOLATED", -errno.EBUSY) == (reasons(result)[1], result.status[1])
        assert [0, 1, 2] == world.contents()

    def test_pages_on_their_way_to_the_lru(self):
        """Pages that wait in the pagevec of any CPU are no obstacle."""
        world = mapped_range(pages=4, filled=False)
        for page in range(4):
            world.process.cpu = page % 2
            world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)

        result = migrate(world)

        assert (4, [True] * 4) == (result.cpages, world.on_device())
        assert [0, 1, 2, 3] == world.contents()

    def test_mapping_that_cannot_be_found(self):
        """A page that stays mapped, whatever its rmap says, stays."""
        world = mapped_range(pages=2)
        mem, pfn = world.machine.mem, world.pfns().item(1)
        world.hold(pfn)
        mem.mapcount[pfn] += 1

        result = migrate(world)

        mem.mapcount[pfn] -= 1
        assert ["NO", "MAPPED"] == reasons(result)
        assert ([True, False], [0, 1]) == (world.on_device(), world.contents())

    def test_page_of_no_process(self):
        """A page that is not anonymous does not go to a device."""
        world = mapped_range(pages=2)
        mem, pfn = world.machine.mem, world.pfns().item(1)
        migration, arguments = in_hand(world)

        with world.process.mm.mmap_sem.read():
            migrate_vma_setup(migration)
            world.gpu.alloc_and_copy(*arguments)
            mem.mapping[pfn] &= ~PAGE_MAPPING_ANON
            migrate_vma_pages(migration)
            mem.mapping[pfn] |= PAGE_MAPPING_ANON
            world.gpu.finalize_and_map(*arguments)
            migrate_vma_finalize(migration)

        assert ["NO", "REFUSED"] == reasons(migration)
        assert ([True, False], [0, 1]) == (world.on_device(), world.contents())

    def test_holes_of_a_file(self):
        """What a file has not been read into is no hole; the private pages on it migrate."""
        world = mapped_range(pages=3, filled=False)
        world.process.write(world.at(1), b"x")
        world.vma.vm_file = object()

        result = migrate(world)

        assert ["SKIPPED", "NO", "SKIPPED"] == reasons(result)
        assert b"x" == world.process.read(world.at(1), 1)

    def test_page_that_is_moving_already(self):
        """A migration inside a migration of the same range finds nothing to move."""
        world = mapped_range(pages=3)
        inner = []

        migrate(world, before=lambda src, dst: inner.append(look_on(world)))

        assert [["SKIPPED"] * 3] == [reasons(result) for result in inner]
        assert [0, 1, 2] == world.contents()


class TestPageState:
    def test_rights_and_soft_dirty_survive(self):
        """There and back, each entry keeps its right to store and its soft-dirty bit."""
        world = mapped_range(pages=4)
        world.write_protect(1, 3)
        world.clear_refs(2, 3)
        before = [(entry.write, entry.soft_dirty) for entry in entries(world)]

        migrate(world)
        away = [(entry.write, entry.soft_dirty) for entry in entries(world)]
        migrate(world, back=True)

        assert [(True, True), (False, True), (True, False), (False, False)] == before == away
        assert before == [(entry.write, entry.soft_dirty) for entry in entries(world)]

    def test_dirty_survives(self):
        """What the CPU has changed is dirty in device memory and after it; the rest is not."""
        world = mapped_range(pages=3)
        world.clear_refs(1)
        flags = world.machine.mem.flags

        migrate(world)
        away = (flags[world.pfns()] & PG_dirty != 0).tolist()
        migrate(world, back=True)

        assert [True, False, True] == away
        assert [True, False, True] == (flags[world.pfns()] & PG_dirty != 0).tolist()

    def test_dirty_of_a_page_that_stays(self):
        """A page that was unmapped and put back still counts as changed."""
        world = mapped_range(pages=1)
        world.pin(0)

        migrate(world)

        assert world.machine.mem.flags[world.pfns()[0]] & PG_dirty
        assert not entries(world)[0].dirty

    def test_restored_page_is_old(self):
        """An entry that was taken away comes back without its accessed bit."""
        world = mapped_range(pages=2)
        world.pin(1)

        migrate(world)
        migrate(world, back=True)

        assert [False, False] == [entry.accessed for entry in entries(world)]

    def test_active_page_comes_back_active(self):
        """The LRU list that a page belongs on is remembered in device memory."""
        world = mapped_range(pages=2)
        flags = world.machine.mem.flags
        flags[world.pfns()[1:]] &= ~PG_active  # it is on its way to a list, not on one

        migrate(world)
        migrate(world, back=True)

        assert [True, False] == (flags[world.pfns()] & PG_active != 0).tolist()

    def test_counters(self):
        """A page in device memory is still an anonymous page of its process, and on no list."""
        world = mapped_range(pages=20)
        free = world.machine.nr_free_pages

        with world.machine.vmstat.counting("nr_anon_pages", "nr_active_anon") as delta:
            migrate(world)

        assert {"nr_anon_pages": 0, "nr_active_anon": -20} == delta
        assert (20, free + 20) == (world.process.mm.anon_rss, world.machine.nr_free_pages)


def read_or_lost(world) -> list[int | str]:
    """What the CPU finds in each page, "lost" where it gets SIGBUS."""
    found: list[int | str] = []
    for page in range(world.pages):
        try:
            found.append(world.process.read(world.at(page), 1)[0])
        except BusError as error:
            found.append("lost" if world.at(page) == error.address else hex(error.address))
    return found


class TestLostContents:
    LOST = int(MIGRATE_PFN_ERROR)

    @pytest.mark.parametrize("back", [False, True])
    def test_bus_error_at_that_page_alone(self, back):
        """MIGRATE_PFN_ERROR makes the CPU fail at its page, loading or storing; the rest moves."""
        world = mapped_range(pages=4)
        if back:
            migrate(world)

        result = migrate(world, after=instead(world, {1: self.LOST}), back=back)

        assert ["NO", "LOST", "NO", "NO"] == reasons(result)
        assert -errno.EIO == result.status[1]
        assert [0, "lost", 2, 3] == read_or_lost(world)
        with pytest.raises(BusError, match=f"{world.at(1):#x}"):
            world.process.write(world.at(1), b"x")

    @pytest.mark.parametrize("back", [False, True])
    def test_memory_is_freed(self, back):
        """The page behind lost contents is freed at once, wherever it was."""
        world = mapped_range(pages=2)
        free = world.machine.nr_free_pages
        if back:
            migrate(world)

        migrate(world, after=instead(world, {0: self.LOST, 1: self.LOST}), back=back)

        assert ["poison"] * 2 == kinds(world)
        assert (free + 2, 0) == (world.machine.nr_free_pages, world.process.mm.anon_rss)
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_error_beside_a_destination(self):
        """Lost is lost, even if the driver hands over a page: it is given back."""
        world = mapped_range(pages=2)

        def lose(src, dst):
            dst[1] |= MIGRATE_PFN_ERROR

        result = migrate(world, after=lose)

        assert ["NO", "LOST"] == reasons(result)
        assert [0, "lost"] == read_or_lost(world)
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_device_that_loses_what_it_brings_back(self):
        """A page that the device cannot give back is lost to the CPU that touches it."""
        world = mapped_range(pages=3, driver=Forgetful)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [0, "lost", 2] == read_or_lost(world)

        with pytest.raises(BusError):
            world.gpu.read(world.process, world.at(1), 1)

    def test_lost_page_stays_where_it_is(self):
        """What is lost is skipped by later migrations, and unmapping forgets it."""
        world = mapped_range(pages=2)
        migrate(world, after=instead(world, {1: self.LOST}))

        again = migrate(world, back=True)
        world.process.munmap(world.at(1), PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, addr=world.at(1))

        assert ["NO", "SKIPPED"] == reasons(again)
        assert [0, 0] == world.contents()


class Forgetful(NumpyDevice):
    """A device that loses its second page whenever it is to give it back."""

    def copy_out(self, pages, system, rows):
        super().copy_out(pages, system, rows)
        return pages == 1


class Broken(NumpyDevice):
    """A device whose copies fail."""

    def copy_in(self, pages, system, rows):
        raise OSError("the bus is gone")

    def copy_out(self, pages, system, rows):
        raise OSError("the bus is gone")


def half_an_answer(world, error):
    """A step that names a page for entry 0, does not lock it, and fails."""

    def fail(src, dst):
        page = world.gpu.allocate(1)
        world.gpu.chunks.take(page)
        world.hold(world.gpu.zone.start_pfn + page.item())
        dst[0] = migrate_pfn(world.gpu.zone.start_pfn + page)[0] | MIGRATE_PFN_LOCKED
        world.pins.pop()
        world.machine.mem.pins.pop()
        raise error

    return fail


class TestCallbackThatRaises:
    @pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_alloc_and_copy(self, when, error):
        """Every page is back where it was, unlocked; no destination leaks; the error goes on."""
        world = mixed_range()
        was, free = mapped(world), world.gpu.chunks.free_pages

        with pytest.raises(type(error)):
            migrate(world, **{when: raises(error)})

        assert (was, free) == (mapped(world), world.gpu.chunks.free_pages)
        assert MIXED_CONTENTS == world.contents()

    def test_alloc_and_copy_on_the_way_back(self):
        """The same for device pages: they stay, and frames are freed."""
        world = mapped_range(pages=3)
        migrate(world)
        was, free = mapped(world), world.machine.nr_free_pages

        with pytest.raises(OSError, match="broken"):
            migrate(world, after=raises(OSError("broken")), back=True)

        assert (was, free) == (mapped(world), world.machine.nr_free_pages)
        assert [0, 1, 2] == world.contents()

    def test_alloc_and_copy_with_half_an_answer(self):
        """A destination that was named but not locked yet is given back as well."""
        world = mixed_range()
        was, free = mapped(world), world.gpu.chunks.free_pages

        with pytest.raises(OSError, match="broken"):
            migrate(world, before=half_an_answer(world, OSError("broken")))

        assert (was, free) == (mapped(world), world.gpu.chunks.free_pages)
        assert MIXED_CONTENTS == world.contents()

    def test_alloc_and_copy_that_spoils_src(self):
        """What the driver wrote to src before it failed does not matter."""
        world = mixed_range()
        was = mapped(world)

        def spoil(src, dst):
            src[:] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
            raise OSError("broken")

        with pytest.raises(OSError, match="broken"):
            migrate(world, after=spoil)

        assert was == mapped(world)
        assert MIXED_CONTENTS == world.contents()

    def test_copy_fails(self):
        """A device whose copy fails keeps nothing, and the process keeps all."""
        world = mapped_range(pages=3, driver=Broken)

        with pytest.raises(OSError, match="the bus is gone"):
            world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (["present"] * 3, 1_024) == (kinds(world), world.gpu.chunks.free_pages)
        assert [0, 1, 2] == world.contents()

    @pytest.mark.parametrize("back", [False, True])
    @pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
    def test_finalize_and_map(self, error, back):
        """What has moved has moved: it is mapped and unlocked, and the error goes on."""
        world = mapped_range(pages=3)
        if back:
            migrate(world)

        with pytest.raises(type(error)):
            migrate(world, mapping=raises(error), back=back)

        assert [not back] * 3 == world.on_device()
        assert [0, 1, 2] == world.contents()

    def test_process_goes_on_afterwards(self):
        """A later migration of the same pages succeeds."""
        world = mixed_range()
        with pytest.raises(OSError, match="broken"):
            migrate(world, after=raises(OSError("broken")))

        result = migrate(world)

        assert (5, [True] * ALL_KINDS) == (result.cpages, world.on_device())
        assert MIXED_CONTENTS == world.contents()


class TestDeadlock:
    @pytest.mark.parametrize("step", ["before", "after", "mapping"])
    def test_cpu_access_to_a_page_under_migration(self, step):
        """A callback that touches what it migrates is told so, and does not hang."""
        world = mapped_range(pages=3)

        with pytest.raises(Deadlock, match="locked by the thread that waits"):
            migrate(world, **{step: lambda src, dst: world.process.read(world.at(1), 1)})

        assert [0, 1, 2] == world.contents()

    def test_cpu_access_to_a_hole_that_was_just_filled(self):
        """The same for a page that the process can see already, but that is still locked."""
        world = mapped_range(pages=3, filled=False)

        with pytest.raises(Deadlock, match="locked by the thread that waits"):
            migrate(world, mapping=lambda src, dst: world.process.read(world.at(1), 1))

        assert [0, 0, 0] == world.contents()

    def test_callback_that_takes_the_hint(self):
        """A callback may catch the error and go on; the migration succeeds."""
        world = mapped_range(pages=3)

        def touch(src, dst):
            with pytest.raises(Deadlock):
                world.process.write(world.at(1), b"x")

        result = migrate(world, before=touch)

        assert (3, [0, 1, 2]) == (result.cpages, world.contents())

    def test_device_access_to_a_page_under_migration(self):
        """The same from the device's side."""
        world = mapped_range(pages=3)

        with pytest.raises(Deadlock):
            migrate(world, before=lambda src, dst: world.gpu.read(world.process, world.at(1), 1))

        assert [0, 1, 2] == world.contents()

    @pytest.mark.parametrize("call", ["munmap", "exit"])
    def test_unmapping_from_a_callback(self, call):
        """Unmapping waits for migrations to end, so a callback that does it is told."""
        world = mapped_range(pages=3)
        unmap = {
            "munmap": lambda src, dst: world.process.munmap(world.addr, world.nbytes),
            "exit": lambda src, dst: world.process.exit(),
        }

        with pytest.raises(Deadlock, match="mmap_sem"):
            migrate(world, before=unmap[call])

        assert [0, 1, 2] == world.contents()

    def test_cpu_access_to_another_page(self):
        """A callback may touch memory that does not move."""
        world = mapped_range(pages=3)
        elsewhere = world.process.mmap(PAGE_SIZE)
        world.process.write(elsewhere, b"table")
        seen = []

        migrate(world, before=lambda src, dst: seen.append(world.process.read(elsewhere, 5)))

        assert ([b"table"], [0, 1, 2]) == (seen, world.contents())


class TestVmas:
    def test_two_areas_of_one_mapping(self):
        """Two VMAs that were one share an anon_vma; each migrates by itself."""
        world = mapped_range(pages=7)
        world.process.munmap(world.at(3), PAGE_SIZE)
        src, dst = np.zeros((2, 3), dtype=np.uint64)

        with pytest.raises(InvalidRange):
            migrate(world)
        for start in (0, 4):
            vma = world.process.find_vma(world.at(start))
            migrate_vma(
                world.gpu,
                vma,
                world.at(start),
                world.at(start + 3),
                src,
                dst,
                Direction.TO_DEVICE,
            )

        assert [True, True, True, False, True, True, True] == world.on_device()
        assert [0, 1, 2, 4, 5, 6] == [
            world.process.read(world.at(page), 1)[0] for page in (0, 1, 2, 4, 5, 6)
        ]

    def test_two_areas_in_one_call_of_the_driver(self):
        """A driver's to_device() goes over the VMAs of its range."""
        world = mapped_range(pages=4)
        world.process.mmap(2 * PAGE_SIZE, "r", addr=world.at(4))

        moved = world.gpu.to_device(world.process, world.addr, 6 * PAGE_SIZE)

        assert (6, 6) == (moved.collected, moved.migrated)
        assert bytes(2 * PAGE_SIZE) == world.process.read(world.at(4), 2 * PAGE_SIZE)
        assert [0, 1, 2, 3] == world.contents()

    def test_same_address_in_another_process(self):
        """A process at the same address keeps its pages and its bytes."""
        world = mapped_range(pages=3)
        other = world.machine.spawn("other")
        other.mmap(world.nbytes, addr=world.addr)
        other.write(world.addr, bytes([9]) * world.nbytes)

        migrate(world)

        assert 3 == other.mm.anon_rss
        assert bytes([9]) * world.nbytes == other.read(world.addr, world.nbytes)
        assert [0, 1, 2] == world.contents()

    def test_part_of_a_vma(self):
        """Pages of the VMA outside the range are not touched."""
        world = mapped_range(pages=6)
        src, dst = np.zeros((2, 2), dtype=np.uint64)

        migrate_vma(Callbacks(world), world.vma, world.at(2), world.at(4), src, dst)

        assert [False, False, True, True, False, False] == world.on_device()
        assert [0, 1, 2, 3, 4, 5] == world.contents()


class Listener:
    """An mmu notifier that writes down what it hears."""

    def __init__(self, world) -> None:
        self.world = world
        self.heard = []
        mmu_notifier_register(self, world.process.mm)

    def invalidate_range_start(self, invalid):
        self.note("start", invalid)

    def invalidate_range_end(self, invalid):
        self.note("end", invalid)

    def release(self, mm):
        pass

    def note(self, what, invalid):
        pages = [(addr - self.world.addr) // PAGE_SIZE for addr in (invalid.start, invalid.end)]
        self.heard.append((what, *pages, invalid.event, invalid.owner))


def pair(first, last, event, owner):
    """What a listener hears of one invalidation."""
    return [(what, first, last, event, owner) for what in ("start", "end")]


class TestNotifier:
    def test_pages(self):
        """Listeners hear of the range once, as a migration by its owner."""
        world = mapped_range(pages=5)
        listener, gpu = Listener(world), world.gpu

        migrate(world)

        assert pair(0, 5, MmuNotifyEvent.MIGRATE, gpu) == listener.heard

    def test_holes(self):
        """Where holes are filled they hear it again, from the first that is to the end."""
        world = mapped_range(pages=5, filled=False)
        for page in (0, 1, 3):
            world.process.write(world.at(page), b"x")
        listener, gpu = Listener(world), world.gpu

        migrate(world)

        collect, insert = (pair(first, 5, MmuNotifyEvent.MIGRATE, gpu) for first in (0, 2))
        assert collect + insert == listener.heard

    def test_holes_that_the_driver_leaves(self):
        """Where no hole is filled they hear nothing of it."""
        world = mapped_range(pages=2, filled=False)
        listener = Listener(world)

        look_on(world)

        assert pair(0, 2, MmuNotifyEvent.MIGRATE, None) == listener.heard

    def test_callback_that_raises(self):
        """Every start has its end, whatever fails."""
        world = mixed_range()
        listener = Listener(world)

        with pytest.raises(OSError, match="broken"):
            migrate(world, mapping=raises(OSError("broken")))

        heard = [what for what, *_ in listener.heard]
        assert ["start", "end"] * (len(heard) // 2) == heard

    def test_nobody_hears_of_a_refused_call(self):
        """A wrong call invalidates nothing."""
        world = mapped_range(pages=2)
        listener = Listener(world)

        with pytest.raises(InvalidArgument):
            migrate(world, wanted=[])

        assert [] == listener.heard


class TestTrace:
    def test_both_ends_are_told(self):
        """Who listens hears how many entries were collected, and how many moved."""
        world = mapped_range(pages=3)
        heard = []

        with listen(lambda event, fields: heard.append((event, fields)), "mm_migrate_vma_*"):
            migrate(world, after=instead(world, {1: 0}))

        place = {"process": "train", "start": world.addr, "end": world.at(3)}
        assert [
            ("mm_migrate_vma_collect", place | {"cpages": 3}),
            ("mm_migrate_vma_finalize", place | {"moved": 2}),
        ] == heard


def in_hand(world):
    """A migration to run stage by stage, and the arguments of its callbacks."""
    src, dst = np.zeros((2, world.pages), dtype=np.uint64)
    start, end = world.addr, world.addr + world.nbytes
    migration = MigrateVma(world.vma, start, end, src, dst)
    return migration, (world.vma, src, dst, start, end, Direction.TO_DEVICE)


class TestStagesInHand:
    def test_driver_that_runs_the_stages_itself(self):
        """setup, pages and finalize with the driver's work in between do what migrate_vma does."""
        world = mapped_range(pages=3)
        migration, arguments = in_hand(world)

        with world.process.mm.mmap_sem.read():
            assert 3 == migrate_vma_setup(migration)
            world.gpu.alloc_and_copy(*arguments)
            migrate_vma_pages(migration)
            world.gpu.finalize_and_map(*arguments)
            migrate_vma_finalize(migration)

        assert (3, [True] * 3) == (migration.cpages, world.on_device())
        assert [0, 1, 2] == world.contents()

    def test_driver_that_changes_its_mind(self):
        """Between setup and pages a driver may simply answer nothing."""
        world = mapped_range(pages=3)
        was = mapped(world)
        migration, _ = in_hand(world)

        with world.process.mm.mmap_sem.read():
            migrate_vma_setup(migration)
            migrate_vma_pages(migration)
            migrate_vma_finalize(migration)

        assert (was, ["NOT_CHOSEN"] * 3) == (mapped(world), reasons(migration))
        assert [0, 1, 2] == world.contents()

    def test_second_round_with_the_same_struct(self):
        """setup begins afresh: nothing of an earlier round is left in it."""
        world = mapped_range(pages=3, filled=False)
        world.process.write(world.at(1), b"x")
        migration, arguments = in_hand(world)

        with world.process.mm.mmap_sem.read():
            for answer in (lambda *_: None, world.gpu.alloc_and_copy):
                migrate_vma_setup(migration)
                answer(*arguments)
                migrate_vma_pages(migration)
                migrate_vma_finalize(migration)

        assert (3, ["NO"] * 3) == (migration.cpages, reasons(migration))
        assert b"x" == world.process.read(world.at(1), 1)
