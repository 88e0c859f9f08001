"""Ranges whose pages are in device memory or on their way, and what their entries say.

Entries are decoded here with plain integers, by the picture at the top of mm/swapops.py:
the code under test does not judge itself.
"""

import threading
import time
from contextlib import contextmanager

import numpy as np

from mm.pgtable import _PAGE_RW
from mm.swapops import (
    make_device_exclusive_entry,
    make_device_private_entry,
    make_hwpoison_entry,
    make_migration_entry,
)
from tests.mm.test_rmap import migrating
from tests.world import mapped_range

LOCKED, DIRTY, RESERVED, UNEVICTABLE, MLOCKED = (1 << bit for bit in (0, 4, 12, 19, 20))
SWP_SOFT_DIRTY = 1 << 1
TYPES = {
    25: "exclusive rw",
    26: "exclusive r",
    27: "poison",
    28: "moving r",
    29: "moving rw",
    30: "private rw",
    31: "private r",
}
YES, NO = np.array([True]), np.array([False])
MAKERS = {
    "moving r": lambda pfns: make_migration_entry(pfns, NO),
    "moving rw": lambda pfns: make_migration_entry(pfns, YES),
    "private r": lambda pfns: make_device_private_entry(pfns, NO),
    "private rw": lambda pfns: make_device_private_entry(pfns, YES),
    "exclusive r": lambda pfns: make_device_exclusive_entry(pfns, NO),
    "exclusive rw": lambda pfns: make_device_exclusive_entry(pfns, YES),
    "poison": make_hwpoison_entry,
}
PLACES = ("system", "private", "public", "moving")


def decoded(word):
    """(what the entry is, its PFN or slot)."""
    if not word:
        return "none", -1
    if word & 0x101:  # present, or PROT_NONE
        return "mapped rw" if word & int(_PAGE_RW) else "mapped r", word >> 12 & (1 << 40) - 1
    offset = (~word & (1 << 64) - 1) >> 9 & (1 << 50) - 1
    return TYPES.get(word >> 59, "swap"), offset


def kinds(world):
    """What the entry of each page of *world* is."""
    return [decoded(word)[0] for word in world.ptes().tolist()]


def frames(world):
    """The PFN in each entry of *world*, whatever kind it is."""
    return np.array([decoded(word)[1] for word in world.ptes().tolist()])


def bits(world, mask):
    """Which entries of *world* have a bit of *mask*."""
    return [bool(word & int(mask)) for word in world.ptes().tolist()]


def flagged(world, mask):
    """Which pages of *world* have a flag of *mask*."""
    return [bool(flags & mask) for flags in world.machine.mem.flags[frames(world)].tolist()]


def away(pages=3, kind="private", **options):
    """A range that is all in memory of a device of *kind*."""
    world = mapped_range(pages, kind=kind, **options)
    world.gpu.to_device(world.process, world.addr, world.nbytes)
    return world


@contextmanager
def in_place(where, pages=3, **options):
    """A range whose pages are in *where*, of PLACES; those that move arrive when it ends."""
    if where in ("private", "public"):
        yield away(pages, where, **options)
        return
    world = mapped_range(pages, **options)
    if where == "system":
        yield world
        return
    with migrating(world):
        yield world


@contextmanager
def waiter(world, call):
    """A thread that has called *call* and sleeps; it ends after the block."""
    heard = []
    thread = threading.Thread(target=lambda: heard.append(call()), daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not world.machine.mem.locks.waiting and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    assert thread.is_alive(), "it did not wait"
    yield heard
    thread.join(10)
    assert not thread.is_alive()
