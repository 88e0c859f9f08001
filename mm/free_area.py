"""The buddy lists of a zone: take blocks, split them, merge them. Linux: mm/page_alloc.c.

A free block is one number, `free_order` of its first page; the stacks in `Zone.free_area` only
say where to look for one. A block that is merged away leaves its item in the stack, so an item
may be stale, or stand there twice; `free_order` says whether it still holds, and whoever clears
that number owns the block. Everything here wants `mem.locks.atomic` held, which is zone->lock.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.mmzone import MAX_ORDER, Zone
from mm.types import MemMap
from mm.typing import Indices, Mask, Pfns, pages
from mm.vectors import ascending, nr_pieces, pieces

_LONG_RUN: Final = 8  # mean length from which freeing run by run is faster
_SLACK: Final = 32  # stale items that a look at a stack may meet before it has to look again


def rmqueue_bulk(mem: MemMap, zone: Zone, count: int) -> Pfns:
    """Take *count* single pages, ascending; fewer where there are no more.

    One run where a block is large enough, else the largest blocks, whole, until one is.
    Linux: rmqueue_bulk().
    """
    runs = []
    order = MAX_ORDER - 1
    while count > 0 and order >= 0:
        head = rmqueue_smallest(mem, zone, count)
        if head:
            runs.append(np.arange(head, head + count))
            break
        heads = del_from_free_area(mem, zone, order, count >> order)
        runs.append((heads[:, np.newaxis] + np.arange(1 << order)).ravel())
        count -= runs[-1].size
        if not heads.size:
            order -= 1
    return runs[0] if len(runs) == 1 else ascending(np.concatenate((pages(), *runs)))


def rmqueue_smallest(mem: MemMap, zone: Zone, count: int) -> int:
    """Take *count* pages in a row from the smallest block that has them; 0 where none has.

    They start where the block does. Linux: __rmqueue_smallest().
    """
    for order in range((count - 1).bit_length(), MAX_ORDER):
        head = del_from_free_area(mem, zone, order, 1)
        if head.size:
            pfn = head.item(0)
            add_range(mem, zone, pfn + count, pfn + (1 << order))
            return pfn
    return 0


def free_pages_sorted(mem: MemMap, zone: Zone, pfns: Pfns) -> None:
    """Free single pages (ascending): run by run where runs are long, else as a vector."""
    breaks = pfns[1:] != pfns[:-1] + 1
    if _LONG_RUN * nr_pieces(breaks) > pfns.size:
        free_one_page(mem, zone, pfns, 0)
        return
    for run in pieces(breaks, pfns.size):
        free_range(mem, zone, pfns.item(run.start), pfns.item(run.stop - 1) + 1)


def free_range(mem: MemMap, zone: Zone, start: int, end: int) -> None:
    """Free [*start*, *end*): at each order only its two ends can have a buddy outside.

    An end that has no place in a block of the next order takes its buddy in, where that is free,
    or is listed and cut off.
    """
    for order in range(MAX_ORDER - 1):
        size = 1 << order
        if start & size and start < end:
            if _take_buddy(mem, zone, start - size, order):
                start -= size
            else:
                add_to_free_area(mem, zone, pages(start), order)
                start += size
        if end & size and start < end:
            if _take_buddy(mem, zone, end, order):
                end += size
            else:
                end -= size
                add_to_free_area(mem, zone, pages(end), order)
        if start >= end:
            return
    size = 1 << (MAX_ORDER - 1)
    add_to_free_area(mem, zone, np.arange(end - size, start - 1, -size), MAX_ORDER - 1)


def _take_buddy(mem: MemMap, zone: Zone, buddy: int, order: int) -> bool:
    """Take *buddy* off its list if it is a free block of *order* in *zone*."""
    if not zone.start_pfn <= buddy < zone.end_pfn or mem.free_order.item(buddy) != order + 1:
        return False
    mem.free_order[buddy] = 0
    zone.nr_free -= 1 << order
    return True


def free_one_page(mem: MemMap, zone: Zone, heads: Pfns, order: int) -> None:
    """Free blocks of *order* (ascending *heads*), merging with buddies here and on the lists.

    All of them count as free first, so that one look at `free_order` finds both kinds of buddy.
    What has none goes on its list, what has one becomes half of a block of the next order.
    Linux: __free_one_page().
    """
    while heads.size:
        mem.free_order[heads] = order + 1
        buddies = heads ^ (1 << order)
        merges = mem.free_order.take(buddies, mode="clip") == order + 1
        merges &= (buddies >= zone.start_pfn) & (buddies < zone.end_pfn)
        if order == MAX_ORDER - 1 or not np.count_nonzero(merges):
            add_to_free_area(mem, zone, heads[::-1], order)
            return

        halves, others = heads[merges], buddies[merges]
        alone = heads[~merges]
        heads = unique_pfns(halves & others)

        mem.free_order[halves] = 0
        mem.free_order[others] = 0
        zone.nr_free -= (2 * heads.size - halves.size) << order  # the halves that were on a list
        if alone.size:
            add_to_free_area(mem, zone, alone[::-1], order)
        order += 1


def add_range(mem: MemMap, zone: Zone, start_pfn: int, end_pfn: int) -> None:
    """List [*start_pfn*, *end_pfn*) as the largest aligned blocks; no buddy of theirs is free.

    Linux: expand(), and __free_pages_memory() of mm/memblock.c.
    """
    while start_pfn < end_pfn:
        aligned = (start_pfn & -start_pfn).bit_length() - 1
        order = min(aligned, (end_pfn - start_pfn).bit_length() - 1, MAX_ORDER - 1)
        size = 1 << order
        stop = start_pfn + ((end_pfn - start_pfn) & -size if order == MAX_ORDER - 1 else size)
        heads = np.arange(stop - size, start_pfn - 1, -size)  # pops give ascending addresses
        add_to_free_area(mem, zone, heads, order)
        start_pfn = stop


def add_to_free_area(mem: MemMap, zone: Zone, heads: Pfns, order: int) -> None:
    """Put free blocks on the list of *order*; the last of *heads* comes off first.

    A full stack is written anew without its stale items. Linux: add_to_free_area(), v5.2.
    """
    area = zone.free_area[order]
    if area.size + heads.size > area.items.size:
        items = area.live()
        live = unique_pfns(np.sort(items[mem.free_order[items] == order + 1]))
        area.items = np.empty(max(64, 2 * (live.size + heads.size)), dtype=np.int64)
        area.size = 0
        area.push(live[::-1])
    mem.free_order[heads] = order + 1
    area.push(heads)
    zone.nr_free += heads.size << order


def del_from_free_area(mem: MemMap, zone: Zone, order: int, count: int) -> Pfns:
    """Take the *count* blocks of *order* that were listed last; their heads, ascending.

    Fewer where the list has no more. Linux: del_page_from_free_area(), v5.2.
    """
    area = zone.free_area[order]
    taken = pages()
    while area.size and taken.size < count:
        wanted = count - taken.size
        bottom = max(0, area.size - wanted - _SLACK)
        items = area.items[bottom : area.size]
        live = np.flatnonzero(mem.free_order[items] == order + 1)[-wanted:]
        area.size = bottom + (live.item(0) if live.size == wanted else 0)

        heads = unique_pfns(ascending(items[live]))
        mem.free_order[heads] = 0
        taken = ascending(np.concatenate((taken, heads))) if taken.size else heads
    zone.nr_free -= taken.size << order
    return taken


def take_page_off_buddy(mem: MemMap, zone: Zone, pfn: int) -> bool:
    """Take the one page *pfn* out of the free block that it lies in; False where it is in none.

    What is left of the block goes back on the lists. Linux: take_page_off_buddy(), v5.10.
    """
    for order in range(MAX_ORDER):
        head = pfn & -(1 << order)
        if mem.free_order.item(head) > order:
            size = 1 << (mem.free_order.item(head) - 1)
            mem.free_order[head] = 0
            zone.nr_free -= size
            add_range(mem, zone, head, pfn)
            add_range(mem, zone, pfn + 1, head + size)
            return True
    return False


def bad_blocks(mem: MemMap, zone: Zone, heads: Pfns, orders: Indices) -> dict[str, Pfns]:
    """The free blocks that break a rule of the lists, by the rule. Linux: bad_range()."""
    ends = heads + (1 << orders)
    buddies = heads ^ (1 << orders)
    unmerged = (orders < MAX_ORDER - 1) & np.isin(buddies, heads)
    unmerged[unmerged] = mem.free_order[buddies[unmerged]] == orders[unmerged] + 1
    unlisted = np.ones(heads.size, dtype=np.bool_)
    for order, area in enumerate(zone.free_area):
        unlisted[orders == order] = ~np.isin(heads[orders == order], area.live())
    return {
        "free block of no order": heads[orders >= MAX_ORDER],
        "free block is not aligned": heads[(heads & ((1 << orders) - 1)) != 0],
        "free block ends outside the zone": heads[ends > zone.end_pfn],
        "free block overlaps the next one": heads[:-1][ends[:-1] > heads[1:]],
        "free block has a free buddy": heads[unmerged],
        "free block is on no list": heads[unlisted],
        "free block says another zone": heads[mem.zone[heads] != zone.index],
    }


def in_blocks(heads: Pfns, orders: Indices, pfns: Pfns) -> Mask:
    """True for those of *pfns* that lie in one of the blocks."""
    block = np.searchsorted(heads, pfns, side="right") - 1
    ends = np.append(heads + (1 << orders), 0)  # before the first block: beyond the end of the last
    return pfns < ends[block]


def unique_pfns(pfns: Pfns) -> Pfns:
    """Ascending *pfns* without those that repeat the one before."""
    fresh = pfns[1:] != pfns[:-1]
    return pfns if fresh.all() else pfns[np.concatenate(([True], fresh))]
