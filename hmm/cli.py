"""The command `hmm`. Exit status: 0 done, 1 the work failed, 2 the call was wrong.

Results go to stdout, as a table or with --json as one JSON object; whatever is wrong goes to
stderr in one line. HMM_TRACEBACK=1 in the environment shows the traceback behind that line.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Final, cast

from hmm import bench as benchmarks
from hmm import script as scripts
from hmm.offload.device import Device
from hmm.offload.replay import Progress, Report, machine_for, replay
from hmm.offload.traces import Trace, load_trace
from hmm.registry import UnusableDriver, available, load_driver, load_suite, load_timing
from mm import trace as events
from mm.errors import InvalidArgument, MmError, OutOfRange
from mm.machine import Machine
from mm.memparse import format_size, memparse
from mm.typing import PAGE_SIZE

try:
    import rich.progress
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"hmm: the command line needs {missing.name}, which is not installed;"
        " install it with: pip install 'hmm-migrate[cli]'"
    ) from None

CHUNKS: Final = tuple(64 * 1024 << doubled for doubled in range(6))  # 64 KiB to 2 MiB

# Typer carries its own copy of click since 0.26, and exports only this one of its errors.
_UsageError: Final = cast(type[typer.BadParameter], typer.BadParameter.__base__)
_PERCENTAGE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")

app = typer.Typer(name="hmm", add_completion=False, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, no table.")]


class WorkFailed(Exception):
    """The call was right and what it asked for failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv* (default: that of the process); the exit status."""
    try:
        status = typer.main.get_command(app).main(argv, prog_name="hmm", standalone_mode=False)
    except _UsageError as error:
        return _complain(f"{error.format_message().rstrip('.')}; see hmm --help", 2)
    except (InvalidArgument, OutOfRange, FileNotFoundError) as error:
        return _complain(_message(error), 2)
    except Exception as error:
        if os.environ.get("HMM_TRACEBACK"):
            raise
        return _complain(_message(error), 1)
    return status or 0


@app.callback()
def _root() -> None:
    """Borrow process memory to devices, in a model of the Linux mm core that moves real bytes."""


@app.command()
def run(
    trace: Annotated[str, typer.Argument(help="An .npz file, or a packaged name.")] = "sqlite",
    memory: Annotated[
        str, typer.Option(help="The device's: a size (2MiB), or part of the footprint (50%).")
    ] = "50%",
    device: Annotated[str, typer.Option(help="Its driver; hmm devices lists them.")] = "numpy",
    chunk: Annotated[
        str | None, typer.Option(help="Evict so much at once, 64KiB to 2MiB; else the driver says.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Simulate its times too: pcie3-x16, gh200, or a file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay a program's page accesses on a device, and check every byte."""
    recorded = load_trace(trace)
    nbytes = memory_bytes(memory, recorded.footprint.size)
    nbytes_chunk = chunk_bytes(chunk)
    driver = load_driver(device)
    machine = machine_for(recorded)
    gpu = driver(machine, memory=nbytes, chunk=nbytes_chunk)
    if profile is not None:
        gpu = load_timing("timed")(gpu, profile)
    differences: list[dict[str, Any]] = []
    with (
        _work(f"{recorded.name} on {gpu.name}"),
        events.listen(lambda _, fields: differences.append(fields), "replay_differs"),
        _progress(f"replaying {recorded.name}", shown=not as_json) as progress,
    ):
        report = _replay(recorded, machine, gpu, progress)
    table, result = _report_table(report), asdict(report)
    if profile is not None:
        result["simulated_us"] = cast(Any, gpu).stats.simulated_us
        table.add_row("simulated", f"{result['simulated_us'] / 1e6:.4f} s on {profile}")
    _print(result, table, as_json)
    if not report.verified:
        raise WorkFailed("not verified: " + "; ".join(map(_difference, differences)))


@app.command()
def devices(as_json: Json = False) -> None:
    """List the drivers that are installed."""
    drivers = [
        {"name": name, "driver": point.value, "problem": _problem(name)}
        for name, point in available().items()
    ]
    table = Table("device", "driver", "state", box=None)
    for driver in drivers:
        table.add_row(driver["name"], driver["driver"], driver["problem"] or "usable")
    _print({"devices": drivers}, table, as_json)


