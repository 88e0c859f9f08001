"""The comparison: recordings agree with themselves, and not with copies that are spoiled."""

import copy
import json

import pytest

from hmm.script import compare, recorded_scripts, recording
from tests.conformance.test_recordings import RECORDINGS


def line(op="read A 0", i=1, **fields):
    return {"i": i, "who": "", "op": op, "ret": 0} | fields


STATE = {"r": "A", "f": 0, "n": 2, "st": "P.", "sd": "11", "fl": "", "cls": [1, 0]}
STATE |= {"mc": [[1, 1], [-1, 1]], "kf": [["AB", 1], ["", 1]], "pg": [["1/1/-1/AEB", 1], ["-", 1]]}
STATE |= {"node": [[0, 1], ["ENOENT", 1]]}
MOVED = {"k": "d", "d": 0, "r": "A", "f": 0, "n": 2, "setup": 0, "cpages": 2}
MOVED |= {"src0": "b2", "dst": "99", "src1": "b2"}
RECORDED = [
    line(v="1", minflt=1, vm={"pswpin": 1}),
    line("state A 0 2", 2, s=[STATE]),
    line("migrate_to_dev A 0 2", 3, mv=[MOVED], perm=[["22", 2]], nt=[["MIGRATE", 1]]),
]


def spoiled(change):
    """A copy of RECORDED after *change* has had it."""
    answers = copy.deepcopy(RECORDED)
    change(answers)
    return answers


def set_at(*path):
    """A change that puts the last of *path* where the others lead."""

    def change(answers):
        *way, key, value = path
        for step in way:
            answers = answers[step]
        answers[key] = value

    return change


class TestMust:
    @pytest.mark.parametrize(
        ("change", "field", "at"),
        [
            (set_at(0, "v", "2"), "v", 1),
            (set_at(0, "ret", "SIGSEGV/MAPERR"), "ret", 1),
            (lambda answers: answers[0].pop("v"), "v", 1),
            (set_at(0, "faults", 1), "faults", 1),
            (set_at(1, "s", 0, "st", "PP"), "s[0].st", 2),
            (set_at(1, "s", 0, "sd", ""), "s[0].sd", 2),
            (set_at(1, "s", 0, "fl", "01"), "s[0].fl", 2),
            (set_at(1, "s", 0, "wp", "10"), "s[0].wp", 2),
            (set_at(1, "s", 0, "mc", [[1, 2]]), "s[0].mc", 2),
            (set_at(1, "s", []), "s[0].r", 2),
            (set_at(2, "perm", [["22", 1]]), "perm", 3),
            (set_at(2, "mv", 0, "src1", "b0"), "mv[0].src1", 3),
            (set_at(2, "mv", []), "mv#", 3),
            (set_at(2, "mv", 0, "setup", "EINVAL"), "mv[0].setup", 3),
            (set_at(2, "op", "migrate_to_dev A 0 3"), "op", 3),
            (set_at(2, "i", 4), "op", 3),
            (lambda answers: answers.pop(), "answer", 3),
        ],
    )
    def test_difference(self, change, field, at):
        """What must agree and does not is found, with line and field."""
        found = compare(RECORDED, spoiled(change))

        assert (field, at) == (found.field, found.line)

    @pytest.mark.parametrize(
        "change",
        [
            set_at(0, "minflt", 2),
            set_at(0, "vm", {}),
            set_at(1, "s", 0, "ex", "10"),
            set_at(1, "s", 0, "fl", "00"),
            set_at(1, "s", 0, "wp", ""),
            set_at(1, "s", 0, "kf", [["", 2]]),
            set_at(1, "s", 0, "mc", [[1, 1], [-1, 1]]),
            set_at(1, "s", 0, "node", [[0, 1], ["ENOENT", 1]]),
            set_at(2, "mv", 0, "dst", "dd"),
            set_at(2, "perm", [["22", 1], ["22", 1]]),
            set_at(2, "nt", []),
            set_at(2, "who", "c"),
            lambda answers: answers.append(line(i=4)),
        ],
    )
    def test_no_difference(self, change):
        """What may differ, or is written otherwise, agrees."""
        assert compare(RECORDED, spoiled(change)) is None

    @pytest.mark.parametrize(
        ("recorded", "model"),
        [
            (line(ret="NOREGION"), line(ret=0)),
            (line(mv_lost=3, v="1"), line(v="2")),
            (line("vmstat", ret=3), line("vmstat", ret=0)),
            (line("migrate_pages 1 2", ret=3), line("migrate_pages 1 2", ret=0)),
        ],
    )
    def test_lines_that_say_nothing(self, recorded, model):
        """A script that was wrong, a record that was lost, a number that nobody promised."""
        assert compare([recorded], [model]) is None

    def test_stops_at_the_first_difference(self):
        """The model is asked for no more than that takes."""
        model = iter(spoiled(set_at(1, "s", 0, "st", "PP")))
        compare(RECORDED, model)

        assert 3 == next(model)["i"]

    def test_message(self):
        """A difference names line, operation, field and both values."""
        found = compare(RECORDED, spoiled(set_at(0, "v", "2")))

        assert "line 1: read A 0: v: kernel '1', model '2'" == str(found)


class TestShould:
    @pytest.mark.parametrize(
        ("change", "field"),
        [
            (set_at(0, "minflt", 2), "minflt"),
            (set_at(0, "vm", {"pswpin": 2}), "vm"),
            (lambda answers: answers[0].pop("vm"), "vm"),
            (set_at(1, "s", 0, "kf", [["", 2]]), "s[0].kf"),
            (set_at(1, "s", 0, "pg", [["1/2/-1/AEB", 1], ["-", 1]]), "s[0].pg"),
            (set_at(1, "s", 0, "pg", [["1/1/0/AEB", 1], ["-", 1]]), "s[0].pg"),
        ],
    )
    def test_difference(self, change, field):
        """Counts, flags, mappings and device are compared as well."""
        assert field == compare(RECORDED, spoiled(change), "should").field

    @pytest.mark.parametrize("pg", ["2/1/-1/AEB", "1/1/-1/AB"])
    def test_no_difference(self, pg):
        """References and flags in `pg` belong to one version."""
        assert (
            compare(RECORDED, spoiled(set_at(1, "s", 0, "pg", [[pg, 1], ["-", 1]])), "should")
            is None
        )


class TestRecordings:
    @pytest.mark.parametrize("tier", ["must", "should"])
    def test_agree_with_themselves(self, tier):
        """Every recording equals its own copy."""
        for script in recorded_scripts(RECORDINGS, ["hand"]):
            answers = recording(script)
            assert compare(answers, json.loads(json.dumps(answers)), tier) is None
