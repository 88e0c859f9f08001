"""Errors that everyone hears of once, whoever asks first. Linux: lib/errseq.c.

A word, which a file's cache keeps for the errors of writing it back:

     63                  14 13          12   11            0
    +----------------------+--------------+----------------+
    |  how often it changed | somebody saw |     errno      |
    +----------------------+--------------+----------------+

Who has sampled it can tell later whether an error came since, and which was the last. The count
rises only where somebody saw the last value, so that it need not be long.
"""

from __future__ import annotations

from typing import Final

_ERRNO: Final = (1 << 12) - 1
_SEEN: Final = 1 << 12
_COUNT: Final = 1 << 13


def errseq_set(eseq: int, err: int) -> int:
    """*eseq* after another error: a negative errno, or 0 for none. Linux: errseq_set()."""
    if not err:
        return eseq
    changed = eseq & ~(_ERRNO | _SEEN) | -err
    return changed + _COUNT if eseq & _SEEN else changed


def errseq_sample(eseq: int) -> int:
    """What to compare with later; an error that nobody has seen yet is still to be reported.

    Linux: errseq_sample().
    """
    return eseq if eseq & _SEEN else 0


def errseq_check(eseq: int, since: int) -> int:
    """The last error since *since* was sampled, a negative errno, or 0. Linux: errseq_check()."""
    return 0 if eseq == since else -(eseq & _ERRNO)


def errseq_check_and_advance(eseq: int, since: int) -> tuple[int, int]:
    """As errseq_check(), and what *eseq* and *since* are now that somebody has seen it.

    Linux: errseq_check_and_advance().
    """
    if eseq == since:
        return 0, eseq
    return -(eseq & _ERRNO), eseq | _SEEN
