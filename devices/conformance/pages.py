"""Rules about which pages a driver hands out: its allocate() and free(), called by themselves."""

from __future__ import annotations

import numpy as np

from devices.conformance.rule import Broken, Device, Opener, rule
from devices.conformance.scene import Scene, expect
from mm.typing import Indices


def allocated(gpu: Device, npages: int) -> Indices:
    """What allocate(*npages*) answers; raises Broken where that is no vector of page numbers."""
    pages = gpu.ops.allocate(npages)
    if not isinstance(pages, np.ndarray) or pages.dtype != np.int64 or pages.ndim != 1:
        kind = f"{pages.dtype}{list(pages.shape)}" if isinstance(pages, np.ndarray) else repr(pages)
        raise Broken(f"allocate({npages}) answered {kind}, no vector of int64")
    return pages


@rule()
def allocate(opener: Opener) -> str:
    """allocate() answers with free pages of the device, each once, and no more than asked for."""
    gpu = Scene(opener, "256KiB").gpu
    used: set[int] = set()
    for asked in (5, 1, 20, 3):
        pages = allocated(gpu, asked)
        expect(pages.size <= asked, f"asked for {asked} pages, it gave {pages.size}")
        for page in pages.tolist():
            expect(0 <= page < gpu.npages, f"page {page} is none of its {gpu.npages}")
            expect(page not in used, f"page {page} was given twice")
            used.add(page)
    return f"{len(used)} different pages in 4 calls"


@rule(allocate)
def full(opener: Opener) -> str:
    """A device gives all the memory that it has, and when it is full gives less, or nothing."""
    gpu = Scene(opener, "64KiB").gpu
    first, rest, none = (allocated(gpu, asked) for asked in (7, 12, 3))
    expect(first.size == 7, f"asked for 7 of 16 free pages, it gave {first.size}")
    expect(rest.size == 9, f"asked for 12 with 9 free, it gave {rest.size}")
    expect(none.size == 0, f"asked for 3 with none free, it gave {none.size}")
    return "16 of 16 pages, then none"


@rule(full)
def free(opener: Opener) -> str:
    """Pages that were freed can be had again, each once, whatever the order."""
    gpu = Scene(opener, "64KiB").gpu
    gpu.ops.allocate(16)
    for order in (np.arange(16)[::-1], np.arange(16) * 7 % 16):
        for few in np.split(order, (1, 5, 6, 12)):
            gpu.ops.free(few)
        again = allocated(gpu, 16)
        expect(
            16 == again.size == np.unique(again).size,
            f"after all 16 were freed it gave {again.size}, {np.unique(again).size} different ones",
        )
    return "16 pages, freed and had again twice"
