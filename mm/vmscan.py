"""Reclaim: pages that nobody uses go to swap, and their frames to those who need them.

    who asks        try_to_free_pages   an allocation that found nothing (direct reclaim)
                    balance_pgdat       one that found little (kswapd), up to the high watermarks
                    reclaim_pages       a process, for pages of its own (MADV_PAGEOUT)
                    try_to_free_mem_cgroup_pages    a control group that is full, for its own
    which pages     shrink_node         some of each LRU list, more of it in each round
                    shrink_active_list  the oldest active pages become inactive
    how they go     shrink_page_list    lock, look whether they are used, give a slot, unmap, write,
                                        free; what cannot go is put back

A page starts active. Deactivated it has until the end of the inactive list to be used again, which
the accessed bits of its mappings tell. Kswapd runs in the thread that finds memory low, so that the
same calls reclaim the same pages. Linux: mm/vmscan.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mm.buffer import try_to_release_page
from mm.filemap import trylock_page, unlock_page
from mm.locking import preempt
from mm.mem_cgroup import MemCgroup, mem_cgroup_tree
from mm.memcontrol import mem_cgroup_get_nr_swap_pages, mem_cgroup_swap_full
from mm.mmzone import Lru, Node
from mm.page_alloc import MAX_RECLAIM_RETRIES, drain_all_pages
from mm.page_cache import by_mapping, delete_from_page_cache, page_in_cache
from mm.page_flags import (
    PG_active,
    PG_dirty,
    PG_mlocked,
    PG_private,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_workingset,
    PG_writeback,
)
from mm.page_io import swap_writepage
from mm.rmap import page_mapped, page_referenced, try_to_unmap_to_swap
from mm.swap import (
    isolate_lru_page,
    isolate_lru_pages,
    lru_add_drain_all,
    lru_pages,
    move_pages_to_lru,
    page_maybe_dma_pinned,
    put_page,
)
from mm.swap_slots import vm_swap_full
from mm.swap_state import add_to_swap, delete_from_swap_cache
from mm.swapfile import free_swap_cache, try_to_free_swap
from mm.trace import TracePoint
from mm.types import MemMap, page_anon
from mm.typing import PAGE_SHIFT, Mask, Pfns, word
from mm.vectors import every, has, places, some, unique
from mm.workingset import workingset_eviction

SWAP_CLUSTER_MAX: Final = 32  # pages that reclaim takes at least, once it has begun
DEF_PRIORITY: Final = 12  # the first round looks at 1/4096 of each list, the last at all of it

_INACTIVE: Final = word(~PG_active)
_UNREFERENCED: Final = word(~PG_referenced)
_SWAPBACKED_OR_REFERENCED: Final = word(PG_swapbacked | PG_referenced)

mm_vmscan_lru_shrink_inactive: Final = TracePoint("mm_vmscan_lru_shrink_inactive")


# Who asks ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class ScanControl:
    """What a run of reclaim is to do, and has done. Linux: struct scan_control, mm/vmscan.c."""

    nr_to_reclaim: int
    who: str  # "kswapd" or "direct", which counts; "" counts nothing
    priority: int = DEF_PRIORITY
    nr_reclaimed: int = 0
    memcg: MemCgroup | None = None  # the control group whose pages it is about; None: anybody's
    among: Mask | None = None  # True at the numbers of that group and those in it

    @property
    def missing(self) -> int:
        """Pages that are still to be reclaimed."""
        return self.nr_to_reclaim - self.nr_reclaimed


def kswapd_init(mem: MemMap) -> None:
    """Let the allocator have memory reclaimed when it is short. Linux: kswapd_init()."""
    for node in mem.nodes:
        node.reclaim = partial(try_to_free_pages, mem)
        node.kswapd = partial(balance_pgdat, mem, node)
    mem.memcg_reclaim = partial(try_to_free_mem_cgroup_pages, mem)


def try_to_free_pages(mem: MemMap, nids: list[int], wanted: int) -> int:
    """Reclaim *wanted* pages, or a few more, of the nodes *nids*; how many it were.

    Linux: try_to_free_pages(), mm/vmscan.c.
    """
    sc = ScanControl(max(wanted, SWAP_CLUSTER_MAX), "direct")
    lru_add_drain_all(mem)
    for sc.priority in range(DEF_PRIORITY, -1, -1):
        for nid in nids:
            shrink_node(mem, mem.nodes[nid], sc)
        if sc.missing <= 0:
            break
    return sc.nr_reclaimed


def try_to_free_mem_cgroup_pages(mem: MemMap, memcg: MemCgroup, wanted: int) -> int:
    """Reclaim *wanted* pages, or a few more, of *memcg* and the groups in it; how many it were.

    Linux: try_to_free_mem_cgroup_pages(), mm/vmscan.c.
    """
    sc = ScanControl(max(wanted, SWAP_CLUSTER_MAX), "", memcg=memcg, among=mem_cgroup_tree(memcg))
    lru_add_drain_all(mem)
    # The rounds before would find that no list has so many pages.
    for sc.priority in range(min(DEF_PRIORITY, memcg.memory.usage.bit_length()), -1, -1):
        for node in mem.nodes:
            shrink_node(mem, node, sc)
        if sc.missing <= 0:
            break
    return sc.nr_reclaimed


def balance_pgdat(mem: MemMap, node: Node) -> int:
    """Reclaim pages of *node* until a zone has its high watermark free; how many.

    A node where that was in vain many times is left alone until direct reclaim finds something.
    Linux: balance_pgdat(), mm/vmscan.c, which kswapd runs.
    """
    if node.kswapd_failures >= MAX_RECLAIM_RETRIES or pgdat_balanced(node):
        return 0
    enough = sum(max(zone.watermark[2], SWAP_CLUSTER_MAX) for zone in node.zones)
    reclaimed, sc = 0, ScanControl(enough, "kswapd")
    lru_add_drain_all(mem)
    while sc.priority >= 0 and not pgdat_balanced(node):
        sc.nr_reclaimed = 0
        shrink_node(mem, node, sc)
        drain_all_pages(mem)
        reclaimed += sc.nr_reclaimed
        if sc.missing > 0:
            sc.priority -= 1
    if not reclaimed:
        node.kswapd_failures += 1
    return reclaimed


def pgdat_balanced(node: Node) -> bool:
    """True where some zone of *node* has its high watermark free. Linux: pgdat_balanced()."""
    top = node.zones[-1].name
    return any(
        zone.nr_free >= zone.watermark[2] + zone.lowmem_reserve.get(top, 0) for zone in node.zones
    )


def reclaim_pages(mem: MemMap, pfns: Pfns) -> int:
    """Swap *pfns* out, whether or not they are used (MADV_PAGEOUT); how many frames that freed.

    What is on no LRU list stays, as does what cannot go. Unlike Linux v4.20, which has no such
    advice. Linux: reclaim_pages(), mm/vmscan.c, v5.4.
    """
    lru_add_drain_all(mem)
    pfns = unique(pfns)
    return shrink_page_list(mem, pfns[isolate_lru_page(mem, pfns)], ignore_references=True)


# Which pages ------------------------------------------------------------------------------------


def shrink_node(mem: MemMap, node: Node, sc: ScanControl) -> None:
    """Scan some of each list of *node*, oldest pages first, until enough is reclaimed.

    Linux: shrink_node() and shrink_node_memcg(), mm/vmscan.c.
    """
    before = sc.nr_reclaimed
    nr = get_scan_count(mem, node, sc)
    while some(nr) and sc.missing > 0:
        for lru in (Lru.INACTIVE_FILE, Lru.ACTIVE_FILE, Lru.INACTIVE_ANON, Lru.ACTIVE_ANON):
            batch = min(nr.item(lru), max(SWAP_CLUSTER_MAX, sc.missing))
            if batch:
                nr[lru] -= batch
                shrink_list(mem, node, lru, batch, sc)
    if inactive_list_is_low(mem, node, Lru.INACTIVE_ANON, sc.among):
        shrink_active_list(mem, node, Lru.ACTIVE_ANON, SWAP_CLUSTER_MAX, sc.among)
    if sc.nr_reclaimed > before:
        node.kswapd_failures = 0


def get_scan_count(mem: MemMap, node: Node, sc: ScanControl) -> NDArray[np.int64]:
    """How many pages of each list to scan in this round, int64[lists].

    Anonymous pages are left alone while no slot is free, and while the inactive pages of files
    (those that MADV_FREE gave up, so far) are many. Linux: get_scan_count(), mm/vmscan.c.
    """
    sizes = np.array([lruvec_lru_size(mem, node, lru, sc.among) for lru in Lru])
    nr = sizes >> sc.priority
    nr[Lru.UNEVICTABLE] = 0
    if not mem_cgroup_get_nr_swap_pages(mem, sc.memcg) or (
        nr[Lru.INACTIVE_FILE] and not inactive_list_is_low(mem, node, Lru.INACTIVE_FILE, sc.among)
    ):
        nr[[Lru.INACTIVE_ANON, Lru.ACTIVE_ANON]] = 0
    return nr


def lruvec_lru_size(mem: MemMap, node: Node, lru: Lru, among: Mask | None = None) -> int:
    """Pages on a list: all, or those of the control groups *among*.

    The groups of a node have their lists in common, unlike in Linux.
    Linux: lruvec_lru_size(), mm/vmscan.c.
    """
    if among is None:
        return node.lruvec[lru].nr_pages
    return int(np.count_nonzero(among[mem.memcg[lru_pages(mem, node.lruvec[lru])]]))


def shrink_list(mem: MemMap, node: Node, lru: Lru, nr_to_scan: int, sc: ScanControl) -> None:
    """Scan the oldest *nr_to_scan* pages of one list. Linux: shrink_list(), mm/vmscan.c."""
    if lru in (Lru.ACTIVE_ANON, Lru.ACTIVE_FILE):
        if inactive_list_is_low(mem, node, Lru(lru - 1), sc.among):
            shrink_active_list(mem, node, lru, nr_to_scan, sc.among)
        return
    shrink_inactive_list(mem, node, lru, nr_to_scan, sc)


def inactive_list_is_low(mem: MemMap, node: Node, inactive: Lru, among: Mask | None = None) -> bool:
    """True where the active list is too long for the *inactive* one before it.

    The larger they are, the smaller a share has to be inactive: half of 1 GiB, a quarter of 10.
    Linux: inactive_list_is_low(), mm/vmscan.c.
    """
    if inactive == Lru.INACTIVE_ANON and not mem.swap.pages:
        return False
    few, many = (lruvec_lru_size(mem, node, Lru(lru), among) for lru in (inactive, inactive + 1))
    gigabytes = (few + many) >> (30 - PAGE_SHIFT)
    return few * (isqrt(10 * gigabytes) or 1) < many


def shrink_active_list(
    mem: MemMap, node: Node, lru: Lru, nr_to_scan: int, among: Mask | None = None
) -> None:
    """Move the oldest *nr_to_scan* pages of *lru* to its inactive list, as if never used.

    Linux: shrink_active_list(), mm/vmscan.c.
    """
    preempt("shrink_active_list")
    pfns = isolate_lru_pages(mem, node.lruvec[lru], nr_to_scan, among)
    page_referenced(mem, pfns)
    with mem.locks.atomic:
        mem.flags[pfns] = mem.flags[pfns] & _INACTIVE | PG_workingset
    move_pages_to_lru(mem, pfns)
    mem.vmstat.add("pgdeactivate", pfns.size)


def shrink_inactive_list(
    mem: MemMap, node: Node, lru: Lru, nr_to_scan: int, sc: ScanControl
) -> None:
    """Reclaim what has not been used of the oldest *nr_to_scan* pages of *lru*.

    Linux: shrink_inactive_list(), mm/vmscan.c.
    """
    preempt("shrink_inactive_list")
    pfns = isolate_lru_pages(mem, node.lruvec[lru], nr_to_scan, sc.among)
    nr_reclaimed = shrink_page_list(mem, pfns)
    sc.nr_reclaimed += nr_reclaimed
    if sc.who:
        mem.vmstat.add(f"pgscan_{sc.who}", pfns.size)
        mem.vmstat.add(f"pgsteal_{sc.who}", nr_reclaimed)
    if mm_vmscan_lru_shrink_inactive:
        mm_vmscan_lru_shrink_inactive(
            nid=node.nid, nr_scanned=pfns.size, nr_reclaimed=nr_reclaimed, priority=sc.priority
        )


# How they go ------------------------------------------------------------------------------------


def shrink_page_list(mem: MemMap, pfns: Pfns, *, ignore_references: bool = False) -> int:
    """Reclaim isolated *pfns* (distinct) and drop their references; how many were freed.

    Each step lets some pages go on to the next; the others go back to the lists, those that are
    used to the active ones. With *ignore_references* it does not matter whether they are used.
    Linux: shrink_page_list(), mm/vmscan.c.
    """
    locked = pfns[trylock_page(mem, pfns)]
    going = locked[~has(mem.flags[locked], PG_mlocked)]
    if not ignore_references:
        going = _unreferenced(mem, going)
    if mem.vmstat["nr_writeback"]:
        going = _go_on(mem, going, ~has(mem.flags[going], PG_writeback))
    going = _with_a_slot(mem, going)
    going = _unmapped(mem, going)
    going = pageout(mem, going)
    going = _released(mem, going)
    freed = remove_mapping(mem, going)
    unlock_page(mem, locked)
    kept = pfns if not freed.size else pfns[~np.isin(pfns, freed, assume_unique=True)]
    free_swap_cache(mem, kept)  # whose last mapping or entry has gone meanwhile
    move_pages_to_lru(mem, kept)
    put_page(mem, freed)
    return freed.size


def _activate(mem: MemMap, pfns: Pfns) -> None:
    """Let locked *pfns*, which stay, go back to the active list; swap may be short of their slots.

    Linux: activate_locked in shrink_page_list(), mm/vmscan.c.
    """
    if not pfns.size:
        return
    if vm_swap_full(mem.swap):
        try_to_free_swap(mem, pfns)
    elif mem.memcgs:
        try_to_free_swap(mem, pfns[mem_cgroup_swap_full(mem, pfns)])
    with mem.locks.atomic:
        mem.flags[pfns] |= PG_active
    mem.vmstat.add("pgactivate", pfns.size)


def _go_on(mem: MemMap, pfns: Pfns, may: Mask) -> Pfns:
    """Those of *pfns* that *may*; the others become active."""
    if every(may):
        return pfns
    _activate(mem, pfns[~may])
    return pfns[may]


def _unreferenced(mem: MemMap, pfns: Pfns) -> Pfns:
    """Go on with what was not used since it was deactivated. Linux: page_check_references().

    A page that MADV_FREE gave up must have been used twice to become active; once, and it stays.
    """
    referenced = page_referenced(mem, pfns)
    with mem.locks.atomic:
        flags = mem.flags[pfns]
        activate = referenced & has(flags, _SWAPBACKED_OR_REFERENCED)
        mem.flags[pfns] = flags & _UNREFERENCED | (referenced & ~activate) * PG_referenced
    _activate(mem, pfns[activate])
    return pfns[~referenced]


def _with_a_slot(mem: MemMap, pfns: Pfns) -> Pfns:
    """Go on with what has its place in swap, or needs none; what is pinned stays as it is."""
    flags = mem.flags[pfns]
    homeless = has(flags, PG_swapbacked) & ~has(flags, PG_swapcache)
    if mem.mappings:
        homeless &= page_anon(mem, pfns)
    if not some(homeless):
        return pfns
    pinned = homeless & page_maybe_dma_pinned(mem, pfns)
    pfns, may = pfns[~pinned], ~homeless[~pinned]
    may[~may] = add_to_swap(mem, pfns[~may])
    return _go_on(mem, pfns, may)


def _unmapped(mem: MemMap, pfns: Pfns) -> Pfns:
    """Take all mappings away; go on with what has none left."""
    try_to_unmap_to_swap(mem, pfns)
    return _go_on(mem, pfns, ~page_mapped(mem, pfns))


def pageout(mem: MemMap, pfns: Pfns) -> Pfns:
    """Write what is dirty of *pfns* (locked, unmapped, with a slot); those that may be freed.

    What others hold is not written, as they may change it still; it stays dirty, in the swap
    cache. A page whose write fails stays as well, active. Linux: pageout(), mm/vmscan.c.
    """
    if mem.mappings:
        pfns = _write_files(mem, pfns)
    dirty = has(mem.flags[pfns], PG_dirty) & has(mem.flags[pfns], PG_swapcache)
    if not some(dirty):
        return pfns
    may = ~dirty
    freeable = places(dirty & (mem.refcount[pfns] == 2))  # the cache's and ours
    may[freeable] = try_to_free_swap(mem, pfns[freeable])  # nobody will ask for it any more
    freeable = freeable[~may[freeable]]
    may[freeable] = swap_writepage(mem, pfns[freeable])
    if not every(may[freeable]):
        _activate(mem, pfns[freeable[~may[freeable]]])
    return pfns[may]


def _write_files(mem: MemMap, pfns: Pfns) -> Pfns:
    """Let files write what is dirty of their *pfns*; go on with the others, and what was written.

    What somebody else holds stays. Linux: pageout() of a page with a mapping, mm/vmscan.c.
    """
    dirty = has(mem.flags[pfns], PG_dirty) & page_in_cache(mem, pfns)
    if not some(dirty):
        return pfns
    may = ~dirty
    held = mem.refcount[pfns] - has(mem.flags[pfns], PG_private) > 2  # not the cache's, nor ours
    for mapping, mine in by_mapping(mem, pfns[dirty & ~held]):
        written = np.zeros(mine.size, dtype=np.bool_)
        if mapping.a_ops.writepage is not None:
            written = mapping.a_ops.writepage(mapping, mine)
            may[np.isin(pfns, mine[written])] = True
        _activate(mem, mine[~written & ~has(mem.flags[mine], PG_writeback)])
    return pfns[may]


def _released(mem: MemMap, pfns: Pfns) -> Pfns:
    """Have files let go of what they know of their *pfns*; go on with those that need nothing.

    Linux: shrink_page_list(), about page_has_private().
    """
    may = np.ones(pfns.size, dtype=np.bool_)
    if mem.buffers.in_use:
        private = has(mem.flags[pfns], PG_private)
        for mapping, mine in by_mapping(mem, pfns[private]):
            may[np.isin(pfns, mine[~try_to_release_page(mapping, mine)])] = False
    return _go_on(mem, pfns, may)


def remove_mapping(mem: MemMap, pfns: Pfns) -> Pfns:
    """Take *pfns* (locked, unmapped) out of their caches; those that only the caller holds now.

    A page that somebody else has found or changed meanwhile stays.
    Linux: __remove_mapping(), mm/vmscan.c.
    """
    with mem.locks.atomic:
        flags = mem.flags[pfns]
        cached = has(flags, PG_swapcache)
        filed = page_in_cache(mem, pfns) if mem.mappings else np.zeros_like(cached)
        ours = mem.refcount[pfns] == 1 + (cached | filed)
        ours &= ~((cached | filed) & has(flags, PG_dirty))
        leaving = pfns[ours & cached]
        delete_from_swap_cache(mem, leaving, workingset_eviction(mem, leaving))
        _leave_page_cache(mem, pfns[ours & filed])
        lazyfree = ours & ~cached & ~filed & ~has(flags, PG_swapbacked)
    mem.vmstat.add("pglazyfreed", int(np.count_nonzero(lazyfree)))
    return pfns[ours]


def _leave_page_cache(mem: MemMap, pfns: Pfns) -> None:
    """Take clean *pfns* out of the page cache; a file on disk keeps shadows of its own."""
    if pfns.size:
        swapbacked = has(mem.flags[pfns], PG_swapbacked)
        delete_from_page_cache(mem, pfns[swapbacked])
        filed = pfns[~swapbacked]
        delete_from_page_cache(mem, filed, workingset_eviction(mem, filed))
