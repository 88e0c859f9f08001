"""Files of a blockfs: the tables of functions by which the core reads, writes and maps them.

A page that a process wants is read by blocks; one that is stored to gets its blocks then, so that
writeback need not look for room. Linux: fs/ext2/inode.c, fs/ext2/file.c.
"""

from __future__ import annotations

import numpy as np

from mm.blockfs_super import BlockSuper
from mm.buffer import (
    block_commit_write,
    block_invalidatepage,
    block_page_mkwrite,
    block_prepare_write,
    block_read_full_page,
    block_write_full_page,
    set_page_dirty_buffers,
    try_to_free_buffers,
)
from mm.errors import FileTooLarge, NoSpace, OutOfMemory
from mm.fault_file import filemap_map_pages
from mm.filemap import lock_page, unlock_page
from mm.filemap_io import (
    filemap_fault,
    generic_file_read,
    generic_perform_write,
    grab_cache_pages,
    read_mapping_page,
)
from mm.fs import File, FileOperations, Inode, InodeOperations
from mm.migrate import buffer_migrate_page
from mm.page_flags import PG_dirty, PG_writeback
from mm.swap import put_page
from mm.truncate import EVERYTHING, truncate_inode_pages_range, truncate_setsize
from mm.types import AddressSpace, AddressSpaceOperations, Vma, VmFault, VmOperations, payload_of
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Faults, Indices, Mask, Pfns, pages
from mm.vectors import has, some
from mm.writeback import (
    balance_dirty_pages,
    clear_page_dirty_for_io,
    file_write_and_wait_range,
    writeback_error,
)


class BlockInode(Inode):
    """A file of a blockfs that somebody has opened since the mount. Linux: ext2_inode_info."""

    def __init__(self, sb: BlockSuper, ino: int) -> None:
        super().__init__(sb.mem, _inode_operations, _file_operations, _aops)
        self.i_sb = sb
        self.i_ino = ino
        self.i_blkbits = sb.layout.block_size.bit_length() - 1
        self.i_size = sb.files[ino].size
        self.i_nlink = 1

    def set_size(self, size: int) -> None:
        """It has *size* bytes, in memory and for the next commit. Linux: i_size_write()."""
        self.i_size = size
        self.i_sb.set_size(self.i_ino, size)


def get_block(inode: BlockInode, blocks: Indices, create: bool) -> tuple[Indices, Mask]:
    """Where *blocks* of *inode* are, and which are new. Linux: ext2_get_block()."""
    return inode.i_sb.map_blocks(inode.i_ino, inode.i_mapping, blocks, create=create)


# Pages ------------------------------------------------------------------------------------------


def blockfs_readpages(mapping: AddressSpace, pfns: Pfns) -> Mask:
    """Fill *pfns* from the device; one that cannot be read has no buffers either.

    Linux: ext2_readpages(), fs/ext2/inode.c.
    """
    good = block_read_full_page(mapping, pfns, get_block)
    try_to_free_buffers(mapping, pfns[~good])
    return good


def blockfs_writepage(mapping: AddressSpace, pfns: Pfns) -> Mask:
    """Send what is dirty of *pfns* to the device; True where a page is clean, and there.

    Linux: ext2_writepage(), fs/ext2/inode.c.
    """
    dirty = clear_page_dirty_for_io(mapping, pfns)
    block_write_full_page(mapping, pfns[dirty], get_block)
    return ~has(mapping.mem.flags[pfns], PG_dirty | PG_writeback)


def blockfs_write_begin(file: File, pos: int, nbytes: int) -> Pfns:
    """The pages of [*pos*, *pos* + *nbytes*), locked, with a reference, and with blocks.

    Fewer, the first of them, where memory or the device is short. Raises OutOfMemory, NoSpace,
    InputOutputError where it would be none. Linux: ext2_write_begin(), block_write_begin().
    """
    inode = file.f_inode
    assert isinstance(inode, BlockInode)
    _check_size(inode, pos + nbytes)
    try:
        return _write_begin(inode, pos, nbytes)
    except NoSpace:
        if not inode.i_sb.freed:
            raise
    inode.i_sb.commit()  # lets go of what was freed. Linux: ext4_should_retry_alloc()
    return _write_begin(inode, pos, nbytes)


def _write_begin(inode: BlockInode, pos: int, nbytes: int) -> Pfns:
    mapping, mem = inode.i_mapping, inode.mem
    indexes = np.arange(pos >> PAGE_SHIFT, (pos + nbytes + PAGE_SIZE - 1) >> PAGE_SHIFT)
    pfns = grab_cache_pages(mapping, indexes)
    if not pfns.size:
        raise OutOfMemory(f"write: no frame for a page of {inode!r}; unmap or truncate something")
    try:
        status = block_prepare_write(mapping, pfns, pos, nbytes, get_block)
    except BaseException:
        unlock_page(mem, pfns)
        put_page(mem, pfns)
        raise
    if not some(status):
        return pfns
    count = int((status != 0).argmax())
    ready, failed = pfns[:count], pfns[count:]
    unlock_page(mem, failed)
    put_page(mem, failed)
    _write_failed(inode, indexes.item(count) << PAGE_SHIFT)
    if not count:
        raise writeback_error(status.item(0), inode)
    return ready


