"""Faults on pages that are in swap: back into memory, and into the page table.

    find   in the swap cache, where the page is still or already: a minor fault
    read   from its slot, through the swap cache, where two that want it meet: a major fault
    map    the entry lets go of the slot; the process may store to what is its own

A page that was read, and that nobody else will look for, leaves the swap cache at once and its slot
is free. Linux goes past the cache for such a page when swap is a RAM disk; one sees no difference.
Linux: do_swap_page(), mm/memory.c; mm/swap_state.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from mm.anon_vma import anon_vma_prepare
from mm.errors import KernelBug
from mm.filemap import lock_new_page, trylock_page, unlock_page, wait_on_page_locked
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.memcontrol import (
    NO_ROOM,
    mem_cgroup_swap_full,
    mem_cgroup_swapin_charge,
    mem_cgroup_swapin_commit,
)
from mm.mempolicy import alloc_pages_vma
from mm.page_flags import PG_hwpoison, PG_lru, PG_mlocked, PG_swapbacked, PG_swapcache
from mm.page_io import swap_readpage
from mm.pgtable import _PAGE_DIRTY, _PAGE_RW, _PAGE_SOFT_DIRTY, _PAGE_UFFD_WP, mk_pte
from mm.rmap import do_page_add_anon_rmap
from mm.sched import current_task
from mm.swap import lru_add_drain, lru_cache_add, put_page
from mm.swap_slots import swap_count, swap_free, vm_swap_full
from mm.swap_state import (
    add_to_swap_cache,
    delete_from_swap_cache,
    find_get_pages,
    lookup_swap_cache,
)
from mm.swapfile import free_pages_and_swap_cache, try_to_free_swap
from mm.swapops import (
    pte_swp_exclusive,
    pte_swp_soft_dirty,
    pte_swp_uffd_wp,
    swp_offset,
    swp_type,
)
from mm.types import VM_LOCKED, VM_SOFTDIRTY, VM_WRITE, MemMap, MmStruct, Vma, VmFault
from mm.typing import Addresses, Faults, Indices, Mask, Pfns, Ptes, Slots, word
from mm.userfaultfd_k import userfaultfd_wp
from mm.vectors import every, has, places, some
from mm.workingset import workingset_refault

_STORED: Final = word(_PAGE_RW | _PAGE_DIRTY | _PAGE_SOFT_DIRTY)

NewFrames: TypeAlias = Callable[[Indices], Pfns]


class SwappedIn(NamedTuple):
    """What became of each slot asked for.

    pfns: its page, locked and with a reference, or 0; read: it was read just now; faults: a
    VmFault word that says why there is none; busy: pages that others have locked.
    """

    pfns: Pfns
    read: Mask
    faults: Faults
    busy: Pfns


def do_swap_in(vma: Vma, addrs: Addresses, at: Indices, ptes: Ptes, *, write: bool) -> Faults:
    """Serve faults at *addrs*, whose entries *ptes*, at places *at*, are in swap; a VmFault each.

    A store ends with a writable entry where the page is the process's own; elsewhere do_wp_page()
    comes next. What another thread has locked is waited for, and left for the next attempt.
    Raises KernelBug for an entry that no slot stands behind. Linux: do_swap_page(), mm/memory.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    slots = swp_offset(ptes)
    bad = (swp_type(ptes) != 0) | (slots <= 0) | (slots >= mem.swap.max)
    if some(bad):
        raise KernelBug(f"bad page table entry {ptes[bad][0]:#x} at {addrs[bad][0]:#x} of {vma!r}")
    anon_vma_prepare(vma)
    page = swapin(mem, slots, _frames_for(vma, addrs), mm)

    got = places(page.pfns)
    pfns = page.pfns[got]
    if write and not every(has(mem.flags[pfns], PG_lru)):
        lru_add_drain(mem, current_task().cpu)  # a pagevec's references would hide who has it alone
    with mm.page_table_lock:
        same = mem.tables.entries[at] == ptes
        mapped = same[got]
        here = got[mapped]
        _map(vma, addrs[here], at[here], ptes[here], pfns[mapped], page.read[here], write=write)
    unlock_page(mem, pfns)
    free_pages_and_swap_cache(mem, pfns[~mapped])  # another thread was first
    for pfn in page.busy.tolist():
        wait_on_page_locked(mem, pfn)
    return np.where(same, page.faults, 0)


