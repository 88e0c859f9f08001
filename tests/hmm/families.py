"""What processes must find in their memory: pages of their own, shared ones, and those of files.

    Object    a file, or what is shared: its size, and what each of its pages may hold
    Page      a page that a process has mapped: its rights, and what it may hold
    Member    a process, its pages, and what it has open

What a page may hold is a set of bytes: one, unless a call that failed in the middle, or MADV_FREE,
leaves several. A load that finds one of them settles it; one that finds another has found a bug.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from hmm.dmirror import Dmirror
from hmm.dmirror_device import DmirrorDevice
from mm import PAGE_SIZE, BusError, Machine, MemCgroup, OutOfMemory, Process, SegmentationFault
from mm.blockfs import BlockFs
from mm.errors import InputOutputError, MmError
from mm.fs import File
from mm.gup import Pin
from mm.pgtable import pte_offset, pte_pfn, pte_present, pte_write
from mm.sched import running
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_write_device_private_entry,
    swp_offset,
)
from mm.userfaultfd import UserfaultFd

PAGES = 32  # of address space, across a border of 2 MiB, and of a file
BASE = 0x1000_0020_0000 - 16 * PAGE_SIZE
GROUPS = ("/a", "/a/b", "/c")
BLOCK_SIZES = ("1KiB", "4KiB")  # of the two file systems
ZEROS = bytes(PAGE_SIZE)


def at(page: int) -> int:
    return BASE + page * PAGE_SIZE


def span(pages: range) -> tuple[int, int]:
    return at(pages.start), len(pages) * PAGE_SIZE


def patched(page: bytes, offset: int, data: bytes) -> bytes:
    """*page* with *data* at *offset*."""
    return page[:offset] + data + page[offset + len(data) :]


@dataclass(eq=False)
class Object:
    """A file, or anonymous memory that is shared: then *file* is None.

    What is stored by a mapping beyond the end of a file, in its last page, may be there or not.
    """

    size: int = 0
    file: File | None = None
    may: list[set[bytes]] = field(default_factory=lambda: [{ZEROS} for _ in range(PAGES)])

    def valid(self, index: int) -> int:
        """Bytes of a page that are in the file."""
        return min(max(self.size - index * PAGE_SIZE, 0), PAGE_SIZE)

    def resize(self, size: int) -> None:
        cut, self.size = size < self.size, size
        for index in range(PAGES):
            if cut:
                self.may[index] = {self.trimmed(index, page) for page in self.may[index]}
            self.blur(index)

    def trimmed(self, index: int, page: bytes) -> bytes:
        """*page* with zeros beyond the end of the file."""
        return page[: self.valid(index)].ljust(PAGE_SIZE, b"\0")

    def blur(self, index: int) -> None:
        """What is beyond the end becomes zeros at some time."""
        if 0 < self.valid(index) < PAGE_SIZE:
            self.may[index] = self.may[index] | {self.trimmed(index, p) for p in self.may[index]}

    def holds(self, index: int, pages: set[bytes]) -> None:
        self.may[index] = pages
        self.blur(index)

    def could_be(self, index: int, page: bytes) -> set[bytes]:
        """What it may hold that looks like *page* up to the end of the file."""
        valid = self.valid(index)
        return {one for one in self.may[index] if one[:valid] == page[:valid]}

    def write(self, pos: int, data: bytes) -> None:
        self.resize(max(self.size, pos + len(data)))
        for index, part, piece in pieces(pos, data):
            self.holds(index, {patched(page, part, piece) for page in self.may[index]})

    def read(self, pos: int, data: bytes) -> None:
        """*data* was read at *pos*."""
        for index, part, piece in pieces(pos, data):
            seen = {p for p in self.may[index] if p[part : part + len(piece)] == piece}
            assert seen, f"page {index} of {self.file}: {piece[:8]!r} at {part}"
            self.may[index] = seen


def pieces(pos: int, data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """*data* at *pos* of a file by pages: index, offset there, bytes."""
    while data:
        index, part = divmod(pos, PAGE_SIZE)
        piece = data[: PAGE_SIZE - part]
        yield index, part, piece
        pos, data = pos + len(piece), data[len(piece) :]


@dataclass
class Page:
    """A mapped page. What it `may` hold is None where that is what is behind it.

    behind: the object that it maps at *index*; without one, zeros. uffd: modes that it is
    registered with. guarded: stores to it may be for userland.
    """

    prot: str
    behind: Object | None = None
    index: int = 0
    shared: bool = False
    may: set[bytes | None] = field(default_factory=lambda: {None})
    dontfork: bool = False
    wipeonfork: bool = False
    uffd: frozenset[str] = frozenset()
    guarded: bool = False

    @property
    def beyond(self) -> bool:
        """Nothing of it is in the file."""
        return self.behind is not None and not self.behind.valid(self.index)

    def choices(self) -> set[bytes]:
        """All that it may hold."""
        found = {page for page in self.may if page is not None}
        if None in self.may:
            found |= {ZEROS} if self.behind is None else self.behind.may[self.index]
        return found

    def forked(self) -> Page:
        """What a child has of it."""
        may: set[bytes | None] = {None} if self.wipeonfork else set(self.may)
        return replace(self, may=may, uffd=frozenset(), guarded=False)

    def moved(self) -> Page:
        """What it is at another address."""
        return replace(self, uffd=frozenset(), guarded=False)

    def emptied(self) -> Page:
        """What is at its address when it has moved away, and the mapping has stayed."""
        return replace(self, may={None}, guarded=False)

    def saw(self, page: bytes) -> None:
        """A load has found *page*."""
        same = {one for one in self.may if one == page}
        behind = {page} & {ZEROS} if self.behind is None else self.behind.could_be(self.index, page)
        if None in self.may and behind:
            if self.behind is not None and not same:
                self.behind.may[self.index] = behind
            same.add(None)
        assert same, f"{page[:8]!r} in place of {[one[:8] for one in self.choices()]}"
        self.may = same

    def stored(self, data: bytes, offset: int = 0, *, sure: bool = True) -> None:
        """*data* was stored to it, or was not, where that is not *sure*."""
        new = {patched(page, offset, data) for page in self.choices()}
        if self.shared:
            assert self.behind is not None
            old = self.behind.may[self.index]
            self.behind.holds(self.index, new if sure else new | old)
        else:
            self.may = set(new) if sure else new | self.may

    def maybe_copied(self) -> None:
        """The process may have a copy of its own of what is behind it, though it stored nothing."""
        if self.behind is not None and not self.shared:
            self.may = self.may | self.choices()

    def allows(self, *, write: bool) -> bool:
        return self.prot == "rw" or (self.prot == "r" and not write)

    def due(self, *, write: bool) -> tuple[type[MmError], ...]:
        """What an access must raise."""
        if not self.allows(write=write):
            return (SegmentationFault,)
        own = None not in self.may
        return (BusError,) if self.beyond or (write and self.guarded and own) else ()

    def possible(self, *, write: bool) -> tuple[type[MmError], ...]:
        """What else it may raise, for userland's sake."""
        missing = "missing" in self.uffd and None in self.may
        return (BusError,) if missing or (write and self.guarded) else ()