@app.command()
def check(
    device: Annotated[str, typer.Argument(help="A name, numpy?kind=public, or file.py:Class.")],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", help="Only this rule, and those it needs; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try on a driver whether it keeps every promise of drivers, and show the evidence."""
    driver, suite = load_driver(device), load_suite()
    table = Table("rule", "result", "evidence", box=None)
    verdicts = []
    with _progress(f"checking {device}", shown=not as_json) as progress:
        for verdict in suite(driver, only or ()):
            verdicts.append(verdict)
            table.add_row(verdict.rule, verdict.outcome, verdict.evidence)
            if progress is not None:
                progress(len(verdicts), max(50, len(verdicts) + 1))
    failed = [verdict.rule for verdict in verdicts if verdict.outcome == "fail"]
    rules = [
        {name: getattr(verdict, name) for name in ("rule", "promise", "outcome", "evidence")}
        for verdict in verdicts
    ]
    _print({"device": device, "passed": not failed, "rules": rules}, table, as_json)
    if failed:
        raise WorkFailed(
            f"{device} breaks {len(failed)} of {len(verdicts)} rules: {', '.join(failed)}"
        )


@app.command()
def calibrate(
    device: Annotated[str, typer.Argument(help="A name, numpy?kind=public, or file.py:Class.")],
    largest: Annotated[str, typer.Option(help="The largest copy to measure.")] = "32MiB",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, for hmm run --profile.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a device's copies and faults, and print them as a profile (TOML)."""
    measure, driver = load_timing("calibrate"), load_driver(device)
    with _work(f"calibrating {device}"):
        profile = measure(driver, device, largest)
    if output is not None:
        output.write_text(profile.toml())
    print(json.dumps(asdict(profile)) if as_json else profile.toml(), end="\n" if as_json else "")


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this figure; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what migration reaches on this computer."""
    figures = []
    with _progress("measuring", shown=not as_json) as progress:
        for figure in benchmarks.figures(only or None):
            figures.append(figure)
            if progress is not None:
                progress(len(figures), len(only or benchmarks.FIGURES))
    table = Table("figure", "value", "unit", "ratio", "against", box=None)
    for figure in figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.3g}"
        table.add_row(figure.name, _number(figure.value), figure.unit, ratio, figure.against)
    _print({"figures": [asdict(figure) for figure in figures]}, table, as_json)


@app.command()
def script(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE...", help="Scripts; - is stdin.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare with the recordings below DIR.")
    ] = None,
    tier: Annotated[
        str, typer.Option(help="must: what has to agree; should: counters and flags as well.")
    ] = "must",
    profile: Annotated[
        list[str] | None, typer.Option(help="Only this folder of recordings; may be repeated.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; else one a core.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the rules of the model after each script.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run scripts of memory operations, one JSON line for each; or check recorded ones."""
    if check is not None and not files:
        _check_scripts(check, tier, profile or [], jobs, verify, as_json)
        return
    if check is not None or not files:
        raise InvalidArgument("give scripts to run, or --check DIR; see hmm script --help")
    for file in files:
        with nullcontext(sys.stdin) if file == "-" else open(file, errors="replace") as lines:
            for answer in scripts.answers(file, lines, verify=verify):
                print(scripts.json_line(answer), flush=True)


def _check_scripts(
    root: Path, tier: str, profiles: list[str], jobs: int | None, verify: bool, as_json: bool
) -> None:
    """Run every script below *root*, print what differs and a table of profiles."""
    if tier not in scripts.TIERS:
        raise InvalidArgument(f"--tier {tier} is not {' or '.join(scripts.TIERS)}")
    found = scripts.recorded_scripts(root, profiles)
    outcomes = []
    with _progress("checking", shown=not as_json) as progress:
        for outcome in scripts.check_scripts(found, tier, jobs, verify=verify):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(found))
    table = Table("profile", "equal", "of", box=None)
    counts: dict[str, list[int]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.profile, []).append(outcome.equal)
    for name, equal in counts.items():
        table.add_row(name, str(sum(equal)), str(len(equal)))
    if not as_json:
        for outcome in outcomes:
            if not outcome.equal:
                print(outcome)
    _print({"tier": tier, "scripts": [o.as_dict() for o in outcomes]}, table, as_json)
    differing = sum(not outcome.equal for outcome in outcomes)
    if differing:
        raise WorkFailed(f"{differing} of {len(outcomes)} scripts differ from their recording")


