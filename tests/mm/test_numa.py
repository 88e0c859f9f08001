"""move_pages(): what a real kernel answered, and one entry after another beside it."""

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import InvalidArgument, NoSuchNode, OutOfMemory
from mm.errors import Deadlock
from mm.filemap import lock_page, trylock_page, unlock_page
from mm.mempolicy import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT
from mm.mmu_notifier import mmu_notifier_register
from mm.numa import do_pages_stat, kernel_move_pages
from mm.typing import PAGE_SIZE
from tests.reference.move_pages import UNSET, MovePages, Page
from tests.world import mapped_range

ENOENT, EFAULT, EACCES, EBUSY = -errno.ENOENT, -errno.EFAULT, -errno.EACCES, -errno.EBUSY
TWO_NODES = ("16MiB", "16MiB")


def two_nodes(pages=8, **how):
    return mapped_range(pages=pages, **{"nodes": TWO_NODES} | how)


def touched(pages, of):
    """The first *pages* of *of* pages are touched, as in the recorded script."""
    world = two_nodes(of, filled=False)
    world.process.touch(world.addr, pages * PAGE_SIZE)
    return world


def move(world, entries, flags=MPOL_MF_MOVE):
    """(return value, status words) for *entries*, pairs of page and node."""
    addrs = np.array([world.at(page) for page, _ in entries], dtype=np.int64)
    nodes = np.array([node for _, node in entries], dtype=np.int64)
    status = np.full(addrs.size, UNSET, dtype=np.int32)
    ret, words = kernel_move_pages(world.process.mm, addrs, nodes, flags, status)
    return ret, words.tolist()


def where(world, pages=None):
    """What move_pages() says about the first *pages*, without nodes."""
    addrs = world.addr + np.arange(world.pages if pages is None else pages) * PAGE_SIZE
    return world.process.move_pages(addrs).tolist()


class Locking:
    """Locks *pfns* when anything is invalidated, as a driver may that is about to use them."""

    def __init__(self, mem, pfns):
        self.mem, self.pfns = mem, pfns

    def invalidate_range_start(self, invalid):
        trylock_page(self.mem, self.pfns)

    def invalidate_range_end(self, invalid):
        """It keeps the lock."""


class TestQuery:
    def test_each_kind_of_page(self):
        """Holes and device pages are not there; the zero page and no VMA are faults."""
        world = touched(2, of=5)
        world.process.touch(world.at(3), PAGE_SIZE, write=False)
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)

        assert [0, ENOENT, ENOENT, EFAULT, ENOENT, EFAULT, EFAULT] == where(world, 7)

    def test_addresses_inside_pages_in_any_order(self):
        """An address stands for the page that it lies in."""
        world = two_nodes(4)
        world.process.move_pages(world.addrs[2:], 1)
        addrs = world.addr + np.array([0x3FFF, 0x0FFF, 0x2001, 0x1000, 0x4000])

        assert [1, 0, 1, 0, EFAULT] == do_pages_stat(world.process.mm, addrs).tolist()

    def test_addresses_that_nothing_can_have(self):
        """They are faults like any other."""
        world = two_nodes(1)

        assert [EFAULT] * 3 == world.process.move_pages([0, -PAGE_SIZE, 1 << 62]).tolist()
        assert [] == world.process.move_pages([]).tolist()

    def test_several_areas(self):
        """Each address is looked for in its own VMA."""
        world = two_nodes(2)
        other = world.process.mmap(PAGE_SIZE)
        world.process.munmap(other, PAGE_SIZE)
        far = world.process.mmap(PAGE_SIZE, addr=1 << 40)
        world.process.touch(far, PAGE_SIZE)

        assert [0, EFAULT, 0] == world.process.move_pages([far, other, world.addr]).tolist()


