"""Files whose home is swap: shared anonymous memory and memfd. Linux: mm/shmem.c.

What is at an offset is in the cache of the file (a page), in swap (a value: the slot), or nothing,
which reads as zeros. A page comes to be when it is first mapped or written to:

    shmem_getpage      in memory; or from swap, by way of the swap cache; or a frame of zeros
    shmem_writepage    out to swap, when reclaim wants the frame
    shmem_undo_range   gone, wherever it is: truncated, or a hole was punched

A page that was only read holds zeros and is clean: reclaim drops it, and nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np

from mm.errors import InvalidArgument, NotSupported, OutOfMemory
from mm.fault_file import filemap_map_pages
from mm.filemap import lock_new_page, unlock_page, wait_on_page_locked
from mm.filemap_io import copy_pages_to, generic_perform_write
from mm.fs import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    File,
    FileOperations,
    Inode,
    InodeOperations,
    i_pages_end,
)
from mm.gfp import GFP_HIGHUSER_MOVABLE, Gfp
from mm.mempolicy import Mempolicy, alloc_pages_mpol, get_task_policy
from mm.migrate import migrate_file_page
from mm.page_cache import (
    charge_cache_pages,
    find_lock_pages,
    page_cache_delete,
    page_cache_store,
    set_page_dirty,
    set_page_dirty_no_writeback,
)
from mm.page_flags import PG_dirty, PG_swapbacked, PG_uptodate
from mm.page_io import swap_writepage
from mm.sched import current_task
from mm.swap import lru_cache_add, mark_page_accessed, put_page
from mm.swap_slots import swap_duplicate, swap_free
from mm.swap_state import add_to_swap, delete_from_swap_cache
from mm.swapfile import free_swap_and_cache
from mm.swapin import swapin
from mm.swapops import make_swap_entry
from mm.truncate import (
    EVERYTHING,
    partial_pages,
    truncate_pages,
    truncate_whole_pages,
    unmap_mapping_range,
    zero_partial_page,
)
from mm.types import (
    AddressSpace,
    AddressSpaceOperations,
    MemMap,
    MmStruct,
    Vma,
    VmFault,
    VmOperations,
    vma_pages,
)
from mm.typing import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Addresses,
    Faults,
    Indices,
    Mask,
    Payload,
    Pfns,
    pages,
    word,
)
from mm.vectors import every, places, some
from mm.xarray import MAX_INDEX, Entries, xa_is_value, xa_mk_value, xa_to_value

_NEW_PAGE: Final = word(PG_swapbacked | PG_uptodate)
_BLOCK: Final = 1 << 11  # pages that fallocate() and read() deal with at a time


class SgpType(Enum):
    """What pages are asked for. Linux: enum sgp_type, include/linux/shmem_fs.h."""

    READ = 0  # those that there are, inside the file
    CACHE = 1  # all, inside the file
    WRITE = 2  # all, also beyond its end


@dataclass(slots=True)
class ShmemInodeInfo:
    """What shmem knows of an inode. Linux: struct shmem_inode_info, include/linux/shmem_fs.h.

    policy: memory policies of page offsets [first, stop), ascending.
    """

    policy: list[tuple[int, int, Mempolicy]] = field(default_factory=list)


# Pages ------------------------------------------------------------------------------------------


def shmem_getpage(
    mapping: AddressSpace, indexes: Indices, sgp: SgpType, mm: MmStruct | None = None
) -> tuple[Pfns, Faults]:
    """The page at each of *indexes* (distinct), locked and with a reference; -1 where none is.

    The group of *mm* pays for new ones, by default that of the task that runs. In the second vector
    is why there is none: SIGBUS beyond the end of the file, or where swap cannot be read; OOM;
    RETRY where it may be there the next time. MAJOR stands for a page that was read from swap.
    Linux: shmem_getpage_gfp(), mm/shmem.c.
    """
    mm = current_task().mm if mm is None else mm
    faults = np.zeros(indexes.size, dtype=np.uint16)
    pfns = np.full(indexes.size, -1)
    inside = np.arange(indexes.size)
    if sgp is not SgpType.WRITE:
        outside = indexes >= i_pages_end(mapping.host)
        faults[outside] = VmFault.SIGBUS
        inside = places(~outside)
    pfns[inside] = find_lock_pages(mapping, indexes[inside])
    away = inside[pfns[inside] < 0]
    if not away.size:
        return pfns, faults
    entries = mapping.i_pages.load(indexes[away])
    swapped, holes = away[entries < 0], away[entries == 0]
    faults[away[entries > 0]] = VmFault.RETRY  # another thread was first
    if swapped.size:
        values = xa_to_value(entries[entries < 0])
        pfns[swapped], faults[swapped] = shmem_swapin(mapping, indexes[swapped], values, mm)
    if holes.size and sgp is not SgpType.READ:
        pfns[holes], faults[holes] = _shmem_alloc(mapping, indexes[holes], mm)
        if sgp is SgpType.CACHE:
            late = holes[(indexes[holes] >= i_pages_end(mapping.host)) & (pfns[holes] >= 0)]
            truncate_pages(mapping, pfns[late])  # by who has been there already
            pfns[late], faults[late] = -1, VmFault.SIGBUS
    return pfns, faults


def _shmem_alloc(
    mapping: AddressSpace, indexes: Indices, mm: MmStruct | None
) -> tuple[Pfns, Faults]:
    """Fresh pages of zeros in the holes at *indexes*. Linux: shmem_alloc_and_acct_page()."""
    mem, cpu = mapping.mem, current_task().cpu
    frames = shmem_alloc_pages(mapping, indexes, GFP_HIGHUSER_MOVABLE | Gfp.ZERO)
    frames = charge_cache_pages(mem, frames, mm)
    faults = np.full(indexes.size, VmFault.RETRY if frames.size else VmFault.OOM, dtype=np.uint16)
    lock_new_page(mem, frames)
    mem.flags[frames] |= _NEW_PAGE
    added = page_cache_store(mapping, frames, indexes[: frames.size], expected=0)
    lru_cache_add(mem, frames[added], cpu)
    unlock_page(mem, frames[~added])
    put_page(mem, frames[~added], cpu)
    faults[: frames.size][added] = 0
    pfns = np.full(indexes.size, -1)
    pfns[: frames.size][added] = frames[added]
    return pfns, faults


def shmem_alloc_pages(mapping: AddressSpace, indexes: Indices, gfp: int) -> Pfns:
    """Frames for *indexes*, by the policies of the file, or else of the task; as many as there are.

    Unlike Linux v4.20, interleaving does not begin at a node by inode number, which nobody knows.
    Linux: shmem_alloc_page(), mm/shmem.c.
    """
    info: ShmemInodeInfo = mapping.host.i_private
    own = np.zeros(indexes.size, dtype=np.int64)
    for number, (first, stop, _) in enumerate(info.policy, 1):
        own[(indexes >= first) & (indexes < stop)] = number
    frames = []
    for number in dict.fromkeys(own.tolist()):
        mpol = info.policy[number - 1][2] if number else get_task_policy(current_task())
        frames.append(alloc_pages_mpol(mapping.mem, gfp, mpol, indexes[own == number]))
    if len(frames) == 1:
        return frames[0]
    return _in_order(mapping.mem, own, frames)


def _in_order(mem: MemMap, own: Indices, frames: list[Pfns]) -> Pfns:
    """*frames*, of one vector for each value of *own*, in its order; up to the first that lacks."""
    found = np.full(own.size, -1)
    for number, some_frames in zip(dict.fromkeys(own.tolist()), frames, strict=True):
        found[places(own == number)[: some_frames.size]] = some_frames
    lacking = places(found < 0)
    count = lacking.item(0) if lacking.size else own.size
    put_page(mem, found[count:][found[count:] >= 0], current_task().cpu)
    return found[:count]


def shmem_swapin(
    mapping: AddressSpace, indexes: Indices, slots: Indices, mm: MmStruct | None
) -> tuple[Pfns, Faults]:
    """Bring what is at *indexes* back from *slots*: into the file's cache, dirty, its slot free.

    Linux: shmem_swapin_page(), mm/shmem.c.
    """
    mem = mapping.mem

    def new_frames(which: Indices) -> Pfns:
        return shmem_alloc_pages(mapping, indexes[which], GFP_HIGHUSER_MOVABLE)

    found = swapin(mem, slots, new_frames, mm)
    pfns, faults = np.where(found.pfns > 0, found.pfns, -1), found.faults.copy()
    got = places(pfns >= 0)
    with mem.locks.atomic:
        entered = page_cache_store(mapping, pfns[got], indexes[got], xa_mk_value(slots[got]))
        here = pfns[got[entered]]
        delete_from_swap_cache(mem, here)
        mem.flags[here] |= PG_dirty
        swap_free(mem.swap, slots[got[entered]])
    late = got[~entered]
    unlock_page(mem, pfns[late])
    put_page(mem, pfns[late])
    pfns[late], faults[late] = -1, VmFault.RETRY
    for pfn in found.busy.tolist():
        _wait_outside(mem, pfns, pfn)
    return pfns, faults


def _wait_outside(mem: MemMap, held: Pfns, pfn: int) -> None:
    """Wait for *pfn*, which is locked, unless we hold locks that somebody may wait for."""
    if not some(held >= 0):
        wait_on_page_locked(mem, pfn)


def shmem_writepage(mapping: AddressSpace, pfns: Pfns) -> Mask:
    """Move dirty *pfns*, locked and mapped nowhere, to the swap cache and write them to swap.

    True for those that are clean now. Where no slot is free a page stays; where its write fails
    it stays dirty, in the swap cache. Linux: shmem_writepage(), mm/shmem.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        done = add_to_swap(mem, pfns)
        going = pfns[done]
        if not going.size:
            return done
        slots = mem.private[going]
        swap_duplicate(mem.swap, slots)  # Linux: swap_shmem_alloc()
        page_cache_delete(mapping, going, xa_mk_value(slots))
        mem.flags[going] |= PG_dirty
        put_page(mem, going)
    done[done] = swap_writepage(mem, going)
    return done


