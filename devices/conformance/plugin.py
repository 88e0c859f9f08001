"""The conformance suite under pytest: each rule is a test of each driver that is named.

    pytest -p devices.conformance.plugin --check my_driver.py:MyDriver --check "numpy?kind=public"

In a project of yours these two are for `addopts`, and make the rules part of every run.
"""

from __future__ import annotations

import pytest

from devices.conformance.rule import Broken, Rule
from devices.conformance.suite import RULES, Trials
from hmm.registry import load_driver
from mm.errors import InvalidArgument


def pytest_addoption(parser: pytest.Parser) -> None:
    """--check DEVICE, as `hmm check` takes it."""
    parser.addoption(
        "--check",
        action="append",
        default=[],
        metavar="DEVICE",
        help="try every rule of the conformance suite on this driver; may be repeated",
    )


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add a test for each rule and driver."""
    for device in session.config.getoption("--check"):
        try:
            trials = Trials(load_driver(device))
        except InvalidArgument as error:
            raise pytest.UsageError(f"--check {device}: {error.strerror}") from None
        for rule in RULES:
            item = RuleItem.from_parent(session, name=f"{device}::{rule.name}")
            item.rule, item.trials = rule, trials
            items.append(item)


class RuleItem(pytest.Item):
    """One rule, tried on one driver."""

    rule: Rule
    trials: Trials

    def runtest(self) -> None:
        """Fail with the evidence; what could not be judged is skipped."""
        verdict = self.trials.verdict(self.rule)
        if verdict.outcome == "skip":
            pytest.skip(verdict.evidence)
        if verdict.outcome == "fail":
            raise Broken(verdict.evidence)

    def repr_failure(
        self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None
    ) -> str:
        """The promise and the evidence; where in the suite it was found is of no use."""
        if isinstance(excinfo.value, Broken):
            return f"{self.rule.name}: {self.rule.promise}\n{excinfo.value}"
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[str, None, str]:
        """How the test is called in reports."""
        return self.path.name, None, self.name
