"""Whether all of a machine's state fits together: the rules of docs/data-model.md, checked.

Everything is counted again from the page tables, the free lists and the LRU logs, and held
against the columns and counters. Linux has pieces of it: mm/debug.c, CONFIG_DEBUG_VM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from mm.census import Census, Complaints, complain, dirty_in_tables, take_census
from mm.debug_buffer import check_buffers, check_super_blocks, check_writeback
from mm.debug_cache import check_files, check_movable, check_page_cache
from mm.debug_memcg import check_memcgs
from mm.debug_mm import (
    check_anon_vmas,
    check_entries,
    check_notifiers,
    check_tables,
    check_userfaultfds,
    check_vmas,
)
from mm.errors import KernelBug
from mm.memremap import FREE_REFCOUNT
from mm.mmzone import MAX_ORDER, Lru
from mm.movable import page_has_driver
from mm.page_alloc import check_zone, free_blocks, nr_free_pages
from mm.page_flags import (
    FLAG_NAMES,
    PG_active,
    PG_anon_exclusive,
    PG_dirty,
    PG_hwpoison,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_private,
    PG_reserved,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
    PG_uptodate,
    describe_flags,
)
from mm.swap import GUP_PIN_COUNTING_BIAS, page_lru
from mm.swap_slots import SWAP_HAS_CACHE
from mm.types import MemMap, page_anon
from mm.vectors import has

_KNOWN_FLAGS: Final = np.bitwise_or.reduce(list(FLAG_NAMES.values()))


def verify(mem: MemMap) -> None:
    """Raise KernelBug with every rule that does not hold; the word before a colon is a column,
    counter or table."""
    complaints = list(check_tables(mem))
    if not complaints:  # else there is no telling what the tables hold
        census = take_census(mem)
        for check in _CHECKS:
            complaints.extend(check(mem, census))
    if complaints:
        raise KernelBug("\n".join(complaints))


def check_zones(mem: MemMap, census: Census) -> Complaints:
    """Each PFN of a zone says so; free memory is well formed."""
    for zone in mem.zones:
        if zone is None:
            continue
        pfns = np.arange(zone.start_pfn, zone.end_pfn)
        yield from complain("zone", pfns, mem.zone[pfns] != zone.index, "not the zone it lies in")
        if zone.pgmap is None:
            yield from check_zone(mem, zone)
    free = nr_free_pages(mem)
    if mem.vmstat["nr_free_pages"] != free:
        yield f"nr_free_pages: says {mem.vmstat['nr_free_pages']}, the free lists hold {free}"


def check_free_pages(mem: MemMap, census: Census) -> Complaints:
    """A page is on a free list exactly if nobody holds it, and then it is blank."""
    free = np.zeros(mem.limit_pfn, dtype=np.bool_)
    device = census.pages[census.pages >= mem.max_pfn]
    heads = mem.free_order[census.pages]
    yield from complain("free_order", census.pages, heads > MAX_ORDER, "no block is so large")
    used = (mem.refcount[census.pages] != 0) & (heads != 0)
    yield from complain("free_order", census.pages, used, "set on a page that is not free")
    for zone in mem.zones:
        if zone is None or zone.pgmap is not None:
            continue
        starts, orders = free_blocks(mem, zone)
        starts, orders = starts[orders < MAX_ORDER], orders[orders < MAX_ORDER]
        sizes = np.int64(1) << orders
        nested = np.concatenate(([False], starts[1:] < (starts + sizes)[:-1]))
        yield from complain("free_order", starts, nested, "a free block inside another")
        for order in np.unique(orders).tolist():
            blocks = starts[orders == order][:, None] + np.arange(1 << order)
            free[blocks[blocks < mem.max_pfn]] = True
        for stack in zone.pcp:
            free[stack.live()] = True
    system = census.pages[census.pages < mem.max_pfn]
    unused = mem.refcount[system] == 0
    yield from complain(
        "refcount", system, unused & ~free[system], "nobody holds it, yet it is not free"
    )
    yield from complain("refcount", system, ~unused & free[system], "held, yet on a free list")
    for name in ("flags", "mapcount", "mapping", "index", "private", "mlock_count", "lock_owner"):
        stained = free[system] & (getattr(mem, name)[system] != 0)
        yield from complain(name, system, stained, "not 0 on a free page")
    unused = mem.refcount[device] == FREE_REFCOUNT
    for name in ("mapcount", "mapping", "index", "private", "mlock_count", "lock_owner"):
        stained = unused & (getattr(mem, name)[device] != 0)
        yield from complain(name, device, stained, "not 0 on a free device page")


def check_counts(mem: MemMap, census: Census) -> Complaints:
    """mapcount is what page tables hold; refcount is that, plus those who hold it besides."""
    pages = census.pages
    mapcount, refcount = mem.mapcount[pages], mem.refcount[pages]
    tables = census.mapped[pages]
    yield from complain("mapcount", pages, mapcount != tables, "page tables say otherwise")
    poisoned = (mem.flags[pages] & PG_hwpoison) != 0
    expected = tables + census.taken[pages] + census.held[pages] + mem.is_zone_device_page(pages)
    expected += poisoned
    yield from complain(
        "refcount", pages, refcount != expected, "not its mappings, pagevecs, pins and caches"
    )
    yield from complain("flags", pages, poisoned & (mapcount != 0), "poisoned, and yet mapped")
    if mem.num_poisoned_pages != np.count_nonzero(poisoned):
        yield f"num_poisoned_pages: says {mem.num_poisoned_pages}, {poisoned.sum()} are"
    unlocked = (mem.flags[pages] & PG_locked) == 0
    yield from complain(
        "flags", pages, (census.waiting[pages] > 0) & unlocked, "migration entries, but not locked"
    )
    mapped = pages[mapcount != 0]
    anon = int(np.count_nonzero(page_anon(mem, mapped)))
    for name, count in (("nr_anon_pages", anon), ("nr_mapped", mapped.size - anon)):
        if mem.vmstat[name] != count:
            yield f"{name}: says {mem.vmstat[name]}, {count} pages are mapped"


def check_flags(mem: MemMap, census: Census) -> Complaints:
    """Only known bits; a lock has an owner; device memory and the zero page are reserved."""
    pages = census.pages
    flags = mem.flags[pages]
    unknown = flags & ~_KNOWN_FLAGS
    yield from complain("flags", pages, unknown != 0, "bits that have no name")
    locked = (flags & PG_locked) != 0
    owned = mem.lock_owner[pages] != 0
    yield from complain("lock_owner", pages, locked != owned, "set and locked do not agree")
    special = mem.is_zone_device_page(pages) | (pages == mem.zero_pfn)
    reserved = (flags & PG_reserved) != 0
    yield from complain("flags", pages, reserved != special, "reserved is for device and zero page")
    on_list = flags & (PG_lru | PG_active | PG_unevictable)
    device = mem.is_zone_device_page(pages)
    yield from complain(
        "flags", pages, device & ((on_list & PG_lru) != 0), "device memory on an LRU list"
    )
    swapbacked, cached = (flags & PG_swapbacked) != 0, (flags & PG_swapcache) != 0
    yield from complain("flags", pages, cached & ~swapbacked, "in the swap cache, not swapbacked")
    poisoned = (flags & PG_hwpoison) != 0
    yield from complain("flags", pages, poisoned & (on_list != 0), "poisoned, yet on an LRU list")
    own = (flags & PG_anon_exclusive) != 0
    shared = census.mapped[pages] + census.taken[pages] > 1
    yield from complain("flags", pages, own & shared, "shared, yet exclusive")
    pinned = (census.held[pages] >= GUP_PIN_COUNTING_BIAS) & page_anon(mem, pages) & ~poisoned
    yield from complain("flags", pages, pinned & ~own, "pinned, yet not the process's own")


def check_mlocked(mem: MemMap, census: Census) -> Complaints:
    """Only what VM_LOCKED memory maps is mlocked, and all of that is off reclaim's lists."""
    pages = census.pages
    flags = mem.flags[pages]
    mlocked, unevictable = (flags & PG_mlocked) != 0, (flags & PG_unevictable) != 0
    free = mlocked & ((census.locked[pages] == 0) | mem.is_zone_device_page(pages))
    yield from complain("flags", pages, free, "mlocked, but in no VM_LOCKED memory")
    astray = ((flags & PG_lru) != 0) & (mlocked != unevictable)
    yield from complain("flags", pages, astray, "mlocked and unevictable do not agree")
    most = np.where(mlocked, census.locked[pages], 0)
    wrong = (mem.mlock_count[pages] < 0) | (mem.mlock_count[pages] > most)
    yield from complain("mlock_count", pages, wrong, "more than map it of VM_LOCKED memory")
    count = int(np.count_nonzero(mlocked))
    if mem.vmstat["nr_mlock"] != count:
        yield f"nr_mlock: says {mem.vmstat['nr_mlock']}, {count} pages are mlocked"


