"""Pages that a device has for itself: taken from the CPU, and taken back by it."""

import numpy as np
import pytest

from mm import SegmentationFault
from mm.device_exclusive import make_device_exclusive, restore_exclusive_pages
from mm.errors import Deadlock
from mm.filemap import page_locked, trylock_page, unlock_page
from mm.gup import make_device_exclusive_range
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_register
from mm.page_flags import PG_anon_exclusive, PG_dirty
from mm.pgtable import pte_dirty, pte_present, pte_soft_dirty, pte_write
from mm.swap import get_page, lru_add_drain_all, put_page
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_write_device_exclusive_entry,
    pte_swp_soft_dirty,
)
from mm.typing import PAGE_SIZE
from tests.interleave import explore
from tests.world import mapped_range

EXCLUSIVE = MmuNotifyEvent.EXCLUSIVE


class Listener:
    """Notes the invalidations that it hears."""

    def __init__(self, world):
        self.heard = []
        mmu_notifier_register(self, world.process.mm)

    def invalidate_range_start(self, invalid):
        self.heard.append((invalid.event, invalid.start, invalid.end, invalid.owner))

    def invalidate_range_end(self, invalid):
        pass

    def release(self, mm):
        pass


class Probe(Listener):
    """A listener that is broken."""

    def invalidate_range_start(self, invalid):
        raise ZeroDivisionError


def exclusive(world):
    """Which pages a device has for itself."""
    return is_device_exclusive_entry(world.ptes()).tolist()


def counts(world, pfns):
    """(references, mappings) of each of *pfns*."""
    mem = world.machine.mem
    lru_add_drain_all(mem)
    return list(zip(mem.refcount[pfns].tolist(), mem.mapcount[pfns].tolist(), strict=True))


def faults_of(world, call):
    """How many minor faults *call* takes."""
    before = world.process.min_flt
    call()
    return world.process.min_flt - before


