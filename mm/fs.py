"""Files: what is open, and the inode behind it. Linux: include/linux/fs.h, fs/file_table.c.

    File     somebody has it open, or maps it: each VMA counts as one who does
    Inode    the file itself, with the cache of its pages; gone when nobody has it open any more

What a kind of file does stands in tables of functions: a user calls File.read(), and that the
`read` of `FileOperations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mm.errors import BadFile, FileTooLarge, InvalidArgument, NotSupported
from mm.errseq import errseq_sample
from mm.locking import RwSemaphore
from mm.memparse import Size, memparse
from mm.types import AddressSpace, AddressSpaceOperations, MemMap, Vma
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Payload
from mm.xarray import MAX_INDEX, XA_MARK_0, XA_MARK_1, XA_MARK_2

FMODE_READ: Final = 1
FMODE_WRITE: Final = 2
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
MAX_LFS_FILESIZE: Final = (MAX_INDEX << PAGE_SHIFT) - 1

# Marks of the entries of i_pages.
PAGECACHE_TAG_DIRTY: Final = XA_MARK_0
PAGECACHE_TAG_WRITEBACK: Final = XA_MARK_1
PAGECACHE_TAG_TOWRITE: Final = XA_MARK_2

_FALLOCATE: Final = {"keep_size": FALLOC_FL_KEEP_SIZE, "punch_hole": FALLOC_FL_PUNCH_HOLE}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOperations:
    """What can be done with a kind of file; what is None cannot. Linux: struct file_operations.

    read(file, pos, out)                fill *out*, uint8[n], which the file covers; the bytes read
    write(file, pos, data)              store *data*, uint8[n]; the bytes stored
    mmap(file, vma)                     give *vma* its vm_ops
    fallocate(file, mode, pos, nbytes)  FALLOC_FL_* of a range
    fsync(file, start, end)             store what has changed in [start, end)
    release(file)                       nobody has it open any more
    """

    read: Callable[[File, int, Payload], int] | None = None
    write: Callable[[File, int, Payload], int] | None = None
    mmap: Callable[[File, Vma], None] | None = None
    fallocate: Callable[[File, int, int, int], None] | None = None
    fsync: Callable[[File, int, int], None] | None = None
    release: Callable[[File], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InodeOperations:
    """What a file system does to its inodes.

    setattr(inode, size)    the file has *size* bytes from now on; the caller holds i_rwsem
    evict_inode(inode)      nobody has it any more: drop its pages, and all else

    Linux: struct inode_operations, and struct super_operations for the second.
    """

    setattr: Callable[[Inode, int], None]
    evict_inode: Callable[[Inode], None]


class Inode:
    """A file. Linux: struct inode, include/linux/fs.h.

    i_size: in bytes; i_count: who has it; i_private: what its file system knows of it besides.
    """

    def __init__(
        self,
        mem: MemMap,
        i_op: InodeOperations,
        i_fop: FileOperations,
        a_ops: AddressSpaceOperations,
        i_private: Any = None,
    ) -> None:
        number = mem.next_mapping
        mem.next_mapping += 1
        self.mem = mem
        self.i_op = i_op
        self.i_fop = i_fop
        self.i_private = i_private
        self.i_rwsem = RwSemaphore(mem.locks, f"i_rwsem of inode {number}")
        self.i_size = 0
        self.i_nlink = 0  # names that it has; without one it is gone with its last user
        self.i_count = 1
        i_mmap_rwsem = RwSemaphore(mem.locks, f"i_mmap_rwsem of inode {number}")
        self.i_mapping = AddressSpace(mem, number, self, a_ops, i_mmap_rwsem)
        mem.mappings[number] = self.i_mapping

    def __repr__(self) -> str:
        return f"<Inode {self.i_mapping.number}, {self.i_size:#x} bytes>"


def alloc_anon_inode(mem: MemMap, a_ops: AddressSpaceOperations) -> Inode:
    """An inode of no file, for a driver: what `mapping` of its pages leads to, until iput().

    The driver has let go of all of them by then. Linux: alloc_anon_inode(), fs/libfs.c.
    """
    i_op = InodeOperations(setattr=lambda inode, size: None, evict_inode=lambda inode: None)
    return Inode(mem, i_op, FileOperations(), a_ops)


def ihold(inode: Inode) -> None:
    """One more who has *inode*. Linux: ihold(), fs/inode.c."""
    with inode.mem.locks.atomic:
        inode.i_count += 1


def iput(inode: Inode) -> None:
    """One less who has *inode*; the last one's going ends it. Linux: iput(), fs/inode.c."""
    with inode.mem.locks.atomic:
        inode.i_count -= 1
        last = not inode.i_count
    if last:
        inode.i_op.evict_inode(inode)
        del inode.mem.mappings[inode.i_mapping.number]


