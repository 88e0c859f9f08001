"""Scenario scripts: memory operations in a small language, answered as recorded kernels did."""

from hmm.script.actor import GRAMMARS
from hmm.script.check import Outcome, check_script, check_scripts, recorded_scripts, recording
from hmm.script.compare import TIERS, Difference, compare
from hmm.script.language import ParseError, parse
from hmm.script.run import answers, json_line

__all__ = [
    "GRAMMARS",
    "TIERS",
    "Difference",
    "Outcome",
    "ParseError",
    "answers",
    "check_script",
    "check_scripts",
    "compare",
    "json_line",
    "parse",
    "recorded_scripts",
    "recording",
]
