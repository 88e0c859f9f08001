"""Watches in which order one thread takes locks. Linux: kernel/locking/lockdep.c, in spirit.

Two threads that take two locks in different order may wait for one another some day. This finds it
in a run where nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from mm.errors import Deadlock
from mm.locking import current, install_scheduler
from mm.types import MemMap


class LockOrder:
    """The `Scheduler` of mm/locking.py for one thread; what was wrong is in `complaints`.

    seen: how often one was taken or given back.
    """

    def __init__(self, mem: MemMap) -> None:
        self.mem = mem
        self.complaints: list[str] = []
        self.seen = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at every lock that the block takes; a Deadlock is a complaint too."""
        install_scheduler(self)
        try:
            yield
        except Deadlock as error:
            self.complaints.append(error.strerror or str(error))
        finally:
            install_scheduler(None)

    def preempt(self, point: str) -> None:
        """*point* is the name of the lock that is about to be taken, or was just given back.

        Page tables' locks may nest: fork() takes the child's inside the parent's.
        """
        me = current()
        for mm in tuple(self.mem.mms):
            lock = mm.page_table_lock
            if lock.holder == me and point.startswith(("mmap_sem", "anon_vma")):
                self.complaints.append(
                    f"{point} is taken by a thread that holds {lock.name}, which comes after it"
                )
            if point == mm.mmap_sem.name:
                self._check_page_locks(point, held=mm.mmap_sem.held())
        self.seen += 1

    def _check_page_locks(self, point: str, *, held: bool) -> None:
        """A page lock comes after mmap_sem; who has that already may take it again to read."""
        if not held and np.any(self.mem.lock_owner == current()):
            self.complaints.append(
                f"{point} is taken by a thread that holds a page lock, which comes after it"
            )

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """There is nobody to wait for."""
        if not ready():
            raise Deadlock(f"{what} is held, and no other thread is there to give it back")
