"""The page cache: pages of files, found by their offset."""

import threading

import numpy as np
import pytest

from mm.errors import BadFile, Deadlock, InvalidArgument, KernelBug
from mm.filemap import page_locked, unlock_page
from mm.fs import PAGECACHE_TAG_DIRTY, File, FileOperations, Inode, InodeOperations
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.page_alloc import alloc_pages_bulk
from mm.page_cache import (
    add_to_page_cache_lru,
    delete_from_page_cache,
    find_get_pages,
    find_lock_pages,
    page_in_cache,
    replace_in_page_cache,
    set_page_dirty,
    set_page_dirty_nobuffers,
)
from mm.page_flags import PG_active, PG_dirty, PG_lru
from mm.swap import lru_add_drain_all, put_page
from mm.types import AddressSpaceOperations, page_mapping
from mm.typing import pages
from mm.workingset import workingset_eviction
from mm.xarray import MAX_INDEX, xa_to_value
from tests.world import mapped_range

SOON = 5


def drop_all(inode):
    """Empty the cache of *inode*."""
    indexes, _ = inode.i_mapping.i_pages.find(0, MAX_INDEX)
    pfns = find_lock_pages(inode.i_mapping, indexes)
    remove(inode.mem, pfns[pfns > 0])
    inode.i_mapping.i_pages.erase(indexes)


def remove(mem, pfns, shadows=None):
    """Take *pfns*, locked and with a reference, out of the cache, and let go of them."""
    delete_from_page_cache(mem, pfns, shadows)
    unlock_page(mem, pfns)
    put_page(mem, pfns)


def new_file(mem):
    """A file with nothing but a page cache."""
    aops = AddressSpaceOperations(set_page_dirty=set_page_dirty_nobuffers)
    iops = InodeOperations(setattr=lambda inode, size: None, evict_inode=drop_all)
    return File(Inode(mem, iops, FileOperations(), aops), "f")


@pytest.fixture
def mem():
    return mapped_range(pages=1).machine.mem


@pytest.fixture
def mapping(mem):
    """The empty cache of a file."""
    return new_file(mem).f_mapping


def cached(mapping, *indexes):
    """Fresh pages at *indexes* of *mapping*, on their lists, with no reference of ours."""
    mem = mapping.mem
    pfns = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, 0, len(indexes))
    assert add_to_page_cache_lru(mapping, pfns, pages(*indexes)).all()
    unlock_page(mem, pfns)
    lru_add_drain_all(mem)
    put_page(mem, pfns)
    return pfns


class TestAdd:
    def test_pages_are_there(self, mem, mapping):
        """They know the cache and their places, are on a list, and have its reference."""
        with mem.vmstat.counting("nr_file_pages", "nr_inactive_file", "nr_shmem") as delta:
            pfns = cached(mapping, 3, 700)

        assert [mapping] * 2 == [page_mapping(mem, pfn) for pfn in pfns.tolist()]
        assert page_in_cache(mem, pfns).all()
        assert [3, 700] == mem.index[pfns].tolist()
        assert [1, 1] == mem.refcount[pfns].tolist()
        assert (mem.flags[pfns] & PG_lru != 0).all()
        assert {"nr_file_pages": 2, "nr_inactive_file": 2, "nr_shmem": 0} == delta

    def test_locked_meanwhile(self, mem, mapping):
        """Nobody gets at a page before whoever brings it has filled it."""
        pfns = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, 0, 1)

        add_to_page_cache_lru(mapping, pfns, pages(0))

        assert page_locked(mem, pfns).all()
        with pytest.raises(Deadlock):
            find_lock_pages(mapping, pages(0))
        unlock_page(mem, pfns)
        put_page(mem, pfns)

    def test_place_that_is_taken(self, mem, mapping):
        """The page that is there stays; ours is as it was."""
        (first,) = cached(mapping, 5)
        pfns = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, 0, 2)

        assert [False, True] == add_to_page_cache_lru(mapping, pfns, pages(5, 6)).tolist()

        assert [first, pfns[1]] == mapping.i_pages.load(pages(5, 6)).tolist()
        assert (0, 0, 1) == (mem.mapping[pfns[0]], mem.flags[pfns[0]], mem.refcount[pfns[0]])
        unlock_page(mem, pfns[1:])
        put_page(mem, pfns)

    def test_page_that_left_too_early(self, mem, mapping):
        """Its shadow says so, and it comes back active."""
        cached(mapping, 4)
        pfns = find_lock_pages(mapping, pages(4))
        remove(mem, pfns, workingset_eviction(mem, pfns))
        assert xa_to_value(mapping.i_pages.load(pages(4)))[0] >= 0

        with mem.vmstat.counting("workingset_refault") as delta:
            again = cached(mapping, 4)

        assert {"workingset_refault": 1} == delta
        assert (mem.flags[again] & PG_active != 0).all()


