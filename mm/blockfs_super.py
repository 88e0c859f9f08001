"""A mounted blockfs: which blocks are whose, and how that gets to the device.

    map_blocks    where blocks of a file are; room for those that have none
    free_blocks   what a file has lost waits until the device knows that
    commit        data of fresh blocks first, then all that says what is where

All that says what is where is in memory from mount to unmount. A commit writes what of it
has changed, for whichever file it is called, so that a remounted image shows one moment of the
whole. Blocks that were freed are nobody's until then: else a crash could leave a file with what
another one has stored since. Linux: fs/ext4/, which gets there by a journal.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.blkdev import WRITE, BlockDevice, submit_bio_wait
from mm.blockfs_extents import Extents
from mm.blockfs_format import (
    DiskInode,
    Metadata,
    clear_inode,
    encode_inode,
    read_inodes,
)
from mm.errors import InputOutputError, NoSpace
from mm.locking import RwSemaphore, SpinLock
from mm.types import AddressSpace, MemMap
from mm.typing import Indices, Mask, Payload
from mm.vectors import joined, places, some
from mm.writeback import WB_SYNC_ALL, WritebackControl, filemap_fdatawait_range, write_cache_pages

_SCAN: Final = 1 << 15  # blocks that a search looks at in one go


class BlockSuper:
    """What is known of a mounted file system. Linux: struct super_block, ext4_sb_info.

    files: every file by number, DiskInode; names: their numbers; used: bool[blocks], which blocks
    are somebody's; freed: those of them that nobody has since the last commit.
    """

    def __init__(self, mem: MemMap, bdev: BlockDevice, meta: Metadata) -> None:
        self.mem, self.s_bdev = mem, bdev
        self.meta, self.layout = meta, meta.layout
        self.files: dict[int, DiskInode] = read_inodes(bdev, meta)
        self.names = {inode.name: ino for ino, inode in self.files.items()}
        self.used: Mask = self.meta.used()
        self.freed: list[Indices] = []
        self.dirty: set[int] = set()  # inodes that differ from the device's
        self.ordered: dict[int, AddressSpace] = {}  # what has fresh blocks, to be written first
        self.lock = SpinLock(mem.locks, f"lock of {bdev.name}")  # of all of these
        self._committing = RwSemaphore(mem.locks, f"commit of {bdev.name}")
        self.meta.seal(clean=False)
        self.meta.commit(bdev)

    @property
    def nr_free(self) -> int:
        """Blocks that a file could have, after a commit at the latest. Linux: statfs(2)."""
        return int(np.count_nonzero(~self.used)) + joined(self.freed).size

    def map_blocks(
        self, ino: int, mapping: AddressSpace, blocks: Indices, *, create: bool
    ) -> tuple[Indices, Mask]:
        """The device's block for each of *blocks* of file *ino*, -1 in a hole; which are new.

        With *create* holes get blocks, in the order of the file, as far as there is room.
        Linux: ext4_map_blocks(), fs/ext4/inode.c.
        """
        inode = self.files[ino]
        with self.lock:
            found = inode.extents.lookup(blocks)
            holes = found < 0
            if create and some(holes):
                self._fill_holes(inode, np.unique(blocks[holes]))
                self.dirty.add(ino)
                self.ordered[ino] = mapping
                found = inode.extents.lookup(blocks)
        return found, holes & (found >= 0)

    def _fill_holes(self, inode: DiskInode, holes: Indices) -> None:
        """Blocks for *holes*, or the first of them, and for the extents that makes."""
        old = inode.extents
        last = old.start[-1:] + old.count[-1:]
        fresh = self._take(holes.size, last.item() if last.size else self.layout.data)
        inode.extents = Extents(old.logical, old.start, old.count)
        inode.extents.insert(holes[: fresh.size], fresh)
        more = self.layout.chain_blocks(inode.extents.size) - inode.chain.size
        if more > 0:
            links = self._take(more, self.layout.data)
            if links.size < more:  # they would not be found again
                self.used[fresh] = self.used[links] = False
                inode.extents = old
            else:
                inode.chain = np.concatenate((inode.chain, links))

    def _take(self, count: int, goal: int) -> Indices:
        """At most *count* free blocks, from *goal* on and then from the first.

        Linux: ext2_new_blocks(), fs/ext2/balloc.c.
        """
        taken = []
        for start, end in ((goal, self.layout.blocks), (self.layout.data, goal)):
            at = start
            while at < end and count:
                stop = min(at + max(count, _SCAN), end)
                free = places(~self.used[at:stop])[:count] + at
                self.used[free] = True
                taken.append(free)
                count -= free.size
                at = stop
        return joined(taken)

    def truncate(self, ino: int, first: int) -> None:
        """File *ino* has no blocks from its block *first* on. Linux: ext2_truncate_blocks()."""
        inode = self.files[ino]
        with self.lock:
            extents = Extents(inode.extents.logical, inode.extents.start, inode.extents.count)
            self.freed.append(extents.truncate(first))
            links = self.layout.chain_blocks(extents.size)
            self.freed.append(inode.chain[links:])
            inode.extents, inode.chain = extents, inode.chain[:links]
            self.dirty.add(ino)

    def set_size(self, ino: int, size: int) -> None:
        """File *ino* has *size* bytes. Linux: i_size_write(), mark_inode_dirty()."""
        with self.lock:
            self.files[ino].size = size
            self.dirty.add(ino)

    def new_file(self, name: str) -> int:
        """The number of a new, empty file. Raises NoSpace. Linux: ext2_new_inode()."""
        with self.lock:
            ino = next((i for i in range(self.layout.inodes) if i not in self.files), None)
            if ino is None:
                raise NoSpace(
                    f"{self.s_bdev.name}: all {self.layout.inodes} inodes are used; unlink "
                    f"something, or make it with more inodes="
                )
            nothing = np.zeros(0, dtype=np.int64)
            self.files[ino] = DiskInode(name, 0, Extents.none(), nothing)
            self.names[name] = ino
            self.dirty.add(ino)
        return ino

    def unlink(self, name: str) -> int:
        """Nobody finds file *name* any more; its number. Linux: ext2_unlink(), fs/ext2/namei.c."""
        with self.lock:
            ino = self.names.pop(name)
            self.dirty.add(ino)
        return ino

    def free_file(self, ino: int) -> None:
        """Nobody has file *ino*, which has no name. Linux: ext2_free_inode(), fs/ext2/ialloc.c."""
        self.truncate(ino, 0)
        with self.lock:
            del self.files[ino]
            self.ordered.pop(ino, None)

    # To the device -----------------------------------------------------------------------------

    def commit(self, *, clean: bool = False) -> None:
        """Let the device know what is where, and before that write what fresh blocks hold.

        Takes page locks. Raises InputOutputError where metadata cannot be written, which the next
        commit tries again; what becomes of the data is for those to hear who have the files open.
        Linux: jbd2_journal_commit_transaction(), in data=ordered mode.
        """
        with self._committing.write():
            while True:
                self._write_ordered()
                with self.lock:
                    if not self.ordered:
                        dirty, freed = self.dirty, self.freed
                        chains = self._encode(dirty, joined(freed), clean=clean)
                        self.dirty, self.freed = set(), []
                        break
            try:
                self._write(chains)
            except InputOutputError:
                with self.lock:
                    self.dirty |= dirty
                    self.freed += freed
                raise
            with self.lock:
                self.used[joined(freed)] = False

    def _write_ordered(self) -> None:
        """Write what is dirty of the files that have fresh blocks, and wait for that."""
        with self.lock:
            ordered, self.ordered = self.ordered, {}
        try:
            for mapping in ordered.values():
                write_cache_pages(mapping, WritebackControl(WB_SYNC_ALL))
                filemap_fdatawait_range(mapping)
        except BaseException:
            with self.lock:
                self.ordered = ordered | self.ordered
            raise

    def _encode(
        self, dirty: set[int], freed: Indices, *, clean: bool
    ) -> list[tuple[Indices, Payload]]:
        """Bring the metadata up to date, in memory; the chains of extents, and what they hold."""
        chains = []
        for ino in dirty:
            inode = self.files.get(ino)
            if inode is None or self.names.get(inode.name) != ino:
                clear_inode(self.meta, ino)
            else:
                chains.append((inode.chain, encode_inode(self.meta, ino, inode)))
        used = self.used.copy()
        used[freed] = False
        self.meta.set_used(used)
        self.meta.seal(clean=clean)
        return chains

    def _write(self, chains: list[tuple[Indices, Payload]]) -> None:
        for chain, blocks in chains:
            if some(submit_bio_wait(self.s_bdev, WRITE, chain, blocks, np.arange(chain.size))):
                raise InputOutputError(f"{self.s_bdev.name}: a chain of extents cannot be written")
        self.meta.commit(self.s_bdev)
