"""Page-table entries against bit arithmetic on Python ints; tables against a dict of prefixes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import KernelBug, OutOfMemory
from mm.pgtable import (
    PGDIR_SHIFT,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SIZE,
    UPPER_SHIFTS,
    TablePool,
    mk_pte,
    pmd_alloc,
    pmd_offset,
    pte_alloc,
    pte_alloc_each,
    pte_dirty,
    pte_mkuffd_wp,
    pte_modify,
    pte_none,
    pte_offset,
    pte_pfn,
    pte_present,
    pte_soft_dirty,
    pte_special,
    pte_tables,
    pte_uffd_wp,
    pte_write,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, pages
from mm.vmstat import VmStat

PFN_BITS = 40
words = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 2**12 - 1), max_size=20)
pfn_lists = st.lists(st.integers(0, 2**PFN_BITS - 1), max_size=20)

# Near the borders of every level, and anywhere in 57 bits.
near_borders = st.builds(
    lambda shift, n, off: ((n << shift) + off * PAGE_SIZE) % (1 << 57),
    st.sampled_from([PMD_SHIFT, *UPPER_SHIFTS]),
    st.integers(0, 3),
    st.integers(-2, 2),
)
anywhere = st.integers(0, (1 << (57 - PAGE_SHIFT)) - 1).map(lambda page: page << PAGE_SHIFT)
address_sets = st.sets(near_borders | anywhere, max_size=12)


def bit(*numbers):
    """A function that says whether a word has any of the bits *numbers*."""
    return lambda word: any(word >> n & 1 for n in numbers)


def entries(words):
    return np.array(words, dtype=np.uint64)


def addresses(addrs):
    return np.array(sorted(addrs), dtype=np.int64)


def pool_of(rows=200):
    pool = TablePool(rows, VmStat())
    return pool, pool.alloc(1).item()


def tables_needed(addrs):
    """Distinct tables below the top one that *addrs* need: a prefix of each address a level."""
    return sum(len({addr >> shift for addr in addrs}) for shift in (*UPPER_SHIFTS, PMD_SHIFT))


class TestEntries:
    @pytest.mark.parametrize(
        ("predicate", "expected"),
        [
            (pte_none, lambda word: word == 0),
            (pte_present, bit(0, 8)),
            (pte_write, bit(1)),
            (pte_dirty, bit(6)),
            (pte_special, bit(9)),
            (pte_uffd_wp, bit(10)),
            (pte_soft_dirty, bit(11)),
        ],
    )
    @given(words=words)
    def test_predicates(self, predicate, expected, words):
        """Each predicate looks at the bits that x86-64 has for it and at no other."""
        mask = predicate(entries(words))

        assert [expected(word) for word in words] == mask.tolist()

    @given(words=words)
    def test_frame(self, words):
        """The frame is bits 12 to 51, as int64."""
        pfns = pte_pfn(entries(words))

        assert [word >> 12 & (2**PFN_BITS - 1) for word in words] == pfns.tolist()
        assert np.int64 == pfns.dtype

    @given(pfns=pfn_lists, low=st.integers(0, 2**12 - 1), high=st.integers(0, 2**12 - 1))
    def test_make(self, pfns, low, high):
        """An entry is a frame between two groups of bits, and loses neither."""
        prot = low | high << 52

        ptes = mk_pte(np.array(pfns, dtype=np.int64), np.uint64(prot))

        assert [pfn << 12 | prot for pfn in pfns] == ptes.tolist()
        assert pfns == pte_pfn(ptes).tolist()
        assert np.uint64 == ptes.dtype

    @given(words=words, prot=st.integers(0, 2**64 - 1))
    def test_modify(self, words, prot):
        """Frame, accessed, dirty, special, device and watchers' bits stay; the rest is the new."""
        kept = sum(1 << n for n in (5, 6, 9, 10, 11, 58, *range(12, 52)))

        ptes = pte_modify(entries(words), np.uint64(prot))

        assert [word & kept | prot for word in words] == ptes.tolist()

    @given(words=words)
    def test_uffd_wp(self, words):
        """What userfaultfd protects is bit 10, and no CPU may store."""
        assert [(word | 1 << 10) & ~2 for word in words] == pte_mkuffd_wp(entries(words)).tolist()


class TestTablePool:
    def test_row_0_is_never_handed_out(self):
        """Row 0 stands for the table that is not there."""
        pool = TablePool(10, VmStat())

        rows = pool.alloc(9)

        assert list(range(1, 10)) == rows.tolist()

    def test_full_pool(self):
        """A request beyond what is left says what is left, and takes nothing."""
        pool = TablePool(10, VmStat())
        pool.alloc(4)

        with pytest.raises(OutOfMemory, match="wanted 6 page-table pages, 5 of 9 are free"):
            pool.alloc(6)

        assert 4 == pool.in_use == pool.vmstat["nr_page_table_pages"]
        assert 5 == pool.alloc(5).size

    def test_released_rows_come_first(self):
        """Rows that were given back are handed out again, ascending, before fresh ones."""
        pool = TablePool(10, VmStat())
        pool.alloc(4)
        pool.release(pages(3, 1))

        assert [1, 3, 5] == pool.alloc(3).tolist()

    def test_table_with_entries_is_not_freed(self):
        """The bug names the row."""
        pool = TablePool(10, VmStat())
        row = pool.alloc(3)[2].item()
        pool.row(row)[511] = 1

        with pytest.raises(KernelBug, match="page table 0x3 is freed with entries"):
            pool.release(pages(row))

    def test_views_outlive_growth(self):
        """A view of a table stays the table while others are added."""
        pool = TablePool(3000, VmStat())
        view = pool.row(pool.alloc(1).item())
        pool.alloc(2000)

        view[7] = 5

        assert 5 == pool.entries[512 + 7]

    @given(moves=st.lists(st.integers(-8, 8), max_size=20))
    def test_any_sequence(self, moves):
        """Whatever is taken and given back: rows are distinct, in use or free, and counted."""
        pool = TablePool(40, VmStat())
        held = []
        for move in moves:
            if 0 < move <= 39 - len(held):
                held += pool.alloc(move).tolist()
            elif move < 0:
                pool.release(pages(*held[move:]))
                del held[move:]
            assert len(set(held)) == len(held) == pool.in_use
            assert len(held) == pool.vmstat["nr_page_table_pages"]
        assert set(held) <= set(range(1, 40))