def shmem_undo_range(mapping: AddressSpace, start: int, end: int) -> None:
    """Leave nothing in bytes [*start*, *end*) of the file, in memory or in swap.

    Linux: shmem_undo_range(), mm/shmem.c.
    """
    truncate_whole_pages(mapping, start, end, shmem_free_swap)
    for offset, nbytes in partial_pages(start, end):
        index = pages(offset >> PAGE_SHIFT)
        pfns, faults = shmem_getpage(mapping, index, SgpType.READ)
        while faults.item() & VmFault.RETRY:
            pfns, faults = shmem_getpage(mapping, index, SgpType.READ)
        set_page_dirty(mapping.mem, pfns[pfns >= 0])
        zero_partial_page(mapping, pfns[pfns >= 0], offset % PAGE_SIZE, nbytes)


def shmem_free_swap(mapping: AddressSpace, indexes: Indices, entries: Entries) -> None:
    """Free the slots that *entries* at *indexes* name. Linux: shmem_free_swap(), mm/shmem.c."""
    mem = mapping.mem
    with mem.locks.atomic:
        same = mapping.i_pages.load(indexes) == entries
        mapping.i_pages.erase(indexes[same])
    free_swap_and_cache(mem, make_swap_entry(xa_to_value(entries[same])))


# Mappings ---------------------------------------------------------------------------------------


