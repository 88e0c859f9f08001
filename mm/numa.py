"""move_pages(): a list of pages, each to a node of its own. Linux: mm/migrate.c, at the end.

    look up    _find_pages                 the page at each address, and its node
    isolate    _add_pages_for_migration    take those that are to move off their LRU lists
    move       _move_pages_to_nodes        all that go to one node in one call
    answer     a word for each page, and one for all

Device memory has no node: it is never moved, and counts as not there.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm.cred import CAP_SYS_NICE, check_capable, ptrace_may_access
from mm.errors import InvalidArgument, PermissionDenied
from mm.filemap import page_locked
from mm.mempolicy import (
    MPOL_MF_MOVE,
    MPOL_MF_MOVE_ALL,
    cpuset_mems_allowed,
    vma_migratable,
)
from mm.migrate import (
    alloc_migration_target,
    migrate_page_add,
    migrate_pages,
    putback_movable_pages,
)
from mm.page_cache import page_in_cache
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_special
from mm.sched import Task, current_task
from mm.swap import lru_add_drain_all
from mm.types import MemMap, MmStruct, Vma
from mm.typing import Addresses, Errnos, Indices, Mask, Pfns
from mm.vectors import distinct, every, pieces, places, some, unique


def kernel_move_pages(
    mm: MmStruct,
    addrs: Addresses,
    nodes: Indices | None = None,
    flags: int = MPOL_MF_MOVE,
    status: Errnos | None = None,
    task: Task | None = None,
) -> tuple[int, Errnos]:
    """Send the page at each of *addrs* to its node of *nodes*; without them, ask where it is.

    *task*: whose memory it is, where not the caller's own. Returns what the system call returns,
    and *status*, int32[n], which is written where the system call writes it: the node that the page
    is on now, -ENOENT where none is present (nor in device memory), -EFAULT for the zero page and
    where nothing is mapped, -EACCES where others map it and *flags* lack MPOL_MF_MOVE_ALL, -EBUSY
    where it is on no LRU list.

    The first is 0, or how many pages were not moved, or -ENODEV at a node that there is not, or
    -EACCES at one that *task* may not use, or -ENOMEM. Then the words of the run of pages that
    failed, and all after it, are as they were. Raises InvalidArgument for other flags,
    PermissionDenied where MPOL_MF_MOVE_ALL is not for the caller, or *task* is out of its reach.
    Linux: kernel_move_pages(), mm/migrate.c.
    """
    if flags & ~(MPOL_MF_MOVE | MPOL_MF_MOVE_ALL):
        raise InvalidArgument(f"move_pages: flags {flags:#x}: only MOVE and MOVE_ALL are known")
    if flags & MPOL_MF_MOVE_ALL:
        check_capable(CAP_SYS_NICE, "move_pages with moveall")
    task = task or current_task()
    if not ptrace_may_access(task):
        raise PermissionDenied(f"move_pages: {task.name} is not {current_task().name}'s to move")
    if status is None:
        status = np.full(addrs.size, -errno.EAGAIN, dtype=np.int32)
    if nodes is None:
        status[:] = do_pages_stat(mm, addrs)
        return 0, status
    mems = cpuset_mems_allowed(mm.mem, task)
    return do_pages_move(mm, addrs, nodes, status, flags, mems), status


def do_pages_stat(mm: MmStruct, addrs: Addresses) -> Errnos:
    """The node of the page at each of *addrs*, or why it has none. Linux: mm/migrate.c."""
    with mm.mmap_sem.read(), mm.page_table_lock:
        return _find_pages(mm, mm.vmas, addrs)[1]


def _find_pages(mm: MmStruct, vmas: list[Vma], addrs: Addresses) -> tuple[Pfns, Errnos]:
    """The page at each address in *vmas*, PFN 0 where there is none, and its node or why none.

    Unlike Linux v4.20, where nothing was touched yet is -ENOENT in every kind of mapping (as in
    6.12); there it is -EFAULT in anonymous ones. Linux: follow_page(), mm/gup.c.
    """
    mem = mm.mem
    pfns = np.zeros(addrs.size, dtype=np.int64)
    found = np.full(addrs.size, -errno.EFAULT, dtype=np.int32)
    starts = np.array([vma.vm_start for vma in vmas] + [np.iinfo(np.int64).max])
    ends = np.array([vma.vm_end for vma in vmas], dtype=np.int64)
    mapped = starts[ends.searchsorted(addrs, side="right")] <= addrs

    ptes = mem.tables.entries[pte_offset(mem.tables, mm.pgd, addrs[mapped])]
    present = pte_present(ptes)
    frames = np.where(present & ~pte_special(ptes), pte_pfn(ptes), 0)
    frames[mem.is_zone_device_page(frames)] = 0
    pfns[mapped] = frames
    nowhere = np.where(present & pte_special(ptes), -errno.EFAULT, -errno.ENOENT)
    found[mapped] = np.where(frames != 0, mem.page_to_nid(frames), nowhere)
    return pfns, found


class _Queue(NamedTuple):
    """Entries of a list that are dealt with together.

    pfns: the page of each; nodes: where it shall go; found: the answer; queued: True where the
    page is isolated and waits to be moved.
    """

    pfns: Pfns
    nodes: Indices
    found: Errnos
    queued: Mask


def do_pages_move(
    mm: MmStruct,
    addrs: Addresses,
    nodes: Indices,
    status: Errnos,
    flags: int,
    mems: Sequence[int],
) -> int:
    """Move pages to nodes that are among *mems*, and answer, as kernel_move_pages() says.

    Unlike Linux v4.20, pages that were not tried count as not moved (as since v5.6).
    Linux: do_pages_move(), mm/migrate.c.
    """
    end, refusal = _first_refused(mm.mem, nodes, mems)
    lru_add_drain_all(mm.mem)
    done = 0
    while done < end:
        queue = _add_pages_for_migration(mm, addrs[done:end], nodes[done:end], flags)
        unmoved = _move_pages_to_nodes(mm.mem, queue)
        if some(unmoved):
            return _stop(queue, unmoved, status[done:end], addrs.size - done, refusal)
        status[done : done + queue.pfns.size] = queue.found
        done += queue.pfns.size
    return refusal


def _first_refused(mem: MemMap, nodes: Indices, mems: Sequence[int]) -> tuple[int, int]:
    """The first place in *nodes* that no page may go to, and why; else their number and 0."""
    allowed = np.isin(nodes, mems)
    if every(allowed):
        return nodes.size, 0
    first = int(allowed.argmin())
    online = 0 <= nodes.item(first) < len(mem.nodes)
    return first, -errno.EACCES if online else -errno.ENODEV


def _add_pages_for_migration(mm: MmStruct, addrs: Addresses, nodes: Indices, flags: int) -> _Queue:
    """Isolate the pages that are to move, of as many entries as can be dealt with together.

    Linux: add_page_for_migration(), mm/migrate.c.
    """
    mem = mm.mem
    with mm.mmap_sem.read(), mm.page_table_lock:
        pfns, found = _find_pages(mm, [vma for vma in mm.vmas if vma_migratable(vma)], addrs)
        queued = (found >= 0) & (found != nodes)
        if not flags & MPOL_MF_MOVE_ALL:
            shared = queued & (mem.mapcount[pfns] > 1)
            found[shared] = -errno.EACCES
            queued &= ~shared
        count, repeated = _together(mem, pfns, nodes, queued)
        waiting = places(queued[:count])
        fresh = waiting[: waiting.size - repeated]
        isolated = np.zeros(waiting.size, dtype=np.bool_)
        isolated[: fresh.size] = migrate_page_add(mem, pfns[fresh])
    found[waiting[~isolated]] = -errno.EBUSY
    queued[waiting] = isolated
    return _Queue(pfns[:count], nodes[:count], found[:count], queued[:count])


def _together(mem: MemMap, pfns: Pfns, nodes: Indices, queued: Mask) -> tuple[int, bool]:
    """How many entries, from the first on, can be dealt with as if one after the other.

    Linux collects pages until the node changes or an entry has nothing to move, moves what it
    has, and goes no further if that fails. Where no failure is in sight and no page is there
    twice, all entries at once come to the same. Else it is the first such run, with the entry
    that ends it; True if that is a page of the run once more.
    """
    waiting, known = pfns[queued], pfns[pfns != 0]
    references = mem.mapcount[waiting] + page_in_cache(mem, waiting)
    held = (mem.refcount[waiting] != references) | page_locked(mem, waiting)
    if not waiting.size or not (some(held) or unique(known).size < known.size):
        return pfns.size, False

    first = int(queued.argmax())
    joins = queued[first:] & (nodes[first:] == nodes[first])
    end = pfns.size if every(joins) else first + int(joins.argmin())
    run = pfns[first:end]
    fresh = unique(run)
    if fresh.size < run.size:
        same = run[: fresh.size] == fresh
        return first + (fresh.size if every(same) else int(same.argmin())) + 1, True
    return end + (end < pfns.size and nodes.item(end) == nodes.item(first)), False


def _move_pages_to_nodes(mem: MemMap, queue: _Queue) -> Errnos:
    """Move what is queued, and note in `found` where it is then; a negative errno if it is not.

    Linux: do_move_pages_to_node(), mm/migrate.c.
    """
    unmoved = np.zeros(queue.pfns.size, dtype=np.int32)
    waiting = queue.queued.copy()
    try:
        for nid in distinct(queue.nodes[waiting]):
            at = places(waiting & (queue.nodes == nid))
            waiting[at] = False
            unmoved[at] = migrate_pages(mem, queue.pfns[at], alloc_migration_target(mem, nid))
            queue.found[at] = nid
    finally:
        putback_movable_pages(mem, queue.pfns[waiting])
    return unmoved


def _stop(queue: _Queue, unmoved: Errnos, status: Errnos, entries: int, refusal: int) -> int:
    """The answer where pages of *queue* could not be moved, and the words of what came before.

    *status*: of the entries from the first of *queue* to the last that names a good node;
    *entries*: how many there are to the end of the list; *refusal*: why the one after it is none.
    Linux: move_pages_and_store_status(), v5.6.
    """
    size, nodes, queued = queue.pfns.size, queue.nodes, queue.queued
    breaks = (nodes[1:] != nodes[:-1]) | ~queued[1:] | ~queued[:-1]
    first = int(unmoved.nonzero()[0][0])
    run = next(run for run in pieces(breaks, size) if run.stop > first)
    status[: run.start] = queue.found[: run.start]
    if run.stop == status.size < entries:
        return refusal
    stop = run.stop
    if stop < size and nodes.item(stop) == nodes.item(first):  # what ends the run has its answer
        status[stop] = queue.found[stop]
        stop += 1
    if some(unmoved[run] == -errno.ENOMEM):
        return -errno.ENOMEM
    return int(np.count_nonzero(unmoved[run])) + entries - stop
