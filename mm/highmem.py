"""Contents of pages: copies between rows of 4 KiB, by the widest moves that their order allows.

NumPy moves a stretch of rows in one slice at the speed of memcpy, single rows at a third of it.
Linux: copy_highpage() and its relatives, include/linux/highmem.h.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np

from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices, Payload, Pfns, places, some

_BLOCK: Final = 128  # rows of a staging copy: 512 KiB, what a core's cache holds
_WORTH_SLICING: Final = 4  # mean rows per stretch from which slices beat gathering


def copy_highpages(dst: Payload, to: Pfns, src: Payload, frm: Pfns) -> None:
    """Copy row frm[i] of *src* to row to[i] of *dst*; both are uint8[rows, 4096].

    Linux: copy_highpage(), include/linux/highmem.h.
    """
    breaks = _breaks(to) | _breaks(frm)
    cuts = places(breaks) + 1
    if to.size >= _WORTH_SLICING * (cuts.size + 1):
        bounds = [0, *cuts.tolist(), to.size]
        for i, k in pairwise(bounds):
            a, b = to.item(i), frm.item(i)
            dst[a : a + k - i] = src[b : b + k - i]
        return
    staging = np.empty((min(_BLOCK, to.size), PAGE_SIZE), dtype=np.uint8)
    for i in range(0, to.size, _BLOCK):
        rows, target = frm[i : i + _BLOCK], to[i : i + _BLOCK]
        first, count = target.item(0), target.size
        if not some(_breaks(target)):
            np.take(src, rows, axis=0, out=dst[first : first + count], mode="clip")
        else:
            np.take(src, rows, axis=0, out=staging[:count], mode="clip")
            dst[target] = staging[:count]


def _breaks(rows: Pfns) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """True between neighbours that do not follow one another."""
    return np.asarray(rows[1:] != rows[:-1] + 1)


def stretches(rows: Pfns) -> list[tuple[int, int, int]]:
    """*rows* as (place in the vector, first row, number of rows) of consecutive rows."""
    heads = np.concatenate(([0], places(_breaks(rows)) + 1, [rows.size]))
    firsts = rows[heads[:-1]]
    return list(zip(heads[:-1].tolist(), firsts.tolist(), np.diff(heads).tolist(), strict=True))


def memcpy_from_pages(out: Payload, payload: Payload, pfns: Pfns, offset: int) -> None:
    """Fill *out* (uint8[n]) from the bytes of *pfns* in a row, from *offset* of the first on.

    Linux: memcpy_from_page(), include/linux/highmem.h.
    """
    flat = payload.reshape(-1)
    for place, row, count in stretches(pfns):
        lo = max((place << PAGE_SHIFT) - offset, 0)
        hi = min(((place + count) << PAGE_SHIFT) - offset, out.size)
        start = (row << PAGE_SHIFT) + lo + offset - (place << PAGE_SHIFT)
        out[lo:hi] = flat[start : start + hi - lo]


def memcpy_to_pages(payload: Payload, pfns: Pfns, offset: int, data: Payload) -> None:
    """Store *data* (uint8[n]) into *pfns* in a row, from *offset* of the first on.

    Linux: memcpy_to_page(), include/linux/highmem.h.
    """
    flat = payload.reshape(-1)
    for place, row, count in stretches(pfns):
        lo = max((place << PAGE_SHIFT) - offset, 0)
        hi = min(((place + count) << PAGE_SHIFT) - offset, data.size)
        start = (row << PAGE_SHIFT) + lo + offset - (place << PAGE_SHIFT)
        flat[start : start + hi - lo] = data[lo:hi]


def byte_places(pfns: Indices, addrs: Indices, page_of: Indices) -> Indices:
    """Where in the flat payload the byte at each of *addrs* is, its page being pfns[page_of]."""
    return (pfns[page_of] << PAGE_SHIFT) + (addrs & (PAGE_SIZE - 1))
