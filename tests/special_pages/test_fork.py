"""Two processes with one memory. Linux: copy_one_pte(), mm/memory.c; kernel/fork.c."""

import pytest

from hmm import hmm_mirror_unregister
from mm.mmu_notifier import MmuNotifyEvent
from mm.page_flags import PG_anon_exclusive
from mm.pgtable import _PAGE_DEVMAP, _PAGE_SOFT_DIRTY
from mm.swap import lru_add_drain_all
from tests.hmm.watch import mirror_of
from tests.mm.test_device_exclusive import Listener, faults_of
from tests.mm.test_rmap import migrating
from tests.special_pages.scenes import (
    DIRTY,
    PLACES,
    SWP_SOFT_DIRTY,
    away,
    bits,
    flagged,
    frames,
    in_place,
    kinds,
)
from tests.world import mapped_range


def forked(world):
    """The same range of a child that *world*'s process forks."""
    return world.seen_by(world.process.fork())


class TestCopyOnePte:
    """mm/memory.c, copy_one_pte()."""

    @pytest.mark.parametrize("where", PLACES)
    def test_rss(self, where):
        """Wherever a page is, the child has it as well."""
        with in_place(where) as world:
            child = forked(world)
            assert 3 == world.process.mm.anon_rss == child.process.mm.anon_rss

    @pytest.mark.parametrize(
        ("where", "kind"),
        [("moving", "moving r"), ("private", "private r"), ("public", "mapped r")],
    )
    def test_write_becomes_read_in_both(self, where, kind):
        """Memory that is copied when it is stored to is writable in neither."""
        with in_place(where) as world:
            before = frames(world).tolist()
            child = forked(world)

            assert [kind] * 3 == kinds(world) == kinds(child)
            assert before == frames(world).tolist() == frames(child).tolist()

    @pytest.mark.parametrize(("where", "kept"), [("moving", True), ("private", False)])
    def test_soft_dirty(self, where, kept):
        """A page on its way keeps the bit; one in device memory loses it with the right."""
        with in_place(where) as world:
            assert [True] * 3 == bits(world, SWP_SOFT_DIRTY)
            child = forked(world)

            assert [kept] * 3 == bits(world, SWP_SOFT_DIRTY) == bits(child, SWP_SOFT_DIRTY)

    def test_soft_dirty_of_a_public_page(self):
        """It is an entry like others."""
        child = forked(away(kind="public"))

        assert [True] * 3 == bits(child, _PAGE_SOFT_DIRTY) == bits(child, _PAGE_DEVMAP)

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_counts(self, where):
        """A device page has a reference and a mapping more, and belongs to neither."""
        world = away(kind=where)
        mem, pfns = world.machine.mem, frames(world)
        forked(world)

        assert ([3] * 3, [2] * 3) == (mem.refcount[pfns].tolist(), mem.mapcount[pfns].tolist())
        assert [False] * 3 == flagged(world, int(PG_anon_exclusive))

    def test_counts_of_a_page_that_moves(self):
        """Nobody but who moves it has a reference, however many entries wait."""
        world = mapped_range(2)
        lru_add_drain_all(world.machine.mem)
        with migrating(world) as (mem, pfns):
            before = mem.refcount[pfns].tolist()
            child = forked(world)
            assert (before, [0, 0]) == (mem.refcount[pfns].tolist(), mem.mapcount[pfns].tolist())

        assert [2, 2] == mem.mapcount[pfns].tolist()
        assert ["mapped r"] * 2 == kinds(world) == kinds(child)
        assert [False] * 2 == flagged(world, int(PG_anon_exclusive))

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_nobody_faults(self, where):
        """A device's pages are copied as entries, and the device hears that they may not change."""
        world = away(kind=where)
        listener = Listener(world)

        assert 0 == faults_of(world, lambda: forked(world))
        assert [MmuNotifyEvent.PROTECTION_PAGE] == [event for event, *_ in listener.heard]
        assert [True] * 3 == world.on_device()

    def test_store_to_a_private_page(self):
        """It comes back for both, and the one that stores has a copy."""
        world = away(2)
        child = forked(world)

        assert 2 == faults_of(world, lambda: world.process.write(world.at(1), b"\x55"))

        assert [True, False] == world.on_device() == child.on_device()
        assert ([0, 0x55], [0, 1]) == (world.contents(), child.contents())

    def test_store_to_a_public_page(self):
        """It stays for the other, and the one that stores has a copy in system memory."""
        world = away(2, "public")
        child = forked(world)

        assert 1 == faults_of(child, lambda: child.process.write(child.at(1), b"\x55"))

        assert ([True, True], [True, False]) == (world.on_device(), child.on_device())
        assert ([0, 1], [0, 0x55]) == (world.contents(), child.contents())

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_read_only(self, where):
        """What was read-only before is so in both."""
        world = away(kind=where)
        world.process.mprotect(world.addr, world.nbytes, "r")
        before = kinds(world)
        child = forked(world)

        assert before == kinds(world) == kinds(child)

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_grandchildren(self, where):
        """Whoever of a family is left has the pages, on the device, until the last exits."""
        world = away(kind=where)
        free = world.gpu.chunks.free_pages
        child = forked(world)
        grandchild = forked(child)
        world.process.exit()
        child.process.exit()

        assert [True] * 3 == grandchild.on_device()
        assert free == world.gpu.chunks.free_pages
        grandchild.process.exit()
        assert free + 3 == world.gpu.chunks.free_pages

    def test_pinned_public_page(self):
        """The child has a copy in system memory at once (5.9): a pin means the parent's page."""
        world = away(kind="public")
        pfn = world.pin(1).pfns.item(0)
        child = forked(world)

        assert pfn == frames(world)[1] != frames(child)[1]
        assert ([True] * 3, [True, False, True]) == (world.on_device(), child.on_device())
        assert child.intact()

    @pytest.mark.parametrize("where", ["system", "public"])
    def test_page_that_a_device_has_for_itself(self, where):
        """It is given back (5.14), then shared."""
        with in_place(where) as world:
            world.make_exclusive(1)
            child = forked(world)

            assert ["mapped r"] * 3 == kinds(world) == kinds(child)
            assert (where == "public") == world.on_device()[1] == child.on_device()[1]
            assert world.intact()
            assert child.intact()

    def test_dirty(self):
        """What a public page's entry knew of stores, its copy knows."""
        world = away(1, "public")
        world.process.write(world.addr, b"\1")
        child = forked(world)
        world.gpu.to_system(child.process, child.addr, child.nbytes)

        assert [True] == flagged(child, DIRTY)


