"""Whether files, page caches, drivers and those who map them fit together: part of mm/debug.py."""

from __future__ import annotations

import numpy as np

from mm.census import Census, Complaints, complain, dirty_in_tables
from mm.fs import PAGECACHE_TAG_DIRTY, File
from mm.movable import page_has_driver, page_isolated
from mm.page_cache import page_in_cache
from mm.page_flags import PG_dirty, PG_locked, PG_lru, PG_swapbacked, PG_swapcache
from mm.shmem import shmem_mapping
from mm.types import AddressSpace, MemMap, Vma
from mm.typing import Mask, Pfns
from mm.vectors import joined
from mm.xarray import MAX_INDEX, xa_is_value, xa_to_value


def check_page_cache(mem: MemMap, census: Census) -> Complaints:
    """A page is in one place of one cache, which knows it as it knows its place."""
    caches = [_pages_of(mem, mapping) for mapping in mem.mappings.values()]
    dirty = dirty_in_tables(mem)
    for mapping, (indexes, pfns) in zip(mem.mappings.values(), caches, strict=True):
        outside = (pfns <= 0) | (pfns >= mem.max_pfn)
        yield from complain("i_pages", indexes, outside, "no such frame", "index")
        there, places = pfns[~outside], indexes[~outside]
        astray = mem.mapping[there] != mapping.number << 2
        yield from complain("mapping", there, astray, f"not {mapping.host!r}, whose cache has it")
        moved = mem.index[there] != places
        yield from complain("index", there, moved, f"not its place in {mapping.host!r}")
        if shmem_mapping(mapping):
            yield from _check_shmem(mem, mapping, dirty)
        tagged, entries = mapping.i_pages.find(0, MAX_INDEX, PAGECACHE_TAG_DIRTY)
        clean = (entries <= 0) | (mem.flags[entries] & PG_dirty == 0)
        yield from complain("i_pages", tagged, clean, "tagged dirty, and not so", "index")
    yield from _check_cached(mem, census, joined([pfns for _, pfns in caches]))


def _check_shmem(mem: MemMap, mapping: AddressSpace, dirty: Mask) -> Complaints:
    """What is in swap has a slot, and what nobody stored to holds zeros."""
    indexes, entries = mapping.i_pages.find(0, MAX_INDEX)
    slots = xa_to_value(entries)
    nowhere = xa_is_value(entries) & ((slots < 1) | (slots >= mem.swap.max))
    yield from complain("i_pages", indexes, nowhere, "no such slot", "index")
    pfns = entries[(entries > 0) & (entries < mem.max_pfn)]
    yield from complain(
        "flags",
        pfns,
        (mem.flags[pfns] & PG_swapbacked) == 0,
        f"in {mapping.host!r}, not swapbacked",
    )
    if mem.payload is not None:
        clean = (mem.flags[pfns] & (PG_dirty | PG_locked)) == 0
        clean &= ~dirty[pfns]
        clean[clean] = mem.payload[pfns[clean]].any(axis=1)
        yield from complain("contents", pfns, clean, "clean, yet not zeros, and stored nowhere")


def _pages_of(mem: MemMap, mapping: AddressSpace) -> tuple[Pfns, Pfns]:
    indexes, entries = mapping.i_pages.find(0, MAX_INDEX)
    return indexes[entries > 0], entries[entries > 0]


def _check_cached(mem: MemMap, census: Census, cached: Pfns) -> Complaints:
    """What is true of all page caches together."""
    pages = census.pages
    found = np.zeros(mem.limit_pfn, dtype=np.int32)
    np.add.at(found, cached[cached < mem.limit_pfn], np.int32(1))
    filed = page_in_cache(mem, pages)
    yield from complain("mapping", pages, filed & (found[pages] != 1), "not in that page cache")
    flags = mem.flags[cached[cached < mem.limit_pfn]]
    both = (flags & PG_swapcache) != 0
    yield from complain("flags", cached, both, "in the page cache and in the swap cache")
    shmem = int(np.count_nonzero(flags & PG_swapbacked))
    tagged = sum(
        m.i_pages.find(0, MAX_INDEX, PAGECACHE_TAG_DIRTY)[0].size for m in mem.mappings.values()
    )
    file_pages = cached.size + mem.vmstat["nr_swapcached"]
    counts = {"nr_file_pages": file_pages, "nr_shmem": shmem, "nr_dirty": tagged}
    for name, count in counts.items():
        if mem.vmstat[name] != count:
            yield f"{name}: says {mem.vmstat[name]}, the page caches have {count}"


def check_movable(mem: MemMap, census: Census) -> Complaints:
    """A movable page is a driver's alone, and with it, as nobody moves one between two calls."""
    pages = census.pages
    moving = page_isolated(mem, pages)
    yield from complain("flags", pages, moving, "isolated, yet nobody moves it")
    theirs = pages[page_has_driver(mem, pages)]
    drivers = [n for n, mapping in mem.mappings.items() if mapping.a_ops.isolate_page is not None]
    lost = ~np.isin(mem.mapping[theirs] >> 2, drivers)
    yield from complain("mapping", theirs, lost, "movable, and no driver's")
    device = mem.is_zone_device_page(theirs)
    yield from complain("mapping", theirs, device, "movable, and device memory")
    mapped = mem.mapcount[theirs] != 0
    yield from complain("mapping", theirs, mapped, "movable, and mapped by a process")
    listed = (mem.flags[theirs] & PG_lru) != 0
    yield from complain("flags", theirs, listed, "movable, and on an LRU list")


def check_files(mem: MemMap, census: Census) -> Complaints:
    """A mapping lists exactly the VMAs of its files, which count as users of those."""
    vmas = [vma for mm in mem.mms for vma in mm.vmas if vma.vm_file is not None]
    named: dict[int, list[Vma]] = {number: [] for number in mem.mappings}
    users: dict[int, int] = {id(file): int(not file.closed) for file in mem.files}
    for vma in vmas:
        file: File = vma.vm_file
        named.setdefault(file.f_mapping.number, []).append(vma)
        users[id(file)] = users.get(id(file), 0) + 1
    for number, found in named.items():
        listed = mem.mappings[number].i_mmap if number in mem.mappings else []
        if sorted(map(id, listed)) != sorted(map(id, found)):
            yield f"i_mmap: inode {number} lists {listed}, mapped by {found}"
    for file in {id(file): file for file in (*mem.files, *(v.vm_file for v in vmas))}.values():
        if file.f_count != users[id(file)] or not file.f_count:
            yield f"f_count: {file!r} says {file.f_count}, it has {users[id(file)]} users"
    for mapping in mem.mappings.values():
        opened = sum(file.f_inode is mapping.host for file in mem.files)
        if mapping.host.i_count < max(opened, 1):
            yield f"i_count: {mapping.host!r} says {mapping.host.i_count}, open {opened} times"
