"""migrate_vma(): move the pages of a range into or out of device memory.

Linux: the second half of mm/migrate.c as of v4.20. The five stages stand here in the order in
which they run, but for the first, and `migrate_vma()` at the end runs them:

    collect    (hmm/collect.py) fill src from the page table, take a reference, put migration
               entries where the page lock was free
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

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmm.collect import migrate_vma_collect
from hmm.contract import Contract, usable_destinations
from hmm.migrate_pfn import (
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_VALID,
    MigratePfns,
    Stayed,
    is_valid,
    migrate_pfn_to_pfn,
)
from hmm.migration import (
    SELECT_ALL,
    MigrateVma,
    MigrateVmaOps,
    Migration,
    check_arguments,
)
from mm.anon_vma import anon_vma_prepare
from mm.errors import DriverBug, OutOfMemory
from mm.filemap import trylock_page, unlock_page
from mm.gfp import GFP_KERNEL
from mm.locking import preempt
from mm.memcontrol import (
    mem_cgroup_oom_synchronize,
    mem_cgroup_try_charge,
    mem_cgroup_uncharge,
)
from mm.memory import anon_entries, pte_offset_alloc, replace_ptes_notify
from mm.migrate import migrate_page
from mm.migration_ptes import poison_migration_ptes, remove_migration_ptes
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.page_cache import page_in_cache
from mm.page_flags import PG_lru, PG_private, PG_swapcache, PG_uptodate
from mm.pgtable import pte_none, pte_present, pte_special
from mm.rmap import page_add_new_anon_rmap, page_mapped, try_to_unmap
from mm.swap import (
    get_page,
    isolate_lru_page,
    lru_add_drain,
    lru_add_drain_all,
    lru_cache_add_active,
    put_page,
    putback_lru_page,
)
from mm.trace import TracePoint
from mm.types import MemMap, Vma, page_anon
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Indices, Mask, Pfns, word
from mm.userfaultfd_k import userfaultfd_missing
from mm.vectors import chosen, distinct, every, frozen, has, parted, rows, some

_CHOSEN: Final = word(MIGRATE_PFN_VALID | MIGRATE_PFN_ERROR)

mm_migrate_vma_setup: Final = TracePoint("mm_migrate_vma_setup")
mm_migrate_vma_finalize: Final = TracePoint("mm_migrate_vma_finalize")


# prepare


def migrate_vma_prepare(migrate: MigrateVma) -> None:
    """Lock what collect could not, isolate every page from the LRU, put back what is pinned.

    Linux: migrate_vma_prepare(), mm/migrate.c.
    """
    preempt("migrate_vma_prepare")
    if migrate.late.size:
        _lock_late(migrate)
    if migrate.reachable:
        _isolate(migrate)
        _restore_pinned(migrate)


def _lock_late(migrate: MigrateVma) -> None:
    """Try the page locks again that collect did not get; a page that is still locked stays."""
    mem, src, late = migrate.mem, migrate.src, migrate.late
    got = trylock_page(mem, migrate_pfn_to_pfn(src[late]))
    src[late[got]] |= MIGRATE_PFN_LOCKED
    busy = late[~got]
    pfns = migrate_pfn_to_pfn(src[busy])
    src[busy] = 0
    migrate.stayed[busy] = Stayed.LOCKED
    _keep(migrate, is_valid(src[migrate.entries]))
    put_page(mem, pfns)


def _isolate(migrate: MigrateVma) -> None:
    """Take system pages off the LRU; one that somebody else has isolated stays."""
    mem = migrate.mem
    system = ~mem.is_zone_device_page(migrate.pfns)
    pfns = chosen(migrate.pfns, system)
    if not pfns.size:
        return
    lru_add_drain(mem)
    if not every(has(mem.flags[rows(pfns)], PG_lru)):
        lru_add_drain_all(mem)
    isolated = isolate_lru_page(mem, pfns)
    put_page(mem, chosen(pfns, isolated))  # isolation has taken one of its own
    if not every(isolated):
        busy = system.copy()
        busy[system] = ~isolated
        _restore(migrate, busy, Stayed.ISOLATED, isolated=False)


def _restore_pinned(migrate: Migration) -> None:
    unpinned = migrate_vma_check_page(migrate.mem, migrate.pfns)
    if not every(unpinned):
        _restore(migrate, ~unpinned, Stayed.PINNED)


def migrate_vma_check_page(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages without references but their mappings, a cache and the migration.

    A device-private page always passes: the CPU threads that wait for it hold references, and
    two of them would keep each other out for good. Unlike Linux v4.20, a device-public page
    passes with one reference too many, and is refused later (as in 6.0 and since).
    Linux: migrate_vma_check_page(), mm/migrate.c.
    """
    device = mem.is_zone_device_page(pfns)
    besides = _references_besides(mem, pfns, device)
    if not some(device):
        return besides <= 0
    return (besides <= device) | mem.is_device_private_page(pfns)


