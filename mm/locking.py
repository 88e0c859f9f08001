"""All waiting happens here, and every place where another thread may come in between.

Order of the locks, outermost first, as in the kernel:

    mmap_sem            RwSemaphore   one per mm; held for read in faults and migrations
      page lock         PG_locked     mm/filemap.py, bits with this file's waiting behind them
        anon_vma lock   RwSemaphore   one per tree of anon_vmas
          page table    SpinLock      one per mm
            atomic      Locks.atomic  the short section that stands for atomic instructions

A thread that would wait for itself gets a `Deadlock` that says for what. By default threads are
those of the interpreter. A test may install a scheduler, which is then asked at every named
preemption point who goes on, and so can try interleavings one by one.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from mm.errors import Deadlock

NOBODY: Final = 0
TICKS: Final = 100  # looks that a wait of a tenth of a second takes at what it waits for
_TURNS: Final = 10  # the same in turns of a scheduler


class Scheduler(Protocol):
    """Decides who runs, in place of the interpreter."""

    def preempt(self, point: str) -> None:
        """The running thread is at *point*; another one may go first."""

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Let others run until *ready*() holds; called with no lock of this file held."""


_scheduler: Scheduler | None = None


def install_scheduler(scheduler: Scheduler | None) -> None:
    """Hand every preemption point to *scheduler*; None gives them back to the interpreter."""
    global _scheduler  # noqa: PLW0603 - one scheduler for all threads is the point of it
    _scheduler = scheduler


def preempt(point: str) -> None:
    """A named place where another thread may come in between. Linux: preempt_check_resched()."""
    if _scheduler is not None:
        _scheduler.preempt(point)


def cond_resched() -> None:
    """Let others go first: this thread tried in vain and will try again. Linux: cond_resched()."""
    if _scheduler is not None:
        _scheduler.preempt("cond_resched")
    else:
        time.sleep(0)


def msleep(seconds: float) -> None:
    """Let others run for a while, as who waits for a device does. Linux: msleep()."""
    if _scheduler is not None:
        _scheduler.preempt("msleep")
    else:
        time.sleep(seconds)


def wait_event_timeout(ready: Callable[[], bool]) -> bool:
    """Let others run until *ready*(), for a tenth of a second at most; what it says at last.

    Does not wait where no other thread has ever come here, or all have ended.
    Linux: wait_event_timeout(), include/linux/wait.h.
    """
    for _ in range(TICKS if _scheduler is None else _TURNS):
        if ready():
            return True
        if _scheduler is not None:
            _scheduler.preempt("wait_event_timeout")
        elif len(_living) == 1:
            return False
        else:
            time.sleep(0.1 / TICKS)
    return ready()


def read_poll_timeout(ready: Callable[[], bool], timeout: float) -> bool:
    """Look at *ready*() again and again, for *timeout* seconds at most; what it says at last.

    For what wakes nobody up, as a device's completion may. Linux: read_poll_timeout(),
    include/linux/iopoll.h, v5.7.
    """
    if _scheduler is not None:
        _scheduler.wait(ready, "a completion")
        return True
    end = time.monotonic() + timeout
    pause = 0.0
    while not ready():
        if time.monotonic() >= end:
            return ready()
        time.sleep(pause)
        pause = min(pause + 1e-6, 1e-3)
    return True


def kthread_run(function: Callable[[], None], name: str) -> None:
    """Run *function* in a thread of its own, which ends with it. Linux: kthread_run()."""
    threading.Thread(target=function, name=name, daemon=True).start()


def taking_turns() -> bool:
    """True where a scheduler decides who runs, and knows of no thread but its own."""
    return _scheduler is not None


def alone() -> bool:
    """True where no other thread could bring about what this one would wait for."""
    return _scheduler is None and len(_living) <= 1


class _Threads(threading.local):
    """Gives each thread a small number, which fits the column `lock_owner`."""

    def __init__(self) -> None:
        self.task: Any = None  # the Task of mm/sched.py that it runs
        try:
            self.number = _numbers.pop()
        except IndexError:
            self.number = next(_fresh_numbers)
        _living.add(self.number)
        weakref.finalize(threading.current_thread(), _bury, self.number).atexit = False


def _bury(number: int) -> None:
    _living.discard(number)
    _numbers.append(number)


_numbers: list[int] = []  # of threads that are gone
_living: set[int] = set()  # of those that have come here and are not
_fresh_numbers = itertools.count(1)
this_thread: Final = _Threads()


def current() -> int:
    """The number of the running thread, 1 to 65535. Linux: current, asm/current.h."""
    return this_thread.number