def _frames_for(vma: Vma, addrs: Addresses) -> NewFrames:
    return lambda which: alloc_pages_vma(vma, addrs[which], GFP_HIGHUSER_MOVABLE)


def swapin(
    mem: MemMap, slots: Slots, new_frames: NewFrames, mm: MmStruct | None = None
) -> SwappedIn:
    """Find the pages of *slots* in the swap cache, or read them.

    *new_frames* gives frames for some of them, by their places; for the first of those only, where
    memory is short. *mm* pays where nobody else does. Linux: swapin_readahead(), mm/swap_state.c.
    """
    faults = np.full(slots.size, VmFault.RETRY, dtype=np.uint16)
    first = np.zeros(slots.size, dtype=np.bool_)  # of those that stand for the same slot
    first[np.unique(slots, return_index=True)[1]] = True
    pfns = np.zeros_like(slots)
    pfns[first] = find_get_pages(mem, slots[first])

    found = places(pfns)
    locked = trylock_page(mem, pfns[found])
    busy = pfns[found[~locked]]
    changed = lookup_swap_cache(mem, slots[found]) != pfns[found]
    unlock_page(mem, pfns[found[locked & changed]])
    put_page(mem, pfns[found[~locked | changed]])
    absent = places(first & (pfns == 0))
    pfns[found[~locked | changed]] = 0
    faults[found[locked & ~changed]] = 0

    read = np.zeros(slots.size, dtype=np.bool_)
    if absent.size:
        if mem.memcgs:
            pfns[absent], faults[absent] = _read_charged(mem, mm, slots[absent], absent, new_frames)
        else:
            frames = new_frames(absent)
            pfns[absent], faults[absent] = read_swap_cache(mem, slots[absent], frames)
        read[absent] = pfns[absent] > 0
        if some(pfns):  # once those are mapped, they may go to swap again for the others
            faults[faults == VmFault.OOM] = VmFault.RETRY
    if mem.num_poisoned_pages:
        got = places(pfns)
        lost = got[has(mem.flags[pfns[got]], PG_hwpoison)]
        unlock_page(mem, pfns[lost])
        put_page(mem, pfns[lost])
        pfns[lost], faults[lost] = 0, VmFault.HWPOISON
    return SwappedIn(pfns, read, faults, busy)


def read_swap_cache_async(vma: Vma, addrs: Addresses, slots: Slots) -> None:
    """Read *slots*, for *addrs* of *vma*, into the swap cache, ahead of faults (MADV_WILLNEED).

    What cannot be read now is left for the fault. Linux: read_swap_cache_async(), mm/swap_state.c.
    """
    page = swapin(vma.vm_mm.mem, slots, _frames_for(vma, addrs), vma.vm_mm)
    pfns = page.pfns[page.pfns > 0]
    unlock_page(vma.vm_mm.mem, pfns)
    free_pages_and_swap_cache(vma.vm_mm.mem, pfns)


def _read_charged(
    mem: MemMap, mm: MmStruct | None, slots: Slots, which: Indices, new_frames: NewFrames
) -> tuple[Pfns, Faults]:
    """read_swap_cache() for those of *slots* whose control groups have room."""
    owners = mem_cgroup_swapin_charge(mem, mm, slots, GFP_HIGHUSER_MOVABLE)
    may = owners != NO_ROOM
    pfns = np.zeros_like(slots)
    faults = np.full(slots.size, VmFault.RETRY if some(may) else VmFault.OOM, dtype=np.uint16)
    try:
        if some(may):
            frames = new_frames(which[may])
            pfns[may], faults[may] = read_swap_cache(mem, slots[may], frames)
    finally:
        mem_cgroup_swapin_commit(mem, pfns, owners)
    return pfns, faults


