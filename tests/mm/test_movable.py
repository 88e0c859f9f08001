"""Pages of drivers that others move: a balloon's, by themselves and among those of processes."""

import errno
import threading

import numpy as np
import pytest

from mm.errors import Deadlock, InvalidArgument, KernelBug
from mm.filemap import lock_page, unlock_page
from mm.fs import alloc_anon_inode, iput
from mm.memory_failure import page_handle_poison
from mm.migrate import (
    alloc_migration_target,
    migrate_page_add,
    migrate_pages,
    putback_movable_pages,
)
from mm.movable import (
    clear_page_movable,
    isolate_movable_page,
    move_movable_page,
    page_has_driver,
    page_isolated,
    putback_movable_page,
    set_page_movable,
)
from mm.page_cache import page_in_cache
from mm.page_flags import PG_hwpoison, PG_lru
from mm.swap import lru_add_drain_all
from mm.types import AddressSpaceOperations, page_anon, page_mapping, page_movable
from mm.typing import PAGE_SIZE, pages
from tests.balloon import Balloon
from tests.files import mapped_file
from tests.interleave import explore
from tests.world import SOMEBODY_ELSE, World, mapped_range

AGAIN, BUSY, EIO = -errno.EAGAIN, -errno.EBUSY, -errno.EIO


@pytest.fixture
def world():
    """Two pages of a process, on two nodes' machine, beside the balloon."""
    return mapped_range(pages=2, nodes=("16MiB", "16MiB"))


@pytest.fixture
def mem(world):
    return world.machine.mem


@pytest.fixture
def balloon(world):
    """Four frames that a driver has."""
    balloon = Balloon(world.machine, 4)
    world.machine.verify()
    yield balloon
    balloon.close()


def isolated(balloon, *places):
    """The frames at *places*, all by default, taken from the driver."""
    pfns = balloon.pfns[list(places)] if places else balloon.pfns.copy()
    assert isolate_movable_page(balloon.mem, pfns).all()
    return pfns


def to_node_1(balloon, *places):
    """What migrate_pages() says about moving the frames at *places* to node 1."""
    mem = balloon.mem
    return migrate_pages(mem, isolated(balloon, *places), alloc_migration_target(mem, 1)).tolist()


def nodes(balloon):
    return balloon.mem.page_to_nid(balloon.pfns).tolist()


def world_nodes(world):
    return world.machine.mem.page_to_nid(world.pfns()).tolist()


def somebody_locks(mem, pfns):
    lock_page(mem, pfns)
    mem.lock_owner[pfns] = SOMEBODY_ELSE


class TestSetPageMovable:
    def test_page_says_whose_it_is(self, mem, balloon):
        """It leads to the driver's mapping, and is neither anonymous nor in a page cache."""
        pfns = balloon.pfns

        assert page_movable(mem, pfns).all()
        assert page_has_driver(mem, pfns).all()
        assert not (page_anon(mem, pfns) | page_in_cache(mem, pfns)).any()
        assert balloon.inode.i_mapping is page_mapping(mem, pfns.item(0))

    def test_others(self, world, mem, balloon):
        """Pages of processes, free ones and the kernel's are no driver's."""
        others = pages(*world.pfns().tolist(), mem.max_pfn - 1, mem.zero_pfn)

        assert not page_movable(mem, others).any()

    def test_unlocked(self, mem, balloon):
        """Who does not hold the page lock is told so."""
        with pytest.raises(KernelBug, match="not locked"):
            set_page_movable(mem, balloon.pfns, balloon.inode.i_mapping)
        with pytest.raises(KernelBug, match="not locked"):
            clear_page_movable(mem, balloon.pfns)

    def test_driver_without_callbacks(self, mem, balloon):
        """A mapping that cannot move pages is no place for them."""
        inode = alloc_anon_inode(mem, AddressSpaceOperations())
        lock_page(mem, balloon.pfns)

        with pytest.raises(InvalidArgument, match="isolate_page, migratepage and putback_page"):
            set_page_movable(mem, balloon.pfns, inode.i_mapping)

        unlock_page(mem, balloon.pfns)
        iput(inode)


