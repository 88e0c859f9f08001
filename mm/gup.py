"""References to the pages behind addresses, for those who bypass page tables. Linux: mm/gup.c.

    follow_page_pte   which pages are there, with the rights that are asked for
    faultin_page      have the others brought, copied or unshared; then look again

There are two kinds. An ordinary reference (FOLL_GET) keeps a page from being freed. A pin
(FOLL_PIN) is for a device that loads and stores by DMA: the page must remain the process's own
for as long as it lasts, so that one which others map too, and the zero page where it lasts long
(FOLL_LONGTERM), is replaced by a copy first, even for reading. Either keeps a page where it is.

Unlike Linux v4.20, which knows ordinary references alone: pins are of v5.7, unsharing of v5.19.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mm.device_exclusive import make_device_exclusive
from mm.errors import Busy, HwPoison, InvalidArgument, MmError, NotMapped
from mm.filemap import trylock_page, unlock_page
from mm.highmem import memcpy_from_pages, memcpy_to_pages
from mm.locking import cond_resched
from mm.memory import handle_mm_fault
from mm.migrate_device import migrate_device_coherent_page
from mm.mmap import find_vma
from mm.page_cache import set_page_dirty
from mm.page_flags import PG_anon_exclusive, PG_referenced
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_soft_dirty, pte_write
from mm.swap import GUP_PIN_COUNTING_BIAS, get_page, put_page
from mm.types import (
    VM_ACCESS_FLAGS,
    VM_FAULT_ERROR,
    VM_IO,
    VM_LOCKONFAULT,
    VM_MAYREAD,
    VM_MAYWRITE,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
    MemMap,
    MmStruct,
    Vma,
    VmFault,
    page_anon,
    payload_of,
)
from mm.typing import (
    NO_PAGES,
    PAGE_SHIFT,
    PAGE_SIZE,
    Addresses,
    Faults,
    Indices,
    Mask,
    Payload,
    Pfns,
    Ptes,
)
from mm.uaccess import MAX_RETRIES, bad_area, mm_fault_error, page_range, served_in_vain
from mm.userfaultfd_k import Userfault, userfault, userfaultfd_pte_wp
from mm.vectors import every, has, places, some

FOLL_WRITE: Final = 1 << 0  # to store to
FOLL_GET: Final = 1 << 1  # take an ordinary reference
FOLL_FORCE: Final = 1 << 3  # pass over the rights that the mapping gives, as a debugger does
FOLL_HWPOISON: Final = 1 << 6  # what is lost is told from what cannot be had
FOLL_LONGTERM: Final = 1 << 8  # for so long that the page may not stand in anybody's way
FOLL_TOUCH: Final = 1 << 16  # what is read counts as used, what is written as changed
FOLL_PIN: Final = 1 << 19  # take a pin
FOLL_UNLOCKABLE: Final = 1 << 21  # the caller lets go of mmap_sem where userland is to be asked

_AT_ONCE: Final = 512  # pages that access_remote_vm() holds at a time


class Pin:
    """References to the pages of a range, until release(); `with` releases.

    pfns: the page behind each page of the range, the zero page included. A machine lists its
    pins, so that verify() can account for every reference.
    """

    def __init__(self, mem: MemMap, gup_flags: int = FOLL_GET) -> None:
        self.mem = mem
        self.gup_flags = gup_flags
        self.pfns: Pfns = NO_PAGES  # -1 where it has not got so far
        mem.pins.append(self)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    @property
    def refs(self) -> int:
        """What it adds to the count of each page."""
        return GUP_PIN_COUNTING_BIAS if self.gup_flags & FOLL_PIN else 1

    def counted(self, pfns: Pfns) -> Pfns:
        """Those of *pfns* whose count it raises: the zero page stays without a pin's help.

        Without FOLL_GET and FOLL_PIN, who wants pages to be there wants no hold on them.
        """
        if not self.gup_flags & (FOLL_GET | FOLL_PIN):
            return NO_PAGES
        held = pfns >= 0
        if self.gup_flags & FOLL_PIN:
            held &= pfns != self.mem.zero_pfn
        return pfns if every(held) else pfns[held]

    def grab(self, where: Indices, pfns: Pfns) -> None:
        """Hold *pfns*, the pages at places *where*; -1 is none. Linux: try_grab_page(), v5.7."""
        self.pfns[where] = pfns
        held = self.counted(pfns)
        get_page(self.mem, held, refs=self.refs)
        if self.gup_flags & FOLL_PIN:
            self.mem.vmstat.add("nr_foll_pin_acquired", held.size)

    def drop(self, first: int) -> None:
        """Let go of the pages from place *first* on, as if it had not got so far."""
        beyond = self.pfns[first:].copy()
        self.pfns[first:] = -1
        self._put(beyond)

    def release(self, *, dirty: bool = True) -> None:
        """Let go of all pages; a second call does nothing.

        dirty: where they were held for writing they have changed, and reclaim may not take them
        for clean. Linux: unpin_user_pages_dirty_lock(), mm/gup.c, v5.6.
        """
        if self in self.mem.pins:
            self.mem.pins.remove(self)
            if dirty and self.gup_flags & FOLL_WRITE:
                set_page_dirty(self.mem, self.counted(self.pfns))
            self._put(self.pfns)

    def _put(self, pfns: Pfns) -> None:
        """Linux: gup_put_folio(), mm/gup.c, v5.18."""
        held = self.counted(pfns)
        put_page(self.mem, held, refs=self.refs)
        if self.gup_flags & FOLL_PIN:
            self.mem.vmstat.add("nr_foll_pin_released", held.size)


# look


def check_vma_flags(vma: Vma, gup_flags: int) -> bool:
    """True where *vma* allows the access, or FOLL_FORCE may pass over what it forbids.

    Unlike a CPU's, an access for reading wants the right to read: that to write does not do.
    Unlike Linux v4.20, nobody may have pages of a file for long, to store to, that wants to hear of
    stores (6.5). Linux: check_vma_flags(), mm/gup.c.
    """
    flags, force = vma.vm_flags, gup_flags & FOLL_FORCE
    if flags & (VM_IO | VM_PFNMAP):
        return False
    if gup_flags & FOLL_WRITE:
        if gup_flags & FOLL_LONGTERM and flags & VM_SHARED and _tracks_dirty(vma):
            return False
        return bool(flags & VM_WRITE or (force and is_cow_mapping(vma)))
    return bool(flags & VM_READ or (force and flags & VM_MAYREAD))


def _tracks_dirty(vma: Vma) -> bool:
    """Linux: vma_needs_dirty_tracking(), mm/mmap.c, v6.5."""
    return vma.vm_ops is not None and vma.vm_ops.page_mkwrite is not None


def is_cow_mapping(vma: Vma) -> bool:
    """True where a store gives the process a page of its own. Linux: is_cow_mapping(), mm.h."""
    return vma.vm_flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE


def follow_page_pte(vma: Vma, addrs: Addresses, gup_flags: int) -> tuple[Pfns, Mask]:
    """The page that each of *addrs* maps, -1 where a fault must come first.

    The mask says which of those faults shall unshare. Called with the page-table lock held.
    Linux: follow_page_pte(), mm/gup.c.
    """
    mm, mem = vma.vm_mm, vma.vm_mm.mem
    ptes = mem.tables.entries[pte_offset(mem.tables, mm.pgd, addrs)]
    ready, unshare = pte_present(ptes), np.zeros(addrs.size, dtype=np.bool_)
    pfns = pte_pfn(ptes) if every(ready) else np.where(ready, pte_pfn(ptes), mem.zero_pfn)
    readonly = ready & ~pte_write(ptes)
    if some(readonly):
        if gup_flags & FOLL_WRITE:
            ready &= ~readonly | can_follow_write_pte(vma, ptes, pfns, gup_flags)
        else:
            unshare = readonly & gup_must_unshare(vma, pfns, gup_flags)
            ready &= ~unshare
    found = pfns if every(ready) else np.where(ready, pfns, -1)
    if gup_flags & FOLL_TOUCH:
        touched = pfns[ready]
        with mem.locks.atomic:
            mem.flags[touched] |= PG_referenced
        if gup_flags & FOLL_WRITE:
            set_page_dirty(mem, touched)
    return found, unshare


def can_follow_write_pte(vma: Vma, ptes: Ptes, pfns: Pfns, gup_flags: int) -> Mask:
    """True for read-only entries *ptes* of *pfns* that FOLL_FORCE may store behind.

    A fault must have made the page the process's own, and have noted the change for whoever
    watches the soft-dirty bits. Linux: can_follow_write_pte(), mm/gup.c, v6.1.
    """
    if not gup_flags & FOLL_FORCE or not is_cow_mapping(vma) or vma.vm_flags & VM_WRITE:
        return np.zeros(ptes.size, dtype=np.bool_)
    own = has(vma.vm_mm.mem.flags[pfns], PG_anon_exclusive) & ~userfaultfd_pte_wp(vma, ptes)
    return own if vma.vm_flags & VM_SOFTDIRTY else own & pte_soft_dirty(ptes)


def gup_must_unshare(vma: Vma, pfns: Pfns, gup_flags: int) -> Mask:
    """True for *pfns*, mapped read-only, that must be copied before they are pinned for reading.

    Linux: gup_must_unshare(), include/linux/mm.h, v5.19.
    """
    mem = vma.vm_mm.mem
    if not gup_flags & FOLL_PIN:
        return np.zeros(pfns.size, dtype=np.bool_)
    shared = ~has(mem.flags[pfns], PG_anon_exclusive)
    if gup_flags & FOLL_LONGTERM and is_cow_mapping(vma):
        return shared
    return shared & page_anon(mem, pfns)


# fault


def faultin_page(vma: Vma, addrs: Addresses, unshare: Mask, gup_flags: int) -> Faults:
    """Serve faults at *addrs*, as follow_page_pte() wants them. Linux: faultin_page(), mm/gup.c."""
    write = bool(gup_flags & FOLL_WRITE)
    if not some(unshare):
        return handle_mm_fault(vma, addrs, write=write)
    faults = np.empty(addrs.size, dtype=np.uint16)
    for kind in (True, False):
        which = unshare == kind
        if some(which):
            faults[which] = handle_mm_fault(vma, addrs[which], write=write, unshare=kind)
    return faults


def get_pages(mm: MmStruct, addrs: Addresses, pin: Pin) -> MmError | Userfault | None:
    """Let *pin* hold the pages at *addrs* (ascending page addresses), faulting in what is away.

    Where a page cannot be had, it holds those before it; the answer says why. With FOLL_UNLOCKABLE
    that may be a Userfault: the caller lets go of all and of mmap_sem, waits, and begins again. The
    caller holds mmap_sem for read, and releases *pin* should this raise.
    Linux: __get_user_pages(), mm/gup.c.
    """
    write = bool(pin.gup_flags & FOLL_WRITE)
    pin.pfns = np.full(addrs.size, -1)
    at = 0
    while at < addrs.size:
        addr = addrs.item(at)
        vma = find_vma(mm, addr)
        if vma is None or vma.vm_start > addr or not check_vma_flags(vma, pin.gup_flags):
            return bad_area(mm, vma, addr, write=write)
        end = int(addrs.searchsorted(vma.vm_end))
        failure = _get_pages_of(vma, addrs, np.arange(at, end), pin)
        if failure is not None:
            return failure
        at = end
    return None


def _get_pages_of(
    vma: Vma, addrs: Addresses, rest: Indices, pin: Pin
) -> MmError | Userfault | None:
    """get_pages() for the places *rest*, all of them in *vma*."""
    mm, rounds = vma.vm_mm, 0
    while True:
        with mm.page_table_lock:
            pfns, unshare = follow_page_pte(vma, addrs[rest], pin.gup_flags)
            pin.grab(rest, pfns)
        away = pfns < 0
        if not some(away):
            return None
        rounds = rounds + 1 if every(away) else 0
        rest, unshare = rest[away], unshare[away]
        if rounds > MAX_RETRIES:
            raise served_in_vain(mm, addrs.item(rest.item(0)), "page fault")
        if rounds > 1:
            cond_resched()
        faults = faultin_page(vma, addrs[rest], unshare, pin.gup_flags)
        failed = places(faults & VM_FAULT_ERROR)
        if failed.size:
            first, fault = rest.item(failed[0]), VmFault(faults.item(failed[0]))
            pin.drop(first)
            return _fault_error(vma, addrs.item(first), fault, pin.gup_flags)


def _fault_error(vma: Vma, addr: int, fault: VmFault, gup_flags: int) -> MmError | Userfault:
    """Linux: vm_fault_to_errno(), include/linux/mm.h; the end of faultin_page(), mm/gup.c."""
    error = mm_fault_error(vma.vm_mm, addr, fault)
    if fault & VmFault.HWPOISON and gup_flags & FOLL_HWPOISON:
        return HwPoison(f"populate: {error.strerror}")
    if gup_flags & FOLL_UNLOCKABLE:
        return userfault(vma, addr, fault, write=bool(gup_flags & FOLL_WRITE)) or error
    return error


# what others call


def get_user_pages(mm: MmStruct, addr: int, nbytes: int, gup_flags: int) -> Pin:
    """Hold an ordinary reference to each page of [*addr*, *addr* + *nbytes*), as vmsplice() does.

    A page in private device memory comes back first. Raises SegmentationFault, BusError,
    OutOfMemory, and then holds nothing; InvalidArgument for FOLL_LONGTERM, which is for pins.
    Linux: get_user_pages(), mm/gup.c.
    """
    if gup_flags & FOLL_LONGTERM:
        raise InvalidArgument("get_user_pages: FOLL_LONGTERM goes with a pin; use pin_user_pages()")
    return _hold(mm, page_range(addr, nbytes), gup_flags | FOLL_GET | FOLL_TOUCH | FOLL_UNLOCKABLE)


def pin_user_pages(mm: MmStruct, addr: int, nbytes: int, gup_flags: int) -> Pin:
    """Pin each page of [*addr*, *addr* + *nbytes*), as a device does that reads it by DMA.

    A page in private device memory comes back first; with FOLL_LONGTERM, one in any device's.
    Raises as get_user_pages(), and Busy where a page cannot come back.
    Linux: pin_user_pages(), mm/gup.c, v5.6.
    """
    return _hold(mm, page_range(addr, nbytes), gup_flags | FOLL_PIN | FOLL_UNLOCKABLE)


def _hold(mm: MmStruct, addrs: Addresses, gup_flags: int) -> Pin:
    """The pages at *addrs*, all or none."""
    pin = Pin(mm.mem, gup_flags)
    try:
        while True:
            with mm.mmap_sem.read():
                failure = get_pages(mm, addrs, pin)
                while gup_flags & FOLL_LONGTERM and migrate_longterm_unpinnable_pages(pin):
                    failure = get_pages(mm, addrs, pin)
            if not isinstance(failure, Userfault):
                break
            pin.drop(0)
            failure.wait()
        if failure is not None:
            raise failure
    except BaseException:
        pin.release(dirty=False)
        raise
    return pin


def migrate_longterm_unpinnable_pages(pin: Pin) -> bool:
    """Where *pin* holds device-public pages, let go of all and move those to system memory.

    True where there were any: the caller looks again. Raises Busy where one of them cannot move.
    Linux: migrate_longterm_unpinnable_pages(), mm/gup.c, v6.1.
    """
    mem = pin.mem
    public = pin.pfns[pin.pfns >= 0]
    public = public[mem.is_device_public_page(public)]
    if not public.size:
        return False
    get_page(mem, public)
    pin.drop(0)
    moved = migrate_device_coherent_page(mem, public)
    if not every(moved):
        raise Busy(
            f"device page {public[~moved][0]:#x} cannot be pinned for long: somebody holds it, or "
            f"no frame is free, so it stays in the device's memory"
        )
    return True


def access_remote_vm(mm: MmStruct, addr: int, buf: Payload, *, write: bool) -> int:
    """Copy [*addr*, *addr* + n) into *buf*, uint8[n], or *buf* there, whatever the rights are.

    A store to a private mapping that the process may not write gives it a copy of its own, still
    read-only. Stops at the first page that cannot be had; the bytes that were copied.
    Linux: access_remote_vm(), mm/memory.c.
    """
    payload, done = payload_of(mm.mem), 0
    flags = FOLL_FORCE | FOLL_GET | FOLL_TOUCH | (FOLL_WRITE if write else 0)
    addrs = page_range(addr, buf.size)
    while done < buf.size:
        block = addrs[(addr % PAGE_SIZE + done) >> PAGE_SHIFT :][:_AT_ONCE]
        with mm.mmap_sem.read(), Pin(mm.mem, flags) as pin:
            get_pages(mm, block, pin)
            pfns = pin.pfns[pin.pfns >= 0]
            begin = addr + done
            end = min(block.item(0) + pfns.size * PAGE_SIZE, addr + buf.size)
            if end <= begin:
                break
            bytes_ = buf[done : end - addr]
            if write:
                memcpy_to_pages(payload, pfns, begin % PAGE_SIZE, bytes_)
            else:
                memcpy_from_pages(bytes_, payload, pfns, begin % PAGE_SIZE)
        done = end - addr
    return done


def make_device_exclusive_range(mm: MmStruct, addrs: Addresses, owner: object) -> Pfns:
    """Take the pages at *addrs* (ascending page addresses) away from every CPU, for a device.

    They are faulted in for writing first, so a page of private device memory comes back. Gives
    the page of each address, locked and with a reference, which the caller drops once the device
    maps it; -1 where it could not be taken. Called with mmap_sem held for read.
    Linux: make_device_exclusive_range(), mm/rmap.c, v5.14.
    """
    mem = mm.mem
    taken = np.full(addrs.size, -1)
    with Pin(mem, FOLL_GET | FOLL_WRITE | FOLL_TOUCH) as pin:
        get_pages(mm, addrs, pin)
        there = places(pin.pfns >= 0)
        there = there[trylock_page(mem, pin.pfns[there])]
        pfns, alone = pin.pfns[there], np.zeros(there.size, dtype=np.bool_)
        try:
            alone = make_device_exclusive(mm, addrs[there], pfns, owner)
        finally:
            unlock_page(mem, pfns[~alone])
        taken[there[alone]] = pfns[alone]
        get_page(mem, pfns[alone])
    return taken


def populate_vma_page_range(vma: Vma, start: int, end: int) -> MmError | Userfault | None:
    """Fault in [*start*, *end*) of *vma*, pages in device memory too; none if VM_LOCKONFAULT.

    Private memory that may be written is faulted in as for a store, so that none of it is shared
    afterwards. The answer says why it stopped, if it did: SegmentationFault where the VMA allows no
    access at all, BusError, OutOfMemory, or a Userfault to wait for. The caller holds mmap_sem for
    read.
    Linux: populate_vma_page_range(), mm/gup.c.
    """
    if vma.vm_flags & VM_LOCKONFAULT:
        return None
    flags = FOLL_TOUCH | FOLL_UNLOCKABLE
    if vma.vm_flags & (VM_WRITE | VM_SHARED) == VM_WRITE:
        flags |= FOLL_WRITE
    if vma.vm_flags & VM_ACCESS_FLAGS:
        flags |= FOLL_FORCE
    return _fault_in(vma.vm_mm, start, end, flags)


def _fault_in(mm: MmStruct, start: int, end: int, gup_flags: int) -> MmError | Userfault | None:
    """get_pages() for their being there alone."""
    with Pin(mm.mem, gup_flags) as pin:
        return get_pages(mm, page_range(start, end - start), pin)


def mm_populate(mm: MmStruct, start: int, length: int, *, ignore_errors: bool = True) -> None:
    """Fault in what is mapped of [*start*, *start* + *length*). Takes mmap_sem for read.

    A VMA that cannot be faulted in is passed over; unless *ignore_errors*, what
    populate_vma_page_range() answers is raised. Linux: __mm_populate(), mm/gup.c.
    """
    addr, end = start, start + length
    while addr < end:
        with mm.mmap_sem.read():
            vma = find_vma(mm, addr)
            if vma is None or vma.vm_start >= end:
                return
            addr, stop = max(vma.vm_start, addr), min(vma.vm_end, end)
            special = vma.vm_flags & (VM_IO | VM_PFNMAP)
            failure = None if special else populate_vma_page_range(vma, addr, stop)
        if isinstance(failure, Userfault):
            failure.wait()
            continue
        if failure is not None and not ignore_errors:
            raise failure
        addr = stop


def faultin_page_range(mm: MmStruct, start: int, end: int, *, write: bool) -> None:
    """Fault in [*start*, *end*) as loads or stores of the process would. Takes mmap_sem for read.

    What comes before a place where that fails is faulted in. Raises NotMapped at a hole,
    InvalidArgument where the VMA forbids it, HwPoison, BusError, OutOfMemory.
    Linux: faultin_page_range(), mm/gup.c, v6.9.
    """
    flags, addr = FOLL_TOUCH | FOLL_HWPOISON | FOLL_UNLOCKABLE, start
    flags |= FOLL_WRITE if write else 0
    while addr < end:
        with mm.mmap_sem.read():
            vma = find_vma(mm, addr)
            if vma is None or vma.vm_start > addr:
                raise NotMapped(f"{mm.name}: nothing is mapped at {addr:#x}")
            if not check_vma_flags(vma, flags):
                what = "write to" if write else "read of"
                raise InvalidArgument(f"{mm.name}: {what} {addr:#x} is not allowed by {vma!r}")
            stop = min(vma.vm_end, end)
            failure = _fault_in(mm, addr, stop, flags)
        if isinstance(failure, Userfault):
            failure.wait()
            continue
        if failure is not None:
            raise failure
        addr = stop
