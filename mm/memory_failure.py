"""Frames whose contents are lost, or soon will be: taken out of use for good.

    memory_failure      hardware says that the contents are gone. Free frames leave the buddy lists.
                        Of a page that is mapped, every mapping becomes a hwpoison entry, and the
                        next access there has SIGBUS; in the swap cache:
        clean           the entries name its slot, from where the next access reads it again
        dirty           they do too, but the page stays in the cache, and who finds it has SIGBUS
    soft_offline_page   hardware says that errors become frequent: the contents move to another
                        frame, and nobody notices
    unpoison_memory     the frame was good after all (a tool for tests, in Linux too)

The frame is PG_hwpoison then, on no list and in no page table, and keeps one reference, so that
nobody is ever given it. Device memory is its driver's to judge. Linux: mm/memory-failure.c.
"""

from __future__ import annotations

import errno
from typing import Final

import numpy as np

from mm.device_exclusive import remove_device_exclusive_ptes, restore_exclusive_pages
from mm.filemap import lock_page, unlock_page
from mm.free_area import take_page_off_buddy
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.memcontrol import mem_cgroup_uncharge
from mm.migrate import NewPages, migrate_page_add, migrate_pages
from mm.movable import isolate_movable_page
from mm.page_alloc import PAGE_POISON, alloc_pages_bulk, drain_all_pages, fill_pages
from mm.page_flags import (
    PG_dirty,
    PG_hwpoison,
    PG_locked,
    PG_swapbacked,
    PG_swapcache,
    PG_uptodate,
)
from mm.rmap import page_mapped, try_to_unmap_poisoned, try_to_unmap_to_swap
from mm.sched import current_task
from mm.swap import (
    get_page,
    isolate_lru_page,
    lru_add_drain_all,
    page_maybe_dma_pinned,
    put_page,
    putback_lru_page,
)
from mm.swap_state import delete_from_swap_cache
from mm.swapfile import try_to_free_swap
from mm.trace import TracePoint
from mm.types import MemMap, page_anon
from mm.typing import Errnos, Mask, Pfns, word
from mm.vectors import distinct, has, places

_CACHED: Final = word(PG_swapcache | PG_swapbacked | PG_dirty)
_KEPT: Final = word(PG_locked | _CACHED)  # of a frame whose other flags nobody asks for any more
_CLEAN: Final = PG_uptodate
_GOOD: Final = word(~PG_hwpoison)

memory_failure_event: Final = TracePoint("memory_failure_event")


def memory_failure(mem: MemMap, pfns: Pfns) -> Errnos:
    """The contents of *pfns* are lost: nobody shall read them. 0, or a negative errno for each.

    -EBUSY: somebody still holds the page, which is out of use all the same; or it stays as it is,
    as it is device memory, of a file, the kernel's own, or on its way to another place. -ENXIO:
    there is no such frame. A page that a device has for itself is taken back first. Raises Deadlock
    where this thread has one locked.

    Unlike Linux v4.20, which takes a page of a file out of the page cache and so loses what was not
    stored without a word, such a page stays. Linux: memory_failure(), mm/memory-failure.c.
    """
    frames, which = np.unique(pfns, return_inverse=True)
    status = _frames_there(mem, frames, device=-errno.EBUSY)
    sound = places((status == 0) & ~_poisoned(mem, frames))
    used = sound[~_take_free_frames(mem, frames[sound])]
    if used.size:
        status[used] = _fail_used_pages(mem, frames[used])
    if memory_failure_event:
        memory_failure_event(pfns=frames, status=status)
    return status[which]


def _frames_there(mem: MemMap, frames: Pfns, *, device: int) -> Errnos:
    """0 for system memory, *device* for that of a device, -ENXIO for what is neither."""
    status = np.full(frames.size, -errno.ENXIO, dtype=np.int32)
    inside = places((frames > 0) & (frames < mem.limit_pfn))
    there = inside[mem.zone[frames[inside]] != 0]
    status[there] = mem.is_zone_device_page(frames[there]) * np.int32(device)
    return status


def _poisoned(mem: MemMap, frames: Pfns) -> Mask:
    """True where a frame, if there is one, is out of use. Linux: PageHWPoison()."""
    return has(mem.flags.take(frames, mode="clip"), PG_hwpoison)


def _take_free_frames(mem: MemMap, frames: Pfns) -> Mask:
    """Take those of *frames* out of use that nobody uses; True where that was done.

    Unlike Linux v4.20, which leaves them on the buddy lists until somebody is about to get them
    (5.11 does not). Linux: page_handle_poison(), mm/memory-failure.c, v5.11.
    """
    taken = np.zeros(frames.size, dtype=np.bool_)
    with mem.locks.atomic:
        free = places(mem.refcount[frames] == 0)
        if free.size:
            drain_all_pages(mem)
            for at in free.tolist():
                zone = mem.zones[mem.zone.item(frames.item(at))]
                assert zone is not None
                taken[at] = take_page_off_buddy(mem, zone, frames.item(at))
            mem.refcount[frames[taken]] = 1
            mem.vmstat.add("nr_free_pages", -int(np.count_nonzero(taken)))
            page_handle_poison(mem, frames[taken])
    return taken


