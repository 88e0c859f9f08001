"""What the memory of a replay holds: before it, what each event stores, and what must come of it.

`expected` is the judge of a replay. It is plain NumPy over one array of words, has neither pages
that move nor windows of epochs, and imports nothing of the model but the trace.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmm.offload.traces import Trace
from mm.typing import PAGE_SIZE, Indices, Pfns

WORD_BYTES: Final = 8
WORDS: Final = PAGE_SIZE // WORD_BYTES  # in a page
EPOCHS_APART: Final = WORDS  # epochs so far apart, and no closer, meet in a word of a page

# Odd constants, with which a product of 64 bits loses nothing: those of splitmix64.
_WORD: Final = np.uint64(0x9E3779B97F4A7C15)
_FIRST: Final = np.uint64(0xBF58476D1CE4E5B9)
_SECOND: Final = np.uint64(0x94D049BB133111EB)


class Expected(NamedTuple):
    """What a replay must show: every word that was loaded, and what is left at the end."""

    loads: NDArray[np.uint64]  # uint64[E]
    words: NDArray[np.uint64]  # uint64[pages, 512], in the order of the footprint


def initial_words(pages: Pfns) -> NDArray[np.uint64]:
    """What the host fills *pages* with, uint64[n, 512]; no two words of a machine are alike."""
    number = pages[:, np.newaxis] * WORDS + np.arange(WORDS)
    return number.astype(np.uint64) * _WORD


def word_of(epoch: Indices) -> Indices:
    """Which word of its page an event of *epoch* loads, and stores where it writes, int64[n]."""
    return epoch % EPOCHS_APART


def stored_words(page: Pfns, epoch: Indices) -> NDArray[np.uint64]:
    """What an event that writes *page* in *epoch* stores, uint64[n]: a hash of the two."""
    mixed = page.astype(np.uint64) * _WORD + epoch.astype(np.uint64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= _FIRST
    mixed ^= mixed >> np.uint64(27)
    mixed *= _SECOND
    mixed ^= mixed >> np.uint64(31)
    return mixed


def expected(trace: Trace) -> Expected:
    """Replay *trace* on one plain array, an epoch at a time."""
    words = initial_words(trace.footprint)
    flat = words.reshape(-1)
    where = trace.place * WORDS + word_of(trace.epoch)
    stored = stored_words(trace.page, trace.epoch)
    loads = np.empty_like(stored)
    for first, stop in pairwise(trace.epoch_start.tolist()):
        at = where[first:stop]
        loads[first:stop] = flat[at]
        flat[at] = np.where(trace.write[first:stop], stored[first:stop], flat[at])
    return Expected(loads, words)
