"""What scripts show of page tables and pages: state, smaps, vmstat."""

import pytest

from tests.hmm.scripts import last, play, shown

MAPPED = ["mmap A 4 anon rw", "write A 0 1", "read A 1", "write A 2 2"]


class TestState:
    def test_system_pages(self):
        """A page of the process's own, the zero page and a hole."""
        assert {
            "r": "A",
            "f": 0,
            "n": 4,
            "st": "PZP.",
            "sd": "1111",
            "ex": "1010",
            "fl": "",
            "cls": [1, 2, 3, 0],
            "mc": [[1, 1], [-1, 1], [1, 1], [-1, 1]],
            "kf": [["AB", 1], ["Z", 1], ["AB", 1], ["", 1]],
            "pg": [["1/1/-1/AEB", 1], ["-", 1], ["1/1/-1/AEB", 1], ["-", 1]],
            "node": [[0, 1], ["EFAULT", 1], [0, 1], ["ENOENT", 1]],
        } == shown(*MAPPED, "state A 0 4")

    def test_device_pages(self):
        """In device memory a page has no node and no line in /proc, and its device shows."""
        state = shown(*MAPPED, "migrate_to_dev A 0 3 @1", "state A 0 4")

        assert ("DDD.", [1, 2, 3, 0]) == (state["st"], state["cls"])
        assert ([[-1, 4]], [["", 4]], [["ENOENT", 4]]) == tuple(
            state[key] for key in ("mc", "kf", "node")
        )
        assert ["1/1/AEB", "-"] == [page.partition("/")[2] or page for page, _ in state["pg"]]

    def test_beyond_the_region(self):
        """Where no mapping is, nothing is, and nothing is soft-dirty."""
        state = shown("mmap A 1 anon rw", "state A -1 3")

        assert ("...", "010") == (state["st"], state["sd"])
        assert [["EFAULT", 1], ["ENOENT", 1], ["EFAULT", 1]] == state["node"]

    def test_several_ranges(self):
        """Classes are of one operation: the same page in two ranges has the same number."""
        answer = last(*MAPPED, "state A 0 3 B 0 1 A 2 2")

        assert [("A", 0, [1, 2, 3]), ("A", 2, [3, 0])] == [
            (state["r"], state["f"], state["cls"]) for state in answer["s"]
        ]

    def test_many_pages(self):
        """Of more than 64 pages classes are left out, and there are at most 4096."""
        state = shown("mmap A 65 anon rw", "state A 0 65")
        assert "cls" not in state
        assert 4096 == shown("mmap A 65 anon rw", "state A 0 9999")["n"]

    @pytest.mark.parametrize("n", [0, -1])
    def test_no_pages(self, n):
        """A range of none shows nothing."""
        state = shown("mmap A 1 anon rw", f"state A 0 {n}")

        assert (0, "", [], []) == tuple(state[key] for key in ("n", "st", "cls", "mc"))

    def test_pagevecs_are_drained(self):
        """What is seen does not depend on who was on its way to a list."""
        state = shown("mmap A 20 anon rw", "fill A 0 20 1", "state A 0 20")

        assert [["1/1/-1/AEB", 20]] == state["pg"]


class TestSmaps:
    def test_sizes(self):
        """What is not 0, in KiB, clean and dirty together."""
        (vma,) = last(*MAPPED, "smaps A")["vmas"]

        assert ("rw-p", "rd wr mr mw me") == (
            vma["prot"],
            vma["vmflags"].partition(" ac")[0].removesuffix(" sd"),
        )
        assert {"f": 0, "n": 4, "Rss": 8, "Pss": 8, "Private": 8, "Anonymous": 8} == {
            key: value for key, value in vma.items() if key not in ("prot", "vmflags")
        }

    def test_each_mapping(self):
        """Every mapping of the region; those of others are left out."""
        answer = last(*MAPPED, "mmap B 4 anon rw", "munmap A 1 2", "smaps A")

        assert [(0, 1), (3, 1)] == [(vma["f"], vma["n"]) for vma in answer["vmas"]]

    def test_unmapped(self):
        """A region of which nothing is left has no mappings."""
        assert {"ret": 0, "vmas": []} == last(*MAPPED, "munmap A 0 4", "smaps A")


class TestVmstat:
    def test_since_the_last(self):
        """What has changed since the operation came before, or the script began."""
        answers = play("mmap A 4 anon rw", "fill A 0 4 1", "vmstat", "read A 0", "vmstat")

        assert 4 == answers[2]["d"]["pgfault"]
        assert "pgfault" not in answers[4]["d"]


class TestClearRefs:
    def test_soft_dirty(self):
        """After it, only what is stored to is soft-dirty."""
        state = shown(*MAPPED, "clear_refs 4", "write A 2 1", "state A 0 4")

        assert "0010" == state["sd"]

    @pytest.mark.parametrize("what", ["0", "7", "all", "4.0"])
    def test_wrong(self, what):
        """The file takes 1 to 4."""
        assert {"ret": "EINVAL"} == last(f"clear_refs {what}")
