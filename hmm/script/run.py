"""Runs scripts: one JSON line for each operation, in order, each written before the next begins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from hmm.script import devices, family, memory, nodes, pins, state, uffd
from hmm.script.actor import Actor, Host
from hmm.script.language import parse
from hmm.script.operations import GRAMMARS, Answer, Unsupported, operation

OPERATIONS: Final = (
    memory,
    state,
    devices,
    nodes,
    pins,
    uffd,
    family,
)  # the files that have operations
NOT_YET: Final = ("ksm PASSES",)


def _not_yet(usage: str) -> None:
    @operation(usage)
    def refuse(actor: Actor, *words: Any, **given: Any) -> Answer:
        """The model has no such thing yet."""
        raise Unsupported(f"{usage.split(maxsplit=1)[0]}: the model has no such thing yet")


for _usage in NOT_YET:
    _not_yet(_usage)


def answers(
    name: str, lines: Iterable[str], *, host: Host | None = None, verify: bool = False
) -> Iterator[Answer]:
    """Perform the script *name*, by default on a fresh computer; an answer for each operation.

    verify: check every rule of the model at the end. Raises ParseError at a line that is no
    operation, when what stands before it is done. Whatever else is raised is a bug of the model,
    with a note that says at which line.
    """
    host = host or Host()
    actor = Actor(host, host.machine.spawn("script"))
    try:
        for op in parse(GRAMMARS, name, lines):
            try:
                answer = actor.perform(op)
            except Exception as error:
                error.add_note(f"{name}, line {op.line}: {op.text}")
                raise
            yield answer
        if verify:
            host.machine.verify()
    finally:
        actor.exit()


def json_line(answer: Answer) -> str:
    """*answer* as one line, without spaces."""
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False)
