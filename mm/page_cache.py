"""The page cache: the pages of files that are in memory. Linux: mm/filemap.c.

A page is in the cache of one file, at one place of `i_pages`, which holds a reference; its
`mapping` is the number of the cache and `index` its place. It enters and leaves locked, so that
who has the page lock of a page that is in the cache can rely on that. All of a vector of pages
enter, leave or are found in one go.

What is dirty differs from what is stored. A file on disk has the tag PAGECACHE_TAG_DIRTY where its
pages are, so that writeback finds them; one that swap is the home of has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from mm.errors import KernelBug
from mm.filemap import lock_new_page, lock_page, unlock_page
from mm.fs import PAGECACHE_TAG_DIRTY
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.memcontrol import mem_cgroup_try_charge
from mm.page_flags import PG_dirty, PG_swapbacked
from mm.sched import current_task
from mm.swap import get_page, lru_cache_add, put_page
from mm.types import PAGE_MAPPING_FLAGS, AddressSpace, MemMap, MmStruct
from mm.typing import Indices, Mask, Pfns, number, word
from mm.vectors import distinct, every, has, rows, set_bits, some
from mm.workingset import workingset_refault
from mm.xarray import Entries, xa_is_value, xa_mk_value, xa_to_value

_FLAGS: Final = number(PAGE_MAPPING_FLAGS)
_CLEAN: Final = word(~PG_dirty)


def page_in_cache(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages of the page cache, whose count it raises by one.

    Linux: page_mapping(), mm/util.c, of pages that are not in the swap cache.
    """
    owners = mem.mapping[pfns]
    return (owners != 0) & ((owners & _FLAGS) == 0)


def by_mapping(mem: MemMap, pfns: Pfns) -> Iterator[tuple[AddressSpace, Pfns]]:
    """The page caches that *pfns* are in, each with those of them; others are left out."""
    owners = mem.mapping[pfns]
    for owner in distinct(owners) if pfns.size else ():
        if owner and not owner & PAGE_MAPPING_FLAGS:
            yield mem.mappings[owner >> 2], pfns[owners == owner]


# Find -------------------------------------------------------------------------------------------


def find_get_pages(mapping: AddressSpace, indexes: Indices) -> Pfns:
    """The page at each of *indexes*, with a reference; -1 where none is.

    Linux: find_get_page(), include/linux/pagemap.h.
    """
    with mapping.mem.locks.atomic:
        pfns = mapping.i_pages.load(indexes)
        there = pfns > 0
        if every(there):
            get_page(mapping.mem, pfns)
            return pfns
        get_page(mapping.mem, pfns[there])
    return np.where(there, pfns, -1)


def find_lock_pages(mapping: AddressSpace, indexes: Indices) -> Pfns:
    """As find_get_pages(), with the page lock of each, for which it waits.

    Raises Deadlock where this thread has one. Linux: find_lock_page(), linux/pagemap.h.
    """
    mem = mapping.mem
    while True:
        found = find_get_pages(mapping, indexes)
        there = found >= 0
        pfns = found if every(there) else found[there]
        try:
            lock_page(mem, pfns)
        except BaseException:
            put_page(mem, pfns)
            raise
        if every(pages_at(mapping, pfns, indexes[there])):
            return found
        unlock_page(mem, pfns)  # some went while we slept, and others may have come
        put_page(mem, pfns)


def pages_at(mapping: AddressSpace, pfns: Pfns, indexes: Indices) -> Mask:
    """True where pfns[i], locked, is at indexes[i] of the cache still.

    Linux: the checks after lock_page_or_retry() in filemap_fault(), mm/filemap.c.
    """
    mem = mapping.mem
    return (mem.mapping[pfns] == mapping.number << 2) & (mem.index[pfns] == indexes)


# Enter and leave --------------------------------------------------------------------------------


def charge_cache_pages(
    mem: MemMap, frames: Pfns, mm: MmStruct | None, gfp: int = GFP_HIGHUSER_MOVABLE
) -> Pfns:
    """Those of fresh *frames*, for a cache, that the group of *mm* has room for; the first ones.

    The others are freed. Linux: mem_cgroup_try_charge() in __add_to_page_cache_locked() and
    shmem_getpage_gfp(), mm/filemap.c, mm/shmem.c.
    """
    if mm is None or mm.memcg is None:
        return frames
    may = mem_cgroup_try_charge(mm, frames, gfp)
    put_page(mem, frames[~may], current_task().cpu)
    return frames[may]


def page_cache_store(
    mapping: AddressSpace, pfns: Pfns, indexes: Indices, expected: Entries | int
) -> Mask:
    """Let locked *pfns* be the pages at *indexes* (distinct), where the entries are *expected*.

    False where they are not. Linux: shmem_add_to_page_cache(), mm/shmem.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        free = mapping.i_pages.load(indexes) == expected
        if not every(free):
            pfns, indexes = pfns[free], indexes[free]
        if pfns.size:
            get_page(mem, pfns)
            mem.mapping[rows(pfns)] = mapping.number << 2
            mem.index[rows(pfns)] = indexes
            mapping.i_pages.store(indexes, pfns)
            _count_file_pages(mem, pfns, 1)
    return free


def add_to_page_cache_lru(mapping: AddressSpace, pfns: Pfns, indexes: Indices) -> Mask:
    """Let fresh *pfns* be the pages at *indexes* (distinct), locked, on their way to an LRU list.

    False where there is a page already. A value is the shadow of a page that was there before, and
    is heeded. Linux: add_to_page_cache_lru(), mm/filemap.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        old = mapping.i_pages.load(indexes)
        added = old <= 0
        mine = pfns if every(added) else pfns[added]
        lock_new_page(mem, mine)
        page_cache_store(mapping, mine, indexes[added], old[added])
        shadowed = added & xa_is_value(old)
        if some(shadowed):
            workingset_refault(mem, pfns[shadowed], xa_to_value(old[shadowed]))
    lru_cache_add(mem, mine, current_task().cpu)
    return added


