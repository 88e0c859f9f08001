"""A process: an address space, and the system calls and memory accesses made in it."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from mm.array import ProcessArray
from mm.cpuset import Cpuset, cpuset_attach
from mm.cred import ROOT, Cred, ptrace_may_access
from mm.errors import (
    AccessDenied,
    InputOutputError,
    InvalidArgument,
    InvalidRange,
    NoSuchNode,
    OutOfMemory,
)
from mm.fork import dup_mmap
from mm.fs import File
from mm.gup import (
    FOLL_FORCE,
    FOLL_LONGTERM,
    FOLL_WRITE,
    Pin,
    access_remote_vm,
    get_user_pages,
    mm_populate,
    pin_user_pages,
)
from mm.madvise import do_madvise
from mm.mbind import do_mbind, do_set_mempolicy, kernel_migrate_pages
from mm.mem_cgroup import MemCgroup
from mm.memcontrol_v1 import mem_cgroup_attach
from mm.memparse import Size, memparse
from mm.mempolicy import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT
from mm.mincore import do_mincore
from mm.mlock import do_mlock, do_munlock
from mm.mmap import TASK_SIZE_MAX, do_mmap, do_munmap, exit_mmap, find_vma
from mm.mprotect import do_mprotect
from mm.mremap import Mremap, do_mremap
from mm.numa import kernel_move_pages
from mm.numa_maps import NumaMaps, numa_maps
from mm.sched import Task, running
from mm.task_mmu import MemSizeStats, clear_refs, pagemap, smaps
from mm.types import (
    VM_EXEC,
    VM_LOCKED,
    VM_LOCKONFAULT,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_NORESERVE,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    MemMap,
    MmStruct,
    Vma,
)
from mm.typing import Errnos, Mask, Payload, Ptes
from mm.uaccess import copy_from_user, copy_to_user, touch_pages
from mm.userfaultfd import UserfaultFd, open_userfaultfd
from mm.userfaultfd_k import userfaultfd_complete
from mm.vectors import integers

_PROT: Final = {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC, "-": 0}
_MAP: Final = {
    "anon": 0,
    "file": 0,
    "private": 0,
    "shared": VM_SHARED | VM_MAYSHARE,
    "populate": 0,
    "locked": VM_LOCKED,
    "noreserve": VM_NORESERVE,
}
_MOVE: Final = {"move": MPOL_MF_MOVE, "moveall": MPOL_MF_MOVE_ALL}
_BIND: Final = {**_MOVE, "strict": MPOL_MF_STRICT}
_MREMAP: Final = {flag.name.lower(): flag for flag in Mremap if flag.name}


def _prot(call: str, prot: str) -> int:
    """The VM_* flags that the letters of *prot* stand for."""
    wrong = sorted(set(prot) - set(_PROT))
    if wrong or not prot:
        raise InvalidArgument(f'{call}: prot {prot!r} is not made of the letters r, w, x or "-"')
    vm_flags = 0
    for letter in prot:
        vm_flags |= _PROT[letter]
    return vm_flags


class Process(Task):
    """A task with its own mm_struct; made by `Machine.spawn()`. Linux: struct task_struct.

    cred: who it is (mm/cred.py). rlimit_memlock: how many bytes it may lock in memory unless it
    has the capability ipc_lock.
    """

    mm: MmStruct

    def __init__(self, mem: MemMap, name: str, cpu: int = 0, cred: Cred = ROOT) -> None:
        super().__init__(name, cpu)
        self.cred = cred
        self.mm = MmStruct(mem, name)
        self._cpuset: Cpuset | None = None

    def __repr__(self) -> str:
        return f"<Process {self.name}{', exited' if self.mm.exited else ''}>"

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.exit()

    def mmap(
        self,
        length: Size,
        prot: str = "rw",
        flags: str | None = None,
        file: File | None = None,
        addr: int | None = None,
        offset: int = 0,
    ) -> int:
        """Map *length* bytes of zeros, or of *file* from *offset* on; the address.

        *prot*: letters of r, w, x, or "-" for none. *addr*: exactly there, in place of what was
        mapped before (MAP_FIXED). *flags*, with bars between them: "anon" for zeros, or "file";
        "private", where nobody else sees what is stored, or "shared", where all do who map the
        file, or fork; "populate" to fault all of it in, "locked" to keep it in memory as mlock()
        does, "noreserve" to account for none of it. Without, it is "anon|private", or
        "file|shared". That memory is too short for all of it is no error.
        Raises InvalidArgument, InvalidRange, OutOfMemory, AccessDenied. Linux: mmap(2).
        """
        if flags is None:
            flags = "anon|private" if file is None else "file|shared"
        words = set(flags.split("|"))
        kinds = words & {"anon", "file"}, words & {"private", "shared"}
        if words - set(_MAP) or [len(kind) for kind in kinds] != [1, 1]:
            raise InvalidArgument(
                f"mmap: flags {flags!r} are not one of anon, file, and one of private, shared, "
                f"with any of populate, locked, noreserve"
            )
        if (file is None) != ("anon" in words):
            raise InvalidArgument(f"mmap: flags {flags!r} do not go with file={file!r}")
        vm_flags = _prot("mmap", prot) | VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC
        for flag in words:
            vm_flags |= _MAP[flag]
        mm, size = self._alive(), memparse(length)
        with running(self):
            with mm.mmap_sem.write():
                start = do_mmap(mm, addr, size, vm_flags, file, offset)
            if mm.uffd_events:
                userfaultfd_complete(mm)
            if words & {"populate", "locked"}:
                mm_populate(mm, start, size)
        return start

    def munmap(self, addr: int, length: Size) -> None:
        """Unmap [*addr*, *addr* + *length*). Linux: munmap(2)."""
        mm, size = self._alive(), memparse(length)
        with running(self):
            with mm.mmap_sem.write():
                do_munmap(mm, addr, size)
            if mm.uffd_events:
                userfaultfd_complete(mm)

    def mprotect(self, addr: int, length: Size, prot: str) -> None:
        """Let [*addr*, *addr* + *length*) have the rights *prot*, as mmap() takes them.

        Raises InvalidArgument; NotMapped at a hole, with the rights changed up to it.
        Linux: mprotect(2).
        """
        with running(self):
            do_mprotect(self._alive(), addr, memparse(length), _prot("mprotect", prot))

    def mremap(
        self,
        old_addr: int,
        old_length: Size,
        new_length: Size,
        flags: str = "maymove",
        new_addr: int | None = None,
    ) -> int:
        """Give memory another size, or another address, and take its contents along; where it is.

        *flags*: "maymove" lets it move if it cannot grow where it is, with "fixed" it goes to
        *new_addr*, with "dontunmap" it leaves empty memory behind; "" keeps it where it is.
        Raises InvalidArgument, InvalidRange, SegmentationFault, OutOfMemory. Linux: mremap(2).
        """
        words = set(flags.split("|")) - {""}
        if not words <= set(_MREMAP):
            raise InvalidArgument(f"mremap: flags {flags!r} are not of {', '.join(_MREMAP)}")
        how = Mremap(0)
        for flag in words:
            how |= _MREMAP[flag]
        sizes = memparse(old_length), memparse(new_length)
        with running(self):
            return do_mremap(self._alive(), old_addr, *sizes, how, new_addr)

    def madvise(self, addr: int, length: Size, advice: str) -> None:
        """Say what is known about [*addr*, *addr* + *length*): a word of mm.madvise.ADVICE.

        Raises InvalidArgument; NotMapped where the range has holes. Linux: madvise(2).
        """
        with running(self):
            do_madvise(self._alive(), addr, memparse(length), advice)

    def mlock(self, addr: int, length: Size, *, onfault: bool = False) -> None:
        """Keep the pages of a range in memory, and bring them there now unless *onfault*.

        Raises NotMapped at a hole or where no access is allowed, TryAgain where memory is short.
        Linux: mlock2(2).
        """
        vm_flags = VM_LOCKED | VM_LOCKONFAULT if onfault else VM_LOCKED
        with running(self):
            do_mlock(self._alive(), addr, memparse(length), vm_flags)

    def munlock(self, addr: int, length: Size) -> None:
        """Let the pages of a range go again. Raises NotMapped at a hole. Linux: munlock(2)."""
        with running(self):
            do_munlock(self._alive(), addr, memparse(length))

    def mincore(self, addr: int, length: Size) -> Mask:
        """Which pages of a range are in memory, bool[pages]; raises NotMapped at a hole.

        Linux: mincore(2).
        """
        return do_mincore(self._alive(), addr, memparse(length))

    def fork(self, name: str = "child") -> Process:
        """A second process on the same CPU, with the same memory, policies and credentials.

        Each sees what it stores, and not what the other does: pages are copied as they are stored
        to, wherever they are, and those that are pinned at once. Memory advised "dontfork" is
        left out, "wipeonfork" is empty there, and none of it is locked. Raises OutOfMemory.
        Linux: fork(2).
        """
        oldmm = self._alive()
        child = Process(oldmm.mem, name, self.cpu, self.cred)
        child.mempolicy, child.il_next = self.mempolicy, self.il_next
        child.rlimit_memlock = self.rlimit_memlock
        with running(self):
            dup_mmap(child.mm, oldmm)
        if self._cpuset is not None:
            child.mems_allowed = self.mems_allowed
            child.cpuset = self._cpuset
        return child

    def userfaultfd(self, features: str = "") -> UserfaultFd:
        """A file by which faults of this process can be served; see mm/userfaultfd.py.

        *features*, with bars between them: "sigbus" (faults end with BusError, and nobody is
        asked), "event_fork", "event_remap", "event_remove", "event_unmap" (messages about those),
        "thread_id", "wp_unpopulated" (what has no page can be write-protected), "wp_async" (stores
        go through, and unprotect). Raises InvalidArgument. Linux: userfaultfd(2).
        """
        return open_userfaultfd(self._alive(), features)

    def move_to(self, group: MemCgroup | None) -> None:
        """Join the control group *group*, None for the root: it pays for new pages from now on.

        What the process has comes along, in memory, on devices and in swap, unless the group's
        `move_charge_at_immigrate` is False. Raises InvalidArgument; OutOfMemory where the group has
        no room, and then the process stays where it is. Linux: writing cgroup.procs.
        """
        mm = self._alive()
        if group is not None and group.mem is not mm.mem:
            raise InvalidArgument(f"move_to: {group!r} is of another machine than {self.name}")
        with running(self):
            mem_cgroup_attach(mm, group)

    @property
    def cgroup(self) -> MemCgroup | None:
        """The control group that pays for its pages; None is the root. Linux: /proc/PID/cgroup."""
        memcg: MemCgroup | None = self.mm.memcg
        return memcg

    @property
    def cpuset(self) -> Cpuset | None:
        """The nodes that the process may use; None: all. Set it to go from one to another.

        Raises InvalidArgument for nodes that the machine does not have.
        Linux: writing the tasks of a cpuset.
        """
        return self._cpuset

    @cpuset.setter
    def cpuset(self, cpuset: Cpuset | None) -> None:
        cpuset_attach(cpuset, self, self._alive(), self._cpuset)
        self._cpuset = cpuset

    def exit(self) -> None:
        """Give all memory back; later calls do nothing. Linux: mmput(), kernel/fork.c."""
        if self.mm.exited:
            return
        with running(self), self.mm.mmap_sem.write():
            exit_mmap(self.mm)

    def find_vma(self, addr: int) -> Vma | None:
        """The VMA that holds *addr*, None where nothing is mapped."""
        vma = find_vma(self.mm, addr)
        return vma if vma is not None and vma.vm_start <= addr else None

    def read(self, addr: int, nbytes: int) -> bytes:
        """CPU load of *nbytes*. Raises SegmentationFault, BusError, OutOfMemory."""
        self._check_range("read", addr, nbytes)
        out = np.empty(nbytes, dtype=np.uint8)
        with running(self):
            copy_from_user(self._alive(), addr, out)
        return out.tobytes()

    def write(self, addr: int, data: Any) -> None:
        """CPU store of *data*, anything with a buffer. Raises as read(); a fault in the middle
        leaves what came before it stored."""
        raw = np.frombuffer(data, dtype=np.uint8)
        self._check_range("write", addr, raw.size)
        with running(self):
            copy_to_user(self._alive(), addr, raw)

    def touch(self, addr: int, nbytes: Size, *, write: bool = True) -> None:
        """CPU access to each page of a range that leaves the bytes as they are."""
        size = memparse(nbytes)
        self._check_range("touch", addr, size)
        with running(self):
            touch_pages(self._alive(), addr, size, write=write)

    def array(self, shape: int | tuple[int, ...], dtype: Any = "float64") -> ProcessArray:
        """New anonymous memory that looks like an array of zeros."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        if kind.hasobject or kind.itemsize == 0 or any(extent < 1 for extent in shape):
            raise InvalidArgument(f"array: no memory holds shape {shape} of dtype {dtype!r}")
        addr = self.mmap(int(np.prod(shape, dtype=object)) * kind.itemsize)
        return ProcessArray(self.mm, addr, shape, kind, self)

    def mem_read(self, addr: int, nbytes: int, of: Process | None = None) -> bytes:
        """Read /proc/PID/mem, as a debugger does: as read(), whatever rights the mapping gives.

        *of*: the process whose memory it is, where not this one's own. Fewer bytes where a page
        after the first cannot be had; raises InputOutputError where it is the first, AccessDenied
        where *of* is out of reach. Linux: mem_read(), fs/proc/base.c.
        """
        out = np.empty(nbytes, dtype=np.uint8)
        return out[: self._mem_rw("mem_read", addr, out, of or self, write=False)].tobytes()

    def mem_write(self, addr: int, data: Any, of: Process | None = None) -> int:
        """Write *data* to /proc/PID/mem; the bytes written, which may be fewer.

        A private mapping that the process may not write gets pages of its own, as by a store.
        Raises as mem_read(). Linux: mem_write(), fs/proc/base.c.
        """
        raw = np.frombuffer(data, dtype=np.uint8)
        return self._mem_rw("mem_write", addr, raw, of or self, write=True)

    def _mem_rw(self, call: str, addr: int, buf: Payload, of: Process, *, write: bool) -> int:
        """Linux: mem_open(), which checks the rights, and mem_rw(), fs/proc/base.c."""
        self._check_range(call, addr, buf.size)
        with running(self):
            if not ptrace_may_access(of, fscreds=True):
                raise AccessDenied(f"{call}: {self.name} may not look into {of.name}")
            done = access_remote_vm(of._alive(), addr, buf, write=write)
        if buf.size and not done:
            raise InputOutputError(f"{call}: {of.name} has no page to use at {addr:#x}")
        return done

    def pin(
        self,
        addr: int,
        nbytes: Size,
        *,
        write: bool = True,
        longterm: bool = False,
        force: bool = False,
        plain: bool = False,
    ) -> Pin:
        """Hold the pages of a range in place, as a device does that reads them by DMA.

        longterm: for more than one transfer, so out of device memory. force: whatever rights the
        mapping gives. plain: by ordinary references, as vmsplice() does, not by pins.
        Raises SegmentationFault, BusError, OutOfMemory, Busy, and then holds nothing.
        """
        size = memparse(nbytes)
        self._check_range("pin", addr, size)
        flags = FOLL_WRITE * write | FOLL_LONGTERM * longterm | FOLL_FORCE * force
        hold = get_user_pages if plain else pin_user_pages
        with running(self):
            return hold(self._alive(), addr, size, flags)

    def set_mempolicy(self, mode: str, nodes: Sequence[int] = ()) -> None:
        """From now on take new pages from *nodes* in the way of *mode*.

        *mode*: "default" (the node of the CPU, then the nearest), "local" (the same, said aloud),
        "preferred" (the first of *nodes*, then the nearest), "bind" (*nodes* and no others) or
        "interleave" (one after the other). Raises InvalidArgument. Linux: set_mempolicy(2).
        """
        with running(self):
            do_set_mempolicy(self._alive().mem, self, mode, nodes)

    def mbind(
        self, addr: int, length: Size, mode: str, nodes: Sequence[int] = (), flags: str = ""
    ) -> None:
        """Give a range a policy of its own, as set_mempolicy() has them.

        *flags*, with bars between them: "move" pages that are elsewhere and that only this process
        maps, "moveall" those of others too; "strict": raise Misplaced where one stays elsewhere.
        Raises InvalidArgument, SegmentationFault; PermissionDenied, as "moveall" needs sys_nice.
        Linux: mbind(2).
        """
        mm, word = self._alive(), _flag_word("mbind", flags, _BIND)
        with running(self):
            do_mbind(mm, addr, memparse(length), mode, nodes, word)

    def move_pages(
        self,
        addrs: ArrayLike,
        nodes: ArrayLike | None = None,
        flags: str = "move",
        of: Process | None = None,
    ) -> Errnos:
        """Move the page at each of *addrs* to its node, or without *nodes* ask where it is.

        *nodes*: one for each of *addrs*, or one for all. *flags*: "move" pages that only this
        process maps, or "moveall". *of*: the process whose pages they are, where not its own.
        Returns int32[n]: the node where the page is, or a negative errno: -ENOENT not present, or
        in device memory; -EFAULT nothing is mapped, or only the zero page; -EACCES others map it;
        -EBUSY, -EAGAIN it, or one of the pages that were to move with it or before, could not be
        moved: ask where it is.
        Raises InvalidArgument; PermissionDenied where *of* is out of reach, or "moveall" is without
        sys_nice; NoSuchNode, AccessDenied for a node that *of* may not use, and OutOfMemory, where
        pages up to there have moved.
        Linux: move_pages(2).
        """
        self._alive()
        whose = of or self
        mm, word = whose._alive(), _flag_word("move_pages", flags, _MOVE)
        where = integers("move_pages: addrs", addrs)
        to = None if nodes is None else integers("move_pages: nodes", nodes)
        if to is not None and to.size != where.size:
            if to.size != 1:
                raise InvalidArgument(
                    f"move_pages: {to.size} nodes for {where.size} addrs; give each one, or all one"
                )
            to = to.repeat(where.size)
        with running(self):
            error, status = kernel_move_pages(mm, where, to, word, task=whose)
        if error == -errno.ENODEV:
            raise NoSuchNode(
                f"move_pages: nodes {to}: the machine has 0..{len(mm.mem.nodes) - 1}; pages before "
                f"the first of the others have been moved"
            )
        if error == -errno.EACCES:
            raise AccessDenied(
                f"move_pages: nodes {to}: {whose.name} may use {list(whose.mems_allowed or ())}; "
                f"pages before the first of the others have been moved"
            )
        if error == -errno.ENOMEM:
            raise OutOfMemory(f"move_pages: a node has no room left for what shall go there: {to}")
        return status

    def migrate_pages(
        self, from_nodes: Sequence[int], to_nodes: Sequence[int], of: Process | None = None
    ) -> int:
        """Move all pages on *from_nodes* to *to_nodes*, the first to the first and so on.

        *of*: the process whose pages they are, where not this one's own. Those that others map too
        take sys_nice. Returns how many could not be moved. Raises InvalidArgument, OutOfMemory;
        PermissionDenied where *of* is out of reach, or may not use *to_nodes* itself.
        Linux: migrate_pages(2).
        """
        self._alive()
        whose = of or self
        with running(self):
            return kernel_migrate_pages(whose._alive(), from_nodes, to_nodes, whose)

    def pagemap(self, addr: int, npages: int) -> Ptes:
        """/proc/self/pagemap: a word for each page from *addr* on, uint64[npages]."""
        return pagemap(self._alive(), addr, npages)

    def smaps(self) -> list[MemSizeStats]:
        """/proc/self/smaps: how much of each VMA is where."""
        return smaps(self._alive())

    def numa_maps(self) -> list[NumaMaps]:
        """/proc/self/numa_maps: on which nodes the pages of each VMA are; str() is a line of it."""
        return numa_maps(self._alive(), self.mempolicy)

    def clear_refs(self, what: int) -> None:
        """Write *what* to /proc/self/clear_refs: 4 lets stores be seen by soft-dirty bits."""
        clear_refs(self._alive(), what)

    def _alive(self) -> MmStruct:
        if self.mm.exited:
            raise InvalidArgument(f"process {self.name} has exited")
        return self.mm

    def _check_range(self, call: str, addr: int, nbytes: int) -> None:
        if nbytes < 0 or addr < 0 or addr + nbytes > TASK_SIZE_MAX:
            raise InvalidRange(
                f"{call}: [{addr:#x}, {addr + nbytes:#x}) is not inside [0, {TASK_SIZE_MAX:#x})"
            )


def _flag_word(call: str, flags: str, names: Mapping[str, int]) -> int:
    """The bits that *flags*, words between bars, stand for."""
    words = set(flags.split("|")) - {""}
    if words - names.keys():
        raise InvalidArgument(f"{call}: flags {flags!r} are not among {'|'.join(names)}")
    return sum(names[word] for word in words)
