"""Pages leave a device without a driver's help. Linux: mm/migrate_device.c, v6.0.

Only memory that the CPU reaches can leave so: somebody wants to pin a page for long, and its
device must remain free to take its memory back. What a driver does for itself is in hmm.
"""

from __future__ import annotations

import numpy as np

from mm.filemap import lock_new_page, lock_page, unlock_page
from mm.gfp import GFP_USER
from mm.highmem import copy_highpages
from mm.locking import preempt
from mm.memremap import FREE_REFCOUNT
from mm.migrate import migrate_page
from mm.migration_ptes import remove_migration_ptes
from mm.page_alloc import alloc_pages_bulk
from mm.rmap import page_mapped, try_to_unmap
from mm.sched import current_task
from mm.swap import put_page, putback_lru_page
from mm.types import MemMap
from mm.typing import Mask, Pfns
from mm.vectors import places


def migrate_device_coherent_page(mem: MemMap, pfns: Pfns) -> Mask:
    """Move device-public *pfns* (distinct) to system memory, one after the other.

    The first that cannot move, because somebody else holds it or no frame is left, is mapped
    again, and those after it stay as they are; True where a page moved. The caller's references
    go, of all of them. Linux: migrate_device_coherent_page(), mm/migrate_device.c.
    """
    preempt("migrate_device_coherent_page")
    try:
        lock_page(mem, pfns)
    except BaseException:
        put_page(mem, pfns)
        raise
    held = places(mem.refcount[pfns] - mem.mapcount[pfns] > FREE_REFCOUNT + 1)
    leaving = pfns[: held.item(0) + 1] if held.size else pfns
    landed = leaving
    try:
        try_to_unmap(mem, leaving)
        landed = _take_places(mem, leaving)
    finally:
        remove_migration_ptes(mem, leaving, landed)
        frames = landed[landed != leaving]
        putback_lru_page(mem, frames)
        unlock_page(mem, frames)
        unlock_page(mem, pfns)
        put_page(mem, pfns)
    moved = np.zeros(pfns.size, dtype=np.bool_)
    moved[: leaving.size] = landed != leaving
    return moved


def _take_places(mem: MemMap, pfns: Pfns) -> Pfns:
    """Let frames take the place of *pfns*, which are locked and unmapped, contents and all.

    For each page the locked frame that has, or the page itself.
    """
    task = current_task()
    frames = alloc_pages_bulk(mem, GFP_USER, mem.cpu_to_node[task.cpu], pfns.size, task.cpu)
    lock_new_page(mem, frames)
    fit = ~page_mapped(mem, pfns[: frames.size])
    fit[fit] = migrate_page(mem, frames[fit], pfns[: frames.size][fit]) == 0
    landed = pfns.copy()
    landed[: frames.size][fit] = frames[fit]
    if mem.payload is not None:
        copy_highpages(mem.payload, frames[fit], mem.payload, pfns[: frames.size][fit])
    unlock_page(mem, frames[~fit])
    put_page(mem, frames[~fit])
    return landed
