"""Page-table entries as x86-64 has them, and the pool that all tables are rows of.

        63 62    59 58 57      52 51              12 11 10  9  8 7 6 5 4 3 2 1 0
       +--+--------+--+----------+------------------+--+--+--+--+-+-+-+-+-+-+-+-+
       |NX|        |DM|          |       PFN        |SD|UW|SP| G|L|D|A| | |U|W|P|
       +--+--------+--+----------+------------------+--+--+--+--+-+-+-+-+-+-+-+-+

P present, W writable, U user, A accessed, D dirty, L leaf (huge), G global, and in an entry that
is not P: PROT_NONE. SP special (no struct page behind it: the zero page), UW write-protected by
userfaultfd, SD soft-dirty, DM ZONE_DEVICE. Five levels of 512: PGD 48, P4D 39, PUD 30, PMD 21,
PTE 12. An upper entry holds the row number of the next table where hardware would hold its frame.
Linux: arch/x86/include/asm/pgtable_types.h.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.errors import KernelBug, OutOfMemory
from mm.page_flags import BIT
from mm.typing import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Addresses,
    Indices,
    Mask,
    Pfns,
    Ptes,
    Word,
    number,
    pages,
    word,
)
from mm.vectors import every, has, joined, pieces, places, rows, some
from mm.vmstat import VmStat

PTRS_PER_PTE: Final = 512
PMD_SHIFT: Final = 21
PUD_SHIFT: Final = 30
P4D_SHIFT: Final = 39
PGDIR_SHIFT: Final = 48
PMD_SIZE: Final = 1 << PMD_SHIFT
PUD_SIZE: Final = 1 << PUD_SHIFT
UPPER_SHIFTS: Final = (PGDIR_SHIFT, P4D_SHIFT, PUD_SHIFT)  # the levels above the PMD table

_PAGE_PRESENT: Final = BIT(0)
_PAGE_RW: Final = BIT(1)
_PAGE_USER: Final = BIT(2)
_PAGE_ACCESSED: Final = BIT(5)
_PAGE_DIRTY: Final = BIT(6)
_PAGE_PROTNONE: Final = BIT(8)
_PAGE_SPECIAL: Final = BIT(9)
_PAGE_UFFD_WP: Final = BIT(10)  # since v5.7
_PAGE_SOFT_DIRTY: Final = BIT(11)
_PAGE_DEVMAP: Final = BIT(58)
_PAGE_NX: Final = BIT(63)
_PAGE_TABLE: Final = word(_PAGE_PRESENT | _PAGE_RW | _PAGE_USER | _PAGE_ACCESSED | _PAGE_DIRTY)

_PRESENT: Final = word(_PAGE_PRESENT | _PAGE_PROTNONE)
_EMPTY: Final = word(0)
PTE_PFN_MASK: Final = word(((1 << 52) - 1) & ~(PAGE_SIZE - 1))
# What stays in an entry when its VMA gets other rights.
_PAGE_CHG_MASK: Final = word(
    PTE_PFN_MASK
    | (_PAGE_ACCESSED | _PAGE_DIRTY)
    | (_PAGE_SPECIAL | _PAGE_UFFD_WP | _PAGE_SOFT_DIRTY | _PAGE_DEVMAP)
)
_NOT_WRITABLE: Final = word(~_PAGE_RW)
_SHIFT: Final = word(PAGE_SHIFT)
_ADDRESS_SHIFT: Final = number(PAGE_SHIFT)
_BLOCK_SHIFT: Final = PMD_SHIFT - PAGE_SHIFT
_SPARSE: Final = 4  # blocks in between to one address


def pte_none(ptes: Ptes) -> Mask:
    """True where nothing is mapped. Linux: pte_none(), asm/pgtable.h."""
    return ptes == _EMPTY


def pte_present(ptes: Ptes) -> Mask:
    """True where a frame is mapped, PROT_NONE included. Linux: pte_present(), asm/pgtable.h."""
    return has(ptes, _PRESENT)


def pte_write(ptes: Ptes) -> Mask:
    """True where the CPU may store. Linux: pte_write(), asm/pgtable.h."""
    return has(ptes, _PAGE_RW)


def pte_dirty(ptes: Ptes) -> Mask:
    """True where the CPU has stored. Linux: pte_dirty(), asm/pgtable.h."""
    return has(ptes, _PAGE_DIRTY)


def pte_young(ptes: Ptes) -> Mask:
    """True where the CPU has used the entry. Linux: pte_young(), asm/pgtable.h."""
    return has(ptes, _PAGE_ACCESSED)


def pte_special(ptes: Ptes) -> Mask:
    """True where no struct page stands behind the frame. Linux: pte_special(), asm/pgtable.h."""
    return has(ptes, _PAGE_SPECIAL)


def pte_devmap(ptes: Ptes) -> Mask:
    """True where a present entry maps device memory. Linux: pte_devmap(), asm/pgtable.h."""
    return has(ptes, _PAGE_DEVMAP)


def pte_soft_dirty(ptes: Ptes) -> Mask:
    """True where a store came since clear_refs. Linux: pte_soft_dirty(), asm/pgtable.h."""
    return has(ptes, _PAGE_SOFT_DIRTY)


def pte_uffd_wp(ptes: Ptes) -> Mask:
    """True where userfaultfd wants to know of a store. Linux: pte_uffd_wp(), v5.7."""
    return has(ptes, _PAGE_UFFD_WP)


def pte_mkuffd_wp(ptes: Ptes) -> Ptes:
    """The same entries, read-only until userfaultfd agrees. Linux: pte_mkuffd_wp(), v5.7."""
    return (ptes | _PAGE_UFFD_WP) & _NOT_WRITABLE


def pte_pfn(ptes: Ptes) -> Pfns:
    """The frame of each present entry, int64[n]. Linux: pte_pfn(), asm/pgtable.h."""
    return ((ptes & PTE_PFN_MASK) >> _SHIFT).view(np.int64)


def mk_pte(pfns: Pfns, prot: Ptes | Word) -> Ptes:
    """Entries that map *pfns* with *prot*, or each with its own. Linux: mk_pte(), asm/pgtable.h."""
    return (pfns.view(np.uint64) << _SHIFT) | prot


def pte_modify(ptes: Ptes, prot: Word) -> Ptes:
    """The same frames with the rights of *prot*. Linux: pte_modify(), asm/pgtable.h."""
    return (ptes & _PAGE_CHG_MASK) | prot


class TablePool:
    """All page tables of a machine: flat rows of 512 entries, uint64[rows * 512].

    Row 0 is never handed out and stays empty: an address without a table reads as row 0, so a
    lookup needs no special case for holes. The array is reserved whole and committed by the host
    as rows come into use, so views of it stay good while other tables are added.
    """

    def __init__(self, rows: int, vmstat: VmStat) -> None:
        self.entries: Ptes = np.zeros(rows * PTRS_PER_PTE, dtype=np.uint64)
        self.rows = rows
        self.vmstat = vmstat
        self.locks = vmstat.locks
        self.fresh = 1  # rows from here on were never used
        self.free: Indices = np.empty(0, dtype=np.int64)  # sorted
        # PMD tables found lately, by top table and GiB, as a processor caches them.
        self.walk_cache: dict[tuple[int, int], int] = {}

    @property
    def in_use(self) -> int:
        """Tables that processes and devices hold (nr_page_table_pages)."""
        return self.fresh - 1 - self.free.size

    def alloc(self, count: int) -> Indices:
        """*count* empty rows, ascending and consecutive where that can be had.

        Raises OutOfMemory. Linux: pte_alloc_one(), arch/x86/mm/pgtable.c.
        """
        with self.locks.atomic:
            return self._alloc(count)

    def _alloc(self, count: int) -> Indices:
        fresh = count - self.free.size
        if fresh > self.rows - self.fresh:
            raise OutOfMemory(
                f"wanted {count} page-table pages, {self.rows - 1 - self.in_use} of "
                f"{self.rows - 1} are free; unmap something or boot with more memory"
            )
        self.vmstat.add("nr_page_table_pages", count)
        if fresh <= 0:
            taken, self.free = self.free[:count], self.free[count:]
            return taken
        taken = np.concatenate((self.free, np.arange(self.fresh, self.fresh + fresh)))
        self.free = self.free[:0]
        self.fresh += fresh
        return taken

    def release(self, rows: Indices) -> None:
        """Give *rows* back; they must be empty. Linux: pte_free(), asm/pgalloc.h."""
        for row in rows.tolist():
            if some(self.row(row)):
                raise KernelBug(f"page table {row:#x} is freed with entries in it")
        with self.locks.atomic:
            self.walk_cache.clear()
            self.free = np.sort(np.concatenate((self.free, rows)))
        self.vmstat.add("nr_page_table_pages", -rows.size)

    def row(self, row: int) -> Ptes:
        """The 512 entries of table *row*, as a view."""
        return self.entries[row * PTRS_PER_PTE : (row + 1) * PTRS_PER_PTE]


def _index(addr: int, shift: int) -> int:
    return (addr >> shift) & (PTRS_PER_PTE - 1)


def pmd_offset(pool: TablePool, pgd: int, addr: int) -> int:
    """Row of the PMD table that covers *addr*, 0 if there is none.

    Linux: pmd_offset() and the three levels above it, asm/pgtable.h.
    """
    key = pgd, addr >> PUD_SHIFT
    row = pool.walk_cache.get(key, 0)
    if row:
        return row
    row = pgd
    for shift in UPPER_SHIFTS:
        entry = pool.entries.item(row * PTRS_PER_PTE + _index(addr, shift))
        if not entry:
            return 0
        row = entry >> PAGE_SHIFT
    pool.walk_cache[key] = row
    return row


def pmd_alloc(pool: TablePool, pgd: int, addr: int) -> int:
    """As pmd_offset(), making the tables that are missing: all of them or, where OutOfMemory is
    raised, none. Linux: pmd_alloc(), include/linux/mm.h."""
    row, missing = pgd, len(UPPER_SHIFTS)
    for shift in UPPER_SHIFTS:
        entry = pool.entries.item(row * PTRS_PER_PTE + _index(addr, shift))
        if not entry:
            break
        row, missing = entry >> PAGE_SHIFT, missing - 1
    if missing:
        tables = pool.alloc(missing)
        entries = mk_pte(tables, _PAGE_TABLE)
        for i, shift in enumerate(UPPER_SHIFTS[-missing:]):
            pool.entries[row * PTRS_PER_PTE + _index(addr, shift)] = entries[i]
            row = tables.item(i)
    return row


def pte_tables(pool: TablePool, pmd: int, start: int, end: int) -> Indices:
    """Rows of the PTE tables for [*start*, *end*) inside PMD table *pmd*; 0 where none is.

    The range may not cross 1 GiB. Shape: one row number per 2 MiB that the range touches.
    """
    first = pmd * PTRS_PER_PTE + _index(start, PMD_SHIFT)
    last = pmd * PTRS_PER_PTE + _index(end - 1, PMD_SHIFT)
    return pte_pfn(pool.entries[first : last + 1])


def pte_alloc(pool: TablePool, pgd: int, start: int, end: int) -> None:
    """Make every page table that [*start*, *end*) needs and lacks. Linux: pte_alloc().

    New PTE tables of one call are consecutive rows where the pool has them, which is what lets
    a walk see one long run. Raises OutOfMemory; tables made until then stay, empty.
    """
    while start < end:
        stop = min(end, (start | (PUD_SIZE - 1)) + 1)
        pmd = pmd_alloc(pool, pgd, start)
        missing = places(pte_tables(pool, pmd, start, stop) == 0)
        if missing.size:
            at = pmd * PTRS_PER_PTE + _index(start, PMD_SHIFT) + missing
            pool.entries[at] = mk_pte(pool.alloc(missing.size), _PAGE_TABLE)
        start = stop


def pte_alloc_each(pool: TablePool, pgd: int, addrs: Addresses) -> None:
    """Make the page tables that *addrs* (ascending, may be far apart) need and lack.

    Raises OutOfMemory. Linux: pte_alloc_map(), include/linux/mm.h.
    """
    if not addrs.size:
        return
    start, end = addrs.item(0), addrs.item(-1) + PAGE_SIZE
    if end - start == addrs.size << PAGE_SHIFT:  # no gap
        pte_alloc(pool, pgd, start, end)
        return
    blocks = addrs >> PMD_SHIFT
    for near in pieces(blocks[1:] > blocks[:-1] + 1, blocks.size):  # cut at gaps of whole tables
        first, last = blocks[near].item(0), blocks[near].item(-1)
        pte_alloc(pool, pgd, first << PMD_SHIFT, (last + 1) << PMD_SHIFT)


def pte_offset(pool: TablePool, pgd: int, addrs: Addresses) -> Indices:
    """Where in `pool.entries` the entry of each address is, int64[n], in any order.

    An address that no table covers gives a place in the empty row 0: reading it finds no entry,
    and only callers that made the tables may write. Linux: pte_offset_map(), asm/pgtable.h.
    """
    if addrs.size == 1:
        addr = addrs.item()
        table = _pte_table(pool, pgd, addr >> PMD_SHIFT)
        return pages(table * PTRS_PER_PTE + _index(addr, PAGE_SHIFT))
    numbers = addrs >> _ADDRESS_SHIFT
    if not addrs.size:
        return numbers
    if isinstance(rows(numbers), slice):
        ends = numbers.item(0) >> _BLOCK_SHIFT, numbers.item(-1) >> _BLOCK_SHIFT
        moves = _moves(pool, pgd, *ends)
        if every(moves == moves[0]):
            return numbers + moves[0]
    blocks = numbers >> _BLOCK_SHIFT
    first, last = blocks.min().item(), blocks.max().item()
    if last - first <= _SPARSE * addrs.size:
        return numbers + _moves(pool, pgd, first, last)[blocks - first]
    blocks, which = np.unique(blocks, return_inverse=True)
    tables = np.array([_pte_table(pool, pgd, block) for block in blocks.tolist()])
    return numbers + ((tables - blocks) * PTRS_PER_PTE)[which]


def _moves(pool: TablePool, pgd: int, first: int, last: int) -> Indices:
    """From a page's number to the place of its entry, for each 2 MiB block of *first* to *last*."""
    if first == last:
        return pages((_pte_table(pool, pgd, first) - first) * PTRS_PER_PTE)
    blocks = np.arange(first, last + 1)
    bounds = blocks << PMD_SHIFT
    tables = []
    for near in pieces(blocks[1:] & (PTRS_PER_PTE - 1) == 0, blocks.size):  # cut at each PMD table
        start, end = bounds.item(near.start), bounds.item(near.stop - 1) + PMD_SIZE
        tables.append(pte_tables(pool, pmd_offset(pool, pgd, start), start, end))
    return (joined(tables) - blocks) * PTRS_PER_PTE


def _pte_table(pool: TablePool, pgd: int, block: int) -> int:
    """Row of the PTE table for 2 MiB *block*, 0 if there is none."""
    pmd = pmd_offset(pool, pgd, block << PMD_SHIFT)
    return pool.entries.item(pmd * PTRS_PER_PTE + (block & (PTRS_PER_PTE - 1))) >> PAGE_SHIFT
