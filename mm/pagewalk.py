"""Walks over the page tables that yield runs of entries. Linux: mm/pagewalk.c.

A run is a view of the table pool: writing it writes the page table. Tables that stand in
consecutive rows come as one run, up to MAX_RUN entries, so that a caller's loop turns once per
stretch and nobody holds a lock or a vector for much longer than a migration does. Where no table
is, the run is a read-only stretch of empty entries: a hole looks like a table full of nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from mm.pgtable import (
    P4D_SHIFT,
    PGDIR_SHIFT,
    PMD_SHIFT,
    PMD_SIZE,
    PTRS_PER_PTE,
    PUD_SHIFT,
    PUD_SIZE,
    UPPER_SHIFTS,
    TablePool,
    pmd_offset,
    pte_tables,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Indices, Ptes
from mm.vectors import pieces, places, some

MAX_RUN: Final = 1 << 16  # entries: 512 KiB of table, 256 MiB of memory

_HOLE: Final = np.zeros(MAX_RUN, dtype=np.uint64)
_HOLE.flags.writeable = False


class Run(NamedTuple):
    """Entries of neighbouring pages.

    addr: address of the first; first: its page offset from the start of the walk;
    ptes: uint64[n], a view of the table, read-only where there is none.
    """

    addr: int
    first: int
    ptes: Ptes

    @property
    def addrs(self) -> Addresses:
        """The address of each entry, int64[n]."""
        return np.arange(self.addr, self.addr + self.ptes.size * PAGE_SIZE, PAGE_SIZE)

    @property
    def slice(self) -> slice:
        """Where the run's pages are in a vector over the whole walk."""
        return slice(self.first, self.first + self.ptes.size)


def walk_page_range(
    pool: TablePool, pgd: int, start: int, end: int, *, holes: bool = True
) -> Iterator[Run]:
    """Runs that cover [*start*, *end*) of the tables under *pgd*, in ascending order.

    Without *holes*, stretches that no table covers are left out. Linux: walk_page_range().
    """
    addr = start
    while addr < end:
        pmd = pmd_offset(pool, pgd, addr)
        if pmd:
            stop = min(end, (addr | (PUD_SIZE - 1)) + 1)
            yield from _walk_pmd_table(pool, pmd, start, addr, stop, holes=holes)
        else:
            stop = min(end, _next_table(pool, pgd, addr))
            if holes:
                yield from _cut(start, addr, stop, None)
        addr = stop


def _walk_pmd_table(
    pool: TablePool, pmd: int, origin: int, start: int, end: int, *, holes: bool
) -> Iterator[Run]:
    rows = pte_tables(pool, pmd, start, end)
    base = start & ~(PMD_SIZE - 1)
    for near in _runs_of_tables(rows):
        lo = max(start, base + (near.start << PMD_SHIFT))
        hi = min(end, base + (near.stop << PMD_SHIFT))
        row = rows.item(near.start)
        if row:
            at = row * PTRS_PER_PTE + ((lo >> PAGE_SHIFT) & (PTRS_PER_PTE - 1))
            yield from _cut(origin, lo, hi, pool.entries[at : at + ((hi - lo) >> PAGE_SHIFT)])
        elif holes:
            yield from _cut(origin, lo, hi, None)


def _runs_of_tables(rows: Indices) -> list[slice]:
    """*rows* as slices that stand in a row in the pool, or are all missing."""
    if rows.size == 1:
        return [slice(0, 1)]
    return pieces(rows[1:] != rows[:-1] + (rows[:-1] != 0), rows.size)


def _cut(origin: int, start: int, end: int, ptes: Ptes | None) -> Iterator[Run]:
    """One stretch as runs of at most MAX_RUN entries."""
    pages = (end - start) >> PAGE_SHIFT
    for first in range(0, pages, MAX_RUN):
        count = min(MAX_RUN, pages - first)
        view = _HOLE[:count] if ptes is None else ptes[first : first + count]
        addr = start + (first << PAGE_SHIFT)
        yield Run(addr, (addr - origin) >> PAGE_SHIFT, view)


def _next_table(pool: TablePool, pgd: int, addr: int) -> int:
    """First address after *addr*, which has no PMD table, that may have one."""
    row = pgd
    for shift in UPPER_SHIFTS:
        entries = pool.row(row)[(addr >> shift) & (PTRS_PER_PTE - 1) :]
        if not entries[0]:
            ahead = places(entries)
            step = ahead.item(0) if ahead.size else entries.size
            return ((addr >> shift) + step) << shift
        row = entries.item(0) >> PAGE_SHIFT
    return addr  # another thread has just made the table: look again


def free_pgtables(pool: TablePool, pgd: int, start: int, end: int) -> None:
    """Give back the tables that cover [*start*, *end*) and hold nothing any more.

    A table at the edge stays while an entry outside the range is in use. Linux: free_pgtables(),
    mm/memory.c.
    """
    addr = start
    while addr < end:
        pmd = pmd_offset(pool, pgd, addr)
        stop = min(end, (addr | (PUD_SIZE - 1)) + 1) if pmd else _next_table(pool, pgd, addr)
        if pmd:
            _free_pte_tables(pool, pmd, addr, stop)
            _free_upper_tables(pool, pgd, addr)
        addr = stop


def _free_pte_tables(pool: TablePool, pmd: int, start: int, end: int) -> None:
    rows = pte_tables(pool, pmd, start, end)
    first = (start >> PMD_SHIFT) & (PTRS_PER_PTE - 1)
    used = places(rows)
    tables = pool.entries.reshape(-1, PTRS_PER_PTE)
    empty = used[~tables[rows[used]].any(axis=1)]
    if empty.size:
        pool.release(rows[empty])
        pool.row(pmd)[first + empty] = 0


def _free_upper_tables(pool: TablePool, pgd: int, addr: int) -> None:
    """Free the PMD, PUD and P4D table of *addr*, from below, as far as they are empty."""
    path = [pgd]
    for shift in UPPER_SHIFTS:
        entry = pool.row(path[-1]).item((addr >> shift) & (PTRS_PER_PTE - 1))
        path.append(entry >> PAGE_SHIFT)
    for shift in (PUD_SHIFT, P4D_SHIFT, PGDIR_SHIFT):
        table = path.pop()
        if some(pool.row(table)):
            return
        pool.release(np.array([table], dtype=np.int64))
        pool.row(path[-1])[(addr >> shift) & (PTRS_PER_PTE - 1)] = 0
