"""userfaultfd in scripts; the recorded answers are tests/conformance/recordings/hand/22_uffd."""

import pytest

from tests.hmm.scripts import last, play

FILLED = ["mmap A 4 anon rw", "fill A 0 3 7"]


class TestRegister:
    def test_missing(self):
        """What is missing ends with SIGBUS; smaps shows whose it is."""
        answers = play(*FILLED, "uffd_reg A 0 4 missing", "readn A 0 4", "smaps A")

        assert ["7", "8", "9", "BUS"] == answers[3]["w"]
        assert "um" in answers[4]["vmas"][0]["vmflags"].split()

    def test_unregister(self):
        """Then it is ordinary memory."""
        lines = ["uffd_reg A 0 4", "uffd_unreg A 0 4", "readn A 3 1"]
        assert ["0"] == last(*FILLED, *lines)["w"]

    @pytest.mark.parametrize(
        ("line", "error"),
        [
            ("uffd_reg A 9 1", "EINVAL"),
            ("uffd_reg A 0 0", "EINVAL"),
            ("uffd_unreg A 9 1", "EINVAL"),
            ("uffd_reg B 0 1", "NOREGION"),
            ("uffd_wp A 0 1", "ENOENT"),
            ("uffd_wp A 0 0", "EINVAL"),
        ],
    )
    def test_refused(self, line, error):
        """Errors are those of the ioctls."""
        assert error == last(*FILLED, "uffd_reg A 0 4 missing", line)["ret"]

    @pytest.mark.parametrize("line", ["uffd_unreg A 0 1", "uffd_wp A 0 1", "uffd_copy A 0 1 2"])
    def test_not_open(self, line):
        """The file is opened by the first registration, in each process."""
        assert "EBADF" == last(*FILLED, line)["ret"]
        assert "EBADF" == last(*FILLED, "uffd_reg A 0 4", "fork c", f"child c {line}")["ret"]

    def test_child_has_its_own(self):
        """And may register the memory that it has got without one."""
        lines = ["uffd_reg A 0 4", "fork c", "child c readn A 3 1", "child c uffd_reg A 3 1"]
        assert ["0"] == play(*FILLED, *lines)[4]["w"]
        assert 0 == last(*FILLED, *lines)["ret"]


class TestCopy:
    def test_pages(self):
        """Page i gets the word V + i."""
        answers = play("mmap A 3 anon rw", "uffd_reg A 0 3", "uffd_copy A 0 3 5", "readn A 0 3")

        assert {"ret": 0, "copied": 3} == answers[2]
        assert ["5", "6", "7"] == answers[3]["w"]

    @pytest.mark.parametrize(
        ("line", "ret", "copied"),
        [
            ("uffd_copy A 0 1 5", "EEXIST", -17),
            ("uffd_copy A 3 1 5", 0, 1),
            ("uffd_copy A 3 2 5", "ENOENT", -2),
            ("uffd_copy A 0 0 5", "EINVAL", 0),
        ],
    )
    def test_answers(self, line, ret, copied):
        """How many pages, or why none."""
        answer = last(*FILLED, "uffd_reg A 0 4", line)
        assert (ret, copied) == (answer["ret"], answer["copied"])

    def test_up_to_what_is_there(self):
        """The pages before it are there then."""
        lines = ["uffd_reg A 0 4", "madvise A 0 2 dontneed", "uffd_copy A 0 4 5", "readn A 0 3"]
        answers = play(*FILLED, *lines)

        assert {"ret": "EAGAIN", "copied": 2} == answers[4]
        assert ["5", "6", "9"] == answers[5]["w"]


class TestProtect:
    def test_bits(self):
        """The state shows them, and stores end with SIGBUS until they are let through."""
        lines = ["uffd_reg A 0 4 wp", "uffd_wp A 1 2", "state A 0 4", "write A 1 5"]
        answers = play(*FILLED, *lines, "uffd_wp A 1 1 off", "write A 1 5", "state A 0 4")

        assert "0110" == answers[4]["s"][0]["wp"]
        assert "SIGBUS/ADRERR" == answers[5]["ret"]
        assert 0 == answers[7]["ret"]
        assert "0010" == answers[8]["s"][0]["wp"]
