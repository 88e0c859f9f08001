"""Whether all of a machine's state fits together: the rules of docs/data-model.md, checked.

Everything is counted again from the page tables, the free lists and the LRU logs, and held
against the columns and counters. Linux has pieces of it: mm/debug.c, CONFIG_DEBUG_VM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.errors import KernelBug
from mm.memremap import FREE_REFCOUNT
from mm.mmzone import MAX_ORDER, Lru
from mm.page_alloc import check_zone, free_blocks, nr_free_pages
from mm.page_flags import (
    FLAG_NAMES,
    PG_active,
    PG_anon_exclusive,
    PG_dirty,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_reserved,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
    PG_uptodate,
    describe_flags,
)
from mm.pagewalk import walk_page_range
from mm.pgtable import (
    PTRS_PER_PTE,
    pte_devmap,
    pte_dirty,
    pte_pfn,
    pte_present,
    pte_special,
    pte_write,
)
from mm.swap import GUP_PIN_COUNTING_BIAS, page_lru
from mm.swap_slots import SWAP_HAS_CACHE
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_hwpoison_entry,
    is_migration_entry,
    is_swap_entry,
    is_write_device_exclusive_entry,
    is_write_device_private_entry,
    pte_swp_exclusive,
    swp_offset,
    swp_type,
)
from mm.types import VM_LOCKED, VM_WRITE, MemMap, MmStruct, Vma, vma_pages
from mm.typing import PAGE_SHIFT, Addresses, Mask, Pfns, Ptes
from mm.vectors import some

_KNOWN_FLAGS: Final = np.bitwise_or.reduce(list(FLAG_NAMES.values()))
_SHOWN: Final = 4  # pages that a complaint names

Complaints = Iterator[str]


def verify(mem: MemMap) -> None:
    """Raise KernelBug with every rule that does not hold; the word before a colon is a column,
    counter or table."""
    complaints = list(check_tables(mem))
    if not complaints:  # else there is no telling what the tables hold
        census = _take_census(mem)
        for check in _CHECKS:
            complaints.extend(check(mem, census))
    if complaints:
        raise KernelBug("\n".join(complaints))


class Census(NamedTuple):
    """What page tables hold, counted anew.

    pages: every PFN that exists, ascending; mapped: entries that map each PFN, by PFN;
    waiting: migration entries for each PFN; taken: exclusive entries for each PFN; locked: entries
    of VM_LOCKED VMAs that map each; held: references from pagevecs, pins and the swap cache, by
    PFN; swapped: entries that hold each slot.
    """

    pages: Pfns
    mapped: NDArray[np.int32]
    waiting: NDArray[np.int32]
    taken: NDArray[np.int32]
    locked: NDArray[np.int32]
    held: NDArray[np.int32]
    swapped: NDArray[np.int32]


def _take_census(mem: MemMap) -> Census:
    zones = [zone for zone in mem.zones if zone is not None]
    spans = [np.arange(zone.start_pfn, zone.end_pfn) for zone in zones]
    pages = np.sort(np.concatenate(spans))
    mapped, waiting, taken, locked, held = np.zeros((5, mem.limit_pfn), dtype=np.int32)
    swapped = np.zeros(mem.swap.max, dtype=np.int32)
    one = np.int32(1)
    for mm in mem.mms:
        for vma, _, ptes in _entries(mm):
            normal = pte_present(ptes) & ~pte_special(ptes)
            for counts, pfns in (
                (mapped, pte_pfn(ptes[normal])),
                (locked, pte_pfn(ptes[normal & bool(vma.vm_flags & VM_LOCKED)])),
                (mapped, swp_offset(ptes[is_device_private_entry(ptes)])),
                (waiting, swp_offset(ptes[is_migration_entry(ptes)])),
                (taken, swp_offset(ptes[is_device_exclusive_entry(ptes)])),
            ):
                np.add.at(counts, pfns[(pfns >= 0) & (pfns < mem.limit_pfn)], one)
            slots = swp_offset(ptes[is_swap_entry(ptes)])
            np.add.at(swapped, slots[slots < mem.swap.max], one)
    for pagevec in (*mem.pagevecs, *mem.lazyfree_pagevecs):
        np.add.at(held, pagevec.live(), one)
    for pin in mem.pins:
        np.add.at(held, pin.counted(pin.pfns), np.int32(pin.refs))
    held[mem.zero_pfn] += 1
    cached = mem.swap.cache
    np.add.at(held, cached[(cached > 0) & (cached < mem.limit_pfn)], one)
    return Census(pages, mapped, waiting, taken, locked, held, swapped)


def _entries(mm: MmStruct) -> Iterator[tuple[Vma, Addresses, Ptes]]:
    """All non-empty entries of *mm* that lie in a VMA."""
    for vma in mm.vmas:
        for run in walk_page_range(mm.mem.tables, mm.pgd, vma.vm_start, vma.vm_end, holes=False):
            used = np.flatnonzero(run.ptes)
            if used.size:
                yield vma, run.addrs[used], run.ptes[used]


def _complain(column: str, pfns: Pfns, wrong: Mask, rule: str, what: str = "page") -> Complaints:
    """One line for the pages, or *what* else they are, that are *wrong*."""
    if wrong.any():
        shown = ", ".join(map(hex, pfns[wrong][:_SHOWN].tolist()))
        more = f" and {int(wrong.sum()) - _SHOWN} more" if wrong.sum() > _SHOWN else ""
        yield f"{column}: {what} {shown}{more}: {rule}"


def check_zones(mem: MemMap, census: Census) -> Complaints:
    """Each PFN of a zone says so; free memory is well formed."""
    for zone in mem.zones:
        if zone is None:
            continue
        pfns = np.arange(zone.start_pfn, zone.end_pfn)
        yield from _complain("zone", pfns, mem.zone[pfns] != zone.index, "not the zone it lies in")
        if zone.pgmap is None:
            yield from check_zone(mem, zone)
    free = nr_free_pages(mem)
    if mem.vmstat["nr_free_pages"] != free:
        yield f"nr_free_pages: says {mem.vmstat['nr_free_pages']}, the free lists hold {free}"


def check_free_pages(mem: MemMap, census: Census) -> Complaints:
    """A page is on a free list exactly if nobody holds it, and then it is blank."""
    free = np.zeros(mem.limit_pfn, dtype=np.bool_)
    device = census.pages[census.pages >= mem.max_pfn]
    heads = mem.free_order[census.pages]
    yield from _complain("free_order", census.pages, heads > MAX_ORDER, "no block is so large")
    used = (mem.refcount[census.pages] != 0) & (heads != 0)
    yield from _complain("free_order", census.pages, used, "set on a page that is not free")
    for zone in mem.zones:
        if zone is None or zone.pgmap is not None:
            continue
        starts, orders = free_blocks(mem, zone)
        starts, orders = starts[orders < MAX_ORDER], orders[orders < MAX_ORDER]
        sizes = np.int64(1) << orders
        nested = np.concatenate(([False], starts[1:] < (starts + sizes)[:-1]))
        yield from _complain("free_order", starts, nested, "a free block inside another")
        for order in np.unique(orders).tolist():
            blocks = starts[orders == order][:, None] + np.arange(1 << order)
            free[blocks[blocks < mem.max_pfn]] = True
        for stack in zone.pcp:
            free[stack.live()] = True
    system = census.pages[census.pages < mem.max_pfn]
    unused = mem.refcount[system] == 0
    yield from _complain(
        "refcount", system, unused & ~free[system], "nobody holds it, yet it is not free"
    )
    yield from _complain("refcount", system, ~unused & free[system], "held, yet on a free list")
    for name in ("flags", "mapcount", "mapping", "index", "private", "mlock_count", "lock_owner"):
        stained = free[system] & (getattr(mem, name)[system] != 0)
        yield from _complain(name, system, stained, "not 0 on a free page")
    unused = mem.refcount[device] == FREE_REFCOUNT
    for name in ("mapcount", "mapping", "index", "private", "mlock_count", "lock_owner"):
        stained = unused & (getattr(mem, name)[device] != 0)
        yield from _complain(name, device, stained, "not 0 on a free device page")


def check_counts(mem: MemMap, census: Census) -> Complaints:
    """mapcount is what page tables hold; refcount is that, plus those who hold it besides."""
    pages = census.pages
    mapcount, refcount = mem.mapcount[pages], mem.refcount[pages]
    tables = census.mapped[pages]
    yield from _complain("mapcount", pages, mapcount != tables, "page tables say otherwise")
    expected = tables + census.taken[pages] + census.held[pages] + mem.is_zone_device_page(pages)
    yield from _complain(
        "refcount", pages, refcount != expected, "not its mappings, pagevecs, pins and swap cache"
    )
    unlocked = (mem.flags[pages] & PG_locked) == 0
    yield from _complain(
        "flags", pages, (census.waiting[pages] > 0) & unlocked, "migration entries, but not locked"
    )
    anon = int(np.count_nonzero(mapcount))
    if mem.vmstat["nr_anon_pages"] != anon:
        yield f"nr_anon_pages: says {mem.vmstat['nr_anon_pages']}, {anon} pages are mapped"


def check_flags(mem: MemMap, census: Census) -> Complaints:
    """Only known bits; a lock has an owner; device memory and the zero page are reserved."""
    pages = census.pages
    flags = mem.flags[pages]
    unknown = flags & ~_KNOWN_FLAGS
    yield from _complain("flags", pages, unknown != 0, "bits that have no name")
    locked = (flags & PG_locked) != 0
    owned = mem.lock_owner[pages] != 0
    yield from _complain("lock_owner", pages, locked != owned, "set and locked do not agree")
    special = mem.is_zone_device_page(pages) | (pages == mem.zero_pfn)
    reserved = (flags & PG_reserved) != 0
    yield from _complain(
        "flags", pages, reserved != special, "reserved is for device and zero page"
    )
    on_list = flags & (PG_lru | PG_active | PG_unevictable)
    device = mem.is_zone_device_page(pages)
    yield from _complain(
        "flags", pages, device & ((on_list & PG_lru) != 0), "device memory on an LRU list"
    )
    swapbacked, cached = (flags & PG_swapbacked) != 0, (flags & PG_swapcache) != 0
    yield from _complain("flags", pages, cached & ~swapbacked, "in the swap cache, not swapbacked")
    own = (flags & PG_anon_exclusive) != 0
    shared = census.mapped[pages] + census.taken[pages] > 1
    yield from _complain("flags", pages, own & shared, "shared, yet exclusive")
    pinned = census.held[pages] >= GUP_PIN_COUNTING_BIAS
    yield from _complain("flags", pages, pinned & ~own, "pinned, yet not the process's own")


def check_mlocked(mem: MemMap, census: Census) -> Complaints:
    """Only what VM_LOCKED memory maps is mlocked, and all of that is off reclaim's lists."""
    pages = census.pages
    flags = mem.flags[pages]
    mlocked, unevictable = (flags & PG_mlocked) != 0, (flags & PG_unevictable) != 0
    free = mlocked & ((census.locked[pages] == 0) | mem.is_zone_device_page(pages))
    yield from _complain("flags", pages, free, "mlocked, but in no VM_LOCKED memory")
    astray = ((flags & PG_lru) != 0) & (mlocked != unevictable)
    yield from _complain("flags", pages, astray, "mlocked and unevictable do not agree")
    most = np.where(mlocked, census.locked[pages], 0)
    wrong = (mem.mlock_count[pages] < 0) | (mem.mlock_count[pages] > most)
    yield from _complain("mlock_count", pages, wrong, "more than map it of VM_LOCKED memory")
    count = int(np.count_nonzero(mlocked))
    if mem.vmstat["nr_mlock"] != count:
        yield f"nr_mlock: says {mem.vmstat['nr_mlock']}, {count} pages are mlocked"


