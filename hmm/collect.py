"""The first stage of migrate_vma(): which pages of a range there are, and which of them to move.

src gets a word for each page of a kind that `MigrateVma.select` names, and for each hole. A page
whose lock is free is locked and unmapped at once, so that most of a range costs one walk; the
other stages are in hmm/migrate.py. Linux: mm/migrate.c, v4.20.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from hmm.migrate_pfn import (
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_WRITE,
    Stayed,
    migrate_pfn,
)
from hmm.migration import (
    SELECT_DEVICE_COHERENT,
    SELECT_DEVICE_PRIVATE,
    SELECT_SYSTEM,
    MigrateVma,
)
from mm.filemap import trylock_page
from mm.locking import preempt
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.pagewalk import Run, walk_page_range
from mm.pgtable import pte_none, pte_pfn, pte_present, pte_special, pte_write
from mm.rmap import unmap_to_migration_entries
from mm.swap import get_page
from mm.swapops import alike, is_device_private_entry, is_write_device_private_entry, swp_offset
from mm.types import vma_is_anonymous
from mm.typing import NO_PAGES, Indices, Mask, Pfns, Word, word
from mm.vectors import distinct, every, frozen, joined, places, rows, some

_MAPPED: Final = word(MIGRATE_PFN_MIGRATE | MIGRATE_PFN_LOCKED)  # what is collected, by kind
_DEVICE: Final = word(_MAPPED | MIGRATE_PFN_DEVICE)
_MIGRATE: Final = MmuNotifyEvent.MIGRATE  # members of an Enum are slow to look up


def migrate_vma_collect(migrate: MigrateVma) -> None:
    """Fill src from the page table; lock and unmap every page whose lock is free.

    Linux: migrate_vma_collect(), mm/migrate.c.
    """
    mm = migrate.vma.vm_mm
    start, end = migrate.start, migrate.end
    migrate.begin(migrate.npages)
    found: list[_Collected] = []
    with mmu_notifier_range(mm, start, end, _MIGRATE, migrate.pgmap_owner):
        for run in walk_page_range(mm.mem.tables, mm.pgd, start, end):
            preempt("migrate_vma_collect")
            with mm.page_table_lock:
                found += _collect_run(migrate, run)
    migrate.entries = frozen(joined([kind.entries for kind in found]))
    migrate.pfns = frozen(joined([kind.pfns for kind in found]))
    migrate.late = joined([kind.late for kind in found])


class _Collected(NamedTuple):
    """Pages of one kind in one run: their places in the range, and where the lock is missing."""

    entries: Indices
    pfns: Pfns
    late: Indices


def _collect_run(migrate: MigrateVma, run: Run) -> Iterator[_Collected]:
    """Linux: migrate_vma_collect_pmd() and migrate_vma_collect_hole(), mm/migrate.c."""
    ptes, asked = run.ptes, alike(run.ptes)
    private = is_device_private_entry(asked)
    if not every(private):
        present = pte_present(asked)
        zero = present & pte_special(asked)
        of_frames = present ^ zero
        if not every(of_frames):
            zero &= bool(migrate.select & SELECT_SYSTEM)
            _collect_holes(migrate, run, pte_none(asked) | zero)
        mapped = _wanted(migrate, run, of_frames)
        found = frozen(pte_pfn(ptes[rows(mapped)]))
        for at, pfns in _selected(migrate, mapped, found) if mapped.size else ():
            migrate.reachable = True
            yield _collect_pages(migrate, run, at, pfns, _MAPPED)
    if migrate.select & SELECT_DEVICE_PRIVATE:
        at = _wanted(migrate, run, private)
        if at.size:
            at, pfns = _owned(migrate, at, swp_offset(ptes[at]))
            yield _collect_pages(migrate, run, at, pfns, _DEVICE)


def _wanted(migrate: MigrateVma, run: Run, found: Mask) -> Indices:
    """Where what is *found* shall be looked at."""
    if migrate.wanted is not None:
        found = found & migrate.wanted[run.slice]
    elif found.size < run.ptes.size:  # all are alike
        return np.arange(run.ptes.size) if found.item() else NO_PAGES
    return places(found)


def _collect_holes(migrate: MigrateVma, run: Run, empty: Mask) -> None:
    """Enter what the device may populate in src.

    Unlike Linux v4.20, holes of file mappings are left out; there they fail later, each of them.
    """
    if vma_is_anonymous(migrate.vma):
        holes = _wanted(migrate, run, empty) + run.first
        migrate.src[holes] = MIGRATE_PFN_MIGRATE
        migrate.stayed[holes] = Stayed.NO
        migrate.holes = joined([migrate.holes, holes])


def _selected(migrate: MigrateVma, at: Indices, pfns: Pfns) -> Iterator[tuple[Indices, Pfns]]:
    """Those of *pfns*, present at places *at*, that shall move: of the system, of the device."""
    public = migrate.mem.is_zone_device_page(pfns)
    mixed = some(public)
    if migrate.select & SELECT_SYSTEM and not every(public):
        yield (at[~public], pfns[~public]) if mixed else (at, pfns)
    if migrate.select & SELECT_DEVICE_COHERENT and mixed:
        yield _owned(migrate, at[public], pfns[public])


def _owned(migrate: MigrateVma, at: Indices, pfns: Pfns) -> tuple[Indices, Pfns]:
    """Those of device pages *pfns*, found at places *at*, that are the owner's."""
    if migrate.pgmap_owner is None:
        return at, pfns
    mem = migrate.mem
    zones = mem.zone[pfns]
    for index in distinct(zones):
        zone = mem.zones[index]
        if zone is None or zone.pgmap.owner is not migrate.pgmap_owner:
            keep = zones != index
            zones, at, pfns = zones[keep], at[keep], pfns[keep]
    return at, pfns


def _collect_pages(
    migrate: MigrateVma, run: Run, at: Indices, pfns: Pfns, kind: Word
) -> _Collected:
    """Enter *pfns*, found at places *at* of the run, in src; unmap those that can be locked."""
    mem, vma, ptes = migrate.mem, migrate.vma, run.ptes
    mapping = mem.mapping[rows(pfns)]
    if not every(mapping):
        at, pfns = at[mapping != 0], pfns[mapping != 0]
    here = rows(at)
    found = ptes[here]
    asked = alike(found)
    writable = is_write_device_private_entry(asked) if kind is _DEVICE else pte_write(asked)
    locked = trylock_page(mem, pfns)
    entries = at + run.first
    span = rows(entries)
    migrate.src[span] = migrate_pfn(pfns, kind | writable * MIGRATE_PFN_WRITE)
    migrate.stayed[span] = Stayed.NO

    # The reference that the mapping of a locked page held becomes the migration's.
    if every(locked):
        ptes[here] = unmap_to_migration_entries(vma, found, pfns)
        return _Collected(entries, pfns, NO_PAGES)
    migrate.src[entries[~locked]] &= ~MIGRATE_PFN_LOCKED
    get_page(mem, pfns[~locked])
    ptes[at[locked]] = unmap_to_migration_entries(vma, found[locked], pfns[locked])
    return _Collected(entries, pfns, entries[~locked])
