"""References from outside. Linux: mm/gup.c."""

import pytest

from mm.migration_ptes import remove_migration_ptes
from tests.mm.test_rmap import begin_migration, end_migration
from tests.special_pages.scenes import away, frames, kinds, waiter
from tests.world import mapped_range


class TestFollowPagePte:
    """mm/gup.c, follow_page_pte()."""

    @pytest.mark.parametrize("write", [False, True])
    def test_private_page_comes_back(self, write):
        """It is not present: the fault brings it, and the pin holds the page of the system."""
        world = away()
        old = frames(world).item(1)
        pin = world.process.pin(world.at(1), 1, write=write)
        world.pins.append(pin)

        assert ["private rw", "mapped rw", "private rw"] == kinds(world)
        assert frames(world)[1] == pin.pfns[0] != old

    def test_public_page_is_held_where_it_is(self):
        """A device's page that the CPU reaches needs no fault; a pin adds 1024 (5.6)."""
        world = away(kind="public")
        pfn = frames(world).item(1)
        before = world.machine.mem.refcount.item(pfn)
        pin = world.pin(1)

        assert [pfn] == pin.pfns.tolist()
        assert before + 1024 == world.machine.mem.refcount[pfn]
        assert [True] * 3 == world.on_device()

    def test_migration_entry(self):
        """The fault waits for the page, and the pin has it where it went."""
        world = mapped_range(1)
        mem, pfns = begin_migration(world)
        with waiter(world, lambda: world.pin(0)) as heard:
            remove_migration_ptes(mem, pfns, pfns)
            end_migration(mem, pfns)

        assert pfns.tolist() == heard[0].pfns.tolist()
