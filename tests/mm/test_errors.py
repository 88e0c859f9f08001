"""Which errors can be caught, and as what."""

import errno

import pytest

import mm
from mm.errors import MmError


class TestErrno:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (mm.InvalidArgument, errno.EINVAL),
            (mm.InvalidRange, errno.EINVAL),
            (mm.OutOfMemory, errno.ENOMEM),
            (mm.NotMapped, errno.ENOMEM),
            (mm.TryAgain, errno.EAGAIN),
            (mm.OutOfRange, errno.ERANGE),
            (mm.PermissionDenied, errno.EPERM),
            (mm.AccessDenied, errno.EACCES),
            (mm.HwPoison, 133),
            (mm.Busy, errno.EBUSY),
            (mm.PageHeld, errno.EBUSY),
            (mm.InputOutputError, errno.EIO),
            (mm.Deadlock, errno.EDEADLK),
            (mm.NoEntry, errno.ENOENT),
            (mm.Exists, errno.EEXIST),
            (mm.NoSuchProcess, errno.ESRCH),
            (mm.TimedOut, errno.ETIMEDOUT),
            (mm.NoSpace, errno.ENOSPC),
            (mm.FileTooLarge, errno.EFBIG),
            (mm.NotExecutable, errno.ENOEXEC),
            (mm.Corrupted, 117),
        ],
    )
    def test_wrong_call(self, error, code):
        """An OSError with the kernel's errno, whose text is the message."""
        raised = error("the message")

        assert isinstance(raised, OSError)
        assert (code, "the message") == (raised.errno, raised.strerror)

    @pytest.mark.parametrize("error", [mm.SegmentationFault, mm.BusError])
    def test_fault(self, error):
        """A fault says where."""
        raised = error(0x1234, "the message")

        assert isinstance(raised, MmError)
        assert (errno.EFAULT, 0x1234, "the message") == (
            raised.errno,
            raised.address,
            raised.strerror,
        )

    @pytest.mark.parametrize("bug", [mm.KernelBug, mm.DriverBug])
    def test_bug(self, bug):
        """A bug is no OSError: who catches those does not swallow it."""
        assert not issubclass(bug, OSError)
        assert issubclass(bug, AssertionError)
