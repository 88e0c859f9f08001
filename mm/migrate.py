"""One page takes the place of another. Linux: mm/migrate.c, the part below migrate_vma().

What a device migration and a move between nodes have in common: migrate_page(), by which the
state of struct page goes from old to new, under both page locks, when nobody else holds a
reference. Around it, for a move between nodes:

    isolate    migrate_page_add     the caller takes pages off their LRU lists, or
               isolate_movable_page from the drivers that have them
    try        unmap_and_move       lock, unmap, migrate_page and copy, map again
    try again  migrate_pages        up to ten times, then the page stays where it is
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from mm.buffer import try_to_release_page
from mm.filemap import lock_new_page, lock_page, trylock_page, unlock_page, wait_on_page_locked
from mm.gfp import GFP_HIGHUSER_MOVABLE, Gfp
from mm.highmem import copy_highpages
from mm.locking import cond_resched, current, preempt
from mm.memcontrol import mem_cgroup_migrate
from mm.migration_ptes import remove_migration_ptes
from mm.movable import (
    clear_page_isolated,
    move_movable_page,
    page_has_driver,
    putback_movable_page,
)
from mm.page_alloc import alloc_pages_bulk
from mm.page_cache import by_mapping, page_in_cache, replace_in_page_cache
from mm.page_flags import (
    PG_active,
    PG_anon_exclusive,
    PG_dirty,
    PG_private,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
    PG_uptodate,
    PG_workingset,
    PG_writeback,
)
from mm.rmap import try_to_unmap
from mm.sched import current_task
from mm.swap import get_page, isolate_lru_page, lru_add_drain, put_page, putback_lru_page
from mm.swap_state import replace_in_swap_cache
from mm.swapfile import try_to_free_swap
from mm.trace import TracePoint
from mm.types import AddressSpace, MemMap, page_movable
from mm.typing import Errnos, Mask, Pfns, word
from mm.vectors import every, has, keep_bits, places, rows, some
from mm.writeback import wait_on_page_writeback

# Gives a frame for each page that is to move; for the first of them only, where memory is short.
NewPages: TypeAlias = Callable[[Pfns], Pfns]
# Takes a reference to each page that has moved, and the CPU: put_page(), or who keeps the pages.
PutPages: TypeAlias = Callable[[MemMap, Pfns, int], None]

NR_MAX_BATCHED_MIGRATION: Final = 1 << 13  # pages on their way at a time; 512 since v6.3
NR_MAX_MIGRATE_PAGES_RETRY: Final = 10
NR_MAX_MIGRATE_ASYNC_RETRY: Final = 3  # of them, that pass over a locked page

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
_ONE: Final = np.array(1, dtype=np.int32)
_NOT_PRIVATE: Final = word(~PG_private)
_KEPT_FLAGS: Final = word(~(PG_active | PG_unevictable))

mm_migrate_pages: Final = TracePoint("mm_migrate_pages")


def migrate_page_move_mapping(mem: MemMap, new: Pfns, old: Pfns) -> Errnos:
    """Let new[i] belong where old[i] does; 0, or -EAGAIN where somebody else holds old[i].

    All pages are locked and unmapped. The references that may be there: one of the caller's, the
    one that every ZONE_DEVICE page has, and that of the page cache or the swap cache, where new[i]
    takes the place of old[i] too. Device memory is not in the swap cache: there a page moves once
    no swap entry needs its slot. Unlike Linux v4.20, which never moves it there (v5.18 does so).
    Linux: migrate_page_move_mapping(), mm/migrate.c.
    """
    preempt("migrate_page_move_mapping")
    with mem.locks.atomic:
        cached = has(mem.flags[rows(old)], PG_swapcache)
        besides = mem.is_zone_device_page(old).view(np.int8) + cached.view(np.int8)
        filed = page_in_cache(mem, old) if mem.mappings else None
        if filed is not None:
            besides += filed.view(np.int8) + has(mem.flags[old], PG_private).view(np.int8)
        alone = mem.refcount[rows(old)] - besides == _ONE
        if some(cached):
            alone[alone] = _leave_swap_cache(mem, new[alone], old[alone])
        status = np.zeros(old.size, dtype=np.int32)
        if not every(alone):
            status[~alone] = -errno.EAGAIN
            old, new = old[alone], new[alone]
        moved_old, moved_new = rows(old), rows(new)
        mem.index[moved_new] = mem.index[moved_old]
        mem.mapping[moved_new] = mem.mapping[moved_old]
        if filed is not None:
            filed = filed[alone]
            replace_in_page_cache(mem, new[filed], old[filed])
    return status


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
    with mem.locks.atomic:
        left = rows(old)
        mem.flags[rows(new)] |= mem.flags[left] & _MOVED_FLAGS
        keep_bits(mem.flags, left, _KEPT_FLAGS)
    if mem.memcgs:
        mem_cgroup_migrate(mem, old, new)


def migrate_page_copy(mem: MemMap, new: Pfns, old: Pfns) -> None:
    """Copy contents and state of old[i] to new[i], which says that it is up to date when it is.

    Who reads a file finds new[i] by then, and need not lock it. Linux: migrate_page_copy().
    """
    preempt("migrate_page_copy")
    if mem.payload is not None:
        copy_highpages(mem.payload, new, mem.payload, old)
    migrate_page_states(mem, new, old)


def migrate_page(mem: MemMap, new: Pfns, old: Pfns, *, copy: bool = False) -> Errnos:
    """Move the state of *old* to *new*, or *copy* the contents too: 0 or -EAGAIN for each.

    Linux: migrate_page(), without *copy* that with MIGRATE_SYNC_NO_COPY, mm/migrate.c.
    """
    status = migrate_page_move_mapping(mem, new, old)
    if some(status):
        moved = status == 0
        new, old = new[moved], old[moved]
    if copy:
        migrate_page_copy(mem, new, old)
    else:
        migrate_page_states(mem, new, old)
    return status


def migrate_file_page(mapping: AddressSpace, new: Pfns, old: Pfns) -> Errnos:
    """migrate_page() for files whose pages are no more than what is in them.

    Linux: migrate_page() as a_ops->migratepage, mm/migrate.c.
    """
    return migrate_page(mapping.mem, new, old, copy=True)


def move_to_new_page(mem: MemMap, new: Pfns, old: Pfns, status: Errnos) -> None:
    """Let new[i] take the place of old[i], in the way of its file or driver if it has its own.

    *status*: -EAGAIN for each at first; what has moved by then if one of them raises.
    Linux: move_to_new_page(), mm/migrate.c.
    """
    plain = np.ones(old.size, dtype=np.bool_)
    if mem.mappings:
        movable = page_movable(mem, old)
        if some(movable):
            status[movable] = move_movable_page(mem, new[movable], old[movable])
            plain = ~movable
        for mapping, mine in by_mapping(mem, old):
            here = np.isin(old, mine)
            migratepage = mapping.a_ops.migratepage or fallback_migrate_page
            status[here] = migratepage(mapping, new[here], old[here])
            plain &= ~here
    status[plain] = migrate_page(mem, new[plain], old[plain], copy=True)


def buffer_migrate_page(mapping: AddressSpace, new: Pfns, old: Pfns) -> Errnos:
    """As migrate_page(), of pages whose buffers go with them.

    Linux: buffer_migrate_page(), mm/migrate.c.
    """
    mem = mapping.mem
    status = migrate_page_move_mapping(mem, new, old)
    moved = status == 0
    new, old = new[moved], old[moved]
    private = has(mem.flags[old], PG_private)
    to, frm = new[private], old[private]
    with mem.locks.atomic:
        rows = mem.private[frm]
        mem.buffers.b_page[rows] = to
        mem.private[to], mem.private[frm] = rows, 0
        mem.flags[to] |= PG_private
        mem.flags[frm] &= _NOT_PRIVATE
        get_page(mem, to)
    put_page(mem, frm)
    migrate_page_copy(mem, new, old)
    return status


def fallback_migrate_page(mapping: AddressSpace, new: Pfns, old: Pfns) -> Errnos:
    """Move pages of a file that does not say how: clean ones, without what it knows of them.

    A dirty one is written first, and its turn comes with the next attempt.
    Linux: fallback_migrate_page(), mm/migrate.c.
    """
    mem, status = mapping.mem, np.full(old.size, -errno.EAGAIN, dtype=np.int32)
    dirty = has(mem.flags[old], PG_dirty)
    if some(dirty):
        status[dirty] = writeout(mapping, old[dirty])
    clean = ~dirty
    private = clean & has(mem.flags[old], PG_private)
    clean[private] = try_to_release_page(mapping, old[private])
    status[clean] = migrate_page(mem, new[clean], old[clean], copy=True)
    return status


def writeout(mapping: AddressSpace, pfns: Pfns) -> int:
    """Have dirty *pfns* written, which are mapped again for that; always a negative errno.

    -EAGAIN: they may be clean soon; -EINVAL where the file cannot write pages. Unlike Linux v4.20,
    where one that could not be written stays at once (EIO), it is tried again: of such errors the
    file tells who has it open. Linux: writeout(), mm/migrate.c.
    """
    if mapping.a_ops.writepage is None:
        return -errno.EINVAL
    remove_migration_ptes(mapping.mem, pfns, pfns)
    mapping.a_ops.writepage(mapping, pfns)
    return -errno.EAGAIN


def migration_entry_wait(mem: MemMap, pfns: Pfns) -> None:
    """Sleep until each of *pfns*, found in migration entries, is where it will be.

    Raises Deadlock where this thread migrates them itself. Linux: migration_entry_wait().
    """
    for pfn in pfns.tolist():
        wait_on_page_locked(mem, pfn)


# Between nodes ----------------------------------------------------------------------------------


def migrate_page_add(mem: MemMap, pfns: Pfns) -> Mask:
    """Take *pfns* (distinct) off their lists, to migrate them; False where a page is on none.

    Linux: migrate_page_add(), mm/mempolicy.c.
    """
    isolated = isolate_lru_page(mem, pfns)
    _count_isolated(mem, pfns[isolated], 1)
    return isolated


def _count_isolated(mem: MemMap, pfns: Pfns, sign: int) -> None:
    """Linux: mod_node_page_state() of NR_ISOLATED_ANON and NR_ISOLATED_FILE."""
    filed = int(np.count_nonzero(_of_files(mem, pfns))) if mem.mappings else 0
    mem.vmstat.add("nr_isolated_file", sign * filed)
    mem.vmstat.add("nr_isolated_anon", sign * (pfns.size - filed))


def _movable(mem: MemMap, pfns: Pfns) -> Mask | None:
    """page_movable(), or None where no page is."""
    if mem.mappings:
        movable = page_movable(mem, pfns)
        if some(movable):
            return movable
    return None


def _of_files(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages of files on disk."""
    return page_in_cache(mem, pfns) & ~has(mem.flags[pfns], PG_swapbacked)


