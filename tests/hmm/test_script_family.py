"""Child processes in scripts."""

import pytest

from hmm.script import Host, answers
from tests.hmm.scripts import last, play

FILLED = ["mmap A 3 anon rw", "fill A 0 3 7"]


class TestChildren:
    def test_who(self):
        """An answer says who gave it, and with what words."""
        lines = [*FILLED, "fork c", "child c fork d", "child c child d read A 1"]
        *_, answer = answers("s", lines, host=Host(("64MiB",)), verify=True)

        assert ("c.d", "read A 1", "8") == (answer["who"], answer["op"], answer["v"])

    @pytest.mark.parametrize("line", ["wait d", "child d read A 0", "child c", "cmp d A 0 1"])
    def test_nobody(self, line):
        """There must be such a child, and something for it to do."""
        assert {"ret": "ECHILD"} == last(*FILLED, "fork c", line)

    def test_wait(self):
        """A child that was waited for is gone, and its name is free."""
        *_, wait, gone, again = play(*FILLED, "fork c", "wait c", "wait c", "fork c")

        assert [0, "ECHILD", 0] == [wait["ret"], gone["ret"], again["ret"]]

    def test_too_many(self):
        """A process has sixteen at most."""
        assert "ENOSPC" == last(*FILLED, *["fork c"] * 17)["ret"]

    def test_compare(self):
        """The same page, another one, or none in one of them."""
        lines = [*FILLED, "fork c", "child c write A 1 9", "cmp c A 0 4"]

        assert "=!=." == last(*lines)["eq"]

    def test_move_pages(self):
        """A parent moves its child's pages."""
        lines = [*FILLED, "fork c", "move_pages A 0 3 1 all pid=c"]

        assert [[1, 3]] == last(*lines)["status"]


class TestDevices:
    def test_inherited(self):
        """A child that uses its parent's file works on its parent's memory."""
        lines = [*FILLED, "dopen", "fork c", "child c write A 0 0x55", "child c dread A 0 1 @p0"]

        assert ["7"] == last(*lines)["w"]

    def test_not_inherited(self):
        """There is none where the parent had not opened the device."""
        assert "EBADF" == last(*FILLED, "fork c", "child c dread A 0 1 @p0")["ret"]

    def test_last_to_close(self):
        """A file that a child has open stays open; when it exits the device evicts its pages."""
        lines = [*FILLED, "migrate_to_dev A 0 3", "fork c", "dclose", "state A 0 3", "wait c"]
        *_, before, _, after = play(*lines, "state A 0 3")

        assert ["ddd", "PPP"] == [before["s"][0]["st"], after["s"][0]["st"]]
