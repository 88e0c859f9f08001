"""Reclaim: which pages go, how they go, and which stay."""

import numpy as np
import pytest

from mm import PAGE_SIZE
from mm.errors import OutOfMemory
from mm.mmzone import Lru
from mm.page_alloc import MAX_RECLAIM_RETRIES, system_zones
from mm.page_flags import (
    PG_active,
    PG_anon_exclusive,
    PG_swapbacked,
    PG_swapcache,
)
from mm.pgtable import _PAGE_ACCESSED, _PAGE_DIRTY, pte_present
from mm.swap import lru_add_drain_all, lru_pages, mark_page_lazyfree
from mm.types import VM_LOCKED
from mm.vmscan import (
    ScanControl,
    balance_pgdat,
    inactive_list_is_low,
    pgdat_balanced,
    reclaim_pages,
    shrink_active_list,
    shrink_inactive_list,
    shrink_page_list,
    try_to_free_mem_cgroup_pages,
    try_to_free_pages,
)
from tests.world import mapped_range

SWAP = "256KiB"


def letters(world):
    """S for each page in swap, P for each present one."""
    ptes = world.ptes()
    return "".join(np.where(world.slots() > 0, "S", np.where(pte_present(ptes), "P", ".")))


def only(world, pages):
    """*world* with fewer pages, to look at the rest of it alone."""
    part = world.seen_by(world.process)
    part.pages = pages
    return part


def lazyfree(world, *pages):
    """What MADV_FREE does: the entries are clean and old, the pages may go."""
    lru_add_drain_all(world.machine.mem)
    world.rewrite(pages, lambda ptes: ptes & ~(_PAGE_DIRTY | _PAGE_ACCESSED))
    mark_page_lazyfree(world.machine.mem, world.pfns()[list(pages)])


class TestPageOut:
    def test_pages_go_to_swap(self):
        """Three of eight pages are written and freed; their entries name slots in a row."""
        world = mapped_range(pages=8, swap=SWAP)
        free = world.machine.nr_free_pages

        with world.machine.vmstat.counting("pswpout", "pgsteal_direct") as delta:
            assert 3 == world.pageout(2, 3, 4)

        # madvise A 2 3 pageout: pswpout 3, state PPSSSPPP
        assert {"pswpout": 3, "pgsteal_direct": 0} == delta
        assert "PPSSSPPP" == letters(world)
        assert [1, 2, 3] == world.slots()[2:5].tolist()
        assert (5, 3) == (world.process.mm.anon_rss, world.process.mm.swapents)
        assert free + 3 == world.machine.nr_free_pages
        assert world.intact()

    def test_device_does_not_collect_them(self):
        """A page in swap is no page that could migrate."""
        world = mapped_range(pages=8, swap=SWAP)
        world.pageout(2, 3, 4)

        result = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (5, 5) == (result.collected, result.migrated)
        assert "..SSS..." == letters(world)
        assert world.intact()

    def test_page_that_several_map(self):
        """Every mapping becomes an entry for the same slot."""
        world = mapped_range(pages=2, swap=SWAP)
        child = world.seen_by(world.fork(0, 1))

        assert 2 == child.pageout()

        assert "SS" == letters(world) == letters(child)
        assert world.slots().tolist() == child.slots().tolist()
        assert [2, 2] == world.machine.mem.swap.swap_map[world.slots()].tolist()
        assert child.intact()

    def test_pages_named_twice(self):
        """They go once."""
        world = mapped_range(pages=2, swap=SWAP)

        assert 2 == world.pageout(0, 1, 0, 1)

    def test_nothing(self):
        """An empty vector, and pages that are away already."""
        world = mapped_range(pages=2, swap=SWAP)
        world.pageout()

        assert 0 == world.pageout()
        assert 0 == reclaim_pages(world.machine.mem, world.pfns()[:0])

    def test_contents_that_nobody_keeps(self):
        """Without payload only the states move."""
        world = mapped_range(pages=4, swap=SWAP, payload=False, filled=False)
        world.process.touch(world.addr, world.nbytes)

        assert 4 == world.pageout()
        world.process.touch(world.addr, world.nbytes, write=False)

        assert 4 == world.process.maj_flt

    def test_soft_dirty_bit(self):
        """It goes into the entry, and so does its absence."""
        world = mapped_range(pages=2, swap=SWAP)
        world.clear_refs(1)

        world.pageout()

        assert [True, False] == (world.ptes() & 2 != 0).tolist()


