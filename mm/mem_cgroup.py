"""A control group as its files show it, and the tree of them. Linux: struct mem_cgroup.

Machine.cgroup() makes groups, mm/memcontrol.py charges them. One that is removed while pages or
slots are charged to it stays, out of sight, until the last of those is freed. Linux:
include/linux/memcontrol.h, the files of mm/memcontrol.c, and kernel/cgroup/cgroup.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from mm.errors import Busy
from mm.memparse import Size, format_size
from mm.page_counter import (
    PAGE_COUNTER_MAX,
    PageCounter,
    page_counter_memparse,
    page_counter_set_max,
)
from mm.page_flags import PG_active, PG_lru, PG_swapbacked, PG_unevictable
from mm.types import MemMap, page_anon
from mm.typing import PAGE_SHIFT, Mask
from mm.vectors import has, places

MEM_CGROUP_RECLAIM_RETRIES: Final = 5  # times that reclaim may find nothing: used pages age by it


class MemCgroup:
    """A control group; made by `Machine.cgroup()`. Linux: struct mem_cgroup.

    Sizes are in bytes, and include what the groups in it have. `events` counts how often its limit
    was met ("max"), an allocation failed by that ("oom"), its limit on swap was met ("swap_max"),
    and pages got no slot ("swap_fail").
    """

    def __init__(self, mem: MemMap, name: str, parent: MemCgroup | None, number: int) -> None:
        self.mem = mem
        self.name = name
        self.parent = parent  # None: it stands in the root
        self.number = number  # in column `memcg`
        self.memory: PageCounter = PageCounter(parent.memory if parent else None)
        self.swap: PageCounter = PageCounter(parent.swap if parent else None)
        self.events = dict.fromkeys(("max", "oom", "swap_max", "swap_fail"), 0)
        self.move_charge_at_immigrate = True  # what a process that joins it has comes along
        self.online = True  # until it is removed
        self.refs = 0  # who is about to charge it

    def __repr__(self) -> str:
        return f"<MemCgroup {self.name}, {self.used}>"

    @property
    def used(self) -> str:
        """`usage` and `limit` as people read them."""
        return f"{format_size(self.usage)} of " + (
            "no limit" if self.limit is None else format_size(self.limit)
        )

    def lineage(self) -> Iterator[MemCgroup]:
        """It, and what it stands in, outward. Linux: parent_mem_cgroup(), linux/memcontrol.h."""
        memcg: MemCgroup | None = self
        while memcg is not None:
            yield memcg
            memcg = memcg.parent

    @property
    def usage(self) -> int:
        """Memory that is charged to it. Linux: memory.current."""
        return self.memory.usage << PAGE_SHIFT

    @property
    def peak(self) -> int:
        """The most that `usage` ever was. Linux: memory.peak."""
        return self.memory.watermark << PAGE_SHIFT

    @property
    def limit(self) -> int | None:
        """What `usage` may come to; None is no limit. Linux: memory.max.

        Setting a lower one has pages reclaimed first, and raises Busy where too many stay; then it
        remains as it was. So does memory.limit_in_bytes; memory.max kills processes.
        """
        return _bytes(self.memory.max)

    @limit.setter
    def limit(self, size: Size | None) -> None:
        mem_cgroup_resize_max(self, page_counter_memparse(size))

    @property
    def swap_usage(self) -> int:
        """Slots in swap that are charged to it. Linux: memory.swap.current."""
        return self.swap.usage << PAGE_SHIFT

    @property
    def swap_limit(self) -> int | None:
        """What `swap_usage` may come to; None is no limit. Linux: memory.swap.max.

        A lower one frees no slots: there are no new ones until enough of the old are free.
        """
        return _bytes(self.swap.max)

    @swap_limit.setter
    def swap_limit(self, size: Size | None) -> None:
        self.swap.max = page_counter_memparse(size)

    @property
    def stat(self) -> dict[str, int]:
        """What its memory is. Linux: memory.stat."""
        return {name: pages << PAGE_SHIFT for name, pages in memory_stat(self).items()}

    def remove(self) -> None:
        """Take it out of the tree; a second call does nothing.

        What is charged to it stays charged, to it and to what it stood in, until it is freed.
        Raises Busy while it has processes or groups in it. Linux: rmdir of a control group.
        """
        mem_cgroup_css_offline(self)


def _bytes(nr_pages: int) -> int | None:
    return None if nr_pages == PAGE_COUNTER_MAX else nr_pages << PAGE_SHIFT


def mem_cgroup_resize_max(memcg: MemCgroup, nr_pages: int) -> None:
    """Allow *memcg* no more than *nr_pages*, reclaiming what is more. Raises Busy.

    Linux: mem_cgroup_resize_max(), and memory_max_write() for the attempts, mm/memcontrol.c.
    """
    mem, retries = memcg.mem, MEM_CGROUP_RECLAIM_RETRIES
    while retries:
        with mem.locks.atomic:
            if page_counter_set_max(memcg.memory, nr_pages):
                return
            excess = memcg.memory.usage - nr_pages
        if mem.memcg_reclaim is None or not mem.memcg_reclaim(memcg, excess):
            retries -= 1
    raise Busy(
        f"cgroup: {memcg.name} uses {format_size(memcg.usage)} that cannot be reclaimed, too much "
        f"for a limit of {format_size(nr_pages << PAGE_SHIFT)}; free some of it, or boot with a "
        f"larger swap="
    )


def memory_stat(memcg: MemCgroup) -> dict[str, int]:
    """How many pages of each kind *memcg* and the groups in it have.

    "device" (ours) are those of them that are in device memory. Linux: memory_stat_show(),
    mm/memcontrol.c; "swap" as in memory.stat of v1.
    """
    mem = memcg.mem
    with mem.locks.atomic:
        among = mem_cgroup_tree(memcg)
        pfns = places(mem.memcg)
        pfns = pfns[among[mem.memcg[pfns]]]
        swap = int(np.count_nonzero(among[mem.swap.swap_cgroup]))
        flags = mem.flags[pfns]
        file = (mem.mapping[pfns] != 0) & ~page_anon(mem, pfns)
    active, unevictable = has(flags, PG_active), has(flags, PG_unevictable)
    evictable, swapbacked = has(flags, PG_lru) & ~unevictable, has(flags, PG_swapbacked)
    kinds = {
        "anon": ~file,
        "file": file,
        "device": mem.is_zone_device_page(pfns),
        "inactive_anon": evictable & swapbacked & ~active,
        "active_anon": evictable & swapbacked & active,
        "inactive_file": evictable & ~swapbacked & ~active,
        "active_file": evictable & ~swapbacked & active,
        "unevictable": unevictable,
    }
    return {"swap": swap} | {name: int(np.count_nonzero(kind)) for name, kind in kinds.items()}


def mem_cgroup_tree(memcg: MemCgroup) -> Mask:
    """True at the number of *memcg* and of each group in it, bool[highest number + 1].

    Linux: for_each_mem_cgroup_tree(), mm/memcontrol.c.
    """
    memcgs = memcg.mem.memcgs
    with memcg.mem.locks.atomic:
        among = np.zeros(max(memcgs, default=0) + 1, dtype=np.bool_)
        for number, one in memcgs.items():
            among[number] = memcg in one.lineage()
    return among


def mem_cgroup_css_offline(memcg: MemCgroup) -> None:
    """Remove *memcg*. Raises Busy. Linux: mem_cgroup_css_offline(), mm/memcontrol.c."""
    mem = memcg.mem
    with mem.locks.atomic:
        members = [f"process {mm.name}" for mm in mem.mms if mm.memcg is memcg]
        members += [g.name for g in mem.memcgs.values() if g.parent is memcg and g.online]
        if members:
            raise Busy(
                f"cgroup: {memcg.name} still holds {', '.join(members[:4])}; move them out, or let "
                f"them exit, first"
            )
        memcg.online = False
        css_release(memcg)


def css_put(memcg: MemCgroup) -> None:
    """Whoever was about to charge *memcg* is done. Linux: css_put(), include/linux/cgroup.h."""
    with memcg.mem.locks.atomic:
        memcg.refs -= 1
        css_release(memcg)


def css_release(memcg: MemCgroup) -> None:
    """Forget *memcg*, and what it stood in, where removed and charged with nothing any more.

    Called with `atomic` held. Linux: css_release(), kernel/cgroup/cgroup.c.
    """
    memcgs = memcg.mem.memcgs
    for one in memcg.lineage():
        if one.online or one.refs or one.memory.usage or one.swap.usage:
            return
        if any(other.parent is one for other in memcgs.values()):
            return
        memcgs.pop(one.number, None)
