"""Devices by name. A driver announces itself with an entry point of the group `hmm.devices`.

[project.entry-points."hmm.devices"]
mine = "my_package.my_module:MyDriver"
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from hmm.offload.device import OpenDevice
from mm.errors import InvalidArgument

GROUP: Final = "hmm.devices"


class UnusableDriver(InvalidArgument):
    """EINVAL: a driver that is announced, and fails when it is imported."""


def available(points: Iterable[EntryPoint] | None = None) -> dict[str, EntryPoint]:
    """Entry points of the drivers that are installed, by name, sorted; none of them is imported.

    Where two distributions announce one name, the first that is found has it. *points* replaces
    what is installed.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP) if points is None else points:
        found.setdefault(point.name, point)
    return dict(sorted(found.items()))


def load_driver(name: str, points: Iterable[EntryPoint] | None = None) -> OpenDevice:
    """Import the driver called *name*; the class that opens its devices.

    Raises InvalidArgument where none has that name, UnusableDriver where its import fails.
    """
    drivers = available(points)
    if name not in drivers:
        raise InvalidArgument(
            f"there is no device {name!r}; installed: {', '.join(drivers) or 'none'}"
        )
    point = drivers[name]
    try:
        driver: OpenDevice = point.load()
    except Exception as cause:
        raise UnusableDriver(
            f"device {name!r} ({point.value}) cannot be imported:"
            f" {type(cause).__name__}: {' '.join(str(cause).split())}"
        ) from cause
    if not callable(driver):
        raise UnusableDriver(f"device {name!r}: {point.value} is no class that opens devices")
    return driver
