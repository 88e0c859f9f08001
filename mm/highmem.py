"""Contents of pages: copies between rows of 4 KiB, by the widest moves that their order allows.

NumPy moves a stretch of rows in one slice at the speed of memcpy, single rows at a third of it.
Linux: copy_highpage() and its relatives, include/linux/highmem.h.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from typing import Final

import numpy as np

from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices, Mask, Payload, Pfns, number
from mm.vectors import nr_pieces, pieces, some, stretches

_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_MADV_HUGEPAGE: Final = getattr(mmap, "MADV_HUGEPAGE", None)
_ONE: Final = number(1)
_BLOCK: Final = 128  # rows of a staging copy: 512 KiB, what a core's cache holds
_WORTH_SLICING: Final = 4  # mean rows per stretch from which slices beat gathering


def reserve_payload(rows: int) -> Payload:
    """Zeros for *rows* pages, uint8[rows, 4096], which the host commits as they are touched.

    On huge pages of the host where it has them, and aligned to pages: memcpy() halves its speed
    between memory that is aligned and memory that is not.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    space = mmap.mmap(-1, rows * PAGE_SIZE, flags=flags)
    if _MADV_HUGEPAGE is not None:
        space.madvise(_MADV_HUGEPAGE)
    return np.frombuffer(space, dtype=np.uint8).reshape(rows, PAGE_SIZE)


def copy_highpages(dst: Payload, to: Pfns, src: Payload, frm: Pfns) -> None:
    """Copy row frm[i] of *src* to row to[i] of *dst*; both are uint8[rows, 4096].

    Linux: copy_highpage(), include/linux/highmem.h.
    """
    if not to.size:
        return
    breaks = _breaks(to) | _breaks(frm)
    nr_runs = nr_pieces(breaks)
    if nr_runs == 1 or to.size >= _WORTH_SLICING * nr_runs:
        for run in pieces(breaks, to.size):
            a, b, count = to.item(run.start), frm.item(run.start), run.stop - run.start
            dst[a : a + count] = src[b : b + count]
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


def _breaks(rows: Pfns) -> Mask:
    """True between neighbours that do not follow one another."""
    return rows[1:] != rows[:-1] + _ONE


def memcpy_from_pages(out: Payload, payload: Payload, pfns: Pfns, offset: int) -> None:
    """Fill *out* (uint8[n]) from the bytes of *pfns* in a row, from *offset* of the first on.

    Linux: memcpy_from_page(), include/linux/highmem.h, v5.12.
    """
    flat = payload.reshape(-1)
    for here, there in _byte_runs(pfns, offset, out.size):
        out[here] = flat[there]


def memcpy_to_pages(payload: Payload, pfns: Pfns, offset: int, data: Payload) -> None:
    """Store *data* (uint8[n]) into *pfns* in a row, from *offset* of the first on.

    Linux: memcpy_to_page(), include/linux/highmem.h, v5.12.
    """
    flat = payload.reshape(-1)
    for here, there in _byte_runs(pfns, offset, data.size):
        flat[there] = data[here]


def _byte_runs(pfns: Pfns, offset: int, nbytes: int) -> Iterator[tuple[slice, slice]]:
    """Stretches of *nbytes* that begin *offset* into *pfns*: in a buffer, in the flat payload."""
    for run in stretches(pfns):
        lo = max((run.start << PAGE_SHIFT) - offset, 0)
        hi = min((run.stop << PAGE_SHIFT) - offset, nbytes)
        start = ((pfns.item(run.start) - run.start) << PAGE_SHIFT) + offset + lo
        yield slice(lo, hi), slice(start, start + hi - lo)


def byte_places(pfns: Indices, addrs: Indices, page_of: Indices) -> Indices:
    """Where in the flat payload the byte at each of *addrs* is, its page being pfns[page_of]."""
    return (pfns[page_of] << PAGE_SHIFT) + (addrs & (PAGE_SIZE - 1))
