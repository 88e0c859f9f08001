"""The page lock, over vectors of pages. Linux: mm/filemap.c, include/linux/pagemap.h.

The lock is the bit PG_locked; `lock_owner` remembers the thread that set it, so that one which
waits for itself is told so. Waiting goes through mm/locking.py.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.errors import Deadlock, KernelBug
from mm.locking import NOBODY, current, preempt
from mm.page_flags import PG_locked
from mm.types import MemMap
from mm.typing import Mask, Pfns, word
from mm.vectors import every, keep_bits, rows, set_bits

_UNLOCKED: Final = word(~PG_locked)
_NOBODY: Final = np.array(NOBODY, dtype=np.uint16)


def trylock_page(mem: MemMap, pfns: Pfns) -> Mask:
    """Lock those of *pfns* (distinct) that nobody has locked; True where that worked.

    Linux: trylock_page(), include/linux/pagemap.h.
    """
    preempt("trylock_page")
    with mem.locks.atomic:
        mine = rows(pfns)
        unlocked = mem.lock_owner[mine] == _NOBODY
        if not every(unlocked):
            mine = rows(pfns[unlocked])
        set_bits(mem.flags, mine, PG_locked)
        mem.lock_owner[mine] = current()
    return unlocked


def lock_new_page(mem: MemMap, pfns: Pfns) -> None:
    """Lock *pfns*, fresh from their allocator, which nobody else can have locked.

    Linux: __SetPageLocked(), include/linux/page-flags.h.
    """
    with mem.locks.atomic:
        mine = rows(pfns)
        set_bits(mem.flags, mine, PG_locked)
        mem.lock_owner[mine] = current()


def page_locked(mem: MemMap, pfns: Pfns) -> Mask:
    """True where somebody has the page lock. Linux: PageLocked(), include/linux/page-flags.h."""
    return mem.lock_owner[pfns] != _NOBODY


def lock_page(mem: MemMap, pfns: Pfns) -> None:
    """Lock *pfns* (distinct), waiting while another thread has locked any of them.

    It waits with none of them locked, so two that want the same pages cannot stop one another.
    Raises Deadlock where this thread has one. Linux: lock_page(), include/linux/pagemap.h.
    """
    got = trylock_page(mem, pfns)
    while not every(got):
        unlock_page(mem, pfns[got])
        wait_on_page_locked(mem, pfns[~got].item(0))
        got = trylock_page(mem, pfns)


def wait_on_page_locked(mem: MemMap, pfn: int) -> None:
    """Sleep until *pfn* is unlocked, holding no reference to it.

    Unlike Linux v4.20, a waiter takes no reference: there it makes the owner's count of
    references fail, so that enough waiters starve a migration (put_and_wait_on_page_locked()
    mended it in v5.0). Raises Deadlock where this thread holds the lock.
    Linux: wait_on_page_locked(), include/linux/pagemap.h.
    """

    def unlocked() -> bool:
        return mem.lock_owner.item(pfn) == NOBODY

    if unlocked():
        return
    if mem.lock_owner.item(pfn) == current():
        raise Deadlock(
            f"page {pfn:#x} is locked by the thread that waits for it; a driver's callback may "
            f"not touch memory that it is migrating through the process"
        )
    mem.locks.wait_until(unlocked, f"page {pfn:#x}")


def unlock_page(mem: MemMap, pfns: Pfns) -> None:
    """Unlock *pfns* and wake whoever waits. Linux: unlock_page(), mm/filemap.c."""
    if not pfns.size:
        return
    with mem.locks.atomic:
        mine = rows(pfns)
        owners = mem.lock_owner[mine]
        if not every(owners):
            wrong = pfns[owners == _NOBODY]
            raise KernelBug(f"unlock_page: not locked: {', '.join(map(hex, wrong[:8].tolist()))}")
        keep_bits(mem.flags, mine, _UNLOCKED)
        mem.lock_owner[mine] = NOBODY
        mem.locks.wake_up()
    preempt("unlock_page")