def alloc_migration_target(mem: MemMap, nid: int) -> NewPages:
    """Frames of *nid* and no other node. Linux: alloc_migration_target(), mm/migrate.c, v5.9."""

    def get_new_pages(pfns: Pfns) -> Pfns:
        gfp = GFP_HIGHUSER_MOVABLE | Gfp.THISNODE
        return alloc_pages_bulk(mem, gfp, nid, pfns.size, current_task().cpu)

    return get_new_pages


def putback_movable_pages(mem: MemMap, pfns: Pfns) -> None:
    """Undo migrate_page_add() and isolate_movable_page(), each of its pages.

    Linux: putback_movable_pages(), mm/migrate.c.
    """
    cpu = current_task().cpu
    movable = _movable(mem, pfns)
    if movable is not None:
        _putback_to_drivers(mem, pfns[movable], cpu)
        pfns = pfns[~movable]
    _count_isolated(mem, pfns, -1)
    putback_lru_page(mem, pfns, cpu)
    lru_add_drain(mem, cpu)


def _putback_to_drivers(mem: MemMap, pfns: Pfns, cpu: int) -> None:
    """putback_movable_pages() of movable *pfns*; what this thread has locked stays so."""
    ours = pfns[mem.lock_owner[pfns] != current()]
    lock_page(mem, ours)
    try:
        kept = page_has_driver(mem, pfns)
        putback_movable_page(mem, pfns[kept])
        clear_page_isolated(mem, pfns[~kept])
    finally:
        unlock_page(mem, ours)
        put_page(mem, pfns, cpu)


