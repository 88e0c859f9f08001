"""Which node a page comes from: policies of VMAs before those of tasks, and what each does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import InvalidArgument, Machine
from mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from mm.mempolicy import (
    Mempolicy,
    Mpol,
    alloc_pages_current,
    alloc_pages_mpol,
    alloc_pages_vma,
    get_vma_policy,
    mpol_equal,
    mpol_new,
)
from mm.page_alloc import nr_free_pages
from mm.sched import running
from mm.swap import put_page
from mm.typing import PAGE_SIZE
from tests.world import mapped_range

THREE = ("4MiB", "4MiB", "4MiB")


def three_nodes(pages=8, **how):
    return mapped_range(pages=pages, **{"nodes": THREE, "filled": False, "cpus": 3} | how)


def nodes_of(world, pages):
    """The nodes of *pages* pages that are allocated for the range, which are freed again."""
    mem = world.machine.mem
    with running(world.process):
        pfns = alloc_pages_vma(world.vma, world.addrs[:pages], GFP_HIGHUSER_MOVABLE)
    put_page(mem, pfns)
    return mem.page_to_nid(pfns).tolist()


def turns_of(world, pages, policy=None):
    """The nodes of *pages* pages that are allocated for no address, which are freed again."""
    mem = world.machine.mem
    if policy is not None:
        world.process.set_mempolicy(*policy)
    with running(world.process):
        pfns = alloc_pages_current(mem, GFP_KERNEL, pages)
    put_page(mem, pfns)
    return mem.page_to_nid(pfns).tolist()


def policy(world, mode, nodes=()):
    return mpol_new(world.machine.mem, mode, nodes)


class TestMpolNew:
    @pytest.mark.parametrize(
        ("mode", "nodes", "made"),
        [
            ("default", [], None),
            ("local", [], Mempolicy(Mpol.LOCAL)),
            ("preferred", [], Mempolicy(Mpol.LOCAL)),
            ("preferred", [2, 1], Mempolicy(Mpol.PREFERRED, (1,))),
            ("bind", [2, 0, 2], Mempolicy(Mpol.BIND, (0, 2))),
            ("bind", [1, 3, 1023], Mempolicy(Mpol.BIND, (1,))),
            ("interleave", np.array([1, 2]), Mempolicy(Mpol.INTERLEAVE, (1, 2))),
        ],
    )
    def test_what_there_is(self, mode, nodes, made):
        """Nodes that the machine lacks are left out, and one is enough to prefer."""
        assert made == mpol_new(Machine(THREE, payload=False).mem, mode, nodes)

    @pytest.mark.parametrize(
        ("mode", "nodes", "complaint"),
        [
            ("binding", [0], "no policy is named 'binding'; there are default, preferred, bind"),
            ("default", [0], r"default takes no nodes, got \[0\]"),
            ("local", [1], r"local takes no nodes, got \[1\]"),
            ("bind", [], r"bind needs a node of 0\.\.2, got \[\]"),
            ("interleave", [3], r"interleave needs a node of 0\.\.2, got \[3\]"),
            ("preferred", [-1], r"in 0\.\.1023, got \[-1\]"),
            ("bind", [0, 1024], r"in 0\.\.1023, got \[0, 1024\]"),
            ("bind", 1, r"nodes are a list of numbers in 0\.\.1023, got 1"),
            ("bind", "01", r"got '01'"),
            ("bind", [0.5], r"got \[0.5\]"),
        ],
    )
    def test_what_there_is_not(self, mode, nodes, complaint):
        """The message says what was asked for and what can be."""
        with pytest.raises(InvalidArgument, match=complaint):
            mpol_new(Machine(THREE, payload=False).mem, mode, nodes)

    def test_equal(self):
        """Policies that choose alike are equal; none is equal to none."""
        mem = Machine(THREE, payload=False).mem
        bind, other = mpol_new(mem, "bind", [0, 1]), mpol_new(mem, "interleave", [0, 1])

        assert mpol_equal(bind, mpol_new(mem, "bind", [1, 0]))
        assert mpol_equal(None, None)
        assert not mpol_equal(bind, other)
        assert not mpol_equal(bind, None)


class TestWhoDecides:
    def test_vma_before_task_before_default(self):
        """A policy of the range hides that of the task."""
        world = three_nodes()
        bind, prefer = policy(world, "bind", [1]), policy(world, "preferred", [2])

        with running(world.process):
            assert get_vma_policy(world.vma) is None
            world.process.mempolicy = prefer
            assert prefer == get_vma_policy(world.vma)
            world.vma.vm_policy = bind
            assert bind == get_vma_policy(world.vma)

    def test_task_that_runs(self):
        """It is not the task whose memory it is: a debugger's pages come by its own policy."""
        world = three_nodes()
        other = world.machine.spawn("other")
        other.mempolicy = policy(world, "bind", [2])

        with running(other):
            assert Mempolicy(Mpol.BIND, (2,)) == get_vma_policy(world.vma)

    @pytest.mark.parametrize("mode", ["default", "local"])
    @pytest.mark.parametrize("cpu", [0, 1, 2])
    def test_node_of_the_cpu(self, mode, cpu):
        """Without a policy, or with "local", pages come from where the task runs."""
        world = three_nodes()
        world.process.cpu = cpu
        world.process.mempolicy = policy(world, mode)

        assert [cpu] * 8 == nodes_of(world, 8)

    @pytest.mark.parametrize("write", [True, False])
    def test_faults(self, write):
        """First touches and copies of what others map obey the policy of their VMA."""
        world = three_nodes()
        world.process.mbind(world.addr, world.nbytes, "interleave", [2, 0])

        world.process.touch(world.addr, world.nbytes, write=write)
        world.process.touch(world.addr, world.nbytes)

        first = (world.addr // PAGE_SIZE) % 2
        expected = [(0, 2)[(first + page) % 2] for page in range(8)]
        assert expected == world.process.move_pages(world.addrs).tolist()


class TestModes:
    @given(
        nodes=st.sets(st.integers(0, 2), min_size=1),
        pages=st.lists(st.integers(0, 63), unique=True).map(sorted),
    )
    def test_interleave_by_offset(self, nodes, pages):
        """A page's place in its object says which node's turn it is, whatever else is asked."""
        world = three_nodes(64)
        world.vma.vm_policy = policy(world, "interleave", sorted(nodes))
        mem, start = world.machine.mem, world.vma.vm_pgoff

        pfns = alloc_pages_vma(world.vma, world.addrs[pages], GFP_KERNEL)
        put_page(mem, pfns)

        turns = [sorted(nodes)[(start + page) % len(nodes)] for page in pages]
        assert turns == mem.page_to_nid(pfns).tolist()

    def test_interleave_by_turns(self):
        """Pages of no address take turns from one call to the next, and anew with each policy."""
        world = three_nodes()

        assert [0, 1] == turns_of(world, 2, ["interleave", [0, 1, 2]])
        assert [2, 0, 1] == turns_of(world, 3)
        assert [0] == turns_of(world, 1, ["interleave", [0, 1, 2]])

    @pytest.mark.parametrize("mode", ["bind", "preferred", "local", "default"])
    def test_pages_of_no_address(self, mode):
        """They come by the task's policy."""
        named = [2] if mode in ("bind", "preferred") else []

        assert (named or [0]) * 3 == turns_of(three_nodes(), 3, [mode, named])

    @pytest.mark.parametrize(("cpu", "order"), [(0, [1, 2]), (2, [2, 1])])
    def test_bind_from_the_nearest_on(self, cpu, order):
        """Nodes of the policy that are near to the CPU come first, and no other ever."""
        world = three_nodes(2000, payload=False)
        world.process.cpu = cpu
        world.process.set_mempolicy("bind", [1, 2])

        nodes = nodes_of(world, 2000)

        assert order == list(dict.fromkeys(nodes))

    def test_bind_and_no_more(self):
        """When its nodes are full there are no more pages, though other nodes have some."""
        world = three_nodes(2000, payload=False)
        world.process.set_mempolicy("bind", [1])

        nodes = nodes_of(world, 2000)

        assert {1} == set(nodes)
        assert 900 < len(nodes) < 1024

    def test_preferred_and_then_others(self):
        """When the preferred node is full the nearest others help out."""
        world = three_nodes(1800, payload=False)
        world.process.set_mempolicy("preferred", [1])

        nodes = nodes_of(world, 1800)

        assert (1800, [1, 0]) == (len(nodes), list(dict.fromkeys(nodes)))

    def test_interleave_when_a_node_is_full(self):
        """Its pages come from its neighbours, the other ones' still from where they should."""
        world = three_nodes(2400, payload=False)
        world.process.set_mempolicy("interleave", [0, 2])
        turn = (world.vma.vm_pgoff + np.arange(2400)) % 2

        nodes = np.array(nodes_of(world, 2400))

        assert 2400 == nodes.size
        full = int((nodes[turn == 1] != 2).argmax())  # pages that node 2 could give
        assert {2} == set(nodes[turn == 1][:full].tolist())
        assert 900 < full < 1024

    def test_interleave_when_all_are_full(self):
        """As many pages as there are, for the first addresses."""
        world = three_nodes(4000, payload=False)
        world.process.set_mempolicy("interleave", [0, 1])
        mem = world.machine.mem

        with running(world.process):
            pfns = alloc_pages_vma(world.vma, world.addrs, GFP_HIGHUSER_MOVABLE)
        left = nr_free_pages(mem)
        put_page(mem, pfns)

        turn = (world.vma.vm_pgoff + np.arange(pfns.size)) % 2
        nodes = mem.page_to_nid(pfns)
        assert 2700 < pfns.size < 3072
        assert left < 300
        assert np.unique(pfns).size == pfns.size
        assert (nodes[:1800] == turn[:1800]).all()

    def test_no_pages(self):
        """Nothing is asked for, nothing comes."""
        mem = Machine(THREE, payload=False).mem
        nothing = np.empty(0, dtype=np.int64)

        for mode, nodes in (("local", []), ("bind", [1]), ("interleave", [0, 1])):
            assert 0 == alloc_pages_mpol(mem, GFP_KERNEL, mpol_new(mem, mode, nodes), nothing).size


class TestCounters:
    @pytest.mark.parametrize(
        ("mode", "nodes", "counted"),
        [
            ("local", [], {"numa_hit": 6, "numa_local": 6}),
            ("bind", [1], {"numa_hit": 6, "numa_other": 6}),
            ("interleave", [0, 1], {"numa_hit": 6, "numa_local": 3, "numa_other": 3}),
        ],
    )
    def test_where_pages_came_from(self, mode, nodes, counted):
        """A hit is a page of the node that was asked; local, one of the CPU's."""
        world = three_nodes()
        world.process.set_mempolicy(mode, nodes)

        with world.machine.vmstat.counting() as delta:
            nodes_of(world, 6)

        turns = {"numa_interleave": 6} if mode == "interleave" else {}
        assert counted | turns == {k: v for k, v in delta.items() if k.startswith("numa")}

    def test_miss(self):
        """Pages that another node gave are its misses, and foreign to the one that was asked."""
        world = three_nodes(1500, payload=False)

        with world.machine.vmstat.counting() as delta:
            away = sum(node != 0 for node in nodes_of(world, 1500))

        assert away == delta["numa_miss"] == delta["numa_foreign"] == delta["numa_other"] > 0
        assert 1500 - away == delta["numa_hit"] == delta["numa_local"]