class TestForkOfHmm:
    """kernel/fork.c, hmm_mm_init() and hmm_mm_destroy()."""

    def test_child_has_no_mirrors(self):
        """A device that mirrors the parent hears nothing of the child."""
        world = away()
        mirror = mirror_of(world.process.mm)
        child = forked(world)
        before = len(mirror.ops.heard)

        assert world.process.mm.hmm is mirror.hmm is not None
        assert (None, []) == (child.process.mm.hmm, child.process.mm.notifiers)
        child.process.munmap(child.addr, child.nbytes)
        assert before == len(mirror.ops.heard)
        hmm_mirror_unregister(mirror)

    def test_device_table_of_the_child(self):
        """A device has none for the child until it touches it; the pages are there then."""
        world = away(kind="private")
        child = forked(world)
        assert child.process.mm not in world.gpu.tables

        assert b"\1" == world.gpu.read(child.process, child.at(1), 1)
        assert child.process.mm in world.gpu.tables
        assert [True] * 3 == child.on_device()

    def test_end(self):
        """With the address space goes what HMM knew of it."""
        world = away()
        mirror = mirror_of(world.process.mm)
        hmm = world.process.mm.hmm
        world.process.exit()

        assert (None, None, []) == (world.process.mm.hmm, mirror.hmm, hmm.mirrors)
