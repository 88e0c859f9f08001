"""The command line: what it prints, where, and with which status; and how it finds drivers."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from hmm.cli import chunk_bytes, main, memory_bytes
from hmm.registry import GROUP, UnusableDriver, available, load_driver, load_timing
from mm.errors import InvalidArgument

KEYS = (
    "trace device policy pages accesses device_memory_pages device_faults fault_batches"
    " pages_to_device pages_to_system evicted_pages bytes_to_device bytes_to_system wall_s"
    " verified vmstat"
)

LOSES_BITS = """
from devices.numpy_device import NumpyDevice

class LosesBits(NumpyDevice):
    def exchange(self, process, addrs, words, write):
        return super().exchange(process, addrs, words, write) // 2 * 2
"""

CRASHES = """
from devices.numpy_device import NumpyDevice
from mm.errors import InvalidArgument, KernelBug

class Crashes(NumpyDevice):
    def exchange(self, process, addrs, words, write):
        raise KernelBug("page 0x7 is nobody's")

class Refuses(NumpyDevice):
    def exchange(self, process, addrs, words, write):
        raise InvalidArgument("no such\\naddress")
"""


@pytest.fixture
def call(capsys):
    """A function that runs the command line: its status, stdout and stderr."""

    def run(*argv):
        status = main([str(word) for word in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def loop(tmp_path):
    """A trace of 40 epochs over 32 pages, of which each epoch touches four."""
    epoch = np.repeat(np.arange(40, dtype=np.uint32), 4)
    np.savez(
        tmp_path / "loop.npz",
        page=(0x1F0 + np.arange(160) % 32).astype(np.uint64),
        write=np.arange(160) % 3 == 0,
        count=np.ones(160, dtype=np.uint32),
        epoch=epoch,
        program="a loop",
        window=4,
    )
    return tmp_path / "loop.npz"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a distribution with one module and its drivers."""

    def write(module, source, **drivers):
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        lines = [f"{name} = {module}:{driver}" for name, driver in drivers.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def one_line(err):
    """The line on stderr, after checking that it is one, and ours."""
    assert err.startswith("hmm: ")
    assert 1 == err.count("\n")
    return err.strip()


class TestRun:
    def test_json(self, call, loop):
        """With --json stdout is one object with the fields of the report, and stderr is empty."""
        status, out, err = call("run", loop, "--memory", "50%", "--json")

        report = json.loads(out)
        assert (0, "") == (status, err)
        assert KEYS == " ".join(report)
        assert report["verified"] is True
        assert ("loop", 32, 160) == (report["trace"], report["pages"], report["accesses"])
        assert report["evicted_pages"] > 0

    def test_table(self, call, loop):
        """Without, it is a short table."""
        status, out, err = call("run", loop)

        assert (0, "") == (status, err)
        assert out.startswith("loop on numpy")
        assert "yes, every byte" in out
        assert len(out.splitlines()) <= 12

    def test_all_of_the_footprint(self, call, loop):
        """A device as large as the footprint evicts nothing."""
        status, out, _ = call("run", loop, "--memory", "100%", "--json")

        report = json.loads(out)
        assert (0, 0, 32) == (status, report["evicted_pages"], report["pages_to_device"])

    @pytest.mark.parametrize("memory", ["1", "4KiB", "3%", "10%", "64MiB", "250%"])
    def test_memory(self, call, loop, memory):
        """Any device that holds a page does the job."""
        assert 0 == call("run", loop, "--memory", memory)[0]

    @pytest.mark.parametrize("chunk", ["64KiB", "2MiB"])
    def test_chunk(self, call, loop, chunk):
        """The smallest and the largest chunk do the job too."""
        assert 0 == call("run", loop, "--memory", "8MiB", "--chunk", chunk)[0]

    def test_progress(self, loop):
        """A terminal sees how far it has come, on stderr."""

        class Terminal(io.StringIO):
            def isatty(self):
                return True

        with redirect_stderr(Terminal()) as terminal:
            assert 0 == main(["run", str(loop)])

        assert "replaying loop" in terminal.getvalue()

    def test_progress_is_not_for_json(self, loop):
        """Who asks for JSON reads no bars."""
        with redirect_stderr(io.StringIO()) as err:
            assert 0 == main(["run", str(loop), "--json"])

        assert "" == err.getvalue()


class TestFailure:
    def test_not_verified(self, call, loop, install):
        """A driver that changes data is reported, with the first word, and the status is 1."""
        install("loses", LOSES_BITS, loses="LosesBits")

        status, out, err = call("run", loop, "--device", "loses", "--json")

        assert 1 == status
        assert json.loads(out)["verified"] is False
        assert "words of load differ, the first on page 0x1f" in one_line(err)

    @pytest.mark.parametrize(
        ("device", "says"),
        [("crashes", "KernelBug: page 0x7 is nobody's"), ("refuses", ": no such address")],
    )
    def test_driver_raises(self, call, loop, install, device, says):
        """What a driver raises at work is a failure, not a wrong call, and fits on one line."""
        install("bad", CRASHES, crashes="Crashes", refuses="Refuses")

        status, out, err = call("run", loop, "--device", device)

        assert (1, "") == (status, out)
        assert says in one_line(err)

    def test_traceback(self, call, loop, install, monkeypatch):
        """Who wants the traceback sets HMM_TRACEBACK."""
        install("bad", CRASHES, crashes="Crashes")
        monkeypatch.setenv("HMM_TRACEBACK", "1")

        with pytest.raises(AssertionError, match="is nobody's"):
            call("run", loop, "--device", "crashes")


class TestWrongCall:
    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "Missing command; see hmm --help"),
            (["jog"], "No such command 'jog'"),
            (["run", "--speed", "9"], "No such option: --speed"),
            (["run", "sqlite", "gzip"], "Got unexpected extra argument"),
            (["run", "--memory"], "requires an argument"),
            (["run", "nowhere.npz"], "there is no trace 'nowhere.npz'"),
            (["run", "--device", "abacus"], "there is no device 'abacus'; installed:"),
            (["run", "--chunk", "96KiB"], "--chunk 96KiB is not one of 64KiB, 128KiB, "),
            (["run", "--chunk", "wide"], "--chunk wide is not one of 64KiB, "),
            (["bench", "--only", "luck"], "luck"),
        ],
    )
    def test_says_what_is_wrong(self, call, argv, says):
        """One line on stderr, nothing on stdout, status 2."""
        status, out, err = call(*argv)

        assert (2, "") == (status, out)
        assert says in one_line(err)

    @pytest.mark.parametrize("memory", ["0", "0%", "0.0MiB", "-1", "-5%", "much", "%", "", "1/2%"])
    def test_memory(self, call, memory):
        """A device has memory; what else may be written there is said."""
        status, out, err = call("run", "--memory", memory)

        assert (2, "") == (status, out)
        assert "such as 2MiB, or a percentage of the footprint, such as 50%" in one_line(err)

    def test_memory_beyond_the_address_space(self, call, loop):
        """A device larger than physical addresses reach is refused."""
        status, out, err = call("run", loop, "--memory", "4096P")

        assert (2, "") == (status, out)
        assert one_line(err)

    def test_bad_trace(self, call, tmp_path):
        """A file that is no trace is refused, whatever else is right."""
        (tmp_path / "notes.npz").write_text("264 265\n")

        status, _, err = call("run", tmp_path / "notes.npz")

        assert 2 == status
        assert "notes.npz cannot be read as an .npz file" in one_line(err)


