"""verify(): each rule about control groups is broken in turn, and named."""

import pytest

from mm.swap import lru_add_drain_all
from tests.mm.test_debug import complaints, named, spoiled, spoiled_attribute
from tests.world import mapped_range


@pytest.fixture
def world():
    """Pages 0 to 2 mapped, 3 in swap; all of /a/b."""
    world = mapped_range(pages=4, swap="64KiB")
    world.process.move_to(world.machine.cgroup("/a/b"))
    world.pageout(3)
    lru_add_drain_all(world.machine.mem)
    world.machine.verify()
    return world


@pytest.fixture
def group(world):
    return world.process.cgroup


@pytest.fixture
def mem(world):
    return world.machine.mem


class TestColumns:
    def test_free_page(self, world, mem):
        """What nobody holds is not charged."""
        with spoiled(mem.memcg, mem.max_pfn - 1, 2):
            assert f"memcg: page {mem.max_pfn - 1:#x}: charged, though nobody holds it" in (
                complaints(world.machine)
            )

    def test_free_device_page(self, world, mem):
        """A device page that is free has a reference, and is free all the same."""
        with spoiled(mem.memcg, world.gpu.zone.end_pfn - 1, 2):
            assert {"memcg", "memory"} == named(world.machine)

    def test_no_such_group(self, world, mem):
        """A number names a group."""
        pfn = world.pfns().item(0)
        with spoiled(mem.memcg, pfn, 77):
            assert f"memcg: page {pfn:#x}: of a group that there is not" in complaints(
                world.machine
            )

    def test_another_group(self, world, mem):
        """Each group counts its pages and those of the groups in it."""
        with spoiled(mem.memcg, world.pfns().item(0), 1):
            assert ["memory: usage of control group /a/b says 3, 2 are charged"] == complaints(
                world.machine
            )

    @pytest.mark.parametrize("number", [1, 77])
    def test_free_slot(self, world, mem, number):
        """A slot that is free is not charged."""
        with spoiled(mem.swap.swap_cgroup, 9, number):
            assert "swap_cgroup: slot 0x9: free, or of no group" in complaints(world.machine)

    def test_slot_of_no_group(self, world, mem):
        """The number of a slot names a group as that of a page does."""
        with spoiled(mem.swap.swap_cgroup, world.slots().item(3), 77):
            assert {"swap_cgroup", "swap"} == named(world.machine)


class TestGroups:
    def test_usage(self, world, group):
        """Usage is what there is."""
        with spoiled_attribute(group.memory, "usage", 2):
            assert ["memory: usage of control group /a/b says 2, 3 are charged"] == complaints(
                world.machine
            )

    def test_swap_usage(self, world, group):
        """So is that of swap, also in what a group stands in."""
        with spoiled_attribute(group.parent.swap, "usage", 0):
            assert ["swap: usage of control group /a says 0, 1 are charged"] == complaints(
                world.machine
            )

    def test_watermark(self, world, group):
        """There is never more than there ever was."""
        with spoiled_attribute(group.memory, "watermark", 2):
            assert ["memory: watermark of control group /a/b says 2, below 3"] == complaints(
                world.machine
            )

    def test_limit(self, world, group):
        """There is never more than there may be."""
        with spoiled_attribute(group.memory, "max", 2):
            assert ["memory: usage of control group /a/b is 3, over 2"] == complaints(world.machine)

    def test_reference(self, world, group):
        """Nobody is about to charge a group."""
        with spoiled_attribute(group, "refs", 1):
            assert ["memcgs: 1 references of control group /a/b, yet nobody charges it"] == (
                complaints(world.machine)
            )

    def test_number(self, world, group):
        """A group is where its number says."""
        with spoiled_attribute(group, "number", 5):
            assert {"memcgs"} == named(world.machine)

    def test_parent(self, world, group, mem):
        """What a group stands in is there."""
        outer = mem.memcgs.pop(1)
        try:
            assert ["memcgs: the parent of control group /a/b is gone"] == complaints(world.machine)
        finally:
            mem.memcgs[1] = outer

    def test_removed_group_with_a_process(self, world, group):
        """A process is in no group that was removed."""
        with spoiled_attribute(group, "online", False):
            assert any("train is in" in line for line in complaints(world.machine))

    def test_removed_group_without_a_charge(self, world, mem):
        """Such a group has gone."""
        empty = world.machine.cgroup("/c")
        with spoiled_attribute(empty, "online", False):
            assert {"memcgs"} == named(world.machine)
