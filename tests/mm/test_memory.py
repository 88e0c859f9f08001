"""Faults: first touch, copy on write, pages that are not there, memory that runs out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import NumpyDevice
from mm import BusError, Machine, OutOfMemory, SegmentationFault, trace
from mm.errors import KernelBug
from mm.filemap import lock_page, unlock_page
from mm.locking import preempt
from mm.memory import anon_entries, handle_mm_fault
from mm.memparse import memparse
from mm.memremap import devm_memremap_pages, devm_memunmap_pages
from mm.migration_ptes import remove_migration_ptes
from mm.mmu_notifier import MmuNotifyEvent
from mm.page_flags import PG_active, PG_anon_exclusive, PG_lru, PG_uptodate
from mm.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DEVMAP,
    _PAGE_DIRTY,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    PMD_SIZE,
    PUD_SIZE,
    pte_dirty,
    pte_offset,
    pte_special,
    pte_write,
)
from mm.rmap import page_add_anon_rmap, page_remove_rmap, try_to_unmap
from mm.swap import get_page, lru_add_drain_all, put_page
from mm.swapops import make_hwpoison_entry, swp_entry
from mm.types import MemoryType, VmFault
from mm.typing import PAGE_SIZE, pages
from mm.zap import zap_page_range
from tests.interleave import explore
from tests.mm.test_memremap import Borrowed
from tests.world import SOMEBODY_ELSE, mapped_range

MARKS = _PAGE_ACCESSED | _PAGE_DIRTY | _PAGE_SOFT_DIRTY  # of a store


def entries_at(world):
    return pte_offset(world.machine.mem.tables, world.process.mm.pgd, world.addrs)


def put_entries(world, entries):
    """Spoil the page table; the caller gives back what pages it then has too many."""
    world.machine.mem.tables.entries[entries_at(world)] = entries


def fault(world, *, write=True):
    with world.process.mm.mmap_sem.read():
        return handle_mm_fault(world.vma, world.addrs, write=write)


class TestFaultInVain:
    def test_store(self):
        """A write fault on an entry that allows it already leaves the marks of a store."""
        world = mapped_range(pages=2)
        world.clear_refs(0)
        before = world.ptes() & ~MARKS

        assert [0, 0] == fault(world).tolist()

        assert (before | MARKS).tolist() == world.ptes().tolist()

    def test_load(self):
        """A read fault only those of a load."""
        world = mapped_range(pages=2)
        world.clear_refs(0, 1)
        before = world.ptes()

        assert [0, 0] == fault(world, write=False).tolist()

        assert (before | _PAGE_ACCESSED).tolist() == world.ptes().tolist()


class TestOrderOfDevices:
    def test_by_address(self):
        """Devices are asked in the order of the addresses, as if each page faulted alone."""
        asked = []

        class Asked(NumpyDevice):
            def page_fault(self, vma, addrs, pfns, *, write):
                asked.extend(addrs.tolist())
                return super().page_fault(vma, addrs, pfns, write=write)

        world = mapped_range(pages=4, driver=Asked)
        other = Asked(world.machine, "4MiB")
        for page, gpu in enumerate((other, world.gpu, world.gpu, other)):
            gpu.to_device(world.process, world.at(page), PAGE_SIZE)

        fault(world)

        assert world.addrs.tolist() == asked


class TestFirstTouch:
    def test_read(self):
        """A load maps the zero page, read-only, and takes no memory."""
        world = mapped_range(pages=3, filled=False)

        with world.machine.vmstat.counting() as delta:
            contents = world.process.read(world.addr, world.nbytes)

        assert bytes(world.nbytes) == contents
        assert {"pgfault": 3, "zeropage_read_faults": 3, "nr_page_table_pages": 4} == delta
        assert [world.machine.mem.zero_pfn] * 3 == world.pfns().tolist()
        assert not pte_write(world.ptes()).any()

    def test_write(self):
        """A store gets a frame of zeros, whatever the frame held before."""
        world = mapped_range(pages=3, filled=False)
        world.machine.mem.payload[world.machine.mem.zero_pfn + 1 :] = 0xCC

        with world.machine.vmstat.counting("pgfault", "nr_anon_pages", "nr_free_pages") as delta:
            world.process.write(world.at(1) - 1, b"ab")

        assert {"pgfault": 2, "nr_anon_pages": 2, "nr_free_pages": -2} == delta
        expected = bytes(PAGE_SIZE - 1) + b"ab" + bytes(2 * PAGE_SIZE - 1)
        assert expected == world.process.read(world.addr, world.nbytes)

    def test_new_page_is_active_and_up_to_date(self):
        """It goes to the active list by way of the pagevec."""
        world = mapped_range(pages=3)
        lru_add_drain_all(world.machine.mem)

        wanted = PG_active | PG_lru | PG_uptodate
        assert (world.machine.mem.flags[world.pfns()] & wanted == wanted).all()
        assert 3 == world.machine.vmstat["nr_active_anon"]

    @settings(max_examples=20)
    @given(
        pages_written=st.sets(st.integers(0, 2047), max_size=12),
        border=st.sampled_from([9 * PMD_SIZE, PUD_SIZE, 512 * PUD_SIZE]),
    )
    def test_anywhere(self, pages_written, border):
        """Pages far apart and near borders of tables each get a frame of their own."""
        world = mapped_range(pages=2048, filled=False, addr=border - 1024 * PAGE_SIZE)
        for page in pages_written:
            world.process.write(world.at(page), bytes([page % 255 + 1]))

        firsts = list(world.process.read(world.at(1000), 50 * PAGE_SIZE)[::PAGE_SIZE])

        expected = [page % 255 + 1 if page in pages_written else 0 for page in range(1000, 1050)]
        assert expected == firsts
        assert len(pages_written) == world.process.mm.anon_rss

    def test_event(self):
        """Who listens hears of every fault."""
        world = mapped_range(pages=2, filled=False)
        heard = []

        with trace.listen(lambda event, fields: heard.append(fields), "page_fault_user"):
            world.process.write(world.at(1) - 1, b"ab")

        (fields,) = heard
        assert ("train", True) == (fields["process"], fields["write"])
        assert world.addrs.tolist() == fields["addrs"].tolist()


class TestCopyOnWrite:
    def test_zero_page(self):
        """A store after a load gets a frame in place of the zero page."""
        world = mapped_range(pages=3, filled=False)
        world.process.read(world.addr, world.nbytes)

        with world.machine.vmstat.counting("cow_faults", "nr_anon_pages", "nr_free_pages") as delta:
            world.process.write(world.at(1), b"x")

        assert {"cow_faults": 1, "nr_anon_pages": 1, "nr_free_pages": -1} == delta
        assert [True, False, True] == pte_special(world.ptes()).tolist()
        assert bytes(PAGE_SIZE) == world.process.read(world.at(2), PAGE_SIZE)

    def test_page_of_nobody_else_is_used_as_it_is(self):
        """A read-only entry that alone maps its page becomes writable."""
        world = mapped_range(pages=3)
        before = world.pfns().tolist()
        put_entries(world, world.ptes() & ~_PAGE_RW)

        with world.machine.vmstat.counting("pgfault", "cow_faults") as delta:
            world.fill()

        assert before == world.pfns().tolist()
        assert {"pgfault": 3, "cow_faults": 0} == delta

    def test_shared_page_is_copied(self):
        """A page that others map too stays theirs, with its contents."""
        world = mapped_range(pages=3)
        mem, shared = world.machine.mem, world.pfns()[1:2]
        get_page(mem, shared)
        page_add_anon_rmap(world.vma, shared)
        mem.flags[shared] &= ~PG_anon_exclusive
        put_entries(world, world.ptes() & ~_PAGE_RW)

        world.process.write(world.at(1), b"mine")

        assert b"mine\1" == world.process.read(world.at(1), 5)
        assert b"\1\1\1\1\1" == mem.payload[shared[0], :5].tobytes()
        assert shared[0] not in world.pfns()
        page_remove_rmap(world.vma, shared)
        put_page(mem, shared)

    def test_mixture(self):
        """One vector of faults may hold every kind; each is served its way."""
        world = mapped_range(pages=5, filled=False)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)
        world.process.write(world.at(2), b"2")
        world.process.write(world.at(3), b"3")
        world.gpu.to_device(world.process, world.at(3), PAGE_SIZE)

        with world.machine.vmstat.counting("cow_faults", "device_private_faults") as delta:
            world.process.write(world.at(1) - 4, bytes(4 * PAGE_SIZE + 4))

        assert {"cow_faults": 1, "device_private_faults": 1} == delta
        assert pte_write(world.ptes()).all()


class TestPagesThatAreNotThere:
    def test_lost_page(self):
        """A poisoned entry answers with SIGBUS, before anything after it is touched."""
        world = mapped_range(pages=3, filled=False)
        world.process.read(world.addr, 1)
        put_entries(world, [0, make_hwpoison_entry(pages(7))[0], 0])

        with pytest.raises(BusError) as error:
            world.process.write(world.at(1) - 2, b"abcd")

        assert world.at(1) == error.value.address
        assert b"ab" == world.process.read(world.at(1) - 2, 2)

    def test_some_lost_and_some_away(self):
        """In one vector each page is served its way: one comes back, the other is lost."""
        world = mapped_range(pages=2)
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)
        world.process.munmap(world.addr, PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, addr=world.addr)
        world.machine.mem.tables.entries[entries_at(world)[0]] = make_hwpoison_entry(pages(7))[0]

        faults = fault(world)

        assert [VmFault.HWPOISON, 0] == faults.tolist()
        assert [False, False] == world.on_device()

    def test_entry_of_no_kind(self):
        """There is no swap: an entry that says so is a bug, and the message shows it."""
        world = mapped_range(pages=1, filled=False)
        world.process.read(world.addr, 1)
        put_entries(world, swp_entry(3, pages(5)))

        with pytest.raises(KernelBug, match=f"bad page table entry 0x.* at {world.addr:#x}"):
            world.process.read(world.addr, 1)

        put_entries(world, 0)

    def test_entry_for_a_device_that_is_gone(self):
        """Nobody could bring the page."""
        world = mapped_range(pages=1)
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)
        mem, pfn = world.machine.mem, world.pfns().item()
        mem.zone[pfn] = 0

        with pytest.raises(KernelBug, match=f"entry for PFN {pfn:#x}, which no device has"):
            world.process.read(world.addr, 1)

        mem.zone[pfn] = world.gpu.zone.index

    def test_device_brings_them_back(self):
        """A load brings the page it needs, a store too; the rest stays."""
        world = mapped_range(pages=4)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        with world.machine.vmstat.counting("device_private_faults") as delta:
            first = world.process.read(world.at(1), 1)
            world.process.write(world.at(2), b"\7")

        assert b"\1" == first
        assert {"device_private_faults": 2} == delta
        assert [True, False, False, True] == world.on_device()

    def test_page_under_migration_is_waited_for(self):
        """An access that finds a migration entry goes on when the page is back."""
        world = mapped_range(pages=1)
        mem, pfns = world.machine.mem, world.pfns()

        def scenario(together):
            def migrate():
                lock_page(mem, pfns)
                get_page(mem, pfns)
                try_to_unmap(mem, pfns)
                preempt("copying")
                remove_migration_ptes(mem, pfns, pfns)
                unlock_page(mem, pfns)
                put_page(mem, pfns)

            _, first = together(migrate, lambda: world.process.read(world.addr, 1))
            assert b"\0" == first

        assert 20 < explore(scenario)

    @pytest.mark.parametrize(
        ("answer", "error", "message"),
        [
            (VmFault.SIGBUS, BusError, "the contents of the page at .* are lost"),
            (VmFault.OOM, OutOfMemory, "no frame for the page at"),
            (VmFault.SIGSEGV, SegmentationFault, "the fault handler refused"),
            (VmFault(0), KernelBug, "page fault at .* is served in vain"),
        ],
    )
    def test_device_that_fails(self, answer, error, message):
        """What the driver answers reaches the process as an error; it may not hang it."""

        class Failing(NumpyDevice):
            def page_fault(self, vma, addrs, pfns, *, write):
                return answer

        world = mapped_range(pages=3)
        gpu = Failing(world.machine, "64KiB")
        gpu.to_device(world.process, world.at(1), PAGE_SIZE)

        with pytest.raises(error, match=message):
            world.process.write(world.at(1) - 2, b"abcd")

        assert b"ab" == world.process.read(world.at(1) - 2, 2)


class TestOutOfMemory:
    def full(self):
        """A machine of 1 MiB and a process that wants 2 MiB."""
        world = mapped_range(pages=512, filled=False, nodes=("1MiB",))
        with pytest.raises(OutOfMemory, match=r"no frame for the page at 0x.*; unmap something"):
            world.process.write(world.addr, b"x" * world.nbytes)
        return world

    def test_what_fits_is_stored(self):
        """The pages before the one that got no frame hold what was written."""
        world = self.full()
        stored = world.process.mm.anon_rss

        assert 200 < stored < 256
        assert b"x" * stored * PAGE_SIZE == world.process.read(world.addr, stored * PAGE_SIZE)
        assert b"\0" == world.process.read(world.at(stored), 1)

    def test_part_given_back_can_be_used(self):
        """Memory that is unmapped serves others again."""
        world = self.full()
        world.process.munmap(world.addr, 10 * PAGE_SIZE)

        with world.machine.spawn("other") as other:
            addr = other.mmap("1MiB")
            other.write(addr, b"y" * 10 * PAGE_SIZE)
            with pytest.raises(OutOfMemory):
                other.write(addr, b"z" * (1 << 20))

        assert b"x" == world.process.read(world.at(10), 1)

    def test_faults_of_one_vector(self):
        """Each fault says for itself how it ended; while some get a frame, the others may retry."""
        world = mapped_range(pages=512, filled=False, nodes=("1MiB",))

        faults = fault(world)

        served = world.process.mm.anon_rss
        assert [0] * served + [VmFault.RETRY] * (512 - served) == faults.tolist()
        assert {VmFault.OOM} == set(fault(world)[served:].tolist())

    def test_copies_of_the_zero_page(self):
        """Pages that were read and cannot be written stay as they were."""
        world = mapped_range(pages=512, filled=False, nodes=("1MiB",))
        world.process.touch(world.addr, world.nbytes, write=False)

        with pytest.raises(OutOfMemory):
            world.process.touch(world.addr, world.nbytes)

        stored = world.process.mm.anon_rss
        zero = pte_special(world.ptes())
        assert [False] * stored + [True] * (512 - stored) == zero.tolist()
        assert bytes(world.nbytes) == world.process.read(world.addr, world.nbytes)

    @pytest.mark.parametrize("left", range(5))
    def test_no_page_table(self, left):
        """Without page tables a store fails, and the process can still give all back."""
        world = mapped_range(pages=1, filled=False)
        pool = world.machine.mem.tables
        taken = pool.alloc(pool.rows - 1 - pool.in_use - left)

        enough = left == 4
        if enough:
            world.process.write(world.addr, b"x")
        else:
            with pytest.raises(OutOfMemory, match=r"wanted [13] page-table pages, \d of"):
                world.process.write(world.addr, b"x")

        pool.release(taken)
        world.process.munmap(world.addr, PAGE_SIZE)
        assert 1 == pool.in_use


class TestAnonEntries:
    @pytest.mark.parametrize(("prot", "writable"), [("rw", True), ("r", False)])
    @pytest.mark.parametrize(
        ("kind", "bits"),
        [(MemoryType.SYSTEM, 0), (MemoryType.DEVICE_PUBLIC, int(_PAGE_DEVMAP))],
    )
    def test_memory_that_the_cpu_reaches(self, prot, writable, kind, bits):
        """Writable and dirty if the area may be written, and marked where it is a device's."""
        world = mapped_range(pages=1, prot=prot, filled=False)
        zone = devm_memremap_pages(world.machine.mem, Borrowed(kind=kind), 1)

        (entry,) = anon_entries(world.vma, pages(zone.start_pfn))

        assert (writable, writable) == (bool(pte_write(entry)), bool(pte_dirty(entry)))
        assert bits == int(entry) & int(_PAGE_DEVMAP)
        devm_memunmap_pages(world.machine.mem, zone)


