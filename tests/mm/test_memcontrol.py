"""Who pays for a page: charges at faults, on the way to devices and swap, and at the limit."""

import errno

import numpy as np
import pytest

from hmm import MIGRATE_PFN_ERROR, Stayed
from mm import PAGE_SIZE, OutOfMemory
from mm.gfp import GFP_ATOMIC, GFP_KERNEL
from mm.memcontrol import (
    get_mem_cgroup_from_mm,
    mem_cgroup_precharge,
    mem_cgroup_try_charge,
    try_charge,
)
from mm.page_alloc import alloc_pages_bulk
from mm.swap import lru_add_drain_all, put_page
from mm.swapin import read_swap_cache_async
from tests.hmm.callbacks import instead, migrate
from tests.interleave import explore
from tests.world import mapped_range


def grouped(pages=8, limit=None, path="/a", **options):
    """A world whose process is in a group with a limit of so many pages."""
    filled = options.pop("filled", True)
    world = mapped_range(pages, filled=False, **options)
    limit = None if limit is None else limit * PAGE_SIZE
    world.process.move_to(world.machine.cgroup(path, limit=limit))
    if filled:
        world.fill()
    return world


def pages_of(group):
    """What is charged to *group* by now: pages, slots."""
    lru_add_drain_all(group.mem)
    return group.memory.usage, group.swap.usage


def events(group):
    return {name: count for name, count in group.events.items() if count}


class TestCharge:
    def test_first_touch(self):
        """A page is charged when it is first stored to; the zero page is nobody's."""
        world = grouped(filled=False)
        group = world.process.cgroup

        world.process.read(world.addr, world.nbytes)
        assert (0, 0) == pages_of(group)
        world.process.write(world.addr, b"x" * (3 * PAGE_SIZE))
        assert (3, 0) == pages_of(group)

    def test_without_groups(self):
        """While there is no group but the root, nothing is charged."""
        world = mapped_range()

        assert not world.machine.mem.memcg.any()
        assert world.process.cgroup is None

    def test_copy(self):
        """A copy is charged to whoever stored; the page that was copied stays with its group."""
        world = grouped(pages=4)
        child = world.process.fork()
        other = world.machine.cgroup("/b")
        other.move_charge_at_immigrate = False
        child.move_to(other)

        child.write(world.addr, b"x")

        assert [(4, 0), (1, 0)] == [pages_of(g) for g in (world.process.cgroup, other)]

    def test_fork(self):
        """A child is in its parent's group, and what both have counts once."""
        world = grouped(pages=4)
        child = world.process.fork()

        assert child.cgroup is world.process.cgroup
        assert (4, 0) == pages_of(child.cgroup)
        child.exit()
        assert (4, 0) == pages_of(world.process.cgroup)

    def test_copies_of_pinned_pages(self):
        """What fork copies at once the child's group pays for, or there is no child."""
        world = grouped(pages=4, limit=5)
        world.pin(1)
        world.process.fork()
        assert (5, 0) == pages_of(world.process.cgroup)

        with pytest.raises(OutOfMemory, match=r"0 frames are free for <MemCgroup /a, 20 KiB"):
            world.process.fork()

        assert (5, 0) == pages_of(world.process.cgroup)

    def test_last_reference(self):
        """A page is charged for as long as somebody holds it, mapped or not."""
        world = grouped(pages=4)
        pin = world.pin(2)
        world.process.munmap(world.addr, world.nbytes)

        assert (1, 0) == pages_of(world.process.cgroup)
        pin.release()
        assert (0, 0) == pages_of(world.process.cgroup)

    def test_ancestors(self):
        """What a group has, all that it stands in have."""
        world = grouped(path="/a/b/c")
        sister = world.machine.cgroup("/a/b/d")

        assert [8, 8, 8] == [g.memory.usage for g in world.process.cgroup.lineage()]
        assert 0 == sister.usage

    def test_pages_at_hand(self):
        """Of pages that are there already the first are charged, and none twice."""
        world = grouped(pages=2, limit=5)
        mem, mm = world.machine.mem, world.process.mm
        pfns = alloc_pages_bulk(mem, GFP_KERNEL, 0, 4)

        assert [True, True] == mem_cgroup_try_charge(mm, pfns[:2], GFP_KERNEL).tolist()
        assert [True, True, True, False] == mem_cgroup_try_charge(mm, pfns, GFP_KERNEL).tolist()
        assert [1, 1, 1, 0] == mem.memcg[pfns].tolist()
        put_page(mem, pfns)
        assert (2, 0) == pages_of(world.process.cgroup)

    def test_for_the_root(self):
        """The root pays for whatever it is asked."""
        world = mapped_range()

        assert (None, 1 << 40) == mem_cgroup_precharge(world.process.mm, 1 << 40, GFP_KERNEL)

    def test_a_process_in_the_root_beside_groups(self):
        """Groups of others do not concern it."""
        world = mapped_range(swap="1MiB")
        group = world.machine.cgroup("/a", limit=PAGE_SIZE)
        world.pageout()

        assert world.intact()
        assert (0, 0) == pages_of(group)


