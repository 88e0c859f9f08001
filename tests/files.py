"""Mapped files, with sane defaults: where tests of files begin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mm import PAGE_SIZE
from mm.fs import File
from mm.swap import lru_add_drain_all
from mm.typing import Pfns
from mm.vmscan import reclaim_pages
from tests.world import World, mapped_range


@dataclass
class Shared(World):
    """A World whose range is a shared mapping of `file`."""

    file: File | None = None

    def cache(self) -> Pfns:
        """The entries of the file's cache for each page of the range: PFN, 0, or ~slot."""
        return self.file.f_mapping.i_pages.load(np.arange(self.pages))

    def evict(self, *pages: int) -> int:
        """Have the file's *pages*, by default all that are in memory, reclaimed; how many were."""
        lru_add_drain_all(self.machine.mem)
        entries = self.cache()[list(pages) if pages else slice(None)]
        return reclaim_pages(self.machine.mem, entries[entries > 0])

    def private(self, name: str = "private") -> Shared:
        """The same part of the file in another process, mapped privately."""
        return self._mapped_by(name, "file|private")

    def shared(self, name: str = "shared") -> Shared:
        """The same part of the file in another process, shared as well."""
        return self._mapped_by(name, "file|shared")

    def _mapped_by(self, name: str, flags: str) -> Shared:
        other = self.seen_by(self.machine.spawn(name))
        other.addr = other.process.mmap(self.nbytes, flags=flags, file=self.file)
        return other


def mapped_file(pages: int = 5, *, filled: bool = True, prot: str = "rw", **options) -> Shared:
    """A process that maps all of a memfd of *pages* pages, each filled with its number."""
    world = mapped_range(pages=1, filled=False, **options)
    file = world.machine.memfd_create("test")
    file.truncate(pages * PAGE_SIZE)
    world.process.munmap(world.addr, PAGE_SIZE)
    addr = world.process.mmap(pages * PAGE_SIZE, prot, file=file)
    shared = Shared(
        world.machine, world.process, world.gpu, addr, pages, world.free_at_boot, file=file
    )
    if filled:
        shared.fill()
    return shared
