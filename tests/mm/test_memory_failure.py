"""Frames whose contents are lost: who reads them, who maps them, and who is never given them."""

import errno

import numpy as np
import pytest

from mm import BusError, Busy, InputOutputError, InvalidArgument, trace
from mm.errors import Deadlock, HwPoison
from mm.filemap import lock_page, unlock_page
from mm.gfp import GFP_KERNEL
from mm.memory_failure import memory_failure
from mm.migration_ptes import remove_migration_ptes
from mm.mmu_notifier import MmuNotifyEvent
from mm.page_alloc import alloc_pages, alloc_pages_bulk, free_pages, is_free_buddy_page
from mm.page_flags import PG_hwpoison, PG_lru, PG_mlocked, PG_swapcache
from mm.pgtable import pte_none
from mm.swap import lru_add_drain_all, put_page
from mm.swapops import is_hwpoison_entry, is_swap_entry
from mm.typing import PAGE_SIZE
from tests.mm.test_device_exclusive import Listener
from tests.mm.test_rmap import begin_migration, end_migration
from tests.special_pages.scenes import waiter
from tests.world import mapped_range

BUSY, EIO, NO_FRAME = -errno.EBUSY, -errno.EIO, -errno.ENXIO


def fails(world, *pages):
    """Let the frames of *pages* fail; the answers."""
    return world.machine.memory_failure(world.pfns()[list(pages)]).tolist()


def retired(world, pfns):
    """Which of *pfns* are out of use for good."""
    mem = world.machine.mem
    out = (mem.flags[pfns] & PG_hwpoison) != 0
    assert not (mem.flags[pfns[out]] & PG_lru).any()
    assert not is_free_buddy_page(mem, np.sort(pfns[out])).any()
    return out.tolist()


def lost(world):
    """Which pages of the range answer with SIGBUS, by CPU loads."""
    found = []
    for page in range(world.pages):
        try:
            found.append(not world.process.read(world.at(page), 1))
        except BusError:
            found.append(True)
    return found


