"""Control groups as their files show them: the tree, limits, what is in them."""

import pytest

from mm import PAGE_SIZE, Busy, InvalidArgument, Machine, OutOfMemory
from mm.mem_cgroup import mem_cgroup_tree
from mm.memcontrol import MEM_CGROUP_ID_MAX
from mm.swap import lru_add_drain_all
from tests.world import mapped_range


@pytest.fixture
def machine():
    return Machine(nodes=("4MiB",), debug=True)


class TestTree:
    def test_parents_are_made(self, machine):
        """A path is made as far as it is not there; the same path is the same group."""
        train = machine.cgroup("/jobs/train")

        assert "/jobs/train" == train.name
        assert machine.cgroup("jobs/") is train.parent
        assert machine.cgroup("/jobs/train/") is train
        assert machine.cgroup("/jobs").parent is None

    @pytest.mark.parametrize("path", ["", "/", "/a//b", "/a/../b", "."])
    def test_no_path(self, machine, path):
        """The root is no group of its own, nor is what a path cannot name."""
        with pytest.raises(InvalidArgument, match="no path"):
            machine.cgroup(path)

        assert {} == machine.mem.memcgs

    def test_numbers_are_used_again(self, machine):
        """A group that is gone gives its number back."""
        first = machine.cgroup("/a")
        machine.cgroup("/b")
        first.remove()

        assert first.number == machine.cgroup("/c").number == 1

    def test_too_many(self, machine):
        """A column of 16 bits tells no more of them apart."""
        machine.mem.memcgs.update(
            dict.fromkeys(range(1, MEM_CGROUP_ID_MAX + 1), machine.cgroup("/a"))
        )

        with pytest.raises(OutOfMemory, match="65535"):
            machine.cgroup("/b")

        machine.mem.memcgs.clear()

    def test_who_is_inside(self, machine):
        """A group's pages are its own and those of the groups in it."""
        inner, other = machine.cgroup("/a/b"), machine.cgroup("/c")

        assert [False, True, True, False] == mem_cgroup_tree(inner.parent).tolist()
        assert [False, False, False, True] == mem_cgroup_tree(other).tolist()

    def test_text(self, machine):
        """A group says how full it is."""
        assert "<MemCgroup /a, 0 B of 1 MiB>" == repr(machine.cgroup("/a", "1MiB"))
        assert "<MemCgroup /b, 0 B of no limit>" == repr(machine.cgroup("/b"))


class TestRemove:
    def test_with_a_process(self, machine):
        """A group that has processes stays."""
        group = machine.cgroup("/a")
        process = machine.spawn("train", cgroup=group)

        with pytest.raises(Busy, match="process train"):
            group.remove()
        process.exit()
        group.remove()

        assert {} == machine.mem.memcgs

    def test_with_a_group(self, machine):
        """A group that has others in it stays."""
        inner = machine.cgroup("/a/b")

        with pytest.raises(Busy, match="/a/b"):
            inner.parent.remove()

    def test_twice(self, machine):
        """What is gone is gone."""
        group = machine.cgroup("/a")
        group.remove()
        group.remove()

        with pytest.raises(InvalidArgument, match="/a was removed"):
            machine.spawn("late", cgroup=group)
        assert [] == machine.mem.mms

    def test_what_is_charged_stays_charged(self):
        """Pages that were left behind count in what the group stood in, until they are freed."""
        world = mapped_range(pages=3)
        outer, inner = world.machine.cgroup("/a"), world.machine.cgroup("/a/b")
        world.process.move_to(inner)
        outer.move_charge_at_immigrate = False
        world.process.move_to(outer)
        inner.remove()

        assert 3 * PAGE_SIZE == outer.usage == inner.usage
        assert machine_groups(world) == {"/a", "/a/b"}
        world.machine.verify()
        world.process.munmap(world.addr, world.nbytes)
        lru_add_drain_all(world.machine.mem)
        assert machine_groups(world) == {"/a"}

    def test_the_same_path_again(self):
        """A new group may take the place of one that is still charged."""
        world = mapped_range(pages=3)
        old = world.machine.cgroup("/a")
        world.process.move_to(old)
        other = world.machine.cgroup("/b")
        other.move_charge_at_immigrate = False
        world.process.move_to(other)
        old.remove()

        new = world.machine.cgroup("/a")

        assert new is not old
        assert (0, 3 * PAGE_SIZE) == (new.usage, old.usage)

    def test_the_last_of_the_family(self):
        """With the last charge go all that stood in one another and were removed."""
        world = mapped_range(pages=1)
        inner = world.machine.cgroup("/a/b/c")
        world.process.move_to(inner)
        other = world.machine.cgroup("/d")
        other.move_charge_at_immigrate = False
        world.process.move_to(other)
        for group in (inner, inner.parent, inner.parent.parent):
            group.remove()
        world.machine.verify()

        world.process.munmap(world.addr, PAGE_SIZE)
        lru_add_drain_all(world.machine.mem)

        assert {"/d"} == machine_groups(world)


