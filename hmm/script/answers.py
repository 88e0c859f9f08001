"""The forms in which an answer gives vectors: runs, words, a hash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mm.typing import PAGE_SIZE, Payload

FNV_OFFSET: Final = 0xCBF2_9CE4_8422_2325
FNV_PRIME: Final = 0x100_0000_01B3
MAX_SHOWN: Final = 64  # pages of which every single word or class is shown


def runs(values: Iterable[Any]) -> list[list[Any]]:
    """Runs of equal *values*: a, a, b is [[a, 2], [b, 1]]."""
    return [[value, sum(1 for _ in same)] for value, same in groupby(values)]


def fnv(words: NDArray[np.uint64]) -> str:
    """Hash of *words*, uint64[n], as FNV-1a does it with bytes; 16 hex digits."""
    hashed, mask = FNV_OFFSET, (1 << 64) - 1
    for word in words.tolist():
        hashed = (hashed ^ word) * FNV_PRIME & mask
    return f"{hashed:016x}"


def words_of(data: Payload) -> NDArray[np.uint64]:
    """The 64-bit words of uint8[n, 4096], uint64[n, 512]."""
    return np.ascontiguousarray(data).view(np.uint64).reshape(-1, PAGE_SIZE // 8)


def contents(data: Payload) -> dict[str, Any]:
    """The first word of each page, where they are few, and the hash of all: `w` and `h`."""
    words = words_of(data)
    shown = {"w": hexes(words[:, 0].tolist())} if len(words) <= MAX_SHOWN else {}
    return shown | {"h": fnv(words.reshape(-1))}


def hexes(words: Sequence[int]) -> list[str]:
    """*words* in hexadecimal, without a prefix."""
    return [f"{word:x}" for word in words]
