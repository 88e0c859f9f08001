"""References to pages that keep them where they are."""

from __future__ import annotations

from typing import Final

from hmm.script.actor import Actor, File, Pages
from hmm.script.answers import error_name
from hmm.script.memory import faulting
from hmm.script.operations import Answer, Refused, operation
from mm.errors import InvalidArgument, MmError, OutOfMemory
from mm.gup import Pin
from mm.typing import PAGE_SIZE

MAX_PINS: Final = 32
PIPE_PAGES: Final = 256  # that fit the pipe


@operation("pin ID NAME first n METHOD")
def pin(actor: Actor, name: str, region: str, first: int, n: int, method: str | None) -> Answer:
    """Hold pages: gup, gupw, gupf, gupwf by the kernel's test of long pins (w: for writing),
    iou as a buffer of io_uring, vms as a pipe that vmsplice(2) fills."""
    pages = actor.pages(region, first, n)
    if method is None:
        raise Refused("EUSAGE")

    def call() -> Answer:
        held = _hold(actor, pages, method)
        actor.pins.append((name, method, actor.opened(File(held, release))))
        return {"ret": len(held) if method == "vms" else n}

    if len(actor.pins) == MAX_PINS:
        raise Refused("ENOSPC")
    return faulting(actor, call, error_name)


def _hold(actor: Actor, pages: Pages, method: str) -> list[Pin]:
    """References to *pages*; a pipe takes those before the first that cannot be had."""
    process = actor.process
    if pages.npages > actor.host.machine.mem.max_pfn:
        raise OutOfMemory(f"pin: {pages.npages} pages are more than the machine has")
    if method == "vms":
        held: list[Pin] = []
        for addr in pages.addrs[:PIPE_PAGES]:
            try:
                held.append(process.pin(addr, PAGE_SIZE, write=False, plain=True))
            except MmError:
                if not held:
                    raise
                break
        return held
    if method == "iou":
        return [process.pin(pages.addr, pages.nbytes, write=True, longterm=True)]
    if not method.startswith("gup"):
        raise InvalidArgument(f"pin: {method!r} is not gup, gupw, gupf, gupwf, iou or vms")
    host = actor.host
    if host.longterm_test or pages.npages <= 0:
        raise InvalidArgument("pin: there is one test of long pins, and it needs pages")
    host.longterm_test = [
        process.pin(pages.addr, pages.nbytes, write="w" in method[3:], longterm=True)
    ]
    return host.longterm_test


def release(held: list[Pin]) -> None:
    """Let go of all of *held*, and forget them."""
    for one in held:
        one.release()
    held.clear()


@operation("unpin ID")
def unpin(actor: Actor, name: str) -> Answer:
    """Let go of them; a pipe's pages stay while a child has the pipe open too."""
    for place, (known, method, file) in enumerate(actor.pins):
        if known == name:
            del actor.pins[place]
            if method != "vms":
                file.close()  # at once, whoever has it open too
            actor.put(file)
            return {"ret": 0}
    raise Refused("ENOENT")
