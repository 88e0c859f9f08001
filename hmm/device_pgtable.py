"""A device's page table for one process, kept in step with the CPU's by an mmu notifier.

It has the same five levels and lies in the same pool of tables. An entry maps a PFN, of the
device's own memory or of system memory that it reaches over the bus, and says whether the device
may store to it. Nothing is in it that the CPU's page table does not show.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hmm.migrate_pfn import MigratePfns, is_valid, migrate_pfn_to_pfn
from mm.errors import InvalidArgument
from mm.mmu_notifier import (
    MmuNotifierRange,
    MmuNotifyEvent,
    mmu_notifier_register,
    mmu_notifier_unregister_no_release,
)
from mm.pagewalk import free_pgtables, walk_page_range
from mm.pgtable import (
    _PAGE_PRESENT,
    _PAGE_RW,
    mk_pte,
    pte_alloc_each,
    pte_offset,
    pte_pfn,
    pte_present,
    pte_write,
)
from mm.swapops import (
    alike,
    is_device_private_entry,
    is_migration_entry,
    is_write_device_private_entry,
    is_write_migration_entry,
    swp_offset,
)
from mm.types import MemMap, MmStruct
from mm.typing import PAGE_SIZE, Addresses, Mask, Pfns, Ptes, pages, word
from mm.vectors import every, places, rows

ADDRESS_SPACE: Final = 1 << 57
_PAGE_READ_WRITE: Final = word(_PAGE_PRESENT | _PAGE_RW)
_MIGRATE: Final = MmuNotifyEvent.MIGRATE  # members of an Enum are slow to look up


class DeviceTable:
    """Five levels of tables for a device's view of one address space."""

    def __init__(self, mem: MemMap) -> None:
        self.mem = mem
        self.pool = mem.tables
        self.pgd = int(self.pool.alloc(1)[0])
        mem.device_pgds.append(self.pgd)

    def lookup(self, addrs: Addresses) -> Ptes:
        """The entry of each address, 0 where the device has to fault."""
        return self.pool.entries[pte_offset(self.pool, self.pgd, addrs)]

    def store(self, addrs: Addresses, ptes: Ptes) -> None:
        """Set the entries of *addrs* (ascending). Raises OutOfMemory, InvalidArgument if freed."""
        if not self.pgd:
            raise InvalidArgument("the device has closed, or the process exited: map nothing")
        pte_alloc_each(self.pool, self.pgd, addrs)
        self.pool.entries[rows(pte_offset(self.pool, self.pgd, addrs))] = ptes

    def erase(self, addrs: Addresses) -> None:
        """Forget *addrs*."""
        self.pool.entries[rows(pte_offset(self.pool, self.pgd, addrs))] = 0

    def clear(self, start: int, end: int) -> None:
        """Forget [*start*, *end*)."""
        for run in walk_page_range(self.pool, self.pgd, start, end, holes=False):
            run.ptes[:] = 0

    def mapped(self) -> tuple[Addresses, Ptes]:
        """Every address that the device can reach, and its entry; for checks."""
        addrs, ptes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
        for run in walk_page_range(self.pool, self.pgd, 0, ADDRESS_SPACE, holes=False):
            used = places(run.ptes)
            addrs.append(run.addrs[used])
            ptes.append(run.ptes[used])
        return np.concatenate(addrs), np.concatenate(ptes)

    def free(self) -> None:
        """Give all tables back; whoever comes too late finds an empty one."""
        self.clear(0, ADDRESS_SPACE)
        pgd, self.pgd = self.pgd, 0
        free_pgtables(self.pool, pgd, 0, ADDRESS_SPACE)
        self.pool.release(pages(pgd))
        self.mem.device_pgds.remove(pgd)


