"""What a rule of the conformance suite is: a promise, and a trial that finds out if it is kept.

A trial returns the evidence, in a few words, or raises `Broken` with it. It needs other rules
where it could not tell its own matter from theirs: no driver that loses bytes in a copy keeps
contents over a fork, and is told about the copy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from devices.driver import Driver
from devices.wrappers import Wrapper
from hmm.offload.device import OpenDevice
from mm.errors import InvalidArgument
from mm.machine import Machine
from mm.memparse import Size

Device: TypeAlias = Driver | Wrapper


class Broken(Exception):
    """A promise that a driver did not keep; the message is the evidence."""


class NotJudged(Exception):
    """A rule that does not apply to this driver; the message says why."""


@dataclass(frozen=True)
class Opener:
    """Opens the devices that are tried; `open` is what the driver gave for it."""

    open: OpenDevice

    def __call__(self, machine: Machine, memory: Size) -> Device:
        """A device of *memory* on *machine*. Raises InvalidArgument where it is no `Driver`."""
        try:
            device = self.open(machine, memory)
        except TypeError as error:
            raise InvalidArgument(
                f"no device is opened by calling this with a machine and a size: {error}"
            ) from error
        if not isinstance(device, Driver | Wrapper):
            raise InvalidArgument(
                f"{device!r} cannot be checked: it does not derive from devices.Driver"
            )
        return device


Trial: TypeAlias = Callable[[Opener], str]


@dataclass(frozen=True, eq=False)
class Rule:
    """A promise of every driver.

    name: what it is called; promise: one sentence; trial: finds out; needs: rules without which it
    cannot be judged.
    """

    name: str
    promise: str
    trial: Trial
    needs: tuple[Rule, ...]

    def __repr__(self) -> str:
        return f"<Rule {self.name}>"


def rule(*needs: Rule) -> Callable[[Trial], Rule]:
    """Make a rule of a trial: its name is the function's, its promise the docstring."""

    def make(trial: Trial) -> Rule:
        promise = " ".join((trial.__doc__ or "").split())
        return Rule(trial.__name__.replace("_", "-"), promise, trial, needs)

    return make
