"""A machine: nodes of memory, and everything that stands on them.

The one file that knows everybody: it boots the zones, keeps the processes, and asks debug to
verify the lot.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final

from numpy.typing import ArrayLike

from mm.blockfs import BlockFs, mount
from mm.cred import prepare_cred
from mm.debug import verify
from mm.errors import InvalidArgument
from mm.fs import File
from mm.gfp import GFP_KERNEL, Gfp
from mm.mem_cgroup import MemCgroup
from mm.memcontrol import mem_cgroup_css_alloc
from mm.memory_failure import memory_failure, soft_offline_page, unpoison_memory
from mm.memory_hotplug import add_memory
from mm.memparse import Size, format_size, memparse
from mm.mm_init import build_nodes
from mm.page_alloc import alloc_pages_bulk, nr_free_pages
from mm.page_flags import PG_reserved
from mm.pgtable import PTRS_PER_PTE
from mm.process import Process
from mm.shmem import memfd_create
from mm.swap import lru_add_drain_all
from mm.swapfile import swapon
from mm.truncate import invalidate_mapping_pages
from mm.types import BYTES_PER_PAGE, MemMap
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Errnos
from mm.vectors import integers
from mm.vmscan import kswapd_init
from mm.vmstat import VmStat

MIN_NODE: Final = 1 << 20
DEVICE_SPACE: Final = 64 << 30  # room for device memory above the system's, unless asked for more


class Machine:
    """Memory, processes and devices of one simulated computer.

    nodes: size of each NUMA node. swap: size of the swap area, "0" for none. payload: keep the
    contents of pages; without, terabytes can be simulated. cpus: their number, spread evenly
    over the nodes. debug: fill freed pages with junk, so that use after free is seen.
    max_physmem: end of physical address space, which bounds the memory of all devices.
    """

    def __init__(
        self,
        nodes: Sequence[Size] = ("512MiB",),
        swap: Size = "0",
        payload: bool = True,
        cpus: int = 2,
        *,
        debug: bool = False,
        max_physmem: Size | None = None,
    ) -> None:
        sizes = _node_pages(nodes)
        if cpus < 1:
            raise InvalidArgument(f"cpus={cpus}: a machine has at least one")
        total = sum(sizes)
        limit = total + max(total, DEVICE_SPACE >> PAGE_SHIFT)
        if max_physmem is not None:
            limit = memparse(max_physmem) >> PAGE_SHIFT
        if limit < total:
            raise InvalidArgument(
                f"max_physmem={max_physmem!r} is less than the nodes hold, "
                f"{format_size(total << PAGE_SHIFT)}"
            )
        tables = 2 * (total // PTRS_PER_PTE) + (1 << 15)
        self.mem = MemMap(total, limit, tables=tables, payload=payload, cpus=cpus)
        self.mem.debug = debug
        self.mem.cpu_to_node = [cpu * len(sizes) // cpus for cpu in range(cpus)]
        build_nodes(self.mem, sizes)
        self._boot_zero_page()
        if memparse(swap):
            swapon(self.mem, swap)
        kswapd_init(self.mem)

    def _boot_zero_page(self) -> None:
        """Linux: empty_zero_page, arch/x86/kernel/head_64.S."""
        zero = alloc_pages_bulk(self.mem, GFP_KERNEL | Gfp.ZERO, 0, 1)
        self.mem.flags[zero] |= PG_reserved
        self.mem.zero_pfn = zero.item(0)

    def __repr__(self) -> str:
        sizes = (format_size((n.end_pfn - n.start_pfn) * PAGE_SIZE) for n in self.mem.nodes)
        return f"<Machine {' + '.join(sizes)}, {len(self.mem.mms)} processes>"

    def spawn(
        self,
        name: str = "task",
        cpu: int = 0,
        cgroup: MemCgroup | None = None,
        *,
        uid: int = 0,
        caps: Iterable[str] | None = None,
    ) -> Process:
        """A new process with an empty address space, running on *cpu*, in a control group.

        uid: its user. caps: what it may do besides, words of mm.cred.CAPABILITIES; by default
        everything if it is root's, nothing else.
        """
        if not 0 <= cpu < len(self.mem.cpu_to_node):
            raise InvalidArgument(f"cpu {cpu}: this machine has {len(self.mem.cpu_to_node)}")
        process = Process(self.mem, name, cpu, prepare_cred(uid, caps=caps))
        try:
            if cgroup is not None:
                process.move_to(cgroup)
        except BaseException:
            process.exit()
            raise
        return process

    def cgroup(self, path: str, limit: Size | None = None) -> MemCgroup:
        """The control group at *path*, as "/jobs/train", made with those that it stands in.

        limit: what its processes, and those of the groups in it, may have in memory, devices' and
        the system's; "max" for no limit, None to leave it as it is. Raises InvalidArgument; Busy
        where there is more already. Linux: mkdir of a control group, and memory.max.
        """
        memcg = mem_cgroup_css_alloc(self.mem, path)
        if limit is not None:
            memcg.limit = limit
        return memcg

    def memfd_create(self, name: str = "") -> File:
        """An empty file in memory, gone when nobody has it open or maps it any more.

        File.truncate() gives it its size. Linux: memfd_create(2).
        """
        return memfd_create(self.mem, name)

    def mount(
        self, path: str | os.PathLike[str], block_size: Size | None = None, size: Size | None = None
    ) -> BlockFs:
        """Mount the file system in the host's file *path*; what it has is read and written there.

        Where there is no such file one is made, of *size* (64 MiB) in blocks of *block_size*
        (4 KiB). Raises InvalidArgument, Corrupted, InputOutputError, Busy. Linux: mount(2).
        """
        return mount(self.mem, path, block_size, size)

    def sync(self) -> None:
        """Have all that was stored in files on their devices. Linux: sync(2)."""
        for fs in tuple(self.mem.super_blocks):
            fs.sync()

    def drop_caches(self) -> int:
        """Let go of pages of files that nobody needs and that are on their devices; how many.

        Linux: drop_caches_sysctl_handler(), fs/drop_caches.c.
        """
        return sum(map(invalidate_mapping_pages, tuple(self.mem.mappings.values())))

    @property
    def vmstat(self) -> VmStat:
        """The counters of /proc/vmstat."""
        return self.mem.vmstat

    @property
    def nr_free_pages(self) -> int:
        """Frames that nobody uses, once what is on its way to the LRU has got there."""
        lru_add_drain_all(self.mem)
        return nr_free_pages(self.mem)

    @property
    def metadata_bytes_per_page(self) -> int:
        """What the columns take for each page."""
        return BYTES_PER_PAGE

    def add_memory(self, size: Size, node: int | None = None) -> None:
        """*size* bytes of memory more, in *node*: the last one (default) or the next.

        Raises InvalidArgument, OutOfRange, and Exists where a device has physical addresses there.
        Linux: /sys/devices/system/memory/probe.
        """
        nid = len(self.mem.nodes) - 1 if node is None else node
        add_memory(self.mem, nid, memparse(size) >> PAGE_SHIFT)
        kswapd_init(self.mem)

    def memory_failure(self, pfns: ArrayLike) -> Errnos:
        """Let the contents of frames *pfns*, one or many, be lost: who reads them has SIGBUS.

        0 for each, or a negative errno: -EBUSY where somebody holds the page, and for memory of
        devices and files; -ENXIO for no frame. Linux: /sys/devices/system/memory/hard_offline_page.
        """
        return memory_failure(self.mem, integers("memory_failure: pfns", pfns))

    def soft_offline_page(self, pfns: ArrayLike) -> Errnos:
        """Move what is in frames *pfns*, one or many, elsewhere, and do not use them any more.

        0 for each, or a negative errno: -EIO where it cannot move, and for device memory; -EBUSY,
        -ENOMEM, -ENXIO. Linux: /sys/devices/system/memory/soft_offline_page.
        """
        return soft_offline_page(self.mem, integers("soft_offline_page: pfns", pfns))

    def unpoison_memory(self, pfns: ArrayLike) -> Errnos:
        """Use frames *pfns* again that the other two took out of use; -EBUSY where one is held.

        Linux: /sys/kernel/debug/hwpoison/unpoison-pfn.
        """
        return unpoison_memory(self.mem, integers("unpoison_memory: pfns", pfns))

    def verify(self) -> None:
        """Check every rule of docs/data-model.md; raises KernelBug that names what is broken."""
        verify(self.mem)


def _node_pages(nodes: Sequence[Size]) -> list[int]:
    if isinstance(nodes, str) or not nodes:
        raise InvalidArgument(f'nodes={nodes!r}: give a size for each node, as ("512MiB",)')
    sizes = [memparse(size) for size in nodes]
    for size in sizes:
        if size < MIN_NODE or size % MIN_NODE:
            raise InvalidArgument(
                f"a node of {format_size(size)}: its size must be a multiple of 1 MiB"
            )
    return [size >> PAGE_SHIFT for size in sizes]
