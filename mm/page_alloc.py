"""Which zone a page comes from, and what it must look like. Linux: mm/page_alloc.c.

    allocate  alloc_pages_bulk       the zonelist and its watermarks choose a zone, then
                make_room            where all are low: kswapd, then direct reclaim
                rmqueue              takes from the per-CPU list or from the buddy lists
                prep_new_page        checks that nobody uses what comes out
    free      free_pages_bulk
                free_pages_prepare   refuses what is still in use, wipes the rest, which goes
                                     to the per-CPU list or, where it is much, to the buddy lists
    look      nr_free_pages, free_blocks, is_free_buddy_page, check_zone

The buddy lists themselves are in mm/free_area.py. rmqueue() and free_pcppages_bulk() want
`mem.locks.atomic` held, which is zone->lock here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final, TypeAlias

import numpy as np

from mm.errors import InvalidArgument, KernelBug, OutOfMemory
from mm.free_area import (
    bad_blocks,
    free_one_page,
    free_pages_sorted,
    in_blocks,
    rmqueue_bulk,
    rmqueue_smallest,
)
from mm.gfp import Gfp
from mm.locking import current, wait_event_timeout
from mm.mmzone import DMA32_END, DMA_END, MAX_ORDER, PageStack, Zone
from mm.page_flags import NO_FLAGS, PAGE_FLAGS_CHECK_AT_FREE, describe_flags
from mm.sched import current_task
from mm.trace import TracePoint
from mm.types import MemMap
from mm.typing import Indices, Mask, Pfns, Word, pages, word
from mm.vectors import ascending, joined, nr_pieces, pieces, some

PCP_BATCH: Final = 31  # pages that move between a per-CPU list and the buddy lists at a time
PCP_HIGH: Final = 6 * PCP_BATCH
MAX_RECLAIM_RETRIES: Final = 16  # attempts to reclaim, in a row, before reclaim is given up
WMARK_MIN: Final = 0  # which of a zone's watermarks a request respects
WMARK_LOW: Final = 1
PAGE_POISON: Final = 0xAA  # what a freed frame is filled with while debugging

# The members of an IntFlag as plain ints, whose `&` is fifty times as fast.
_DMA, _DMA32, _HIGH = int(Gfp.DMA), int(Gfp.DMA32), int(Gfp.HIGH)
_ATOMIC, _THISNODE = int(Gfp.ATOMIC), int(Gfp.THISNODE)
_DIRECT_RECLAIM, _ZERO = int(Gfp.DIRECT_RECLAIM), int(Gfp.ZERO)

Nodes: TypeAlias = Collection[int] | None  # those that an allocation is confined to; None: any

_ORDERS: Final = np.arange(MAX_ORDER)
_ANY_FLAG: Final = word(~NO_FLAGS)
_HEAD_MASKS: Final = -(np.int64(1) << _ORDERS)  # pfn & mask: where a block of that order starts

mm_page_alloc = TracePoint("mm_page_alloc")
mm_page_free = TracePoint("mm_page_free")


# Allocate ---------------------------------------------------------------------------------------


def alloc_pages_bulk(
    mem: MemMap, gfp: int, nid: int, count: int, cpu: int = 0, nodes: Nodes = None
) -> Pfns:
    """At most *count* pages, ascending, refcount 1; fewer where the watermarks forbid the rest.

    They come from *nid* or what is nearest to it, of *nodes* alone where those are given, and
    form as few runs as the free blocks allow. Linux: alloc_pages_bulk() of v5.13, for which v4.20
    calls alloc_page() in a loop.
    """
    return alloc_pages_nodemask(mem, int(gfp), 0, count, nid, cpu, nodes)


def alloc_pages(mem: MemMap, gfp: int, order: int, nid: int, cpu: int = 0) -> int:
    """A block of 2**order pages; the first has refcount 1, the others 0. Returns its first PFN.

    Raises OutOfMemory. Linux: alloc_pages_node(), include/linux/gfp.h.
    """
    if not 0 <= order < MAX_ORDER:
        raise InvalidArgument(f"order {order} is not in 0..{MAX_ORDER - 1}")
    block = alloc_pages_nodemask(mem, int(gfp), order, 1 << order, nid, cpu)
    if not block.size:
        raise OutOfMemory(
            f"wanted a block of order {order} ({1 << order:#x} pages) on node {nid} with gfp "
            f"{int(gfp):#x}; free are {show_free_areas(mem)}; free something, ask for a lower "
            f"order or with another gfp, or boot with more memory"
        )
    return block.item(0)


def alloc_pages_nodemask(
    mem: MemMap, gfp: int, order: int, count: int, nid: int, cpu: int, nodes: Nodes = None
) -> Pfns:
    """*count* pages, ascending: what can be had where *order* is 0, else one block or nothing.

    Linux: __alloc_pages_nodemask() and, when memory is short, __alloc_pages_slowpath().
    """
    if not 0 <= nid < len(mem.nodes):
        raise InvalidArgument(f"there is no node {nid}, only 0..{len(mem.nodes) - 1}")
    zones = zones_allowed(mem, gfp, nid, nodes)
    with mem.locks.atomic:
        parts = [get_page_from_freelist(mem, gfp, order, count, zones, cpu, WMARK_LOW)]
    missing = count - parts[0].size
    if missing and zones:
        for _ in make_room(mem, gfp, zones, missing, parts):
            with mem.locks.atomic:
                parts.append(get_page_from_freelist(mem, gfp, order, missing, zones, cpu))
            missing -= parts[-1].size
            if not missing:
                break
    taken = parts[0] if len(parts) == 1 else ascending(np.concatenate(parts))
    if taken.size:
        prep_new_page(mem, taken, order, gfp)
    if mm_page_alloc:
        mm_page_alloc(pfns=taken, order=order, gfp=gfp)
    return taken


def make_room(
    mem: MemMap, gfp: int, zones: list[Zone], wanted: int, parts: list[Pfns]
) -> Iterator[None]:
    """What helps an allocation that falls short, one step for each turn.

    Who has got anything so far, in *parts*, and finds nothing to reclaim does not wait for others,
    which may wait for just that. Linux: wake_all_kswapds(), __alloc_pages_direct_reclaim().
    """
    nids = list(dict.fromkeys(zone.nid for zone in zones))
    reclaim, may_wait = mem.nodes[nids[0]].reclaim, gfp & _DIRECT_RECLAIM
    if may_wait:
        for kswapd in (mem.nodes[nid].kswapd for nid in nids):
            if kswapd is not None:
                kswapd()
    yield
    drain_all_pages(mem)
    yield
    if reclaim is not None and may_wait:
        retries, served = 0, mem.vmstat["pgfault"]
        while retries < MAX_RECLAIM_RETRIES:
            if not reclaim(nids, wanted) and (joined(parts).size or not _others_go_on(mem)):
                return
            drain_all_pages(mem)
            yield
            # What was freed is of no use to us, or others were faster: let those finish.
            retries = retries + 1 if served == mem.vmstat["pgfault"] else 0
            served = mem.vmstat["pgfault"]


def _others_go_on(mem: MemMap) -> bool:
    """Let other threads run, which may have all pages in hand; True if one gets anything done.

    Linux: should_reclaim_retry(), and too_many_isolated() of mm/vmscan.c.
    """
    before = mem.vmstat["pgfault"], mem.vmstat["pgfree"]
    return wait_event_timeout(lambda: before != (mem.vmstat["pgfault"], mem.vmstat["pgfree"]))


def get_page_from_freelist(
    mem: MemMap,
    gfp: int,
    order: int,
    count: int,
    zones: list[Zone],
    cpu: int,
    wmark: int = WMARK_MIN,
) -> Pfns:
    """Go down the zonelist, taking from each zone what its watermark leaves; ascending.

    Linux: get_page_from_freelist().
    """
    parts = []
    for zone in zones:
        spare = zone.nr_free - zone_watermark(zone, gfp, zones[0], wmark)
        if spare > 0 and count > 0:
            part = rmqueue(mem, zone, order, count, spare, cpu)
            zone_statistics(mem, zones[0], zone, part.size, cpu)
            parts.append(part)
            count -= part.size
    taken = parts[0] if len(parts) == 1 else ascending(np.concatenate((pages(), *parts)))
    mem.vmstat.add("nr_free_pages", -taken.size)
    return taken


def zone_statistics(mem: MemMap, preferred: Zone, zone: Zone, count: int, cpu: int) -> None:
    """Count *count* pages that *zone* gave, where *preferred* was asked first.

    Linux: zone_statistics().
    """
    hit, local = zone.nid == preferred.nid, zone.nid == mem.cpu_to_node[cpu]
    where = "numa_hit" if hit else "numa_miss", "numa_local" if local else "numa_other"
    mem.vmstat.add_each((zone.pgalloc, *where), count)
    if not hit:
        mem.vmstat.add("numa_foreign", count)


def zones_allowed(mem: MemMap, gfp: int, nid: int, nodes: Nodes = None) -> list[Zone]:
    """The zones where *gfp*, and the cpuset of who asks, let a request to *nid* look, best first.

    Linux: gfp_zone(), __cpuset_zone_allowed() and, with *nodes*, for_each_zone_zonelist_nodemask().
    """
    zones = mem.nodes[nid].zonelist
    if nodes is not None:
        zones = [zone for zone in zones if zone.nid in nodes]
    if mem.cpusets_enabled and (mems := current_task().mems_allowed) is not None:
        zones = [zone for zone in zones if zone.nid in mems]
    if gfp & (_DMA | _DMA32):
        limit = DMA_END if gfp & _DMA else DMA32_END
        zones = [zone for zone in zones if zone.end_pfn <= limit]
    if gfp & _THISNODE:
        zones = [zone for zone in zones if zone.nid == nid]
    return zones


def zone_watermark(zone: Zone, gfp: int, first: Zone, wmark: int = WMARK_MIN) -> int:
    """Pages that must stay on the lists of *zone* for a request that could ask *first* first.

    Below the low watermark somebody has to reclaim; below min only *gfp* can go.
    Linux: __zone_watermark_ok().
    """
    mark = zone.watermark[wmark]
    if wmark == WMARK_MIN:
        if gfp & _HIGH:
            mark -= mark // 2
        if gfp & _ATOMIC:
            mark -= mark // 4
    return mark + zone.lowmem_reserve.get(first.name, 0)


def rmqueue(mem: MemMap, zone: Zone, order: int, count: int, spare: int, cpu: int) -> Pfns:
    """Take *count* pages, ascending: at most *spare* from the buddy lists. Linux: rmqueue().

    An order above 0 wants one block or nothing; few pages of order 0 come from the CPU's list.
    """
    if order:
        head = rmqueue_smallest(mem, zone, count) if count <= spare else 0
        return np.arange(head, head + count) if head else pages()
    if count > PCP_BATCH:
        return rmqueue_bulk(mem, zone, min(count, spare))
    pcp = zone.pcp[cpu]
    if pcp.size < count:
        pcp.push(rmqueue_bulk(mem, zone, min(PCP_BATCH, spare))[::-1])
    return ascending(pcp.pop(count))


def prep_new_page(mem: MemMap, pfns: Pfns, order: int, gfp: int) -> None:
    """Give *pfns* (ascending) their reference and contents; raises KernelBug if any is in use.

    Linux: prep_new_page() and check_new_page().
    """
    rows = _rows_of(pfns)
    check_pages(mem, pfns, _ANY_FLAG, "allocated")
    mem.refcount[pfns[:1] if order else rows] = 1
    if mem.debug:
        mem.page_owner[rows] = current()
    if gfp & _ZERO:
        fill_pages(mem, pfns, 0)


# Free -------------------------------------------------------------------------------------------


def free_pages_bulk(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Free *pfns*, in any order, whose last reference is gone: their refcount is 0.

    Few of them go to the CPU's list. Raises KernelBug, with nothing changed, where a page is
    still in use, is free already or is no system memory; of the pages that are free already some
    are noticed only with `mem.debug`. Linux: free_unref_page_list().
    """
    if pfns.size:
        free_pages_ok(mem, ascending(pfns), 0, cpu)


