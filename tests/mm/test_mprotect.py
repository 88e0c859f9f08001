"""mprotect(): what recordings of Linux 6.12 show, and a dict of pages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import InvalidArgument, OutOfMemory, SegmentationFault
from mm.errors import AccessDenied, NotMapped
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_register, mmu_notifier_unregister
from mm.page_flags import PG_anon_exclusive
from mm.pgtable import (
    PMD_SIZE,
    pte_dirty,
    pte_present,
    pte_soft_dirty,
    pte_special,
    pte_write,
)
from mm.swapops import (
    SWP_SOFT_DIRTY,
    is_migration_entry,
    is_write_device_exclusive_entry,
    is_write_device_private_entry,
    is_write_migration_entry,
)
from mm.types import VM_ACCOUNT, VM_MAYWRITE, VM_SOFTDIRTY, VM_WRITE
from mm.typing import PAGE_SIZE
from tests.mm.test_rmap import migrating
from tests.world import mapped_range


def protect(world, first, count, prot):
    world.process.mprotect(world.at(first), count * PAGE_SIZE, prot)


def faults(world, access):
    """Minor faults that *access* takes."""
    before = world.process.min_flt
    access()
    return world.process.min_flt - before


def areas(world):
    """[first page, last page, rights] of every VMA, from the start of the world's range."""
    return [
        [
            (vma.vm_start - world.addr) // PAGE_SIZE,
            (vma.vm_end - world.addr) // PAGE_SIZE - 1,
            repr(vma)[-4:-1],
        ]
        for vma in world.process.mm.vmas
    ]


class TestRights:
    @pytest.mark.parametrize(
        ("prot", "reads", "writes"),
        [("rw", True, True), ("r", True, False), ("w", True, True), ("-", False, False)],
    )
    def test_what_the_cpu_may_do_then(self, prot, reads, writes):
        """Loads and stores are allowed or end in a signal, for pages that were there before."""
        world = mapped_range(pages=1)
        protect(world, 0, 1, prot)

        for allowed, access in (
            (reads, lambda: world.process.read(world.addr, 1)),
            (writes, lambda: world.process.write(world.addr, b"x")),
        ):
            if allowed:
                access()
            else:
                with pytest.raises(SegmentationFault):
                    access()

    def test_contents_stay(self):
        """No access, and access again: the bytes are those of before."""
        world = mapped_range(pages=5)

        protect(world, 1, 3, "-")
        protect(world, 0, 5, "r")

        assert world.intact()

    def test_areas(self):
        """The range is an area of its own while its rights differ."""
        world = mapped_range(pages=6)

        protect(world, 2, 2, "r")
        cut = areas(world)
        protect(world, 1, 4, "rw")

        assert [[0, 1, "rw-"], [2, 3, "r--"], [4, 5, "rw-"]] == cut
        assert [[0, 5, "rw-"]] == areas(world)

    def test_same_rights(self):
        """Nothing changes, nothing is cut, nobody hears of it."""
        world = mapped_range(pages=4)
        heard = Listener(world)

        protect(world, 1, 2, "rw")

        assert ([[0, 3, "rw-"]], []) == (areas(world), heard.events)

    def test_range_over_tables(self):
        """Entries on both sides of a table's end are rewritten."""
        world = mapped_range(pages=6, addr=5 * PMD_SIZE - 3 * PAGE_SIZE)

        protect(world, 1, 4, "r")

        assert [True, False, False, False, False, True] == pte_write(world.ptes()).tolist()


class TestWritableAgain:
    """Back to "rw", a page of the process's own is writable at once (5.19 and later)."""

    def test_own_pages(self):
        """No store takes a fault."""
        world = mapped_range(pages=3)
        protect(world, 0, 3, "r")
        protect(world, 0, 3, "rw")

        assert pte_write(world.ptes()).all()
        assert 0 == faults(world, world.fill)

    def test_zero_page(self):
        """The page of zeros stays read-only: the first store gets a page."""
        world = mapped_range(pages=2, filled=False)
        world.process.touch(world.addr, world.nbytes, write=False)
        protect(world, 0, 2, "r")
        protect(world, 0, 2, "rw")

        assert pte_special(world.ptes()).all()
        assert not pte_write(world.ptes()).any()
        assert 2 == faults(world, world.fill)

    def test_page_that_may_be_shared(self):
        """A page that is not the process's own stays read-only."""
        world = mapped_range(pages=2)
        world.machine.mem.flags[world.pfns()[0]] &= ~PG_anon_exclusive
        protect(world, 0, 2, "r")
        protect(world, 0, 2, "rw")

        assert [False, True] == pte_write(world.ptes()).tolist()

    def test_page_whose_stores_are_watched(self):
        """After clear_refs a store must fault, to leave its mark."""
        world = mapped_range(pages=2)
        world.clear_refs(0)
        world.vma.vm_flags &= ~VM_SOFTDIRTY
        protect(world, 0, 2, "r")
        protect(world, 0, 2, "rw")

        assert [False, True] == pte_write(world.ptes()).tolist()

    def test_no_access(self):
        """What cannot be accessed is not writable either, and keeps what was known of it."""
        world = mapped_range(pages=1)
        before = world.ptes()

        protect(world, 0, 1, "-")

        (hidden,) = world.ptes().tolist()
        assert pte_present(world.ptes()).all()
        assert not hidden & 1  # the processor's own bit
        assert pte_dirty(world.ptes()).all()
        assert pte_soft_dirty(world.ptes()).all()
        protect(world, 0, 1, "rw")
        assert before.tolist() == world.ptes().tolist()