class TestRecorded:
    """What Linux 6.12 answered, line by line."""

    def test_holes_and_the_end_of_the_mapping(self):
        """The pages that are there move; each of the others says why not."""
        world = touched(6, of=8)

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            answer = move(world, [(page, 1) for page in range(10)])

        assert (0, [1] * 6 + [ENOENT] * 2 + [EFAULT] * 2) == answer
        assert {"pgmigrate_success": 6, "pgmigrate_fail": 0} == delta

    def test_nodes_by_turns(self):
        """Pages that are on their node already are left alone."""
        world = touched(6, of=8)

        with world.machine.vmstat.counting("pgmigrate_success") as delta:
            assert (0, [0, 1, 0, 1, 0, 1]) == move(world, [(p, p & 1) for p in range(6)])

        assert [0, 1, 0, 1, 0, 1] == where(world, 6)
        assert {"pgmigrate_success": 3} == delta

    @pytest.mark.parametrize("node", [5, -1, 2])
    def test_node_that_there_is_not(self, node):
        """Nothing is done and nothing answered."""
        world = touched(6, of=8)

        assert (-errno.ENODEV, [UNSET] * 6) == move(world, [(p, node) for p in range(6)])
        assert [0] * 6 == where(world, 6)

    def test_entries_before_such_a_node_are_done(self):
        """The call stops there."""
        world = touched(6, of=8)
        world.process.move_pages(world.addrs[:1], 1)

        with world.machine.vmstat.counting("pgmigrate_success") as delta:
            assert (-errno.ENODEV, [0, UNSET, UNSET]) == move(world, [(0, 0), (1, 7), (2, 1)])

        assert {"pgmigrate_success": 1} == delta
        assert [0, 0, 0] == where(world, 3)

    def test_list_in_any_order(self):
        """Holes and what is not mapped may stand between pages and nodes."""
        world = touched(6, of=8)

        answer = move(world, [(0, 1), (1, 1), (7, 1), (2, 0), (9, 1), (3, 1)])

        assert (0, [1, 1, ENOENT, 0, EFAULT, 1]) == answer

    def test_flags(self):
        """No flag is as MOVE; one that there is not is refused before anything is done."""
        world = touched(6, of=8)

        with pytest.raises(InvalidArgument, match="flags 0x1"):
            move(world, [(0, 1)], MPOL_MF_STRICT)
        assert (0, [1]) == move(world, [(0, 1)], 0)

    def test_device_pages_stay_away(self):
        """They are not there, wherever they shall go; their neighbours move."""
        world = touched(6, of=8)
        world.gpu.to_device(world.process, world.addr, 3 * PAGE_SIZE)

        assert (0, [ENOENT] * 3 + [1] * 3) == move(world, [(p, 1) for p in range(6)])
        assert [True] * 3 + [False] * 5 == world.on_device()

    def test_pages_of_two_processes(self):
        """They move with MOVE_ALL only, and then for both."""
        world = touched(3, of=3)
        world.process.write(world.at(1), b"both")
        child = world.fork(0, 1, 2)

        assert (0, [EACCES] * 3) == move(world, [(p, 1) for p in range(3)])
        assert (0, [1] * 3) == move(world, [(p, 1) for p in range(3)], MPOL_MF_MOVE_ALL)

        assert [1] * 3 == child.move_pages(world.addrs).tolist()
        assert b"both" == child.read(world.at(1), 4) == world.process.read(world.at(1), 4)

    def test_pinned_pages(self):
        """The call gives up at the run that they are in: two did not move, three were not tried."""
        world = two_nodes(8)
        world.gpu.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        world.gpu.to_device(world.process, world.at(4), 4 * PAGE_SIZE)
        world.pin(2)
        world.pin(3)

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            answer = move(world, [(page, 1) for page in range(8)])

        assert (5, [ENOENT] * 2 + [UNSET] * 2 + [ENOENT] + [UNSET] * 3) == answer
        assert {"pgmigrate_success": 0, "pgmigrate_fail": 2} == delta
        assert [0, 1, 2, 3, 4, 5, 6, 7] == world.contents()

    def test_same_page_again_in_a_run(self):
        """It is taken already: EBUSY; a third time finds it where it should be."""
        world = two_nodes(1)

        assert (0, [1, EBUSY, 1]) == move(world, [(0, 1)] * 3)


class TestRaces:
    def test_page_that_somebody_else_isolates(self):
        """It is on no list: EBUSY, and the rest moves."""
        world = two_nodes(3)
        world.isolate(1)

        assert (0, [1, EBUSY, 1]) == move(world, [(p, 1) for p in range(3)])

    def test_locked_by_the_caller(self):
        """Who has the page locked is told so; it and the pages after it are put back."""
        world = two_nodes(4)
        mem, pfns = world.machine.mem, world.pfns()[1:2]
        world.process.move_pages(world.addrs[3:], 1)
        lock_page(mem, pfns)

        counting = world.machine.vmstat.counting("pgmigrate_success", "nr_isolated_anon")
        with counting as delta, pytest.raises(Deadlock):
            world.process.move_pages(world.addrs, [1, 1, 1, 0])

        unlock_page(mem, pfns)
        assert {"pgmigrate_success": 2, "nr_isolated_anon": 0} == delta
        assert [1, 0, 1, 1] == where(world)
        assert (0, [1, 1, 1, 0]) == move(world, [(0, 1), (1, 1), (2, 1), (3, 0)])

    def test_locked_by_the_caller_in_the_middle(self):
        """Pages for nodes whose turn has not come are put back as well."""
        world = two_nodes(4, nodes=("4MiB",) * 4)
        mem, pfns = world.machine.mem, world.pfns()
        mmu_notifier_register(Locking(mem, pfns[1:2]), world.process.mm)

        with pytest.raises(Deadlock):
            world.process.move_pages(world.addrs, [1, 2, 3, 0])

        world.process.mm.notifiers.clear()
        unlock_page(mem, pfns[1:2])
        assert [1, 0, 0, 0] == where(world)
        assert [3, 3, 3, 3] == world.process.move_pages(world.addrs, 3).tolist()


