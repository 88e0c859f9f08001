"""madvise(): flags, contents and presence, as recorded on Linux 6.12."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import InvalidArgument, OutOfMemory
from mm.errors import HwPoison, NotMapped
from mm.madvise import ADVICE
from mm.mmu_notifier import MmuNotifyEvent
from mm.page_flags import PG_active, PG_dirty, PG_swapbacked, PG_workingset
from mm.pgtable import (
    pte_dirty,
    pte_none,
    pte_offset,
    pte_present,
    pte_special,
    pte_write,
    pte_young,
)
from mm.swap import lru_add_drain_all
from mm.swapops import is_swap_entry, make_hwpoison_entry
from mm.types import (
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_HUGEPAGE,
    VM_IO,
    VM_MERGEABLE,
    VM_MIXEDMAP,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_WIPEONFORK,
)
from mm.typing import PAGE_SIZE, pages
from tests.mm.test_mprotect import Listener
from tests.world import mapped_range

BITS = (
    VM_SEQ_READ | VM_RAND_READ | VM_DONTCOPY | VM_WIPEONFORK | VM_DONTDUMP
    | VM_HUGEPAGE | VM_NOHUGEPAGE | VM_MERGEABLE
)  # fmt: skip


def advise(world, first, count, advice):
    world.process.madvise(world.at(first), count * PAGE_SIZE, advice)


def faults(world, access):
    """Minor faults that *access* takes."""
    before = world.process.min_flt
    access()
    return world.process.min_flt - before


def areas(world):
    """[first page, last page, bits of advice] of every VMA."""
    return [
        [
            (vma.vm_start - world.addr) // PAGE_SIZE,
            (vma.vm_end - world.addr) // PAGE_SIZE - 1,
            vma.vm_flags & BITS,
        ]
        for vma in world.process.mm.vmas
    ]


class TestFlags:
    @pytest.mark.parametrize(
        ("advice", "bits"),
        [
            ("normal", 0),
            ("random", VM_RAND_READ),
            ("sequential", VM_SEQ_READ),
            ("dontfork", VM_DONTCOPY),
            ("dofork", 0),
            ("wipeonfork", VM_WIPEONFORK),
            ("keeponfork", 0),
            ("dontdump", VM_DONTDUMP),
            ("dodump", 0),
            ("hugepage", VM_HUGEPAGE),
            ("nohugepage", VM_NOHUGEPAGE),
            ("mergeable", VM_MERGEABLE),
            ("unmergeable", 0),
        ],
    )
    def test_bit_of_the_area(self, advice, bits):
        """What is advised is a bit of an area of its own; what is so already changes nothing."""
        world = mapped_range(pages=3)

        advise(world, 1, 1, advice)

        expected = [[0, 0, 0], [1, 1, bits], [2, 2, 0]] if bits else [[0, 2, 0]]
        assert expected == areas(world)
        assert world.intact()

    @pytest.mark.parametrize(
        ("first", "then", "bits"),
        [
            ("random", "normal", 0),
            ("sequential", "random", VM_RAND_READ),
            ("random", "sequential", VM_SEQ_READ),
            ("dontfork", "dofork", 0),
            ("wipeonfork", "keeponfork", 0),
            ("dontdump", "dodump", 0),
            ("hugepage", "nohugepage", VM_NOHUGEPAGE),
            ("nohugepage", "hugepage", VM_HUGEPAGE),
            ("mergeable", "unmergeable", 0),
        ],
    )
    def test_opposites(self, first, then, bits):
        """The later advice holds."""
        world = mapped_range(pages=2)

        advise(world, 0, 2, first)
        advise(world, 0, 2, then)

        assert [[0, 1, bits]] == areas(world)

    def test_over_several_areas(self):
        """Each takes it; they are one afterwards if nothing else tells them apart."""
        world = mapped_range(pages=4)
        advise(world, 1, 2, "dontfork")

        advise(world, 0, 4, "dontfork")

        assert [[0, 3, VM_DONTCOPY]] == areas(world)

    @pytest.mark.parametrize(
        ("advice", "bit"),
        [("dofork", VM_IO), ("wipeonfork", VM_SHARED), ("dodump", VM_MIXEDMAP)],
    )
    def test_areas_that_refuse(self, advice, bit):
        """A driver's mapping stays out of children and dumps; shared memory cannot be wiped."""
        world = mapped_range(pages=2)
        world.vma.vm_flags |= bit

        with pytest.raises(InvalidArgument, match=f"cannot be advised to {advice}"):
            advise(world, 0, 2, advice)

        world.vma.vm_flags &= ~bit