class TestPagesThatStay:
    def stays(self, world, page=1):
        """Page out the range; all but one page go."""
        assert world.pages - 1 == world.pageout()
        kinds = ["S"] * world.pages
        kinds[page] = "P"
        assert "".join(kinds) == letters(world)
        assert world.intact()

    def test_locked(self):
        """Somebody else works on it."""
        world = mapped_range(pages=3, swap=SWAP)
        world.lock(1)
        self.stays(world)

    def test_isolated(self):
        """Somebody else has taken it off its list."""
        world = mapped_range(pages=3, swap=SWAP)
        world.isolate(1)
        self.stays(world)

    def test_pinned(self):
        """A device may store to it at any time."""
        world = mapped_range(pages=3, swap=SWAP)
        world.pin(1)
        self.stays(world)

    def test_mlocked(self):
        """A process has locked it in memory."""
        world = mapped_range(pages=3, swap=SWAP)
        world.process.mlock(world.at(1), PAGE_SIZE)
        self.stays(world)

    def test_in_a_locked_vma(self):
        """The mapping says so, though the page does not yet; it keeps its place in memory."""
        world = mapped_range(pages=3, swap=SWAP)
        world.vma.vm_flags |= VM_LOCKED

        assert 0 == world.pageout()

        assert "PPP" == letters(world)
        world.vma.vm_flags &= ~VM_LOCKED

    def test_where_slots_run_out(self):
        """Seven slots take seven pages; the rest stay, active, and can go later."""
        world = mapped_range(pages=10, swap="32KiB")

        assert 7 == world.pageout()
        assert "SSSSSSSPPP" == letters(world)
        assert world.machine.mem.flags[world.pfns()[8]] & PG_active

        world.process.munmap(world.at(0), 2 * PAGE_SIZE)
        assert 2 == world.pageout()

    def test_on_a_machine_without_swap(self):
        """Nothing happens to anonymous pages."""
        world = mapped_range(pages=3)

        assert 0 == world.pageout()

        assert "PPP" == letters(world)

    def test_whose_slot_cannot_be_written(self):
        """It is unmapped, but stays in memory, where the next access finds it."""
        world = mapped_range(pages=3, swap=SWAP)
        world.machine.mem.swap.write_errors.add(2)

        assert 2 == world.pageout()
        assert "SSS" == letters(world)
        with world.machine.vmstat.counting("pswpin", "pgmajfault") as delta:
            assert 1 == world.contents()[1]
        assert {"pswpin": 1, "pgmajfault": 2} == delta  # page 0 is zeros, page 1 is still there

        world.machine.mem.swap.write_errors.clear()
        assert 3 == world.pageout()
        assert world.intact()

    def test_to_which_somebody_has_a_reference(self):
        """It is unmapped and not written: the frame may change; it is found again as it is."""
        world = mapped_range(pages=3, swap=SWAP)
        world.hold(world.pfns().item(1))
        before = world.pfns().item(1)

        # a page given to vmsplice(): state S, no pswpout; then minflt 1, 2/1 AEB, swap cache
        with world.machine.vmstat.counting("pswpout") as delta:
            assert 2 == world.pageout()
        assert {"pswpout": 1} == delta  # page 2; page 0 is zeros
        assert "SSS" == letters(world)
        world.machine.mem.payload[before] = 77

        with world.machine.vmstat.counting("pgmajfault") as delta:
            assert b"M" == world.process.read(world.at(1), 1)
        assert {"pgmajfault": 0} == delta
        flags = world.machine.mem.flags.item(world.pfns().item(1))
        assert before == world.pfns()[1]
        assert int(PG_swapcache | PG_anon_exclusive) == flags & int(
            PG_swapcache | PG_anon_exclusive
        )

    def test_that_is_zapped_meanwhile(self):
        """A page whose last entry goes while reclaim has it is not forgotten."""
        world = mapped_range(pages=1, swap=SWAP)
        world.isolate(0)
        pfns = world.pfns()
        world.isolated.clear()
        world.process.munmap(world.addr, world.nbytes)

        with world.machine.vmstat.counting("pswpout") as delta:
            assert 1 == shrink_page_list(world.machine.mem, pfns)

        assert {"pswpout": 0} == delta


