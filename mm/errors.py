"""What can go wrong, each with the errno that Linux would give.

A wrong call raises one of these; a page that cannot move raises nothing and is data in the
result. `KernelBug` and `DriverBug` are not for catching: they say that the model, or a driver,
broke a rule that every caller relies on.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class MmError(OSError):
    """A call that Linux answers with an errno; *message* names the values and the way out."""

    code: ClassVar[int] = errno.EINVAL

    def __init__(self, message: str) -> None:
        super().__init__(self.code, message)


class InvalidArgument(MmError):
    """EINVAL: a size, flag or object that the call cannot take."""


class NoSuchCounter(InvalidArgument, KeyError):
    """EINVAL: no counter has that name. Also the KeyError that a mapping answers with."""


class InvalidRange(InvalidArgument):
    """EINVAL: a range that is empty, inverted, or outside what it must lie in."""


class OutOfMemory(MmError):
    """ENOMEM: no frame, no page-table page or no address space is left."""

    code = errno.ENOMEM


class NotMapped(MmError):
    """ENOMEM: nothing is mapped in a part of the range."""

    code = errno.ENOMEM


class TryAgain(MmError):
    """EAGAIN: memory was short; the same call may succeed later."""

    code = errno.EAGAIN


class PartlyCopied(TryAgain):
    """EAGAIN: `copied` bytes are there, and what comes next could not be had."""

    def __init__(self, copied: int, message: str) -> None:
        super().__init__(message)
        self.copied = copied


class OutOfRange(MmError):
    """ERANGE: physical address space has no hole of that size."""

    code = errno.ERANGE


class Overflow(MmError):
    """EOVERFLOW: a range that is empty or ends where no address is."""

    code = errno.EOVERFLOW


class PermissionDenied(MmError):
    """EPERM: the mapping does not allow that access, or the task may not ask for it."""

    code = errno.EPERM


class AccessDenied(MmError):
    """EACCES: what is mapped may never be accessed that way."""

    code = errno.EACCES


class InputOutputError(MmError):
    """EIO: not one byte could be transferred."""

    code = errno.EIO


class BadFile(MmError):
    """EBADF: a file that is closed, or open for something else."""

    code = errno.EBADF


class FileTooLarge(MmError):
    """EFBIG: no file has bytes at that place."""

    code = errno.EFBIG


class NoSpace(MmError):
    """ENOSPC: the file system has no room left."""

    code = errno.ENOSPC


class NotSupported(MmError):
    """EOPNOTSUPP: that kind of file cannot do it."""

    code = errno.EOPNOTSUPP


class NoEntry(MmError):
    """ENOENT: what was asked for is not there."""

    code = errno.ENOENT


class Busy(MmError):
    """EBUSY: something still uses what should go away."""

    code = errno.EBUSY


class PageHeld(Busy):
    """EBUSY: a page has to move, and somebody who does not let go of it holds a reference."""


class WouldBlock(MmError):
    """EAGAIN: the call would have to wait, and was told not to."""

    code = errno.EAGAIN


class TimedOut(MmError):
    """ETIMEDOUT: userland did not answer for a fault that it has to serve."""

    code = errno.ETIMEDOUT


class Exists(MmError):
    """EEXIST: a page, or something of that name, is there already."""

    code = errno.EEXIST


class NoSuchProcess(MmError):
    """ESRCH: the process has exited."""

    code = errno.ESRCH


class Misplaced(MmError):
    """EIO: a page is on a node where the policy does not want it."""

    code = errno.EIO


class NoDevice(MmError):
    """ENODEV: that kind of file cannot be mapped."""

    code = errno.ENODEV


class NoSuchNode(MmError):
    """ENODEV: a page shall go to a node that the machine does not have."""

    code = errno.ENODEV


class Deadlock(MmError):
    """EDEADLK: a thread would wait for something that it holds itself."""

    code = errno.EDEADLK


class SegmentationFault(MmError):
    """EFAULT: no mapping at *address*, or one that forbids the access (SIGSEGV)."""

    code = errno.EFAULT

    def __init__(self, address: int, message: str) -> None:
        super().__init__(message)
        self.address = address


class BusError(MmError):
    """EFAULT: the mapping is there, its contents are not (SIGBUS)."""

    code = errno.EFAULT

    def __init__(self, address: int, message: str) -> None:
        super().__init__(message)
        self.address = address


class NotExecutable(MmError):
    """ENOEXEC: a file that cannot be read by pages cannot be mapped."""

    code = errno.ENOEXEC


class Corrupted(MmError):
    """EUCLEAN: what is on the device contradicts itself."""

    code = 117  # EUCLEAN, for which not every host's `errno` has a name


class HwPoison(MmError):
    """EHWPOISON: the contents of a page of the range are lost."""

    code = 133  # EHWPOISON, for which `errno` has no name


class KernelBug(AssertionError):
    """An invariant of the model is broken (VM_BUG_ON_PAGE)."""


class DriverBug(AssertionError):
    """A device driver broke the contract of the migration callbacks."""