class TestDontneed:
    def test_contents_go(self):
        """The pages read as zeros; their memory is free."""
        world = mapped_range(pages=5)
        world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)
        free = world.machine.nr_free_pages

        advise(world, 1, 3, "dontneed")

        assert free + 2 == world.machine.nr_free_pages
        assert [0, 0, 0, 0, 4] == world.contents()
        assert [[0, 4, 0]] == areas(world)

    def test_announced(self):
        """A device forgets the range."""
        world = mapped_range(pages=5)
        heard = Listener(world)

        advise(world, 2, 3, "dontneed")

        assert [(MmuNotifyEvent.CLEAR, 2, 5)] == heard.events

    def test_locked(self):
        """Locked memory is refused, unless the advice says that it is known to be."""
        world = mapped_range(pages=3)
        world.process.mlock(world.at(1), PAGE_SIZE)

        with pytest.raises(InvalidArgument, match="cannot be advised to dontneed"):
            advise(world, 0, 3, "dontneed")
        before = pte_none(world.ptes()).tolist()
        advise(world, 1, 2, "dontneed_locked")

        assert [True, False, False] == before  # what came before it has gone
        assert pte_none(world.ptes()).all()
        assert (1, 0) == (world.process.mm.locked_vm, world.machine.vmstat["nr_mlock"])

    def test_driver_mapping(self):
        """What maps no pages has none to drop."""
        world = mapped_range(pages=1)
        world.vma.vm_flags |= VM_PFNMAP

        for advice in ("dontneed", "dontneed_locked"):
            with pytest.raises(InvalidArgument, match="cannot be advised"):
                advise(world, 0, 1, advice)

    def test_remove(self):
        """Only a file can have a hole."""
        world = mapped_range(pages=1)

        with pytest.raises(InvalidArgument, match="has no file to remove from"):
            advise(world, 0, 1, "remove")

        assert world.intact()


class TestFree:
    def test_dropped_unless_stored_to(self):
        """Recorded in 32_lazyfree: what was stored to since stays, the rest reads as zeros."""
        world = mapped_range(pages=6, swap="1MiB")
        advise(world, 0, 4, "free")
        assert 0 == faults(world, lambda: world.process.write(world.addr, b"\7"))

        with world.machine.vmstat.counting("pswpout") as delta:
            advise(world, 0, 6, "pageout")

        assert {"pswpout": 2} == delta
        assert [True, False, False, False, False, False] == pte_present(world.ptes()).tolist()
        assert [7, 0, 0, 0, 4, 5] == world.contents()

    def test_kept_while_memory_lasts(self):
        """Until reclaim comes nothing is lost; pages are clean, and no longer swap's."""
        world = mapped_range(pages=4)

        advise(world, 0, 3, "free")
        lru_add_drain_all(world.machine.mem)

        flags = world.machine.mem.flags[world.pfns()]
        assert [False, False, False, True] == ((flags & PG_swapbacked) != 0).tolist()
        assert [False, False, False, True] == pte_dirty(world.ptes()).tolist()
        assert 3 == world.machine.vmstat["pglazyfree"]
        assert world.intact()

    def test_what_is_in_swap(self):
        """It is gone at once, and its slots are free."""
        world = mapped_range(pages=3, swap="1MiB")
        world.pageout()

        advise(world, 0, 2, "free")

        assert [0, 0, 2] == world.contents()
        assert 0 == world.process.mm.swapents

    def test_lost_page(self):
        """What answers with SIGBUS reads as zeros afterwards."""
        world = mapped_range(pages=2, filled=False)
        poison(world, 1)

        advise(world, 0, 2, "free")

        assert [0, 0] == world.contents()

    def test_who_keeps_his_page(self):
        """A device page, and one that another process has changed and still maps."""
        world = mapped_range(pages=3)
        world.machine.mem.flags[world.pfns()[1]] |= PG_dirty
        world.fork(1)
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)

        advise(world, 0, 3, "free")
        lru_add_drain_all(world.machine.mem)

        backed = (world.machine.mem.flags[world.pfns()] & PG_swapbacked) != 0
        assert [True, True, False] == backed.tolist()
        assert [True, False, False] == world.on_device()
        assert world.intact()

    def test_cached_page(self):
        """Its slot goes with its contents, unless somebody has it locked."""
        world = mapped_range(pages=2, swap="1MiB")
        world.pageout()
        advise(world, 0, 2, "willneed")
        world.process.read(world.addr, world.nbytes)
        world.lock(1)

        advise(world, 0, 2, "free")

        lru_add_drain_all(world.machine.mem)
        backed = (world.machine.mem.flags[world.pfns()] & PG_swapbacked) != 0
        assert [False, True] == backed.tolist()
        world.unlock(1)

    def test_announced(self):
        """A device forgets the range: it must not store to what may be dropped."""
        world = mapped_range(pages=2)
        heard = Listener(world)

        advise(world, 0, 2, "free")

        assert [(MmuNotifyEvent.CLEAR, 0, 2)] == heard.events