class TestLazyFree:
    def test_clean_pages_are_dropped(self):
        """What was stored to since, and what was never given up, stays or is written."""
        world = mapped_range(pages=6, swap=SWAP)
        lazyfree(world, 0, 1, 2, 3)
        world.process.write(world.addr, b"\1")

        with world.machine.vmstat.counting("pswpout", "pglazyfreed") as delta:
            assert 5 == world.pageout()

        # madvise A 0 4 free; write A 0 1; madvise A 0 6 pageout: pswpout 2, state P...SS
        assert {"pswpout": 2, "pglazyfreed": 3} == delta
        assert "P...SS" == letters(world)
        assert world.machine.mem.flags[world.pfns()[0]] & PG_swapbacked
        assert [1, 0, 0, 0, 4, 5] == world.contents()

    def test_counted_when_the_pagevec_is_full(self):
        """Fourteen wait for the fifteenth."""
        world = mapped_range(pages=20, swap=SWAP)

        lru_add_drain_all(world.machine.mem)

        with world.machine.vmstat.counting() as delta:
            lazyfree(world, *range(14))
        assert {} == delta
        with world.machine.vmstat.counting("pglazyfree") as delta:
            lazyfree(world, *range(14, 20))
            lru_add_drain_all(world.machine.mem)

        assert {"pglazyfree": 20} == delta
        assert 20 == world.machine.vmstat["nr_inactive_file"]

    def test_given_up_twice(self):
        """Before the first time is done with."""
        world = mapped_range(pages=2, swap=SWAP)
        lazyfree(world, 0, 1)
        mark_page_lazyfree(world.machine.mem, world.pfns()[[1, 0, 1]])

        with world.machine.vmstat.counting("pglazyfree") as delta:
            lru_add_drain_all(world.machine.mem)

        assert {"pglazyfree": 2} == delta
        world.machine.verify()

    def test_migrates_to_the_device_and_back(self):
        """It is as good as any page until reclaim takes it."""
        world = mapped_range(pages=4, swap=SWAP)
        lazyfree(world, 0, 1)

        assert 4 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated

        assert world.intact()
        assert [False, False, True, True] == (
            world.machine.mem.flags[world.pfns()] & PG_swapbacked != 0
        ).tolist()

    def test_page_that_a_device_may_store_to(self):
        """Its stores pass by the CPU's page table; what it can store to counts as changed."""
        world = mapped_range(pages=2, swap=SWAP)
        lazyfree(world, 0, 1)
        lru_add_drain_all(world.machine.mem)
        world.isolate(0)  # so that it cannot migrate
        world.gpu.write(world.process, world.addr, b"device")
        world.let_go()

        world.pageout(0)

        assert b"device" == world.process.read(world.addr, 6)

    def test_used_pages_have_a_second_chance(self):
        """Those that were loaded from since stay once; if it happens again, they become active."""
        world = mapped_range(pages=40, swap=SWAP)
        lazyfree(world, *range(40))
        mem = world.machine.mem

        for expected in (0, 5):
            world.process.read(world.addr, 5 * PAGE_SIZE)
            lru_add_drain_all(mem)
            shrink_inactive_list(
                mem, mem.nodes[0], Lru.INACTIVE_FILE, 40, ScanControl(40, "direct")
            )
            assert "P" * 5 + "." * 35 == letters(world)
            assert expected == mem.vmstat["nr_active_file"]

    def test_held_page_stays(self):
        """Whoever holds it may still look at it."""
        world = mapped_range(pages=2, swap=SWAP)
        lazyfree(world, 0, 1)
        lru_add_drain_all(world.machine.mem)
        world.hold(world.pfns().item(1))

        assert 1 == world.pageout()

        assert ".P" == letters(world)


