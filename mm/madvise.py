"""madvise(): what a process knows about its memory and the core does not. Linux: mm/madvise.c.

flags        the advice is a bit of the VMA, for those to read who act on it
contents     the bytes may go: at once, or when memory is short
presence     pages are faulted in
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from mm.errors import InvalidArgument, NotMapped
from mm.gup import faultin_page_range
from mm.memory import zap_page_range
from mm.mmap import find_vma, page_align
from mm.mmu_notifier import MmuNotifyEvent
from mm.types import (
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_HUGEPAGE,
    VM_IO,
    VM_LOCKED,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_SPECIAL,
    VM_WIPEONFORK,
    MmStruct,
    Vma,
    vma_is_anonymous,
)
from mm.typing import PAGE_SIZE
from mm.vma import vma_modify_flags

# Acts on a range of a VMA; the VMA that the range is in then.
Visit: TypeAlias = Callable[[Vma, int, int], Vma]


class Flags(NamedTuple):
    """Advice that is a bit of the VMA: what it clears, what it sets, which VMAs refuse it."""

    clear: int
    set: int
    refused: int = 0


_FLAGS: Final = {
    "normal": Flags(VM_RAND_READ | VM_SEQ_READ, 0),
    "sequential": Flags(VM_RAND_READ, VM_SEQ_READ),
    "random": Flags(VM_SEQ_READ, VM_RAND_READ),
    "dontfork": Flags(0, VM_DONTCOPY),
    "dofork": Flags(VM_DONTCOPY, 0, refused=VM_IO),
    "wipeonfork": Flags(0, VM_WIPEONFORK, refused=VM_SHARED),
    "keeponfork": Flags(VM_WIPEONFORK, 0),
    "dontdump": Flags(0, VM_DONTDUMP),
    "dodump": Flags(VM_DONTDUMP, 0, refused=VM_SPECIAL),
    "hugepage": Flags(VM_NOHUGEPAGE, VM_HUGEPAGE),
    "nohugepage": Flags(VM_HUGEPAGE, VM_NOHUGEPAGE),
    "mergeable": Flags(0, VM_MERGEABLE),
    "unmergeable": Flags(VM_MERGEABLE, 0),
}


def do_madvise(mm: MmStruct, start: int, length: int, advice: str) -> None:
    """Take *advice*, a word of madvise(2) without MADV_, on [*start*, *start* + *length*).

    Takes mmap_sem. Raises InvalidArgument for advice that there is not, or that a VMA refuses;
    NotMapped where the range has holes, with the advice taken on the rest (but the populating
    ones, which stop there). Linux: do_madvise(), mm/madvise.c.
    """
    if start % PAGE_SIZE:
        raise InvalidArgument(f"madvise: addr {start:#x} is not a multiple of {PAGE_SIZE:#x}")
    end = start + page_align(length)
    if advice in _FLAGS:
        with mm.mmap_sem.write():
            _walk_vmas(mm, start, end, _madvise_flags(advice))
    elif advice in _READERS:
        with mm.mmap_sem.read():
            _walk_vmas(mm, start, end, _READERS[advice])
    elif advice in ("populate_read", "populate_write"):
        faultin_page_range(mm, start, end, write=advice == "populate_write")
    else:
        raise InvalidArgument(f"madvise: no advice is named {advice!r}; {', '.join(ADVICE)}")


def _walk_vmas(mm: MmStruct, start: int, end: int, visit: Visit) -> None:
    """Call *visit* for the part of each VMA that is in the range. Linux: madvise_walk_vmas()."""
    addr, hole = start, None
    while addr < end:
        vma = find_vma(mm, addr)
        if vma is None or vma.vm_start > addr:
            hole = addr if hole is None else hole
        if vma is None or vma.vm_start >= end:
            break
        addr = visit(vma, max(addr, vma.vm_start), min(vma.vm_end, end)).vm_end
    if hole is not None:
        raise NotMapped(f"madvise: nothing is mapped at {hole:#x}")


def _madvise_flags(advice: str) -> Visit:
    """Linux: madvise_vma_behavior() and madvise_update_vma(), mm/madvise.c."""
    flags = _FLAGS[advice]

    def visit(vma: Vma, start: int, end: int) -> Vma:
        if vma.vm_flags & flags.refused or (advice == "wipeonfork" and not vma_is_anonymous(vma)):
            raise InvalidArgument(f"madvise: {vma!r} cannot be advised to {advice}")
        vm_flags = vma.vm_flags & ~flags.clear | flags.set
        if vm_flags == vma.vm_flags:
            return vma
        return vma_modify_flags(vma, start, end, vm_flags)

    return visit


def _madvise_dontneed(vma: Vma, start: int, end: int) -> Vma:
    """Drop the contents, unless they are locked in memory. Linux: madvise_dontneed_free()."""
    _refuse(vma, VM_LOCKED, "dontneed")
    return _madvise_dontneed_locked(vma, start, end)


def _madvise_dontneed_locked(vma: Vma, start: int, end: int) -> Vma:
    """Drop the contents. Linux: madvise_dontneed_single_vma(), mm/madvise.c."""
    _refuse(vma, VM_PFNMAP, "dontneed_locked")
    zap_page_range(vma, start, end, MmuNotifyEvent.CLEAR)
    return vma


def _madvise_remove(vma: Vma, start: int, end: int) -> Vma:
    """Punch a hole into the file behind a mapping, which private memory has not.

    Linux: madvise_remove(), mm/madvise.c.
    """
    raise InvalidArgument(f"madvise: {vma!r} has no file to remove from")


def _refuse(vma: Vma, vm_flags: int, advice: str) -> None:
    if vma.vm_flags & vm_flags:
        raise InvalidArgument(f"madvise: {vma!r} cannot be advised to {advice}")


_READERS: Final[dict[str, Visit]] = {
    "dontneed": _madvise_dontneed,
    "dontneed_locked": _madvise_dontneed_locked,
    "remove": _madvise_remove,
}
ADVICE: Final = (*_FLAGS, *_READERS, "populate_read", "populate_write")
