"""Faults that userland serves, and events that it hears of: userfaultfd as the core sees it.

    handle_userfault   a fault finds that it is not the kernel's to serve
    Userfault.wait     with mmap_sem let go of, the faulting thread asks: it calls the handler, or
                       queues for whoever reads the fd, until somebody says that it may go on
    (fork, mremap, munmap, madvise) prepare an event under mmap_sem, and complete it without

What userland does about it, and the fd itself, are in mm/userfaultfd.py.

Unlike Linux v4.20, which knows faults on missing pages alone, stores to pages can be asked for too
(v5.7), with markers where there is no page yet (v6.4), or let through and noted (v6.7).
Linux: fs/userfaultfd.c, include/linux/userfaultfd_k.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final, NamedTuple

from mm.errors import TimedOut
from mm.locking import NOBODY, current, preempt
from mm.pgtable import pte_offset, pte_present, pte_uffd_wp
from mm.sched import current_task
from mm.swapops import pte_none_mostly
from mm.types import (
    VM_FAULT_USERFAULT,
    VM_UFFD_FLAGS,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    MmStruct,
    Vma,
    VmFault,
    vma_is_anonymous,
)
from mm.typing import Mask, Ptes, pages
from mm.vectors import some

PATIENCE: Final = 10.0  # seconds that a fault waits for its answer unless the fd says otherwise


class UffdFeature(IntFlag):
    """What an fd is to do besides. Linux: UFFD_FEATURE_*, include/uapi/linux/userfaultfd.h."""

    PAGEFAULT_FLAG_WP = 1 << 0  # faults by stores to write-protected pages; always there
    EVENT_FORK = 1 << 1  # the child's memory has an fd of its own
    EVENT_REMAP = 1 << 2  # memory that mremap() moves goes on to report
    EVENT_REMOVE = 1 << 3  # madvise() drops contents
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7  # nobody is asked: the fault ends with SIGBUS
    THREAD_ID = 1 << 8  # messages say which thread it is
    WP_UNPOPULATED = 1 << 13  # what has no page yet can be write-protected; since v6.4
    WP_ASYNC = 1 << 15  # a store loses the protection, and nobody is asked; since v6.7


class UffdEvent(IntEnum):
    """What a message tells. Linux: UFFD_EVENT_*, include/uapi/linux/userfaultfd.h."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class UffdMsg(NamedTuple):
    """What userland reads. Linux: struct uffd_msg, include/uapi/linux/userfaultfd.h.

    address: page that faulted, or start of what moved or went; end: where that ends; to: where it
    moved; write: it was a store; wp: to a page that is there, and write-protected; thread: the
    number of who faulted, if asked for; fd: that of the child that was forked.
    """

    event: UffdEvent
    address: int = 0
    end: int = 0
    to: int = 0
    write: bool = False
    wp: bool = False
    thread: int = 0
    fd: Any = None


@dataclass(slots=True, eq=False)
class UserfaultfdWaiter:
    """Somebody who waits. Linux: struct userfaultfd_wait_queue, fs/userfaultfd.c."""

    msg: UffdMsg
    waken: bool = False


