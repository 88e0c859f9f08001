"""System calls about nodes: where pages are, where they shall be. Linux: mm/migrate.c, mempolicy.c.

    move_pages      each of a list of pages to a node of its own, or where each of them is
    migrate_pages   all pages of a process from some nodes to others
    mbind           the policy of a range, and its pages to where that wants them
    set_mempolicy   the policy of a task

All of them take pages off their LRU lists under the page-table lock and hand them to
migrate_pages() of mm/migrate.py. Device memory has no node and is never moved.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final, NamedTuple

import numpy as np

from mm.errors import (
    InvalidArgument,
    InvalidRange,
    Misplaced,
    MmError,
    OutOfMemory,
    SegmentationFault,
)
from mm.filemap import page_locked
from mm.gfp import GFP_HIGHUSER_MOVABLE, Gfp
from mm.mempolicy import (
    Mempolicy,
    alloc_pages_mpol,
    check_nodes,
    get_task_policy,
    mpol_equal,
    mpol_new,
    vma_migratable,
)
from mm.migrate import (
    Errnos,
    NewPages,
    migrate_page_add,
    migrate_pages,
    putback_movable_pages,
)
from mm.mmap import page_align, vma_modify_policy, vmas_in
from mm.page_alloc import alloc_pages_bulk
from mm.pagewalk import walk_page_range
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_special
from mm.sched import Task, current_task
from mm.swap import lru_add_drain_all
from mm.swapops import is_migration_entry
from mm.types import MemMap, MmStruct, Vma
from mm.typing import PAGE_SIZE, Addresses, Indices, Mask, Pfns, Ptes
from mm.vectors import distinct, every, joined, pieces, places, some

MPOL_MF_STRICT: Final = 1  # a page that is and stays misplaced is an error
MPOL_MF_MOVE: Final = 2  # move pages that only this process maps
MPOL_MF_MOVE_ALL: Final = 4  # move pages that others map too
_MOVE: Final = MPOL_MF_MOVE | MPOL_MF_MOVE_ALL


# move_pages -------------------------------------------------------------------------------------


def kernel_move_pages(
    mm: MmStruct,
    addrs: Addresses,
    nodes: Indices | None = None,
    flags: int = MPOL_MF_MOVE,
    status: Errnos | None = None,
) -> tuple[int, Errnos]:
    """Send the page at each of *addrs* to its node of *nodes*; without them, ask where it is.

    Returns what the system call returns, and *status*, int32[n], which is written where the
    system call writes it: the node that the page is on now, -ENOENT where none is present (nor in
    device memory), -EFAULT for the zero page and where nothing is mapped, -EACCES where others
    map it and *flags* lack MPOL_MF_MOVE_ALL, -EBUSY where it is on no LRU list.

    The first is 0, or how many pages were not moved, or -ENODEV at a node that there is not, or
    -ENOMEM. Then the words of the run of pages that failed, and all after it, are as they were.
    Raises InvalidArgument for other flags. Linux: kernel_move_pages(), mm/migrate.c.
    """
    if flags & ~_MOVE:
        raise InvalidArgument(f"move_pages: flags {flags:#x} are not among {_MOVE:#x}")
    if status is None:
        status = np.full(addrs.size, -errno.EAGAIN, dtype=np.int32)
    if nodes is None:
        status[:] = do_pages_stat(mm, addrs)
        return 0, status
    return do_pages_move(mm, addrs, nodes, status, flags), status


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
    mm: MmStruct, addrs: Addresses, nodes: Indices, status: Errnos, flags: int
) -> int:
    """Move pages as kernel_move_pages() says, and answer as it does.

    Unlike Linux v4.20, pages that were not tried count as not moved (as since v5.6).
    Linux: do_pages_move(), mm/migrate.c.
    """
    online = (nodes >= 0) & (nodes < len(mm.mem.nodes))
    end = addrs.size if every(online) else int(online.argmin())
    lru_add_drain_all(mm.mem)
    done = 0
    while done < end:
        queue = _add_pages_for_migration(mm, addrs[done:end], nodes[done:end], flags)
        unmoved = _move_pages_to_nodes(mm.mem, queue)
        if some(unmoved):
            return _stop(queue, unmoved, status[done:end], addrs.size - done)
        status[done : done + queue.pfns.size] = queue.found
        done += queue.pfns.size
    return 0 if end == addrs.size else -errno.ENODEV


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
    held = (mem.refcount[waiting] != mem.mapcount[waiting]) | page_locked(mem, waiting)
    if not waiting.size or not (some(held) or np.unique(known).size < known.size):
        return pfns.size, False

    first = int(queued.argmax())
    joins = queued[first:] & (nodes[first:] == nodes[first])
    end = pfns.size if every(joins) else first + int(joins.argmin())
    seen = np.sort(np.unique(pfns[first:end], return_index=True)[1])
    again = places(seen != np.arange(seen.size))
    if seen.size < end - first:
        return first + (again.item(0) if again.size else seen.size) + 1, True
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
            unmoved[at] = migrate_pages(mem, queue.pfns[at], _new_pages_on(mem, nid))
            queue.found[at] = nid
    finally:
        putback_movable_pages(mem, queue.pfns[waiting])
    return unmoved


def _new_pages_on(mem: MemMap, nid: int) -> NewPages:
    """Frames of *nid* and no other node. Linux: alloc_new_node_page(), mm/migrate.c."""

    def get_new_pages(pfns: Pfns) -> Pfns:
        gfp = GFP_HIGHUSER_MOVABLE | Gfp.THISNODE
        return alloc_pages_bulk(mem, gfp, nid, pfns.size, current_task().cpu)

    return get_new_pages


def _stop(queue: _Queue, unmoved: Errnos, status: Errnos, entries: int) -> int:
    """The answer where pages of *queue* could not be moved, and the words of what came before.

    *status*: of the entries from the first of *queue* to the last that names a node; *entries*:
    how many there are to the end of the list. Linux: move_pages_and_store_status(), v5.6.
    """
    size, nodes, queued = queue.pfns.size, queue.nodes, queue.queued
    breaks = (nodes[1:] != nodes[:-1]) | ~queued[1:] | ~queued[:-1]
    first = int(unmoved.nonzero()[0][0])
    run = next(run for run in pieces(breaks, size) if run.stop > first)
    status[: run.start] = queue.found[: run.start]
    if run.stop == status.size < entries:
        return -errno.ENODEV
    stop = run.stop
    if stop < size and nodes.item(stop) == nodes.item(first):  # what ends the run has its answer
        status[stop] = queue.found[stop]
        stop += 1
    if some(unmoved[run] == -errno.ENOMEM):
        return -errno.ENOMEM
    return int(np.count_nonzero(unmoved[run])) + entries - stop


# migrate_pages ----------------------------------------------------------------------------------


def kernel_migrate_pages(mm: MmStruct, old: Sequence[int], new: Sequence[int]) -> int:
    """Move the pages of *mm* that are on nodes *old* to nodes *new*, the first to the first.

    Returns how many could not be moved. Raises InvalidArgument, and OutOfMemory where frames run
    out, with what has moved by then moved. Linux: kernel_migrate_pages(), mm/mempolicy.c.
    """
    there = [nid for nid in check_nodes(new) if nid < len(mm.mem.nodes)]
    if not there:
        raise InvalidArgument(
            f"migrate_pages: of nodes {list(new)} the machine has none, only "
            f"0..{len(mm.mem.nodes) - 1}"
        )
    lru_add_drain_all(mm.mem)
    return sum(migrate_to_node(mm, *pair) for pair in _node_pairs(check_nodes(old), there))


def _node_pairs(old: list[int], new: list[int]) -> Iterator[tuple[int, int]]:
    """From which node to which, in an order that fills a node after it was emptied.

    Where there are as many of both, each goes to its like; else what is on one of *new* stays.
    Linux: do_migrate_pages(), mm/mempolicy.c.
    """
    left = list(old)
    while left:
        pairs = [(nid, new[old.index(nid) % len(new)]) for nid in left]
        pairs = [(source, dest) for source, dest in pairs if source != dest]
        if len(old) != len(new):
            pairs = [(source, dest) for source, dest in pairs if source not in new]
        if not pairs:
            return
        pair = next((pair for pair in pairs if pair[1] not in left), pairs[-1])
        left.remove(pair[0])
        yield pair


def migrate_to_node(mm: MmStruct, source: int, dest: int) -> int:
    """Move the pages of *mm* from node *source* to *dest*; how many could not be moved.

    Raises OutOfMemory. Linux: migrate_to_node(), mm/mempolicy.c.
    """
    mem = mm.mem
    wrong = np.arange(len(mem.nodes)) == source
    with mm.mmap_sem.read():
        if not mm.vmas:
            return 0
        pfns, failed = queue_pages_range(
            mm, 0, mm.vmas[-1].vm_end, wrong, MPOL_MF_MOVE_ALL, holes=True
        )
    status = migrate_pages(mem, pfns, _new_pages_on(mem, dest))
    if some(status == -errno.ENOMEM):
        raise OutOfMemory(
            f"migrate_pages: node {dest} has no room for {np.count_nonzero(status)} of "
            f"{pfns.size} pages of node {source}"
        )
    return failed + int(np.count_nonzero(status))


# mbind ------------------------------------------------------------------------------------------


def do_set_mempolicy(mem: MemMap, task: Task, mode: str, nodes: Sequence[int]) -> None:
    """Let *task* allocate by policy *mode* over *nodes*, where no VMA has another.

    Raises InvalidArgument. Linux: do_set_mempolicy(), mm/mempolicy.c.
    """
    task.mempolicy = mpol_new(mem, mode, nodes)
    task.il_next = 0


def do_mbind(
    mm: MmStruct, start: int, length: int, mode: str, nodes: Sequence[int], flags: int
) -> None:
    """Let [*start*, *start* + *length*) allocate by policy *mode* over *nodes*.

    With MPOL_MF_MOVE or MPOL_MF_MOVE_ALL pages that are elsewhere are moved; with MPOL_MF_STRICT
    those that stay, or without a move the first that is elsewhere, raise Misplaced. Device memory
    is passed over. Raises InvalidArgument, InvalidRange, and SegmentationFault where nothing is
    mapped. Linux: do_mbind(), mm/mempolicy.c, v6.7, before which pages that could not be isolated
    were no error.
    """
    mem = mm.mem
    if start % PAGE_SIZE:
        raise InvalidRange(f"mbind: addr {start:#x} is not a multiple of {PAGE_SIZE:#x}")
    if not length:
        return
    policy, end = mpol_new(mem, mode, nodes), start + page_align(length)
    if policy is None:  # then no page is elsewhere than it should be
        flags &= ~MPOL_MF_STRICT
    if flags & _MOVE:
        lru_add_drain_all(mem)
    wrong = ~np.isin(np.arange(len(mem.nodes)), check_nodes(nodes))
    with mm.mmap_sem.write():
        pfns, failed = queue_pages_range(mm, start, end, wrong, flags, holes=policy is None)
        mbind_range(mm, start, end, policy)
    failed += int(np.count_nonzero(migrate_pages(mem, pfns, _new_pages_by(mem, policy))))
    if failed and flags & MPOL_MF_STRICT:
        raise Misplaced(
            f"mbind: {failed} pages of [{start:#x}, {end:#x}) cannot be moved to nodes "
            f"{list(nodes)}; the policy is set all the same"
        )


def _new_pages_by(mem: MemMap, policy: Mempolicy | None) -> NewPages:
    """Frames as *policy* wants them. Linux: alloc_migration_target_by_mpol(), v6.7."""
    wanted = policy or get_task_policy(current_task())

    def get_new_pages(pfns: Pfns) -> Pfns:
        return alloc_pages_mpol(mem, GFP_HIGHUSER_MOVABLE, wanted, mem.index[pfns])

    return get_new_pages


def mbind_range(mm: MmStruct, start: int, end: int, policy: Mempolicy | None) -> None:
    """Give what is mapped in [*start*, *end*) another policy. Linux: mbind_range()."""
    for vma in vmas_in(mm, start, end):
        if not mpol_equal(vma.vm_policy, policy):
            vma_modify_policy(mm, vma, max(start, vma.vm_start), min(end, vma.vm_end), policy)


def queue_pages_range(
    mm: MmStruct, start: int, end: int, wrong: Mask, flags: int, *, holes: bool
) -> tuple[Pfns, int]:
    """Isolate pages of [*start*, *end*) on nodes that are *wrong*, bool[nodes], as *flags* say.

    Returns them, and how many could not be isolated that should. Called with mmap_sem held.
    Raises Misplaced for the first where MPOL_MF_STRICT stands alone; SegmentationFault where
    nothing is mapped in the range or, unless it may have *holes*, in a part of it.
    Linux: queue_pages_range(), mm/mempolicy.c, v6.7.
    """
    vmas = vmas_in(mm, start, end)
    if not vmas:
        raise SegmentationFault(start, f"{mm.name}: nothing is mapped in [{start:#x}, {end:#x})")
    queued: list[Pfns] = []
    failed, at = 0, start
    try:
        for vma, after in zip_longest(vmas, vmas[1:]):
            to = min(end, after.vm_start if after else end)
            if not holes and (at < vma.vm_start or vma.vm_end < to):
                gap = at if at < vma.vm_start else vma.vm_end
                raise SegmentationFault(gap, f"{mm.name}: nothing is mapped at {gap:#x}")
            at, last = vma.vm_end, min(end, vma.vm_end)
            failed += _queue_pages(vma, max(start, vma.vm_start), last, wrong, flags, queued)
    except MmError:
        putback_movable_pages(mm.mem, joined(queued))
        raise
    return joined(queued), failed


def _queue_pages(
    vma: Vma, start: int, end: int, wrong: Mask, flags: int, queued: list[Pfns]
) -> int:
    """The part of queue_pages_range() in one VMA; appends to *queued*.

    Linux: queue_pages_pte_range(), mm/mempolicy.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    moves, strict = flags & _MOVE, flags & MPOL_MF_STRICT
    if not (strict or (moves and vma_migratable(vma))):
        return 0
    failed = 0
    for run in walk_page_range(mem.tables, mm.pgd, start, end, holes=False):
        with mm.page_table_lock:
            pfns = _misplaced(mem, run.ptes, wrong)
            failed += int(np.count_nonzero(is_migration_entry(run.ptes)))
            if moves and vma_migratable(vma):
                if not flags & MPOL_MF_MOVE_ALL:
                    pfns = pfns[mem.mapcount[pfns] == 1]
                taken = _isolate(mem, pfns)
                queued.append(taken)
                failed -= taken.size
            failed += pfns.size
        if failed and not moves:
            raise Misplaced(
                f"mbind: {failed} pages of [{run.addr:#x}, "
                f"{run.addr + run.ptes.size * PAGE_SIZE:#x}) are on other nodes; move them"
            )
    return failed


def _misplaced(mem: MemMap, ptes: Ptes, wrong: Mask) -> Pfns:
    """The pages of *ptes* that are on nodes that are *wrong*. Linux: queue_pages_required()."""
    pfns = pte_pfn(ptes[pte_present(ptes) & ~pte_special(ptes)])
    pfns = pfns[~mem.is_zone_device_page(pfns)]
    return pfns[wrong[mem.page_to_nid(pfns)]]


def _isolate(mem: MemMap, pfns: Pfns) -> Pfns:
    """Those of *pfns*, which may repeat, that could be taken off their lists, in their order."""
    distinct_pfns = pfns[np.sort(np.unique(pfns, return_index=True)[1])]
    return distinct_pfns[migrate_page_add(mem, distinct_pfns)]
