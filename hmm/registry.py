"""Devices by name. A driver announces itself with an entry point of the group `hmm.devices`.

[project.entry-points."hmm.devices"]
mine = "my_package.my_module:MyDriver"

Wherever the name of a device is asked for, one of these will do; `?` begins options of the driver:

    numpy                       announced
    numpy?kind=public           with options, more of them after &
    my_package.my_module:make   a class or function in a module
    my_driver.py:MyDriver       or in a file
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl
from zlib import crc32

from hmm.offload.device import OpenDevice
from mm.errors import InvalidArgument

GROUP: Final = "hmm.devices"
SUITES: Final = "hmm.conformance"
TIMING: Final = "hmm.timing"


class Verdict(Protocol):
    """What became of one rule of a conformance suite."""

    @property
    def rule(self) -> str:
        """What it is called."""

    @property
    def promise(self) -> str:
        """What every driver promises."""

    @property
    def outcome(self) -> str:
        """ "pass", "fail", or "skip" where it could not be judged."""

    @property
    def evidence(self) -> str:
        """What was seen, or why it was not judged."""

    @property
    def seconds(self) -> float:
        """How long that took."""


class Suite(Protocol):
    """A conformance suite: tries its rules, or *only* some, on the driver that opens devices."""

    def __call__(self, driver: OpenDevice, only: Sequence[str] = ()) -> Iterator[Verdict]:
        """Raises InvalidArgument, before the first verdict, for what cannot be tried."""


class UnusableDriver(InvalidArgument):
    """EINVAL: a driver that is there, and fails when it is imported."""


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
    """Import the driver called *name*, in any of the ways above; what opens its devices.

    Raises InvalidArgument where none has that name or takes those options, UnusableDriver where
    its import fails.
    """
    place, _, query = name.partition("?")
    if ":" in place:
        driver = _load_from(place)
    else:
        drivers = available(points)
        if place not in drivers:
            raise InvalidArgument(
                f"there is no device {place!r}; installed: {', '.join(drivers) or 'none'}; or name "
                f"a class as module:Class or file.py:Class"
            )
        driver = _imported(place, drivers[place].value, drivers[place].load)
    if not callable(driver):
        raise UnusableDriver(f"device {place!r} is no class that opens devices, but {driver!r}")
    return _with_options(driver, name, query) if query else driver


def load_suite() -> Suite:
    """The conformance suite for drivers. Raises InvalidArgument where none is installed."""
    suites = entry_points(group=SUITES)
    if not suites:
        raise InvalidArgument(
            f"no conformance suite is installed (entry point group {SUITES}); install hmm-migrate "
            f"again: pip install -e ."
        )
    suite: Suite = next(iter(suites)).load()
    return suite


def load_timing(name: str) -> Any:
    """`timed` or `calibrate` of the package that knows simulated time.

    Raises InvalidArgument where none is installed.
    """
    found = entry_points(group=TIMING, name=name)
    if not found:
        raise InvalidArgument(
            f"nothing that simulates time is installed (entry point group {TIMING}); install "
            f"hmm-migrate again: pip install -e ."
        )
    return next(iter(found)).load()


def _imported(name: str, value: str, load: Callable[[], Any]) -> Any:
    """What *load*() brings; whatever is raised there is the driver's fault."""
    try:
        return load()
    except (Exception, SystemExit) as cause:
        raise UnusableDriver(
            f"device {name!r} ({value}) cannot be imported:"
            f" {type(cause).__name__}: {' '.join(str(cause).split())}"
        ) from cause


def _load_from(place: str) -> Any:
    """The driver at *place*, which is module:attribute or file.py:attribute."""
    where, _, attribute = place.rpartition(":")
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise InvalidArgument(f"device {place!r}: there is no file {where}")
    module = _imported(place, where, partial(_run_file if is_file else import_module, where))
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        public = sorted(n for n, value in vars(module).items() if _is_own_class(module, value))
        raise InvalidArgument(
            f"device {place!r}: {where} has no {attribute!r}; its classes are "
            f"{', '.join(public) or 'none'}"
        )
    return found


def _is_own_class(module: ModuleType, value: object) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _run_file(path: str) -> ModuleType:
    """Import the file *path*, which need not be in a package or on sys.path."""
    resolved = str(Path(path).resolve())
    name = f"_hmm_device_{crc32(resolved.encode()):08x}"
    spec = spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def _with_options(driver: OpenDevice, name: str, query: str) -> OpenDevice:
    """*driver*, always opened with the options of *query*."""
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    opened = partial(driver, **options)
    try:
        signature(driver).bind(None, 0, **options)
    except TypeError as wrong:
        raise InvalidArgument(f"device {name!r}: {wrong}") from None
    return opened