class TestLimit:
    def test_pages_go_to_swap(self):
        """A process may use more than its group may have, and every byte is as it was stored."""
        world = grouped(pages=300, limit=64, swap="4MiB")
        group = world.process.cgroup

        assert world.intact()
        assert group.usage <= 64 * PAGE_SIZE == group.peak
        assert group.events["max"] > 0 == group.events["oom"]

    def test_others_keep_their_pages(self):
        """A group that is full takes no page from another, nor from the root."""
        world = mapped_range(pages=40, swap="4MiB", nodes=("1MiB",))
        machine = world.machine
        other = machine.spawn("other", cgroup=machine.cgroup("/b"))
        other.write(other.mmap(40 * PAGE_SIZE), b"x" * (40 * PAGE_SIZE))
        greedy = machine.spawn("greedy", cgroup=machine.cgroup("/a", limit=8 * PAGE_SIZE))

        greedy.write(greedy.mmap(500 * PAGE_SIZE), b"y" * (500 * PAGE_SIZE))

        assert (40, 0) == pages_of(other.cgroup)
        assert not world.slots().any()
        assert greedy.cgroup.swap_usage >= 492 * PAGE_SIZE

    def test_nothing_to_reclaim(self):
        """Without swap an access fails, and says whose limit it met; what was there stays."""
        world = grouped(pages=8, limit=5, filled=False)
        group = world.process.cgroup

        with pytest.raises(OutOfMemory, match=r"in control group /a, which uses 20 KiB of 20 KiB"):
            world.fill()

        assert (5, 0) == pages_of(group)
        assert [0, 1, 2, 3, 4] == [world.process.read(world.at(i), 1)[0] for i in range(5)]
        assert 1 == group.events["oom"]

    def test_an_ancestor_is_full(self):
        """The limit that counts may be far out, and pages of a sister go to meet it."""
        world = grouped(pages=8, path="/a/b", swap="1MiB")
        outer = world.machine.cgroup("/a", limit=12 * PAGE_SIZE)
        sister = world.machine.spawn("sister", cgroup=world.machine.cgroup("/a/c"))

        addr = sister.mmap(10 * PAGE_SIZE)
        sister.write(addr, b"x" * (10 * PAGE_SIZE))

        assert outer.usage <= 12 * PAGE_SIZE
        assert outer.events["max"] > 0 == sister.cgroup.events["max"]
        assert world.process.cgroup.swap_usage > 0
        assert world.intact()

    def test_whose_limit_is_named(self):
        """An error names the group that is full, be it an ancestor."""
        world = grouped(pages=8, path="/a/b/c", filled=False)
        world.machine.cgroup("/a/b", limit=2 * PAGE_SIZE)

        with pytest.raises(OutOfMemory, match=r"group /a/b, which uses 8 KiB of 8 KiB"):
            world.fill()

        assert {"max", "oom"} == events(world.machine.cgroup("/a/b")).keys()
        assert {} == events(world.process.cgroup) | events(world.machine.cgroup("/a"))

    def test_of_the_machine_not_of_the_group(self):
        """Where memory itself is short, no group is named, though one was full before."""
        world = grouped(pages=300, limit=5, filled=False, nodes=("1MiB",))
        with pytest.raises(OutOfMemory, match="control group"):
            world.fill()
        world.process.cgroup.limit = "max"

        with pytest.raises(OutOfMemory, match="kept in reserve"):
            world.fill()

    def test_pin(self):
        """A pin that the group has no room for is ENOMEM, and holds nothing."""
        world = grouped(pages=8, limit=5, filled=False)

        with pytest.raises(OutOfMemory, match="control group /a") as error:
            world.process.pin(world.addr, world.nbytes)

        assert errno.ENOMEM == error.value.errno
        assert [] == world.machine.mem.pins

    def test_a_limit_of_nothing(self):
        """A group may have no page at all."""
        world = grouped(pages=1, limit=0, filled=False)

        assert b"\0" == world.process.read(world.addr, 1)
        with pytest.raises(OutOfMemory, match="0 B of 0 B"):
            world.process.write(world.addr, b"x")

    def test_who_may_not_reclaim(self):
        """An allocation that cannot wait gets what there is room for."""
        world = grouped(pages=8, limit=10, swap="1MiB")
        group = world.process.cgroup

        assert 2 == try_charge(get_mem_cgroup_from_mm(world.process.mm), 5, GFP_ATOMIC)
        assert 0 == try_charge(get_mem_cgroup_from_mm(world.process.mm), 5, GFP_ATOMIC)
        assert {"max": 2, "oom": 1} == events(group)
        group.memory.usage -= 2

    def test_mlocked(self):
        """What is locked in memory cannot make room."""
        world = grouped(pages=8, limit=5, filled=False, swap="1MiB")
        world.process.mlock(world.addr, 5 * PAGE_SIZE)

        with pytest.raises(OutOfMemory, match="control group"):
            world.process.write(world.at(5), b"x")

    def test_populate_stops(self):
        """Populating stops at the limit without an error, as it does where memory is short."""
        world = grouped(pages=1, limit=6)

        addr = world.process.mmap(10 * PAGE_SIZE, flags="anon|private|populate")

        assert 5 == np.count_nonzero(world.process.mincore(addr, 10 * PAGE_SIZE))


