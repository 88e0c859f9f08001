"""migrate_vma() by scenario: what moves, and what everybody sees of it."""

import errno

import numpy as np
import pytest

from devices import NumpyDevice
from devices.memory import Direction
from hmm import (
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MigrateVmaSelect,
    migrate_vma,
)
from mm import (
    PAGE_SIZE,
    InvalidArgument,
    InvalidRange,
)
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_register
from mm.page_flags import PG_active, PG_dirty, PG_locked
from mm.trace import listen
from tests.hmm.callbacks import (
    Callbacks,
    device_page,
    hand_over,
    instead,
    look_on,
    migrate,
    migrate_with,
    raises,
)
from tests.hmm.ranges import (
    MIXED_CONTENTS,
    entries,
    kinds,
    mixed_range,
    reasons,
)
from tests.world import mapped_range


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

        result = migrate(
            world, after=lambda src, dst: hand_over(world, dst, 1, device_page(world.gpu))
        )

        assert [True, False, True] == world.on_device()
        assert 2 == result.cpages
        assert world.gpu.npages - 2 == world.gpu.chunks.free_pages


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
            ("mm_migrate_vma_setup", place | {"cpages": 3}),
            ("mm_migrate_vma_finalize", place | {"moved": 2}),
        ] == heard