def check_lru(mem: MemMap, census: Census) -> Complaints:
    """Each PG_lru page stands once in the log of its list; a mapped page is there or on its way."""
    system = census.pages[census.pages < mem.max_pfn]
    listed = system[(mem.flags[system] & PG_lru) != 0]
    found = np.zeros(mem.limit_pfn, dtype=np.int32)
    kinds, kind_of = np.unique(mem.flags[listed], return_inverse=True)
    lists = np.array([page_lru(kind) for kind in kinds.tolist()], dtype=np.int64)[kind_of]
    keys = mem.page_to_nid(listed) * len(Lru) + lists
    for node in mem.nodes:
        for lru, items in zip(Lru, node.lruvec, strict=True):
            here = listed[keys == node.nid * len(Lru) + lru]
            log, stamps = items.log[: items.size], items.stamps[: items.size]
            on_list = np.isin(log, here) & (mem.lru_stamp[log] == stamps)
            np.add.at(found, log[on_list], np.int32(1))
            if items.nr_pages != here.size:
                what = f"node {node.nid} counts {items.nr_pages}, has {here.size}"
                yield f"nr_{lru.name.lower()}: {what}"
    yield from _complain("lru_stamp", listed, found[listed] != 1, "not once in the log of its list")
    for lru in Lru:
        name = f"nr_{lru.name.lower()}"
        count = sum(node.lruvec[lru].nr_pages for node in mem.nodes)
        if mem.vmstat[name] != count:
            yield f"{name}: says {mem.vmstat[name]}, the lists hold {count}"
    if mem.vmstat["nr_isolated_anon"]:
        yield f"nr_isolated_anon: says {mem.vmstat['nr_isolated_anon']}, yet nobody moves pages"
    waiting = np.zeros(mem.limit_pfn, dtype=np.bool_)
    for pagevec in mem.pagevecs:
        waiting[pagevec.live()] = True
    mapped = system[census.mapped[system] + census.taken[system] > 0]
    lost = ((mem.flags[mapped] & PG_lru) == 0) & ~waiting[mapped]
    yield from _complain("flags", mapped, lost, "mapped, but on no LRU list nor on its way")


