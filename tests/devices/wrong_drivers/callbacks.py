"""Drivers that break the contract of the two callbacks, or take locks as they may not."""

import numpy as np

from devices import NumpyDevice
from devices.memory import Direction
from hmm import MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, migrate_pfn_to_pfn
from mm.filemap import lock_page, unlock_page
from mm.swap import get_page


def named(dst):
    """Places of *dst* that name a page."""
    return np.flatnonzero(dst & MIGRATE_PFN_VALID)


class AllocAndCopy(NumpyDevice):
    """Does something to the vectors once alloc_and_copy() is done."""

    def alloc_and_copy(self, vma, src, dst, start, end, private):
        super().alloc_and_copy(vma, src, dst, start, end, private)
        self.spoil(src, dst)


class ChangesSrc(AllocAndCopy):
    """Takes a page off the list by itself."""

    breaks, evidence = "alloc-and-copy", "changed src, which it may only read"

    def spoil(self, src, dst):
        src[0] &= ~MIGRATE_PFN_MIGRATE


class UnlocksTooEarly(AllocAndCopy):
    """Is done with its pages before the migration is."""

    breaks, evidence = "alloc-and-copy", "the destination page is not locked"

    def spoil(self, src, dst):
        unlock_page(self.mem, migrate_pfn_to_pfn(dst[named(dst)]))


class ForgetsTheValidBit(AllocAndCopy):
    """Names pages by their PFN alone."""

    breaks, evidence = "alloc-and-copy", "dst names a page without MIGRATE_PFN_VALID"

    def spoil(self, src, dst):
        dst &= ~MIGRATE_PFN_VALID


class NamesAPageTwice(AllocAndCopy):
    """Gives one page to two."""

    breaks, evidence = "alloc-and-copy", "the destination page is given twice"

    def spoil(self, src, dst):
        where = named(dst)
        dst[where[1:2]] = dst[where[0]]


class TakesAPageForItself(AllocAndCopy):
    """Allocates one page more than it hands over."""

    breaks, evidence = "alloc-and-copy", "took 1 pages that dst does not name"

    def spoil(self, src, dst):
        pages = self.allocate(1)
        self.chunks.take(pages)
        get_page(self.mem, self.zone.start_pfn + pages)


class HoldsItsPages(AllocAndCopy):
    """Takes a reference too many."""

    breaks, evidence = "alloc-and-copy", "the destination page is free or in use"

    def spoil(self, src, dst):
        get_page(self.mem, migrate_pfn_to_pfn(dst[named(dst)[:1]]))


class ChangesDst(NumpyDevice):
    """Strikes off what it has mapped."""

    breaks, evidence = "finalize-and-map", r"finalize_and_map\(\) changed src or dst"

    def finalize_and_map(self, vma, src, dst, start, end, private):
        super().finalize_and_map(vma, src, dst, start, end, private)
        dst[:] = 0


class TakesLocksInside(NumpyDevice):
    """Asks for mmap_sem under the lock of a page table."""

    breaks = "lock-order"
    evidence = "mmap_sem of train is taken by a thread that holds page_table_lock of train"

    def copy_in(self, pages, system, rows):
        for mm in self.tables:
            with mm.page_table_lock, mm.mmap_sem.read():
                pass
        return super().copy_in(pages, system, rows)


class LooksAtEverybody(NumpyDevice):
    """Asks for the mmap_sem of processes that it does not work for, with pages locked."""

    breaks, evidence = "lock-order", "mmap_sem of train is taken by a thread that holds a page lock"
    engines = 0

    def copy_out(self, pages, system, rows):
        for mm in self.tables:
            with mm.mmap_sem.read():
                pass
        return super().copy_out(pages, system, rows)


class WaitsForItself(NumpyDevice):
    """Locks the page that it copies, which is locked already."""

    breaks, evidence = "lock-order", "is locked by the thread that waits for it"

    def alloc_and_copy(self, vma, src, dst, start, end, private):
        super().alloc_and_copy(vma, src, dst, start, end, private)
        if private is Direction.TO_SYSTEM:
            lock_page(self.mem, migrate_pfn_to_pfn(dst[named(dst)]))
