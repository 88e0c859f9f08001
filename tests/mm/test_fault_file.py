"""Faults in mappings of files."""

import numpy as np
import pytest

from mm import PAGE_SIZE
from mm.fault_file import FAULT_AROUND_BYTES
from mm.memory import handle_mm_fault
from mm.page_flags import PG_anon_exclusive, PG_dirty
from mm.pgtable import pte_dirty, pte_present, pte_write
from mm.types import VmFault
from tests.files import mapped_file
from tests.world import mapped_range

WINDOW = FAULT_AROUND_BYTES // PAGE_SIZE


def fault(world, *pages, write=False):
    """What faults at *pages*, in one vector, come to."""
    with world.process.mm.mmap_sem.read():
        return handle_mm_fault(world.vma, world.addrs[list(pages)], write=write).tolist()


def present(world):
    return np.flatnonzero(pte_present(world.ptes())).tolist()


def aligned(pages, first=0):
    """Another mapping of a file of *pages* pages, that starts *first* pages after a window does."""
    world = mapped_file(pages=pages)
    other = world.seen_by(world.machine.spawn("reader"))
    other.addr = (1 << 32) + first * PAGE_SIZE
    other.process.mmap(other.nbytes, "r", file=world.file, addr=other.addr)
    return other


class TestReadFault:
    def test_maps_its_window(self):
        """What is in memory around the page is mapped with it, in one fault."""
        world = aligned(3 * WINDOW)

        world.process.read(world.at(WINDOW + 3), 1)

        assert list(range(WINDOW, 2 * WINDOW)) == present(world)
        assert 1 == world.process.min_flt

    def test_window_that_begins_with_the_mapping(self):
        """It is as long as any other, and reaches into the next."""
        world = aligned(3 * WINDOW, first=5)

        world.process.read(world.at(2), 1)

        assert list(range(WINDOW)) == present(world)

    def test_page_table_ends(self):
        """No window goes beyond its page table."""
        world = aligned(2 * WINDOW, first=512 - 3)

        world.process.read(world.at(0), 1)

        assert [0, 1, 2] == present(world)

    def test_holes_around(self):
        """Only the page that is asked for comes to be."""
        world = mapped_file(pages=4, filled=False)

        world.process.read(world.at(1), 1)

        assert [1] == present(world)
        assert 1 == world.machine.vmstat["nr_shmem"]

    def test_vector_counts_as_one_after_the_other(self):
        """Pages that a neighbour's fault has mapped did not fault; holes did, each of them."""
        world = aligned(2 * WINDOW)
        world.file.fallocate("punch_hole|keep_size", 3 * PAGE_SIZE, 2 * PAGE_SIZE)

        faults = fault(world, *range(2 * WINDOW))

        served = [page for page, word in enumerate(faults) if word != VmFault.RETRY]
        assert [0, 3, 4, WINDOW] == served
        assert list(range(2 * WINDOW)) == present(world)

    def test_vector_over_a_window_that_is_cut_short(self):
        """The second window begins where the first one ended."""
        world = aligned(3 * WINDOW, first=10)

        faults = fault(world, 0, 1, WINDOW - 1, WINDOW, WINDOW + 1)

        retry = int(VmFault.RETRY)
        assert [0, retry, retry, 0, retry] == faults
        assert list(range(2 * WINDOW - 10)) == present(world)

    @pytest.mark.parametrize("first", [0, 3])
    def test_any_vector(self, first):
        """Whatever faults together maps what single faults map, in as many."""
        rng = np.random.default_rng(first)
        for _ in range(5):
            pages = np.flatnonzero(rng.random(70) < 0.3)
            holes = np.flatnonzero(rng.random(70) < 0.3)
            together, alone = (aligned(70, first=first) for _ in range(2))
            for world in (together, alone):
                for hole in holes.tolist():
                    world.file.fallocate("punch_hole|keep_size", hole * PAGE_SIZE, PAGE_SIZE)

            faults = fault(together, *pages)
            for page in pages.tolist():
                alone.process.read(alone.at(page), 1)

            assert present(alone) == present(together)
            assert alone.process.min_flt == faults.count(0)

    def test_shared_writable(self):
        """The entry may be stored through at once, as nobody wants to hear of it."""
        world = mapped_file(pages=1, filled=False)
        world.process.read(world.addr, 1)

        assert pte_write(world.ptes()).all()
        assert not pte_dirty(world.ptes()).any()

    def test_locked_page_is_left_for_its_own_fault(self):
        """To map what is around waits for nobody."""
        world = mapped_file(pages=3)
        other = world.shared()
        world.lock(page=1)

        other.process.read(other.at(0), 1)

        assert [0, 2] == present(other)


