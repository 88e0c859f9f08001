"""Memory that comes while the machine runs. Linux: mm/memory_hotplug.c.

It lies where system memory ends, in the last node or in one more that has no CPU. A device that has
its PFNs there keeps them: the call fails, as private memory stands for physical addresses that
nothing else may have.
"""

from __future__ import annotations

from collections.abc import Iterator

from mm.errors import Exists, InvalidArgument, OutOfRange
from mm.free_area import free_range
from mm.memparse import format_size
from mm.mm_init import (
    ZONE_ENDS,
    build_all_zonelists,
    setup_per_zone_lowmem_reserve,
    setup_per_zone_wmarks,
)
from mm.mmzone import Node, PageStack, Zone
from mm.page_alloc import PCP_HIGH, drain_all_pages
from mm.types import MemMap, MemoryType
from mm.typing import PAGE_SHIFT, PAGE_SIZE
from mm.vectors import places

SECTION_PAGES = (1 << 20) >> PAGE_SHIFT  # what memory comes in, as nodes do at boot


def add_memory(mem: MemMap, nid: int, npages: int) -> int:
    """Add *npages* of memory to node *nid*, which is the last one or the next; their first PFN.

    Raises InvalidArgument, OutOfRange where physical address space ends, and Exists where a device
    has any of it. Linux: add_memory() and online_pages(), mm/memory_hotplug.c.
    """
    if npages < 1 or npages % SECTION_PAGES:
        raise InvalidArgument(
            f"add_memory: {format_size(npages << PAGE_SHIFT)} is no multiple of 1 MiB"
        )
    if nid not in (len(mem.nodes) - 1, len(mem.nodes)):
        raise InvalidArgument(
            f"add_memory: node {nid}: memory comes to the last, {len(mem.nodes) - 1}, or as "
            f"{len(mem.nodes)}"
        )
    start, end = mem.max_pfn, mem.max_pfn + npages
    register_memory_resource(mem, start, end)
    with mem.locks.atomic:
        drain_all_pages(mem)
        mem.grow(end)
        if nid == len(mem.nodes):
            mem.nodes.append(Node(nid, start, start))
        node = mem.nodes[nid]
        for zone, first, last in _zones_of(mem, node, start, end):
            zone.end_pfn = last
            zone.managed_pages += last - first
            mem.zone[first:last] = zone.index
            free_range(mem, zone, first, last)
        node.end_pfn = end
        build_all_zonelists(mem)
        setup_per_zone_wmarks(mem)
        setup_per_zone_lowmem_reserve(mem)
        mem.vmstat.add("nr_free_pages", npages)
    return start


def register_memory_resource(mem: MemMap, start: int, end: int) -> None:
    """Raise OutOfRange or Exists unless PFNs [*start*, *end*) are nobody's.

    Linux: register_memory_resource(), mm/memory_hotplug.c.
    """
    if end > mem.limit_pfn:
        raise OutOfRange(
            f"add_memory: PFNs [{start:#x}, {end:#x}) are not below {mem.limit_pfn:#x}; boot the "
            f"machine with a larger max_physmem="
        )
    taken = places(mem.zone[start:end])
    if taken.size:
        pfn = start + taken.item(0)
        pgmap = mem.pagemap_of(pfn)
        raise Exists(
            f"add_memory: physical address {pfn * PAGE_SIZE:#x} is memory of "
            f"{pgmap.name if pgmap else 'the system'}; close that first or add less"
        )


def _zones_of(mem: MemMap, node: Node, start: int, end: int) -> Iterator[tuple[Zone, int, int]]:
    """The zones of *node* that [*start*, *end*) is in, made where it lacks one, with each part."""
    for name, zone_end in ZONE_ENDS.items():
        last = min(end, zone_end)
        if start >= last:
            continue
        zone = next((zone for zone in node.zones if zone.name == name), None)
        if zone is None:
            index = next((i for i, z in enumerate(mem.zones) if i and z is None), len(mem.zones))
            zone = Zone(name, node.nid, index, start, start)
            zone.pcp = [PageStack(2 * PCP_HIGH) for _ in mem.pagevecs]
            node.zones.append(zone)
            mem.zones[index : index + 1] = [zone]
            mem.memory_type[index] = MemoryType.SYSTEM
            mem.zone_nid[index] = node.nid
        yield zone, start, last
        start = last
