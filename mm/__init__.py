"""The Linux memory-management core, as of v4.20, over NumPy columns.

    machine = mm.Machine(nodes=("512MiB",))
    process = machine.spawn("train")
    a = process.array((1024, 1024), dtype="float32")

docs/where-is.md says in which file each kernel function has its counterpart.
"""

from mm.cpuset import Cpuset
from mm.errors import (
    AccessDenied,
    BusError,
    Busy,
    Corrupted,
    Deadlock,
    DriverBug,
    Exists,
    FileTooLarge,
    HwPoison,
    InputOutputError,
    InvalidArgument,
    InvalidRange,
    KernelBug,
    Misplaced,
    NoEntry,
    NoSpace,
    NoSuchNode,
    NoSuchProcess,
    NotExecutable,
    NotMapped,
    OutOfMemory,
    OutOfRange,
    Overflow,
    PageHeld,
    PartlyCopied,
    PermissionDenied,
    SegmentationFault,
    TimedOut,
    TryAgain,
    WouldBlock,
)
from mm.machine import Machine
from mm.mem_cgroup import MemCgroup
from mm.process import Process
from mm.typing import PAGE_SIZE
from mm.userfaultfd import UserfaultFd
from mm.userfaultfd_k import UffdEvent, UffdMsg

__all__ = [
    "AccessDenied",
    "BusError",
    "Busy",
    "Corrupted",
    "Cpuset",
    "Deadlock",
    "DriverBug",
    "Exists",
    "FileTooLarge",
    "HwPoison",
    "InputOutputError",
    "InvalidArgument",
    "InvalidRange",
    "KernelBug",
    "Machine",
    "MemCgroup",
    "Misplaced",
    "NoEntry",
    "NoSpace",
    "NoSuchNode",
    "NoSuchProcess",
    "NotExecutable",
    "NotMapped",
    "OutOfMemory",
    "OutOfRange",
    "Overflow",
    "PAGE_SIZE",
    "PageHeld",
    "PartlyCopied",
    "PermissionDenied",
    "Process",
    "SegmentationFault",
    "TimedOut",
    "TryAgain",
    "UffdEvent",
    "UffdMsg",
    "UserfaultFd",
    "WouldBlock",
]
