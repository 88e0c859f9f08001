"""One page takes the place of another, page by page in Python beside it, and between nodes."""

import errno
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import Machine, migrate, trace
from mm.errors import Deadlock
from mm.filemap import trylock_page, unlock_page
from mm.gfp import GFP_KERNEL
from mm.migrate import (
    alloc_migration_target,
    migrate_page,
    migrate_page_add,
    migrate_page_move_mapping,
    migrate_page_states,
    migrate_pages,
    migration_entry_wait,
    putback_movable_pages,
)
from mm.mmu_notifier import mmu_notifier_register
from mm.page_alloc import alloc_pages_bulk
from mm.page_flags import (
    FLAG_NAMES,
    PG_active,
    PG_dirty,
    PG_referenced,
    PG_swapbacked,
    PG_unevictable,
    PG_uptodate,
)
from mm.pgtable import pte_soft_dirty, pte_write
from mm.swap import lru_add_drain_all, put_page
from mm.typing import NO_PAGES, PAGE_SIZE
from tests.files import disk_file
from tests.interleave import explore
from tests.world import SOMEBODY_ELSE, mapped_range

COPIED = [PG_referenced, PG_uptodate, PG_dirty, PG_active, PG_unevictable]
flag_words = st.sets(st.sampled_from([int(bit) for bit in (*COPIED, PG_swapbacked)])).map(sum)
old_pages = st.lists(
    st.fixed_dictionaries(
        {
            "flags": flag_words,
            "refcount": st.integers(1, 2),
            "mapping": st.integers(1, 1000),
            "index": st.integers(0, 2**40),
        }
    ),
    min_size=1,
    max_size=8,
)


def scene(rows):
    """(memory, old pages with the columns of *rows*, fresh pages) on a machine of their own."""
    mem = Machine(("1MiB",), payload=False).mem
    old, new = np.split(alloc_pages_bulk(mem, GFP_KERNEL, 0, 2 * len(rows)), 2)
    for name in rows[0]:
        getattr(mem, name)[old] = [row[name] for row in rows]
    return mem, old, new


class TestMigratePageMoveMapping:
    @given(rows=old_pages)
    def test_only_who_is_alone(self, rows):
        """The mapping moves where nobody but the caller holds the page; else -EAGAIN, unmoved."""
        mem, old, new = scene(rows)

        status = migrate_page_move_mapping(mem, new, old)

        alone = [row["refcount"] == 1 for row in rows]
        assert [0 if a else -errno.EAGAIN for a in alone] == status.tolist()
        assert np.int32 == status.dtype
        for name in ("mapping", "index"):
            moved = [row[name] * a for row, a in zip(rows, alone, strict=True)]
            assert moved == getattr(mem, name)[new].tolist()

    def test_device_page_has_a_reference_of_its_own(self):
        """A ZONE_DEVICE page is alone at two references, as it is free at one."""
        world = mapped_range(pages=2)
        mem, pfns = world.machine.mem, world.gpu.zone.start_pfn + np.arange(3)
        new = alloc_pages_bulk(mem, GFP_KERNEL, 0, 3)
        mem.refcount[pfns] += [0, 1, 2]

        status = migrate_page_move_mapping(mem, new, pfns)
        mem.refcount[pfns] = 1
        put_page(mem, new)

        assert [-errno.EAGAIN, 0, -errno.EAGAIN] == status.tolist()


class TestMigratePageStates:
    @given(rows=old_pages)
    def test_flags(self, rows):
        """What is known of the contents is copied; the place on the LRU passes over."""
        mem, old, new = scene(rows)

        migrate_page_states(mem, new, old)

        copied, lost = int(sum(COPIED) | PG_swapbacked), int(PG_active | PG_unevictable)
        assert [row["flags"] & copied for row in rows] == mem.flags[new].tolist()
        assert [row["flags"] & ~lost for row in rows] == mem.flags[old].tolist()


