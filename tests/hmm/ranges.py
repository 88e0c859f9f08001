"""Ranges of every kind of page, and what their page-table entries say."""

import numpy as np

from devices.memory import Direction
from hmm import (
    MigrateVma,
    Stayed,
)
from mm import (
    PAGE_SIZE,
)
from tests.reference.state import Entry, decode, page_table_word
from tests.world import mapped_range

ALL_KINDS = 6  # pages of mixed_range()
MIXED_CONTENTS = [0, 0, 2, 3, 4, 5]  # and what each of them holds


def entries(world) -> list[Entry]:
    """The decoded page-table entry of each page of the range."""
    mem = world.machine.mem
    words = [page_table_word(mem, world.process.mm.pgd, addr) for addr in world.addrs.tolist()]
    return [decode(word, mem.zero_pfn) if word else Entry("none") for word in words]


def mapped(world) -> list[tuple[str, int, bool]]:
    """What each entry of the range is, which page it names, and whether stores may use it."""
    return [(entry.kind, entry.pfn, entry.write) for entry in entries(world)]


def kinds(world) -> list[str]:
    return [entry.kind for entry in entries(world)]


def reasons(result: MigrateVma) -> list[str]:
    return [Stayed(reason).name for reason in result.stayed.tolist()]


def mixed_range():
    """Pages 0 to 5: a hole, the zero page, touched, touched read-only, device page, touched."""
    world = mapped_range(pages=ALL_KINDS)
    world.process.munmap(world.addr, world.nbytes)
    world.process.mmap(world.nbytes, addr=world.addr)
    world.process.touch(world.at(1), PAGE_SIZE, write=False)
    for page in (2, 3, 4, 5):
        world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)
    world.write_protect(3)
    world.gpu.to_device(world.process, world.at(4), PAGE_SIZE)
    return world


def in_hand(world):
    """A migration to run stage by stage, and the arguments of its callbacks."""
    src, dst = np.zeros((2, world.pages), dtype=np.uint64)
    start, end = world.addr, world.addr + world.nbytes
    migration = MigrateVma(world.vma, start, end, src, dst)
    return migration, (world.vma, src, dst, start, end, Direction.TO_DEVICE)
