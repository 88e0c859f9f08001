"""References to pages, and their way on and off the LRU lists. Linux: mm/swap.c.

A page that should be on a list waits in its CPU's pagevec first, which holds a reference and
hands over 15 at a time. Whoever wants to isolate pages drains the pagevecs before.

Taking a page off a list is one bit (`LruList` says how), so a vector of pages costs no more
than a few passes over its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from mm.errors import KernelBug
from mm.locking import current, preempt
from mm.memcontrol import mem_cgroup_uncharge
from mm.memremap import FREE_REFCOUNT, free_zone_device_page
from mm.mmzone import PAGEVEC_SIZE, Lru, LruList
from mm.page_alloc import free_pages_bulk
from mm.page_flags import (
    PG_active,
    PG_lru,
    PG_mlocked,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
)
from mm.types import MemMap, page_anon
from mm.typing import Indices, Mask, Pfns, Ptes, word
from mm.vectors import (
    add_at,
    chosen,
    distinct,
    every,
    has,
    joined,
    keep_bits,
    places,
    rows,
    some,
    unique,
)

GUP_PIN_COUNTING_BIAS: Final = 1024  # what a pin adds to `refcount`, to be told from references

_LRU_KIND: Final = word(PG_swapbacked | PG_active | PG_unevictable)
_OFF_LISTS: Final = word(~(PG_lru | PG_active | PG_unevictable))
_NOT_LRU: Final = word(~PG_lru)
_NOT_ACTIVE: Final = word(~PG_active)
_EVICTABLE: Final = word(~PG_unevictable)
_UNREFERENCED: Final = word(~PG_referenced)
_ACTIVE_OR_UNEVICTABLE: Final = word(PG_active | PG_unevictable)
_MLOCKED_OR_UNEVICTABLE: Final = word(PG_mlocked | PG_unevictable)
_INACTIVE: Final = word(~(PG_active | PG_referenced))
_LAZYFREE: Final = word(~(PG_active | PG_referenced | PG_swapbacked))
_NOT_FREEABLE: Final = word(PG_swapcache | PG_unevictable)
_SWAPBACKED, _ACTIVE, _UNEVICTABLE = int(PG_swapbacked), int(PG_active), int(PG_unevictable)
_NID_SHIFT: Final = word(32)
_COUNTERS: Final = {lru: f"nr_{lru.name.lower()}" for lru in Lru}


def get_page(mem: MemMap, pfns: Pfns, *, refs: int = 1) -> None:
    """*refs* more references to each of *pfns*, which may repeat. Linux: get_page()."""
    if pfns.size:
        with mem.locks.atomic:
            add_at(mem.refcount, rows(pfns), refs)
            if mem.debug:
                fresh = pfns[(mem.refcount[pfns] == FREE_REFCOUNT + 1) & (pfns >= mem.max_pfn)]
                mem.page_owner[fresh] = current()


def put_page(mem: MemMap, pfns: Pfns, cpu: int = 0, *, refs: int = 1) -> None:
    """*refs* references less to each of *pfns*, which may repeat; frees what nobody holds.

    A ZONE_DEVICE page is free at one reference, not at none, and goes back to its driver.
    Raises KernelBug for a reference that was never taken.
    Linux: put_page(), include/linux/mm.h; __put_page(), mm/swap.c.
    """
    if not pfns.size:
        return
    with mem.locks.atomic:
        which = rows(pfns)
        add_at(mem.refcount, which, -refs)
        left = mem.refcount[which].copy()
    free_at = mem.is_zone_device_page(pfns)
    last = left <= free_at
    if not some(last):
        return
    unused = chosen(pfns, last)
    if some(left < free_at):
        wrong = pfns[left < free_at]
        raise KernelBug(f"put_page: no reference left on {', '.join(map(hex, wrong[:8].tolist()))}")
    if unused.size > 1 and some(unused[1:] <= unused[:-1]):
        unused = np.sort(unused)
        if some(unused[1:] == unused[:-1]):
            unused = np.unique(unused)
    if mem.memcgs:
        mem_cgroup_uncharge(mem, unused)
    system = unused.size
    if unused.item(-1) >= mem.max_pfn:
        system = int(unused.searchsorted(mem.max_pfn))
        free_zone_device_page(mem, unused[system:])
    if system:
        _free_system_pages(mem, unused[:system], cpu)


def page_maybe_dma_pinned(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages that somebody has pinned, who may still store to them at any time.

    Also for one with very many ordinary references. Linux: page_maybe_dma_pinned(), v5.7.
    """
    return mem.refcount[pfns] >= GUP_PIN_COUNTING_BIAS


