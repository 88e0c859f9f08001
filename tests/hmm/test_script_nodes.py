"""NUMA operations in scripts."""

import pytest

from tests.hmm.scripts import last, play, shown

FILLED = ["mmap A 4 anon rw", "fill A 0 3 7"]


class TestMovePages:
    def test_to_a_node(self):
        """Pages go to the node, holes have none."""
        answer = last(*FILLED, "move_pages A 0 5 1")

        assert {"pgmigrate_success": 3} == answer.pop("vm")
        assert {"ret": 0, "status": [[1, 3], ["ENOENT", 1], ["EFAULT", 1]]} == answer

    def test_by_turns(self):
        """Even pages to node 0, odd ones to node 1."""
        assert [[0, 1], [1, 1], [0, 1]] == last(*FILLED, "move_pages A 0 3 alt")["status"]

    @pytest.mark.parametrize("option", ["", "all", "noflag"])
    def test_options(self, option):
        """Pages of this process alone move under any flags."""
        assert [[1, 3]] == last(*FILLED, f"move_pages A 0 3 1 {option}")["status"]

    @pytest.mark.parametrize(
        ("where", "ret"), [("1 badflag", "EINVAL"), ("2", "ENODEV"), ("-1", "ENODEV")]
    )
    def test_refused(self, where, ret):
        """Then no status is written."""
        assert {"ret": ret, "status": [["unset", 3]]} == last(*FILLED, f"move_pages A 0 3 {where}")

    def test_movelist(self):
        """Any order, and no address at all."""
        answers = play(*FILLED, "movelist A 2:1 null 0:1", "status A 0 4", "movelist A")

        assert [[1, 1], ["EFAULT", 1], [1, 1]] == answers[2]["status"]
        assert {"ret": 0, "status": [[1, 1], [0, 1], [1, 1], ["ENOENT", 1]]} == answers[3]
        assert {"ret": 0, "status": []} == answers[4]


class TestPolicies:
    def test_mbind(self):
        """What is touched later comes from the node, and with `move` what is there goes."""
        lines = ["mbind A 0 4 bind 2", "write A 3 1", "mbind A 0 2 bind 2 move", "state A 0 4"]

        assert [[1, 2], [0, 1], [1, 1]] == shown(*FILLED, *lines)["node"]

    def test_strict(self):
        """With `strict` alone a page elsewhere is an error."""
        assert "EIO" == last(*FILLED, "mbind A 0 4 bind 2 strict")["ret"]

    def test_set_mempolicy(self):
        """The policy of the process holds for all of its memory that has none of its own."""
        lines = ["mmap A 2 anon rw", "set_mempolicy bind 2", "fill A 0 1 1"]
        lines += ["set_mempolicy default 0", "fill A 1 1 1", "state A 0 2"]

        assert [[1, 1], [0, 1]] == shown(*lines)["node"]

    @pytest.mark.parametrize("line", ["mbind A 0 4 bind 0", "set_mempolicy bind 0x100"])
    def test_no_nodes(self, line):
        """To bind needs a node; system calls are given the bits of eight."""
        assert "EINVAL" == last(*FILLED, line)["ret"]

    def test_migrate_pages(self):
        """All pages of the process that are on some nodes go to others."""
        answers = play(*FILLED, "migrate_pages 1 2", "status A 0 3")

        assert (0, [[1, 3]]) == (answers[2]["ret"], answers[3]["status"])


class TestBench:
    def test_counts(self):
        """Every repetition moves all pages to the other node."""
        answer = last("mmap A 8 anon rw", "bench_move A 0 8 3")

        assert (0, 0) == (answer["ret"], answer["bad"])
        assert answer["pps"] > 0
