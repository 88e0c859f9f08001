"""migrate_vma() with drivers that fail: no byte is lost that the driver does not give up."""

import errno

import numpy as np
import pytest

from devices import NumpyDevice
from hmm import (
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    migrate_pfn,
)
from mm import (
    PAGE_SIZE,
    BusError,
    Deadlock,
)
from tests.hmm.callbacks import device_page, instead, migrate, raises
from tests.hmm.ranges import (
    ALL_KINDS,
    MIXED_CONTENTS,
    kinds,
    mapped,
    mixed_range,
    reasons,
)
from tests.world import mapped_range


def read_or_lost(world) -> list[int | str]:
    """What the CPU finds in each page, "lost" where it gets SIGBUS."""
    found: list[int | str] = []
    for page in range(world.pages):
        try:
            found.append(world.process.read(world.at(page), 1)[0])
        except BusError as error:
            found.append("lost" if world.at(page) == error.address else hex(error.address))
    return found


class TestLostContents:
    LOST = int(MIGRATE_PFN_ERROR)

    @pytest.mark.parametrize("back", [False, True])
    def test_bus_error_at_that_page_alone(self, back):
        """MIGRATE_PFN_ERROR makes the CPU fail at its page, loading or storing; the rest moves."""
        world = mapped_range(pages=4)
        if back:
            migrate(world)

        result = migrate(world, after=instead(world, {1: self.LOST}), back=back)

        assert ["NO", "LOST", "NO", "NO"] == reasons(result)
        assert -errno.EIO == result.status[1]
        assert [0, "lost", 2, 3] == read_or_lost(world)
        with pytest.raises(BusError, match=f"{world.at(1):#x}"):
            world.process.write(world.at(1), b"x")

    @pytest.mark.parametrize("back", [False, True])
    def test_memory_is_freed(self, back):
        """The page behind lost contents is freed at once, wherever it was."""
        world = mapped_range(pages=2)
        free = world.machine.nr_free_pages
        if back:
            migrate(world)

        migrate(world, after=instead(world, {0: self.LOST, 1: self.LOST}), back=back)

        assert ["poison"] * 2 == kinds(world)
        assert (free + 2, 0) == (world.machine.nr_free_pages, world.process.mm.anon_rss)
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_error_beside_a_destination(self):
        """Lost is lost, even if the driver hands over a page: it is given back."""
        world = mapped_range(pages=2)

        def lose(src, dst):
            dst[1] |= MIGRATE_PFN_ERROR

        result = migrate(world, after=lose)

        assert ["NO", "LOST"] == reasons(result)
        assert [0, "lost"] == read_or_lost(world)
        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_device_that_loses_what_it_brings_back(self):
        """A page that the device cannot give back is lost to the CPU that touches it."""
        world = mapped_range(pages=3, driver=Forgetful)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [0, "lost", 2] == read_or_lost(world)

        with pytest.raises(BusError):
            world.gpu.read(world.process, world.at(1), 1)

    def test_lost_page_stays_where_it_is(self):
        """What is lost is skipped by later migrations, and unmapping forgets it."""
        world = mapped_range(pages=2)
        migrate(world, after=instead(world, {1: self.LOST}))

        again = migrate(world, back=True)
        world.process.munmap(world.at(1), PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, addr=world.at(1))

        assert ["NO", "SKIPPED"] == reasons(again)
        assert [0, 0] == world.contents()


class Forgetful(NumpyDevice):
    """A device that loses its second page whenever it is to give it back."""

    def copy_out(self, pages, system, rows):
        super().copy_out(pages, system, rows)
        return pages == 1


class Broken(NumpyDevice):
    """A device whose copies fail."""

    def copy_in(self, pages, system, rows):
        raise OSError("the bus is gone")

    def copy_out(self, pages, system, rows):
        raise OSError("the bus is gone")


def half_an_answer(world, error):
    """A step that names a page for entry 0, does not lock it, and fails."""

    def fail(src, dst):
        pfn = np.array([device_page(world.gpu)])
        dst[0] = migrate_pfn(pfn)[0] | MIGRATE_PFN_LOCKED
        raise error

    return fail


