"""Counters of pages that stand in one another, each with a limit. Linux: mm/page_counter.c.

What a counter is charged with, its parent and all that those stand in are charged with too; each
may refuse. Callers hold `mem.locks.atomic`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mm.errors import InvalidArgument, KernelBug
from mm.memparse import Size, memparse
from mm.typing import PAGE_SHIFT, PAGE_SIZE

PAGE_COUNTER_MAX: Final = ((1 << 63) - 1) // PAGE_SIZE  # no limit


class PageCounter:
    """Pages, and how many there may be. Linux: struct page_counter, linux/page_counter.h.

    usage: those charged now; watermark: the most there ever were; failcnt: how often it refused.
    """

    __slots__ = ("failcnt", "max", "parent", "usage", "watermark")

    def __init__(self, parent: PageCounter | None = None) -> None:
        self.parent = parent
        self.max = PAGE_COUNTER_MAX
        self.usage = self.watermark = self.failcnt = 0

    def lineage(self) -> Iterator[PageCounter]:
        """It, and what it stands in, outward."""
        counter: PageCounter | None = self
        while counter is not None:
            yield counter
            counter = counter.parent

    @property
    def margin(self) -> int:
        """Pages that it and what it stands in have room for. Linux: mem_cgroup_margin()."""
        return max(0, min(counter.max - counter.usage for counter in self.lineage()))


def page_counter_try_charge(counter: PageCounter, nr_pages: int) -> tuple[int, PageCounter | None]:
    """Charge as many of *nr_pages* as there is room for; how many, and who refused the others.

    Linux: page_counter_try_charge(), mm/page_counter.c, which charges all or nothing.
    """
    room, refuses = nr_pages, None
    for one in counter.lineage():
        if one.max - one.usage < room:
            room, refuses = max(0, one.max - one.usage), one
    for one in counter.lineage():
        one.usage += room
        one.watermark = max(one.watermark, one.usage)
    if refuses is not None:
        refuses.failcnt += 1
    return room, refuses


def page_counter_uncharge(counter: PageCounter, nr_pages: int) -> None:
    """Take *nr_pages* off. Raises KernelBug where there were not so many.

    Linux: page_counter_uncharge(), mm/page_counter.c.
    """
    for one in counter.lineage():
        one.usage -= nr_pages
        if one.usage < 0:
            raise KernelBug(f"page_counter: {nr_pages:#x} pages less, {-one.usage:#x} too many")


def page_counter_set_max(counter: PageCounter, nr_pages: int) -> bool:
    """Allow no more than *nr_pages* from now on; False, with nothing changed, if more are charged.

    Linux: page_counter_set_max(), mm/page_counter.c.
    """
    if counter.usage > nr_pages:
        return False
    counter.max = nr_pages
    return True


def page_counter_memparse(size: Size | None) -> int:
    """Whole pages in *size*, of which None and "max" are no limit. Raises InvalidArgument.

    Linux: page_counter_memparse(), mm/page_counter.c.
    """
    if size is None or size == "max":
        return PAGE_COUNTER_MAX
    try:
        return min(memparse(size) >> PAGE_SHIFT, PAGE_COUNTER_MAX)
    except InvalidArgument as error:
        raise InvalidArgument(f'{error.strerror}; "max" is no limit') from None