class TestCowFault:
    def test_copy_is_its_own(self):
        """The file keeps its page, clean of what the process does."""
        world = mapped_file(pages=2)
        private = world.private()

        fault(private, 0, 1, write=True)

        mem = world.machine.mem
        assert (mem.flags[private.pfns()] & PG_anon_exclusive != 0).all()
        assert not set(private.pfns().tolist()) & set(world.pfns().tolist())
        assert private.intact()

    def test_beyond_the_end(self):
        """No copy is made of nothing."""
        world = mapped_file(pages=2)
        private = world.private()
        world.file.truncate(PAGE_SIZE)

        assert [0, VmFault.SIGBUS] == fault(private, 0, 1, write=True)
        assert 1 == private.process.mm.anon_rss

    def test_memory_is_short(self):
        """Those that have a frame are mapped; the others come back."""
        world = mapped_file(pages=600, nodes=("4MiB",))
        private = world.private()

        faults = fault(private, *range(600), write=True)

        assert VmFault.RETRY in faults
        assert faults.count(0) == private.process.mm.anon_rss > 100


class TestSharedFault:
    def test_page_is_dirty(self):
        """The CPU stores through the entry, and nobody would know."""
        world = mapped_file(pages=2, filled=False)

        fault(world, 0, 1, write=True)

        assert (world.machine.mem.flags[world.pfns()] & PG_dirty != 0).all()
        assert pte_dirty(world.ptes()).all()

    def test_store_after_clear_refs(self):
        """It faults, so that it is seen."""
        world = mapped_file(pages=1)
        world.process.clear_refs(4)
        assert not pte_write(world.ptes()).any()

        world.process.write(world.addr, b"x")

        assert 1 == int(world.process.pagemap(world.addr, 1).item()) >> 55 & 1

    def test_after_mprotect(self):
        """What was read-only can be stored to at once, as the mapping allows it again."""
        world = mapped_file(pages=1)
        world.process.mprotect(world.addr, PAGE_SIZE, "r")
        assert not pte_write(world.ptes()).any()
        world.process.mprotect(world.addr, PAGE_SIZE, "rw")

        with world.machine.vmstat.counting("pgfault") as delta:
            world.process.write(world.addr, b"x")

        assert {"pgfault": 0} == delta


