"""verify(): each rule about files and their pages is broken in turn, and named."""

import pytest

from mm.errors import KernelBug
from mm.fs import PAGECACHE_TAG_DIRTY
from mm.page_alloc import free_pages_bulk
from mm.page_flags import PG_dirty, PG_isolated, PG_lru, PG_swapbacked, PG_swapcache
from mm.swap import lru_add_drain_all
from mm.types import PAGE_MAPPING_MOVABLE
from mm.typing import pages
from tests.balloon import Balloon
from tests.files import disk_file, mapped_file
from tests.mm.test_debug import complaints, named, spoiled, spoiled_attribute


@pytest.fixture
def world():
    """Pages 0 and 1 mapped, 2 in the cache, 3 in swap, 4 a hole."""
    world = mapped_file(pages=5, swap="64KiB")
    world.process.madvise(world.at(2), 2 * 4096, "dontneed")
    world.evict(3)
    world.process.madvise(world.at(4), 4096, "remove")
    lru_add_drain_all(world.machine.mem)
    world.machine.verify()
    return world


@pytest.fixture
def mem(world):
    return world.machine.mem


@pytest.fixture
def on_disk(world):
    """A file on disk whose first page is dirty."""
    file, _ = disk_file(world.machine, bytes(9000))
    file.write(0, b"x")
    return file


def entry(world, page, value):
    """Let the cache have another entry for *page* inside the block."""
    array = world.file.f_mapping.i_pages
    return spoiled(array._entries, array._at(pages(page)), value)


class TestPages:
    @pytest.mark.parametrize("column", ["mapping", "index"])
    @pytest.mark.parametrize("page", [0, 2])
    def test_columns(self, world, mem, column, page):
        """A page knows its file and its place there."""
        rows, pfn = getattr(mem, column), world.cache()[page]

        with spoiled(rows, pfn, rows[pfn] + (4 if column == "mapping" else 1)):
            assert column in named(world.machine)

    def test_lost_page(self, world):
        """A page that says it is in a cache is found there."""
        pfn = world.cache()[2]
        with entry(world, 2, 0):
            lines = complaints(world.machine)

        assert f"mapping: page {pfn:#x}: not in that page cache" in lines

    def test_twice(self, world):
        """A page is in one place."""
        with entry(world, 4, world.cache()[2]):
            assert {"index", "mapping", "refcount"} <= named(world.machine)

    @pytest.mark.parametrize(("value", "what"), [(1 << 40, "frame"), (~4000, "slot"), (~0, "slot")])
    def test_nowhere(self, world, value, what):
        """An entry leads somewhere."""
        with entry(world, 4, value):
            assert f"i_pages: index 0x4: no such {what}" in complaints(world.machine)

    def test_slot(self, world):
        """One that is named is held."""
        with entry(world, 4, ~9):
            assert "swap_map" in named(world.machine)

    def test_reference(self, world, mem):
        """The cache holds one."""
        pfn = world.cache()[2]
        with spoiled(mem.refcount, pfn, 2):
            assert {"refcount"} == named(world.machine)

    def test_clean_page(self, world, mem):
        """What swap has no copy of is dirty, unless it is zeros."""
        pfn = world.cache()[2]
        with spoiled(mem.flags, pfn, mem.flags[pfn] & ~PG_dirty):
            assert [f"contents: page {pfn:#x}: clean, yet not zeros, and stored nowhere"] == (
                complaints(world.machine)
            )

    def test_kind(self, world, mem):
        """A page of shared memory goes to swap, not to a disk."""
        pfn = world.cache()[2]
        with spoiled(mem.flags, pfn, mem.flags[pfn] & ~PG_swapbacked):
            assert {"flags", "nr_shmem"} <= named(world.machine)

    def test_in_both_caches(self, world, mem):
        """A page is in the swap cache or in that of its file."""
        pfn = world.cache()[2]
        with spoiled(mem.flags, pfn, mem.flags[pfn] | PG_swapcache):
            lines = complaints(world.machine)

        assert f"flags: page {pfn:#x}: in the page cache and in the swap cache" in lines

    def test_tag(self, world, mem, on_disk):
        """What writeback will look at is dirty."""
        pfn = on_disk.f_mapping.i_pages.load(pages(0))
        with spoiled(mem.flags, pfn, mem.flags[pfn] & ~PG_dirty):
            assert ["i_pages: index 0x0: tagged dirty, and not so"] == complaints(world.machine)

    @pytest.mark.parametrize(
        "name", ["nr_file_pages", "nr_shmem", "nr_mapped", "nr_dirty", "nr_isolated_file"]
    )
    def test_counters(self, world, on_disk, name):
        """They count what there is."""
        world.machine.vmstat.add(name, 1)
        found = named(world.machine)
        world.machine.vmstat.add(name, -1)

        assert {name} == found

    def test_tags_are_counted(self, world, on_disk):
        """nr_dirty is the number of tags."""
        array = on_disk.f_mapping.i_pages
        array.clear_mark(pages(0), PAGECACHE_TAG_DIRTY)
        found = named(world.machine)
        array.set_mark(pages(0), PAGECACHE_TAG_DIRTY)

        assert {"nr_dirty"} == found

    @pytest.mark.parametrize("name", ["shmem_rss", "file_rss"])
    def test_rss(self, world, name):
        """An address space counts its pages by kind."""
        with spoiled_attribute(world.process.mm, name, 7):
            assert {name} == named(world.machine)