class TestZap:
    def test_contents_are_gone(self):
        """What is zapped reads as zeros; the mapping stays."""
        world = mapped_range(pages=3)
        with world.process.mm.mmap_sem.write():
            zap_page_range(world.vma, world.at(1), world.at(2), MmuNotifyEvent.CLEAR)

        assert [0, 0, 2] == world.contents()
        assert 2 == world.process.mm.anon_rss

    def test_every_kind_of_entry(self):
        """Frames, whoever has them, the zero page and lost pages go, and their memory with them."""
        world = mapped_range(pages=5, filled=False)
        world.process.write(world.at(0), b"x")
        world.process.read(world.at(1), 1)
        world.process.write(world.at(2), b"x")
        world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)
        world.machine.mem.tables.entries[entries_at(world)[3]] = make_hwpoison_entry(pages(9))[0]
        world.make_exclusive(4)

        world.process.munmap(world.addr, world.nbytes)

        assert 0 == world.process.mm.anon_rss == world.machine.vmstat["nr_anon_pages"]
        assert world.gpu.chunks.free_pages == world.gpu.npages


class TestRaces:
    """Threads that fault at once; every schedule of a few preemptions."""

    def race(self, *functions, read_first=False):
        """What functions of (process, address of two pages) do together, in all schedules."""
        world = mapped_range(pages=1, filled=False)
        machine = world.machine

        def scenario(together):
            free = machine.nr_free_pages
            process = machine.spawn("racer")
            addr = process.mmap(2 * PAGE_SIZE)
            if read_first:
                process.read(addr, 1)
            together(*(lambda f=f: f(process, addr) for f in functions))
            contents = process.read(addr, 2), process.mm.anon_rss
            outcomes.add(contents)
            process.exit()
            assert free == machine.nr_free_pages

        outcomes = set()
        assert 20 < explore(scenario)
        return outcomes

    def test_two_writers_of_a_page(self):
        """Both stores are there, in one frame; the other frame goes back."""
        outcomes = self.race(
            lambda process, addr: process.write(addr, b"a"),
            lambda process, addr: process.write(addr + 1, b"b"),
        )

        assert {(b"ab", 1)} == outcomes

    def test_reader_and_writer(self):
        """A load that comes first sees zero, and the store is not lost either way."""

        def read(process, addr):
            assert process.read(addr, 1) in (b"\0", b"a")

        outcomes = self.race(lambda process, addr: process.write(addr, b"a"), read)

        assert {(b"a\0", 1)} == outcomes

    def test_two_readers(self):
        """They share the zero page."""
        reads = [lambda process, addr: process.read(addr, PAGE_SIZE)] * 2

        assert {(b"\0\0", 0)} == self.race(*reads)

    def test_two_copies_of_the_zero_page(self):
        """Two stores after a load make one frame."""
        outcomes = self.race(
            lambda process, addr: process.write(addr, b"a"),
            lambda process, addr: process.write(addr + 1, b"b"),
            read_first=True,
        )

        assert {(b"ab", 1)} == outcomes

    def test_overlapping_ranges(self):
        """Ranges that share a page leave a frame for each page."""
        outcomes = self.race(
            lambda process, addr: process.touch(addr, 2 * PAGE_SIZE),
            lambda process, addr: process.touch(addr + PAGE_SIZE, PAGE_SIZE),
        )

        assert {(b"\0\0", 2)} == outcomes