class UserfaultfdCtx:
    """Who waits for userland, and why. Linux: struct userfaultfd_ctx, fs/userfaultfd.c.

    handler: called with each message by the thread that it is about, holding no lock; without one
    messages queue for whoever reads. timeout: seconds that a fault waits for its answer, None for
    ever.
    """

    def __init__(self, mm: MmStruct, features: UffdFeature) -> None:
        self.mm = mm
        self.features = features
        self.handler: Callable[[UffdMsg], object] | None = None
        self.timeout: float | None = PATIENCE
        self.released = False
        self.mmap_changing = 0  # events that userland has not heard of
        self.fault_pending: list[UserfaultfdWaiter] = []  # faults nobody has read
        self.faults: list[UserfaultfdWaiter] = []  # those that somebody has
        self.events: list[UserfaultfdWaiter] = []  # nobody has read
        self.reader = NOBODY  # the last thread that read
        mm.userfaultfds.append(self)

    def wake_userfault(self, start: int, end: int) -> None:
        """Let the faults at [*start*, *end*) go on. Linux: wake_userfault(), fs/userfaultfd.c."""
        with self.mm.mem.locks.atomic:
            for waiter in (*self.fault_pending, *self.faults):
                waiter.waken |= start <= waiter.msg.address < end
            self.mm.mem.locks.wake_up()

    def release(self) -> None:
        """Nobody will answer any more: all that wait go on.

        Linux: the beginning and the end of userfaultfd_release(), fs/userfaultfd.c.
        """
        with self.mm.mem.locks.atomic:
            self.released = True
            events, self.events = self.events, []
            self.mmap_changing = 0
            if self in self.mm.userfaultfds:
                self.mm.userfaultfds.remove(self)
            self.mm.mem.locks.wake_up()
        for waiter in events:
            if waiter.msg.fd is not None:
                waiter.msg.fd.close()  # nobody else will ever have it

    def event(self, msg: UffdMsg) -> None:
        """Let userland hear of *msg*, for which mmap_changing was counted. Called without locks.

        A thread that reads is waited for until it has. Unlike in Linux, whoever does not read yet
        is not: the event stays in the queue, and until it is read no page can be brought.
        Linux: userfaultfd_event_wait_completion(), fs/userfaultfd.c.
        """
        if self.handler is not None and not self.released:
            self.completed()
            self.handler(msg)
            return
        locks, waiter = self.mm.mem.locks, UserfaultfdWaiter(msg)
        with locks.atomic:
            gone = self.released
            if not gone:
                self.events.append(waiter)
                locks.wake_up()
        if gone and msg.fd is not None:
            msg.fd.close()
        if self.reader not in (NOBODY, current()):
            locks.wait_until(lambda: waiter.waken or self.released, repr(self), self.timeout)

    def completed(self) -> None:
        """Userland knows of one of the events. Linux: userfaultfd_event_complete()."""
        with self.mm.mem.locks.atomic:
            self.mmap_changing -= not self.released
            self.mm.mem.locks.wake_up()


# VMAs


def userfaultfd_missing(vma: Vma) -> bool:
    """True where userland brings missing pages. Linux: userfaultfd_missing()."""
    return bool(vma.vm_flags & VM_UFFD_MISSING)


def userfaultfd_wp(vma: Vma) -> bool:
    """True where userland may write-protect pages. Linux: userfaultfd_wp(), v5.7."""
    return bool(vma.vm_flags & VM_UFFD_WP)


def userfaultfd_wp_async(vma: Vma) -> bool:
    """True where a store is noted, and goes through. Linux: userfaultfd_wp_async(), v6.7."""
    ctx: UserfaultfdCtx | None = vma.vm_userfaultfd_ctx
    return ctx is not None and bool(ctx.features & UffdFeature.WP_ASYNC)


def userfaultfd_wp_use_markers(vma: Vma) -> bool:
    """True where what has no page is write-protected too.

    Linux: userfaultfd_wp_use_markers(), include/linux/userfaultfd_k.h, v6.4.
    """
    if not userfaultfd_wp(vma):
        return False
    ctx: UserfaultfdCtx = vma.vm_userfaultfd_ctx
    return not vma_is_anonymous(vma) or bool(ctx.features & UffdFeature.WP_UNPOPULATED)


def userfaultfd_pte_wp(vma: Vma, ptes: Ptes) -> Mask:
    """True where a store to an entry of *vma* is userland's to allow.

    Linux: userfaultfd_pte_wp(), include/linux/userfaultfd_k.h.
    """
    return pte_uffd_wp(ptes) & userfaultfd_wp(vma)


# faults


def handle_userfault(vma: Vma, reason: VmFault) -> int:
    """What a fault in *vma* that is userland's to serve comes to: *reason*, UFFD_MISSING or _WP.

    With it goes RETRY: whoever can let go of mmap_sem waits (Userfault) and tries again. For
    whoever cannot it is an error, as it is for all where the fd says SIGBUS.
    Linux: handle_userfault(), fs/userfaultfd.c.
    """
    ctx: UserfaultfdCtx = vma.vm_userfaultfd_ctx
    return int(VmFault.SIGBUS if ctx.features & UffdFeature.SIGBUS else reason | VmFault.RETRY)