class TestMappedPages:
    def test_next_access(self):
        """It has SIGBUS, load or store; the neighbours are as they were."""
        world = mapped_range(4)
        pfns = world.pfns()[1:2]

        assert [0] == fails(world, 1)

        assert [False, True, False, False] == is_hwpoison_entry(world.ptes()).tolist()
        assert [False, True, False, False] == lost(world)
        with pytest.raises(BusError) as caught:
            world.process.write(world.at(1), b"\1")
        assert world.at(1) == caught.value.address
        assert ([True], 3) == (retired(world, pfns), world.process.mm.anon_rss)
        world.machine.verify()

    def test_every_process(self):
        """All who map it have lost it."""
        world = mapped_range(2)
        child = world.seen_by(world.process.fork())

        assert [0] == fails(world, 0)

        assert [True, False] == lost(world) == lost(child)
        assert [1, 2] == [world.machine.mem.num_poisoned_pages, world.pages]

    def test_child_of_who_has_lost_it(self):
        """Fork copies the entry."""
        world = mapped_range(2)
        fails(world, 0)

        assert [True, False] == lost(world.seen_by(world.process.fork()))

    def test_memory_without_contents(self):
        """munmap and MADV_DONTNEED take the entry away, and fresh memory is there next."""
        world = mapped_range(3)
        pfns = world.pfns()
        fails(world, 0, 1)
        world.process.madvise(world.at(0), PAGE_SIZE, "dontneed")
        world.process.munmap(world.at(1), PAGE_SIZE)

        assert b"\0" == world.process.read(world.at(0), 1)
        assert [True, True, False] == retired(world, pfns)
        world.machine.verify()

    def test_mlocked_page(self):
        """That it is locked in memory does not save it."""
        world = mapped_range(2)
        world.process.mlock(world.addr, world.nbytes)
        pfns = world.pfns()[:1]

        assert [0] == fails(world, 0)
        assert not world.machine.mem.flags[pfns] & PG_mlocked
        assert 1 == world.machine.vmstat["nr_mlock"]
        world.machine.verify()

    def test_pinned_page(self):
        """It leaves the page table too, but the frame is not free of users: EBUSY."""
        world = mapped_range(2)
        pfns = world.pfns()[:1]
        pin = world.pin(0)

        assert [BUSY] == fails(world, 0)

        assert [True, False] == lost(world)
        world.machine.verify()
        pin.release()
        assert ([True], 1) == (retired(world, pfns), world.machine.mem.refcount[pfns])

    def test_page_that_a_device_has_for_itself(self):
        """It is taken back first; the device hears of both."""
        world = mapped_range(2)
        world.make_exclusive(0)
        listener = Listener(world)

        assert [0] == fails(world, 0)

        heard = [event for event, *_ in listener.heard]
        assert [MmuNotifyEvent.EXCLUSIVE, MmuNotifyEvent.CLEAR] == heard
        assert [True, False] == lost(world)

    def test_page_that_moves(self):
        """Its migration comes first: the entry that waits for the page is none to poison."""
        world = mapped_range(2)
        mem, pfns = begin_migration(world)
        with waiter(world, lambda: world.machine.memory_failure(pfns[:1]).tolist()) as answers:
            remove_migration_ptes(mem, pfns, pfns)
            end_migration(mem, pfns)

        assert [[0]] == answers
        assert [True, False] == lost(world)

    def test_who_wants_to_hold_it(self):
        """Neither pins nor MADV_POPULATE get it."""
        world = mapped_range(2)
        fails(world, 1)

        with pytest.raises(BusError):
            world.pin(1)
        with pytest.raises(HwPoison):
            world.process.madvise(world.addr, world.nbytes, "populate_read")

    def test_device_that_maps_it(self):
        """A device that reads it where it is has SIGBUS as well."""
        world = mapped_range(2)
        pin = world.pin(1)  # so that it stays where it is
        assert b"\1" == world.gpu.read(world.process, world.at(1), 1)
        fails(world, 1)

        with pytest.raises(BusError):
            world.gpu.read(world.process, world.at(1), 1)
        pin.release()

    def test_migration_passes_over(self):
        """What is lost is no page that could go to a device."""
        world = mapped_range(3)
        fails(world, 1)

        moved = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (2, {"skipped": 1}) == (moved.migrated, moved.stayed)
        assert [False, True, False] == lost(world)

    def test_without_contents(self):
        """A machine that keeps no bytes knows what is lost all the same."""
        world = mapped_range(2, payload=False, filled=False)
        world.process.touch(world.addr, world.nbytes)
        fails(world, 0)

        with pytest.raises(BusError):
            world.process.touch(world.addr, 1)


class TestSwapCache:
    def test_clean_page_comes_from_swap_again(self):
        """What swap has a copy of is not lost."""
        world = mapped_range(3, swap="1MiB")
        child = world.seen_by(world.process.fork())
        world.pageout()
        assert world.intact()  # read into the swap cache: the child's entries need the slots
        pfns = world.pfns()

        assert [0] * 3 == world.machine.memory_failure(pfns).tolist()

        assert is_swap_entry(world.ptes()).all()
        assert world.intact()
        assert child.intact()
        assert [True] * 3 == retired(world, pfns)
        world.machine.verify()

    def test_dirty_page_is_lost_for_all(self):
        """Whoever finds it in the swap cache has SIGBUS, also who had not mapped it."""
        world = mapped_range(2, swap="1MiB")
        child = world.seen_by(world.process.fork())
        pfns = world.pfns()
        pin = world.hold(*pfns.tolist())
        world.pageout()  # in the swap cache, dirty, as somebody holds them
        pin.release()
        assert is_swap_entry(world.ptes()).all()
        assert (world.machine.mem.flags[pfns] & PG_swapcache).all()

        assert [0, 0] == world.machine.memory_failure(pfns).tolist()

        assert [True, True] == lost(world) == lost(child)
        world.machine.verify()
        child.process.exit()
        world.process.exit()
        assert 0 == world.machine.mem.swap.inuse_pages
        assert [1, 1] == world.machine.mem.refcount[pfns].tolist()

    def test_dirty_page_that_is_mapped(self):
        """A slot alone does not save what was stored since."""
        world = mapped_range(2, swap="1MiB")
        child = world.seen_by(world.process.fork())
        world.pageout()
        world.process.touch(world.addr, 2 * PAGE_SIZE, write=False)
        pfns = world.pfns()
        world.rewrite([0], lambda ptes: ptes | np.uint64(1 << 6))  # the CPU's dirty bit

        assert [0, 0] == world.machine.memory_failure(pfns).tolist()

        assert [True, False] == lost(world) == lost(child)

    def test_pinned_page(self):
        """It leaves the swap cache, and is lost."""
        world = mapped_range(1, swap="1MiB")
        world.pageout()
        world.process.touch(world.addr, 1, write=False)
        pin = world.pin(0)

        assert [BUSY] == fails(world, 0)
        assert [True] == lost(world)
        pin.release()