class TestMemoryShort:
    def test_node_is_full(self):
        """-ENOMEM: what found room has moved, and no word of the run is written."""
        world = two_nodes(400, nodes=("16MiB", "1MiB"), filled=False)
        world.fill()

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            ret, status = move(world, [(page, 1) for page in range(400)])

        assert (-errno.ENOMEM, [UNSET] * 400) == (ret, status)
        assert where(world).count(1) == delta["pgmigrate_success"] > 0
        assert 1 == delta["pgmigrate_fail"]
        assert world.intact()

    def test_process_is_told(self):
        """The error says that there is no room."""
        world = two_nodes(400, nodes=("16MiB", "1MiB"))

        with pytest.raises(OutOfMemory, match="no room left"):
            world.process.move_pages(world.addrs, 1)


class TestProcess:
    def test_one_node_for_all(self):
        """A single number is the node of each address."""
        world = two_nodes(3)

        assert [1, 1, 1] == world.process.move_pages(world.addrs, 1).tolist()

    def test_pages_that_could_not_be_moved(self):
        """-EAGAIN stands where the system call leaves its word alone."""
        world = two_nodes(3)
        world.pin(1)

        assert [-errno.EAGAIN] * 3 == world.process.move_pages(world.addrs, 1).tolist()
        assert [1, 0, 1] == where(world)

    def test_unknown_node(self):
        """The error names those that there are."""
        world = two_nodes(2)

        with pytest.raises(NoSuchNode, match=r"the machine has 0\.\.1"):
            world.process.move_pages(world.addrs, [1, 2])

        assert [1, 0] == where(world)

    @pytest.mark.parametrize(
        ("addrs", "nodes", "complaint"),
        [
            ([0, 4096], [0, 1, 0], "3 nodes for 2 addrs; give each one, or all one"),
            ([0, 4096], [], "0 nodes for 2 addrs"),
            ([0.5], None, r"addrs are whole numbers, got \[0.5\]"),
            ([1 << 64], None, "addrs are whole numbers"),
            ([0], ["1"], r"nodes are whole numbers, got \['1'\]"),
        ],
    )
    def test_what_is_no_list(self, addrs, nodes, complaint):
        """The message says what was given and what can be."""
        with pytest.raises(InvalidArgument, match=complaint):
            two_nodes(1).process.move_pages(addrs, nodes)

    def test_unknown_flag(self):
        """The error names those that there are."""
        with pytest.raises(InvalidArgument, match=r"'strict' are not among move\|moveall"):
            two_nodes(1).process.move_pages([0], 1, "strict")


KINDS = ("here", "there", "shared", "pinned", "zero", "device", "hole")
entries = st.lists(
    st.tuples(st.integers(0, len(KINDS) + 3), st.sampled_from([0, 1, 1, 1, 2])), max_size=12
)


class TestOneAfterAnother:
    @given(kinds=st.permutations([*KINDS, "here", "here"]), entries=entries, everyone=st.booleans())
    def test_any_list(self, kinds, entries, everyone):
        """Answers, places and counters are those of the page-at-a-time twin."""
        world = two_nodes(len(kinds), filled=False)
        twin = MovePages({}, nodes=2, migrate_all=everyone)
        for number, kind in enumerate(kinds):
            twin.pages[number] = make(world, number, kind)
        flags = MPOL_MF_MOVE_ALL if everyone else MPOL_MF_MOVE

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            answer = move(world, entries, flags)

        assert (twin.run(entries), twin.status) == answer
        assert {"pgmigrate_success": twin.succeeded, "pgmigrate_fail": twin.failed} == delta
        for number, page in twin.pages.items():
            if page.kind == "page":
                assert page.node == where(world)[number]
                assert number == world.process.read(world.at(number), 1)[0]


def make(world, number, kind):
    """Let *number* of *world* be a page of *kind*, and the twin's view of it."""
    if kind == "hole":
        return Page("hole")
    if kind == "zero":
        world.process.touch(world.at(number), 1, write=False)
        return Page("zero")
    world.process.write(world.at(number), bytes([number]))
    if kind == "device":
        world.gpu.to_device(world.process, world.at(number), PAGE_SIZE)
        return Page("device")
    if kind == "there":
        world.process.move_pages([world.at(number)], 1)
    if kind == "shared":
        world.fork(number)
    if kind == "pinned":
        world.pin(number)
    mapcount = 2 if kind == "shared" else 1
    return Page("page", int(kind == "there"), mapcount, pinned=kind == "pinned")