class TestCallbackThatRaises:
    @pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_alloc_and_copy(self, when, error):
        """Every page is back where it was, unlocked; no destination leaks; the error goes on."""
        world = mixed_range()
        was, free = mapped(world), world.gpu.chunks.free_pages

        with pytest.raises(type(error)):
            migrate(world, **{when: raises(error)})

        assert (was, free) == (mapped(world), world.gpu.chunks.free_pages)
        assert MIXED_CONTENTS == world.contents()

    def test_alloc_and_copy_on_the_way_back(self):
        """The same for device pages: they stay, and frames are freed."""
        world = mapped_range(pages=3)
        migrate(world)
        was, free = mapped(world), world.machine.nr_free_pages

        with pytest.raises(OSError, match="broken"):
            migrate(world, after=raises(OSError("broken")), back=True)

        assert (was, free) == (mapped(world), world.machine.nr_free_pages)
        assert [0, 1, 2] == world.contents()

    def test_alloc_and_copy_with_half_an_answer(self):
        """A destination that was named but not locked yet is given back as well."""
        world = mixed_range()
        was, free = mapped(world), world.gpu.chunks.free_pages

        with pytest.raises(OSError, match="broken"):
            migrate(world, before=half_an_answer(world, OSError("broken")))

        assert (was, free) == (mapped(world), world.gpu.chunks.free_pages)
        assert MIXED_CONTENTS == world.contents()

    def test_alloc_and_copy_that_spoils_src(self):
        """What the driver wrote to src before it failed does not matter."""
        world = mixed_range()
        was = mapped(world)

        def spoil(src, dst):
            src[:] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
            raise OSError("broken")

        with pytest.raises(OSError, match="broken"):
            migrate(world, after=spoil)

        assert was == mapped(world)
        assert MIXED_CONTENTS == world.contents()

    def test_copy_fails(self):
        """A device whose copy fails keeps nothing, and the process keeps all."""
        world = mapped_range(pages=3, driver=Broken)

        with pytest.raises(OSError, match="the bus is gone"):
            world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (["present"] * 3, 1_024) == (kinds(world), world.gpu.chunks.free_pages)
        assert [0, 1, 2] == world.contents()

    @pytest.mark.parametrize("back", [False, True])
    @pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
    def test_finalize_and_map(self, error, back):
        """What has moved has moved: it is mapped and unlocked, and the error goes on."""
        world = mapped_range(pages=3)
        if back:
            migrate(world)

        with pytest.raises(type(error)):
            migrate(world, mapping=raises(error), back=back)

        assert [not back] * 3 == world.on_device()
        assert [0, 1, 2] == world.contents()

    def test_process_goes_on_afterwards(self):
        """A later migration of the same pages succeeds."""
        world = mixed_range()
        with pytest.raises(OSError, match="broken"):
            migrate(world, after=raises(OSError("broken")))

        result = migrate(world)

        assert (5, [True] * ALL_KINDS) == (result.cpages, world.on_device())
        assert MIXED_CONTENTS == world.contents()


class TestDeadlock:
    @pytest.mark.parametrize("step", ["before", "after", "mapping"])
    def test_cpu_access_to_a_page_under_migration(self, step):
        """A callback that touches what it migrates is told so, and does not hang."""
        world = mapped_range(pages=3)

        with pytest.raises(Deadlock, match="locked by the thread that waits"):
            migrate(world, **{step: lambda src, dst: world.process.read(world.at(1), 1)})

        assert [0, 1, 2] == world.contents()

    def test_cpu_access_to_a_hole_that_was_just_filled(self):
        """The same for a page that the process can see already, but that is still locked."""
        world = mapped_range(pages=3, filled=False)

        with pytest.raises(Deadlock, match="locked by the thread that waits"):
            migrate(world, mapping=lambda src, dst: world.process.read(world.at(1), 1))

        assert [0, 0, 0] == world.contents()

    def test_callback_that_takes_the_hint(self):
        """A callback may catch the error and go on; the migration succeeds."""
        world = mapped_range(pages=3)

        def touch(src, dst):
            with pytest.raises(Deadlock):
                world.process.write(world.at(1), b"x")

        result = migrate(world, before=touch)

        assert (3, [0, 1, 2]) == (result.cpages, world.contents())

    def test_device_access_to_a_page_under_migration(self):
        """The same from the device's side."""
        world = mapped_range(pages=3)

        with pytest.raises(Deadlock):
            migrate(world, before=lambda src, dst: world.gpu.read(world.process, world.at(1), 1))

        assert [0, 1, 2] == world.contents()

    @pytest.mark.parametrize("call", ["munmap", "exit"])
    def test_unmapping_from_a_callback(self, call):
        """Unmapping waits for migrations to end, so a callback that does it is told."""
        world = mapped_range(pages=3)
        unmap = {
            "munmap": lambda src, dst: world.process.munmap(world.addr, world.nbytes),
            "exit": lambda src, dst: world.process.exit(),
        }

        with pytest.raises(Deadlock, match="mmap_sem"):
            migrate(world, before=unmap[call])

        assert [0, 1, 2] == world.contents()

    def test_cpu_access_to_another_page(self):
        """A callback may touch memory that does not move."""
        world = mapped_range(pages=3)
        elsewhere = world.process.mmap(PAGE_SIZE)
        world.process.write(elsewhere, b"table")
        seen = []

        migrate(world, before=lambda src, dst: seen.append(world.process.read(elsewhere, 5)))

        assert ([b"table"], [0, 1, 2]) == (seen, world.contents())