class TestClearPageMovable:
    def test_nothing_leads_to_the_driver(self, mem, balloon):
        """What is left says that it once was a driver's."""
        pfns = isolated(balloon, 1)
        balloon.release(1)

        assert page_movable(mem, pfns).all()
        assert not page_has_driver(mem, pfns).any()
        assert page_mapping(mem, pfns.item()) is None
        putback_movable_pages(mem, pfns)

    def test_page_of_a_process(self, world, mem):
        """Which no driver ever had."""
        pfns = world.pfns()
        lock_page(mem, pfns)

        with pytest.raises(KernelBug, match="never was"):
            clear_page_movable(mem, pfns)

        unlock_page(mem, pfns)


class TestIsolateMovablePage:
    def test_taken(self, mem, balloon):
        """The driver has put them aside; they have one more reference, and nobody's lock."""
        pfns = balloon.pfns[[2, 0]]

        assert isolate_movable_page(mem, pfns).all()

        assert [("isolate", [2, 0])] == balloon.calls
        assert page_isolated(mem, balloon.pfns).tolist() == [True, False, True, False]
        assert [2, 1, 2, 1] == mem.refcount[balloon.pfns].tolist()
        assert not mem.lock_owner[balloon.pfns].any()
        putback_movable_pages(mem, pfns)

    def test_once(self, mem, balloon):
        """What somebody moves already stays his; the driver is not asked again."""
        pfns = isolated(balloon, 0)

        assert [False, True] == isolate_movable_page(mem, balloon.pfns[:2]).tolist()

        assert [("isolate", [0]), ("isolate", [1])] == balloon.calls
        assert [2, 2] == mem.refcount[balloon.pfns[:2]].tolist()
        putback_movable_pages(mem, balloon.pfns[:2])
        assert 1 == mem.refcount[pfns].item()

    def test_locked(self, mem, balloon):
        """What somebody has locked stays: the driver may be about to let go of it."""
        somebody_locks(mem, balloon.pfns[1:2])

        assert [False] == isolate_movable_page(mem, balloon.pfns[1:2]).tolist()

        unlock_page(mem, balloon.pfns[1:2])
        assert [] == balloon.calls

    def test_no_drivers_pages(self, world, mem, balloon):
        """Of others nothing changes, nor is their lock tried."""
        free = mem.max_pfn - 1
        others = pages(*world.pfns().tolist(), free, mem.zero_pfn)
        before = mem.refcount[others].tolist()
        lock_page(mem, world.pfns())

        assert not isolate_movable_page(mem, others).any()

        assert before == mem.refcount[others].tolist()
        unlock_page(mem, world.pfns())

    def test_driver_refuses(self, mem, balloon):
        """It parts with those that it does not need."""
        balloon.refuses = {1, 3}

        taken = isolate_movable_page(mem, balloon.pfns)

        assert [True, False, True, False] == taken.tolist()
        assert [2, 1, 2, 1] == mem.refcount[balloon.pfns].tolist()
        putback_movable_pages(mem, balloon.pfns[taken])

    def test_two_drivers(self, world, mem, balloon):
        """Each is asked once, for its own."""
        other = Balloon(world.machine, 2)
        mixed = pages(balloon.pfns[0], other.pfns[1], balloon.pfns[3], other.pfns[0])

        assert isolate_movable_page(mem, mixed).all()

        assert ([("isolate", [0, 3])], [("isolate", [1, 0])]) == (balloon.calls, other.calls)
        putback_movable_pages(mem, mixed)
        assert not balloon.aside.any()
        assert not other.aside.any()
        other.close()

    def test_driver_raises(self, world, mem, balloon):
        """Then no driver has parted with anything."""
        other = Balloon(world.machine, 2)
        other.pfns[0], wrong = 0, other.pfns[0]  # trips over its own accounts

        with pytest.raises(AssertionError):
            isolate_movable_page(mem, np.concatenate([balloon.pfns, other.pfns[1:], pages(wrong)]))

        other.pfns[0] = wrong
        other.aside[:] = False
        assert ["isolate", "putback"] == [name for name, _ in balloon.calls]
        world.machine.verify()
        other.close()


