"""Pages of drivers that others may move, though they are on no LRU list. Linux: mm/compaction.c.

A driver that keeps pages of its own, as a balloon does, need not keep just these frames. It has
an inode of its own (`alloc_anon_inode()`, mm/fs.py), and says of each page, locked, that it
belongs to the `i_mapping` of that:

    set_page_movable      `mapping` is its number and PAGE_MAPPING_MOVABLE: whoever wants the frame
    isolate_movable_page  asks the driver (isolate_page), which takes the page off its lists; it
                          is PG_isolated then, with a reference
    move_movable_page     the driver lets another frame take its place (migratepage), contents and
                          all; or
    putback_movable_page  the driver (putback_page) has it again
    clear_page_movable    the driver needs it no more, and drops its reference. It may do so while
                          the page is PG_isolated: whoever moves it finds it without a mapping, and
                          only has to let go of it

The callbacks are called with the pages locked. mm/migrate.py moves these pages among others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from mm.errors import InvalidArgument, KernelBug
from mm.filemap import page_locked, trylock_page, unlock_page
from mm.locking import preempt
from mm.page_flags import PG_isolated
from mm.swap import get_page, put_page
from mm.types import PAGE_MAPPING_MOVABLE, AddressSpace, MemMap, page_movable
from mm.typing import Errnos, Mask, Pfns, word
from mm.vectors import distinct, every, has, places

_NOT_ISOLATED: Final = word(~PG_isolated)


def set_page_movable(mem: MemMap, pfns: Pfns, mapping: AddressSpace) -> None:
    """Say that the driver behind *mapping* lets others move *pfns*, which it has locked.

    It has one reference to each. Raises InvalidArgument where *mapping* lacks what moves them.
    Linux: __SetPageMovable(), mm/compaction.c.
    """
    a_ops = mapping.a_ops
    if None in (a_ops.isolate_page, a_ops.migratepage, a_ops.putback_page):
        raise InvalidArgument(
            f"set_page_movable: {mapping.host!r} needs isolate_page, migratepage and putback_page"
        )
    _check(page_locked(mem, pfns), pfns, "to be movable, but not locked")
    with mem.locks.atomic:
        mem.mapping[pfns] = mapping.number << 2 | PAGE_MAPPING_MOVABLE


def clear_page_movable(mem: MemMap, pfns: Pfns) -> None:
    """Say that the driver needs *pfns*, which it has locked, no more, isolated or not.

    That they were movable stays, so that whoever moves one does not give it back.
    Linux: __ClearPageMovable(), mm/compaction.c.
    """
    _check(page_locked(mem, pfns), pfns, "no more movable, but not locked")
    _check(page_has_driver(mem, pfns), pfns, "no more movable, and never was")
    with mem.locks.atomic:
        mem.mapping[pfns] = PAGE_MAPPING_MOVABLE


def page_has_driver(mem: MemMap, pfns: Pfns) -> Mask:
    """True for movable pages that their driver has not let go of, who has the page lock.

    Linux: PageMovable(), mm/compaction.c.
    """
    return page_movable(mem, pfns) & (mem.mapping[pfns] != PAGE_MAPPING_MOVABLE)


def page_isolated(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages that their driver has put aside. Linux: PageIsolated(), linux/page-flags.h."""
    return has(mem.flags[pfns], PG_isolated)


def isolate_movable_page(mem: MemMap, pfns: Pfns) -> Mask:
    """Take *pfns* (distinct) from their drivers, with a reference each, to move them.

    False for what is no driver's, what somebody else moves or has locked, and what its driver
    will not part with. Linux: isolate_movable_page(), mm/migrate.c.
    """
    preempt("isolate_movable_page")
    isolated = np.zeros(pfns.size, dtype=np.bool_)
    with mem.locks.atomic:
        # What is no driver's is not ours to lock, nor what is about to be freed.
        held = page_movable(mem, pfns) & (mem.refcount[pfns] > 0)
        get_page(mem, pfns[held])
    at = places(held)
    at = at[trylock_page(mem, pfns[at])]
    locked = pfns[at]
    at = at[page_has_driver(mem, locked) & ~page_isolated(mem, locked)]
    try:
        for mapping, which in _by_driver(mem, pfns[at]):
            assert mapping.a_ops.isolate_page is not None
            mine = at[which]
            mine = mine[mapping.a_ops.isolate_page(mapping, pfns[mine])]
            with mem.locks.atomic:
                mem.flags[pfns[mine]] |= PG_isolated
            isolated[mine] = True
    except BaseException:
        putback_movable_page(mem, pfns[isolated])
        isolated[:] = False
        raise
    finally:
        unlock_page(mem, locked)
        put_page(mem, pfns[held & ~isolated])
    return isolated


def _by_driver(mem: MemMap, pfns: Pfns) -> Iterator[tuple[AddressSpace, Mask]]:
    """The mappings that *pfns*, which drivers have, belong to, and which of them to each."""
    owners = mem.mapping[pfns]
    for owner in distinct(owners) if pfns.size else ():
        yield mem.mappings[owner >> 2], owners == owner


def putback_movable_page(mem: MemMap, pfns: Pfns) -> None:
    """Give isolated *pfns*, locked, back to their drivers; the references stay the caller's.

    Linux: putback_movable_page(), mm/migrate.c.
    """
    _check(page_locked(mem, pfns), pfns, "put back, but not locked")
    _check(page_has_driver(mem, pfns), pfns, "put back, but no driver has it")
    _check(page_isolated(mem, pfns), pfns, "put back, but not isolated")
    for mapping, mine in _by_driver(mem, pfns):
        assert mapping.a_ops.putback_page is not None
        mapping.a_ops.putback_page(mapping, pfns[mine])
    clear_page_isolated(mem, pfns)


def clear_page_isolated(mem: MemMap, pfns: Pfns) -> None:
    """Say that nobody moves *pfns* any more. Linux: __ClearPageIsolated()."""
    with mem.locks.atomic:
        mem.flags[pfns] &= _NOT_ISOLATED


def move_movable_page(mem: MemMap, new: Pfns, old: Pfns) -> Errnos:
    """Have the drivers of isolated old[i] use new[i] in its place: 0, or what they say instead.

    Both are locked. 0 also where the driver has let go of the page: new[i] is as it was then.
    Linux: move_to_new_page() of pages that are on no LRU list, mm/migrate.c.
    """
    _check(page_isolated(mem, old), old, "to be moved, but not isolated")
    status = np.zeros(old.size, dtype=np.int32)
    kept = places(page_has_driver(mem, old))
    for mapping, which in _by_driver(mem, old[kept]):
        assert mapping.a_ops.migratepage is not None
        mine = kept[which]
        status[mine] = mapping.a_ops.migratepage(mapping, new[mine], old[mine])
    clear_page_isolated(mem, old[status == 0])
    return status


def _check(good: Mask, pfns: Pfns, what: str) -> None:
    """Raise KernelBug unless all of *pfns* are *good*. Linux: VM_BUG_ON_PAGE()."""
    if not every(good):
        raise KernelBug(f"page {', '.join(map(hex, pfns[~good][:8].tolist()))}: {what}")
