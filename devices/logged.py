"""A device that keeps a log of what it was asked to do, and a way to ask another the same again.

    gpu = Logged(NumpyDevice(machine, "64MiB"))
    ...                                       # until something looks wrong
    save(gpu.log, "run.jsonl")
    replay(load("run.jsonl"), NumpyDevice(another_machine, "64MiB"))   # what is answered otherwise

A replay needs no process and no contents of the first run: it copies patterns of its own, and looks
whether they come back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import structlog

from devices.dma_fence import DmaFence, answer_of
from devices.driver import Driver
from devices.wrappers import Wrapper
from mm.errors import InvalidArgument
from mm.typing import PAGE_SIZE, Indices, Mask, Payload
from mm.vectors import places

_ODD: Final = np.uint64(0x9E3779B97F4A7C15)
_PAGED: Final = ("allocate", "free", "copy_in", "copy_out", "clear")  # what a log holds


class Entry(NamedTuple):
    """One call: of which function, for which pages of the device (those that allocate() gave).

    asked: how many pages allocate() was asked for; lost: what copy_out() reported; error: what was
    raised, "" if nothing was.
    """

    op: str
    pages: list[int]
    asked: int = 0
    lost: list[int] = []  # noqa: RUF012 - a tuple's fields are never written to
    error: str = ""


class Logged(Wrapper):
    """Logs every call through structlog (logger "hmm", event "device_op"), and in `log`."""

    def __init__(self, device: Driver | Wrapper) -> None:
        self.log: list[Entry] = []
        self._logger = structlog.get_logger("hmm")
        super().__init__(device)

    def call(self, op: str, *args: Any) -> Any:
        """Write it down, whatever comes of it."""
        if op not in _PAGED:
            self._logger.info("device_op", device=self.name, op=op)
            return super().call(op, *args)
        pages = [] if op == "allocate" else args[0].tolist()
        entry = Entry(op, pages, asked=args[0] if op == "allocate" else 0)
        try:
            result = super().call(op, *args)
        except BaseException as error:
            self._note(entry._replace(error=f"{type(error).__name__}: {error}"))
            raise
        if isinstance(result, DmaFence):
            result.watch(partial(self._ended, entry, args[0]))
            return result
        if op == "allocate":
            entry = entry._replace(pages=result.tolist())
        elif result is not None:
            entry = entry._replace(lost=args[0][result].tolist())
        self._note(entry)
        return result

    def _ended(
        self, entry: Entry, pages: Indices, lost: Mask | None, error: BaseException | None
    ) -> None:
        """A copy that was under way is done, or has failed: only now it is written down."""
        if error is not None:
            entry = entry._replace(error=f"{type(error).__name__}: {error}")
        elif lost is not None:
            entry = entry._replace(lost=pages[lost].tolist())
        self._note(entry)

    def _note(self, entry: Entry) -> None:
        self.log.append(entry)
        also = {
            key: value for key, value in (("error", entry.error), ("lost", entry.lost)) if value
        }
        self._logger.info(
            "device_op", device=self.name, op=entry.op, pages=len(entry.pages), **also
        )


def save(log: Iterable[Entry], path: str | Path) -> None:
    """Write *log* to a file, a JSON object on each line."""
    lines = (json.dumps({k: v for k, v in entry._asdict().items() if v}) for entry in log)
    Path(path).write_text("".join(line + "\n" for line in lines))


def load(path: str | Path) -> list[Entry]:
    """Read what save() wrote. Raises InvalidArgument for a line that is no entry of a log."""
    log = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            entry = Entry(**{"pages": []} | json.loads(line))
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{path}, line {number} is no entry of a log: {error}") from None
        if entry.op not in _PAGED:
            raise InvalidArgument(
                f"{path}, line {number}: {entry.op!r} is not one of {', '.join(_PAGED)}"
            )
        log.append(entry)
    return log


def replay(log: Iterable[Entry], device: Driver | Wrapper) -> list[str]:
    """Ask *device*, which nobody else uses, what the log says; what went otherwise, or wrong.

    Where it gives other pages than the first device did, those stand for them. What fails is noted
    unless it failed the first time.
    """
    return _Replay(device).run(log)


class _Replay:
    """A replay under way: the pages that stand for those of the log, and what is in them."""

    def __init__(self, device: Driver | Wrapper) -> None:
        self.device = device
        self.ops = device.ops
        self.stands: dict[int, int] = {}
        self.holds: dict[int, int] = {}  # page of the log -> number of the copy that filled it
        self.copies = 0
        self.differences: list[str] = []

    def run(self, log: Iterable[Entry]) -> list[str]:
        """All entries, and then give back what is left."""
        for number, entry in enumerate(log):
            try:
                self._step(number, entry)
            except Exception as error:  # noqa: BLE001 - drivers may raise anything
                for page in entry.pages:  # what is on them now, nobody knows
                    self.holds.pop(page, None)
                if not entry.error:
                    self._differs(number, entry, f"{type(error).__name__}: {error}")
            else:
                if entry.error:
                    self._differs(number, entry, f"no error, where there was {entry.error}")
        if self.stands:
            self.ops.free(np.array(sorted(self.stands.values()), dtype=np.int64))
        return self.differences

    def _end(self, answer: Mask | DmaFence | None) -> Mask | None:
        return answer_of(answer, self.device.timeout)

    def _differs(self, number: int, entry: Entry, what: str) -> None:
        self.differences.append(f"entry {number}, {entry.op} of {len(entry.pages)} pages: {what}")

    def _step(self, number: int, entry: Entry) -> None:
        if entry.op == "allocate":
            self._allocate(number, entry)
            return
        known = [page for page in entry.pages if page in self.stands]
        pages = np.array([self.stands[page] for page in known], dtype=np.int64)
        if not known:
            return
        if entry.op == "free":
            for page in known:
                del self.stands[page]
                self.holds.pop(page, None)
            self.ops.free(pages)
        elif entry.op == "copy_in":
            self.copies += 1
            pattern = self._pattern(known, [self.copies] * len(known))
            self._end(self.ops.copy_in(pages, pattern, _rows(pages)))
            self.holds |= dict.fromkeys(known, self.copies)
        elif entry.op == "clear" and self.ops.clear is not None:
            self.ops.clear(pages)
            self.holds |= dict.fromkeys(known, 0)
        elif entry.op == "copy_out":
            self._copy_out(number, entry, known, pages)

    def _allocate(self, number: int, entry: Entry) -> None:
        pages = self.ops.allocate(entry.asked).tolist()
        if len(pages) != len(entry.pages) and not entry.error:
            self._differs(number, entry, f"{len(pages)} pages of {entry.asked} asked for")
        self.stands |= dict(zip(entry.pages, pages, strict=False))
        beyond = pages[len(entry.pages) :]
        if beyond:
            self.ops.free(np.array(beyond, dtype=np.int64))

    def _copy_out(self, number: int, entry: Entry, known: list[int], pages: Indices) -> None:
        system = np.zeros((pages.size, PAGE_SIZE), dtype=np.uint8)
        lost = self._end(self.ops.copy_out(pages, system, _rows(pages)))
        gone = set() if lost is None else {known[i] for i in places(lost).tolist()}
        if gone != set(entry.lost) & set(known):
            self._differs(number, entry, f"pages {sorted(gone)} are lost, not {entry.lost}")
        filled = [i for i, page in enumerate(known) if page in self.holds and page not in gone]
        there = [known[i] for i in filled]
        expected = self._pattern(there, [self.holds[page] for page in there])
        wrong = [
            p for p, a, b in zip(there, system[filled], expected, strict=True) if (a != b).any()
        ]
        if wrong:
            self._differs(number, entry, f"pages {wrong} do not hold what was copied there")

    def _pattern(self, pages: list[int], copies: list[int]) -> Payload:
        """What copy number copies[i] brings to page pages[i]; copy 0 is zeros."""
        first = np.array(copies, dtype=np.uint64) << np.uint64(40)
        first += np.array(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE // 8)
        words = (first[:, np.newaxis] + np.arange(1, PAGE_SIZE // 8 + 1, dtype=np.uint64)) * _ODD
        words[np.array(copies, dtype=np.int64) == 0] = 0
        return words.view(np.uint8)


def _rows(pages: Indices) -> Indices:
    return np.arange(pages.size)
