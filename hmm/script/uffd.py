"""userfaultfd: ranges whose faults end with SIGBUS, as nobody is there to serve them."""

from __future__ import annotations

from hmm.script.actor import Actor, File
from hmm.script.answers import errno_name, pages_of_words
from hmm.script.operations import Answer, Refused, operation
from mm.errors import InvalidRange, MmError, PartlyCopied
from mm.typing import PAGE_SHIFT
from mm.userfaultfd import UserfaultFd


@operation("uffd_reg NAME first n UFFD")
def uffd_reg(actor: Actor, name: str, first: int, n: int, mode: str) -> Answer:
    """UFFDIO_REGISTER; the process opens its file at first use."""
    pages = actor.pages(name, first, n)
    if actor.uffd is None:
        fd = actor.process.userfaultfd("sigbus")
        actor.uffd = actor.opened(File(fd, UserfaultFd.close))
    actor.uffd.held.register(pages.addr, pages.nbytes, "wp" if mode[:1] == "w" else "missing")
    return {"ret": 0}


@operation("uffd_unreg NAME first n")
def uffd_unreg(actor: Actor, name: str, first: int, n: int) -> Answer:
    """UFFDIO_UNREGISTER."""
    pages = actor.pages(name, first, n)
    _opened(actor).unregister(pages.addr, pages.nbytes)
    return {"ret": 0}


@operation("uffd_copy NAME first n V")
def uffd_copy(actor: Actor, name: str, first: int, n: int, value: int) -> Answer:
    """UFFDIO_COPY of V + i in every word of page i; how many pages, or why none."""
    pages = actor.pages(name, first, n)
    if actor.uffd is None:
        return {"ret": "EBADF", "copied": 0}
    try:
        copied = actor.uffd.held.copy(pages.addr, pages_of_words(value, max(n, 0)).reshape(-1))
    except PartlyCopied as error:
        return {"ret": errno_name(error.code), "copied": error.copied >> PAGE_SHIFT}
    except InvalidRange as error:
        return {"ret": errno_name(error.code), "copied": 0}
    except MmError as error:
        return {"ret": errno_name(error.code), "copied": -error.code}
    return {"ret": 0, "copied": copied >> PAGE_SHIFT}


@operation("uffd_wp NAME first n [off]")
def uffd_wp(actor: Actor, name: str, first: int, n: int, *, off: bool = False) -> Answer:
    """UFFDIO_WRITEPROTECT."""
    pages = actor.pages(name, first, n)
    _opened(actor).writeprotect(pages.addr, pages.nbytes, not off)
    return {"ret": 0}


def _opened(actor: Actor) -> UserfaultFd:
    if actor.uffd is None:
        raise Refused("EBADF")
    return actor.uffd.held
