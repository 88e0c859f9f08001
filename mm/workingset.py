"""Did a page come back soon after reclaim took it? Linux: mm/workingset.c.

Each node counts the pages that leave its inactive lists. What the counter said when a page left
stays behind in the swap cache, as its shadow; when the page comes back, the difference to what it
says then is how much longer the inactive list would have had to be. Is it no more than what the
active lists hold, then the page deserves a place there.

Unlike Linux v4.20, where only pages of files leave shadows, and anonymous pages come back active
(v5.9 treats both alike).

A shadow:  | age 62 ... 9 | node 8 ... 1 | 0: was in the working set |
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.mmzone import Lru, Node
from mm.page_flags import PG_active, PG_workingset
from mm.types import MemMap
from mm.typing import Pfns, Slots
from mm.vectors import distinct, has, places

NODES_SHIFT: Final = 8
EVICTION_SHIFT: Final = NODES_SHIFT + 1


def workingset_eviction(mem: MemMap, pfns: Pfns) -> Slots:
    """Shadows for *pfns* (in the order in which they go), int64[n] and not negative.

    Linux: workingset_eviction(), mm/workingset.c.
    """
    nids = np.zeros_like(pfns)
    if len(mem.nodes) > 1:
        nids += mem.page_to_nid(pfns)
    ages = np.empty(pfns.size, dtype=np.int64)
    with mem.locks.atomic:
        for nid in distinct(nids):
            node, here = mem.nodes[nid], places(nids == nid)
            ages[here] = np.arange(node.inactive_age, node.inactive_age + here.size)
            node.inactive_age += here.size
    return ages << EVICTION_SHIFT | nids << 1 | has(mem.flags[pfns], PG_workingset)


def workingset_refault(mem: MemMap, pfns: Pfns, shadows: Slots) -> None:
    """Make *pfns*, which come back, active where their *shadows* say that they left too early.

    Linux: workingset_refault(), mm/workingset.c.
    """
    if not pfns.size:
        return
    nids = (shadows >> 1) & ((1 << NODES_SHIFT) - 1)
    early = np.zeros(pfns.size, dtype=np.bool_)
    with mem.locks.atomic:
        for nid in distinct(nids):
            node, here = mem.nodes[nid], places(nids == nid)
            distance = node.inactive_age - (shadows[here] >> EVICTION_SHIFT)
            early[here] = distance <= _workingset_size(node)
            node.inactive_age += int(np.count_nonzero(early[here]))
        restored = early & (shadows & 1 != 0)
        mem.flags[pfns[early]] |= PG_active
        mem.flags[pfns[restored]] |= PG_workingset
    mem.vmstat.add("workingset_refault", pfns.size)
    mem.vmstat.add("workingset_activate", int(np.count_nonzero(early)))
    mem.vmstat.add("workingset_restore", int(np.count_nonzero(restored)))


def _workingset_size(node: Node) -> int:
    """What a page competes with that is not on its own inactive list."""
    rivals = (Lru.ACTIVE_ANON, Lru.ACTIVE_FILE, Lru.INACTIVE_FILE)
    return sum(node.lruvec[lru].nr_pages for lru in rivals)
