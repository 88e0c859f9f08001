"""Whether control groups are charged with what there is: the part of mm/debug.py about those."""

from __future__ import annotations

import numpy as np

from mm.census import Census, Complaints, complain
from mm.mem_cgroup import MemCgroup, mem_cgroup_tree
from mm.memremap import FREE_REFCOUNT
from mm.page_flags import PG_hwpoison
from mm.types import MemMap
from mm.typing import Pfns
from mm.vectors import has


def check_memcgs(mem: MemMap, census: Census) -> Complaints:
    """Used pages and slots name groups, which count them, and keep to their limits."""
    pages, slots = census.pages, np.arange(mem.swap.max)
    free = mem.refcount[pages] <= FREE_REFCOUNT * mem.is_zone_device_page(pages)
    charged = mem.memcg[pages] != 0
    yield from complain("memcg", pages, charged & free, "charged, though nobody holds it")
    poisoned = has(mem.flags[pages], PG_hwpoison)
    yield from complain("memcg", pages, charged & poisoned, "charged, though out of use")
    unknown = charged & ~np.isin(mem.memcg[pages], list(mem.memcgs))
    yield from complain("memcg", pages, unknown, "of a group that there is not")
    in_use, owners = mem.swap.swap_map > 0, mem.swap.swap_cgroup
    unknown = (owners != 0) & (~in_use | ~np.isin(owners, list(mem.memcgs)))
    yield from complain("swap_cgroup", slots, unknown, "free, or of no group", "slot")
    for number, memcg in mem.memcgs.items():
        yield from _check_memcg(mem, pages, number, memcg)
    for mm in mem.mms:
        if mm.memcg is not None and (not mm.memcg.online or mm.memcg not in mem.memcgs.values()):
            yield f"memcg: {mm.name} is in {mm.memcg}, which was removed"


def _check_memcg(mem: MemMap, pages: Pfns, number: int, memcg: MemCgroup) -> Complaints:
    where = f"of control group {memcg.name}"
    if memcg.number != number:
        yield f"memcgs: number {memcg.number} {where} is not {number}"
    if memcg.parent is not None and mem.memcgs.get(memcg.parent.number) is not memcg.parent:
        yield f"memcgs: the parent {where} is gone"
    among = np.append(mem_cgroup_tree(memcg), False)  # the last is for numbers of no group
    for name, counter, column in (
        ("memory", memcg.memory, mem.memcg[pages]),
        ("swap", memcg.swap, mem.swap.swap_cgroup),
    ):
        count = int(np.count_nonzero(among[np.minimum(column, among.size - 1)]))
        if counter.usage != count:
            yield f"{name}: usage {where} says {counter.usage}, {count} are charged"
        if counter.usage > counter.watermark:
            yield f"{name}: watermark {where} says {counter.watermark}, below {counter.usage}"
    if memcg.memory.usage > memcg.memory.max:
        yield f"memory: usage {where} is {memcg.memory.usage}, over {memcg.memory.max}"
    if memcg.refs:
        yield f"memcgs: {memcg.refs} references {where}, yet nobody charges it"
    if not memcg.online and not (memcg.memory.usage or memcg.swap.usage):
        yield f"memcgs: nothing is charged any more, yet what is left {where} stays"
