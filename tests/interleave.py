"""Threads that take turns: interleavings of a few functions, one by one, and each repeatable.

`explore()` runs a scenario under every schedule that preempts a thread at most so often:

    def scenario(together):
        world = mapped_range(pages=1, filled=False)
        first, second = (lambda: world.process.write(world.addr, byte) for byte in (b"a", b"b"))

        together(first, second)

        assert world.process.read(world.addr, 1) in (b"a", b"b")

    explore(scenario)

`run_interleaved()` runs one schedule, from a list of choices, as the note on a failure gives it,
or from a seed. A thread may be preempted where mm/locking.py says so, and nowhere else.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mm.locking import install_scheduler
from tests.world import ended_worlds

Function: TypeAlias = Callable[[], Any]
Together: TypeAlias = Callable[..., list[Any]]

LOST_AFTER = 60.0  # seconds without a turn: somebody sleeps where this scheduler cannot see it


class Stuck(AssertionError):
    """Every thread waits for another one."""


@dataclass(frozen=True)
class Step:
    """A choice between *options* threads; number 0 is the running one where it *may_go_on*."""

    taken: int
    options: int
    may_go_on: bool

    @property
    def preempts(self) -> bool:
        return self.may_go_on and self.taken > 0


@dataclass(eq=False)
class _Task:
    function: Function
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits_for: str = ""
    done: bool = False
    result: Any = None
    error: BaseException | None = None


class TakingTurns:
    """The `Scheduler` of mm/locking.py that lets one of its threads go on at a time.

    choose: of how many threads that could go on, the number of the one that does.
    """

    def __init__(self, functions: Sequence[Function], choose: Callable[[int], int]) -> None:
        self.tasks = [_Task(function) for function in functions]
        self.choose = choose
        self.steps: list[Step] = []
        self.stuck = ""
        self._asleep: set[_Task] = set()  # those that nothing has happened for since they looked
        self._mine = threading.local()
        self._all_done = threading.Event()

    def run(self) -> list[Any]:
        """What each function returned; raises what the first of them raised, or Stuck."""
        threads = [threading.Thread(target=self._live, args=(t,), daemon=True) for t in self.tasks]
        install_scheduler(self)
        try:
            for thread in threads:
                thread.start()
            self._next(None)
            if not self._all_done.wait(LOST_AFTER):
                raise Stuck("a thread sleeps, but not in mm.locking")
            for thread in threads:
                thread.join()
        finally:
            install_scheduler(None)
        if self.stuck:
            raise Stuck(self.stuck)
        for task in self.tasks:
            if task.error is not None:
                raise task.error
        return [task.result for task in self.tasks]

    def preempt(self, point: str) -> None:
        """Linux: cond_resched(). A stranger to these threads passes."""
        task = getattr(self._mine, "task", None)
        if task is not None and not self.stuck:
            self._asleep.clear()
            self._next(task, yields=point == "cond_resched")

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Linux: wait_event()."""
        task = self._mine.task
        self._asleep.clear()
        while not ready():
            if self.stuck:
                raise Stuck(self.stuck)
            task.waits_for = what
            self._asleep.add(task)
            self._next(task)
        task.waits_for = ""
        self._asleep.clear()

    def _live(self, task: _Task) -> None:
        self._mine.task = task
        self._await_turn(task)
        try:
            task.result = task.function()
        except BaseException as error:  # noqa: BLE001 - run() raises it
            task.error = error
        task.done = True
        self._asleep.clear()
        self._next(task)

    def _next(self, running: _Task | None, *, yields: bool = False) -> None:
        """Let one of the threads that can go on do so, and sleep until it is our turn again."""
        able = [task for task in self.tasks if not task.done and task not in self._asleep]
        able.sort(key=lambda task: (task is not running) != yields)
        if not able:
            self._nobody_can_go_on()
            return
        taken = self.choose(len(able)) if len(able) > 1 else 0
        if len(able) > 1:
            self.steps.append(Step(taken, len(able), able[0] is running))
        if able[taken] is running:
            return
        able[taken].turn.release()
        if running is not None and not running.done:
            self._await_turn(running)

    def _nobody_can_go_on(self) -> None:
        waiting = [task for task in self.tasks if not task.done]
        if not waiting:
            self._all_done.set()
            return
        self.stuck = "; ".join(
            f"thread {self.tasks.index(task)} waits for {task.waits_for}" for task in waiting
        )

    def _await_turn(self, task: _Task) -> None:
        if not task.turn.acquire(timeout=LOST_AFTER):
            raise Stuck("a thread sleeps, but not in mm.locking")


def run_interleaved(
    functions: Sequence[Function], *, choices: Sequence[int] = (), seed: int | None = None
) -> tuple[list[Any], list[Step]]:
    """Run *functions* as threads that take turns; what they returned, and the choices made.

    *choices* says who goes on at each point where more than one could, 0 for the thread that is
    running already and for all further points; with a *seed*, chance says it. Raises what the
    first function raised, or Stuck, with a note that says how to run it again.
    """
    rest = iter(choices)
    dice = random.Random(seed)
    pick = (lambda options: next(rest, 0)) if seed is None else dice.randrange
    turns = TakingTurns(functions, pick)
    try:
        return turns.run(), turns.steps
    except BaseException as error:
        error.add_note(f"to see it again: choices={_short([step.taken for step in turns.steps])}")
        raise


def explore(
    scenario: Callable[[Together], None], *, preemptions: int = 2, limit: int = 3_000
) -> int:
    """Run *scenario* under every schedule with at most so many *preemptions*; how many there were.

    It gets a function that runs its arguments as threads and returns their results. A world that
    it makes is ended after each run, which takes longer than the run: one that is made outside,
    with a new process for each run, allows more of them. More than *limit* are an error.
    """
    choices: list[int] | None = []
    runs = 0
    while choices is not None:
        steps: list[Step] = []
        fixed = choices

        def together(*functions: Function) -> list[Any]:
            results, made = run_interleaved(functions, choices=fixed[len(steps) :])  # noqa: B023
            steps.extend(made)  # noqa: B023 - called before the loop goes on
            return results

        try:
            with ended_worlds():
                scenario(together)
        except BaseException as error:
            error.add_note(f"schedule {runs}: choices={_short(fixed)}")
            raise
        runs += 1
        assert runs <= limit, f"more than {limit} schedules; allow fewer preemptions"
        choices = _next_choices(steps, preemptions)
    return runs


def _next_choices(steps: list[Step], preemptions: int) -> list[int] | None:
    """The schedule after the one that made *steps*, depth first; None after the last."""
    for i in reversed(range(len(steps))):
        step = steps[i]
        before = sum(earlier.preempts for earlier in steps[:i])
        if step.taken + 1 < step.options and before + step.may_go_on <= preemptions:
            return [earlier.taken for earlier in steps[:i]] + [step.taken + 1]
    return None


def _short(choices: Sequence[int]) -> list[int]:
    """*choices* without the zeros at the end, which say nothing."""
    last = max((i for i, choice in enumerate(choices) if choice), default=-1)
    return list(choices[: last + 1])
