"""Named events: free while nobody listens, structlog when somebody does.

    with trace.to_structlog():                 # every event
        gpu.to_device(process, a.addr, a.nbytes)

    with trace.listen(print, "migrate_vma_*"):  # some, to any function of (event, fields)
        ...

A tracepoint is called only behind its own truth value, so that the fields are not even computed
when nobody listens: `if migrate_vma_collect: migrate_vma_collect(start=start, ...)`.
Linux: include/linux/tracepoint.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import structlog

from mm.errors import InvalidArgument

Probe: TypeAlias = Callable[[str, dict[str, Any]], object]

_tracepoints: dict[str, TracePoint] = {}


class TracePoint:
    """One named event. Linux: TRACE_EVENT(), include/trace/events/."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.probes: tuple[Probe, ...] = ()
        _tracepoints[name] = self

    def __bool__(self) -> bool:
        return bool(self.probes)

    def __call__(self, **fields: Any) -> None:
        for probe in self.probes:
            probe(self.name, fields)


def names() -> list[str]:
    """Every event that the loaded modules can emit, sorted."""
    return sorted(_tracepoints)


@contextmanager
def listen(probe: Probe, *patterns: str) -> Iterator[None]:
    """Call *probe*(event, fields) for the events that match any of *patterns* (default: all).

    Raises InvalidArgument where a pattern matches no event.
    """
    chosen: dict[str, TracePoint] = {}
    for pattern in patterns or ("*",):
        matching = {n: point for n, point in _tracepoints.items() if fnmatchcase(n, pattern)}
        if not matching:
            raise InvalidArgument(f"no event matches {pattern!r}; there are {', '.join(names())}")
        chosen |= matching
    for point in chosen.values():
        point.probes += (probe,)
    try:
        yield
    finally:
        for point in chosen.values():
            kept = list(point.probes)
            kept.remove(probe)
            point.probes = tuple(kept)


@contextmanager
def to_structlog(*patterns: str) -> Iterator[None]:
    """Log the events that match *patterns* (default: all) through structlog, level info."""
    log = structlog.get_logger("hmm")
    with listen(lambda event, fields: log.info(event, **fields), *patterns):
        yield
