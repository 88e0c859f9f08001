"""Devices with something in between: whoever uses the device finds no difference but what it does.

    gpu = Limited(NumpyDevice(machine, "64MiB"), "16MiB")
    gpu = Counting(Faulty(gpu, copy={"fail_at": 3}))
    gpu.to_device(process, addr, nbytes)

The wrapper that is put on last is asked first. Faults to inject are in devices/faulty.py, a log to
replay in devices/logged.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

from devices.dma_fence import DmaFence
from devices.driver import Driver
from devices.ops import OPTIONAL
from mm.errors import InvalidArgument
from mm.memparse import Size, format_size, memparse
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Indices, Mask, Payload, Pfns


class Wrapper:
    """Passes every call of the table of functions on; derive and change what call() does.

    device: the device itself, below all wrappers; what is no function of the table is looked up
    there. inner: what comes next. As a context manager it is taken off at the end of the block.
    """

    copy_peer: None = None  # it would go past the wrappers of the other device

    def __init__(self, device: Driver | Wrapper) -> None:
        self.device = unwrapped(device)
        self.inner = self.device.ops
        for name in OPTIONAL:
            if getattr(self.inner, name) is None:
                setattr(self, name, None)
        self.device.ops = self

    def __getattr__(self, name: str) -> Any:
        if name == "device":  # not there yet
            raise AttributeError(name)
        return getattr(self.device, name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.inner!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.take_off()

    def take_off(self) -> None:
        """Let the device do without this wrapper, which must be the one put on last."""
        if self.device.ops is not self:
            raise InvalidArgument(
                f"{self.name}: {type(self).__name__} is wrapped by {self.device.ops!r}; take that "
                f"off first"
            )
        self.device.ops = self.inner

    def call(self, op: str, *args: Any) -> Any:
        """What every function of the table comes down to: *op* of what is inside."""
        return getattr(self.inner, op)(*args)

    def allocate(self, npages: int) -> Indices:
        """Up to *npages* free pages."""
        return self.call("allocate", npages)

    def free(self, pages: Indices) -> None:
        """*pages* are not used any more."""
        self.call("free", pages)

    def copy_in(self, pages: Indices, system: Payload, rows: Pfns) -> DmaFence | None:
        """System memory to device memory."""
        return self.call("copy_in", pages, system, rows)

    def copy_out(self, pages: Indices, system: Payload, rows: Pfns) -> Mask | DmaFence | None:
        """Device memory to system memory; what is lost."""
        return self.call("copy_out", pages, system, rows)

    def clear(self, pages: Indices) -> None:
        """Zeros."""
        self.call("clear", pages)

    def prefetch(self, addrs: Addresses, start: int, end: int) -> Addresses:
        """What to bring along with *addrs*."""
        return self.call("prefetch", addrs, start, end)

    def power_off(self) -> None:
        """The device goes."""
        self.call("power_off")


def unwrapped(device: Driver | Wrapper) -> Driver:
    """The device below all wrappers."""
    return device.device if isinstance(device, Wrapper) else device


def pages_of(op: str, args: tuple[Any, ...]) -> int:
    """How many pages a call with *args* is about."""
    if op == "power_off":
        return 0
    return args[0] if op == "allocate" else args[0].size


class Limited(Wrapper):
    """A device of whose memory only *memory* may be in use, as if others used the rest.

    The device evicts to stay below. Raises InvalidArgument for less than a page, or for more than
    the device has.
    """

    def __init__(self, device: Driver | Wrapper, memory: Size) -> None:
        pages = memparse(memory) >> PAGE_SHIFT
        if not 0 < pages <= device.limit:
            raise InvalidArgument(
                f"{device.name}: a limit of {memory!r} is not between a page and the "
                f"{format_size(device.limit * PAGE_SIZE)} that may be used"
            )
        super().__init__(device)
        self.without = self.device.limit
        self.device.limit = pages

    def take_off(self) -> None:
        """Let all of the memory be used again."""
        super().take_off()
        self.device.limit = self.without

    def allocate(self, npages: int) -> Indices:
        """As many as are left below the limit."""
        return self.inner.allocate(max(0, min(npages, self.device.free_pages)))


class Counting(Wrapper):
    """Counts what a device is asked to do.

    calls, pages: by the name of the function; failed: calls that raised; in_use, peak: pages that
    are allocated, and the most that ever were.
    """

    def __init__(self, device: Driver | Wrapper) -> None:
        self.calls: Counter[str] = Counter()
        self.pages: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        super().__init__(device)
        self.in_use = self.peak = self.device.npages - self.device.chunks.free_pages

    def call(self, op: str, *args: Any) -> Any:
        """Count, whatever comes of it."""
        self.calls[op] += 1
        try:
            result = super().call(op, *args)
        except BaseException:
            self.failed[op] += 1
            raise
        npages = result.size if op == "allocate" else pages_of(op, args)
        if isinstance(result, DmaFence):
            result.watch(lambda _, error: self._ended(op, npages, error))
            return result
        self.pages[op] += npages
        self.in_use += npages * ((op == "allocate") - (op == "free"))
        self.peak = max(self.peak, self.in_use)
        return result

    def _ended(self, op: str, npages: int, error: BaseException | None) -> None:
        """A copy that was under way is done, or has failed."""
        if error is None:
            self.pages[op] += npages
        else:
            self.failed[op] += 1
