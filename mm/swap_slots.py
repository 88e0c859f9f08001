"""The swap area: slots of a page each, and who needs them. Linux: mm/swap_slots.c, mm/swapfile.c.

    swap_map     0             free
                 n             n page-table entries hold the slot
                 | HAS_CACHE   and so does a page in the swap cache

A slot's contents are good while an entry holds it and no page of the swap cache is newer. There
is one area; without swap it has no slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mm.errors import KernelBug
from mm.highmem import reserve_payload
from mm.locking import Locks
from mm.typing import Mask, Pfns, Slots
from mm.vectors import add_at, every, joined, places, rows, some

SWAP_HAS_CACHE: Final = 1 << 30  # Linux keeps counts in a byte, and continues them elsewhere
SWAP_MAP_BAD: Final = -1  # not a slot: the header of the area
SCAN: Final = 1 << 13  # slots that a search looks at in one go


class SwapInfo:
    """The swap area of a machine. Linux: struct swap_info_struct, include/linux/swap.h."""

    def __init__(self, slots: int, locks: Locks, *, payload: bool) -> None:
        self.locks = locks
        self.max = slots  # slot numbers are below it
        self.swap_map: NDArray[np.int32] = np.zeros(slots, dtype=np.int32)
        # The page in the swap cache: its PFN; where a page went lately, ~shadow (mm/workingset.py);
        # else 0. Linux: the address spaces `swapper_spaces`.
        self.cache: Pfns = np.zeros(slots, dtype=np.int64)
        self.zeromap: Mask = np.zeros(slots, dtype=np.bool_)  # slots that stand for a page of zeros
        self.contents = reserve_payload(slots) if payload and slots else None
        # Number of the control group that each used slot is charged to. Linux: mm/swap_cgroup.c.
        self.swap_cgroup: NDArray[np.uint16] = np.zeros(slots, dtype=np.uint16)
        self.uncharge: Callable[[Slots], None] | None = None  # mm/memcontrol.py fills it
        self.pages = max(slots - 1, 0)  # slots that can be used
        self.inuse_pages = 0
        self.cluster_next = 1  # where the next search begins
        self.read_errors: set[int] = set()  # slots that fail, for tests of those who use them
        self.write_errors: set[int] = set()
        self.swap_map[:1] = SWAP_MAP_BAD


def nr_swap_pages(si: SwapInfo) -> int:
    """Slots that are free. Linux: get_nr_swap_pages(), include/linux/swap.h."""
    return si.pages - si.inuse_pages


def vm_swap_full(si: SwapInfo) -> bool:
    """True while more than half of the slots are used. Linux: vm_swap_full(), linux/swap.h."""
    return nr_swap_pages(si) * 2 < si.pages


def get_swap_pages(si: SwapInfo, count: int) -> Slots:
    """Take *count* free slots for the swap cache; fewer where not so many are free.

    They ascend from where the last search ended, and follow one another where the area is not
    fragmented; past the end the search begins anew. Linux: get_swap_pages() and
    scan_swap_map_slots(), mm/swapfile.c.
    """
    with si.locks.atomic:
        count = min(count, nr_swap_pages(si))
        si.inuse_pages += count
        taken = []
        while count:
            start, stop = si.cluster_next, min(si.cluster_next + max(count, SCAN), si.max)
            free = places(si.swap_map[start:stop] == 0)[:count] + start
            si.swap_map[rows(free)] = SWAP_HAS_CACHE
            taken.append(free)
            count -= free.size
            after = stop if count else free.item(-1) + 1
            si.cluster_next = after if after < si.max else 1
    return joined(taken)


def swap_duplicate(si: SwapInfo, slots: Slots) -> None:
    """One more entry for each of *slots*, which may repeat. Linux: swap_duplicate()."""
    with si.locks.atomic:
        if not every(si.swap_map[rows(slots)] > 0):
            raise KernelBug(f"swap_duplicate: nobody holds {_unused(si, slots)}")
        add_at(si.swap_map, rows(slots), 1)


def swap_free(si: SwapInfo, slots: Slots) -> None:
    """One entry less for each of *slots*, which may repeat. Linux: swap_free()."""
    with si.locks.atomic:
        add_at(si.swap_map, rows(slots), -1)
        left = si.swap_map[rows(slots)] & (SWAP_HAS_CACHE - 1)
        if some(left == SWAP_HAS_CACHE - 1):  # it fell below 0, and borrowed
            raise KernelBug(f"swap_free: no entry was left for {_unused(si, slots)}")
        _range_free(si, slots)


def put_swap_page(si: SwapInfo, slots: Slots) -> None:
    """The swap cache needs *slots* (distinct) no more. Linux: put_swap_page()."""
    with si.locks.atomic:
        which = rows(slots)
        if not every(si.swap_map[which] >= SWAP_HAS_CACHE):
            raise KernelBug(f"put_swap_page: not the swap cache's: {_unused(si, slots)}")
        si.swap_map[which] -= SWAP_HAS_CACHE
        _range_free(si, slots)


def _range_free(si: SwapInfo, slots: Slots) -> None:
    """Forget what was in those of *slots* that nobody holds now. Linux: swap_range_free()."""
    free = slots[si.swap_map[slots] == 0]
    if free.size > 1 and not every(free[1:] > free[:-1]):
        free = np.unique(free)
    si.cache[rows(free)] = 0
    si.inuse_pages -= free.size
    if si.uncharge is not None:
        si.uncharge(free)


def swap_count(si: SwapInfo, slots: Slots) -> NDArray[np.int32]:
    """Entries that hold each of *slots*, int32[n]. Linux: __swap_count(), mm/swapfile.c."""
    return si.swap_map[rows(slots)] & (SWAP_HAS_CACHE - 1)


def _unused(si: SwapInfo, slots: Slots) -> str:
    counts = si.swap_map[slots]
    return ", ".join(f"slot {s:#x} ({c:#x})" for s, c in zip(slots[:8], counts[:8], strict=True))