class TestNobodyWaitsForHimself:
    def test_own_migration(self):
        """A thread that touches what it is migrating itself is told so."""
        world = mapped_range(pages=1)
        mem, pfns = world.machine.mem, world.pfns()
        lock_page(mem, pfns)
        get_page(mem, pfns)
        try_to_unmap(mem, pfns)

        with pytest.raises(OSError, match="is locked by the thread that waits for it"):
            world.process.read(world.addr, 1)

        remove_migration_ptes(mem, pfns, pfns)
        unlock_page(mem, pfns)
        put_page(mem, pfns)


class TestWithoutContents:
    def test_faults_are_served(self):
        """A machine that keeps no contents has the same pages."""
        world = mapped_range(pages=5, payload=False)
        world.process.touch(world.addr, world.nbytes, write=False)
        world.process.touch(world.at(1), PAGE_SIZE)

        assert [True, False, True, True, True] == pte_special(world.ptes()).tolist()
        assert 1 == world.process.mm.anon_rss


class TestNodes:
    def test_memory_of_the_nearest_node(self):
        """A process gets pages of the node that its CPU belongs to."""
        machine = Machine(("2MiB", "2MiB"), debug=True, max_physmem="4MiB")

        assert [{0}, {1}] == [homes_of(machine, "128KiB", cpu) for cpu in (0, 1)]

    def test_other_node_when_the_nearest_is_full(self):
        """More than a node has comes from its neighbour."""
        machine = Machine(("1MiB", "4MiB"), debug=True, max_physmem="5MiB")

        assert {0, 1} == homes_of(machine, "2MiB", cpu=0)

    def test_owner_of_locks(self):
        """A page that somebody else has locked can still be read: the lock is for its owner."""
        world = mapped_range(pages=2)
        world.lock(page=1)

        assert [0, 1] == world.contents()
        assert SOMEBODY_ELSE == world.machine.mem.lock_owner[world.pfns()[1]]


def homes_of(machine, nbytes, cpu):
    """Nodes of the pages that a process on *cpu* gets for so much memory."""
    with machine.spawn(cpu=cpu) as process:
        process.touch(process.mmap(nbytes), nbytes)
        machine.verify()
        mapped = np.flatnonzero(machine.mem.mapcount)
        assert mapped.size == memparse(nbytes) // PAGE_SIZE
        return set(machine.mem.page_to_nid(mapped).tolist())
