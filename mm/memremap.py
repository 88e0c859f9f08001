"""ZONE_DEVICE: pages that stand for a device's memory. Linux: kernel/memremap.c, v4.20.

A device page has PFN, flags, counts and mapping like any other, but the allocator and the LRU
never see it. Free, it has one reference; used, one more for each user. When the count falls back
to one the driver hears of it and has the page for itself again.
"""

from __future__ import annotations

import numpy as np

from mm.errors import Busy, KernelBug, OutOfRange
from mm.memparse import format_size
from mm.mmzone import Zone
from mm.page_flags import PG_reserved
from mm.types import COLUMNS, DevPagemap, MemMap, MemoryType
from mm.typing import PAGE_SIZE, Pfns
from mm.vectors import distinct, every, places, some

FREE_REFCOUNT = 1  # of a ZONE_DEVICE page; 0 since v5.18 or so


def devm_memremap_pages(
    mem: MemMap, pgmap: DevPagemap, npages: int, start: int | None = None
) -> Zone:
    """Give *pgmap*'s memory of *npages* pages PFNs, as a zone: from *start* on, or the highest
    that are free.

    Raises OutOfRange where physical address space has no hole of that size, Busy where something
    is at *start* already.
    Linux: devm_memremap_pages(), kernel/memremap.c; memmap_init_zone_device(), mm/page_alloc.c.
    """
    if start is None:
        start = _find_hole(mem, npages)
    else:
        _check_hole(mem, pgmap, start, start + npages)
    index = next((i for i, zone in enumerate(mem.zones) if i and zone is None), len(mem.zones))
    if index > np.iinfo(mem.zone.dtype).max:
        raise OutOfRange(f"{pgmap.name}: a machine has at most 255 zones; close another device")
    zone = Zone("Device", 0, index, start, start + npages, managed_pages=npages, pgmap=pgmap)
    mem.zones[index : index + 1] = [zone]
    mem.memory_type[index] = pgmap.type
    rows = slice(start, start + npages)
    mem.zone[rows] = index
    mem.refcount[rows] = FREE_REFCOUNT
    mem.flags[rows] = PG_reserved
    return zone


def _find_hole(mem: MemMap, npages: int) -> int:
    """First PFN of the highest hole of *npages* above system memory."""
    top = mem.limit_pfn
    taken = [zone for zone in mem.zones if zone is not None and zone.start_pfn >= mem.max_pfn]
    for zone in sorted(taken, key=lambda zone: -zone.start_pfn):
        if top - zone.end_pfn >= npages:
            return top - npages
        top = zone.start_pfn
    if top - npages < mem.max_pfn:
        raise OutOfRange(
            f"a device of {format_size(npages * PAGE_SIZE)} does not fit below physical address "
            f"{mem.limit_pfn * PAGE_SIZE:#x}: {format_size((top - mem.max_pfn) * PAGE_SIZE)} are "
            f"free there; boot the machine with a larger max_physmem="
        )
    return top - npages


def _check_hole(mem: MemMap, pgmap: DevPagemap, start: int, end: int) -> None:
    if not 0 <= start < end <= mem.limit_pfn:
        raise OutOfRange(
            f"{pgmap.name}: PFNs [{start:#x}, {end:#x}) are not below {mem.limit_pfn:#x}; boot the "
            f"machine with a larger max_physmem="
        )
    taken = places(mem.zone[start:end])
    if taken.size:
        zone = mem.zones[int(mem.zone[start + taken[0]])]
        assert zone is not None
        owner = f"zone {zone.name}" if zone.pgmap is None else zone.pgmap.name
        raise Busy(f"{pgmap.name}: PFN {start + taken[0]:#x} belongs to {owner}")


def devm_memunmap_pages(mem: MemMap, zone: Zone) -> None:
    """Take the PFNs of *zone* away; every page must be free.

    Raises Busy, with nothing changed, where pages are in use.
    Linux: devm_memremap_pages_release(), kernel/memremap.c.
    """
    used = pages_in_use(mem, zone)
    if used.size:
        raise Busy(
            f"{used.size} device pages are in use, the first is PFN {used[0]:#x}; evict them first"
        )
    rows = slice(zone.start_pfn, zone.end_pfn)
    for column in COLUMNS:
        getattr(mem, column.name)[rows] = 0
    mem.memory_type[zone.index] = MemoryType.HOLE
    mem.zones[zone.index] = None


def pages_in_use(mem: MemMap, zone: Zone) -> Pfns:
    """The pages of a device's *zone* that somebody holds, ascending.

    Linux: what percpu_ref_kill(pgmap->ref) waits for, kernel/memremap.c.
    """
    used = places(mem.refcount[zone.start_pfn : zone.end_pfn] != FREE_REFCOUNT)
    return zone.start_pfn + used


def free_zone_device_page(mem: MemMap, pfns: Pfns) -> None:
    """Hand *pfns* (sorted, down to one reference) back to their drivers.

    Linux: __put_devmap_managed_page(), kernel/memremap.c.
    """
    if some(mem.mapcount[pfns]):
        wrong = pfns[mem.mapcount[pfns] != 0]
        raise KernelBug(f"device page {wrong[0]:#x} is freed while page tables map it")
    mem.flags[pfns] = PG_reserved
    mem.mapping[pfns] = 0
    mem.index[pfns] = 0
    mem.private[pfns] = 0
    owners = mem.zone[pfns]
    for index in distinct(owners):
        zone = mem.zones[index]
        assert zone is not None
        assert zone.pgmap is not None
        zone.pgmap.page_free(pfns if every(owners == index) else pfns[owners == index])
