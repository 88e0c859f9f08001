"""Boot: memory is cut into nodes and zones, and every frame goes on the free lists.

Linux: mm/page_alloc.c, free_area_init_nodes() and what it calls; since v6.4 mm/mm_init.c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from mm.errors import InvalidArgument
from mm.free_area import add_range
from mm.mmzone import DMA32_END, DMA_END, Node, PageStack, Zone
from mm.page_alloc import PCP_HIGH, nr_free_pages, system_zones
from mm.types import MemMap, MemoryType

LOWMEM_RESERVE_RATIO: Final = 256
ZONE_ENDS: Final = {"DMA": DMA_END, "DMA32": DMA32_END, "Normal": 1 << 40}  # first PFN above each


def build_nodes(mem: MemMap, nodes: Sequence[int]) -> None:
    """Make the nodes and zones of *mem* and give every frame but PFN 0 to the buddy lists.

    *nodes* are sizes in pages, contiguous from PFN 0. Of the columns only `zone` is written, and
    `free_order` where blocks begin. Raises InvalidArgument where the sizes do not add up to
    `mem.max_pfn`. Linux: free_area_init_nodes() and memblock_free_all().
    """
    if not nodes or min(nodes) < 1 or sum(nodes) != mem.max_pfn:
        raise InvalidArgument(
            f"nodes of {list(nodes)} pages do not make up system memory, which is "
            f"[0x0, {mem.max_pfn:#x}); give sizes above 0 that add up to {mem.max_pfn}"
        )
    start_pfn = 0
    for nid, size in enumerate(nodes):
        node = Node(nid, start_pfn, start_pfn + size)
        mem.nodes.append(node)
        free_area_init_node(mem, node)
        start_pfn = node.end_pfn
    build_all_zonelists(mem)
    setup_per_zone_wmarks(mem)
    setup_per_zone_lowmem_reserve(mem)
    mem.vmstat.add("nr_free_pages", nr_free_pages(mem))


def free_area_init_node(mem: MemMap, node: Node) -> None:
    """Make the zones of *node* and fill their lists. Linux: free_area_init_node()."""
    start_pfn = max(node.start_pfn, 1)  # PFN 0 is a hole, so that 0 can mean "no frame"
    for name, zone_end in ZONE_ENDS.items():
        end_pfn = min(node.end_pfn, zone_end)
        if start_pfn >= end_pfn:
            continue
        zone = Zone(name, node.nid, len(mem.zones), start_pfn, end_pfn, end_pfn - start_pfn)
        zone.pcp = [PageStack(2 * PCP_HIGH) for _ in mem.pagevecs]
        node.zones.append(zone)
        mem.zones.append(zone)
        mem.memory_type[zone.index] = MemoryType.SYSTEM
        mem.zone_nid[zone.index] = node.nid
        mem.zone[start_pfn:end_pfn] = zone.index
        add_range(mem, zone, start_pfn, end_pfn)
        start_pfn = end_pfn


def build_all_zonelists(mem: MemMap) -> None:
    """Own zones from the highest down, then the other nodes', nearest first.

    Linux: build_all_zonelists(), mm/page_alloc.c.
    """
    for node in mem.nodes:
        near = sorted(mem.nodes, key=lambda other: (abs(other.nid - node.nid), other.nid))
        node.zonelist = [zone for other in near for zone in reversed(other.zones)]


def setup_per_zone_wmarks(mem: MemMap) -> None:
    """Share min_free_kbytes out over the zones by size; none keeps more than a quarter.

    Linux: setup_per_zone_wmarks() and init_per_zone_wmark_min(), mm/page_alloc.c.
    """
    managed = sum(zone.managed_pages for zone in system_zones(mem))
    min_free_kbytes = min(max(math.isqrt(managed * 4 * 16), 128), 65536)
    for zone in system_zones(mem):
        share = min_free_kbytes // 4 * zone.managed_pages // managed
        low = min(share, zone.managed_pages // 4)
        step = max(low // 4, zone.managed_pages * 10 // 10_000)
        zone.watermark = (low, low + step, low + 2 * step)


def setup_per_zone_lowmem_reserve(mem: MemMap) -> None:
    """Keep part of each zone from requests that could have had a higher one.

    A zone reserves 1/256 of what its node has above it: on machines below 1 GiB that is less
    than a quarter of the zone, from 4 GiB on all of ZONE_DMA.
    Linux: setup_per_zone_lowmem_reserve(), mm/page_alloc.c.
    """
    names = list(ZONE_ENDS)
    for node in mem.nodes:
        managed = {zone.name: zone.managed_pages for zone in node.zones}
        for zone in node.zones:
            above = 0
            for name in names[names.index(zone.name) + 1 :]:
                above += managed.get(name, 0)
                zone.lowmem_reserve[name] = above // LOWMEM_RESERVE_RATIO
