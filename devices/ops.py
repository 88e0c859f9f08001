"""What a device can do: the table of functions that a driver fills, and that wrappers wrap.

Everything above asks `device.ops`, which is the driver itself until somebody puts a wrapper in
between (devices/wrappers.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, Protocol

from devices.dma_fence import DmaFence
from mm.errors import MmError
from mm.typing import Addresses, Indices, Mask, Payload, Pfns

OPTIONAL: Final = ("clear", "prefetch", "power_off")


class DeviceError(MmError):
    """EIO: a device failed at what it was asked to do. What was there before is there still."""

    code = errno.EIO


class DeviceOps(Protocol):
    """Four functions that every device has, and some that it has or has not: then they are None.

    Pages are numbers from 0 within the device. No vector is ever empty, no page in it is there
    twice, and none is in any order, unless a function says so.
    """

    def allocate(self, npages: int) -> Indices:
        """Up to *npages* free pages; fewer, or none, when the device is full.

        Nobody else may do anything meanwhile, so it does not wait.
        """

    def free(self, pages: Indices) -> None:
        """*pages* are not used any more. It does not wait either."""

    def copy_in(self, pages: Indices, system: Payload, rows: Pfns) -> DmaFence | None:
        """Copy row rows[i] of *system*, uint8[n, 4096], to device page pages[i].

        *system* is the machine's memory, or a buffer on the way to another device. Returns None
        when it is done, or a fence that signals when it is; until then both sides stay as they are.
        """

    def copy_out(self, pages: Indices, system: Payload, rows: Pfns) -> Mask | DmaFence | None:
        """Copy device page pages[i] to row rows[i] of *system*.

        Returns None, or True for pages whose contents are lost for good; or a fence with that.
        """

    @property
    def clear(self) -> Callable[[Indices], None] | None:
        """clear(pages): fill *pages* with zeros. Without it, the zero page is copied in."""

    @property
    def copy_peer(self) -> Callable[[Indices, DeviceOps, Indices], Mask | DmaFence | None] | None:
        """copy_peer(pages, peer, theirs): copy page pages[i] to page theirs[i] of *peer*.

        For two devices of one class; else, and where a wrapper is between, the way is copy_out()
        into a buffer and copy_in() from there. Returns as copy_out() does.
        """

    @property
    def prefetch(self) -> Callable[[Addresses, int, int], Addresses] | None:
        """prefetch(addrs, start, end): faults at page addresses *addrs*; what to bring as well.

        [start, end) is memory of one kind within 2 MiB. What lies outside it, or finds no free
        memory, does not come.
        """

    @property
    def power_off(self) -> Callable[[], None] | None:
        """power_off(): the device is empty and goes. Called once, by close()."""
