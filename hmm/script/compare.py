"""Whether two answers to a script agree, for the fields that count.

`must` compares what every kernel with this model's contract would answer; `should` adds the
counts of faults, counters, smaps and flags of pages, which belong to one version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from hmm.script.operations import Answer

TIERS: Final = ("must", "should")

_FIELDS: Final = {
    "must": (
        *("ret", "cpages", "faults", "v", "w", "h", "perm", "eq", "at", "status", "copied"),
        *("shared", "sharing"),
    ),
    "should": ("minflt", "majflt", "vm", "vmas"),
}
_STATE: Final = {
    "must": ("r", "f", "n", "st", "sd", "fl", "wp", "cls", "mc", "node"),
    "should": ("kf", "pg"),
}
_MIGRATION: Final = ("k", "d", "r", "f", "n", "setup", "cpages", "src0", "dst", "src1")
_RUNS: Final = ("perm", "status", "mc", "node", "kf")
_BITS: Final = ("sd", "fl", "wp")
_WORDS: Final = ("src0", "dst", "src1")
_COUNTED_BITS: Final = 0xB  # VALID, MIGRATE and WRITE
_FREE_RET: Final = ("migrate_pages", "vmstat")  # what these return is nobody's contract


class Difference(NamedTuple):
    """The first place where two answers differ."""

    line: int
    op: str
    field: str
    kernel: Any
    model: Any

    def __str__(self) -> str:
        found = f"kernel {self.kernel!r}, model {self.model!r}"
        return f"line {self.line}: {self.op}: {self.field}: {found}"


def compare(
    recorded: Iterable[Answer], model: Iterable[Answer], tier: str = "must"
) -> Difference | None:
    """The first difference between what a kernel *recorded* and what the *model* answers.

    Takes no more of *model* than it needs. What the model answers after the last recorded line
    does not count, nor do lines in which the script itself was wrong.
    """
    answers = iter(model)
    for want in recorded:
        line, op = want["i"], want["op"]
        got = next(answers, None)
        if want["ret"] == "NOREGION" or "mv_lost" in want:
            continue
        if got is None:
            return Difference(line, op, "answer", want["ret"], None)
        if (got["i"], got["op"]) != (line, op):
            return Difference(line, op, "op", (line, op), (got["i"], got["op"]))
        wanted, found = (dict(_compared(answer, tier)) for answer in (want, got))
        for field in wanted | found:
            if wanted.get(field) != found.get(field):
                return Difference(line, op, field, wanted.get(field), found.get(field))
    return None


def _compared(answer: Answer, tier: str) -> Iterator[tuple[str, Any]]:
    """The fields of one answer that count, each in a form of its own."""
    tiers = TIERS[: TIERS.index(tier) + 1]
    skipped = ("ret",) if answer["op"].split()[0] in _FREE_RET else ()
    for key in (key for each in tiers for key in _FIELDS[each]):
        if key in answer and key not in skipped:
            yield key, _normal(key, answer[key], 0)
    for n, state in enumerate(answer.get("s", ())):
        for key in (key for each in tiers for key in _STATE[each]):
            if key in state or key == "wp":
                yield f"s[{n}].{key}", _normal(key, state.get(key, ""), state["n"])
    yield "mv#", len(answer.get("mv", ()))
    for n, record in enumerate(answer.get("mv", ())):
        for key in _MIGRATION:
            if key in record:
                yield f"mv[{n}].{key}", _normal(key, record[key], 0)


def _normal(key: str, value: Any, npages: int) -> Any:
    """*value* so that equal ones agree: runs unrolled, empty bits written out, words masked."""
    if key in _RUNS:
        return _unrolled(value)
    if key in _BITS:
        return value or "0" * npages
    if key in _WORDS:
        return [int(digit, 16) & _COUNTED_BITS for digit in value]
    if key == "pg":  # references and flags belong to one version; mappings and device do not
        return [page if page == "-" else page.split("/")[1:3] for page in _unrolled(value)]
    return value


def _unrolled(runs: list[list[Any]]) -> list[Any]:
    return [value for value, count in runs for _ in range(count)]