def free_pages(mem: MemMap, pfn: int, order: int, cpu: int = 0) -> None:
    """Drop a reference to the block at *pfn*, as alloc_pages() gave it; the last one frees it.

    Raises KernelBug as free_pages_bulk(). Linux: __free_pages().
    """
    if not 0 <= order < MAX_ORDER or pfn & ((1 << order) - 1) or not 0 < pfn < mem.max_pfn:
        raise KernelBug(f"there is no block of order {order} at pfn {pfn:#x}")
    with mem.locks.atomic:
        if mem.refcount.item(pfn) <= 0:
            raise bad_page(mem, pages(pfn), "freed, though nobody holds it")
        mem.refcount[pfn] -= 1
        last = not mem.refcount.item(pfn)
    if last:
        free_pages_ok(mem, np.arange(pfn, pfn + (1 << order)), order, cpu)


def free_pages_ok(mem: MemMap, pfns: Pfns, order: int, cpu: int) -> None:
    """Free *pfns* (ascending): single pages, or one block of *order*. Linux: __free_pages_ok()."""
    free_pages_prepare(mem, pfns)
    if mm_page_free:
        mm_page_free(pfns=pfns, order=order)
    with mem.locks.atomic:
        for zone, part in _by_zone(mem, pfns):
            if order:
                free_one_page(mem, zone, part[:1], order)
                continue
            if pfns.size > PCP_BATCH:
                free_pages_sorted(mem, zone, part)
                continue
            pcp = zone.pcp[cpu]
            pcp.push(part[::-1])
            if pcp.size > PCP_HIGH:
                free_pcppages_bulk(mem, zone, pcp, PCP_BATCH)
        mem.vmstat.add("nr_free_pages", pfns.size)
        mem.vmstat.add("pgfree", pfns.size)


