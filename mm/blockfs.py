"""A small file system on a block device, with files in one directory.

    fs = machine.mount("disk.img")         made by mkfs(), or by mount() where there is no file
    file = fs.create("a")                  read, written, mapped, truncated as any File
    file.fsync()                           what was stored is on the device, and found after a mount
    fs.unmount()

An inode stays in memory, with its pages, until it is unlinked or the file system is unmounted:
closing a file stores nothing and forgets nothing. Linux: fs/super.c, fs/namei.c, fs/sync.c.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from mm.blkdev import BlockDevice, blkdev_open, blkdev_put
from mm.blockfs_format import NAME_MAX, Metadata, check_block_size, mkfs, read_super
from mm.blockfs_inode import BlockInode
from mm.blockfs_super import BlockSuper
from mm.errors import Busy, Exists, InvalidArgument, NoEntry
from mm.fs import File, ihold, iput
from mm.memparse import Size, format_size, memparse
from mm.types import MemMap, payload_of
from mm.typing import PAGE_SIZE
from mm.writeback import filemap_write_and_wait_range, writeback_error

DEFAULT_SIZE: Final = "64MiB"  # of an image that mount() makes


class BlockFs:
    """A mounted file system; made by `Machine.mount()`. `with` unmounts it."""

    def __init__(self, mem: MemMap, bdev: BlockDevice, meta: Metadata) -> None:
        self.mem = mem
        self.super = BlockSuper(mem, bdev, meta)
        self.inodes: dict[int, BlockInode] = {}  # that were opened, by number
        self.mounted = True
        mem.super_blocks.append(self)

    def __repr__(self) -> str:
        layout = self.super.layout
        size = format_size(layout.blocks * layout.block_size)
        return f"<BlockFs {self.device.name}, {size} in blocks of {layout.block_size}>"

    def __enter__(self) -> BlockFs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unmount()

    @property
    def device(self) -> BlockDevice:
        """The device that it lies on."""
        return self.super.s_bdev

    @property
    def free_bytes(self) -> int:
        """Room for files. Linux: statfs(2)."""
        return self.super.nr_free * self.super.layout.block_size

    def listdir(self) -> list[str]:
        """The names of all files, sorted. Linux: getdents(2)."""
        return sorted(self.super.names)

    def create(self, name: str) -> File:
        """A new, empty file, open. Raises Exists, NoSpace, InvalidArgument. Linux: creat(2)."""
        self._check(name)
        if name in self.super.names:
            raise Exists(f"{self!r} has a file {name!r} already; open() it")
        self.super.new_file(name)
        return self.open(name)

    def open(self, name: str) -> File:
        """The file called *name*. Raises NoEntry. Linux: open(2)."""
        self._check(name)
        if name not in self.super.names:
            raise NoEntry(f"{self!r} has no file {name!r}; create() it")
        ino = self.super.names[name]
        if ino not in self.inodes:
            self.inodes[ino] = BlockInode(self.super, ino)
        inode = self.inodes[ino]
        ihold(inode)
        return File(inode, name)

    def unlink(self, name: str) -> None:
        """Take the name *name* away; who has the file open keeps it till then.

        Raises NoEntry. Linux: unlink(2).
        """
        self.open(name).close()  # so that an inode is there, whose going frees its blocks
        inode = self.inodes.pop(self.super.unlink(name))
        inode.i_nlink = 0
        iput(inode)

    def sync(self) -> None:
        """Have all that was stored on the device. Raises the first error. Linux: syncfs(2)."""
        self._alive()
        self._sync(clean=False)

    def _sync(self, *, clean: bool) -> None:
        errors = [
            writeback_error(err, inode)
            for inode in tuple(self.inodes.values())
            if (err := filemap_write_and_wait_range(inode.i_mapping))
        ]
        self.super.commit(clean=clean)
        if errors:
            raise errors[0]

    def unmount(self) -> None:
        """Store everything, and let go of the device; a second call does nothing.

        Raises Busy where a file is open or mapped; the first error of storing, but then it is
        unmounted all the same, and what could not be stored is lost. Linux: umount(2).
        """
        if not self.mounted:
            return
        inodes = (file.f_inode for file in self.mem.files)
        users = [repr(i) for i in inodes if isinstance(i, BlockInode) and i.i_sb is self.super]
        if users:
            raise Busy(f"{self!r}: {', '.join(users[:4])} still open or mapped; close that first")
        self.mounted = False
        try:
            self._sync(clean=True)
        finally:
            for inode in self.inodes.values():
                iput(inode)
            self.inodes.clear()
            self.mem.super_blocks.remove(self)
            blkdev_put(self.device)

    def _alive(self) -> None:
        if not self.mounted:
            raise InvalidArgument(f"{self!r} is unmounted; mount it again")

    def _check(self, name: str) -> None:
        self._alive()
        size = len(name.encode(errors="replace"))
        if not 0 < size <= NAME_MAX or "\0" in name or "/" in name:
            raise InvalidArgument(
                f"{name!r} is no name for a file: 1 to {NAME_MAX} bytes, without slash and NUL"
            )


def mount(
    mem: MemMap,
    path: str | os.PathLike[str],
    block_size: Size | None = None,
    size: Size | None = None,
) -> BlockFs:
    """Mount the image *path*; where there is no such file, make one of *size* first.

    Raises InvalidArgument where it is no file system, or one with other blocks than *block_size*;
    Corrupted, InputOutputError, Busy where it is mounted. Linux: mount(2).
    """
    payload_of(mem)
    wanted = None if block_size is None else check_block_size(memparse(block_size))
    if not Path(path).exists():
        mkfs(path, DEFAULT_SIZE if size is None else size, wanted or PAGE_SIZE)
    bdev = blkdev_open(path, mem.vmstat)
    try:
        meta = read_super(bdev)
        found = meta.layout.block_size
        if wanted not in (None, found):
            raise InvalidArgument(f"{bdev.name} has blocks of {found} bytes, not of {wanted}")
        return BlockFs(mem, bdev, meta)
    except BaseException:
        blkdev_put(bdev)
        raise
