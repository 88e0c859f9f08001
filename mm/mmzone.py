"""Nodes, zones and the lists that live in them. Linux: include/linux/mmzone.h.

Only data: the buddy allocator works on it in page_alloc, the LRU in swap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import numpy as np

from mm.typing import Pfns

MAX_ORDER: Final = 11  # orders 0 to 10, 4 KiB to 4 MiB
PAGEVEC_SIZE: Final = 15

DMA_END: Final = 16 << 20 >> 12  # first PFN above ZONE_DMA
DMA32_END: Final = 4 << 30 >> 12


class PageStack:
    """PFNs in a growing array with a live top: what a linked list of pages is in the kernel."""

    __slots__ = ("items", "size")

    def __init__(self, capacity: int = 64) -> None:
        self.items: Pfns = np.empty(capacity, dtype=np.int64)
        self.size = 0

    def push(self, pfns: Pfns) -> None:
        """Put *pfns* on top; the last one comes off first."""
        top = self.size + pfns.size
        if top > self.items.size:
            grown = np.empty(max(top, 2 * self.items.size), dtype=np.int64)
            grown[: self.size] = self.items[: self.size]
            self.items = grown
        self.items[self.size : top] = pfns
        self.size = top

    def pop(self, count: int) -> Pfns:
        """At most *count* PFNs from the top, the topmost last."""
        bottom = max(0, self.size - count)
        taken = self.items[bottom : self.size].copy()
        self.size = bottom
        return taken

    def live(self) -> Pfns:
        """All PFNs, bottom to top, as a view."""
        return self.items[: self.size]


@dataclass(slots=True, eq=False)
class Zone:
    """A stretch of frames with one use: the system's zones of a node, or one device's memory.

    `index` is what the column `MemMap.zone` holds for its pages. Linux: struct zone.
    """

    name: str  # "DMA", "DMA32", "Normal" or "Device"
    nid: int
    index: int
    start_pfn: int
    end_pfn: int  # first PFN after it
    managed_pages: int = 0
    nr_free: int = 0  # pages on free_area; pcp holds more
    watermark: tuple[int, int, int] = (0, 0, 0)  # min, low, high, in pages
    lowmem_reserve: dict[str, int] = field(default_factory=dict)  # by the zone first asked
    # One stack per order. A block that was merged away stays in the stack until it is popped;
    # `MemMap.free_order` says whether an item is still a free block of that order.
    free_area: list[PageStack] = field(
        default_factory=lambda: [PageStack() for _ in range(MAX_ORDER)]
    )
    pcp: list[PageStack] = field(default_factory=list)  # one per CPU; order 0
    pgmap: Any = None  # the DevPagemap of mm/types.py behind a ZONE_DEVICE
    pgalloc: str = field(init=False)  # the counter of what it gives

    def __post_init__(self) -> None:
        self.pgalloc = f"pgalloc_{self.name.lower()}"


class Lru(IntEnum):
    """The lists of a lruvec. Linux: enum lru_list."""

    INACTIVE_ANON = 0
    ACTIVE_ANON = 1
    INACTIVE_FILE = 2
    ACTIVE_FILE = 3
    UNEVICTABLE = 4


class LruList:
    """One LRU list, oldest first, as an append-only log.

    An item is (PFN, stamp); it counts while the page is PG_lru and `MemMap.lru_stamp` still says
    *stamp*. Taking a page out is therefore one write to a column, wherever it stands, and the
    log sheds what no longer counts when it is full.
    """

    __slots__ = ("first", "log", "nr_pages", "size", "stamps")

    def __init__(self) -> None:
        self.log: Pfns = np.empty(256, dtype=np.int64)
        self.stamps: Pfns = np.empty(256, dtype=np.int64)
        self.first = 0  # no item before it counts
        self.size = 0
        self.nr_pages = 0  # items that count


@dataclass(slots=True, eq=False)
class Node:
    """A NUMA node. Linux: struct pglist_data."""

    nid: int
    start_pfn: int
    end_pfn: int
    zones: list[Zone] = field(default_factory=list)  # ascending addresses
    zonelist: list[Zone] = field(default_factory=list)  # where to look, best first
    lruvec: list[LruList] = field(default_factory=lambda: [LruList() for _ in Lru])
    # Direct reclaim, filled by vmscan: (nodes to look at, wanted pages) -> reclaimed pages.
    reclaim: Callable[[list[int], int], int] | None = None
    # What reclaims up to the high watermarks, filled by vmscan; for a thread that may wait.
    kswapd: Callable[[], int] | None = None
    kswapd_failures: int = 0  # runs of it in a row that reclaimed nothing
    inactive_age: int = 0  # pages that have left the inactive lists (mm/workingset.py)
