"""Policies of ranges and tasks, and what is moved for them: recorded answers, and a twin."""

import errno
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import InvalidArgument, InvalidRange, Misplaced, OutOfMemory, SegmentationFault
from mm.mbind import do_mbind, kernel_migrate_pages
from mm.mempolicy import MPOL_MF_MOVE, MPOL_MF_STRICT, Mempolicy, Mpol
from mm.typing import PAGE_SIZE
from tests.world import mapped_range

TWO_NODES = ("16MiB", "16MiB")
ENOENT = -errno.ENOENT
BIND_0, BIND_1 = Mempolicy(Mpol.BIND, (0,)), Mempolicy(Mpol.BIND, (1,))


def two_nodes(pages=8, **how):
    return mapped_range(pages=pages, **{"nodes": TWO_NODES} | how)


def bind(world, first, pages, *how):
    """mbind() of *pages* pages from *first* on."""
    world.process.mbind(world.at(first), pages * PAGE_SIZE, *how)


def where(world):
    return world.process.move_pages(world.addrs).tolist()


def policies(world):
    """(first page, pages, nodes) of every VMA of the process, nodes None where it has no policy."""
    return [
        (
            (vma.vm_start - world.addr) // PAGE_SIZE,
            (vma.vm_end - vma.vm_start) // PAGE_SIZE,
            vma.vm_policy and vma.vm_policy.nodes,
        )
        for vma in world.process.mm.vmas
    ]


class TestRecorded:
    """What Linux 6.12 answered to one script, in its order."""

    def test_first_touch(self):
        """New pages come from the nodes of the range, and so do those that a device gives back."""
        world = two_nodes(filled=False)
        bind(world, 0, 8, "bind", [1])
        world.fill()
        assert [1] * 8 == where(world)

        world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert [ENOENT] * 8 == where(world)
        assert list(range(8)) == world.contents()
        assert [1] * 8 == where(world)

    def test_pages_that_are_there(self):
        """They stay; STRICT complains; MOVE moves them."""
        world = two_nodes()
        world.process.move_pages(world.addrs, 1)
        bind(world, 0, 8, "bind", [0])
        assert [1] * 8 == where(world)

        with pytest.raises(Misplaced, match=r"8 pages of .* are on other nodes"):
            bind(world, 0, 8, "bind", [0], "strict")
        with world.machine.vmstat.counting("pgmigrate_success") as delta:
            bind(world, 0, 8, "bind", [0], "move")

        assert ([0] * 8, {"pgmigrate_success": 8}) == (where(world), delta)
        assert world.intact()

    def test_device_pages(self):
        """They are passed over, and come back by the policy of then."""
        world = two_nodes()
        bind(world, 0, 4, "bind", [1], "move")
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        bind(world, 4, 4, "bind", [1], "move|strict")

        assert [True] * 8 == world.on_device()
        assert list(range(8)) == world.contents()
        assert [1] * 8 == where(world)

    def test_node_that_there_is_not(self):
        """EINVAL where no node is left."""
        with pytest.raises(InvalidArgument, match=r"bind needs a node of 0\.\.1, got \[3\]"):
            bind(two_nodes(), 0, 8, "bind", [3])

    def test_policy_of_the_task(self):
        """It is for ranges without their own; migrate_pages moves both back."""
        world = two_nodes(12, filled=False)
        bind(world, 0, 8, "bind", [1])
        world.process.set_mempolicy("bind", [1])
        world.fill()
        world.process.set_mempolicy("default")
        assert [1] * 12 == where(world)

        assert 0 == world.process.migrate_pages([1], [0])

        assert [0] * 12 == where(world)
        assert world.intact()


