"""Pins in scripts."""

import pytest

from tests.hmm.scripts import last, play, shown

FILLED = ["mmap A 4 anon rw", "fill A 0 3 7"]


class TestPin:
    @pytest.mark.parametrize(
        ("method", "refs"),
        [("gup", 1025), ("gupw", 1025), ("gupwf", 1025), ("iou", 1025), ("vms", 2)],
    )
    def test_holds(self, method, refs):
        """Pins count 1024 each, the references of a pipe 1; afterwards nothing is left."""
        answers = play(*FILLED, f"pin p A 0 2 {method}", "state A 0 3", "unpin p", "state A 0 3")

        assert {"ret": 2, "minflt": 0, "majflt": 0} == answers[2]
        assert [[f"{refs}/1/-1/AEB", 2], ["1/1/-1/AEB", 1]] == answers[3]["s"][0]["pg"]
        assert {"ret": 0} == answers[4]
        assert [["1/1/-1/AEB", 3]] == answers[5]["s"][0]["pg"]

    def test_pinned_page_stays(self):
        """It does not go to a device."""
        answers = play(
            *FILLED, "pin p A 1 1 gupw", "migrate_to_dev A 0 3", "state A 0 3", "unpin p"
        )

        assert "ENOENT" == answers[3]["ret"]
        assert "b0b" == answers[3]["mv"][0]["src0"]
        assert "DPD" == answers[4]["s"][0]["st"]

    def test_end_of_the_script(self):
        """What was not unpinned is let go when the process ends."""
        assert [0, 0, 2, 2] == [
            answer["ret"] for answer in play(*FILLED, "pin p A 0 2 iou", "pin q A 1 2 vms")
        ]

    def test_one_long_test(self):
        """The kernel's test of long pins can run once; the other methods as often as wanted."""
        lines = [
            "pin p A 0 1 gup",
            "pin q A 1 1 gupw",
            "pin r A 1 1 iou",
            "unpin p",
            "pin s A 1 1 gup",
        ]

        assert [1, "EINVAL", 1, 0, 1] == [answer["ret"] for answer in play(*FILLED, *lines)[2:]]

    @pytest.mark.parametrize("method", ["gup", "iou", "vms"])
    def test_nothing_there(self, method):
        """What cannot be had is not held."""
        assert "EFAULT" == last(*FILLED, f"pin p A 9 1 {method}")["ret"]

    def test_part_of_a_pipe(self):
        """A pipe takes the pages before the first that cannot be had; pins are all or none."""
        lines = ["munmap A 2 1", "pin p A 0 3 vms", "pin q A 0 3 iou", "state A 0 1"]
        answers = play(*FILLED, *lines)

        assert [2, "EFAULT"] == [answer["ret"] for answer in answers[3:5]]
        assert [["2/1/-1/AEB", 1]] == answers[5]["s"][0]["pg"]

    @pytest.mark.parametrize(
        ("line", "ret"),
        [
            ("pin p A 0 1", "EUSAGE"),
            ("pin p A 0 1 glue", "EINVAL"),
            ("pin p A 0 0 gup", "EINVAL"),
            ("pin p B 0 1 gup", "NOREGION"),
            ("unpin p", "ENOENT"),
        ],
    )
    def test_refused(self, line, ret):
        """What lacks words, a method, pages, a region or the pin."""
        assert ret == last(*FILLED, line)["ret"]

    def test_at_most_32(self):
        """There are so many places for pins."""
        pins = [f"pin p{i} A 0 1 iou" for i in range(33)]

        assert [1] * 32 + ["ENOSPC"] == [answer["ret"] for answer in play(*FILLED, *pins)[2:]]

    def test_of_two_with_one_name(self):
        """The older goes first."""
        lines = ["pin p A 0 1 vms", "pin p A 1 1 vms", "unpin p", "state A 0 2"]

        assert ["1/1/-1/AEB", "2/1/-1/AEB"] == [pg for pg, _ in shown(*FILLED, *lines)["pg"]]