class Userfault(NamedTuple):
    """A fault at *addr* that userland has to serve, by a store or a load; *wp* of a page there."""

    ctx: UserfaultfdCtx
    addr: int
    write: bool
    wp: bool

    def wait(self) -> None:
        """Ask userland, and wait until it says that the fault may come again.

        The caller holds no lock. Raises TimedOut if nobody answers, and whatever the handler
        raises. The fault counts as a major one. Linux: handle_userfault(), fs/userfaultfd.c.
        """
        preempt("handle_userfault")
        ctx, mem = self.ctx, self.ctx.mm.mem
        thread = current() if ctx.features & UffdFeature.THREAD_ID else 0
        msg = UffdMsg(UffdEvent.PAGEFAULT, self.addr, write=self.write, wp=self.wp, thread=thread)
        handler, waiter = ctx.handler, UserfaultfdWaiter(msg)
        with mem.locks.atomic:
            (ctx.fault_pending if handler is None else ctx.faults).append(waiter)
            mem.locks.wake_up()
        try:
            if handler is not None and self.must_wait():
                handler(msg)
            if self.must_wait():
                self._wait(waiter)
        finally:
            with mem.locks.atomic:
                for queue in (ctx.fault_pending, ctx.faults):
                    if waiter in queue:
                        queue.remove(waiter)
        mem.vmstat.add("pgfault", 1)
        current_task().maj_flt += 1

    def must_wait(self) -> bool:
        """Would the fault come again? Linux: userfaultfd_must_wait(), fs/userfaultfd.c."""
        ctx, mm = self.ctx, self.ctx.mm
        with mm.mmap_sem.read():
            if not any(
                vma.vm_userfaultfd_ctx is ctx and vma.vm_start <= self.addr < vma.vm_end
                for vma in mm.vmas
            ):
                return False
            with mm.page_table_lock:
                pool = mm.mem.tables
                ptes = pool.entries[pte_offset(pool, mm.pgd, pages(self.addr))]
            if self.wp:
                return some(pte_present(ptes) & pte_uffd_wp(ptes))
            return some(pte_none_mostly(ptes))

    def _wait(self, waiter: UserfaultfdWaiter) -> None:
        ctx = self.ctx
        what = f"userfaultfd of {ctx.mm.name} to serve {self.addr:#x}"
        answered = ctx.mm.mem.locks.wait_until(
            lambda: waiter.waken or ctx.released, what, ctx.timeout
        )
        if not answered:
            why = "store to" if self.wp else "page at"
            raise TimedOut(
                f"{ctx.mm.name}: nobody has answered for {ctx.timeout} s for the {why} "
                f"{self.addr:#x}; read() the userfaultfd, or give it a handler, and answer with "
                f"copy(), zeropage(), writeprotect() or wake()"
            )


def userfault(vma: Vma, addr: int, fault: int, *, write: bool) -> Userfault | None:
    """What *fault*, of an access to *addr*, waits for; None if that is not userland.

    Linux: userfault_msg(), fs/userfaultfd.c.
    """
    if not fault & VM_FAULT_USERFAULT:
        return None
    return Userfault(vma.vm_userfaultfd_ctx, addr, write, bool(fault & VmFault.UFFD_WP))


# events


def _prepare(ctx: UserfaultfdCtx, msg: UffdMsg) -> None:
    """Have userland hear of *msg* once mmap_sem is let go of; until then it can bring no page."""
    with ctx.mm.mem.locks.atomic:
        ctx.mmap_changing += 1
    ctx.mm.uffd_events.append((ctx, msg))


def userfaultfd_complete(mm: MmStruct) -> None:
    """Tell what has been prepared; called when mmap_sem of *mm* has been let go of.

    Linux: mremap_userfaultfd_complete(), userfaultfd_unmap_complete(), fs/userfaultfd.c.
    """
    events, mm.uffd_events = mm.uffd_events, []
    for ctx, msg in events:
        ctx.event(msg)


