"""Operations of the CPU in scripts."""

import pytest

from hmm.script.answers import fnv, pages_of_words
from tests.hmm.scripts import last, play

NO_FAULTS = {"minflt": 0, "majflt": 0}


class TestMap:
    def test_mmap(self):
        """Regions are where nothing else is, and what is touched appears in them."""
        assert [{"ret": 0}] * 2 == play("mmap A 2 anon rw", "mmap B 4 anon r off=100")

    @pytest.mark.parametrize("line", ["mmap", "mmap A 2 anon"])
    def test_missing_words(self, line):
        """A mapping needs to be described."""
        assert {"ret": "EUSAGE"} == last(line)

    def test_empty(self):
        """No pages is no mapping, and its name stays free."""
        assert ["EINVAL", "NOREGION"] == [a["ret"] for a in play("mmap A 0 anon rw", "read A 0")]

    def test_many(self):
        """There are at most 64 regions."""
        assert {"ret": "EUSAGE"} == last(*[f"mmap R{i} 1 anon rw" for i in range(65)])

    def test_first_of_a_name(self):
        """Of two regions with one name the first is meant."""
        lines = ["mmap A 1 anon rw", "mmap A 2 anon rw", "read A 1"]
        assert {"ret": "SIGSEGV/MAPERR"} | NO_FAULTS == last(*lines)

    @pytest.mark.parametrize("kind", ["hugetlb", "devmap", "sheet"])
    def test_unsupported(self, kind):
        """A kind of memory that the model lacks is refused, and says so."""
        answer = last(f"mmap A 1 {kind} rw")

        assert "EOPNOTSUPP" == answer["ret"]
        assert kind in answer["why"]

    def test_munmap(self):
        """What is unmapped is gone; where nothing is, nothing happens."""
        lines = ["mmap A 3 anon rw", "munmap A 1 1", "munmap A 1 1", "munmap A 1 0", "readn A 0 3"]
        answers = play(*lines)

        assert [0, 0, "EINVAL"] == [answer["ret"] for answer in answers[1:4]]
        assert ["0", "SEGV", "0"] == answers[4]["w"]


class TestLoadAndStore:
    def test_words(self):
        """A CPU reads what it wrote; each first touch is a fault."""
        assert [
            {"ret": 0, "minflt": 1, "majflt": 0},
            {"ret": 0, "v": "11", "minflt": 0, "majflt": 0},
            {"ret": 0, "v": "0", "minflt": 1, "majflt": 0},
        ] == play("mmap A 2 anon rw", "write A 1 0x11", "read A 1", "read A 0")[1:]

    def test_negative_word(self):
        """A word is taken modulo 2**64."""
        assert "ffffffffffffffff" == last("mmap A 1 anon rw", "write A 0 -1", "read A 0")["v"]

    @pytest.mark.parametrize(
        ("line", "signal"),
        [
            ("read A 4", "SIGSEGV/MAPERR"),
            ("read A -1", "SIGSEGV/MAPERR"),
            ("read A 0x7fffffffffffffff", "SIGSEGV/MAPERR"),
            ("write A 0 1", "SIGSEGV/ACCERR"),
        ],
    )
    def test_signals(self, line, signal):
        """An access outside the mapping, or against its rights."""
        assert {"ret": signal} | NO_FAULTS == last("mmap A 4 anon r", line)

    def test_pointers_have_64_bits(self):
        """A page number is multiplied as C does it: this one leads back to page 0."""
        assert "7" == last("mmap A 1 anon rw", "write A 0 7", "read A -9223372036854775808")["v"]

    def test_prot_none(self):
        """Memory that may not be touched at all."""
        assert "SIGSEGV/ACCERR" == last("mmap A 1 anon -", "read A 0")["ret"]

    def test_fill(self):
        """Every word of page i becomes V + i."""
        answers = play("mmap A 3 anon rw", "fill A 0 3 7", "readn A 0 3", "sum A 0 3")

        assert {"ret": 0, "minflt": 3, "majflt": 0} == answers[1]
        assert {"ret": 0, "w": ["7", "8", "9"]} | NO_FAULTS == answers[2]
        assert {"ret": 0, "h": fnv(pages_of_words(7, 3))} | NO_FAULTS == answers[3]

    @pytest.mark.parametrize("line", ["fill A 0 4 1", "sum A 0 4"])
    def test_stops_at_a_signal(self, line):
        """The page that brought it is named; those before it were touched."""
        answer = last("mmap A 3 anon rw", "munmap A 2 1", line)

        assert {"ret": "SIGSEGV/MAPERR", "at": 2, "minflt": 2, "majflt": 0} == answer

    def test_readn(self):
        """Loads go on after a signal, which stands in place of the word."""
        lines = ["mmap A 3 anon rw", "fill A 0 3 7", "munmap A 1 1", "readn A 0 4"]

        assert {"ret": 0, "w": ["7", "SEGV", "9", "SEGV"]} | NO_FAULTS == last(*lines)

    @pytest.mark.parametrize("line", ["fill A 0 0 1", "fill A 0 -5 1", "readn A 0 -1", "sum A 0 0"])
    def test_no_pages(self, line):
        """Nothing is done to no pages."""
        answer = last("mmap A 1 anon rw", line)

        assert (0, 0) == (answer["ret"], answer["minflt"])

    def test_at_most_4096_pages(self):
        """One operation touches no more."""
        assert 4096 == last("mmap A 5000 anon rw", "fill A 0 5000 1")["minflt"]


class TestProcMem:
    def test_reads_and_writes(self):
        """A debugger stores where the process itself may not."""
        lines = ["mmap A 1 anon r", "memwrite A 0 0x2a", "memread A 0", "read A 0"]
        answers = play(*lines)

        assert {"ret": 8} == {"ret": answers[1]["ret"]}
        assert (8, "2a", 0) == tuple(answers[2][key] for key in ("ret", "v", "minflt"))
        assert "2a" == answers[3]["v"]

    @pytest.mark.parametrize("line", ["memread A 1", "memwrite A 1 1"])
    def test_nothing_there(self, line):
        """Without a mapping there is nothing to transfer."""
        assert {"ret": "EIO"} | NO_FAULTS == last("mmap A 1 anon rw", line)
