"""Where the blocks of a file are, as extents. Linux: fs/ext4/extents.c, in another form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mm.typing import Indices
from mm.vectors import every, some


class Extents:
    """Stretches of a file, ascending, that do not touch: three columns, int64[n] each, in blocks.

    logical: where in the file a stretch begins; start: where on the device; count: its length.
    """

    def __init__(self, logical: Indices, start: Indices, count: Indices) -> None:
        self.logical, self.start, self.count = logical, start, count

    @classmethod
    def none(cls) -> Extents:
        """Those of a file that is one hole."""
        return cls(*np.zeros((3, 0), dtype=np.int64))

    @property
    def size(self) -> int:
        """How many there are."""
        return self.logical.size

    @property
    def end(self) -> int:
        """The file's first block that lies behind all of them."""
        return int(self.logical[-1] + self.count[-1]) if self.size else 0

    def lookup(self, blocks: Indices) -> Indices:
        """The device's block for each of *blocks* of the file, -1 in a hole.

        Linux: ext4_map_blocks() without EXT4_GET_BLOCKS_CREATE.
        """
        if not self.size:
            return np.full(blocks.size, -1, dtype=np.int64)
        at = np.searchsorted(self.logical, blocks, side="right") - 1
        offset = blocks - self.logical[at]
        inside = (at >= 0) & (offset < self.count[at])
        return np.where(inside, self.start[at] + offset, -1)

    def insert(self, blocks: Indices, found: Indices) -> None:
        """Let the holes at *blocks* (ascending) be the device's blocks *found*.

        Linux: ext4_ext_insert_extent().
        """
        one = np.ones(blocks.size, dtype=np.int64)
        logical = np.concatenate((self.logical, blocks))
        order = np.argsort(logical, kind="stable")
        logical = logical[order]
        start = np.concatenate((self.start, found))[order]
        count = np.concatenate((self.count, one))[order]
        joins = (logical[:-1] + count[:-1] == logical[1:]) & (start[:-1] + count[:-1] == start[1:])
        heads = np.flatnonzero(np.concatenate((np.ones(min(1, logical.size), np.bool_), ~joins)))
        self.logical, self.start = logical[heads], start[heads]
        self.count = np.add.reduceat(count, heads) if heads.size else count

    def truncate(self, first: int) -> Indices:
        """Forget the file's blocks from *first* on; the device's blocks that are free by it.

        Linux: ext4_ext_remove_space().
        """
        kept = np.clip(first - self.logical, 0, self.count)
        freed = spread(self.start + kept, self.count - kept)
        left = kept > 0
        self.logical, self.start, self.count = self.logical[left], self.start[left], kept[left]
        return freed

    def blocks(self) -> Indices:
        """All of the device's blocks, in the order of the file."""
        return spread(self.start, self.count)

    def sound(self, first: int, end: int) -> bool:
        """True if they ascend, do not overlap, and lie in the device's blocks [*first*, *end*)."""
        return (
            every(self.count > 0)
            and every(self.logical[1:] >= (self.logical + self.count)[:-1])
            and not some((self.start < first) | (self.start + self.count > end))
        )


def spread(start: Indices, count: NDArray[np.int64]) -> Indices:
    """start[i], start[i] + 1, ... of each stretch, count[i] numbers; one after the other."""
    before = np.cumsum(count) - count
    return np.repeat(start - before, count) + np.arange(int(count.sum()))
