"""Operations of devices in scripts."""

import pytest

from hmm.script.answers import fnv, pages_of_words
from tests.hmm.scripts import last, play, shown

FILLED = ["mmap A 4 anon rw", "fill A 0 3 7"]


class TestMigrate:
    def test_there_and_back(self):
        """Pages and holes go to the device, what is there comes back; the stages are recorded."""
        there, back = play(*FILLED, "migrate_to_dev A 0 4", "migrate_to_sys A 0 4")[-2:]
        record = {"k": "d", "d": 0, "r": "A", "f": 0, "n": 4, "setup": 0, "cpages": 4}

        assert (0, 4, ["7", "8", "9", "0"]) == (there["ret"], there["cpages"], there["w"])
        assert [record | {"src0": "bbb2", "dst": "9999", "src1": "bbb2"}] == there["mv"]
        assert {"ret": 0, "cpages": 4, "minflt": 0} == {
            key: back[key] for key in back if key != "mv"
        }
        assert ("s", "bbbb", "9999", "bbbb") == tuple(
            back["mv"][0][key] for key in ("k", "src0", "dst", "src1")
        )

    def test_cpu_faults(self):
        """Each page that the CPU touches comes back by a run of its own."""
        answer = last(*FILLED, "migrate_to_dev A 0 4", "readn A 1 2")

        assert (["8", "9"], 2) == (answer["w"], answer["minflt"])
        assert [("f", 0, "A", 1, 1, "b"), ("f", 0, "A", 2, 1, "b")] == [
            tuple(record[key] for key in ("k", "d", "r", "f", "n", "src0"))
            for record in answer["mv"]
        ]

    def test_records_of_two_devices(self):
        """Runs come in the order in which they were made."""
        lines = ["migrate_to_dev A 0 2 @0", "migrate_to_dev A 2 2 @1", "readn A 0 4"]
        answer = last(*FILLED, *lines)

        assert [0, 0, 1, 1] == [record["d"] for record in answer["mv"]]

    def test_window(self):
        """Migrations go by 64 pages, and each run shows its pages."""
        answer = last("mmap A 70 anon rw", "migrate_to_dev A 0 70")

        assert [(0, 64), (64, 6)] == [(record["f"], record["n"]) for record in answer["mv"]]
        assert "w" not in answer
        assert fnv(pages_of_words(0, 70) * 0) == answer["h"]


class TestAccess:
    def test_read(self):
        """The device faults in what it does not reach, and reads all."""
        answer = last(*FILLED, "dread A 0 4")
        data = pages_of_words(7, 4)
        data[3] = 0

        assert (4, 1, ["7", "8", "9", "0"], fnv(data)) == tuple(
            answer[key] for key in ("cpages", "faults", "w", "h")
        )

    def test_write(self):
        """The device stores, and the CPU loads it."""
        answers = play(*FILLED, "dwrite A 1 3 0x20", "readn A 0 4")

        assert (0, 3, 1) == tuple(answers[2][key] for key in ("ret", "cpages", "faults"))
        assert ["7", "20", "21", "22"] == answers[3]["w"]

    def test_snapshot(self):
        """A byte for each page, in runs."""
        answer = last(*FILLED, "migrate_to_dev A 1 1", "snapshot A 0 5")

        assert [["02", 1], ["22", 1], ["02", 1], ["00", 1], ["ff", 1]] == answer["perm"]

    @pytest.mark.parametrize("line", ["dread A 0 5", "dwrite A 4 1 1"])
    def test_unmapped(self, line):
        """An error copies nothing out."""
        answer = last(*FILLED, line)

        assert "EFAULT" == answer["ret"]
        assert {"ret", "minflt"} == answer.keys()

    def test_exclusive(self):
        """A page that the device took is its own until the CPU touches it."""
        lines = ["exclusive A 0 2", "check_exclusive A 0 2", "read A 0", "check_exclusive A 0 1"]
        answers = play(*FILLED, *lines)

        assert [0, "EPERM", 0, 0] == [answer["ret"] for answer in answers[2:]]
        assert (2, ["7", "8"]) == (answers[2]["cpages"], answers[2]["w"])
        assert {"ret", "minflt"} == answers[5].keys()
        assert "XP" == shown(*FILLED, "exclusive A 0 1", "state A 0 2")["st"]


class TestWrongRange:
    @pytest.mark.parametrize("op", ["dread", "dwrite", "migrate_to_dev", "snapshot", "exclusive"])
    @pytest.mark.parametrize("n", ["0", "-1", "1 unaligned"])
    def test_refused(self, op, n):
        """No pages, a negative number of them, and an address inside a page."""
        first, _, option = n.partition(" ")
        value = " 1" if op == "dwrite" else ""
        assert "EINVAL" == last(*FILLED, f"{op} A 0 {first}{value} {option}")["ret"]

    def test_more_than_memory(self):
        """The driver has no buffer of that size."""
        assert "ENOMEM" == last(*FILLED, "dread A 0 0x7fffffffffff")["ret"]

    def test_no_region(self):
        """A region that was never made."""
        assert {"ret": "NOREGION"} == last("dread A 0 1")


class TestFile:
    def test_open_and_close(self):
        """The last to close a device's file lets all its pages go back to system memory."""
        lines = ["migrate_to_dev A 0 4", "dclose", "state A 0 4"]

        assert "PPPP" == shown(*FILLED, *lines)["st"]

    def test_other_device(self):
        """What another device has stays there."""
        lines = ["migrate_to_dev A 0 4", "dopen @1", "dclose @1", "state A 0 4"]

        assert "DDDD" == shown(*FILLED, *lines)["st"]

    def test_not_open(self):
        """What is not open cannot be closed, nor what no parent has opened be used."""
        answers = play(*FILLED, "dclose", "dread A 0 1 @p0")

        assert ["EBADF", "EBADF"] == [answer["ret"] for answer in answers[2:]]

    def test_release(self):
        """A device that gives its memory back evicts its pages too."""
        answers = play(*FILLED, "migrate_to_dev A 0 4", "drelease", "state A 0 4")

        assert {"ret": 0, "minflt": 0} == answers[3]
        assert "PPPP" == answers[4]["s"][0]["st"]

    def test_coherent(self):
        """Devices 2 and 3 have memory that the CPU reaches."""
        state = shown(*FILLED, "migrate_to_dev A 0 4 @2", "state A 0 4")

        assert ("PPPP", [["ENOENT", 4]]) == (state["st"], state["node"])


class TestBench:
    def test_counts(self):
        """What is timed is counted: pages, and those that went."""
        answer = last("mmap A 100 anon rw", "bench A 0 100 2 @1")

        assert (0, 200, 200) == tuple(answer[key] for key in ("ret", "pages", "migrated"))
        assert answer["to_dev_s"] > 0
        assert answer["to_sys_pps"] > 0
