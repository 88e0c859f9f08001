"""move_pages(2) for one entry of its list after another, to be read beside mm/numa.py.

Linux collects pages for a node until the node changes or an entry has nothing to move, and then
moves what it has. Where that fails it gives up, and leaves every word that it has not written.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

UNSET = 12345


@dataclass
class Page:
    """What the system call sees at an address. kind: page, zero, device or hole."""

    kind: str
    node: int = 0
    mapcount: int = 1
    pinned: bool = False
    isolated: bool = False


@dataclass
class MovePages:
    """One call: *pages* by number, of which some are not mapped; *nodes* there are."""

    pages: dict[int, Page]
    nodes: int
    migrate_all: bool
    status: list[int] = field(default_factory=list)
    waiting: list[Page] = field(default_factory=list)
    succeeded: int = 0
    failed: int = 0

    def run(self, entries: list[tuple[int, int]]) -> int:
        """The return value for *entries* (page, node); the words are in `status`."""
        self.status = [UNSET] * len(entries)
        current, start = None, 0
        for i, (number, node) in enumerate(entries):
            if not 0 <= node < self.nodes:
                self._flush(current, start, i)
                return -errno.ENODEV
            if current is None:
                current, start = node, i
            elif node != current:
                if left := self._flush(current, start, i):
                    return left + len(entries) - i
                current, start = node, i
            answer = self._add(self.pages.get(number), node)
            if answer is None:
                continue
            self.status[i] = answer
            if left := self._flush(current, start, i):
                return left + len(entries) - i - 1
            current = None
        return self._flush(current, start, len(entries))

    def _add(self, page: Page | None, node: int) -> int | None:
        """Isolate *page*; None where it waits to be moved, else its word."""
        if page is None or page.kind == "zero":
            return -errno.EFAULT
        if page.kind != "page":
            return -errno.ENOENT
        if page.node == node:
            return node
        if page.mapcount > 1 and not self.migrate_all:
            return -errno.EACCES
        if page.isolated:
            return -errno.EBUSY
        page.isolated = True
        self.waiting.append(page)
        return None

    def _flush(self, node: int | None, start: int, stop: int) -> int:
        """Move what waits; how many stayed."""
        moved = self.waiting
        if not moved:
            return 0
        stayed = sum(page.pinned for page in moved)
        for page in moved:
            page.isolated = False
            if not page.pinned:
                page.node = node
        self.succeeded += len(moved) - stayed
        self.failed += stayed
        self.waiting = []
        if not stayed:
            self.status[start:stop] = [node] * (stop - start)
        return stayed
