"""Scripts in a test: their lines, and what each operation answers."""

from hmm.script import Host, answers

PLACE = ("i", "who", "op")


def play(*lines):
    """What a script of *lines* answers, without line, process and text; the model is verified."""
    return [
        {key: value for key, value in answer.items() if key not in PLACE}
        for answer in answers("test", lines, host=Host(("64MiB", "64MiB")), verify=True)
    ]


def last(*lines):
    """What the last of *lines* answers."""
    return play(*lines)[-1]


def shown(*lines):
    """The first range of the `state` that is the last of *lines*."""
    return last(*lines)["s"][0]
