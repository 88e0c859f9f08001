"""Other addresses. Linux: mm/mremap.c."""

import pytest

from mm.pgtable import _PAGE_SOFT_DIRTY
from tests.mm.test_rmap import migrating
from tests.special_pages.scenes import PLACES, SWP_SOFT_DIRTY, away, in_place, kinds


class TestMovePtes:
    """mm/mremap.c, move_ptes()."""

    @pytest.mark.parametrize("where", PLACES)
    def test_moved_as_it_is(self, where):
        """The entry is the same at the new address, but for its soft-dirty bit."""
        with in_place(where) as world:
            world.process.clear_refs(4)
            before = world.ptes().tolist()
            world.addr = world.process.mremap(
                world.addr,
                world.nbytes,
                world.nbytes,
                "maymove|fixed",
                world.addr + (1 << 24) + 4096,
            )
            bit = int(_PAGE_SOFT_DIRTY) if where in ("system", "public") else SWP_SOFT_DIRTY

            assert [word | bit for word in before] == world.ptes().tolist()
        assert world.intact()

    def test_migration_ends_at_the_new_address(self):
        """Who ends the migration finds the entries where they are now."""
        world = away(2)
        with migrating(world):
            world.addr = world.process.mremap(
                world.addr, world.nbytes, world.nbytes, "maymove|fixed", world.addr + (1 << 24)
            )
            assert ["moving rw"] * 2 == kinds(world)

        assert ["private rw"] * 2 == kinds(world)
