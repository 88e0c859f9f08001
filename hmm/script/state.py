"""What is where: the page tables and the pages behind them, as /proc shows them."""

from __future__ import annotations

from typing import Final

import numpy as np

from hmm.dmirror_device import DmirrorChunk
from hmm.script.actor import COUNTED, MAX_PAGES, STRIDE, Actor, Pages
from hmm.script.answers import MAX_SHOWN, runs, status_name
from hmm.script.operations import Answer, Refused, operation
from mm.numa import do_pages_stat
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
from mm.typing import PAGE_SHIFT, Pfns, Ptes, Word, number
from mm.vectors import has, some

# Counters that `vmstat` shows besides those that every answer does.
_MORE: Final = (
    "thp_zero_page_alloc",
    "unevictable_pgs_mlocked",
    "unevictable_pgs_munlocked",
    "pgfault",
    "pgmajfault",
    "pgalloc_dma",
    "pgalloc_dma32",
    "pgalloc_normal",
    "pgalloc_movable",
    "pgfree",
    "numa_hit",
    "numa_miss",
    "compact_stall",
    "pgscan_direct",
)
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
        device = pgmap.device.number if isinstance(pgmap, DmirrorChunk) else -1
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
    status = do_pages_stat(mm, np.array(pages.addrs, dtype=np.int64))
    answer["node"] = runs(map(status_name, status.tolist()))
    return answer


_SMAPS: Final = {
    "Rss": ("resident",),
    "Pss": ("pss",),
    "Shared": ("shared_clean", "shared_dirty"),
    "Private": ("private_clean", "private_dirty"),
    "Anonymous": ("anonymous",),
    "LazyFree": ("lazyfree",),
    "Swap": ("swap",),
    "Locked": ("pss_locked",),
}


@operation("smaps NAME", counted=False)
def smaps(actor: Actor, name: str) -> Answer:
    """The VMAs of a region in /proc/self/smaps; what is not 0, in KiB."""
    region = actor.pages(name).region
    end = region.addr + (region.npages << PAGE_SHIFT)
    vmas = []
    for mss in actor.process.smaps():
        if region.addr - STRIDE // 4 <= mss.start < end:
            first, npages = mss.start - region.addr, mss.end - mss.start
            vma = {"f": first >> PAGE_SHIFT, "n": npages >> PAGE_SHIFT, "prot": mss.perms}
            sizes = {key: sum(getattr(mss, f) for f in fields) for key, fields in _SMAPS.items()}
            vma |= {key: size >> 10 for key, size in sizes.items() if size >> 10}
            vmas.append(vma | {"vmflags": mss.vmflags})
    return {"ret": 0, "vmas": vmas}


@operation("vmstat", counted=False)
def vmstat(actor: Actor) -> Answer:
    """What has changed in /proc/vmstat since the last time."""
    host, counts = actor.host, actor.host.machine.vmstat
    changed = {key: n - host.vmstat[key] for key, n in counts.items() if n != host.vmstat[key]}
    host.vmstat = dict(counts)
    return {"ret": 0, "d": {key: changed[key] for key in (*COUNTED, *_MORE) if key in changed}}


@operation("clear_refs REFS")
def clear_refs(actor: Actor, what: str) -> Answer:
    """Write to /proc/self/clear_refs: 4 forgets what is soft-dirty."""
    actor.process.clear_refs(int(what) if what.isdecimal() else 0)
    return {"ret": 0}