class TestFreeFrames:
    @pytest.mark.parametrize("order", [0, 3, 10])
    def test_in_a_free_block(self, order):
        """Only the frame itself is gone, wherever in a block it lies; nobody is given it."""
        world = mapped_range(1, nodes=("16MiB",))
        mem = world.machine.mem
        block = alloc_pages(mem, GFP_KERNEL, order, 0)
        free_pages(mem, block, order)
        free = world.machine.nr_free_pages
        pfn = block + (1 << order) // 3

        assert [0] == world.machine.memory_failure(pfn).tolist()

        assert free - 1 == world.machine.nr_free_pages
        world.machine.verify()
        everything = alloc_pages_bulk(mem, GFP_KERNEL, 0, free)
        assert pfn not in everything
        put_page(mem, everything)

    def test_on_a_per_cpu_list(self):
        """It is found there too."""
        world = mapped_range(2)
        pfns = world.pfns()
        lru_add_drain_all(world.machine.mem)
        world.process.munmap(world.addr, world.nbytes)
        assert any(pcp.size for zone in world.machine.mem.nodes[0].zones for pcp in zone.pcp)

        assert [0, 0] == world.machine.memory_failure(pfns).tolist()
        assert [True, True] == retired(world, pfns)
        world.machine.verify()

    def test_many(self):
        """A whole block, frame by frame, in one call."""
        world = mapped_range(1)
        mem = world.machine.mem
        block = alloc_pages(mem, GFP_KERNEL, 5, 0)
        free_pages(mem, block, 5)

        assert [0] * 32 == world.machine.memory_failure(np.arange(block, block + 32)).tolist()
        assert 32 == mem.num_poisoned_pages
        world.machine.verify()


