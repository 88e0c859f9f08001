"""Nodes, which device memory has none of. Linux: mm/mempolicy.c and mm/migrate.c."""

import errno

import pytest

from mm import PAGE_SIZE
from tests.special_pages.scenes import away, frames
from tests.world import mapped_range


class TestMempolicy:
    """mm/mempolicy.c and mm/migrate.c: device pages are of no node."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    @pytest.mark.parametrize("node", [0, 1])
    def test_mbind(self, kind, node):
        """Not even MPOL_MF_STRICT minds where a device page is."""
        world = away(kind=kind, nodes=("16MiB", "16MiB"))
        before = world.ptes().tolist()

        world.process.mbind(world.addr, world.nbytes, "bind", [node], "strict")
        world.process.mbind(world.addr, world.nbytes, "bind", [node], "strict|move")

        assert before == world.ptes().tolist()

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_migrate_pages(self, kind):
        """Node 0 is emptied, and nothing counts as left."""
        world = mapped_range(3, kind=kind, nodes=("16MiB", "16MiB"))
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)
        old = frames(world).tolist()

        assert 0 == world.process.migrate_pages([0], [1])
        assert [False, True, False] == (frames(world) == old).tolist()
        assert world.machine.mem.page_to_nid(frames(world)[[0, 2]]).tolist() == [1, 1]

    @pytest.mark.parametrize("kind", ["private", "public"])
    @pytest.mark.parametrize("nodes", [None, 1])
    def test_move_pages(self, kind, nodes):
        """-ENOENT, asked or moved."""
        world = away(kind=kind, nodes=("16MiB", "16MiB"))

        assert [-errno.ENOENT] * 3 == world.process.move_pages(world.addrs, nodes).tolist()
        assert [True] * 3 == world.on_device()
