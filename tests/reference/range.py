"""hmm_range_fault() for one page after another, to be read beside hmm/range.py; and v4.20's walk.

A `Memory` says of each page what the CPU's page table holds and which VMA it is in, in words;
faults change it as the fault handler would. Nothing here knows of vectors, runs or entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE = 4096
LEVELS = (48, 39, 30, 21)  # log2 of what a table's entry covers, from the top table down
PMD = 1 << 21

VALID, WRITE, ERROR, DEVICE = 1 << 63, 1 << 62, 1 << 61, 1 << 60
REQ_FAULT, REQ_WRITE = VALID, WRITE


class Again(Exception):
    """The walk begins anew, at the page that had to fault."""


class Failed(Exception):
    """The call fails, with the name of an errno; maybe at another page than the walk is at."""

    def __init__(self, name: str, addr: int | None = None) -> None:
        super().__init__(name)
        self.addr = addr


@dataclass
class Page:
    """kind: hole, zero, present, device or poison. owner: whose device it is on."""

    kind: str
    write: bool = False
    owner: str = ""

    @property
    def word(self) -> int:
        """Without its PFN."""
        if self.kind in ("hole", "poison"):
            return 0
        return VALID | (WRITE if self.write else 0)


@dataclass
class Memory:
    """pages: by address. vmas: (start, end, letters of r and w). tables: (level, address >> level)
    of the entries that name one. faults: calls of handle_mm_fault() that ended well."""

    pages: dict[int, Page]
    vmas: list[tuple[int, int, str]]
    tables: set[tuple[int, int]] = field(default_factory=set)
    faults: int = 0

    def page(self, addr: int) -> Page:
        return self.pages.setdefault(addr, Page("hole"))

    def handle_mm_fault(self, addr: int, write: bool) -> None:
        page = self.page(addr)
        if page.kind == "poison":
            raise Failed("EFAULT", addr)
        self.tables |= {(level, addr >> level) for level in LEVELS}
        self.faults += 1
        if page.kind == "device":
            page.kind = "present"  # as writable as it was there
        elif page.kind == "hole" and not write:
            page.kind = "zero"
        elif write:
            page.kind, page.write = "present", True


@dataclass
class Walk:
    """A call of hmm_range_fault(): words are requests until the walk has passed them."""

    memory: Memory
    start: int
    end: int
    words: list[int]
    default: int
    mask: int
    owner: str
    last: int = 0

    def run(self) -> str:
        """The name of the errno, or an empty string."""
        self.last = self.start
        while True:
            try:
                self._walk_page_range()
            except Again:
                continue
            except Failed as failure:
                self._give_up(self.last if failure.addr is None else failure.addr)
                return str(failure)
            return ""

    def _give_up(self, addr: int) -> None:
        """The words that are not answered stay as they are."""

    def _walk_page_range(self) -> None:
        addr = self.last
        while addr < self.end:
            vma = next((vma for vma in self.memory.vmas if addr < vma[1]), None)
            if vma is None or addr < vma[0]:
                stop = self.end if vma is None else min(self.end, vma[0])
                self._refuse(addr, stop)
            else:
                stop = min(self.end, vma[1])
                if "r" in vma[2]:
                    self._walk_vma(addr, stop, vma[2])
                else:
                    self._refuse(addr, stop)
            addr = stop

    def _refuse(self, addr: int, end: int) -> None:
        if self._range_needs(addr, end):
            raise Failed("EFAULT")
        self._fill(addr, end, ERROR)

    def _walk_vma(self, addr: int, end: int, prot: str) -> None:
        while addr < end:
            missing = [lvl for lvl in LEVELS if (lvl, addr >> lvl) not in self.memory.tables]
            size = 1 << missing[0] if missing else PMD
            stop = min(end, addr - addr % size + size)
            if missing:
                need = self._range_needs(addr, stop)
                if need:
                    self._fault(addr, stop, need, prot)
                self._fill(addr, stop, 0)
            else:
                for one in range(addr, stop, PAGE):
                    self._handle_pte(one, stop, prot)
            addr = stop

    def _handle_pte(self, addr: int, end: int, prot: str) -> None:
        page = self.memory.page(addr)
        if page.kind == "device" and page.owner == self.owner:
            self._fill(addr, addr + PAGE, page.word)
            return
        word = 0 if page.kind == "device" else page.word
        need = self._needs(addr, word)
        if need and page.kind == "poison":
            raise Failed("EFAULT")
        if need:
            self._fault(addr, end, need, prot)
        self._fill(addr, addr + PAGE, word)

    def _fault(self, addr: int, end: int, need: str, prot: str) -> None:
        """The spill: every page up to the end of the table faults."""
        self.last = addr
        if need == "write" and "w" not in prot:
            raise Failed("EPERM")
        for one in range(addr, end, PAGE):
            self.memory.handle_mm_fault(one, need == "write")
        raise Again

    def _needs(self, addr: int, word: int) -> str:
        asked = self.words[(addr - self.start) // PAGE] & self.mask | self.default
        if not asked & REQ_FAULT:
            return ""
        if asked & REQ_WRITE and not word & WRITE:
            return "write"
        return "" if word & VALID else "fault"

    def _range_needs(self, addr: int, end: int) -> str:
        needs = {self._needs(one, 0) for one in range(addr, end, PAGE)}
        return next((need for need in ("write", "fault") if need in needs), "")

    def _fill(self, addr: int, end: int, word: int) -> None:
        for one in range(addr, end, PAGE):
            self.words[(one - self.start) // PAGE] = word


class MirrorWalk(Walk):
    """hmm_vma_fault() of v4.20: device pages stay where they are, unless DEVICE is asked too."""

    def _handle_pte(self, addr: int, end: int, prot: str) -> None:
        page = self.memory.page(addr)
        asked = self.words[(addr - self.start) // PAGE] & self.mask
        if page.kind == "poison":
            self.last = addr
            if asked & REQ_FAULT:
                raise Failed("EFAULT")
            self._fill(addr, addr + PAGE, ERROR)
            return
        if page.kind == "device" and not (asked & REQ_FAULT and asked & DEVICE):
            self._fill(addr, addr + PAGE, page.word | DEVICE)
            return
        need = self._needs(addr, 0 if page.kind == "device" else page.word)
        if need:
            self._fault(addr, end, need, prot)
        self._fill(addr, addr + PAGE, page.word)

    def _give_up(self, addr: int) -> None:
        """Nothing is known from where the walk was; the page that failed is an error."""
        self._fill(self.last, self.end, 0)
        self._fill(addr, addr + PAGE, ERROR)
