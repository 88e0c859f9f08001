"""The Linux memory-management core, as of v4.20, over NumPy columns.

    machine = mm.Machine(nodes=("512MiB",))
    process = machine.spawn("train")
    a = process.array((1024, 1024), dtype="float32")

docs/where-is.md says in which file each kernel function has its counterpart.
"""

from mm.errors import (
    AccessDenied,
    BusError,
    Busy,
    Deadlock,
    DriverBug,
    Exists,
    HwPoison,
    InputOutputError,
    InvalidArgument,
    InvalidRange,
    KernelBug,
    Misplaced,
    NoSuchNode,
    NotMapped,
    OutOfMemory,
    OutOfRange,
    Overflow,
    PageHeld,
    PermissionDenied,
    SegmentationFault,
    TryAgain,
    WouldBlock,
)
from mm.machine import Machine
from mm.mem_cgroup import MemCgroup
from mm.process import Process
from mm.typing import PAGE_SIZE

__all__ = [
    "PAGE_SIZE",
    "AccessDenied",
    "BusError",
    "Busy",
    "Deadlock",
    "DriverBug",
    "Exists",
    "HwPoison",
    "InputOutputError",
    "InvalidArgument",
    "InvalidRange",
    "KernelBug",
    "Machine",
    "MemCgroup",
    "Misplaced",
    "NoSuchNode",
    "NotMapped",
    "OutOfMemory",
    "OutOfRange",
    "Overflow",
    "PageHeld",
    "PermissionDenied",
    "Process",
    "SegmentationFault",
    "TryAgain",
    "WouldBlock",
]
