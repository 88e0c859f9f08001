"""What is where: the page tables and the pages behind them, as /proc shows them."""

from __future__ import annotations

import errno
from typing import Final

import numpy as np

from hmm.script.actor import Actor, Answer, Pages, Refused, operation
from hmm.script.answers import MAX_SHOWN, runs
from mm.page_flags import (
    PG_anon_exclusive,
    PG_locked,
    PG_mlocked,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
)
from mm.swap import lru_add_drain_all
from mm.swapops import (
    MAX_SWAPFILES,
    MAX_SWAPFILES_SHIFT,
    SWP_DEVICE_EXCLUSIVE_READ,
    SWP_DEVICE_EXCLUSIVE_WRITE,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_HWPOISON,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_WRITE,
)
from mm.task_mmu import (
    PM_FILE,
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
    pagemap,
)
from mm.types import PAGE_MAPPING_ANON, MemMap, page_anon
from mm.typing import Pfns, Ptes, Word, number
from mm.vectors import has, some

MAX_PAGES: Final = 4096
_TYPES: Final = number((1 << MAX_SWAPFILES_SHIFT) - 1)
_SWAP_LETTERS: Final = {
    SWP_MIGRATION_READ: "M",
    SWP_MIGRATION_WRITE: "M",
    SWP_DEVICE_WRITE: "D",
    SWP_DEVICE_READ: "d",
    SWP_DEVICE_EXCLUSIVE_WRITE: "X",
    SWP_DEVICE_EXCLUSIVE_READ: "x",
    SWP_HWPOISON: "H",
}
_KPAGEFLAGS: Final = (
    ("B", int(PG_swapbacked)),
    ("S", int(PG_swapcache)),
    ("U", int(PG_unevictable)),
    ("L", int(PG_mlocked)),
)
_BITS: Final = {"sd": PM_SOFT_DIRTY, "ex": PM_MMAP_EXCLUSIVE, "fl": PM_FILE}


class View:
    """Pages of a process, as its pagemap shows them; every vector has one element a page.

    frames: PFN or swap offset; pfns: the page behind the entry, -1 where that is none, or the
    zero page; system: where /proc/kpageflags has something to say, which is of no device page.
    """

    def __init__(self, mem: MemMap, words: Ptes) -> None:
        self.mem, self.words = mem, words
        self.present, self.swapped = has(words, PM_PRESENT), has(words, PM_SWAP)
        frames = (words & PM_PFRAME_MASK).view(np.int64)
        self.types = np.where(self.swapped, frames & _TYPES, -1)
        self.frames = np.where(self.swapped, frames >> MAX_SWAPFILES_SHIFT, frames)
        self.zero = self.present & (frames == mem.zero_pfn)

        behind = (self.present & ~self.zero) | (self.types >= MAX_SWAPFILES)
        self.pfns: Pfns = np.where(behind, self.frames, -1)
        self.system = behind & self.present & ~mem.is_zone_device_page(self.pfns)

    def letters(self) -> str:
        """What each entry is, one letter a page."""
        present = np.where(self.zero, "Z", np.where(self.present, "P", "."))
        return "".join(
            there if kind < 0 else _SWAP_LETTERS.get(kind, "S")
            for there, kind in zip(present.tolist(), self.types.tolist(), strict=True)
        )

    def bits(self, bit: Word) -> str:
        """*bit* of each word as 0 or 1; empty where all are 0."""
        found = has(self.words, bit)
        return "".join("01"[one] for one in found.tolist()) if some(found) else ""

    def classes(self, known: dict[tuple[int, int], int]) -> list[int]:
        """A number for each page, the same for the same page or swap slot; 0 for none.

        Numbers are given in order of appearance, and kept in *known*.
        """
        kinds = np.where((self.types >= 0) & (self.types < MAX_SWAPFILES), self.types, -1)
        there = self.present | self.swapped
        return [
            known.setdefault((kind, frame), len(known) + 1) if is_there else 0
            for is_there, kind, frame in zip(
                there.tolist(), kinds.tolist(), self.frames.tolist(), strict=True
            )
        ]

    def mapcounts(self) -> list[int]:
        """/proc/kpagecount of each page, -1 where it has no answer."""
        counts = self.mem.mapcount[np.where(self.system, self.pfns, 0)]
        return np.where(self.system, counts, -1).tolist()

    def flags(self) -> list[str]:
        """/proc/kpageflags of each page, in letters."""
        pfns = np.where(self.system, self.pfns, 0)
        flags = np.where(self.system, self.mem.flags[pfns], 0)
        anon = self.system & page_anon(self.mem, pfns)
        return [
            "Z" if zero else "A" * anon + _flag_letters(word)
            for zero, anon, word in zip(
                self.zero.tolist(), anon.tolist(), flags.tolist(), strict=True
            )
        ]

    def details(self) -> list[str]:
        """References, mappings, device and flags of each page; "-" for none."""
        return [self._detail(pfn) if pfn >= 0 else "-" for pfn in self.pfns.tolist()]

    def _detail(self, pfn: int) -> str:
        mem = self.mem
        pgmap = mem.pagemap_of(pfn)
        device = -1 if pgmap is None else getattr(pgmap, "number", 0)
        flags = mem.flags.item(pfn)
        letters = (
            ("A", mem.mapping.item(pfn) & PAGE_MAPPING_ANON),
            ("E", flags & int(PG_anon_exclusive)),
            ("B", flags & int(PG_swapbacked)),
            ("!", flags & int(PG_locked)),
        )
        shown = "".join(letter for letter, bit in letters if bit)
        return f"{mem.refcount.item(pfn)}/{mem.mapcount.item(pfn)}/{device}/{shown}"


