"""The vectors that every function takes and gives, and the page size they count in."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT

Pfns: TypeAlias = NDArray[np.int64]  # page frame numbers
Addresses: TypeAlias = NDArray[np.int64]  # virtual addresses, in bytes, page aligned
Indices: TypeAlias = NDArray[np.int64]  # places in another vector, or in the table pool
Ptes: TypeAlias = NDArray[np.uint64]  # page-table entries
Mask: TypeAlias = NDArray[np.bool_]
Payload: TypeAlias = NDArray[np.uint8]  # contents, uint8[pages, 4096]


NO_PAGES: Final = np.empty(0, dtype=np.int64)


def pages(*numbers: int) -> Pfns:
    """A vector of *numbers*, for the places where one page is at hand rather than many."""
    return np.array(numbers, dtype=np.int64)