def _free_system_pages(mem: MemMap, pfns: Pfns, cpu: int) -> None:
    """Off the lists and back to the allocator. Linux: __put_single_page(), mm/swap.c."""
    with mem.locks.atomic:
        which = rows(pfns)
        flags = mem.flags[which]
        listed = has(flags, PG_lru)
        if some(listed):
            _del_from_lru(mem, pfns[listed], flags[listed])
        mem.flags[which] = flags & _OFF_LISTS
        mem.mapping[which] = 0
    free_pages_bulk(mem, pfns, cpu)


def page_lru(flags: int) -> Lru:
    """The list for a page with these *flags*. Linux: page_lru(), include/linux/mm_inline.h."""
    if flags & _UNEVICTABLE:
        return Lru.UNEVICTABLE
    lru = Lru.INACTIVE_ANON if flags & _SWAPBACKED else Lru.INACTIVE_FILE
    return Lru(lru + bool(flags & _ACTIVE))


def _by_list(
    mem: MemMap, pfns: Pfns, flags: Ptes
) -> Iterator[tuple[LruList, str, slice | Indices]]:
    """The lists that *pfns* belong on, with their counters and which of *pfns* go there."""
    kinds = flags & _LRU_KIND
    nids = mem.page_to_nid(pfns) if len(mem.nodes) > 1 else None
    if not every(kinds == kinds[0]) or (nids is not None and some(nids != nids[0])):
        keys = kinds if nids is None else kinds | (nids.astype(np.uint64) << _NID_SHIFT)
        for key in distinct(keys):
            lru = page_lru(key)
            node = mem.nodes[key >> int(_NID_SHIFT)]
            yield node.lruvec[lru], _COUNTERS[lru], places(keys == key)
        return
    lru = page_lru(kinds.item(0))
    node = mem.nodes[0 if nids is None else nids.item(0)]
    yield node.lruvec[lru], _COUNTERS[lru], slice(None)


