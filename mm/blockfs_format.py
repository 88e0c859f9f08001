"""What a blockfs looks like on disk, and how it is made and checked.

    block 0    superblock     magic, sizes, whether it was unmounted, CRC
    then       bitmap         one bit for each block, 1 where it is used
               inode table    128 bytes for each file: links, size, extents
               names          64 bytes for each inode: what the one directory calls it
               data           blocks of files, and blocks of extents that an inode has no room for

An extent says which blocks of the device hold a stretch of a file; what none covers is a hole. An
inode has room for eight; the others stand in a chain of blocks, each of which begins with the
number of the next. All numbers are little-endian. Not a format of Linux; its parts are ext2's.

Whatever is found in the superblock, bitmap, inodes, names and extents is checked before it is
believed: a mount ends with InvalidArgument or Corrupted, or with a file system that is sound.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mm.blkdev import READ, WRITE, BlockDevice, submit_bio_wait
from mm.blockfs_extents import Extents
from mm.errors import Corrupted, InputOutputError, InvalidArgument
from mm.memparse import Size, format_size, memparse
from mm.typing import Indices, Mask, Payload
from mm.vectors import every, places, some

BLOCK_SIZES: Final = (1024, 2048, 4096)
MAGIC: Final = b"HMMBLKFS"
VERSION: Final = 1
INLINE_EXTENTS: Final = 8  # that an inode has room for
NAME_MAX: Final = 64  # bytes
MIN_INODES: Final = 16
BYTES_PER_INODE: Final = 16 << 10  # of the device, unless mkfs() is told otherwise

SUPER: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("block_size", "<u4"),
        ("blocks", "<u4"),  # of the device
        ("inodes", "<u4"),
        ("clean", "<u4"),  # 1: it was unmounted, and the bitmap is right
        ("crc", "<u4"),  # of what stands before it
    ]
)
_CRC_AT: Final = SUPER.itemsize - 4
EXTENT: Final = np.dtype([("logical", "<u4"), ("start", "<u4"), ("count", "<u4")])  # in blocks
INODE: Final = np.dtype(
    [
        ("nlink", "<u4"),  # 0: free
        ("nr_extents", "<u4"),
        ("size", "<u8"),  # bytes
        ("chain", "<u4"),  # the block with the extents after the first eight, 0 for none
        ("spare", "<u4", 3),
        ("extents", EXTENT, INLINE_EXTENTS),
    ]
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is, in blocks."""

    block_size: int
    blocks: int
    inodes: int

    @property
    def bitmap(self) -> int:
        """First block of the bitmap."""
        return 1

    @property
    def inode_table(self) -> int:
        """First block of the inodes."""
        return self.bitmap + -(-self.blocks // (8 * self.block_size))

    @property
    def names(self) -> int:
        """First block of the names."""
        return self.inode_table + -(-self.inodes * INODE.itemsize // self.block_size)

    @property
    def data(self) -> int:
        """First block that files may have."""
        return self.names + -(-self.inodes * NAME_MAX // self.block_size)

    @property
    def extents_per_block(self) -> int:
        """Extents that a block of a chain has room for, beside the number of the next."""
        return self.block_size // EXTENT.itemsize - 1

    def chain_blocks(self, extents: int) -> int:
        """Blocks that hold what an inode with so many *extents* has no room for."""
        return max(-(-(extents - INLINE_EXTENTS) // self.extents_per_block), 0)

    @property
    def max_bytes(self) -> int:
        """What a file cannot grow beyond: block numbers have 32 bits. Linux: s_maxbytes."""
        return self.block_size << 31


@dataclass(slots=True, eq=False)
class DiskInode:
    """A file as it is on disk. Linux: struct ext2_inode_info, fs/ext2/ext2.h.

    chain: the blocks that hold the extents for which the inode has no room.
    """

    name: str
    size: int
    extents: Extents
    chain: Indices


class Metadata:
    """All blocks before the data, in memory: views of the same bytes, which commit() writes.

    bitmap: uint8[bytes]; inodes: INODE[inodes]; names: uint8[inodes, 64], the name of each inode.
    """

    def __init__(self, layout: Layout, raw: Payload) -> None:
        self.layout = layout
        self.raw = raw  # uint8[blocks, block size]
        self.on_disk = raw.copy()  # what was last read or written
        flat, size = raw.reshape(-1), layout.block_size
        self.super: NDArray[Any] = flat[: SUPER.itemsize].view(SUPER)
        at = layout.bitmap * size
        self.bitmap: Payload = flat[at : at + -(-layout.blocks // 8)]
        at = layout.inode_table * size
        self.inodes: NDArray[Any] = flat[at : at + layout.inodes * INODE.itemsize].view(INODE)
        at = layout.names * size
        self.names = flat[at : at + layout.inodes * NAME_MAX].reshape(-1, NAME_MAX)

    def used(self) -> Mask:
        """Which blocks the bitmap says are used, bool[blocks]."""
        return np.unpackbits(self.bitmap, count=self.layout.blocks, bitorder="little") != 0

    def set_used(self, used: Mask) -> None:
        """Let the bitmap say what *used* does."""
        self.bitmap[:] = np.packbits(used, bitorder="little")

    def seal(self, *, clean: bool) -> None:
        """Fill the superblock."""
        layout = self.layout
        self.super[0] = MAGIC, VERSION, layout.block_size, layout.blocks, layout.inodes, clean, 0
        self.super["crc"] = _crc(self.super)

    def commit(self, bdev: BlockDevice) -> None:
        """Write the blocks that differ from the device's. Raises InputOutputError; then as before.

        The superblock goes last.
        """
        changed = places((self.raw != self.on_disk).any(axis=1))[::-1]
        status = submit_bio_wait(bdev, WRITE, changed, self.raw, changed)
        written = changed[status == 0]
        self.on_disk[written] = self.raw[written]
        if some(status):
            lost = _named(changed[status != 0])
            raise InputOutputError(f"{bdev.name}: {lost} of its metadata cannot be written")


def mkfs(
    path: str | os.PathLike[str],
    size: Size = "64MiB",
    block_size: Size = "4KiB",
    inodes: int | None = None,
) -> None:
    """Make a file of the host an empty blockfs of *size* with room for *inodes* files.

    What was in the file is lost; its blocks take room on the host as they are written. Raises
    InvalidArgument. Linux: mkfs(8).
    """
    nbytes, block_bytes = memparse(size), check_block_size(memparse(block_size))
    inodes = max(nbytes // BYTES_PER_INODE, MIN_INODES) if inodes is None else inodes
    blocks = nbytes // block_bytes
    layout = Layout(block_bytes, blocks, inodes)
    if inodes < 1 or nbytes % block_bytes or not layout.data < blocks < 1 << 32:
        raise InvalidArgument(
            f"mkfs: {format_size(nbytes)} with {inodes} inodes: the size must be a multiple of "
            f"{block_bytes} bytes, larger than the {layout.data} blocks that say what is where, "
            f"and of fewer than 2**32 blocks"
        )
    meta = Metadata(layout, np.zeros((layout.data, block_bytes), dtype=np.uint8))
    meta.set_used(np.arange(blocks) < layout.data)
    meta.seal(clean=True)
    with Path(path).open("wb") as image:
        image.write(meta.raw.tobytes())
        image.truncate(nbytes)


def check_block_size(nbytes: int) -> int:
    """*nbytes*, if blocks may be so large. Raises InvalidArgument. Linux: sb_set_blocksize()."""
    if nbytes not in BLOCK_SIZES:
        raise InvalidArgument(f"a block of {format_size(nbytes)}: it must have 1, 2 or 4 KiB")
    return nbytes


def read_super(bdev: BlockDevice) -> Metadata:
    """Read and check what stands before the data. Linux: ext2_fill_super(), fs/ext2/super.c.

    Raises InvalidArgument where there is no blockfs, Corrupted, InputOutputError.
    """
    nothing = InvalidArgument(f"{bdev.name}: no blockfs of version {VERSION}; mkfs() makes one")
    if bdev.nbytes < BLOCK_SIZES[0]:
        raise nothing
    found = _read(bdev, np.arange(1), BLOCK_SIZES[0])[0, : SUPER.itemsize].view(SUPER)
    if found["magic"].item() != MAGIC or found["version"].item() != VERSION:
        raise nothing
    layout = Layout(*(found[name].item() for name in ("block_size", "blocks", "inodes")))
    if (
        found["crc"].item() != _crc(found)
        or layout.block_size not in BLOCK_SIZES
        or not layout.data < layout.blocks <= bdev.nbytes // layout.block_size
    ):
        raise Corrupted(f"{bdev.name}: its superblock says {layout}, of {bdev.nbytes} bytes")
    return Metadata(layout, _read(bdev, np.arange(layout.data), layout.block_size))


def read_inodes(bdev: BlockDevice, meta: Metadata) -> dict[int, DiskInode]:
    """All inodes that are used, by number; a block has one owner at most.

    The bitmap is made anew where the file system went away without being unmounted. Raises
    Corrupted, InputOutputError. Linux: ext2_iget(), fs/ext2/inode.c; fsck(8).
    """
    layout, inodes, names = meta.layout, dict[int, DiskInode](), set[str]()
    used = places(meta.inodes["nlink"])
    if int(meta.inodes["nr_extents"][used].sum(dtype=np.int64)) > layout.blocks:
        raise Corrupted(f"{bdev.name}: its inodes have more extents than there are blocks")
    owners = np.zeros(layout.blocks, dtype=np.uint8)
    owners[: layout.data] = 1
    for ino in used.tolist():
        inode = _read_inode(bdev, meta, ino)
        blocks = np.concatenate((inode.extents.blocks(), inode.chain))
        if some(owners[blocks]) or np.unique(blocks).size < blocks.size:
            raise Corrupted(f"{bdev.name}: a block of inode {ino} has two owners")
        if inode.name in names:
            raise Corrupted(f"{bdev.name}: two files are called {inode.name!r}")
        owners[blocks] = 1
        names.add(inode.name)
        inodes[ino] = inode
    if not meta.super["clean"].item():
        meta.set_used(owners != 0)
    elif not every(meta.used() == owners):
        raise Corrupted(f"{bdev.name}: its bitmap is not what its inodes say")
    return inodes


def _read_inode(bdev: BlockDevice, meta: Metadata, ino: int) -> DiskInode:
    raw = meta.inodes[ino]
    name, _, rest = meta.names[ino].tobytes().partition(b"\0")
    extents, chain = _read_extents(bdev, meta.layout, raw)
    text = name.decode(errors="replace")
    inode = DiskInode(text, int(raw["size"]), extents, chain)
    data, end = meta.layout.data, meta.layout.blocks
    most = meta.layout.max_bytes
    if (
        not name
        or text.encode() != name
        or rest.strip(b"\0")
        or raw["nlink"] != 1
        or raw["size"] > most
        or not extents.sound(data, end)
        or (extents.size and extents.end * meta.layout.block_size > most)
    ):
        raise Corrupted(f"{bdev.name}: inode {ino} makes no sense: {name!r}, {raw}")
    return inode


def _read_extents(bdev: BlockDevice, layout: Layout, inode: Any) -> tuple[Extents, Indices]:
    """The extents of one inode, and the blocks of its chain."""
    left, block = int(inode["nr_extents"]), int(inode["chain"])
    parts, chain = [inode["extents"][:left]], []
    left -= parts[0].size
    while left:
        if not layout.data <= block < layout.blocks:
            raise Corrupted(f"{bdev.name}: a chain of extents goes on in block {block:#x}")
        whole = _chain_view(_read(bdev, np.array([block]), layout.block_size), layout)[0]
        parts.append(whole[1 : 1 + left])
        chain.append(block)
        left, block = left - parts[-1].size, int(whole[0]["logical"])
    found = np.concatenate(parts)
    columns = (found[name].astype(np.int64) for name in ("logical", "start", "count"))
    return Extents(*columns), np.array(chain, dtype=np.int64)


def encode_inode(meta: Metadata, ino: int, inode: DiskInode) -> Payload:
    """Fill in inode *ino* for Metadata.commit() to write; and what the blocks of its chain hold.

    Linux: __ext2_write_inode(), fs/ext2/inode.c.
    """
    extents, chain, layout = inode.extents, inode.chain, meta.layout
    table = np.zeros(INLINE_EXTENTS + chain.size * layout.extents_per_block, dtype=EXTENT)
    for name in ("logical", "start", "count"):
        table[name][: extents.size] = getattr(extents, name)
    blocks = np.zeros((chain.size, layout.block_size), dtype=np.uint8)
    whole = _chain_view(blocks, layout)
    whole[:, 1:] = table[INLINE_EXTENTS:].reshape(-1, layout.extents_per_block)
    whole["logical"][:-1, 0] = chain[1:]
    first = chain.item(0) if chain.size else 0
    row = (1, extents.size, inode.size, first, (0, 0, 0), table[:INLINE_EXTENTS])
    meta.inodes[ino] = row
    text = inode.name.encode().ljust(NAME_MAX, b"\0")
    meta.names[ino] = np.frombuffer(text, dtype=np.uint8)
    return blocks


def clear_inode(meta: Metadata, ino: int) -> None:
    """Inode *ino* is free, once the metadata are committed. Linux: ext2_free_inode()."""
    meta.inodes[ino] = 0
    meta.names[ino] = 0


def _chain_view(blocks: Payload, layout: Layout) -> NDArray[Any]:
    """Blocks of a chain as EXTENT[blocks, extents]; the first of each names the next block."""
    room = layout.extents_per_block + 1
    return blocks[:, : room * EXTENT.itemsize].view(EXTENT)


def _read(bdev: BlockDevice, blocks: Indices, size: int) -> Payload:
    """*blocks* of *size* bytes each. Raises InputOutputError."""
    raw = np.zeros((blocks.size, size), dtype=np.uint8)
    status = submit_bio_wait(bdev, READ, blocks, raw, np.arange(blocks.size))
    if some(status):
        raise InputOutputError(f"{bdev.name}: {_named(blocks[status != 0])} cannot be read")
    return raw


def _crc(found: NDArray[Any]) -> int:
    return zlib.crc32(found.tobytes()[:_CRC_AT])


def _named(blocks: Indices) -> str:
    return "blocks " + ", ".join(map(hex, blocks[:4].tolist()))
