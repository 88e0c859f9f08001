"""Which part of a device's memory to evict: chunks in the order in which they were taken.

A chunk is as old as its first page since it was last empty, as with the root chunks of NVIDIA's
driver: use does not make it younger.
"""

from __future__ import annotations

import numpy as np

from mm.typing import Indices
from mm.vectors import places


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
        counts = np.bincount(pages // self.size, minlength=self.used.size)
        fresh = places((counts > 0) & (self.used == 0))
        self.born[fresh] = np.arange(self.clock, self.clock + fresh.size)
        self.clock += fresh.size
        self.used += counts

    def give(self, pages: Indices) -> None:
        """*pages* are free again."""
        self.used -= np.bincount(pages // self.size, minlength=self.used.size)

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
