"""A driver that breaks the rules of its callbacks is told which, and no process suffers for it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from devices import NumpyDevice
from hmm import (
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from mm import DriverBug
from mm.filemap import trylock_page, unlock_page
from mm.swap import put_page
from tests.hmm.callbacks import device_page, frame, instead, look_on, migrate
from tests.world import World, mapped_range

PAGES = 4
SPOILED = 2  # the entry that each driver here gets wrong


@pytest.fixture
def world() -> World:
    return mapped_range(pages=PAGES)


def complaint(rule: str, world: World, entry: int = SPOILED) -> str:
    """What a DriverBug says of *entry*: number, address and rule."""
    return rf"entry {entry}\b.*{world.at(entry):#x}.*{re.escape(rule)}"


class Page:
    """A page that a driver has in hand: given for the spoiled entry, and taken back after it."""

    def __init__(self, world: World, pfn: int, *, lock: bool = True) -> None:
        self.mem, self.pfn = world.machine.mem, np.array([pfn])
        self.give_back = instead(world, {SPOILED: 0})
        self.locked = lock and trylock_page(self.mem, self.pfn).item()

    def __call__(self, src, dst):
        self.give_back(src, dst)
        dst[SPOILED] = migrate_pfn(self.pfn)[0] | MIGRATE_PFN_LOCKED

    def unlock(self) -> None:
        if self.locked:
            unlock_page(self.mem, self.pfn)


def changes(vector: str, flag: np.uint64):
    """A step that flips *flag* of the spoiled entry in *vector*."""

    def change(src, dst):
        words = {"src": src, "dst": dst}[vector]
        words[SPOILED] ^= flag

    return change


class TestWords:
    @pytest.mark.parametrize("flag", [MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, np.uint64(1 << 20)])
    def test_src_is_changed(self, world, flag):
        """alloc_and_copy() may only read src."""
        with pytest.raises(DriverBug, match=complaint("changed src", world)):
            migrate(world, after=changes("src", flag))

        assert ([False] * PAGES, [0, 1, 2, 3]) == (world.on_device(), world.contents())

    def test_dst_without_valid(self, world):
        """A word in dst that names a page says so with MIGRATE_PFN_VALID."""
        pfns = []

        def forget(src, dst):
            pfns.append(migrate_pfn_to_pfn(dst[[SPOILED]]))
            dst[SPOILED] &= ~MIGRATE_PFN_VALID

        with pytest.raises(DriverBug, match=complaint("MIGRATE_PFN_VALID", world)):
            migrate(world, after=forget)

        assert [0, 1, 2, 3] == world.contents()
        unlock_page(world.machine.mem, pfns[0])  # what no word named, the driver still has
        put_page(world.machine.mem, pfns[0])

    def test_locked_bit_is_missing(self, world):
        """A destination is not only locked, its word says so."""
        with pytest.raises(DriverBug, match=complaint("not locked", world)):
            migrate(world, after=changes("dst", MIGRATE_PFN_LOCKED))

        assert [0, 1, 2, 3] == world.contents()

    def test_page_is_not_locked(self, world):
        """A word that says so without the lock is a lie."""

        def unlock(src, dst):
            unlock_page(world.machine.mem, migrate_pfn_to_pfn(dst[[SPOILED]]))

        with pytest.raises(DriverBug, match=complaint("not locked", world)):
            migrate(world, after=unlock)

        assert [0, 1, 2, 3] == world.contents()

    def test_error_alone_is_no_bug(self, world):
        """MIGRATE_PFN_ERROR without a page is an answer, not a broken rule."""
        result = migrate(world, after=instead(world, {SPOILED: int(MIGRATE_PFN_ERROR)}))

        assert PAGES - 1 == result.cpages


class TestDestination:
    def refuse(self, world, rule, page, **options):
        """A migration whose spoiled entry gets *page* breaks *rule*, and harms nobody."""
        try:
            with pytest.raises(DriverBug, match=complaint(rule, world)):
                migrate(world, after=page, **options)

            assert [0, 1, 2, 3] == world.contents()
        finally:
            page.unlock()

    def test_frame_for_a_page_that_goes_to_the_device(self, world):
        """System memory is no destination for what the device asked for."""
        page = Page(world, frame(world))
        page.unlock = lambda: None  # it is given back with the rest

        self.refuse(world, "wrong zone", page)

    def test_page_of_another_device(self, world):
        """Nor is the memory of another driver."""
        other = NumpyDevice(world.machine, "64KiB", name="numpy1")
        page = Page(world, device_page(other))
        page.unlock = lambda: None

        self.refuse(world, "wrong zone", page)

        assert other.npages == other.chunks.free_pages

    def test_device_page_for_a_page_that_comes_back(self, world):
        """A page that leaves the device goes to system memory."""
        migrate(world)
        page = Page(world, device_page(world.gpu))
        page.unlock = lambda: None

        self.refuse(world, "wrong zone", page, back=True)

        assert world.gpu.npages == world.gpu.chunks.free_pages

    def test_free_frame(self, world):
        """A frame that the allocator has may not be handed over."""
        free = frame(world)
        put_page(world.machine.mem, np.array([free]))

        self.refuse(world, "free or in use", Page(world, free))

    def test_free_device_page(self, world):
        """Nor a page of the device that nobody uses."""
        self.refuse(world, "free or in use", Page(world, world.gpu.zone.end_pfn - 1))

    def test_mapped_page(self, world):
        """Nor one that a process has mapped."""
        other = world.machine.spawn("other")
        addr = other.mmap(4096)
        other.write(addr, b"precious")
        mine = other.pin(addr, 4096)
        pfn = mine.pfns.item()
        mine.release()

        self.refuse(world, "free or in use", Page(world, pfn))

        assert b"precious" == other.read(addr, 8)

    def test_page_under_migration(self, world):
        """Nor the very page that moves."""
        page = Page(world, world.pfns().item(SPOILED), lock=False)

        self.refuse(world, "free or in use", page)

    def test_page_that_somebody_else_holds(self, world):
        """Nor one that is not the driver's alone."""
        pfn = device_page(world.gpu)
        pin = world.hold(pfn)
        page = Page(world, pfn)

        self.refuse(world, "free or in use", page)

        pin.release()
        put_page(world.machine.mem, page.pfn)

    def test_zero_page(self, world):
        """Least of all the frame of zeros that everybody maps."""
        self.refuse(world, "free or in use", Page(world, world.machine.mem.zero_pfn))

    @pytest.mark.parametrize("pfn", [0, 0x1_0000, 1 << 40, (1 << 57) - 1])
    def test_no_such_page(self, world, pfn):
        """A PFN that no memory has is named in the complaint."""
        self.refuse(world, "no memory has", Page(world, pfn, lock=False))

    def test_page_given_twice(self, world):
        """Two entries cannot have one destination."""

        def repeat(src, dst):
            instead(world, {SPOILED: dst.item(0)})(src, dst)

        with pytest.raises(DriverBug, match=complaint("given twice", world)):
            migrate(world, after=repeat)

        assert [0, 1, 2, 3] == world.contents()
        assert world.gpu.npages == world.gpu.chunks.free_pages