class TestDevice:
    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_there_and_back(self, kind):
        """The charge goes with the page: a group that is full migrates both ways."""
        world = grouped(pages=8, limit=8, kind=kind)
        group = world.process.cgroup

        assert 8 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
        assert (8, 0) == pages_of(group)
        assert 8 * PAGE_SIZE == group.stat["device"]
        assert 8 == world.gpu.to_system(world.process, world.addr, world.nbytes).migrated
        assert (8, 0) == pages_of(group)
        assert {} == events(group)

    def test_cpu_fault(self):
        """A CPU that fetches a page back needs no room: it has been paid for."""
        world = grouped(pages=8, limit=8)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert world.intact()
        assert {} == events(world.process.cgroup)

    def test_device_memory_counts(self):
        """Pages on a device fill the group, and no reclaim reaches them."""
        world = grouped(pages=8, limit=8, swap="1MiB")
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        with pytest.raises(OutOfMemory, match="control group /a"):
            world.process.write(world.process.mmap(PAGE_SIZE), b"x")

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_freed(self, kind):
        """A device page that is given back is uncharged."""
        world = grouped(pages=8, kind=kind)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.process.munmap(world.at(2), 3 * PAGE_SIZE)

        assert (5, 0) == pages_of(world.process.cgroup)

    def test_device_goes(self):
        """Pages that a device gives back when it is closed are charged still."""
        world = grouped(pages=8)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.gpu.close()

        assert (8, 0) == pages_of(world.process.cgroup)
        assert world.intact()

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_hole(self, kind):
        """A hole that the device fills is charged as a first touch is."""
        world = grouped(pages=4, filled=False, kind=kind)

        assert 4 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
        assert (4, 0) == pages_of(world.process.cgroup)

    def test_hole_beyond_the_limit(self):
        """Holes that the group cannot pay for stay, and the result counts them."""
        world = grouped(pages=6, limit=4, filled=False)
        world.process.write(world.at(1), b"x")

        result = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (6, 4, {"over_limit": 2}) == (result.collected, result.migrated, result.stayed)
        assert [True, True, True, True, False, False] == world.on_device()
        assert (4, 0) == pages_of(world.process.cgroup)

    def test_no_hole_is_filled(self):
        """Where there is no room at all only the pages move."""
        world = grouped(pages=3, limit=1, filled=False)
        world.process.write(world.at(1), b"x")

        result = migrate(world)

        assert [Stayed.OVER_LIMIT, Stayed.NO, Stayed.OVER_LIMIT] == result.stayed.tolist()
        assert [-errno.ENOMEM, 0, -errno.ENOMEM] == result.status.tolist()
        assert [False, True, False] == world.on_device()

    def test_hole_makes_room(self):
        """Pages of the group that are not in use go to swap for it."""
        world = grouped(pages=8, limit=8, swap="1MiB")
        addr = world.process.mmap(4 * PAGE_SIZE)

        assert 4 == world.gpu.to_device(world.process, addr, 4 * PAGE_SIZE).migrated
        assert world.process.cgroup.usage <= 8 * PAGE_SIZE
        assert world.intact()

    def test_hole_that_was_filled_meanwhile(self):
        """A page that came too late is charged no more."""
        world = grouped(pages=3, filled=False)

        def fault(src, dst):
            world.process.write(world.at(1), b"x")

        result = migrate(world, after=fault)

        assert Stayed.RACED == result.stayed[1]
        assert (3, 0) == pages_of(world.process.cgroup)

    def test_pages_that_the_driver_loses(self):
        """Pages whose bytes are lost are uncharged."""
        world = grouped(pages=3)

        migrate(world, after=instead(world, {1: int(MIGRATE_PFN_ERROR)}))

        assert (2, 0) == pages_of(world.process.cgroup)

    def test_between_nodes(self):
        """The charge goes with a page that moves to another node."""
        world = grouped(pages=8, limit=8, nodes=("4MiB", "4MiB"))

        world.process.move_pages(world.addrs, 1)

        assert [1] * 8 == world.process.move_pages(world.addrs).tolist()
        assert (8, 0) == pages_of(world.process.cgroup)

    def test_a_device_that_stores(self):
        """Faults of a device are charged to the process."""
        world = grouped(pages=4, filled=False)

        world.gpu.write(world.process, world.addr, b"x" * world.nbytes)

        assert (4, 0) == pages_of(world.process.cgroup)


