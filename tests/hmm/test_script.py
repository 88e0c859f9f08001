"""Scripts: what each operation answers."""

import pytest

from hmm.script import ParseError, answers


def play(*lines):
    """What a script of *lines* answers, without line, process and text."""
    return [
        {key: value for key, value in answer.items() if key not in ("i", "who", "op")}
        for answer in answers("test", lines)
    ]


class TestMemory:
    def test_store_and_load(self):
        """A CPU reads what it wrote; each first touch is a fault."""
        assert [
            {"ret": 0},
            {"ret": 0, "minflt": 1, "majflt": 0},
            {"ret": 0, "v": "11", "minflt": 0, "majflt": 0},
            {"ret": 0, "v": "0", "minflt": 1, "majflt": 0},
        ] == play("mmap A 2 anon rw", "write A 1 0x11", "read A 1", "read A 0")

    def test_signals(self):
        """Accesses outside and against the mapping say which signal came, and at which page."""
        assert [
            {"ret": "SIGSEGV/MAPERR", "minflt": 0, "majflt": 0},
            {"ret": "SIGSEGV/ACCERR", "minflt": 0, "majflt": 0},
            {"ret": "SIGSEGV/MAPERR", "at": 2, "minflt": 2, "majflt": 0},
        ] == play("mmap A 4 anon r", "read A 4", "write A 0 1", "mmap B 2 anon rw", "fill B 0 3 1")[
            1:3
        ] + play("mmap B 2 anon rw", "fill B 0 3 1")[1:]

    def test_readn(self):
        """Loads go on after a signal."""
        answer = play("mmap A 3 anon rw", "fill A 0 3 7", "munmap A 1 1", "readn A 0 4")[-1]

        assert ["7", "SEGV", "9", "SEGV"] == answer["w"]

    def test_region_is_missing(self):
        """An operation on a region that was never made is answered, not refused."""
        assert [{"ret": "NOREGION"}] == play("read A 0")


class TestParser:
    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("raed A 0", "test, line 1: expected an operation at 'raed'; is it read?"),
            ("read A zero", "expected a number, such as 16 or 0x10 at 'zero', in: read NAME page"),
            ("read A 0 1", "expected nothing more at '1'"),
            ("read A 0 @7", "expected a device, @0 to @3 or @p0 to @p3, at '@7'"),
        ],
    )
    def test_refuses(self, line, says):
        """What would be read as something else is refused, with what was expected."""
        with pytest.raises(ParseError, match=says.replace("?", r"\?")):
            play(line)