class Locks:
    """The waiting room of one machine, and its short atomic section."""

    def __init__(self) -> None:
        self.atomic = threading.RLock()  # an atomic step may consist of others
        self._changed = threading.Condition(self.atomic)
        self.waiting = 0

    def wait_until(
        self, ready: Callable[[], bool], what: str, timeout: float | None = None
    ) -> bool:
        """Sleep until *ready*(), which is asked again after each wake_up(); what it says at last.

        timeout: in seconds, after which it is no longer waited for.
        """
        if _scheduler is not None:
            _scheduler.wait(ready, what)
            return True
        return self.idle_until(ready, timeout)

    def idle_until(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """wait_until() of a kernel thread (kthread_run), which takes no turns."""
        with self.atomic:
            self.waiting += 1
            try:
                return self._changed.wait_for(ready, timeout)
            finally:
                self.waiting -= 1

    def wake_up(self) -> None:
        """Let every waiter look again; called with `atomic` held. Linux: wake_up_all()."""
        if self.waiting:
            self._changed.notify_all()


class SpinLock:
    """A lock that one thread holds for a short while; `with lock:`. Linux: spinlock_t."""

    __slots__ = ("_lock", "holder", "locks", "name")

    def __init__(self, locks: Locks, name: str) -> None:
        self.locks = locks
        self.name = name
        self.holder = NOBODY
        self._lock = threading.Lock()

    def locked(self) -> bool:
        """True while some thread has it. Linux: spin_is_locked()."""
        return self._lock.locked()

    def _try(self) -> bool:
        return self._lock.acquire(blocking=False)

    def __enter__(self) -> None:
        if _scheduler is not None:
            _scheduler.preempt(self.name)
        if not self._lock.acquire(blocking=False):
            if self.holder == current():
                raise Deadlock(f"{self.name} is taken again by the thread that holds it")
            self.locks.wait_until(self._try, self.name)
        self.holder = current()

    def __exit__(self, *exc: object) -> None:
        self.holder = NOBODY
        self._lock.release()
        if self.locks.waiting:
            with self.locks.atomic:
                self.locks.wake_up()
        if _scheduler is not None:
            _scheduler.preempt(self.name)


class RwSemaphore:
    """Many readers or one writer. Linux: struct rw_semaphore, include/linux/rwsem.h.

    A reader may take it again, as a driver does that touches memory of the process whose fault
    it serves; a reader that wants to write would wait for itself and gets a Deadlock.
    """

    __slots__ = ("_read", "_write", "locks", "name", "readers", "writer")

    def __init__(self, locks: Locks, name: str) -> None:
        self.locks = locks
        self.name = name
        self.readers: dict[int, int] = {}
        self.writer = NOBODY
        self._read = _Held(self, self._try_read, self._up_read, self._written_by_me)
        self._write = _Held(self, self._try_write, self._up_write, self.held)

    def read(self) -> _Held:
        """`with sem.read():`. Linux: down_read(), up_read()."""
        return self._read

    def write(self) -> _Held:
        """`with sem.write():`. Linux: down_write(), up_write()."""
        return self._write

    def held(self) -> bool:
        """True if the running thread has it, for read or write. Linux: lockdep_is_held()."""
        me = current()
        return self.writer == me or me in self.readers

    def _written_by_me(self) -> bool:
        return self.writer == current()

    def _try_read(self) -> bool:
        if self.writer != NOBODY:
            return False
        me = current()
        self.readers[me] = self.readers.get(me, 0) + 1
        return True

    def _try_write(self) -> bool:
        if self.writer != NOBODY or self.readers:
            return False
        self.writer = current()
        return True

    def _up_read(self) -> None:
        me = current()
        if self.readers[me] > 1:
            self.readers[me] -= 1
        else:
            del self.readers[me]
            self.locks.wake_up()

    def _up_write(self) -> None:
        self.writer = NOBODY
        self.locks.wake_up()


class _Held:
    """What `with` holds between taking a semaphore and giving it back."""

    __slots__ = ("attempt", "give_back", "holds", "sem")

    def __init__(
        self,
        sem: RwSemaphore,
        attempt: Callable[[], bool],
        give_back: Callable[[], None],
        holds: Callable[[], bool],
    ) -> None:
        self.sem = sem
        self.attempt = attempt
        self.give_back = give_back
        self.holds = holds  # True where this thread would wait for itself

    def __enter__(self) -> None:
        sem = self.sem
        preempt(sem.name)
        with sem.locks.atomic:
            if self.attempt():
                return
        if self.holds():
            raise Deadlock(
                f"{sem.name} is wanted by the thread that holds it; a callback may not map, "
                f"unmap or exit the process that it works for"
            )
        sem.locks.wait_until(self.attempt, sem.name)

    def __exit__(self, *exc: object) -> None:
        with self.sem.locks.atomic:
            self.give_back()
        preempt(self.sem.name)
