"""What migrate_vma() refuses to begin, and what may be done with its struct."""

import errno

import numpy as np
import pytest

from hmm import (
    migrate_vma,
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from mm import (
    InvalidArgument,
    InvalidRange,
)
from mm.types import VM_DONTEXPAND, VM_HUGETLB, VM_IO, VM_MIXEDMAP, VM_PFNMAP
from tests.hmm.callbacks import Callbacks, migrate
from tests.hmm.ranges import (
    in_hand,
    mapped,
    reasons,
)
from tests.world import mapped_range


class TestArguments:
    @pytest.mark.parametrize(
        ("start", "end"),
        [(-1, 3), (2, 6), (-2, -1), (5, 6), (-1, 6), (0, 1 << 52), (0, 1 << 70), (-(1 << 60), 3)],
    )
    def test_range_outside_its_vma(self, start, end):
        """A range that leaves its VMA, however far, is refused with both ranges in hex."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 5), dtype=np.uint64)
        ops = Callbacks(world)

        with pytest.raises(InvalidRange, match=f"{world.at(end):#x}.*{world.vma.vm_start:#x}"):
            migrate_vma(ops, world.vma, world.at(start), world.at(end), src, dst)

        assert [] == ops.calls

    @pytest.mark.parametrize(("start", "end"), [(0, 0), (4, 4), (3, 1), (5, 0)])
    def test_empty_or_inverted_range(self, start, end):
        """A range without a page is refused."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 5), dtype=np.uint64)

        with pytest.raises(InvalidRange, match=f"{world.at(start):#x}, {world.at(end):#x}"):
            migrate_vma(Callbacks(world), world.vma, world.at(start), world.at(end), src, dst)

    def test_range_of_less_than_a_page(self):
        """Both ends are rounded down, so that a piece of one page is an empty range."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 1), dtype=np.uint64)

        with pytest.raises(InvalidRange):
            migrate_vma(Callbacks(world), world.vma, world.addr + 8, world.addr + 100, src, dst)

    def test_unaligned_range_is_rounded_down(self):
        """[start, end) loses what is below a page at both ends, as in v4.20."""
        world = mapped_range(pages=5)
        src, dst = np.zeros((2, 2), dtype=np.uint64)

        migrate_vma(Callbacks(world), world.vma, world.at(1) + 9, world.at(3) + 4095, src, dst)

        assert [False, True, True, False, False] == world.on_device()
        assert [0, 1, 2, 3, 4] == world.contents()

    @pytest.mark.parametrize("name", ["src", "dst"])
    @pytest.mark.parametrize(
        "vector",
        [
            np.zeros(4, dtype=np.uint64),
            np.zeros(6, dtype=np.uint64),
            np.zeros((5, 1), dtype=np.uint64),
            np.zeros(5, dtype=np.int64),
            np.zeros(5, dtype=np.uint32),
            [0] * 5,
            None,
        ],
    )
    def test_vector_that_does_not_fit(self, name, vector):
        """src and dst are uint64 vectors of one word for each page, and nothing else."""
        world = mapped_range(pages=5)
        vectors = {"src": np.zeros(5, np.uint64), "dst": np.zeros(5, np.uint64)} | {name: vector}

        with pytest.raises(InvalidArgument, match=rf"{name} must be .*uint64\[5\], got"):
            migrate_vma(
                Callbacks(world), world.vma, world.addr, world.addr + world.nbytes, **vectors
            )

    def test_one_vector_for_both(self):
        """src and dst may not share memory: what the driver answers would be the question."""
        world = mapped_range(pages=5)
        words = np.zeros(5, dtype=np.uint64)

        with pytest.raises(InvalidArgument, match="src"):
            migrate_vma(
                Callbacks(world), world.vma, world.addr, world.addr + world.nbytes, words, words
            )

        assert [0, 1, 2, 3, 4] == world.contents()

    @pytest.mark.parametrize("name", ["src", "dst"])
    def test_read_only_vector(self, name):
        """Both vectors are written to."""
        world = mapped_range(pages=5)
        vectors = {"src": np.zeros(5, np.uint64), "dst": np.zeros(5, np.uint64)}
        vectors[name].flags.writeable = False

        with pytest.raises(InvalidArgument, match=f"{name} is read-only"):
            migrate_vma(
                Callbacks(world), world.vma, world.addr, world.addr + world.nbytes, **vectors
            )

    @pytest.mark.parametrize("wanted", [np.ones(4, np.bool_), np.ones(5, np.uint8), [True] * 5])
    def test_wanted_that_does_not_fit(self, wanted):
        """`wanted` is one truth value for each page."""
        world = mapped_range(pages=5)

        with pytest.raises(InvalidArgument, match=r"wanted must be .*bool\[5\], got"):
            migrate(world, wanted=wanted)

    @pytest.mark.parametrize("flag", [VM_IO, VM_DONTEXPAND, VM_PFNMAP, VM_MIXEDMAP, VM_HUGETLB])
    def test_special_vma(self, flag):
        """Memory that is a driver's own, or hugetlb, never migrates."""
        world = mapped_range(pages=5)
        world.vma.vm_flags |= flag

        with pytest.raises(InvalidArgument, match="VM_SPECIAL") as caught:
            migrate(world)

        assert errno.EINVAL == caught.value.errno

    def test_refused_call_changes_nothing(self):
        """A wrong call leaves vectors, entries and counters as they are."""
        world = mapped_range(pages=5)
        src, dst = np.full((2, 5), 7, dtype=np.uint64)
        before = mapped(world)

        with world.machine.vmstat.counting() as delta, pytest.raises(InvalidRange):
            migrate_vma(Callbacks(world), world.vma, world.addr, world.at(6), src, dst)

        assert {} == delta
        assert ([7] * 5, [7] * 5, before) == (src.tolist(), dst.tolist(), mapped(world))

    def test_stages_want_the_lock(self):
        """Who runs the stages by hand must hold mmap_sem all the while."""
        world = mapped_range(pages=5)
        migration, _ = in_hand(world)

        with pytest.raises(InvalidArgument, match="mmap_sem"):
            migrate_vma_setup(migration)


class TestStagesInHand:
    def test_driver_that_runs_the_stages_itself(self):
        """setup, pages and finalize with the driver's work in between do what migrate_vma does."""
        world = mapped_range(pages=3)
        migration, arguments = in_hand(world)

        with world.process.mm.mmap_sem.read():
            assert 3 == migrate_vma_setup(migration)
            world.gpu.alloc_and_copy(*arguments)
            migrate_vma_pages(migration)
            world.gpu.finalize_and_map(*arguments)
            migrate_vma_finalize(migration)

        assert (3, [True] * 3) == (migration.cpages, world.on_device())
        assert [0, 1, 2] == world.contents()

    def test_driver_that_changes_its_mind(self):
        """Between setup and pages a driver may simply answer nothing."""
        world = mapped_range(pages=3)
        was = mapped(world)
        migration, _ = in_hand(world)

        with world.process.mm.mmap_sem.read():
            migrate_vma_setup(migration)
            migrate_vma_pages(migration)
            migrate_vma_finalize(migration)

        assert (was, ["NOT_CHOSEN"] * 3) == (mapped(world), reasons(migration))
        assert [0, 1, 2] == world.contents()

    def test_second_round_with_the_same_struct(self):
        """setup begins afresh: nothing of an earlier round is left in it."""
        world = mapped_range(pages=3, filled=False)
        world.process.write(world.at(1), b"x")
        migration, arguments = in_hand(world)

        with world.process.mm.mmap_sem.read():
            for answer in (lambda *_: None, world.gpu.alloc_and_copy):
                migrate_vma_setup(migration)
                answer(*arguments)
                migrate_vma_pages(migration)
                migrate_vma_finalize(migration)

        assert (3, ["NO"] * 3) == (migration.cpages, reasons(migration))
        assert b"x" == world.process.read(world.at(1), 1)
