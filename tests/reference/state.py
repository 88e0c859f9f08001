"""What a machine holds, page by page, as plain objects: where the twins of the stages begin.

Slow and obvious on purpose. Entries are decoded bit by bit and tables are walked one entry at a
time, so that nothing here shares a line with the code that it is held against.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from hmm import MigrateVma, MigrateVmaSelect, Stayed
from mm.locking import current
from mm.types import VM_WRITE, MemMap, MemoryType

FLAGS = {
    0: "locked",
    2: "referenced",
    3: "uptodate",
    4: "dirty",
    5: "lru",
    6: "active",
    12: "reserved",
    17: "anon_exclusive",
    18: "swapbacked",
    19: "unevictable",
    20: "mlocked",
}
SWAP_TYPES = {  # type of an entry that is not present: (kind, writable)
    25: ("exclusive", True),
    26: ("exclusive", False),
    27: ("poison", False),
    28: ("migration", False),
    29: ("migration", True),
    30: ("device", True),
    31: ("device", False),
}


@dataclass
class Entry:
    """A page-table entry. kind: none, zero, present, device, exclusive, migration or poison."""

    kind: str
    pfn: int = 0
    write: bool = False
    dirty: bool = False
    soft_dirty: bool = False
    accessed: bool = False
    devmap: bool = False


@dataclass
class Page:
    """A page that somebody uses.

    Waiting in a pagevec is on the way to a list: it counts as the flag `lru`, and the pagevec's
    reference does not count.
    """

    zone: str  # "system", or the name of the device whose memory it is
    public: bool  # memory of a device that the CPU reaches
    flags: set[str]
    refcount: int
    mapcount: int
    mapping: int
    index: int
    lock_owner: int

    @property
    def on_device(self) -> bool:
        return self.zone != "system"

    @property
    def private(self) -> bool:
        return self.on_device and not self.public


@dataclass
class State:
    """One migration, the VMA it works on, and every page in use.

    entries: by address, those that are not empty. pages: by PFN. select: the kinds of memory to
    collect. owner: the device whose pages to collect, None for all. held: device pages that
    somebody held when they were unmapped.
    """

    me: int
    start: int
    src: list[int]
    dst: list[int]
    stayed: list[str]
    select: set[str]
    owner: str | None
    wanted: list[bool]
    writable: bool
    vm_start: int
    vm_pgoff: int
    anon_vma: int | None
    next_anon_vma: int
    anon_rss: int
    held: set[int]
    entries: dict[int, Entry] = field(default_factory=dict)
    pages: dict[int, Page] = field(default_factory=dict)

    def address(self, i: int) -> int:
        """Address of entry *i* of src and dst."""
        return self.start + i * 4096

    def entry(self, i: int) -> Entry:
        """The page-table entry behind entry *i* of src and dst."""
        return self.entries.get(self.address(i), Entry("none"))


def differences(twin: State, found: State) -> list[str]:
    """Where the two do not agree, one line for each field, entry or page."""
    lines = []
    for name in (column.name for column in fields(State)):
        expected, got = getattr(twin, name), getattr(found, name)
        if isinstance(expected, dict):
            for key in sorted(expected.keys() | got.keys()):
                if expected.get(key) != got.get(key):
                    lines.append(f"{name}[{key:#x}]: {expected.get(key)}, not {got.get(key)}")
        elif expected != got:
            lines.append(f"{name}: {expected}, not {got}")
    return lines


def look(migrate: MigrateVma) -> State:
    """The state of *migrate* and its machine as it is now."""
    mem, vma = migrate.mem, migrate.vma
    owner = migrate.pgmap_owner
    every = [True] * migrate.npages
    state = State(
        me=current(),
        start=migrate.start,
        src=migrate.src.tolist(),
        dst=migrate.dst.tolist(),
        stayed=[Stayed(reason).name for reason in migrate.stayed.tolist()],
        select=set(MigrateVmaSelect(migrate.select).name.split("|")),
        owner=None if owner is None else owner.name,
        wanted=every if migrate.wanted is None else migrate.wanted.tolist(),
        writable=bool(vma.vm_flags & VM_WRITE),
        vm_start=vma.vm_start,
        vm_pgoff=vma.vm_pgoff,
        anon_vma=None if vma.anon_vma is None else vma.anon_vma.number,
        next_anon_vma=mem.next_anon_vma,
        anon_rss=vma.vm_mm.anon_rss,
        held=set(migrate.held.tolist()),
    )
    for addr in range(vma.vm_start, vma.vm_end, 4096):
        word = page_table_word(mem, vma.vm_mm.pgd, addr)
        if word:
            state.entries[addr] = decode(word, mem.zero_pfn)
    in_use = mem.refcount > (np.arange(mem.refcount.size) >= mem.max_pfn)
    for pfn in np.flatnonzero(in_use).tolist():
        page = read_page(mem, pfn)
        if page.refcount > page.on_device:
            state.pages[pfn] = page
    return state


def page_table_word(mem: MemMap, pgd: int, addr: int) -> int:
    """Down five levels, one index at a time; 0 where a table or the entry is missing."""
    table = pgd
    for shift in (48, 39, 30, 21):
        word = mem.tables.entries.item(table * 512 + (addr >> shift) % 512)
        if not word:
            return 0
        table = word >> 12
    return mem.tables.entries.item(table * 512 + (addr >> 12) % 512)


def decode(word: int, zero_pfn: int) -> Entry:
    """*word* as the pictures in mm/pgtable.py and mm/swapops.py draw it."""
    if word & (1 << 0 | 1 << 8):
        pfn = (word >> 12) % (1 << 40)
        if word & 1 << 9:
            assert zero_pfn == pfn
            return Entry("zero")
        return Entry("present", pfn, *(bool(word & 1 << bit) for bit in (1, 6, 11, 5, 58)))
    kind, write = SWAP_TYPES[word >> 59]
    pfn = (~word >> 9) % (1 << 50)
    return Entry(kind, pfn, write, soft_dirty=bool(word & 1 << 1))


def read_page(mem: MemMap, pfn: int) -> Page:
    """Row *pfn* of the columns."""
    zone = mem.zones[mem.zone.item(pfn)]
    page = Page(
        zone="system" if zone.pgmap is None else zone.pgmap.owner.name,
        public=zone.pgmap is not None and zone.pgmap.type == MemoryType.DEVICE_PUBLIC,
        flags={name for bit, name in FLAGS.items() if mem.flags.item(pfn) >> bit & 1},
        refcount=mem.refcount.item(pfn),
        mapcount=mem.mapcount.item(pfn),
        mapping=mem.mapping.item(pfn),
        index=mem.index.item(pfn),
        lock_owner=mem.lock_owner.item(pfn),
    )
    for pagevec in mem.pagevecs:
        if pfn in pagevec.live().tolist():
            page.refcount -= 1
            page.flags.add("lru")
    return page
