"""mincore(): which pages of a range are in memory. Linux: mm/mincore.c."""

from __future__ import annotations

import numpy as np

from mm.errors import InvalidArgument, NotMapped
from mm.mmap import find_vma, page_align
from mm.page_flags import PG_uptodate
from mm.pagewalk import walk_page_range
from mm.shmem import shmem_mapping
from mm.swap_state import lookup_swap_cache
from mm.swapops import is_swap_entry, pte_none_mostly, swp_offset
from mm.types import MemMap, MmStruct, Vma, linear_page_index
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Mask, Ptes
from mm.vectors import has, places
from mm.xarray import xa_is_value, xa_to_value


def do_mincore(mm: MmStruct, start: int, length: int) -> Mask:
    """True for pages that an access would find without I/O, bool[pages of the range].

    What stands in the page table for a page that is somewhere else but not in swap counts: one in
    device memory, or on its way. One in swap does while the swap cache has it. Where nothing
    stands, of a file the page cache knows.
    Takes mmap_sem for read. Raises InvalidArgument, NotMapped.
    Linux: mincore() and do_mincore(), mm/mincore.c.
    """
    if start % PAGE_SIZE:
        raise InvalidArgument(f"mincore: addr {start:#x} is not a multiple of {PAGE_SIZE:#x}")
    end = start + page_align(length)
    resident = np.zeros((end - start) >> PAGE_SHIFT, dtype=np.bool_)
    with mm.mmap_sem.read():
        addr = start
        while addr < end:
            vma = find_vma(mm, addr)
            if vma is None or vma.vm_start > addr:
                raise NotMapped(f"mincore: nothing is mapped at {addr:#x}")
            if vma.vm_file is not None:
                first, last = max(addr, vma.vm_start), min(vma.vm_end, end)
                here = slice((first - start) >> PAGE_SHIFT, (last - start) >> PAGE_SHIFT)
                resident[here] = _mincore_file(vma, first, last)
            addr = vma.vm_end
        for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
            with mm.page_table_lock:
                known, there = _mincore_ptes(mm.mem, run.ptes)
                resident[run.slice][known] = there[known]
    return resident


def _mincore_file(vma: Vma, start: int, end: int) -> Mask:
    """Whether the file has pages in memory for [*start*, *end*). Linux: mincore_page()."""
    mem, mapping = vma.vm_mm.mem, vma.vm_file.f_mapping
    entries = mapping.i_pages.load(linear_page_index(vma, np.arange(start, end, PAGE_SIZE)))
    if shmem_mapping(mapping):
        swapped = places(xa_is_value(entries))
        entries[swapped] = lookup_swap_cache(mem, xa_to_value(entries[swapped]))
    return (entries > 0) & has(mem.flags[entries], PG_uptodate)


def _mincore_ptes(mem: MemMap, ptes: Ptes) -> tuple[Mask, Mask]:
    """Where there is an entry, and whether it says that the page is in memory.

    Linux: mincore_pte_range() and mincore_page(), mm/mincore.c.
    """
    resident = ~pte_none_mostly(ptes)
    known = resident.copy()
    swapped = places(is_swap_entry(ptes))
    if swapped.size:
        pfns = lookup_swap_cache(mem, swp_offset(ptes[swapped]))
        resident[swapped] = (pfns > 0) & has(mem.flags[pfns], PG_uptodate)
    return known, resident