class TestPutbackMovablePage:
    def test_as_before(self, world, mem, balloon):
        """The driver has them again."""
        putback_movable_pages(mem, isolated(balloon, 1, 2))

        assert [("isolate", [1, 2]), ("putback", [1, 2])] == balloon.calls
        world.machine.verify()

    def test_mixed_with_others(self, world, mem, balloon):
        """Pages of processes go back to their lists, and only they were counted as isolated."""
        lru_add_drain_all(mem)
        with world.machine.vmstat.counting() as delta:
            assert migrate_page_add(mem, world.pfns()).all()
            mixed = np.concatenate([world.pfns()[:1], isolated(balloon, 0), world.pfns()[1:]])
            assert 2 == mem.vmstat["nr_isolated_anon"]
            putback_movable_pages(mem, mixed)

        assert {} == delta
        world.machine.verify()

    def test_driver_has_let_go(self, world, mem, balloon):
        """A frame that nobody has any more is free; the driver does not hear of it again."""
        pfns = isolated(balloon, 0, 1)
        balloon.release(1)

        putback_movable_pages(mem, pfns)

        assert [("isolate", [0, 1]), ("putback", [0])] == balloon.calls
        assert [1, 0] == mem.refcount[pfns].tolist()
        world.machine.verify()

    def test_what_is_not_so(self, mem, balloon):
        """It is for locked pages that are isolated."""
        with pytest.raises(KernelBug, match="not locked"):
            putback_movable_page(mem, balloon.pfns)
        lock_page(mem, balloon.pfns)
        with pytest.raises(KernelBug, match="not isolated"):
            putback_movable_page(mem, balloon.pfns)
        with pytest.raises(KernelBug, match="not isolated"):
            move_movable_page(mem, balloon.pfns, balloon.pfns)
        unlock_page(mem, balloon.pfns)