class TestLists:
    def lists(self, world):
        """Pages of the range on the inactive and the active list, oldest first."""
        mem = world.machine.mem
        lru_add_drain_all(mem)
        page_of = {pfn: page for page, pfn in enumerate(world.pfns().tolist())}
        node = mem.nodes[0]
        return [
            [page_of[pfn] for pfn in lru_pages(mem, node.lruvec[lru]).tolist()]
            for lru in (Lru.INACTIVE_ANON, Lru.ACTIVE_ANON)
        ]

    def test_oldest_pages_become_inactive(self):
        """As if they had never been used."""
        world = mapped_range(pages=5, swap=SWAP)
        lru_add_drain_all(world.machine.mem)

        with world.machine.vmstat.counting("pgdeactivate") as delta:
            shrink_active_list(world.machine.mem, world.machine.mem.nodes[0], Lru.ACTIVE_ANON, 3)

        assert [[0, 1, 2], [3, 4]] == self.lists(world)
        assert {"pgdeactivate": 3} == delta
        assert [False] * 3 == (world.ptes()[:3] & _PAGE_ACCESSED != 0).tolist()

    def test_second_chance(self):
        """A page that was used after it became inactive is active again; the others go."""
        world = mapped_range(pages=6, swap=SWAP)
        mem, node = world.machine.mem, world.machine.mem.nodes[0]
        lru_add_drain_all(mem)
        shrink_active_list(mem, node, Lru.ACTIVE_ANON, 6)
        world.process.read(world.at(2), 1)

        with mem.vmstat.counting("pgactivate", "pgscan_direct", "pgsteal_direct") as delta:
            assert 5 == try_to_free_pages(mem, [0], 6)

        assert "SSPSSS" == letters(world)
        assert {"pgactivate": 1, "pgscan_direct": 6, "pgsteal_direct": 5} == delta

    def test_pages_used_all_the_time_go_in_the_end(self):
        """Where nothing else is left, they are the oldest."""
        world = mapped_range(pages=40, swap=SWAP)

        assert 32 <= try_to_free_pages(world.machine.mem, [0], 1)

        assert world.intact()

    def test_pages_given_up_go_first(self):
        """They cost no I/O."""
        world = mapped_range(pages=60, swap=SWAP)
        lazyfree(world, *range(20, 60))

        with world.machine.vmstat.counting("pswpout") as delta:
            try_to_free_pages(world.machine.mem, [0], 32)

        assert {"pswpout": 0} == delta
        assert "P" * 20 == letters(world)[:20]

    def test_one_node_of_two(self):
        """Only the nodes that the request may have memory from are looked at."""
        world = mapped_range(pages=2, swap=SWAP, nodes=("8MiB", "8MiB"))

        assert 0 == try_to_free_pages(world.machine.mem, [1], 1)
        assert 2 == try_to_free_pages(world.machine.mem, [0, 1], 1)

    def test_device_pages_are_on_no_list(self):
        """Reclaim never sees them."""
        world = mapped_range(pages=4, swap=SWAP)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert 0 == try_to_free_pages(world.machine.mem, [0], 4)

        assert [True] * 4 == world.on_device()

    @pytest.mark.parametrize(
        ("inactive", "active", "low"),
        [
            (0, 1, True),
            (5, 5, False),
            (5, 6, True),
            (1 << 18, 1 << 19, False),
            (1 << 17, 1 << 20, True),
        ],
    )
    def test_balance_of_the_lists(self, inactive, active, low):
        """Half and half below 1 GiB; the more memory, the smaller the inactive share."""
        world = mapped_range(pages=1, filled=False, swap=SWAP)
        mem, node = world.machine.mem, world.machine.mem.nodes[0]
        counts = node.lruvec[Lru.INACTIVE_ANON], node.lruvec[Lru.ACTIVE_ANON]
        counts[0].nr_pages, counts[1].nr_pages = inactive, active

        assert low == inactive_list_is_low(mem, node, Lru.INACTIVE_ANON)

        counts[0].nr_pages = counts[1].nr_pages = 0


class TestKswapd:
    @pytest.fixture
    def full(self):
        """A machine whose memory is used up to 40 pages above where kswapd begins."""
        world = mapped_range(pages=4000, filled=False, swap="32MiB", payload=False)
        (zone,) = system_zones(world.machine.mem)
        spare = world.machine.nr_free_pages - zone.watermark[1]
        world.process.touch(world.addr, (spare - 40) * PAGE_SIZE)
        return world, zone

    def test_runs_when_memory_is_low(self, full):
        """The allocation that finds the low watermark has memory freed up to the high one."""
        world, zone = full
        with world.machine.vmstat.counting("pgsteal_kswapd", "pgsteal_direct") as delta:
            world.process.touch(world.at(3990), 10 * PAGE_SIZE)
        assert {"pgsteal_kswapd": 0, "pgsteal_direct": 0} == delta

        with world.machine.vmstat.counting("pgsteal_kswapd", "pgsteal_direct") as delta:
            world.process.touch(world.at(3900), 60 * PAGE_SIZE)

        assert delta["pgsteal_kswapd"] > 0 == delta["pgsteal_direct"]
        assert zone.nr_free > zone.watermark[0]

    def test_balanced_node_is_left_alone(self, full):
        """There is nothing to do above the high watermark."""
        world, zone = full
        node = world.machine.mem.nodes[0]
        balance_pgdat(world.machine.mem, node)
        assert pgdat_balanced(node)

        assert 0 == balance_pgdat(world.machine.mem, node)
        assert zone.nr_free >= zone.watermark[2]

    def test_gives_up_after_many_failures(self):
        """Without swap it has nothing to take; until something changes it does not even look."""
        world = mapped_range(pages=4000, filled=False, payload=False)
        node = world.machine.mem.nodes[0]
        with pytest.raises(OutOfMemory):
            world.process.touch(world.addr, world.nbytes)
        failures = node.kswapd_failures

        for _ in range(20):
            balance_pgdat(world.machine.mem, node)

        assert 0 < failures <= MAX_RECLAIM_RETRIES == node.kswapd_failures

    def test_takes_heart_when_reclaim_succeeds(self):
        """Pages that are given up are a reason to look again."""
        world = mapped_range(pages=8, payload=False, filled=False)
        world.process.touch(world.addr, world.nbytes)
        world.machine.mem.nodes[0].kswapd_failures = MAX_RECLAIM_RETRIES
        lazyfree(world, *range(8))

        try_to_free_pages(world.machine.mem, [0], 8)

        assert 0 == world.machine.mem.nodes[0].kswapd_failures