def migrate_pages(
    mem: MemMap, pfns: Pfns, get_new_pages: NewPages, put_old_pages: PutPages = put_page
) -> Errnos:
    """Let new pages take the place of *pfns*, which the caller has isolated; 0 for each that moved.

    They may be pages of LRU lists and of drivers, mixed. -EAGAIN: it stays, for at each of ten
    attempts somebody held it or had it locked, or it was on its way to disk. -EINVAL: its file can
    do nothing about its being dirty. -ENOMEM: frames ran out at this page or before its turn.
    Others: what its driver says. What moved is freed, or *put_old_pages* has it; what stays is on
    its list, or its driver has it, again. So it is where a driver, or a listener on an address
    space, raises: then the pages that were under way stay.

    Unlike Linux v4.20, what waits for another attempt when frames run out counts as failed too (as
    since 6.1). Linux: migrate_pages(), mm/migrate.c.
    """
    status = np.full(pfns.size, -errno.ENOMEM, dtype=np.int32)
    filed = _of_files(mem, pfns) if mem.mappings else np.zeros(pfns.size, dtype=np.bool_)
    movable = _movable(mem, pfns)
    try:
        for first in range(0, pfns.size, NR_MAX_BATCHED_MIGRATION):
            batch = slice(first, first + NR_MAX_BATCHED_MIGRATION)
            mine = pfns[batch], status[batch]
            if not _migrate_pages_batch(mem, *mine, get_new_pages, put_old_pages):
                break
    finally:
        putback_movable_pages(mem, pfns[status != 0])
        moved = int(np.count_nonzero(status == 0))
        stuck = pfns.size - moved - int(np.count_nonzero(status == -errno.ENOMEM))
        short = moved + stuck < pfns.size  # of those that got no frame, the first was tried
        moved_files = int(np.count_nonzero(filed & (status == 0)))
        of_drivers = 0 if movable is None else int(np.count_nonzero(movable & (status == 0)))
        mem.vmstat.add("nr_isolated_file", -moved_files)
        mem.vmstat.add("nr_isolated_anon", moved_files + of_drivers - moved)
        mem.vmstat.add("pgmigrate_success", moved)
        mem.vmstat.add("pgmigrate_fail", stuck + short)
        if mm_migrate_pages:
            mm_migrate_pages(pfns=pfns, status=status)
    return status