class TestWhatIsNotDone:
    def test_no_frame(self):
        """ENXIO, for each."""
        world = mapped_range(1)
        limit = world.machine.mem.limit_pfn

        assert [NO_FRAME] * 4 == world.machine.memory_failure([0, -1, limit, 1 << 40]).tolist()
        assert [NO_FRAME] == world.machine.soft_offline_page(limit - (64 << 10)).tolist()

    def test_zero_page(self):
        """The kernel's own stays."""
        world = mapped_range(1)
        pfn = world.machine.mem.zero_pfn

        assert [BUSY] == world.machine.memory_failure(pfn).tolist()
        assert [BUSY] == world.machine.soft_offline_page(pfn).tolist()
        world.machine.verify()

    def test_page_of_a_file(self):
        """It stays, whoever maps it; but it can go out of use with its contents kept."""
        world = mapped_range(1)
        file = world.machine.memfd_create("file")
        file.truncate(2 * PAGE_SIZE)
        shared = world.seen_by(world.process)
        shared.addr = world.process.mmap(2 * PAGE_SIZE, flags="file|shared", file=file)
        shared.pages = 2
        shared.fill()
        old = shared.pfns()

        assert [BUSY, BUSY] == world.machine.memory_failure(old).tolist()
        assert [0, 0] == world.machine.soft_offline_page(old).tolist()
        assert shared.intact()
        assert shared.written().tobytes() == file.read(0, 2 * PAGE_SIZE)
        assert [True, True] == retired(world, old)
        world.machine.verify()

    def test_page_that_somebody_has_isolated(self):
        """It is on its way somewhere, with its contents."""
        world = mapped_range(2)
        world.isolate(0)

        assert [BUSY, 0] == fails(world, 0, 1)
        assert [False, True] == lost(world)

    def test_once_more(self):
        """A frame that is out of use already is no news; in one call neither."""
        world = mapped_range(2)
        pfn = world.pfns()[0]

        assert [0, 0] == world.machine.memory_failure([pfn, pfn]).tolist()
        assert [0] == world.machine.memory_failure(pfn).tolist()
        assert [BUSY] == world.machine.soft_offline_page(pfn).tolist()
        assert 1 == world.machine.mem.num_poisoned_pages

    def test_no_number(self):
        """A frame is a whole number."""
        with pytest.raises(InvalidArgument, match="whole numbers"):
            mapped_range(1).machine.memory_failure(1.5)

    def test_page_that_this_thread_has_locked(self):
        """It would wait for itself, and lets go of what it holds."""
        world = mapped_range(1)
        mem, pfns = world.machine.mem, world.pfns()
        lock_page(mem, pfns)
        with pytest.raises(Deadlock):
            memory_failure(mem, pfns)
        unlock_page(mem, pfns)
        world.machine.verify()
        assert world.intact()


class TestSoftOffline:
    def test_contents_move(self):
        """Another frame has them, and nobody notices."""
        world = mapped_range(3)
        old = world.pfns()
        with world.machine.vmstat.counting("pgmigrate_success", "pgfault") as delta:
            assert [0, 0] == world.machine.soft_offline_page(old[:2]).tolist()
            assert [True, True, False] == retired(world, old)
            assert world.intact()

        assert {"pgmigrate_success": 2, "pgfault": 0} == delta
        assert old[2] == world.pfns()[2]
        world.machine.verify()

    def test_every_process(self):
        """Both who map it have the new frame."""
        world = mapped_range(1)
        child = world.seen_by(world.process.fork())
        old = world.pfns()

        assert [0] == world.machine.soft_offline_page(old).tolist()
        assert old != world.pfns() == child.pfns()

    def test_node(self):
        """The new frame is on the same node if that has one."""
        world = mapped_range(2, nodes=("16MiB", "16MiB"))
        world.process.move_pages(world.addrs, [0, 1])

        assert [0, 0] == world.machine.soft_offline_page(world.pfns()).tolist()
        assert [0, 1] == world.process.move_pages(world.addrs).tolist()

    def test_pinned_page(self):
        """It stays, and in use: EIO."""
        world = mapped_range(2)
        world.pin(0)
        old = world.pfns()

        assert [EIO, 0] == world.machine.soft_offline_page(old).tolist()
        assert [False, True] == retired(world, old)
        assert [True, False] == (world.pfns() == old).tolist()
        assert world.intact()

    def test_free_frame(self):
        """It just leaves the lists."""
        world = mapped_range(1)
        pfn = alloc_pages(world.machine.mem, GFP_KERNEL, 0, 0)
        put_page(world.machine.mem, np.array([pfn]))

        assert [0] == world.machine.soft_offline_page(pfn).tolist()
        assert [True] == retired(world, np.array([pfn]))

    def test_swap_cache(self):
        """The new frame stands for the slot."""
        world = mapped_range(2, swap="1MiB")
        child = world.seen_by(world.process.fork())
        world.pageout()
        world.process.touch(world.addr, world.nbytes, write=False)
        old = world.pfns()

        assert [0, 0] == world.machine.soft_offline_page(old).tolist()
        assert not (old == world.pfns()).any()
        assert child.intact()
        assert world.intact()
        world.machine.verify()

    def test_page_that_a_device_has_for_itself(self):
        """It comes back to the CPU, and moves."""
        world = mapped_range(2)
        world.make_exclusive(0)

        assert [0, 0] == world.machine.soft_offline_page(world.pfns()).tolist()
        assert world.intact()

    def test_nothing_left(self):
        """Without a frame for its contents it stays in use."""
        world = mapped_range(2, nodes=("1MiB",))
        with world.machine.spawn("hog") as hog:
            addr = hog.mmap("1MiB")
            with pytest.raises(OSError, match="no frame"):
                hog.write(addr, bytes(1 << 20))

            assert [-errno.ENOMEM] * 2 == world.machine.soft_offline_page(world.pfns()).tolist()
            world.machine.verify()
        assert world.intact()


