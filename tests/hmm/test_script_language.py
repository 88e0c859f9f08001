"""The script language: lines as operations, and what is said of those that are none."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmm.script import GRAMMARS, ParseError, parse, parse_line
from hmm.script.language import Choice, number

ORACLE = Path(__file__).parents[1] / "conformance" / "recordings"


def line(text):
    """The name, arguments and options of the operation that *text* is."""
    op = parse_line(GRAMMARS, text)
    return op.name, op.arguments, op.options


class TestNumber:
    @pytest.mark.parametrize(
        ("text", "value"),
        [("0", 0), ("7", 7), ("-7", -7), ("+7", 7), ("0x1F", 31), ("-0X1f", -31), ("017", 15)],
    )
    def test_as_strtol(self, text, value):
        """Decimal, hexadecimal and octal, with a sign."""
        assert value == number(text)

    @pytest.mark.parametrize("text", ["", "x", "0x", "08", "1_0", "1.0", "--1", " 1", "٣"])
    def test_not_a_number(self, text):
        """What strtol() would read half of, or as 0, is none."""
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            number(text)

    @given(st.integers())
    def test_any(self, value):
        """Every integer is read back from its decimal and hexadecimal forms."""
        assert value == number(str(value)) == number(hex(value))


class TestLine:
    @pytest.mark.parametrize(
        ("text", "op"),
        [
            ("read A 3", ("read", ("A", 3), {})),
            ("write\tA  3 -1", ("write", ("A", 3, 2**64 - 1), {})),
            (
                "mmap A 4 anon rw off=100 populate",
                ("mmap", ("A", 4, "anon", "rw"), {"off": 100, "populate": True}),
            ),
            ("mremap A 0 4 M dontunmap", ("mremap", ("A", 0, 4, "M", None), {"dontunmap": True})),
            ("mremap A 0 4 M 6", ("mremap", ("A", 0, 4, "M", 6), {})),
            ("move_pages A 0 4 alt all", ("move_pages", ("A", 0, 4, "alt"), {"all": True})),
            ("movelist A 3:1 null all", ("movelist", ("A", [((3, 1),), (None,)]), {"all": True})),
            ("state A 0 4 B 1 2", ("state", ([("A", 0, 4), ("B", 1, 2)],), {})),
            ("vmstat # since boot", ("vmstat", (), {})),
        ],
    )
    def test_words(self, text, op):
        """Words are read by the grammar of the operation, options wherever they stand."""
        assert op == line(text)

    @pytest.mark.parametrize(
        ("text", "op"),
        [
            ("munmap A", ("munmap", ("A", 0, 1), {})),
            ("read", ("read", (None, 0), {})),
            ("mmap A 4 anon", ("mmap", ("A", 4, "anon", None), {})),
            ("clear_refs", ("clear_refs", ("4",), {})),
        ],
    )
    def test_missing_words(self, text, op):
        """They have defaults, or are None for the operation to refuse."""
        assert op == line(text)

    @pytest.mark.parametrize(
        ("text", "choice"),
        [
            ("dread A 0 1", Choice(0)),
            ("dread @1 A 0 1", Choice(1)),
            ("@p3 dread A 0 1", Choice(3, inherited=True)),
            ("dread A 0 1 @0 @2", Choice(2)),
        ],
    )
    def test_device(self, text, choice):
        """It is selected from anywhere; the last one counts."""
        assert choice == line(text)[1][-1]

    def test_child(self):
        """What a child shall do is an operation of its own, of the same line."""
        op = parse_line(GRAMMARS, "child c child d read A 3", 7)

        outer, inner = op.arguments[1], op.arguments[1].arguments[1]
        assert ("child", "c") == (op.name, op.arguments[0])
        assert ("child", "d", "child d read A 3") == (outer.name, outer.arguments[0], outer.text)
        assert ("read", ("A", 3), 7) == (inner.name, inner.arguments, inner.line)

    @pytest.mark.parametrize(("text", "name"), [("child", None), ("child c", "c")])
    def test_child_without_operation(self, text, name):
        """It is for the operation to answer."""
        assert (name, None) == line(text)[1]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("raed A 0", "expected an operation at 'raed'; is it read?"),
            ("children c", "expected an operation at 'children'"),
            ("@1", "expected an operation at ''"),
            ("read A zero", "expected a number, such as 16 or 0x10 at 'zero', in: read NAME page"),
            ("read A 0 1", "expected nothing more at '1', in: read NAME page"),
            ("mmap A 4 anon rwz", "expected letters of rwx, or - at 'rwz'"),
            ("mmap A 4 anon rw off", "expected nothing more at 'off'"),
            ("mmap A 4 anon rw off=x", "expected a number, such as 16 or 0x10 at 'x'"),
            ("mmap A 4 anon rw populate=1", "expected nothing more at 'populate=1'"),
            (
                "mbind A 0 1 some 1",
                "expected default, preferred, bind, interleave or local at 'some'",
            ),
            ("movelist A 3-1", "expected a page and a node, such as 3:1, or null at '3-1'"),
            ("state A 0 1 B", "expected 3 words for each, after 'B', in: state {NAME first n}"),
            ("read A 0 @7", "expected a device, @0 to @3 or @p0 to @p3, at '@7'"),
            ("child c raed A 0", "expected an operation at 'raed'; is it read?"),
        ],
    )
    def test_refuses(self, text, says):
        """What would silently be read as something else is refused, with what was expected."""
        with pytest.raises(ParseError) as refused:
            parse_line(GRAMMARS, text)

        assert refused.value.strerror.startswith(says)

    @pytest.mark.parametrize(
        "text", ["z" * 10**6, "z " * 10**6, "child " * 10**6, "\0\x1b[2J", "读"]
    )
    def test_garbage(self, text):
        """However much of it, the message is short and printable."""
        with pytest.raises(ParseError) as refused:
            parse_line(GRAMMARS, text)

        assert len(refused.value.strerror) < 200
        assert refused.value.strerror.isascii()
        assert refused.value.strerror.isprintable()

    @given(st.text())
    def test_any_text(self, text):
        """It is an operation or refused; nothing else is raised."""
        with suppress(ParseError):
            parse_line(GRAMMARS, text)


class TestScript:
    def test_lines(self):
        """Empty lines and comments are no operations, and count."""
        lines = ["# a script\n", "\n", "  \t \r\n", "\tvmstat \r\n", "  # end", "smaps A"]

        ops = list(parse(GRAMMARS, "s", lines))

        assert [(4, "vmstat "), (6, "smaps A")] == [(op.line, op.text) for op in ops]

    def test_error_names_its_place(self):
        """A wrong line is named with its script, when the lines before it are done."""
        ops = parse(GRAMMARS, "dir/s.script", ["vmstat", "", "vmstta"])

        assert "vmstat" == next(ops).name
        with pytest.raises(ParseError, match=r"dir/s\.script, line 3: expected an operation"):
            next(ops)

    def test_recorded_scripts(self):
        """Every recorded script is a script."""
        for script in sorted(ORACLE.rglob("*.script")):
            with script.open() as lines:
                assert len(list(parse(GRAMMARS, str(script), lines))) > 0