def _count_file_pages(mem: MemMap, pfns: Pfns, sign: int) -> None:
    mem.vmstat.add("nr_file_pages", sign * pfns.size)
    if has(mem.flags[pfns[:1]], PG_swapbacked).item():  # pages of one file are of one kind
        mem.vmstat.add("nr_shmem", sign * pfns.size)


def delete_from_page_cache(mem: MemMap, pfns: Pfns, shadows: Indices | None = None) -> None:
    """Take locked *pfns*, which nothing maps, out of their caches, and drop the references.

    In the place of each comes one of *shadows*, where they are given. What was dirty is lost.
    Linux: delete_from_page_cache(), mm/filemap.c.
    """
    owners = mem.mapping[pfns]
    for mapping, mine in by_mapping(mem, pfns):
        here = owners == mapping.number << 2
        entries = None if shadows is None else xa_mk_value(shadows[here])
        page_cache_delete(mapping, mine, entries)
        put_page(mem, mine)


def page_cache_delete(mapping: AddressSpace, pfns: Pfns, entries: Entries | None = None) -> None:
    """Take locked *pfns* out of *mapping*; the caller has the references of the cache then.

    *entries*: what comes in their places. Linux: __delete_from_page_cache(), mm/filemap.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        indexes = mem.index[pfns]
        if not every(mapping.i_pages.load(indexes) == pfns):
            raise KernelBug(f"page {pfns[0]:#x} or one after it is not where its index says")
        if some(mem.mapcount[pfns]):
            raise KernelBug(f"page {pfns[0]:#x} or one after it leaves the page cache mapped")
        cancel_dirty_page(mapping, pfns)
        mapping.i_pages.erase(indexes)
        if entries is not None:
            mapping.i_pages.store(indexes, entries)
        mem.mapping[rows(pfns)] = 0
        _count_file_pages(mem, pfns, -1)


def replace_in_page_cache(mem: MemMap, new: Pfns, old: Pfns) -> None:
    """Let new[i] be where old[i] is in its cache, as a migration needs; both are locked.

    Linux: migrate_page_move_mapping(), mm/migrate.c, of pages with a mapping.
    """
    with mem.locks.atomic:
        get_page(mem, new)
        for mapping, mine in by_mapping(mem, old):
            indexes = mem.index[mine]
            mapping.i_pages.store(indexes, new[mem.mapping[old] == mapping.number << 2])
        for column in (mem.mapping, mem.index):
            column[new] = column[old]
        mem.mapping[old] = 0
    put_page(mem, old)


# Dirty ------------------------------------------------------------------------------------------


def set_page_dirty(mem: MemMap, pfns: Pfns) -> None:
    """Say that *pfns* differ from what is stored of them, in swap or on disk.

    Linux: set_page_dirty(), mm/page-writeback.c.
    """
    if mem.mappings:
        filed = page_in_cache(mem, pfns)
        if some(filed):
            for mapping, mine in by_mapping(mem, pfns[filed]):
                (mapping.a_ops.set_page_dirty or set_page_dirty_nobuffers)(mapping, mine)
            pfns = pfns[~filed]
    with mem.locks.atomic:
        set_bits(mem.flags, rows(pfns), PG_dirty)


def set_page_dirty_no_writeback(mapping: AddressSpace, pfns: Pfns) -> None:
    """For a file that has no other home than swap. Linux: __set_page_dirty_no_writeback()."""
    mem = mapping.mem
    with mem.locks.atomic:
        mem.flags[pfns] |= PG_dirty


def set_page_dirty_nobuffers(mapping: AddressSpace, pfns: Pfns) -> None:
    """For a file on disk: writeback will find *pfns* by their tag.

    Linux: __set_page_dirty_nobuffers(), mm/page-writeback.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        here = pfns[mem.mapping[pfns] == mapping.number << 2]  # else truncated meanwhile
        indexes = mem.index[here]
        tagged = mapping.i_pages.get_mark(indexes, PAGECACHE_TAG_DIRTY)
        mem.flags[pfns] |= PG_dirty
        mapping.i_pages.set_mark(indexes[~tagged], PAGECACHE_TAG_DIRTY)
        fresh = tagged.size - int(np.count_nonzero(tagged))
    mem.vmstat.add("nr_dirty", fresh)
    mem.vmstat.add("nr_dirtied", fresh)


def cancel_dirty_page(mapping: AddressSpace, pfns: Pfns) -> None:
    """Nobody needs what is new in locked *pfns*. Linux: cancel_dirty_page()."""
    mem = mapping.mem
    with mem.locks.atomic:
        if not some(has(mem.flags[pfns], PG_dirty)):
            return
        mem.flags[pfns] &= _CLEAN
        indexes = mem.index[pfns]
        tagged = indexes[mapping.i_pages.get_mark(indexes, PAGECACHE_TAG_DIRTY)]
        mapping.i_pages.clear_mark(tagged, PAGECACHE_TAG_DIRTY)
        mem.vmstat.add("nr_dirty", -tagged.size)
