"""How pages go to a GPU and back: what needs no GPU of devices/cupy_device.py.

runs        pages that follow one another on both sides: one DMA each, straight from pinned memory
staged      scattered ones: gathered in a pinned buffer, one DMA, a kernel that deals them out; in
            blocks, so that one is gathered while the one before is on its way
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mm.typing import PAGE_SHIFT, Indices, Pfns, number
from mm.vectors import pieces

WORTH_A_COPY: Final = 16  # pages; starting a DMA from Python takes about as long as 64 KiB of it
STAGING_PAGES: Final = 4096  # of one block: 16 MiB
UNDER_WAY: Final = 2  # blocks, each with a buffer of its own

_ONE: Final = number(1)


class Run(NamedTuple):
    """Pages that follow one another in the device's memory, and in the system's."""

    page: int
    row: int
    npages: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.npages << PAGE_SHIFT


def copy_runs(pages: Indices, rows: Pfns) -> list[Run]:
    """The runs of *pages* and *rows*; none where staging takes less time than one copy of each."""
    breaks = (pages[1:] != pages[:-1] + _ONE) | (rows[1:] != rows[:-1] + _ONE)
    found = pieces(breaks, pages.size)
    if len(found) > 1 and len(found) * WORTH_A_COPY > pages.size:
        return []
    return [Run(pages.item(run.start), rows.item(run.start), run.stop - run.start) for run in found]


def staging_blocks(npages: int) -> list[slice]:
    """Scattered pages, cut into blocks of at most STAGING_PAGES, about equal in size."""
    count = -(-npages // STAGING_PAGES)
    size = -(-npages // max(1, count))
    return [slice(first, min(first + size, npages)) for first in range(0, npages, max(1, size))]