class TestMigratePage:
    @given(rows=old_pages)
    def test_all_or_nothing_for_each_page(self, rows):
        """A page moves with its mapping, index and flags, or keeps all of them."""
        mem, old, new = scene(rows)

        moved = migrate_page(mem, new, old) == 0

        for row, here, there, went in zip(rows, old, new, moved, strict=True):
            assert went == (row["refcount"] == 1)
            home = there if went else here
            assert row["mapping"] == mem.mapping[home]
            assert row["index"] == mem.index[home]
            assert row["flags"] == mem.flags[home]
            assert went or mem.flags[there] == 0

    def test_lock_does_not_move(self):
        """Each page is locked and unlocked for itself."""
        mem, old, new = scene([{"flags": int(FLAG_NAMES["PG_locked"]), "refcount": 1}])

        migrate_page(mem, new, old)

        assert [0] == mem.flags[new].tolist()


class TestMigrationEntryWait:
    def test_until_the_owner_is_done(self):
        """It returns when all pages are unlocked."""
        world = mapped_range(pages=3)
        mem, pfns = world.machine.mem, world.pfns()
        trylock_page(mem, pfns)
        mem.lock_owner[pfns] = SOMEBODY_ELSE
        timer = threading.Timer(0.02, unlock_page, (mem, pfns))
        timer.start()

        migration_entry_wait(mem, pfns)

        assert not mem.lock_owner[pfns].any()
        timer.join()

    def test_own_migration(self):
        """Who migrates the page itself gets an error, not a hang."""
        world = mapped_range(pages=1)
        trylock_page(world.machine.mem, world.pfns())

        with pytest.raises(Deadlock, match="may not touch memory that it is migrating"):
            migration_entry_wait(world.machine.mem, world.pfns())

        unlock_page(world.machine.mem, world.pfns())