def free_pages_prepare(mem: MemMap, pfns: Pfns) -> None:
    """Check that *pfns* (ascending) may go, then wipe their rows and, in debug, their contents.

    Linux: free_pages_prepare().
    """
    if pfns.item(0) < 1 or pfns.item(-1) >= mem.max_pfn:
        outside = pfns[(pfns < 1) | (pfns >= mem.max_pfn)]
        raise KernelBug(f"freed, but no system memory: pfn {_hex_list(outside)}")
    if pfns.size > 1 and np.count_nonzero(pfns[1:] == pfns[:-1]):
        raise bad_page(mem, pfns[1:][pfns[1:] == pfns[:-1]], "freed twice in one call")
    if mem.debug:
        free_already = is_free_buddy_page(mem, pfns)
        if free_already.any():
            raise bad_page(mem, pfns[free_already], "freed, but free already")
    check_pages(mem, pfns, PAGE_FLAGS_CHECK_AT_FREE, "freed")

    rows = _rows_of(pfns)
    mem.flags[rows] = NO_FLAGS
    mem.index[rows] = 0
    mem.private[rows] = 0
    if mem.debug:
        fill_pages(mem, pfns, PAGE_POISON)


def check_pages(mem: MemMap, pfns: Pfns, flags: Word, what: str) -> None:
    """Raise KernelBug where a page is used, has any of *flags* or starts a free block.

    Linux: free_pages_check() and check_new_page().
    """
    rows = _rows_of(pfns)
    if (
        some(mem.refcount[rows])
        or some(mem.mapcount[rows])
        or some(mem.mapping[rows])
        or some(mem.free_order[rows])
        or some(mem.flags[rows] & flags)
    ):
        used = mem.refcount[rows] | mem.mapcount[rows] | mem.mapping[rows] | mem.free_order[rows]
        bad = (used != 0) | ((mem.flags[rows] & flags) != 0)
        raise bad_page(mem, pfns[bad], f"{what}, but in use or free already")


