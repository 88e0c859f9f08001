"""Pages to and from the slots of the swap area. Linux: mm/page_io.c.

Swap is memory of the host, as in a RAM disk: I/O is a copy that is done when the call returns. The
slots of `SwapInfo.read_errors` and `write_errors` fail.

Unlike Linux v4.20, a page of zeros is but a bit in `SwapInfo.zeromap`; it is neither written nor
read (v6.12).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.highmem import copy_highpages
from mm.page_flags import PG_dirty, PG_uptodate
from mm.types import MemMap
from mm.typing import Mask, Pfns, Slots, word
from mm.vectors import every, places, rows, some

_CLEAN: Final = word(~PG_dirty)
_BLOCK: Final = 128  # pages that are read at a time: 512 KiB, what a core's cache holds


def swap_writepage(mem: MemMap, pfns: Pfns) -> Mask:
    """Write *pfns*, locked and in the swap cache, to their slots: clean where that worked.

    Where it fails the page stays dirty, and nothing is lost as long as it stays in memory.
    Linux: swap_writepage() and end_swap_bio_write(), mm/page_io.c.
    """
    slots = mem.private[pfns]
    good = _healthy(slots, mem.swap.write_errors)
    if not every(good):
        pfns, slots = pfns[good], slots[good]
    zero = is_page_zero_filled(mem, pfns)
    mem.swap.zeromap[rows(slots)] = zero
    written = slice(None) if not some(zero) else ~zero
    if mem.payload is not None and mem.swap.contents is not None:
        copy_highpages(mem.swap.contents, slots[written], mem.payload, pfns[written])
    with mem.locks.atomic:
        mem.flags[rows(pfns)] &= _CLEAN
    mem.vmstat.add("pswpout", slots[written].size)
    return good


def is_page_zero_filled(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages that hold nothing but zeros; a machine without contents knows of none.

    Linux: is_folio_zero_filled(), mm/page_io.c, v6.12.
    """
    zero = np.zeros(pfns.size, dtype=np.bool_)
    if mem.payload is not None:
        words = mem.payload.view(np.uint64)
        zero = words[rows(pfns), -1] == 0  # one look spares most pages the rest
        at = places(zero)
        for i in range(0, at.size, _BLOCK):
            block = at[i : i + _BLOCK]
            zero[block] = ~words[rows(pfns[block])].any(axis=1)
    return zero


def swap_readpage(mem: MemMap, pfns: Pfns) -> Mask:
    """Read *pfns*, locked and in the swap cache, from their slots: up to date where that worked.

    Linux: swap_readpage() and end_swap_bio_read(), mm/page_io.c.
    """
    slots = mem.private[pfns]
    good = _healthy(slots, mem.swap.read_errors)
    if not every(good):
        pfns, slots = pfns[good], slots[good]
    zero = mem.swap.zeromap[rows(slots)]
    read = slice(None) if not some(zero) else ~zero
    if mem.payload is not None and mem.swap.contents is not None:
        copy_highpages(mem.payload, pfns[read], mem.swap.contents, slots[read])
        mem.payload[pfns[zero]] = 0
    with mem.locks.atomic:
        mem.flags[rows(pfns)] |= PG_uptodate
    mem.vmstat.add("pswpin", slots[read].size)
    return good


def _healthy(slots: Slots, errors: set[int]) -> Mask:
    if not errors:
        return np.ones(slots.size, dtype=np.bool_)
    return ~np.isin(slots, list(errors))