class TestTaken:
    def test_entries_and_counts(self):
        """The entry keeps its reference and maps nothing [hand/20, i=4]."""
        world = mapped_range(pages=4)
        before = world.pfns().tolist()

        assert 0 == faults_of(world, lambda: world.make_exclusive(0, 1, 2, 3))

        assert is_write_device_exclusive_entry(world.ptes()).all()
        assert before == world.pfns().tolist()
        assert [(1, 0)] * 4 == counts(world, world.pfns())
        assert (world.machine.mem.flags[world.pfns()] & PG_anon_exclusive).all()
        world.machine.verify()

    def test_locked_until_the_device_maps_them(self):
        """The caller gets each page locked and with a reference."""
        world = mapped_range(pages=2)
        mem, mm = world.machine.mem, world.process.mm

        with mm.mmap_sem.read():
            pfns = make_device_exclusive_range(mm, world.addrs, "the owner")

        assert world.pfns().tolist() == pfns.tolist()
        assert page_locked(mem, pfns).all()
        assert [(2, 0)] * 2 == counts(world, pfns)
        unlock_page(mem, pfns)
        put_page(mem, pfns)

    def test_listeners(self):
        """Whoever watches hears of it, and for whom it is."""
        world = mapped_range(pages=3)
        listener = Listener(world)

        with world.process.mm.mmap_sem.read():
            pfns = make_device_exclusive_range(world.process.mm, world.addrs[:2], "the owner")
        unlock_page(world.machine.mem, pfns)
        put_page(world.machine.mem, pfns)

        assert [(EXCLUSIVE, world.at(0), world.at(2), "the owner")] == listener.heard

    def test_what_the_entry_knew(self):
        """The soft-dirty bit stays in the entry, the dirty bit goes to the page."""
        world = mapped_range(pages=2)
        world.clear_refs(1)

        world.make_exclusive(0, 1)

        assert [True, False] == pte_swp_soft_dirty(world.ptes()).tolist()
        assert world.machine.mem.flags[world.pfns()[0]] & PG_dirty

    def test_faulted_in_first(self):
        """Holes, the zero page and read-only pages become pages that may be stored to."""
        world = mapped_range(pages=3)
        world.process.munmap(world.addr, world.nbytes)
        world.process.mmap(world.nbytes, addr=world.addr)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)
        world.process.write(world.at(2), b"\2")
        world.write_protect(2)

        assert 3 == faults_of(world, lambda: world.make_exclusive(0, 1, 2))

        assert is_write_device_exclusive_entry(world.ptes()).all()
        assert [0, 0, 2] == world.contents()

    def test_device_memory_comes_back(self):
        """Atomics are for system memory; one fault for each page."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert 2 == faults_of(world, lambda: world.make_exclusive(0, 1))

        assert [True, True, False] == exclusive(world)
        assert is_device_private_entry(world.ptes())[2]
        assert world.intact()

    def test_shared_page(self):
        """The process gets a copy for its device; the other keeps its page."""
        world = mapped_range(pages=1)
        child = world.fork(0)

        assert 1 == faults_of(world, lambda: world.make_exclusive(0))

        assert [True] == exclusive(world)
        assert b"\0" == child.read(world.addr, 1)
        assert 0 == child.min_flt

    def test_once_more(self):
        """Who takes pages again takes them back first, by a fault each."""
        world = mapped_range(pages=2)
        world.make_exclusive(0, 1)

        assert 2 == faults_of(world, lambda: world.make_exclusive(0, 1))
        assert [True, True] == exclusive(world)

    def test_nothing(self):
        """No address, no page."""
        assert 0 == mapped_range(pages=1).make_exclusive().size


class TestNotTaken:
    def test_page_that_somebody_has_locked(self):
        """It stays where the CPU can reach it; its neighbours are taken."""
        world = mapped_range(pages=3)
        world.lock(1)

        assert [False, True, False] == (world.make_exclusive(0, 1, 2) < 0).tolist()

        assert [True, False, True] == exclusive(world)
        assert pte_write(world.ptes())[1]

    def test_after_the_end_of_an_area(self):
        """What came before it is taken nevertheless [coherent-excl/k5015, i=40]."""
        world = mapped_range(pages=4)
        world.process.munmap(world.at(2), PAGE_SIZE)

        assert [False, False, True, True] == (world.make_exclusive(0, 1, 2, 3) < 0).tolist()
        assert [True, True, False, False] == exclusive(world)

    @pytest.mark.parametrize("prot", ["r", "-"])
    def test_area_without_the_right(self, prot):
        """A device may not store where the process may not."""
        world = mapped_range(pages=2)
        world.protect(prot)

        assert (world.make_exclusive(0, 1) < 0).all()
        assert [False, False] == exclusive(world)

    def test_page_that_became_shared(self):
        """Between looking and taking a page may lose its writable entry."""
        world = mapped_range(pages=1)
        mem, pfns = world.machine.mem, world.pfns()
        child = world.fork(0)
        get_page(mem, pfns)
        assert trylock_page(mem, pfns).all()

        taken = make_device_exclusive(world.process.mm, world.addrs, pfns, None)

        unlock_page(mem, pfns)
        put_page(mem, pfns)
        assert [False] == taken.tolist()
        assert [True] == exclusive(world)
        world.machine.verify()
        assert b"\0" == child.read(world.addr, 1) == world.process.read(world.addr, 1)

    def test_listener_that_fails(self):
        """Nothing stays locked or held."""
        world = mapped_range(pages=1)
        Probe(world)

        with pytest.raises(ZeroDivisionError):
            world.make_exclusive(0)

        assert not page_locked(world.machine.mem, world.pfns()).any()
        world.process.mm.notifiers.clear()


class TestTakenBack:
    def test_read(self):
        """One fault for the page that is touched, writable as it was [hand/20, i=7 and 8]."""
        world = mapped_range(pages=3)
        world.make_exclusive(0, 1, 2)

        assert 1 == faults_of(world, lambda: world.process.read(world.at(1), 1))

        assert [True, False, True] == exclusive(world)
        entry = world.ptes()[1:2]
        assert (pte_write(entry) & pte_dirty(entry) & pte_soft_dirty(entry)).all()
        assert [(1, 1)] == counts(world, world.pfns()[1:2])
        assert world.intact()

    def test_listeners(self):
        """The device hears that it has lost the page."""
        world = mapped_range(pages=3)
        world.make_exclusive(0, 1, 2)
        listener = Listener(world)

        world.process.read(world.at(1), PAGE_SIZE + 1)

        assert [(EXCLUSIVE, world.at(1), world.at(3), None)] == listener.heard

    def test_read_only_entry(self):
        """A store needs a second fault, which finds the page unshared."""
        world = mapped_range(pages=1)
        world.make_exclusive(0)
        world.write_protect(0)
        before = world.pfns().tolist()

        assert 2 == faults_of(world, lambda: world.process.write(world.addr, b"x"))
        assert before == world.pfns().tolist()

    def test_area_that_lost_the_right(self):
        """The page comes back read-only, and changed, as the device may have stored to it."""
        world = mapped_range(pages=1)
        world.make_exclusive(0)
        world.protect("r")

        assert b"\0" == world.process.read(world.addr, 1)

        assert not pte_write(world.ptes()).any()
        with pytest.raises(SegmentationFault):
            world.process.write(world.addr, b"x")

    def test_device_at_work(self):
        """A thread that touches what it takes itself is told so."""
        world = mapped_range(pages=1)
        mem, mm = world.machine.mem, world.process.mm
        with mm.mmap_sem.read():
            pfns = make_device_exclusive_range(mm, world.addrs, None)

        with pytest.raises(Deadlock):
            world.process.read(world.addr, 1)

        unlock_page(mem, pfns)
        put_page(mem, pfns)
        assert world.intact()

    def test_listener_that_fails(self):
        """Nothing stays locked or held, and the next access succeeds."""
        world = mapped_range(pages=1)
        world.make_exclusive(0)
        Probe(world)

        with pytest.raises(ZeroDivisionError):
            world.process.read(world.addr, 1)

        world.process.mm.notifiers.clear()
        assert world.intact()


class TestMeanwhile:
    def test_munmap(self):
        """The pages go as others do."""
        world = mapped_range(pages=3)
        free = world.machine.nr_free_pages
        world.make_exclusive(0, 1, 2)

        world.process.munmap(world.at(1), PAGE_SIZE)

        assert free + 1 == world.machine.nr_free_pages
        assert 2 == world.process.mm.anon_rss
        world.machine.verify()

    def test_exit(self):
        """Also with the process."""
        world = mapped_range(pages=3)
        world.make_exclusive(0, 2)

        world.process.exit()

        assert world.free_at_boot == world.machine.nr_free_pages

    def test_migration(self):
        """migrate_vma() passes over them [hand/20, i=11]."""
        world = mapped_range(pages=4)
        world.make_exclusive(0, 2, 3)

        moved = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert 1 == moved.migrated
        assert {"skipped": 3} == moved.stayed
        assert [True, False, True, True] == exclusive(world)

    def test_pin(self):
        """A pin takes them back; one that was there before stays."""
        world = mapped_range(pages=2)
        world.pin(0)
        world.make_exclusive(0, 1)
        world.machine.verify()

        world.pin(1)

        assert [True, False] == exclusive(world)


class TestRaces:
    """Every schedule of a few preemptions."""

    def race(self, *functions):
        """What functions of (process, address of a page that a device has) do together."""
        world = mapped_range(pages=1)

        def scenario(together):
            world.process.write(world.addr, b"a")
            world.make_exclusive(0)
            results.append(together(*(lambda f=f: f(world) for f in functions)))
            world.machine.verify()

        results = []
        assert 20 < explore(scenario)
        return world, results

    def test_two_cpus(self):
        """Both find the page, and it comes back once."""
        world, results = self.race(
            lambda world: world.process.read(world.addr, 1),
            lambda world: world.process.read(world.addr, 1),
        )

        assert [[b"a", b"a"]] == list(map(list, {tuple(found) for found in results}))
        assert [(1, 1)] == counts(world, world.pfns())

    def test_cpu_and_device(self):
        """The CPU's store is there, whoever has the page in the end."""
        self.race(
            lambda world: world.process.write(world.addr, b"b"),
            lambda world: world.make_exclusive(0),
        )

    def test_cpu_and_munmap(self):
        """The CPU finds its byte, or no mapping."""
        outcomes = set()

        def read(world):
            try:
                outcomes.add(world.process.read(world.addr, 1))
            except SegmentationFault:
                outcomes.add(None)

        def unmap(world):
            world.process.munmap(world.addr, PAGE_SIZE)
            world.process.mmap(PAGE_SIZE, addr=world.addr)

        self.race(read, unmap)

        assert outcomes <= {b"a", b"\0", None}
        assert b"a" in outcomes

    def test_pages_left_alone(self):
        """Many pages at once, in two stretches, with a neighbour that the CPU keeps."""
        world = mapped_range(pages=1_100)
        taken = [page for page in range(1_100) if page != 512]
        world.make_exclusive(*taken)

        assert 1_099 == faults_of(world, lambda: world.process.read(world.addr, world.nbytes))
        assert pte_present(world.ptes()).all()
        assert np.unique(world.pfns()).size == 1_100
        assert world.intact()


