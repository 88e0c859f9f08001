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
    PG_swapcache,
    PG_unevictable,
    PG_uptodate,
    PG_workingset,
)
from mm.swap_state import replace_in_swap_cache
from mm.swapfile import try_to_free_swap
from mm.types import MemMap
from mm.typing import Mask, Pfns, word
from mm.vectors import every, has, rows, some

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

    All pages are locked and unmapped. The references that may be there: one of the caller's, the
    one that every ZONE_DEVICE page has, and that of the swap cache, where new[i] takes the place
    of old[i] too. Device memory is not in the swap cache: there a page moves once no swap entry
    needs its slot. Unlike Linux v4.20, which never moves it there (v5.18 does so).
    Linux: migrate_page_move_mapping(), mm/migrate.c.
    """
    preempt("migrate_page_move_mapping")
    with mem.locks.atomic:
        cached = has(mem.flags[rows(old)], PG_swapcache)
        expected = 1 + mem.is_zone_device_page(old).view(np.int8) + cached.view(np.int8)
        alone = mem.refcount[rows(old)] == expected
        if some(cached):
            alone[alone] = _leave_swap_cache(mem, new[alone], old[alone])
        if not every(alone):
            old, new = old[alone], new[alone]
        moved_old, moved_new = rows(old), rows(new)
        mem.index[moved_new] = mem.index[moved_old]
        mem.mapping[moved_new] = mem.mapping[moved_old]
    return ~alone * np.int32(-errno.EAGAIN)


def _leave_swap_cache(mem: MemMap, new: Pfns, old: Pfns) -> Mask:
    """Put *new* in the place of *old* in the swap cache; False for what must stay there."""
    cached, device = has(mem.flags[old], PG_swapcache), mem.is_zone_device_page(new)
    leaving = cached & device
    left = ~leaving
    left[leaving] = try_to_free_swap(mem, old[leaving])
    replace_in_swap_cache(mem, new[cached & ~device], old[cached & ~device])
    return left


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
