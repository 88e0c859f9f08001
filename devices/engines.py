"""Copy engines: threads that copy while the one that asked goes on.

NumPy lets others run while it copies, so a copy here and bookkeeping there take two cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from devices.dma_fence import DmaFence
from mm.locking import Locks, kthread_run, taking_turns
from mm.typing import Mask

IDLE_SECONDS: Final = 0.5  # after which an engine that nobody needs ends its thread


class CopyEngines:
    """Up to *count* threads, each with one copy under way; the others wait in order.

    Where threads take turns (`mm.locking.taking_turns`) a copy is done at once, so that schedules
    can be repeated.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.count = count
        self.locks = Locks()  # of their own: nobody else is woken up when a copy ends
        self.threads = 0
        self._idle = 0
        self._queue: deque[tuple[Callable[[], Mask | None], DmaFence]] = deque()

    def submit(self, copy: Callable[[], Mask | None], what: str) -> DmaFence:
        """Have *copy* called by an engine; its fence."""
        fence = DmaFence(what, self.locks)
        if taking_turns():
            fence.run(copy)
            return fence
        with self.locks.atomic:
            self._queue.append((copy, fence))
            if self._idle >= len(self._queue) or self.threads == self.count or not self._start():
                self.locks.wake_up()
            if not self.threads:  # the host has no thread for us
                self._queue.pop()
                fence.run(copy)
        return fence

    def _start(self) -> bool:
        """Begin another thread; False where there can be none."""
        try:
            kthread_run(self._work, f"{self.name}-engine")
        except RuntimeError:
            return False
        self.threads += 1
        return True

    def _work(self) -> None:
        """An engine's life."""
        while (job := self._next()) is not None:
            copy, fence = job
            fence.run(copy)
            del copy, fence, job  # they hold the memory of a machine

    def _next(self) -> tuple[Callable[[], Mask | None], DmaFence] | None:
        """The next copy; None after a while without one."""
        with self.locks.atomic:
            self._idle += 1
            there = self.locks.idle_until(lambda: bool(self._queue), IDLE_SECONDS)
            self._idle -= 1
            if there:
                return self._queue.popleft()
            self.threads -= 1
            return None