def check_swap(mem: MemMap, census: Census) -> Complaints:
    """A slot is held by the entries that name it and by its page in the swap cache."""
    si, slots = mem.swap, np.arange(1, mem.swap.max)
    cached = si.cache[slots] > 0
    expected = census.swapped[slots] + cached * np.int32(SWAP_HAS_CACHE)
    wrong = si.swap_map[slots] != expected
    yield from _complain("swap_map", slots, wrong, "not its entries and the swap cache", "slot")
    used = int(np.count_nonzero(si.swap_map[slots]))
    if si.inuse_pages != used:
        yield f"inuse_pages: says {si.inuse_pages}, {used} slots are used"
    unused = (si.swap_map[slots] == 0) & (si.cache[slots] != 0)
    yield from _complain(
        "swap cache", slots, unused, "something of a slot that nobody holds", "slot"
    )

    pages = census.pages
    inside = (mem.flags[pages] & PG_swapcache) != 0
    named = np.where(inside, mem.private[pages], 0)
    stray = inside & ((named <= 0) | (named >= si.max))
    yield from _complain("private", pages, stray, "no such slot")
    odd = ~inside & (mem.private[pages] != 0) & ~mem.is_zone_device_page(pages)
    yield from _complain("private", pages, odd, "only a driver or the swap cache has a use for it")
    pages, named = pages[inside & ~stray], named[inside & ~stray]
    yield from _complain("private", pages, si.cache[named] != pages, "the swap cache differs")
    if not mem.vmstat["nr_swapcached"] == inside.sum() == cached.sum():
        what = f"{cached.sum()} slots have pages, {inside.sum()} pages have slots"
        yield f"nr_swapcached: says {mem.vmstat['nr_swapcached']}, {what}"
    if mem.payload is not None and si.contents is not None:
        flags = mem.flags[pages]
        clean = ((flags & PG_uptodate) != 0) & ((flags & (PG_dirty | PG_locked)) == 0)
        clean &= ~_dirty_in_tables(mem)[pages]
        saved = np.where(si.zeromap[named[clean], np.newaxis], 0, si.contents[named[clean]])
        clean[clean] = (mem.payload[pages[clean]] != saved).any(axis=1)
        yield from _complain("contents", pages, clean, "clean, yet its slot holds something else")


