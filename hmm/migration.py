"""One migration under way: what it is asked, what its stages hand on, what became of it.

The stages are in hmm/migrate.py. Linux: struct migrate_vma and its ops, include/linux/migrate.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hmm.migrate_pfn import MIGRATE_PFN_MIGRATE, STAYED_ERRNO, MigratePfns, Stayed
from mm.errors import InvalidArgument, InvalidRange
from mm.types import VM_HUGETLB, VM_SPECIAL, MemMap, Vma
from mm.typing import NO_PAGES, PAGE_SHIFT, PAGE_SIZE, Indices, Mask, Pfns, word

_WORD: Final = np.dtype(np.uint64)
_STAYS: Final = word(~MIGRATE_PFN_MIGRATE)
_FLAG: Final = np.dtype(np.bool_)
_SKIPPED: Final = int(Stayed.SKIPPED)
_NONE_MOVED: Final = NO_PAGES.astype(np.bool_)


class MigrateVmaSelect(IntFlag):
    """Which pages to collect; holes always are. Linux: enum migrate_vma_direction, v6.0."""

    SYSTEM = 1
    DEVICE_PRIVATE = 2
    DEVICE_COHERENT = 4  # device-public memory, as v4.20 calls it


# As plain ints, whose `&` is fifty times as fast.
SELECT_SYSTEM, SELECT_DEVICE_PRIVATE, SELECT_DEVICE_COHERENT = map(int, MigrateVmaSelect)
SELECT_ALL: Final = SELECT_SYSTEM | SELECT_DEVICE_PRIVATE | SELECT_DEVICE_COHERENT


class MigrateVmaOps(Protocol):
    """A driver's part of a migration. Linux: struct migrate_vma_ops, include/linux/migrate.h."""

    def alloc_and_copy(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> Callable[[], None] | None:
        """Choose a destination for entries with MIGRATE in *src*, copy, and name it in *dst*.

        Each page in *dst* is the driver's alone, locked, and written as
        `migrate_pfn(pfn) | MIGRATE_PFN_LOCKED`; 0 leaves the page where it is; and
        MIGRATE_PFN_ERROR gives its contents up for lost. *src* may only be read. Copies may still
        be under way when it returns a function: that one waits for them, and may then name lost
        contents in *dst* as well.
        """

    def finalize_and_map(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> None:
        """See in *src* what moved (MIGRATE still set) and update the device's page table.

        Both pages are still locked, and the process cannot reach either. Both vectors may only
        be read.
        """


class Migration:
    """Pages on their way from src to dst, as the stages hand them on.

    src, dst: uint64[n], what the driver sees. `entries` are the places with a page that can still
    move, `pfns` those pages, so that no stage decodes src again; `reachable` says whether a CPU
    reaches any of them, and so may have pinned it, `held` are device pages that somebody held when
    they were unmapped, `moved` says for each of `entries` whether dst took its place, and `stayed`
    for each of the n why it did not.
    """

    __slots__ = ("dst", "entries", "held", "mem", "moved", "pfns", "reachable", "src", "stayed")
    mem: MemMap
    src: MigratePfns
    dst: MigratePfns
    stayed: NDArray[np.uint8]
    entries: Indices
    pfns: Pfns
    held: Pfns
    moved: Mask
    reachable: bool

    def begin(self, npages: int) -> None:
        """Nothing is found yet, and every page of *npages* counts as skipped."""
        self.stayed = np.empty(npages, dtype=np.uint8)
        self.stayed.fill(_SKIPPED)
        self.entries = self.pfns = self.held = NO_PAGES
        self.moved = _NONE_MOVED
        self.reachable = False

    @property
    def place(self) -> dict[str, Any]:
        """Whose memory it is, for the events."""
        raise NotImplementedError

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
        if entries.size:
            self.src[entries] &= _STAYS
            self.stayed[entries] = why


@dataclass(slots=True, eq=False)
class MigrateDevice(Migration):
    """Pages of a device that leave it, wherever they are mapped."""

    mem: MemMap
    name: str  # of the device
    src: MigratePfns
    dst: MigratePfns
    stayed: NDArray[np.uint8] = field(init=False)
    entries: Indices = field(init=False)
    pfns: Pfns = field(init=False)
    held: Pfns = field(init=False)
    moved: Mask = field(init=False)
    reachable: bool = field(init=False)

    @property
    def place(self) -> dict[str, Any]:
        """Which device it is, for the events."""
        return {"device": self.name}


@dataclass(slots=True, eq=False)
class MigrateVma(Migration):
    """One migration under way, and its result. Linux: struct migrate_vma.

    src, dst: uint64[npages], what the driver sees. pgmap_owner: whose device pages to collect,
    and whose own invalidations these are; None collects those of any device, as v4.20 does.
    wanted: pages of the range to consider, all if None (ours: it makes one call of a scattered
    set of pages).

    Beside what every migration hands on, `late` are the places among `entries` whose lock collect
    did not get, and `holes` the places that the device may populate.
    """

    vma: Vma
    start: int
    end: int
    src: MigratePfns
    dst: MigratePfns
    select: int = SELECT_ALL
    pgmap_owner: object = None
    wanted: Mask | None = None
    mem: MemMap = field(init=False)
    stayed: NDArray[np.uint8] = field(init=False)
    entries: Indices = field(init=False)
    pfns: Pfns = field(init=False)
    late: Indices = field(init=False)
    holes: Indices = field(init=False)
    held: Pfns = field(init=False)
    moved: Mask = field(init=False)
    reachable: bool = field(init=False)

    def __post_init__(self) -> None:
        self.mem = self.vma.vm_mm.mem
        self.begin(0)

    def begin(self, npages: int) -> None:
        """Nothing is found yet, no holes either."""
        Migration.begin(self, npages)
        self.late = self.holes = NO_PAGES

    @property
    def npages(self) -> int:
        """Pages of the range."""
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def place(self) -> dict[str, Any]:
        """Whose memory it is, for the events."""
        return {"process": self.vma.vm_mm.name, "start": self.start, "end": self.end}


def check_arguments(migrate: MigrateVma) -> None:
    """Raise InvalidArgument or InvalidRange unless *migrate* can begin."""
    vma, start, end = migrate.vma, migrate.start, migrate.end
    if start % PAGE_SIZE or end % PAGE_SIZE or start >= end:
        raise InvalidRange(
            f"migrate_vma: [{start:#x}, {end:#x}) is no range of whole pages; "
            f"start must be below end"
        )
    if vma.vm_flags & (VM_SPECIAL | VM_HUGETLB):
        raise InvalidArgument(
            f"migrate_vma: {vma!r} is hugetlb or a driver's own (VM_SPECIAL); no page of it moves"
        )
    if start < vma.vm_start or end > vma.vm_end:
        raise InvalidRange(
            f"migrate_vma: [{start:#x}, {end:#x}) is not inside its VMA "
            f"[{vma.vm_start:#x}, {vma.vm_end:#x}); migrate one VMA at a time"
        )
    _check_vector("src", migrate.src, migrate.npages, _WORD)
    _check_vector("dst", migrate.dst, migrate.npages, _WORD)
    for name, vector in (("src", migrate.src), ("dst", migrate.dst)):
        if not vector.flags.writeable:
            raise InvalidArgument(f"migrate_vma: {name} is read-only")
    if np.shares_memory(migrate.src, migrate.dst):
        raise InvalidArgument("migrate_vma: src and dst share memory; give each a vector")
    if migrate.wanted is not None:
        _check_vector("wanted", migrate.wanted, migrate.npages, _FLAG)
    if not vma.vm_mm.mmap_sem.held():
        raise InvalidArgument(
            f"migrate_vma: [{start:#x}, {end:#x}): hold mmap_sem for read until "
            f"migrate_vma_finalize()"
        )


def _check_vector(name: str, vector: object, size: int, dtype: np.dtype[Any]) -> None:
    if isinstance(vector, np.ndarray) and vector.dtype == dtype and vector.shape == (size,):
        return
    got = f"{vector.dtype}{list(vector.shape)}" if isinstance(vector, np.ndarray) else repr(vector)
    raise InvalidArgument(f"migrate_vma: {name} must be a NumPy array {dtype}[{size}], got {got}")
