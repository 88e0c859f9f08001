"""/proc/PID/numa_maps: on which nodes the pages of each mapping are. Linux: fs/proc/task_mmu.c.

Only pages that a node has are counted: neither device memory, which has none, nor what is in swap
or on its way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mm.mempolicy import Mempolicy, mpol_to_str
from mm.page_flags import (
    PG_active,
    PG_dirty,
    PG_swapcache,
    PG_unevictable,
    PG_writeback,
)
from mm.pagewalk import walk_page_range
from mm.pgtable import pte_dirty, pte_pfn, pte_present, pte_special
from mm.types import MmStruct, Vma, page_anon
from mm.typing import PAGE_SIZE, Mask, Pfns, Ptes, word
from mm.vectors import has

_ACTIVE = word(PG_active | PG_unevictable)


@dataclass(slots=True)
class NumaMaps:
    """What numa_maps says of one VMA, in pages; str() is its line. Linux: struct numa_maps.

    policy: its own, or that of the task; mapmax: the most mappings that one of its pages has;
    nodes: how many pages are on each node that has any.
    """

    start: int
    policy: str
    file: str | None = None  # the name of what is mapped, None for anonymous memory
    pages: int = 0
    anon: int = 0
    dirty: int = 0
    mapmax: int = 0
    swapcache: int = 0
    active: int = 0
    writeback: int = 0
    nodes: dict[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{self.start:08x} {self.policy}"]
        if self.file is not None:
            said.append(f"file=/{self.file}")
        if self.pages:
            mapped = self.pages not in (self.anon, self.dirty)
            said += [
                f"{name}={count}"
                for name, count, shown in (
                    ("anon", self.anon, self.anon),
                    ("dirty", self.dirty, self.dirty),
                    ("mapped", self.pages, mapped),
                    ("mapmax", self.mapmax, self.mapmax > 1),
                    ("swapcache", self.swapcache, self.swapcache),
                    ("active", self.active, self.active < self.pages),
                    ("writeback", self.writeback, self.writeback),
                )
                if shown
            ]
            said += [f"N{nid}={count}" for nid, count in sorted(self.nodes.items())]
            said.append(f"kernelpagesize_kB={PAGE_SIZE >> 10}")
        return " ".join(said)


def numa_maps(mm: MmStruct, policy: Mempolicy | None) -> list[NumaMaps]:
    """A record for each VMA, ascending; *policy* is that of the task, where a VMA has none.

    Takes mmap_sem for read. Linux: show_numa_map(), fs/proc/task_mmu.c.
    """
    with mm.mmap_sem.read():
        return [_gather_vma_stats(vma, policy) for vma in mm.vmas]


def _gather_vma_stats(vma: Vma, policy: Mempolicy | None) -> NumaMaps:
    mm = vma.vm_mm
    file = None if vma.vm_file is None else vma.vm_file.name
    md = NumaMaps(vma.vm_start, mpol_to_str(vma.vm_policy or policy), file)
    for run in walk_page_range(mm.mem.tables, mm.pgd, vma.vm_start, vma.vm_end, holes=False):
        with mm.page_table_lock:
            pfns, dirty = _numa_pages(vma, run.ptes)
            _gather_stats(md, vma, pfns, dirty)
    return md


def _numa_pages(vma: Vma, ptes: Ptes) -> tuple[Pfns, Mask]:
    """The pages of *ptes* that a node has, and which entries are dirty.

    Linux: can_gather_numa_stats(), fs/proc/task_mmu.c.
    """
    ptes = ptes[pte_present(ptes) & ~pte_special(ptes)]
    pfns = pte_pfn(ptes)
    system = ~vma.vm_mm.mem.is_zone_device_page(pfns)
    return pfns[system], pte_dirty(ptes[system])


def _gather_stats(md: NumaMaps, vma: Vma, pfns: Pfns, dirty: Mask) -> None:
    """Count *pfns* in. Linux: gather_stats(), fs/proc/task_mmu.c."""
    if not pfns.size:
        return
    mem = vma.vm_mm.mem
    flags = mem.flags[pfns]
    for name, counted in (
        ("anon", page_anon(mem, pfns)),
        ("dirty", dirty | has(flags, PG_dirty)),
        ("swapcache", has(flags, PG_swapcache)),
        ("active", has(flags, _ACTIVE)),
        ("writeback", has(flags, PG_writeback)),
    ):
        setattr(md, name, getattr(md, name) + int(np.count_nonzero(counted)))
    md.pages += pfns.size
    md.mapmax = max(md.mapmax, mem.mapcount[pfns].max().item())
    for nid, count in zip(*np.unique(mem.page_to_nid(pfns), return_counts=True), strict=True):
        md.nodes[int(nid)] = md.nodes.get(int(nid), 0) + int(count)
