"""Scenario scripts: memory operations in a small language, answered as recorded kernels did."""

from hmm.script.actor import Host
from hmm.script.check import Outcome, check_script, check_scripts, recorded_scripts, recording
from hmm.script.compare import TIERS, Difference, compare
from hmm.script.language import ParseError, parse, parse_line
from hmm.script.operations import GRAMMARS
from hmm.script.run import answers, json_line

__all__ = [
    "GRAMMARS",
    "TIERS",
    "Difference",
    "Host",
    "Outcome",
    "ParseError",
    "answers",
    "check_script",
    "check_scripts",
    "compare",
    "json_line",
    "parse",
    "parse_line",
    "recorded_scripts",
    "recording",
]
