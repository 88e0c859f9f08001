"""One page takes the place of another. Linux: mm/migrate.c, the part below migrate_vma().

What a device migration and a move between nodes have in common: the state of struct page goes
from old to new, under both page locks, when nobody else holds a reference.
"""

from __future__ import annotations

import errno
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mm.filemap import wait_on_page_locked
from mm.locking import preempt
from mm.page_flags import (
    PG_active,
    PG_anon_exclusive,
    PG_dirty,
    PG_referenced,
    PG_swapbacked,
    PG_unevictable,
    PG_uptodate,
    PG_workingset,
)
from mm.types import MemMap
from mm.typing import Pfns, word
from mm.vectors import every, rows, some

# What moves with the page, and what the old page loses by it.
_MOVED_FLAGS: Final = word(
    PG_referenced
    | PG_uptodate
    | PG_dirty
    | PG_active
    | PG_workingset
    | PG_unevictable
    | PG_swapbacked
    | PG_anon_exclusive
)
_KEPT_FLAGS: Final = word(~(PG_active | PG_unevictable))


def migrate_page_move_mapping(mem: MemMap, new: Pfns, old: Pfns) -> NDArray[np.int32]:
    """Let new[i] belong where old[i] does; 0, or -EAGAIN where somebody else holds old[i].

    All pages are locked and unmapped. The references that may be there: one of the caller's, and
    the one that every ZONE_DEVICE page has. Linux: migrate_page_move_mapping(), mm/migrate.c.
    """
    preempt("migrate_page_move_mapping")
    with mem.locks.atomic:
        expected = 1 + mem.is_zone_device_page(old).view(np.int8)
        alone = mem.refcount[rows(old)] == expected
        if not every(alone):
            old, new = old[alone], new[alone]
        moved_old, moved_new = rows(old), rows(new)
        mem.index[moved_new] = mem.index[moved_old]
        mem.mapping[moved_new] = mem.mapping[moved_old]
    return ~alone * np.int32(-errno.EAGAIN)


def migrate_page_states(mem: MemMap, new: Pfns, old: Pfns) -> None:
    """Copy what is known about old[i] to new[i]. Linux: migrate_page_states(), mm/migrate.c."""
    to, frm = rows(new), rows(old)
    with mem.locks.atomic:
        mem.flags[to] |= mem.flags[frm] & _MOVED_FLAGS
        mem.flags[frm] &= _KEPT_FLAGS


def migrate_page(mem: MemMap, new: Pfns, old: Pfns) -> NDArray[np.int32]:
    """Move the state of *old* to *new*, contents aside: 0 or -EAGAIN for each.

    Linux: migrate_page() with MIGRATE_SYNC_NO_COPY, mm/migrate.c.
    """
    status = migrate_page_move_mapping(mem, new, old)
    if some(status):
        moved = status == 0
        new, old = new[moved], old[moved]
    migrate_page_states(mem, new, old)
    return status


def migration_entry_wait(mem: MemMap, pfns: Pfns) -> None:
    """Sleep until each of *pfns*, found in migration entries, is where it will be.

    Raises Deadlock where this thread migrates them itself. Linux: migration_entry_wait().
    """
    for pfn in pfns.tolist():
        wait_on_page_locked(mem, pfn)
