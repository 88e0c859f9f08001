"""Walks against a dict of entries; free_pgtables() against a set of tables."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import OutOfMemory
from mm.pagewalk import MAX_RUN, Run, free_pgtables, walk_page_range
from mm.pgtable import (
    P4D_SHIFT,
    PGDIR_SHIFT,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SHIFT,
    TablePool,
    pte_alloc,
    pte_alloc_each,
    pte_offset,
    pte_pfn,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE
from mm.vectors import places
from mm.vmstat import VmStat

SHIFTS = (PGDIR_SHIFT, P4D_SHIFT, PUD_SHIFT, PMD_SHIFT)  # of the tables below each level
TOP = 1 << 57
BORDERS = st.sampled_from([5 << PMD_SHIFT, 3 << PUD_SHIFT, 1 << P4D_SHIFT, 2 << PGDIR_SHIFT])

# A border between tables of some level, and pages within 4 MiB of it.
offsets = st.integers(-1024, 1023) | st.integers(-2, 1)
scenes = st.tuples(BORDERS, st.sets(offsets, max_size=10), offsets, offsets)


def tables_with(entries):
    """A pool whose one top table maps {address: entry}; its tables are where entries are."""
    pool = TablePool(200, VmStat())
    pgd = pool.alloc(1).item()
    addrs = np.array(sorted(entries), dtype=np.int64)
    pte_alloc_each(pool, pgd, addrs)
    values = np.array([entries[addr] for addr in addrs.tolist()], dtype=np.uint64)
    pool.entries[pte_offset(pool, pgd, addrs)] = values
    return pool, pgd


def scene(drawn):
    """(pool, top table, {address: entry}, start, end) of one of `scenes`."""
    border, used, one, other = drawn
    entries = {border + page * PAGE_SIZE: page + 5000 for page in used}
    start, last = sorted((border + one * PAGE_SIZE, border + other * PAGE_SIZE))
    return *tables_with(entries), entries, start, last + PAGE_SIZE


def tables_under(pool, pgd):
    """Every table below the top one, as (shift, address of its first byte), step by step."""
    found, level = set(), {0: pgd}
    for shift in SHIFTS:
        below = {}
        for base, row in level.items():
            for i in np.flatnonzero(pool.row(row)).tolist():
                below[base + (i << shift)] = int(pte_pfn(pool.row(row)[i : i + 1])[0])
        found |= {(shift, base) for base in below}
        level = below
    return found


def prefixes(addrs):
    """The tables that *addrs* lie in, in the same form."""
    return {(shift, addr >> shift << shift) for shift in SHIFTS for addr in addrs}


class TestWalkPageRange:
    @given(drawn=scenes)
    def test_every_page_once_and_in_order(self, drawn):
        """With holes, the runs tile the range and show what the tables hold."""
        pool, pgd, entries, start, end = scene(drawn)

        runs = list(walk_page_range(pool, pgd, start, end))

        addrs = np.concatenate([run.addrs for run in runs])
        ptes = np.concatenate([run.ptes for run in runs])
        assert list(range(start, end, PAGE_SIZE)) == addrs.tolist()
        assert [entries.get(addr, 0) for addr in addrs.tolist()] == ptes.tolist()

    @given(drawn=scenes)
    def test_without_holes(self, drawn):
        """Without holes, only pages that a table covers are seen."""
        pool, pgd, entries, start, end = scene(drawn)
        covered = {addr >> PMD_SHIFT for addr in entries}
        expected = [a for a in range(start, end, PAGE_SIZE) if a >> PMD_SHIFT in covered]

        runs = walk_page_range(pool, pgd, start, end, holes=False)

        assert expected == [addr for run in runs for addr in run.addrs.tolist()]

    @given(drawn=scenes)
    def test_whole_address_space(self, drawn):
        """57 bits with a few pages in them take no longer than the pages."""
        pool, pgd, entries, _, _ = scene(drawn)

        runs = walk_page_range(pool, pgd, 0, TOP, holes=False)

        found = {run.addrs.item(i): run.ptes.item(i) for run in runs for i in places(run.ptes)}
        assert entries == found

    @given(drawn=scenes)
    def test_run_knows_its_place(self, drawn):
        """`first` and `slice` count pages from the start of the walk."""
        pool, pgd, _, start, end = scene(drawn)
        pages = np.arange(start, end, PAGE_SIZE)

        for run in walk_page_range(pool, pgd, start, end):
            assert run.addrs.tolist() == pages[run.slice].tolist()
            assert (run.addr - start) >> PAGE_SHIFT == run.first

    def test_writing_a_run_writes_the_table(self):
        """A run is a view."""
        pool, pgd = tables_with({PMD_SIZE: 7})

        for run in walk_page_range(pool, pgd, PMD_SIZE, PMD_SIZE + 2 * PAGE_SIZE):
            run.ptes[:] = [8, 9]

        at = pte_offset(pool, pgd, np.array([PMD_SIZE, PMD_SIZE + PAGE_SIZE]))
        assert [8, 9] == pool.entries[at].tolist()

    def test_hole_cannot_be_written(self):
        """Where no table is, an entry would be lost."""
        pool, pgd = tables_with({})
        (run,) = walk_page_range(pool, pgd, 0, PAGE_SIZE)

        with pytest.raises(ValueError, match="read-only"):
            run.ptes[0] = 1

    @pytest.mark.parametrize("mapped", [True, False])
    def test_neighbouring_tables_are_one_run(self, mapped):
        """Tables in consecutive rows, and holes, are cut only every MAX_RUN entries."""
        pool, pgd = tables_with({})
        end = 132 * PMD_SIZE
        if mapped:
            pte_alloc(pool, pgd, 0, end)

        sizes = [run.ptes.size for run in walk_page_range(pool, pgd, PAGE_SIZE, end)]

        assert [MAX_RUN, 132 * 512 - MAX_RUN - 1] == sizes

    def test_tables_out_of_order_are_runs_of_their_own(self):
        """A run never reaches into a table that somebody else's pages use."""
        pool, pgd = tables_with({3 * PMD_SIZE: 30})
        pte_alloc(pool, pgd, PMD_SIZE, 3 * PMD_SIZE)

        runs = list(walk_page_range(pool, pgd, 0, 4 * PMD_SIZE))

        assert [512, 1024, 512] == [run.ptes.size for run in runs]
        assert 30 == runs[2].ptes[0]

    def test_empty_range(self):
        """A walk from a place to itself sees nothing."""
        assert [] == list(walk_page_range(*tables_with({0: 1}), PAGE_SIZE, PAGE_SIZE))