class TestAway:
    def test_device_pages(self):
        """Entries become read-only and stay so; the data comes back as it was."""
        world = mapped_range(pages=4)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        protect(world, 0, 2, "-")
        protect(world, 0, 2, "rw")

        assert [False, False, True, True] == is_write_device_private_entry(world.ptes()).tolist()
        assert 2 == faults(world, lambda: world.process.write(world.at(1), b"\1"))  # move, then own
        assert 1 == faults(world, lambda: world.process.write(world.at(2), b"\2"))
        assert world.intact()

    def test_soft_dirty_device_page(self):
        """The mark goes with the right to store, as Linux has it, and only then."""
        world = mapped_range(pages=2)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.write_protect(1)
        world.rewrite([0, 1], lambda ptes: ptes | SWP_SOFT_DIRTY)

        protect(world, 0, 2, "r")

        assert [False, True] == ((world.ptes() & SWP_SOFT_DIRTY) != 0).tolist()

    def test_page_on_its_way(self):
        """It arrives with the rights that are left, and with its soft-dirty mark."""
        world = mapped_range(pages=2)

        with migrating(world):
            protect(world, 0, 1, "r")
            entries = world.ptes()

        assert is_migration_entry(entries).all()
        assert [False, True] == is_write_migration_entry(entries).tolist()
        assert [False, True] == pte_write(world.ptes()).tolist()
        assert pte_soft_dirty(world.ptes()).all()

    def test_exclusive_page(self):
        """What a device has for itself comes back read-only."""
        world = mapped_range(pages=1)
        world.make_exclusive(0)
        assert is_write_device_exclusive_entry(world.ptes()).all()

        protect(world, 0, 1, "r")

        assert not is_write_device_exclusive_entry(world.ptes()).any()
        assert world.intact()
        assert not pte_write(world.ptes()).any()


