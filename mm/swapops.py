"""Entries that are not present: swap entries, and what Linux hides among them.

        63      59 58                                   9 8 7 6  3 2 1 0
       +----------+--------------------------------------+-+-+----+-+-+-+
       |   type   |           offset, inverted           |0|E|  0 |U|S|0|
       +----------+--------------------------------------+-+-+----+-+-+-+

S is the soft-dirty bit; U says that userfaultfd wants to know of a store (since v5.7); E says of a
slot that no other process holds it (since v5.19). The offset is inverted so that a processor which
speculates on the entry finds no cacheable memory there (L1TF). It is a slot of the swap area; for a
page under migration, a device-private page and a poisoned page it is a PFN. A marker stands for no
page: it keeps what U is for where there is none. Linux: include/linux/swapops.h,
arch/x86/include/asm/pgtable_64.h.

A present entry never has bits 62-59. So the types from SWP_PTE_MARKER up are told from everything
else, and from one another, by comparing whole entries.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.pgtable import PTE_PFN_MASK, pte_none, pte_present
from mm.typing import Mask, Pfns, Ptes, Slots, Word, word
from mm.vectors import has

SWP_TYPE_SHIFT: Final = word(59)
SWP_OFFSET_SHIFT: Final = word(9)
SWP_OFFSET_MASK: Final = word((1 << 50) - 1)
SWP_SOFT_DIRTY: Final = word(1 << 1)
SWP_UFFD_WP: Final = word(1 << 2)
SWP_EXCLUSIVE: Final = word(1 << 7)
SWP_WATCHED: Final = word(SWP_SOFT_DIRTY | SWP_UFFD_WP)  # what is kept for those who watch

MAX_SWAPFILES_SHIFT: Final = 5
MAX_SWAPFILES: Final = (1 << MAX_SWAPFILES_SHIFT) - 2 - 2 - 1 - 2 - 1
SWP_PTE_MARKER: Final = MAX_SWAPFILES  # since v5.19
SWP_DEVICE_EXCLUSIVE_WRITE: Final = MAX_SWAPFILES + 1  # since v5.14
SWP_DEVICE_EXCLUSIVE_READ: Final = MAX_SWAPFILES + 2
SWP_HWPOISON: Final = MAX_SWAPFILES + 3
SWP_MIGRATION_READ: Final = MAX_SWAPFILES + 4
SWP_MIGRATION_WRITE: Final = MAX_SWAPFILES + 5
SWP_DEVICE_WRITE: Final = MAX_SWAPFILES + 6
SWP_DEVICE_READ: Final = MAX_SWAPFILES + 7

PTE_MARKER_UFFD_WP: Final = 1  # the offset of a marker

_WORTH_A_LOOK: Final = 64  # entries: a look at all of them costs as much as two questions
_PRESENT: Final = (1 << 0) | (1 << 8)  # present, PROT_NONE
_FRAMES: Final = int(PTE_PFN_MASK)
_TYPES: Final = ((1 << MAX_SWAPFILES_SHIFT) - 1) << int(SWP_TYPE_SHIFT)
_OFFSETS: Final = int(SWP_OFFSET_MASK) << int(SWP_OFFSET_SHIFT)
_OFFSET_0: Final = word(_OFFSETS)
_NEXT_TYPE: Final = word(1 << 59)
_FIRST: Final = tuple(word(kind << 59) for kind in range(1 << MAX_SWAPFILES_SHIFT))


def _first(kind: int) -> Word:
    """The lowest entry of swap type *kind*."""
    return _FIRST[kind]


def alike(ptes: Ptes) -> Ptes:
    """The first of *ptes*, where all say the same of their frames or slots; otherwise *ptes*.

    The entries of a long run mostly do: one can be asked for all then, and NumPy spreads the
    answer, a vector of one, over the others.
    """
    if ptes.size < _WORTH_A_LOOK:
        return ptes
    all_have, some_have = int(np.bitwise_and.reduce(ptes)), int(np.bitwise_or.reduce(ptes))
    if all_have & _PRESENT:
        same = not (all_have ^ some_have) & ~_FRAMES
    elif all_have & _TYPES:  # a slot of type 0 might differ from an empty entry by its offset alone
        same = not (all_have ^ some_have) & ~_OFFSETS
    else:
        same = not some_have
    return ptes[:1] if same else ptes


def swp_entry(kind: int, offsets: Pfns) -> Ptes:
    """Entries of swap type *kind* (0-31) with *offsets* (int64[n], of 50 bits) for a page table.

    Linux: swp_entry() and swp_entry_to_pte(), include/linux/swapops.h.
    """
    return _of_types(_first(kind), offsets)


def _of_types(types: Ptes | Word, offsets: Pfns) -> Ptes:
    """Entries with *offsets*, inverted, each of its own type or all of one, in place."""
    return (types + _OFFSET_0) - (offsets.view(np.uint64) << SWP_OFFSET_SHIFT)


def swp_type(ptes: Ptes) -> Ptes:
    """The swap type of each entry, uint64[n]; only for entries that `is_swap_pte`."""
    return ptes >> SWP_TYPE_SHIFT


def swp_offset(ptes: Ptes) -> Pfns:
    """The offset (slot or PFN) of each entry, int64[n]; only for entries that `is_swap_pte`."""
    return ((~ptes >> SWP_OFFSET_SHIFT) & SWP_OFFSET_MASK).view(np.int64)


def is_swap_pte(ptes: Ptes) -> Mask:
    """True where the entry is neither empty nor present. Linux: is_swap_pte()."""
    return ~pte_none(ptes) & ~pte_present(ptes)


def non_swap_entry(ptes: Ptes) -> Mask:
    """True for swap-type entries that stand for no swap slot. Linux: non_swap_entry()."""
    return ptes >= _first(MAX_SWAPFILES)


def make_swap_entry(slots: Slots) -> Ptes:
    """Entries that say that a page is in swap, in *slots* of the one area.

    Linux: swp_entry_to_pte(), include/linux/swapops.h.
    """
    return swp_entry(0, slots)


def is_swap_entry(ptes: Ptes) -> Mask:
    """True where the page is in swap. Linux: is_swap_pte() without non_swap_entry()."""
    return is_swap_pte(ptes) & ~non_swap_entry(ptes)


def make_migration_entry(pfns: Pfns, write: Mask) -> Ptes:
    """Migration entries for *pfns*, which their owner has locked; writable where *write*.

    Linux: make_migration_entry(), include/linux/swapops.h.
    """
    return _of_types(_first(SWP_MIGRATION_READ) + write * _NEXT_TYPE, pfns)


def is_migration_entry(ptes: Ptes) -> Mask:
    """True where the entry stands for a page that is being moved. Linux: is_migration_entry()."""
    return (ptes >= _first(SWP_MIGRATION_READ)) & (ptes < _first(SWP_DEVICE_WRITE))


def is_write_migration_entry(ptes: Ptes) -> Mask:
    """True for migration entries that were writable. Linux: is_write_migration_entry()."""
    return (ptes >= _first(SWP_MIGRATION_WRITE)) & (ptes < _first(SWP_DEVICE_WRITE))


def make_device_private_entry(pfns: Pfns, write: Mask) -> Ptes:
    """Entries for device-private *pfns*; writable where *write*.

    Linux: make_device_private_entry(), include/linux/swapops.h.
    """
    return _of_types(_first(SWP_DEVICE_READ) - write * _NEXT_TYPE, pfns)


def is_device_private_entry(ptes: Ptes) -> Mask:
    """True where the page is in device memory. Linux: is_device_private_entry()."""
    return ptes >= _first(SWP_DEVICE_WRITE)


def is_write_device_private_entry(ptes: Ptes) -> Mask:
    """True for writable device-private entries. Linux: is_write_device_private_entry()."""
    return (ptes >= _first(SWP_DEVICE_WRITE)) & (ptes < _first(SWP_DEVICE_READ))


def make_device_exclusive_entry(pfns: Pfns, write: Mask) -> Ptes:
    """Entries for ordinary *pfns* that a device has for itself; writable where *write*.

    Linux: make_writable_device_exclusive_entry(), include/linux/swapops.h, v5.14.
    """
    return swp_entry(SWP_DEVICE_EXCLUSIVE_READ, pfns) - write * _NEXT_TYPE


def is_device_exclusive_entry(ptes: Ptes) -> Mask:
    """True where a device has the page for itself. Linux: is_device_exclusive_entry(), v5.14."""
    return (ptes >= _first(SWP_DEVICE_EXCLUSIVE_WRITE)) & (ptes < _first(SWP_HWPOISON))


def is_write_device_exclusive_entry(ptes: Ptes) -> Mask:
    """True for those of them that were writable.

    Linux: is_writable_device_exclusive_entry(), include/linux/swapops.h, v5.14.
    """
    return (ptes >= _first(SWP_DEVICE_EXCLUSIVE_WRITE)) & (ptes < _first(SWP_DEVICE_EXCLUSIVE_READ))


def make_hwpoison_entry(pfns: Pfns) -> Ptes:
    """Entries that answer every access with SIGBUS. Linux: make_hwpoison_entry()."""
    return swp_entry(SWP_HWPOISON, pfns)


def is_hwpoison_entry(ptes: Ptes) -> Mask:
    """True where the contents are lost for good. Linux: is_hwpoison_entry()."""
    return (ptes >= _first(SWP_HWPOISON)) & (ptes < _first(SWP_MIGRATION_READ))


def make_pte_marker(count: int) -> Ptes:
    """*count* entries that keep a page write-protected by userfaultfd before there is one.

    Linux: make_pte_marker(), include/linux/swapops.h, v5.19.
    """
    return swp_entry(SWP_PTE_MARKER, np.full(count, PTE_MARKER_UFFD_WP))


def is_pte_marker(ptes: Ptes) -> Mask:
    """True where there is a marker in place of a page. Linux: is_pte_marker(), v5.19."""
    return (ptes >= _first(SWP_PTE_MARKER)) & (ptes < _first(SWP_DEVICE_EXCLUSIVE_WRITE))


def pte_none_mostly(ptes: Ptes) -> Mask:
    """True where no page is, though there may be a marker. Linux: pte_none_mostly(), v5.19."""
    return pte_none(ptes) | is_pte_marker(ptes)


def is_pfn_swap_entry(ptes: Ptes) -> Mask:
    """True for entries not present that stand for a page. Linux: is_pfn_swap_entry(), v5.14."""
    return ptes >= _first(SWP_DEVICE_EXCLUSIVE_WRITE)


def make_readable(ptes: Ptes) -> Ptes:
    """The same entries without the right to store, whatever they stand for.

    A migration entry keeps its soft-dirty bit; one for device memory loses it with the right, as
    Linux has it. Linux: change_pte_range(), mm/mprotect.c; copy_one_pte(), mm/memory.c.
    """
    moving = is_write_migration_entry(ptes)
    device = is_write_device_private_entry(ptes)
    exclusive = is_write_device_exclusive_entry(ptes)
    readable = ptes - moving * _NEXT_TYPE + (device | exclusive) * _NEXT_TYPE
    return np.where(device, readable & ~SWP_SOFT_DIRTY, readable)


def pte_swp_soft_dirty(ptes: Ptes) -> Mask:
    """True where a swap-type entry carries the soft-dirty bit. Linux: pte_swp_soft_dirty()."""
    return has(ptes, SWP_SOFT_DIRTY)


def pte_swp_uffd_wp(ptes: Ptes) -> Mask:
    """True where userfaultfd wants to know of a store. Linux: pte_swp_uffd_wp(), v5.7."""
    return has(ptes, SWP_UFFD_WP)


def pte_swp_exclusive(ptes: Ptes) -> Mask:
    """True where no other process holds the slot. Linux: pte_swp_exclusive(), v5.19."""
    return has(ptes, SWP_EXCLUSIVE)
