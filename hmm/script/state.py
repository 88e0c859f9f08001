"""What is where: the page tables and the pages behind them, as /proc shows them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hmm.dmirror_device import DmirrorChunk
from hmm.script.actor import COUNTED, MAX_PAGES, STRIDE, Actor, Pages
from hmm.script.answers import MAX_SHOWN, runs, status_name
from hmm.script.operations import Answer, Refused, operation
from mm.numa import do_pages_stat
from mm.page_flags import (
    BIT,
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
    SWP_PTE_MARKER,
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
from mm.types import MemMap, page_anon
from mm.typing import PAGE_SHIFT, Pfns, Ptes, Word, number, word
from mm.vectors import distinct, has, some

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
# Letters of the entries by swap type, then those of what is no swap entry.
_LETTERS: Final = {
    SWP_MIGRATION_READ: "M",
    SWP_MIGRATION_WRITE: "M",
    SWP_DEVICE_WRITE: "D",
    SWP_DEVICE_READ: "d",
    SWP_DEVICE_EXCLUSIVE_WRITE: "X",
    SWP_DEVICE_EXCLUSIVE_READ: "x",
    SWP_HWPOISON: "H",
    SWP_PTE_MARKER: "K",
}
_NOTHING, _PRESENT, _ZERO = ((1 << MAX_SWAPFILES_SHIFT) + i for i in range(3))
_ENTRY_LETTERS: Final = np.full(_ZERO + 1, "S", dtype="U1")
_ENTRY_LETTERS[[*_LETTERS, _NOTHING, _PRESENT, _ZERO]] = [*_LETTERS.values(), *".PZ"]

_KIND: Final = word(PM_PRESENT | PM_SWAP)
_TYPES: Final = number((1 << MAX_SWAPFILES_SHIFT) - 1)
_BITS: Final = {"sd": PM_SOFT_DIRTY, "ex": PM_MMAP_EXCLUSIVE, "fl": PM_FILE, "wp": PM_UFFD_WP}

# Letters of page flags; A and Z stand for what is no flag here.
_KPF_ANON, _KPF_ZERO = BIT(62), BIT(63)
_KPAGEFLAGS: Final = {
    "A": _KPF_ANON,
    "B": PG_swapbacked,
    "S": PG_swapcache,
    "U": PG_unevictable,
    "L": PG_mlocked,
    "Z": _KPF_ZERO,
}
_DETAILS: Final = {"A": _KPF_ANON, "E": PG_anon_exclusive, "B": PG_swapbacked, "!": PG_locked}


class View:
    """Pages of a process, as its pagemap shows them; every vector has one element a page.

    types: of swap entries, or what else the entry is; frames: PFN or swap offset; pfns: the page
    behind the entry, -1 where there is none, or the zero page; known: those of them of which
    /proc/kpageflags says something, which are the present ones that are no device's.
    """

    def __init__(self, mem: MemMap, words: Ptes) -> None:
        self.mem, self.words = mem, words
        present, swapped = has(words, PM_PRESENT), has(words, PM_SWAP)
        frames = (words & PM_PFRAME_MASK).view(np.int64)
        self.zero = present & (frames == mem.zero_pfn)
        self.types = np.where(present, np.where(self.zero, _ZERO, _PRESENT), _NOTHING)
        self.types = np.where(swapped, frames & _TYPES, self.types)
        self.frames = np.where(swapped, frames >> MAX_SWAPFILES_SHIFT, frames)

        behind = (self.types >= MAX_SWAPFILES) & (self.types < _NOTHING) | (present ^ self.zero)
        self.pfns: Pfns = np.where(behind, self.frames, -1)
        self.known = present & behind & ~mem.is_zone_device_page(self.pfns)
        anon = page_anon(mem, self.pfns) & behind
        self.flags = mem.flags[self.pfns] | anon * _KPF_ANON  # of the last page where there is none

    def letters(self) -> str:
        """What each entry is, one letter a page."""
        return "".join(_ENTRY_LETTERS[self.types].tolist())

    def bits(self, bit: Word) -> str:
        """*bit* of each word as 0 or 1; empty where all are 0."""
        found = has(self.words, bit)
        return "".join("01"[one] for one in found.tolist()) if some(found) else ""

    def classes(self, seen: dict[tuple[int, int], int]) -> list[int]:
        """A number for each page, the same for the same page or swap slot; 0 for none.

        Numbers are given in order of appearance, and kept in *seen*.
        """
        files = np.where(self.types < MAX_SWAPFILES, self.types, -1)
        keys = zip(files.tolist(), self.frames.tolist(), strict=True)
        return [
            seen.setdefault(key, len(seen) + 1) if there else 0
            for key, there in zip(keys, (self.types != _NOTHING).tolist(), strict=True)
        ]

    def compared(self, other: View) -> str:
        """For each page "=" where *other* has the same, "!" another, "." one of the two none."""
        both = (self.types != _NOTHING) & (other.types != _NOTHING)
        same = (self.words & _KIND) == (other.words & _KIND)
        same &= (self.types < MAX_SWAPFILES) == (other.types < MAX_SWAPFILES)
        same &= self.frames == other.frames
        return "".join(np.where(both, np.where(same, "=", "!"), ".").tolist())

    def mapcounts(self) -> list[list[Any]]:
        """Runs of /proc/kpagecount, -1 where it has no answer."""
        return runs(np.where(self.known, self.mem.mapcount[self.pfns], -1).tolist())

    def kpageflags(self) -> list[list[Any]]:
        """Runs of /proc/kpageflags, in letters."""
        flags = np.where(self.known, self.flags, self.zero * _KPF_ZERO)
        return runs(letters(_KPAGEFLAGS, flags))

    def details(self) -> list[list[Any]]:
        """Runs of references/mappings/device/flags; "-" for no page."""
        mem, pfns = self.mem, self.pfns
        columns = (mem.refcount[pfns], mem.mapcount[pfns], self.devices(), pfns >= 0)
        pages = zip(*(c.tolist() for c in columns), letters(_DETAILS, self.flags), strict=True)
        return [
            [f"{refcount}/{mapcount}/{device}/{flags}" if is_page else "-", count]
            for (refcount, mapcount, device, is_page, flags), count in runs(pages)
        ]

    def devices(self) -> NDArray[np.int64]:
        """The number of the device that each page belongs to, -1 for none."""
        numbers = np.full(self.pfns.size, -1)
        zones = self.mem.zone[self.pfns]
        for index in distinct(zones):
            zone = self.mem.zones[index]
            if zone is not None and isinstance(zone.pgmap, DmirrorChunk):
                numbers[zones == index] = zone.pgmap.device.number
        return numbers


def letters(names: Mapping[str, Word], flags: Ptes) -> list[str]:
    """For each word of *flags* the letters of those of *names* that it has."""
    words, bits = flags.tolist(), [(letter, bit.item()) for letter, bit in names.items()]
    shown = {word: "".join(letter for letter, bit in bits if word & bit) for word in set(words)}
    return [shown[word] for word in words]


@operation("state {NAME first n}", counted=False)
def state(actor: Actor, places: list[tuple[str, int, int]]) -> Answer:
    """Where every page is, and what /proc says of it; every pagevec is drained before."""
    lru_add_drain_all(actor.host.machine.mem)
    seen: dict[tuple[int, int], int] = {}
    shown = []
    for name, first, n in places:
        with suppress(Refused):
            pages = actor.pages(name, first, max(min(n, MAX_PAGES), 0))
            shown.append(_state(actor, pages, seen))
    return {"ret": 0, "s": shown}


def _state(actor: Actor, pages: Pages, seen: dict[tuple[int, int], int]) -> Answer:
    mm = actor.process.mm
    view = View(mm.mem, pagemap(mm, pages.addr, pages.npages))
    answer = {"r": pages.region.name, "f": pages.first, "n": pages.npages, "st": view.letters()}
    answer |= {key: view.bits(bit) for key, bit in _BITS.items()}
    if not answer["wp"]:
        del answer["wp"]
    if pages.npages <= MAX_SHOWN:
        answer["cls"] = view.classes(seen)
    answer |= {"mc": view.mapcounts(), "kf": view.kpageflags(), "pg": view.details()}
    status = do_pages_stat(mm, np.array(pages.addrs, dtype=np.int64))
    answer["node"] = [[status_name(word), count] for word, count in runs(status.tolist())]
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
    before, counts = actor.vmstat, actor.host.machine.vmstat
    changed = {key: n - before[key] for key, n in counts.items() if n != before[key]}
    actor.vmstat = dict(counts)
    return {"ret": 0, "d": {key: changed[key] for key in (*COUNTED, *_MORE) if key in changed}}


@operation("clear_refs REFS")
def clear_refs(actor: Actor, what: str) -> Answer:
    """Write to /proc/self/clear_refs: 4 forgets what is soft-dirty."""
    actor.process.clear_refs(int(what) if what.isdecimal() else 0)
    return {"ret": 0}