class TestCold:
    def test_to_the_inactive_list(self):
        """The page counts as not used for long; its contents stay."""
        world = mapped_range(pages=3)
        lru_add_drain_all(world.machine.mem)

        advise(world, 0, 2, "cold")

        flags = world.machine.mem.flags[world.pfns()]
        assert [False, False, True] == ((flags & PG_active) != 0).tolist()
        assert [True, True, False] == ((flags & PG_workingset) != 0).tolist()
        assert [False, False, True] == pte_young(world.ptes()).tolist()
        assert 2 == world.machine.vmstat["pgdeactivate"]
        assert world.intact()


class TestPageout:
    def test_own_pages(self):
        """They are in swap, and come back with a major fault each."""
        world = mapped_range(pages=4, swap="1MiB")

        advise(world, 1, 2, "pageout")
        major = world.process.maj_flt

        assert [False, True, True, False] == is_swap_entry(world.ptes()).tolist()
        assert world.intact()
        assert 2 == world.process.maj_flt - major

    def test_what_stays(self):
        """A shared page, a device page, the zero page and what was never touched."""
        world = mapped_range(pages=4, filled=False, swap="1MiB")
        world.process.touch(world.addr, 2 * PAGE_SIZE)
        world.process.touch(world.at(2), PAGE_SIZE, write=False)
        world.fork(0)
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)
        before = world.ptes().tolist()

        advise(world, 0, 4, "pageout")

        assert before == world.ptes().tolist()

    def test_without_swap(self):
        """There is nowhere to go, and that is no error."""
        world = mapped_range(pages=2)

        advise(world, 0, 2, "pageout")

        assert world.intact()

    @pytest.mark.parametrize("advice", ["free", "cold", "pageout"])
    def test_locked(self, advice):
        """What is locked in memory stays there."""
        world = mapped_range(pages=2)
        world.process.mlock(world.addr, world.nbytes)

        with pytest.raises(InvalidArgument, match=f"cannot be advised to {advice}"):
            advise(world, 0, 2, advice)

        assert world.intact()


class TestWillneed:
    def test_read_ahead(self):
        """What is in swap is read; the accesses that follow find it."""
        world = mapped_range(pages=4, swap="1MiB")
        world.pageout(1, 2)
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)

        with world.machine.vmstat.counting("pswpin") as delta:
            advise(world, 0, 4, "willneed")
            advise(world, 0, 4, "willneed")
        major = world.process.maj_flt

        assert {"pswpin": 2} == delta
        assert [True, False, False, False] == world.on_device()
        assert world.intact()
        assert 0 == world.process.maj_flt - major

    def test_nothing_in_swap(self):
        """Nothing to do."""
        world = mapped_range(pages=2, filled=False)

        advise(world, 0, 2, "willneed")

        assert pte_none(world.ptes()).all()


def poison(world, page):
    """Let *page*, never touched, be one whose contents are lost."""
    world.process.touch(world.addr, PAGE_SIZE)  # so that there is a page table
    pool, mm = world.machine.mem.tables, world.process.mm
    at = pte_offset(pool, mm.pgd, world.addrs[page : page + 1])
    pool.entries[at] = make_hwpoison_entry(pages(7))


class TestPopulate:
    def test_read(self):
        """Zeros where nothing is, and device pages come back: a fault for each."""
        world = mapped_range(pages=4, filled=False)
        world.process.write(world.at(1), b"\1")
        world.process.write(world.at(2), b"\2")
        world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)

        assert 3 == faults(world, lambda: advise(world, 0, 4, "populate_read"))

        assert pte_present(world.ptes()).all()
        assert [True, False, False, True] == pte_special(world.ptes()).tolist()
        assert 0 == faults(world, lambda: world.process.read(world.addr, world.nbytes))

    def test_write(self):
        """Pages of its own, that stores find writable."""
        world = mapped_range(pages=4, filled=False)
        world.process.touch(world.addr, 2 * PAGE_SIZE, write=False)

        assert 4 == faults(world, lambda: advise(world, 0, 4, "populate_write"))

        assert pte_write(world.ptes()).all()
        assert 0 == faults(world, world.fill)

    @pytest.mark.parametrize(
        ("prot", "advice"),
        [("-", "populate_read"), ("w", "populate_read"), ("r", "populate_write")],
    )
    def test_forbidden(self, prot, advice):
        """An access that the area does not allow is refused, after what comes before it."""
        world = mapped_range(pages=3, filled=False)
        world.process.mprotect(world.at(1), PAGE_SIZE, prot)

        with pytest.raises(InvalidArgument, match="is not allowed by"):
            advise(world, 0, 3, advice)

        assert [True, False, False] == pte_present(world.ptes()).tolist()

    def test_hole(self):
        """It ends there."""
        world = mapped_range(pages=3, filled=False)
        world.process.munmap(world.at(1), PAGE_SIZE)

        with pytest.raises(NotMapped, match=f"nothing is mapped at {world.at(1):#x}"):
            advise(world, 0, 3, "populate_write")

        assert [True, False, False] == pte_present(world.ptes()).tolist()

    def test_memory_is_short(self):
        """As many as there are."""
        world = mapped_range(pages=300, filled=False, nodes=("1MiB",))

        with pytest.raises(OutOfMemory):
            advise(world, 0, 300, "populate_write")

        assert 0 < world.process.mm.anon_rss < 300

    def test_lost_page(self):
        """Contents that are gone cannot be brought."""
        world = mapped_range(pages=2, filled=False)
        poison(world, 1)

        with pytest.raises(HwPoison, match=r"populate: .* are lost"):
            advise(world, 0, 2, "populate_read")


