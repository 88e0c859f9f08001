"""Running recorded scripts and comparing."""

import gzip

import pytest

from hmm.script import (
    Host,
    answers,
    check_script,
    check_scripts,
    json_line,
    recorded_scripts,
    recording,
)
from hmm.script.check import described
from mm.errors import InvalidArgument, KernelBug

SCRIPT = "mmap A 2 anon rw\nwrite A 1 0x11\nread A 1\n"


@pytest.fixture
def record(tmp_path):
    """A function that records a script as the model answers it, after *spoil* has changed that."""

    def write(name, script=SCRIPT, spoil=("", ""), packed=True):
        path = tmp_path / f"{name}.script"
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        lines = [json_line(a) for a in answers(name, script.splitlines(), host=Host(("64MiB",)))]
        text = "".join(f"{line}\n" for line in lines).replace(*spoil)
        if packed:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            path.with_suffix(".jsonl").write_text(text)
        return path

    return write


class TestRecordings:
    def test_found(self, record, tmp_path):
        """Every script below the folder, sorted, or those of some profiles."""
        scripts = [record("b/2"), record("a/1"), record("b/1")]

        assert sorted(scripts) == recorded_scripts(tmp_path)
        assert [scripts[1]] == recorded_scripts(tmp_path, ["a", "c"])

    @pytest.mark.parametrize("profiles", [[], ["a"]])
    def test_none(self, tmp_path, profiles):
        """Where there is none, that is said."""
        with pytest.raises(InvalidArgument, match="there is no script"):
            recorded_scripts(tmp_path, profiles)

    @pytest.mark.parametrize("packed", [True, False])
    def test_read(self, record, packed):
        """A recording may be packed."""
        assert [1, 2, 3] == [answer["i"] for answer in recording(record("a/1", packed=packed))]


class TestCheck:
    def test_equal(self, record):
        """The model agrees with what it said itself."""
        outcome = check_script(record("a/1"), "should", verify=True)

        assert outcome.equal
        assert "a/1: equal" == str(outcome)
        assert {"profile": "a", "script": "1", "equal": True} == outcome.as_dict()

    def test_difference(self, record):
        """The first difference is named, with both values."""
        outcome = check_script(record("a/1", spoil=('"v":"11"', '"v":"12"')))

        assert not outcome.equal
        assert "a/1: line 3: read A 1: v: kernel '12', model '11'" == str(outcome)
        found = {"line": 3, "op": "read A 1", "field": "v", "kernel": "12", "model": "11"}
        assert {"profile": "a", "script": "1", "equal": False} | found == outcome.as_dict()

    def test_tier(self, record):
        """Counts of faults differ only where they should agree too."""
        script = record("a/1", spoil=('"minflt":1', '"minflt":2'))

        assert check_script(script, "must").equal
        assert "minflt" == check_script(script, "should").difference.field

    def test_broken_script(self, record):
        """What cannot be run is a finding, not the end of the check."""
        script = record("a/1")
        script.write_text(SCRIPT.replace("read", "raed"))

        assert "line 3: expected an operation at 'raed'" in check_script(script).error
        script.with_suffix(".jsonl.gz").unlink()
        assert "FileNotFoundError" in check_script(script).error

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_several(self, record, jobs):
        """Outcomes come in the order of the scripts, whoever ran them."""
        scripts = [record("a/1"), record("a/2", spoil=('"v":"11"', '"v":"12"')), record("b/1")]

        outcomes = list(check_scripts(scripts, jobs=jobs))

        assert [("a", "1"), ("a", "2"), ("b", "1")] == [(o.profile, o.script) for o in outcomes]
        assert [True, False, True] == [outcome.equal for outcome in outcomes]


class TestDescribed:
    def test_one_line(self):
        """An error names its kind, what it says and where in the script it came."""
        error = KernelBug("page 0x7 is nobody's")
        error.add_note("s, line 2: read A 0")

        assert "KernelBug: page 0x7 is nobody's; s, line 2: read A 0" == described(error)
        assert "InvalidArgument: no" == described(InvalidArgument("no"))
