"""A device that fails on demand: the same faults at the same calls, whenever it is asked again.

Faulty(gpu, copy={"fail_at": 3})                       # the third copy, in or out, raises
Faulty(gpu, copy_out={"fail_at": (1, 4), "how": "lose"})
Faulty(gpu, seed=7, allocate={"share": 0.1})           # one allocation in ten, drawn from 7
Faulty(gpu, copy={"fail_at": 2, "how": "hang"})         # a completion that never comes
Faulty(gpu, lost_at=20)                                # at call 20 it falls off the bus
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Final

import numpy as np

from devices.dma_fence import DmaFence, answer_of
from devices.driver import Driver
from devices.ops import DeviceError
from devices.wrappers import Wrapper, pages_of
from mm.errors import InvalidArgument
from mm.locking import msleep

HOW: Final = {  # how a function can fail; the first of each is what it does unless told otherwise
    "allocate": ("none", "half", "raise", "delay"),
    "copy_in": ("raise", "torn", "delay", "late", "fail", "hang"),
    "copy_out": ("raise", "torn", "lose", "delay", "late", "fail", "hang"),
    "clear": ("raise", "torn", "delay"),
}


class _Late(DmaFence):
    """A copy that is done when somebody waits for it, and not before."""

    def __init__(self, what: str, delay: float, work: Callable[[], Any], timeout: float) -> None:
        super().__init__(what)
        self._delay = delay
        self._work = work
        self._timeout = timeout

    def _sleep(self, timeout: float) -> bool:
        if self._delay >= timeout:
            msleep(timeout)
            return False
        msleep(self._delay)
        self.run(lambda: answer_of(self._work(), self._timeout))
        return True


class DeviceLost(DeviceError):
    """EIO: the device is gone, with what it held."""


@dataclass(frozen=True)
class Fault:
    """Which calls of a function fail, and how.

    fail_at: their numbers, counted from 1. share: of the others so many, drawn from the seed.
    how: "raise" a DeviceError before anything is done; "torn": after half the pages; "none" or
    "half" of the pages that allocate() was asked for; "lose" all contents that copy_out() was
    asked for; "delay" by so many seconds, and then do it.

    Completions: "late": done `delay` seconds after somebody begins to wait, and not before; "fail":
    the copy has begun and ends with a DeviceError, half of it done; "hang": it never ends. What
    has not ended does so with let_go().
    """

    fail_at: int | Sequence[int] = ()
    share: float = 0.0
    how: str = ""
    delay: float = 0.001

    def numbers(self) -> frozenset[int]:
        """`fail_at` as a set."""
        return frozenset([self.fail_at] if isinstance(self.fail_at, int) else self.fail_at)


class Faulty(Wrapper):
    """A device whose calls fail as planned; everything that has been injected is in `injected`.

    allocate, copy_in, copy_out, clear: a `Fault`, or a dict of its fields; copy: for both copies,
    which are then counted together. lost_at: the call, of all of them, at which the device is lost:
    nothing can be allocated or copied in any more, and what it held is lost. armed: set it to
    False, and everything works (but what is lost stays lost).
    """

    def __init__(
        self,
        device: Driver | Wrapper,
        *,
        allocate: Fault | Mapping[str, Any] | None = None,
        copy: Fault | Mapping[str, Any] | None = None,
        copy_in: Fault | Mapping[str, Any] | None = None,
        copy_out: Fault | Mapping[str, Any] | None = None,
        clear: Fault | Mapping[str, Any] | None = None,
        lost_at: int | None = None,
        seed: int = 0,
    ) -> None:
        asked = {
            "allocate": allocate,
            "copy": copy,
            "copy_in": copy_in,
            "copy_out": copy_out,
            "clear": clear,
        }
        self.faults = {name: _fault(name, fault) for name, fault in asked.items() if fault}
        if "copy" in self.faults and {"copy_in", "copy_out"} & self.faults.keys():
            raise InvalidArgument("Faulty: copy= is for both copies; give it alone")
        self.lost_at = lost_at
        self.armed = True
        self.lost = False
        self.injected: list[str] = []
        self.hung: list[DmaFence] = []
        self._calls: Counter[str] = Counter()
        self._draw = random.Random(seed)
        super().__init__(device)

    def take_off(self) -> None:
        """Let the device do without its faults."""
        super().take_off()
        self.let_go()

    def let_go(self) -> None:
        """Let the copies that hang end after all, in failure: nothing was copied."""
        hung, self.hung = self.hung, []
        for fence in hung:
            if not fence.is_signaled():
                fence.signal(error=DeviceError(f"{fence.what}: reset"))
        self.device.stranded.reap()

    def lose(self) -> None:
        """Let the device be lost now."""
        self.lost = True

    def call(self, op: str, *args: Any) -> Any:
        """Fail if it is time to, else pass on."""
        if self.armed and op in HOW:
            self._calls["all"] += 1
            self.lost |= self._calls["all"] == self.lost_at
        work = partial(super().call, op, *args)
        if self.lost:
            return self._answer_of_a_lost_device(op, args, work)
        how = self._how(op)
        if not how:
            return work()
        said = f"{self.name}: {op} {self._number(op)} of {pages_of(op, args)} pages: {how}"
        self.injected.append(said)
        return self._fail(op, how, args, work, said)

    def _kind(self, op: str) -> str:
        """Under which name *op* is planned and counted."""
        return "copy" if "copy" in self.faults and op.startswith("copy_") else op

    def _number(self, op: str) -> int:
        return self._calls[self._kind(op)]

    def _how(self, op: str) -> str:
        """How this call of *op* fails, "" if it does not."""
        fault = self.faults.get(self._kind(op))
        if fault is None or not self.armed:
            return ""
        self._calls[self._kind(op)] += 1
        planned = self._number(op) in fault.numbers()
        if planned or (fault.share and self._draw.random() < fault.share):
            return fault.how or HOW[op][0]
        return ""

    def _fail(
        self, op: str, how: str, args: tuple[Any, ...], work: Callable[[], Any], said: str
    ) -> Any:
        half = pages_of(op, args) // 2
        if how == "none":
            return np.empty(0, dtype=np.int64)
        if how == "half":
            return self.inner.allocate(half) if half else np.empty(0, dtype=np.int64)
        if how == "lose":
            return np.ones(args[0].size, dtype=np.bool_)
        if how == "delay":
            msleep(self.faults[self._kind(op)].delay)
            return work()
        if how == "late":
            late = _Late(said, self.faults[self._kind(op)].delay, work, self.device.timeout)
            self.hung.append(late)
            return late
        if how in ("torn", "fail") and half:
            first = getattr(self.inner, op)(*_first_half(op, half, args))
            answer_of(first, self.device.timeout)
        if how in ("fail", "hang"):
            return self._end_badly(how, DmaFence(said))
        raise DeviceError(said)

    def _end_badly(self, how: str, fence: DmaFence) -> DmaFence:
        """A completion that fails, or never comes."""
        if how == "fail":
            fence.signal(error=DeviceError(fence.what))
        else:
            self.hung.append(fence)
        return fence

    def _answer_of_a_lost_device(
        self, op: str, args: tuple[Any, ...], work: Callable[[], Any]
    ) -> Any:
        if op == "allocate":
            return np.empty(0, dtype=np.int64)
        if op == "copy_out":
            return np.ones(args[0].size, dtype=np.bool_)
        if op in ("copy_in", "clear"):
            raise DeviceLost(f"{self.name}: {op} of {args[0].size} pages: the device is lost")
        return work()


def _first_half(op: str, half: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call for the first *half* pages."""
    if op == "clear":
        return (args[0][:half],)
    pages, system, rows = args
    return pages[:half], system, rows[:half]


def _fault(name: str, fault: Fault | Mapping[str, Any]) -> Fault:
    """*fault* as a Fault that *name* can have. Raises InvalidArgument."""
    if not isinstance(fault, Fault):
        known = [field.name for field in fields(Fault)]
        unknown = sorted(set(fault) - set(known))
        if unknown:
            raise InvalidArgument(
                f"Faulty: {name}= has no {', '.join(unknown)}; it takes {', '.join(known)}"
            )
        fault = Fault(**fault)
    ways = HOW["copy_in"] if name == "copy" else HOW[name]
    if fault.how and fault.how not in ways:
        raise InvalidArgument(
            f"Faulty: {name} cannot fail by {fault.how!r}; it can by {', '.join(ways)}"
        )
    if not 0 <= fault.share <= 1 or any(number < 1 for number in fault.numbers()):
        raise InvalidArgument(
            f"Faulty: {name}= fails at calls from 1 on, or a share from 0 to 1, not {fault}"
        )
    return fault
