"""What copies and faults would take on some hardware: a link model, with profiles as TOML.

A profile has the time of a transfer by its size, for either direction, whether both directions go
at once (duplex), how many copies can be under way (engines), and what a fault costs besides its
copies. Profiles that come along are in devices/profiles/, others are files; `hmm calibrate` writes
one of the device at hand.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from mm.errors import InvalidArgument
from mm.typing import PAGE_SHIFT

TO_DEVICE: Final = "to_device"
TO_SYSTEM: Final = "to_system"
_KIB: Final = 1024


@dataclass(frozen=True)
class Transfers:
    """Time of one transfer by its size: kib[i] take us[i]; straight lines between, and beyond.

    Both ascend, and there are at least two.
    """

    kib: tuple[float, ...]
    us: tuple[float, ...]

    def us_of(self, nbytes: int) -> float:
        """Microseconds that a transfer of *nbytes* takes; nothing takes none."""
        if nbytes <= 0:
            return 0.0
        size = nbytes / _KIB
        last = len(self.kib) - 1
        right = min(max(int(np.searchsorted(self.kib, size)), 1), last)
        (x0, x1), (y0, y1) = self.kib[right - 1 : right + 1], self.us[right - 1 : right + 1]
        return max(0.0, y0 + (size - x0) * (y1 - y0) / (x1 - x0))


@dataclass(frozen=True)
class Profile:
    """A link, and the device at its end.

    duplex: copies in both directions go at full speed together. engines: copies that can be under
    way at a time. batch_us: what a batch of faults costs; page_us: what a page's migration to the
    device costs, both besides the transfers.
    """

    name: str
    to_device: Transfers
    to_system: Transfers
    duplex: bool = True
    engines: int = 2
    batch_us: float = 0.0
    page_us: float = 0.0

    def copy_us(self, direction: str, npages: int) -> float:
        """Microseconds of one copy of *npages*, on a link that nobody else uses."""
        transfers = self.to_device if direction == TO_DEVICE else self.to_system
        return transfers.us_of(npages << PAGE_SHIFT)

    def fault_us(self, npages: int) -> float:
        """Microseconds of a batch of faults that brings *npages* in one copy."""
        return self.batch_us + npages * self.page_us + self.copy_us(TO_DEVICE, npages)

    def toml(self) -> str:
        """The profile as the text of a file that load_profile() reads."""
        return "\n".join(
            [
                f'name = "{self.name}"',
                f"duplex = {str(self.duplex).lower()}",
                f"engines = {self.engines}",
                *_table(TO_DEVICE, self.to_device),
                *_table(TO_SYSTEM, self.to_system),
                "\n[fault]",
                f"batch_us = {self.batch_us:.6g}",
                f"page_us = {self.page_us:.6g}\n",
            ]
        )


def _table(name: str, transfers: Transfers) -> list[str]:
    return [
        f"\n[{name}]",
        f"kib = [{', '.join(f'{size:g}' for size in transfers.kib)}]",
        f"us = [{', '.join(f'{us:.6g}' for us in transfers.us)}]",
    ]


def profiles() -> list[str]:
    """Names of the profiles that come along."""
    names = (entry.name for entry in files("devices").joinpath("profiles").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_profile(name: str | Path) -> Profile:
    """The profile called *name*, or in the file of that name.

    Raises InvalidArgument for a name that is neither, and for a file that holds no profile.
    """
    known = profiles()
    if str(name) in known:
        text = files("devices").joinpath("profiles", f"{name}.toml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise InvalidArgument(
            f"there is no profile {str(name)!r}; there are {', '.join(known)}, and any file that "
            f"hmm calibrate has written"
        )
    try:
        return _parsed(tomllib.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"profile {name}: {error}") from error


def _parsed(table: dict[str, Any]) -> Profile:
    fault = table.get("fault", {})
    profile = Profile(
        str(table["name"]),
        _transfers(TO_DEVICE, table[TO_DEVICE]),
        _transfers(TO_SYSTEM, table[TO_SYSTEM]),
        bool(table.get("duplex", True)),
        int(table.get("engines", 2)),
        float(fault.get("batch_us", 0)),
        float(fault.get("page_us", 0)),
    )
    if profile.engines < 1 or profile.batch_us < 0 or profile.page_us < 0:
        raise ValueError("engines is at least 1, and no cost is below 0")
    return profile


def _transfers(name: str, table: dict[str, Any]) -> Transfers:
    kib, us = (tuple(map(float, table[column])) for column in ("kib", "us"))
    if len(kib) != len(us) or len(kib) < 2:
        raise ValueError(f"{name}: kib and us are two lists of the same length, at least 2")
    ascend = all(a < b for a, b in pairwise(kib))
    if not ascend or any(a > b for a, b in pairwise(us)) or min(kib + us) <= 0:
        raise ValueError(f"{name}: sizes ascend from above 0, and times with them")
    return Transfers(kib, us)


class Timeline:
    """Simulated time: when copies that begin now would be done.

    Copies in one direction queue for the link; those in the other go on beside them where the
    link is duplex and there is an engine for either. now: microseconds since it was made.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.now = 0.0
        self._link = {TO_DEVICE: 0.0, TO_SYSTEM: 0.0}  # until when each direction is taken

    def work(self, us: float) -> None:
        """The host is busy for so long."""
        self.now += us

    def copy(self, direction: str, npages: int) -> float:
        """Begin a copy of *npages*; when it is done."""
        at_once = self.profile.duplex and self.profile.engines > 1
        ways = (direction,) if at_once else tuple(self._link)
        begin = max(self.now, *(self._link[way] for way in ways))
        end = begin + self.profile.copy_us(direction, npages)
        for way in ways:
            self._link[way] = end
        return end

    def wait(self, until: float) -> None:
        """The host waits for a copy that is done at *until*."""
        self.now = max(self.now, until)
