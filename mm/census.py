"""What page tables hold, counted anew, for mm/debug.py to hold the columns against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.movable import page_has_driver
from mm.page_flags import PG_private
from mm.pagewalk import walk_page_range
from mm.pgtable import (
    pte_dirty,
    pte_pfn,
    pte_present,
    pte_special,
)
from mm.shmem import shmem_mapping
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_swap_entry,
    swp_offset,
)
from mm.types import VM_LOCKED, MemMap, MmStruct, Vma
from mm.typing import Addresses, Mask, Pfns, Ptes
from mm.vectors import has
from mm.xarray import MAX_INDEX, xa_is_value, xa_to_value

_SHOWN: Final = 4  # pages that a complaint names


Complaints = Iterator[str]


class Census(NamedTuple):
    """What page tables hold, counted anew.

    pages: every PFN that exists, ascending; mapped: entries that map each PFN, by PFN;
    waiting: migration entries for each PFN; taken: exclusive entries for each PFN; locked: entries
    of VM_LOCKED VMAs that map each; held: references from pagevecs, pins, buffers, the page cache,
    the swap cache and drivers of movable pages, by PFN; swapped: entries that hold each slot.
    """

    pages: Pfns
    mapped: NDArray[np.int32]
    waiting: NDArray[np.int32]
    taken: NDArray[np.int32]
    locked: NDArray[np.int32]
    held: NDArray[np.int32]
    swapped: NDArray[np.int32]


def take_census(mem: MemMap) -> Census:
    """Walk every page table, and whoever else holds pages."""
    zones = [zone for zone in mem.zones if zone is not None]
    spans = [np.arange(zone.start_pfn, zone.end_pfn) for zone in zones]
    pages = np.sort(np.concatenate(spans))
    mapped, waiting, taken, locked, held = np.zeros((5, mem.limit_pfn), dtype=np.int32)
    swapped = np.zeros(mem.swap.max, dtype=np.int32)
    one = np.int32(1)
    for mm in mem.mms:
        for vma, _, ptes in used_entries(mm):
            normal = pte_present(ptes) & ~pte_special(ptes)
            for counts, pfns in (
                (mapped, pte_pfn(ptes[normal])),
                (locked, pte_pfn(ptes[normal & bool(vma.vm_flags & VM_LOCKED)])),
                (mapped, swp_offset(ptes[is_device_private_entry(ptes)])),
                (waiting, swp_offset(ptes[is_migration_entry(ptes)])),
                (taken, swp_offset(ptes[is_device_exclusive_entry(ptes)])),
            ):
                np.add.at(counts, pfns[(pfns >= 0) & (pfns < mem.limit_pfn)], one)
            slots = swp_offset(ptes[is_swap_entry(ptes)])
            np.add.at(swapped, slots[slots < mem.swap.max], one)
    for pagevec in (*mem.pagevecs, *mem.lazyfree_pagevecs):
        np.add.at(held, pagevec.live(), one)
    for pin in mem.pins:
        np.add.at(held, pin.counted(pin.pfns), np.int32(pin.refs))
    held[mem.zero_pfn] += 1
    for mapping in mem.mappings.values():
        _, entries = mapping.i_pages.find(0, MAX_INDEX)
        np.add.at(held, entries[(entries > 0) & (entries < mem.limit_pfn)], one)
        if shmem_mapping(mapping):
            slots = xa_to_value(entries[xa_is_value(entries)])
            np.add.at(swapped, slots[slots < mem.swap.max], one)
    held[pages[has(mem.flags[pages], PG_private)]] += 1
    held[pages[page_has_driver(mem, pages)]] += 1
    cached = mem.swap.cache
    np.add.at(held, cached[(cached > 0) & (cached < mem.limit_pfn)], one)
    return Census(pages, mapped, waiting, taken, locked, held, swapped)


def used_entries(mm: MmStruct) -> Iterator[tuple[Vma, Addresses, Ptes]]:
    """All non-empty entries of *mm* that lie in a VMA."""
    for vma in mm.vmas:
        for run in walk_page_range(mm.mem.tables, mm.pgd, vma.vm_start, vma.vm_end, holes=False):
            used = np.flatnonzero(run.ptes)
            if used.size:
                yield vma, run.addrs[used], run.ptes[used]


def complain(column: str, pfns: Pfns, wrong: Mask, rule: str, what: str = "page") -> Complaints:
    """One line for the pages, or *what* else they are, that are *wrong*."""
    if wrong.any():
        shown = ", ".join(map(hex, pfns[wrong][:_SHOWN].tolist()))
        more = f" and {int(wrong.sum()) - _SHOWN} more" if wrong.sum() > _SHOWN else ""
        yield f"{column}: {what} {shown}{more}: {rule}"


def dirty_in_tables(mem: MemMap) -> Mask:
    """True for pages that some entry says a CPU has stored to, by PFN."""
    dirty = np.zeros(mem.limit_pfn, dtype=np.bool_)
    for mm in mem.mms:
        for _, _, ptes in used_entries(mm):
            pfns = pte_pfn(ptes[pte_present(ptes) & pte_dirty(ptes)])
            dirty[pfns[pfns < mem.limit_pfn]] = True
    return dirty
