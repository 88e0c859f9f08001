"""Runs recorded scripts and tells where the model answers otherwise than the kernel did.

`NAME.script` is a script, `NAME.jsonl` or `NAME.jsonl.gz` what a kernel answered; the folder that
they are in is their profile.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from hmm.script.compare import Difference, compare
from hmm.script.operations import Answer
from hmm.script.run import answers
from mm.errors import InvalidArgument


class Outcome(NamedTuple):
    """What came of one script: the first difference, or what broke the run; neither if equal."""

    script: str
    profile: str
    difference: Difference | None = None
    error: str | None = None

    @property
    def equal(self) -> bool:
        """True where the model answered as the kernel did."""
        return self.difference is None and self.error is None

    def __str__(self) -> str:
        return f"{self.profile}/{self.script}: {self.error or self.difference or 'equal'}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {} if self.difference is None else self.difference._asdict()
        broken = {} if self.error is None else {"error": self.error}
        return (
            {"profile": self.profile, "script": self.script, "equal": self.equal} | found | broken
        )


def recorded_scripts(root: Path, profiles: Sequence[str] = ()) -> list[Path]:
    """The scripts below *root*, sorted; only those of *profiles* where some are given.

    Raises InvalidArgument where there is none.
    """
    scripts = sorted(
        script
        for script in root.rglob("*.script")
        if not profiles or script.parent.name in profiles
    )
    if not scripts:
        of = f" of profile {', '.join(profiles)}" if profiles else ""
        raise InvalidArgument(f"there is no script{of} below {root}; scripts end in .script")
    return scripts


def recording(script: Path) -> list[Answer]:
    """What the kernel answered to *script*. Raises FileNotFoundError."""
    packed, plain = script.with_suffix(".jsonl.gz"), script.with_suffix(".jsonl")
    text = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def check_script(script: Path, tier: str = "must", *, verify: bool = False) -> Outcome:
    """Run *script* up to the first difference. verify: and check every rule of the model."""
    outcome = Outcome(script.stem, script.parent.name)
    try:
        with script.open(errors="replace") as lines:
            played = answers(str(script), lines, verify=verify)
            return outcome._replace(difference=compare(recording(script), played, tier))
    except Exception as error:  # noqa: BLE001 - whatever breaks in the model is a finding
        return outcome._replace(error=described(error))


def described(error: Exception) -> str:
    """*error* in one line: its kind, what it says, and where in a script it came."""
    said = error.strerror if isinstance(error, OSError) else str(error)
    return "; ".join([f"{type(error).__name__}: {said}", *getattr(error, "__notes__", ())])


def check_scripts(
    scripts: Sequence[Path], tier: str = "must", jobs: int | None = None, *, verify: bool = False
) -> Iterator[Outcome]:
    """check_script() of each, in order, by *jobs* processes (default: one for each core)."""
    work = partial(check_script, tier=tier, verify=verify)
    jobs = min(jobs or os.cpu_count() or 1, len(scripts))
    if jobs == 1:
        yield from map(work, scripts)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(work, scripts, chunksize=4)
