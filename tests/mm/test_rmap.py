"""From pages to page-table entries, and the two ends of a migration."""

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import BusError
from mm.errors import KernelBug
from mm.filemap import trylock_page, unlock_page
from mm.gfp import GFP_KERNEL
from mm.memremap import devm_memremap_pages, devm_memunmap_pages
from mm.migration_ptes import poison_migration_ptes, remove_migration_ptes
from mm.page_alloc import alloc_pages_bulk
from mm.page_flags import PG_dirty, PG_swapbacked
from mm.pgtable import (
    _PAGE_DEVMAP,
    _PAGE_DIRTY,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    pte_offset,
    pte_pfn,
    pte_soft_dirty,
    pte_write,
    pte_young,
)
from mm.rmap import (
    page_add_anon_rmap,
    page_mapped,
    page_referenced,
    page_remove_rmap,
    rmap_walk,
    try_to_unmap,
)
from mm.swap import get_page, put_page, putback_lru_page
from mm.swapops import (
    SWP_SOFT_DIRTY,
    is_device_private_entry,
    is_migration_entry,
    is_write_device_private_entry,
    is_write_migration_entry,
    swp_offset,
)
from mm.types import VM_LOCKED, MemoryType
from mm.typing import PAGE_SIZE, pages
from tests.mm.test_memremap import Borrowed
from tests.world import mapped_range


def vma_at(process, addr):
    vma = process.find_vma(addr)
    assert vma is not None
    return vma


def where(mem, pfns):
    """(process, address) of every place where rmap_walk() says each of *pfns* may be."""
    found = [set() for _ in range(pfns.size)]
    for vma, which, addrs in rmap_walk(mem, pfns):
        for page, addr in zip(which.tolist(), addrs.tolist(), strict=True):
            found[page].add((vma.vm_mm.name, addr))
    return found


def entries_at(world):
    return pte_offset(world.machine.mem.tables, world.process.mm.pgd, world.addrs)


def begin_migration(world):
    """Lock and hold the pages of *world* and put migration entries in their place."""
    mem, pfns = world.machine.mem, world.pfns()
    assert trylock_page(mem, pfns).all()
    get_page(mem, pfns)
    try_to_unmap(mem, pfns)
    return mem, pfns


def end_migration(mem, pfns):
    """Let go of pages that a migration has left behind."""
    unlock_page(mem, pfns)
    put_page(mem, pfns)


@contextmanager
def migrating(world):
    """Inside, the pages of *world* are on the move; then they come back."""
    mem, pfns = begin_migration(world)
    yield mem, pfns
    remove_migration_ptes(mem, pfns, pfns)
    end_migration(mem, pfns)


class TestPageReferenced:
    def test_accessed_bits(self):
        """Asking forgets: what was not used since is not referenced."""
        world = mapped_range(pages=3)
        mem, pfns = world.machine.mem, world.pfns()

        assert [True] * 3 == page_referenced(mem, pfns).tolist()
        world.process.read(world.at(1), 1)

        assert [False, True, False] == page_referenced(mem, pfns).tolist()
        assert [False] * 3 == pte_young(world.ptes()).tolist()

    def test_any_mapping_counts(self):
        """One process may have used what another has not."""
        world = mapped_range(pages=2)
        child = world.fork(0, 1)
        page_referenced(world.machine.mem, world.pfns())
        child.read(world.at(1), 1)

        assert [False, True] == page_referenced(world.machine.mem, world.pfns()).tolist()

    def test_locked_memory(self):
        """It counts as used, always."""
        world = mapped_range(pages=1)
        world.clear_refs(0)
        world.vma.vm_flags |= VM_LOCKED

        assert [True] == page_referenced(world.machine.mem, world.pfns()).tolist()

        world.vma.vm_flags &= ~VM_LOCKED

    def test_page_of_nobody(self):
        """Where nothing maps it nobody uses it."""
        world = mapped_range(pages=1)
        pfns = alloc_pages_bulk(world.machine.mem, GFP_KERNEL, 0, 1)

        assert [False] == page_referenced(world.machine.mem, pfns).tolist()

        put_page(world.machine.mem, pfns)


