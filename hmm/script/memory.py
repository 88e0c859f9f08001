"""Mapping memory, and what the CPU does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from hmm.script.actor import BASE, MAX_PAGES, MAX_REGIONS, STRIDE, Actor, File, Pages, Region
from hmm.script.answers import error_name, fnv, pages_of_words
from hmm.script.operations import Answer, Refused, Unsupported, operation
from mm.errors import BadFile, MmError
from mm.fs import File as MemFile
from mm.pgtable import PMD_SIZE
from mm.typing import PAGE_SHIFT, PAGE_SIZE

WORD: int = 8  # bytes


def faulting(actor: Actor, call: Callable[[], Answer], name: Callable[[MmError], str]) -> Answer:
    """What *call* answers, or the error's *name*; and the faults that it took."""
    process = actor.process
    minor, major = process.min_flt, process.maj_flt
    try:
        answer = call()
    except MmError as error:
        answer = {"ret": name(error)}
    return answer | {"minflt": process.min_flt - minor, "majflt": process.maj_flt - major}


# Mapping ----------------------------------------------------------------------------------------


@operation("mmap NAME pages KIND PROT [populate] [locked] [noreserve] [off=K]")
def mmap(
    actor: Actor,
    name: str,
    npages: int,
    kind: str,
    prot: str | None,
    *,
    off: int = 0,
    **given: bool,
) -> Answer:
    """Map a new region."""
    if prot is None or len(actor.regions) == MAX_REGIONS:
        raise Refused("EUSAGE")
    file = _file_of_kind(actor, kind, npages)
    shared = kind in ("shared", "file") or kind.startswith("same:")
    addr = BASE + len(actor.regions) * STRIDE + (off << PAGE_SHIFT)
    how = ["anon" if file is None else "file", "shared" if shared else "private", *given]
    actor.process.mmap(npages << PAGE_SHIFT, prot, "|".join(how), file, addr)
    actor.regions.append(Region(name, addr, npages, file))
    return {"ret": 0}


def _file_of_kind(actor: Actor, kind: str, npages: int) -> MemFile | None:
    """What memory of *kind* is a mapping of: a new memfd, that of another region, or nothing."""
    if kind in ("anon", "shared"):
        return None
    if kind in ("file", "fileprivate"):
        file = actor.host.machine.memfd_create("mmscript")
        actor.opened(File(file, MemFile.close))
        file.truncate(npages << PAGE_SHIFT)
        return file
    same, _, other = kind.partition(":")
    if same not in ("same", "samepriv"):
        raise Unsupported(f"mmap: memory of kind {kind}; there are anon, shared, file, fileprivate")
    try:
        return _memfd(actor.pages(other))
    except Refused:
        raise BadFile(f"mmap: there is no region {other}") from None


def _memfd(pages: Pages) -> MemFile:
    """The file behind a region. Raises BadFile where it has none."""
    if pages.region.file is None:
        raise BadFile(f"region {pages.region.name} has no file")
    return pages.region.file


@operation("munmap NAME first n")
def munmap(actor: Actor, name: str, first: int, n: int) -> Answer:
    """munmap(2)."""
    pages = actor.pages(name, first, n)
    actor.process.munmap(pages.addr, pages.nbytes)
    return {"ret": 0}


@operation("mprotect NAME first n PROT")
def mprotect(actor: Actor, name: str, first: int, n: int, prot: str | None) -> Answer:
    """mprotect(2)."""
    pages = actor.pages(name, first, n)
    actor.process.mprotect(pages.addr, pages.nbytes, prot or "-")
    return {"ret": 0}


@operation("madvise NAME first n ADVICE")
def madvise(actor: Actor, name: str, first: int, n: int, advice: str) -> Answer:
    """madvise(2); where the advice is to populate, with the faults that it took."""
    pages = actor.pages(name, first, n)

    def call() -> Answer:
        actor.process.madvise(pages.addr, pages.nbytes, advice)
        return {"ret": 0}

    if advice.startswith("populate"):
        return faulting(actor, call, error_name)
    return call()


@operation("mremap NAME first n NEW newn [dontunmap]")
def mremap(
    actor: Actor,
    name: str,
    first: int,
    n: int,
    new: str | None,
    newn: int | None,
    *,
    dontunmap: bool = False,
) -> Answer:
    """Move pages to a new region, at the same place inside 2 MiB."""
    pages = actor.pages(name, first, n)
    if new is None or len(actor.regions) == MAX_REGIONS:
        raise Refused("EUSAGE")
    npages = n if newn is None else newn
    to = BASE + len(actor.regions) * STRIDE + pages.addr % PMD_SIZE
    how = "maymove|fixed|dontunmap" if dontunmap else "maymove|fixed"
    actor.process.mremap(pages.addr, pages.nbytes, npages << PAGE_SHIFT, how, to)
    actor.regions.append(Region(new, to, npages, pages.region.file))
    return {"ret": 0}


@operation("mlock NAME first n")
def mlock(actor: Actor, name: str, first: int, n: int) -> Answer:
    """mlock(2), with the faults that it took."""
    pages = actor.pages(name, first, n)

    def call() -> Answer:
        actor.process.mlock(pages.addr, pages.nbytes)
        return {"ret": 0}

    return faulting(actor, call, error_name)


