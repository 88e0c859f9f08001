"""Running scripts: answers come in order, each before the next operation begins."""

import json
from pathlib import Path

import pytest

from hmm.script import Host, ParseError, answers, json_line
from hmm.script.operations import GRAMMARS, HANDLERS, operation
from hmm.script.run import NOT_YET
from mm.errors import KernelBug
from tests.hmm.scripts import play


def small():
    return Host(("64MiB",))


class TestAnswers:
    def test_place(self):
        """Each says its line, process and text."""
        found = list(answers("s", ["# a script", "", "\tvmstat ", "smaps A"], host=small()))

        assert [(3, "", "vmstat "), (4, "", "smaps A")] == [
            (a["i"], a["who"], a["op"]) for a in found
        ]

    def test_one_at_a_time(self):
        """Lines are read as answers are asked for: a wrong one stops the script there."""
        found = answers("s", iter(["mmap A 1 anon rw", "write A 0 1", "wriet A 0 1"]), host=small())

        assert [0, 0] == [next(found)["ret"], next(found)["ret"]]
        with pytest.raises(ParseError, match=r"s, line 3: .*is it write"):
            next(found)

    def test_json(self):
        """A line has no spaces and keeps what is no ASCII."""
        line = json_line({"i": 1, "op": "read Ä 0", "w": ["1"]})

        assert '{"i":1,"op":"read Ä 0","w":["1"]}' == line
        assert ["1"] == json.loads(line)["w"]

    def test_everything_is_freed(self):
        """When a script ends its process does, whatever it held."""
        host = small()
        free = host.machine.nr_free_pages
        lines = ["mmap A 9 anon rw", "fill A 0 9 1", "pin p A 0 2 vms", "migrate_to_dev A 3 4"]
        list(answers("s", lines, host=host, verify=True))

        assert free == host.machine.nr_free_pages
        host.machine.verify()

    def test_abandoned(self):
        """So it does when nobody asks for more answers."""
        host = small()
        found = answers("s", ["mmap A 9 anon rw", "fill A 0 9 1", "vmstat"], host=host)
        next(found)
        found.close()

        assert [] == host.machine.mem.mms

    def test_bug_names_its_line(self):
        """What breaks inside the model is passed on, with the place in the script."""

        @operation("explode")
        def explode(actor):
            raise KernelBug("page 0x7 is nobody's")

        try:
            with pytest.raises(KernelBug) as broken:
                list(answers("s", ["", "explode"], host=small()))
        finally:
            del GRAMMARS["explode"], HANDLERS["explode"]

        assert ["s, line 2: explode"] == broken.value.__notes__

    def test_broken_model(self):
        """With `verify` a rule of the model that is broken is found at the end."""
        host = small()
        found = answers("s", ["mmap A 1 anon rw", "write A 0 1"], host=host, verify=True)
        next(found), next(found)
        host.machine.mem.mms[0].anon_rss += 1
        with pytest.raises(KernelBug, match="anon_rss"):
            next(found)
        host.machine.mem.mms[:] = []

    @pytest.mark.parametrize("line", ["ksm 3"])
    def test_not_yet(self, line):
        """What the model lacks is refused by name."""
        (answer,) = play(line)

        assert "EOPNOTSUPP" == answer["ret"]
        assert line.split()[0] in answer["why"]


class TestOperations:
    def test_are_documented(self):
        """docs/scripts.md has the grammar of each operation that the model performs."""
        page = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text()
        performed = {grammar.usage for grammar in GRAMMARS.values()} - set(NOT_YET)

        assert set() == {usage for usage in performed if f"`{usage}`" not in page}

    @pytest.mark.parametrize("name", sorted(GRAMMARS))
    def test_say_what_they_do(self, name):
        """Every operation has a grammar and a sentence."""
        assert name == GRAMMARS[name].name
        assert HANDLERS[name].__doc__
