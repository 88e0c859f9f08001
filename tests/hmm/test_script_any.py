"""Whatever a script says is answered, and leaves the model whole."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hmm.script import GRAMMARS, json_line
from tests.hmm.scripts import play

MEANT = [0, 1, 2, 3, 7]
EXTREME = [-1, 64, 4097, 1 << 20, 1 << 44, (1 << 51) - 1, 1 << 52, (1 << 63) - 1, -1 << 63, 1 << 70]
NUMBERS = st.sampled_from(MEANT) | st.sampled_from(EXTREME)
WORDS = {
    "NAME": ["A", "B", "C"],
    "KIND": ["anon"],
    "PROT": ["rw", "r", "-"],
    "ADVICE": ["dontneed", "free", "pageout", "cold", "willneed", "populate_read", "collapse"],
    "METHOD": ["gup", "gupw", "iou", "vms"],
    "MODE": ["default", "bind", "preferred", "interleave", "local"],
    "NODE": ["0", "1", "alt", "-1", str(1 << 40)],
    "PAGE:NODE": ["0:1", "1:0", "null", f"{1 << 50}:1", f"1:{1 << 40}"],
    "ID": ["p", "q"],
    "NEW": ["B"],
    "REFS": ["1", "4"],
}
# Those that take their time with many pages, and those of which a machine has too little.
SLOW = {"bench", "bench_move", "mmap", "mremap"}


def words_of(usage):
    """Words for each of a grammar's."""
    drawn = []
    for word in usage.replace("{", "").replace("}", "").split()[1:]:
        if word == "@" or word.startswith("["):
            option = "@1" if word == "@" else word[1:-1].replace("=K", "=3")
            drawn.append(st.sampled_from(["", option]))
        elif word in WORDS:
            drawn.append(st.sampled_from(WORDS[word]))
        else:
            drawn.append(NUMBERS.map(str))
    return st.tuples(*drawn).map(" ".join)


LINES = st.one_of(
    [
        words_of(grammar.usage).map(f"{name} {{}}".format)
        for name, grammar in GRAMMARS.items()
        if name not in SLOW | {"child"}
    ]
)


class TestAnyScript:
    @settings(max_examples=30)
    @given(st.lists(LINES, min_size=4, max_size=10))
    def test_is_answered(self, lines):
        """Each operation has an answer that is JSON, and no rule of the model is broken."""
        begin = ["mmap A 8 anon rw", "mmap B 70 anon rw off=500", "fill A 0 8 1"]
        for answer in play(*begin, *lines):
            assert "ret" in answer
            assert json_line(answer)
