"""The structures that everything works on. Linux: include/linux/mm_types.h.

`MemMap` is every struct page of the machine as columns; row i is the page with PFN i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mm.buffer_head import BufferHeads
from mm.errors import InvalidArgument
from mm.highmem import reserve_payload
from mm.locking import Locks, RwSemaphore, SpinLock
from mm.mmzone import Node, PageStack, Zone
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_NX,
    _PAGE_PRESENT,
    _PAGE_PROTNONE,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    _PAGE_USER,
    TablePool,
)
from mm.swap_slots import SwapInfo
from mm.typing import (
    PAGE_SHIFT,
    Addresses,
    Faults,
    Indices,
    Mask,
    Payload,
    Pfns,
    Word,
    number,
    word,
)
from mm.vectors import every, rows
from mm.vmstat import VmStat
from mm.xarray import XArray


class Column(NamedTuple):
    """One column of `MemMap`: how it is stored and what it may hold."""

    name: str
    dtype: type[np.generic]
    struct_page: str  # the field that it stands for
    meaning: str


COLUMNS: Final = (
    Column("flags", np.uint64, "flags", "PG_* bits of mm/page_flags.py"),
    Column("refcount", np.int32, "_refcount", "references; 0 is free, 1 a free ZONE_DEVICE page"),
    Column("mapcount", np.int32, "_mapcount + 1", "page-table entries that map the page"),
    Column("mapping", np.int64, "mapping", "whose it is: number << 2, with PAGE_MAPPING_*"),
    Column("index", np.int64, "index", "its page offset there: that of the VMAs' vm_pgoff"),
    Column("private", np.int64, "private", "slot of a page in the swap cache, else 0"),
    Column("lru_stamp", np.int64, "lru", "its place in the LRU list: higher is younger"),
    Column("mlock_count", np.int32, "mlock_count", "VM_LOCKED mappings counted while unevictable"),
    Column(
        "memcg", np.uint16, "mem_cgroup", "control group that pays for it, by number; 0: the root"
    ),
    Column("lock_owner", np.uint16, "(none)", "thread that set PG_locked, 0 where it is clear"),
    Column("zone", np.uint8, "flags", "index into `zones`; 0 where no frame stands behind the PFN"),
    Column("free_order", np.uint8, "private", "order + 1 of the free block that starts here, or 0"),
)
BYTES_PER_PAGE: Final = sum(np.dtype(column.dtype).itemsize for column in COLUMNS)

PAGE_MAPPING_ANON: Final = 1
PAGE_MAPPING_MOVABLE: Final = 2
PAGE_MAPPING_FLAGS: Final = PAGE_MAPPING_ANON | PAGE_MAPPING_MOVABLE
_ANON: Final = number(PAGE_MAPPING_ANON)
_MOVABLE: Final = number(PAGE_MAPPING_MOVABLE)
_FLAGS: Final = number(PAGE_MAPPING_FLAGS)


class MemoryType(IntEnum):
    """What stands behind the pages of a zone. Linux: enum memory_type, linux/memremap.h."""

    HOLE = 0
    DEVICE_PRIVATE = 1
    DEVICE_PUBLIC = 2
    SYSTEM = 3


_DEVICE_PRIVATE: Final = np.array(MemoryType.DEVICE_PRIVATE, dtype=np.uint8)
_DEVICE_PUBLIC: Final = np.array(MemoryType.DEVICE_PUBLIC, dtype=np.uint8)


class MemMap:
    """struct page as columns, with the memory, zones and counters of one machine around them.

    Columns reach to the end of the physical address space and cost nothing where no page is: the
    host commits them as they are written. Devices get their PFNs from the top downward.
    """

    flags: NDArray[np.uint64]
    refcount: NDArray[np.int32]
    mapcount: NDArray[np.int32]
    mapping: NDArray[np.int64]
    index: NDArray[np.int64]
    private: NDArray[np.int64]
    lru_stamp: NDArray[np.int64]
    mlock_count: NDArray[np.int32]
    memcg: NDArray[np.uint16]
    lock_owner: NDArray[np.uint16]
    zone: NDArray[np.uint8]
    free_order: NDArray[np.uint8]

    def __init__(
        self, max_pfn: int, limit_pfn: int, *, tables: int, payload: bool, cpus: int
    ) -> None:
        for column in COLUMNS:
            setattr(self, column.name, np.zeros(limit_pfn, dtype=column.dtype))
        self.grow(max_pfn)
        self.limit_pfn = limit_pfn  # first PFN that no device can have either
        # What the CPU can address, uint8[limit_pfn, 4096]: system and device-public memory. The
        # rows of device-private pages are never touched.
        self.payload: Payload | None = reserve_payload(limit_pfn) if payload else None
        self.zero_pfn = 0  # the frame of zeros that read faults map; set at boot
        self.debug = False  # freed frames are filled with junk, allocations are checked
        # Thread that took each page from where it was free; kept while debugging only.
        self.page_owner: NDArray[np.uint16] = np.zeros(limit_pfn, dtype=np.uint16)
        self.nodes: list[Node] = []
        self.zones: list[Zone | None] = [None]
        self.memory_type: NDArray[np.uint8] = np.zeros(256, dtype=np.uint8)  # by zone index
        self.zone_nid: NDArray[np.int16] = np.full(256, -1, dtype=np.int16)  # by zone index
        self.locks = Locks()
        self.vmstat = VmStat(self.locks)
        self.tables = TablePool(tables, self.vmstat)
        self.pagevecs = [PageStack(32) for _ in range(cpus)]  # pages on their way to the LRU
        self.lazyfree_pagevecs = [PageStack(32) for _ in range(cpus)]  # that MADV_FREE gave up
        self.cpu_to_node = [0] * cpus  # NUMA node of each CPU
        self.lru_clock = 0  # stamps given out
        self.swap = SwapInfo(0, self.locks, payload=False)  # the swap area
        self.num_poisoned_pages = 0  # frames that are PG_hwpoison
        self.anon_vmas: dict[int, AnonVma] = {}  # by the number that `mapping` holds
        self.next_anon_vma = 1
        self.super_blocks: list[Any] = []  # every BlockFs of mm/blockfs.py that is mounted
        self.max_map_count = 65530  # VMAs that a process may have
        self.mappings: dict[int, AddressSpace] = {}  # page caches, by the number in `mapping`
        self.next_mapping = 1
        self.buffers = BufferHeads()  # of pages whose files are on a block device
        self.files: list[Any] = []  # every File of mm/fs.py that is open
        self.dirty_background_ratio = 10  # percent of memory that may be dirty before it is written
        self.vm_dirty_ratio = 20  # and before who makes it dirty has to wait
        self.pins: list[Any] = []  # references held outside all tables (mm.gup.Pin)
        self.cpusets_enabled = False  # some task may not use every node
        self.mms: list[MmStruct] = []  # address spaces that live
        self.device_pgds: list[int] = []  # top page tables of devices
        # The MemCgroup of mm/mem_cgroup.py by the number in `memcg`; none until the first is made.
        self.memcgs: dict[int, Any] = {}
        self.memcg_reclaim: Callable[[Any, int], int] | None = None  # mm/vmscan.py fills it

    def grow(self, max_pfn: int) -> None:
        """System memory ends at *max_pfn* from now on; device memory begins above."""
        self.max_pfn = max_pfn  # first PFN above system memory
        self._first_device_pfn = number(max_pfn)

    def page_to_nid(self, pfns: Pfns) -> NDArray[np.int16]:
        """NUMA node of each page. Linux: page_to_nid(), include/linux/mm.h."""
        return self.zone_nid[self.zone[pfns]]

    def is_zone_device_page(self, pfns: Pfns) -> Mask:
        """True for device memory of any type. Linux: is_zone_device_page()."""
        return pfns >= self._first_device_pfn

    def is_device_private_page(self, pfns: Pfns) -> Mask:
        """True for memory that only its device can touch. Linux: is_device_private_page()."""
        return self._has_type(pfns, _DEVICE_PRIVATE)

    def is_device_public_page(self, pfns: Pfns) -> Mask:
        """True for device memory that the CPU can touch. Linux: is_device_public_page()."""
        return self._has_type(pfns, _DEVICE_PUBLIC)

    def _has_type(self, pfns: Pfns, memory_type: NDArray[np.uint8]) -> Mask:
        zones = self.zone[rows(pfns)]
        if zones.size > 1 and every(zones == zones[0]):
            return np.full(zones.size, self.memory_type.item(zones.item(0)) == memory_type)
        return self.memory_type[zones] == memory_type

    def pagemap_of(self, pfn: int) -> DevPagemap | None:
        """The driver's pagemap behind a device page. Linux: page->pgmap."""
        zone = self.zones[int(self.zone[pfn])]
        return zone.pgmap if zone is not None else None