def _dirty_in_tables(mem: MemMap) -> Mask:
    """True for pages that some entry says a CPU has stored to, by PFN."""
    dirty = np.zeros(mem.limit_pfn, dtype=np.bool_)
    for mm in mem.mms:
        for _, _, ptes in _entries(mm):
            dirty[pte_pfn(ptes[pte_present(ptes) & pte_dirty(ptes)])] = True
    return dirty


def check_entries(mem: MemMap, census: Census) -> Complaints:
    """Every entry maps a page that may be there, with rights that the VMA gives."""
    for mm in mem.mms:
        anon = swapents = 0
        for vma, addrs, ptes in _entries(mm):
            present, special = pte_present(ptes), pte_special(ptes)
            private, moving = is_device_private_entry(ptes), is_migration_entry(ptes)
            poisoned, taken = is_hwpoison_entry(ptes), is_device_exclusive_entry(ptes)
            swapped, slots = is_swap_entry(ptes), swp_offset(ptes)
            anon += int(np.count_nonzero((present & ~special) | private | moving | taken))
            swapents += int(np.count_nonzero(swapped))
            odd = ~(present | private | moving | poisoned | taken | swapped)
            odd |= present & special & (pte_pfn(ptes) != mem.zero_pfn)
            odd |= swapped & ((swp_type(ptes) != 0) | (slots == 0) | (slots >= mem.swap.max))
            yield from _complain("page table", addrs, odd, f"an entry of no kind in {vma!r}")
            writable = (present & pte_write(ptes)) | is_write_device_private_entry(ptes)
            writable |= is_write_device_exclusive_entry(ptes)
            if not vma.vm_flags & VM_WRITE:
                yield from _complain("page table", addrs, writable, f"writable in {vma!r}")
            lost = moving & ((swp_offset(ptes) < 0) | (swp_offset(ptes) >= mem.limit_pfn))
            yield from _complain("page table", addrs, lost, f"no such frame in {vma!r}")
            own = swapped & pte_swp_exclusive(ptes) & ~odd
            own[own] = census.swapped[slots[own]] != 1
            yield from _complain("page table", addrs, own, f"others hold the slot too, {vma!r}")
            yield from _check_owner(mem, vma, addrs, ptes, present & ~special, private | taken)
        if anon != mm.anon_rss:
            yield f"anon_rss: {mm.name} says {mm.anon_rss}, its page tables hold {anon}"
        if swapents != mm.swapents:
            yield f"swapents: {mm.name} says {mm.swapents}, its page tables hold {swapents}"


