"""The forms in which an answer gives vectors: runs, words, a hash."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Final

import numpy as np

from mm.errors import MmError
from mm.typing import PAGE_SIZE, Payload

WORDS_PER_PAGE: Final = PAGE_SIZE // 8
MAX_SHOWN: Final = 64  # pages of which every single word or class is shown

_FNV_OFFSET: Final = 0xCBF2_9CE4_8422_2325
_FNV_PRIME: Final = 0x100_0000_01B3
_OTHER_NAMES: Final = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK"}
_WORD: Final = (1 << 64) - 1


def runs(values: Iterable[Any]) -> list[list[Any]]:
    """Runs of equal *values*: a, a, b is [[a, 2], [b, 1]]."""
    return [[value, sum(1 for _ in same)] for value, same in groupby(values)]


def errno_name(code: int) -> str:
    """The name of an errno, where it has two that which strerrorname_np(3) gives."""
    return _OTHER_NAMES.get(code) or errno.errorcode[code]


def error_name(error: MmError) -> str:
    """The errno of *error* by name, such as EINVAL."""
    return errno_name(error.code)


def status_name(status: int) -> int | str:
    """A node as it is, a negative errno by its name."""
    return status if status >= 0 else errno_name(-status)


def fnv(data: Payload) -> str:
    """Hash of the 64-bit words of *data*, uint8[n, 4096]; 16 hex digits.

    As FNV-1a, but it takes a word at a time instead of a byte.
    """
    hashed = _FNV_OFFSET
    for word in data.view(np.uint64).ravel().tolist():
        hashed = (hashed ^ word) * _FNV_PRIME & _WORD
    return f"{hashed:016x}"


def contents(data: Payload) -> dict[str, Any]:
    """What a device read, uint8[n, 4096]: the first word of each of a few pages, and the hash."""
    firsts = data.view(np.uint64)[:, 0] if len(data) <= MAX_SHOWN else None
    shown = {} if firsts is None else {"w": [f"{word:x}" for word in firsts.tolist()]}
    return shown | {"h": fnv(data)}


def pages_of_words(value: int, npages: int) -> Payload:
    """Pages of which page i holds the word *value* + i all over, uint8[npages, 4096]."""
    words = np.uint64(value) + np.arange(npages, dtype=np.uint64)
    return words.repeat(WORDS_PER_PAGE).view(np.uint8).reshape(npages, PAGE_SIZE)
