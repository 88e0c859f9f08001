"""The device's page table: what it shows, forgets and hands back, against a dict of addresses."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmm.device_pgtable import DevicePageTable
from mm import PAGE_SIZE
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.pgtable import pte_pfn, pte_present, pte_write
from mm.trace import listen
from tests.world import mapped_range

BORDERS = (0x7F00_0060_0000, 0x7F00_4000_0000, 0x7F80_0000_0000)  # of 2 MiB, 1 GiB, 512 GiB
PAGES = [border + page * PAGE_SIZE for border in BORDERS for page in range(-3, 3)]
MAPPINGS = st.dictionaries(
    st.sampled_from(PAGES), st.tuples(st.integers(1, (1 << 40) - 1), st.booleans()), max_size=12
)
RANGES = st.tuples(st.sampled_from(PAGES), st.sampled_from([*PAGES, PAGES[-1] + PAGE_SIZE])).map(
    sorted
)


class Table:
    """A device page table of a process, and the same as a dict."""

    def __init__(self) -> None:
        self.world = mapped_range(1, filled=False)
        self.mm = self.world.process.mm
        self.owner = object()
        self.table = DevicePageTable(self.mm, self.owner)

    def begin(self, mappings) -> None:
        """Forget everything, then map *mappings*."""
        self.invalidate(0, 1 << 56, MmuNotifyEvent.UNMAP)
        self.map(mappings)

    def map(self, mappings) -> bool:
        addrs = sorted(mappings)
        pfns = np.array([mappings[addr][0] for addr in addrs], dtype=np.int64)
        writable = np.array([mappings[addr][1] for addr in addrs], dtype=np.bool_)
        with self.mm.page_table_lock:
            return self.table.map(np.array(addrs, dtype=np.int64), pfns, writable)

    def shown(self) -> dict[int, tuple[int, bool]]:
        """What lookup() finds at any of PAGES."""
        with self.mm.page_table_lock:
            ptes = self.table.lookup(np.array(PAGES))
        found = zip(PAGES, pte_present(ptes), pte_pfn(ptes), pte_write(ptes), strict=True)
        return {addr: (int(pfn), bool(write)) for addr, there, pfn, write in found if there}

    def invalidate(self, start, end, event, owner=None) -> None:
        with mmu_notifier_range(self.mm, start, end, event, owner):
            pass

    def close(self) -> None:
        self.table.close()


@pytest.fixture
def table():
    table = Table()
    yield table
    table.close()


class TestEntries:
    def test_the_last_mapping_counts(self, table):
        """lookup() and mapped() show what was mapped last, whichever tables it takes."""

        @given(MAPPINGS, MAPPINGS)
        def check(first, second):
            table.begin(first)
            table.map(second)

            assert first | second == table.shown()
            assert sorted(first | second) == table.table.mapped()[0].tolist()

        check()

    def test_unmapping(self, table):
        """unmap() takes away what it is told, mapped or not, and nothing else."""

        @given(MAPPINGS, st.sets(st.sampled_from(PAGES)))
        def check(mappings, gone):
            table.begin(mappings)

            table.table.unmap(np.array(sorted(gone), dtype=np.int64))

            left = {addr: entry for addr, entry in mappings.items() if addr not in gone}
            assert left == table.shown()

        check()

    def test_empty_table(self, table):
        """An address without a table is not mapped, and has no table after the question."""
        with table.world.machine.vmstat.counting("nr_page_table_pages") as delta:
            assert {} == table.shown()

        assert {"nr_page_table_pages": 0} == delta
        assert [0, 0] == [column.size for column in table.table.mapped()]


class TestInvalidation:
    def test_range_is_forgotten(self, table):
        """What the CPU's table is about to change is gone from the device's; the rest stays."""

        @given(MAPPINGS, RANGES, st.sampled_from(list(MmuNotifyEvent)))
        def check(mappings, invalid, event):
            table.begin(mappings)
            start, end = invalid

            table.invalidate(start, end, event)

            left = {a: entry for a, entry in mappings.items() if not start <= a < end}
            assert left == table.shown()

        check()

    def test_own_migration(self, table):
        """The device's own migration forgets nothing: it corrects the table itself."""
        table.map({PAGES[0]: (7, True)})

        table.invalidate(PAGES[0], PAGES[-1], MmuNotifyEvent.MIGRATE, table.owner)

        assert {PAGES[0]: (7, True)} == table.shown()

    def test_anothers_migration(self, table):
        """Another device's migration is as any other change."""
        table.map({PAGES[0]: (7, True)})

        table.invalidate(PAGES[0], PAGES[-1], MmuNotifyEvent.MIGRATE, object())

        assert {} == table.shown()

    def test_mapping_meanwhile(self, table):
        """Nothing is mapped where an invalidation is under way; beside it, all is as ever."""
        with mmu_notifier_range(table.mm, PAGES[1], PAGES[2], MmuNotifyEvent.CLEAR):
            mapped = table.map({PAGES[0]: (7, True), PAGES[1]: (8, True)})
            beside = table.map({PAGES[2]: (9, True)})

        assert (False, True) == (mapped, beside)
        assert {PAGES[2]: (9, True)} == table.shown()

    def test_another_process(self, table):
        """What happens in another process is none of its business."""
        table.map({PAGES[0]: (7, True)})
        other = table.world.machine.spawn("other")

        with mmu_notifier_range(other.mm, 0, 1 << 56, MmuNotifyEvent.UNMAP):
            pass

        assert {PAGES[0]: (7, True)} == table.shown()