def i_pages_end(inode: Inode) -> int:
    """The first page offset that is beyond the end of the file.

    Linux: DIV_ROUND_UP(i_size_read(inode), PAGE_SIZE).
    """
    return (inode.i_size + PAGE_SIZE - 1) >> PAGE_SHIFT


class File:
    """An open file, until close(); `with` closes. Linux: struct file, include/linux/fs.h.

    It takes the caller's hold on *inode*. A mapping of it goes on when it is closed.
    """

    def __init__(self, inode: Inode, name: str, f_mode: int = FMODE_READ | FMODE_WRITE) -> None:
        self.name = name
        self.f_inode = inode
        self.f_mapping = inode.i_mapping
        self.f_op = inode.i_fop
        self.f_mode = f_mode
        self.f_pos = 0
        self.f_ra_prev = 0  # the page after the last that was read
        self.f_wb_err = errseq_sample(inode.i_mapping.wb_err)  # errors that it has heard of
        self.f_count = 1  # its user, and the VMAs that map it
        self.closed = False
        inode.mem.files.append(self)

    def __repr__(self) -> str:
        return f"<File {self.name}, {self.f_inode.i_size:#x} bytes>"

    def __enter__(self) -> File:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes that the file has."""
        return self.f_inode.i_size

    def read(self, pos: int, nbytes: int) -> bytes:
        """Up to *nbytes* from *pos* on, fewer at the end of the file. Linux: pread(2)."""
        if pos < 0 or nbytes < 0:
            raise InvalidArgument(f"read: {nbytes} bytes from {pos} are not in a file")
        out = np.empty(max(min(nbytes, self.size - pos), 0), dtype=np.uint8)
        return out[: self.readinto(pos, out)].tobytes()

    def readinto(self, pos: int, buffer: Any) -> int:
        """As read(), into *buffer*, anything with a buffer that can be written; how many bytes.

        Raises InputOutputError, OutOfMemory where not one can be had. Linux: pread(2).
        """
        read = self._can("read", self.f_op.read, FMODE_READ)
        out = np.frombuffer(buffer, dtype=np.uint8)
        if pos < 0 or not out.flags.writeable:
            raise InvalidArgument(f"readinto: {pos} is not in a file, or nothing can be stored")
        return read(self, pos, out[: max(self.size - pos, 0)])

    def write(self, pos: int, data: Any) -> int:
        """Store *data*, anything with a buffer, from *pos* on; how many bytes were stored.

        Fewer than asked for where memory or room ran out in the middle; raises OutOfMemory,
        NoSpace where not one could be, FileTooLarge. Linux: pwrite(2).
        """
        write = self._can("write", self.f_op.write, FMODE_WRITE)
        raw = np.frombuffer(data, dtype=np.uint8)
        if pos < 0:
            raise InvalidArgument(f"write: {pos} is not in a file")
        if pos + raw.size > MAX_LFS_FILESIZE:
            raise FileTooLarge(f"write: no file has bytes up to {pos + raw.size:#x}")
        with self.f_inode.i_rwsem.write():
            return write(self, pos, raw)

    def truncate(self, size: Size) -> None:
        """Let the file have *size* bytes; what is added reads as zeros. Linux: ftruncate(2).

        Who maps what is cut off gets BusError from now on, and loses private copies of it too.
        """
        self._can("truncate", self.f_inode.i_op.setattr, FMODE_WRITE)
        nbytes = memparse(size)
        if nbytes > MAX_LFS_FILESIZE:
            raise FileTooLarge(f"truncate: no file has {nbytes:#x} bytes")
        with self.f_inode.i_rwsem.write():
            self.f_inode.i_op.setattr(self.f_inode, nbytes)

    def fallocate(self, mode: str | int, pos: int, nbytes: Size) -> None:
        """Find room for a range; with *mode* "punch_hole|keep_size", empty it.

        *mode*: words between bars, "" for none, or FALLOC_FL_*. Raises InvalidArgument,
        NotSupported, NoSpace. Linux: fallocate(2).
        """
        self._can("fallocate", self.f_op.fallocate, FMODE_WRITE)
        size = memparse(nbytes)
        if isinstance(mode, str):
            words = set(mode.split("|")) - {""}
            if words - _FALLOCATE.keys():
                raise NotSupported(f"fallocate: {mode!r} is not of {'|'.join(_FALLOCATE)}")
            mode = sum(_FALLOCATE[word] for word in words)
        vfs_fallocate(self, mode, pos, size)

    def fsync(self) -> None:
        """Store what has changed; comes back when it is. Raises InputOutputError, NoSpace.

        Linux: fsync(2).
        """
        self._can("fsync", self.f_op.fsync, 0)(self, 0, MAX_LFS_FILESIZE)

    def close(self) -> None:
        """The user lets go of it; a second call does nothing. Linux: close(2)."""
        if not self.closed:
            self.closed = True
            fput(self)

    def _can(self, call: str, operation: Any, mode: int) -> Any:
        """*operation*, which *call* needs, of a file that is open with *mode*."""
        if self.closed or self.f_mode & mode != mode:
            how = "closed" if self.closed else "not open for that"
            raise BadFile(f"{call}: {self!r} is {how}")
        if operation is None:
            raise InvalidArgument(f"{call}: {self!r} is of a kind that has no {call}")
        return operation


def get_file(file: File) -> None:
    """One more who has *file* open. Linux: get_file(), include/linux/fs.h."""
    with file.f_inode.mem.locks.atomic:
        file.f_count += 1


def fput(file: File) -> None:
    """One less who has *file* open. Linux: fput(), fs/file_table.c."""
    mem = file.f_inode.mem
    with mem.locks.atomic:
        file.f_count -= 1
        last = not file.f_count
        if last:
            mem.files.remove(file)
    if last:
        if file.f_op.release is not None:
            file.f_op.release(file)
        iput(file.f_inode)


def vfs_fallocate(file: File, mode: int, pos: int, nbytes: int) -> None:
    """As File.fallocate(), also of a file that is mapped and closed.

    Linux: vfs_fallocate(), fs/open.c.
    """
    if file.f_op.fallocate is None:
        raise NotSupported(f"fallocate: {file!r} is of a kind that has no holes")
    if mode & FALLOC_FL_PUNCH_HOLE and not mode & FALLOC_FL_KEEP_SIZE:
        raise NotSupported("fallocate: punch_hole goes with keep_size")
    if pos < 0 or nbytes <= 0:
        raise InvalidArgument(f"fallocate: {nbytes} bytes from {pos} are not in a file")
    if pos + nbytes > MAX_LFS_FILESIZE:
        raise FileTooLarge(f"fallocate: no file has bytes up to {pos + nbytes:#x}")
    with file.f_inode.i_rwsem.write():
        file.f_op.fallocate(file, mode, pos, nbytes)
