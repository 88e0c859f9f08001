"""Mlocked pages and their list, against a model that knows every page's count."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm import Machine
from mm.gfp import GFP_KERNEL
from mm.mmzone import Lru
from mm.page_alloc import alloc_pages_bulk
from mm.page_flags import PG_active, PG_mlocked, PG_swapbacked, PG_unevictable
from mm.swap import (
    isolate_lru_page,
    lru_add_drain_all,
    lru_cache_add,
    lru_pages,
    put_page,
    putback_lru_page,
)
from mm.typing import PAGE_SIZE, pages
from mm.unevictable import mlock_new_page, mlock_page, munlock_page
from tests.world import mapped_range


def boot():
    return Machine(("1MiB",), payload=False, debug=True, max_physmem="1MiB")


def frames(machine, count, flags=PG_swapbacked | PG_active):
    """Pages of nobody, on a list, with a reference."""
    pfns = alloc_pages_bulk(machine.mem, GFP_KERNEL, 0, count)
    machine.mem.flags[pfns] |= flags
    lru_cache_add(machine.mem, pfns)
    lru_add_drain_all(machine.mem)
    return pfns


def listed(machine, lru=Lru.UNEVICTABLE):
    return lru_pages(machine.mem, machine.mem.nodes[0].lruvec[lru]).tolist()


class TestMlock:
    def test_on_a_list(self):
        """The page goes to the unevictable list, and is counted there."""
        machine = boot()
        pfns = frames(machine, 3)

        with machine.vmstat.counting() as delta:
            mlock_page(machine.mem, pfns[:2])

        expected = {"nr_active_anon": -2, "nr_unevictable": 2, "nr_mlock": 2}
        assert expected | {"unevictable_pgs_mlocked": 2} == delta
        assert (pfns[:2].tolist(), [pfns[2]]) == (listed(machine), listed(machine, Lru.ACTIVE_ANON))
        assert [1, 1, 0] == machine.mem.mlock_count[pfns].tolist()

    def test_again(self):
        """Each mapping counts; the page is one."""
        machine = boot()
        (pfn,) = pfns = frames(machine, 1)

        mlock_page(machine.mem, pages(pfn, pfn))
        mlock_page(machine.mem, pfns)

        assert 3 == machine.mem.mlock_count[pfn]
        assert ([pfn], 1) == (listed(machine), machine.vmstat["nr_mlock"])

    def test_in_a_pagevec(self):
        """A page that waits for its list finds the right one when it gets there."""
        machine = boot()
        pfns = alloc_pages_bulk(machine.mem, GFP_KERNEL, 0, 2)
        machine.mem.flags[pfns] |= PG_swapbacked | PG_active
        lru_cache_add(machine.mem, pfns)

        mlock_new_page(machine.mem, pfns[:1])
        lru_add_drain_all(machine.mem)

        assert (pfns[:1].tolist(), pfns[1:].tolist()) == (
            listed(machine),
            listed(machine, Lru.ACTIVE_ANON),
        )
        assert not machine.mem.flags[pfns[0]] & PG_active
        assert 1 == machine.mem.mlock_count[pfns[0]]

    @pytest.mark.parametrize("locks", [1, 2])
    def test_isolated(self, locks):
        """Off the lists a page is marked, and not counted: it comes back with a count of 0."""
        machine = boot()
        pfns = frames(machine, 1)
        assert isolate_lru_page(machine.mem, pfns).all()

        for _ in range(locks):
            mlock_page(machine.mem, pfns)
        putback_lru_page(machine.mem, pfns)
        lru_add_drain_all(machine.mem)

        assert (pfns.tolist(), 0) == (listed(machine), machine.mem.mlock_count[pfns[0]])


class TestMunlock:
    def test_last(self):
        """The page is evictable again, and inactive."""
        machine = boot()
        pfns = frames(machine, 2)
        mlock_page(machine.mem, pfns)

        munlock_page(machine.mem, pfns[:1])

        assert (pfns[:1].tolist(), pfns[1:].tolist()) == (
            listed(machine, Lru.INACTIVE_ANON),
            listed(machine),
        )
        assert (1, 1) == (
            machine.vmstat["nr_mlock"],
            machine.vmstat["unevictable_pgs_munlocked"],
        )

    def test_not_the_last(self):
        """As long as the count says that somebody else has it locked, it stays."""
        machine = boot()
        pfns = frames(machine, 1)
        mlock_page(machine.mem, pfns)
        mlock_page(machine.mem, pfns)

        munlock_page(machine.mem, pfns)

        assert (pfns.tolist(), 1) == (listed(machine), machine.mem.mlock_count[pfns[0]])

    def test_count_is_lost_off_the_list(self):
        """After a migration the first who unlocks it frees it for all: recorded in 42_mlock_fault,
        line 26."""
        machine = boot()
        pfns = frames(machine, 1)
        mlock_page(machine.mem, pfns)
        mlock_page(machine.mem, pfns)
        isolate_lru_page(machine.mem, pfns)
        putback_lru_page(machine.mem, pfns)
        lru_add_drain_all(machine.mem)

        munlock_page(machine.mem, pfns)

        assert ([], 0) == (listed(machine), machine.vmstat["nr_mlock"])

    def test_never_mlocked(self):
        """Nothing happens."""
        machine = boot()
        pfns = frames(machine, 1)

        with machine.vmstat.counting() as delta:
            munlock_page(machine.mem, pfns)

        assert {} == delta
        assert pfns.tolist() == listed(machine, Lru.ACTIVE_ANON)


class TestMapping:
    """Who maps a page into VM_LOCKED memory locks it, and who unmaps it lets it go."""

    def test_first_touch(self):
        """A fresh page is mlocked from the start."""
        world = mapped_range(pages=3, filled=False)
        world.process.mlock(world.addr, 2 * PAGE_SIZE, onfault=True)

        world.fill()

        assert [True, True, False] == mlocked(world)
        assert 2 == world.machine.vmstat["nr_mlock"]

    def test_zap(self):
        """munmap() of locked memory leaves nothing locked behind."""
        world = mapped_range(pages=3)
        world.process.mlock(world.addr, world.nbytes)

        world.process.munmap(world.at(1), PAGE_SIZE)

        assert (2, 2) == (world.machine.vmstat["nr_mlock"], world.process.mm.locked_vm)

    def test_copy_on_write(self):
        """The copy is locked; the page that it was made of is not, for all that we know."""
        world = mapped_range(pages=1)
        child = world.fork(0)
        world.process.mlock(world.addr, PAGE_SIZE)

        world.process.write(world.addr, b"mine")

        mem, (hers,) = world.machine.mem, world.pfns()
        assert mem.flags[hers] & PG_mlocked
        assert 1 == world.machine.vmstat["nr_mlock"]
        assert b"\0" == child.read(world.addr, 1)

    def test_migration(self):
        """In device memory a page is not mlocked; back, it is again, if its memory is then."""
        world = mapped_range(pages=3)
        world.process.mlock(world.addr, world.nbytes)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        there = world.machine.vmstat["nr_mlock"], world.machine.mem.flags[world.pfns()] & PG_mlocked

        world.process.munlock(world.at(1), PAGE_SIZE)
        assert world.intact()

        assert (0, False) == (there[0], there[1].any())
        assert [True, False, True] == mlocked(world)
        lru_add_drain_all(world.machine.mem)
        assert 2 == world.machine.vmstat["nr_unevictable"]

    def test_migration_that_fails(self):
        """A page that is put back where it was is mlocked again."""
        world = mapped_range(pages=2)
        world.process.mlock(world.addr, world.nbytes)
        world.pin(0)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [False, True] == world.on_device()
        assert [True, False] == mlocked(world)

    def test_device_public_memory(self):
        """Only frames are locked: the driver's memory is on no list."""
        world = mapped_range(pages=1, filled=False)
        world.process.mlock(world.addr, PAGE_SIZE, onfault=True)

        world.gpu.write(world.process, world.addr, b"\1")
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)

        assert 0 == world.machine.vmstat["nr_mlock"]