class TestSettle:
    def test_quiet_range(self, table):
        """Nobody waits where nothing is invalidated, also beside a range that is."""
        with mmu_notifier_range(table.mm, PAGES[0], PAGES[2], MmuNotifyEvent.CLEAR):
            table.table.settle(PAGES[2], PAGES[3])

    def test_range_that_is_invalidated(self, table):
        """A thread that wants to map waits until the invalidation is done."""
        order = []

        def settle() -> None:
            table.table.settle(PAGES[1], PAGES[3])
            order.append("settled")

        with mmu_notifier_range(table.mm, PAGES[0], PAGES[2], MmuNotifyEvent.CLEAR):
            waiter = threading.Thread(target=settle)
            waiter.start()
            waiter.join(0.05)
            order.append("end")
        waiter.join()

        assert ["end", "settled"] == order

    def test_invalidation_that_fails(self, table):
        """A change that raises still ends its invalidation."""
        change = mmu_notifier_range(table.mm, PAGES[0], PAGES[2], MmuNotifyEvent.CLEAR)

        with pytest.raises(OSError, match="no luck"), change:
            raise OSError("no luck")

        table.table.settle(PAGES[0], PAGES[2])


class TestEnd:
    def test_process_exits(self):
        """With the process go all of the tables that the device had for it."""
        table = Table()
        table.map(dict.fromkeys(PAGES, (1, True)))

        table.world.process.exit()

        assert 0 == table.world.machine.vmstat["nr_page_table_pages"]
        assert [] == table.world.machine.mem.device_pgds

    def test_device_goes(self):
        """A table that is closed hears nothing more, and its process lives on."""
        table = Table()
        table.map(dict.fromkeys(PAGES, (1, True)))

        table.close()

        assert [] == table.mm.notifiers
        table.world.process.write(table.world.addr, b"alive")

    def test_process_maps_the_same_range_again(self):
        """A table that a munmap has emptied serves what is mapped there next."""
        world = mapped_range(pages=3)
        world.gpu.read(world.process, world.addr, world.nbytes)
        world.process.munmap(world.addr, world.nbytes)
        world.process.mmap(world.nbytes, addr=world.addr)
        world.process.write(world.addr, b"new")

        assert b"new" == world.gpu.read(world.process, world.addr, 3)


class TestMigrations:
    def device_shows(self, world) -> dict[int, tuple[int, bool]]:
        """PFN and right to store of each page of the range that the device can reach."""
        addrs, ptes = world.gpu.tables[world.process.mm].mapped()
        pages = (addrs - world.addr) // PAGE_SIZE
        found = zip(pages, pte_pfn(ptes), pte_write(ptes), strict=True)
        return {int(page): (int(pfn), bool(write)) for page, pfn, write in found}

    def test_to_device(self):
        """After a migration the device reaches what moved, with the process's rights."""
        world = mapped_range(pages=3)
        world.write_protect(1)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        pfns = world.pfns().tolist()
        assert {
            0: (pfns[0], True),
            1: (pfns[1], False),
            2: (pfns[2], True),
        } == self.device_shows(world)

    def test_to_system(self):
        """What has left the device is not in its table."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.gpu.to_system(world.process, world.at(1), PAGE_SIZE)

        assert {0, 2} == set(self.device_shows(world))

    def test_page_that_cannot_come(self):
        """A pinned page is mapped where it is, and stays so through migrations around it."""
        world = mapped_range(pages=3)
        world.pin(1)
        assert b"\1" == world.gpu.read(world.process, world.at(1), 1)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (world.pfns().item(1), True) == self.device_shows(world)[1]

    def test_cpu_store_is_seen(self):
        """Device and CPU that share a page in system memory see each other's stores."""
        world = mapped_range(pages=1)
        world.pin(0)
        world.gpu.read(world.process, world.addr, 1)

        with listen(lambda event, fields: pytest.fail("no fault is needed"), "gpu_fault"):
            world.process.write(world.addr, b"cpu")
            seen = world.gpu.read(world.process, world.addr, 3)
            world.gpu.write(world.process, world.addr, b"gpu")

        assert (b"cpu", b"gpu") == (seen, world.process.read(world.addr, 3))

    def test_zero_page_is_read_only(self):
        """Where the zero page is mapped for the device, a store of the device faults."""
        world = mapped_range(pages=2, filled=False, memory="4KiB")
        world.gpu.write(world.process, world.at(1), b"x")
        world.hold(world.pfns().item(1))

        loaded = world.gpu.read(world.process, world.at(0), 1)

        assert (b"\0", (world.machine.mem.zero_pfn, False)) == (loaded, self.device_shows(world)[0])
        world.gpu.write(world.process, world.at(0), b"y")
        assert b"y" == world.process.read(world.at(0), 1)
