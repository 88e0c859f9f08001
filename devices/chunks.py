"""Which part of a device's memory to evict: chunks in the order in which they were taken.

A chunk is as old as its first page since it was last empty, as with the root chunks of NVIDIA's
driver: use does not make it younger.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.errors import InvalidArgument
from mm.memparse import Size, format_size, memparse
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices
from mm.vectors import places, rows

MIN_CHUNK: Final = 64 << 10
MAX_CHUNK: Final = 2 << 20


class Chunks:
    """Ages of the chunks of *npages* pages of device memory, *size* pages each."""

    def __init__(self, npages: int, size: int) -> None:
        count = -(-npages // size)
        self.npages = npages
        self.size = size
        self.used: Indices = np.zeros(count, dtype=np.int64)  # pages in use
        self.born: Indices = np.zeros(count, dtype=np.int64)  # when the first of them was taken
        self.clock = 0

    def take(self, pages: Indices) -> None:
        """*pages* (numbers within the device) come into use."""
        counts = self._counts(pages)
        fresh = places((counts > 0) & (self.used == 0))
        self.born[fresh] = np.arange(self.clock, self.clock + fresh.size)
        self.clock += fresh.size
        self.used += counts

    def give(self, pages: Indices) -> None:
        """*pages* are free again."""
        self.used -= self._counts(pages)

    def _counts(self, pages: Indices) -> Indices:
        """How many of *pages* are in each chunk."""
        which = rows(pages)
        if isinstance(which, slice):
            bounds = np.arange(self.used.size + 1) * self.size
            return np.diff(bounds.clip(which.start, which.stop))
        return np.bincount(pages // self.size, minlength=self.used.size)

    @property
    def free_pages(self) -> int:
        """Pages that are not in use."""
        return self.npages - int(self.used.sum())

    def oldest_first(self) -> Indices:
        """The chunks that are in use, oldest first."""
        used = places(self.used)
        return used[np.argsort(self.born[used])]

    def pages_of(self, chunk: int) -> Indices:
        """The pages of *chunk*."""
        first = chunk * self.size
        return np.arange(first, min(first + self.size, self.npages))


def chunk_pages(name: str, chunk: Size | None, npages: int) -> int:
    """Pages per chunk: as asked, or about a sixteenth of the device within the limits.

    Raises InvalidArgument, in the name of the device, for a size that no chunk can have.
    """
    if chunk is None:
        size = MIN_CHUNK
        while size < MAX_CHUNK and size * 16 < npages * PAGE_SIZE:
            size *= 2
        return size >> PAGE_SHIFT
    size = memparse(chunk)
    if not MIN_CHUNK <= size <= MAX_CHUNK or size & (size - 1):
        raise InvalidArgument(
            f"{name}: chunk={chunk!r}: a chunk is a power of two from "
            f"{format_size(MIN_CHUNK)} to {format_size(MAX_CHUNK)}"
        )
    return size >> PAGE_SHIFT
