"""Drivers of devices that borrow memory of processes.

gpu = devices.open("numpy", machine, memory="64MiB")
"""

from devices.driver import Driver
from devices.memory import Moved, Stats
from devices.numpy_device import NumpyDevice
from devices.peers import migrate_between
from devices.registry import open_device as open

__all__ = ["Driver", "Moved", "NumpyDevice", "Stats", "migrate_between", "open"]
