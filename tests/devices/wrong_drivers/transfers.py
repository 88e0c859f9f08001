"""Drivers that move the wrong pages, or do the wrong thing when something fails."""

from contextlib import suppress

import numpy as np

from devices import NumpyDevice
from devices.memory import Direction
from devices.ops import DeviceError
from hmm import MIGRATE_PFN_ERROR, MIGRATE_PFN_MIGRATE, migrate_pfn_to_pfn
from hmm.migrate_pfn import is_migrating, is_valid
from mm import PAGE_SIZE, OutOfMemory


class TakesEveryOtherPage(NumpyDevice):
    """Leaves pages behind for which it has room."""

    breaks, evidence = "willing", "20 of 40 pages went to the device; .*'not_chosen': 20"

    def _copy_to_device(self, mm, src, dst):
        half = src.copy()
        half[::2] &= ~MIGRATE_PFN_MIGRATE
        super()._copy_to_device(mm, half, dst)


class KeepsPages(NumpyDevice):
    """Brings back what is in the way, and nothing on request."""

    breaks, evidence = "willing", "0 of 40 pages came back"

    def to_system(self, process, addr, nbytes):
        return super().to_system(process, addr, 1) if nbytes == PAGE_SIZE else self.evict(NONE)


NONE = np.empty(0, dtype=np.int64)


class RoundsItsMemory(NumpyDevice):
    """Has memory in pieces of 64 KiB."""

    breaks, evidence = "sizes", "opened with 1 pages, it says that it has 16"

    def __init__(self, machine, memory="64MiB", kind="private", **options):
        if isinstance(memory, int):
            memory = -(-memory // (64 << 10)) * (64 << 10)
        super().__init__(machine, memory, kind, **options)


class ForgetsThePartialPage(NumpyDevice):
    """Rounds the end of a range down."""

    breaks, evidence = "odd-ranges", "bytes 0 to 1 are on 1 pages, 0 moved"

    def to_device(self, process, addr, nbytes):
        start, end = addr & ~(PAGE_SIZE - 1), (addr + nbytes) & ~(PAGE_SIZE - 1)
        if end <= start:
            return self.evict(NONE)
        return super().to_device(process, start, end - start)


class ShiftsAroundHoles(NumpyDevice):
    """Copies the pages of a range to its pages in a row, as if there were no holes."""

    breaks, evidence = "contents", "after 1 pages|after .* pages moved there and back"

    def _copy_to_device(self, mm, src, dst):
        super()._copy_to_device(mm, src, dst)
        given = is_valid(dst) & is_migrating(src)
        full = given & is_valid(src)
        if self.memory is not None and full.sum() < given.sum() > 8:
            pages = migrate_pfn_to_pfn(dst[given])[: full.sum()] - self.zone.start_pfn
            self.memory[pages] = self.mem.payload[migrate_pfn_to_pfn(src[full])]


class ShowsWhatWasThere(NumpyDevice):
    """Clears pages, but not those of untouched memory."""

    breaks, evidence = "holes", "never touched, from the device: page 0, byte . is"

    def _clear(self, pages):
        """Nothing."""


class RaisesWhenShort(NumpyDevice):
    """Wants all or nothing."""

    breaks, evidence = "partial", "OutOfMemory: 10 pages are missing"

    def _copy_to_device(self, mm, src, dst):
        super()._copy_to_device(mm, src, dst)
        missing = np.count_nonzero(is_migrating(src) & ~is_valid(dst))
        if missing == 10:
            raise OutOfMemory(f"{missing} pages are missing")


class GivesUpWithoutAFrame(NumpyDevice):
    """Takes a page for lost that finds no frame in system memory."""

    breaks, evidence = "no-frames", "BusError: .*are lost"

    def _copy_to_system(self, vma, start, src, dst):
        super()._copy_to_system(vma, start, src, dst)
        dst[is_migrating(src) & is_valid(src) & (dst == 0)] = MIGRATE_PFN_ERROR


class SwallowsErrors(NumpyDevice):
    """Goes on when a copy fails."""

    breaks, evidence = "failing-copy", r"copy_in failed \(raise\), and nobody heard of it"

    def _copy_to_device(self, mm, src, dst):
        with suppress(DeviceError):
            super()._copy_to_device(mm, src, dst)


class HandsOverJunk(NumpyDevice):
    """Brings lost pages back, whatever is in them."""

    breaks, evidence = "lost-pages", "page 2 is lost, and a CPU reads"

    def give_up(self, dst, entries):
        """Nothing."""


class MapsWhatStayed(NumpyDevice):
    """Maps all copies, also of pages that were refused."""

    breaks, evidence = "late-refusal", "3 entries of the device's page table are stale"

    def finalize_and_map(self, vma, src, dst, start, end, private):
        super().finalize_and_map(vma, src, dst, start, end, private)
        given = np.flatnonzero(is_valid(dst) & ~is_migrating(src))
        if private is Direction.TO_DEVICE and given.size:
            with vma.vm_mm.page_table_lock:
                pfns, writable = migrate_pfn_to_pfn(dst[given]), np.ones(given.size, dtype=np.bool_)
                self.table_of(vma.vm_mm).map(start + given * PAGE_SIZE, pfns, writable)