def bad_page(mem: MemMap, pfns: Pfns, why: str) -> KernelBug:
    """The error for *pfns*, with the row of the first. Linux: bad_page()."""
    pfn = pfns.item(0)
    return KernelBug(
        f"{why}: pfn {_hex_list(pfns)}; the first has refcount {mem.refcount[pfn]}, mapcount "
        f"{mem.mapcount[pfn]}, mapping {mem.mapping[pfn]:#x}, free_order {mem.free_order[pfn]}, "
        f"flags {describe_flags(mem.flags.item(pfn))}"
    )


def free_pcppages_bulk(mem: MemMap, zone: Zone, pcp: PageStack, count: int) -> None:
    """Give the *count* pages that lie longest on a per-CPU list back to the buddy lists.

    Linux: free_pcppages_bulk().
    """
    drained, kept = np.sort(pcp.live()[:count]), pcp.live()[count:].copy()
    pcp.size = 0
    pcp.push(kept)
    free_one_page(mem, zone, drained, 0)


def drain_all_pages(mem: MemMap) -> None:
    """Empty the per-CPU lists, so that their pages can merge. Linux: drain_all_pages()."""
    with mem.locks.atomic:
        for zone in system_zones(mem):
            for pcp in zone.pcp:
                free_pcppages_bulk(mem, zone, pcp, pcp.size)


# Vectors ----------------------------------------------------------------------------------------


def _rows_of(pfns: Pfns) -> slice | Pfns:
    """What selects *pfns* (ascending, none twice) from a column; a slice where they are one run."""
    first, last = pfns.item(0), pfns.item(-1)
    return slice(first, last + 1) if last - first + 1 == pfns.size else pfns


def fill_pages(mem: MemMap, pfns: Pfns, byte: int) -> None:
    """Fill the contents of *pfns* (ascending) with *byte*. Linux: clear_highpage() and the like."""
    if mem.payload is None:
        return
    breaks = pfns[1:] != pfns[:-1] + 1
    if nr_pieces(breaks) * 4 > pfns.size:  # so short that a slice for each costs more
        mem.payload[pfns] = byte
        return
    for run in pieces(breaks, pfns.size):
        mem.payload[pfns.item(run.start) : pfns.item(run.stop - 1) + 1] = byte