class TestLeaks:
    def test_device_page(self, world):
        """A page of the device that is taken but not handed over is found, and named."""
        taken = []

        with pytest.raises(DriverBug, match=r"took 1 page.*dst does not name") as caught:
            migrate(world, after=lambda src, dst: taken.append(device_page(world.gpu)))

        assert f"{taken[0]:#x}" in str(caught.value)
        assert [0, 1, 2, 3] == world.contents()
        put_page(world.machine.mem, np.array(taken))

    def test_frame(self, world):
        """So is a frame of system memory, also where every answer was nothing."""
        taken = []

        with pytest.raises(DriverBug, match="dst does not name"):
            look_on(world, lambda src, dst: taken.append(frame(world)))

        assert [0, 1, 2, 3] == world.contents()
        put_page(world.machine.mem, np.array(taken))

    def test_forgotten_answer(self, world):
        """So is a destination whose word the driver has overwritten."""
        pfns = []

        def overwrite(src, dst):
            pfns.append(migrate_pfn_to_pfn(dst[[SPOILED]]))
            dst[SPOILED] = 0

        with pytest.raises(DriverBug, match="dst does not name"):
            migrate(world, after=overwrite)

        assert [0, 1, 2, 3] == world.contents()
        unlock_page(world.machine.mem, pfns[0])
        put_page(world.machine.mem, pfns[0])

    def test_page_that_is_freed_again(self, world):
        """A page that the driver takes and frees is none."""

        def borrow(src, dst):
            put_page(world.machine.mem, np.array([device_page(world.gpu)]))

        result = migrate(world, after=borrow)

        assert (PAGES, [0, 1, 2, 3]) == (result.cpages, world.contents())

    def test_memory_that_the_process_gets_meanwhile(self, world):
        """What a process maps while the driver works is not the driver's."""
        addr = world.process.mmap(1 << 20)

        result = migrate(world, after=lambda src, dst: world.process.write(addr, b"x" * 9_000))

        assert (PAGES, [0, 1, 2, 3]) == (result.cpages, world.contents())

    def test_nobody_looks_for_leaks_in_earnest(self, world):
        """Without debug=True the allocators are not watched, and the migration succeeds."""
        taken = []
        world.machine.mem.debug = False

        result = migrate(world, after=lambda src, dst: taken.append(frame(world)))

        assert (PAGES, [0, 1, 2, 3]) == (result.cpages, world.contents())
        put_page(world.machine.mem, np.array(taken))


class TestFinalizeAndMap:
    @pytest.mark.parametrize("vector", ["src", "dst"])
    @pytest.mark.parametrize("flag", [MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, np.uint64(1 << 20)])
    def test_vector_is_changed(self, world, vector, flag):
        """finalize_and_map() may only read both vectors; what had moved has moved."""
        with pytest.raises(DriverBug, match=complaint("finalize_and_map() changed", world)):
            migrate(world, mapping=changes(vector, flag))

        assert ([True] * PAGES, [0, 1, 2, 3]) == (world.on_device(), world.contents())


class TestComplaint:
    def test_it_counts_the_entries(self, world):
        """The first entry is named, with its words in hex; the others are counted."""

        def spoil(src, dst):
            src[[1, 3]] |= MIGRATE_PFN_ERROR

        with pytest.raises(DriverBug, match=r"entry 1 \(and 1 more\).*src 0x[0-9a-f]+, dst 0x"):
            migrate(world, after=spoil)

        assert [0, 1, 2, 3] == world.contents()

    def test_it_is_no_error_of_the_system(self, world):
        """A driver's mistake is an AssertionError: no `except OSError` takes it for bad luck."""
        with pytest.raises(AssertionError) as caught:
            migrate(world, after=changes("src", MIGRATE_PFN_VALID))

        assert not isinstance(caught.value, OSError)
        assert [0, 1, 2, 3] == world.contents()
