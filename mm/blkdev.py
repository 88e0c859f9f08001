"""A block device: a file of the host. Linux: block/blk-core.c, fs/block_dev.c.

    submit_bio    counts a bio, and does it; writes wait in `queue` while a test holds the device
    complete      does what waits
    end_io        hears of each block of the bio: 0 or a negative errno

The blocks of a bio that follow one another in the file and in memory move in one system call. A
device fails where the host does, past its end, and where a test has armed it (`fail()`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from mm.errors import AccessDenied, Busy, InvalidArgument, NoEntry
from mm.typing import Errnos, Indices, Payload
from mm.vectors import every, places, stretches
from mm.vmstat import VmStat

SECTOR_SHIFT: Final = 9
SECTOR_SIZE: Final = 1 << SECTOR_SHIFT
READ: Final = "read"
WRITE: Final = "write"

_IOV_MAX: Final = 1024  # stretches of memory that one system call of the host takes
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True, eq=False)
class Bio:
    """Blocks on their way between a device and memory. Linux: struct bio, linux/blk_types.h.

    blocks: int64[n], distinct; memory: uint8[rows, block size]; rows: int64[n], where in memory the
    bytes of each block are. end_io(status): called once, with an errno for each block.
    """

    op: str  # READ or WRITE
    blocks: Indices
    memory: Payload
    rows: Indices
    end_io: Callable[[Errnos], None]

    @property
    def nbytes(self) -> int:
        """What it moves."""
        return self.blocks.size * self.memory.shape[1]


@dataclass(slots=True, eq=False)
class FaultAttr:
    """What a device fails. Linux: struct fault_attr, include/linux/fault-inject.h.

    sectors: those that fail, None for any; nth: only the n-th block, counted from 1 when armed.
    """

    op: str
    error: int
    sectors: Collection[int] | None = None
    nth: int | None = None
    seen: int = 0  # blocks that passed, or failed

    def hits(self, blocks: Indices, size: int) -> Indices:
        """Which of *blocks*, of *size* bytes each, fail: places in the vector. Counts them."""
        fails = np.ones(blocks.size, dtype=np.bool_)
        if self.sectors is not None:
            per_block = size >> SECTOR_SHIFT
            fails = np.isin(blocks, np.array([*self.sectors], dtype=np.int64) // per_block)
        if self.nth is not None:
            fails &= np.arange(self.seen + 1, self.seen + 1 + blocks.size) == self.nth
        self.seen += blocks.size
        return places(fails)


@dataclass(slots=True, eq=False)
class BlockDevice:
    """A file of the host as a disk; blkdev_open() makes it. Linux: struct block_device."""

    name: str
    fd: int
    nbytes: int  # what lies past it is not there
    vmstat: VmStat
    faults: list[FaultAttr] = field(default_factory=list)
    holding: bool = False  # writes wait in `queue` until complete()
    queue: list[Bio] = field(default_factory=list)  # submitted and not done, oldest first
    ios: dict[str, int] = field(default_factory=lambda: {READ: 0, WRITE: 0})  # system calls

    def __repr__(self) -> str:
        return f"<BlockDevice {self.name}, {self.nbytes >> SECTOR_SHIFT} sectors>"

    def fail(
        self,
        op: str,
        sectors: Collection[int] | None = None,
        *,
        nth: int | None = None,
        error: int = errno.EIO,
    ) -> FaultAttr:
        """Arm a failure of "read" or "write": of *sectors*, of the *nth* block from now, or of all.

        It stays until it is taken out of `faults`. Raises InvalidArgument.
        Linux: should_fail_request(), block/blk-core.c.
        """
        if op not in self.ios or (nth is not None and nth < 1) or error <= 0:
            raise InvalidArgument(
                f'{self.name}: fail({op!r}, nth={nth}, error={error}): op is "read" or "write", '
                f"nth counts from 1, error is a positive errno"
            )
        attr = FaultAttr(op, error, sectors, nth)
        self.faults.append(attr)
        return attr

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the completions of writes back inside the block, or until complete()."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
            self.complete()

    def complete(self, count: int | None = None) -> int:
        """Do the *count* oldest writes that wait, by default all; how many it were."""
        done = 0
        while self.queue and done != count:
            _do_bio(self, self.queue.pop(0))
            done += 1
        return done


def blkdev_open(path: str | os.PathLike[str], vmstat: VmStat) -> BlockDevice:
    """The file at *path* as a device, whose size is that of the file, for the caller alone.

    Raises NoEntry, AccessDenied, Busy. Linux: blkdev_get_by_path(), fs/block_dev.c.
    """
    if not os.path.isfile(path):
        raise NoEntry(f"{os.fspath(path)!r} is no file that could hold a disk")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise AccessDenied(f"{os.fspath(path)!r} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Busy(f"{os.fspath(path)!r} is in use as a device already") from error
    return BlockDevice(Path(path).name, fd, os.fstat(fd).st_size, vmstat)


def blkdev_put(bdev: BlockDevice) -> None:
    """Do what waits, and close the file. Linux: blkdev_put(), fs/block_dev.c."""
    bdev.holding = False
    bdev.complete()
    os.close(bdev.fd)
    bdev.fd = -1


def submit_bio(bdev: BlockDevice, bio: Bio) -> None:
    """Have *bio* done: at once, unless the device holds writes back.

    Linux: submit_bio(), block/blk-core.c.
    """
    if not bio.blocks.size:
        bio.end_io(np.zeros(0, dtype=np.int32))
        return
    bdev.vmstat.add("pgpgin" if bio.op == READ else "pgpgout", bio.nbytes >> 10)
    if bdev.holding and bio.op == WRITE:
        bdev.queue.append(bio)
    else:
        _do_bio(bdev, bio)


def submit_bio_wait(
    bdev: BlockDevice, op: str, blocks: Indices, memory: Payload, rows: Indices
) -> Errnos:
    """Move *blocks* now, whatever the device holds back; an errno for each.

    Linux: submit_bio_wait(), block/bio.c.
    """
    status = np.zeros(blocks.size, dtype=np.int32)

    def end_io(found: Errnos) -> None:
        status[:] = found

    bio = Bio(op, blocks, memory, rows, end_io)
    bdev.vmstat.add("pgpgin" if op == READ else "pgpgout", bio.nbytes >> 10)
    _do_bio(bdev, bio)
    return status


def _do_bio(bdev: BlockDevice, bio: Bio) -> None:
    """Move the bytes of *bio*, in ascending order of blocks, and tell who waits."""
    blocks, rows = bio.blocks, bio.rows
    order = None if every(blocks[1:] > blocks[:-1]) else np.argsort(blocks)
    if order is not None:
        blocks, rows = blocks[order], rows[order]
    status = _may_do(bdev, bio.op, blocks, bio.memory.shape[1])
    good = places(status == 0)
    for run in stretches(blocks[good]):
        here = good[run]
        status[here] = _do_run(bdev, bio, blocks.item(here[0]), rows[here])
    if order is not None:
        ordered = np.empty_like(status)
        ordered[order] = status
        status = ordered
    bio.end_io(status)


def _may_do(bdev: BlockDevice, op: str, blocks: Indices, size: int) -> Errnos:
    """0 for each block that the device does not fail. Linux: generic_make_request_checks()."""
    status = np.zeros(blocks.size, dtype=np.int32)
    status[(blocks < 0) | (blocks >= bdev.nbytes // size)] = -errno.EIO  # bio_check_eod()
    for attr in bdev.faults:
        if attr.op == op:
            status[attr.hits(blocks, size)] = -attr.error
    return status


def _do_run(bdev: BlockDevice, bio: Bio, block: int, rows: Indices) -> Errnos:
    """Move one run of blocks, from *block* on, in as few system calls as the host allows."""
    memory, size = bio.memory, bio.memory.shape[1]
    status = np.zeros(rows.size, dtype=np.int32)
    rw = os.preadv if bio.op == READ else os.pwritev
    done = 0
    while done < rows.size:
        left = rows[done:]
        parts = stretches(left)[:_IOV_MAX]
        vectors = [memory[left.item(p.start) : left.item(p.stop - 1) + 1].data for p in parts]
        bdev.ios[bio.op] += 1
        try:
            moved = rw(bdev.fd, vectors, (block + done) * size) // size
        except OSError as error:
            status[done:] = -errno.ENOSPC if error.errno in _NO_SPACE else -errno.EIO
            break
        if not moved:  # the file of the host has become shorter than the device
            status[done:] = -errno.EIO
            break
        done += moved
    return status
