"""On which nodes the pages of each mapping are."""

import pytest

from mm import PAGE_SIZE
from mm.mempolicy import Mempolicy, Mpol, mpol_to_str
from mm.swap import lru_add_drain_all
from tests.world import mapped_range


def two_nodes(pages=4, **options):
    return mapped_range(pages, nodes=("16MiB", "16MiB"), **options)


class TestLine:
    def test_pages_of_two_nodes(self):
        """Each node that has pages has a field."""
        world = two_nodes()
        world.process.move_pages(world.addrs[:1], 1)

        (md,) = world.process.numa_maps()

        expected = f"{world.addr:08x} default anon=4 dirty=4 N0=3 N1=1 kernelpagesize_kB=4"
        assert expected == str(md)
        assert {0: 3, 1: 1} == md.nodes

    def test_untouched(self):
        """Without pages there is the policy alone."""
        world = two_nodes(filled=False)
        world.process.touch(world.addr, PAGE_SIZE, write=False)  # the zero page is nobody's
        world.process.mbind(world.addr, world.nbytes, "bind", [0, 1])

        assert [f"{world.addr:08x} bind:0-1"] == [str(md) for md in world.process.numa_maps()]

    def test_policy_of_the_task(self):
        """It stands where a mapping has none of its own."""
        world = two_nodes()
        other = world.process.mmap(PAGE_SIZE, "r")
        world.process.mbind(other, PAGE_SIZE, "preferred", [1])
        world.process.set_mempolicy("interleave", [0, 1])

        policies = {md.start: md.policy for md in world.process.numa_maps()}
        assert {world.addr: "interleave:0-1", other: "prefer:1"} == policies

    def test_shared_and_inactive(self):
        """mapmax and active are told where they are not what one expects."""
        world = two_nodes()
        lru_add_drain_all(world.machine.mem)
        world.process.fork()
        world.process.madvise(world.addr, PAGE_SIZE, "cold")
        (md,) = world.process.numa_maps()
        assert (2, 4) == (md.mapmax, md.active)  # others' pages are not deactivated

        world.process.write(world.addr, b"\1")
        lru_add_drain_all(world.machine.mem)
        world.process.madvise(world.addr, PAGE_SIZE, "cold")
        assert "mapmax=2 active=3 N0=4" in str(world.process.numa_maps()[0])

    def test_clean_pages(self):
        """Dirty is what the entry or the page says."""
        world = two_nodes(swap="1MiB")
        world.process.fork()
        world.pageout()
        world.process.touch(world.addr, 2 * PAGE_SIZE, write=False)
        (md,) = world.process.numa_maps()

        assert (2, 0, 2) == (md.pages, md.dirty, md.swapcache)
        assert "anon=2 swapcache=2" in str(md)


class TestFiles:
    def test_name(self):
        """A mapping of a file says which; its pages are those that it maps."""
        world = two_nodes(1)
        file = world.machine.memfd_create("data")
        file.truncate(2 * PAGE_SIZE)
        addr = world.process.mmap(2 * PAGE_SIZE, flags="file|shared", file=file)
        world.process.write(addr, b"\1")

        md = next(md for md in world.process.numa_maps() if md.start == addr)
        assert ("memfd:data", 0) == (md.file, md.anon)
        assert f"{addr:08x} default file=/memfd:data dirty=1" in str(md)


class TestPolicies:
    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (None, "default"),
            (Mempolicy(Mpol.LOCAL), "local"),
            (Mempolicy(Mpol.PREFERRED, (3,)), "prefer:3"),
            (Mempolicy(Mpol.BIND, (0, 1, 2, 5, 7, 8)), "bind:0-2,5,7-8"),
            (Mempolicy(Mpol.INTERLEAVE, (1, 3)), "interleave:1,3"),
        ],
    )
    def test_text(self, policy, text):
        """Nodes in a row are a range."""
        assert text == mpol_to_str(policy)
