"""Advice. Linux: mm/madvise.c."""

import pytest

from tests.special_pages.scenes import PLACES, in_place, kinds


class TestMadvise:
    """mm/madvise.c."""

    @pytest.mark.parametrize("where", ["private", "public", "moving"])
    @pytest.mark.parametrize("advice", ["free", "willneed", "cold", "pageout"])
    def test_passed_over(self, where, advice):
        """What is in device memory or on its way stays as it is, with its contents."""
        with in_place(where, swap="1MiB") as world:
            before = world.ptes().tolist()
            world.process.madvise(world.addr, world.nbytes, advice)

            assert before == world.ptes().tolist()
        assert world.intact()

    @pytest.mark.parametrize("where", PLACES)
    def test_dontneed(self, where):
        """MADV_DONTNEED takes them all: zeros are there next."""
        with in_place(where) as world:
            world.process.madvise(world.addr, world.nbytes, "dontneed")

            assert ["none"] * 3 == kinds(world)
        assert bytes(world.nbytes) == world.process.read(world.addr, world.nbytes)
