"""The table of operations: each is a function, under the grammar of its line."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from hmm.script.language import Grammar
from mm.errors import MmError

Answer: TypeAlias = dict[str, Any]  # the fields of one JSON line, in their order
Handler: TypeAlias = Callable[..., Answer]

GRAMMARS: Final[dict[str, Grammar]] = {}
HANDLERS: Final[dict[str, Handler]] = {}
UNCOUNTED: Final[set[str]] = set()  # operations whose answers show no counters


def operation(usage: str, *, counted: bool = True) -> Callable[[Handler], Handler]:
    """Let the function answer the operation whose grammar is *usage*.

    It is called with the Actor and the words of the line, options by name, and gives the fields
    from `ret` on. Without *counted* the answer shows no counters.
    """

    def register(handler: Handler) -> Handler:
        grammar = Grammar(usage)
        GRAMMARS[grammar.name] = grammar
        HANDLERS[grammar.name] = handler
        if not counted:
            UNCOUNTED.add(grammar.name)
        return handler

    return register


class Refused(Exception):
    """The operation cannot begin; the message is what it answers: NOREGION, EUSAGE, ECHILD."""


class Unsupported(MmError):
    """EOPNOTSUPP: Linux has it, and this model has not."""

    code = errno.EOPNOTSUPP


def flags(given: Mapping[str, Any], *names: str) -> str:
    """Those of *names* that are *given*, with bars between them: "move|strict"."""
    return "|".join(name for name in names if given.get(name))