def shmem_fault(vma: Vma, addrs: Addresses, pgoffs: Indices, write: bool) -> tuple[Pfns, Faults]:
    """The pages that faults at *addrs* want. Linux: shmem_fault(), mm/shmem.c."""
    return shmem_getpage(vma.vm_file.f_mapping, pgoffs, SgpType.CACHE, vma.vm_mm)


def shmem_set_policy(vma: Vma, start: int, end: int, policy: Mempolicy | None) -> None:
    """New pages of what *vma* maps at [*start*, *end*) come by *policy*, whoever asks for them.

    Linux: shmem_set_policy(), mm/shmem.c.
    """
    info: ShmemInodeInfo = vma.vm_file.f_inode.i_private
    first = vma.vm_pgoff + ((start - vma.vm_start) >> PAGE_SHIFT)
    stop = first + ((end - start) >> PAGE_SHIFT)
    rest = []
    for low, high, mpol in info.policy:
        rest += [(low, min(high, first), mpol), (max(low, stop), high, mpol)]
    if policy is not None:
        rest.append((first, stop, policy))
    info.policy = sorted(part for part in rest if part[0] < part[1])


def shmem_mmap(file: File, vma: Vma) -> None:
    """Linux: shmem_mmap(), mm/shmem.c."""
    vma.vm_ops = shmem_vm_ops


def shmem_mapping(mapping: AddressSpace) -> bool:
    """True for the cache of a file whose home is swap. Linux: shmem_mapping(), mm/shmem.c."""
    return mapping.a_ops is shmem_aops


