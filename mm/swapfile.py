"""The swap area as a whole, and who may let go of a slot. Linux: mm/swapfile.c.

The slots themselves are in mm/swap_slots.py, below the swap cache; what looks at both is here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mm.errors import InvalidArgument
from mm.filemap import trylock_page, unlock_page
from mm.memparse import Size, format_size, memparse
from mm.page_flags import PG_dirty, PG_lru, PG_swapcache
from mm.swap import lru_add_drain_all, put_page
from mm.swap_slots import SWAP_HAS_CACHE, SwapInfo, swap_count, swap_free, vm_swap_full
from mm.swap_state import delete_from_swap_cache, find_get_pages
from mm.swapops import swp_offset
from mm.types import MemMap
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Mask, Pfns, Ptes
from mm.vectors import every, has, some


def swapon(mem: MemMap, size: Size) -> None:
    """Give a machine that has none a swap area of *size*, whose first page is a header.

    Raises InvalidArgument. Linux: swapon(2).
    """
    nbytes = memparse(size)
    if nbytes % PAGE_SIZE or nbytes == PAGE_SIZE:
        raise InvalidArgument(
            f"a swap area of {format_size(nbytes)}: its size must be a multiple of 4 KiB, of which "
            f'the first hold a header; use "0" for none'
        )
    mem.swap = SwapInfo(nbytes >> PAGE_SHIFT, mem.locks, payload=mem.payload is not None)


def page_swapcount(mem: MemMap, pfns: Pfns) -> NDArray[np.int32]:
    """Page-table entries that hold the slot of each of *pfns*, which are in the swap cache.

    Linux: page_swapcount(), mm/swapfile.c.
    """
    return swap_count(mem.swap, mem.private[pfns])


def try_to_free_swap(mem: MemMap, pfns: Pfns) -> Mask:
    """Take locked *pfns* out of the swap cache, and free their slots; True where that was done.

    A page stays whose slot some entry holds. One that leaves is dirty: its copy in swap is gone.
    Linux: try_to_free_swap(), mm/swapfile.c.
    """
    with mem.locks.atomic:
        freed = has(mem.flags[pfns], PG_swapcache)
        if some(freed):
            freed[freed] = page_swapcount(mem, pfns[freed]) == 0
            mem.flags[pfns[freed]] |= PG_dirty
            delete_from_swap_cache(mem, pfns[freed])
    return freed


def free_swap_cache(mem: MemMap, pfns: Pfns) -> None:
    """Take those of *pfns* (distinct) out of the swap cache that nobody maps or has swapped out.

    A page that somebody else has locked stays. Linux: free_swap_cache(), mm/swap_state.c.
    """
    if not mem.vmstat["nr_swapcached"]:
        return
    unused = has(mem.flags[pfns], PG_swapcache) & (mem.mapcount[pfns] == 0)
    if some(unused):
        pfns = pfns[unused]
        locked = pfns[trylock_page(mem, pfns)]
        try_to_free_swap(mem, locked)
        unlock_page(mem, locked)


def free_pages_and_swap_cache(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Drop a reference to each of *pfns* (distinct), which have just lost a mapping.

    Linux: free_pages_and_swap_cache(), mm/swap_state.c.
    """
    free_swap_cache(mem, pfns)
    put_page(mem, pfns, cpu)


def free_swap_and_cache(mem: MemMap, ptes: Ptes) -> None:
    """The swap entries *ptes* are gone: let go of their slots, and of pages that only those need.

    A page that is mapped stays in the swap cache, unless swap is short.
    Linux: free_swap_and_cache() and __try_to_reclaim_swap(), mm/swapfile.c.
    """
    slots, si = swp_offset(ptes), mem.swap
    swap_free(si, slots)
    orphans = slots[si.swap_map[slots] == SWAP_HAS_CACHE]
    if not orphans.size:
        return
    pfns = find_get_pages(mem, np.unique(orphans))
    pfns = pfns[pfns > 0]
    if not vm_swap_full(si):
        free_swap_cache(mem, pfns)
    else:
        locked = pfns[trylock_page(mem, pfns)]
        try_to_free_swap(mem, locked)
        unlock_page(mem, locked)
    put_page(mem, pfns)


def reuse_swap_page(mem: MemMap, pfns: Pfns) -> Mask:
    """True for mapped *pfns* that nobody else can reach, so that a store need not copy them.

    The mapping's is their only reference, but for that of the swap cache, which they leave: a
    page stays there whose slot somebody else may read. Unlike Linux v4.20, which counts mappings
    and slots, references count (v5.19 and later): a pinned page that was shared is copied.
    Linux: reuse_swap_page(), mm/swapfile.c; wp_can_reuse_anon_folio(), mm/memory.c, v6.1.
    """
    if not every(has(mem.flags[pfns], PG_lru)):
        lru_add_drain_all(mem)
    base = 1 + mem.is_zone_device_page(pfns)
    cached = has(mem.flags[pfns], PG_swapcache)
    likely = cached & (mem.refcount[pfns] == base + 1)
    if some(likely):
        locked = pfns[likely]
        locked = locked[trylock_page(mem, locked)]
        try_to_free_swap(mem, locked)
        unlock_page(mem, locked)
    return mem.refcount[pfns] == base
