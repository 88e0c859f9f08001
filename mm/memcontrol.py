"""Whose pages there are, and how many there may be: control groups. Linux: mm/memcontrol.c.

    charge     try_charge            room in the group, and in all that it stands in; where there is
                                     none, pages of theirs that are not in use make some
               commit_charge         the pages are the group's, column `memcg` says so
    keep       mem_cgroup_migrate    the charge goes with the page, to a device and back
    uncharge   mem_cgroup_uncharge   the last reference is gone

A page is charged once, to the group of the process that brought it, in system memory as in a
device's. Its slot in swap is charged besides, to a counter of its own, and the page that is read
from there belongs to the group that the slot is charged to.

Charged are the pages that processes map, not their page tables. Number 0 is the root, which has no
limit and counts nothing. While there is no other group `mem.memcgs` is empty, and nobody comes
here. Counters and columns change under `mem.locks.atomic`.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mm.errors import InvalidArgument, OutOfMemory
from mm.gfp import Gfp
from mm.locking import wait_event_timeout
from mm.mem_cgroup import MEM_CGROUP_RECLAIM_RETRIES, MemCgroup, css_put, css_release
from mm.page_counter import page_counter_try_charge, page_counter_uncharge
from mm.sched import current_task
from mm.swap_slots import nr_swap_pages
from mm.types import MemMap, MmStruct
from mm.typing import Indices, Mask, Pfns, Slots
from mm.vectors import distinct, places, rows

MEM_CGROUP_ID_MAX: Final = (1 << 16) - 1
NO_ROOM: Final = -1  # in place of a group's number: it has no room

_DIRECT_RECLAIM: Final = int(Gfp.DIRECT_RECLAIM)


def mem_cgroup_css_alloc(mem: MemMap, path: str) -> MemCgroup:
    """The group at *path*, as "/jobs/train"; made where there is none, with what it stands in.

    Raises InvalidArgument, OutOfMemory. Linux: mem_cgroup_css_alloc(), mm/memcontrol.c;
    cgroup_mkdir(), kernel/cgroup/cgroup.c.
    """
    names = path.strip("/").split("/")
    if not all(names) or {".", ".."} & set(names):
        raise InvalidArgument(
            f'cgroup: {path!r} is no path as "/jobs/train" is; the root, "/", has no limit, and '
            f"processes are there unless they are moved"
        )
    memcg = None
    with mem.locks.atomic:
        for depth in range(len(names)):
            name = "/" + "/".join(names[: depth + 1])
            there = (g for g in mem.memcgs.values() if g.online and g.name == name)
            memcg = next(there, None) or _css_alloc(mem, name, memcg)
    assert memcg is not None
    return memcg


def _css_alloc(mem: MemMap, name: str, parent: MemCgroup | None) -> MemCgroup:
    number = next((n for n in range(1, MEM_CGROUP_ID_MAX + 1) if n not in mem.memcgs), None)
    if number is None:
        raise OutOfMemory(f"cgroup: no more than {MEM_CGROUP_ID_MAX} groups; remove some")
    memcg = mem.memcgs[number] = MemCgroup(mem, name, parent, number)
    mem.swap.uncharge = partial(mem_cgroup_uncharge_swap, mem)
    return memcg


# Charge -----------------------------------------------------------------------------------------


def get_mem_cgroup_from_mm(mm: MmStruct) -> MemCgroup | None:
    """The group that pays for *mm*, with a reference; None is the root.

    Linux: get_mem_cgroup_from_mm(), mm/memcontrol.c.
    """
    with mm.mem.locks.atomic:
        memcg: MemCgroup | None = mm.memcg
        if memcg is not None:
            memcg.refs += 1
    return memcg


def try_charge(memcg: MemCgroup, nr_pages: int, gfp: int) -> int:
    """Charge *memcg* for as many of *nr_pages* as it has, or can be given, room for; how many.

    Where a limit is met, pages of that group are reclaimed, unless *gfp* forbids it. Nobody is
    killed where that does not help: whoever asks gets nothing, as with memory.oom_control of v1,
    and the task remembers for which group's sake. Drops the caller's reference to *memcg*: from
    then on what is charged keeps it. Linux: try_charge(), mm/memcontrol.c.
    """
    missing, retries, over = nr_pages, MEM_CGROUP_RECLAIM_RETRIES, None
    try:
        while True:
            part, over = _charge(memcg, missing)
            missing -= part
            if over is None or not gfp & _DIRECT_RECLAIM:
                break
            if not _reclaim(over, missing):
                if missing < nr_pages or not retries:
                    break
                retries -= 1
                wait_event_timeout(lambda: memcg.memory.margin > 0)  # others may have all in hand
    finally:
        css_put(memcg)
    full = over if missing == nr_pages else None
    if full is not None:
        with memcg.mem.locks.atomic:
            full.events["oom"] += 1
    current_task().memcg_in_oom = full
    return nr_pages - missing


def _charge(memcg: MemCgroup, nr_pages: int) -> tuple[int, MemCgroup | None]:
    """Charge *memcg* for what there is room for; how many pages, and whose limit refuses more."""
    with memcg.mem.locks.atomic:
        room, refuses = page_counter_try_charge(memcg.memory, nr_pages)
        over = next((one for one in memcg.lineage() if one.memory is refuses), None)
        if over is not None:
            over.events["max"] += 1
    return room, over


def _reclaim(memcg: MemCgroup, nr_pages: int) -> int:
    """Reclaim *nr_pages* of *memcg*, or as many as it may have; how many it were."""
    reclaim = memcg.mem.memcg_reclaim
    return reclaim(memcg, min(nr_pages, memcg.memory.max)) if reclaim is not None else 0


def commit_charge(mem: MemMap, pfns: Pfns, memcg: MemCgroup | None) -> None:
    """*pfns*, for which *memcg* is charged, belong to it. Linux: commit_charge()."""
    if memcg is not None and pfns.size:
        with mem.locks.atomic:
            mem.memcg[rows(pfns)] = memcg.number


def cancel_charge(memcg: MemCgroup | None, nr_pages: int) -> None:
    """*memcg* gets *nr_pages* less than it is charged for. Linux: cancel_charge()."""
    if memcg is not None and nr_pages:
        with memcg.mem.locks.atomic:
            page_counter_uncharge(memcg.memory, nr_pages)
            css_release(memcg)


def mem_cgroup_precharge(mm: MmStruct, nr_pages: int, gfp: int) -> tuple[MemCgroup | None, int]:
    """Charge the group of *mm* for *nr_pages* that are still to be allocated; it, and how many.

    The caller allocates no more than that, then calls commit_charge() for what it got and
    cancel_charge() for the rest: a process of a group that is full takes no frames from others.
    Linux: mem_cgroup_try_charge(), mm/memcontrol.c, which comes after the allocation of one page.
    """
    memcg = get_mem_cgroup_from_mm(mm)
    return memcg, nr_pages if memcg is None else try_charge(memcg, nr_pages, gfp)


def mem_cgroup_try_charge(mm: MmStruct, pfns: Pfns, gfp: int) -> Mask:
    """Charge the group of *mm* for *pfns*; False for the last ones if there is no room for all.

    What is charged already, as a page from swap is, stays so. Unlike Linux v4.20 there is no
    second step: a page that is freed before it is mapped is uncharged as any other (v5.8).
    Linux: mem_cgroup_try_charge() and mem_cgroup_commit_charge(), mm/memcontrol.c.
    """
    mem = mm.mem
    charged = mem.memcg[pfns] != 0
    fresh = places(~charged)
    memcg, room = mem_cgroup_precharge(mm, fresh.size, gfp)
    commit_charge(mem, pfns[fresh[:room]], memcg)
    charged[fresh[:room]] = True
    return charged


# Keep, uncharge ---------------------------------------------------------------------------------


def mem_cgroup_migrate(mem: MemMap, old: Pfns, new: Pfns) -> None:
    """The charge of old[i] becomes that of new[i], which takes its place.

    Unlike Linux v4.20, which charges for both until the old page is freed (v6.7): there is room
    for one page where there was for another, whatever the limit.
    Linux: mem_cgroup_migrate(), mm/memcontrol.c.
    """
    with mem.locks.atomic:
        owners = mem.memcg[old]
        mem.memcg[rows(old)] = 0
        mem.memcg[rows(new)] = owners


def mem_cgroup_uncharge(mem: MemMap, pfns: Pfns) -> None:
    """*pfns* (distinct) are nobody's any more. Linux: mem_cgroup_uncharge(), mm/memcontrol.c."""
    with mem.locks.atomic:
        for memcg, mine in _by_group(mem, mem.memcg[pfns]):
            page_counter_uncharge(memcg.memory, mine.size)
            css_release(memcg)
        mem.memcg[rows(pfns)] = 0


