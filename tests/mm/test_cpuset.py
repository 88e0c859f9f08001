"""cpusets: the nodes that processes may use at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import (
    PAGE_SIZE,
    AccessDenied,
    Cpuset,
    InvalidArgument,
    Machine,
    OutOfMemory,
    PermissionDenied,
)
from mm.mempolicy import Mempolicy, Mpol, mpol_rebind
from tests.world import mapped_range


@pytest.fixture
def machine():
    """Three nodes."""
    machine = Machine(("4MiB", "4MiB", "4MiB"), max_physmem="64MiB", debug=True)
    yield machine
    machine.verify()


def where(process, pages=4):
    """The nodes of the pages of a fresh mapping."""
    addr = process.mmap(pages * PAGE_SIZE)
    process.touch(addr, pages * PAGE_SIZE)
    return nodes_of(process, addr, pages)


def nodes_of(process, addr, pages=4):
    return process.move_pages(addr + np.arange(pages) * PAGE_SIZE).tolist()


class TestAllocation:
    def test_pages_come_from_allowed_nodes(self, machine):
        """The process runs on node 0, and may not use it."""
        process = machine.spawn("fenced")
        before = where(process)
        process.cpuset = Cpuset(mems=[2, 1])

        assert ([0] * 4, [1] * 4) == (before, where(process))
        process.cpuset = None
        assert [0] * 4 == where(process)

    def test_no_others_when_they_are_full(self, machine):
        """Memory that is free elsewhere is of no use."""
        process = machine.spawn("fenced")
        process.cpuset = Cpuset(mems=[1])
        with pytest.raises(OutOfMemory):
            process.touch(process.mmap("5MiB"), "5MiB")

        assert {1} == set(nodes_of(process, process.mm.vmas[0].vm_start, 100))
        assert [0] * 4 == where(machine.spawn("free"))

    def test_what_a_device_gives_back(self):
        """Pages that a CPU takes back from a device come to allowed nodes."""
        world = mapped_range(pages=3, nodes=("8MiB", "8MiB"))
        world.process.cpuset = Cpuset(mems=[1])
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert world.intact()
        assert [1] * 3 == nodes_of(world.process, world.addr, 3)

    def test_child(self, machine):
        """A child is in its parent's cpuset, and follows it."""
        parent, cpuset = machine.spawn("parent"), Cpuset(mems=[1])
        parent.cpuset = cpuset
        child = parent.fork()
        assert cpuset is child.cpuset

        cpuset.mems = [2]
        assert ([2] * 4, [2] * 4) == (where(parent), where(child))
        child.exit()
        cpuset.mems = [1]
        assert [1] * 4 == where(parent)


class TestPolicies:
    def test_nodes_are_those_that_are_allowed(self, machine):
        """A policy over more is over these; one over none of them is EINVAL."""
        process = machine.spawn("fenced")
        process.cpuset = Cpuset(mems=[1, 2])
        process.set_mempolicy("interleave", [0, 1, 2])
        addr = process.mmap(PAGE_SIZE)

        assert (1, 2) == process.mempolicy.nodes
        assert {1, 2} == set(where(process))
        with pytest.raises(InvalidArgument, match=r"bind needs a node of 1\.\.2, got \[0\]"):
            process.mbind(addr, PAGE_SIZE, "bind", [0])

    def test_change(self, machine):
        """Policies of the process and of its mappings go along; pages stay."""
        process, cpuset = machine.spawn("fenced"), Cpuset(mems=[0, 1])
        process.cpuset = cpuset
        process.set_mempolicy("interleave", [0, 1])
        addr = process.mmap(8 * PAGE_SIZE)
        process.mbind(addr, 8 * PAGE_SIZE, "bind", [1])
        process.touch(addr, 4 * PAGE_SIZE)

        cpuset.mems = [0, 2]
        process.touch(addr, 8 * PAGE_SIZE)

        assert (0, 2) == process.mempolicy.nodes
        assert [1] * 4 + [2] * 4 == nodes_of(process, addr, 8)

    @given(
        st.sets(st.integers(0, 7), min_size=1),
        st.sets(st.integers(0, 7), min_size=1),
        st.data(),
    )
    def test_rebind(self, old, new, data):
        """The n-th old node becomes the n-th new one, round and round; nodes stay allowed."""
        old, new = sorted(old), sorted(new)
        nodes = sorted(data.draw(st.sets(st.sampled_from(old), min_size=1)))

        rebound = mpol_rebind(Mempolicy(Mpol.BIND, tuple(nodes)), old, new)

        expected = {new[old.index(nid) % len(new)] for nid in nodes}
        assert Mempolicy(Mpol.BIND, tuple(sorted(expected))) == rebound
        assert mpol_rebind(None, old, new) is None


