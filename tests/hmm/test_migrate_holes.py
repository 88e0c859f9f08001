"""migrate_vma() where nothing was mapped yet: the device populates the process's memory."""

import errno

import numpy as np
import pytest

from hmm import (
    MIGRATE_PFN_ERROR,
    Stayed,
)
from mm import (
    PAGE_SIZE,
)
from tests.hmm.callbacks import frame, hand_over, instead, migrate
from tests.hmm.ranges import (
    entries,
    kinds,
    reasons,
)
from tests.world import mapped_range


class TestHoles:
    @pytest.mark.parametrize("access", ["none", "read"])
    @pytest.mark.parametrize("prot", ["r", "rw", "rx", "-"])
    def test_hole_or_zero_page_is_filled(self, prot, access):
        """A page that was never written gets device memory, writable exactly if its VMA is."""
        world = mapped_range(pages=3, filled=False, prot=prot)
        if access == "read" and prot != "-":
            world.process.touch(world.addr, world.nbytes, write=False)

        with world.machine.vmstat.counting("nr_anon_pages") as delta:
            result = migrate(world)

        assert 3 == result.cpages
        assert [("device", prot == "rw")] * 3 == [(e.kind, e.write) for e in entries(world)]
        assert ({"nr_anon_pages": 3}, 3) == (delta, world.process.mm.anon_rss)

    def test_hole_of_userland(self):
        """A userfaultfd for missing pages fills it alone; one for stores keeps what it marks."""
        world = mapped_range(pages=4, filled=False)
        missing, stores = world.process.userfaultfd(), world.process.userfaultfd("wp_unpopulated")
        missing.register(world.addr, PAGE_SIZE)
        stores.register(world.at(2), 2 * PAGE_SIZE, "wp")
        stores.writeprotect(world.at(3), PAGE_SIZE)

        result = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [False, True, True, False] == world.on_device()
        assert 1 == result.stayed["userfault"]

    def test_zero_page_is_system_memory(self):
        """Who asks for device pages alone is not given the zero page, but holes."""
        world = mapped_range(pages=2, filled=False)
        world.process.read(world.at(1), 1)

        result = migrate(world, back=True)

        assert ["NOT_CHOSEN", "SKIPPED"] == reasons(result)
        assert ["none", "zero"] == kinds(world)

    @pytest.mark.parametrize("prot", ["r", "rw"])
    def test_filled_hole_reads_as_zeros(self, prot):
        """The CPU finds zeros where the device filled a hole, and with the same rights."""
        world = mapped_range(pages=3, filled=False, prot=prot)

        migrate(world)

        assert bytes(world.nbytes) == world.process.read(world.addr, world.nbytes)
        assert [("present", prot == "rw")] * 3 == [(e.kind, e.write) for e in entries(world)]

    def test_hole_that_the_driver_leaves(self):
        """A hole without a destination is a hole afterwards."""
        world = mapped_range(pages=3, filled=False)

        result = migrate(world, after=instead(world, {0: 0, 1: int(MIGRATE_PFN_ERROR)}))

        assert ["none", "none", "device"] == kinds(world)
        assert ["NOT_CHOSEN", "NOT_CHOSEN", "NO"] == reasons(result)
        assert [0, 0, 0] == world.contents()

    def test_cpu_stores_to_a_hole_meanwhile(self):
        """The CPU was first: its page stays, and what the driver prepared is given back."""
        world = mapped_range(pages=3, filled=False)

        result = migrate(world, before=lambda src, dst: world.process.write(world.at(1), b"\x07"))

        assert ["NO", "RACED", "NO"] == reasons(result)
        assert [0, -errno.EEXIST, 0] == result.status.tolist()
        assert [0, 7, 0] == world.contents()
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_cpu_loads_from_a_hole_meanwhile(self):
        """The zero page is no obstacle: the device's page takes its place."""
        world = mapped_range(pages=3, filled=False)

        result = migrate(world, after=lambda src, dst: world.process.read(world.at(1), 1))

        assert (3, [True] * 3) == (result.cpages, world.on_device())

    def test_filled_from_system_memory_and_device_at_once(self):
        """Each hole gets the kind of page that the driver chose for it."""
        world = mapped_range(pages=4, filled=False)

        def half(src, dst):
            instead(world, {1: 0, 2: 0})(src, dst)
            for i in (1, 2):
                pfn = frame(world)
                world.machine.mem.payload[pfn] = 9
                hand_over(world, dst, i, pfn)

        migrate(world, after=half, pgmap_owner=None)

        assert ["device", "present", "present", "device"] == kinds(world)
        assert [0, 9, 9, 0] == world.contents()

    def test_huge_range_with_a_few_pages(self):
        """A gigabyte of holes around three pages: the device takes what fits, from the start."""
        world = mapped_range(pages=1 << 18, filled=False)
        for page in (0, 1_000, 200_000):
            world.process.write(world.at(page), bytes([page % 251]) * PAGE_SIZE)

        result = migrate(world)

        assert 1_024 == result.cpages == np.count_nonzero(world.on_device())
        assert [0, 1_000 % 251] == [world.process.read(world.at(p), 1)[0] for p in (0, 1_000)]
        assert 200_000 % 251 == world.process.read(world.at(200_000), 1)[0]
        assert "NOT_CHOSEN" == Stayed(result.stayed[-1]).name

    def test_wanted_pages_of_a_huge_range(self):
        """Of scattered pages only those that were asked for are looked at."""
        world = mapped_range(pages=1 << 18, filled=False)
        wanted = np.zeros(world.pages, dtype=np.bool_)
        wanted[[5, 600, 70_000, 262_143]] = True
        world.process.write(world.at(600), b"x")

        result = migrate(world, wanted=wanted)

        assert [5, 600, 70_000, 262_143] == np.flatnonzero(world.on_device()).tolist()
        assert b"x" == world.process.read(world.at(600), 1)
        assert {"NO", "SKIPPED"} == {Stayed(reason).name for reason in set(result.stayed.tolist())}

    def test_no_page_table_is_left(self):
        """Holes that would need a table stay where none can be had; the pages move."""
        world = mapped_range(pages=1_024, filled=False, addr=0x7F00_0000_0000)
        for page in range(3):
            world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)
        world.gpu.table_of(world.process.mm)
        tables = world.machine.mem.tables
        spare = tables.alloc(tables.rows - 1 - tables.in_use)
        wanted = np.zeros(1_024, dtype=np.bool_)
        wanted[[0, 1, 2, 600]] = True

        try:
            result = migrate(world, mapping=lambda src, dst: tables.release(spare), wanted=wanted)
        finally:
            if tables.in_use == tables.rows - 1:
                tables.release(spare)

        assert [0, 1, 2] == np.flatnonzero(world.on_device()).tolist()
        assert 0 > Stayed(result.stayed[600]).errno
        assert [0, 1, 2] == world.contents()[:3]