class TestMbindRange:
    def test_split(self):
        """A policy for the middle of an area makes three of it."""
        world = two_nodes()

        bind(world, 2, 4, "bind", [1])

        assert [(0, 2, None), (2, 4, (1,)), (6, 2, None)] == policies(world)
        assert world.intact()

    def test_merge(self):
        """Areas that come to agree are one again."""
        world = two_nodes()
        bind(world, 2, 4, "bind", [1])
        bind(world, 0, 2, "bind", [1])
        assert [(0, 6, (1,)), (6, 2, None)] == policies(world)

        bind(world, 0, 8, "default")

        assert [(0, 8, None)] == policies(world)

    def test_over_several_areas(self):
        """Each part takes the policy, and those that have it already are left alone."""
        world = two_nodes()
        bind(world, 1, 2, "bind", [1])
        bind(world, 4, 2, "interleave", [0, 1])

        bind(world, 2, 3, "bind", [1])

        parts = [(0, 1, None), (1, 4, (1,)), (5, 1, (0, 1)), (6, 2, None)]
        assert parts == policies(world)

    def test_same_policy(self):
        """Nothing is split where nothing changes."""
        world = two_nodes()
        bind(world, 0, 8, "bind", [1])
        before = world.vma

        bind(world, 3, 2, "bind", [1])

        assert world.vma is before
        assert [(0, 8, (1,))] == policies(world)

    def test_new_area_beside_it(self):
        """What is mapped beside an area with a policy does not join it."""
        world = two_nodes(4)
        bind(world, 0, 4, "bind", [1])

        world.process.mmap(PAGE_SIZE, addr=world.at(4))

        assert [(0, 4, (1,)), (4, 1, None)] == policies(world)
        world.process.touch(world.at(4), PAGE_SIZE)
        assert [0] == world.process.move_pages([world.at(4)]).tolist()

    def test_unmapping_the_middle(self):
        """Both halves keep the policy."""
        world = two_nodes()
        bind(world, 0, 8, "bind", [1])

        world.process.munmap(world.at(3), PAGE_SIZE)

        assert [(0, 3, (1,)), (4, 4, (1,))] == policies(world)

    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 7), st.integers(1, 8), st.sampled_from([None, 0, 1])).filter(
                lambda change: change[0] + change[1] <= 8
            ),
            max_size=6,
        )
    )
    def test_any_order(self, changes):
        """Each page has the last policy that it was given; areas are as few as they can be."""
        world = two_nodes(8, filled=False)
        twin = [None] * 8
        for first, pages, node in changes:
            twin[first : first + pages] = [node] * pages
            if node is None:
                bind(world, first, pages, "default")
            else:
                bind(world, first, pages, "bind", [node])

        found = policies(world)

        assert twin == [nodes and nodes[0] for _, pages, nodes in found for _ in range(pages)]
        assert all(a[2] != b[2] for a, b in pairwise(found))


class TestQueuePagesRange:
    def holey(self):
        """Pages 0 to 2 and 5 to 7 are mapped."""
        world = two_nodes()
        world.process.munmap(world.at(3), 2 * PAGE_SIZE)
        return world

    @pytest.mark.parametrize(
        ("first", "pages", "gap"), [(1, 6, 3), (3, 3, 3), (6, 4, 8), (4, 1, 4), (9, 2, 9)]
    )
    def test_hole(self, first, pages, gap):
        """Nothing may be missing: EFAULT, with nothing moved and no policy set."""
        world = self.holey()

        with pytest.raises(SegmentationFault) as error:
            bind(world, first, pages, "bind", [1], "move")

        assert world.at(gap) == error.value.address
        assert [None, None] == [nodes for _, _, nodes in policies(world)]
        assert 6 == where(world).count(0)

    def test_default_over_holes(self):
        """To have no policy is possible anywhere, but not where nothing is mapped at all."""
        world = self.holey()
        bind(world, 0, 3, "bind", [1])

        bind(world, 0, 10, "default")

        assert [(0, 3, None), (5, 3, None)] == policies(world)
        with pytest.raises(SegmentationFault, match="nothing is mapped in"):
            bind(world, 3, 2, "default")

    def test_strict_before_a_hole(self):
        """A misplaced page is found before the hole after the next area."""
        world = two_nodes()
        bind(world, 2, 2, "bind", [0])
        world.process.munmap(world.at(6), PAGE_SIZE)

        with pytest.raises(Misplaced):
            bind(world, 0, 8, "bind", [1], "strict")

    def test_where_pages_should_be_is_what_was_named(self):
        """To prefer two nodes leaves pages on either, though new ones come from the first."""
        world = two_nodes(4)
        world.process.move_pages(world.addrs[:2], 1)

        bind(world, 0, 4, "preferred", [0, 1], "move|strict")

        assert [1, 1, 0, 0] == where(world)

    def test_no_flags(self):
        """Pages that cannot move are nobody's business then."""
        world = two_nodes(4)
        world.pin(1)

        bind(world, 0, 4, "bind", [1])

        assert [0] * 4 == where(world)

    def test_zero_page_and_holes(self):
        """There is nothing of the process to move, and nothing to complain of."""
        world = two_nodes(4, filled=False)
        world.process.touch(world.addr, 2 * PAGE_SIZE, write=False)

        bind(world, 0, 4, "bind", [1], "move|strict")

        assert [(0, 4, (1,))] == policies(world)


