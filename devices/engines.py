"""Copy engines: threads that copy while the one that asked goes on.

NumPy lets others run while it copies, so a copy here and bookkeeping there take two cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from devices.dma_fence import DmaFence
from mm.locking import Locks, kthread_run, taking_turns
from mm.typing import Mask

IDLE_SECONDS: Final = 0.5  # after which an engine that nobody needs ends its thread


class CopyEngines:
    """Up to *count* threads, each with one copy under way; the others wait in order.

    Who waits for a copy that no engine has begun does it: nobody sleeps for an engine to wake up,
    and the core of the one who waits copies too.

    Where threads take turns (`mm.locking.taking_turns`) a copy is done at once, so that schedules
    can be repeated.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.count = count
        self.locks = Locks()  # of their own: nobody else is woken up when a copy ends
        self.threads = 0
        self._idle = 0
        self._queue: deque[_Job] = deque()

    def submit(self, copy: Callable[[], Mask | None], what: str) -> DmaFence:
        """Have *copy* called by an engine; its fence."""
        job = _Job(self, copy, what)
        if taking_turns():
            job.do()
            return job
        with self.locks.atomic:
            self._queue.append(job)
            if self._idle < len(self._queue) and self.threads < self.count:
                self._start()
            else:
                self.locks.wake_up()
        return job

    def take_back(self, job: _Job) -> bool:
        """True where no engine has begun *job*, and now none will."""
        with self.locks.atomic:
            if job not in self._queue:
                return False
            self._queue.remove(job)
            return True

    def _start(self) -> None:
        """Begin another thread; where the host has none, who waits will copy."""
        with suppress(RuntimeError):
            kthread_run(self._work, f"{self.name}-engine")
            self.threads += 1

    def _work(self) -> None:
        """An engine's life."""
        while (job := self._next()) is not None:
            job.do()
            del job  # it holds the memory of a machine

    def _next(self) -> _Job | None:
        """The next copy; None after a while without one."""
        with self.locks.atomic:
            self._idle += 1
            there = self.locks.idle_until(lambda: bool(self._queue), IDLE_SECONDS)
            self._idle -= 1
            if there:
                return self._queue.popleft()
            self.threads -= 1
            return None


class _Job(DmaFence):
    """The fence of a copy that an engine does, or who waits for it."""

    def __init__(self, engines: CopyEngines, copy: Callable[[], Mask | None], what: str) -> None:
        super().__init__(what, engines.locks)
        self._engines = engines
        self._copy: Callable[[], Mask | None] | None = copy

    def do(self) -> None:
        """Copy, and signal."""
        copy, self._copy = self._copy, None  # it holds the memory of a machine
        assert copy is not None
        self.run(copy)

    def _sleep(self, timeout: float) -> bool:
        if self._engines.take_back(self):
            self.do()
            return True
        return super()._sleep(timeout)