class TestRmapWalk:
    def test_every_page_at_its_address(self):
        """Pages in any order are found where they are mapped."""
        world = mapped_range(pages=6)
        order = [4, 0, 5, 2]

        found = where(world.machine.mem, world.pfns()[order])

        assert [{("train", world.at(page))} for page in order] == found

    def test_after_a_split(self):
        """A hole in the middle leaves two areas; each page is in the one that has it."""
        world = mapped_range(pages=6)
        pfns = world.pfns()
        world.process.munmap(world.at(2), PAGE_SIZE)

        found = where(world.machine.mem, pfns[[0, 1, 3, 4, 5]])

        assert [{("train", world.at(page))} for page in (0, 1, 3, 4, 5)] == found

    def test_several_processes(self):
        """One vector may hold pages of many."""
        world = mapped_range(pages=2)
        other = world.machine.spawn("other")
        addr = other.mmap(PAGE_SIZE)
        other.touch(addr, PAGE_SIZE)
        at = pte_offset(world.machine.mem.tables, other.mm.pgd, pages(addr))
        theirs = pte_pfn(world.machine.mem.tables.entries[at])

        found = where(world.machine.mem, np.concatenate((theirs, world.pfns())))

        assert [{("other", addr)}, *({("train", a)} for a in world.addrs.tolist())] == found

    def test_pages_of_nobody(self):
        """A page without a mapping, and no page at all, are nowhere."""
        world = mapped_range(pages=1)

        assert [set()] == where(world.machine.mem, pages(world.machine.mem.zero_pfn))
        assert [] == where(world.machine.mem, pages())

    def test_device_pages(self):
        """The way back leads from device memory as well."""
        world = mapped_range(pages=2)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        found = where(world.machine.mem, world.pfns())

        assert [{("train", addr)} for addr in world.addrs.tolist()] == found


class TestMapcount:
    @settings(max_examples=20)
    @given(counts=st.lists(st.integers(0, 3), min_size=4, max_size=4))
    def test_pages_that_repeat(self, counts):
        """Each mention is a mapping; nr_anon_pages counts pages, not mappings."""
        world = mapped_range(pages=4)
        mem, pfns = world.machine.mem, world.pfns()

        page_add_anon_rmap(world.vma, np.repeat(pfns, counts))
        added = mem.mapcount[pfns].tolist()
        counted = world.machine.vmstat["nr_anon_pages"]
        for _ in range(3):
            page_remove_rmap(world.vma, pfns[mem.mapcount[pfns] > 1])

        assert [1 + count for count in counts] == added
        assert 4 == counted == world.machine.vmstat["nr_anon_pages"]

    def test_page_mapped(self):
        """Mapped is what any table maps."""
        world = mapped_range(pages=2)
        pfns = pages(*world.pfns(), world.machine.mem.zero_pfn)

        assert [True, True, False] == page_mapped(world.machine.mem, pfns).tolist()

    def test_once_too_often(self):
        """Who takes a mapping away that is not there is told which page."""
        world = mapped_range(pages=1)
        mem = world.machine.mem
        zero = mem.zero_pfn

        with pytest.raises(KernelBug, match=f"page {zero:#x} is unmapped more often than"):
            page_remove_rmap(world.vma, pages(zero))

        mem.mapcount[zero] = 0


