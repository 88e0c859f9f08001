"""Page accesses of real programs, recorded, and the checks that a recording must pass.

A trace is an .npz file of columns, one row per event: in one epoch (a fixed number of consecutive
data accesses) one page was touched. Row i is event i. `load_trace` reads it, `Trace` holds it.
"""

from __future__ import annotations

import errno
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.errors import InvalidArgument
from mm.mmap import MMAP_MIN_ADDR
from mm.typing import PAGE_SHIFT, Indices, Mask, Pfns

PACKAGED: Final = Path(__file__).with_name("data")
ADDRESS_BITS: Final = 47  # of a user address on x86-64 with four levels, where traces come from
PAGE_FIRST: Final = MMAP_MIN_ADDR >> PAGE_SHIFT  # nobody can map the pages before it
PAGE_LIMIT: Final = 1 << (ADDRESS_BITS - PAGE_SHIFT)

_UNREADABLE: Final = (
    ValueError,  # pickled or object arrays, and headers that are none
    OSError,
    EOFError,
    SyntaxError,
    TokenError,
    MemoryError,  # a header that promises more than there is
    NotImplementedError,  # a zip of a newer kind
    RuntimeError,  # an encrypted one
    zipfile.BadZipFile,
    zlib.error,
)


class InvalidTrace(InvalidArgument):
    """EINVAL: a file that is there, and holds no page-access trace."""


class TraceColumn(NamedTuple):
    """One column of a trace file: how it is stored and what it holds."""

    name: str
    dtype: type[np.generic]
    meaning: str


COLUMNS: Final = (
    TraceColumn("page", np.uint64, "virtual page number: address >> 12"),
    TraceColumn("write", np.bool_, "the epoch stored to the page at least once"),
    TraceColumn("count", np.uint32, "accesses to the page in the epoch, 1 or more"),
    TraceColumn("epoch", np.uint32, "epoch number; never decreases, and may skip"),
)
NAMES: Final = (*(column.name for column in COLUMNS), "program", "window")


@dataclass(frozen=True, eq=False)
class Trace:
    """Which pages a program touched, epoch by epoch; E events in the order of their first touch.

    An epoch lists a page once, whatever the number of accesses.
    """

    name: str
    page: Pfns  # int64[E], virtual page number
    write: Mask  # bool[E]
    count: NDArray[np.uint32]  # uint32[E]
    epoch: Indices  # int64[E]
    program: str  # what ran
    window: int  # data accesses per epoch

    @property
    def events(self) -> int:
        """Touches of a page, E."""
        return int(self.page.size)

    @cached_property
    def _unique(self) -> tuple[Pfns, Indices]:
        footprint, place = np.unique(self.page, return_inverse=True)
        return footprint, place.astype(np.int64, copy=False)

    @property
    def footprint(self) -> Pfns:
        """Every page that was touched, ascending, int64[pages]."""
        return self._unique[0]

    @property
    def place(self) -> Indices:
        """Where each event's page stands in `footprint`, int64[E]."""
        return self._unique[1]

    @cached_property
    def epoch_start(self) -> Indices:
        """First event of each epoch that has events, then E, int64[epochs + 1]."""
        changed = np.flatnonzero(self.epoch[1:] != self.epoch[:-1]) + 1
        return np.concatenate(([0], changed, [self.events])).astype(np.int64)


