"""A driver of one's own, as docs/writing-a-driver.md builds it."""

import numpy as np

from devices import Driver
from mm import PAGE_SIZE
from mm.highmem import copy_highpages

BLOCK = 16 * PAGE_SIZE  # what a fault brings at once


class MyDriver(Driver):
    """A device whose memory is a NumPy array, and which faults 64 KiB at a time."""

    def __init__(self, machine, memory="64MiB", kind="private", **options):
        super().__init__(machine, memory, kind, **options)
        self.is_free = np.ones(self.npages, dtype=np.bool_)
        if machine.mem.payload is not None:
            self.memory = np.zeros((self.npages, PAGE_SIZE), dtype=np.uint8)

    def allocate(self, npages):
        pages = np.flatnonzero(self.is_free)[:npages]
        self.is_free[pages] = False
        return pages

    def free(self, pages):
        self.is_free[pages] = True

    def copy_in(self, pages, system, rows):
        copy_highpages(self.memory, pages, system, rows)

    def copy_out(self, pages, system, rows):
        copy_highpages(system, rows, self.memory, pages)

    def clear(self, pages):
        self.memory[pages] = 0

    def prefetch(self, addrs, start, end):
        blocks = np.unique(addrs // BLOCK) * BLOCK
        return (blocks[:, np.newaxis] + np.arange(0, BLOCK, PAGE_SIZE)).reshape(-1)

    def power_off(self):
        self.memory = None