class TestMigration:
    def test_memory_migrate(self, machine):
        """With it pages follow, node by node, those of others too; also of who is attached."""
        process, cpuset = machine.spawn("fenced"), Cpuset(mems=[0], memory_migrate=True)
        addr = process.mmap(4 * PAGE_SIZE)
        process.write(addr, b"follow me")
        process.touch(addr, 4 * PAGE_SIZE)
        child = process.fork()

        process.cpuset = Cpuset(mems=[1], memory_migrate=True)
        attached = nodes_of(process, addr)
        process.cpuset.mems = [2]
        changed = nodes_of(process, addr)
        process.cpuset = cpuset

        assert ([1] * 4, [2] * 4, [0] * 4) == (attached, changed, nodes_of(process, addr))
        assert b"follow me" == child.read(addr, 9)

    def test_device_pages_stay(self):
        """What a device has is on no node."""
        world = mapped_range(pages=4, nodes=("8MiB", "8MiB"))
        world.gpu.to_device(world.process, world.at(0), 2 * PAGE_SIZE)
        world.process.cpuset = Cpuset(mems=[1], memory_migrate=True)

        assert [True, True, False, False] == world.on_device()
        assert [1, 1] == nodes_of(world.process, world.at(2), 2)
        assert world.intact()

    def test_move_pages(self, machine):
        """EACCES for a node that the owner of the pages may not use; those before it have moved."""
        process = machine.spawn("fenced")
        addr = process.mmap(3 * PAGE_SIZE)
        process.touch(addr, 3 * PAGE_SIZE)
        process.cpuset = Cpuset(mems=[0, 1])
        pages = addr + np.arange(3) * PAGE_SIZE
        with pytest.raises(AccessDenied, match=r"fenced may use \[0, 1\]"):
            machine.spawn("root").move_pages(pages, [1, 2, 1], of=process)

        assert [1, 0, 0] == nodes_of(process, addr, 3)

    def test_migrate_pages(self, machine):
        """EPERM for nodes that the owner may not use, unless the caller has CAP_SYS_NICE."""
        owner = machine.spawn("owner", uid=7)
        addr = owner.mmap(PAGE_SIZE)
        owner.touch(addr, PAGE_SIZE)
        owner.cpuset = Cpuset(mems=[0, 1])
        with pytest.raises(PermissionDenied, match="nodes that owner may not use"):
            machine.spawn("brother", uid=7).migrate_pages([0], [2], of=owner)

        machine.spawn("root").migrate_pages([0], [2], of=owner)
        assert [2] == nodes_of(owner, addr, 1)

    def test_caller_may_use_no_such_node(self, machine):
        """Who may not use a node himself moves nothing there: EINVAL, or no frame."""
        root, owner = machine.spawn("root"), machine.spawn("owner")
        addr = owner.mmap(PAGE_SIZE)
        owner.touch(addr, PAGE_SIZE)
        root.cpuset = Cpuset(mems=[0])
        with pytest.raises(InvalidArgument, match="root may use none"):
            root.migrate_pages([0], [2], of=owner)
        with pytest.raises(OutOfMemory):
            root.move_pages([addr], [2], of=owner)

        assert [0] == nodes_of(owner, addr, 1)


class TestRefused:
    @pytest.mark.parametrize("mems", [[], [-1], "01", 3])
    def test_nodes(self, mems):
        """A cpuset has nodes, which are numbers."""
        with pytest.raises(InvalidArgument):
            Cpuset(mems=mems)

    def test_node_that_the_machine_lacks(self, machine):
        """It is found out when a process would use it; then nothing has changed."""
        process, cpuset = machine.spawn("fenced"), Cpuset(mems=[1])
        with pytest.raises(InvalidArgument, match=r"the machine has 0\.\.2"):
            process.cpuset = Cpuset(mems=[1, 3])
        process.cpuset = cpuset
        with pytest.raises(InvalidArgument, match=r"the machine has 0\.\.2"):
            cpuset.mems = [3]

        assert ((1,), "<Cpuset of nodes 1>") == (cpuset.mems, repr(cpuset))
        assert [1] * 4 == where(process)