def check_lru(mem: MemMap, census: Census) -> Complaints:
    """Each PG_lru page stands once in the log of its list; a mapped page is there or on its way."""
    system = census.pages[census.pages < mem.max_pfn]
    listed = system[(mem.flags[system] & PG_lru) != 0]
    found = np.zeros(mem.limit_pfn, dtype=np.int32)
    kinds, kind_of = np.unique(mem.flags[listed], return_inverse=True)
    lists = np.array([page_lru(kind) for kind in kinds.tolist()], dtype=np.int64)[kind_of]
    keys = mem.page_to_nid(listed) * len(Lru) + lists
    for node in mem.nodes:
        for lru, items in zip(Lru, node.lruvec, strict=True):
            here = listed[keys == node.nid * len(Lru) + lru]
            log, stamps = items.log[: items.size], items.stamps[: items.size]
            on_list = np.isin(log, here) & (mem.lru_stamp[log] == stamps)
            np.add.at(found, log[on_list], np.int32(1))
            if items.nr_pages != here.size:
                what = f"node {node.nid} counts {items.nr_pages}, has {here.size}"
                yield f"nr_{lru.name.lower()}: {what}"
    yield from complain("lru_stamp", listed, found[listed] != 1, "not once in the log of its list")
    for lru in Lru:
        name = f"nr_{lru.name.lower()}"
        count = sum(node.lruvec[lru].nr_pages for node in mem.nodes)
        if mem.vmstat[name] != count:
            yield f"{name}: says {mem.vmstat[name]}, the lists hold {count}"
    for name in ("nr_isolated_anon", "nr_isolated_file"):
        if mem.vmstat[name]:
            yield f"{name}: says {mem.vmstat[name]}, yet nobody moves pages"
    waiting = np.zeros(mem.limit_pfn, dtype=np.bool_)
    for pagevec in mem.pagevecs:
        waiting[pagevec.live()] = True
    mapped = system[census.mapped[system] + census.taken[system] > 0]
    lost = ((mem.flags[mapped] & PG_lru) == 0) & ~waiting[mapped]
    yield from complain("flags", mapped, lost, "mapped, but on no LRU list nor on its way")


