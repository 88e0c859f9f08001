"""The reference driver: a mirror of an address space that reads, writes and migrates on demand.

Linux: lib/test_hmm.c, v6.12. An open file of one of its devices is a `Dmirror`; its methods are
the ioctls, which work in windows of 64 pages cut at VMA ends, as the driver's do. The devices and
their memory are in hmm/dmirror_device.py.

    read, write          through the device's page table, faulting with hmm_range_fault()
    migrate_to_device    setup, alloc_and_copy, pages, map, finalize; then read it all back
    migrate_to_system    the same, the other way
    snapshot             what hmm_range_fault() sees without faulting
    exclusive            take pages away from the CPU until it touches them
    release              evict everything and give the device's memory back
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hmm.device_pgtable import ADDRESS_SPACE, DeviceTable, migrated_entries, settled
from hmm.dmirror_device import DmirrorDevice, MigrationRecord
from hmm.migrate import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from hmm.migrate_pfn import (
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_WRITE,
    is_migrating,
    is_valid,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from hmm.migration import MigrateVma, MigrateVmaSelect
from hmm.range import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_pfn,
    hmm_range_fault,
)
from mm.errors import (
    Busy,
    InvalidArgument,
    MmError,
    NoEntry,
    PageHeld,
    PermissionDenied,
    SegmentationFault,
)
from mm.filemap import unlock_page
from mm.gup import make_device_exclusive_range
from mm.locking import SpinLock, cond_resched
from mm.mmap import find_vma
from mm.mmu_notifier import (
    MmuIntervalNotifier,
    MmuNotifierRange,
    MmuNotifyEvent,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from mm.page_cache import set_page_dirty
from mm.pgtable import (
    _PAGE_PRESENT,
    _PAGE_RW,
    _PAGE_SPECIAL,
    mk_pte,
    pte_pfn,
    pte_special,
)
from mm.process import Process
from mm.swap import put_page
from mm.types import VM_READ, VM_WRITE, Vma
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Mask, Payload, Pfns, Ptes, word
from mm.vectors import every, has, places, some

WINDOW: Final = 64 << PAGE_SHIFT  # bytes that one fault or migration takes at most
MAX_TRIES: Final = 1000  # of a fault that somebody invalidates, in place of a timeout of a second

# Bytes of a snapshot. Linux: enum in lib/test_hmm_uapi.h.
PROT_ERROR: Final = 0xFF
PROT_NONE: Final = 0x00
PROT_READ: Final = 0x01
PROT_WRITE: Final = 0x02
PROT_ZERO: Final = 0x10
PROT_DEV_PRIVATE_LOCAL: Final = 0x20
PROT_DEV_PRIVATE_REMOTE: Final = 0x30
PROT_DEV_COHERENT_LOCAL: Final = 0x40
PROT_DEV_COHERENT_REMOTE: Final = 0x50

_REQUEST_WRITE: Final = word(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
_ATOMIC: Final = word(_PAGE_PRESENT | _PAGE_SPECIAL)  # tag of an entry that exclusive() made


@dataclass(slots=True)
class DmirrorAnswer:
    """What an ioctl copies out. data: uint8[cpages, 4096]; perm: uint8[cpages]."""

    cpages: int
    faults: int = 0
    data: Payload | None = None
    perm: NDArray[np.uint8] | None = None


class Dmirror(MmuIntervalNotifier):
    """One process's address space as a device sees it. Linux: struct dmirror."""

    def __init__(self, device: DmirrorDevice, process: Process) -> None:
        self.device = device
        self.mm = process.mm
        self.mutex = SpinLock(device.mem.locks, f"mutex of hmm_dmirror{device.number}")
        self.table = DeviceTable(device.mem)
        self.number = device.add_mirror(self)
        self.closed = False
        mmu_interval_notifier_insert(self, self.mm, 0, ADDRESS_SPACE)

    def close(self) -> None:
        """Close the file: the device evicts every page that it has, of any process.

        A second call does nothing.
        """
        if self.closed:
            return
        self.closed = True
        mmu_interval_notifier_remove(self)
        self.device.evict()
        del self.device.mirrors[self.number]
        self.table.free()

    # What changes the table.

    def invalidate(self, invalid: MmuNotifierRange, cur_seq: int) -> bool:
        """Forget a range, unless the device itself migrates it.

        As in the recorded driver, the page after the range is forgotten too; False where it would
        wait for the mutex, and may not.
        Linux: dmirror_interval_invalidate().
        """
        if invalid.event is MmuNotifyEvent.MIGRATE and invalid.owner is self.device:
            return True
        if not invalid.blockable and self.mutex.locked():
            return False
        with self.mutex:
            mmu_interval_set_seq(self, cur_seq)
            self.table.clear(invalid.start, min(invalid.end + PAGE_SIZE, ADDRESS_SPACE))
        return True

    def forget(self, addrs: Addresses) -> None:
        """The pages at *addrs* go back to system memory."""
        with self.mutex:
            self.table.erase(addrs)

    # The ioctls.

    def read(self, addr: int, npages: int) -> DmirrorAnswer:
        """The device loads *npages* pages at *addr*. Linux: dmirror_read()."""
        self._check_range(addr, npages)
        data = np.empty((npages, PAGE_SIZE), dtype=np.uint8)
        done = faults = 0
        while True:
            done += self._do_read(addr + (done << PAGE_SHIFT), data[done:])
            if done == npages:
                return DmirrorAnswer(done, faults, data=data)
            self._fault(addr + (done << PAGE_SHIFT), addr + (npages << PAGE_SHIFT), write=False)
            faults += 1

    def write(self, addr: int, npages: int, data: Payload) -> DmirrorAnswer:
        """The device stores *data*, uint8[npages, 4096], at *addr*. Linux: dmirror_write()."""
        self._check_range(addr, npages)
        done = faults = 0
        while True:
            done += self._do_write(addr + (done << PAGE_SHIFT), data[done:])
            if done == npages:
                return DmirrorAnswer(done, faults)
            self._fault(addr + (done << PAGE_SHIFT), addr + (npages << PAGE_SHIFT), write=True)
            faults += 1

    def migrate_to_device(self, addr: int, npages: int) -> DmirrorAnswer:
        """Migrate what can move of *npages* pages at *addr* here, and read the range back.

        Raises InvalidArgument at the first page that no readable VMA has, NoEntry where a page
        is not in the mirror's table afterwards; what was migrated by then stays so.
        Linux: dmirror_migrate_to_device().
        """
        self._check_range(addr, npages)
        with self.mm.mmap_sem.read():
            for vma, start, end in self._windows(addr, npages):
                migrate, record = self._setup("d", vma, start, end, MigrateVmaSelect.SYSTEM)
                self._alloc_and_copy(migrate)
                record.dst = migrate.dst.copy()
                migrate_vma_pages(migrate)
                record.src1 = migrate.src.copy()
                self._finalize_and_map(migrate)
                migrate_vma_finalize(migrate)
        data = np.empty((npages, PAGE_SIZE), dtype=np.uint8)
        got = self._do_read(addr, data)
        if got < npages:
            raise NoEntry(
                f"hmm_dmirror{self.device.number}: the page at {addr + (got << PAGE_SHIFT):#x} is "
                f"not in the mirror; it could not migrate, and the device has not read it"
            )
        return DmirrorAnswer(npages, data=data)

    def migrate_to_system(self, addr: int, npages: int) -> DmirrorAnswer:
        """Migrate the device's pages among *npages* at *addr* back; cpages: how many moved.

        Raises InvalidArgument at the first page that no readable VMA has.
        Linux: dmirror_migrate_to_system().
        """
        self._check_range(addr, npages)
        cpages = 0
        with self.mm.mmap_sem.read():
            for vma, start, end in self._windows(addr, npages):
                migrate, record = self._setup("s", vma, start, end, self.device.select)
                self.device.copy_to_system(migrate)
                record.dst = migrate.dst.copy()
                migrate_vma_pages(migrate)
                record.src1 = migrate.src.copy()
                cpages += int(np.count_nonzero(is_valid(migrate.src) & is_migrating(migrate.src)))
                migrate_vma_finalize(migrate)
        return DmirrorAnswer(cpages)

    def snapshot(self, addr: int, npages: int) -> DmirrorAnswer:
        """What the CPU's page table says of *npages* pages at *addr*, a byte each; no faults.

        Linux: dmirror_snapshot().
        """
        self._check_range(addr, npages)
        words = np.zeros(npages, dtype=np.uint64)
        hmm_range = HmmRange(
            self, 0, addr, addr + (npages << PAGE_SHIFT), words, dev_private_owner=self.device
        )
        self._range_fault(hmm_range, store=False)
        return DmirrorAnswer(npages, perm=self._permissions(words))

    def exclusive(self, addr: int, npages: int) -> DmirrorAnswer:
        """Take *npages* pages at *addr* away from every CPU until one touches them.

        Raises Busy where that fails for a page. Linux: dmirror_exclusive().
        """
        self._check_range(addr, npages)
        end = addr + (npages << PAGE_SHIFT)
        with self.mm.mmap_sem.read():
            for start in range(addr, end, WINDOW):
                addrs = np.arange(start, min(start + WINDOW, end), PAGE_SIZE)
                pfns = make_device_exclusive_range(self.mm, addrs, None)
                marked = pfns >= 0
                with self.mutex:
                    if every(marked):
                        self.table.store(addrs, mk_pte(pfns, _ATOMIC))
                unlock_page(self.device.mem, pfns[marked])
                put_page(self.device.mem, pfns[marked])
                if not every(marked):
                    raise Busy(
                        f"hmm_dmirror{self.device.number}: the page at {addrs[~marked][0]:#x} "
                        f"could not be taken from the CPU"
                    )
        data = np.empty((npages, PAGE_SIZE), dtype=np.uint8)
        if self._do_read(addr, data) < npages:
            raise NoEntry(f"hmm_dmirror{self.device.number}: the CPU has taken pages back already")
        return DmirrorAnswer(npages, data=data)

    def check_exclusive(self, addr: int, npages: int) -> None:
        """Raises PermissionDenied while the device has any of the pages for itself.

        Linux: dmirror_check_atomic().
        """
        self._check_range(addr, npages)
        addrs = np.arange(addr, addr + (npages << PAGE_SHIFT), PAGE_SIZE)
        with self.mutex:
            atomic = pte_special(self.table.lookup(addrs))
        if some(atomic):
            raise PermissionDenied(
                f"hmm_dmirror{self.device.number}: the device still has {addrs[atomic][0]:#x} for "
                f"itself"
            )

    def release(self) -> None:
        """Evict everything and give the device's memory back. Linux: HMM_DMIRROR_RELEASE."""
        self.device.remove_chunks()

    # How it is done.

    def _check_range(self, addr: int, npages: int) -> None:
        end = addr + (npages << PAGE_SHIFT)
        if self.closed or addr % PAGE_SIZE or npages <= 0 or addr < 0 or end > ADDRESS_SPACE:
            raise InvalidArgument(
                f"hmm_dmirror{self.device.number}: [{addr:#x}, {end:#x}) is no range of whole "
                f"pages, or the file is closed"
            )

    def _windows(self, addr: int, npages: int) -> Iterator[tuple[Vma, int, int]]:
        """The range in pieces of 64 pages, cut where a VMA ends."""
        end = addr + (npages << PAGE_SHIFT)
        while addr < end:
            vma = find_vma(self.mm, addr)
            if vma is None or vma.vm_start > addr or not vma.vm_flags & VM_READ:
                raise InvalidArgument(
                    f"hmm_dmirror{self.device.number}: nothing readable is mapped at {addr:#x}"
                )
            stop = min(addr + WINDOW, end, vma.vm_end)
            yield vma, addr, stop
            addr = stop

    def _setup(
        self, kind: str, vma: Vma, start: int, end: int, select: MigrateVmaSelect
    ) -> tuple[MigrateVma, MigrationRecord]:
        """migrate_vma_setup(), and a record of it."""
        migrate = self.device.migration(vma, start, end, select)
        record = MigrationRecord(kind, self.device.number, self.mm, start, migrate.npages)
        self.device.records.append(record)
        try:
            record.cpages = migrate_vma_setup(migrate)
        except MmError as error:
            record.errno = error.code
            raise
        record.src0 = migrate.src.copy()
        return migrate, record

    def _alloc_and_copy(self, migrate: MigrateVma) -> None:
        """Linux: dmirror_migrate_alloc_and_copy()."""
        src, dst = migrate.src, migrate.dst
        entries = places(is_migrating(src))
        pfns = self.device.alloc_pages(entries.size, self)
        entries = entries[: pfns.size]
        full = is_valid(src[entries])
        self.device.copy(pfns[full], migrate_pfn_to_pfn(src[entries[full]]))
        self.device.clear(pfns[~full])
        writable = has(src[entries], MIGRATE_PFN_WRITE)
        if migrate.vma.vm_flags & VM_WRITE:
            writable |= ~full
        dst[entries] = migrate_pfn(pfns, MIGRATE_PFN_LOCKED | writable * MIGRATE_PFN_WRITE)

    def _finalize_and_map(self, migrate: MigrateVma) -> None:
        """Unlike the recorded driver, map nothing that the process has given up meanwhile.

        Linux: dmirror_migrate_finalize_and_map().
        """
        moved = places(is_migrating(migrate.src) & is_valid(migrate.dst))
        addrs, words = migrate.start + (moved << PAGE_SHIFT), migrate.dst[moved]
        with self.mutex, self.mm.page_table_lock:
            there, writable = migrated_entries(self.mm, addrs, migrate.src[moved], words)
            there &= settled(self.mm, migrate.start, migrate.end, self.device)
            entries = _entries(migrate_pfn_to_pfn(words[there]), writable[there])
            self.table.store(addrs[there], entries)

    def _do_read(self, addr: int, out: Payload) -> int:
        """Copy pages from *addr* on to *out* up to the first that is missing; how many.

        Linux: dmirror_do_read().
        """
        with self.mutex:
            pfns = self._leading(addr, out.shape[0], _PAGE_PRESENT)
            self.device.load(pfns, out)
        return pfns.size

    def _do_write(self, addr: int, data: Payload) -> int:
        """As _do_read(), the other way; the pages have changed, though no CPU entry says so.

        Unlike the recorded driver, which says nothing either: reclaim takes such a page for clean.
        Linux: dmirror_do_write().
        """
        with self.mutex:
            pfns = self._leading(addr, data.shape[0], _PAGE_RW)
            self.device.store(pfns, data[: pfns.size])
            set_page_dirty(self.device.mem, pfns)
        return pfns.size

    def _leading(self, addr: int, npages: int, need: Ptes) -> Pfns:
        """The pages from *addr* on, up to the first whose entry lacks the bit *need*."""
        entries = self.table.lookup(np.arange(addr, addr + (npages << PAGE_SHIFT), PAGE_SIZE))
        there = has(entries, need)
        count = npages if every(there) else int(there.argmin())
        return pte_pfn(entries[:count])

    def _fault(self, start: int, end: int, *, write: bool) -> None:
        """Fault [*start*, *end*) in for the device. Linux: dmirror_fault()."""
        if self.mm.exited:
            raise InvalidArgument(f"hmm_dmirror{self.device.number}: {self.mm.name} has exited")
        flags = _REQUEST_WRITE if write else HMM_PFN_REQ_FAULT
        for window in range(start, end, WINDOW):
            stop = min(window + WINDOW, end)
            words = np.zeros((stop - window) >> PAGE_SHIFT, dtype=np.uint64)
            self._range_fault(
                HmmRange(self, 0, window, stop, words, flags, dev_private_owner=self.device)
            )

    def _range_fault(self, hmm_range: HmmRange, *, store: bool = True) -> None:
        """hmm_range_fault() until nobody interferes, then into the table.

        Linux: dmirror_range_fault() and dmirror_range_snapshot().
        """
        for _ in range(MAX_TRIES):
            hmm_range.notifier_seq = mmu_interval_read_begin(self)
            try:
                with self.mm.mmap_sem.read():
                    hmm_range_fault(hmm_range)
            except PageHeld:
                raise
            except Busy:
                cond_resched()
                continue
            with self.mutex:
                if mmu_interval_read_retry(self, hmm_range.notifier_seq):
                    continue
                if store:
                    self._do_fault(hmm_range)
                return
        raise Busy(
            f"hmm_dmirror{self.device.number}: [{hmm_range.start:#x}, {hmm_range.end:#x}) was "
            f"invalidated {MAX_TRIES} times while the device faulted on it"
        )

    def _do_fault(self, hmm_range: HmmRange) -> None:
        """Enter what hmm_range_fault() found. Linux: dmirror_do_fault()."""
        words = hmm_range.hmm_pfns
        addrs = np.arange(hmm_range.start, hmm_range.end, PAGE_SIZE)
        writable = has(words, HMM_PFN_WRITE)
        count = words.size
        if hmm_range.default_flags is _REQUEST_WRITE and not every(writable):
            count = int(writable.argmin())
        self.table.store(addrs[:count], _entries(hmm_pfn_to_pfn(words[:count]), writable[:count]))
        if count < words.size:
            raise SegmentationFault(
                addrs.item(count),
                f"hmm_dmirror{self.device.number}: {addrs.item(count):#x} cannot be stored to",
            )

    def _permissions(self, words: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Linux: dmirror_mkentry()."""
        mem = self.device.mem
        valid, error = has(words, HMM_PFN_VALID), has(words, HMM_PFN_ERROR)
        pfns = np.where(valid, hmm_pfn_to_pfn(words), 0)
        ours = np.zeros(words.size, dtype=np.bool_)
        for chunk in self.device.chunks:
            ours |= mem.zone[pfns] == chunk.zone.index
        private, public = mem.is_device_private_page(pfns), mem.is_device_public_page(pfns)
        perm = np.where(has(words, HMM_PFN_WRITE), PROT_WRITE, PROT_READ)
        perm |= (pfns == mem.zero_pfn) * PROT_ZERO
        perm |= private * np.where(ours, PROT_DEV_PRIVATE_LOCAL, PROT_DEV_PRIVATE_REMOTE)
        perm |= public * np.where(ours, PROT_DEV_COHERENT_LOCAL, PROT_DEV_COHERENT_REMOTE)
        perm[~valid] = PROT_NONE
        perm[error] = PROT_ERROR
        return perm.astype(np.uint8)


def _entries(pfns: Pfns, writable: Mask) -> Ptes:
    """Entries of the mirror's table."""
    return mk_pte(pfns, _PAGE_PRESENT) | writable * _PAGE_RW
