"""Pages of a file as blocks of a device: what to read, what to write. Linux: fs/buffer.c.

    block_read_full_page    from the device what is not up to date; holes are zeros
    block_prepare_write     a block for each hole that is written to; reads what is around the bytes
    block_commit_write      the bytes are there: up to date, and dirty
    block_write_full_page   the dirty blocks to the device
    try_to_free_buffers     forget which blocks they are

get_block(inode, blocks, create) of a file system says where the blocks of a file are, and finds
room for those that are not. All pages of a call are locked and of one file; vectors of buffers have
the shape [pages, blocks of a page].
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mm.blkdev import READ, WRITE, Bio, submit_bio
from mm.buffer_head import (
    NO_BLOCK,
    BH_Async_Write,
    BH_Dirty,
    BH_Mapped,
    BH_New,
    BH_Uptodate,
    BH_Write_EIO,
)
from mm.page_cache import cancel_dirty_page, set_page_dirty_nobuffers
from mm.page_flags import PG_dirty, PG_private, PG_uptodate, PG_writeback
from mm.swap import get_page, put_page
from mm.types import AddressSpace, MemMap, Vma, VmFault
from mm.typing import PAGE_SIZE, Errnos, Faults, Indices, Mask, Payload, Pfns, word
from mm.vectors import has, some
from mm.writeback import end_page_writeback, mapping_set_error, set_page_writeback

# Where each of `blocks` of a file is on the device, NO_BLOCK in a hole or where `create` found no
# room; and which it has just made.
GetBlock: TypeAlias = Callable[[Any, Indices, bool], tuple[Indices, Mask]]
States: TypeAlias = NDArray[np.uint8]  # BH_* bits

_NOT_PRIVATE: Final = word(~PG_private)
_BUSY: Final = BH_Dirty | BH_Async_Write
_DISCARDED: Final = ~(BH_Dirty | BH_Mapped | BH_New)


def page_has_private(mem: MemMap, pfns: Pfns) -> Mask:
    """True for pages that have buffers, and one more reference for them.

    Linux: page_has_private(), include/linux/page-flags.h.
    """
    return has(mem.flags[pfns], PG_private)


def create_page_buffers(mapping: AddressSpace, pfns: Pfns) -> Indices:
    """Give those of *pfns* buffers that have none; the rows of all.

    Fresh ones are up to date and dirty as their page is.
    Linux: create_page_buffers() and create_empty_buffers(), fs/buffer.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        bare = pfns[~page_has_private(mem, pfns)]
        if bare.size:
            rows, flags = mem.buffers.alloc(bare), mem.flags[bare]
            states = has(flags, PG_uptodate) * BH_Uptodate | has(flags, PG_dirty) * BH_Dirty
            mem.buffers.b_state[rows, : PAGE_SIZE >> mapping.host.i_blkbits] = states[:, None]
            mem.private[bare] = rows
            mem.flags[bare] |= PG_private
            get_page(mem, bare)
        return mem.private[pfns]