class TestMove:
    def test_interleave(self):
        """Pages go to the node whose turn it is by their offset."""
        world = two_nodes(6, nodes=("4MiB",) * 3)

        bind(world, 0, 6, "interleave", [1, 2], "move")

        first = world.addr // PAGE_SIZE
        assert [(1, 2)[(first + page) % 2] for page in range(6)] == where(world)
        assert world.intact()

    def test_default(self):
        """Every page is allocated anew, by the policy of the task, wherever it is."""
        world = two_nodes(3)
        world.process.set_mempolicy("bind", [1])
        bind(world, 0, 3, "default", [], "move|strict")
        assert [1, 1, 1] == where(world)
        before = world.pfns().tolist()

        bind(world, 0, 3, "default", [], "move")

        assert set(before).isdisjoint(world.pfns().tolist())
        assert [1, 1, 1] == where(world)

    def test_shared_pages(self):
        """Pages that others map too are left alone, and that is no error; moveall moves them."""
        world = two_nodes(3)
        child = world.fork(1)

        bind(world, 0, 3, "bind", [1], "move|strict")
        assert [1, 0, 1] == where(world)
        bind(world, 0, 3, "bind", [1], "moveall|strict")

        assert [1, 1, 1] == where(world)
        assert [1] == child.move_pages([world.at(1)]).tolist()
        assert world.intact()

    def test_pages_that_cannot_move(self):
        """They stay; with STRICT that is an error, and the policy is set all the same."""
        world = two_nodes(3)
        world.pin(1)

        with pytest.raises(Misplaced, match=r"1 pages of .* cannot be moved to nodes \[1\]"):
            bind(world, 0, 3, "bind", [1], "move|strict")

        assert [1, 0, 1] == where(world)
        assert [(0, 3, (1,))] == policies(world)
        bind(world, 0, 3, "bind", [0], "move")  # without STRICT it is not
        bind(world, 0, 3, "bind", [1], "move")
        assert [1, 0, 1] == where(world)

    def test_pages_that_cannot_be_isolated(self):
        """As those."""
        world = two_nodes(3)
        world.isolate(1)

        bind(world, 0, 3, "bind", [1], "move")
        with pytest.raises(Misplaced, match="1 pages"):
            bind(world, 0, 3, "bind", [1], "move|strict")

        assert [1, 0, 1] == where(world)

    def test_no_room(self):
        """What finds no frame stays, as STRICT says."""
        world = two_nodes(400, nodes=("16MiB", "1MiB"))

        bind(world, 0, 400, "bind", [1], "move")
        with pytest.raises(Misplaced):
            bind(world, 0, 400, "bind", [1], "move|strict")

        assert 0 < where(world).count(1) < 400
        assert world.intact()