class TestRefused:
    @pytest.mark.parametrize("advice", ["collapse", "pray", "", "DONTNEED"])
    def test_unknown_advice(self, advice):
        """The message says what there is."""
        world = mapped_range(pages=1)

        with pytest.raises(InvalidArgument, match=r"no advice is named .*; normal, sequential"):
            advise(world, 0, 1, advice)

    def test_not_at_a_page(self):
        """An address is a multiple of the page size."""
        world = mapped_range(pages=1)

        with pytest.raises(InvalidArgument, match="is not a multiple of 0x1000"):
            world.process.madvise(world.addr + 1, PAGE_SIZE, "random")

    @pytest.mark.parametrize("advice", ["dontneed", "random"])
    def test_holes(self, advice):
        """They are passed over, and told in the end."""
        world = mapped_range(pages=5)
        world.process.munmap(world.at(1), PAGE_SIZE)
        world.process.munmap(world.at(4), PAGE_SIZE)

        with pytest.raises(NotMapped, match=f"nothing is mapped at {world.at(1):#x}"):
            advise(world, 0, 5, advice)

        if advice == "random":
            assert [[0, 0, VM_RAND_READ], [2, 3, VM_RAND_READ]] == areas(world)
        else:
            assert pte_none(world.ptes()).all()

    @pytest.mark.parametrize("page", [-3, 5])
    def test_nothing_mapped(self, page):
        """Nor anything after it."""
        world = mapped_range(pages=5)

        with pytest.raises(NotMapped):
            advise(world, page, 2, "random")

        assert [[0, 4, 0]] == areas(world)

    @pytest.mark.parametrize("advice", ADVICE)
    def test_nothing(self, advice):
        """A range of no bytes is no error, wherever it is."""
        mapped_range(pages=1).process.madvise(0, 0, advice)


FLAGS = {
    "normal": (VM_RAND_READ | VM_SEQ_READ, 0),
    "random": (VM_SEQ_READ, VM_RAND_READ),
    "dontfork": (0, VM_DONTCOPY),
    "dofork": (VM_DONTCOPY, 0),
    "hugepage": (VM_NOHUGEPAGE, VM_HUGEPAGE),
}
steps = st.tuples(st.integers(0, 9), st.integers(1, 10), st.sampled_from([*FLAGS, "dontneed"]))


class TestAgainstPages:
    @settings(max_examples=30)
    @given(steps=st.lists(steps, max_size=8), holes=st.sets(st.integers(0, 9), max_size=3))
    def test_every_page_has_its_advice(self, steps, holes):
        """The model is a list of flags and bytes; areas are its runs, as one tree has all pages."""
        world = mapped_range(pages=10)
        for page in holes:
            world.process.munmap(world.at(page), PAGE_SIZE)
        flags, bytes_ = [0] * 10, list(range(10))

        for first, count, advice in steps:
            advised = range(first, min(first + count, 10))
            if holes & set(advised):
                with pytest.raises(NotMapped):
                    advise(world, first, len(advised), advice)
            else:
                advise(world, first, len(advised), advice)
            for page in advised:
                if advice == "dontneed":
                    bytes_[page] = 0
                else:
                    clear, on = FLAGS[advice]
                    flags[page] = flags[page] & ~clear | on

        mapped = [page for page in range(10) if page not in holes]
        starts = [p for p in mapped if p - 1 not in mapped or flags[p] != flags[p - 1]]
        assert [[p, flags[p]] for p in starts] == [[first, f] for first, _, f in areas(world)]
        for page in mapped:
            assert bytes_[page] == world.process.read(world.at(page), 1)[0]