class _Buffers:
    """The buffers of *pfns* while a call works on them: copies of their columns, until save().

    Of shape [pages, blocks of a page] are blocks, which of the file they are; numbers, which of the
    device; state; rows_in_memory, where their bytes are in memory, uint8[rows, block size].
    """

    def __init__(self, mapping: AddressSpace, pfns: Pfns) -> None:
        self.mapping, self.mem, self.host = mapping, mapping.mem, mapping.host
        self.size: int = 1 << self.host.i_blkbits
        of_a_page = PAGE_SIZE // self.size
        assert self.mem.payload is not None
        self.memory: Payload = self.mem.payload.reshape(-1, self.size)
        self.rows = create_page_buffers(mapping, pfns)
        parts = np.arange(of_a_page)
        self.blocks = self.mem.index[pfns][:, None] * of_a_page + parts
        self.rows_in_memory = pfns[:, None] * of_a_page + parts
        self.state: States = self.mem.buffers.b_state[self.rows, :of_a_page]
        self.numbers = self.mem.buffers.b_blocknr[self.rows, :of_a_page]

    def of(self, *bits: np.uint8) -> Mask:
        """Where a buffer has any of *bits*."""
        return (self.state & np.bitwise_or.reduce(bits)) != 0

    @property
    def inside(self) -> Mask:
        """Where a block begins before the end of the file."""
        return self.blocks << self.host.i_blkbits < self.host.i_size

    def map(self, holes: Mask, get_block: GetBlock, *, create: bool) -> Mask:
        """Ask the file system where the unmapped buffers *holes* are; True for new blocks."""
        new = np.zeros_like(holes)
        if some(holes):
            self.numbers[holes], new[holes] = get_block(self.host, self.blocks[holes], create)
            self.state[holes & (self.numbers != NO_BLOCK)] |= BH_Mapped
        return new

    def zero(self, which: Mask) -> None:
        """Let the bytes of *which* be zeros, and up to date."""
        self.memory[self.rows_in_memory[which]] = 0
        self.state[which] |= BH_Uptodate

    def read(self, which: Mask) -> Errnos:
        """Read *which*, which are mapped; for each page 0 or a negative errno."""
        status = np.zeros(which.shape, dtype=np.int32)
        if some(which):

            def end_buffer_read(found: Errnos) -> None:
                status[which] = found

            numbers, rows = self.numbers[which], self.rows_in_memory[which]
            bio = Bio(READ, numbers, self.memory, rows, end_buffer_read)
            submit_bio(self.host.i_sb.s_bdev, bio)
            self.state[which & (status == 0)] |= BH_Uptodate
        return status.min(axis=1, initial=0)

    def save(self) -> None:
        """Write the columns back."""
        heads, of_a_page = self.mem.buffers, self.state.shape[1]
        with self.mem.locks.atomic:
            heads.b_state[self.rows, :of_a_page] = self.state
            heads.b_blocknr[self.rows, :of_a_page] = self.numbers


# Read -------------------------------------------------------------------------------------------


def block_read_full_page(mapping: AddressSpace, pfns: Pfns, get_block: GetBlock) -> Mask:
    """Fill *pfns* from the device; True where that worked, and the page is up to date.

    Linux: block_read_full_page(), fs/buffer.c.
    """
    mem, buffers = mapping.mem, _Buffers(mapping, pfns)
    wanted = ~buffers.of(BH_Uptodate)
    buffers.map(wanted & ~buffers.of(BH_Mapped) & buffers.inside, get_block, create=False)
    mapped = buffers.of(BH_Mapped)
    buffers.zero(wanted & ~mapped)
    buffers.read(wanted & mapped)
    buffers.save()

    filled = np.asarray(buffers.of(BH_Uptodate).all(axis=1))
    with mem.locks.atomic:
        mem.flags[pfns[filled]] |= PG_uptodate
    return filled


# Write to a page --------------------------------------------------------------------------------


def block_prepare_write(
    mapping: AddressSpace, pfns: Pfns, pos: int, nbytes: int, get_block: GetBlock
) -> Errnos:
    """Make [*pos*, *pos* + *nbytes*) of the file, which *pfns* cover, ready to be written to.

    For each page 0, -ENOSPC where a hole finds no block, or -EIO where what is around the bytes
    cannot be read. A block that was made for a page that fails is zeros.
    Linux: __block_write_begin(), fs/buffer.c.
    """
    buffers = _Buffers(mapping, pfns)
    touched, partial = _touched(buffers, pos, nbytes)
    buffers.state[has(mapping.mem.flags[pfns], PG_uptodate)] |= BH_Uptodate
    unmapped = touched & ~buffers.of(BH_Mapped)
    fresh = buffers.map(unmapped, get_block, create=True)
    zeros = fresh & buffers.of(BH_Uptodate)  # holes that were read: the device has something else
    buffers.state[zeros] |= BH_Dirty
    fresh &= ~zeros
    buffers.state[fresh] |= BH_New
    buffers.memory[buffers.rows_in_memory[fresh & partial]] = 0
    status = buffers.read(partial & buffers.of(BH_Mapped) & ~buffers.of(BH_Uptodate) & ~fresh)
    full = (unmapped & ~buffers.of(BH_Mapped)).any(axis=1)
    status[full] = -errno.ENOSPC
    failed = status != 0
    if some(failed):
        _page_zero_new_buffers(buffers, pfns, failed)
    buffers.save()
    set_page_dirty_nobuffers(mapping, pfns[zeros.any(axis=1)])
    return status


