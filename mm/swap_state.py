"""The swap cache: pages that are in memory and have a slot in swap. Linux: mm/swap_state.c.

A page enters on its way out, before its mappings become swap entries, or on its way in, when more
than one process will look for it. While it is there `private` is its slot, the cache holds a
reference, and whoever has the page lock may take it out. A clean page's slot holds the same bytes.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.errors import KernelBug
from mm.memcontrol import mem_cgroup_try_charge_swap
from mm.page_flags import PG_dirty, PG_swapcache
from mm.swap import get_page, put_page
from mm.swap_slots import SWAP_HAS_CACHE, get_swap_pages, put_swap_page
from mm.types import MemMap
from mm.typing import Mask, Pfns, Slots, word
from mm.vectors import every, has, parted, rows

_NOT_CACHED: Final = word(~PG_swapcache)


def lookup_swap_cache(mem: MemMap, slots: Slots) -> Pfns:
    """The page in the swap cache for each of *slots*, 0 where none is; takes no references.

    Linux: lookup_swap_cache(), mm/swap_state.c.
    """
    return np.maximum(mem.swap.cache[rows(slots)], 0)


def find_get_pages(mem: MemMap, slots: Slots) -> Pfns:
    """As lookup_swap_cache(), with a reference to each page. Linux: find_get_page()."""
    with mem.locks.atomic:
        pfns = lookup_swap_cache(mem, slots)
        get_page(mem, pfns[pfns > 0])
    return pfns


def add_to_swap(mem: MemMap, pfns: Pfns) -> Mask:
    """Give locked anonymous *pfns* a slot each; False where none is free, or the group's to have.

    They become dirty: no copy of theirs is in swap yet. Linux: add_to_swap(), mm/swap_state.c.
    """
    slots = get_swap_pages(mem.swap, pfns.size)
    may = np.arange(pfns.size) < slots.size
    if mem.memcgs:
        may = mem_cgroup_try_charge_swap(mem, pfns, slots)
        slots, refused = parted(slots, may[: slots.size])
        put_swap_page(mem.swap, refused)
    added = pfns if every(may) else pfns[may]
    add_to_swap_cache(mem, added, slots)
    with mem.locks.atomic:
        mem.flags[rows(added)] |= PG_dirty
    return may


def add_to_swap_cache(mem: MemMap, pfns: Pfns, slots: Slots) -> None:
    """Let *pfns*, locked, stand for *slots*, which none does. Linux: add_to_swap_cache()."""
    if not pfns.size:
        return
    which, si = rows(slots), mem.swap
    with mem.locks.atomic:
        get_page(mem, pfns)
        mem.flags[rows(pfns)] |= PG_swapcache
        mem.private[rows(pfns)] = slots
        si.cache[which] = pfns
        si.swap_map[which] |= SWAP_HAS_CACHE
    mem.vmstat.add("nr_file_pages", pfns.size)
    mem.vmstat.add("nr_swapcached", pfns.size)


def delete_from_swap_cache(mem: MemMap, pfns: Pfns, shadows: Slots | None = None) -> None:
    """Take locked *pfns* out; slots that no entry holds are free then.

    In the place of each comes one of *shadows*, which say when it went. Drops the reference of the
    cache. Linux: delete_from_swap_cache(), mm/swap_state.c.
    """
    if not pfns.size:
        return
    cached = rows(pfns)
    with mem.locks.atomic:
        slots = mem.private[pfns]
        if not every(has(mem.flags[cached], PG_swapcache)):
            raise KernelBug(f"page {pfns[0]:#x} or one after it is not in the swap cache")
        mem.swap.cache[rows(slots)] = 0 if shadows is None else ~shadows
        mem.flags[cached] &= _NOT_CACHED
        mem.private[cached] = 0
        put_swap_page(mem.swap, slots)
    mem.vmstat.add("nr_file_pages", -pfns.size)
    mem.vmstat.add("nr_swapcached", -pfns.size)
    put_page(mem, pfns)


def replace_in_swap_cache(mem: MemMap, new: Pfns, old: Pfns) -> None:
    """Let new[i] stand for the slot of old[i], as a migration needs; both are locked.

    Linux: migrate_page_move_mapping(), mm/migrate.c, of pages with a mapping.
    """
    with mem.locks.atomic:
        slots = mem.private[old]
        get_page(mem, new)
        mem.private[new] = slots
        mem.swap.cache[slots] = new
        mem.flags[new] |= PG_swapcache
        mem.flags[old] &= _NOT_CACHED
        mem.private[old] = 0
    put_page(mem, old)
