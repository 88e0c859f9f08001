"""A process joins another control group with what it has. Linux: mm/memcontrol-v1.c, v6.11.

    count      what its page tables hold that its old group pays for: pages and slots in swap
    precharge  charge the new group for as many; a process whose memory does not fit stays
    move       run by run, under the page-table lock

This is move_charge_at_immigrate of the first version of control groups, for anonymous memory: pages
in system and in device memory, and what is in swap, whoever else maps it too. What is just being
migrated stays charged as it was. In v4.20 it is in mm/memcontrol.c.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mm.errors import InvalidArgument, OutOfMemory
from mm.gfp import GFP_KERNEL
from mm.mem_cgroup import MemCgroup, css_release
from mm.memcontrol import mem_cgroup_oom_synchronize, try_charge
from mm.memparse import format_size
from mm.page_counter import page_counter_try_charge, page_counter_uncharge
from mm.page_flags import PG_swapcache
from mm.pagewalk import walk_page_range
from mm.pgtable import pte_pfn, pte_present, pte_special
from mm.swap_state import lookup_swap_cache
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_swap_entry,
    swp_offset,
)
from mm.types import MemMap, MmStruct, page_anon
from mm.typing import PAGE_SHIFT, Pfns, Ptes, Slots
from mm.vectors import has


def mem_cgroup_attach(mm: MmStruct, to: MemCgroup | None) -> None:
    """Let *to* pay for *mm*, None being the root; with `move_charge_at_immigrate`, also for what it
    has.

    Unlike Linux v4.20, where the branch for device-private pages is never reached (5.11), those
    come along. Raises InvalidArgument where *to* was removed; OutOfMemory where it has no room, and
    then nothing has changed. Takes mmap_sem.
    Linux: cgroup_attach_task(), kernel/cgroup/cgroup.c; mem_cgroup_move_task(), mm/memcontrol.c.
    """
    with mm.mmap_sem.write():
        was: MemCgroup | None = mm.memcg
        if to is was:
            return
        moves = to is None or to.move_charge_at_immigrate
        pages, slots = mem_cgroup_count_precharge(mm, was) if moves else (0, 0)
        if to is None:
            mm.memcg = None
        else:
            mem_cgroup_can_attach(mm, to, pages, slots)
        if moves:
            gone = mem_cgroup_move_charge(mm, was, to, pages, slots)
            _uncharge(to, pages - gone[0], slots - gone[1])
            _uncharge(was, *gone)


def mem_cgroup_can_attach(mm: MmStruct, to: MemCgroup, pages: int, slots: int) -> None:
    """Let *mm* join *to*, which is charged for *pages* and *slots* that it will bring.

    Raises as mem_cgroup_attach(). Linux: mem_cgroup_can_attach() and mem_cgroup_do_precharge(),
    mm/memcontrol.c.
    """
    mem = mm.mem
    with mem.locks.atomic:
        to.refs += 1
    charged = try_charge(to, pages, GFP_KERNEL)
    mem_cgroup_oom_synchronize()
    with mem.locks.atomic:
        in_swap, _ = page_counter_try_charge(to.swap, slots)
        if (charged, in_swap) == (pages, slots) and to.online:
            mm.memcg = to
            return
        _uncharge(to, charged, in_swap)
    if not to.online:
        raise InvalidArgument(f"move_to: control group {to.name} was removed")
    raise OutOfMemory(
        f"move_to: {mm.name} brings {format_size(pages << PAGE_SHIFT)}, and "
        f"{format_size(slots << PAGE_SHIFT)} in swap, for which {to.name} has no room; it uses "
        f"{to.used}; raise its limits, or let what there is stay charged where it is by "
        f"move_charge_at_immigrate = False"
    )


def _uncharge(memcg: MemCgroup | None, pages: int, slots: int) -> None:
    if memcg is not None:
        with memcg.mem.locks.atomic:
            page_counter_uncharge(memcg.memory, pages)
            page_counter_uncharge(memcg.swap, slots)
            css_release(memcg)


def mem_cgroup_count_precharge(mm: MmStruct, was: MemCgroup | None) -> tuple[int, int]:
    """Pages and slots of *mm* that *was* pays for. Linux: mem_cgroup_count_precharge()."""
    pages = slots = 0
    for pfns, used in _targets(mm, was):
        pages, slots = pages + pfns.size, slots + used.size
    return pages, slots


def mem_cgroup_move_charge(
    mm: MmStruct, was: MemCgroup | None, to: MemCgroup | None, pages: int, slots: int
) -> tuple[int, int]:
    """Let *to* own what *was* does of *mm*, at most *pages* and *slots*; how many of each it were.

    Linux: mem_cgroup_move_charge_pte_range(), mm/memcontrol.c.
    """
    mem, number = mm.mem, 0 if to is None else to.number
    moved_pages = moved_slots = 0
    for pfns, used in _targets(mm, was):
        moving, in_swap = pfns[: pages - moved_pages], used[: slots - moved_slots]
        mem.memcg[moving] = number
        mem.swap.swap_cgroup[in_swap] = number
        moved_pages, moved_slots = moved_pages + moving.size, moved_slots + in_swap.size
    return moved_pages, moved_slots


def _targets(mm: MmStruct, was: MemCgroup | None) -> Iterator[tuple[Pfns, Slots]]:
    """What each run of the page tables of *mm* holds that *was* pays for; it stays so meanwhile."""
    mem, number = mm.mem, 0 if was is None else was.number
    for vma in mm.vmas:
        for run in walk_page_range(mem.tables, mm.pgd, vma.vm_start, vma.vm_end, holes=False):
            with mm.page_table_lock, mem.locks.atomic:
                yield get_mctgt_type(mem, run.ptes, number)


def get_mctgt_type(mem: MemMap, ptes: Ptes, number: int) -> tuple[Pfns, Slots]:
    """The anonymous pages behind *ptes*, and the slots, of the group *number*.

    A page that is in the swap cache and its slot go together.
    Linux: get_mctgt_type(), mm/memcontrol.c.
    """
    present = pte_present(ptes) & ~pte_special(ptes)
    away = is_device_private_entry(ptes) | is_device_exclusive_entry(ptes)
    slots = swp_offset(ptes[is_swap_entry(ptes)])
    cached = lookup_swap_cache(mem, slots)
    pfns = np.concatenate((pte_pfn(ptes[present]), swp_offset(ptes[away])))
    pfns = pfns[page_anon(mem, pfns)]
    slots = np.concatenate((slots, mem.private[pfns[has(mem.flags[pfns], PG_swapcache)]]))
    pfns = np.concatenate((pfns, cached[cached > 0]))
    pfns, slots = np.unique(pfns), np.unique(slots)
    return pfns[mem.memcg[pfns] == number], slots[mem.swap.swap_cgroup[slots] == number]
