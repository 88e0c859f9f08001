"""Scenario scripts: memory operations in a small language, answered as recorded kernels did."""

from hmm.script.actor import GRAMMARS
from hmm.script.language import ParseError, parse
from hmm.script.run import answers, json_line

__all__ = ["GRAMMARS", "ParseError", "answers", "json_line", "parse"]