class TestPteAlloc:
    @given(addrs=address_sets)
    def test_tables_are_those_that_addresses_need(self, addrs):
        """One table for each prefix of an address, shared where prefixes are; none twice."""
        pool, pgd = pool_of()

        pte_alloc_each(pool, pgd, addresses(addrs))
        pte_alloc_each(pool, pgd, addresses(addrs))

        assert 1 + tables_needed(addrs) == pool.in_use

    @given(addrs=address_sets, others=address_sets)
    def test_every_address_has_an_entry_of_its_own(self, addrs, others):
        """What is written through pte_offset() is read back, in any order; the rest is empty."""
        pool, pgd = pool_of()
        pte_alloc_each(pool, pgd, addresses(addrs))
        numbers = {addr: i + 1 for i, addr in enumerate(sorted(addrs))}
        pool.entries[pte_offset(pool, pgd, addresses(addrs))] = entries([*numbers.values()])
        asked = [*others, *addrs]

        found = pool.entries[pte_offset(pool, pgd, np.array(asked, dtype=np.int64))]

        assert [numbers.get(addr, 0) for addr in asked] == found.tolist()

    @given(data=st.data(), first=st.integers(0, 1023), npages=st.integers(1, 3000))
    def test_long_range(self, data, first, npages):
        """Each page is found as it is alone, whichever tables of the range there are, and where."""
        pool, pgd = pool_of()
        start = PUD_SIZE - PMD_SIZE + first * PAGE_SIZE
        for block in data.draw(st.permutations(range(8))):
            if data.draw(st.booleans()):
                pte_alloc(pool, pgd, *[PUD_SIZE + (block - 1 + i) * PMD_SIZE for i in range(2)])
        addrs = start + np.arange(npages) * PAGE_SIZE

        at = pte_offset(pool, pgd, addrs)

        alone = [pte_offset(pool, pgd, addrs[i : i + 1]).item() for i in range(0, npages, 37)]
        assert alone == at[::37].tolist()
        assert at[::-1].tolist() == pte_offset(pool, pgd, addrs[::-1]).tolist()

    @given(addrs=address_sets)
    def test_address_without_a_table_is_in_row_0(self, addrs):
        """Nothing is made by looking."""
        pool, pgd = pool_of()

        at = pte_offset(pool, pgd, addresses(addrs))

        assert [addr >> 12 & 511 for addr in sorted(addrs)] == at.tolist()
        assert 1 == pool.in_use

    def test_tables_of_one_call_are_consecutive(self):
        """The entries of a long range lie in a row, so that a walk sees one run."""
        pool, pgd = pool_of()

        pte_alloc(pool, pgd, PUD_SIZE + PAGE_SIZE, PUD_SIZE + 5 * PMD_SIZE)

        pmd = pmd_offset(pool, pgd, PUD_SIZE)
        rows = pte_tables(pool, pmd, PUD_SIZE, PUD_SIZE + 5 * PMD_SIZE)
        assert [1] * 4 == np.diff(rows).tolist()
        assert 1 + 3 + 5 == pool.in_use

    def test_empty_range(self):
        """No address needs no table."""
        pool, pgd = pool_of()

        pte_alloc_each(pool, pgd, pages())

        assert 1 == pool.in_use
        assert 0 == pte_offset(pool, pgd, pages()).size

    def test_full_pool(self):
        """What was made until the pool was full can be used."""
        pool, pgd = pool_of(rows=8)

        with pytest.raises(OutOfMemory, match="wanted 4 page-table pages, 3 of 7 are free"):
            pte_alloc(pool, pgd, 0, 4 * PMD_SIZE)
        pte_alloc(pool, pgd, 0, 3 * PMD_SIZE)

        assert 7 == pool.in_use


class TestPmdOffset:
    def test_missing_at_each_level(self):
        """Row 0 where any upper table is missing."""
        pool, pgd = pool_of()
        pmd = pmd_alloc(pool, pgd, 0)

        assert pmd == pmd_offset(pool, pgd, PUD_SIZE - 1)
        assert [0, 0, 0] == [pmd_offset(pool, pgd, 1 << shift) for shift in UPPER_SHIFTS]
        assert pmd == pmd_alloc(pool, pgd, PMD_SIZE)

    def test_top_of_the_address_space(self):
        """The last of five levels' 57 bits is within reach."""
        pool, pgd = pool_of()
        last = (512 << PGDIR_SHIFT) - PAGE_SIZE

        pte_alloc_each(pool, pgd, pages(last))

        assert 511 == pte_offset(pool, pgd, pages(last))[0] % 512