class TestDevices:
    def test_lists_drivers(self, call):
        """The driver that comes along is listed, with the class behind it."""
        status, out, _ = call("devices", "--json")

        listed = json.loads(out)["devices"]
        assert 0 == status
        assert {
            "name": "numpy",
            "driver": "devices.numpy_device:NumpyDevice",
            "problem": None,
        } in listed

    def test_broken_driver(self, call, install):
        """A driver that cannot be imported is listed with the reason, and hides no other."""
        install("broken", "import nowhere_to_be_found", broken="Broken")

        status, out, _ = call("devices", "--json")

        problems = {driver["name"]: driver["problem"] for driver in json.loads(out)["devices"]}
        assert 0 == status
        assert "No module named 'nowhere_to_be_found'" in problems["broken"]
        assert problems["numpy"] is None

    def test_driver_that_exits(self, call, install):
        """One that ends the program when it is imported does not take the others down."""
        install("rude", "import sys; sys.exit('no GPU here')", rude="Rude")

        status, out, err = call("devices", "--json")

        problems = {driver["name"]: driver["problem"] for driver in json.loads(out)["devices"]}
        assert (0, "") == (status, err)
        assert (
            "device 'rude' (rude:Rude) cannot be imported: SystemExit: no GPU here"
            in (problems["rude"])
        )
        assert problems["numpy"] is None

    def test_table(self, call):
        """Without --json it is a table."""
        assert "usable" in call("devices")[1]


