"""Copies under way: a fence that signals when one is done. Linux: drivers/dma-buf/dma-fence.c."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mm.errors import TimedOut
from mm.locking import Locks
from mm.typing import Mask


class DmaFence:
    """What copy_in() and copy_out() may answer with: the copy is under way, wait() for it.

    what: names the copy. Until wait() has returned, both sides of the copy belong to the device.
    Linux: struct dma_fence.
    """

    def __init__(self, what: str, locks: Locks | None = None) -> None:
        self.what = what
        self._locks = locks or Locks()
        self._signaled = False
        self._lost: Mask | None = None
        self._error: BaseException | None = None
        self._watchers: list[Callable[[Mask | None, BaseException | None], None]] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.what}>"

    def is_signaled(self) -> bool:
        """True when the copy is done, or has failed. Linux: dma_fence_is_signaled()."""
        return self._signaled

    def signal(self, lost: Mask | None = None, error: BaseException | None = None) -> None:
        """The copy is done, with the answer of a copy_out(); or *error* is why it is not.

        Only the first call says so. Linux: dma_fence_signal(), dma_fence_set_error().
        """
        with self._locks.atomic:
            if not self._signaled:
                self._lost, self._error = lost, error
                self._signaled = True
                self._locks.wake_up()

    def run(self, copy: Callable[[], Mask | None]) -> None:
        """Copy, and signal whatever comes of it."""
        try:
            lost = copy()
        except BaseException as error:  # noqa: BLE001 - wait() raises it
            self.signal(error=error)
        else:
            self.signal(lost)

    def wait(self, timeout: float) -> Mask | None:
        """Sleep until the copy is done; what copy_out() says of lost pages.

        Raises what made it fail; TimedOut where it is not done after *timeout* seconds.
        Linux: dma_fence_wait_timeout().
        """
        lost, error = None, None
        if self.is_signaled() or self._sleep(timeout):
            lost, error = self._answer()
        else:
            error = TimedOut(
                f"{self.what} is not done after {timeout:g} s: the device hangs; its pages stay "
                f"out of use until the copy ends"
            )
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher(lost, error)
        if error is not None:
            raise error
        return lost

    def watch(self, watcher: Callable[[Mask | None, BaseException | None], None]) -> None:
        """Have *watcher* called with what came of it, once, by who waits.

        Linux: dma_fence_add_callback().
        """
        self._watchers.append(watcher)

    def _sleep(self, timeout: float) -> bool:
        return self._locks.wait_until(self.is_signaled, self.what, timeout)

    def _answer(self) -> tuple[Mask | None, BaseException | None]:
        return self._lost, self._error


class DmaFenceArray(DmaFence):
    """One fence for the parts of a copy, none of which loses anything: it signals with the last.

    Linux: struct dma_fence_array, drivers/dma-buf/dma-fence-array.c.
    """

    def __init__(self, what: str, parts: Sequence[DmaFence]) -> None:
        super().__init__(what)
        self._parts = parts

    def is_signaled(self) -> bool:
        """True when every part is done, or has failed."""
        return all(part.is_signaled() for part in self._parts)

    def _sleep(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        return all(
            part.is_signaled() or part._sleep(max(0.0, end - time.monotonic()))
            for part in self._parts
        )

    def _answer(self) -> tuple[Mask | None, BaseException | None]:
        errors = (part._answer()[1] for part in self._parts)
        return None, next((error for error in errors if error is not None), None)


def answer_of(answer: Mask | DmaFence | None, timeout: float) -> Mask | None:
    """What a copy says of lost pages, once it is done. Raises as DmaFence.wait() does."""
    return answer.wait(timeout) if isinstance(answer, DmaFence) else answer
