"""Bits of `MemMap.flags`. Linux: include/linux/page-flags.h.

Each is a typed constant, so that `flags & PG_lru` stays uint64 and `~PG_lru` is what it says.
The zone and node that Linux packs into the top bits have a column of their own.
"""

from __future__ import annotations

from typing import Final

from mm.typing import Word, word


def BIT(n: int) -> Word:
    """The word with only bit *n* set. Linux: BIT(), include/linux/bits.h."""
    return word(1 << n)


NO_FLAGS: Final = word(0)
PG_locked: Final = BIT(0)  # somebody owns the page; `lock_owner` says who
PG_referenced: Final = BIT(2)  # accessed since reclaim last looked
PG_uptodate: Final = BIT(3)  # contents are valid
PG_dirty: Final = BIT(4)  # contents differ from the copy on disk or in swap
PG_lru: Final = BIT(5)  # on an LRU list
PG_active: Final = BIT(6)  # the list it is on, or goes back to, is an active one
PG_workingset: Final = BIT(7)  # came back soon after reclaim took it
PG_swapcache: Final = BIT(10)  # in the swap cache; `private` is its slot
PG_reserved: Final = BIT(12)  # the allocator never owns it: zero page, ZONE_DEVICE
PG_private: Final = BIT(13)  # `private` is the row of its buffer heads
PG_writeback: Final = BIT(15)  # being written to its backing store
PG_anon_exclusive: Final = BIT(17)  # the one process that maps it owns it; since v5.19
PG_swapbacked: Final = BIT(18)  # its home is swap: anonymous memory and tmpfs
PG_unevictable: Final = BIT(19)  # reclaim must not look at it
PG_mlocked: Final = BIT(20)  # some VMA that maps it is VM_LOCKED
PG_isolated: Final = BIT(21)  # somebody moves it, who got it from its driver
PG_hwpoison: Final = BIT(22)  # its contents are lost: nobody maps it or will be given it

# What a page that goes back to the allocator may not carry.
PAGE_FLAGS_CHECK_AT_FREE: Final = word(
    PG_locked | PG_lru | PG_active | PG_reserved | PG_unevictable | PG_mlocked | PG_isolated
)

FLAG_NAMES: Final = {
    name: value for name, value in globals().copy().items() if name.startswith("PG_")
}


def describe_flags(word: int) -> str:
    """The names of the bits that *word* has, as a kernel dump prints them: `locked|lru`."""
    names = [name[3:] for name, bit in FLAG_NAMES.items() if int(bit) & word]
    return "|".join(names) or "none"