def dup_userfaultfd(vma: Vma, old: Vma) -> None:
    """Let *vma*, a child's copy of *old*, report to an fd of its own, if that of *old* says so.

    Linux: dup_userfaultfd(), fs/userfaultfd.c.
    """
    ctx: UserfaultfdCtx | None = old.vm_userfaultfd_ctx
    if ctx is None or not ctx.features & UffdFeature.EVENT_FORK:
        vma.vm_flags &= ~VM_UFFD_FLAGS
        return
    child = next((msg.fd for of, msg in old.vm_mm.uffd_events if of is ctx), None)
    if child is None:
        child = type(ctx)(vma.vm_mm, ctx.features)
        child.timeout = ctx.timeout
        _prepare(ctx, UffdMsg(UffdEvent.FORK, fd=child))
    vma.vm_userfaultfd_ctx = child
    vma.vm_mm.uffd_wp = old.vm_mm.uffd_wp


def dup_userfaultfd_fail(mm: MmStruct, old: MmStruct) -> None:
    """*mm*, which was to be a copy of *old*, is gone, and nobody hears of its fds.

    Linux: dup_userfaultfd_fail(), fs/userfaultfd.c, v6.12.
    """
    for prepared in tuple(old.uffd_events):
        ctx, msg = prepared
        if msg.fd is not None and msg.fd.mm is mm:
            old.uffd_events.remove(prepared)
            ctx.completed()


def vma_has_uffd_without_event_remap(vma: Vma) -> bool:
    """True where memory that leaves *vma* for another address leaves its fd, too.

    Linux: vma_has_uffd_without_event_remap(), include/linux/userfaultfd_k.h, v6.13.
    """
    ctx: UserfaultfdCtx | None = vma.vm_userfaultfd_ctx
    return ctx is not None and not ctx.features & UffdFeature.EVENT_REMAP


def mremap_userfaultfd_prep(vma: Vma, start: int, to: int, length: int) -> None:
    """*length* bytes have moved from *start* to *to*, in *vma*.

    Linux: mremap_userfaultfd_prep(), fs/userfaultfd.c.
    """
    ctx: UserfaultfdCtx | None = vma.vm_userfaultfd_ctx
    if ctx is not None:
        _prepare(ctx, UffdMsg(UffdEvent.REMAP, start, start + length, to))


def userfaultfd_unmap_prep(vmas: list[Vma], start: int, end: int) -> None:
    """*vmas* go, for somebody unmaps [*start*, *end*): each fd hears of it once.

    Linux: userfaultfd_unmap_prep(), fs/userfaultfd.c.
    """
    told: list[UserfaultfdCtx] = []
    for vma in vmas:
        ctx: UserfaultfdCtx | None = vma.vm_userfaultfd_ctx
        if ctx is not None and ctx.features & UffdFeature.EVENT_UNMAP and ctx not in told:
            told.append(ctx)
            _prepare(ctx, UffdMsg(UffdEvent.UNMAP, start, end))


def userfaultfd_remove(mm: MmStruct, start: int, end: int) -> None:
    """Tell whoever wants to know that what is in [*start*, *end*) is about to be dropped.

    Takes mmap_sem for read, and does not hold it when that is told.
    Linux: userfaultfd_remove(), fs/userfaultfd.c.
    """
    with mm.mmap_sem.read():
        for vma in mm.vmas:
            ctx: UserfaultfdCtx | None = vma.vm_userfaultfd_ctx
            if ctx is None or not ctx.features & UffdFeature.EVENT_REMOVE:
                continue
            if vma.vm_start < end and start < vma.vm_end:
                first, last = max(start, vma.vm_start), min(end, vma.vm_end)
                _prepare(ctx, UffdMsg(UffdEvent.REMOVE, first, last))
    userfaultfd_complete(mm)


def userfaultfd_exit(mm: MmStruct) -> None:
    """*mm* goes: who waits in it goes on, and finds nothing there. The kernel kills such threads.

    Linux: exit_mmap(), mm/mmap.c.
    """
    for ctx in tuple(mm.userfaultfds):
        ctx.release()
