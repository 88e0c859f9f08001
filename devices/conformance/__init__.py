"""What every driver promises, tried on one: the suite behind `hmm check DEVICE`.

for verdict in check(MyDriver):
    print(verdict.rule, verdict.outcome, verdict.evidence)

devices/conformance/plugin.py runs it under pytest.
"""

from devices.conformance.rule import Broken, NotJudged, Opener, Rule, rule
from devices.conformance.suite import RULES, Verdict, check

__all__ = ["RULES", "Broken", "NotJudged", "Opener", "Rule", "Verdict", "check", "rule"]