def packaged_traces() -> list[str]:
    """Names of the traces that ship with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.npz"))


def load_trace(source: str | Path) -> Trace:
    """Read the trace at *source*: the path of an .npz file, or the name of a packaged trace.

    Raises FileNotFoundError where neither exists, and InvalidTrace where the file is no trace.
    """
    path = _find(Path(source))
    columns = _read(path)
    _check_names(path, columns)
    for column in COLUMNS:
        _check_column(path, columns, column)
    trace = Trace(
        name=path.stem,
        page=columns["page"].astype(np.int64),
        write=columns["write"],
        count=columns["count"],
        epoch=columns["epoch"].astype(np.int64),
        program=_program(path, columns),
        window=_window(path, columns),
    )
    _check_pages(path, columns["page"])
    _check_events(path, trace)
    return trace


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if path.name == str(path) and path.name.removesuffix(".npz") in packaged_traces():
        return PACKAGED / f"{path.name.removesuffix('.npz')}.npz"
    if path.exists():
        raise InvalidTrace(f"{path} is not a file; give the path of an .npz file")
    raise FileNotFoundError(
        errno.ENOENT,
        f"there is no trace {str(path)!r}; give the path of an .npz file,"
        f" or one of: {', '.join(packaged_traces())}",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise InvalidTrace(f"{path} is one array, not an .npz file of columns")
            return {name: loaded[name] for name in NAMES if name in loaded.files}
    except InvalidTrace:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidTrace(
            f"{path} cannot be read as an .npz file of plain arrays"
            f" (it is damaged, or something else): {reason}"
        ) from error


def _check_names(path: Path, columns: dict[str, Any]) -> None:
    missing = [name for name in NAMES if name not in columns]
    if missing:
        raise InvalidTrace(
            f"{path} has no {' and no '.join(missing)}; a trace has {', '.join(NAMES)}"
        )


def _check_column(path: Path, columns: dict[str, Any], column: TraceColumn) -> None:
    array = columns[column.name]
    wanted = np.dtype(column.dtype)
    if not isinstance(array, np.ndarray) or array.dtype != wanted or array.ndim != 1:
        raise InvalidTrace(
            f"{path}: column {column.name!r} is {_kind(array)}, and must be {wanted}[events]"
        )
    if array.size == 0:
        raise InvalidTrace(f"{path} holds no events; record one that touches a page")
    if array.size != columns["page"].size:
        raise InvalidTrace(
            f"{path}: column {column.name!r} has {array.size} rows, 'page' has"
            f" {columns['page'].size}; they must agree"
        )


def _kind(array: object) -> str:
    if not isinstance(array, np.ndarray):
        return "no array"
    return f"{array.dtype}[{', '.join(str(length) for length in array.shape)}]"


def _program(path: Path, columns: dict[str, Any]) -> str:
    program = columns["program"]
    if not isinstance(program, np.ndarray) or program.dtype.kind != "U" or program.ndim:
        raise InvalidTrace(f"{path}: 'program' is {_kind(program)}, and must be one string")
    return str(program)


def _window(path: Path, columns: dict[str, Any]) -> int:
    window = columns["window"]
    if not isinstance(window, np.ndarray) or window.dtype.kind not in "iu" or window.ndim:
        raise InvalidTrace(f"{path}: 'window' is {_kind(window)}, and must be one integer")
    if window < 1:
        raise InvalidTrace(f"{path}: 'window' is {window}, and must be at least 1")
    return int(window)


def _check_pages(path: Path, page: NDArray[np.uint64]) -> None:
    outside = np.flatnonzero((page < PAGE_FIRST) | (page >= PAGE_LIMIT))
    if outside.size:
        event = outside[0]
        raise InvalidTrace(
            f"{path}: event {event} touches page {int(page[event]):#x}, not one of the pages"
            f" {PAGE_FIRST:#x} to {PAGE_LIMIT - 1:#x} of a {ADDRESS_BITS}-bit address space;"
            " the column holds page numbers, not addresses"
        )


def _check_events(path: Path, trace: Trace) -> None:
    back = np.flatnonzero(trace.epoch[1:] < trace.epoch[:-1]) + 1
    if back.size:
        before, after = trace.epoch[back[0] - 1 : back[0] + 1]
        raise InvalidTrace(
            f"{path}: epoch {after} of event {back[0]} comes after epoch {before};"
            " sort the events by epoch"
        )
    if not trace.count.all():
        raise InvalidTrace(f"{path}: event {trace.count.argmin()} counts no access; leave it out")
    visit = np.sort(trace.epoch * trace.footprint.size + trace.place)
    twice = np.flatnonzero(visit[1:] == visit[:-1])
    if twice.size:
        epoch, place = divmod(int(visit[twice[0]]), trace.footprint.size)
        raise InvalidTrace(
            f"{path}: epoch {epoch} lists page {int(trace.footprint[place]):#x} twice;"
            " fold its accesses into one event"
        )
