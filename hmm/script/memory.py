"""Mapping memory, and what the CPU does with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from hmm.script.actor import (
    BASE,
    MAX_REGIONS,
    STRIDE,
    Actor,
    Answer,
    Refused,
    Region,
    operation,
    options,
)
from hmm.script.answers import fnv
from mm.errors import InvalidArgument, MmError
from mm.typing import PAGE_SHIFT, PAGE_SIZE

MAX_PAGES: Final = 4096  # that one operation touches
_WORDS: Final = PAGE_SIZE // 8
_MASK: Final = (1 << 64) - 1


def touched(actor: Actor, access: Callable[[], object]) -> tuple[int | str, Answer]:
    """Let the CPU *access* memory: 0 or the signal that the process gets, and the faults taken."""
    process = actor.process
    minor, major = process.min_flt, process.maj_flt
    ret: int | str = 0
    try:
        access()
    except MmError as error:
        ret = actor.signal(error)
    return ret, {"minflt": process.min_flt - minor, "majflt": process.maj_flt - major}


def _load_into(words: list[str], actor: Actor, addr: int) -> None:
    words.append(load(actor, addr))


def load(actor: Actor, addr: int) -> str:
    """The 64-bit word at *addr* by a CPU load, in hexadecimal."""
    return f"{int.from_bytes(actor.process.read(addr, 8), 'little'):x}"


@operation("mmap NAME pages KIND PROT [populate] [locked] [noreserve] [off=K]")
def mmap(
    actor: Actor,
    name: str,
    npages: int,
    kind: str | None,
    prot: str,
    *,
    off: int = 0,
    **given: bool,
) -> Answer:
    if kind is None or len(actor.regions) == MAX_REGIONS:
        raise Refused("EUSAGE")
    if kind != "anon":
        raise InvalidArgument(f"mmap: {kind} memory cannot be mapped so far, only anon")
    addr = BASE + len(actor.regions) * STRIDE + (off << PAGE_SHIFT)
    flags = options({"anon": True, "private": True} | given, "anon", "private", *given)
    actor.process.mmap(npages << PAGE_SHIFT, prot, flags, addr=addr)
    actor.regions.append(Region(name, addr, npages))
    return {"ret": 0}


@operation("munmap NAME first n")
def munmap(actor: Actor, name: str, first: int, n: int) -> Answer:
    pages = actor.pages(name, first, n)
    actor.process.munmap(pages.addr, pages.nbytes)
    return {"ret": 0}


@operation("write NAME page V")
def write(actor: Actor, name: str, page: int, value: int) -> Answer:
    addr = actor.pages(name, page).addr
    ret, faults = touched(actor, lambda: actor.process.write(addr, np.uint64(value).tobytes()))
    return {"ret": ret} | faults


@operation("read NAME page")
def read(actor: Actor, name: str, page: int) -> Answer:
    addr = actor.pages(name, page).addr
    words: list[str] = []
    ret, faults = touched(actor, partial(_load_into, words, actor, addr))
    return {"ret": ret} | dict(zip("v", words, strict=False)) | faults


@operation("fill NAME first n V")
def fill(actor: Actor, name: str, first: int, n: int, value: int) -> Answer:
    pages = actor.pages(name, first, min(n, MAX_PAGES))
    done = 0

    def store() -> None:
        nonlocal done
        for word, addr in enumerate(pages.addrs, value):
            actor.process.write(addr, np.full(_WORDS, word & _MASK, dtype=np.uint64))
            done += 1

    ret, faults = touched(actor, store)
    return {"ret": ret} | ({} if ret == 0 else {"at": done}) | faults


@operation("sum NAME first n")
def sum_(actor: Actor, name: str, first: int, n: int) -> Answer:
    pages = actor.pages(name, first, min(n, MAX_PAGES))
    data = bytearray()

    def loads() -> None:
        for addr in pages.addrs:
            data.extend(actor.process.read(addr, PAGE_SIZE))

    ret, faults = touched(actor, loads)
    if ret != 0:
        return {"ret": ret, "at": len(data) // PAGE_SIZE} | faults
    return {"ret": 0, "h": fnv(np.frombuffer(data, dtype=np.uint64))} | faults


@operation("readn NAME first n")
def readn(actor: Actor, name: str, first: int, n: int) -> Answer:
    pages = actor.pages(name, first, min(n, MAX_PAGES))
    words: list[str] = []
    total = {"minflt": 0, "majflt": 0}
    for addr in pages.addrs:
        ret, faults = touched(actor, partial(_load_into, words, actor, addr))
        if ret != 0:
            words.append(str(ret).partition("/")[0].removeprefix("SIG"))
        total = {name: count + faults[name] for name, count in total.items()}
    return {"ret": 0, "w": words} | total