class TestTakenBackForOthers:
    """restore_exclusive_pages(): somebody must have the pages, and no CPU touches them."""

    def test_entries_and_counts(self):
        """All is as before; a page that no device has is not touched."""
        world = mapped_range(pages=4)
        pfns = world.pfns()
        before = counts(world, pfns)
        world.make_exclusive(0, 1, 3)

        assert 0 == faults_of(world, lambda: restore_exclusive_pages(world.machine.mem, pfns))

        assert (pfns.tolist(), before) == (world.pfns().tolist(), counts(world, pfns))
        assert (pte_present(world.ptes()) & pte_write(world.ptes())).all()
        assert world.intact()

    def test_who_hears(self):
        """Each stretch is told once."""
        world = mapped_range(pages=4)
        world.make_exclusive(0, 1, 3)
        listener = Listener(world)
        restore_exclusive_pages(world.machine.mem, world.pfns())

        stretches = [(world.at(0), world.at(2)), (world.at(3), world.at(4))]
        assert [(EXCLUSIVE, *stretch, None) for stretch in stretches] == listener.heard

    def test_locked_page(self):
        """What somebody has locked stays as it is."""
        world = mapped_range(pages=2)
        world.make_exclusive(0, 1)
        world.lock(1)
        restore_exclusive_pages(world.machine.mem, world.pfns())

        assert [False, True] == exclusive(world)
        world.unlock(1)

    def test_other_addresses(self):
        """The rmap finds entries that have moved, of each process."""
        world = mapped_range(pages=2)
        other = world.seen_by(world.process.fork())
        other.fill()
        world.fill()
        for one in (world, other):
            one.make_exclusive(0, 1)
        target = world.addr + (1 << 24)
        world.addr = world.process.mremap(world.addr, 8192, 8192, "maymove|fixed", target)
        pfns = np.concatenate((world.pfns(), other.pfns()))
        restore_exclusive_pages(world.machine.mem, pfns)

        assert [False] * 4 == exclusive(world) + exclusive(other)
        assert world.intact()
        assert other.intact()

    def test_free_pages(self):
        """A page of nobody is passed over."""
        world = mapped_range(pages=1)
        zone = world.gpu.zone
        restore_exclusive_pages(world.machine.mem, np.arange(zone.start_pfn, zone.start_pfn + 3))
        restore_exclusive_pages(world.machine.mem, np.array([world.machine.mem.max_pfn - 1]))

        world.machine.verify()
