"""Runs scripts: one JSON line for each operation, in order, each written before the next begins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from hmm.script import memory, state
from hmm.script.actor import GRAMMARS, Actor, Answer, Host
from hmm.script.language import parse

OPERATIONS = (memory, state)  # the files whose operations there are


def answers(name: str, lines: Iterable[str]) -> Iterator[Answer]:
    """Perform the script *name* on a fresh computer; an answer for each operation.

    Raises ParseError at a line that is no operation, when what stands before it is done.
    """
    host = Host()
    with host.machine.spawn("script") as process:
        actor = Actor(host, process)
        for operation in parse(GRAMMARS, name, lines):
            yield actor.perform(operation)


def json_line(answer: Answer) -> str:
    """*answer* as one line, without spaces."""
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False)
