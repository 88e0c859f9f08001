"""Pages that reclaim must leave alone, because somebody has locked them in memory.

A page is PG_mlocked while a VM_LOCKED VMA maps it, and then waits on the unevictable list of its
node, where reclaim does not look. `mlock_count` says how many such VMAs there are, as long as the
page stays on that list; a page that was taken off, by a migration say, comes back with 0. So the
count may be too low, never too high: the page of several lockers may become evictable too early,
and never stays unevictable for nobody.

Unlike Linux v4.20, which asks every VMA that maps the page when one of them unlocks it, the count
decides (v5.18 does so). Device memory is never PG_mlocked. Linux: mm/mlock.c.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.page_flags import PG_active, PG_lru, PG_mlocked, PG_unevictable
from mm.swap import relist_pages
from mm.types import VM_LOCKED, VM_SPECIAL, MemMap, Vma
from mm.typing import Pfns, word
from mm.vectors import add_at, has, rows, some, unique

_LISTED: Final = word(PG_lru | PG_unevictable)
_NOT_ACTIVE: Final = word(~PG_active)
_EVICTABLE: Final = word(~(PG_mlocked | PG_unevictable))


def mlock_page(mem: MemMap, pfns: Pfns) -> None:
    """One more VM_LOCKED mapping of each of *pfns*, which may repeat.

    A page off the lists goes to the unevictable one when it is put back.
    Linux: mlock_folio(), mm/mlock.c, v5.18.
    """
    with mem.locks.atomic:
        flags = mem.flags[pfns]
        _set_mlocked(mem, unique(pfns[~has(flags, PG_mlocked)]))
        listed = has(flags, PG_lru)
        moves = unique(pfns[listed & ~has(flags, PG_unevictable)])
        relist_pages(mem, moves, (mem.flags[moves] | PG_unevictable) & _NOT_ACTIVE)
        add_at(mem.mlock_count, rows(pfns[listed]), 1)


def mlock_new_page(mem: MemMap, pfns: Pfns) -> None:
    """First mapping of fresh *pfns*, on no list yet, by a VM_LOCKED VMA.

    Linux: mlock_new_folio(), mm/mlock.c, v6.3.
    """
    with mem.locks.atomic:
        _set_mlocked(mem, pfns)
        mem.mlock_count[pfns] = 1


def _set_mlocked(mem: MemMap, pfns: Pfns) -> None:
    mem.flags[pfns] |= PG_mlocked
    mem.vmstat.add("nr_mlock", pfns.size)
    mem.vmstat.add("unevictable_pgs_mlocked", pfns.size)


def munlock_page(mem: MemMap, pfns: Pfns) -> None:
    """One VM_LOCKED mapping less of each of *pfns* (distinct); evictable where it was the last.

    Linux: munlock_folio(), mm/mlock.c, v6.3.
    """
    with mem.locks.atomic:
        flags = mem.flags[pfns]
        listed = (flags & _LISTED) == _LISTED
        left = np.where(listed, np.maximum(mem.mlock_count[pfns] - 1, 0), 0)
        mem.mlock_count[pfns] = left

        last = left == 0
        freed = int(np.count_nonzero(last & has(flags, PG_mlocked)))
        mem.vmstat.add("nr_mlock", -freed)
        mem.vmstat.add("unevictable_pgs_munlocked", freed)
        moves = last & listed
        relist_pages(mem, pfns[moves], flags[moves] & _EVICTABLE)
        mem.flags[pfns[last]] &= _EVICTABLE


def mlock_vma_page(vma: Vma, pfns: Pfns) -> None:
    """*vma* maps *pfns* from now on: they are locked in memory if it is VM_LOCKED.

    Linux: mlock_vma_folio(), mm/internal.h, v5.18.
    """
    if vma.vm_flags & (VM_LOCKED | VM_SPECIAL) == VM_LOCKED:
        mlock_page(vma.vm_mm.mem, _system_pages(vma, pfns))


def munlock_vma_page(vma: Vma, pfns: Pfns) -> None:
    """*vma* maps *pfns* no more. Linux: munlock_vma_folio(), mm/internal.h, v6.3."""
    if vma.vm_flags & VM_LOCKED:
        munlock_page(vma.vm_mm.mem, _system_pages(vma, pfns))


def _system_pages(vma: Vma, pfns: Pfns) -> Pfns:
    device = vma.vm_mm.mem.is_zone_device_page(pfns)
    return pfns[~device] if some(device) else pfns
