"""Small questions about vectors, answered with as few NumPy calls as they need.

On the short vectors of a single fault a NumPy call costs more than its work, and NumPy's own
any(), all(), unique() and split() are many calls each.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final, TypeAlias, TypeVar
from weakref import ref

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mm.errors import InvalidArgument
from mm.typing import Indices, Mask, Word

T = TypeVar("T", bound=np.generic)
Rows: TypeAlias = slice | Indices  # of a column, as rows() gives them

_LONG: Final = 64
_WORTH_A_LOOK: Final = 1 << 12  # from so many words on, two looks cost less than a mask

_runs: Final[dict[int, ref[Indices]]] = {}  # by id(): the frozen vectors that are a run


def some(mask: NDArray[Any]) -> bool:
    """True if any element is true, or not 0."""
    return bool(mask.item() if mask.size == 1 else np.count_nonzero(mask))


def every(mask: NDArray[Any]) -> bool:
    """True if all elements are; also of no elements."""
    return bool(mask.item() if mask.size == 1 else np.count_nonzero(mask) == mask.size)


def has(words: NDArray[np.uint64], bits: Word) -> Mask:
    """True where a word has any of *bits*."""
    if words.size >= _WORTH_A_LOOK:  # mostly all of them have, or none
        wanted = int(bits)
        if not int(np.bitwise_or.reduce(words)) & wanted:
            return np.zeros(words.size, dtype=np.bool_)
        if int(np.bitwise_and.reduce(words)) & wanted:
            return np.ones(words.size, dtype=np.bool_)
    return (words & bits).astype(np.bool_)


def places(mask: NDArray[Any]) -> Indices:
    """Where *mask*, a vector, is true, or not 0."""
    return mask.nonzero()[0]


def distinct(values: NDArray[Any]) -> list[int]:
    """The values that occur, ascending; quick where there is only one."""
    if values.size == 1 or (values.size and every(values == values[0])):
        return [values.item(0)]
    return np.unique(values).tolist()


def unique(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of *values* that do not repeat an earlier one, in their order."""
    if values.size > 1 and not every(values[1:] > values[:-1]):
        return values[np.sort(np.unique(values, return_index=True)[1])]
    return values


def ascending(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """*numbers* in order; as they are where they stand so, as they mostly do."""
    if numbers.size <= 1 or id(numbers) in _runs:
        return numbers
    falls = numbers[1:] < numbers[:-1]
    count = int(np.count_nonzero(falls))
    if not count:
        return numbers
    if count * _LONG < numbers.size:  # long stretches, which mostly need no more than their order
        parts = sorted((numbers[piece] for piece in pieces(falls, numbers.size)), key=_first)
        numbers = np.concatenate(parts)
        if not some(numbers[1:] < numbers[:-1]):
            return numbers
    return np.sort(numbers)


def _first(numbers: NDArray[np.int64]) -> int:
    return numbers.item(0)


def chosen(values: NDArray[T], mask: Mask) -> NDArray[T]:
    """Those of *values* where *mask* is true; without a copy where all are.

    A mask of one is for all of them.
    """
    if every(mask):
        return values
    return values[mask] if mask.size == values.size else values[:0]


def uniform(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The first of *words* where they are all the same, to be asked for all; otherwise *words*."""
    return words[:1] if words.size > _LONG and every(words == words[0]) else words


def parted(values: NDArray[np.int64], mask: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those of *values* where *mask* is true, and the others."""
    if every(mask):
        return values, values[:0]
    return values[mask], values[~mask]


def rows(numbers: Indices) -> Rows:
    """What selects *numbers* from a column: a slice where they ascend without gaps.

    NumPy moves a slice several times as fast as single elements. What it selects may be a view:
    whoever reads a column by it and then writes the column must be done with what was read.
    """
    if numbers.size > 1:
        first, last = numbers.item(0), numbers.item(-1)
        if last - first == numbers.size - 1 and (
            id(numbers) in _runs or every(numbers[1:] > numbers[:-1])
        ):
            return slice(first, last + 1)
    return numbers


def frozen(numbers: Indices) -> Indices:
    """*numbers*, which change no more: rows() looks at them once instead of at each call.

    They own their elements, or nobody else has a name for the vector that does.
    """
    if numbers.size > _LONG and id(numbers) not in _runs:
        numbers.flags.writeable = False
        if isinstance(rows(numbers), slice):
            key = id(numbers)
            _runs[key] = ref(numbers, lambda _: _runs.pop(key, None))
    return numbers


def add_at(column: NDArray[np.int32], which: Rows, amount: int) -> None:
    """Add *amount* to column[n] for each n of *which*; one that repeats counts as often."""
    if isinstance(which, slice):
        column[which] += np.int32(amount)
    elif which.size == 1:
        at = which.item()
        column[at] = column.item(at) + amount
    else:
        np.add.at(column, which, np.int32(amount))


def set_bits(words: NDArray[np.uint64], which: Rows, bits: Word) -> None:
    """words[n] |= *bits* for each n of *which*."""
    if not isinstance(which, slice) and which.size == 1:
        at = which.item()  # NumPy takes four times as long for one word as Python
        words[at] = words.item(at) | bits.item()
    else:
        words[which] |= bits


def keep_bits(words: NDArray[np.uint64], which: Rows, bits: Word) -> None:
    """words[n] &= *bits* for each n of *which*."""
    if not isinstance(which, slice) and which.size == 1:
        at = which.item()
        words[at] = words.item(at) & bits.item()
    else:
        words[which] &= bits


def joined(vectors: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One after the other, without a copy where only one has elements."""
    full = [vector for vector in vectors if vector.size]
    if len(full) == 1:
        return full[0]
    return np.concatenate(full) if full else np.empty(0, dtype=np.int64)


def pieces(breaks: Mask, size: int) -> list[slice]:
    """A vector of *size* as slices; breaks[i] cuts between its elements i and i + 1."""
    if size <= 1 or not some(breaks):
        return [slice(0, size)] if size else []
    bounds = [0, *(places(breaks) + 1).tolist(), size]
    return [slice(first, last) for first, last in pairwise(bounds)]


def nr_pieces(breaks: Mask) -> int:
    """How many pieces() there would be, where there are any elements."""
    return int(np.count_nonzero(breaks)) + 1


def stretches(numbers: NDArray[np.int64], step: int = 1) -> list[slice]:
    """*numbers* as slices in which each is *step* above the one before."""
    return pieces(numbers[1:] != numbers[:-1] + step, numbers.size)


def integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """*values*, a number or many of them, as a vector. Raises InvalidArgument for other things."""
    vector = np.asarray(values).reshape(-1)
    if vector.size and vector.dtype.kind not in "iu":
        raise InvalidArgument(f"{name} are whole numbers, got {vector[:4]}")
    return vector.astype(np.int64)