class TestArguments:
    def test_nothing(self):
        """No bytes, nothing to do, whatever the policy."""
        world = two_nodes(2)

        bind(world, 0, 0, "bind", [])

        assert [(0, 2, None)] == policies(world)

    def test_length_is_rounded_up(self):
        """Part of a page is a page."""
        world = two_nodes(2)

        world.process.mbind(world.addr, 1, "bind", [1])

        assert [(0, 1, (1,)), (1, 1, None)] == policies(world)

    def test_address_inside_a_page(self):
        """A policy is for whole pages."""
        world = two_nodes(2)

        with pytest.raises(InvalidRange, match="not a multiple of 0x1000"):
            world.process.mbind(world.addr + 1, PAGE_SIZE, "bind", [1])
        with pytest.raises(InvalidArgument, match="negative"):
            world.process.mbind(world.addr, -PAGE_SIZE, "bind", [1])

    def test_flags(self):
        """The message says which there are."""
        with pytest.raises(InvalidArgument, match=r"'lazy' are not among move\|moveall\|strict"):
            bind(two_nodes(1), 0, 1, "bind", [1], "lazy")

    def test_words(self):
        """The system call takes the bits of Linux."""
        world = two_nodes(2)
        flags = MPOL_MF_MOVE | MPOL_MF_STRICT

        do_mbind(world.process.mm, world.addr, PAGE_SIZE, "bind", [1], flags)

        assert [1, 0] == where(world)
        assert [BIND_1, None] == [vma.vm_policy for vma in world.process.mm.vmas]

    def test_set_mempolicy(self):
        """A task's policy is its own; a wrong one leaves the old in place."""
        world = two_nodes(1)
        world.process.set_mempolicy("bind", [0])

        with pytest.raises(InvalidArgument):
            world.process.set_mempolicy("bind", [5])

        assert BIND_0 == world.process.mempolicy
        assert world.machine.spawn("other").mempolicy is None


def moves(old, new):
    """The pairs of do_migrate_pages(), one node after another as its loop has it."""
    left, pairs = set(old), []
    while left:
        source = dest = None
        for node in sorted(left):
            if len(old) != len(new) and node in new:
                continue
            to = sorted(new)[sorted(old).index(node) % len(new)]
            if to == node:
                continue
            source, dest = node, to
            if dest not in left:
                break
        if source is None:
            break
        left.remove(source)
        pairs.append((source, dest))
    return pairs


class TestMigratePages:
    @given(
        at=st.lists(st.integers(0, 3), min_size=8, max_size=8),
        old=st.sets(st.integers(0, 5), min_size=1),
        new=st.sets(st.integers(0, 3), min_size=1),
    )
    def test_from_nodes_to_nodes(self, at, old, new):
        """Each page ends where the moves, one after another, take it."""
        world = two_nodes(8, nodes=("2MiB",) * 4, memory="1MiB")
        world.process.move_pages(world.addrs, at)

        assert 0 == world.process.migrate_pages(sorted(old), sorted(new))

        for source, dest in moves(old, new):
            at = [dest if node == source else node for node in at]
        assert at == where(world)
        assert world.intact()

    def test_who_stays(self):
        """Pinned pages are counted, shared ones move for all, device pages are not looked at."""
        world = two_nodes(5)
        child = world.fork(1)
        world.pin(2)
        world.gpu.to_device(world.process, world.at(3), PAGE_SIZE)

        with world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail") as delta:
            assert 1 == world.process.migrate_pages([0], [1])

        assert [1, 1, 0, ENOENT, 1] == where(world)
        assert [1] == child.move_pages([world.at(1)]).tolist()
        assert {"pgmigrate_success": 3, "pgmigrate_fail": 1} == delta

    def test_several_areas(self):
        """Wherever they are mapped."""
        world = two_nodes(2)
        far = world.process.mmap(PAGE_SIZE, addr=1 << 40)
        world.process.touch(far, PAGE_SIZE)

        world.process.migrate_pages([0], [1])

        assert [1, 1] == where(world)
        assert [1] == world.process.move_pages([far]).tolist()

    @pytest.mark.parametrize("new", [[], [2], [-1]])
    def test_nowhere(self, new):
        """There must be a node to go to."""
        with pytest.raises(InvalidArgument):
            two_nodes(1).process.migrate_pages([0], new)

    def test_nothing_mapped(self):
        """Nothing to do."""
        process = two_nodes(1).machine.spawn("empty")

        assert 0 == process.migrate_pages([0], [1])
        assert 0 == kernel_migrate_pages(process.mm, [7], [1])

    def test_no_room(self):
        """The error says how many pages found none; the others have moved."""
        world = two_nodes(400, nodes=("16MiB", "1MiB"))

        with pytest.raises(OutOfMemory, match=r"node 1 has no room for .* of 400 pages of node 0"):
            world.process.migrate_pages([0], [1])

        assert 0 < where(world).count(1) < 400
        assert world.intact()
        assert np.isin(where(world), [0, 1]).all()
