"""Drivers whose copies go on after they have returned, and go wrong there.

Only those of 1024 pages and more, as with many devices: nobody else sees it.
"""

from devices import NumpyDevice
from devices.dma_fence import DmaFence
from mm.highmem import copy_highpages

LARGE = 1024


class Hangs(NumpyDevice):
    """Begins a large copy and never ends it."""

    breaks, evidence = "completion", "hangs0: copy_in of 2048 pages is not done after 0.05 s"
    timeout = 0.05

    def copy_in(self, pages, system, rows):
        if pages.size < LARGE:
            return super().copy_in(pages, system, rows)
        return DmaFence(f"hangs0: copy_in of {pages.size} pages")


class SaysDoneAndIsNot(NumpyDevice):
    """Has a fence that nobody needs to signal."""

    breaks, evidence = "completion", "wait.. has returned, and .* has not signaled"

    def copy_out(self, pages, system, rows):
        if pages.size < LARGE:
            return super().copy_out(pages, system, rows)
        return _NoFence("a copy")


class _NoFence(DmaFence):
    def wait(self, timeout):
        """At once."""


class SignalsEarly(NumpyDevice):
    """Signals when the copy has begun; the second half comes with the next one."""

    breaks, evidence = "not-early", "frames, when the copy out had signaled: page 1024, byte"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rest = None

    def copy_in(self, pages, system, rows):
        if pages.size < 2 * LARGE:
            return super().copy_in(pages, system, rows)
        half = pages.size // 2
        copy_highpages(self.memory, pages[:half], system, rows[:half])
        self.rest = (self.memory, pages[half:], system, rows[half:])
        fence = DmaFence("half a copy")
        fence.signal()
        return fence

    def copy_out(self, pages, system, rows):
        if self.rest is not None:
            copy_highpages(*self.rest)
            self.rest = None
        return super().copy_out(pages, system, rows)


class HasOneStagingBuffer(NumpyDevice):
    """Gathers into a buffer, from which the copy goes on; and has one of it."""

    breaks, evidence = "together", "pages copied out while others came in: page 0, byte"

    def copy_in(self, pages, system, rows):
        if pages.size < LARGE:
            return super().copy_in(pages, system, rows)
        self.staging = system[rows]
        return _FromStaging(self, pages)


class _FromStaging(DmaFence):
    def __init__(self, device, pages):
        super().__init__("a staged copy")
        self.device, self.pages = device, pages

    def _sleep(self, timeout):
        self.device.memory[self.pages] = self.device.staging
        self.signal()
        return True