def _check_owner(
    mem: MemMap, vma: Vma, addrs: Addresses, ptes: Ptes, normal: Mask, away: Mask
) -> Complaints:
    """The page behind each entry is of the right kind, and its rmap leads back here."""
    pfns = np.concatenate((pte_pfn(ptes[normal]), swp_offset(ptes[away])))
    places = np.concatenate((addrs[normal], addrs[away]))
    private, devmap = is_device_private_entry(ptes), pte_devmap(ptes) & normal
    device = np.concatenate((private[normal], private[away]))
    marked, mapped = (np.concatenate((bits[normal], bits[away])) for bits in (devmap, normal))
    outside = (pfns < 0) | (pfns >= mem.limit_pfn)
    yield from _complain("page table", pfns, outside, "no such frame")
    pfns, places, device = pfns[~outside], places[~outside], device[~outside]
    marked, mapped = marked[~outside], mapped[~outside]
    wrong = mem.is_device_private_page(pfns) != device
    yield from _complain("page table", pfns, wrong, "entry and kind of memory do not agree")
    wrong = marked != (mapped & mem.is_device_public_page(pfns))
    yield from _complain("page table", pfns, wrong, "devmap is for device-public memory")
    index = ((places - vma.vm_start) >> PAGE_SHIFT) + vma.vm_pgoff
    yield from _complain("index", pfns, mem.index[pfns] != index, f"not its offset in {vma!r}")
    owners = [(a.number << 2) | 1 for a in vma.anon_vma_chain]
    yield from _complain(
        "mapping", pfns, ~np.isin(mem.mapping[pfns], owners), f"not an anon_vma of {vma!r}"
    )


def check_anon_vmas(mem: MemMap, census: Census) -> Complaints:
    """Each anon_vma lists exactly the VMAs that name it, of address spaces that live.

    What one lists its parent lists too.
    """
    named: dict[int, list[Vma]] = {number: [] for number in mem.anon_vmas}
    for mm in mem.mms:
        for vma in mm.vmas:
            for anon_vma in vma.anon_vma_chain:
                named.setdefault(anon_vma.number, []).append(vma)
    for number, vmas in named.items():
        listed = mem.anon_vmas[number].vmas if number in mem.anon_vmas else []
        if {id(v) for v in listed} != {id(v) for v in vmas} or not vmas:
            yield f"anon_vma: {number} lists {listed}, named by {vmas}"
        elif (parent := mem.anon_vmas[number].parent) and not set(vmas) <= set(parent.vmas):
            yield f"anon_vma: {number} lists {listed}, its parent {parent.vmas}"


