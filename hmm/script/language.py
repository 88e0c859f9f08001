"""The script language: one operation a line, read by the grammar that stands above each operation.

    mmap A 16 anon rw       # region A, 16 pages
    write A 3 0x11          # page 3 of it
    child c dread A 0 16 @1 # in child c, through device 1

A grammar names the words of its operation in order, each with its kind and default in WORDS;
`[word]` and `[word=K]` are options, what stands in braces may repeat, and `@` says that the
operation is for a device, which `@1` or `@p1` selects from anywhere in the line.

The parser refuses what would silently be read as something else: an operation or option that
nobody knows, a word that is no number where one belongs. What the operation itself can answer it
lets pass: a region that does not exist (NOREGION), words that are missing (EUSAGE, or a default).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from mm.errors import InvalidArgument

_NUMBER: Final = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_DEVICE: Final = re.compile(r"@(p?)([0-3])")
_CHILD: Final = re.compile(r"child(?:\s+(\S+)(?:\s+(\S.*))?)?\s*", re.DOTALL)
_MAX_CHILDREN: Final = 16  # inside one another
_SHOWN: Final = 40  # characters of a wrong word that the message repeats


class ParseError(InvalidArgument):
    """A line that is no operation; the message says where, and what was expected."""


class Choice(NamedTuple):
    """The device that a line selects; inherited: by the file that the parent process opened."""

    device: int = 0
    inherited: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One line of a script, or what `child C` hands on to C.

    arguments: in the order of the grammar, None for what is missing and has no default, and last
    the device where it takes one; options: those that were given, True or their value.
    """

    line: int
    text: str
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def number(text: str) -> int:
    """*text* as strtol() takes it: decimal, 0x hexadecimal or 0 octal. Raises ValueError."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(text)
    sign, digits = match.groups()
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    return int(sign + digits, base)


def _long(text: str) -> int:
    return max(-(1 << 63), min(number(text), (1 << 63) - 1))


def _word64(text: str) -> int:
    return number(text) & ((1 << 64) - 1)


def _prot(text: str) -> str:
    if set(text) - set("rwx-"):
        raise ValueError(text)
    return text


def _node(text: str) -> int | str:
    return text if text == "alt" else _long(text)


def _mode(text: str) -> str:
    if text not in ("default", "preferred", "bind", "interleave", "local"):
        raise ValueError(text)
    return text


def _place(text: str) -> tuple[int, int] | None:
    if text == "null":
        return None
    page, node = text.split(":")
    return _long(page), _long(node)


class Kind(NamedTuple):
    """How one word of a grammar is read, what that is called, and what stands for it if missing."""

    read: Callable[[str], Any]
    expected: str
    default: Any

    def of(self, word: str) -> Any:
        """The value of *word*. Raises ValueError: what was expected."""
        try:
            return self.read(word)
        except ValueError:
            raise ValueError(f"{self.expected} at {shown(word)}") from None


_A_NUMBER: Final = "a number, such as 16 or 0x10"
WORDS: Final = {
    "NAME": Kind(str, "a region", None),
    "NEW": Kind(str, "a name for the new region", None),
    "C": Kind(str, "a child", "c"),
    "ID": Kind(str, "a name for the pin", ""),
    "KIND": Kind(str, "a kind of memory", None),
    "ADVICE": Kind(str, "an advice", ""),
    "METHOD": Kind(str, "a method of pinning", None),
    "REFS": Kind(str, "what to clear", "4"),
    "PROT": Kind(_prot, "letters of rwx, or -", None),
    "MODE": Kind(_mode, "default, preferred, bind, interleave or local", "default"),
    "MASK": Kind(_word64, "a bit mask of nodes, such as 0x3", 0),
    "NODE": Kind(_node, "a node, or alt", 0),
    "PAGE:NODE": Kind(_place, "a page and a node, such as 3:1, or null", None),
    "V": Kind(_word64, _A_NUMBER, 0),
    "UFFD": Kind(str, "missing or wp", "missing"),
    "PASSES": Kind(str, "a number of scans, or unmerge", "3"),
    "newn": Kind(_long, _A_NUMBER, None),
    "n": Kind(_long, _A_NUMBER, 1),
    "reps": Kind(_long, _A_NUMBER, 1),
    "first": Kind(_long, _A_NUMBER, 0),
    "page": Kind(_long, _A_NUMBER, 0),
    "pages": Kind(_long, _A_NUMBER, None),
}
_OPTION_VALUES: Final = {"K": WORDS["page"], "C": WORDS["C"]}


class Grammar:
    """What the words of one operation are, as its usage says."""

    def __init__(self, usage: str) -> None:
        self.usage = usage
        plain, _, group = usage.partition("{")
        group, _, options = group.partition("}") if group else ("", "", "")
        self.name, *words = f"{plain} {options}".split()
        self.takes_device = "@" in words
        self.slots = [WORDS[word] for word in words if word[0] not in "[@"]
        self.group = [WORDS[word] for word in group.split()]
        self.options: dict[str, Kind | None] = {}
        for word in words:
            if word.startswith("["):
                option, _, value = word[1:-1].partition("=")
                self.options[option] = _OPTION_VALUES[value] if value else None

    def parse(self, words: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """*words* after the name as arguments and options. Raises ValueError: what was expected."""
        plain: list[str] = []
        options: dict[str, Any] = {}
        for word in words:
            option, equals, value = word.partition("=")
            kind = self.options.get(option)
            if option in self.options and bool(equals) == (kind is not None):
                options[option] = True if kind is None else kind.of(value)
            else:
                plain.append(word)
        count = len(self.slots)
        arguments = [kind.of(word) for kind, word in zip(self.slots, plain, strict=False)]
        arguments += [kind.default for kind in self.slots[len(arguments) :]]
        if self.group:
            arguments.append(self._groups(plain[count:]))
        elif len(plain) > count:
            raise ValueError(f"nothing more at {shown(plain[count])}")
        return tuple(arguments), options

    def _groups(self, words: list[str]) -> list[tuple[Any, ...]]:
        size = len(self.group)
        if len(words) % size:
            raise ValueError(f"{size} words for each, after {shown(words[-1])}")
        values = [kind.of(word) for kind, word in zip(self.group * len(words), words, strict=False)]
        return [tuple(values[i : i + size]) for i in range(0, len(values), size)]


def shown(word: str) -> str:
    """*word* as a message repeats it: quoted, printable and short."""
    quoted = ascii(word[: _SHOWN + 1])
    return quoted if len(quoted) <= _SHOWN + 2 else f"{quoted[:_SHOWN]}...{quoted[0]}"


def parse_line(
    grammars: Mapping[str, Grammar], text: str, line: int = 1, depth: int = 0
) -> Operation:
    """The operation that *text*, line *line* of a script, is. Raises ParseError."""
    if match := _CHILD.fullmatch(text):
        if depth == _MAX_CHILDREN:
            raise ParseError(f"expected an operation after {depth} times child")
        handed_on = parse_line(grammars, match[2], line, depth + 1) if match[2] else None
        return Operation(line, text, "child", (match[1], handed_on), {})
    words, choice = [], Choice()
    for word in text.split():
        if word.startswith("#"):
            break
        if word.startswith("@"):
            choice = _device(word)
        else:
            words.append(word)
    name, *rest = words or [""]
    if name not in grammars:
        near = difflib.get_close_matches(name[:_SHOWN], grammars, n=1)
        hint = f"; is it {near[0]}?" if near else ""
        raise ParseError(f"expected an operation at {shown(name)}{hint}")
    grammar = grammars[name]
    try:
        arguments, options = grammar.parse(rest)
    except ValueError as error:
        raise ParseError(f"expected {error}, in: {grammar.usage}") from None
    return Operation(line, text, name, arguments + (choice,) * grammar.takes_device, options)


def _device(word: str) -> Choice:
    match = _DEVICE.fullmatch(word)
    if match is None:
        raise ParseError(f"expected a device, @0 to @3 or @p0 to @p3, at {shown(word)}")
    return Choice(int(match[2]), bool(match[1]))


def parse(grammars: Mapping[str, Grammar], name: str, lines: Iterable[str]) -> Iterator[Operation]:
    """The operations of the script *name*, each before the next line is read.

    Raises ParseError that says name, line and what was expected.
    """
    for line, written in enumerate(lines, 1):
        text = written.rstrip("\r\n").lstrip(" \t")
        if text and not text.startswith("#"):
            try:
                yield parse_line(grammars, text, line)
            except ParseError as error:
                raise ParseError(f"{name}, line {line}: {error.strerror}") from None