def _flag_letters(flags: int) -> str:
    return "".join(letter for letter, bit in _KPAGEFLAGS if flags & bit)


@operation("state {NAME first n}", counted=False)
def state(actor: Actor, places: list[tuple[str, int, int]]) -> Answer:
    lru_add_drain_all(actor.host.machine.mem)
    known: dict[tuple[int, int], int] = {}
    shown = []
    for name, first, n in places:
        try:
            pages = actor.pages(name, first, min(n, MAX_PAGES))
        except Refused:
            continue
        shown.append(_state(actor, pages, known))
    return {"ret": 0, "s": shown}


def _state(actor: Actor, pages: Pages, known: dict[tuple[int, int], int]) -> Answer:
    mm = actor.process.mm
    view = View(mm.mem, pagemap(mm, pages.addr, pages.npages))
    answer = {"r": pages.region.name, "f": pages.first, "n": pages.npages, "st": view.letters()}
    answer |= {key: view.bits(bit) for key, bit in _BITS.items()}
    if wp := view.bits(PM_UFFD_WP):
        answer["wp"] = wp
    if pages.npages <= MAX_SHOWN:
        answer["cls"] = view.classes(known)
    answer["mc"] = runs(view.mapcounts())
    answer["kf"] = runs(view.flags())
    answer["pg"] = runs(view.details())
    answer["node"] = runs(map(status_name, page_status(actor, view, pages)))
    return answer


def page_status(actor: Actor, view: View, pages: Pages) -> list[int]:
    """The node that each page is on, or an errno. Linux: do_pages_stat(), mm/migrate.c."""
    mem = view.mem
    nodes = mem.page_to_nid(np.where(view.system, view.pfns, 0)).astype(np.int64)
    status = np.where(view.system, nodes, np.where(view.zero, -errno.EFAULT, -errno.ENOENT))
    for i, addr in enumerate(pages.addrs):
        if actor.process.find_vma(addr) is None:
            status[i] = -errno.EFAULT
    return status.tolist()


def status_name(status: int) -> int | str:
    """A node as it is, an errno by its name."""
    return status if status >= 0 else errno.errorcode[-status]
