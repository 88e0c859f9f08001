"""Sparse arrays of pages, by page offset. Linux: lib/xarray.c, include/linux/xarray.h.

An entry is one number:

     n > 0    the page with PFN n
     0        nothing
    ~v < 0    the value v, which stands for a page that is not in memory: a slot in swap, a shadow

A node is a row of 512 entries, with the marks of each; an array has the nodes that hold something.
All calls take and give vectors. Whoever shares an array holds `atomic` (Linux: xa_lock).
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mm.typing import Indices, Mask, pages
from mm.vectors import distinct, joined, pieces, places, some

Entries: TypeAlias = NDArray[np.int64]  # as drawn above

XA_CHUNK_SHIFT: Final = 9
XA_CHUNK_SIZE: Final = 1 << XA_CHUNK_SHIFT
XA_CHUNK_MASK: Final = XA_CHUNK_SIZE - 1
MAX_INDEX: Final = 1 << 52  # no page offset is so high
XA_MARK_0: Final = 1
XA_MARK_1: Final = 2
XA_MARK_2: Final = 4
_NO_ENTRIES: Final[Entries] = np.empty(0, dtype=np.int64)


def xa_mk_value(values: Indices) -> Entries:
    """Entries that hold *values*, which are not negative. Linux: xa_mk_value()."""
    return ~values


def xa_to_value(entries: Entries) -> Indices:
    """What entries that are values hold. Linux: xa_to_value()."""
    return ~entries


def xa_is_value(entries: Entries) -> Mask:
    """True for entries that hold a value instead of a page. Linux: xa_is_value()."""
    return entries < 0


class XArray:
    """Linux: struct xarray. Nodes are rows of two columns, found by the upper bits of the index."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # row of each node, by index >> XA_CHUNK_SHIFT
        self._spare: list[int] = []  # rows that have no node
        # Row 0 is never given to a node: where a node is missing, a lookup finds its zeros.
        self._entries: Entries = np.zeros(XA_CHUNK_SIZE, dtype=np.int64)
        self._marks: NDArray[np.uint8] = np.zeros(XA_CHUNK_SIZE, dtype=np.uint8)

    @property
    def empty(self) -> bool:
        """True where it holds no entry. Linux: xa_empty()."""
        return not self._rows

    @property
    def nodes(self) -> int:
        """How many nodes it has."""
        return len(self._rows)

    def load(self, indexes: Indices) -> Entries:
        """The entry at each of *indexes*. Linux: xa_load()."""
        return self._entries[self._at(indexes)]

    def store(self, indexes: Indices, entries: Entries) -> None:
        """Put *entries*, none of them 0, at *indexes*; marks stay. Linux: xa_store()."""
        at = self._at(indexes)
        if some(at < XA_CHUNK_SIZE):
            self._make_nodes(indexes)
            at = self._at(indexes)
        self._entries[at] = entries

    def erase(self, indexes: Indices) -> None:
        """Leave nothing at *indexes*, and no marks. Linux: xa_erase()."""
        at = self._at(indexes)
        self._entries[at] = 0
        self._marks[at] = 0
        for node in distinct(indexes >> XA_CHUNK_SHIFT) if indexes.size else ():
            row = self._rows.get(node, 0) << XA_CHUNK_SHIFT
            if row and not some(self._entries[row : row + XA_CHUNK_SIZE]):
                self._spare.append(self._rows.pop(node))

    def find(self, start: int, end: int, mark: int = 0) -> tuple[Indices, Entries]:
        """Where in [*start*, *end*) something is, ascending, and what; if *mark*, only what has it.

        Linux: xas_for_each() and xas_for_each_marked().
        """
        found = []
        for node in self._nodes_in(start, end):
            row = self._rows[node]
            here = slice(row << XA_CHUNK_SHIFT, (row + 1) << XA_CHUNK_SHIFT)
            there = self._marks[here] & np.uint8(mark) if mark else self._entries[here]
            found.append(places(there) + (node << XA_CHUNK_SHIFT))
        indexes = joined(found)
        if indexes.size and (indexes.item(0) < start or indexes.item(-1) >= end):
            indexes = indexes[(indexes >= start) & (indexes < end)]
        return indexes, self.load(indexes)

    def set_mark(self, indexes: Indices, mark: int) -> None:
        """Give the entries at *indexes*, all of which there are, *mark*. Linux: xa_set_mark()."""
        self._marks[self._at(indexes)] |= np.uint8(mark)

    def clear_mark(self, indexes: Indices, mark: int) -> None:
        """Take *mark* from the entries at *indexes*. Linux: xa_clear_mark()."""
        self._marks[self._at(indexes)] &= np.uint8(0xFF ^ mark)

    def get_mark(self, indexes: Indices, mark: int) -> Mask:
        """True where the entry at an index has *mark*. Linux: xa_get_mark()."""
        return (self._marks[self._at(indexes)] & np.uint8(mark)).astype(np.bool_)

    def marked(self, mark: int) -> bool:
        """True if any entry has *mark*. Linux: xa_marked()."""
        return some(self._marks & np.uint8(mark))

    def _at(self, indexes: Indices) -> Indices:
        """Where in the columns each index is; in row 0 where its node is missing."""
        if indexes.size == 1:
            index = indexes.item()
            row = self._rows.get(index >> XA_CHUNK_SHIFT, 0)
            return pages((row << XA_CHUNK_SHIFT) + (index & XA_CHUNK_MASK))
        nodes, at = indexes >> XA_CHUNK_SHIFT, indexes & XA_CHUNK_MASK
        for piece in pieces(nodes[1:] != nodes[:-1], nodes.size):
            at[piece] += self._rows.get(nodes.item(piece.start), 0) << XA_CHUNK_SHIFT
        return at

    def _nodes_in(self, start: int, end: int) -> list[int]:
        """The nodes that [*start*, *end*) touches, ascending."""
        first, stop = start >> XA_CHUNK_SHIFT, ((end - 1) >> XA_CHUNK_SHIFT) + 1
        if stop - first < len(self._rows):
            return [node for node in range(first, stop) if node in self._rows]
        return sorted(node for node in self._rows if first <= node < stop)

    def _make_nodes(self, indexes: Indices) -> None:
        missing = [n for n in distinct(indexes >> XA_CHUNK_SHIFT) if n not in self._rows]
        fresh = len(missing) - len(self._spare)
        if fresh > 0:
            rows = self._entries.size >> XA_CHUNK_SHIFT
            grown = max(2 * rows, rows + fresh)
            self._entries = np.concatenate((self._entries, _zeros(grown - rows, np.int64)))
            self._marks = np.concatenate((self._marks, _zeros(grown - rows, np.uint8)))
            self._spare += range(grown - 1, rows - 1, -1)
        for node in missing:
            self._rows[node] = self._spare.pop()


def _zeros(rows: int, dtype: type[np.generic]) -> NDArray[np.generic]:
    return np.zeros(rows << XA_CHUNK_SHIFT, dtype=dtype)