class TestSwap:
    def test_out_and_in(self):
        """A page in swap is charged for its slot, and for its frame when it comes back."""
        world = grouped(pages=4, swap="1MiB")
        group = world.process.cgroup

        world.pageout(0, 1, 2)
        assert (1, 3) == pages_of(group)
        assert world.intact()
        assert (4, 0) == pages_of(group)

    def test_the_owner_of_the_slot_pays(self):
        """Whoever reads it, a page from swap is its group's."""
        world = grouped(pages=4, swap="1MiB")
        child = world.process.fork()
        other = world.machine.cgroup("/b")
        other.move_charge_at_immigrate = False
        child.move_to(other)
        world.pageout()

        child.read(world.addr, world.nbytes)

        assert [4, 0] == [g.memory.usage for g in (world.process.cgroup, other)]

    def test_the_owner_of_the_slot_is_gone(self):
        """Then whoever reads it pays."""
        world = grouped(pages=4, swap="1MiB")
        first, second = world.process.cgroup, world.machine.cgroup("/b")
        world.pageout()
        second.move_charge_at_immigrate = False
        world.process.move_to(second)
        first.remove()

        assert world.intact()

        assert [(0, 0), (4, 0)] == [pages_of(g) for g in (first, second)]
        assert {"/b"} == {g.name for g in world.machine.mem.memcgs.values()}

    def test_read_in_by_the_root(self):
        """Of a group that is gone, the root needs no room."""
        world = grouped(pages=4, swap="1MiB")
        group = world.process.cgroup
        world.pageout(0, 1)
        world.process.move_to(None)
        group.remove()

        assert {} == world.machine.mem.memcgs
        assert world.intact()

    def test_slots_of_a_group_that_is_gone(self):
        """What reclaim takes of it is charged to what it stood in."""
        world = grouped(pages=4, path="/a/b", swap="1MiB")
        inner = world.process.cgroup
        other = world.machine.cgroup("/c")
        other.move_charge_at_immigrate = False
        world.process.move_to(other)
        inner.remove()

        world.pageout()

        assert [(0, 0), (0, 4)] == [pages_of(g) for g in inner.lineage()]
        assert ["/a", "/c"] == sorted(g.name for g in world.machine.mem.memcgs.values())

    def test_slots_of_a_removed_group_beside_those_of_its_parent(self):
        """Reclaimed at once, they are charged once each."""
        world = mapped_range(pages=6, filled=False, swap="1MiB")
        first, outer = world.machine.cgroup("/first"), world.machine.cgroup("/a")
        first.remove()
        inner = world.machine.cgroup("/a/b")
        assert inner.number < outer.number
        world.process.move_to(inner)
        world.process.write(world.addr, b"x" * (2 * PAGE_SIZE))
        outer.move_charge_at_immigrate = False
        world.process.move_to(outer)
        world.process.write(world.at(2), b"x" * (4 * PAGE_SIZE))
        inner.remove()

        assert 6 == world.pageout()

        assert (0, 6) == pages_of(outer)

    def test_read_ahead(self):
        """What is read ahead of a fault is charged as it is read."""
        world = grouped(pages=4, swap="1MiB")
        world.pageout()

        read_swap_cache_async(world.vma, world.addrs[:2], world.slots()[:2])

        assert (2, 4) == pages_of(world.process.cgroup)
        assert world.intact()

    def test_no_room_to_come_back(self):
        """A page that finds no room stays in swap, and the access fails."""
        world = grouped(pages=4, limit=4, swap="1MiB")
        world.pageout(0, 1)
        world.process.mlock(world.at(2), 2 * PAGE_SIZE)
        addr = world.process.mmap(2 * PAGE_SIZE, flags="anon|private|locked")

        with pytest.raises(OutOfMemory, match="control group /a"):
            world.process.read(world.addr, 1)

        world.process.munmap(addr, 2 * PAGE_SIZE)
        assert world.intact()

    def test_some_room_to_come_back(self):
        """The first that fit come back, and go again for the others."""
        world = grouped(pages=40, limit=8, swap="1MiB")
        world.pageout()

        assert world.intact()
        assert world.process.cgroup.usage <= 8 * PAGE_SIZE

    def test_room_that_the_same_fault_has_in_hand(self):
        """Pages that were read ahead make room for others as soon as they are mapped."""
        world = grouped(pages=6, limit=4, swap="1MiB")
        world.pageout()
        read_swap_cache_async(world.vma, world.addrs[:4], world.slots()[:4])
        assert (4, 6) == pages_of(world.process.cgroup)

        assert world.intact()

    def test_the_end_of_swap(self):
        """Pages that get no slot are counted, whosever limit it was."""
        world = grouped(pages=8, swap="20KiB")

        assert 4 == world.pageout()
        assert {"swap_fail": 4} == events(world.process.cgroup)

    def test_half_of_the_slots(self):
        """Once a group uses half of its slots, pages that are back give theirs up."""
        world = grouped(pages=4, swap="1MiB")
        group, child = world.process.cgroup, world.process.fork()
        world.pageout()
        child.exit()  # nobody else needs the slots, and yet they are not each page's own
        read_swap_cache_async(world.vma, world.addrs, world.slots())
        world.process.read(world.at(0), 1)
        assert (4, 4) == pages_of(group)
        group.swap_limit = 8 * PAGE_SIZE

        world.process.read(world.at(1), 1)

        assert (4, 3) == pages_of(group)