class TestRun:
    def test_addresses(self):
        """One for each entry, a page apart."""
        run = Run(0x5000, 2, np.zeros(3, dtype=np.uint64))

        assert [0x5000, 0x6000, 0x7000] == run.addrs.tolist()
        assert slice(2, 5) == run.slice


class TestFreePgtables:
    @given(drawn=scenes, zapped=st.sets(offsets, max_size=10))
    def test_exactly_what_is_empty(self, drawn, zapped):
        """A table stays if an entry needs it or the range does not touch it; all others go."""
        pool, pgd, entries, start, end = scene(drawn)
        gone = {a for a in entries if start <= a < end or (a - drawn[0]) >> PAGE_SHIFT in zapped}
        if gone:
            pool.entries[pte_offset(pool, pgd, np.array(sorted(gone)))] = 0
        needed = prefixes(entries.keys() - gone)
        outside = {addr for addr in gone if not touches(addr, start, end)}

        free_pgtables(pool, pgd, start, end)

        assert needed | prefixes(outside) == tables_under(pool, pgd)
        assert 1 + len(needed | prefixes(outside)) == pool.in_use

    @given(drawn=scenes)
    def test_nothing_is_empty(self, drawn):
        """Tables with entries stay, even where the range covers them."""
        pool, pgd, entries, _, _ = scene(drawn)

        free_pgtables(pool, pgd, 0, TOP)

        assert prefixes(entries) == tables_under(pool, pgd)

    @pytest.mark.parametrize("left", range(5))
    def test_path_that_a_full_pool_cut_short(self, left):
        """The upper tables of an address that could not get its lower ones go too."""
        pool = TablePool(2 + left, VmStat())
        pgd = pool.alloc(1).item()

        with suppress(OutOfMemory):
            pte_alloc(pool, pgd, PMD_SIZE, PMD_SIZE + PAGE_SIZE)
        free_pgtables(pool, pgd, 0, TOP)

        assert set() == tables_under(pool, pgd)
        assert 1 == pool.in_use


def touches(addr, start, end):
    """True if [start, end) has a page of the 2 MiB that the table of *addr* covers."""
    base = addr >> PMD_SHIFT << PMD_SHIFT
    return base < end and start < base + PMD_SIZE