def _references_besides(mem: MemMap, pfns: Pfns, device: Mask | bool) -> NDArray[np.int32]:
    """References to each page that are neither a mapping, nor ours, nor that of a free page."""
    which = rows(pfns)
    extra = mem.refcount[which] - mem.mapcount[which] - has(mem.flags[which], PG_swapcache)
    if mem.mappings:
        extra -= page_in_cache(mem, pfns)
        if mem.buffers.in_use:
            extra -= has(mem.flags[which], PG_private)
    return extra - 1 - device


def _restore(migrate: Migration, bad: Mask, why: Stayed, *, isolated: bool = True) -> None:
    """Map those of `entries` that are *bad* again where they were, and let go of them."""
    mem = migrate.mem
    entries, pfns = migrate.entries[bad], migrate.pfns[bad]
    _keep(migrate, ~bad)
    remove_migration_ptes(mem, pfns, pfns)
    migrate.src[entries] = 0
    migrate.stayed[entries] = why
    to_lru = ~mem.is_zone_device_page(pfns) & isolated
    putback_lru_page(mem, pfns[to_lru])
    put_page(mem, pfns[~to_lru])
    unlock_page(mem, pfns)


def _keep(migrate: Migration, good: Mask) -> None:
    """Go on with those of `entries` that are *good*."""
    migrate.entries = frozen(migrate.entries[good])
    migrate.pfns = frozen(migrate.pfns[good])


# unmap


def migrate_vma_unmap(migrate: Migration) -> None:
    """Take away the mappings that collect did not see, and look for pins once more.

    Linux: migrate_vma_unmap(), mm/migrate.c.
    """
    mem = migrate.mem
    preempt("migrate_vma_unmap")
    mapped = page_mapped(mem, migrate.pfns)
    if some(mapped):
        try_to_unmap(mem, migrate.pfns[mapped])
        mapped = page_mapped(mem, migrate.pfns)
        if some(mapped):
            _restore(migrate, mapped, Stayed.MAPPED)
    if migrate.reachable:
        _restore_pinned(migrate)
        public = migrate.pfns[mem.is_device_public_page(migrate.pfns)]
        migrate.held = public[_references_besides(mem, public, True) > 0]


def migrate_vma_setup(migrate: MigrateVma) -> int:
    """Run collect, prepare and unmap; how many entries can move (`cpages`).

    The caller holds mmap_sem of the VMA's mm from here until migrate_vma_finalize().
    Raises InvalidArgument, InvalidRange. Linux: migrate_vma_setup(), v5.4.
    """
    check_arguments(migrate)
    return _setup(migrate)


def _setup(migrate: MigrateVma) -> int:
    """migrate_vma_setup() of arguments that have been checked."""
    migrate.src[:] = 0
    migrate.dst[:] = 0
    migrate_vma_collect(migrate)
    if migrate.entries.size:
        migrate_vma_prepare(migrate)
    if migrate.entries.size:
        migrate_vma_unmap(migrate)
    migrate.moved = np.zeros(migrate.entries.size, dtype=np.bool_)
    if mm_migrate_vma_setup:
        mm_migrate_vma_setup(**migrate.place, cpages=migrate.cpages)
    return migrate.cpages


# pages


def migrate_vma_pages(migrate: MigrateVma) -> None:
    """Let the pages of dst take the place of those of src, and fill the holes.

    Linux: migrate_vma_pages(), mm/migrate.c.
    """
    preempt("migrate_vma_pages")
    if migrate.holes.size:
        given = is_valid(migrate.dst[migrate.holes])
        migrate.drop(migrate.holes[~given], Stayed.NOT_CHOSEN)
        if some(given):
            migrate_vma_insert_page(migrate, migrate.holes[given])

    migrate_device_pages(migrate)


