"""VMAs: cutting one in two, and joining neighbours that are alike. Linux: mm/mmap.c.

Two neighbours are one VMA where nothing tells them apart: the flags (all but VM_SOFTDIRTY), the
file, the policy, the userfaultfd, page offsets that go on from one to the other, and anon_vmas that
agree. So a
range of new memory may enlarge what is beside it, and a range whose flags change may go over to
a neighbour or stand alone:

    |   prev   |   [    vma    ]   |   next   |        the range in brackets is to change
    |   prev       ------------]   |   next   |        it continues prev
    |   prev   |   [------------       next   |        it continues next
    |   prev       ------------        next   |        it continues both
    |   prev   |vma|           |vma|   next   |        none: vma is cut

The rules are those of Linux v6.12 (mm/vma.c), which gave what v4.20 has in vma_merge() and
vma_adjust() names of their own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from mm.anon_vma import anon_vma_clone, unlink_anon_vmas
from mm.fs import fput, get_file
from mm.mempolicy import Mempolicy, mpol_equal
from mm.overcommit import check_map_count
from mm.types import (
    VM_SOFTDIRTY,
    VM_SPECIAL,
    AnonVma,
    MmStruct,
    Vma,
    vma_pages,
    vma_set_page_prot,
)
from mm.typing import PAGE_SHIFT


@dataclass(slots=True)
class VmaMerge:
    """A range as it is to be; what decides whether it continues a neighbour.

    Linux: struct vma_merge_struct, mm/vma.h, v6.12.
    """

    mm: MmStruct
    start: int
    end: int
    pgoff: int
    vm_flags: int
    vm_file: Any = None
    vm_policy: Mempolicy | None = None
    anon_vma: AnonVma | None = None
    uffd_ctx: Any = None


def vmg_of(vma: Vma, start: int, end: int) -> VmaMerge:
    """[*start*, *end*) as a part, or a continuation, of *vma*. Linux: VMG_VMA_STATE(), v6.12."""
    pgoff = vma.vm_pgoff + ((start - vma.vm_start) >> PAGE_SHIFT)
    vmg = VmaMerge(vma.vm_mm, start, end, pgoff, vma.vm_flags, vma.vm_file, vma.vm_policy)
    vmg.anon_vma, vmg.uffd_ctx = vma.anon_vma, vma.vm_userfaultfd_ctx
    return vmg


def _vm_start(vma: Vma) -> int:
    return vma.vm_start


def _vm_end(vma: Vma) -> int:
    return vma.vm_end


def insert_vma(vma: Vma, parent: Vma | None = None) -> None:
    """Enter *vma*, which overlaps no other, in its address space, and list it where its file's
    pages look for who maps them, right after *parent* if that is given.

    Linux: vma_link(), mm/mmap.c; vma_interval_tree_insert_after(), mm/interval_tree.c.
    """
    vmas = vma.vm_mm.vmas
    vmas.insert(bisect_right(vmas, vma.vm_start, key=_vm_end), vma)
    if vma.vm_file is not None:
        get_file(vma.vm_file)
        with vma.vm_file.f_mapping.i_mmap_rwsem.write():
            i_mmap = vma.vm_file.f_mapping.i_mmap
            i_mmap.insert(i_mmap.index(parent) + 1 if parent else len(i_mmap), vma)


def remove_vma(vma: Vma) -> None:
    """Undo insert_vma(); what *vma* mapped is gone, or another's.

    Linux: unlink_file_vma() and remove_vma(), mm/mmap.c.
    """
    unlink_anon_vmas(vma)
    vma.vm_mm.vmas.remove(vma)
    if vma.vm_file is not None:
        with vma.vm_file.f_mapping.i_mmap_rwsem.write():
            vma.vm_file.f_mapping.i_mmap.remove(vma)
        fput(vma.vm_file)


def vma_inherit(vma: Vma, orig: Vma) -> None:
    """Let *vma*, new and in no list yet, map what *orig* maps, by the same rules.

    Linux: vm_area_dup(), kernel/fork.c.
    """
    vma.vm_file, vma.vm_ops = orig.vm_file, orig.vm_ops
    vma.vm_policy = orig.vm_policy
    vma.vm_page_prot = orig.vm_page_prot


def _neighbours(vmg: VmaMerge) -> tuple[Vma | None, Vma | None]:
    """The VMA that ends where the range starts, and the one that starts where it ends."""
    vmas = vmg.mm.vmas
    left = bisect_left(vmas, vmg.start, key=_vm_end)
    right = bisect_left(vmas, vmg.end, key=_vm_start)
    prev = vmas[left] if left < len(vmas) and vmas[left].vm_end == vmg.start else None
    after = vmas[right] if right < len(vmas) and vmas[right].vm_start == vmg.end else None
    return prev, after


def _is_mergeable_vma(vma: Vma, vmg: VmaMerge) -> bool:
    """Linux: is_mergeable_vma(), mm/mmap.c."""
    return (
        not (vma.vm_flags ^ vmg.vm_flags) & ~VM_SOFTDIRTY
        and vma.vm_file is vmg.vm_file
        and mpol_equal(vma.vm_policy, vmg.vm_policy)
        and vma.vm_userfaultfd_ctx is vmg.uffd_ctx
    )


def _is_mergeable_anon_vma(vma: Vma, anon_vma: AnonVma | None) -> bool:
    """True if *vma* may take in pages of *anon_vma*.

    It may take in a range that has none, unless it shares pages with a process that forked. The
    other way round it may not: a VMA without an anon_vma takes in no range that has one.
    Linux: is_mergeable_anon_vma(), mm/mmap.c.
    """
    if vma.anon_vma is None or anon_vma is None:
        return vma.anon_vma is anon_vma or len(vma.anon_vma_chain) == 1
    return vma.anon_vma is anon_vma


def _can_vma_merge_after(prev: Vma, vmg: VmaMerge) -> bool:
    """Linux: can_vma_merge_after(), mm/mmap.c."""
    return (
        _is_mergeable_vma(prev, vmg)
        and _is_mergeable_anon_vma(prev, vmg.anon_vma)
        and prev.vm_pgoff + vma_pages(prev) == vmg.pgoff
    )


def _can_vma_merge_before(after: Vma, vmg: VmaMerge) -> bool:
    """Linux: can_vma_merge_before(), mm/mmap.c."""
    return (
        _is_mergeable_vma(after, vmg)
        and _is_mergeable_anon_vma(after, vmg.anon_vma)
        and vmg.pgoff + ((vmg.end - vmg.start) >> PAGE_SHIFT) == after.vm_pgoff
    )


def _are_anon_vmas_compatible(one: Vma, other: Vma) -> bool:
    """Linux: are_anon_vmas_compatible(), mm/vma.c, v6.12."""
    return None in (one.anon_vma, other.anon_vma) or one.anon_vma is other.anon_vma


def vma_merge(vmg: VmaMerge, vma: Vma | None = None) -> Vma | None:
    """Let the neighbours that the range continues have it; the VMA that does, or None.

    *vma* is the one that the range is a part of now; without, the range is free. The caller holds
    mmap_sem for write, and gives the result its flags.
    Linux: vma_merge_existing_range() and vma_merge_new_range(), mm/vma.c, v6.12.
    """
    if vmg.vm_flags & VM_SPECIAL:
        return None
    prev, after = _neighbours(vmg)
    if prev is not None and not _can_vma_merge_after(prev, vmg):
        prev = None
    if after is not None and not _can_vma_merge_before(after, vmg):
        after = None
    if prev is not None and after is not None and not _are_anon_vmas_compatible(prev, after):
        after = None

    merged = prev or after
    if merged is None:
        return None
    absorbed = after if merged is prev else None
    for given in (absorbed, vma):
        if given is not None and given.anon_vma is not None and merged.anon_vma is None:
            anon_vma_clone(merged, given)
    start = min(merged.vm_start, vmg.start)
    vma_set_range(merged, start, absorbed.vm_end if absorbed else max(merged.vm_end, vmg.end))
    if vma is not None:
        _give_away(vma, vmg.start, vmg.end)
    if absorbed is not None:
        _give_away(absorbed, absorbed.vm_start, absorbed.vm_end)
    return merged


def _give_away(vma: Vma, start: int, end: int) -> None:
    """Take [*start*, *end*), an end or all of *vma*, which another has now, from it."""
    if start > vma.vm_start:
        vma_set_range(vma, vma.vm_start, start)
    elif end < vma.vm_end:
        vma_set_range(vma, end, vma.vm_end)
    else:
        remove_vma(vma)


def vma_set_range(vma: Vma, start: int, end: int) -> None:
    """Let *vma* span [*start*, *end*); what it maps at an address stays what it was.

    Linux: vma_set_range(), mm/vma.h, v6.12, between vma_prepare() and vma_complete().
    """
    mapping = vma.vm_file.f_mapping if vma.vm_file is not None else None
    with (
        mapping.i_mmap_rwsem.write() if mapping else nullcontext(),
        vma.anon_vma.rwsem.write() if vma.anon_vma else nullcontext(),
    ):
        vma.vm_pgoff += (start - vma.vm_start) >> PAGE_SHIFT
        vma.vm_start = start
        vma.vm_end = end


def split_vma(vma: Vma, addr: int) -> Vma:
    """Cut *vma* at *addr*; the part from there on is returned. Linux: __split_vma(), mm/mmap.c."""
    rest = Vma(vma.vm_mm, addr, vma.vm_end, vma.vm_flags, vma.vm_pgoff)
    rest.vm_pgoff += (addr - vma.vm_start) >> PAGE_SHIFT
    vma_inherit(rest, vma)
    rest.vm_userfaultfd_ctx = vma.vm_userfaultfd_ctx
    anon_vma_clone(rest, vma)
    vma_set_range(vma, vma.vm_start, addr)
    insert_vma(rest)
    return rest


def vma_modify(vma: Vma, vmg: VmaMerge) -> Vma:
    """A VMA of which the range of *vmg*, a part of *vma*, is all, or which it now continues.

    The caller holds mmap_sem for write, and lets the result have what changes. Raises OutOfMemory
    where there are too many VMAs to cut one. Linux: vma_modify(), mm/vma.c, v6.12.
    """
    merged = vma_merge(vmg, vma)
    if merged is not None:
        return merged
    if vma.vm_start < vmg.start:
        check_map_count(vma.vm_mm, "split_vma")
        vma = split_vma(vma, vmg.start)
    if vma.vm_end > vmg.end:
        check_map_count(vma.vm_mm, "split_vma")
        split_vma(vma, vmg.end)
    return vma


def vma_modify_flags(vma: Vma, start: int, end: int, vm_flags: int) -> Vma:
    """Let [*start*, *end*) of *vma* have *vm_flags*; the VMA that it is in then.

    Linux: vma_modify_flags() and vm_flags_reset(), mm/vma.c, v6.12.
    """
    vmg = vmg_of(vma, start, end)
    vmg.vm_flags = vm_flags
    vma = vma_modify(vma, vmg)
    vma.vm_flags = vm_flags
    vma_set_page_prot(vma)
    return vma


def vma_modify_policy(vma: Vma, start: int, end: int, policy: Mempolicy | None) -> Vma:
    """Let [*start*, *end*) of *vma* have the memory policy *policy*; the VMA that it is in then.

    Linux: vma_modify_policy(), mm/vma.c, v6.12; vma_replace_policy(), mm/mempolicy.c.
    """
    vmg = vmg_of(vma, start, end)
    vmg.vm_policy = policy
    vma = vma_modify(vma, vmg)
    if vma.vm_ops is not None and vma.vm_ops.set_policy is not None:
        vma.vm_ops.set_policy(vma, start, end, policy)
    vma.vm_policy = policy
    return vma


def vma_modify_flags_uffd(vma: Vma, start: int, end: int, vm_flags: int, ctx: Any) -> Vma:
    """Let [*start*, *end*) of *vma* have *vm_flags*, and its faults go to *ctx*; its VMA then.

    Linux: vma_modify_flags_uffd(), mm/vma.c, and userfaultfd_set_vm_flags(), v6.12.
    """
    vmg = vmg_of(vma, start, end)
    vmg.vm_flags, vmg.uffd_ctx = vm_flags, ctx
    vma = vma_modify(vma, vmg)
    vma.vm_flags, vma.vm_userfaultfd_ctx = vm_flags, ctx
    return vma
