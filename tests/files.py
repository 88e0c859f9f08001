"""Mapped files, with sane defaults: where tests of files begin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mm import PAGE_SIZE, Machine
from mm.fault_file import filemap_map_pages
from mm.filemap import unlock_page
from mm.filemap_io import (
    filemap_fault,
    generic_file_read,
    generic_perform_write,
    read_cache_pages,
)
from mm.fs import File, FileOperations, Inode, InodeOperations
from mm.page_cache import cancel_dirty_page, set_page_dirty, set_page_dirty_nobuffers
from mm.swap import lru_add_drain_all, put_page
from mm.truncate import EVERYTHING, truncate_inode_pages_range, truncate_setsize
from mm.types import AddressSpace, AddressSpaceOperations, Vma, VmFault, VmOperations
from mm.typing import Faults, Mask, Pfns
from mm.vmscan import reclaim_pages
from tests.world import World, mapped_range, track


@dataclass
class Shared(World):
    """A World whose range is a shared mapping of `file`."""

    file: File | None = None

    def cache(self) -> Pfns:
        """The entries of the file's cache for each page of the range: PFN, 0, or ~slot."""
        return self.file.f_mapping.i_pages.load(np.arange(self.pages))

    def evict(self, *pages: int) -> int:
        """Have the file's *pages*, by default all that are in memory, reclaimed; how many were."""
        lru_add_drain_all(self.machine.mem)
        entries = self.cache()[list(pages) if pages else slice(None)]
        return reclaim_pages(self.machine.mem, entries[entries > 0])

    def private(self, name: str = "private") -> Shared:
        """The same part of the file in another process, mapped privately."""
        return self._mapped_by(name, "file|private")

    def shared(self, name: str = "shared") -> Shared:
        """The same part of the file in another process, shared as well."""
        return self._mapped_by(name, "file|shared")

    def _mapped_by(self, name: str, flags: str) -> Shared:
        other = self.seen_by(self.machine.spawn(name))
        other.addr = other.process.mmap(self.nbytes, flags=flags, file=self.file)
        return other


def mapped_file(pages: int = 5, *, filled: bool = True, prot: str = "rw", **options) -> Shared:
    """A process that maps all of a memfd of *pages* pages, each filled with its number."""
    world = mapped_range(pages=1, filled=False, **options)
    file = world.machine.memfd_create("test")
    file.truncate(pages * PAGE_SIZE)
    world.process.munmap(world.addr, PAGE_SIZE)
    addr = world.process.mmap(pages * PAGE_SIZE, prot, file=file)
    shared = Shared(
        world.machine, world.process, world.gpu, addr, pages, world.free_at_boot, file=file
    )
    track(shared)
    if filled:
        shared.fill()
    return shared


class Disk:
    """Bytes that a file is read from and written to, uint8[n]; pages of `bad` cannot be read."""

    def __init__(self, data: bytes) -> None:
        self.data = np.frombuffer(data.ljust(-(-len(data) // PAGE_SIZE) * PAGE_SIZE, b"\0"), "u1")
        self.data = self.data.reshape(-1, PAGE_SIZE).copy()
        self.bad: set[int] = set()
        self.reads: list[list[int]] = []  # offsets of the pages of each call
        self.mkwrites: list[list[int]] = []

    def readpages(self, mapping: AddressSpace, pfns: Pfns) -> Mask:
        mem, indexes = mapping.mem, mapping.mem.index[pfns]
        self.reads.append(indexes.tolist())
        mem.payload[pfns] = self.data[indexes]
        return ~np.isin(indexes, list(self.bad))

    def writepage(self, mapping: AddressSpace, pfns: Pfns) -> Mask:
        mem = mapping.mem
        self.data[mem.index[pfns]] = mem.payload[pfns]
        cancel_dirty_page(mapping, pfns)
        return np.ones(pfns.size, dtype=np.bool_)

    def write_begin(self, file: File, pos: int, nbytes: int) -> Pfns:
        indexes = np.arange(pos // PAGE_SIZE, (pos + nbytes - 1) // PAGE_SIZE + 1)
        return read_cache_pages(file.f_mapping, indexes)[0]

    def write_end(self, file: File, pos: int, nbytes: int, pfns: Pfns) -> None:
        set_page_dirty(file.f_inode.mem, pfns)
        unlock_page(file.f_inode.mem, pfns)
        put_page(file.f_inode.mem, pfns)

    def page_mkwrite(self, vma: Vma, pfns: Pfns) -> Faults:
        indexes = vma.vm_mm.mem.index[pfns]
        self.mkwrites.append(indexes.tolist())
        return np.where(np.isin(indexes, list(self.bad)), VmFault.SIGBUS, 0).astype(np.uint16)

    def mmap(self, file: File, vma: Vma) -> None:
        vma.vm_ops = VmOperations(
            fault=filemap_fault, map_pages=filemap_map_pages, page_mkwrite=self.page_mkwrite
        )


def disk_file(machine: Machine, data: bytes) -> tuple[File, Disk]:
    """An open file on a disk that holds *data*."""
    disk = Disk(data)
    inode = Inode(
        machine.mem,
        InodeOperations(
            setattr=truncate_setsize,
            evict_inode=lambda inode: truncate_inode_pages_range(inode.i_mapping, 0, EVERYTHING),
        ),
        FileOperations(read=generic_file_read, write=generic_perform_write, mmap=disk.mmap),
        AddressSpaceOperations(
            set_page_dirty=set_page_dirty_nobuffers,
            readpages=disk.readpages,
            writepage=disk.writepage,
            write_begin=disk.write_begin,
            write_end=disk.write_end,
        ),
    )
    inode.i_size = len(data)
    return File(inode, "disk"), disk