def _touched(buffers: _Buffers, pos: int, nbytes: int) -> tuple[Mask, Mask]:
    """The blocks that have bytes of [*pos*, *pos* + *nbytes*), and those that have others too."""
    start = buffers.blocks << buffers.host.i_blkbits
    end = start + buffers.size
    touched = (end > pos) & (start < pos + nbytes)
    return touched, touched & ((start < pos) | (end > pos + nbytes))


def _page_zero_new_buffers(buffers: _Buffers, pfns: Pfns, failed: Mask) -> None:
    """Nobody will fill the new blocks of pages that *failed*, and what was there is not the file's.

    Linux: page_zero_new_buffers(), fs/buffer.c.
    """
    new = buffers.of(BH_New) & failed[:, None]
    buffers.zero(new)
    buffers.state[new] ^= BH_New
    buffers.state[new] |= BH_Dirty
    set_page_dirty_nobuffers(buffers.mapping, pfns[new.any(axis=1)])


def block_commit_write(mapping: AddressSpace, pfns: Pfns, pos: int, nbytes: int) -> None:
    """The bytes are there: the blocks that they touch are up to date, and dirty, as the pages are.

    Linux: block_commit_write(), fs/buffer.c.
    """
    mem, buffers = mapping.mem, _Buffers(mapping, pfns)
    touched, _ = _touched(buffers, pos, nbytes)
    buffers.state[touched] |= BH_Uptodate | BH_Dirty
    buffers.state &= ~BH_New
    buffers.save()
    with mem.locks.atomic:
        mem.flags[pfns[buffers.of(BH_Uptodate).all(axis=1)]] |= PG_uptodate
    set_page_dirty_nobuffers(mapping, pfns)


def block_page_mkwrite(vma: Vma, pfns: Pfns, get_block: GetBlock) -> Faults:
    """Find blocks for locked *pfns*, to which a process is about to store; they become dirty.

    SIGBUS for those that there is no room for; RETRY for what the file has no more.
    Linux: block_page_mkwrite(), fs/buffer.c.
    """
    mapping: AddressSpace = vma.vm_file.f_mapping
    mem, size = mapping.mem, mapping.host.i_size
    faults = np.full(pfns.size, VmFault.RETRY, dtype=np.uint16)
    inside = mem.mapping[pfns] == mapping.number << 2
    inside &= mem.index[pfns] * PAGE_SIZE < size
    status = block_prepare_write(mapping, pfns[inside], 0, size, get_block)
    faults[inside] = (status != 0) * np.uint16(VmFault.SIGBUS)
    block_commit_write(mapping, pfns[faults == 0], 0, size)
    return faults


