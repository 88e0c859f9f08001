"""`hmm check`, the pytest plugin, and the suite they share: calls, answers, exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from devices import NumpyDevice
from devices.conformance import RULES, check
from devices.conformance.lock_order import LockOrder
from hmm.cli import main
from mm import InvalidArgument, Machine
from mm.errors import Deadlock

ROOT = Path(__file__).parents[2]
WRONG = ROOT / "tests" / "devices" / "wrong_drivers" / "copies.py"


@pytest.fixture
def call(capsys):
    """A function that runs the command line: its status, stdout and stderr."""

    def run(*argv):
        status = main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return run


class Blind(NumpyDevice):
    """Has no memory to compute on, and nothing that a driver may leave out."""

    clear = None
    _sides = None
    engines = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.vram, self.memory = self.memory, None

    def copy_in(self, pages, system, rows):
        self.vram[pages] = system[rows]

    def copy_out(self, pages, system, rows):
        system[rows] = self.vram[pages]


class TestRules:
    def test_promises(self):
        """Every rule is a sentence, and needs only rules that come before it."""
        for number, rule in enumerate(RULES):
            assert rule.promise.endswith(".")
            assert set(rule.needs) <= set(RULES[:number])

    def test_names_are_different(self):
        """A rule is known by its name."""
        assert len(RULES) == len({rule.name for rule in RULES})


class TestCheck:
    def test_only(self):
        """One rule comes with those that it needs, in order."""
        assert ["allocate", "full", "free", "copy-one"] == [
            verdict.rule for verdict in check(NumpyDevice, ["copy-one"])
        ]

    def test_what_the_driver_lacks(self):
        """Rules about what a driver has not are not judged, and keep no other from it."""
        verdicts = {verdict.rule: verdict for verdict in check(Blind)}

        skipped = {name for name, verdict in verdicts.items() if verdict.outcome == "skip"}
        assert {"device-access", "exchange", "run"} == skipped
        assert "no `memory`" in verdicts["run"].evidence
        assert {"pass", "skip"} == {verdict.outcome for verdict in verdicts.values()}

    @pytest.mark.parametrize("driver", [lambda machine, memory: "a toaster", lambda: None])
    def test_no_driver(self, driver):
        """What opens no device is refused before the first rule."""
        with pytest.raises(InvalidArgument, match=r"does not derive from devices.Driver|no device"):
            check(driver)

    def test_unknown_rule(self):
        """A rule that does not exist is answered with those that do."""
        with pytest.raises(InvalidArgument, match="no rule 'grace'; there are allocate, full"):
            check(NumpyDevice, ["grace"])


class TestCommand:
    def test_right(self, call):
        """A driver that keeps the rules: a table, nothing on stderr, status 0."""
        status, out, err = call("check", "numpy", "--only", "copy-one")

        assert (0, "") == (status, err)
        assert ["rule", "allocate", "full", "free", "copy-one"] == [
            line.split()[0] for line in out.splitlines()
        ]

    def test_wrong(self, call):
        """A driver that does not: status 1, and which rules it breaks."""
        status, out, err = call("check", f"{WRONG}:LosesTheLastByte", "--only", "copy-run")

        assert 1 == status
        assert err.endswith("LosesTheLastByte breaks 1 of 5 rules: copy-one\n")
        assert "byte 4095" in out

    def test_json(self, call):
        """With --json it is one object, with every promise and what became of it."""
        status, out, _ = call("check", f"{WRONG}:LosesTheLastByte", "--only", "copy-run", "--json")

        report = json.loads(out)
        assert (1, False) == (status, report["passed"])
        assert ["pass", "pass", "pass", "fail", "skip"] == [r["outcome"] for r in report["rules"]]
        assert "A page comes back as it was, every byte." == report["rules"][3]["promise"]

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["abacus"], "there is no device 'abacus'"),
            (["numpy?speed=9"], "unexpected keyword argument 'speed'"),
            (["numpy?kind=odd"], 'device memory is "private" or "public"'),
            (["nowhere.py:Mine"], "there is no file nowhere.py"),
            ([f"{WRONG}:Right"], "has no 'Right'; its classes are AnswersWithNumbers, Clears"),
            (["no.where:Mine"], "cannot be imported: ModuleNotFoundError"),
            (["json:loads"], "no device is opened by calling this"),
            (["numpy", "--only", "grace"], "there is no rule 'grace'"),
        ],
    )
    def test_wrong_call(self, call, argv, says):
        """What cannot be checked is said in a line, with status 2."""
        status, out, err = call("check", *argv)

        assert (2, "") == (status, out)
        assert says in err


class TestPlugin:
    def run(self, *devices):
        """The last lines of a pytest run without tests of its own."""
        options = [word for device in devices for word in ("--check", device)]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "devices.conformance.plugin"]
        answer = subprocess.run(
            [*command, *options, "-p", "no:cacheprovider", "samples/data"],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        return answer.returncode, answer.stdout + answer.stderr

    def test_rules_are_tests(self):
        """Each rule is a test of each driver; a failure shows the promise and the evidence."""
        status, out = self.run("numpy", f"{WRONG}:ClearsNothing")

        assert 1 == status
        assert f"{len(RULES)} passed" not in out
        assert "clear: clear(), if there is one, makes zeros" in out
        assert "pages, some of them cleared" in out
        assert "1 failed" in out

    def test_wrong_call(self):
        """A driver that is not there is a wrong call."""
        status, out = self.run("abacus")

        assert 4 == status
        assert "--check abacus: there is no device 'abacus'" in out


class TestLockOrder:
    def test_in_order(self):
        """What the model does itself is in order."""
        machine = Machine(("1MiB",))
        order = LockOrder(machine.mem)
        with order.watched(), machine.spawn() as process:
            process.write(process.mmap(4096), b"x")

        assert [] == order.complaints
        assert order.seen > 0

    def test_waiting_for_nobody(self):
        """Where the only thread would have to wait, it is told for what."""
        machine = Machine(("1MiB",))
        order = LockOrder(machine.mem)

        with pytest.raises(Deadlock, match="a bus is held"):
            order.wait(lambda: False, "a bus")