def mlocked(world):
    return ((world.machine.mem.flags[world.pfns()] & PG_mlocked) != 0).tolist()


class AnySequence(RuleBasedStateMachine):
    """Whatever is locked, unlocked, isolated and put back; the model counts for each page."""

    def __init__(self):
        super().__init__()
        self.machine = boot()
        self.pfns = frames(self.machine, 8)
        self.locks = dict.fromkeys(self.pfns.tolist(), 0)  # that were taken
        self.count = dict.fromkeys(self.locks, 0)  # as far as the list knows
        self.off = set()

    some = st.sets(st.integers(0, 7), min_size=1)

    def which(self, places):
        return self.pfns[sorted(places)]

    @rule(places=some)
    def lock(self, places):
        mlock_page(self.machine.mem, self.which(places))
        for pfn in self.which(places).tolist():
            self.locks[pfn] += 1
            self.count[pfn] += pfn not in self.off

    @precondition(lambda self: any(self.locks.values()))
    @rule(places=some)
    def unlock(self, places):
        going = pages(*[pfn for pfn in self.which(places).tolist() if self.locks[pfn]])
        munlock_page(self.machine.mem, going)
        for pfn in going.tolist():
            left = self.count[pfn] - 1
            self.count[pfn] = max(left, 0) if pfn not in self.off else 0
            self.locks[pfn] = self.locks[pfn] - 1 if self.count[pfn] else 0

    @rule(places=some)
    def isolate(self, places):
        taken = {pfn for pfn in self.which(places).tolist() if pfn not in self.off}
        isolate_lru_page(self.machine.mem, pages(*taken))
        self.off |= taken
        self.count |= dict.fromkeys(taken, 0)

    @rule()
    def put_back(self):
        putback_lru_page(self.machine.mem, pages(*self.off))
        lru_add_drain_all(self.machine.mem)
        self.off.clear()

    @invariant()
    def as_in_the_model(self):
        flags = self.machine.mem.flags
        marked = {pfn for pfn in self.locks if flags[pfn] & PG_mlocked}
        assert {pfn for pfn, locks in self.locks.items() if locks} == marked
        assert marked - self.off == set(listed(self.machine))
        assert all(flags[pfn] & PG_unevictable for pfn in marked - self.off)
        counts = dict(
            zip(self.locks, self.machine.mem.mlock_count[self.pfns].tolist(), strict=True)
        )
        assert self.count == counts
        assert len(marked) == self.machine.vmstat["nr_mlock"]

    def teardown(self):
        self.put_back()
        for _ in range(max(self.locks.values())):
            munlock_page(self.machine.mem, self.pfns)
        put_page(self.machine.mem, self.pfns)
        self.machine.verify()
        assert not np.count_nonzero(self.machine.mem.mlock_count)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=20, stateful_step_count=20)
