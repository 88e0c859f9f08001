"""Which node a page comes from. Linux: mm/mempolicy.c.

The policy of a VMA (mbind) goes before that of the task that runs (set_mempolicy), and that
before the default:

    default      None: as the next in that order says; at last, local
    local        the node of the CPU that asks, then the nearest others
    preferred    one node, then those nearest to it
    bind         the policy's nodes and no others, nearest to the CPU first
    interleave   node after node: by a page's offset in its object, or, of pages that belong to
                 no address, by turns of the task

A policy is a value that nobody changes, so that VMAs and tasks share it and equal ones are as
good as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np

from mm.errors import InvalidArgument
from mm.gfp import Gfp
from mm.memcontrol import cancel_charge, commit_charge, mem_cgroup_precharge
from mm.page_alloc import Nodes, alloc_pages_bulk
from mm.sched import Task, current_task
from mm.types import VM_IO, VM_PFNMAP, MemMap, Vma, linear_page_index
from mm.typing import NO_PAGES, Addresses, Indices, Pfns
from mm.vectors import distinct, joined, places, stretches

MAX_NUMNODES: Final = 1 << 10  # numbers that a node may have, whether it is there or not

MPOL_MF_STRICT: Final = 1  # a page that is and stays on another node is an error
MPOL_MF_MOVE: Final = 2  # move pages that only this process maps
MPOL_MF_MOVE_ALL: Final = 4  # move pages that others map too


class Mpol(IntEnum):
    """How a policy chooses. Linux: MPOL_*, include/uapi/linux/mempolicy.h."""

    DEFAULT = 0
    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    LOCAL = 4


class Mempolicy(NamedTuple):
    """A mode and the nodes that it is about, ascending. Linux: struct mempolicy."""

    mode: Mpol
    nodes: tuple[int, ...] = ()


def mpol_new(mem: MemMap, mode: str, nodes: Sequence[int] = ()) -> Mempolicy | None:
    """The policy *mode* ("default", "preferred", "bind", "interleave" or "local") over *nodes*.

    None for the default. Nodes that the machine does not have, or the task that runs may not use
    (mm/cpuset.py), are left out; of those preferred
    the first one counts, and to prefer none is local. Raises InvalidArgument.
    Linux: mpol_new() and mpol_set_nodemask(), mm/mempolicy.c.
    """
    known = {kind.name.lower(): kind for kind in Mpol}
    if mode not in known:
        raise InvalidArgument(f"no policy is named {mode!r}; there are {', '.join(known)}")
    kind, named = known[mode], check_nodes(nodes)
    if kind is Mpol.PREFERRED and not named:
        kind = Mpol.LOCAL
    if kind in (Mpol.DEFAULT, Mpol.LOCAL):
        if named:
            raise InvalidArgument(f"the policy {mode} takes no nodes, got {named}")
        return Mempolicy(kind) if kind else None
    mems = cpuset_mems_allowed(mem, current_task())
    present = tuple(nid for nid in named if nid in mems)
    if not present:
        raise InvalidArgument(f"the policy {mode} needs a node of {show_nodes(mems)}, got {named}")
    return Mempolicy(kind, present[:1] if kind is Mpol.PREFERRED else present)


def check_nodes(nodes: Any) -> list[int]:
    """*nodes*, each once and ascending. Raises InvalidArgument for what no node can be numbered.

    Linux: get_nodes(), mm/mempolicy.c.
    """
    known = range(MAX_NUMNODES)
    if not isinstance(nodes, Iterable) or any(nid not in known for nid in nodes):
        raise InvalidArgument(f"nodes are a list of numbers in 0..{known.stop - 1}, got {nodes!r}")
    return sorted({int(nid) for nid in nodes})


def cpuset_mems_allowed(mem: MemMap, task: Task) -> tuple[int, ...]:
    """The nodes that *task* may use. Linux: cpuset_mems_allowed(), kernel/cgroup/cpuset.c."""
    mems = task.mems_allowed
    return tuple(range(len(mem.nodes))) if mems is None else mems


def show_nodes(nodes: Sequence[int]) -> str:
    """*nodes*, ascending, as people write them: 0..3, or 0, 2."""
    if len(nodes) == nodes[-1] - nodes[0] + 1:
        return f"{nodes[0]}..{nodes[-1]}"
    return ", ".join(map(str, nodes))


def mpol_rebind(
    policy: Mempolicy | None, old: Sequence[int], new: Sequence[int]
) -> Mempolicy | None:
    """*policy* of a task that could use nodes *old* and can use nodes *new* now.

    The n-th of the old nodes becomes the n-th of the new ones, which begin anew where they are
    fewer. Unlike Linux v4.20, which takes the result for what it counts from the next time (5.2
    does not). Linux: mpol_rebind_policy(), mm/mempolicy.c; bitmap_remap(), lib/bitmap.c.
    """
    if policy is None or not policy.nodes:
        return policy
    moved = {nid: new[n % len(new)] for n, nid in enumerate(old)}
    return Mempolicy(policy.mode, tuple(sorted({moved.get(nid, nid) for nid in policy.nodes})))


def mpol_equal(a: Mempolicy | None, b: Mempolicy | None) -> bool:
    """True where *a* and *b* choose alike, so that VMAs may merge. Linux: mpol_equal()."""
    return a == b


def mpol_to_str(policy: Mempolicy | None) -> str:
    """*policy* as /proc shows it: "default", "prefer:0", "bind:0-2,5".

    Linux: mpol_to_str(), mm/mempolicy.c.
    """
    if policy is None:
        return "default"
    name = "prefer" if policy.mode is Mpol.PREFERRED else policy.mode.name.lower()
    if not policy.nodes:
        return name
    nodes = np.array(policy.nodes)
    runs = [nodes[run].tolist() for run in stretches(nodes)]
    return f"{name}:{','.join(f'{r[0]}-{r[-1]}' if len(r) > 1 else str(r[0]) for r in runs)}"


def vma_migratable(vma: Vma) -> bool:
    """False where *vma* maps what no page stands for. Linux: vma_migratable(), mempolicy.h."""
    return not vma.vm_flags & (VM_IO | VM_PFNMAP)


def get_vma_policy(vma: Vma) -> Mempolicy | None:
    """What decides about new pages of *vma*; None is local. Linux: get_vma_policy()."""
    return vma.vm_policy if vma.vm_policy is not None else get_task_policy(current_task())


def get_task_policy(task: Task) -> Mempolicy | None:
    """What decides about pages that *task* asks for; None is local. Linux: get_task_policy()."""
    return task.mempolicy


def alloc_pages_vma(vma: Vma, addrs: Addresses, gfp: int) -> Pfns:
    """A page for each of *addrs* of *vma*, in their order; where memory is short, for the first.

    Linux: alloc_pages_vma(), mm/mempolicy.c.
    """
    policy = get_vma_policy(vma)
    if policy is None:
        return _alloc_pages_local(vma.vm_mm.mem, gfp, addrs.size)
    return alloc_pages_mpol(vma.vm_mm.mem, gfp, policy, linear_page_index(vma, addrs))


def alloc_charged_pages(vma: Vma, addrs: Addresses, gfp: int) -> Pfns:
    """As alloc_pages_vma(), with the group of the process paying, and no more pages than it can.

    Linux: folio_prealloc(), mm/memory.c, v6.8.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    if mm.memcg is None:
        return alloc_pages_vma(vma, addrs, gfp)
    memcg, room = mem_cgroup_precharge(mm, addrs.size, gfp)
    pfns = NO_PAGES
    try:
        if room:
            pfns = alloc_pages_vma(vma, addrs[:room], gfp)
    finally:
        commit_charge(mem, pfns, memcg)
        cancel_charge(memcg, room - pfns.size)
    return pfns


