"""Copies of a migration that are under way, and pages that a device which hangs does not let go of.

The driver's half of hmm/migrate_pieces.py: between alloc_and_copy() and the next stage.
"""

from __future__ import annotations

from typing import Protocol

from devices.dma_fence import DmaFence
from hmm.migrate_pfn import MigratePfns, migrate_pfn_to_pfn
from mm.errors import Busy
from mm.filemap import unlock_page
from mm.gup import Pin
from mm.types import MemMap
from mm.typing import Indices
from mm.vectors import some


class _Device(Protocol):
    mem: MemMap
    timeout: float
    stranded: Stranded

    def give_up(self, dst: MigratePfns, entries: Indices) -> None:
        """The contents of *entries* are lost."""


class InFlight:
    """A copy to the pages that *dst* names for *entries*; call it to wait for the copy."""

    __slots__ = ("_device", "_dst", "_entries", "_fence")

    def __init__(
        self, device: _Device, fence: DmaFence, dst: MigratePfns, entries: Indices
    ) -> None:
        self._device = device
        self._fence = fence
        self._dst = dst
        self._entries = entries

    def __call__(self) -> None:
        """Sleep until it is done; give up what was lost. Raises what the fence does."""
        device = self._device
        try:
            lost = self._fence.wait(device.timeout)
        except BaseException:
            if not self._fence.is_signaled():
                device.stranded.add(self._fence, self._dst, self._entries)
            raise
        if lost is not None and some(lost):
            device.give_up(self._dst, self._entries[lost])


class Stranded:
    """Pages that a copy may still write to, though nobody waits for it any more.

    They are nobody's until its fence signals. Each such copy is a pin, so that verify() knows of
    them.
    """

    def __init__(self, mem: MemMap) -> None:
        self.mem = mem
        self._copies: list[tuple[DmaFence, Pin]] = []

    def __len__(self) -> int:
        return len(self._copies)

    def add(self, fence: DmaFence, dst: MigratePfns, entries: Indices) -> None:
        """Take the pages that *dst* names for *entries* away from their migration."""
        pin = Pin(self.mem)
        pin.pfns = migrate_pfn_to_pfn(dst[entries])  # with the reference that the migration had
        dst[entries] = 0
        unlock_page(self.mem, pin.pfns)
        with self.mem.locks.atomic:
            self._copies.append((fence, pin))

    def reap(self) -> None:
        """Let go of the pages of copies that have ended after all."""
        with self.mem.locks.atomic:  # two threads that look at once let go of each once
            copies, self._copies = self._copies, []
            for fence, pin in copies:
                if fence.is_signaled():
                    pin.release(dirty=False)
                else:
                    self._copies.append((fence, pin))

    def check_none(self, name: str) -> None:
        """Raise Busy where a copy of the device *name* is under way still."""
        if self._copies:
            raise Busy(
                f"{name}: {len(self)} copies are under way still, the first is "
                f"{self._copies[0][0].what}; close it when they have ended"
            )
