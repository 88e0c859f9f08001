"""Who performs a script: processes with their regions, on one computer.

Each answer is a dict with the fields that `mmscript` prints, in its order:

    i, who, op     the line, the process, the text
    ret ...        what the operation says of itself
    mv             what migrate_vma() did meanwhile
    vm             the counters that changed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from hmm.dmirror import Dmirror
from hmm.dmirror_device import DmirrorDevice, MigrationRecord
from hmm.script.answers import MAX_SHOWN, errno_name, error_name
from hmm.script.language import Choice, Operation
from hmm.script.operations import HANDLERS, UNCOUNTED, Answer, Refused, Unsupported
from mm.errors import BusError, InvalidRange, MmError, SegmentationFault
from mm.fs import File as MemFile
from mm.gup import Pin
from mm.machine import Machine
from mm.memparse import Size
from mm.process import Process
from mm.sched import running
from mm.typing import PAGE_SHIFT, PAGE_SIZE, word
from mm.userfaultfd import UserfaultFd
from mm.vmstat import VMSTAT_NAMES

BASE: Final = 0x1000_0000_0000  # of the first region
STRIDE: Final = 1 << 30  # from one region to the next: no two share a PMD table
MAX_REGIONS: Final = 64
MAX_PAGES: Final = 4096  # that one operation of the CPU touches

# Counters whose changes every answer shows.
COUNTED: Final = (
    "pgmigrate_success",
    "pgmigrate_fail",
    "thp_migration_success",
    "thp_migration_fail",
    "thp_migration_split",
    "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_collapse_alloc",
    "thp_collapse_alloc_failed",
    "thp_split_page",
    "thp_split_page_failed",
    "thp_deferred_split_page",
    "thp_split_pmd",
    "pswpin",
    "pswpout",
    "ksm_swpin_copy",
    "cow_ksm",
    "pglazyfree",
)

_SHOWN_BITS: Final = word(0xB)  # VALID, MIGRATE and WRITE
_KEPT: Final = [name for name in COUNTED if name in VMSTAT_NAMES]

T = TypeVar("T")


def pointer(addr: int) -> int:
    """*addr* as 64 bits hold it: what is not below 2**63 is negative."""
    return (addr + (1 << 63)) % (1 << 64) - (1 << 63)


class Region(NamedTuple):
    """What `mmap NAME` made: pages at a fixed address, of a file where it has one."""

    name: str
    addr: int
    npages: int
    file: MemFile | None = None


class Pages(NamedTuple):
    """Pages of a region, or beyond its end."""

    region: Region
    first: int
    npages: int

    @property
    def addr(self) -> int:
        return pointer(self.region.addr + (self.first << PAGE_SHIFT))

    @property
    def nbytes(self) -> int:
        return self.npages << PAGE_SHIFT

    @property
    def addrs(self) -> range:
        return range(self.addr, self.addr + self.nbytes, PAGE_SIZE)


class File(Generic[T]):
    """Something open, closed when the last process lets go of it. Linux: struct file."""

    def __init__(self, held: T, close: Callable[[T], object]) -> None:
        self.held = held
        self.holders = 1
        self._close = close

    def close(self) -> None:
        """Close it, whoever else has it open."""
        self._close(self.held)

    def put(self) -> None:
        """One holder less. Linux: fput()."""
        self.holders -= 1
        if self.holders == 0:
            self.close()


class Host:
    """The computer that a script runs on: by default that of the recorded kernel."""

    def __init__(self, nodes: Sequence[Size] = ("1GiB", "1GiB")) -> None:
        self.machine = Machine(nodes, swap="128MiB", cpus=2)
        self.records: list[MigrationRecord] = []  # of all devices, in the order of time
        self.devices: dict[int, DmirrorDevice] = {}
        self.longterm_test: list[Pin] = []  # what the kernel's test of long pins holds

    def device(self, number: int) -> DmirrorDevice:
        """One of the four: 0 and 1 have private memory, 2 and 3 public."""
        if number not in self.devices:
            device = DmirrorDevice(self.machine, number, public=number >= 2)
            device.records = self.records
            self.devices[number] = device
        return self.devices[number]


class Actor:
    """A process of the script. who: its place in the family, "" or "c" or "c.d"."""

    def __init__(self, host: Host, process: Process, parent: Actor | None = None) -> None:
        self.host = host
        self.process = process
        self.parent = parent
        self.who = ""
        self.children: list[Actor | None] = []  # None where one has exited
        self.regions: list[Region] = []
        self.vmstat = dict(host.machine.vmstat)  # at the last `vmstat`
        self.mirrors: dict[int, File[Dmirror]] = {}  # that it opened, by device
        self.inherited: dict[int, File[Dmirror]] = {}  # that its parent had opened
        self.pins: list[tuple[str, str, File[list[Pin]]]] = []  # name, method, what they hold
        self.uffd: File[UserfaultFd] | None = None  # once a range is registered
        self.files: list[File[Any]] = []  # everything it has open

    def perform(self, op: Operation) -> Answer:
        """Run *op* and answer for it."""
        vmstat = self.host.machine.vmstat
        before = {name: vmstat[name] for name in _KEPT}
        self.host.records.clear()
        answer: Answer = {"i": op.line, "who": self.who, "op": op.text}
        try:
            with running(self.process):
                answer |= HANDLERS[op.name](self, *op.arguments, **op.options)
        except Refused as refused:
            return answer | {"ret": str(refused)}
        except Unsupported as error:
            answer |= {"ret": error_name(error), "why": error.strerror}
        except MmError as error:
            answer["ret"] = error_name(error)
        if self.host.records:
            answer["mv"] = [migration(record, self.regions) for record in self.host.records]
        changed = {name: vmstat[name] - n for name, n in before.items() if vmstat[name] != n}
        if changed and op.name not in UNCOUNTED:
            answer["vm"] = changed
        return answer

    def pages(self, name: str | None, first: int = 0, npages: int = 1) -> Pages:
        """Pages of the region called *name*. Raises Refused."""
        for region in self.regions:
            if region.name == name:
                return Pages(region, first, npages)
        raise Refused("NOREGION")

    def mirror(self, choice: Choice) -> Dmirror:
        """The open file of the chosen device, opened now where it is not. Raises Refused."""
        number = choice.device
        opened = self.inherited if choice.inherited else self.mirrors
        if number not in opened:
            if choice.inherited:
                raise Refused("EBADF")
            mirror = Dmirror(self.host.device(number), self.process)
            opened[number] = self.opened(File(mirror, Dmirror.close))
        return opened[number].held

    def opened(self, file: File[T]) -> File[T]:
        """Have *file* open from now on."""
        self.files.append(file)
        return file

    def put(self, file: File[Any]) -> None:
        """Let go of *file*. Linux: close(2)."""
        self.files.remove(file)
        file.put()

    def adopt(self, name: str) -> None:
        """Fork a child called *name*, which has open what this process has."""
        child = Actor(self.host, self.process.fork(name), self)
        child.who = f"{self.who}.{name}" if self.who else name
        child.regions = self.regions.copy()
        child.vmstat = self.vmstat.copy()
        child.inherited = self.mirrors.copy()
        child.files = self.files.copy()
        for file in child.files:
            file.holders += 1
        if None in self.children:
            self.children[self.children.index(None)] = child
        else:
            self.children.append(child)

    def child(self, name: str) -> Actor | None:
        """The first of its children that is called *name*."""
        for child in self.children:
            if child is not None and child.process.name == name:
                return child
        return None

    def exit(self) -> None:
        """End the process: memory first, then what it has open. Linux: do_exit().

        Then its children follow, as nobody tells them what to do any more: the youngest first, as
        that also holds the other end of what its elder siblings listen to.
        """
        self.process.exit()
        for file in tuple(self.files):
            self.put(file)
        for child in reversed(self.children):
            if child is not None:
                child.exit()
        if self.parent is not None:
            siblings = self.parent.children
            siblings[siblings.index(self)] = None

    def signal(self, error: MmError) -> str:
        """How a process hears of *error* where it touched memory: by a signal."""
        if isinstance(error, BusError):
            return "SIGBUS/ADRERR"
        if isinstance(error, InvalidRange):
            return "SIGSEGV/MAPERR"  # beyond what a process can have
        if isinstance(error, SegmentationFault):
            mapped = self.process.find_vma(error.address) is not None
            return "SIGSEGV/ACCERR" if mapped else "SIGSEGV/MAPERR"
        return error_name(error)


def migration(record: MigrationRecord, regions: list[Region]) -> Answer:
    """One run of migrate_vma() as an answer shows it, with a hex digit for each page."""
    answer: Answer = {"k": record.kind, "d": record.device, "r": "?", "f": -1, "n": record.npages}
    for region in regions:
        if 0 <= record.start - region.addr < region.npages << PAGE_SHIFT:
            answer |= {"r": region.name, "f": (record.start - region.addr) >> PAGE_SHIFT}
    if record.errno:
        return answer | {"setup": errno_name(record.errno)}
    answer |= {"setup": 0, "cpages": record.cpages}
    for name in ("src0", "dst", "src1"):
        words = getattr(record, name)[:MAX_SHOWN] & _SHOWN_BITS
        answer[name] = "".join(f"{word:x}" for word in words.tolist())
    return answer
