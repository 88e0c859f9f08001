"""The two ends of a migration. Linux: mm/migrate.c."""

import pytest

from mm.migration_ptes import remove_migration_ptes
from mm.pgtable import _PAGE_ACCESSED, _PAGE_DEVMAP, _PAGE_SOFT_DIRTY
from mm.swap import lru_add_drain_all
from tests.mm.test_rmap import begin_migration, end_migration, migrating
from tests.special_pages.scenes import (
    MLOCKED,
    SWP_SOFT_DIRTY,
    UNEVICTABLE,
    away,
    bits,
    flagged,
    frames,
    in_place,
    kinds,
    waiter,
)
from tests.world import mapped_range


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
