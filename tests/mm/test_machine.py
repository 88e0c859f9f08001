"""Booting machines of all sizes, and of no size at all."""

import pytest

from mm import InvalidArgument, Machine
from mm.mmzone import DMA32_END, DMA_END
from mm.types import BYTES_PER_PAGE, COLUMNS
from mm.typing import PAGE_SIZE

MIB = (1 << 20) // PAGE_SIZE  # pages


class TestBoot:
    @pytest.mark.parametrize(
        ("nodes", "frames"),
        [
            (("1MiB",), MIB),
            (("16MiB",), 16 * MIB),
            (("17MiB",), 17 * MIB),
            (("3MiB", "5MiB"), 8 * MIB),
            ((2 << 20, "1.5G", "1MiB"), (2 + 1536 + 1) * MIB),
            (["64MiB"] * 4, 256 * MIB),
        ],
    )
    def test_all_memory_is_free(self, nodes, frames):
        """Every frame is there but PFN 0, which stands for none, and the zero page."""
        machine = Machine(nodes, payload=False, max_physmem=frames * PAGE_SIZE)

        assert frames - 2 == machine.nr_free_pages == machine.vmstat["nr_free_pages"]
        machine.verify()

    def test_without_arguments(self):
        """512 MiB with contents, two CPUs, and room for devices."""
        machine = Machine()

        assert 512 * MIB - 2 == machine.nr_free_pages
        assert 2 == len(machine.mem.cpu_to_node)
        assert machine.mem.limit_pfn - machine.mem.max_pfn >= (64 << 30) // PAGE_SIZE
        assert "<Machine 512 MiB, 0 processes>" == repr(machine)

    def test_zero_page(self):
        """One frame of zeros is everybody's; the allocator never has it."""
        machine = Machine(("1MiB",), max_physmem="1MiB")
        mem = machine.mem

        assert 1 == mem.refcount[mem.zero_pfn]
        assert not mem.payload[mem.zero_pfn].any()

    def test_cpus_are_spread_over_nodes(self):
        """Evenly, in order."""
        machine = Machine(("1MiB",) * 2, cpus=4, payload=False, max_physmem="2MiB")

        assert [0, 0, 1, 1] == machine.mem.cpu_to_node

    def test_fewer_cpus_than_nodes(self):
        """A node may have no CPU: it is memory only."""
        machine = Machine(("1MiB",) * 3, cpus=1, payload=False, max_physmem="3MiB")

        assert [0] == machine.mem.cpu_to_node

    def test_shown(self):
        """By its memory and processes."""
        machine = Machine(("1MiB", "2MiB"), max_physmem="3MiB")
        machine.spawn()

        assert "<Machine 1 MiB + 2 MiB, 1 processes>" == repr(machine)

    def test_bytes_per_page(self):
        """What the kernel has for struct page is enough here, too."""
        machine = Machine(("1MiB",), max_physmem="1MiB")
        columns = [getattr(machine.mem, column.name) for column in COLUMNS]

        assert sum(column.itemsize for column in columns) == machine.metadata_bytes_per_page
        assert 64 >= BYTES_PER_PAGE == machine.metadata_bytes_per_page


class TestBadArguments:
    @pytest.mark.parametrize(
        ("how", "complaint"),
        [
            ({"nodes": ()}, r"nodes=\(\): give a size for each node"),
            ({"nodes": "512MiB"}, "nodes='512MiB': give a size for each node, as"),
            ({"nodes": ("0",)}, "a node of 0 B: its size must be a multiple of 1 MiB"),
            ({"nodes": ("4KiB",)}, "a node of 4 KiB: its size must be a multiple of 1 MiB"),
            ({"nodes": ("1MiB", "1.5MiB")}, r"a node of 1\.5 MiB: its size must be"),
            ({"nodes": ("big",)}, "'big' is no size"),
            ({"nodes": (-1,)}, "a size cannot be negative"),
            ({"swap": "x"}, "'x' is no size"),
            ({"swap": "4KiB"}, "a swap area of 4 KiB: its size must be a multiple of 4 KiB"),
            ({"swap": 10_000}, r"a swap area of 9\.766 KiB: its size must be a multiple"),
            ({"cpus": 0}, "cpus=0: a machine has at least one"),
            ({"max_physmem": "1MiB"}, "max_physmem='1MiB' is less than the nodes hold, 2 MiB"),
        ],
    )
    def test_no_such_machine(self, how, complaint):
        """The message says what was asked for, and what a machine can be."""
        with pytest.raises(InvalidArgument, match=complaint):
            Machine(**{"nodes": ("2MiB",)} | how)

    @pytest.mark.parametrize("cpu", [-1, 2])
    def test_no_such_cpu(self, cpu):
        """A process runs on a CPU that the machine has."""
        with pytest.raises(InvalidArgument, match=f"cpu {cpu}: this machine has 2"):
            Machine(("1MiB",), max_physmem="1MiB").spawn(cpu=cpu)


class TestTerabyte:
    def test_boots_and_works(self):
        """A machine of 1 TiB without contents boots, maps, faults and gives back."""
        machine = Machine(("1TiB",), payload=False, max_physmem="1TiB")
        frames = machine.nr_free_pages

        with machine.spawn() as process:
            addr = process.mmap("1TiB")
            process.touch(addr + (1 << 39), "16MiB")
            assert 4096 == process.mm.anon_rss

        assert ((1 << 40) // PAGE_SIZE) - 2 == frames == machine.nr_free_pages
        zones = [(zone.name, zone.start_pfn) for zone in machine.mem.nodes[0].zones]
        assert [("DMA", 1), ("DMA32", DMA_END), ("Normal", DMA32_END)] == zones
