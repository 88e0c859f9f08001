"""Drivers whose page table is not in step with the CPU's."""

import numpy as np

from devices import NumpyDevice
from devices.memory import Direction
from hmm import migrate_pfn_to_pfn
from hmm.device_pgtable import DevicePageTable
from hmm.migrate_pfn import is_migrating, is_valid
from mm import PAGE_SIZE
from mm.mmu_notifier import MmuNotifyEvent


class DeafTable(DevicePageTable):
    """Does not hear of one kind of change."""

    event = None

    def invalidate_range_start(self, invalid):
        if invalid.event is not self.event:
            super().invalidate_range_start(invalid)


class Deaf(NumpyDevice):
    """A device with such a table."""

    event = None

    def table_of(self, mm):
        if mm not in self.tables:
            self.tables[mm] = DeafTable(mm, self.owner)
            self.tables[mm].event = self.event
        return self.tables[mm]


class DeafToMunmap(Deaf):
    """Reaches memory that is gone."""

    breaks, evidence = "stale-unmap", r"munmap\(\): 3 entries .* are stale"
    event = MmuNotifyEvent.UNMAP


class DeafToMprotect(Deaf):
    """Keeps rights that were taken."""

    breaks, evidence = "stale-protect", r"mprotect\(.r.\): .* may store to 3 pages"
    event = MmuNotifyEvent.PROTECTION_VMA


class DeafToReplacement(Deaf):
    """Keeps pages that the process has thrown away."""

    breaks, evidence = "stale-clear", r"madvise\(.dontneed.\): 3 entries .* are stale"
    event = MmuNotifyEvent.CLEAR


class DeafToFork(Deaf):
    """Stores to what a child must not see."""

    breaks, evidence = "stale-fork", r"fork\(\): the device may store to 8 pages"
    event = MmuNotifyEvent.PROTECTION_PAGE


class DeafToClearRefs(Deaf):
    """Stores without anybody seeing it."""

    breaks, evidence = "stale-soft-dirty", "clear_refs: the device may store to 1 pages"
    event = MmuNotifyEvent.SOFT_DIRTY


class DeafToAtomics(Deaf):
    """Stores in the middle of another device's atomic operation."""

    breaks, evidence = "stale-exclusive", "range.*: 1 entries .* are stale"
    event = MmuNotifyEvent.EXCLUSIVE


class DeafToOtherDevices(Deaf):
    """Thinks that all migrations are its own."""

    breaks, evidence = "stale-migrate", "migration by another device: 8 entries .* are stale"
    event = MmuNotifyEvent.MIGRATE


class KeepsOldEntries(NumpyDevice):
    """Goes on to reach pages that it has given back."""

    breaks, evidence = "stale-own", r"to_system\(\): [45] entries .* are stale"

    def finalize_and_map(self, vma, src, dst, start, end, private):
        super().finalize_and_map(vma, src, dst, start, end, private)
        moved = np.flatnonzero(is_migrating(src) & is_valid(src) & is_valid(dst))
        if private is Direction.TO_SYSTEM and moved.size:
            with vma.vm_mm.page_table_lock:
                pfns, writable = migrate_pfn_to_pfn(src[moved]), np.ones(moved.size, dtype=np.bool_)
                self.table_of(vma.vm_mm).map(start + moved * PAGE_SIZE, pfns, writable)


class MapsAllWritable(NumpyDevice):
    """Does not look at MIGRATE_PFN_WRITE."""

    breaks, evidence = "rights", "shared with a child .* may store to 4 pages"

    def finalize_and_map(self, vma, src, dst, start, end, private):
        super().finalize_and_map(vma, src, dst, start, end, private)
        moved = np.flatnonzero(is_migrating(src) & is_valid(dst))
        if private is Direction.TO_DEVICE and moved.size:
            with vma.vm_mm.page_table_lock:
                pfns, writable = migrate_pfn_to_pfn(dst[moved]), np.ones(moved.size, dtype=np.bool_)
                self.table_of(vma.vm_mm).map(start + moved * PAGE_SIZE, pfns, writable)
