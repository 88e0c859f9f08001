"""The conformance suite: right drivers pass every rule, and each wrong one fails its own."""

import re
from importlib import import_module

import pytest

from devices import Counting, Faulty, Logged, NumpyDevice
from devices.conformance import RULES, check
from hmm.registry import load_driver

MODULES = ("pages", "copies", "fences", "callbacks", "transfers", "tables", "life")
WRONG = [
    driver
    for module in MODULES
    for driver in vars(import_module(f"tests.devices.wrong_drivers.{module}")).values()
    if isinstance(driver, type) and hasattr(driver, "breaks")
]


def wrapped(machine, memory):
    """A device with several things in between, none of which may be felt."""
    return Logged(
        Counting(Faulty(NumpyDevice(machine, memory), copy={"share": 0.5, "how": "delay"}))
    )


def outcomes(driver, outcome):
    """The verdicts on *driver* that are *outcome*."""
    return [verdict for verdict in check(driver) if verdict.outcome == outcome]


class TestRightDrivers:
    @pytest.mark.parametrize("spec", ["numpy", "numpy?kind=public", f"{__file__}:wrapped"])
    def test_every_rule_is_kept(self, spec):
        """The drivers that come along keep every promise, wrapped or not."""
        verdicts = list(check(load_driver(spec)))

        assert {"pass"} == {verdict.outcome for verdict in verdicts}
        assert [rule.name for rule in RULES] == [verdict.rule for verdict in verdicts]


class TestWrongDrivers:
    @pytest.mark.parametrize("driver", WRONG, ids=lambda driver: driver.__name__)
    def test_fails_for_its_reason_and_no_other(self, driver):
        """What is wrong with a driver is found by the rule that is about it, with evidence."""
        failed = outcomes(driver, "fail")

        assert [driver.breaks] == [verdict.rule for verdict in failed]
        assert re.search(driver.evidence, failed[0].evidence), failed[0].evidence

    def test_every_rule_finds_somebody(self):
        """No rule is there that no driver has ever broken."""
        assert {rule.name for rule in RULES} == {driver.breaks for driver in WRONG}