@dataclass(eq=False)
class Member:
    """A process, what it has mapped, and the devices that it has open."""

    process: Process
    pages: dict[int, Page]
    mirrors: dict[int, Dmirror] = field(default_factory=dict)
    fd: UserfaultFd | None = None

    def own(self, pages: range) -> list[Page]:
        """Those of *pages* that are mapped."""
        return [self.pages[n] for n in pages if n in self.pages]


class Access:
    """An access in a `with` block: it raises what must be *due*, or what is *possible*.

    `done` tells if it raised nothing.
    """

    def __init__(self, due: tuple[type[MmError], ...], possible: tuple[type[MmError], ...]) -> None:
        self.due, self.possible, self.done = due, possible, False

    def __enter__(self) -> Access:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.done = kind is None
        assert not (self.done and self.due), f"it should have raised {self.due}"
        return kind is not None and issubclass(kind, self.due + self.possible)


class Families:
    """The machine, its four devices, three files, and those processes that live.

    A rule names a process by a number that may be too large.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        nodes = ("4MiB", "4MiB")
        self.machine = Machine(nodes, swap="8MiB", debug=True, max_physmem="64MiB")
        self.free = self.machine.nr_free_pages
        self.devices = [
            DmirrorDevice(self.machine, n, public=n > 1, chunk="128KiB") for n in range(4)
        ]
        self.pins: list[Pin] = []
        self.stored = 0
        self.groups: list[MemCgroup] = [self.machine.cgroup(path) for path in GROUPS]
        self.disks: list[BlockFs] = [
            self.machine.mount(self.image(number), block_size, "4MiB")
            for number, block_size in enumerate(BLOCK_SIZES)
        ]
        self.files = [Object(file=self.machine.memfd_create("memory"))]
        self.files += [Object(file=fs.create("file")) for fs in self.disks]
        self.members = [Member(self.machine.spawn("0"), {})]
        self.born = 1

    def image(self, number: int) -> Path:
        """What a disk is to the host."""
        return Path(self.folder.name) / f"disk{number}"

    def fresh(self, nbytes: int = PAGE_SIZE) -> bytes:
        """Bytes that were never stored before."""
        self.stored += 1
        words = np.full(nbytes // 8 + 1, self.stored << 32 | 0x5A5A5A5A, dtype=np.uint64)
        return words.tobytes()[:nbytes]

    @contextmanager
    def member(self, who: int) -> Iterator[Member]:
        """The member that *who* names; it runs inside the block."""
        member = self.members[who % len(self.members)]
        with running(member.process):
            yield member

    @contextmanager
    def mirror(self, who: int, device: int) -> Iterator[tuple[Member, Dmirror]]:
        """The same, and what it sees of *device*, which it opens if need be."""
        with self.member(who) as member:
            if device not in member.mirrors:
                member.mirrors[device] = Dmirror(self.devices[device], member.process)
            yield member, member.mirrors[device]

    @property
    def limited(self) -> tuple[type[MmError], ...]:
        """What calls may raise that need memory."""
        some = any(group.limit is not None for group in self.groups)
        return (OutOfMemory,) if some else ()

    def access(self, member: Member, pages: range, *, write: bool) -> Access:
        """An access of a CPU or a device to all of *pages*."""
        due, possible = set[type[MmError]](), set(self.limited)
        for page in pages:
            found = member.pages.get(page)
            due |= {SegmentationFault} if found is None else set(found.due(write=write))
            possible |= set() if found is None else set(found.possible(write=write))
        return Access(tuple(due), tuple(possible))

    def forced(self, member: Member, page: int, *, write: bool) -> Access:
        """An access to /proc/PID/mem: by force, where the mapping is private."""
        found = member.pages.get(page)
        may = found is not None and (not write or not found.shared or found.prot == "rw")
        refused = replace(found, prot="rw").due(write=write) if found and may else True
        possible = (found is not None and found.possible(write=write)) or self.limited
        error = (InputOutputError,)
        return Access(error if refused else (), error if possible else ())

    def end(self, member: Member) -> None:
        """It exits."""
        member.process.exit()
        for mirror in member.mirrors.values():
            mirror.close()
        if member.fd is not None:
            member.fd.close()
        self.members.remove(member)

    def end_all(self) -> None:
        """Look at every page of everybody; afterwards everything is free."""
        for group in self.groups:
            group.limit = None
        for pin in self.pins:
            pin.release()
        for member in tuple(self.members):
            with running(member.process):
                for n, page in member.pages.items():
                    with self.forced(member, n, write=False):
                        page.saw(member.process.mem_read(at(n), PAGE_SIZE))
            self.end(member)
        self.machine.verify()
        self.end_files()
        for device in self.devices:
            device.remove_chunks()
        self.machine.verify()
        mem = self.machine.mem
        assert self.free == self.machine.nr_free_pages
        assert (0, 0) == (mem.swap.inuse_pages, mem.buffers.in_use)
        assert ({}, {}, []) == (mem.anon_vmas, mem.mappings, mem.files)
        assert 0 == self.machine.vmstat["nr_page_table_pages"]
        assert all(0 == group.usage == group.swap_usage for group in self.groups)

    def end_files(self) -> None:
        """Each holds what it should, on its disk too."""
        for file in self.files:
            assert file.file is not None
            assert file.size == file.file.size
            file.read(0, file.file.read(0, file.size))
            file.file.close()
        for number, file in enumerate(self.files[1:]):
            self.disks[number].unmount()
            with Machine(("1MiB",)).mount(self.image(number)) as again:
                assert ["file"] == again.listdir()
                with again.open("file") as stored:
                    assert file.size == stored.size
                    file.read(0, stored.read(0, file.size))
        self.folder.cleanup()

    def check(self) -> None:
        """The machine is sound, files have their sizes, no device reaches more than its CPU."""
        self.machine.verify()
        assert all(file.size == file.file.size for file in self.files if file.file is not None)
        tables = self.machine.mem.tables
        for member in self.members:
            for mirror in member.mirrors.values():
                addrs, theirs = mirror.table.mapped()
                ours = tables.entries[pte_offset(tables, member.process.mm.pgd, addrs)]
                private, exclusive = is_device_private_entry(ours), is_device_exclusive_entry(ours)
                pfns = np.where(private | exclusive, swp_offset(ours), pte_pfn(ours))
                assert ((pte_present(ours) | private | exclusive) & (pfns == pte_pfn(theirs))).all()
                writable = np.where(private, is_write_device_private_entry(ours), pte_write(ours))
                assert (writable | exclusive | ~pte_write(theirs)).all()
