"""A process joins another group, and takes along what its group has paid for."""

import pytest

from mm import PAGE_SIZE, InvalidArgument, Machine, OutOfMemory
from mm.swap import lru_add_drain_all
from mm.swapin import read_swap_cache_async
from tests.world import mapped_range


def pages_of(group):
    """What is charged to *group* by now: pages, slots."""
    lru_add_drain_all(group.mem)
    return group.memory.usage, group.swap.usage


@pytest.fixture
def world():
    """Pages 0 to 2 on a device, 3 and 4 in swap, 5 there too and read ahead, 6 and 7 mapped."""
    world = mapped_range(pages=8, swap="1MiB")
    world.process.move_to(world.machine.cgroup("/a"))
    world.gpu.to_device(world.process, world.addr, 3 * PAGE_SIZE)
    world.pageout(3, 4, 5)
    read_swap_cache_async(world.vma, world.addrs[5:6], world.slots()[5:6])
    return world


class TestMove:
    def test_everything_comes_along(self, world):
        """Pages in memory and with devices, and what is in swap, are the new group's."""
        old, new = world.process.cgroup, world.machine.cgroup("/b")
        assert (6, 3) == pages_of(old)

        world.process.move_to(new)

        assert world.process.cgroup is new
        assert [(0, 0), (6, 3)] == [pages_of(g) for g in (old, new)]
        assert world.intact()

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_device_memory(self, kind):
        """Device memory comes along, of either kind."""
        world = mapped_range(pages=4, kind=kind)
        world.process.move_to(world.machine.cgroup("/a"))
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.process.move_to(world.machine.cgroup("/b"))

        assert 4 * PAGE_SIZE == world.process.cgroup.stat["device"]

    def test_exclusive(self):
        """So do pages that a device has for itself."""
        world = mapped_range(pages=4)
        world.make_exclusive(0, 1)

        world.process.move_to(world.machine.cgroup("/a"))

        assert (4, 0) == pages_of(world.process.cgroup)

    def test_from_the_root_and_back(self):
        """The root pays without counting."""
        world = mapped_range(pages=4, swap="1MiB")
        world.pageout(0)
        group = world.machine.cgroup("/a")

        world.process.move_to(group)
        assert (3, 1) == pages_of(group)
        world.process.move_to(None)

        assert world.process.cgroup is None
        assert (0, 0) == pages_of(group)
        assert not world.machine.mem.memcg.any()

    def test_nothing_comes_along(self, world):
        """Where the group does not want it, all stays where it is charged."""
        old, new = world.process.cgroup, world.machine.cgroup("/b")
        new.move_charge_at_immigrate = False

        world.process.move_to(new)
        world.process.write(world.process.mmap(PAGE_SIZE), b"x")

        assert [(6, 3), (1, 0)] == [pages_of(g) for g in (old, new)]

    def test_pages_of_others(self, world):
        """What another group has paid for stays with it, though the process maps it."""
        child = world.process.fork()
        third = world.machine.cgroup("/c")
        third.move_charge_at_immigrate = False
        child.move_to(third)
        child.write(world.at(6), b"x")

        child.move_to(world.machine.cgroup("/d"))

        assert [(6, 3), (0, 0), (1, 0)] == [
            pages_of(g) for g in (world.process.cgroup, third, child.cgroup)
        ]

    def test_shared_pages(self, world):
        """What a child maps too goes with whoever moves first."""
        child = world.process.fork()

        child.move_to(world.machine.cgroup("/b"))

        assert [(0, 0), (6, 3)] == [pages_of(g) for g in (world.process.cgroup, child.cgroup)]

    def test_zero_pages(self):
        """The page of zeros is nobody's."""
        world = mapped_range(pages=4, filled=False)
        world.process.read(world.addr, world.nbytes)

        world.process.move_to(world.machine.cgroup("/a"))

        assert (0, 0) == pages_of(world.process.cgroup)

    def test_many_tables(self):
        """A process of more than one run of page tables moves as a whole."""
        world = mapped_range(pages=9000, filled=False, nodes=("64MiB",), payload=False)
        world.process.touch(world.addr, world.nbytes)

        world.process.move_to(world.machine.cgroup("/a"))

        assert (9000, 0) == pages_of(world.process.cgroup)

    def test_to_where_it_is(self, world):
        """Who is there already brings nothing."""
        group = world.process.cgroup

        world.process.move_to(group)

        assert (6, 3) == pages_of(group)


class TestNoRoom:
    def test_memory(self, world):
        """A process that is too large stays where it is."""
        old = world.process.cgroup

        with pytest.raises(OutOfMemory, match=r"train brings 24 KiB, and 12 KiB in swap"):
            world.process.move_to(world.machine.cgroup("/b", limit=5 * PAGE_SIZE))

        assert world.process.cgroup is old
        assert [(6, 3), (0, 0)] == [pages_of(g) for g in (old, world.machine.cgroup("/b"))]

    def test_swap(self, world):
        """So does one that has too much in swap."""
        old, new = world.process.cgroup, world.machine.cgroup("/b")
        new.swap_limit = 2 * PAGE_SIZE

        with pytest.raises(OutOfMemory, match="/b has no room"):
            world.process.move_to(new)

        assert [(6, 3), (0, 0)] == [pages_of(g) for g in (old, new)]

    def test_pages_there_make_room(self, world):
        """What the new group does not use goes to swap."""
        new = world.machine.cgroup("/b", limit=8 * PAGE_SIZE)
        other = world.machine.spawn("other", cgroup=new)
        other.write(other.mmap(6 * PAGE_SIZE), b"x" * (6 * PAGE_SIZE))

        world.process.move_to(new)

        assert new.usage <= 8 * PAGE_SIZE
        assert 9 + 6 == sum(pages_of(new))
        assert world.intact()


class TestBadInput:
    def test_of_another_machine(self, world):
        """Machines have nothing in common."""
        other = Machine(nodes=("1MiB",))

        with pytest.raises(InvalidArgument, match="of another machine"):
            world.process.move_to(other.cgroup("/b"))

    def test_removed(self, world):
        """A group that is gone takes nobody in."""
        group = world.machine.cgroup("/b")
        group.remove()

        with pytest.raises(InvalidArgument, match="/b was removed"):
            world.process.move_to(group)

        assert (6, 3) == pages_of(world.process.cgroup)

    def test_exited(self, world):
        """Who has exited moves no more."""
        world.process.exit()

        with pytest.raises(InvalidArgument, match="has exited"):
            world.process.move_to(None)
