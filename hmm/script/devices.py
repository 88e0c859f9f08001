"""What devices do, through the reference driver: hmm/dmirror.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hmm.dmirror import Dmirror, DmirrorAnswer
from hmm.script.actor import MAX_PAGES, Actor, Answer, Pages, Refused, error_name, operation
from hmm.script.answers import contents, runs
from hmm.script.language import Choice
from mm.errors import MmError
from mm.typing import PAGE_SIZE

_UNALIGNED = 8  # bytes that the option of this name adds to the address


def ioctl(
    actor: Actor,
    choice: Choice,
    call: Callable[[Dmirror], DmirrorAnswer | None],
    *shown: str,
) -> Answer:
    """Let the chosen device do *call*; of what it answers, show the fields *shown*."""
    mirror = actor.mirror(choice)
    minor = actor.process.min_flt
    answer: Answer = {"ret": 0}
    try:
        got = call(mirror)
        if got is not None:
            answer |= _fields(got, shown)
    except MmError as error:
        answer["ret"] = error_name(error)
    return answer | {"minflt": actor.process.min_flt - minor}


def _fields(got: DmirrorAnswer, shown: tuple[str, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(got, name) for name in shown if name != "data"}
    if "perm" in fields:
        fields["perm"] = runs(f"{perm:02x}" for perm in fields["perm"].tolist())
    if "data" in shown and got.data is not None:
        fields |= contents(got.data)
    return fields