def memory_bytes(memory: str, footprint: int) -> int:
    """Bytes of whole pages, at least one, in a size or a percentage of *footprint* pages.

    Raises InvalidArgument for zero, and for what is neither.
    """
    match = _PERCENTAGE.fullmatch(memory)
    try:
        wanted = footprint * Fraction(match[1]) / 100 * PAGE_SIZE if match else memparse(memory)
    except InvalidArgument:
        wanted = 0
    if wanted <= 0:
        raise InvalidArgument(
            f"--memory {memory} is not what a device can have; write a size above 0, such as"
            " 2MiB, or a percentage of the footprint, such as 50%"
        )
    return ceil(Fraction(wanted) / PAGE_SIZE) * PAGE_SIZE


def chunk_bytes(chunk: str | None) -> int | None:
    """Bytes in *chunk*; None stays None. Raises InvalidArgument for what no chunk can be."""
    if chunk is None:
        return None
    try:
        nbytes = memparse(chunk)
    except InvalidArgument:
        nbytes = 0
    if nbytes not in CHUNKS:
        sizes = ", ".join(format_size(size).replace(" ", "") for size in CHUNKS)
        raise InvalidArgument(f"--chunk {chunk} is not one of {sizes}")
    return nbytes


def _replay(trace: Trace, machine: Machine, gpu: Device, progress: Progress | None) -> Report:
    process = machine.spawn(trace.name)
    report = replay(trace, machine, process, gpu, progress)
    machine.verify()
    process.exit()
    gpu.close()
    return report


def _report_table(report: Report) -> Table:
    table = Table(title=f"{report.trace} on {report.device}", box=None, show_header=False)
    table.title_justify = "left"
    for what, value in (
        ("policy", report.policy),
        ("footprint", _pages(report.pages)),
        ("device memory", _pages(report.device_memory_pages)),
        ("accesses", f"{report.accesses:,} in {report.wall_s:.2f} s"),
        ("device faults", f"{report.device_faults:,} in {report.fault_batches:,} batches"),
        ("to the device", _moved(report.pages_to_device, report.bytes_to_device)),
        ("to the system", _moved(report.pages_to_system, report.bytes_to_system)),
        ("evicted", f"{report.evicted_pages:,} pages"),
        ("verified", "yes, every byte" if report.verified else "NO"),
    ):
        table.add_row(what, value)
    return table


def _pages(count: int) -> str:
    return f"{count:,} pages, {format_size(count * PAGE_SIZE)}"


def _moved(count: int, nbytes: int) -> str:
    return f"{count:,} pages, {format_size(nbytes)} copied"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _difference(fields: dict[str, Any]) -> str:
    return (
        f"{fields['count']} words of {fields['what']} differ, the first on page {fields['page']}:"
        f" {fields['found']} where {fields['expected']} belongs"
    )


def _problem(name: str) -> str | None:
    try:
        load_driver(name)
    except UnusableDriver as error:
        return _message(error)
    return None


def _print(result: dict[str, Any], table: Table, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        Console(markup=False, highlight=False).print(table)


@contextmanager
def _work(what: str) -> Iterator[None]:
    """Say that what fails in here is no wrong call, whatever is raised."""
    try:
        yield
    except MmError as error:
        raise WorkFailed(f"{what}: {_message(error)}") from error


@contextmanager
def _progress(what: str, *, shown: bool) -> Iterator[Progress | None]:
    """A bar on stderr, where that is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    with rich.progress.Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=100)
        percent = 0

        def advance(done: int, total: int) -> None:
            nonlocal percent
            if done * 100 // total > percent:
                percent = done * 100 // total
                bar.update(task, completed=percent)

        yield advance


def _message(error: Exception) -> str:
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, WorkFailed):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + (error.strerror or str(error)) + notes
    return f"{type(error).__name__}: {error}{notes}"


def _complain(message: str, status: int) -> int:
    print(f"hmm: {' '.join(message.split())}", file=sys.stderr)
    return status