class TestSystemCalls:
    def test_second_mapping_by_mremap(self):
        """An old length of 0 maps shared memory once more."""
        world = mapped_file(pages=2)

        twin = world.process.mremap(world.addr, 0, world.nbytes)

        world.process.write(twin, b"twin")
        assert b"twin" == world.process.read(world.addr, 4)

    def test_mremap_moves(self):
        """Pages and private copies are found at the new address, also by the rmap."""
        world = mapped_file(pages=3)
        private = world.private()
        private.process.write(private.at(1), b"mine")
        private.contents()

        private.addr = private.process.mremap(
            private.addr, private.nbytes, private.nbytes, "maymove|fixed", 1 << 40
        )
        world.file.truncate(2 * PAGE_SIZE)

        assert b"mine" == private.process.read(private.at(1), 4)
        assert [True, True, False] == (private.ptes() != 0).tolist()

    def test_madvise_remove(self):
        """A hole in the file, for all who map it."""
        world = mapped_file(pages=3)
        other = world.shared()

        world.process.madvise(world.at(1), PAGE_SIZE, "remove")

        assert 2 == world.machine.vmstat["nr_shmem"]
        assert [0, 0, 2] == other.contents()

    def test_madvise_dontneed_keeps_the_file(self):
        """The pages are unmapped, and fault in again with what they hold."""
        world = mapped_file(pages=3)

        world.process.madvise(world.addr, world.nbytes, "dontneed")

        assert [] == present(world)
        assert world.intact()

    def test_mlock(self):
        """Shared pages are locked in memory: reclaim leaves them."""
        world = mapped_file(pages=3, swap="64KiB")
        world.process.mlock(world.addr, world.nbytes)

        assert 0 == world.evict()

        assert 3 == world.machine.vmstat["nr_mlock"]

    def test_pin(self):
        """A pinned page of a file stays where it is, shared as it is."""
        world = mapped_file(pages=1, nodes=("8MiB", "8MiB"))
        with world.process.pin(world.addr, PAGE_SIZE, longterm=True):
            child = world.process.fork()
            assert world.process.move_pages([world.addr], [1], "moveall").tolist()[0] < 0
            child.write(world.addr, b"both")
        assert b"both" == world.process.read(world.addr, 4)

    def test_proc_mem(self):
        """A debugger writes to the file through a shared mapping, and to a copy through others."""
        world = mapped_file(pages=1)
        private = world.private()

        world.process.mem_write(world.addr, b"all")
        private.process.mprotect(private.addr, PAGE_SIZE, "r")
        private.process.mem_write(private.addr, b"own")

        assert b"all" == world.file.read(0, 3)
        assert b"own" == private.process.read(private.addr, 3)

    def test_smaps(self):
        """Shared with whoever maps it; what is in swap is counted for each."""
        world = mapped_file(pages=4, swap="64KiB")
        world.evict(3)
        (vma,) = world.process.smaps()

        assert (3 * PAGE_SIZE, PAGE_SIZE) == (vma.resident, vma.swap)
        assert "rw-s" == vma.perms
        assert "rd wr sh mr mw me ms sd" == vma.vmflags

    def test_mincore(self):
        """Pages of the cache count, whether or not they are mapped."""
        world = mapped_file(pages=3, swap="64KiB")
        other = world.shared()
        world.evict(1)

        assert [True, False, True] == other.process.mincore(other.addr, other.nbytes).tolist()

    def test_dontfork(self):
        """A child that does not map it does not hold it either."""
        world = mapped_file(pages=1)
        world.process.madvise(world.addr, PAGE_SIZE, "dontfork")
        child = world.process.fork()

        assert [] == child.mm.vmas
        assert 2 == world.file.f_count

    def test_part_is_unmapped(self):
        """The parts of a VMA that was cut hold the file, each for itself."""
        world = mapped_file(pages=3)

        world.process.munmap(world.at(1), PAGE_SIZE)

        assert 3 == world.file.f_count
        assert [0, 2] == present(world)

    def test_closed_file_stays_mapped(self):
        """It is gone when its last mapping is."""
        world = mapped_file(pages=2)
        world.file.close()

        assert world.intact()
        world.process.munmap(world.addr, world.nbytes)

        assert {} == world.machine.mem.mappings

    def test_file_that_may_not_be_written(self):
        """It can be mapped shared for reading, and never made writable."""
        world = mapped_range(pages=1)
        file = world.machine.memfd_create()
        file.truncate(PAGE_SIZE)
        file.f_mode = 1
        with pytest.raises(OSError, match="not open for writing"):
            world.process.mmap(PAGE_SIZE, file=file)

        addr = world.process.mmap(PAGE_SIZE, "r", file=file)

        with pytest.raises(OSError, match="may not have the rights"):
            world.process.mprotect(addr, PAGE_SIZE, "rw")
