"""One page takes the place of another, page by page in Python beside it."""

import errno
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import Machine
from mm.errors import Deadlock
from mm.filemap import trylock_page, unlock_page
from mm.gfp import GFP_KERNEL
from mm.migrate import (
    migrate_page,
    migrate_page_move_mapping,
    migrate_page_states,
    migration_entry_wait,
)
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
from mm.swap import put_page
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
