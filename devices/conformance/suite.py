"""The conformance suite: all rules, and what became of them on one driver."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from devices.conformance import access, callbacks, copies, fences, life, pages, tables, transfers
from devices.conformance.rule import Broken, NotJudged, Opener, Rule
from hmm.offload.device import OpenDevice
from mm.errors import InvalidArgument
from mm.machine import Machine

RULES: Final = (
    pages.allocate,
    pages.full,
    pages.free,
    copies.copy_one,
    copies.copy_run,
    copies.copy_bystanders,
    copies.copy_scattered,
    copies.copy_source,
    copies.lost,
    copies.clear,
    fences.completion,
    fences.not_early,
    fences.together,
    callbacks.alloc_and_copy,
    callbacks.finalize_and_map,
    callbacks.lock_order,
    transfers.willing,
    transfers.sizes,
    transfers.odd_ranges,
    transfers.cpu_access,
    transfers.contents,
    transfers.holes,
    transfers.partial,
    transfers.no_frames,
    transfers.failing_copy,
    transfers.lost_pages,
    transfers.late_refusal,
    tables.stale_own,
    tables.rights,
    tables.stale_unmap,
    tables.stale_protect,
    tables.stale_clear,
    tables.stale_fork,
    tables.stale_soft_dirty,
    tables.stale_exclusive,
    tables.stale_migrate,
    access.device_access,
    access.exchange,
    access.run,
    life.munmap,
    life.eviction,
    life.fork,
    life.exit,
    life.removal,
    life.two_devices,
    life.between,
    life.no_contents,
    life.leaks,
)


@dataclass(frozen=True)
class Verdict:
    """What became of one rule.

    outcome: "pass", "fail", or "skip" where it could not be judged; evidence: what was seen, or
    why it was not judged.
    """

    rule: str
    promise: str
    outcome: str
    evidence: str
    seconds: float


def rules_called(names: Sequence[str]) -> tuple[Rule, ...]:
    """The rules called *names*, and those that they need; all where there are no names.

    Raises InvalidArgument for a name that none has.
    """
    known = {rule.name: rule for rule in RULES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidArgument(
            f"there is no rule {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
        )
    chosen: set[Rule] = set()
    pending = [known[name] for name in names]
    while pending:
        rule = pending.pop()
        chosen.add(rule)
        pending.extend(rule.needs)
    return tuple(rule for rule in RULES if rule in chosen) if names else RULES


class Trials:
    """Verdicts on one driver, each found when it is asked for, after those that it needs.

    Raises InvalidArgument for what is no driver, or for options that the driver refuses.
    """

    def __init__(self, driver: OpenDevice) -> None:
        self.opener = Opener(driver)
        self.opener(Machine(("1MiB",), max_physmem="64MiB"), "64KiB").close()
        self._verdicts: dict[Rule, Verdict] = {}
        self._unfit: set[Rule] = set()  # rules that are broken, or need one that is

    def verdict(self, rule: Rule) -> Verdict:
        """What became of *rule*."""
        if rule not in self._verdicts:
            self._verdicts[rule] = self._judge(rule)
        return self._verdicts[rule]

    def _judge(self, rule: Rule) -> Verdict:
        for need in rule.needs:
            self.verdict(need)
        missing = [need.name for need in rule.needs if need in self._unfit]
        begin = time.perf_counter()
        if missing:
            outcome, evidence = "skip", f"not judged without {', '.join(missing)}"
        else:
            outcome, evidence = _try(rule, self.opener)
        if missing or outcome == "fail":
            self._unfit.add(rule)
        return Verdict(rule.name, rule.promise, outcome, evidence, time.perf_counter() - begin)


def check(driver: OpenDevice, only: Sequence[str] = ()) -> Iterator[Verdict]:
    """Try the rules, or *only* those and what they need, on *driver*, one after the other.

    Raises InvalidArgument, before the first, for a rule that does not exist, for what is no
    driver, and for options that the driver refuses.
    """
    rules, trials = rules_called(only), Trials(driver)
    return map(trials.verdict, rules)


def _try(rule: Rule, opener: Opener) -> tuple[str, str]:
    """How *rule* turns out, and the evidence. Whatever a driver raises is a finding."""
    try:
        return "pass", rule.trial(opener)
    except NotJudged as reason:
        return "skip", str(reason)
    except Broken as broken:
        return "fail", str(broken)
    except Exception as error:  # noqa: BLE001 - drivers may raise anything
        said = error.strerror if isinstance(error, OSError) else str(error)
        return "fail", f"{type(error).__name__}: {' '.join(str(said).split())}"