def _migrate_pages_batch(
    mem: MemMap, pfns: Pfns, status: Errnos, get_new_pages: NewPages, put_old_pages: PutPages
) -> bool:
    """Try until *pfns* have moved or it is no use; False where frames run out.

    Linux: migrate_pages_batch() and migrate_pages_sync(), mm/migrate.c, v6.3.
    """
    status[:] = -errno.EAGAIN
    for attempt in range(NR_MAX_MIGRATE_PAGES_RETRY):
        left = places(status == -errno.EAGAIN)
        if not left.size:
            break
        if attempt:
            cond_resched()
        wait = attempt >= NR_MAX_MIGRATE_ASYNC_RETRY
        tried = status[left]
        try:
            unmap_and_move(mem, pfns[left], tried, get_new_pages, put_old_pages, wait=wait)
        finally:
            status[left] = tried
        if some(status == -errno.ENOMEM):
            return False
    return True


def unmap_and_move(
    mem: MemMap,
    pfns: Pfns,
    status: Errnos,
    get_new_pages: NewPages,
    put_old_pages: PutPages,
    *,
    wait: bool,
) -> None:
    """Attempt to move isolated *pfns*, once.

    *status*, -EAGAIN at first, becomes 0 where a page has moved and *put_old_pages* has it, also
    if this raises. It stays for those that somebody else holds or, unless we are to *wait*, has
    locked; -ENOMEM: no frame was left for it. They are as before. Raises Deadlock where this
    thread has locked what it is to wait for.

    Unlike Linux v4.20, which asks the new page whether it goes to an LRU list, when its driver may
    have let go of it, we go by what the old page was (as since 5.0).
    Linux: unmap_and_move(), mm/migrate.c.
    """
    if wait:
        _lock_written_pages(mem, pfns)
        at = np.arange(pfns.size)
    else:
        at = places(trylock_page(mem, pfns))
        if mem.vmstat["nr_writeback"]:
            under_way = has(mem.flags[pfns[at]], PG_writeback)
            unlock_page(mem, pfns[at[under_way]])
            at = at[~under_way]
    try:
        new = get_new_pages(pfns[at])
    except BaseException:
        unlock_page(mem, pfns[at])
        raise
    at, short = at[: new.size], at[new.size :]
    status[short] = -errno.ENOMEM
    unlock_page(mem, pfns[short])

    old = pfns[at]
    lock_new_page(mem, new)
    movable = _movable(mem, old)
    tried = status[at]
    try:
        try_to_unmap(mem, old)
        move_to_new_page(mem, new, old, tried)
    finally:
        status[at] = tried
        moved = tried == 0
        listed = moved if movable is None else moved & ~movable
        remove_migration_ptes(mem, old, np.where(listed, new, old))
        _release(mem, old, new, moved, listed, put_old_pages)


def _lock_written_pages(mem: MemMap, pfns: Pfns) -> None:
    """Lock *pfns*, which are not on their way to disk then; or raise Deadlock."""
    lock_page(mem, pfns)
    try:
        wait_on_page_writeback(mem, pfns)
    except BaseException:
        unlock_page(mem, pfns)
        raise


def _release(
    mem: MemMap, old: Pfns, new: Pfns, moved: Mask, listed: Mask, put_old_pages: PutPages
) -> None:
    """Unlock both; put new[i] on a list where it shall be *listed*, and let go of the others.

    The locks go first: ours may be the last reference, if others have unmapped the page.
    """
    cpu = current_task().cpu
    unlock_page(mem, new)
    unlock_page(mem, old)
    putback_lru_page(mem, new[listed], cpu)
    lru_add_drain(mem, cpu)
    put_page(mem, new[~listed], cpu)
    put_old_pages(mem, old[moved], cpu)
