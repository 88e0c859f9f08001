"""What mm does about migration entries and device pages: a class for each place of v4.20.

Entries are decoded here with plain integers, by the picture at the top of mm/swapops.py:
the code under test does not judge itself.
"""

import errno
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from devices import NumpyDevice
from mm import PAGE_SIZE, BusError, Deadlock, OutOfMemory
from mm.errors import KernelBug, NotMapped
from mm.pgtable import _PAGE_ACCESSED, _PAGE_DEVMAP, _PAGE_DIRTY, _PAGE_RW, _PAGE_SOFT_DIRTY
from mm.rmap import page_referenced, remove_migration_ptes
from mm.swap import lru_add_drain_all
from mm.swapops import (
    is_device_private_entry,
    is_migration_entry,
    is_swap_entry,
    is_write_device_private_entry,
    is_write_migration_entry,
    make_device_exclusive_entry,
    make_device_private_entry,
    make_hwpoison_entry,
    make_migration_entry,
    make_readable,
    swp_entry,
    swp_offset,
)
from mm.typing import pages
from tests.hmm.callbacks import look_on, migrate
from tests.mm.test_device_exclusive import Listener
from tests.mm.test_rmap import begin_migration, end_migration, migrating
from tests.world import mapped_range

LOCKED, DIRTY, RESERVED, UNEVICTABLE, MLOCKED = (1 << bit for bit in (0, 4, 12, 19, 20))
SWP_SOFT_DIRTY = 1 << 1
TYPES = {
    25: "exclusive rw",
    26: "exclusive r",
    27: "poison",
    28: "moving r",
    29: "moving rw",
    30: "private rw",
    31: "private r",
}
YES, NO = np.array([True]), np.array([False])
MAKERS = {
    "moving r": lambda pfns: make_migration_entry(pfns, NO),
    "moving rw": lambda pfns: make_migration_entry(pfns, YES),
    "private r": lambda pfns: make_device_private_entry(pfns, NO),
    "private rw": lambda pfns: make_device_private_entry(pfns, YES),
    "exclusive r": lambda pfns: make_device_exclusive_entry(pfns, NO),
    "exclusive rw": lambda pfns: make_device_exclusive_entry(pfns, YES),
    "poison": make_hwpoison_entry,
}
PLACES = ("system", "private", "public", "moving")


def decoded(word):
    """(what the entry is, its PFN or slot)."""
    if not word:
        return "none", -1
    if word & 0x101:  # present, or PROT_NONE
        return "mapped rw" if word & int(_PAGE_RW) else "mapped r", word >> 12 & (1 << 40) - 1
    offset = (~word & (1 << 64) - 1) >> 9 & (1 << 50) - 1
    return TYPES.get(word >> 59, "swap"), offset


def kinds(world):
    """What the entry of each page of *world* is."""
    return [decoded(word)[0] for word in world.ptes().tolist()]


def frames(world):
    """The PFN in each entry of *world*, whatever kind it is."""
    return np.array([decoded(word)[1] for word in world.ptes().tolist()])


def bits(world, mask):
    """Which entries of *world* have a bit of *mask*."""
    return [bool(word & int(mask)) for word in world.ptes().tolist()]


def flagged(world, mask):
    """Which pages of *world* have a flag of *mask*."""
    return [bool(flags & mask) for flags in world.machine.mem.flags[frames(world)].tolist()]


def away(pages=3, kind="private", **options):
    """A range that is all in memory of a device of *kind*."""
    world = mapped_range(pages, kind=kind, **options)
    world.gpu.to_device(world.process, world.addr, world.nbytes)
    return world


@contextmanager
def in_place(where, pages=3, **options):
    """A range whose pages are in *where*, of PLACES; those that move arrive when it ends."""
    if where in ("private", "public"):
        yield away(pages, where, **options)
        return
    world = mapped_range(pages, **options)
    if where == "system":
        yield world
        return
    with migrating(world):
        yield world