class TestBench:
    def test_json(self, call):
        """A figure can be had alone."""
        status, out, _ = call("bench", "--only", "fault_back_1", "--json")

        (figure,) = json.loads(out)["figures"]
        assert (0, "fault_back_1") == (status, figure["name"])
        assert ["name", "value", "unit", "against", "ratio"] == list(figure)

    @pytest.mark.parametrize("name", ["fork", "rmap_shared"])
    def test_ratio(self, call, name):
        """A figure that is held against another of the same run says how it compares."""
        status, out, _ = call("bench", "--only", name, "--json")

        (figure,) = json.loads(out)["figures"]
        assert (0, name, "ns") == (status, figure["name"], figure["unit"])
        assert figure["ratio"] > 0

    def test_table(self, call):
        """Without --json it is a table."""
        assert "fault_back_1" in call("bench", "--only", "fault_back_1")[1]


class TestTiming:
    def test_calibrate(self, call, loop, tmp_path):
        """What is measured is a profile, which a run can then be told to simulate."""
        path = tmp_path / "numpy.toml"
        status, out, _ = call("calibrate", "numpy", "--largest", "256KiB", "--output", path)
        assert (0, out) == (status, path.read_text())

        status, out, _ = call("run", loop, "--profile", path, "--json")

        assert 0 == status
        assert json.loads(out)["simulated_us"] > 0
        assert "simulated" in call("run", loop, "--profile", "gh200")[1]

    def test_json(self, call):
        """The same as JSON."""
        _, out, _ = call("calibrate", "numpy", "--largest", "256KiB", "--json")

        assert [4, 8, 16, 32, 64, 128, 256] == json.loads(out)["to_system"]["kib"]

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["calibrate", "toaster"], "there is no device 'toaster'"),
            (["run", "--profile", "isa"], "there is no profile 'isa'; there are gh200, pcie3-x16"),
        ],
    )
    def test_wrong_call(self, call, argv, says):
        """What there is not is said in one line."""
        status, _, err = call(*argv)

        assert 2 == status
        assert says in err

    def test_not_installed(self, monkeypatch):
        """Without the package that knows simulated time, the message says what to do."""
        monkeypatch.setattr("hmm.registry.entry_points", lambda **group: ())
        with pytest.raises(InvalidArgument, match="install hmm-migrate again"):
            load_timing("timed")


class TestScript:
    @pytest.fixture
    def write(self, tmp_path):
        """A function that writes a script, and with *answers* its recording."""

        def script(text, answers=None):
            path = tmp_path / "a" / "s.script"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
            if answers is not None:
                path.with_suffix(".jsonl").write_text(answers)
            return path

        return script

    def test_json_lines(self, call, write):
        """One line for each operation; each script has a computer of its own."""
        script = write("mmap A 1 anon rw\nwrite A 0 1\n")

        status, out, err = call("script", script, script)

        answers = [json.loads(line) for line in out.splitlines()]
        assert (0, "") == (status, err)
        assert [(1, 0), (2, 0)] * 2 == [(answer["i"], answer["ret"]) for answer in answers]

    def test_stdin(self, call, monkeypatch):
        """`-` is what comes in."""
        monkeypatch.setattr("sys.stdin", io.StringIO("vmstat\n"))

        assert (0, 1) == (call("script", "-")[0], 1)

    def test_wrong_line(self, call, write):
        """It ends the script, with its place, after the answers to what stands before it."""
        status, out, err = call("script", write("vmstat\n\nvmstta\n"))

        assert (2, 1) == (status, json.loads(out)["i"])
        assert "s.script, line 3: expected an operation at 'vmstta'; is it vmstat?" in one_line(err)

    @pytest.mark.parametrize(
        "text", [b"\xff\x00\x80" * 350_000, b"z " * 500_000, b"\n" * 10**6 + b"z"]
    )
    def test_garbage(self, call, write, text):
        """However much of it ends in one line."""
        status, out, err = call("script", write(text))

        assert (2, "") == (status, out)
        assert len(one_line(err)) < 300

    def test_no_such_script(self, call):
        """A file that is not there is said to be so."""
        status, out, err = call("script", "nowhere.script")

        assert (2, "") == (status, out)
        assert "nowhere.script" in one_line(err)

    @pytest.mark.parametrize(
        "argv", [[], ["a.script", "--check", "."], ["--check", ".", "--tier", "may"]]
    )
    def test_wrong_call(self, call, argv):
        """Scripts, or a folder to check, in a tier that there is."""
        status, out, err = call("script", *argv)

        assert (2, "") == (status, out)
        assert one_line(err)

    def test_bug(self, call, write, monkeypatch):
        """A bug of the model is a failure that names the line of the script."""
        monkeypatch.setattr("mm.process.Process.munmap", lambda *_: 1 // 0)

        status, _, err = call("script", write("mmap A 1 anon rw\nmunmap A 0 1\n"))

        assert 1 == status
        assert "ZeroDivisionError" in one_line(err)
        assert "s.script, line 2: munmap A 0 1" in err

    def test_check(self, call, write):
        """A table of profiles, and status 0 where all agree."""
        answers = '{"i":1,"who":"","op":"mmap A 1 anon rw","ret":0}\n'
        script = write("mmap A 1 anon rw\n", answers)

        status, out, err = call("script", "--check", script.parent.parent, "--jobs", 1)

        assert (0, "") == (status, err)
        assert ["a", "1", "1"] == out.splitlines()[-1].split()

    def test_check_differs(self, call, write):
        """The first difference of each script, and status 1."""
        script = write("smaps A\n", '{"i":1,"op":"smaps A","ret":0}\n')

        status, out, err = call("script", "--check", script.parent, "--jobs", 1)

        assert 1 == status
        assert "a/s: line 1: smaps A: ret: kernel 0, model 'NOREGION'" in out
        assert "1 of 1 scripts differ" in one_line(err)

    def test_check_json(self, call, write):
        """With --json it is one object."""
        script = write("vmstat\n", '{"i":1,"op":"vmstat","ret":0}\n')

        status, out, err = call("script", "--check", script.parent, "--jobs", 1, "--json")

        assert (0, "") == (status, err)
        checked = [{"profile": "a", "script": "s", "equal": True}]
        assert {"tier": "must", "scripts": checked} == json.loads(out)

    def test_check_nothing(self, call, tmp_path):
        """A folder without scripts is a wrong call."""
        assert 2 == call("script", "--check", tmp_path)[0]


class TestHelp:
    @pytest.mark.parametrize("argv", [["--help"], ["run", "--help"]])
    def test_help(self, call, argv):
        """Help is no failure."""
        status, out, err = call(*argv)

        assert (0, "") == (status, err)
        assert "Usage: hmm" in out

    def test_as_a_module(self):
        """`python -m hmm` is the same command."""
        asked = [sys.executable, "-m", "hmm", "run", "nowhere.npz"]

        answer = subprocess.run(asked, check=False, capture_output=True, text=True)

        assert (2, "") == (answer.returncode, answer.stdout)
        assert "there is no trace" in one_line(answer.stderr)

    @pytest.mark.parametrize("absent", ["typer", "rich"])
    def test_without_its_extra(self, absent):
        """A library user who tries the command is told what to install."""
        code = f"import sys; sys.modules['{absent}'] = None; import hmm.cli"

        answer = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        )

        assert 1 == answer.returncode
        assert "pip install 'hmm-migrate[cli]'" in one_line(answer.stderr)