def migrated_entries(
    mm: MmStruct, addrs: Addresses, src: MigratePfns, dst: MigratePfns
) -> tuple[Mask, Mask]:
    """Where *mm* still has what migrates from src[i] to dst[i] at addrs[i], and may store to it.

    For finalize_and_map(), with page_table_lock held: MADV_DONTNEED and the write protection of
    userfaultfd need mmap_sem only for read, as the migration does, and truncating a file not even
    that. What they did meanwhile is in the migration entries, or is not any more.
    """
    pool = mm.mem.tables
    ptes = pool.entries[rows(pte_offset(pool, mm.pgd, addrs))]
    asked = alike(ptes)
    there = is_migration_entry(asked) & (swp_offset(ptes) == migrate_pfn_to_pfn(src))
    writable, full = there & is_write_migration_entry(asked), is_valid(src)
    if every(full):
        return there, writable
    private, present = is_device_private_entry(ptes), pte_present(ptes)
    new = migrate_pfn_to_pfn(dst)
    filled = (private & (swp_offset(ptes) == new)) | (present & (pte_pfn(ptes) == new))
    may = np.where(private, is_write_device_private_entry(ptes), pte_write(ptes))
    return np.where(full, there, filled), np.where(full, writable, may)


def settled(mm: MmStruct, start: int, end: int, owner: object) -> bool:
    """True if nobody invalidates any of [*start*, *end*), but for the migrations of *owner*."""
    return not any(
        invalid.start < end and start < invalid.end and not _ours(invalid, owner)
        for invalid in tuple(mm.invalidating)
    )


def _ours(invalid: MmuNotifierRange, owner: object) -> bool:
    return invalid.event is _MIGRATE and invalid.owner is owner


class DevicePageTable(DeviceTable):
    """What the device with *owner* may reach of *mm*. All methods want no lock held.

    What lookup() answers holds as long as the caller holds the mm's page_table_lock.
    """

    def __init__(self, mm: MmStruct, owner: object) -> None:
        super().__init__(mm.mem)
        self.mm = mm
        self.owner = owner
        mmu_notifier_register(self, mm)

    def map(self, addrs: Addresses, pfns: Pfns, writable: Mask) -> bool:
        """Let the device reach *pfns* at *addrs* (ascending), with page_table_lock held.

        False, and nothing is mapped, where somebody invalidates any of the range: what the
        caller has read of the CPU's page table may be about to change.
        """
        if not addrs.size:
            return True
        if not self._settled(addrs.item(0), addrs.item(-1) + PAGE_SIZE):
            return False
        rights = _PAGE_READ_WRITE if every(writable) else _PAGE_PRESENT | writable * _PAGE_RW
        self.store(addrs, mk_pte(pfns, rights))
        return True

    def unmap(self, addrs: Addresses) -> None:
        """Forget *addrs*, which the device is about to migrate itself."""
        with self.mm.page_table_lock:
            self.erase(addrs)

    def settle(self, start: int, end: int) -> None:
        """Wait until nobody invalidates any of [*start*, *end*)."""
        if not self._settled(start, end):
            self.mm.mem.locks.wait_until(
                lambda: self._settled(start, end), f"invalidation in [{start:#x}, {end:#x})"
            )

    def _settled(self, start: int, end: int) -> bool:
        return settled(self.mm, start, end, self.owner)

    def invalidate_range_start(self, invalid: MmuNotifierRange) -> None:
        """Forget the range, unless it is invalidated for the device's own migration.

        Then the device knows better than to forget what does not move, and corrects the rest in
        finalize_and_map().
        """
        if not _ours(invalid, self.owner):
            with self.mm.page_table_lock:
                self.clear(invalid.start, invalid.end)

    def invalidate_range_end(self, invalid: MmuNotifierRange) -> None:
        """Nothing to do: settle() asks the mm which ranges are being invalidated."""

    def release(self, mm: MmStruct) -> None:
        """The process goes: give all tables back."""
        with mm.page_table_lock:
            self.free()

    def close(self) -> None:
        """The device goes: as release(), and listen no more."""
        mmu_notifier_unregister_no_release(self, self.mm)
        self.release(self.mm)