class Listener:
    """Remembers what an address space tells its notifiers."""

    def __init__(self, world):
        self.world, self.events = world, []
        mmu_notifier_register(self, world.process.mm)

    def invalidate_range_start(self, invalid):
        first, end = ((a - self.world.addr) // PAGE_SIZE for a in (invalid.start, invalid.end))
        self.events.append((invalid.event, first, end))

    def invalidate_range_end(self, invalid):
        pass

    def release(self, mm):
        pass


class TestNotifiers:
    def test_each_area_is_announced(self):
        """A change of rights is one event for each area that changes."""
        world = mapped_range(pages=6)
        protect(world, 2, 2, "r")
        heard = Listener(world)

        protect(world, 1, 5, "r")

        event = MmuNotifyEvent.PROTECTION_VMA
        assert [(event, 1, 2), (event, 4, 6)] == heard.events
        mmu_notifier_unregister(heard, world.process.mm)

    def test_nothing_mapped(self):
        """Without page tables there is nothing to forget."""
        world = mapped_range(pages=6, filled=False)
        heard = Listener(world)

        protect(world, 0, 6, "r")

        assert [] == heard.events

    def test_device_table(self):
        """A device that reached the page must ask again, and is refused."""
        world = mapped_range(pages=1)
        world.gpu.write(world.process, world.addr, b"\7")

        protect(world, 0, 1, "r")

        with pytest.raises(OSError, match="not allowed"):
            world.gpu.write(world.process, world.addr, b"\7")
        assert b"\7" == world.gpu.read(world.process, world.addr, 1)


class TestAccounting:
    """VM_ACCOUNT: who may need memory of his own for each page."""

    def accounted(self, world):
        return [bool(vma.vm_flags & VM_ACCOUNT) for vma in world.process.mm.vmas]

    def test_never_written(self):
        """Read-only memory that was never written to needs none, writable memory does."""
        world = mapped_range(pages=2, filled=False)

        protect(world, 1, 1, "r")
        cut = self.accounted(world)
        protect(world, 1, 1, "rw")

        assert [True, False] == cut
        assert [True] == self.accounted(world)

    def test_written(self):
        """What was written to stays accounted for."""
        world = mapped_range(pages=2)

        protect(world, 1, 1, "r")

        assert [True, True] == self.accounted(world)

    def test_without_reserve(self):
        """What was mapped so stays so."""
        world = mapped_range(pages=1)
        addr = world.process.mmap(PAGE_SIZE, "r", flags="anon|private|noreserve")

        world.process.mprotect(addr, PAGE_SIZE, "rw")

        assert not world.process.find_vma(addr).vm_flags & VM_ACCOUNT


class TestLocked:
    def test_writable_memory_is_faulted_in(self):
        """mlock() of read-only memory maps zeros; writable, it gets its own pages at once."""
        world = mapped_range(pages=3, prot="r", filled=False)
        world.process.mlock(world.addr, world.nbytes)

        taken = faults(world, lambda: protect(world, 0, 2, "rw"))

        assert 2 == taken
        assert [True, True, False] == pte_write(world.ptes()).tolist()
        assert 2 == world.machine.vmstat["nr_mlock"]

    def test_device_pages_come_back(self):
        """As recorded: r0816, line 77, and two more."""
        world = mapped_range(pages=4)
        world.process.mlock(world.addr, world.nbytes)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        protect(world, 0, 4, "r")

        protect(world, 1, 2, "rw")

        assert [True, False, False, True] == world.on_device()
        assert world.intact()

    def test_memory_is_short(self):
        """That not all can be faulted in is no error: the rights are there."""
        world = mapped_range(pages=250, prot="r", filled=False, nodes=("1MiB",))
        world.process.mlock(world.addr, world.nbytes)

        protect(world, 0, 250, "rw")

        assert world.vma.vm_flags & VM_WRITE
        with pytest.raises(OutOfMemory):
            world.process.touch(world.addr, world.nbytes)


class TestRefused:
    def test_hole(self):
        """What comes before it has the new rights, what comes after has not."""
        world = mapped_range(pages=5)
        world.process.munmap(world.at(2), PAGE_SIZE)

        with pytest.raises(NotMapped, match=f"nothing is mapped at {world.at(2):#x}"):
            protect(world, 1, 4, "r")

        assert [[0, 0, "rw-"], [1, 1, "r--"], [3, 4, "rw-"]] == areas(world)

    def test_hole_at_the_start(self):
        """Nothing changes."""
        world = mapped_range(pages=2)

        with pytest.raises(NotMapped):
            protect(world, -1, 2, "r")

        assert [[0, 1, "rw-"]] == areas(world)

    def test_what_may_never_be(self):
        """A mapping that may never be written is not, and the areas before it are."""
        world = mapped_range(pages=3)
        protect(world, 1, 1, "r")
        world.process.mm.vmas[1].vm_flags &= ~VM_MAYWRITE

        with pytest.raises(AccessDenied, match="may not have the rights"):
            protect(world, 0, 3, "rwx")

        assert [[0, 0, "rwx"], [1, 1, "r--"], [2, 2, "rw-"]] == areas(world)

    @pytest.mark.parametrize(
        ("addr", "prot", "complaint"),
        [(5, "r", "is not a multiple of 0x1000"), (0, "z", "not made of"), (0, "", "not made of")],
    )
    def test_wrong_arguments(self, addr, prot, complaint):
        """The message says what would be right."""
        world = mapped_range(pages=1)

        with pytest.raises(InvalidArgument, match=complaint):
            world.process.mprotect(world.addr + addr, PAGE_SIZE, prot)

    def test_nothing(self):
        """A range of no bytes is no error, wherever it is."""
        mapped_range(pages=1).process.mprotect(0, 0, "r")


spots = st.sampled_from(["none", "zero", "page", "device", "read-only device", "shared"])
steps = st.tuples(st.integers(0, 7), st.integers(1, 8), st.sampled_from(["rw", "r", "-", "w"]))


class TestAgainstPages:
    @settings(max_examples=30)
    @given(kinds=st.lists(spots, min_size=8, max_size=8), steps=st.lists(steps, max_size=5))
    def test_rights_and_contents(self, kinds, steps):
        """Each page has the rights that were given last, and keeps its byte."""
        world = mapped_range(pages=8, filled=False)
        model = dict.fromkeys(range(8), "rw")
        bytes_ = dict.fromkeys(range(8), 0)
        for page, kind in enumerate(kinds):
            if kind != "none":
                world.process.touch(world.at(page), PAGE_SIZE, write=False)
            if kind not in ("none", "zero"):
                bytes_[page] = page + 1
                world.process.write(world.at(page), bytes([page + 1]))
            if "device" in kind:
                world.gpu.to_device(world.process, world.at(page), PAGE_SIZE)
            if kind == "read-only device":
                world.write_protect(page)
            if kind == "shared":
                world.fork(page)

        for first, count, prot in steps:
            end = min(first + count, 8)
            protect(world, first, end - first, prot)
            model |= dict.fromkeys(range(first, end), prot)
            assert_entries(world, model)

        world.machine.verify()
        for page, prot in model.items():
            if prot == "-":
                protect(world, page, 1, "r")
            assert bytes_[page] == world.process.read(world.at(page), 1)[0]


def assert_entries(world, model):
    """Each VMA has the rights of its pages, and no entry allows more."""
    ptes = world.ptes()
    writable = (pte_present(ptes) & pte_write(ptes)) | is_write_device_private_entry(ptes)
    for page, prot in model.items():
        assert ("w" in prot) == bool(world.process.find_vma(world.at(page)).vm_flags & VM_WRITE)
        assert "w" in prot or not writable[page]