class TestSizes:
    @pytest.mark.parametrize(
        ("memory", "npages"),
        [("50%", 234), ("100%", 467), ("0.001%", 1), ("1", 1), ("4097", 2), ("2MiB", 512)],
    )
    def test_memory(self, memory, npages):
        """A device gets whole pages, rounded up, of a size or of a footprint of 467."""
        assert npages * 4096 == memory_bytes(memory, 467)

    def test_chunk(self):
        """No chunk leaves it to the driver."""
        assert [None, 64 << 10, 2 << 20] == [chunk_bytes(c) for c in (None, "64KiB", "2M")]


def points(**drivers):
    return [EntryPoint(name, value, GROUP) for name, value in drivers.items()]


class TestRegistry:
    def test_available(self):
        """Drivers come sorted by name; the first of a name has it; none is imported."""
        found = available([*points(b="no.where:B", a="json:loads"), *points(b="json:dumps")])

        assert {"a": "json:loads", "b": "no.where:B"} == {n: p.value for n, p in found.items()}
        assert ["a", "b"] == list(found)

    def test_load(self):
        """A driver is what its entry point names, whatever is wrong with others."""
        assert json.loads is load_driver("a", points(a="json:loads", b="no.where:B"))

    @pytest.mark.parametrize(
        ("drivers", "installed"), [({}, "none"), ({"b": "json:loads", "a": "json:dumps"}, "a, b")]
    )
    def test_unknown(self, drivers, installed):
        """An unknown name is answered with those that exist."""
        with pytest.raises(InvalidArgument, match=f"no device 'c'; installed: {installed}"):
            load_driver("c", points(**drivers))

    @pytest.mark.parametrize(
        ("value", "cause"),
        [
            ("no.where:B", "ModuleNotFoundError: No module named 'no'"),
            ("json:nothing", "AttributeError: .*nothing"),
            ("sys:path", "is no class that opens devices"),
        ],
    )
    def test_unusable(self, value, cause):
        """A driver that fails to load is named, with its cause."""
        with pytest.raises(UnusableDriver, match=f"device 'b'.*{cause}"):
            load_driver("b", points(b=value))
