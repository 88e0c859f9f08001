"""Ranges of any pages, VMAs and requests, for the walks of hmm/range.py and their twins."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from devices import NumpyDevice
from hmm import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE
from mm import PAGE_SIZE
from mm.swapops import make_hwpoison_entry
from mm.types import VM_READ, VM_WRITE
from mm.typing import pages
from mm.vma import split_vma
from tests.reference import range as twin
from tests.reference.state import decode, page_table_word
from tests.world import mapped_range

FAULT = int(HMM_PFN_REQ_FAULT)
STORE = FAULT | int(HMM_PFN_REQ_WRITE)
FLAGS = 0xFF << 56
BORDERS = {"2 MiB": 0x7F00_0060_0000, "1 GiB": 0x7F00_4000_0000}
HOMES = ("hole", "zero", "ro", "rw", "mine", "mine ro", "theirs", "theirs ro", "poison")
WORDS = (0, 0, FAULT, STORE, int(HMM_PFN_REQ_WRITE))


@dataclass(frozen=True)
class Case:
    """homes: what is behind each page. vmas: (pages, letters of r and w, "-", or "" for none), of
    all pages in order. words: what is asked of each page of the range [first, last)."""

    homes: list[str]
    vmas: list[tuple[int, str]]
    words: list[int]
    first: int
    border: str
    below: int
    default: int
    mask: int
    owner: str | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    homes = draw(st.lists(st.sampled_from(HOMES), min_size=1, max_size=14))
    vmas, left = [], len(homes)
    while left:
        count = draw(st.integers(1, left))
        vmas.append((count, draw(st.sampled_from(["rw", "rw", "rw", "r", "-", ""]))))
        left -= count
    first = draw(st.integers(0, len(homes) - 1))
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=len(homes) - first))
    return Case(
        homes=homes,
        vmas=vmas,
        words=words,
        first=first,
        border=draw(st.sampled_from(sorted(BORDERS))),
        below=draw(st.integers(0, len(homes))),
        default=draw(st.sampled_from([0, 0, FAULT, STORE])),
        mask=draw(st.sampled_from([0, FLAGS, FLAGS, FAULT])),
        owner=draw(st.sampled_from([None, "numpy0", "numpy1"])),
    )


class Scene:
    """The world of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        start = BORDERS[case.border] - case.below * PAGE_SIZE
        self.world = mapped_range(len(case.homes), filled=False, addr=start)
        self.theirs = NumpyDevice(self.world.machine, "512KiB", name="numpy1")
        for page, home in enumerate(case.homes):
            self._populate(page, home)
        self._carve()

    def _populate(self, page: int, home: str) -> None:
        world, addr = self.world, self.world.at(page)
        if home in ("zero", "poison"):
            world.process.touch(addr, PAGE_SIZE, write=False)
        elif home != "hole":
            world.process.touch(addr, PAGE_SIZE)
        if home == "poison":
            world.rewrite([page], lambda ptes: make_hwpoison_entry(pages(7)))
        if home.startswith(("mine", "theirs")):
            device = world.gpu if home.startswith("mine") else self.theirs
            device.to_device(world.process, addr, PAGE_SIZE)
        if home.endswith("ro"):
            world.write_protect(page)

    def _carve(self) -> None:
        """Cut the VMA, and take rights from the pieces, or the pieces."""
        first, process = 0, self.world.process
        for count, prot in self.case.vmas:
            addr, nbytes = self.world.at(first), count * PAGE_SIZE
            first += count
            if first < len(self.case.homes):
                split_vma(process.find_vma(addr), self.world.at(first))
            if prot == "":
                process.munmap(addr, nbytes)
            elif prot != "rw":
                process.mprotect(addr, nbytes, prot)

    def memory(self) -> twin.Memory:
        """The same for the twin, read entry by entry."""
        mem, mm = self.world.machine.mem, self.world.process.mm
        found = twin.Memory({}, [])
        for vma in mm.vmas:
            letters = "".join(
                c for c, bit in (("r", VM_READ), ("w", VM_WRITE)) if vma.vm_flags & bit
            )
            found.vmas.append((vma.vm_start, vma.vm_end, letters))
        for addr in self.world.addrs.tolist():
            table = mm.pgd
            for level in twin.LEVELS:
                word = mem.tables.entries.item(table * 512 + (addr >> level) % 512)
                if word:
                    found.tables.add((level, addr >> level))
                table = word >> 12
            found.pages[addr] = self.page(addr)
        return found

    def page(self, addr: int) -> twin.Page:
        mem = self.world.machine.mem
        word = page_table_word(mem, self.world.process.mm.pgd, addr)
        if not word:
            return twin.Page("hole")
        entry = decode(word, mem.zero_pfn)
        zone = mem.zones[mem.zone[entry.pfn]] if entry.kind == "device" else None
        return twin.Page(entry.kind, entry.write, "" if zone is None else zone.pgmap.name)

    def pfn(self, addr: int) -> int:
        """The page behind *addr*, whatever its entry."""
        mem = self.world.machine.mem
        word = page_table_word(mem, self.world.process.mm.pgd, addr)
        entry = decode(word, mem.zero_pfn)
        return mem.zero_pfn if entry.kind == "zero" else entry.pfn