def machine_groups(world):
    return {group.name for group in world.machine.mem.memcgs.values()}


class TestLimit:
    def test_sizes(self, machine):
        """Whole pages; "max" and None are no limit, and none is where a group begins."""
        group = machine.cgroup("/a")
        assert group.limit is None
        group.limit = 3 * PAGE_SIZE + 1
        assert 3 * PAGE_SIZE == group.limit
        assert machine.cgroup("/a", limit="max").limit is None
        group.swap_limit = "1MiB"
        assert 1 << 20 == group.swap_limit

    def test_lower_than_what_is_used(self):
        """What is too much goes to swap first."""
        world = mapped_range(pages=40, swap="1MiB")
        group = world.machine.cgroup("/a")
        world.process.move_to(group)

        group.limit = 10 * PAGE_SIZE

        assert group.usage <= 10 * PAGE_SIZE
        assert group.swap_usage >= 30 * PAGE_SIZE
        assert world.intact()

    def test_what_cannot_go(self):
        """Without swap nothing goes, and the limit remains as it was."""
        world = mapped_range(pages=40)
        group = world.machine.cgroup("/a", limit="1MiB")
        world.process.move_to(group)

        with pytest.raises(Busy, match="/a uses 160 KiB that cannot be reclaimed"):
            group.limit = "64KiB"

        assert (1 << 20, 40 * PAGE_SIZE) == (group.limit, group.usage)

    def test_slots(self):
        """A lower limit on swap leaves what is there, and gives out no more."""
        world = mapped_range(pages=8, swap="1MiB")
        group = world.machine.cgroup("/a")
        world.process.move_to(group)
        world.pageout(0, 1, 2, 3)

        group.swap_limit = PAGE_SIZE

        assert 4 * PAGE_SIZE == group.swap_usage
        assert 0 == world.pageout(4, 5)
        assert {"swap_max": 2, "swap_fail": 2} == {
            name: count for name, count in group.events.items() if count
        }
        assert world.intact()


class TestStat:
    def test_where_the_pages_are(self):
        """Memory of the system and of devices is told apart, and swap besides."""
        world = mapped_range(pages=8, swap="1MiB")
        group = world.machine.cgroup("/a/b")
        world.process.move_to(group)
        world.gpu.to_device(world.process, world.addr, 3 * PAGE_SIZE)
        world.pageout(6, 7)
        lru_add_drain_all(world.machine.mem)

        stat = group.parent.stat

        assert {"anon": 6, "device": 3, "swap": 2, "active_anon": 3} == {
            name: nbytes // PAGE_SIZE for name, nbytes in stat.items() if nbytes
        }
        assert group.stat == stat
        assert group.usage == stat["anon"] + stat["file"]

    def test_lists(self):
        """Mlocked pages are unevictable, those given up wait where files do."""
        world = mapped_range(pages=8)
        group = world.machine.cgroup("/a")
        world.process.move_to(group)
        world.process.mlock(world.addr, 2 * PAGE_SIZE)
        world.process.madvise(world.at(4), PAGE_SIZE, "free")
        lru_add_drain_all(world.machine.mem)

        stat = group.stat

        assert [2, 1, 5, 8] == [
            stat[name] // PAGE_SIZE
            for name in ("unevictable", "inactive_file", "active_anon", "anon")
        ]

    def test_peak(self):
        """The most that there ever was stays known."""
        world = mapped_range(pages=8)
        group = world.machine.cgroup("/a")
        world.process.move_to(group)
        world.process.munmap(world.addr, 5 * PAGE_SIZE)
        lru_add_drain_all(world.machine.mem)

        assert (8 * PAGE_SIZE, 3 * PAGE_SIZE) == (group.peak, group.usage)
