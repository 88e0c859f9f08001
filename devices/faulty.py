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

from devices.dma_fence import DmaFence
from devices.driver import Driver
from devices.ops import DeviceError
from devices.wrappers import Wrapper, pages_of
from mm.errors import InvalidArgument, TimedOut
from mm.locking import msleep
from mm.typing import Mask

HOW: Final = {  # how a function can fail; the first of each is what it does unless told otherwise
    "allocate": ("none", "half", "raise", "delay"),
    "copy_in": ("raise", "torn", "delay", "late", "fail", "hang"),
    "copy_out": ("raise", "torn", "lose", "delay", "late", "fail", "hang"),
    "clear": ("raise", "torn", "delay"),
}


class _Around(DmaFence):
    """A copy around one of the device's own, which may be under way for longer than this one.

    inside: the fence of that, None until it begins. error: what comes of it in any case.
    """

    def __init__(self, what: str, inside: DmaFence | None, error: DeviceError | None) -> None:
        super().__init__(what)
        self.inside = inside
        self._error_then = error

    def is_signaled(self) -> bool:
        """Not before what is inside."""
        return super().is_signaled() or (self.inside is not None and self.inside.is_signaled())

    def _sleep(self, timeout: float) -> bool:
        inside = self.inside
        assert inside is not None
        try:
            self.signal(inside.wait(timeout), self._error_then)
        except BaseException as error:
            if inside.is_signaled():
                self.signal(error=error)
            elif not isinstance(error, TimedOut):
                raise
        return super().is_signaled()

    def _answer(self) -> tuple[Mask | None, BaseException | None]:
        if not super().is_signaled():
            self._sleep(0)
        return super()._answer()


class _Late(_Around):
    """A copy that begins when somebody has waited for it for *delay* seconds, and not before."""

    def __init__(self, what: str, delay: float, begin: Callable[[], Any]) -> None:
        super().__init__(what, None, None)
        self._delay = delay
        self._begin = begin

    def _sleep(self, timeout: float) -> bool:
        if self.inside is not None:
            return super()._sleep(timeout)
        msleep(min(self._delay, timeout))
        if self._delay >= timeout:
            return False
        try:
            answer = self._begin()
        except BaseException as error:  # noqa: BLE001 - wait() raises it
            self.signal(error=error)
            return True
        if isinstance(answer, DmaFence):
            self.inside = answer
            return super()._sleep(timeout - self._delay)
        self.signal(answer)
        return True


class DeviceLost(DeviceError):
    """EIO: the device is gone, with what it held."""


@dataclass(frozen=True)
class Fault:
    """Which calls of a function fail, and how.

    fail_at: their numbers, counted from 1. share: of the others so many, drawn from the seed.
    how: "raise" a DeviceError before anything is done; "torn": after half the pages (by a fence,
    where those have one); "none" or "half" of the pages that allocate() was asked for; "lose" all
    contents that copy_out() was asked for; "delay" by so many seconds, and then do it.

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
        """Let the copies that hang end after all, in failure: nothing was copied.

        What is under way inside ends by itself.
        """
        hung, self.hung = self.hung, []
        for fence in hung:
            if not isinstance(fence, _Late) or fence.inside is None:
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
        if how in ("torn", "fail") and half:
            first = getattr(self.inner, op)(*_first_half(op, half, args))
            if isinstance(first, DmaFence):
                return _Around(said, first, DeviceError(said))
        if how in ("late", "fail", "hang"):
            return self._completion(op, how, work, said)
        raise DeviceError(said)

    def _completion(self, op: str, how: str, work: Callable[[], Any], said: str) -> DmaFence:
        """One that comes late, fails, or never comes."""
        if how == "fail":
            fence = DmaFence(said)
            fence.signal(error=DeviceError(said))
            return fence
        delay = self.faults[self._kind(op)].delay
        fence = _Late(said, delay, work) if how == "late" else DmaFence(said)
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