def lru_cache_add(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Put *pfns* in the CPU's pagevec, on their way to a list. Linux: lru_cache_add()."""
    get_page(mem, pfns)
    _pagevec_add(mem, pfns, cpu)


def lru_cache_add_active(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Put fresh *pfns* on the active list. Linux: lru_cache_add_active_or_unevictable()."""
    with mem.locks.atomic:
        mem.flags[pfns] |= PG_active
    lru_cache_add(mem, pfns, cpu)


def mark_page_accessed(mem: MemMap, pfns: Pfns) -> None:
    """Note a use of *pfns* (distinct) that no page-table entry tells of; the second activates.

    Linux: mark_page_accessed(), mm/swap.c.
    """
    with mem.locks.atomic:
        flags = mem.flags[pfns]
        again = has(flags, PG_referenced) & ~has(flags, _ACTIVE_OR_UNEVICTABLE)
        moves = pfns[again & has(flags, PG_lru)]
        relist_pages(mem, moves, mem.flags[moves] | PG_active)
        mem.flags[pfns[again]] = (flags[again] | PG_active) & _UNREFERENCED
        mem.flags[pfns[~again]] |= PG_referenced
    mem.vmstat.add("pgactivate", moves.size)


def _pagevec_add(mem: MemMap, pfns: Pfns, cpu: int) -> None:
    """Hand a reference to each of *pfns* to the CPU's pagevec. Linux: pagevec_add()."""
    if not pfns.size:
        return
    pagevec = mem.pagevecs[cpu]
    with mem.locks.atomic:
        pagevec.push(pfns)
        full = pagevec.size - pagevec.size % PAGEVEC_SIZE
        if full:
            waiting = pagevec.pop(pagevec.size)
            pagevec.push(waiting[full:])
            _pagevec_lru_add(mem, waiting[:full], cpu)


def lru_add_drain(mem: MemMap, cpu: int = 0) -> None:
    """Hand over what waits in this CPU's pagevecs. Linux: lru_add_drain()."""
    pagevec, lazyfree = mem.pagevecs[cpu], mem.lazyfree_pagevecs[cpu]
    with mem.locks.atomic:
        if pagevec.size:
            _pagevec_lru_add(mem, pagevec.pop(pagevec.size), cpu)
        if lazyfree.size:
            _lru_lazyfree(mem, lazyfree.pop(lazyfree.size), cpu)


def lru_add_drain_all(mem: MemMap) -> None:
    """Hand over what waits in any CPU's pagevec. Linux: lru_add_drain_all()."""
    for cpu in range(len(mem.pagevecs)):
        lru_add_drain(mem, cpu)


def _pagevec_lru_add(mem: MemMap, pfns: Pfns, cpu: int) -> None:
    """Onto the lists, and drop the pagevec's reference; with `atomic` held.

    Linux: __pagevec_lru_add().
    """
    flags = mem.flags[pfns]
    if some(flags & _MLOCKED_OR_UNEVICTABLE):
        flags = _unevictable_if_mlocked(flags)
    _add_to_lru(mem, pfns, flags)
    put_page(mem, pfns, cpu)


def _unevictable_if_mlocked(flags: Ptes) -> Ptes:
    """Which list a page goes to is decided when it gets there. Linux: __pagevec_lru_add_fn()."""
    unevictable = (flags | PG_unevictable) & _NOT_ACTIVE
    return np.where(has(flags, PG_mlocked), unevictable, flags & _EVICTABLE)


def relist_pages(mem: MemMap, pfns: Pfns, flags: Ptes) -> None:
    """Let *pfns*, which are on lists, have *flags*, and be the youngest of the lists these name.

    Called with `atomic` held. Linux: lruvec_del_folio() and lruvec_add_folio(), mm_inline.h, v5.16.
    """
    if pfns.size:
        _del_from_lru(mem, pfns, mem.flags[pfns])
        _add_to_lru(mem, pfns, flags)


def _add_to_lru(mem: MemMap, pfns: Pfns, flags: Ptes) -> None:
    """Onto the lists that *flags* name, as the youngest. Linux: add_page_to_lru_list()."""
    stamps = np.arange(mem.lru_clock, mem.lru_clock + pfns.size)
    mem.lru_clock += pfns.size
    mem.flags[pfns] = flags | PG_lru
    mem.lru_stamp[pfns] = stamps
    for lru, counter, here in _by_list(mem, pfns, flags):
        added = pfns[here]
        _append(mem, lru, added, stamps[here])
        lru.nr_pages += added.size
        mem.vmstat.add(counter, added.size)


def _del_from_lru(mem: MemMap, pfns: Pfns, flags: Ptes) -> None:
    """Account for pages that leave their lists. Linux: del_page_from_lru_list()."""
    for lru, counter, here in _by_list(mem, pfns, flags) if pfns.size else ():
        count = pfns[here].size
        lru.nr_pages -= count
        mem.vmstat.add(counter, -count)


def _append(mem: MemMap, lru: LruList, pfns: Pfns, stamps: Pfns) -> None:
    """Add the youngest items; when the log is full, shed those that no longer count."""
    if lru.size + pfns.size > lru.log.size:
        log, old_stamps = lru.log[lru.first : lru.size], lru.stamps[lru.first : lru.size]
        live = (mem.lru_stamp[log] == old_stamps) & (has(mem.flags[log], PG_lru))
        kept = places(live)
        capacity = max(lru.log.size, 2 * (kept.size + pfns.size))
        lru.log, lru.stamps = (
            np.concatenate((column[kept], np.empty(capacity - kept.size, dtype=np.int64)))
            for column in (log, old_stamps)
        )
        lru.first, lru.size = 0, kept.size
    lru.log[lru.size : lru.size + pfns.size] = pfns
    lru.stamps[lru.size : lru.size + pfns.size] = stamps
    lru.size += pfns.size


def lru_pages(mem: MemMap, lru: LruList) -> Pfns:
    """The pages on *lru*, oldest first, int64[nr_pages]."""
    return _live(mem, lru, lru.first, lru.size)


def _live(mem: MemMap, lru: LruList, start: int, stop: int) -> Pfns:
    """Those of the items [*start*, *stop*) of its log that count."""
    log, stamps = lru.log[start:stop], lru.stamps[start:stop]
    return log[(mem.lru_stamp[log] == stamps) & (has(mem.flags[log], PG_lru))]


def isolate_lru_pages(mem: MemMap, lru: LruList, count: int, among: Mask | None = None) -> Pfns:
    """Take the *count* oldest pages off *lru*, with a reference each; oldest first.

    among: of those control groups alone, by number; what is others' keeps its place.
    Linux: isolate_lru_pages(), mm/vmscan.c.
    """
    with mem.locks.atomic:
        if among is not None:
            oldest = lru_pages(mem, lru)
            oldest = oldest[among[mem.memcg[oldest]]][:count]
            return oldest[_isolate(mem, oldest)]
        parts = []
        while count > 0 and lru.first < lru.size:
            stop = min(lru.first + count, lru.size)
            parts.append(_live(mem, lru, lru.first, stop))
            lru.first = stop
            count -= parts[-1].size
        oldest = joined(parts)
        return oldest[_isolate(mem, oldest)]


def isolate_lru_page(mem: MemMap, pfns: Pfns) -> Mask:
    """Take *pfns* off their lists, with a reference each; False where a page was on none.

    Linux: isolate_lru_page(), mm/vmscan.c.
    """
    preempt("isolate_lru_page")
    return _isolate(mem, pfns)


def _isolate(mem: MemMap, pfns: Pfns) -> Mask:
    """Linux: __isolate_lru_page(), mm/vmscan.c."""
    with mem.locks.atomic:
        which = rows(pfns)
        flags = mem.flags[which]
        # At refcount 0 somebody is about to free it.
        isolated = has(flags, PG_lru) & (mem.refcount[which] > 0)
        taken = chosen(pfns, isolated)
        if some(has(flags, PG_unevictable)):
            mem.mlock_count[taken] = 0  # what it counts is lost off the list
        _del_from_lru(mem, taken, chosen(flags, isolated))
        keep_bits(mem.flags, rows(taken), _NOT_LRU)
        get_page(mem, taken)
    return isolated


def putback_lru_page(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Undo isolate_lru_page(): back on a list, without the reference. Linux: mm/vmscan.c."""
    _pagevec_add(mem, pfns, cpu)  # with the reference that isolation took


def move_pages_to_lru(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Put isolated *pfns* on the lists that their flags name, at once; drops the references.

    Linux: putback_inactive_pages() and move_active_pages_to_lru(), mm/vmscan.c.
    """
    if pfns.size:
        with mem.locks.atomic:
            _pagevec_lru_add(mem, pfns, cpu)


def deactivate_page(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Let those of *pfns* that are active go to the young end of the inactive list (MADV_COLD).

    Unlike Linux v4.20, which has no such advice (v5.4).
    Linux: deactivate_page() and lru_deactivate_fn(), mm/swap.c, v5.4.
    """
    lru_add_drain(mem, cpu)
    with mem.locks.atomic:
        flags = mem.flags[pfns]
        active = pfns[has(flags, PG_active) & has(flags, PG_lru) & ~has(flags, PG_unevictable)]
        active = active[_isolate(mem, active)]
        mem.flags[active] &= _INACTIVE
        move_pages_to_lru(mem, active, cpu)
    mem.vmstat.add("pgdeactivate", active.size)


def mark_page_lazyfree(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """The process can do without the contents of *pfns* (MADV_FREE), unless it stores to them.

    Reclaim may drop them as long as they stay clean: the caller has cleaned their entries. They
    wait in a pagevec first. Linux: mark_page_lazyfree(), mm/swap.c.
    """
    with mem.locks.atomic:
        pfns = pfns[_can_be_freed(mem, pfns)]
        get_page(mem, pfns)
        pagevec = mem.lazyfree_pagevecs[cpu]
        pagevec.push(pfns)
        full = pagevec.size - pagevec.size % PAGEVEC_SIZE
        if full:
            waiting = pagevec.pop(pagevec.size)
            pagevec.push(waiting[full:])
            _lru_lazyfree(mem, waiting[:full], cpu)


def _can_be_freed(mem: MemMap, pfns: Pfns) -> Mask:
    flags = mem.flags[pfns]
    kept_in_swap = has(flags, PG_swapbacked) & ~has(flags, _NOT_FREEABLE)
    return kept_in_swap & has(flags, PG_lru) & page_anon(mem, pfns)


def _lru_lazyfree(mem: MemMap, pfns: Pfns, cpu: int) -> None:
    """Onto the inactive list of files, where reclaim looks first; with `atomic` held.

    Linux: lru_lazyfree_fn(), mm/swap.c.
    """
    freeable = unique(pfns[_can_be_freed(mem, pfns)])
    _isolate(mem, freeable)  # the pagevec holds them
    mem.flags[freeable] &= _LAZYFREE
    move_pages_to_lru(mem, freeable, cpu)
    mem.vmstat.add("pglazyfree", freeable.size)
    put_page(mem, pfns, cpu)
