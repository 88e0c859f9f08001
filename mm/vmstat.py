"""Counters, under the names of /proc/vmstat. Linux: mm/vmstat.c.

Names that begin with `nr_` are amounts that rise and fall; the rest count events and only rise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from mm.errors import NoSuchCounter
from mm.locking import Locks

VMSTAT_NAMES: Final = (
    "nr_free_pages",  # frames that the buddy allocator and the per-CPU lists hold
    "nr_inactive_anon",
    "nr_active_anon",
    "nr_inactive_file",
    "nr_active_file",
    "nr_unevictable",
    "nr_mlock",  # pages that some VM_LOCKED mapping keeps in memory
    "nr_isolated_anon",  # taken off a list by somebody who moves them
    "nr_isolated_file",
    "nr_anon_pages",  # mapped anonymous pages, device memory included
    "nr_mapped",  # mapped pages of the page cache
    "nr_file_pages",  # pages of the page cache, the swap cache included
    "nr_dirty",  # pages of files whose contents are not on disk yet
    "nr_writeback",  # pages of files on their way to disk
    "nr_dirtied",  # pages that became dirty since boot, and that were written: they only rise
    "nr_written",
    "nr_shmem",  # pages of the page cache whose home is swap: tmpfs and shared anonymous memory
    "nr_swapcached",  # pages in the swap cache
    "nr_page_table_pages",
    "nr_foll_pin_acquired",  # pins taken since boot: this one and the next only rise
    "nr_foll_pin_released",
    "pgpgin",  # KiB that block devices read, and wrote
    "pgpgout",
    "pgalloc_dma",
    "pgalloc_dma32",
    "pgalloc_normal",
    "numa_hit",  # pages that came from the node that was asked first
    "numa_miss",  # pages that came from another, because that one had none
    "numa_foreign",  # the same pages, as the node sees it that had none
    "numa_interleave",  # pages that came from the node whose turn it was
    "numa_local",  # pages that came from the node of the CPU that asked
    "numa_other",
    "pgfree",
    "pgactivate",
    "pgdeactivate",
    "pglazyfree",  # pages that MADV_FREE gave up
    "pglazyfreed",  # those of them that reclaim took, contents and all
    "pgscan_kswapd",  # pages that reclaim looked at
    "pgscan_direct",
    "pgsteal_kswapd",  # pages that it took
    "pgsteal_direct",
    "pswpin",
    "pswpout",
    "workingset_refault",  # pages that came back after reclaim had taken them
    "workingset_activate",  # those that went to the active list at once
    "workingset_restore",  # those that had been there before
    "pgfault",
    "pgmajfault",
    "unevictable_pgs_mlocked",  # pages that became PG_mlocked
    "unevictable_pgs_munlocked",
    "pgmigrate_success",  # base-page migration by the kernel; migrate_vma counts none
    "pgmigrate_fail",
    "zeropage_read_faults",  # ours: read faults that the zero page served
    "cow_faults",  # ours: writes that got a new frame in place of a read-only one
    "device_private_faults",  # ours: CPU accesses that found the page in device memory
)


class VmStat(Mapping[str, int]):
    """/proc/vmstat as a mapping: `machine.vmstat["pgfault"]`."""

    def __init__(self, locks: Locks | None = None) -> None:
        self.locks = locks or Locks()  # of the machine that is counted
        self._counts = dict.fromkeys(VMSTAT_NAMES, 0)

    def __getitem__(self, name: str) -> int:
        if name not in self._counts:
            raise NoSuchCounter(f"no counter is named {name!r}; see mm.vmstat.VMSTAT_NAMES")
        return self._counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, name: str, amount: int) -> None:
        """Let counter *name* rise by *amount*, or fall where it is negative.

        Linux: count_vm_events() and mod_node_page_state(), include/linux/vmstat.h.
        """
        with self.locks.atomic:
            self._counts[name] += amount

    def add_each(self, names: Iterable[str], amount: int) -> None:
        """Let each of *names* rise by *amount*."""
        with self.locks.atomic:
            for name in names:
                self._counts[name] += amount

    @contextmanager
    def counting(self, *names: str) -> Iterator[dict[str, int]]:
        """What changes inside the block, filled in when it ends.

        Holds the counters that changed, or exactly *names* where some are given.

        >>> with machine.vmstat.counting("pgfault") as delta:
        ...     process.write(addr, b"x")
        >>> delta
        {'pgfault': 1}
        """
        before = {name: self[name] for name in names or self}
        delta: dict[str, int] = {}
        yield delta
        for name, count in before.items():
            if names or self[name] != count:
                delta[name] = self[name] - count
