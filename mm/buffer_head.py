"""Buffer heads: which block of a device each part of a page stands for, and what is known of it.

A page of a file that lies on a block device is of 4, 2 or 1 blocks. Its buffers are one row here;
`MemMap.private` of the page is the row's number, while the page is PG_private and has a reference
more. Row 0 is nobody's. Linux: struct buffer_head, include/linux/buffer_head.h.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mm.typing import Indices, Pfns

MAX_BUF_PER_PAGE: Final = 4  # of 1 KiB

# Bits of b_state.
BH_Uptodate: Final = np.uint8(1 << 0)  # holds valid data
BH_Dirty: Final = np.uint8(1 << 1)  # differs from the block
BH_Mapped: Final = np.uint8(1 << 2)  # b_blocknr says which block it is
BH_New: Final = np.uint8(1 << 3)  # the block was just allocated, and holds nothing
BH_Async_Write: Final = np.uint8(1 << 4)  # on its way to the device
BH_Write_EIO: Final = np.uint8(1 << 5)  # did not get there
NO_BLOCK: Final = -1  # b_blocknr of a buffer that is not mapped


class BufferHeads:
    """The buffers of a machine's pages. Linux: bh_cachep, fs/buffer.c.

    b_page: int64[rows], the PFN that has the row, -1 for none; b_state: uint8[rows, 4], BH_* bits;
    b_blocknr: int64[rows, 4]. Of a page with fewer blocks the first of the four are used.
    """

    def __init__(self) -> None:
        self.b_page: Pfns = np.full(1, -1, dtype=np.int64)
        self.b_state: NDArray[np.uint8] = np.zeros((1, MAX_BUF_PER_PAGE), dtype=np.uint8)
        self.b_blocknr: Indices = np.full((1, MAX_BUF_PER_PAGE), NO_BLOCK, dtype=np.int64)
        self._free: Indices = np.empty(0, dtype=np.int64)  # rows that no page has, as a stack
        self._nr_free = 0

    @property
    def in_use(self) -> int:
        """Rows that a page has."""
        return self.b_page.size - 1 - self._nr_free

    def alloc(self, pfns: Pfns) -> Indices:
        """A blank row for each of *pfns*. Linux: alloc_page_buffers(), fs/buffer.c."""
        if pfns.size > self._nr_free:
            self._grow(pfns.size)
        self._nr_free -= pfns.size
        rows = self._free[self._nr_free : self._nr_free + pfns.size][::-1].copy()
        self.b_page[rows] = pfns
        return rows

    def free(self, rows: Indices) -> None:
        """No page has *rows* any more. Linux: free_buffer_head(), fs/buffer.c."""
        self.b_page[rows] = -1
        self.b_state[rows] = 0
        self.b_blocknr[rows] = NO_BLOCK
        self._free[self._nr_free : self._nr_free + rows.size] = rows[::-1]
        self._nr_free += rows.size

    def _grow(self, wanted: int) -> None:
        """At least *wanted* more rows, and twice what there were."""
        old, more = self.b_page.size, max(wanted, self.b_page.size)
        self.b_page = np.concatenate((self.b_page, np.full(more, -1, dtype=np.int64)))
        blank = np.zeros((more, MAX_BUF_PER_PAGE), dtype=np.uint8)
        self.b_state = np.concatenate((self.b_state, blank))
        unmapped = np.full((more, MAX_BUF_PER_PAGE), NO_BLOCK, dtype=np.int64)
        self.b_blocknr = np.concatenate((self.b_blocknr, unmapped))
        free = np.empty(old + more, dtype=np.int64)
        free[:more] = np.arange(old + more - 1, old - 1, -1)
        free[more : more + self._nr_free] = self._free[: self._nr_free]
        self._free = free
        self._nr_free += more