class TestMigratePages:
    def test_contents_move(self, world, mem, balloon):
        """Other frames have them, with one reference; the old ones are free."""
        old = balloon.pfns.copy()

        with world.machine.vmstat.counting("pgmigrate_success", "nr_isolated_anon") as delta:
            assert [0] * 4 == to_node_1(balloon)

        assert [1] * 4 == nodes(balloon)
        assert balloon.intact()
        assert [1] * 4 == mem.refcount[balloon.pfns].tolist()
        assert not (mem.flags[balloon.pfns] & PG_lru).any()
        assert not mem.refcount[old].any()
        assert {"pgmigrate_success": 4, "nr_isolated_anon": 0} == delta
        world.machine.verify()

    def test_among_pages_of_processes_and_files(self):
        """One call moves them all, each in its way, and counts those of LRU lists as isolated."""
        files = mapped_file(pages=2, nodes=("16MiB", "16MiB"))
        mem, balloon = files.machine.mem, Balloon(files.machine, 2)
        anon = World(files.machine, files.process, files.gpu, files.process.mmap(PAGE_SIZE), 1, 0)
        anon.fill()
        lru_add_drain_all(mem)
        listed = np.concatenate([files.pfns(), anon.pfns()])
        with files.machine.vmstat.counting("nr_isolated_anon", "pgmigrate_success") as delta:
            assert migrate_page_add(mem, listed).all()
            mixed = np.insert(listed, [1, 3], isolated(balloon))

            assert [0] * 5 == migrate_pages(mem, mixed, alloc_migration_target(mem, 1)).tolist()

        assert {"nr_isolated_anon": 0, "pgmigrate_success": 5} == delta
        assert [[1, 1], [1, 1], [1]] == [nodes(balloon), *map(world_nodes, (files, anon))]
        assert files.intact()
        assert anon.intact()
        assert balloon.intact()
        files.machine.verify()
        balloon.close()

    def test_driver_is_busy_for_a_while(self, balloon):
        """It is asked again for those that it could not move, up to ten times in all."""
        balloon.answers = {1: [AGAIN] * 10, 2: [AGAIN] * 9}

        assert [0, AGAIN, 0, 0] == to_node_1(balloon)

        asked = [places for name, places in balloon.calls if name == "migrate"]
        assert [[0, 1, 2, 3]] + [[1, 2]] * 9 == asked
        assert ("putback", [1]) == balloon.calls[-1]
        assert ([1, 0, 1, 1], True) == (nodes(balloon), balloon.intact())

    def test_driver_cannot(self, world, balloon):
        """Any other answer stands at once; the page is counted as failed."""
        balloon.answers = {3: [-errno.EPERM]}

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            assert [0, 0, 0, -errno.EPERM] == to_node_1(balloon)

        assert ["isolate", "migrate", "putback"] == [name for name, _ in balloon.calls]
        assert {"pgmigrate_success": 3, "pgmigrate_fail": 1} == delta
        assert not balloon.aside.any()
        world.machine.verify()

    def test_driver_lets_go_before(self, world, mem, balloon):
        """A frame that nobody needs any more is freed in place of a move, and the new one too."""
        pfns, free = isolated(balloon, 0, 1), world.machine.nr_free_pages
        balloon.release(0)

        assert [0, 0] == migrate_pages(mem, pfns, alloc_migration_target(mem, 1)).tolist()

        assert [("isolate", [0, 1]), ("migrate", [1])] == balloon.calls
        assert not mem.refcount[pfns].any()
        assert free + 1 == world.machine.nr_free_pages
        world.machine.verify()

    def test_driver_lets_go_between_two_attempts(self, world, balloon):
        """It may have been too busy to move it, and then not need it any more."""
        balloon.answers = {2: [AGAIN] * 2}
        asked = []

        def get_new_pages(pfns):
            asked.append(pfns.size)
            if len(asked) == 3:
                unlock_page(balloon.mem, pfns)
                balloon.release(2)
                lock_page(balloon.mem, pfns)
            return alloc_migration_target(balloon.mem, 1)(pfns)

        assert [0] == migrate_pages(balloon.mem, isolated(balloon, 2), get_new_pages).tolist()

        assert [1, 1, 1] == asked
        assert 0 == balloon.pfns[2]
        world.machine.verify()

    def test_frames_run_out(self, world, mem, balloon):
        """Those that got none are with their driver again."""
        get_new_pages = alloc_migration_target(mem, 1)

        status = migrate_pages(mem, isolated(balloon), lambda old: get_new_pages(old[:1]))

        assert [0, -errno.ENOMEM, -errno.ENOMEM, -errno.ENOMEM] == status.tolist()
        assert ("putback", [1, 2, 3]) == balloon.calls[-1]
        world.machine.verify()

    def test_lock_that_somebody_else_has(self, mem, balloon):
        """It is waited for."""
        pfns = isolated(balloon)
        somebody_locks(mem, pfns[:1])
        timer = threading.Timer(0.02, unlock_page, (mem, pfns[:1]))
        timer.start()

        assert [0] * 4 == migrate_pages(mem, pfns, alloc_migration_target(mem, 1)).tolist()

        timer.join()
        assert balloon.intact()

    def test_own_lock(self, world, mem, balloon):
        """Who would wait for itself is told so, and the driver has the page again."""
        pfns = isolated(balloon)
        lock_page(mem, pfns[1:2])

        with pytest.raises(Deadlock):
            migrate_pages(mem, pfns, alloc_migration_target(mem, 1))

        unlock_page(mem, pfns[1:2])
        assert ("putback", [1]) == balloon.calls[-1]
        assert [1, 0, 1, 1] == nodes(balloon)
        world.machine.verify()

    def test_driver_raises(self, world, mem, balloon):
        """What has not moved by then is back where it was; the error is the caller's."""
        other = Balloon(world.machine, 2)
        other.breaks = ZeroDivisionError()
        lru_add_drain_all(mem)
        assert migrate_page_add(mem, world.pfns()).all()
        mixed = np.concatenate([world.pfns(), isolated(balloon), isolated(other)])

        with pytest.raises(ZeroDivisionError):
            migrate_pages(mem, mixed, alloc_migration_target(mem, 1))

        assert world.intact()
        assert balloon.intact()
        assert ("putback", [0, 1]) == other.calls[-1]
        assert not mem.lock_owner[mixed].any()
        other.close()
        world.machine.verify()

    def test_without_contents(self):
        """A machine that keeps no bytes moves them all the same."""
        world = mapped_range(1, nodes=("16MiB", "16MiB"), payload=False)
        balloon = Balloon(world.machine, 3)

        assert [0] * 3 == to_node_1(balloon)

        balloon.close()