def _by_zone(mem: MemMap, pfns: Pfns) -> Iterator[tuple[Zone, Pfns]]:
    """*pfns* (ascending, all system memory), cut where a new zone begins."""
    while True:
        zone = mem.zones[mem.zone.item(pfns.item(0))]
        assert zone is not None
        if pfns.item(-1) < zone.end_pfn:
            yield zone, pfns
            return
        inside = int(pfns.searchsorted(zone.end_pfn))
        yield zone, pfns[:inside]
        pfns = pfns[inside:]


def _hex_list(pfns: Pfns) -> str:
    """At most eight of *pfns*, in hex."""
    more = f" and {pfns.size - 8} more" if pfns.size > 8 else ""
    return ", ".join(f"{pfn:#x}" for pfn in pfns[:8].tolist()) + more


# Look -------------------------------------------------------------------------------------------


def system_zones(mem: MemMap) -> list[Zone]:
    """Every zone that the allocator owns. Linux: for_each_populated_zone()."""
    return [zone for node in mem.nodes for zone in node.zones]


def nr_free_pages(mem: MemMap) -> int:
    """Free pages, those on per-CPU lists included. Linux: nr_free_pages(), linux/swap.h."""
    return sum(z.nr_free + sum(pcp.size for pcp in z.pcp) for z in system_zones(mem))


def is_free_buddy_page(mem: MemMap, pfns: Pfns) -> Mask:
    """True where one of *pfns* (ascending) lies in a free block or, unlike in Linux, on a pcp.

    Linux: is_free_buddy_page().
    """
    free: Mask = (mem.free_order[pfns[:, np.newaxis] & _HEAD_MASKS] > _ORDERS).any(axis=1)
    loose = np.concatenate([pcp.live() for zone in system_zones(mem) for pcp in zone.pcp])
    place = pfns.searchsorted(loose)
    free[place[pfns.take(place, mode="clip") == loose]] = True
    return free


def free_blocks(mem: MemMap, zone: Zone) -> tuple[Pfns, Indices]:
    """First PFN (ascending) and order of every free block of *zone*, both int64[n].

    Linux: frag_show_print(), mm/vmstat.c, which counts them for /proc/buddyinfo.
    """
    heads = np.flatnonzero(mem.free_order[zone.start_pfn : zone.end_pfn]) + zone.start_pfn
    return heads, mem.free_order[heads].astype(np.int64) - 1


def show_free_areas(mem: MemMap) -> str:
    """How many blocks of each size are free, zone by zone. Linux: show_free_areas()."""
    lines = []
    for zone in system_zones(mem):
        counts = np.bincount(free_blocks(mem, zone)[1], minlength=MAX_ORDER).tolist()
        blocks = " ".join(f"{n}*{4 << order}kB" for order, n in enumerate(counts) if n)
        lines.append(
            f"node {zone.nid} {zone.name} [{zone.start_pfn:#x}, {zone.end_pfn:#x}): "
            f"{blocks or 'nothing'}, min {zone.watermark[0] << 2}kB"
        )
    return ", ".join(lines)


def check_zone(mem: MemMap, zone: Zone) -> list[str]:
    """What is wrong with the free pages of *zone*, a sentence each; empty if nothing is.

    Linux: free_pages_check() and bad_range(), for every page at once.
    """
    heads, orders = free_blocks(mem, zone)
    loose = np.sort(np.concatenate([pages(), *(pcp.live() for pcp in zone.pcp)]))
    outside = (loose < zone.start_pfn) | (loose >= zone.end_pfn)
    wrong = {
        "per-CPU list holds a page outside the zone": loose[outside],
        "page is twice on per-CPU lists": loose[1:][loose[1:] == loose[:-1]],
        "page is on a per-CPU list and in a free block": loose[in_blocks(heads, orders, loose)],
        **bad_blocks(mem, zone, heads, orders),
    }
    for name in ("refcount", "mapcount", "mapping", "index", "private", "flags"):
        column = getattr(mem, name)[zone.start_pfn : zone.end_pfn]
        used = np.flatnonzero(column) + zone.start_pfn
        free = in_blocks(heads, orders, used) | np.isin(used, loose)
        wrong[f"free page has a {name}"] = used[free]

    where = f"node {zone.nid} zone {zone.name}"
    complaints = [f"{where}: {what}: pfn {_hex_list(at)}" for what, at in wrong.items() if at.size]
    listed = int((1 << orders).sum())
    if listed != zone.nr_free:
        complaints.append(f"{where}: nr_free is {zone.nr_free}, but {listed} pages are in blocks")
    return complaints