def check_vmas(mem: MemMap, census: Census) -> Complaints:
    """VMAs ascend without overlap, on nodes that there are; nothing is mapped outside them."""
    nodes = {node.nid for node in mem.nodes}
    for mm in mem.mms:
        total, locked, end = 0, 0, 0
        for vma in mm.vmas:
            if vma.vm_policy is not None and not nodes.issuperset(vma.vm_policy.nodes):
                yield f"vm_policy: {vma!r} of {mm.name} wants {vma.vm_policy}"
            if not end <= vma.vm_start < vma.vm_end:
                yield f"vma: {vma!r} of {mm.name} overlaps what ends at {end:#x}"
            total += vma_pages(vma)
            locked += vma_pages(vma) if vma.vm_flags & VM_LOCKED else 0
            end = vma.vm_end
        if total != mm.total_vm:
            yield f"total_vm: {mm.name} says {mm.total_vm}, its VMAs span {total} pages"
        if locked != mm.locked_vm:
            yield f"locked_vm: {mm.name} says {mm.locked_vm}, {locked} pages are VM_LOCKED"
        inside = sum(ptes.size for _, _, ptes in _entries(mm))
        runs = walk_page_range(mem.tables, mm.pgd, 0, 1 << 57, holes=False)
        everywhere = sum(int(np.count_nonzero(run.ptes)) for run in runs)
        if inside != everywhere:
            yield f"page table: {mm.name} maps {everywhere - inside} pages outside its VMAs"


def check_notifiers(mem: MemMap, census: Census) -> Complaints:
    """Nothing is being invalidated; interval notifiers ascend, with counts that differ from it."""
    for mm in mem.mms:
        if mm.invalidating:
            yield f"invalidating: {mm.name} is between start and end of {mm.invalidating[0]}"
        elif mm.invalidate_seq & 1:
            yield f"invalidate_seq: {mm.name} says {mm.invalidate_seq}, and nothing is invalidated"
        starts = [notifier.start for notifier in mm.interval_notifiers]
        if starts != sorted(starts):
            yield f"interval_notifiers: those of {mm.name} do not ascend"
        for notifier in mm.interval_notifiers:
            seq = notifier.invalidate_seq
            if notifier.mm is not mm or not notifier.start < notifier.end:
                yield f"interval_notifiers: {notifier!r} is not at home in {mm.name}"
            if not seq & 1 or seq > mm.invalidate_seq:
                yield f"invalidate_seq: {notifier!r} says {seq}, {mm.name} {mm.invalidate_seq}"


def check_tables(mem: MemMap) -> Complaints:
    """Each table in use is reached once; each free one is empty."""
    pool = mem.tables
    tables = pool.entries[: pool.fresh * PTRS_PER_PTE].reshape(-1, PTRS_PER_PTE)
    level = np.array([mm.pgd for mm in mem.mms] + mem.device_pgds, dtype=np.int64)
    reached = [level]
    for _ in range(4):
        entries = tables[level]
        level = pte_pfn(entries[entries != 0])
        if some(level >= pool.fresh):
            yield f"page table: an entry names table {level.max():#x}, which there is not"
            return
        reached.append(level)
    rows = np.concatenate(reached)
    idle = np.setdiff1d(np.arange(pool.fresh), rows)
    if np.unique(rows).size != rows.size or rows.size != pool.in_use:
        yield f"page table: {pool.in_use} tables are in use, {rows.size} are reached"
    if tables[idle].any():
        yield "page table: a free table holds entries"
    if mem.vmstat["nr_page_table_pages"] != pool.in_use:
        yield f"nr_page_table_pages: says {mem.vmstat['nr_page_table_pages']}, not {pool.in_use}"


_CHECKS: Final[tuple[Callable[[MemMap, Census], Complaints], ...]] = (
    check_zones,
    check_free_pages,
    check_counts,
    check_flags,
    check_mlocked,
    check_lru,
    check_swap,
    check_entries,
    check_anon_vmas,
    check_vmas,
    check_notifiers,
)


def dump_page(mem: MemMap, pfn: int) -> str:
    """All that is known of one page, in a line. Linux: dump_page(), mm/debug.c."""
    zone = mem.zones[int(mem.zone[pfn])]
    return (
        f"page {pfn:#x}: {zone.name if zone else 'hole'} refcount {mem.refcount[pfn]} "
        f"mapcount {mem.mapcount[pfn]} mapping {mem.mapping[pfn]:#x} index {mem.index[pfn]:#x} "
        f"flags {describe_flags(int(mem.flags[pfn]))}"
    )
