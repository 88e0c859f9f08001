"""Which VMAs may map the pages of one anonymous area. Linux: mm/rmap.c.

A VMA that gets its first page gets an anon_vma, which lists it. A part of the VMA, and a child's
copy of it, are listed there too; the child's copy has one of its own besides, for the pages that
only the child will have.
"""

from __future__ import annotations

from typing import Final

from mm.locking import RwSemaphore
from mm.types import (
    VM_ACCESS_FLAGS,
    VM_SOFTDIRTY,
    AnonVma,
    MemMap,
    Vma,
    vma_pages,
)

_MAY_CHANGE: Final = VM_ACCESS_FLAGS | VM_SOFTDIRTY  # and neighbours still share an anon_vma


def anon_vma_prepare(vma: Vma) -> AnonVma:
    """The anon_vma for new pages of *vma*, made or shared with a neighbour where it has none.

    Linux: __anon_vma_prepare(), mm/rmap.c.
    """
    if vma.anon_vma is None:
        anon_vma = _mergeable_anon_vma(vma) or _anon_vma_alloc(vma.vm_mm.mem)
        vma.anon_vma = anon_vma
        _link(vma, anon_vma)
    return vma.anon_vma


def _anon_vma_alloc(mem: MemMap, parent: AnonVma | None = None) -> AnonVma:
    number = mem.next_anon_vma
    mem.next_anon_vma += 1
    rwsem = parent.rwsem if parent else RwSemaphore(mem.locks, f"anon_vma {number}")
    anon_vma = AnonVma(number, rwsem, [], parent)
    mem.anon_vmas[number] = anon_vma
    return anon_vma


def _mergeable_anon_vma(vma: Vma) -> AnonVma | None:
    """A neighbour's anon_vma, so that the two may merge later. Linux: find_mergeable_anon_vma()."""
    vmas = vma.vm_mm.vmas
    at = vmas.index(vma)
    for left, right in ((at, at + 1), (at - 1, at)):
        if left < 0 or right >= len(vmas):
            continue
        before, after = vmas[left], vmas[right]
        near = after if before is vma else before
        if (
            near.anon_vma is not None
            and len(near.anon_vma_chain) == 1
            and before.vm_end == after.vm_start
            and not (before.vm_flags ^ after.vm_flags) & ~_MAY_CHANGE
            and before.vm_file is after.vm_file
            and before.vm_policy == after.vm_policy
            and after.vm_pgoff == before.vm_pgoff + vma_pages(before)
        ):
            return near.anon_vma
    return None


def _link(vma: Vma, anon_vma: AnonVma) -> None:
    with anon_vma.rwsem.write():
        anon_vma.vmas.append(vma)
    vma.anon_vma_chain.append(anon_vma)


def anon_vma_clone(dst: Vma, src: Vma) -> None:
    """List *dst* wherever *src* is listed, as a split or copied VMA needs. Linux: mm/rmap.c."""
    for anon_vma in src.anon_vma_chain:
        _link(dst, anon_vma)
    dst.anon_vma = src.anon_vma


def anon_vma_fork(vma: Vma, pvma: Vma) -> None:
    """List *vma*, the child's copy of *pvma*, wherever that is listed, and give it an anon_vma.

    New pages of the child are in that one, where no walk for the parent's pages looks. It may be
    one that an ancestor has left: else a family whose parents exit and whose children fork, over
    and over, would list ever more of them. Linux: anon_vma_fork() and anon_vma_clone(), mm/rmap.c.
    """
    if pvma.anon_vma is None:
        return
    for anon_vma in pvma.anon_vma_chain:
        if vma.anon_vma is None and _is_left(anon_vma):
            vma.anon_vma = anon_vma
        _link(vma, anon_vma)
    if vma.anon_vma is None:
        vma.anon_vma = _anon_vma_alloc(vma.vm_mm.mem, pvma.anon_vma)
        _link(vma, vma.anon_vma)


def _is_left(anon_vma: AnonVma) -> bool:
    """True if new pages of no VMA go there, and it has one child at most, and a parent.

    Unlike Linux v4.20, which may use the first of a family again too.
    Linux: `num_active_vmas` and `num_children` of struct anon_vma, v6.0.
    """
    if anon_vma.parent is None or any(vma.anon_vma is anon_vma for vma in anon_vma.vmas):
        return False
    below = {a.number for vma in anon_vma.vmas for a in vma.anon_vma_chain if a.parent is anon_vma}
    return len(below) < 2


def unlink_anon_vmas(vma: Vma) -> None:
    """Take *vma* out of every anon_vma, and drop those that list nothing. Linux: mm/rmap.c."""
    for anon_vma in vma.anon_vma_chain:
        with anon_vma.rwsem.write():
            anon_vma.vmas.remove(vma)
        if not anon_vma.vmas:
            del vma.vm_mm.mem.anon_vmas[anon_vma.number]
    vma.anon_vma_chain.clear()
    vma.anon_vma = None
