"""NUMA nodes: where pages are, and where they should be."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np

from hmm.script.actor import MAX_PAGES, Actor, pointer
from hmm.script.answers import runs, status_name
from hmm.script.operations import Answer, flags, operation
from mm.errors import MmError
from mm.mempolicy import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL
from mm.numa import kernel_move_pages
from mm.typing import PAGE_SIZE

UNSET: Final = 12345  # of a status that the system call left alone
MAX_BENCH: Final = 65536
_BAD_FLAG: Final = 1 << 10


def nodes(mask: int) -> list[int]:
    """The nodes of a bit mask, of which system calls are given eight bits."""
    return [node for node in range(8) if mask >> node & 1]


def move(
    actor: Actor, addrs: list[int], to: list[int] | None, how: int, child: Actor | None = None
) -> Answer:
    """move_pages(2) of the pages at *addrs*, its own or those of a *child*."""
    status = np.full(len(addrs), UNSET, dtype=np.int32)
    wanted = None if to is None else np.array(to, dtype=np.int64)
    where = np.array([pointer(addr) for addr in addrs], dtype=np.int64)
    try:
        ret, status = kernel_move_pages((child or actor).process.mm, where, wanted, how, status)
    except MmError as error:
        ret = -error.code
    shown = ("unset" if word == UNSET else status_name(word) for word in status.tolist())
    return {"ret": status_name(ret), "status": runs(shown)}


@operation("move_pages NAME first n NODE [all] [noflag] [badflag] [pid=C]")
def move_pages(
    actor: Actor,
    name: str,
    first: int,
    n: int,
    node: int | str,
    *,
    pid: str = "",
    **given: bool,
) -> Answer:
    """move_pages(2): all pages to one node, or to nodes 0 and 1 by turns; pid: of a child."""
    pages = actor.pages(name, first, min(n, MAX_PAGES))
    to = [i & 1 if node == "alt" else int(node) for i in range(len(pages.addrs))]
    how = MPOL_MF_MOVE
    for option, value in (("all", MPOL_MF_MOVE_ALL), ("noflag", 0), ("badflag", _BAD_FLAG)):
        how = value if option in given else how
    return move(actor, list(pages.addrs), to, how, actor.child(pid))


@operation("status NAME first n")
def status(actor: Actor, name: str, first: int, n: int) -> Answer:
    """move_pages(2) without nodes: where each page is."""
    pages = actor.pages(name, first, min(n, MAX_PAGES))
    return move(actor, list(pages.addrs), None, 0)


@operation("movelist NAME {PAGE:NODE} [all]")
def movelist(actor: Actor, name: str, list_: list[Any], **given: bool) -> Answer:
    """move_pages(2) with a list in any order, in which `null` is no address."""
    region = actor.pages(name).region
    pairs = [pair or (None, 0) for (pair,) in list_]
    addrs = [0 if page is None else region.addr + page * PAGE_SIZE for page, _ in pairs]
    how = MPOL_MF_MOVE_ALL if given else MPOL_MF_MOVE
    return move(actor, addrs, [node for _, node in pairs], how)


@operation("mbind NAME first n MODE MASK [move] [moveall] [strict]")
def mbind(
    actor: Actor, name: str, first: int, n: int, mode: str, mask: int, **given: bool
) -> Answer:
    """mbind(2)."""
    pages = actor.pages(name, first, n)
    how = flags(given, "move", "moveall", "strict")
    actor.process.mbind(pages.addr, pages.nbytes, mode, nodes(mask), how)
    return {"ret": 0}


@operation("set_mempolicy MODE MASK")
def set_mempolicy(actor: Actor, mode: str, mask: int) -> Answer:
    """set_mempolicy(2)."""
    actor.process.set_mempolicy(mode, nodes(mask))
    return {"ret": 0}


@operation("migrate_pages MASK MASK", counted=False)
def migrate_pages(actor: Actor, old: int, new: int) -> Answer:
    """migrate_pages(2)."""
    return {"ret": actor.process.migrate_pages(nodes(old), nodes(new))}


@operation("bench_move NAME first n reps", counted=False)
def bench_move(actor: Actor, name: str, first: int, n: int, reps: int) -> Answer:
    """Time move_pages(2) of the range between nodes 0 and 1."""
    pages = actor.pages(name, first, min(n, MAX_BENCH))
    actor.process.touch(pages.addr, pages.nbytes)
    spent, bad = 0.0, 0
    for rep in range(reps):
        start = time.perf_counter()
        answer = move(actor, list(pages.addrs), [1 - rep % 2] * n, MPOL_MF_MOVE)
        spent += time.perf_counter() - start
        bad += answer["ret"] != 0
    rate = round(n * reps / spent) if spent else 0
    return {"ret": 0, "bad": bad, "s": round(spent, 6), "pps": rate}