def shmem_swap_usage(vma: Vma) -> int:
    """Pages in swap of what *vma* maps of its file. Linux: shmem_swap_usage(), mm/shmem.c."""
    first = vma.vm_pgoff
    _, entries = vma.vm_file.f_mapping.i_pages.find(first, first + vma_pages(vma))
    return int(np.count_nonzero(entries < 0))


# Files ------------------------------------------------------------------------------------------


def shmem_file_read(file: File, pos: int, out: Payload) -> int:
    """Fill *out*, uint8[n], from *pos* on; holes stay holes. Linux: shmem_file_read_iter()."""
    mapping, mem = file.f_mapping, file.f_inode.mem
    out[:] = 0
    last = (pos + out.size - 1) >> PAGE_SHIFT if out.size else -1
    for first in range(pos >> PAGE_SHIFT, last + 1, _BLOCK):
        with mem.locks.atomic:
            indexes, _ = mapping.i_pages.find(first, min(first + _BLOCK, last + 1))
        pfns = _get_unlocked(mapping, indexes, SgpType.READ)
        there = pfns >= 0
        copy_pages_to(out, pos, mem, pfns[there], indexes[there])
        mark_page_accessed(mem, pfns[there])
        put_page(mem, pfns[there])
    return out.size


def _get_unlocked(mapping: AddressSpace, indexes: Indices, sgp: SgpType) -> Pfns:
    """As shmem_getpage(), unlocked, with what has to be tried again. Raises OutOfMemory."""
    mem, found = mapping.mem, np.full(indexes.size, -1)
    left = np.arange(indexes.size)
    while left.size:
        pfns, faults = shmem_getpage(mapping, indexes[left], sgp)
        found[left] = pfns
        unlock_page(mem, pfns[pfns >= 0])
        if some(faults & VmFault.OOM):
            put_page(mem, found[found >= 0])
            raise OutOfMemory(f"no frame for {mapping.host!r}; unmap or truncate something")
        left = left[(faults & VmFault.RETRY) != 0]
    return found


def shmem_write_begin(file: File, pos: int, nbytes: int) -> Pfns:
    """The pages of [*pos*, *pos* + *nbytes*), locked and with a reference.

    Fewer, the first of them, where memory is short; raises OutOfMemory where it has none, and
    InputOutputError where swap cannot be read. Linux: shmem_write_begin(), mm/shmem.c.
    """
    mapping = file.f_mapping
    indexes = np.arange(pos >> PAGE_SHIFT, (pos + nbytes + PAGE_SIZE - 1) >> PAGE_SHIFT)
    while True:
        pfns, faults = shmem_getpage(mapping, indexes, SgpType.WRITE)
        if every(pfns >= 0):
            return pfns
        count = int((pfns < 0).argmax())
        beyond = pfns[count:][pfns[count:] >= 0]
        unlock_page(mapping.mem, beyond)
        put_page(mapping.mem, beyond)
        if count:
            return pfns[:count]
        if not faults.item(0) & VmFault.RETRY:
            raise OutOfMemory(f"write: no frame for {file!r}; unmap or truncate something")


def shmem_write_end(file: File, pos: int, nbytes: int, pfns: Pfns) -> None:
    """*pfns* are written to. Linux: shmem_write_end(), mm/shmem.c."""
    file.f_inode.i_size = max(file.f_inode.i_size, pos + nbytes)
    mem = file.f_inode.mem
    set_page_dirty(mem, pfns)
    unlock_page(mem, pfns)
    put_page(mem, pfns)