def migrate_device_pages(migrate: Migration) -> None:
    """Let the pages of dst take the place of those of src, wherever those are mapped.

    Linux: migrate_device_pages(), v6.1.
    """
    mem = migrate.mem
    words = migrate.dst[rows(migrate.entries)]
    moved = (words & _CHOSEN) == MIGRATE_PFN_VALID
    if not every(moved):
        migrate.drop(migrate.entries[~moved], Stayed.NOT_CHOSEN)
        migrate.drop(migrate.entries[has(words, MIGRATE_PFN_ERROR)], Stayed.LOST)
    anon = page_anon(mem, migrate.pfns)
    if not every(anon):
        # No device has pages of files, nor can it lose them.
        # Unlike Linux v4.20, device-public memory is no exception (as in 6.0).
        refused = ~anon & has(words, _CHOSEN)
        migrate.drop(migrate.entries[refused], Stayed.REFUSED)
        moved &= ~refused
    if migrate.held.size:  # whoever held it may have stored to it after it was copied
        held = moved & np.isin(migrate.pfns, migrate.held)
        migrate.drop(migrate.entries[held], Stayed.BUSY)
        moved &= ~held
    pfns = migrate.pfns
    if not every(moved):
        words, pfns = words[moved], pfns[moved]
    status = migrate_page(mem, frozen(migrate_pfn_to_pfn(words)), pfns)
    if some(status):
        migrate.drop(migrate.entries[moved][status != 0], Stayed.BUSY)
        moved[moved] = status == 0
    migrate.moved = moved


def migrate_vma_insert_page(migrate: MigrateVma, holes: Indices) -> None:
    """Map the pages of dst where there was nothing, or the zero page, and still is.

    Linux: migrate_vma_insert_page(), mm/migrate.c.
    """
    vma, mem = migrate.vma, migrate.mem
    mm = vma.vm_mm
    pfns = migrate_pfn_to_pfn(migrate.dst[holes])
    addrs = migrate.start + (holes << PAGE_SHIFT)
    anon_vma_prepare(vma)
    try:
        at = pte_offset_alloc(mm, addrs)
    except OutOfMemory:
        migrate.drop(holes, Stayed.NO_TABLE)
        return
    if userfaultfd_missing(vma):  # they are userland's to fill
        migrate.drop(holes, Stayed.USERFAULT)
        return
    if mem.memcgs:
        may = _charge(migrate, holes, pfns)
        holes, pfns, addrs, at = holes[may], pfns[may], addrs[may], at[may]
        if not holes.size:
            return
    with mmu_notifier_range(
        mm,
        addrs.item(0),
        migrate.end,
        MmuNotifyEvent.MIGRATE,
        migrate.pgmap_owner,
        only_end=True,
    ):
        with mm.page_table_lock:
            ptes = mem.tables.entries[at]
            empty = pte_none(ptes) | (pte_present(ptes) & pte_special(ptes))
            types = mem.memory_type[mem.zone[pfns]]
            for memory_type in distinct(types):
                kind = empty & (types == memory_type)
                mapped = pfns[kind]
                get_page(mem, mapped)
                mem.flags[mapped] |= PG_uptodate
                page_add_new_anon_rmap(vma, mapped, addrs[kind])
                mm.anon_rss += mapped.size
                entries = anon_entries(vma, mapped)
                if mm.notifier_extras:
                    zero = pte_present(ptes[kind])
                    replace_ptes_notify(mm, addrs[kind][zero], at[kind][zero], entries[zero])
                mem.tables.entries[at[kind]] = entries
        lru_cache_add_active(mem, pfns[empty & ~mem.is_zone_device_page(pfns)])
    migrate.drop(holes[~empty], Stayed.RACED)
    if mem.memcgs:
        mem_cgroup_uncharge(mem, pfns[~empty])


def _charge(migrate: MigrateVma, holes: Indices, pfns: Pfns) -> Mask:
    """Charge the process's control group for *pfns*; the holes that it has no room for stay."""
    may = mem_cgroup_try_charge(migrate.vma.vm_mm, pfns, GFP_KERNEL)
    mem_cgroup_oom_synchronize()  # of those that stay the result tells
    migrate.drop(holes[~may], Stayed.OVER_LIMIT)
    return may


# finalize


def migrate_vma_finalize(migrate: Migration) -> None:
    """Point the page tables at what moved, or back at what did not; unlock and release all.

    Linux: migrate_vma_finalize(), mm/migrate.c.
    """
    mem, old, moved = migrate.mem, migrate.pfns, migrate.moved
    preempt("migrate_vma_finalize")
    entries, left = migrate.entries, old
    if not every(moved):
        entries, left = entries[moved], old[moved]
        _finalize_unmoved(migrate)
    landed = frozen(migrate_pfn_to_pfn(migrate.dst[rows(entries)]))
    remove_migration_ptes(mem, left, landed)
    # The references of the migration go before the locks: whoever waits for one of these pages
    # may migrate it next, and must find it with no references but its mappings.
    device, system = parted(landed, mem.is_zone_device_page(landed))
    putback_lru_page(mem, system)
    put_page(mem, device)
    unlock_page(mem, landed)
    unlock_page(mem, left)
    # Unlike Linux v4.20, a source page, which nobody maps any more, is freed at once, without the
    # detour over an LRU list.
    put_page(mem, left)
    if np.count_nonzero(migrate.dst & MIGRATE_PFN_VALID) > left.size:
        _release_unused(migrate)
    if mm_migrate_vma_finalize:
        mm_migrate_vma_finalize(**migrate.place, moved=migrate.cpages)