def read_swap_cache(mem: MemMap, slots: Slots, frames: Pfns) -> tuple[Pfns, Faults]:
    """Read *slots* (distinct) into the swap cache: a page each, locked and with a reference, or 0.

    *frames*: fresh ones for the first of them, or all; what is not used is freed. With it goes
    what the fault comes to: MAJOR, SIGBUS where the slot cannot be read, OOM where no frame is left
    for any, RETRY where none is for this one, or another thread was first.
    Linux: __read_swap_cache_async() and swap_readpage().
    """
    si, cpu = mem.swap, current_task().cpu
    faults = np.full(slots.size, VmFault.RETRY if frames.size else VmFault.OOM, dtype=np.uint16)
    with mem.locks.atomic:
        cached, unused = si.cache[slots[: frames.size]], swap_count(si, slots[: frames.size]) == 0
        wanted = (cached <= 0) & ~unused
        pfns, at = frames[wanted], places(wanted)
        lock_new_page(mem, pfns)
        mem.flags[pfns] |= PG_swapbacked
        add_to_swap_cache(mem, pfns, slots[at])
    put_page(mem, frames[~wanted], cpu)
    gone = cached[at] < 0
    workingset_refault(mem, pfns[gone], ~cached[at][gone])

    good = swap_readpage(mem, pfns)
    faults[at] = np.where(good, VmFault.MAJOR, VmFault.SIGBUS)
    failed = pfns[~good]
    delete_from_swap_cache(mem, failed)
    unlock_page(mem, failed)
    put_page(mem, failed, cpu)
    lru_cache_add(mem, pfns[good], cpu)
    found = np.zeros_like(slots)
    found[at[good]] = pfns[good]
    return found, faults


def _map(
    vma: Vma, addrs: Addresses, at: Indices, ptes: Ptes, pfns: Pfns, read: Mask, *, write: bool
) -> None:
    """Let *pfns* take the place of the swap entries *ptes*, under the page-table lock.

    Our reference to each becomes the mapping's. A page leaves the swap cache if nobody else needs
    its slot and it was read for us, is written or locked, or swap is getting full.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    swap_free(mem.swap, swp_offset(ptes))
    leaving = read | has(mem.flags[pfns], PG_mlocked)
    if write:
        leaving |= mem.refcount[pfns] == 2  # the cache's and ours
    if mem.memcgs:
        leaving |= mem_cgroup_swap_full(mem, pfns)
    if vma.vm_flags & VM_LOCKED or vm_swap_full(mem.swap):
        leaving[:] = True
    try_to_free_swap(mem, pfns[leaving])
    own = pte_swp_exclusive(ptes) | (mem.refcount[pfns] == 1)
    own |= read & ~has(mem.flags[pfns], PG_swapcache)

    soft_dirty = pte_swp_soft_dirty(ptes)
    writable = own if vma.vm_flags & VM_WRITE else np.zeros_like(own)
    if not vma.vm_flags & VM_SOFTDIRTY:
        writable = writable & soft_dirty  # else a store would not be noticed
    entries = mk_pte(pfns, vma.vm_page_prot) | soft_dirty * _PAGE_SOFT_DIRTY
    if mm.uffd_wp:
        guarded = pte_swp_uffd_wp(ptes)
        entries |= guarded * _PAGE_UFFD_WP
        writable = writable & ~(guarded & userfaultfd_wp(vma))
    entries |= writable * (_STORED if write else _PAGE_RW)
    do_page_add_anon_rmap(vma, pfns, addrs, own)
    mem.tables.entries[at] = entries
    mm.anon_rss += pfns.size
    mm.swapents -= pfns.size
