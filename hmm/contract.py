"""What a driver promises in its two callbacks, checked. Linux: include/linux/migrate.h, v4.20.

The kernel trusts its drivers. On a machine with debug=True a broken promise becomes a `DriverBug`
that names the entry and the rule, after every page has been put back. The allocators are watched
too, so that a destination page which the driver took but did not hand over is found.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmm.migrate_pfn import (
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MigratePfns,
    is_valid,
    migrate_pfn_to_pfn,
)
from mm.errors import DriverBug
from mm.locking import current
from mm.page_flags import PG_locked
from mm.types import MemMap, MemoryType
from mm.typing import Indices, Mask, Pfns
from mm.vectors import has, places, some


class Contract:
    """Watches one migration of one driver.

    src, dst: the vectors that the driver gets; start: address of their first page; owner: the
    `owner` of the driver's pagemap, None if it has not said who it is.
    """

    def __init__(
        self, mem: MemMap, src: MigratePfns, dst: MigratePfns, start: int, owner: object
    ) -> None:
        self.mem = mem
        self.src = src
        self.dst = dst
        self.start = start
        self.owner = owner
        self.src_before = src.copy()
        self.dst_before = dst
        self.in_use_before = _in_use(mem)

    def check_alloc_and_copy(self) -> None:
        """Raise DriverBug for the first rule that alloc_and_copy() broke.

        `src` is then as it was before the call.
        """
        changed = self.src != self.src_before
        self.src[:] = self.src_before
        self._refuse(changed, "alloc_and_copy() changed src, which it may only read")
        given = is_valid(self.dst)
        odd = (self.dst != 0) & ~given & (~has(self.dst, MIGRATE_PFN_ERROR))
        self._refuse(odd, "dst names a page without MIGRATE_PFN_VALID")
        where = places(given)
        if where.size:
            self._check_destinations(where, migrate_pfn_to_pfn(self.dst[where]))
        self._check_leaks()

    def before_finalize_and_map(self) -> None:
        """Remember what finalize_and_map() may only read."""
        self.src_before, self.dst_before = self.src.copy(), self.dst.copy()

    def check_finalize_and_map(self) -> None:
        """Raise DriverBug if finalize_and_map() wrote to `src` or `dst`; both are put right."""
        changed = (self.src != self.src_before) | (self.dst != self.dst_before)
        self.src[:], self.dst[:] = self.src_before, self.dst_before
        self._refuse(changed, "finalize_and_map() changed src or dst, which it may only read")

    def locked(self, where: Indices) -> Mask:
        """True where the destination page of an entry really is locked."""
        pfns = migrate_pfn_to_pfn(self.dst[where])
        return has(self.mem.flags[pfns], PG_locked)

    def _check_destinations(self, where: Indices, pfns: Pfns) -> None:
        self._refuse_at(where, _no_page(self.mem, pfns), "dst names a PFN that no memory has")
        unlocked = ~self.locked(where) | (~has(self.dst[where], MIGRATE_PFN_LOCKED))
        self._refuse_at(where, unlocked, "the destination page is not locked")
        self._refuse_at(where, _not_ours(self.mem, pfns), "the destination page is free or in use")
        self._refuse_at(where, self._wrong_zone(where, pfns), "the destination is in a wrong zone")
        if some(pfns[1:] <= pfns[:-1]) and np.unique(pfns).size < pfns.size:
            repeated = np.ones(pfns.size, dtype=np.bool_)
            repeated[np.unique(pfns, return_index=True)[1]] = False
            self._refuse_at(where, repeated, "the destination page is given twice")

    def _wrong_zone(self, where: Indices, pfns: Pfns) -> Mask:
        """Device memory of another driver; or for a page of a device, not system memory."""
        mem = self.mem
        device = mem.is_zone_device_page(pfns)
        if self.owner is None:
            return np.zeros_like(device)
        ours = np.zeros(len(mem.zones), dtype=np.bool_)
        for zone in mem.zones:
            if zone is not None and zone.pgmap is not None:
                ours[zone.index] = zone.pgmap.owner is self.owner
        from_device = is_valid(self.src[where]) & mem.is_zone_device_page(
            migrate_pfn_to_pfn(self.src[where])
        )
        return np.where(from_device, device, ~ours[mem.zone[pfns]])

    def _check_leaks(self) -> None:
        """Pages that this thread took, and that neither dst nor a process has."""
        mem = self.mem
        taken = places(_in_use(mem) & ~self.in_use_before)
        taken = taken[(mem.page_owner[taken] == current()) & (mem.mapping[taken] == 0)]
        given = migrate_pfn_to_pfn(self.dst[is_valid(self.dst)])
        leaked = np.setdiff1d(taken, given)
        if leaked.size:
            raise DriverBug(
                f"alloc_and_copy() took {leaked.size} pages that dst does not name, the first is "
                f"PFN {leaked[0]:#x}; hand over or free every page that you allocate"
            )

    def _refuse_at(self, where: Indices, wrong: Mask, rule: str) -> None:
        if some(wrong):
            self._raise(where[wrong], rule)

    def _refuse(self, wrong: Mask, rule: str) -> None:
        if some(wrong):
            self._raise(places(wrong), rule)

    def _raise(self, entries: Indices, rule: str) -> None:
        i = entries.item(0)
        more = f" (and {entries.size - 1} more)" if entries.size > 1 else ""
        raise DriverBug(
            f"entry {i}{more}, address {self.start + (i << 12):#x}: {rule}; "
            f"src {self.src[i]:#x}, dst {self.dst[i]:#x}"
        )


def usable_destinations(mem: MemMap, dst: MigratePfns) -> Indices:
    """Entries of a faulty *dst* whose page really is the migration's to give back."""
    where = places(is_valid(dst))
    pfns = migrate_pfn_to_pfn(dst[where])
    good = ~_no_page(mem, pfns)
    good[good] = ~_not_ours(mem, pfns[good])
    _, first = np.unique(pfns, return_index=True)
    once = np.zeros(where.size, dtype=np.bool_)
    once[first] = True
    return where[good & once]


def _no_page(mem: MemMap, pfns: Pfns) -> Mask:
    outside = (pfns < 0) | (pfns >= mem.limit_pfn)
    outside[~outside] = mem.zone[pfns[~outside]] == MemoryType.HOLE
    return outside


def _not_ours(mem: MemMap, pfns: Pfns) -> Mask:
    """Anything but one reference, the driver's."""
    base = mem.is_zone_device_page(pfns)
    taken = (mem.refcount[pfns] != base + 1) | (mem.mapping[pfns] != 0)
    return taken | (pfns == mem.zero_pfn)


def _in_use(mem: MemMap) -> NDArray[np.bool_]:
    """By PFN: somebody holds a reference."""
    used = mem.refcount > 0
    for zone in mem.zones:
        if zone is not None and zone.pgmap is not None:
            span = slice(zone.start_pfn, zone.end_pfn)
            used[span] = mem.refcount[span] > 1
    return used