@contextmanager
def waiter(world, call):
    """A thread that has called *call* and sleeps; it ends after the block."""
    heard = []
    thread = threading.Thread(target=lambda: heard.append(call()), daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not world.machine.mem.locks.waiting and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    assert thread.is_alive(), "it did not wait"
    yield heard
    thread.join(10)
    assert not thread.is_alive()


class TestSwapTypes:
    """include/linux/swap.h."""

    def test_order(self):
        """Poison, migration read and write, device write and read end the five bits of types.

        As since v5.14, entries that a device has for itself take two more, below them.
        """
        order = sorted(MAKERS, key=lambda name: int(MAKERS[name](pages(9))[0]) >> 59)

        assert list(TYPES.values()) == order
        assert [31] == [int(make_device_private_entry(pages(9), NO)[0]) >> 59]

    @pytest.mark.parametrize("where", ["private", "moving"])
    def test_no_swap_area(self, where):
        """free_swap_and_cache() of a kernel without swap takes such entries."""
        with in_place(where) as world:
            assert 0 == world.machine.mem.swap.max
            world.process.munmap(world.addr, world.nbytes)

        assert 0 == world.process.mm.anon_rss


class TestSwapOps:
    """include/linux/swapops.h."""

    @pytest.mark.parametrize("name", MAKERS)
    @pytest.mark.parametrize("pfn", [0, 1, 0x1234, (1 << 40) - 1])
    def test_what_is_what(self, name, pfn):
        """An entry is of one kind, keeps its PFN, and says whether it may be written."""
        entry = MAKERS[name](pages(pfn))

        assert (name, pfn) == decoded(int(entry[0]))
        assert [pfn] == swp_offset(entry).tolist()
        assert ["moving" in name] == is_migration_entry(entry).tolist()
        assert ["private" in name] == is_device_private_entry(entry).tolist()
        assert [name == "moving rw"] == is_write_migration_entry(entry).tolist()
        assert [name == "private rw"] == is_write_device_private_entry(entry).tolist()
        assert [False] == is_swap_entry(entry).tolist()

    @pytest.mark.parametrize("name", MAKERS)
    def test_make_read(self, name):
        """Each becomes its own read-only kind, of the same page."""
        entry = make_readable(MAKERS[name](pages(0x77)))

        assert (name.replace("rw", "r"), 0x77) == decoded(int(entry[0]))

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_page_of_a_migration_entry_is_locked(self, kind):
        """While a driver copies, whatever has a migration entry has its page locked."""
        world = mapped_range(3, kind=kind)
        seen = []

        migrate(world, after=lambda src, dst: seen.append((kinds(world), flagged(world, LOCKED))))

        assert [(["moving rw"] * 3, [True] * 3)] == seen

    def test_unlocked_page_of_a_migration_entry(self):
        """The kernel's BUG_ON(!PageLocked) is one of verify()."""
        world = mapped_range(1)
        with migrating(world) as (mem, pfns):
            mem.flags[pfns] &= ~np.uint64(LOCKED)
            with pytest.raises(KernelBug):
                world.machine.verify()
            mem.flags[pfns] |= np.uint64(LOCKED)


class TestVmNormalPage:
    """mm/memory.c, _vm_normal_page()."""

    def test_public_page_for_who_zaps(self):
        """With with_public_device it is a page: unmapping drops its mapping and frees it."""
        world = away(kind="public")
        pfns, free = frames(world), world.gpu.chunks.free_pages

        world.process.munmap(world.addr, world.nbytes)

        assert [0] * 3 == world.machine.mem.mapcount[pfns].tolist()
        assert free + 3 == world.gpu.chunks.free_pages

    @pytest.mark.parametrize("advice", ["cold", "pageout", "free"])
    def test_public_page_for_all_others(self, advice):
        """Without it there is none, so reclaim cannot be told of it.

        As since v6.1, MADV_FREE passes over it too; that of v4.20 made its entry clean.
        """
        world = away(kind="public", swap="1MiB")
        world.fill()
        before = world.ptes().tolist()
        assert [True] * 3 == bits(world, _PAGE_DIRTY) == bits(world, _PAGE_ACCESSED)

        world.process.madvise(world.addr, world.nbytes, advice)

        assert before == world.ptes().tolist()
        assert ([True] * 3, True) == (world.on_device(), world.intact())


class TestZapPteRange:
    """mm/memory.c, zap_pte_range()."""

    @pytest.mark.parametrize("where", PLACES)
    def test_rss(self, where):
        """Wherever the page is, the process has one less."""
        with in_place(where) as world:
            before = world.process.mm.anon_rss
            world.process.munmap(world.at(0), 2 * PAGE_SIZE)

            assert (3, 1) == (before, world.process.mm.anon_rss)

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_device_page(self, kind):
        """It loses its mapping and the reference of that, and is free with the one that is left."""
        world = away(kind=kind)
        mem, pfns = world.machine.mem, frames(world)

        world.process.madvise(world.addr, PAGE_SIZE, "dontneed")

        assert [1, 2, 2] == mem.refcount[pfns].tolist()
        assert [0, 1, 1] == mem.mapcount[pfns].tolist()
        assert "none" == kinds(world)[0]

    def test_page_that_moves(self):
        """Only rss changes: the page stays locked and referenced for whoever migrates it."""
        world = mapped_range(2)
        with migrating(world) as (mem, pfns):
            before = mem.refcount[pfns].tolist(), mem.flags[pfns].tolist()
            world.process.madvise(world.addr, world.nbytes, "dontneed")

            assert ["none"] * 2 == kinds(world)
            assert before == (mem.refcount[pfns].tolist(), mem.flags[pfns].tolist())
            assert 0 == world.process.mm.anon_rss

    def test_end_of_such_a_migration(self):
        """It maps nothing where the entry is gone, and frees the page."""
        world = away(2)
        free = world.gpu.chunks.free_pages
        mem, pfns = begin_migration(world)
        world.process.madvise(world.addr, world.nbytes, "dontneed")
        remove_migration_ptes(mem, pfns, pfns)
        end_migration(mem, pfns)

        assert ["none"] * 2 == kinds(world)
        assert free + 2 == world.gpu.chunks.free_pages


class Recorder(NumpyDevice):
    """A device that notes the faults it is asked to serve, and in what state its pages were."""

    def page_fault(self, vma, addrs, pfns, *, write):
        found = [(self.mem.flags[pfns] & np.uint64(LOCKED)).any(), self.mem.refcount[pfns].tolist()]
        self.__dict__.setdefault("faults", []).append((addrs.tolist(), pfns.tolist(), write, found))
        return super().page_fault(vma, addrs, pfns, write=write)


class TestDoSwapPage:
    """mm/memory.c, do_swap_page()."""

    @pytest.mark.parametrize("write", [False, True])
    def test_migration_entry(self, write):
        """The fault waits, ends well, and comes again when the page is there."""
        world = mapped_range(1)
        faults = world.process.min_flt
        mem, pfns = begin_migration(world)
        with waiter(world, lambda: world.process.touch(world.addr, 1, write=write)) as heard:
            assert ([], ["moving rw"]) == (heard, kinds(world))
            remove_migration_ptes(mem, pfns, pfns)
            end_migration(mem, pfns)

        assert ([None], ["mapped rw"]) == (heard, kinds(world))
        assert pfns.tolist() == frames(world).tolist()
        assert faults < world.process.min_flt
        assert 0 == world.process.maj_flt

    def test_fault_of_who_migrates(self):
        """A driver that waits for the page which it migrates itself is told so."""
        world = mapped_range(1)

        with pytest.raises(Deadlock):
            look_on(world, lambda src, dst: world.process.read(world.addr, 1))

        assert world.intact()

    @pytest.mark.parametrize("write", [False, True])
    def test_device_private_entry(self, write):
        """The pagemap's page_fault is called, with a page that nobody has locked or taken."""
        world = away(3, driver=Recorder)
        pfn = frames(world).item(1)

        world.process.touch(world.at(1), 1, write=write)

        assert [([world.at(1)], [pfn], write, [False, [2]])] == world.gpu.faults
        assert ["private rw", "mapped rw", "private rw"] == kinds(world)
        assert world.intact()

    def test_public_page(self):
        """It is present: the driver is not asked."""
        world = away(3, "public", driver=Recorder)

        assert world.intact()
        assert "faults" not in world.gpu.__dict__

    def test_private_entry_of_a_locked_page(self):
        """The CPU waits for the lock (7.0); v4.20 calls the driver, which can do nothing."""
        world = away(1, driver=Recorder)
        world.lock(0)
        with waiter(world, lambda: world.process.read(world.addr, 1)):
            assert "faults" not in world.gpu.__dict__
            world.unlock(0)

        assert 1 == len(world.gpu.faults)
        assert ["mapped rw"] == kinds(world)

    def test_entry_that_changed(self):
        """Two threads that want the page: it comes back once, and both find it."""
        world = away(1)
        world.lock(0)
        with waiter(world, lambda: world.process.read(world.addr, 1)) as heard:
            world.unlock(0)
            assert b"\0" == world.process.read(world.addr, 1)

        assert ([b"\0"], ["mapped rw"]) == (heard, kinds(world))
        assert 1 == world.process.mm.anon_rss

    def test_hwpoison(self):
        """VM_FAULT_HWPOISON, which the process sees as SIGBUS; its neighbours are well."""
        world = mapped_range(2)
        word = world.ptes().item(0)
        world.rewrite([0], lambda ptes: make_hwpoison_entry(pages(7)))

        with pytest.raises(BusError):
            world.process.read(world.at(0), 1)
        assert b"\1" == world.process.read(world.at(1), 1)
        world.rewrite([0], lambda ptes: ptes * 0 + np.uint64(word))

    @pytest.mark.parametrize("kind", [1, 5, 24])
    def test_bad_entry(self, kind):
        """An entry of no area is a bug: where v4.20 logs it and sends SIGBUS, we stop."""
        world = mapped_range(1)
        word = world.ptes().item(0)
        world.rewrite([0], lambda ptes: swp_entry(kind, pages(3)))

        with pytest.raises(KernelBug, match=f"bad page table entry .* at {world.addr:#x}"):
            world.process.read(world.addr, 1)
        world.rewrite([0], lambda ptes: ptes * 0 + np.uint64(word))


class TestRemoveMigrationPte:
    """mm/migrate.c, remove_migration_pte()."""

    def test_old(self):
        """The entry comes back writable and with its soft-dirty bit, but not accessed."""
        world = mapped_range(2)
        assert [True] * 2 == bits(world, _PAGE_ACCESSED)

        with migrating(world):
            pass

        assert (["mapped rw"] * 2, [False] * 2) == (kinds(world), bits(world, _PAGE_ACCESSED))
        assert [True] * 2 == bits(world, _PAGE_SOFT_DIRTY)

    @pytest.mark.parametrize("soft_dirty", [False, True])
    @pytest.mark.parametrize("where", ["system", "private", "public"])
    def test_soft_dirty(self, where, soft_dirty):
        """The bit goes from entry to entry."""
        with in_place(where, 1) as world:
            if not soft_dirty:
                world.process.clear_refs(4)
            with migrating(world):
                assert [soft_dirty] == bits(world, SWP_SOFT_DIRTY)

        there = SWP_SOFT_DIRTY if where == "private" else _PAGE_SOFT_DIRTY
        assert [soft_dirty] == bits(world, there)

    def test_maybe_mkwrite(self):
        """A page that was writable is not, if its VMA may not be written any more."""
        world = mapped_range(2)
        with migrating(world):
            world.vma.vm_flags &= ~2  # VM_WRITE
            assert ["moving rw"] * 2 == kinds(world)

        assert ["mapped r"] * 2 == kinds(world)

    @pytest.mark.parametrize(
        ("kind", "entry", "devmap"), [("private", "private", False), ("public", "mapped", True)]
    )
    @pytest.mark.parametrize("write", [False, True])
    def test_new_page_of_a_device(self, kind, entry, devmap, write):
        """A private page gets an entry of its own, a public one is mapped as devmap."""
        world = mapped_range(2, kind=kind)
        if not write:
            world.write_protect(0, 1)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [f"{entry} {'rw' if write else 'r'}"] * 2 == kinds(world)
        assert [devmap] * 2 == bits(world, 0 if kind == "private" else _PAGE_DEVMAP)

    @pytest.mark.parametrize("where", ["system", "private", "public"])
    def test_rmap(self, where):
        """What is mapped again has a mapping and a reference for each process."""
        with in_place(where, 2) as world:
            world.fork(0)
            lru_add_drain_all(world.machine.mem)
            mem, pfns = world.machine.mem, frames(world)
            with migrating(world):
                assert [0, 0] == mem.mapcount[pfns].tolist()

        assert [2, 1] == mem.mapcount[pfns].tolist()
        base = where != "system"
        assert [2 + base, 1 + base] == mem.refcount[pfns].tolist()

    def test_vm_locked(self):
        """A page that comes to a VM_LOCKED VMA is PG_mlocked and unevictable."""
        world = away(2)
        world.vma.vm_flags |= 0x2000  # VM_LOCKED; mlock() itself would bring the pages back
        world.process.mm.locked_vm = 2

        world.gpu.to_system(world.process, world.addr, world.nbytes)
        lru_add_drain_all(world.machine.mem)

        assert ([True] * 2, [True] * 2) == (flagged(world, MLOCKED), flagged(world, UNEVICTABLE))


class TestMigrationEntryWait:
    """mm/migrate.c, __migration_entry_wait()."""

    def test_no_reference(self):
        """A waiter takes no reference, as since v5.0; that of v4.20 would fail the migration."""
        world = mapped_range(1)
        mem, pfns = begin_migration(world)
        before = mem.refcount[pfns].tolist()
        with waiter(world, lambda: world.process.read(world.addr, 1)):
            assert before == mem.refcount[pfns].tolist()
            remove_migration_ptes(mem, pfns, pfns)
            end_migration(mem, pfns)


class TestTryToUnmapOne:
    """mm/rmap.c, try_to_unmap_one()."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    @pytest.mark.parametrize("write", [False, True])
    def test_device_page(self, kind, write):
        """A migration entry takes its place with the rights that it had, and it loses its mapping.

        v4.20 makes the entry of a private page read-only (until 5.14), and leaves a public page
        mapped (until 6.0).
        """
        world = away(2, kind)
        if not write:
            world.write_protect(0, 1)
        before = frames(world).tolist()
        with migrating(world) as (mem, pfns):
            assert [f"moving {'rw' if write else 'r'}"] * 2 == kinds(world)
            assert before == frames(world).tolist()
            assert ([0] * 2, [2] * 2) == (mem.mapcount[pfns].tolist(), mem.refcount[pfns].tolist())

    def test_rss(self):
        """A page on its way is still the process's."""
        with in_place("private") as world, migrating(world):
            assert 3 == world.process.mm.anon_rss

    def test_dirty(self):
        """The dirty bit of the entry goes to the page (6.1); a private entry has none."""
        world = mapped_range(1)
        world.machine.mem.flags[frames(world)] &= ~np.uint64(DIRTY)
        assert [True] == bits(world, _PAGE_DIRTY)

        with migrating(world):
            assert [True] == flagged(world, DIRTY)


class TestPageVmaMapped:
    """mm/page_vma_mapped.c, map_pte() and check_pte()."""

    def test_private_entry_is_a_mapping(self):
        """Who unmaps a device page finds the entries of every process."""
        world = away(2)
        child = world.seen_by(world.fork(0, 1))

        with migrating(world):
            assert ["moving r"] * 2 == kinds(world) == kinds(child)

        assert ["private r"] * 2 == kinds(world) == kinds(child)

    def test_migration_entry_is_none(self):
        """Who asks for mappings passes over a page on its way, who ends a migration over others."""
        world = mapped_range(3)
        pfns = frames(world)
        with migrating(world) as (mem, _):
            assert [False] * 3 == page_referenced(mem, pfns).tolist()
        remove_migration_ptes(mem, pfns, pfns)

        assert (["mapped rw"] * 3, [1] * 3) == (kinds(world), mem.mapcount[pfns].tolist())


class TestChangePteRange:
    """mm/mprotect.c, change_pte_range()."""

    @pytest.mark.parametrize(
        ("where", "before", "after", "soft_dirty"),
        [
            ("moving", "moving rw", "moving r", True),
            ("private", "private rw", "private r", False),
        ],
    )
    def test_write_becomes_read(self, where, before, after, soft_dirty):
        """A page on its way keeps its soft-dirty bit, one in device memory loses it."""
        with in_place(where) as world:
            world.rewrite(range(3), lambda ptes: ptes | np.uint64(SWP_SOFT_DIRTY))
            assert [before] * 3 == kinds(world)
            world.process.mprotect(world.addr, world.nbytes, "r")

            assert ([after] * 3, [soft_dirty] * 3) == (kinds(world), bits(world, SWP_SOFT_DIRTY))

    @pytest.mark.parametrize("where", ["moving", "private"])
    def test_read_stays_read(self, where):
        """Rights that come back do not make the entry writable; a store faults."""
        with in_place(where) as world:
            world.process.mprotect(world.addr, world.nbytes, "r")
            before = world.ptes().tolist()
            world.process.mprotect(world.addr, world.nbytes, "rw")

            assert before == world.ptes().tolist()
        world.process.write(world.addr, b"\7")
        assert b"\7" == world.process.read(world.addr, 1)

    def test_device_hears(self):
        """The entries count as changed: the device may not store to its page any more."""
        world = away()
        listener = Listener(world)

        world.process.mprotect(world.addr, world.nbytes, "r")

        assert [(world.addr, world.addr + world.nbytes)] == [heard[1:3] for heard in listener.heard]


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


class TestMincore:
    """mm/mincore.c, mincore_pte_range()."""

    @pytest.mark.parametrize("kind", MAKERS)
    def test_entry_that_is_no_swap(self, kind):
        """Whatever hides among the swap entries counts as being in memory."""
        world = mapped_range(2, filled=False)
        world.process.touch(world.at(0), 1, write=False)
        words = world.ptes().tolist()
        world.rewrite([0], lambda ptes: MAKERS[kind](pages(0x77)))

        resident = world.process.mincore(world.addr, world.nbytes)
        world.rewrite([0], lambda ptes: np.array(words[:1], dtype=np.uint64))

        assert [True, False] == resident.tolist()

    @pytest.mark.parametrize("where", PLACES)
    def test_pages(self, where):
        """So do the pages themselves, and nobody waits or faults."""
        with in_place(where) as world, world.machine.vmstat.counting() as delta:
            assert [True] * 3 == world.process.mincore(world.addr, world.nbytes).tolist()

        assert "pgfault" not in delta

    def test_swap(self):
        """A page in swap is not in memory, unless the swap cache has it."""
        world = mapped_range(3, swap="1MiB")
        world.pageout()
        assert ["swap"] * 3 == kinds(world)
        before = world.process.mincore(world.addr, world.nbytes).tolist()
        world.process.madvise(world.at(1), PAGE_SIZE, "willneed")

        assert [False] * 3 == before
        assert [False, True, False] == world.process.mincore(world.addr, world.nbytes).tolist()

    def test_hole(self):
        """Device memory is no excuse for a hole in the range."""
        world = away()
        world.process.munmap(world.at(1), PAGE_SIZE)

        with pytest.raises(NotMapped):
            world.process.mincore(world.addr, world.nbytes)


class TestPutPage:
    """mm/swap.c, __put_page() and release_pages()."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_device_page(self, kind):
        """The last user's reference gives it to its driver, not to the allocator or a list."""
        world = away(kind=kind)
        lru_add_drain_all(world.machine.mem)
        free, device = world.machine.nr_free_pages, world.gpu.chunks.free_pages
        with world.machine.vmstat.counting() as delta:
            world.process.madvise(world.addr, world.nbytes, "dontneed")

        assert (free, device + 3) == (world.machine.nr_free_pages, world.gpu.chunks.free_pages)
        assert [] == [name for name in delta if name.startswith(("pgfree", "nr_inactive"))]

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_kinds_in_one_call(self, kind):
        """Frames go to the allocator and device pages to their driver, from one range."""
        world = mapped_range(4, kind=kind)
        world.gpu.to_device(world.process, world.at(1), 2 * PAGE_SIZE)
        lru_add_drain_all(world.machine.mem)
        free, device = world.machine.nr_free_pages, world.gpu.chunks.free_pages
        world.process.madvise(world.addr, world.nbytes, "dontneed")

        assert (free + 2, device + 2) == (world.machine.nr_free_pages, world.gpu.chunks.free_pages)


class TestSwapfile:
    """mm/swapfile.c, free_swap_and_cache(); mm/swap_state.c, readahead."""

    @pytest.mark.parametrize("where", ["private", "moving"])
    def test_no_slot(self, where):
        """Entries that are gone let go of no slot, though their PFN may be the number of one."""
        with in_place(where, swap="1MiB") as world:
            other = world.machine.spawn("other")
            addr = other.mmap(4 * PAGE_SIZE)
            other.write(addr, b"\1" * (4 * PAGE_SIZE))
            other.madvise(addr, 4 * PAGE_SIZE, "pageout")
            used = world.machine.mem.swap.inuse_pages
            world.process.madvise(world.addr, world.nbytes, "dontneed")

            assert 4 == used == world.machine.mem.swap.inuse_pages
        assert b"\1" * (4 * PAGE_SIZE) == other.read(addr, 4 * PAGE_SIZE)

    def test_readahead(self):
        """MADV_WILLNEED reads what is in swap, and nothing for a page in device memory."""
        world = mapped_range(4, swap="1MiB")
        world.gpu.to_device(world.process, world.at(1), 2 * PAGE_SIZE)
        world.pageout(0, 3)
        assert ["swap", "private rw", "private rw", "swap"] == kinds(world)

        with world.machine.vmstat.counting() as delta:
            world.process.madvise(world.addr, world.nbytes, "willneed")

        assert 1 == delta["pswpin"]  # page 0 is zeros, which take no reading
        assert [False, True, True, False] == world.on_device()


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


class TestMemmapInitZoneDevice:
    """mm/page_alloc.c, memmap_init_zone_device()."""

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_page(self, kind):
        """Reserved, with one reference, its pagemap, no data of the driver, and no other state."""
        world = mapped_range(1, kind=kind)
        mem, zone = world.machine.mem, world.gpu.zone
        rows = slice(zone.start_pfn, zone.end_pfn)

        assert {RESERVED} == set(mem.flags[rows].tolist())
        assert ({1}, {0}) == (set(mem.refcount[rows].tolist()), set(mem.mapcount[rows].tolist()))
        assert {0} == set(mem.private[rows].tolist())
        assert world.gpu is mem.pagemap_of(zone.start_pfn) is mem.pagemap_of(zone.end_pfn - 1)

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_no_zone_of_the_allocator(self, kind):
        """When frames run out, nobody gets a page of a device instead."""
        world = mapped_range(1, nodes=("4MiB",), memory="8MiB", kind=kind)
        free = world.gpu.chunks.free_pages
        addr = world.process.mmap("8MiB", flags="anon|private|noreserve")

        with pytest.raises(OutOfMemory):
            world.process.touch(addr, "8MiB")

        assert free == world.gpu.chunks.free_pages
        world.process.munmap(addr, "8MiB")


class TestTaskMmu:
    """fs/proc/task_mmu.c."""

    @pytest.mark.parametrize("where", PLACES)
    def test_smaps(self, where):
        """Rss and Pss count a page wherever it is."""
        with in_place(where) as world:
            stats = world.process.smaps()[0]

            assert (3 * PAGE_SIZE, 3 * PAGE_SIZE) == (stats.resident, stats.pss)
            assert (3 * PAGE_SIZE, 0) == (stats.anonymous, stats.swap)

    @pytest.mark.parametrize("where", ["private", "public"])
    def test_smaps_of_shared_pages(self, where):
        """Pss has half of what two processes map."""
        world = away(2, where)
        world.fork(0)

        assert (8192, 6144) == (world.process.smaps()[0].resident, world.process.smaps()[0].pss)

    @pytest.mark.parametrize(("where", "kind"), [("private", 30), ("moving", 29)])
    def test_pagemap_of_swap(self, where, kind):
        """PM_SWAP, with the type of the entry below its PFN; never the bit of a sole mapping."""
        with in_place(where) as world:
            expected = [1 << 62 | 1 << 55 | pfn << 5 | kind for pfn in frames(world).tolist()]

            words = world.process.pagemap(world.addr, 3).tolist()
            assert expected == [word | 1 << 55 for word in words]

    def test_pagemap_of_a_public_page(self):
        """PM_PRESENT, with the PFN of the device's page."""
        world = away(kind="public")
        words = world.process.pagemap(world.addr, 3).tolist()

        assert frames(world).tolist() == [word & (1 << 55) - 1 for word in words]
        assert [2] * 3 == [word >> 62 for word in words]


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