def alloc_pages_current(mem: MemMap, gfp: int, count: int) -> Pfns:
    """At most *count* pages for the task that runs, not for an address.

    Linux: alloc_pages_current(), mm/mempolicy.c.
    """
    task = current_task()
    policy = get_task_policy(task)
    if policy is None:
        return _alloc_pages_local(mem, gfp, count)
    turns = np.arange(task.il_next, task.il_next + count)
    if policy.mode is Mpol.INTERLEAVE:
        task.il_next += count
    return alloc_pages_mpol(mem, gfp, policy, turns)


def alloc_pages_mpol(mem: MemMap, gfp: int, policy: Mempolicy | None, index: Indices) -> Pfns:
    """A page for each of *index*, the numbers by which they interleave; fewer if memory is short.

    Linux: alloc_pages_mpol(), mm/mempolicy.c, v6.7.
    """
    if policy is None or policy.mode is Mpol.LOCAL:
        return _alloc_pages_local(mem, gfp, index.size)
    if policy.mode is Mpol.INTERLEAVE:
        return _alloc_pages_interleaved(mem, gfp, policy, index)
    if policy.mode is Mpol.PREFERRED:
        return _alloc_pages_near(mem, gfp, policy.nodes[0], index.size)
    return _alloc_pages_local(mem, gfp, index.size, policy.nodes)


def _alloc_pages_local(mem: MemMap, gfp: int, count: int, nodes: Nodes = None) -> Pfns:
    return _alloc_pages_near(mem, gfp, mem.cpu_to_node[current_task().cpu], count, nodes)


def _alloc_pages_near(mem: MemMap, gfp: int, nid: int, count: int, nodes: Nodes = None) -> Pfns:
    """At most *count* pages of *nid* and then of what is nearest, in this order."""
    pfns = alloc_pages_bulk(mem, gfp, nid, count, current_task().cpu, nodes)
    if count > 1 and pfns.size and mem.zone.item(pfns.item(0)) != mem.zone.item(pfns.item(-1)):
        nids = mem.page_to_nid(pfns)
        order = dict.fromkeys(zone.nid for zone in mem.nodes[nid].zonelist)
        return joined([pfns[nids == near] for near in order])
    return pfns


def _alloc_pages_interleaved(mem: MemMap, gfp: int, policy: Mempolicy, index: Indices) -> Pfns:
    """From each node what it has, and only then from the neighbours of those that have no more.

    Linux: interleave_nid() and alloc_page_interleave(), mm/mempolicy.c.
    """
    turns = np.array(policy.nodes)[index % len(policy.nodes)]
    pfns = np.zeros(index.size, dtype=np.int64)  # PFN 0 is no frame
    for how in ((gfp | Gfp.THISNODE) & ~Gfp.DIRECT_RECLAIM, gfp):
        for nid in distinct(turns[pfns == 0]):
            at = places((pfns == 0) & (turns == nid))
            taken = _alloc_pages_near(mem, how, nid, at.size)
            pfns[at[: taken.size]] = taken
    count = int(np.count_nonzero(pfns))
    first, spare = pfns[:count], pfns[count:]
    first[first == 0] = spare[spare != 0]  # memory is short: what there is, for the first pages
    hits = mem.page_to_nid(first) == turns[:count]
    mem.vmstat.add("numa_interleave", int(np.count_nonzero(hits)))
    return first