def _by_group(mem: MemMap, owners: NDArray[np.integer]) -> list[tuple[MemCgroup, Indices]]:
    """The groups whose numbers are among *owners*, each with the places where they are."""
    return [(mem.memcgs[n], places(owners == n)) for n in distinct(owners) if n]


def mem_cgroup_oom_synchronize() -> MemCgroup | None:
    """The full group for whose sake the last charge of the running task failed; asks once.

    Linux: mem_cgroup_oom_synchronize(), mm/memcontrol.c.
    """
    task = current_task()
    memcg: MemCgroup | None = task.memcg_in_oom
    task.memcg_in_oom = None
    return memcg


# Swap -------------------------------------------------------------------------------------------


def mem_cgroup_try_charge_swap(mem: MemMap, pfns: Pfns, slots: Slots) -> Mask:
    """Charge slots[i] to the group of pfns[i]; False where it may have no more.

    *slots* may be fewer than *pfns*: none are left for the last. Those of a group that was removed
    are charged to what it stood in. Linux: mem_cgroup_try_charge_swap(), mm/memcontrol.c.
    """
    may = np.arange(pfns.size) < slots.size
    with mem.locks.atomic:
        owners = mem.memcg[pfns]
        for memcg, mine in _by_group(mem, owners):
            slotted = mine[may[mine]]
            memcg.events["swap_fail"] += mine.size - slotted.size
            online = next((one for one in memcg.lineage() if one.online), None)
            owners[slotted] = 0 if online is None else online.number
            if online is not None:
                room, _ = page_counter_try_charge(online.swap, slotted.size)
                may[slotted[room:]] = False
                refused = slotted.size - room
                online.events["swap_max"] += refused
                online.events["swap_fail"] += refused
        here = places(may)
        mem.swap.swap_cgroup[slots[here]] = owners[here]
    return may


