"""The vectors that every function takes and gives, and the page size they count in."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT

Pfns: TypeAlias = NDArray[np.int64]  # page frame numbers
Addresses: TypeAlias = NDArray[np.int64]  # virtual addresses, in bytes, page aligned
Indices: TypeAlias = NDArray[np.int64]  # places in another vector, or in the table pool
Slots: TypeAlias = NDArray[np.int64]  # places in the swap area
Ptes: TypeAlias = NDArray[np.uint64]  # page-table entries
Mask: TypeAlias = NDArray[np.bool_]
Errnos: TypeAlias = NDArray[np.int32]  # for each page or block 0, or a negative errno
Faults: TypeAlias = NDArray[np.uint16]  # a VmFault word for each address
Payload: TypeAlias = NDArray[np.uint8]  # contents, uint8[pages, 4096]
Word: TypeAlias = NDArray[np.uint64]  # one word, uint64[]: a flag, a mask, a shift


def word(value: Any) -> Word:
    """A constant to combine vectors of words with.

    Of shape () and read-only: NumPy takes it as it is, while it converts a scalar, be it its own
    uint64, at each use, which costs as much again as the operation on a vector of one.
    """
    constant = np.array(value, dtype=np.uint64)
    constant.flags.writeable = False
    return constant


def number(value: int) -> NDArray[np.int64]:
    """As word(), to combine PFNs and addresses with: int64[]."""
    return word(value).view(np.int64)


NO_PAGES: Final = np.empty(0, dtype=np.int64)


def pages(*numbers: int) -> Pfns:
    """A vector of *numbers*, for the places where one page is at hand rather than many."""
    return np.array(numbers, dtype=np.int64)
