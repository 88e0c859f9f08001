"""What a replay asks of a device. The drivers answer; their package is never imported here."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mm.machine import Machine
from mm.memparse import Size
from mm.process import Process
from mm.typing import PAGE_SIZE, Addresses, Mask

Words = NDArray[np.uint64]  # 64-bit words of memory


class DeviceStats(Protocol):
    """What a device has counted since it was opened."""

    @property
    def device_faults(self) -> int:
        """Pages that the device touched and lacked."""

    @property
    def fault_batches(self) -> int:
        """Times that it stopped to have such pages brought."""

    @property
    def pages_to_device(self) -> int:
        """Pages migrated to it."""

    @property
    def pages_to_system(self) -> int:
        """Pages migrated back, for whatever reason."""

    @property
    def evicted_pages(self) -> int:
        """Those of them that had to make room."""

    @property
    def bytes_to_device(self) -> int:
        """Bytes copied to it."""

    @property
    def bytes_to_system(self) -> int:
        """Bytes copied back."""


class Device(Protocol):
    """An open device, with memory of its own and a page table per process."""

    @property
    def name(self) -> str:
        """As it was asked for, with a number."""

    @property
    def npages(self) -> int:
        """Size of its memory."""

    @property
    def chunk_pages(self) -> int:
        """Pages that one eviction takes at most."""

    @property
    def stats(self) -> DeviceStats:
        """Its counters."""

    def resident(self, process: Process, addrs: Addresses, write: Mask) -> Mask:
        """True where its page table answers the access at byte address *addrs[i]*, bool[n]."""

    def exchange(self, process: Process, addrs: Addresses, words: Words, write: Mask) -> Words:
        """Load the word at every address, then store *words[i]* where *write[i]*, uint64[n].

        *addrs* are distinct and multiples of 8. Pages that it lacks are one batch of faults.
        """

    def close(self) -> None:
        """Bring everything back and give the memory up."""


class OpenDevice(Protocol):
    """A driver's class: called, it opens a device on a machine."""

    def __call__(
        self,
        machine: Machine,
        memory: Size,
        *,
        chunk: Size | None = None,
        neighbours: Size = PAGE_SIZE,
    ) -> Device:
        """Open with *memory* bytes.

        chunk: what a full device evicts at a time; None lets the driver choose. neighbours: how
        much to bring back around a page that a CPU touches. Raises InvalidArgument for sizes that
        it cannot have.
        """