class Listener:
    """Remembers what was invalidated, (first page, pages) of *world*; does *then* at *when*."""

    def __init__(self, world, when=None, then=None):
        self.world, self.when, self.then, self.heard = world, when, then, []
        mmu_notifier_register(self, world.process.mm)

    def invalidate_range_start(self, invalid):
        first = (invalid.start - self.world.addr) // PAGE_SIZE
        self.heard.append((first, (invalid.end - invalid.start) // PAGE_SIZE))
        if self.heard[-1] == self.when:
            self.then()

    def invalidate_range_end(self, invalid):
        """Nothing was kept."""

    def release(self, mm):
        """Nothing is kept."""


def two_nodes(pages=5, **how):
    return mapped_range(pages=pages, **{"nodes": ("16MiB", "16MiB")} | how)


def isolated(world, *which):
    """The pages *which* of *world*, all by default, taken off their lists."""
    mem, pfns = world.machine.mem, world.pfns()
    lru_add_drain_all(mem)
    pfns = pfns[list(which)] if which else pfns
    assert migrate_page_add(mem, pfns).all()
    return mem, pfns


def to_node_1(world, *which):
    """What migrate_pages() says about moving them to node 1."""
    mem, pfns = isolated(world, *which)
    return migrate_pages(mem, pfns, alloc_migration_target(mem, 1)).tolist()


def nodes(world):
    return world.machine.mem.page_to_nid(world.pfns()).tolist()


class TestMigratePages:
    def test_contents_and_state_move(self):
        """The new page is what the old one was; the old frame is free, filled with junk."""
        world = two_nodes()
        mem, old = world.machine.mem, world.pfns()
        lru_add_drain_all(mem)
        flags = (mem.flags[old] | PG_dirty).tolist()  # by the entries, which had been written to

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            assert [0] * 5 == to_node_1(world)

        assert [1] * 5 == nodes(world)
        assert world.intact()
        assert flags == mem.flags[world.pfns()].tolist()
        assert {"pgmigrate_success": 5, "pgmigrate_fail": 0} == delta
        assert {0xAA} == set(mem.payload[old].reshape(-1).tolist())
        assert not mem.refcount[old].any()

    def test_every_mapping_follows(self):
        """A page that two processes map is the same page for both afterwards."""
        world = two_nodes(3)
        child = world.fork(0, 1)

        assert [0, 0, 0] == to_node_1(world)

        assert [2, 2, 1] == world.machine.mem.mapcount[world.pfns()].tolist()
        assert [1, 1, -errno.ENOENT] == child.move_pages(world.addrs).tolist()

    def test_entries_keep_their_rights(self):
        """What was read-only stays so, and soft-dirty stays as it is."""
        world = two_nodes(3)
        world.clear_refs(1)
        world.write_protect(2)
        rights = pte_write(world.ptes()).tolist(), pte_soft_dirty(world.ptes()).tolist()

        to_node_1(world)

        assert ([True, True, False], [True, False, True]) == rights
        assert rights == (pte_write(world.ptes()).tolist(), pte_soft_dirty(world.ptes()).tolist())

    def test_devices_hear_of_it(self):
        """Each stretch of pages is invalidated once."""
        world = two_nodes()
        listener = Listener(world)

        to_node_1(world, 0, 1, 3)

        assert [(0, 2), (3, 1)] == listener.heard

    def test_pinned_page_is_tried_ten_times(self):
        """Then it stays where it is, counted once; its neighbours move at the first attempt."""
        world = two_nodes(3)
        world.pin(1)
        listener = Listener(world)

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            assert [0, -errno.EAGAIN, 0] == to_node_1(world)

        assert [(0, 3)] + [(1, 1)] * 9 == listener.heard
        assert {"pgmigrate_success": 2, "pgmigrate_fail": 1} == delta
        assert ([1, 0, 1], [0, 1, 2]) == (nodes(world), world.contents())

    def test_pin_that_goes_away(self):
        """A page that is let go of between two attempts moves with the second."""
        world = two_nodes(2)
        pin = world.pin(0)
        listener = Listener(world, when=(0, 1), then=pin.release)

        assert [0, 0] == to_node_1(world)

        assert [(0, 2), (0, 1)] == listener.heard

    def test_lock_that_somebody_else_has(self):
        """Three attempts pass it over, then it is waited for."""
        world = two_nodes(3)
        world.lock(1)
        timer = threading.Timer(0.02, world.unlock, [1])
        timer.start()

        assert [0, 0, 0] == to_node_1(world)

        timer.join()
        assert [1, 1, 1] == nodes(world)

    def test_own_lock(self):
        """Who would wait for itself is told so, and what has not moved is put back."""
        world = two_nodes(3)
        mem, pfns = isolated(world)
        trylock_page(mem, pfns[1:2])

        with pytest.raises(Deadlock):
            migrate_pages(mem, pfns, alloc_migration_target(mem, 1))

        unlock_page(mem, pfns[1:2])
        assert [1, 0, 1] == nodes(world)
        assert [0] == to_node_1(world, 1)

    @pytest.mark.parametrize("when", [(0, 2), (3, 1)])
    def test_listener_raises(self, when):
        """What the process has stays as it was, whatever was unmapped by then."""
        world = two_nodes(4)
        mem, pfns = isolated(world, 0, 1, 3)
        Listener(world, when, lambda: 1 // 0)

        with pytest.raises(ZeroDivisionError):
            migrate_pages(mem, pfns, alloc_migration_target(mem, 1))

        assert [0] * 4 == nodes(world)
        assert world.intact()
        world.machine.verify()

    def test_no_frames_to_be_had(self):
        """Who raises instead of giving frames leaves every page as it was."""
        world = two_nodes(2)
        mem, pfns = isolated(world)

        with pytest.raises(ZeroDivisionError):
            migrate_pages(mem, pfns, lambda pfns: 1 // 0)

        assert world.intact()
        world.machine.verify()

    def test_frames_run_out(self):
        """The first pages have theirs; the next one has failed, the rest was not tried."""
        world = two_nodes(4)
        world.pin(0)
        mem, pfns = isolated(world)

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            status = migrate_pages(mem, pfns, lambda old: alloc_migration_target(mem, 1)(old[:2]))

        assert [-errno.EAGAIN, 0, -errno.ENOMEM, -errno.ENOMEM] == status.tolist()
        assert {"pgmigrate_success": 1, "pgmigrate_fail": 2} == delta
        assert ([0, 1, 0, 0], [0, 1, 2, 3]) == (nodes(world), world.contents())

    def test_unmapped_meanwhile(self):
        """A page that nobody has any more when its turn comes is gone, and counts as moved."""
        world = two_nodes(2)
        mem, pfns = isolated(world)
        world.process.munmap(world.addr, PAGE_SIZE)

        assert [0, 0] == migrate_pages(mem, pfns, alloc_migration_target(mem, 1)).tolist()

        assert 0 == mem.refcount[pfns[0]]
        assert 1 == world.process.mm.anon_rss

    def test_in_batches(self, monkeypatch):
        """No more than a batch of pages is on the way at a time."""
        world = two_nodes(5)
        mem, pfns = isolated(world)
        asked = []
        monkeypatch.setattr(migrate, "NR_MAX_BATCHED_MIGRATION", 2)

        def get_new_pages(old):
            asked.append(old.size)
            return alloc_migration_target(mem, 1)(old)

        assert [0] * 5 == migrate_pages(mem, pfns, get_new_pages).tolist()

        assert [2, 2, 1] == asked
        assert world.intact()

    def test_in_any_order(self):
        """The order of the pages is the caller's."""
        world = two_nodes(5)

        assert [0, 0, 0] == to_node_1(world, 4, 0, 2)

        assert [1, 0, 1, 0, 1] == nodes(world)
        assert world.intact()

    def test_no_pages(self):
        """There may be none."""
        mem = two_nodes(1).machine.mem

        assert 0 == migrate_pages(mem, NO_PAGES, alloc_migration_target(mem, 1)).size


class TestEvent:
    def test_fields(self):
        """It names the pages as they were, and what became of each."""
        world, seen = two_nodes(2), []
        world.pin(1)
        old = world.pfns().tolist()
        with trace.listen(lambda _, fields: seen.append(fields), "mm_migrate_pages"):
            to_node_1(world)

        (fields,) = seen
        assert (old, [0, -errno.EAGAIN]) == (fields["pfns"].tolist(), fields["status"].tolist())


class TestPutbackMovablePages:
    def test_as_before(self):
        """What was isolated is on its list again, and counted there."""
        world = two_nodes(3)
        lru_add_drain_all(world.machine.mem)
        with world.machine.vmstat.counting() as delta:
            mem, pfns = isolated(world)
            assert 3 == mem.vmstat["nr_isolated_anon"]
            putback_movable_pages(mem, pfns)

        assert {} == delta


class TestAllocMigrationTarget:
    def test_no_other_node(self):
        """When the node is full there are no more pages."""
        world = two_nodes(1, nodes=("16MiB", "1MiB"))
        mem = world.machine.mem

        pfns = alloc_migration_target(mem, 1)(np.arange(1000))

        assert {1} == set(mem.page_to_nid(pfns).tolist())
        assert pfns.size < 256
        put_page(mem, pfns)


class TestReaders:
    def test_of_a_file(self):
        """Who reads a file while its pages move finds what is in them, locked or not."""

        def scenario(together):
            world = two_nodes(1, nodes=("2MiB", "2MiB"))
            mem, data = world.machine.mem, bytes(range(256)) * 32
            file, _ = disk_file(world.machine, data)
            assert data == file.read(0, len(data))
            lru_add_drain_all(mem)
            pfns = file.f_mapping.i_pages.load(np.arange(2))
            assert migrate_page_add(mem, pfns).all()

            _, found = together(
                lambda: migrate_pages(mem, pfns, alloc_migration_target(mem, 1)),
                lambda: file.read(0, len(data)),
            )

            assert data == found

        assert 5 < explore(scenario, preemptions=2)