def set_page_dirty_buffers(mapping: AddressSpace, pfns: Pfns) -> None:
    """All that is known of each of *pfns* differs from the device.

    Linux: __set_page_dirty_buffers(), fs/buffer.c, of pages that are up to date.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        rows = mem.private[pfns[page_has_private(mem, pfns)]]
        states = mem.buffers.b_state[rows]
        mem.buffers.b_state[rows] = states | ((states & BH_Uptodate) != 0) * BH_Dirty
    set_page_dirty_nobuffers(mapping, pfns)


# Write to the device ----------------------------------------------------------------------------


def block_write_full_page(mapping: AddressSpace, pfns: Pfns, get_block: GetBlock) -> None:
    """Send the dirty blocks of *pfns*, which are clean from now on, to the device.

    The pages are PG_writeback until that is done. What lies past the end of the file is not
    written, and zeros in a page that the end is in. A block that finds no room, or is not written,
    is noted in the mapping, and lost when its page is. Unlike Linux v4.20, whose buffers know only
    that it failed, a device that has no room says ENOSPC (as iomap does since v5.5).
    Linux: block_write_full_page() and __block_write_full_page(), fs/buffer.c.
    """
    mem, size = mapping.mem, mapping.host.i_size
    assert mem.payload is not None
    start = mem.index[pfns] * PAGE_SIZE
    gone = start >= size
    if some(gone):
        block_invalidatepage(mapping, pfns[gone], 0, PAGE_SIZE)
        pfns, start = pfns[~gone], start[~gone]
    mem.payload[pfns[start + PAGE_SIZE > size], size % PAGE_SIZE :] = 0

    buffers = _Buffers(mapping, pfns)
    buffers.state[~buffers.inside] &= ~BH_Dirty
    dirty = buffers.of(BH_Dirty)
    buffers.map(dirty & ~buffers.of(BH_Mapped), get_block, create=True)
    going = dirty & buffers.of(BH_Mapped)
    if some(dirty & ~going):
        mapping_set_error(mapping, -errno.ENOSPC)
    buffers.state[dirty] &= ~(BH_Dirty | BH_Write_EIO)
    buffers.state[going] |= BH_Async_Write
    buffers.save()
    set_page_writeback(mapping, pfns)
    _submit_write(mapping, pfns, buffers, going)


def _submit_write(mapping: AddressSpace, pfns: Pfns, buffers: _Buffers, going: Mask) -> None:
    """Write the buffers *going*; the pages are not PG_writeback any more when that is done."""
    heads, places = mapping.mem.buffers, np.broadcast_to(buffers.rows[:, None], going.shape)[going]
    parts = going.nonzero()[1]

    def end_buffer_async_write(status: Errnos) -> None:
        lost = status != 0
        with mapping.mem.locks.atomic:
            heads.b_state[places, parts] &= ~BH_Async_Write
            heads.b_state[places[lost], parts[lost]] &= ~BH_Uptodate
            heads.b_state[places[lost], parts[lost]] |= BH_Write_EIO
        if some(lost):
            mapping_set_error(mapping, status[lost].item(0))
        end_page_writeback(mapping, pfns)

    numbers, rows = buffers.numbers[going], buffers.rows_in_memory[going]
    bio = Bio(WRITE, numbers, buffers.memory, rows, end_buffer_async_write)
    submit_bio(mapping.host.i_sb.s_bdev, bio)


# Forget -----------------------------------------------------------------------------------------


def try_to_free_buffers(mapping: AddressSpace, pfns: Pfns) -> Mask:
    """Take their buffers from locked *pfns*; False where one is dirty or on its way to the device.

    A page that is dirty without one of its buffers being so has been written by hand: it is clean.
    Linux: try_to_free_buffers(), fs/buffer.c.
    """
    mem = mapping.mem
    with mem.locks.atomic:
        private = page_has_private(mem, pfns)
        busy = (mem.buffers.b_state[mem.private[pfns]] & _BUSY).any(axis=1) & private
        freed = pfns[private & ~busy]
        cancel_dirty_page(mapping, freed)
        mem.buffers.free(mem.private[freed])
        mem.private[freed] = 0
        mem.flags[freed] &= _NOT_PRIVATE
    put_page(mem, freed)
    return ~busy


def try_to_release_page(mapping: AddressSpace, pfns: Pfns) -> Mask:
    """Ask the file system to let go of what it knows of locked *pfns*; True where it did.

    Linux: try_to_release_page(), mm/filemap.c.
    """
    release = mapping.a_ops.releasepage or try_to_free_buffers
    free = ~has(mapping.mem.flags[pfns], PG_writeback)
    free[free] = release(mapping, pfns[free])
    return free


def block_invalidatepage(mapping: AddressSpace, pfns: Pfns, offset: int, nbytes: int) -> None:
    """Forget the blocks of locked *pfns* that lie in *nbytes* bytes from *offset* of each page on.

    A page that loses all of them loses its buffers, and is clean.
    Linux: block_invalidatepage(), fs/buffer.c.
    """
    mem, size = mapping.mem, 1 << mapping.host.i_blkbits
    pfns = pfns[page_has_private(mem, pfns)]
    first, end = -(-offset // size), (offset + nbytes) // size
    with mem.locks.atomic:
        rows = mem.private[pfns]
        mem.buffers.b_state[rows, first:end] &= _DISCARDED
        mem.buffers.b_blocknr[rows, first:end] = NO_BLOCK
    if nbytes == PAGE_SIZE:
        try_to_release_page(mapping, pfns)