class TestControlGroups:
    @pytest.mark.parametrize("call", ["memory_failure", "soft_offline_page"])
    def test_charge(self, call):
        """A frame that is out of use is charged to nobody; what moved is charged once."""
        world = mapped_range(1)
        group = world.machine.cgroup("job", limit="1MiB")
        world.process.move_to(group)
        world.addr = world.process.mmap(2 * PAGE_SIZE)
        world.pages = 2
        world.fill()
        before = group.memory.usage

        assert [0] == getattr(world.machine, call)(world.pfns()[0]).tolist()

        assert before - (call == "memory_failure") == group.memory.usage
        world.machine.verify()


class TestUnpoison:
    def test_frames_are_free_again(self):
        """Whoever asks may get them."""
        world = mapped_range(3)
        free, pfns = world.machine.nr_free_pages, world.pfns()
        fails(world, 0, 1)

        assert [0, 0, 0] == world.machine.unpoison_memory(pfns).tolist()

        assert free + 2 == world.machine.nr_free_pages
        assert 0 == world.machine.mem.num_poisoned_pages
        world.machine.verify()

    def test_held(self):
        """Not while somebody holds one."""
        world = mapped_range(1)
        pin, pfns = world.pin(0), world.pfns()
        fails(world, 0)

        assert [BUSY] == world.machine.unpoison_memory(pfns).tolist()
        pin.release()
        assert [0] == world.machine.unpoison_memory(pfns).tolist()


class TestMadvise:
    def test_hwpoison(self):
        """The frames behind a range fail."""
        world = mapped_range(3)
        world.process.madvise(world.addr, 2 * PAGE_SIZE, "hwpoison")

        assert [True, True, False] == lost(world)

    def test_soft_offline(self):
        """The frames behind a range go out of use, and the contents stay."""
        world = mapped_range(3)
        old = world.pfns()
        world.process.madvise(world.addr, 2 * PAGE_SIZE, "soft_offline")

        assert [True, True, False] == retired(world, old)
        assert world.intact()

    def test_pinned_page(self):
        """What cannot be done raises, and says where."""
        world = mapped_range(2)
        world.pin(1)

        with pytest.raises(InputOutputError, match=f"at {world.at(1):#x}"):
            world.process.madvise(world.addr, world.nbytes, "soft_offline")
        with pytest.raises(Busy, match=f"at {world.at(1):#x}"):
            world.process.madvise(world.addr, world.nbytes, "hwpoison")
        assert [True, True] == lost(world)

    def test_nothing_touched(self):
        """The zero page is everybody's."""
        world = mapped_range(1, filled=False)

        with pytest.raises(Busy):
            world.process.madvise(world.addr, world.nbytes, "hwpoison")
        assert not pte_none(world.ptes()).any()


class TestEvent:
    def test_fields(self):
        """It names frames and answers."""
        world = mapped_range(1)
        seen = []
        with trace.listen(lambda event, fields: seen.append((event, fields)), "memory_failure_*"):
            fails(world, 0)

        assert [("memory_failure_event", [0])] == [(e, f["status"].tolist()) for e, f in seen]
