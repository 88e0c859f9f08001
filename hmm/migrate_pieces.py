"""migrate_vma() of a long range in pieces, the next of which begins while the device copies one.

begin 0 | begin 1       | end 0 | begin 2 | end 1 | ...
          copy 0 ............ |   copy 2 ............
                         copy 1 ............ |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hmm.migrate import Begun, begin_migration, end_migration
from hmm.migration import SELECT_ALL, MigrateVma, MigrateVmaOps, check_arguments
from mm.types import Vma
from mm.typing import PAGE_SHIFT, Mask


def migrate_vma_pieces(
    ops: MigrateVmaOps,
    vma: Vma,
    bounds: Sequence[int],
    private: Any = None,
    *,
    select: int = SELECT_ALL,
    pgmap_owner: object = None,
    wanted: Mask | None = None,
) -> list[MigrateVma]:
    """migrate_vma() of each [bounds[i], bounds[i + 1]), two of them under way at a time.

    *wanted* is for the pages of the whole range. Raises as migrate_vma() does; what has begun is
    ended then, and what comes after it stays.
    """
    pieces: list[MigrateVma] = []
    under_way: deque[Begun] = deque()
    with vma.vm_mm.mmap_sem.read():
        try:
            for start, end in pairwise(bounds):
                src, dst = np.zeros((2, (end - start) >> PAGE_SHIFT), dtype=np.uint64)
                first = (start - bounds[0]) >> PAGE_SHIFT
                chosen = None if wanted is None else wanted[first : first + src.size]
                migrate = MigrateVma(vma, start, end, src, dst, select, pgmap_owner, chosen)
                check_arguments(migrate)
                pieces.append(migrate)
                begun = begin_migration(migrate, ops, private)
                if begun is not None:
                    under_way.append(begun)
                if len(under_way) > 1:
                    end_migration(under_way.popleft())
        finally:
            _end_all(under_way)
    return pieces


def _end_all(under_way: deque[Begun]) -> None:
    """End them all, whatever one of them raises."""
    if under_way:
        try:
            end_migration(under_way.popleft())
        finally:
            _end_all(under_way)
