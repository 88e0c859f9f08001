"""migrate_vma() where something is in the way: what stays, and why; its neighbours go."""

import errno

from hmm import (
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from hmm.migrate import migrate_vma_collect, migrate_vma_prepare, migrate_vma_unmap
from mm import (
    PAGE_SIZE,
)
from mm.types import PAGE_MAPPING_ANON
from tests.files import mapped_file
from tests.hmm.callbacks import look_on, migrate
from tests.hmm.ranges import (
    in_hand,
    kinds,
    reasons,
)
from tests.world import SOMEBODY_ELSE, mapped_range


class TestInTheWay:
    def test_pinned_page_in_the_middle_stays(self):
        """A pinned page stays in system memory; its neighbours migrate."""
        world = mapped_range(pages=5)
        world.pin(page=2)

        result = migrate(world)

        assert [True, True, False, True, True] == world.on_device()
        assert ("PINNED", -errno.EBUSY) == (reasons(result)[2], result.status[2])
        assert [0, 1, 2, 3, 4] == world.contents()

    def test_pin_that_comes_while_it_is_copied(self):
        """A reference taken during alloc_and_copy() keeps the page, and the copy is wasted."""
        world = mapped_range(pages=3)
        pfn = world.pfns().item(1)

        result = migrate(world, after=lambda src, dst: world.hold(pfn))

        assert [True, False, True] == world.on_device()
        assert ("BUSY", -errno.EAGAIN) == (reasons(result)[1], result.status[1])
        assert [0, 1, 2] == world.contents()
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_device_page_that_its_driver_holds(self):
        """A device page with one reference more stays in device memory until it is dropped."""
        world = mapped_range(pages=2)
        migrate(world)
        pin = world.hold(world.pfns().item(0))

        result = migrate(world, back=True)
        pin.release()

        assert ["BUSY", "NO"] == reasons(result)
        assert [True, False] == world.on_device()
        assert [0, 1] == world.contents()

    def test_locked_page_stays(self):
        """A page that another thread has locked stays; nobody waits for it."""
        world = mapped_range(pages=3)
        world.lock(page=1)

        result = migrate(world)

        assert [True, False, True] == world.on_device()
        assert ("LOCKED", -errno.EAGAIN) == (reasons(result)[1], result.status[1])
        assert SOMEBODY_ELSE == world.machine.mem.lock_owner[world.pfns()[1]]
        assert [0, 1, 2] == world.contents()

    def test_lock_that_comes_free_between_collect_and_prepare(self):
        """A page that collect found locked is tried once more, and then unmapped by its rmap."""
        world = mapped_range(pages=3)
        world.lock(page=1)
        seen = []
        migration, _ = in_hand(world)

        with world.process.mm.mmap_sem.read():
            migrate_vma_collect(migration)
            seen.append(kinds(world))
            world.unlock(1)
            migrate_vma_prepare(migration)
            migrate_vma_unmap(migration)
            seen.append(kinds(world))
            migrate_vma_pages(migration)
            migrate_vma_finalize(migration)

        assert [["migration", "present", "migration"], ["migration"] * 3] == seen
        assert [0, 1, 2] == world.contents()

    def test_isolated_page_stays(self):
        """A page that somebody has taken off the LRU is somebody's who moves it himself."""
        world = mapped_range(pages=3)
        world.isolate(page=1)

        result = migrate(world)

        assert [True, False, True] == world.on_device()
        assert ("ISOLATED", -errno.EBUSY) == (reasons(result)[1], result.status[1])
        assert [0, 1, 2] == world.contents()

    def test_pages_on_their_way_to_the_lru(self):
        """Pages that wait in the pagevec of any CPU are no obstacle."""
        world = mapped_range(pages=4, filled=False)
        for page in range(4):
            world.process.cpu = page % 2
            world.process.write(world.at(page), bytes([page]) * PAGE_SIZE)

        result = migrate(world)

        assert (4, [True] * 4) == (result.cpages, world.on_device())
        assert [0, 1, 2, 3] == world.contents()

    def test_mapping_that_cannot_be_found(self):
        """A page that stays mapped, whatever its rmap says, stays."""
        world = mapped_range(pages=2)
        mem, pfn = world.machine.mem, world.pfns().item(1)
        world.hold(pfn)
        mem.mapcount[pfn] += 1

        result = migrate(world)

        mem.mapcount[pfn] -= 1
        assert ["NO", "MAPPED"] == reasons(result)
        assert ([True, False], [0, 1]) == (world.on_device(), world.contents())

    def test_page_of_no_process(self):
        """A page that is not anonymous does not go to a device."""
        world = mapped_range(pages=2)
        mem, pfn = world.machine.mem, world.pfns().item(1)
        migration, arguments = in_hand(world)

        with world.process.mm.mmap_sem.read():
            migrate_vma_setup(migration)
            world.gpu.alloc_and_copy(*arguments)
            mem.mapping[pfn] &= ~PAGE_MAPPING_ANON
            migrate_vma_pages(migration)
            mem.mapping[pfn] |= PAGE_MAPPING_ANON
            world.gpu.finalize_and_map(*arguments)
            migrate_vma_finalize(migration)

        assert ["NO", "REFUSED"] == reasons(migration)
        assert ([True, False], [0, 1]) == (world.on_device(), world.contents())

    def test_page_that_belongs_to_nobody(self):
        """A page whose owner has let go of it is not collected."""
        world = mapped_range(pages=3)
        mem, pfn = world.machine.mem, world.pfns().item(1)
        owner = mem.mapping.item(pfn)
        mem.mapping[pfn] = 0

        result = migrate(world)

        mem.mapping[pfn] = owner
        assert ["NO", "SKIPPED", "NO"] == reasons(result)
        assert [0, 1, 2] == world.contents()

    def test_holes_of_a_file(self):
        """What a file has not been read into is no hole; the private pages on it migrate."""
        world = mapped_file(pages=3, filled=False).private()
        world.process.write(world.at(1), b"x")

        result = migrate(world)

        assert ["SKIPPED", "NO", "SKIPPED"] == reasons(result)
        assert b"x" == world.process.read(world.at(1), 1)

    def test_page_that_is_moving_already(self):
        """A migration inside a migration of the same range finds nothing to move."""
        world = mapped_range(pages=3)
        inner = []

        migrate(world, before=lambda src, dst: inner.append(look_on(world)))

        assert [["SKIPPED"] * 3] == [reasons(result) for result in inner]
        assert [0, 1, 2] == world.contents()