class TestMigrationEntries:
    def test_there_and_back(self):
        """Pages in migration entries are mapped nowhere; afterwards all is as it was."""
        world = mapped_range(pages=4)
        before = world.ptes() & ~np.uint64(0x60)  # but for accessed and dirty

        with migrating(world) as (mem, pfns):
            entries = world.ptes()
            assert is_migration_entry(entries).all()
            assert pfns.tolist() == swp_offset(entries).tolist()
            assert not page_mapped(mem, pfns).any()

        assert before.tolist() == (world.ptes() & ~np.uint64(0x60)).tolist()
        assert [0, 1, 2, 3] == world.contents()

    def test_rights_and_soft_dirty_survive(self):
        """A read-only entry comes back read-only, a soft-dirty one soft-dirty."""
        world = mapped_range(pages=4)
        entries, at = world.machine.mem.tables.entries, entries_at(world)
        entries[at[::2]] &= ~_PAGE_RW
        entries[at[:2]] &= ~_PAGE_SOFT_DIRTY

        with migrating(world):
            moving = world.ptes()

        writable, soft_dirty = [False, True] * 2, [False, False, True, True]
        assert writable == is_write_migration_entry(moving).tolist()
        assert soft_dirty == ((moving & SWP_SOFT_DIRTY) != 0).tolist()
        assert writable == pte_write(world.ptes()).tolist()
        assert soft_dirty == pte_soft_dirty(world.ptes()).tolist()

    def test_dirty_bit_goes_to_the_page(self):
        """What the entry knew about a store is not lost with it."""
        world = mapped_range(pages=2)
        world.machine.mem.tables.entries[entries_at(world)[1]] &= ~_PAGE_DIRTY

        with migrating(world) as (mem, pfns):
            pass

        assert [True, False] == ((mem.flags[pfns] & PG_dirty) != 0).tolist()

    def test_device_pages_keep_their_rights(self):
        """A device page that was writable is writable again, in every process."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        entries, at = world.machine.mem.tables.entries, entries_at(world)
        entries[at[1:2]] = entries[at[1:2]] + np.uint64(1 << 59)  # DEVICE_WRITE to DEVICE_READ

        with migrating(world):
            moving = world.ptes()

        assert [True, False, True] == is_write_migration_entry(moving).tolist()
        assert [True, False, True] == is_write_device_private_entry(world.ptes()).tolist()

    def test_system_and_device_pages_in_one_vector(self):
        """Each page gets the kind of entry that its memory needs."""
        world = mapped_range(pages=4)
        world.gpu.to_device(world.process, world.at(1), 2 * PAGE_SIZE)
        before = world.pfns().tolist()

        with migrating(world):
            assert is_migration_entry(world.ptes()).all()

        assert before == world.pfns().tolist()
        assert [False, True, True, False] == is_device_private_entry(world.ptes()).tolist()

    def test_public_device_memory(self):
        """A page of public device memory is mapped as such, for the CPU to use."""
        world = mapped_range(pages=1)
        mem, old = begin_migration(world)
        driver = Borrowed(kind=MemoryType.DEVICE_PUBLIC)
        zone = devm_memremap_pages(mem, driver, 1)
        new = pages(zone.start_pfn)
        mem.mapping[new], mem.index[new] = mem.mapping[old], mem.index[old]

        remove_migration_ptes(mem, old, new)

        assert _PAGE_DEVMAP == world.ptes()[0] & _PAGE_DEVMAP
        assert new == pte_pfn(world.ptes())
        end_migration(mem, old)
        world.process.munmap(world.addr, PAGE_SIZE)
        assert [new.tolist()] == driver.freed
        devm_memunmap_pages(mem, zone)

    def test_replaced_by_others(self):
        """The entries may come to hold other pages, at the same addresses."""
        world = mapped_range(pages=3)
        mem, old = begin_migration(world)
        new = alloc_pages_bulk(mem, GFP_KERNEL, 0, 3)
        mem.payload[new] = mem.payload[old]
        mem.flags[new] |= PG_swapbacked
        mem.mapping[new], mem.index[new] = mem.mapping[old], mem.index[old]

        remove_migration_ptes(mem, old, new)

        end_migration(mem, old)
        putback_lru_page(mem, new)
        assert new.tolist() == world.pfns().tolist()
        assert [0, 1, 2] == world.contents()

    def test_unmapped_meanwhile(self):
        """A migration entry that munmap took away does not come back."""
        world = mapped_range(pages=3)

        with migrating(world):
            world.process.munmap(world.at(1), PAGE_SIZE)

        assert 2 == world.machine.vmstat["nr_anon_pages"] == world.process.mm.anon_rss
        assert [0, 0] == [world.process.read(world.at(0), 1)[0], world.ptes()[1]]


class TestPoisonMigrationPtes:
    def test_lost_pages_answer_with_sigbus(self):
        """The process hears that its bytes are lost where they are, and only there."""
        world = mapped_range(pages=3)

        with migrating(world) as (mem, pfns):
            poison_migration_ptes(mem, pfns[1:2])

        with pytest.raises(BusError, match=r"contents .* are lost") as error:
            world.process.read(world.addr, world.nbytes)
        assert world.at(1) == error.value.address
        assert 0 == world.process.read(world.at(0), 1)[0]
        assert 2 == world.process.mm.anon_rss

    def test_can_be_unmapped(self):
        """A fresh mapping in its place works."""
        world = mapped_range(pages=1)
        with migrating(world) as (mem, pfns):
            poison_migration_ptes(mem, pfns)

        world.process.mmap(PAGE_SIZE, addr=world.addr)

        assert b"\0" == world.process.read(world.addr, 1)
