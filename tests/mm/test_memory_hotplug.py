"""Memory that comes while a machine runs."""

import numpy as np
import pytest

from mm import InvalidArgument, Machine, OutOfMemory, OutOfRange
from mm.gfp import GFP_KERNEL
from mm.mmzone import DMA_END
from mm.page_alloc import alloc_pages, free_blocks, free_pages
from mm.typing import PAGE_SIZE

MIB = (1 << 20) // PAGE_SIZE  # pages


def machine_of(*nodes, payload=False, **options):
    return Machine(nodes, payload=payload, max_physmem="64MiB", debug=True, **options)


class TestAdd:
    @pytest.mark.parametrize("nodes", [("1MiB",), ("3MiB", "5MiB"), ("15MiB",), ("16MiB",)])
    @pytest.mark.parametrize("size", ["1MiB", "8MiB", "37MiB"])
    def test_free_memory(self, nodes, size):
        """There are so many free frames more, and all is as if they had been there at boot."""
        machine = machine_of(*nodes)
        free = machine.nr_free_pages
        machine.add_memory(size)

        assert free + int(size[:-3]) * MIB == machine.nr_free_pages
        assert machine.mem.max_pfn == machine.mem.nodes[-1].end_pfn
        machine.verify()
        total = machine.mem.max_pfn * PAGE_SIZE
        sizes = [n.end_pfn - n.start_pfn for n in machine.mem.nodes]
        twin = Machine([s * PAGE_SIZE for s in sizes], payload=False, max_physmem=total)
        assert [
            (z.name, z.start_pfn, z.end_pfn, z.managed_pages, z.watermark, z.lowmem_reserve)
            for z in machine.mem.zones[1:]
        ] == [
            (z.name, z.start_pfn, z.end_pfn, z.managed_pages, z.watermark, z.lowmem_reserve)
            for z in twin.mem.zones[1:]
        ]

    def test_blocks(self):
        """What comes merges with the free blocks before it."""
        machine = machine_of("3MiB")
        machine.add_memory("1MiB")
        machine.add_memory("4MiB")
        (zone,) = machine.mem.nodes[0].zones

        heads, orders = free_blocks(machine.mem, zone)
        assert 10 == orders[heads == 1024]  # [4 MiB, 8 MiB) in one block
        assert 9 == orders[heads == 512]  # [2 MiB, 4 MiB): half of it came
        machine.verify()

    def test_new_zone(self):
        """Memory beyond 16 MiB is of the next zone."""
        machine = machine_of("15MiB")
        machine.add_memory("3MiB")

        assert [("DMA", 1, DMA_END), ("DMA32", DMA_END, 18 * MIB)] == [
            (z.name, z.start_pfn, z.end_pfn) for z in machine.mem.nodes[0].zones
        ]

    def test_new_node(self):
        """It has no CPU, and serves those that have no memory left."""
        machine = machine_of("2MiB", payload=True)
        process = machine.spawn()
        addr = process.mmap("2MiB", flags="anon|private|noreserve")
        with pytest.raises(OutOfMemory):
            process.touch(addr, "2MiB")
        machine.add_memory("2MiB", node=1)
        process.touch(addr, "2MiB")

        nodes = process.move_pages(addr + np.arange(512) * PAGE_SIZE)
        assert {0, 1} == set(nodes.tolist())
        assert [0, 0] == machine.mem.cpu_to_node
        process.mbind(addr, "1MiB", "bind", [1], "move")
        machine.verify()
        process.exit()

    def test_reclaim_of_a_new_node(self):
        """Its pages go to swap as others do."""
        machine = machine_of("2MiB", payload=True, swap="8MiB")
        machine.add_memory("2MiB", node=1)
        process = machine.spawn()
        process.set_mempolicy("bind", [1])
        addr = process.mmap("4MiB")
        data = np.random.default_rng(1).bytes(4 << 20)
        process.write(addr, data)

        assert machine.vmstat["pswpout"]
        assert data == process.read(addr, 4 << 20)
        process.exit()

    def test_contents(self):
        """A frame that came is a frame: it holds bytes, and goes to whoever asks."""
        machine = machine_of("1MiB", payload=True)
        machine.add_memory("4MiB")
        block = alloc_pages(machine.mem, GFP_KERNEL, 9, 0)
        assert block >= MIB
        free_pages(machine.mem, block, 9)
        machine.verify()


class TestRefused:
    @pytest.mark.parametrize("size", ["0", "4KiB", "1537KiB"])
    def test_size(self, size):
        """Memory comes in MiB."""
        with pytest.raises(InvalidArgument, match="multiple of 1 MiB"):
            machine_of("1MiB").add_memory(size)

    @pytest.mark.parametrize("node", [-1, 0, 3])
    def test_node(self, node):
        """Only where the last one ends, or as the next."""
        with pytest.raises(InvalidArgument, match="memory comes to the last, 1, or as 2"):
            machine_of("1MiB", "1MiB").add_memory("1MiB", node)

    def test_end_of_physical_memory(self):
        """ERANGE, and nothing has changed."""
        machine = machine_of("1MiB")
        with pytest.raises(OutOfRange, match="max_physmem"):
            machine.add_memory("64MiB")
        machine.verify()
