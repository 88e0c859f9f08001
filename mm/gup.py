"""References to the pages behind an address range, for those who bypass page tables.

Linux: mm/gup.c.
"""

from __future__ import annotations

import numpy as np

from mm.swap import put_page
from mm.types import MemMap, MmStruct
from mm.typing import Pfns
from mm.uaccess import access_pages, page_range
from mm.vectors import add_at


class Pin:
    """References to pages that keep them where they are, until release(); `with` releases.

    A machine lists its pins, so that verify() can account for every reference.
    """

    def __init__(self, mem: MemMap) -> None:
        self.mem = mem
        self.pfns: Pfns = np.empty(0, dtype=np.int64)
        mem.pins.append(self)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Drop the references; a second call does nothing. Linux: release_pages(), mm/swap.c."""
        if self in self.mem.pins:
            self.mem.pins.remove(self)
            put_page(self.mem, self.pfns)


def pin_user_pages(mm: MmStruct, addr: int, nbytes: int, *, write: bool = True) -> Pin:
    """Fault in the pages of [*addr*, *addr* + *nbytes*) and hold a reference to each.

    A page in device memory comes back first; the zero page is not counted.
    Raises SegmentationFault, BusError, OutOfMemory, and then holds nothing.
    Linux: get_user_pages(), mm/gup.c.
    """
    pin = Pin(mm.mem)

    def hold(place: int, pfns: Pfns) -> None:
        pfns = pfns[pfns != mm.mem.zero_pfn]
        with mm.mem.locks.atomic:
            add_at(mm.mem.refcount, pfns, 1)
        pin.pfns = np.concatenate((pin.pfns, pfns))

    try:
        access_pages(mm, page_range(addr, nbytes), hold, write=write)
    except BaseException:
        pin.release()
        raise
    return pin