def mem_cgroup_uncharge_swap(mem: MemMap, slots: Slots) -> None:
    """*slots* (distinct) are free. Linux: mem_cgroup_uncharge_swap(), mm/memcontrol.c."""
    if not mem.memcgs:
        return
    charged_to = mem.swap.swap_cgroup
    with mem.locks.atomic:
        for memcg, mine in _by_group(mem, charged_to[slots]):
            page_counter_uncharge(memcg.swap, mine.size)
            css_release(memcg)
        charged_to[rows(slots)] = 0


def mem_cgroup_swapin_charge(
    mem: MemMap, mm: MmStruct | None, slots: Slots, gfp: int
) -> NDArray[np.int64]:
    """Charge for pages that are to be read from *slots*; the number of each one's group.

    That is the group that the slot is charged to, or that of *mm* if it was removed; NO_ROOM where
    it has no room. mem_cgroup_swapin_commit() must follow. Unlike Linux v4.20, which charges for a
    page when it is mapped, and not for what is read ahead (v5.8).
    Linux: mem_cgroup_swapin_charge_page(), mm/memcontrol.c, v5.13.
    """
    with mem.locks.atomic:
        owners = mem.swap.swap_cgroup[slots].astype(np.int64)
        for memcg, mine in _by_group(mem, owners):
            if not memcg.online:
                owners[mine] = 0 if mm is None or mm.memcg is None else mm.memcg.number
        asked = list(_by_group(mem, owners))
        for memcg, _ in asked:
            memcg.refs += 1
    for memcg, mine in asked:
        owners[mine[try_charge(memcg, mine.size, gfp) :]] = NO_ROOM
    return owners


def mem_cgroup_swapin_commit(mem: MemMap, pfns: Pfns, owners: NDArray[np.int64]) -> None:
    """pfns[i] belongs to the group owners[i], and where it is 0 nothing was read after all.

    Linux: commit_charge() and cancel_charge(), mm/memcontrol.c.
    """
    for memcg, mine in _by_group(mem, np.maximum(owners, 0)):
        read = pfns[mine[pfns[mine] > 0]]
        commit_charge(mem, read, memcg)
        cancel_charge(memcg, mine.size - read.size)


def mem_cgroup_get_nr_swap_pages(mem: MemMap, memcg: MemCgroup | None) -> int:
    """Slots that *memcg* can have; of the root (None), those that are free.

    Linux: mem_cgroup_get_nr_swap_pages(), mm/memcontrol.c.
    """
    free = nr_swap_pages(mem.swap)
    return free if memcg is None else min(free, memcg.swap.margin)


def mem_cgroup_swap_full(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages whose group, or what it stands in, uses half of the slots it may have.

    Linux: mem_cgroup_swap_full(), mm/memcontrol.c.
    """
    full = np.zeros(pfns.size, dtype=np.bool_)
    with mem.locks.atomic:
        for memcg, mine in _by_group(mem, mem.memcg[pfns]):
            full[mine] = any(2 * one.usage >= one.max for one in memcg.swap.lineage())
    return full
