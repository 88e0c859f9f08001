"""Policies for tasks and ranges of memory, and pages moved to where these want them.

    set_mempolicy   the policy of a task
    mbind           the policy of a range, and its pages to where that wants them
    migrate_pages   all pages of a process from some nodes to others

Linux: the system calls of mm/mempolicy.c.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np

from mm.cred import CAP_SYS_NICE, capable, check_capable, ptrace_may_access
from mm.errors import (
    InvalidArgument,
    InvalidRange,
    Misplaced,
    MmError,
    OutOfMemory,
    PermissionDenied,
    SegmentationFault,
)
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.mempolicy import (
    MPOL_MF_MOVE,
    MPOL_MF_MOVE_ALL,
    MPOL_MF_STRICT,
    Mempolicy,
    alloc_pages_mpol,
    check_nodes,
    cpuset_mems_allowed,
    get_task_policy,
    mpol_equal,
    mpol_new,
    mpol_rebind,
    show_nodes,
    vma_migratable,
)
from mm.migrate import (
    NewPages,
    alloc_migration_target,
    migrate_page_add,
    migrate_pages,
    putback_movable_pages,
)
from mm.mmap import find_vma, page_align, vmas_in
from mm.pagewalk import walk_page_range
from mm.pgtable import pte_pfn, pte_present, pte_special
from mm.sched import Task, current_task
from mm.swap import lru_add_drain_all
from mm.swapops import is_migration_entry
from mm.types import MemMap, MmStruct, Vma
from mm.typing import PAGE_SIZE, Mask, Pfns, Ptes
from mm.vectors import joined, some, unique
from mm.vma import vma_modify_policy

_MOVE = MPOL_MF_MOVE | MPOL_MF_MOVE_ALL


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
    is passed over. Raises InvalidArgument, InvalidRange, SegmentationFault where nothing is mapped,
    and PermissionDenied where MPOL_MF_MOVE_ALL is not for the task that runs.

    Unlike Linux v4.20, pages that cannot be taken off their lists are among those that stay (as
    in 6.7). Linux: do_mbind(), mm/mempolicy.c.
    """
    mem = mm.mem
    if flags & MPOL_MF_MOVE_ALL:
        check_capable(CAP_SYS_NICE, "mbind with moveall")
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
    vma = find_vma(mm, start)
    while vma is not None and vma.vm_start < end:
        if not mpol_equal(vma.vm_policy, policy):
            first, last = max(start, vma.vm_start), min(end, vma.vm_end)
            vma = vma_modify_policy(vma, first, last, policy)
        vma = find_vma(mm, vma.vm_end)


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
    once = unique(pfns)
    return once[migrate_page_add(mem, once)]


def mpol_rebind_mm(mm: MmStruct, old: Sequence[int], new: Sequence[int]) -> None:
    """Let the policies of the VMAs of *mm*, made over nodes *old*, be over nodes *new*.

    Linux: mpol_rebind_mm(), mm/mempolicy.c.
    """
    with mm.mmap_sem.write():
        for vma in mm.vmas:
            vma.vm_policy = mpol_rebind(vma.vm_policy, old, new)


def kernel_migrate_pages(
    mm: MmStruct, old: Sequence[int], new: Sequence[int], task: Task | None = None
) -> int:
    """Move the pages of *mm* that are on nodes *old* to nodes *new*, the first to the first.

    *task*: whose memory it is, where not the caller's own. Returns how many could not be moved:
    those that others map too are not tried without CAP_SYS_NICE. Raises InvalidArgument;
    PermissionDenied where *task* is out of the caller's reach, or may not use one of the nodes
    itself; OutOfMemory where frames run out, with what has moved by then moved.
    Linux: kernel_migrate_pages(), mm/mempolicy.c.
    """
    mem, task = mm.mem, task or current_task()
    sources, targets = check_nodes(old), check_nodes(new)
    if not ptrace_may_access(task):
        raise PermissionDenied(f"migrate_pages: {task.name} is not {current_task().name}'s to move")
    if not set(targets) <= set(cpuset_mems_allowed(mem, task)):
        check_capable(CAP_SYS_NICE, f"migrate_pages to nodes that {task.name} may not use")
    mems = cpuset_mems_allowed(mem, current_task())
    there = [nid for nid in targets if nid in mems]
    if not there:
        raise InvalidArgument(
            f"migrate_pages: of nodes {list(new)} the machine has none, or {current_task().name} "
            f"may use none; it may use {show_nodes(mems)}"
        )
    flags = MPOL_MF_MOVE_ALL if capable(CAP_SYS_NICE) else MPOL_MF_MOVE
    return do_migrate_pages(mm, sources, there, flags)


def do_migrate_pages(mm: MmStruct, old: list[int], new: list[int], flags: int) -> int:
    """Move the pages of *mm* from nodes *old* to nodes *new*; how many could not be moved.

    Raises OutOfMemory. Linux: do_migrate_pages(), mm/mempolicy.c.
    """
    lru_add_drain_all(mm.mem)
    return sum(migrate_to_node(mm, *pair, flags) for pair in _node_pairs(old, new))


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


def migrate_to_node(mm: MmStruct, source: int, dest: int, flags: int) -> int:
    """Move the pages of *mm* from node *source* to *dest*, those of others too if *flags* say so.

    Returns how many could not be moved. Raises OutOfMemory.
    Linux: migrate_to_node(), mm/mempolicy.c.
    """
    mem = mm.mem
    wrong = np.arange(len(mem.nodes)) == source
    with mm.mmap_sem.read():
        if not mm.vmas:
            return 0
        pfns, failed = queue_pages_range(mm, 0, mm.vmas[-1].vm_end, wrong, flags, holes=True)
    status = migrate_pages(mem, pfns, alloc_migration_target(mem, dest))
    if some(status == -errno.ENOMEM):
        raise OutOfMemory(
            f"migrate_pages: node {dest} has no room for {np.count_nonzero(status)} of "
            f"{pfns.size} pages of node {source}"
        )
    return failed + int(np.count_nonzero(status))
