"""Who performs a script: processes with their regions, on one computer.

Each answer is a dict with the fields that `mmscript` prints, in its order:

    i, who, op     the line, the process, the text
    ret ...        what the operation says of itself
    mv             what migrate_vma() did meanwhile
    vm             the counters that changed
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from hmm.script.language import Grammar, Operation
from mm.errors import BusError, MmError, SegmentationFault
from mm.machine import Machine
from mm.process import Process
from mm.typing import PAGE_SHIFT, PAGE_SIZE
from mm.vmstat import VMSTAT_NAMES

BASE: Final = 0x1000_0000_0000  # of the first region
STRIDE: Final = 1 << 30  # from one region to the next: no two share a PMD table
MAX_REGIONS: Final = 64

# Counters whose changes every answer shows.
COUNTED: Final = (
    "pgmigrate_success",
    "pgmigrate_fail",
    "thp_migration_success",
    "thp_migration_fail",
    "thp_migration_split",
    "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_collapse_alloc",
    "thp_collapse_alloc_failed",
    "thp_split_page",
    "thp_split_page_failed",
    "thp_deferred_split_page",
    "thp_split_pmd",
    "pswpin",
    "pswpout",
    "ksm_swpin_copy",
    "cow_ksm",
    "pglazyfree",
)

_KEPT: Final = [name for name in COUNTED if name in VMSTAT_NAMES]

Answer: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[..., Answer]

GRAMMARS: Final[dict[str, Grammar]] = {}
_HANDLERS: Final[dict[str, tuple[Handler, bool]]] = {}


def operation(usage: str, *, counted: bool = True) -> Callable[[Handler], Handler]:
    """Let the function answer the operation whose grammar is *usage*.

    It is called with the Actor and the words of the line, and answers what follows `op`.
    Without *counted* the answer shows no counters.
    """

    def register(handler: Handler) -> Handler:
        grammar = Grammar(usage)
        GRAMMARS[grammar.name] = grammar
        _HANDLERS[grammar.name] = handler, counted
        return handler

    return register


class Refused(Exception):
    """The operation cannot begin; the message is the answer: NOREGION, EUSAGE, ECHILD."""


class Region(NamedTuple):
    """What `mmap NAME` made: pages at a fixed address."""

    name: str
    addr: int
    npages: int


class Pages(NamedTuple):
    """Pages of a region, or beyond its end."""

    region: Region
    first: int
    npages: int

    @property
    def addr(self) -> int:
        return self.region.addr + (self.first << PAGE_SHIFT)

    @property
    def nbytes(self) -> int:
        return self.npages << PAGE_SHIFT

    @property
    def addrs(self) -> range:
        return range(self.addr, self.addr + self.nbytes, PAGE_SIZE)


class Host:
    """The computer that a script runs on: that of the recorded kernel."""

    def __init__(self) -> None:
        self.machine = Machine(("1GiB", "1GiB"), cpus=2)


class Actor:
    """A process of the script. who: its place in the tree of processes, "" or "c" or "c.d"."""

    def __init__(self, host: Host, process: Process, who: str = "") -> None:
        self.host = host
        self.process = process
        self.who = who
        self.regions: list[Region] = []

    def perform(self, op: Operation) -> Answer:
        """Run *op* and answer for it."""
        handler, counted = _HANDLERS[op.name]
        vmstat = self.host.machine.vmstat
        before = {name: vmstat[name] for name in _KEPT}
        answer = {"i": op.line, "who": self.who, "op": op.text}
        try:
            answer |= handler(self, *op.arguments, **op.options)
        except Refused as refused:
            return answer | {"ret": str(refused)}
        except MmError as error:
            answer["ret"] = error_name(error)
        changed = {name: vmstat[name] - n for name, n in before.items() if vmstat[name] != n}
        return answer | ({"vm": changed} if counted and changed else {})

    def pages(self, name: str | None, first: int = 0, count: int = 1) -> Pages:
        """Pages of the region called *name*. Raises Refused."""
        for region in self.regions:
            if region.name == name:
                return Pages(region, first, count)
        raise Refused("NOREGION")

    def signal(self, error: MmError) -> str:
        """How a process hears of *error* where it touched memory: by a signal."""
        if isinstance(error, BusError):
            return "SIGBUS/ADRERR"
        if isinstance(error, SegmentationFault):
            mapped = self.process.find_vma(error.address) is not None
            return "SIGSEGV/ACCERR" if mapped else "SIGSEGV/MAPERR"
        return error_name(error)


def error_name(error: MmError) -> str:
    """The errno of *error* by name: "EINVAL"."""
    return errno.errorcode[error.code]


def options(given: Mapping[str, Any], *names: str) -> str:
    """Those of *names* that are *given*, as a flags string: "move|strict"."""
    return "|".join(name for name in names if given.get(name))
