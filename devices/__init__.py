"""Drivers of devices that borrow memory of processes.

gpu = devices.open("numpy", machine, memory="64MiB")
"""

from devices.dma_fence import DmaFence
from devices.driver import Driver
from devices.faulty import DeviceLost, Fault, Faulty
from devices.logged import Logged, replay
from devices.moved import Moved, Stats
from devices.numpy_device import NumpyDevice
from devices.ops import DeviceError
from devices.peers import migrate_between
from devices.registry import open_device as open
from devices.timed import Timed
from devices.timing import Profile, load_profile
from devices.wrappers import Counting, Limited, Wrapper

__all__ = [
    "Counting",
    "DeviceError",
    "DeviceLost",
    "DmaFence",
    "Driver",
    "Fault",
    "Faulty",
    "Limited",
    "Logged",
    "Moved",
    "NumpyDevice",
    "Profile",
    "Stats",
    "Timed",
    "Wrapper",
    "load_profile",
    "migrate_between",
    "open",
    "replay",
]
