"""Who a task is, and what it may do to others. Linux: kernel/cred.c, capability.c, ptrace.c.

A task is root with all capabilities unless it is told otherwise. A capability is a word of
CAPABILITIES:

    ipc_lock     lock memory without limit
    sys_ptrace   look into, and move, the memory of any process
    sys_nice     move pages that others map too, and to nodes that their owner may not use
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from mm.errors import InvalidArgument, OutOfMemory, PermissionDenied, TryAgain
from mm.sched import Task, current_task
from mm.types import MmStruct
from mm.typing import PAGE_SHIFT

CAP_IPC_LOCK: Final = 1 << 14
CAP_SYS_PTRACE: Final = 1 << 19
CAP_SYS_NICE: Final = 1 << 23
CAP_FULL_SET: Final = (1 << 38) - 1
CAPABILITIES: Final = {
    "ipc_lock": CAP_IPC_LOCK,
    "sys_ptrace": CAP_SYS_PTRACE,
    "sys_nice": CAP_SYS_NICE,
}


class Cred(NamedTuple):
    """Who a task is: its user, whose rights it has now, and the capabilities, as bits.

    Linux: struct cred, include/linux/cred.h.
    """

    uid: int = 0
    euid: int = 0
    caps: int = CAP_FULL_SET


ROOT: Final = Cred()


def prepare_cred(uid: int, euid: int | None = None, caps: Iterable[str] | None = None) -> Cred:
    """The credentials of user *uid* with *caps*, words of CAPABILITIES.

    Without *caps*, root has all and others have none. Raises InvalidArgument.
    Linux: setuid(2), capset(2).
    """
    euid = uid if euid is None else euid
    for number in (uid, euid):
        if not 0 <= number < (1 << 32) - 1:
            raise InvalidArgument(f"a user is a number in 0..{(1 << 32) - 2:#x}, got {number!r}")
    if caps is None:
        return Cred(uid, euid, 0 if euid else CAP_FULL_SET)
    words = {caps} if isinstance(caps, str) else set(caps)
    if words - CAPABILITIES.keys():
        raise InvalidArgument(f"caps {sorted(words)} are not among {', '.join(CAPABILITIES)}")
    return Cred(uid, euid, sum(CAPABILITIES[word] for word in words))


def task_cred(task: Task) -> Cred:
    """The credentials of *task*. Linux: __task_cred(), include/linux/cred.h."""
    return ROOT if task.cred is None else task.cred


def capable(cap: int) -> bool:
    """True where the task that runs has capability *cap*. Linux: capable()."""
    return bool(task_cred(current_task()).caps & cap)


def check_capable(cap: int, call: str) -> None:
    """Raise PermissionDenied where the task that runs lacks *cap*, which *call* needs.

    Linux: capable(), and what its callers do about it.
    """
    if not capable(cap):
        name = next(word for word, bit in CAPABILITIES.items() if bit == cap)
        raise PermissionDenied(f"{call}: {current_task().name} lacks the capability {name}")


def ptrace_may_access(task: Task, *, fscreds: bool = False) -> bool:
    """True where the task that runs may look into *task*: both are one user's, without privileges.

    *task* may be of no other user in any respect, nor have capabilities that the caller lacks; or
    the caller has CAP_SYS_PTRACE. *fscreds*: it is a file that the caller opens, and so its
    effective user that counts. Linux: ptrace_may_access(), kernel/ptrace.c, and
    cap_ptrace_access_check(), security/commoncap.c.
    """
    caller = current_task()
    mine, theirs = task_cred(caller), task_cred(task)
    if task is caller or mine.caps & CAP_SYS_PTRACE:
        return True
    user = mine.euid if fscreds else mine.uid
    return user == theirs.uid == theirs.euid and not theirs.caps & ~mine.caps


# Locked memory ------------------------------------------------------------------------------------


def can_do_mlock(call: str) -> None:
    """Raise PermissionDenied where *call* may lock no memory at all. Linux: can_do_mlock()."""
    if not current_task().rlimit_memlock and not capable(CAP_IPC_LOCK):
        raise PermissionDenied(f"{call}: {current_task().name} may lock no memory")


def check_mlock(mm: MmStruct, npages: int) -> None:
    """Raise where mlock() may not lock *npages* more of *mm*.

    PermissionDenied where the task may lock none at all, OutOfMemory where its limit would be
    passed. Linux: can_do_mlock(), mm/mlock.c, and do_mlock() after it.
    """
    can_do_mlock("mlock")
    if _over_limit(mm, npages):
        raise OutOfMemory(_limit_says("mlock", mm, npages))


def mlock_future_check(mm: MmStruct, npages: int, call: str) -> None:
    """Raise TryAgain where *call* may not map *npages* more that are VM_LOCKED from the start.

    Linux: mlock_future_check(), mm/mmap.c.
    """
    if _over_limit(mm, npages):
        raise TryAgain(_limit_says(call, mm, npages))


def _over_limit(mm: MmStruct, npages: int) -> bool:
    limit = current_task().rlimit_memlock >> PAGE_SHIFT
    return mm.locked_vm + npages > limit and not capable(CAP_IPC_LOCK)


def _limit_says(call: str, mm: MmStruct, npages: int) -> str:
    task = current_task()
    return (
        f"{call}: {npages} pages more than the {mm.locked_vm} that {mm.name} has locked pass the "
        f"limit of {task.rlimit_memlock >> PAGE_SHIFT}; raise rlimit_memlock, or give {task.name} "
        f"the capability ipc_lock"
    )