class TestInterleavings:
    """What two threads do to one group, in every order."""

    def every_order(self, scenario, *, limit, swap="0"):
        world = grouped(1, filled=False, nodes=("2MiB",), memory="64KiB", limit=limit, swap=swap)

        def one(together):
            scenario(world, together)
            lru_add_drain_all(world.machine.mem)
            world.machine.verify()
            assert 0 == world.process.cgroup.usage

        assert 10 < explore(one, preemptions=1)

    def test_two_faults_and_one_page_to_have(self):
        """Both want the last page; one gets it, unless the other was through with it."""

        def touch(process):
            try:
                addr = process.mmap(PAGE_SIZE)
                process.write(addr, b"x")
            except OutOfMemory:
                return False
            finally:
                process.munmap(addr, PAGE_SIZE)
            return True

        def scenario(world, together):
            child = world.process.fork()

            assert any(together(lambda: touch(world.process), lambda: touch(child)))

            child.exit()

        self.every_order(scenario, limit=1)

    def test_fault_and_move(self):
        """A page that comes while its process moves is charged before or after, and once."""

        def scenario(world, together):
            process, group = world.process, world.process.cgroup
            other = world.machine.cgroup("/b")
            addr = process.mmap(2 * PAGE_SIZE)
            process.write(addr, b"x")

            together(lambda: process.write(addr + PAGE_SIZE, b"y"), lambda: process.move_to(other))

            assert [(0, 0), (2, 0)] == [pages_of(g) for g in (group, other)]
            process.munmap(addr, 2 * PAGE_SIZE)
            process.move_to(group)

        self.every_order(scenario, limit=8)

    def test_swapped_out_while_it_moves(self):
        """Reclaim and a move of the same pages: each page and slot is charged once."""

        def scenario(world, together):
            process, group = world.process, world.process.cgroup
            other = world.machine.cgroup("/b")
            addr = process.mmap(3 * PAGE_SIZE)
            process.write(addr, b"x" * (3 * PAGE_SIZE))

            together(
                lambda: process.madvise(addr, 3 * PAGE_SIZE, "pageout"),
                lambda: process.move_to(other),
            )

            world.machine.verify()
            assert b"x" * (3 * PAGE_SIZE) == process.read(addr, 3 * PAGE_SIZE)
            process.munmap(addr, 3 * PAGE_SIZE)
            process.move_to(group)

        self.every_order(scenario, limit=8, swap="64KiB")

    def test_read_in_while_the_group_goes(self):
        """A slot's group that is removed meanwhile pays, or the reader's does."""

        def scenario(world, together):
            process, group = world.process, world.process.cgroup
            gone = world.machine.cgroup("/gone")
            process.move_to(gone)
            addr = process.mmap(PAGE_SIZE)
            process.write(addr, b"x")
            process.madvise(addr, PAGE_SIZE, "pageout")
            group.move_charge_at_immigrate = False
            process.move_to(group)

            together(lambda: process.read(addr, 1), gone.remove)

            process.munmap(addr, PAGE_SIZE)
            lru_add_drain_all(world.machine.mem)
            assert {"/a"} == {g.name for g in world.machine.mem.memcgs.values()}

        self.every_order(scenario, limit=8, swap="64KiB")
