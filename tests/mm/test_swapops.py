"""Swap-type entries against bit arithmetic on Python ints."""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.pgtable import mk_pte, pte_none, pte_present, pte_write
from mm.swapops import (
    MAX_SWAPFILES,
    SWP_DEVICE_EXCLUSIVE_READ,
    SWP_DEVICE_EXCLUSIVE_WRITE,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_EXCLUSIVE,
    SWP_HWPOISON,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_WRITE,
    SWP_PTE_MARKER,
    SWP_SOFT_DIRTY,
    SWP_UFFD_WP,
    alike,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_hwpoison_entry,
    is_migration_entry,
    is_pfn_swap_entry,
    is_pte_marker,
    is_swap_entry,
    is_swap_pte,
    is_write_device_exclusive_entry,
    is_write_device_private_entry,
    is_write_migration_entry,
    make_device_private_entry,
    make_hwpoison_entry,
    make_migration_entry,
    make_pte_marker,
    make_readable,
    make_swap_entry,
    non_swap_entry,
    pte_none_mostly,
    pte_swp_exclusive,
    pte_swp_soft_dirty,
    pte_swp_uffd_wp,
    swp_entry,
    swp_offset,
    swp_type,
)

KINDS = range(32)
OFFSETS = 2**50  # first that no entry can hold
offset_lists = st.lists(st.integers(0, OFFSETS - 1), min_size=1, max_size=20)


def vector(offsets):
    return np.array(offsets, dtype=np.int64)


def picture(kind, offset):
    """The entry as mm/swapops.py draws it: type, offset inverted, nine zeros."""
    return kind << 59 | (OFFSETS - 1 - offset) << 9


class TestSwpEntry:
    @given(kind=st.sampled_from(KINDS), offsets=offset_lists)
    def test_bits(self, kind, offsets):
        """Type on top, the offset inverted below, and both come back."""
        ptes = swp_entry(kind, vector(offsets))

        assert [picture(kind, offset) for offset in offsets] == ptes.tolist()
        assert [kind] * len(offsets) == swp_type(ptes).tolist()
        assert offsets == swp_offset(ptes).tolist()
        assert (np.uint64, np.int64) == (ptes.dtype, swp_offset(ptes).dtype)

    @given(kind=st.sampled_from(KINDS), offsets=offset_lists)
    def test_neither_present_nor_empty(self, kind, offsets):
        """Hardware faults on each; only type 0 with the last offset would look empty."""
        expected = [(kind, offset) != (0, OFFSETS - 1) for offset in offsets]

        assert expected == is_swap_pte(swp_entry(kind, vector(offsets))).tolist()

    @pytest.mark.parametrize(
        ("bit", "is_set"),
        [(SWP_SOFT_DIRTY, pte_swp_soft_dirty), (SWP_UFFD_WP, pte_swp_uffd_wp)],
        ids=["soft_dirty", "uffd_wp"],
    )
    @given(offsets=offset_lists)
    def test_bits_beside_the_entry(self, bit, is_set, offsets):
        """Soft-dirty and uffd-wp bit are beside the entry: they change neither type nor offset."""
        for kind in KINDS:
            ptes = swp_entry(kind, vector(offsets)) | bit

            assert is_set(ptes).all()
            assert offsets == swp_offset(ptes).tolist()
            assert not is_set(ptes ^ bit).any()


class TestKinds:
    def test_types_as_in_linux(self):
        """v4.20's five types come last; those of later kernels, a marker among them, before."""
        types = (
            SWP_HWPOISON,
            SWP_MIGRATION_READ,
            SWP_MIGRATION_WRITE,
            SWP_DEVICE_WRITE,
            SWP_DEVICE_READ,
        )

        assert (27, 28, 29, 30, 31) == types
        assert (24, 24, 25, 26) == (
            MAX_SWAPFILES,
            SWP_PTE_MARKER,
            SWP_DEVICE_EXCLUSIVE_WRITE,
            SWP_DEVICE_EXCLUSIVE_READ,
        )

    @pytest.mark.parametrize(
        ("predicate", "kinds"),
        [
            (is_swap_entry, set(range(MAX_SWAPFILES))),
            (non_swap_entry, {24, 25, 26, 27, 28, 29, 30, 31}),
            (is_pfn_swap_entry, {25, 26, 27, 28, 29, 30, 31}),
            (is_pte_marker, {SWP_PTE_MARKER}),
            (pte_none_mostly, {SWP_PTE_MARKER}),
            (is_device_exclusive_entry, {SWP_DEVICE_EXCLUSIVE_WRITE, SWP_DEVICE_EXCLUSIVE_READ}),
            (is_write_device_exclusive_entry, {SWP_DEVICE_EXCLUSIVE_WRITE}),
            (is_hwpoison_entry, {SWP_HWPOISON}),
            (is_migration_entry, {SWP_MIGRATION_READ, SWP_MIGRATION_WRITE}),
            (is_write_migration_entry, {SWP_MIGRATION_WRITE}),
            (is_device_private_entry, {SWP_DEVICE_READ, SWP_DEVICE_WRITE}),
            (is_write_device_private_entry, {SWP_DEVICE_WRITE}),
        ],
    )
    @given(offset=st.integers(0, OFFSETS - 2))
    def test_predicates(self, predicate, kinds, offset):
        """Each predicate knows its types, whatever the offset and the bits beside it."""
        every_kind = np.concatenate([swp_entry(kind, vector([offset])) for kind in KINDS])

        assert kinds == set(np.flatnonzero(predicate(every_kind)).tolist())
        for bit in (SWP_SOFT_DIRTY, SWP_UFFD_WP):
            assert kinds == set(np.flatnonzero(predicate(every_kind | bit)).tolist())

    @given(
        pfns=st.lists(st.integers(0, 2**40 - 1), max_size=20),
        low=st.integers(0, 2**11 - 1).map(lambda bits: bits << 1 | 1),
        nx=st.booleans(),
    )
    def test_present_entries_are_none_of_them(self, pfns, low, nx):
        """No frame and no bits of a present entry look like one that is not."""
        ptes = mk_pte(vector(pfns), np.uint64(low | nx << 63))

        for predicate in (is_swap_pte, is_migration_entry, is_device_private_entry):
            assert not predicate(ptes).any()
        assert not is_hwpoison_entry(ptes).any()

    def test_empty_entry_is_none_of_them(self):
        """An empty entry is no swap entry of any type."""
        empty = np.zeros(1, dtype=np.uint64)

        assert not is_swap_pte(empty)[0]
        assert not non_swap_entry(empty)[0]
        assert not is_pte_marker(empty)[0]
        assert pte_none_mostly(empty)[0]

    def test_marker(self):
        """A marker says one thing, and stands for no page."""
        markers = make_pte_marker(2)

        assert [picture(SWP_PTE_MARKER, 1)] * 2 == markers.tolist()
        assert not is_pfn_swap_entry(markers).any()
        assert not is_swap_entry(markers).any()