def _write_failed(inode: BlockInode, end: int) -> None:
    """Nothing is beyond *end*, or the end of the file: blocks that a write has got in vain go.

    Linux: ext2_write_failed(), fs/ext2/inode.c.
    """
    end = max(end, inode.i_size)
    truncate_inode_pages_range(inode.i_mapping, end, EVERYTHING)
    inode.i_sb.truncate(inode.i_ino, _blocks(inode, end))


def _blocks(inode: BlockInode, nbytes: int) -> int:
    """Blocks that *nbytes* bytes of the file take."""
    return (nbytes + (1 << inode.i_blkbits) - 1) >> inode.i_blkbits


def blockfs_write_end(file: File, pos: int, nbytes: int, pfns: Pfns) -> None:
    """*pfns* are written to: dirty, unlocked, and no more than may be.

    Linux: generic_write_end(), fs/buffer.c; balance_dirty_pages_ratelimited().
    """
    inode, mem = file.f_inode, file.f_inode.mem
    assert isinstance(inode, BlockInode)
    block_commit_write(inode.i_mapping, pfns, pos, nbytes)
    if pos + nbytes > inode.i_size:
        inode.set_size(pos + nbytes)
    unlock_page(mem, pfns)
    put_page(mem, pfns)
    balance_dirty_pages(mem)


# Files ------------------------------------------------------------------------------------------


def blockfs_fsync(file: File, start: int, end: int) -> None:
    """Have the file on the device, and what says where it is; errors are told once.

    Raises InputOutputError, NoSpace. Linux: ext2_fsync(), fs/ext2/file.c.
    """
    inode = file.f_inode
    assert isinstance(inode, BlockInode)
    err = file_write_and_wait_range(file, start >> PAGE_SHIFT, (end >> PAGE_SHIFT) + 1)
    if err:
        raise writeback_error(err, file)
    inode.i_sb.commit()


def blockfs_setattr(inode: Inode, size: int) -> None:
    """Let *inode* have *size* bytes; what it loses is gone, what it gains is a hole.

    Raises FileTooLarge; InputOutputError where the block that the end is in cannot be read.
    Linux: ext2_setsize(), fs/ext2/inode.c.
    """
    assert isinstance(inode, BlockInode)
    _check_size(inode, size)
    if size < inode.i_size:
        _zero_tail(inode, size)
        truncate_setsize(inode, size)
        inode.i_sb.truncate(inode.i_ino, _blocks(inode, size))
    inode.set_size(size)


def _check_size(inode: BlockInode, size: int) -> None:
    most = inode.i_sb.layout.max_bytes
    if size > most:
        raise FileTooLarge(f"{inode!r} cannot have {size:#x} bytes, at most {most:#x}")


def _zero_tail(inode: BlockInode, size: int) -> None:
    """Zeros from *size* to the end of its block, in memory, for the device to have later.

    Linux: block_truncate_page(), fs/buffer.c.
    """
    mem, block_size = inode.mem, 1 << inode.i_blkbits
    found, _ = get_block(inode, pages(size >> inode.i_blkbits), False)
    if not size % block_size or found.item() < 0:
        return
    pfns = read_mapping_page(inode, inode.i_mapping, size >> PAGE_SHIFT)
    tail = -size % block_size
    payload_of(mem)[pfns, size % PAGE_SIZE : size % PAGE_SIZE + tail] = 0
    block_commit_write(inode.i_mapping, pfns, size, tail)
    unlock_page(mem, pfns)
    put_page(mem, pfns)


def blockfs_evict_inode(inode: Inode) -> None:
    """Nobody has *inode* any more. Linux: ext2_evict_inode(), fs/ext2/inode.c."""
    assert isinstance(inode, BlockInode)
    truncate_inode_pages_range(inode.i_mapping, 0, EVERYTHING)
    if not inode.i_nlink:
        inode.i_sb.free_file(inode.i_ino)


def blockfs_page_mkwrite(vma: Vma, pfns: Pfns) -> Faults:
    """Find blocks for locked *pfns*, which are about to be stored to.

    Where there are none but those that a commit lets go of, the locks are given up for that.
    Linux: ext4_page_mkwrite(), fs/ext4/inode.c.
    """
    inode = vma.vm_file.f_inode
    faults = block_page_mkwrite(vma, pfns, get_block)
    if inode.i_sb.freed and some(faults & VmFault.SIGBUS):
        unlock_page(inode.mem, pfns)
        try:
            inode.i_sb.commit()
        finally:
            lock_page(inode.mem, pfns)
        faults = block_page_mkwrite(vma, pfns, get_block)
    return faults


_aops = AddressSpaceOperations(
    set_page_dirty=set_page_dirty_buffers,
    readpages=blockfs_readpages,
    writepage=blockfs_writepage,
    write_begin=blockfs_write_begin,
    write_end=blockfs_write_end,
    invalidatepage=block_invalidatepage,
    releasepage=try_to_free_buffers,
    migratepage=buffer_migrate_page,
)
_vm_ops = VmOperations(
    fault=filemap_fault, map_pages=filemap_map_pages, page_mkwrite=blockfs_page_mkwrite
)


def blockfs_mmap(file: File, vma: Vma) -> None:
    """Linux: ext4_file_mmap(), fs/ext4/file.c."""
    vma.vm_ops = _vm_ops


_file_operations = FileOperations(
    read=generic_file_read, write=generic_perform_write, mmap=blockfs_mmap, fsync=blockfs_fsync
)
_inode_operations = InodeOperations(setattr=blockfs_setattr, evict_inode=blockfs_evict_inode)
