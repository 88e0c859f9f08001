"""Child processes: what each operation does in one of them."""

from __future__ import annotations

from hmm.script.actor import Actor
from hmm.script.language import Operation
from hmm.script.operations import Answer, Refused, operation
from hmm.script.state import View
from mm.task_mmu import pagemap

MAX_CHILDREN = 16  # of one process, at a time


@operation("fork C")
def fork(actor: Actor, name: str) -> Answer:
    """fork(2): the child goes by that name, and has open what its parent has."""
    if len(actor.children) == MAX_CHILDREN and None not in actor.children:
        raise Refused("ENOSPC")
    actor.adopt(name)
    return {"ret": 0}


@operation("wait C")
def wait(actor: Actor, name: str) -> Answer:
    """Let a child exit, and wait for it."""
    _child(actor, name).exit()
    return {"ret": 0}


@operation("child C", counted=False)
def child(actor: Actor, name: str, op: Operation | None) -> Answer:
    """Let a child do the rest of the line, and answer for it."""
    if op is None:
        raise Refused("ECHILD")
    return _child(actor, name).perform(op)


@operation("cmp C NAME first n", counted=False)
def cmp(actor: Actor, name: str, region: str, first: int, n: int) -> Answer:
    """Do parent and child have the same page there? "=" yes, "!" no, "." one has none."""
    pages = actor.pages(region, first, n)
    mms = actor.process.mm, _child(actor, name).process.mm
    views = [View(mm.mem, pagemap(mm, pages.addr, pages.npages)) for mm in mms]
    return {"ret": 0, "eq": views[0].compared(views[1])}


def _child(actor: Actor, name: str) -> Actor:
    """The child of that name that was born first. Raises Refused."""
    found = actor.child(name)
    if found is None:
        raise Refused("ECHILD")
    return found