class TestFind:
    def test_with_a_reference(self, mem, mapping):
        """Whoever finds a page holds it; where none is there is -1."""
        (pfn,) = cached(mapping, 8).tolist()

        found = find_get_pages(mapping, pages(7, 8, 9))

        assert [-1, pfn, -1] == found.tolist()
        assert 2 == mem.refcount[pfn]
        put_page(mem, pages(pfn))

    def test_lock(self, mem, mapping):
        """It waits for the lock, and looks again: the page may have gone meanwhile."""
        cached(mapping, 1, 2)
        pfns = find_lock_pages(mapping, pages(1, 2))
        found = []
        thread = threading.Thread(
            target=lambda: found.append(find_lock_pages(mapping, pages(1, 2))), daemon=True
        )
        thread.start()
        while mem.refcount[pfns[1]] < 3:
            thread.join(0.001)
        delete_from_page_cache(mem, pfns[:1])
        unlock_page(mem, pfns)
        put_page(mem, pfns)
        thread.join(SOON)

        assert [[-1, pfns.item(1)]] == [pfns.tolist() for pfns in found]
        mem.lock_owner[pfns[1]] = 1  # the thread that has it is gone: let it be ours
        unlock_page(mem, pfns[1:])
        put_page(mem, pfns[1:])


class TestDelete:
    def test_all_is_as_before(self, mem, mapping):
        """The pages are free, the cache is empty, the counters are what they were."""
        free = mem.vmstat["nr_free_pages"]
        with mem.vmstat.counting("nr_file_pages", "nr_dirty") as delta:
            pfns = cached(mapping, 3, 700)
            set_page_dirty(mem, pfns)
            remove(mem, find_lock_pages(mapping, pages(3, 700)))

        assert mapping.i_pages.empty
        assert {"nr_file_pages": 0, "nr_dirty": 0} == delta
        assert free == mem.vmstat["nr_free_pages"]

    def test_page_that_is_not_there(self, mem, mapping):
        """To take a page out from where it is not is a bug."""
        cached(mapping, 3)
        pfns = find_lock_pages(mapping, pages(3))
        mem.index[pfns] = 4

        with pytest.raises(KernelBug, match=f"page {pfns[0]:#x} or one after it"):
            delete_from_page_cache(mem, pfns)

        mem.index[pfns] = 3
        unlock_page(mem, pfns)
        put_page(mem, pfns)


class TestReplace:
    def test_new_page_is_where_the_old_was(self, mem, mapping):
        """References and places go over; tags stay."""
        old = cached(mapping, 3, 9)
        set_page_dirty(mem, old)
        find_get_pages(mapping, pages(3, 9))
        new = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, 0, 2)
        mem.flags[new] |= PG_dirty

        replace_in_page_cache(mem, new, old)

        assert new.tolist() == mapping.i_pages.load(pages(3, 9)).tolist()
        assert mapping.i_pages.get_mark(pages(3, 9), PAGECACHE_TAG_DIRTY).all()
        assert [2, 2, 1, 1] == mem.refcount[np.concatenate((new, old))].tolist()
        assert not page_in_cache(mem, old).any()
        put_page(mem, new)
        put_page(mem, old)


class TestDirty:
    def test_tag(self, mem, mapping):
        """Pages of a file are dirty once, and tagged."""
        pfns = cached(mapping, 3, 4)
        with mem.vmstat.counting("nr_dirty") as delta:
            set_page_dirty(mem, pfns[:1])
            set_page_dirty(mem, pfns)

        assert {"nr_dirty": 2} == delta
        assert [3, 4] == mapping.i_pages.find(0, 9, PAGECACHE_TAG_DIRTY)[0].tolist()

    def test_anonymous_pages(self, mem, mapping):
        """They have no tags."""
        cached(mapping, 3)
        world_pfns = np.flatnonzero(mem.mapping & 1)

        set_page_dirty(mem, world_pfns)

        assert (mem.flags[world_pfns] & PG_dirty != 0).all()
        assert 0 == mem.vmstat["nr_dirty"]


class TestFile:
    def test_closed(self, mem):
        """Nothing can be done with it, and its inode is gone with its pages."""
        file = new_file(mem)
        cached(file.f_mapping, 1)
        free = mem.vmstat["nr_free_pages"]

        file.close()
        file.close()

        assert ([], {}) == (mem.files, mem.mappings)
        assert free + 1 == mem.vmstat["nr_free_pages"]
        with pytest.raises(BadFile, match="read: <File f, 0x0 bytes> is closed"):
            file.read(0, 1)

    def test_what_it_cannot(self, mem):
        """It says so."""
        with pytest.raises(InvalidArgument, match="is of a kind that has no read"):
            new_file(mem).read(0, 1)