class TestAlike:
    ENTRIES: ClassVar = [0, mk_pte(vector([5]), np.uint64(3)).item(), 0x100 | 5 << 12] + [
        swp_entry(kind, vector([7])).item() | low
        for kind in (0, 3, SWP_DEVICE_READ, SWP_DEVICE_WRITE, SWP_MIGRATION_READ)
        for low in (0, int(SWP_SOFT_DIRTY))
    ]

    @given(kinds=st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=2))
    def test_one_speaks_for_all(self, kinds):
        """Whatever is asked of the entry that stands for all is true of each of them."""
        ptes = np.resize(np.array(kinds, dtype=np.uint64), 100)

        for ask in (pte_none, pte_present, pte_write, is_device_private_entry, swp_type):
            assert (ask(alike(ptes)) == ask(ptes)).all()
        assert (alike(ptes) & SWP_SOFT_DIRTY == ptes & SWP_SOFT_DIRTY).all()

    @pytest.mark.parametrize("kind", [SWP_DEVICE_READ, SWP_MIGRATION_WRITE, 4])
    def test_frames_may_differ(self, kind):
        """It is enough to look at one, of many entries or of many present ones."""
        offsets = np.arange(100)

        assert 1 == alike(swp_entry(kind, offsets)).size
        assert 1 == alike(mk_pte(offsets, np.uint64(0x67))).size
        assert 100 == alike(swp_entry(kind, offsets) | (offsets == 50) * SWP_SOFT_DIRTY).size


class TestMake:
    @given(slots=offset_lists)
    def test_slot(self, slots):
        """An entry of the first area; the bit that says whose it is stands beside the slot."""
        ptes = make_swap_entry(vector(slots))
        own = ptes | SWP_EXCLUSIVE

        assert (slots, [0] * len(slots)) == (swp_offset(own).tolist(), swp_type(own).tolist())
        assert pte_swp_exclusive(own).all()
        assert not pte_swp_exclusive(ptes | SWP_SOFT_DIRTY).any()
        assert (pte_swp_soft_dirty(own) == pte_swp_soft_dirty(ptes)).all()

    @pytest.mark.parametrize(
        ("make", "read", "write"),
        [
            (make_migration_entry, SWP_MIGRATION_READ, SWP_MIGRATION_WRITE),
            (make_device_private_entry, SWP_DEVICE_READ, SWP_DEVICE_WRITE),
        ],
    )
    @given(pages=st.lists(st.tuples(st.integers(0, 2**40 - 1), st.booleans()), max_size=20))
    def test_write_permission_is_in_the_type(self, make, read, write, pages):
        """A mixed vector keeps PFN and permission of each page."""
        pfns, writable = [p for p, _ in pages], [w for _, w in pages]

        ptes = make(vector(pfns), np.array(writable, dtype=np.bool_))

        assert [picture(write if w else read, p) for p, w in pages] == ptes.tolist()

    @given(offsets=offset_lists)
    def test_hwpoison(self, offsets):
        """A poisoned page is remembered by its PFN."""
        ptes = make_hwpoison_entry(vector(offsets))

        assert [picture(SWP_HWPOISON, offset) for offset in offsets] == ptes.tolist()


class TestMakeReadable:
    LOST: ClassVar = {
        SWP_MIGRATION_WRITE: SWP_MIGRATION_READ,
        SWP_DEVICE_WRITE: SWP_DEVICE_READ,
        SWP_DEVICE_EXCLUSIVE_WRITE: SWP_DEVICE_EXCLUSIVE_READ,
    }

    @given(kinds=st.lists(st.sampled_from(KINDS), min_size=1), soft=st.booleans())
    def test_every_type(self, kinds, soft):
        """Writable types become their readable kin, others stay; the page is the same.

        Only a device-private entry pays for it with its soft-dirty bit, as in Linux.
        """
        ptes = np.array([picture(kind, 5) | soft * 2 for kind in kinds], dtype=np.uint64)

        readable = make_readable(ptes)

        kept = [soft and kind != SWP_DEVICE_WRITE for kind in kinds]
        expected = [
            picture(self.LOST.get(k, k), 5) | 2 * s for k, s in zip(kinds, kept, strict=True)
        ]
        assert expected == readable.tolist()