class TestPressure:
    def test_twice_the_memory(self):
        """A process may use twice what there is: each byte is as it was stored."""
        world = mapped_range(pages=1024, swap="8MiB", nodes=("2MiB",), filled=False)
        data = np.random.default_rng(1).integers(0, 256, world.nbytes, dtype=np.uint8).tobytes()

        world.process.write(world.addr, data)

        assert data == world.process.read(world.addr, world.nbytes)
        assert world.process.mm.anon_rss < 512 < world.process.mm.swapents
        world.machine.verify()

    def test_memory_and_swap_are_full(self):
        """The store that finds neither fails; what was stored before is there."""
        world = mapped_range(pages=1024, swap="1MiB", nodes=("2MiB",), filled=False)

        with pytest.raises(OutOfMemory, match="no frame for the page at"):
            world.fill()

        stored = only(world, world.process.mm.anon_rss + world.process.mm.swapents)
        assert 255 + 400 < stored.pages < 512 + 255
        world.process.munmap(stored.at(stored.pages - 50), 50 * PAGE_SIZE)
        assert only(world, stored.pages - 50).intact()

    def test_device_brings_more_back_than_fits(self):
        """Pages that return from the device push others out to swap."""
        world = mapped_range(pages=384, swap="4MiB", nodes=("2MiB",), memory="2MiB", filled=False)
        world.fill()
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        other = world.process.mmap(384 * PAGE_SIZE)
        world.process.write(other, b"\7" * 384 * PAGE_SIZE)

        world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert world.intact()
        assert b"\7" * 384 * PAGE_SIZE == world.process.read(other, 384 * PAGE_SIZE)

    def test_lock_of_somebody_else_stops_nobody(self):
        """Reclaim never waits for a page lock."""
        world = mapped_range(pages=64, swap=SWAP)
        world.lock(0)

        assert try_to_free_pages(world.machine.mem, [0], 64) > 32

        assert "P" == letters(world)[0]


class TestControlGroups:
    @pytest.fixture
    def world(self):
        """Pages 0 to 15 of the root, and as many of a child's own in a group."""
        world = mapped_range(pages=16, swap=SWAP)
        child = world.process.fork()
        group = world.machine.cgroup("/a/b")
        group.move_charge_at_immigrate = False  # what it shares with its parent is the parent's
        child.move_to(group)
        self.child = world.seen_by(child)
        self.child.fill()
        lru_add_drain_all(world.machine.mem)
        return world

    @pytest.mark.parametrize("path", ["/a", "/a/b"])
    def test_pages_of_the_group_alone(self, world, path):
        """Pages of the group, and of those in it, make room; the others keep theirs."""
        mem = world.machine.mem
        with mem.vmstat.counting("pgscan_direct", "pgsteal_direct") as delta:
            assert 16 == try_to_free_mem_cgroup_pages(mem, world.machine.cgroup(path), 16)

        assert "P" * 16 == letters(world)
        assert 16 == np.count_nonzero(self.child.slots())
        assert {"pgscan_direct": 0, "pgsteal_direct": 0} == delta  # as in v4.20
        assert self.child.intact()

    def test_the_order_of_the_others(self, world):
        """What is left on a list is as old as it was."""
        mem = world.machine.mem
        lru = mem.nodes[0].lruvec[Lru.ACTIVE_ANON]
        before = lru_pages(mem, lru)
        others = before[mem.memcg[before] == 0].tolist()

        try_to_free_mem_cgroup_pages(mem, world.machine.cgroup("/a"), 16)

        assert others == lru_pages(mem, lru).tolist()

    def test_an_empty_group(self, world):
        """Who has nothing gives nothing."""
        group = world.machine.cgroup("/c")

        assert 0 == try_to_free_mem_cgroup_pages(world.machine.mem, group, 16)

    def test_no_slots_for_the_group(self, world):
        """A group that may have no slot keeps its pages."""
        group = world.machine.cgroup("/a")
        group.swap_limit = 0

        assert 0 == try_to_free_mem_cgroup_pages(world.machine.mem, group, 16)
        assert "P" * 16 == letters(self.child)
