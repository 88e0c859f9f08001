"""What a device has done, and what became of the pages that it was asked to move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from hmm.migrate_pfn import Stayed
from hmm.migration import MigrateVma
from mm.vectors import places


@dataclass
class Stats:
    """What a device has done so far. Bytes are those that were copied: a hole costs none.

    simulated_us: what that would have taken on the hardware of a `Timed` (devices/timed.py).
    """

    device_faults: int = 0
    fault_batches: int = 0
    pages_to_device: int = 0
    pages_to_system: int = 0
    evicted_pages: int = 0
    bytes_to_device: int = 0
    bytes_to_system: int = 0
    simulated_us: float = 0.0


@dataclass
class Moved:
    """What became of the pages of a range.

    collected: pages that could move when the migration began; migrated: those that did; stayed:
    for the others, how many stayed for which reason (the names of `hmm.Stayed`, lower case).
    """

    collected: int = 0
    migrated: int = 0
    stayed: Counter[str] = field(default_factory=Counter)

    def add(self, migrate: MigrateVma) -> None:
        """Count one migrate_vma() call in."""
        migrated = migrate.cpages
        self.migrated += migrated
        self.collected += migrated
        if migrated == migrate.npages:
            return
        reasons = migrate.stayed if migrate.wanted is None else migrate.stayed[migrate.wanted]
        counts = np.bincount(reasons, minlength=len(Stayed))
        counts[Stayed.NO] = 0
        for reason in places(counts).tolist():
            self.stayed[Stayed(reason).name.lower()] += counts.item(reason)
        self.collected += int(counts.sum()) - counts.item(Stayed.SKIPPED)