@operation("mlock_onfault NAME first n")
def mlock_onfault(actor: Actor, name: str, first: int, n: int) -> Answer:
    """mlock2(2) with MLOCK_ONFAULT."""
    pages = actor.pages(name, first, n)
    actor.process.mlock(pages.addr, pages.nbytes, onfault=True)
    return {"ret": 0}


@operation("munlock NAME first n")
def munlock(actor: Actor, name: str, first: int, n: int) -> Answer:
    """munlock(2)."""
    pages = actor.pages(name, first, n)
    actor.process.munlock(pages.addr, pages.nbytes)
    return {"ret": 0}


@operation("filewrite NAME page V")
def filewrite(actor: Actor, name: str, page: int, value: int) -> Answer:
    """pwrite(2) of a word to the file behind a region."""
    file = _memfd(actor.pages(name))
    return {"ret": file.write(page << PAGE_SHIFT, value.to_bytes(WORD, "little"))}


@operation("ftruncate NAME pages")
def ftruncate(actor: Actor, name: str, npages: int | None) -> Answer:
    """ftruncate(2) of the file behind a region."""
    file = _memfd(actor.pages(name))
    file.truncate((npages or 0) << PAGE_SHIFT)
    return {"ret": 0}


# Loads and stores -------------------------------------------------------------------------------


def word(data: bytes) -> str:
    """A 64-bit word from memory, in hexadecimal."""
    return f"{int.from_bytes(data, 'little'):x}"


@operation("write NAME page V")
def write(actor: Actor, name: str, page: int, value: int) -> Answer:
    """A store to the first word of a page."""
    addr = actor.pages(name, page).addr

    def call() -> Answer:
        actor.process.write(addr, value.to_bytes(WORD, "little"))
        return {"ret": 0}

    return faulting(actor, call, actor.signal)


@operation("read NAME page")
def read(actor: Actor, name: str, page: int) -> Answer:
    """A load from the first word of a page."""
    addr = actor.pages(name, page).addr
    return faulting(
        actor, lambda: {"ret": 0, "v": word(actor.process.read(addr, WORD))}, actor.signal
    )


@operation("fill NAME first n V")
def fill(actor: Actor, name: str, first: int, n: int, value: int) -> Answer:
    """Stores V + i to every word of page i, up to the first signal."""
    pages = actor.pages(name, first, min(n, MAX_PAGES))
    data = pages_of_words(value, len(pages.addrs))

    def store(i: int, addr: int) -> None:
        actor.process.write(addr, data[i])

    return _in_turn(actor, pages.addrs, store)


@operation("sum NAME first n")
def sum_(actor: Actor, name: str, first: int, n: int) -> Answer:
    """Loads every word of the pages, up to the first signal, and hashes them."""
    pages = actor.pages(name, first, min(n, MAX_PAGES))
    data = np.empty((len(pages.addrs), PAGE_SIZE), dtype=np.uint8)

    def load(i: int, addr: int) -> None:
        data[i] = np.frombuffer(actor.process.read(addr, PAGE_SIZE), dtype=np.uint8)

    answer = _in_turn(actor, pages.addrs, load)
    return answer if answer["ret"] else {"ret": 0, "h": fnv(data)} | answer


def _in_turn(actor: Actor, addrs: Iterable[int], access: Callable[[int, int], object]) -> Answer:
    """Let the CPU *access* page after page; `at` is the page that brought a signal."""
    done = 0

    def call() -> Answer:
        nonlocal done
        for addr in addrs:
            access(done, addr)
            done += 1
        return {"ret": 0}

    answer = faulting(actor, call, actor.signal)
    return answer if answer["ret"] == 0 else {"ret": answer["ret"], "at": done} | answer


@operation("readn NAME first n")
def readn(actor: Actor, name: str, first: int, n: int) -> Answer:
    """Loads the first word of each page; a signal stands in place of its word."""
    pages = actor.pages(name, first, min(n, MAX_PAGES))

    def call() -> Answer:
        words = []
        for addr in pages.addrs:
            try:
                words.append(word(actor.process.read(addr, WORD)))
            except MmError as error:
                words.append(actor.signal(error).partition("/")[0].removeprefix("SIG"))
        return {"ret": 0, "w": words}

    return faulting(actor, call, actor.signal)


@operation("memread NAME page")
def memread(actor: Actor, name: str, page: int) -> Answer:
    """A word through /proc/self/mem, which passes over what the mapping forbids."""
    addr = actor.pages(name, page).addr

    def call() -> Answer:
        data = actor.process.mem_read(addr, WORD)
        return {"ret": len(data), "v": word(data)}

    return faulting(actor, call, error_name)


@operation("memwrite NAME page V")
def memwrite(actor: Actor, name: str, page: int, value: int) -> Answer:
    """The same, to write."""
    addr = actor.pages(name, page).addr

    def call() -> Answer:
        return {"ret": actor.process.mem_write(addr, value.to_bytes(WORD, "little"))}

    return faulting(actor, call, error_name)
