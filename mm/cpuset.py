"""Which nodes a process may use at all. Linux: kernel/cgroup/cpuset.c.

A cpuset is a set of nodes that any number of processes share. Their pages come from these nodes,
whatever their policies say: a policy that names others is a policy over those that are allowed.
When the nodes of a cpuset change, or a process goes from one to another, its policies change as
well: the first of the old nodes becomes the first of the new ones, and so on. Pages stay where
they are, unless the cpuset says `memory_migrate`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mm.errors import InvalidArgument
from mm.mbind import do_migrate_pages, mpol_rebind_mm
from mm.mempolicy import MPOL_MF_MOVE_ALL, check_nodes, cpuset_mems_allowed, mpol_rebind
from mm.sched import IDLE, Task, running
from mm.types import MemMap, MmStruct


class Cpuset:
    """Nodes that the processes in it may use. Linux: struct cpuset.

    memory_migrate: their pages follow when that changes.
    """

    def __init__(self, mems: Sequence[int], *, memory_migrate: bool = False) -> None:
        self.memory_migrate = memory_migrate
        self.tasks: dict[Task, MmStruct] = {}  # that are in it, with their address spaces
        self._mems = _node_list(mems)

    def __repr__(self) -> str:
        return f"<Cpuset of nodes {', '.join(map(str, self._mems))}>"

    @property
    def mems(self) -> tuple[int, ...]:
        """The nodes, ascending; set it to change them, and what follows from them.

        Raises InvalidArgument for none, and for a node that a process's machine does not have.
        Linux: update_nodemask(), kernel/cgroup/cpuset.c.
        """
        return self._mems

    @mems.setter
    def mems(self, mems: Sequence[int]) -> None:
        new = _node_list(mems)
        living = {task: mm for task, mm in self.tasks.items() if not mm.exited}
        for mm in living.values():
            _check_there(mm.mem, new)
        self.tasks, self._mems = living, new
        for task, mm in living.items():
            _change_nodemask(task, mm, new, migrate=self.memory_migrate)


def cpuset_attach(cpuset: Cpuset | None, task: Task, mm: MmStruct, old: Cpuset | None) -> None:
    """Let *task*, with *mm*, go from cpuset *old* to *cpuset*; None is the one of all nodes.

    Raises InvalidArgument where the machine lacks a node of it. Linux: cpuset_attach().
    """
    if cpuset is not None:
        _check_there(mm.mem, cpuset.mems)
        cpuset.tasks[task] = mm
    if old is not None and old is not cpuset:
        old.tasks.pop(task, None)
    mm.mem.cpusets_enabled = True
    migrate = cpuset is not None and cpuset.memory_migrate
    _change_nodemask(task, mm, None if cpuset is None else cpuset.mems, migrate=migrate)


def _change_nodemask(
    task: Task, mm: MmStruct, mems: tuple[int, ...] | None, *, migrate: bool
) -> None:
    """Linux: update_tasks_nodemask() and cpuset_change_task_nodemask()."""
    old = cpuset_mems_allowed(mm.mem, task)
    task.mems_allowed = mems
    new = cpuset_mems_allowed(mm.mem, task)
    if old == new:
        return
    task.mempolicy = mpol_rebind(task.mempolicy, old, new)
    mpol_rebind_mm(mm, old, new)
    if migrate:
        cpuset_migrate_mm(mm, old, new)


def cpuset_migrate_mm(mm: MmStruct, old: Sequence[int], new: Sequence[int]) -> int:
    """Move the pages of *mm* from nodes *old* to nodes *new*; how many could not be moved.

    The kernel itself does so, which may use any node. Raises OutOfMemory, with what has moved by
    then moved. Linux: cpuset_migrate_mm(), kernel/cgroup/cpuset.c.
    """
    with running(IDLE):
        return do_migrate_pages(mm, list(old), list(new), MPOL_MF_MOVE_ALL)


def _node_list(mems: Sequence[int]) -> tuple[int, ...]:
    nodes = tuple(check_nodes(mems))
    if not nodes:
        raise InvalidArgument("a cpuset without nodes would leave its processes without memory")
    return nodes


def _check_there(mem: MemMap, mems: Sequence[int]) -> None:
    if mems[-1] >= len(mem.nodes):
        raise InvalidArgument(
            f"a cpuset of nodes {list(mems)}: the machine has 0..{len(mem.nodes) - 1}"
        )
