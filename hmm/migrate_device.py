"""Pages leave a device, wherever they are mapped: eviction without an address.

    lock       migrate_device_range: src from the frames, with a reference and the page lock
    unmap      (inside it) take every mapping away, over the rmap
    (driver    allocate, lock and copy, name the destinations in dst)
    pages      migrate_device_pages, of hmm/migrate.py
    finalize   migrate_device_finalize

Linux: mm/migrate_device.c, v6.1.
"""

from __future__ import annotations

import numpy as np

from hmm.migrate import migrate_device_pages, migrate_vma_finalize, migrate_vma_unmap
from hmm.migrate_pfn import MIGRATE_PFN_LOCKED, MIGRATE_PFN_MIGRATE, Stayed, migrate_pfn
from hmm.migration import MigrateDevice
from mm.filemap import trylock_page
from mm.memremap import FREE_REFCOUNT
from mm.mmzone import Zone
from mm.swap import get_page
from mm.types import MemMap, MemoryType
from mm.typing import Pfns, word
from mm.vectors import places

__all__ = ["migrate_device_finalize", "migrate_device_pages", "migrate_device_range"]

_TO_MOVE = word(MIGRATE_PFN_MIGRATE | MIGRATE_PFN_LOCKED)


def migrate_device_range(mem: MemMap, zone: Zone, pfns: Pfns) -> MigrateDevice:
    """Begin to migrate those of *pfns* (distinct, of device *zone*) that are in use.

    The driver fills dst of the result for entries with MIGRATE in src, then calls
    migrate_device_pages() and migrate_device_finalize(). A page that somebody has locked stays.
    Linux: migrate_device_range(), mm/migrate_device.c, v6.1.
    """
    src, dst = np.zeros((2, pfns.size), dtype=np.uint64)
    migrate = MigrateDevice(mem, zone.pgmap.name, src, dst)
    migrate.begin(pfns.size)
    used = places(mem.refcount[pfns] > FREE_REFCOUNT)
    locked = trylock_page(mem, pfns[used])
    migrate.stayed[used[~locked]] = Stayed.LOCKED
    migrate.entries = used[locked]
    migrate.pfns = pfns[migrate.entries]
    get_page(mem, migrate.pfns)
    src[migrate.entries] = migrate_pfn(migrate.pfns, _TO_MOVE)
    migrate.stayed[migrate.entries] = Stayed.NO
    migrate.reachable = zone.pgmap.type is not MemoryType.DEVICE_PRIVATE
    migrate_vma_unmap(migrate)
    migrate.moved = np.zeros(migrate.entries.size, dtype=np.bool_)
    return migrate


def migrate_device_finalize(migrate: MigrateDevice) -> None:
    """Point the page tables at what moved, or back; unlock and release all.

    Linux: migrate_device_finalize(), mm/migrate_device.c, v6.1.
    """
    migrate_vma_finalize(migrate)
