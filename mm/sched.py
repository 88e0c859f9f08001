"""Who runs: the task on whose behalf the core works. Linux: include/linux/sched.h.

Faults are counted for the task that runs, not for the one whose memory it is, and its CPU and
policy decide where a page comes from.
"""

from __future__ import annotations

from typing import Any, Final

from mm.locking import this_thread


class Task:
    """What the core reads of a thread of execution. Linux: struct task_struct."""

    def __init__(self, name: str, cpu: int = 0) -> None:
        self.name = name
        self.cpu = cpu  # that it runs on: whose node and lists serve its faults
        self.mm: Any = None  # its MmStruct, whose group pays for the pages of files it reads
        self.mempolicy: Any = None  # the Mempolicy of mm/mempolicy.py; None is the default
        self.il_next = 0  # turns that interleaving has taken, of pages that have no address
        self.cred: Any = None  # the Cred of mm/cred.py; None is root's, with all capabilities
        self.rlimit_memlock = 64 << 10  # bytes that it may lock in memory without CAP_IPC_LOCK
        self.mems_allowed: tuple[int, ...] | None = None  # nodes of its cpuset; None: all
        self.min_flt = 0  # faults served without I/O
        self.maj_flt = 0  # faults that waited for swap or a file
        self.memcg_in_oom: Any = None  # the MemCgroup whose limit made its last charge fail


IDLE: Final = Task("swapper")  # runs where nobody else does: a driver called from outside


def current_task() -> Task:
    """The task that this thread runs. Linux: current, asm/current.h."""
    return this_thread.task or IDLE


class running:  # noqa: N801 - used as a function is: with running(task):
    """Let this thread run *task* inside the block. Linux: context_switch(), kernel/sched/core.c."""

    __slots__ = ("before", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.before: Task | None = None

    def __enter__(self) -> None:
        self.before, this_thread.task = this_thread.task, self.task

    def __exit__(self, *exc: object) -> None:
        this_thread.task = self.before
