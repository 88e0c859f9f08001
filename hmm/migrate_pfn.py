"""The words of `src` and `dst`, and why a page stayed. Linux: include/linux/migrate.h, v4.20.

 63                               6  5     4      3     2      1      0
+----------------------------------+-----+------+-----+------+-------+-----+
|               PFN                |ERROR|DEVICE|WRITE|LOCKED|MIGRATE|VALID|
+----------------------------------+-----+------+-----+------+-------+-----+
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mm.page_flags import BIT
from mm.typing import Mask, Pfns, Word, word
from mm.vectors import has

MigratePfns: TypeAlias = NDArray[np.uint64]

MIGRATE_PFN_VALID: Final = BIT(0)  # there is a page
MIGRATE_PFN_MIGRATE: Final = BIT(1)  # src: it can move; without VALID: a hole that may be filled
MIGRATE_PFN_LOCKED: Final = BIT(2)  # whoever wrote the word has locked it
MIGRATE_PFN_WRITE: Final = BIT(3)  # src: the process may store to it
MIGRATE_PFN_DEVICE: Final = BIT(4)  # src: it is in device-private memory
MIGRATE_PFN_ERROR: Final = BIT(5)  # dst: the contents are lost, the CPU gets SIGBUS
MIGRATE_PFN_SHIFT: Final = word(6)


def migrate_pfn(pfns: Pfns, flags: MigratePfns | Word = MIGRATE_PFN_VALID) -> MigratePfns:
    """Words for *pfns* with VALID and *flags* set. Linux: migrate_pfn()."""
    return (pfns.view(np.uint64) << MIGRATE_PFN_SHIFT) | (flags | MIGRATE_PFN_VALID)


def migrate_pfn_to_page(words: MigratePfns) -> Pfns:
    """PFN of each word, -1 where it is not VALID. Linux: migrate_pfn_to_page()."""
    return np.where(is_valid(words), migrate_pfn_to_pfn(words), -1)


def migrate_pfn_to_pfn(words: MigratePfns) -> Pfns:
    """PFN of each word, which the caller knows to be VALID."""
    return (words >> MIGRATE_PFN_SHIFT).view(np.int64)


def is_valid(words: MigratePfns) -> Mask:
    """True where a word names a page."""
    return has(words, MIGRATE_PFN_VALID)


def is_migrating(words: MigratePfns) -> Mask:
    """True where a src word still has MIGRATE: a page or hole that can move, or has moved."""
    return has(words, MIGRATE_PFN_MIGRATE)


class Stayed(IntEnum):
    """Why an entry did not migrate; `errno` gives what `MigrateVma.status` says for it."""

    NO = 0  # it moved, or it was never asked for
    SKIPPED = 1  # not a kind of page that was selected
    LOCKED = 2  # somebody else holds the page lock
    ISOLATED = 3  # somebody else has taken it off the LRU
    PINNED = 4  # references beyond its mappings
    MAPPED = 5  # a mapping of it could not be taken away
    NOT_CHOSEN = 6  # the driver gave no destination
    REFUSED = 7  # the destination cannot hold a page of this kind
    BUSY = 8  # a reference came while it was being copied
    RACED = 9  # a hole that something else filled meanwhile
    LOST = 10  # the driver lost the contents (MIGRATE_PFN_ERROR)
    ABORTED = 11  # a callback raised
    NO_TABLE = 12  # a hole for which no page table was to be had
    OVER_LIMIT = 13  # a hole whose process's control group may have no more pages
    USERFAULT = 14  # a hole that is userland's to fill (userfaultfd)

    @property
    def errno(self) -> int:
        """The negative errno for it, 0 for `NO`."""
        return _ERRNO[self]


_ERRNO: Final = {
    Stayed.NO: 0,
    Stayed.SKIPPED: -errno.EINVAL,
    Stayed.LOCKED: -errno.EAGAIN,
    Stayed.ISOLATED: -errno.EBUSY,
    Stayed.PINNED: -errno.EBUSY,
    Stayed.MAPPED: -errno.EAGAIN,
    Stayed.NOT_CHOSEN: -errno.ENOMEM,
    Stayed.REFUSED: -errno.EINVAL,
    Stayed.BUSY: -errno.EAGAIN,
    Stayed.RACED: -errno.EEXIST,
    Stayed.LOST: -errno.EIO,
    Stayed.ABORTED: -errno.ECANCELED,
    Stayed.NO_TABLE: -errno.ENOMEM,
    Stayed.OVER_LIMIT: -errno.ENOMEM,
    Stayed.USERFAULT: -errno.EBUSY,
}
STAYED_ERRNO: Final = np.array([_ERRNO[reason] for reason in Stayed], dtype=np.int32)
