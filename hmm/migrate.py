"""migrate_vma(): move the pages of a range into or out of device memory.

Linux: the second half of mm/migrate.c as of v4.20. The five stages stand here in the order in
which they run, and `migrate_vma()` at the end runs them:

    collect    fill src from the page table, take a reference, put migration entries where the
               page lock was free
    prepare    lock the rest, take them off the LRU, refuse what is pinned
    unmap      take away every other mapping, look for pins again
    (driver    alloc_and_copy: choose destinations, copy the contents)
    pages      move struct page state from src to dst, fill holes
    (driver    finalize_and_map: see what moved, update the device's page table)
    finalize   the page tables point at dst, or back at src

`src` and `dst` hold one word for each page of the range; hmm/migrate_pfn.py draws it. MIGRATE in
src is the verdict: it is set while the page can still move, and a stage that finds that it
cannot clears it and notes why in `MigrateVma.stayed`. MIGRATE without VALID is a hole that the
device may populate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hmm.contract import Contract
from hmm.migrate_pfn import (
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_WRITE,
    STAYED_ERRNO,
    MigratePfns,
    Stayed,
    is_migrating,
    is_valid,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from mm.errors import InvalidArgument, InvalidRange
from mm.filemap import trylock_page, unlock_page
from mm.locking import preempt
from mm.memory import anon_entries, lru_cache_add_active, pte_offset_alloc
from mm.migrate import migrate_page
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.page_flags import PG_lru, PG_uptodate
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import (
    pte_none,
    pte_pfn,
    pte_present,
    pte_special,
    pte_write,
)
from mm.rmap import (
    anon_vma_prepare,
    page_add_new_anon_rmap,
    page_mapped,
    poison_migration_ptes,
    remove_migration_ptes,
    try_to_unmap,
    unmap_to_migration_entries,
)
from mm.swap import (
    get_page,
    isolate_lru_page,
    lru_add_drain,
    lru_add_drain_all,
    put_page,
    putback_lru_page,
)
from mm.swapops import is_device_private_entry, is_write_device_private_entry, swp_offset
from mm.trace import TracePoint
from mm.types import VM_HUGETLB, VM_SPECIAL, MemMap, Vma, page_anon, vma_is_anonymous
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices, Mask, Pfns, Ptes
from mm.vectors import every, has, places, some

mm_migrate_vma_collect: Final = TracePoint("mm_migrate_vma_collect")
mm_migrate_vma_finalize: Final = TracePoint("mm_migrate_vma_finalize")


class MigrateVmaSelect(IntFlag):
    """Which pages to collect; holes always are. Linux: enum migrate_vma_direction, v5.9."""

    SYSTEM = 1
    DEVICE_PRIVATE = 2


class MigrateVmaOps(Protocol):
    """A driver's part of a migration. Linux: struct migrate_vma_ops, include/linux/migrate.h."""

    def alloc_and_copy(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> None:
        """Choose a destination for entries with MIGRATE in *src*, copy, and name it in *dst*.

        Each page in *dst* is the driver's alone, locked, and written as
        `migrate_pfn(pfn) | MIGRATE_PFN_LOCKED`; 0 leaves the page where it is; and
        MIGRATE_PFN_ERROR gives its contents up for lost. *src* may only be read.
        """

    def finalize_and_map(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> None:
        """See in *src* what moved (MIGRATE still set) and update the device's page table.

        Both pages are still locked, and the process cannot reach either. Both vectors may only
        be read.
        """


@dataclass(slots=True, eq=False)
class MigrateVma:
    """One migration under way, and its result. Linux: struct migrate_vma.

    src, dst: uint64[npages]. pgmap_owner: whose device pages to collect, and whose own
    invalidations these are; None collects those of any device, as v4.20 does. wanted: pages of
    the range to consider, all if None (ours: it makes one call of a scattered set of pages).
    """

    vma: Vma
    start: int
    end: int
    src: MigratePfns
    dst: MigratePfns
    select: MigrateVmaSelect = MigrateVmaSelect.SYSTEM | MigrateVmaSelect.DEVICE_PRIVATE
    pgmap_owner: object = None
    wanted: Mask | None = None
    stayed: NDArray[np.uint8] = field(init=False)  # a `Stayed` for each page

    def __post_init__(self) -> None:
        self.stayed = np.zeros(self.npages, dtype=np.uint8)

    @property
    def mem(self) -> MemMap:
        """The machine's memory."""
        return self.vma.vm_mm.mem

    @property
    def npages(self) -> int:
        """Pages of the range."""
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def cpages(self) -> int:
        """Entries that can still move, or have moved, holes included."""
        return int(np.count_nonzero(self.src & MIGRATE_PFN_MIGRATE))

    @property
    def status(self) -> NDArray[np.int32]:
        """0 for each page that moved, or a negative errno."""
        return STAYED_ERRNO[self.stayed]

    def drop(self, entries: Indices, why: Stayed) -> None:
        """Say that *entries* stay."""
        if not entries.size:
            return
        self.src[entries] &= ~MIGRATE_PFN_MIGRATE
        self.stayed[entries] = why


# collect


def migrate_vma_collect(migrate: MigrateVma) -> None:
    """Fill src from the page table; lock and unmap every page whose lock is free.

    Linux: migrate_vma_collect(), mm/migrate.c.
    """
    mm = migrate.vma.vm_mm
    start, end = migrate.start, migrate.end
    with mmu_notifier_range(mm, start, end, MmuNotifyEvent.MIGRATE, migrate.pgmap_owner):
        for run in walk_page_range(mm.mem.tables, mm.pgd, start, end):
            preempt("migrate_vma_collect")
            with mm.page_table_lock:
                _collect_run(migrate, run)
    if mm_migrate_vma_collect:
        mm_migrate_vma_collect(process=mm.name, start=start, end=end, cpages=migrate.cpages)


def _collect_run(migrate: MigrateVma, run: Run) -> None:
    """Linux: migrate_vma_collect_pmd() and migrate_vma_collect_hole(), mm/migrate.c."""
    mem, ptes, src = migrate.mem, run.ptes, migrate.src[run.slice]
    pfns, writable, private = _decode(ptes)
    present = pte_present(ptes)
    hole = pte_none(ptes) | (present & pte_special(ptes))
    chosen = ~hole & _selected(migrate, pfns, present, private)
    if not vma_is_anonymous(migrate.vma):
        hole[:] = False  # Unlike Linux v4.20, which collects them only to fail on each later.
    if migrate.wanted is not None:
        hole &= migrate.wanted[run.slice]
        chosen &= migrate.wanted[run.slice]
    entries = places(chosen)
    pages = pfns if entries.size == pfns.size else pfns[entries]

    src[:] = hole * MIGRATE_PFN_MIGRATE
    migrate.stayed[run.slice] = ~(hole | chosen) * np.uint8(Stayed.SKIPPED)
    if not pages.size:
        return
    word = migrate_pfn(pfns) | MIGRATE_PFN_MIGRATE
    word |= writable * MIGRATE_PFN_WRITE | private * MIGRATE_PFN_DEVICE
    locked = trylock_page(mem, pages)
    get_page(mem, pages[~locked])
    src[entries] = word[entries] | locked * MIGRATE_PFN_LOCKED
    # The reference that the mapping held is the migration's from here on.
    taken = entries[locked]
    ptes[taken] = unmap_to_migration_entries(mem, ptes[taken], pages[locked])


def _decode(ptes: Ptes) -> tuple[Pfns, Mask, Mask]:
    """PFN, writable and device-private of each entry; meaningless where there is no page."""
    private = is_device_private_entry(ptes)
    if not some(private):
        return pte_pfn(ptes), pte_write(ptes), private
    pfns = np.where(private, swp_offset(ptes), pte_pfn(ptes))
    writable = np.where(private, is_write_device_private_entry(ptes), pte_write(ptes))
    return pfns, writable, private


def _selected(migrate: MigrateVma, pfns: Pfns, present: Mask, private: Mask) -> Mask:
    """Entries with a page of a kind that was asked for, which belongs to somebody."""
    mem = migrate.mem
    chosen = np.zeros_like(private)
    if migrate.select & MigrateVmaSelect.SYSTEM:
        chosen |= present
    if migrate.select & MigrateVmaSelect.DEVICE_PRIVATE and some(private):
        theirs = places(private)
        for zone in mem.zones:
            if zone is None or zone.pgmap is None:
                continue
            if migrate.pgmap_owner is None or zone.pgmap.owner is migrate.pgmap_owner:
                chosen[theirs[mem.zone[pfns[theirs]] == zone.index]] = True
    there = places(chosen)
    chosen[there] = mem.mapping[pfns[there]] != 0
    return chosen


# prepare


def migrate_vma_prepare(migrate: MigrateVma) -> None:
    """Lock what collect could not, isolate every page from the LRU, put back what is pinned.

    Linux: migrate_vma_prepare(), mm/migrate.c.
    """
    mem, src = migrate.mem, migrate.src
    preempt("migrate_vma_prepare")
    lru_add_drain(mem)
    entries = places(is_valid(src))
    entries = entries[_lock_rest(migrate, entries)]
    pfns = migrate_pfn_to_pfn(src[entries])

    system = ~mem.is_zone_device_page(pfns)
    listed = pfns[system]
    if some(~has(mem.flags[listed], PG_lru)):
        lru_add_drain_all(mem)
    isolated = isolate_lru_page(mem, listed)
    put_page(mem, listed[isolated])  # isolation has taken one of its own
    busy = entries[system][~isolated]
    if busy.size:
        _restore(migrate, busy, Stayed.ISOLATED, isolated=False)
        still = is_valid(src[entries])
        entries, pfns = entries[still], pfns[still]
    pinned = ~migrate_vma_check_page(mem, pfns)
    if some(pinned):
        _restore(migrate, entries[pinned], Stayed.PINNED)


def _lock_rest(migrate: MigrateVma, entries: Indices) -> Mask:
    """Try the page locks again that collect did not get; True for entries that are locked."""
    mem, src = migrate.mem, migrate.src
    locked = has(src[entries], MIGRATE_PFN_LOCKED)
    if every(locked):
        return locked
    late = places(~locked)
    pfns = migrate_pfn_to_pfn(src[entries[late]])
    got = trylock_page(mem, pfns)
    src[entries[late[got]]] |= MIGRATE_PFN_LOCKED
    locked[late[got]] = True
    src[entries[late[~got]]] = 0
    migrate.stayed[entries[late[~got]]] = Stayed.LOCKED
    put_page(mem, pfns[~got])
    return locked


def migrate_vma_check_page(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages without references beyond their mappings and the migration's own.

    A device-private page always passes: the CPU threads that wait for it hold references, and
    two of them would keep each other out for good. Linux: migrate_vma_check_page().
    """
    free_of_pins = mem.refcount[pfns] - mem.mapcount[pfns] <= 1
    device = mem.is_zone_device_page(pfns)
    return free_of_pins | device if some(device) else free_of_pins


def _restore(migrate: MigrateVma, entries: Indices, why: Stayed, *, isolated: bool = True) -> None:
    """Map the pages of *entries* again where they were, and let go of them."""
    mem = migrate.mem
    pfns = migrate_pfn_to_pfn(migrate.src[entries])
    remove_migration_ptes(mem, pfns, pfns)
    migrate.src[entries] = 0
    migrate.stayed[entries] = why
    unlock_page(mem, pfns)
    device = mem.is_zone_device_page(pfns)
    if isolated:
        putback_lru_page(mem, pfns[~device])
        put_page(mem, pfns[device])
    else:
        put_page(mem, pfns)


# unmap


def migrate_vma_unmap(migrate: MigrateVma) -> None:
    """Take away the mappings that collect did not see, and look for pins once more.

    Linux: migrate_vma_unmap(), mm/migrate.c.
    """
    mem, src = migrate.mem, migrate.src
    preempt("migrate_vma_unmap")
    entries = places(is_valid(src))
    pfns = migrate_pfn_to_pfn(src[entries])
    mapped = page_mapped(mem, pfns)
    if some(mapped):
        try_to_unmap(mem, pfns[mapped])
        mapped = page_mapped(mem, pfns)
        if some(mapped):
            _restore(migrate, entries[mapped], Stayed.MAPPED)
            entries, pfns = entries[~mapped], pfns[~mapped]
    pinned = ~migrate_vma_check_page(mem, pfns)
    if some(pinned):
        _restore(migrate, entries[pinned], Stayed.PINNED)


def migrate_vma_setup(migrate: MigrateVma) -> int:
    """Run collect, prepare and unmap; how many entries can move (`cpages`).

    The caller holds mmap_sem of the VMA's mm from here until migrate_vma_finalize().
    Raises InvalidArgument, InvalidRange. Linux: migrate_vma_setup(), v5.4.
    """
    _check_arguments(migrate)
    migrate.src[:] = 0
    migrate.dst[:] = 0
    migrate_vma_collect(migrate)
    if migrate.cpages:
        migrate_vma_prepare(migrate)
    if migrate.cpages:
        migrate_vma_unmap(migrate)
    return migrate.cpages


def _check_arguments(migrate: MigrateVma) -> None:
    vma, start, end = migrate.vma, migrate.start, migrate.end
    what = f"migrate_vma: [{start:#x}, {end:#x})"
    if start % PAGE_SIZE or end % PAGE_SIZE or start >= end:
        raise InvalidRange(f"{what} is not a range of whole pages; start must be below end")
    if vma.vm_flags & (VM_SPECIAL | VM_HUGETLB):
        raise InvalidArgument(f"{what}: {vma!r} is hugetlb or a driver's own (VM_SPECIAL)")
    if start < vma.vm_start or end > vma.vm_end:
        raise InvalidRange(
            f"{what} is not inside its VMA [{vma.vm_start:#x}, {vma.vm_end:#x}); "
            f"migrate one VMA at a time"
        )
    for name, words in (("src", migrate.src), ("dst", migrate.dst)):
        _check_vector(f"{what}: {name}", words, migrate.npages, np.dtype(np.uint64))
    if migrate.wanted is not None:
        _check_vector(f"{what}: wanted", migrate.wanted, migrate.npages, np.dtype(np.bool_))
    if not vma.vm_mm.mmap_sem.held():
        raise InvalidArgument(f"{what}: hold mmap_sem for read until migrate_vma_finalize()")


def _check_vector(what: str, vector: object, size: int, dtype: np.dtype[Any]) -> None:
    if isinstance(vector, np.ndarray) and vector.dtype == dtype and vector.shape == (size,):
        return
    got = f"{vector.dtype}{list(vector.shape)}" if isinstance(vector, np.ndarray) else repr(vector)
    raise InvalidArgument(f"{what} must be a NumPy array {dtype}[{size}], got {got}")


# pages


def migrate_vma_pages(migrate: MigrateVma) -> None:
    """Let the pages of dst take the place of those of src, and fill the holes.

    Linux: migrate_vma_pages(), mm/migrate.c.
    """
    mem, src, dst = migrate.mem, migrate.src, migrate.dst
    preempt("migrate_vma_pages")
    moving = is_migrating(src)
    given = is_valid(dst)
    lost = moving & is_valid(src) & (has(dst, MIGRATE_PFN_ERROR))
    migrate.drop(places(lost), Stayed.LOST)
    migrate.drop(places(moving & ~given & ~lost), Stayed.NOT_CHOSEN)
    moving &= given & ~lost

    holes = places(moving & ~is_valid(src))
    if holes.size:
        migrate_vma_insert_page(migrate, holes)
    entries = places(moving & is_valid(src))
    new, old = migrate_pfn_to_pfn(dst[entries]), migrate_pfn_to_pfn(src[entries])
    anon = page_anon(mem, old)
    if not every(anon):  # only the page cache knows how to move its pages, and not to a device
        migrate.drop(entries[~anon], Stayed.REFUSED)
        entries, new, old = entries[anon], new[anon], old[anon]
    failed = migrate_page(mem, new, old) != 0
    if some(failed):
        migrate.drop(entries[failed], Stayed.BUSY)


def migrate_vma_insert_page(migrate: MigrateVma, holes: Indices) -> None:
    """Map the pages of dst where there was nothing, or the zero page, and still is.

    Linux: migrate_vma_insert_page(), mm/migrate.c.
    """
    vma, mem = migrate.vma, migrate.mem
    mm = vma.vm_mm
    pfns = migrate_pfn_to_pfn(migrate.dst[holes])
    addrs = migrate.start + (holes << PAGE_SHIFT)
    anon_vma_prepare(vma)
    at = pte_offset_alloc(mm, addrs)
    start = addrs.item(0)
    with mmu_notifier_range(mm, start, migrate.end, MmuNotifyEvent.MIGRATE, migrate.pgmap_owner):
        with mm.page_table_lock:
            ptes = mem.tables.entries[at]
            empty = pte_none(ptes) | (pte_present(ptes) & pte_special(ptes))
            mapped = pfns[empty]
            get_page(mem, mapped)
            mem.flags[mapped] |= PG_uptodate
            page_add_new_anon_rmap(vma, mapped, addrs[empty])
            mm.anon_rss += mapped.size
            mem.tables.entries[at[empty]] = anon_entries(vma, mapped)
        lru_cache_add_active(mem, mapped[~mem.is_zone_device_page(mapped)])
    migrate.drop(holes[~empty], Stayed.RACED)


# finalize


def migrate_vma_finalize(migrate: MigrateVma) -> None:
    """Point the page tables at what moved, or back at what did not; unlock and release all.

    Linux: migrate_vma_finalize(), mm/migrate.c.
    """
    mem, src, dst = migrate.mem, migrate.src, migrate.dst
    preempt("migrate_vma_finalize")
    sources = places(is_valid(src))
    old = migrate_pfn_to_pfn(src[sources])
    moved = is_migrating(src[sources]) & is_valid(dst[sources])
    lost = migrate.stayed[sources] == Stayed.LOST

    if some(lost):
        poison_migration_ptes(mem, old[lost])
    remove_migration_ptes(mem, old, np.where(moved, migrate_pfn_to_pfn(dst[sources]), old))
    unlock_page(mem, old)
    # Unlike Linux v4.20, a source page that nobody maps any more is freed at once, without the
    # detour over an LRU list.
    kept = ~moved & ~lost & ~mem.is_zone_device_page(old)
    put_page(mem, old[~kept])
    putback_lru_page(mem, old[kept])
    _release_destinations(migrate)
    if mm_migrate_vma_finalize:
        mm_migrate_vma_finalize(
            process=migrate.vma.vm_mm.name,
            start=migrate.start,
            end=migrate.end,
            moved=migrate.cpages,
        )


def _release_destinations(migrate: MigrateVma) -> None:
    """Unlock the pages of dst; a system page that moved in goes to the LRU."""
    mem = migrate.mem
    given = is_valid(migrate.dst)
    new = migrate_pfn_to_pfn(migrate.dst[given])
    word = migrate.src[given]
    unlock_page(mem, new)
    # A hole that was filled is on its way to the LRU already.
    to_lru = is_migrating(word) & is_valid(word) & ~mem.is_zone_device_page(new)
    putback_lru_page(mem, new[to_lru])
    put_page(mem, new[~to_lru])


# all of it


def migrate_vma(
    ops: MigrateVmaOps,
    vma: Vma,
    start: int,
    end: int,
    src: MigratePfns,
    dst: MigratePfns,
    private: Any = None,
    *,
    select: MigrateVmaSelect = MigrateVmaSelect.SYSTEM | MigrateVmaSelect.DEVICE_PRIVATE,
    pgmap_owner: object = None,
    wanted: Mask | None = None,
) -> MigrateVma:
    """Migrate the pages of [*start*, *end*) of *vma* where *ops* wants them.

    *src* and *dst* are uint64 vectors with a word for each page, overwritten; *private* is
    passed on to the callbacks. What stayed, and why, is in the result. The callbacks are not
    called when nothing can move. Takes mmap_sem for read.

    Raises InvalidArgument and InvalidRange before anything is touched; DriverBug, or whatever a
    callback raised, after every page has been put back. Linux: migrate_vma(), mm/migrate.c.
    """
    start, end = start & ~(PAGE_SIZE - 1), end & ~(PAGE_SIZE - 1)
    migrate = MigrateVma(vma, start, end, src, dst, select, pgmap_owner, wanted)
    with vma.vm_mm.mmap_sem.read():
        if not migrate_vma_setup(migrate):
            return migrate
        contract = Contract(migrate.mem, src, dst, start, pgmap_owner)
        try:
            ops.alloc_and_copy(vma, src, dst, start, end, private)
            contract.check_alloc_and_copy()
        except BaseException:
            _abort(migrate, contract)
            raise
        migrate_vma_pages(migrate)
        moved_src, moved_dst = src.copy(), dst.copy()
        try:
            ops.finalize_and_map(vma, src, dst, start, end, private)
            contract.check_finalize_and_map(moved_dst, moved_src)
        finally:
            src[:], dst[:] = moved_src, moved_dst
            migrate_vma_finalize(migrate)
    return migrate


def _abort(migrate: MigrateVma, contract: Contract) -> None:
    """Put everything back after alloc_and_copy() failed, whatever it left in the vectors."""
    migrate.src[:] = contract.src_before
    usable = contract.usable_destinations()
    words = migrate.dst[usable]
    migrate.dst[:] = 0
    migrate.dst[usable] = words
    unlocked = usable[~contract.locked(usable)]
    put_page(migrate.mem, migrate_pfn_to_pfn(migrate.dst[unlocked]))
    migrate.dst[unlocked] = 0
    migrate.drop(places(is_migrating(migrate.src)), Stayed.ABORTED)
    migrate_vma_finalize(migrate)