def page_handle_poison(mem: MemMap, pfns: Pfns, cpu: int = 0) -> None:
    """Take *pfns* (distinct), which nobody maps and no list holds, out of use.

    A reference of the caller's is theirs from now on.
    Linux: page_handle_poison(), mm/memory-failure.c, v5.10.
    """
    with mem.locks.atomic:
        flags = mem.flags[pfns]
        mem.flags[pfns] = flags & np.where(has(flags, PG_swapcache), _KEPT, PG_locked) | PG_hwpoison
        mem.mapping[pfns] = 0
        mem.index[pfns] = 0
        mem.num_poisoned_pages += pfns.size
    if mem.memcgs:
        mem_cgroup_uncharge(mem, pfns)
    if mem.debug:
        fill_pages(mem, np.sort(pfns), PAGE_POISON)


def _fail_used_pages(mem: MemMap, pfns: Pfns) -> Errnos:
    """memory_failure() of *pfns* (distinct) that somebody uses, or that are being freed."""
    status = np.full(pfns.size, -errno.EBUSY, dtype=np.int32)
    lru_add_drain_all(mem)
    with mem.locks.atomic:
        held = places(mem.refcount[pfns] > 0)
        get_page(mem, pfns[held])
    ours = pfns[held]
    try:
        lock_page(mem, ours)
    except BaseException:
        put_page(mem, ours)
        raise
    remove_device_exclusive_ptes(mem, ours)
    on_list = isolate_lru_page(mem, ours)
    on_list[on_list] = _hwpoison_user_mappings(mem, ours[on_list])
    gone = ours[on_list]
    page_handle_poison(mem, gone)
    put_page(mem, gone)  # isolation's; that of the failure stays
    besides = has(mem.flags[gone], PG_swapcache)
    alone = mem.refcount[gone] - besides == 1
    status[held[on_list][alone]] = 0
    unlock_page(mem, ours)
    put_page(mem, ours[~on_list])
    return status


def _hwpoison_user_mappings(mem: MemMap, pfns: Pfns) -> Mask:
    """Take every mapping of *pfns* (locked, isolated) away; False for what is on its list again.

    Pages of the swap cache whose slots hold the same bytes leave it.
    Linux: hwpoison_user_mappings() and me_swapcache_clean(), mm/memory-failure.c.
    """
    mine = page_anon(mem, pfns) | has(mem.flags[pfns], PG_swapcache)
    pinned = mine & page_maybe_dma_pinned(mem, pfns)
    try_to_free_swap(mem, pfns[pinned])  # so that whoever maps it need not keep it
    cached = mine & has(mem.flags[pfns], PG_swapcache)
    try_to_unmap_poisoned(mem, pfns[mine & ~cached])
    try_to_unmap_to_swap(mem, pfns[cached], ignore_mlock=True)

    left = ~mine | page_mapped(mem, pfns)
    putback_lru_page(mem, pfns[left])
    cached &= ~left
    clean = pfns[cached]
    flags = mem.flags[clean]
    clean = clean[has(flags, PG_uptodate) & ~has(flags, PG_dirty)]
    delete_from_swap_cache(mem, clean)
    return ~left


def soft_offline_page(mem: MemMap, pfns: Pfns) -> Errnos:
    """Move what is in *pfns* to other frames, and take these out of use. 0, or a negative errno.

    -EIO: device memory, or it could not move, as somebody holds it or its driver or file would
    not; -ENOMEM: no frame is left for it; -EBUSY: it is on no list, as it is the kernel's own or on
    its way, its driver will not part with it, or it was out of use already; -ENXIO: there is no
    such frame. It stays as it is then.
    Linux: soft_offline_page(), mm/memory-failure.c.
    """
    frames, which = np.unique(pfns, return_inverse=True)
    status = _frames_there(mem, frames, device=-errno.EIO)
    status[(status == 0) & _poisoned(mem, frames)] = -errno.EBUSY
    sound = places(status == 0)
    used = sound[~_take_free_frames(mem, frames[sound])]
    restore_exclusive_pages(mem, frames[used])
    lru_add_drain_all(mem)
    isolated = migrate_page_add(mem, frames[used])
    if mem.mappings:
        isolated[~isolated] = isolate_movable_page(mem, frames[used[~isolated]])
    status[used[~isolated]] = -errno.EBUSY
    moving = used[isolated]
    nids = mem.page_to_nid(frames[moving])
    for nid in distinct(nids):
        here = moving[nids == nid]
        left = migrate_pages(mem, frames[here], _near(mem, nid), page_handle_poison)
        stays = (left != 0) & (left != -errno.ENOMEM)
        status[here] = np.where(stays, -errno.EIO, left)
    return status[which]


def _near(mem: MemMap, nid: int) -> NewPages:
    """Frames of *nid*, or of what is nearest to it. Linux: new_page(), mm/memory-failure.c."""

    def get_new_pages(pfns: Pfns) -> Pfns:
        return alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, nid, pfns.size, current_task().cpu)

    return get_new_pages


def unpoison_memory(mem: MemMap, pfns: Pfns) -> Errnos:
    """Put frames that are out of use back into it. 0, or -EBUSY where somebody still holds one.

    What is in use, or no frame of the system, stays as it is.
    Linux: unpoison_memory(), mm/memory-failure.c.
    """
    frames, which = np.unique(pfns, return_inverse=True)
    status = np.zeros(frames.size, dtype=np.int32)
    with mem.locks.atomic:
        at = places(_poisoned(mem, frames))
        held = mem.refcount[frames[at]] != 1
        status[at[held]] = -errno.EBUSY
        back = frames[at[~held]]
        mem.flags[back] &= _GOOD
        mem.num_poisoned_pages -= back.size
    put_page(mem, back)
    return status[which]