def _finalize_unmoved(migrate: Migration) -> None:
    """Map what did not move where it was; what the driver lost answers with SIGBUS."""
    mem, unmoved = migrate.mem, ~migrate.moved
    pfns = migrate.pfns[unmoved]
    lost = migrate.stayed[migrate.entries[unmoved]] == Stayed.LOST
    poison_migration_ptes(mem, pfns[lost])
    remove_migration_ptes(mem, pfns[~lost], pfns[~lost])
    device = mem.is_zone_device_page(pfns)
    putback_lru_page(mem, pfns[~lost & ~device])
    put_page(mem, pfns[~lost & device])
    unlock_page(mem, pfns)
    put_page(mem, pfns[lost])


def _release_unused(migrate: Migration) -> None:
    """Let go of the pages of dst that took no page's place: in filled holes, or nowhere.

    A page that fills a hole is on its way to the LRU already, if it goes there.
    """
    unused = is_valid(migrate.dst)
    unused[migrate.entries[migrate.moved]] = False
    pfns = migrate_pfn_to_pfn(migrate.dst[unused])
    mapped = page_mapped(migrate.mem, pfns)
    put_page(migrate.mem, pfns[mapped])
    unlock_page(migrate.mem, pfns)
    put_page(migrate.mem, pfns[~mapped])


def migrate_vma(
    ops: MigrateVmaOps,
    vma: Vma,
    start: int,
    end: int,
    src: MigratePfns,
    dst: MigratePfns,
    private: Any = None,
    *,
    select: int = SELECT_ALL,
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
        check_arguments(migrate)  # until it passes, dst is the caller's, and no abort may touch it
        begun = begin_migration(migrate, ops, private)
        if begun is not None:
            end_migration(begun)
    return migrate


class Begun(NamedTuple):
    """A migration whose driver is copying."""

    migrate: MigrateVma
    ops: MigrateVmaOps
    private: Any
    contract: Contract | None
    copied: Callable[[], None] | None  # waits for the copies


def begin_migration(migrate: MigrateVma, ops: MigrateVmaOps, private: Any) -> Begun | None:
    """Everything up to alloc_and_copy(); None where nothing can move. The caller holds mmap_sem."""
    src, dst, start = migrate.src, migrate.dst, migrate.start
    try:
        if not _setup(migrate):
            return None
        debug = migrate.mem.debug
        contract = Contract(migrate.mem, src, dst, start, migrate.pgmap_owner) if debug else None
        copied = ops.alloc_and_copy(migrate.vma, src, dst, start, migrate.end, private)
        if contract:
            _check_contract(contract, copied)
    except BaseException:
        _abort(migrate)
        raise
    return Begun(migrate, ops, private, contract, copied)


def _check_contract(contract: Contract, copied: Callable[[], None] | None) -> None:
    """Let nothing be put back under copies of a driver that has broken its contract."""
    try:
        contract.check_alloc_and_copy()
    except DriverBug:
        if copied is not None:
            copied()
        raise


def end_migration(begun: Begun) -> None:
    """Everything after alloc_and_copy(): wait for the copies, then let the pages move."""
    migrate, ops, private, contract, copied = begun
    if copied is not None:
        try:
            copied()
        except BaseException:
            _abort(migrate)
            raise
    migrate_vma_pages(migrate)
    try:
        if contract:
            contract.before_finalize_and_map()
        ops.finalize_and_map(
            migrate.vma, migrate.src, migrate.dst, migrate.start, migrate.end, private
        )
        if contract:
            contract.check_finalize_and_map()
    finally:
        migrate_vma_finalize(migrate)


def _abort(migrate: MigrateVma) -> None:
    """Put everything back after alloc_and_copy() failed, whatever it left in dst."""
    mem, dst = migrate.mem, migrate.dst
    ours = usable_destinations(mem, dst)
    words = dst[ours]
    dst[:] = 0
    dst[ours] = words
    trylock_page(mem, migrate_pfn_to_pfn(words))  # a page that came unlocked is released as others
    migrate.drop(migrate.entries, Stayed.ABORTED)
    migrate.drop(migrate.holes, Stayed.ABORTED)
    migrate.moved = np.zeros(migrate.entries.size, dtype=np.bool_)
    migrate_vma_finalize(migrate)