def shmem_fallocate(file: File, mode: int, pos: int, nbytes: int) -> None:
    """Let all of a range have pages, or none of it. Raises OutOfMemory, NotSupported.

    Linux: shmem_fallocate(), mm/shmem.c.
    """
    mapping, end = file.f_mapping, pos + nbytes
    if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
        raise NotSupported(f"fallocate: mode {mode:#x} is not of keep_size, punch_hole")
    if mode & FALLOC_FL_PUNCH_HOLE:
        first, stop = -(-pos // PAGE_SIZE) * PAGE_SIZE, end // PAGE_SIZE * PAGE_SIZE
        if first < stop:
            unmap_mapping_range(mapping, first, stop, even_cows=False)
        shmem_undo_range(mapping, pos, end)
        return
    last = (end + PAGE_SIZE - 1) >> PAGE_SHIFT
    for first in range(pos >> PAGE_SHIFT, last, _BLOCK):
        indexes = np.arange(first, min(first + _BLOCK, last))
        pfns = _get_unlocked(mapping, indexes, SgpType.WRITE)
        set_page_dirty(mapping.mem, pfns)  # else reclaim would take them for holes
        put_page(mapping.mem, pfns)
    if not mode & FALLOC_FL_KEEP_SIZE:
        file.f_inode.i_size = max(file.f_inode.i_size, end)


def shmem_setattr(inode: Inode, size: int) -> None:
    """Let *inode* have *size* bytes; a Deadlock leaves it those that it has.

    Linux: shmem_setattr(), mm/shmem.c.
    """
    old, inode.i_size = inode.i_size, size
    if size >= old:
        return
    hole = -(-size // PAGE_SIZE) * PAGE_SIZE
    try:
        if old > hole:  # twice: a fault that saw the old size may bring a private copy meanwhile
            unmap_mapping_range(inode.i_mapping, hole, EVERYTHING, even_cows=True)
        shmem_undo_range(inode.i_mapping, size, EVERYTHING)
        if old > hole:
            unmap_mapping_range(inode.i_mapping, hole, EVERYTHING, even_cows=True)
    except BaseException:
        inode.i_size = old
        raise


def shmem_evict_inode(inode: Inode) -> None:
    """Nobody has *inode* any more. Linux: shmem_evict_inode(), mm/shmem.c."""
    inode.i_size = 0
    shmem_undo_range(inode.i_mapping, 0, EVERYTHING)


def shmem_file_setup(mem: MemMap, name: str, size: int) -> File:
    """A file of *size* bytes of zeros that has no name but for people.

    Linux: shmem_file_setup(), mm/shmem.c.
    """
    inode = Inode(mem, _shmem_inode_operations, shmem_file_operations, shmem_aops, ShmemInodeInfo())
    inode.i_size = size
    return File(inode, name)


def shmem_zero_setup(vma: Vma) -> File:
    """The file behind shared anonymous memory. Linux: shmem_zero_setup(), mm/shmem.c."""
    return shmem_file_setup(vma.vm_mm.mem, "dev/zero", vma.vm_end - vma.vm_start)


def memfd_create(mem: MemMap, name: str) -> File:
    """An empty file that is gone when nobody has it open or maps it any more.

    Linux: memfd_create(2), mm/memfd.c.
    """
    if len(name.encode()) > 249 or "\0" in name:
        raise InvalidArgument(
            f"memfd_create: name {name[:16]!r}... has more than 249 bytes, or NUL"
        )
    return shmem_file_setup(mem, f"memfd:{name}", 0)


def shmem_swapin_range(mapping: AddressSpace, first: int, stop: int) -> None:
    """Bring page offsets [*first*, *stop*) that are in swap into the swap cache (MADV_WILLNEED).

    What cannot be read now is left for the fault. Linux: shmem_swapin_range(), mm/madvise.c.
    """
    indexes, entries = mapping.i_pages.find(first, min(stop, MAX_INDEX))
    there = xa_is_value(entries)
    indexes, slots = indexes[there], xa_to_value(entries[there])

    def new_frames(which: Indices) -> Pfns:
        return shmem_alloc_pages(mapping, indexes[which], GFP_HIGHUSER_MOVABLE)

    pfns = swapin(mapping.mem, slots, new_frames, current_task().mm).pfns
    pfns = pfns[pfns > 0]
    unlock_page(mapping.mem, pfns)
    put_page(mapping.mem, pfns)


shmem_aops: Final = AddressSpaceOperations(
    set_page_dirty=set_page_dirty_no_writeback,
    writepage=shmem_writepage,
    write_begin=shmem_write_begin,
    write_end=shmem_write_end,
    migratepage=migrate_file_page,
)
shmem_vm_ops: Final = VmOperations(
    fault=shmem_fault, map_pages=filemap_map_pages, set_policy=shmem_set_policy
)
_shmem_inode_operations: Final = InodeOperations(
    setattr=shmem_setattr, evict_inode=shmem_evict_inode
)
shmem_file_operations: Final = FileOperations(
    read=shmem_file_read,
    write=generic_perform_write,
    mmap=shmem_mmap,
    fallocate=shmem_fallocate,
    fsync=lambda file, start, end: None,  # it is as safe as it can be
)