def check_swap(mem: MemMap, census: Census) -> Complaints:
    """A slot is held by the entries that name it and by its page in the swap cache."""
    si, slots = mem.swap, np.arange(1, mem.swap.max)
    cached = si.cache[slots] > 0
    expected = census.swapped[slots] + cached * np.int32(SWAP_HAS_CACHE)
    wrong = si.swap_map[slots] != expected
    yield from complain("swap_map", slots, wrong, "not its entries and the swap cache", "slot")
    used = int(np.count_nonzero(si.swap_map[slots]))
    if si.inuse_pages != used:
        yield f"inuse_pages: says {si.inuse_pages}, {used} slots are used"
    unused = (si.swap_map[slots] == 0) & (si.cache[slots] != 0)
    yield from complain(
        "swap cache", slots, unused, "something of a slot that nobody holds", "slot"
    )

    pages = census.pages
    inside = (mem.flags[pages] & PG_swapcache) != 0
    named = np.where(inside, mem.private[pages], 0)
    stray = inside & ((named <= 0) | (named >= si.max))
    yield from complain("private", pages, stray, "no such slot")
    odd = ~inside & (mem.private[pages] != 0) & ~mem.is_zone_device_page(pages)
    odd &= ~has(mem.flags[pages], PG_private) & ~page_has_driver(mem, pages)
    yield from complain("private", pages, odd, "neither a driver, nor swap, nor buffers use it")
    pages, named = pages[inside & ~stray], named[inside & ~stray]
    yield from complain("private", pages, si.cache[named] != pages, "the swap cache differs")
    if not mem.vmstat["nr_swapcached"] == inside.sum() == cached.sum():
        what = f"{cached.sum()} slots have pages, {inside.sum()} pages have slots"
        yield f"nr_swapcached: says {mem.vmstat['nr_swapcached']}, {what}"
    if mem.payload is not None and si.contents is not None:
        flags = mem.flags[pages]
        clean = ((flags & PG_uptodate) != 0) & ((flags & (PG_dirty | PG_locked)) == 0)
        clean &= ~dirty_in_tables(mem)[pages]
        saved = np.where(si.zeromap[named[clean], np.newaxis], 0, si.contents[named[clean]])
        clean[clean] = (mem.payload[pages[clean]] != saved).any(axis=1)
        yield from complain("contents", pages, clean, "clean, yet its slot holds something else")


_CHECKS: Final[tuple[Callable[[MemMap, Census], Complaints], ...]] = (
    check_zones,
    check_free_pages,
    check_counts,
    check_flags,
    check_mlocked,
    check_lru,
    check_swap,
    check_page_cache,
    check_movable,
    check_files,
    check_buffers,
    check_writeback,
    check_super_blocks,
    check_entries,
    check_anon_vmas,
    check_vmas,
    check_notifiers,
    check_userfaultfds,
    check_memcgs,
)


def dump_page(mem: MemMap, pfn: int) -> str:
    """All that is known of one page, in a line. Linux: dump_page(), mm/debug.c."""
    zone = mem.zones[int(mem.zone[pfn])]
    return (
        f"page {pfn:#x}: {zone.name if zone else 'hole'} refcount {mem.refcount[pfn]} "
        f"mapcount {mem.mapcount[pfn]} mapping {mem.mapping[pfn]:#x} index {mem.index[pfn]:#x} "
        f"flags {describe_flags(int(mem.flags[pfn]))}"
    )
