"""userfaultfd(2): userland serves the faults of a range, and hears what becomes of it.

    register       a range whose missing pages, or stores to pages, are userland's
    read           who waits for what; or set `handler`, which is called by who would wait
    copy, zeropage    bring missing pages
    writeprotect   from now on a store is asked for; or let stores through
    wake, close    let those that wait go on without an answer

    fd = process.userfaultfd()
    fd.register(addr, length, "missing")
    fd.handler = lambda msg: fd.copy(msg.address, storage.page(msg.address))

What faults do about it is in mm/userfaultfd_k.py. Linux: fs/userfaultfd.c, mm/userfaultfd.c, v6.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from mm.anon_vma import anon_vma_prepare
from mm.errors import (
    Busy,
    Exists,
    InvalidArgument,
    InvalidRange,
    MmError,
    NoEntry,
    NoSuchProcess,
    OutOfMemory,
    PartlyCopied,
    PermissionDenied,
    TryAgain,
    WouldBlock,
)
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.highmem import memcpy_to_pages
from mm.locking import current
from mm.memcontrol import mem_cgroup_oom_synchronize
from mm.memory import pte_offset_alloc
from mm.memparse import Size, memparse
from mm.mempolicy import alloc_charged_pages
from mm.mmap import MMAP_MIN_ADDR, TASK_SIZE_MAX, find_vma, vmas_in
from mm.mprotect import MM_CP_UFFD_WP, MM_CP_UFFD_WP_RESOLVE, change_protection
from mm.page_flags import PG_uptodate
from mm.pagewalk import walk_page_range
from mm.pgtable import (
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    mk_pte,
    pte_mkuffd_wp,
    pte_none,
    pte_present,
    pte_write,
)
from mm.rmap import page_add_new_anon_rmap
from mm.sched import current_task
from mm.swap import lru_cache_add_active, put_page
from mm.swapops import SWP_UFFD_WP, make_readable, pte_none_mostly
from mm.types import (
    VM_MAYWRITE,
    VM_UFFD_FLAGS,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    MmStruct,
    Vma,
    maybe_mkwrite,
    payload_of,
    vma_is_anonymous,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Mask, Payload, pages, word
from mm.userfaultfd_k import UffdFeature, UffdMsg, UserfaultfdCtx, UserfaultfdWaiter, userfaultfd_wp
from mm.vectors import every
from mm.vma import vma_modify_flags_uffd

_MODES: Final = {"missing": VM_UFFD_MISSING, "wp": VM_UFFD_WP}
_FEATURES: Final = {feature.name.lower(): feature for feature in UffdFeature if feature.name}
_NOT_UFFD_WP: Final = word(~_PAGE_UFFD_WP)
_NOT_SWP_UFFD_WP: Final = word(~SWP_UFFD_WP)


class UserfaultFd(UserfaultfdCtx):
    """An open userfaultfd of one address space; made by `Process.userfaultfd()`.

    Its calls are the ioctls. Each takes page addresses and lengths of whole pages, and raises
    InvalidRange for others, NoSuchProcess once the process has exited.
    """

    def __repr__(self) -> str:
        return f"<UserfaultFd of {self.mm.name}{', closed' if self.released else ''}>"

    def __enter__(self) -> UserfaultFd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def register(self, addr: int, length: Size, mode: str = "missing") -> None:
        """Have the faults in [*addr*, *addr* + *length*) reported here.

        *mode*: "missing" for accesses to what has no page, "wp" for stores to what is
        write-protected, or both, "missing|wp". It takes the place of the mode that a VMA had,
        unless that had all of it.
        Raises InvalidArgument for memory that cannot have it, PermissionDenied for memory that may
        never be written, Busy where another fd has it; then nothing has changed.
        Linux: userfaultfd_register(), fs/userfaultfd.c.
        """
        modes = set(mode.split("|"))
        if not modes <= set(_MODES):
            raise InvalidArgument(f"userfaultfd: mode {mode!r} is not of {'|'.join(_MODES)}")
        start, end = self._range(addr, length)
        bits = sum(_MODES[name] for name in modes)
        with self.mm.mmap_sem.write():
            self._check_register(start, end)
            self.mm.uffd_wp |= bool(bits & VM_UFFD_WP)
            while (vma := find_vma(self.mm, start)) is not None and vma.vm_start < end:
                first, last = max(start, vma.vm_start), min(end, vma.vm_end)
                if vma.vm_userfaultfd_ctx is not self or vma.vm_flags & bits != bits:
                    if bits & ~vma.vm_flags & VM_UFFD_WP:
                        _drop_stale_uffd_wp(vma, first, last)
                    vm_flags = vma.vm_flags & ~VM_UFFD_FLAGS | bits
                    vma = vma_modify_flags_uffd(vma, first, last, vm_flags, self)
                start = vma.vm_end

    def _check_register(self, start: int, end: int) -> None:
        vmas = vmas_in(self.mm, start, end)
        if not vmas:
            raise InvalidRange(f"userfaultfd: nothing is mapped in [{start:#x}, {end:#x})")
        for vma in vmas:
            if not vma_can_userfault(vma):
                raise InvalidArgument(f"userfaultfd: {vma!r} is not anonymous memory")
            if not vma.vm_flags & VM_MAYWRITE:
                raise PermissionDenied(f"userfaultfd: {vma!r} may never be written")
            if vma.vm_userfaultfd_ctx not in (None, self):
                raise Busy(f"userfaultfd: {vma!r} reports to another one")

    def unregister(self, addr: int, length: Size) -> None:
        """The faults in [*addr*, *addr* + *length*) are the kernel's again; who waits goes on.

        Nothing stays write-protected. Raises InvalidRange where nothing is mapped, InvalidArgument
        where another fd has it. Unlike Linux v4.20, which takes it from that one (v6.15 does not).
        Linux: userfaultfd_unregister(), fs/userfaultfd.c.
        """
        start, end = self._range(addr, length)
        with self.mm.mmap_sem.write():
            vmas = vmas_in(self.mm, start, end)
            if not vmas:
                raise InvalidRange(f"userfaultfd: nothing is mapped in [{start:#x}, {end:#x})")
            for vma in vmas:
                if not vma_can_userfault(vma) or vma.vm_userfaultfd_ctx not in (None, self):
                    raise InvalidArgument(f"userfaultfd: {vma!r} does not report here")
            self._clear(start, end)
        self.wake_userfault(start, end)

    def _clear(self, start: int, end: int) -> None:
        """Linux: userfaultfd_clear_vma(), mm/userfaultfd.c, v6.12."""
        while (vma := find_vma(self.mm, start)) is not None and vma.vm_start < end:
            first, last = max(start, vma.vm_start), min(end, vma.vm_end)
            if vma.vm_userfaultfd_ctx is self:
                if userfaultfd_wp(vma):
                    change_protection(vma, first, last, MM_CP_UFFD_WP_RESOLVE)
                vm_flags = vma.vm_flags & ~VM_UFFD_FLAGS
                vma = vma_modify_flags_uffd(vma, first, last, vm_flags, None)
            start = vma.vm_end

    def copy(self, dst: int, data: Any, *, wp: bool = False, wake: bool = True) -> int:
        """Fill missing pages from *dst* on with *data*, anything with a buffer; the bytes copied.

        wp: the pages are write-protected from the start. Without *wake* those that wait for them
        do so until wake() is called. Raises NoEntry where the range is not inside one VMA that is
        registered, Exists where the first page is there already, OutOfMemory; PartlyCopied at a
        later page, of which copying may go on; TryAgain while an event is waiting to be read.
        Linux: userfaultfd_copy(), fs/userfaultfd.c; mfill_atomic_copy(), mm/userfaultfd.c.
        """
        raw = np.frombuffer(data, dtype=np.uint8)
        return self._mfill(dst, raw.size, raw, wp=wp, wake=wake)

    def zeropage(self, addr: int, length: Size, *, wake: bool = True) -> int:
        """Fill missing pages of [*addr*, *addr* + *length*) with zeros; the bytes. As copy().

        Linux: userfaultfd_zeropage(), fs/userfaultfd.c.
        """
        return self._mfill(addr, memparse(length), None, wp=False, wake=wake)

    def _mfill(self, dst: int, size: int, raw: Payload | None, *, wp: bool, wake: bool) -> int:
        start, end = self._range(dst, size)
        with self.mm.mmap_sem.read():
            self._check_unchanging()
            vma = find_dst_vma(self.mm, start, end)
            if wp and not userfaultfd_wp(vma):
                raise InvalidArgument(f"userfaultfd: {vma!r} is not registered for wp")
            if raw is None:
                done, error = mfill_atomic_zeropage(vma, start, end)
            else:
                done, error = mfill_atomic_copy(vma, start, raw, wp=wp)
        if wake and done:
            self.wake_userfault(start, start + done)
        if error is None:
            return done
        if done:
            raise PartlyCopied(done, f"{error.strerror}; {done:#x} bytes before it are there")
        raise error

    def writeprotect(self, addr: int, length: Size, on: bool = True, *, wake: bool = True) -> None:
        """Have stores to pages of [*addr*, *addr* + *length*) asked for, or let them through.

        What has no page is protected where the fd has the feature wp_unpopulated. Raises NoEntry
        where memory is not registered for it, with what comes before done; TryAgain as copy().
        Linux: userfaultfd_writeprotect(), fs/userfaultfd.c; mwriteprotect_range().
        """
        start, end = self._range(addr, length)
        how = MM_CP_UFFD_WP if on else MM_CP_UFFD_WP_RESOLVE
        with self.mm.mmap_sem.read():
            self._check_unchanging()
            vmas = vmas_in(self.mm, start, end)
            for vma in vmas:
                if not userfaultfd_wp(vma):
                    raise NoEntry(f"userfaultfd: {vma!r} is not registered for wp")
                change_protection(vma, max(start, vma.vm_start), min(end, vma.vm_end), how)
            if not vmas:
                raise NoEntry(f"userfaultfd: nothing is mapped in [{start:#x}, {end:#x})")
        if not on and wake:
            self.wake_userfault(start, end)

    def _check_unchanging(self) -> None:
        if self.mmap_changing:
            raise TryAgain("userfaultfd: memory is changing; read() what has happened first")

    def wake(self, addr: int | None = None, length: Size = 0) -> None:
        """Let those that wait for a range, or all, go on without an answer; they may be back.

        Linux: userfaultfd_wake(), fs/userfaultfd.c.
        """
        self.wake_userfault(*((0, TASK_SIZE_MAX) if addr is None else self._range(addr, length)))

    def read(self, *, block: bool = True) -> list[UffdMsg]:
        """The messages that nobody has read; without *block* WouldBlock is raised if there is none.

        Else it waits for one, or for the fd to be closed or the process to exit: then there will
        be none, and the list is empty. Faults come first. Linux: userfaultfd_read().
        """
        self.reader, locks = current(), self.mm.mem.locks
        unread: list[UserfaultfdWaiter] = []

        def take() -> bool:
            unread[:] = self.fault_pending + self.events
            return bool(unread) or self.released

        with locks.atomic:
            if not take() and not block:
                raise WouldBlock("userfaultfd: there is no message to read")
        if not unread:
            locks.wait_until(take, f"a message for {self!r}")
        return [self._taken(waiter) for waiter in unread]

    def _taken(self, waiter: UserfaultfdWaiter) -> UffdMsg:
        """Refile *waiter*, whose message has been read. Linux: userfaultfd_ctx_read()."""
        with self.mm.mem.locks.atomic:
            if waiter in self.fault_pending:
                self.fault_pending.remove(waiter)
                self.faults.append(waiter)
            elif waiter in self.events:
                self.events.remove(waiter)
                waiter.waken = True
                self.completed()
        return waiter.msg

    def __iter__(self) -> Iterator[UffdMsg]:
        """Every message, as it comes, until the fd is closed or the process exits."""
        while messages := self.read():
            yield from messages

    def close(self) -> None:
        """Let go of everything that is registered; who waits goes on. Again, it does nothing.

        Linux: userfaultfd_release(), fs/userfaultfd.c.
        """
        if self.released:
            return
        if not self.mm.exited:
            with self.mm.mmap_sem.write():
                self._clear(0, TASK_SIZE_MAX)
        self.release()

    def _range(self, addr: int, length: Size) -> tuple[int, int]:
        """Linux: validate_range(), fs/userfaultfd.c."""
        size = memparse(length)
        if self.mm.exited:
            raise NoSuchProcess(f"userfaultfd: process {self.mm.name} has exited")
        if self.released:
            raise InvalidArgument("userfaultfd: the fd is closed")
        if (addr | size) % PAGE_SIZE or size <= 0:
            raise InvalidRange(
                f"userfaultfd: [{addr:#x}, {addr + size:#x}) is not made of whole pages"
            )
        if addr < MMAP_MIN_ADDR or addr + size > TASK_SIZE_MAX:
            raise InvalidRange(
                f"userfaultfd: [{addr:#x}, {addr + size:#x}) is not inside "
                f"[{MMAP_MIN_ADDR:#x}, {TASK_SIZE_MAX:#x})"
            )
        return addr, addr + size


def open_userfaultfd(mm: MmStruct, features: str) -> UserfaultFd:
    """A new fd with *features*, words of UffdFeature in small letters between bars.

    Raises InvalidArgument. Linux: userfaultfd(2) and userfaultfd_api(), fs/userfaultfd.c.
    """
    words = set(features.split("|")) - {""}
    if not words <= set(_FEATURES):
        raise InvalidArgument(
            f"userfaultfd: features {features!r} are not among {'|'.join(_FEATURES)}"
        )
    asked = UffdFeature(0)
    for name in words:
        asked |= _FEATURES[name]
    if asked & UffdFeature.WP_ASYNC:
        asked |= UffdFeature.WP_UNPOPULATED
    return UserfaultFd(mm, asked)


def vma_can_userfault(vma: Vma) -> bool:
    """True for memory whose faults userland can serve. Linux: vma_can_userfault()."""
    return vma_is_anonymous(vma)


def find_dst_vma(mm: MmStruct, start: int, end: int) -> Vma:
    """The VMA that holds all of [*start*, *end*), whose missing pages userland brings.

    Raises NoEntry. Linux: find_dst_vma(), mm/userfaultfd.c.
    """
    vma = find_vma(mm, start)
    if vma is None or start < vma.vm_start or end > vma.vm_end:
        raise NoEntry(f"userfaultfd: [{start:#x}, {end:#x}) is not inside one VMA")
    if vma.vm_userfaultfd_ctx is None:
        raise NoEntry(f"userfaultfd: {vma!r} is not registered")
    return vma


def mfill_atomic_copy(
    vma: Vma, start: int, raw: Payload, *, wp: bool
) -> tuple[int, MmError | None]:
    """Map fresh pages with the bytes *raw* at *start* of *vma*, up to the first that is there.

    The bytes that are there now, and why it stopped, if it did. mmap_sem is held for read.
    Linux: mfill_atomic_copy() and mfill_atomic_pte_copy(), mm/userfaultfd.c.
    """
    mm, mem, cpu = vma.vm_mm, vma.vm_mm.mem, current_task().cpu
    payload, addrs = payload_of(mem), np.arange(start, start + raw.size, PAGE_SIZE)
    anon_vma_prepare(vma)
    at = pte_offset_alloc(mm, addrs)
    wanted = _leading(pte_none_mostly(mem.tables.entries[at]))
    pfns = alloc_charged_pages(vma, addrs[:wanted], GFP_HIGHUSER_MOVABLE)
    memcpy_to_pages(payload, pfns, 0, raw[: pfns.size << PAGE_SHIFT])
    with mm.page_table_lock:
        count = _leading(pte_none_mostly(mem.tables.entries[at[: pfns.size]]))
        mapped = pfns[:count]
        mem.flags[mapped] |= PG_uptodate
        page_add_new_anon_rmap(vma, mapped, addrs[:count])
        entries = mk_pte(mapped, vma.vm_page_prot) | maybe_mkwrite(vma)
        mem.tables.entries[at[:count]] = pte_mkuffd_wp(entries) if wp else entries
        mm.anon_rss += count
    lru_cache_add_active(mem, mapped, cpu)
    put_page(mem, pfns[count:], cpu)  # another thread was first
    if count == pfns.size < wanted:
        addr, memcg = addrs.item(count), mem_cgroup_oom_synchronize() or mm.memcg
        where = "the machine" if memcg is None else f"{memcg}"
        why = f"userfaultfd: {where} has no room for the page at {addr:#x}; unmap something"
        return count << PAGE_SHIFT, OutOfMemory(why)
    return _filled(addrs, count)


def mfill_atomic_zeropage(vma: Vma, start: int, end: int) -> tuple[int, MmError | None]:
    """Map the zero page in [*start*, *end*) of *vma*, up to the first page that is there.

    As mfill_atomic_copy(), but a marker is in the way too.
    Linux: mfill_atomic_zeropage() and mfill_atomic_pte_zeropage(), mm/userfaultfd.c.
    """
    mm, mem, addrs = vma.vm_mm, vma.vm_mm.mem, np.arange(start, end, PAGE_SIZE)
    anon_vma_prepare(vma)
    at = pte_offset_alloc(mm, addrs)
    zero = mk_pte(pages(mem.zero_pfn), vma.vm_page_prot)[0] | _PAGE_SPECIAL
    with mm.page_table_lock:
        count = _leading(pte_none(mem.tables.entries[at]))
        mem.tables.entries[at[:count]] = zero
    return _filled(addrs, count)


def _leading(holes: Mask) -> int:
    """How many of *holes* come before the first that is none."""
    return holes.size if every(holes) else int(holes.argmin())


def _filled(addrs: Addresses, count: int) -> tuple[int, MmError | None]:
    """The bytes of *count* pages, and what there is to say if those are not all."""
    if count == addrs.size:
        return count << PAGE_SHIFT, None
    where = addrs.item(count)
    return count << PAGE_SHIFT, Exists(f"userfaultfd: there is a page at {where:#x} already")


def _drop_stale_uffd_wp(vma: Vma, start: int, end: int) -> None:
    """Stores that went through while nobody asked for them go on to, until they are asked for.

    An fd that is registered for missing pages after it was for stores leaves its bits behind; in
    Linux such an entry is writable and write-protected.
    """
    mm = vma.vm_mm
    for run in walk_page_range(mm.mem.tables, mm.pgd, start, end, holes=False):
        with mm.page_table_lock:
            ptes, present = run.ptes, pte_present(run.ptes)
            run.ptes[present & pte_write(ptes)] &= _NOT_UFFD_WP
            run.ptes[make_readable(ptes) != ptes] &= _NOT_SWP_UFFD_WP