def page_anon(mem: MemMap, pfns: Pfns) -> Mask:
    """True for anonymous pages. Linux: PageAnon(), include/linux/page-flags.h."""
    return (mem.mapping[rows(pfns)] & _ANON).astype(np.bool_)


def page_movable(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages that a driver lets others move, also for those that it has let go of since.

    Linux: __PageMovable(), include/linux/page-flags.h.
    """
    return (mem.mapping[pfns] & _FLAGS) == _MOVABLE


def payload_of(mem: MemMap) -> Payload:
    """The contents of all frames. Raises InvalidArgument on a machine that keeps none."""
    if mem.payload is None:
        raise InvalidArgument("this machine keeps no contents; boot it with payload=True")
    return mem.payload


def page_mapping(mem: MemMap, pfn: int) -> AddressSpace | None:
    """The page cache that *pfn* is in, or its driver's; None if it is anonymous or nobody's.

    Linux: page_mapping(), mm/util.c.
    """
    owner = mem.mapping.item(pfn)
    return None if owner & PAGE_MAPPING_ANON else mem.mappings.get(owner >> 2)


class VmFault(IntFlag):
    """How a fault ended; 0 is well. Linux: VM_FAULT_*, include/linux/mm.h."""

    OOM = 0x0001
    SIGBUS = 0x0002
    MAJOR = 0x0004
    HWPOISON = 0x0010
    SIGSEGV = 0x0040
    RETRY = 0x0400
    UFFD_MISSING = 0x4000  # (not Linux) with RETRY: userland has to bring the page first
    UFFD_WP = 0x8000  # (not Linux) with RETRY: userland has to allow the store first


VM_FAULT_USERFAULT: Final = int(VmFault.UFFD_MISSING | VmFault.UFFD_WP)
# Whoever cannot wait for userland takes its faults for errors.
VM_FAULT_ERROR: Final = int(
    VmFault.OOM | VmFault.SIGBUS | VmFault.HWPOISON | VmFault.SIGSEGV | VM_FAULT_USERFAULT
)


class DevPagemap(Protocol):
    """A driver's memory, as the core calls it. Linux: struct dev_pagemap, linux/memremap.h."""

    type: MemoryType
    name: str
    owner: object

    def page_fault(self, vma: Vma, addrs: Addresses, pfns: Pfns, *, write: bool) -> VmFault:
        """The CPU touched device-private *pfns* at *addrs* (sorted, one VMA): migrate them back.

        Called with mmap_sem held for read. The first address matters most. VmFault.SIGBUS means
        that the device lost them, OOM that no frame was left; anything else makes the CPU retry.
        """

    def page_free(self, pfns: Pfns) -> None:
        """The last reference to *pfns* is gone; they are the driver's alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressSpaceOperations:
    """How a kind of file, or a driver, treats its pages; what is None it has no need of.

    All pages are locked by the caller, in one mapping, and stay so. The last three are for a
    driver whose pages others may move (mm/movable.py).
    Linux: struct address_space_operations, include/linux/fs.h.

    readpages(mapping, pfns)              fill them; True where they are up to date now
    writepage(mapping, pfns)              write them, if dirty; True where one is stored now, False
                                          where it is dirty still, or on its way (PG_writeback)
    set_page_dirty(mapping, pfns)         their contents differ from what is stored
    write_begin(file, pos, nbytes)        pages to write to, locked and with a reference, ascending
    write_end(file, pos, nbytes, pfns)    they are written to; unlock them and drop the references
    invalidatepage(mapping, pfns, offset, nbytes)  forget what belongs to that part of each
    releasepage(mapping, pfns)            let go of `private`; True where that was done
    migratepage(mapping, new, old)        let new[i] take the place of old[i], contents and all: 0,
                                          or -errno; a driver's references go from old[i] to new[i]
    isolate_page(mapping, pfns)           put them aside, to be moved; True where that was done
    putback_page(mapping, pfns)           they have not moved, and are as before
    """

    set_page_dirty: Callable[[AddressSpace, Pfns], None] | None = None
    readpages: Callable[[AddressSpace, Pfns], Mask] | None = None
    writepage: Callable[[AddressSpace, Pfns], Mask] | None = None
    write_begin: Callable[[Any, int, int], Pfns] | None = None
    write_end: Callable[[Any, int, int, Pfns], None] | None = None
    invalidatepage: Callable[[AddressSpace, Pfns, int, int], None] | None = None
    releasepage: Callable[[AddressSpace, Pfns], Mask] | None = None
    migratepage: Callable[[AddressSpace, Pfns, Pfns], NDArray[np.int32]] | None = None
    isolate_page: Callable[[AddressSpace, Pfns], Mask] | None = None
    putback_page: Callable[[AddressSpace, Pfns], None] | None = None


@dataclass(slots=True, eq=False)
class AddressSpace:
    """The pages of a file that are in memory. Linux: struct address_space, include/linux/fs.h.

    number: what `mapping` of its pages holds, shifted. i_pages: by page offset, changed with
    `atomic` held. i_mmap: the VMAs that map the file, privately or not.
    """

    mem: MemMap
    number: int
    host: Any  # the Inode of mm/fs.py
    a_ops: AddressSpaceOperations
    i_mmap_rwsem: RwSemaphore
    i_pages: XArray = field(default_factory=XArray)
    i_mmap: list[Vma] = field(default_factory=list)
    flags: int = 0  # AS_*
    wb_err: int = 0  # the errors of writing its pages, as mm/errseq.py keeps them


@dataclass(frozen=True, slots=True, kw_only=True)
class VmOperations:
    """How a kind of file serves faults. Linux: struct vm_operations_struct, include/linux/mm.h.

    fault(vma, addrs, pgoffs, write)  the page at each offset, locked and with a reference, or -1
                                      and in the second vector why there is none
    map_pages(vma, addrs, at)         map what is in memory of the ascending *addrs*, whose entries
                                      are at places *at* of the table pool; True where it did
    page_mkwrite(vma, pfns)           locked pages are about to be stored to for the first time
                                      since they were clean; a VmFault for each that may not be.
                                      It may unlock them for a while
    set_policy(vma, start, end, policy)  new pages of the file come by *policy* there
    """

    fault: Callable[[Vma, Addresses, Indices, bool], tuple[Pfns, Faults]]
    map_pages: Callable[[Vma, Addresses, Indices], Mask] | None = None
    page_mkwrite: Callable[[Vma, Pfns], Faults] | None = None
    set_policy: Callable[[Vma, int, int, Any], None] | None = None


VM_READ: Final = 0x00000001
VM_WRITE: Final = 0x00000002
VM_EXEC: Final = 0x00000004
VM_SHARED: Final = 0x00000008
VM_MAYREAD: Final = 0x00000010
VM_MAYWRITE: Final = 0x00000020
VM_MAYEXEC: Final = 0x00000040
VM_MAYSHARE: Final = 0x00000080
VM_UFFD_MISSING: Final = 0x00000200
VM_PFNMAP: Final = 0x00000400
VM_UFFD_WP: Final = 0x00001000
VM_LOCKED: Final = 0x00002000
VM_IO: Final = 0x00004000
VM_SEQ_READ: Final = 0x00008000
VM_RAND_READ: Final = 0x00010000
VM_DONTCOPY: Final = 0x00020000
VM_DONTEXPAND: Final = 0x00040000
VM_LOCKONFAULT: Final = 0x00080000
VM_ACCOUNT: Final = 0x00100000
VM_NORESERVE: Final = 0x00200000
VM_HUGETLB: Final = 0x00400000
VM_WIPEONFORK: Final = 0x02000000
VM_DONTDUMP: Final = 0x04000000
VM_SOFTDIRTY: Final = 0x08000000
VM_MIXEDMAP: Final = 0x10000000
VM_HUGEPAGE: Final = 0x20000000
VM_NOHUGEPAGE: Final = 0x40000000
VM_MERGEABLE: Final = 0x80000000
VM_SPECIAL: Final = VM_IO | VM_DONTEXPAND | VM_PFNMAP | VM_MIXEDMAP
VM_ACCESS_FLAGS: Final = VM_READ | VM_WRITE | VM_EXEC
VM_LOCKED_MASK: Final = VM_LOCKED | VM_LOCKONFAULT
VM_UFFD_FLAGS: Final = VM_UFFD_MISSING | VM_UFFD_WP


def vm_get_page_prot(vm_flags: int) -> Word:
    """Bits of a fresh entry; a private mapping's are read-only, as a store must fault first.

    Linux: vm_get_page_prot(), mm/mmap.c.
    """
    if not vm_flags & VM_ACCESS_FLAGS:
        return word(_PAGE_PROTNONE | _PAGE_ACCESSED)
    prot = _PAGE_PRESENT | _PAGE_USER | _PAGE_ACCESSED
    if not vm_flags & VM_EXEC:
        prot |= _PAGE_NX
    if vm_flags & VM_SHARED and vm_flags & VM_WRITE:
        prot |= _PAGE_RW
    return word(prot)


def vma_set_page_prot(vma: Vma) -> None:
    """Give *vma* what its flags say, without the right to store where a store must fault first.

    Linux: vma_set_page_prot(), mm/mmap.c.
    """
    notify = vma_wants_writenotify(vma)
    vma.vm_page_prot = vm_get_page_prot(vma.vm_flags & ~VM_SHARED if notify else vma.vm_flags)


def vma_wants_writenotify(vma: Vma) -> bool:
    """True for a shared mapping whose file, or who watches it, wants to know of the first store.

    Linux: vma_wants_writenotify(), mm/mmap.c.
    """
    if vma.vm_flags & (VM_WRITE | VM_SHARED) != VM_WRITE | VM_SHARED:
        return False
    if vma.vm_ops is not None and vma.vm_ops.page_mkwrite is not None:
        return True
    return not vma.vm_flags & VM_SOFTDIRTY


_DIRTIED: Final = word(_PAGE_DIRTY | _PAGE_SOFT_DIRTY)
_STORED: Final = word(_PAGE_RW | _DIRTIED)


def maybe_mkwrite(vma: Vma) -> Word:
    """What a store leaves in an entry of *vma*, writable only where the process may store.

    Where it may not, somebody else has stored for it (FOLL_FORCE). Linux: maybe_mkwrite() of
    pte_mkdirty(), include/linux/mm.h.
    """
    return _STORED if vma.vm_flags & VM_WRITE else _DIRTIED


@dataclass(slots=True, eq=False)
class AnonVma:
    """The VMAs in which the pages of one anonymous area may be mapped. Linux: struct anon_vma."""

    number: int
    rwsem: RwSemaphore  # that of the first one: all that descend from it have it in common
    vmas: list[Vma]  # the interval tree of the kernel, as a list; a parent's before its child's
    parent: AnonVma | None = None  # of the process that forked, None for the first


class Vma:
    """A stretch of address space with one meaning. Linux: struct vm_area_struct."""

    __slots__ = (
        "anon_vma",
        "anon_vma_chain",
        "vm_end",
        "vm_file",
        "vm_flags",
        "vm_mm",
        "vm_ops",
        "vm_page_prot",
        "vm_pgoff",
        "vm_policy",
        "vm_start",
        "vm_userfaultfd_ctx",
    )

    def __init__(self, mm: MmStruct, start: int, end: int, vm_flags: int, pgoff: int) -> None:
        self.vm_mm = mm
        self.vm_start = start
        self.vm_end = end  # first byte after it
        self.vm_flags = vm_flags
        self.vm_pgoff = pgoff  # in pages; of anonymous memory: the address it was mapped at
        self.vm_page_prot = vm_get_page_prot(vm_flags)
        self.vm_file: Any = None  # the File of mm/fs.py behind it
        self.vm_ops: VmOperations | None = None  # of that file
        self.vm_policy: Any = None  # the Mempolicy of mm/mempolicy.py; None is the task's
        self.vm_userfaultfd_ctx: Any = None  # the UserfaultfdCtx that faults go to, if any
        self.anon_vma: AnonVma | None = None  # where new anonymous pages of this VMA belong
        self.anon_vma_chain: list[AnonVma] = []  # every anon_vma that lists this VMA

    def __repr__(self) -> str:
        letters = "".join(
            letter if self.vm_flags & bit else "-"
            for letter, bit in (("r", VM_READ), ("w", VM_WRITE), ("x", VM_EXEC))
        )
        return f"<Vma {self.vm_start:#x}-{self.vm_end:#x} {letters}>"


def vma_is_anonymous(vma: Vma) -> bool:
    """True for memory without a file. Linux: vma_is_anonymous(), include/linux/mm.h."""
    return vma.vm_file is None


def vma_pages(vma: Vma) -> int:
    """Pages that *vma* spans. Linux: vma_pages(), include/linux/mm.h."""
    return (vma.vm_end - vma.vm_start) >> PAGE_SHIFT


def linear_page_index(vma: Vma, addrs: Addresses) -> Pfns:
    """Page offset of each address in its object. Linux: linear_page_index(), linux/pagemap.h."""
    return ((addrs - vma.vm_start) >> PAGE_SHIFT) + vma.vm_pgoff


class MmStruct:
    """An address space. Linux: struct mm_struct."""

    def __init__(self, mem: MemMap, name: str) -> None:
        self.mem = mem
        self.name = name
        self.pgd = int(mem.tables.alloc(1)[0])  # row of the top page table
        self.vmas: list[Vma] = []  # ascending addresses
        self.mmap_sem = RwSemaphore(mem.locks, f"mmap_sem of {name}")
        self.page_table_lock = SpinLock(mem.locks, f"page_table_lock of {name}")
        self.anon_rss = 0  # MM_ANONPAGES
        self.file_rss = 0  # MM_FILEPAGES: of files on disk
        self.shmem_rss = 0  # MM_SHMEMPAGES: of files that are swapped
        self.swapents = 0  # MM_SWAPENTS: swap entries in the page tables
        self.total_vm = 0  # pages
        self.locked_vm = 0  # pages
        self.notifiers: list[Any] = []  # the MmuNotifier of mm/mmu_notifier.py
        self.notifier_extras: dict[str, list[Any]] = {}  # those of them that have each of EXTRAS
        self.interval_notifiers: list[Any] = []  # its MmuIntervalNotifier, by start
        self.invalidate_seq = 2  # odd while one of those is told of a change
        self.invalidating: list[Any] = []  # every MmuNotifierRange between start and end
        self.hmm: Any = None  # the Hmm of hmm/mirror.py
        self.userfaultfds: list[Any] = []  # every open UserfaultfdCtx of mm/userfaultfd_k.py
        self.uffd_events: list[Any] = []  # for userland to hear of when mmap_sem is let go of
        self.uffd_wp = False  # some entry may have a bit for userfaultfd, or have had one
        self.memcg: Any = None  # the MemCgroup that pays for its pages; None is the root
        self.exited = False
        mem.mms.append(self)