class TestSoftOffline:
    def test_contents_move(self, world, mem, balloon):
        """Another frame has them; the old one goes out of use."""
        old = balloon.pfns.copy()

        assert [0] * 3 == world.machine.soft_offline_page(
            [old[0], world.pfns()[0], old[2]]
        ).tolist()

        assert (mem.flags[old[[0, 2]]] & PG_hwpoison).all()
        assert 3 == mem.num_poisoned_pages
        assert [False, True, False, True] == (old == balloon.pfns).tolist()
        assert balloon.intact()
        assert world.intact()
        world.machine.verify()

    def test_driver_will_not(self, world, balloon):
        """EBUSY where it does not part with the page, EIO where it could not move it."""
        balloon.refuses, balloon.answers = {0}, {1: [AGAIN] * 10, 2: [-errno.EPERM]}
        old = balloon.pfns.copy()

        assert [BUSY, EIO, EIO, 0] == world.machine.soft_offline_page(old).tolist()

        assert [True, True, True, False] == (old == balloon.pfns).tolist()
        assert 1 == world.machine.mem.num_poisoned_pages
        world.machine.verify()

    def test_driver_lets_go(self, world, mem, balloon):
        """A frame that it does not need when its turn comes goes out of use as well."""
        pfns = isolated(balloon, 0, 1)
        balloon.release(1)

        get_new_pages = alloc_migration_target(mem, 0)
        assert [0, 0] == migrate_pages(mem, pfns, get_new_pages, page_handle_poison).tolist()

        assert (mem.flags[pfns] & PG_hwpoison).all()
        assert [1, 1] == mem.refcount[pfns].tolist()
        world.machine.verify()

    def test_memory_failure(self, world, balloon):
        """What is lost is the driver's to judge: the page stays."""
        assert [BUSY] * 4 == world.machine.memory_failure(balloon.pfns).tolist()

        assert balloon.intact()
        world.machine.verify()


class TestRaces:
    def test_moved_and_let_go(self):
        """Whenever the driver lets go of a page that is moved, it is moved, or free, once."""

        def scenario(together):
            world = mapped_range(1, nodes=("2MiB", "2MiB"))
            balloon = Balloon(world.machine, 2)
            mem = world.machine.mem

            def move():
                pfns = balloon.pfns[balloon.pfns > 0]
                pfns = pfns[isolate_movable_page(mem, pfns)]
                migrate_pages(mem, pfns, alloc_migration_target(mem, 1))

            together(move, lambda: balloon.release(0))

            assert 0 == balloon.pfns[0] < balloon.pfns[1]
            assert balloon.intact()
            world.machine.verify()
            balloon.close()

        assert 10 < explore(scenario, preemptions=2)

    def test_two_who_move(self):
        """Each page is moved by one of them, or by one after the other."""

        def scenario(together):
            world = mapped_range(1, nodes=("2MiB", "2MiB"))
            balloon = Balloon(world.machine, 2)
            mem = world.machine.mem

            def move():
                pfns = balloon.pfns.copy()
                pfns = pfns[isolate_movable_page(mem, pfns)]
                return migrate_pages(mem, pfns, alloc_migration_target(mem, 1)).tolist()

            together(move, lambda: world.machine.soft_offline_page(balloon.pfns.copy()))

            assert balloon.intact()
            world.machine.verify()
            balloon.close()

        assert 10 < explore(scenario, preemptions=1)
