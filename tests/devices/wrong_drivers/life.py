"""Drivers that go wrong when somebody uses their memory, or when somebody goes."""

import numpy as np

from devices import NumpyDevice
from hmm.device_pgtable import DevicePageTable
from mm.highmem import reserve_payload
from mm.pgtable import pte_offset, pte_pfn, pte_present
from mm.swap import get_page
from mm.types import VmFault


class RefusesStores(NumpyDevice):
    """Brings pages back for loads only."""

    breaks, evidence = "cpu-access", "BusError: .*the page at 0x.* are lost"

    def page_fault(self, vma, addrs, pfns, *, write):
        if write:
            return VmFault.SIGBUS
        return super().page_fault(vma, addrs, pfns, write=write)


class ServesInVain(NumpyDevice):
    """Says that a fault is served, and leaves the page where it is."""

    breaks, evidence = "cpu-access", "KernelBug: .*is served in vain"

    def page_fault(self, vma, addrs, pfns, *, write):
        return VmFault(0)


class ComputesOnACopy(NumpyDevice):
    """Stores to a copy of its memory."""

    breaks, evidence = "device-access", "after its own stores: page 0, byte 9 is"

    def _sides(self, pfns):
        return [(memory.copy(), which, rows) for memory, which, rows in super()._sides(pfns)]


class LosesBits(NumpyDevice):
    """Loads odd words as even ones."""

    breaks, evidence = "exchange", "[0-9]+ of 300 words that were loaded are not what was there"

    def exchange(self, process, addrs, words, write):
        return super().exchange(process, addrs, words, write) // 2 * 2


class ForgetsTheResult(NumpyDevice):
    """Computes, and stores the result where it was not asked to."""

    breaks, evidence = "run", "2999 of 3000 results are wrong"

    def run(self, kernel, *arrays, out=None):
        super().run(kernel, *arrays)


class KeepsPagesInQuarantine(NumpyDevice):
    """Frees pages later, as if they were still in use."""

    breaks, evidence = "munmap", "6 of 16 pages were unmapped, 0 are free"
    waiting = ()

    def page_free(self, pfns):
        self.waiting = (*self.waiting, pfns)
        if len(self.waiting) > 4:
            super().page_free(np.sort(np.concatenate(self.waiting)))
            self.waiting = ()


class DropsWhatItEvicts(NumpyDevice):
    """Makes room without a copy."""

    breaks, evidence = "eviction", "CPU, after six windows of 40 pages"
    dropping = False
    engines = 0

    def make_room(self, npages):
        self.dropping = npages == 40
        super().make_room(npages)
        self.dropping = False

    def copy_out(self, pages, system, rows):
        if not self.dropping:
            super().copy_out(pages, system, rows)


class TakesOneProcessForTheOther(NumpyDevice):
    """Has a TLB without the numbers of address spaces: who came first is asked for an address."""

    breaks, evidence = "fork", "after stores of the device: page [1234], byte 0"

    def readinto(self, process, addr, buffer):
        self.seen = getattr(self, "seen", {})
        super().readinto(self.seen.setdefault(addr, process), addr, buffer)


class ForgottenTable(DevicePageTable):
    """Stays when the process goes."""

    def release(self, mm):
        """Nothing."""


class LeaksTables(NumpyDevice):
    """Never frees a page table."""

    breaks, evidence = "exit", "no process is left, and [0-9]+ pages of page tables are"

    def table_of(self, mm):
        if mm not in self.tables:
            self.tables[mm] = ForgottenTable(mm, self.owner)
        return self.tables[mm]


class PowersOffFirst(NumpyDevice):
    """Goes before its pages have."""

    breaks, evidence = "removal", r"train, after close\(\): page 0, byte . is 0x00"

    def close(self):
        if not self.closed:
            self.memory[:] = 0
        super().close()


class SharesItsMemory(NumpyDevice):
    """All devices of this class are one."""

    breaks, evidence = "two-devices", "the first device's pages: page 0"
    shared = reserve_payload(4096)
    engines = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.memory is not None:
            self.memory = self.shared[: self.npages]


class KnowsOneMemory(NumpyDevice):
    """Takes every row for one of the machine's memory, also those of a buffer."""

    breaks, evidence = "between", "moved to another device: page 1, byte"
    engines = 0

    def copy_in(self, pages, system, rows):
        super().copy_in(pages, self.mem.payload, rows)


class NeedsContents(NumpyDevice):
    """Wipes pages that it gives, which not every machine has."""

    breaks, evidence = "no-contents", "TypeError: 'NoneType' object"

    def allocate(self, npages):
        pages = super().allocate(npages)
        self.memory[pages] = 0
        return pages


class KeepsAReference(NumpyDevice):
    """Holds the frame that it brought a page back to, for ever."""

    breaks, evidence = "leaks", "refcount: .*rules of docs/data-model.md are broken"

    def page_fault(self, vma, addrs, pfns, *, write):
        fault = super().page_fault(vma, addrs, pfns, write=write)
        pool = self.mem.tables
        ptes = pool.entries[pte_offset(pool, vma.vm_mm.pgd, addrs)]
        get_page(self.mem, pte_pfn(ptes[pte_present(ptes)])[:1])
        return fault
