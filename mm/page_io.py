"""Pages to and from the slots of the swap area. Linux: mm/page_io.c.

Swap is memory of the host, as in a RAM disk: I/O is a copy that is done when the call returns. The
slots of `SwapInfo.read_errors` and `write_errors` fail.

Unlike Linux v4.20, a page of zeros needs no I/O (as in 6.12): that is not counted and cannot fail.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.highmem import copy_highpages
from mm.page_flags import PG_dirty, PG_uptodate
from mm.types import MemMap
from mm.typing import Indices, Mask, Payload, Pfns, Slots, word
from mm.vectors import every, rows

_CLEAN: Final = word(~PG_dirty)


def swap_writepage(mem: MemMap, pfns: Pfns) -> Mask:
    """Write *pfns*, locked and in the swap cache, to their slots: clean where that worked.

    Where it fails the page stays dirty, and nothing is lost as long as it stays in memory.
    Linux: swap_writepage() and end_swap_bio_write(), mm/page_io.c.
    """
    slots = mem.private[pfns]
    zero = _zero_filled(mem.payload, pfns)
    good = _healthy(slots, mem.swap.write_errors) | zero
    if not every(good):
        pfns, slots = pfns[good], slots[good]
    if mem.payload is not None and mem.swap.contents is not None:
        copy_highpages(mem.swap.contents, slots, mem.payload, pfns)
    with mem.locks.atomic:
        mem.flags[rows(pfns)] &= _CLEAN
    mem.vmstat.add("pswpout", pfns.size - int(np.count_nonzero(zero)))
    return good


def swap_readpage(mem: MemMap, pfns: Pfns) -> Mask:
    """Read *pfns*, locked and in the swap cache, from their slots: up to date where that worked.

    Linux: swap_readpage() and end_swap_bio_read(), mm/page_io.c.
    """
    slots = mem.private[pfns]
    zero = _zero_filled(mem.swap.contents, slots)
    good = _healthy(slots, mem.swap.read_errors) | zero
    if not every(good):
        pfns, slots = pfns[good], slots[good]
    if mem.payload is not None and mem.swap.contents is not None:
        copy_highpages(mem.payload, pfns, mem.swap.contents, slots)
    with mem.locks.atomic:
        mem.flags[rows(pfns)] |= PG_uptodate
    mem.vmstat.add("pswpin", pfns.size - int(np.count_nonzero(zero)))
    return good


def _zero_filled(contents: Payload | None, numbers: Indices) -> Mask:
    """True for those of *numbers*, pages or slots, that hold nothing but zeros.

    Without contents nothing is known to. Linux: is_folio_zero_filled(), mm/page_io.c, 6.12.
    """
    if contents is None:
        return np.zeros(numbers.size, dtype=np.bool_)
    return ~contents.view(np.uint64)[rows(numbers)].any(axis=1)


def _healthy(slots: Slots, errors: set[int]) -> Mask:
    if not errors:
        return np.ones(slots.size, dtype=np.bool_)
    return ~np.isin(slots, list(errors))