class TestFiles:
    def test_mapping_that_is_not_listed(self, world):
        """The pages of a file find all who map it."""
        i_mmap = world.file.f_mapping.i_mmap
        with spoiled_attribute(world.file.f_mapping, "i_mmap", i_mmap[1:]):
            assert {"i_mmap"} == named(world.machine)

    def test_mapping_that_is_gone(self, world):
        """And nobody else."""
        i_mmap = world.file.f_mapping.i_mmap
        with spoiled_attribute(world.file.f_mapping, "i_mmap", i_mmap * 2):
            assert {"i_mmap"} == named(world.machine)

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_users(self, world, count):
        """Whoever has it open counts, and each VMA."""
        with spoiled_attribute(world.file, "f_count", count):
            assert {"f_count"} == named(world.machine)

    def test_unknown_file(self, world, mem):
        """A file that is mapped is listed."""
        with spoiled_attribute(mem, "files", []):
            assert {"f_count"} == named(world.machine)

    def test_inode_that_nobody_has(self, world):
        """An inode lives by those who have it."""
        with spoiled_attribute(world.file.f_inode, "i_count", 0):
            assert {"i_count"} == named(world.machine)


class TestMovable:
    @pytest.fixture
    def balloon(self, world):
        balloon = Balloon(world.machine, 2)
        world.machine.verify()
        yield balloon
        world.machine.verify()
        balloon.close()

    def test_isolated(self, world, mem, balloon):
        """Between two calls nobody moves a page, be it a driver's or not."""
        for pfn in (balloon.pfns[0], world.cache()[0], mem.max_pfn - 1):
            with spoiled(mem.flags, pfn, mem.flags[pfn] | PG_isolated):
                lines = complaints(world.machine)

            assert f"flags: page {pfn:#x}: isolated, yet nobody moves it" in lines

    def test_isolated_and_freed(self, mem, balloon):
        """A page that somebody moves is not freed."""
        (pfn,) = pages(balloon.pfns[1])
        with (
            spoiled(mem.flags, pfn, mem.flags[pfn] | PG_isolated),
            pytest.raises(KernelBug, match="isolated"),
        ):
            free_pages_bulk(mem, pages(pfn))

    @pytest.mark.parametrize("number", [1, 77])
    def test_driver(self, world, mem, balloon, number):
        """The mapping of a movable page is a driver's: not a file's, nor nobody's."""
        assert number == world.file.f_mapping.number or number not in mem.mappings
        pfn = balloon.pfns[0]
        with spoiled(mem.mapping, pfn, number << 2 | PAGE_MAPPING_MOVABLE):
            assert [f"mapping: page {pfn:#x}: movable, and no driver's"] == complaints(
                world.machine
            )

    def test_reference(self, world, mem, balloon):
        """The driver has one to each, and none to what it has let go of."""
        pfn = balloon.pfns[0]
        for column, value in ((mem.refcount, 2), (mem.mapping, PAGE_MAPPING_MOVABLE)):
            with spoiled(column, pfn, value):
                assert "refcount" in named(world.machine)

    def test_list(self, world, mem, balloon):
        """It is on no LRU list."""
        pfn = balloon.pfns[0]
        with spoiled(mem.flags, pfn, mem.flags[pfn] | PG_lru):
            assert f"flags: page {pfn:#x}: movable, and on an LRU list" in complaints(world.machine)

    def test_mapped(self, world, mem, balloon):
        """No process maps it, and it is no device's."""
        pfn = world.cache()[0]
        device = world.gpu.zone.end_pfn - 1
        owner = balloon.inode.i_mapping.number << 2 | PAGE_MAPPING_MOVABLE
        with spoiled(mem.mapping, pages(pfn, device), owner):
            lines = complaints(world.machine)

        assert f"mapping: page {pfn:#x}: movable, and mapped by a process" in lines
        assert f"mapping: page {device:#x}: movable, and device memory" in lines
