"""mlock() and munlock(), as recorded in 18_mlock and 42_mlock_fault of Linux 6.12."""

import pytest

from mm import PAGE_SIZE
from mm.errors import NotMapped, TryAgain
from mm.page_flags import PG_mlocked
from mm.pgtable import PMD_SIZE, pte_present, pte_special, pte_write
from mm.swap import lru_add_drain_all
from mm.types import VM_IO, VM_LOCKED, VM_LOCKONFAULT
from tests.world import mapped_range


def lock(world, first, count, **how):
    world.process.mlock(world.at(first), count * PAGE_SIZE, **how)


def unlock(world, first, count):
    world.process.munlock(world.at(first), count * PAGE_SIZE)


def faults(world, access):
    """Minor faults that *access* takes."""
    before = world.process.min_flt
    access()
    return world.process.min_flt - before


def mlocked(world):
    """Which pages are PG_mlocked."""
    pfns = world.pfns()
    return [bool(pfn >= 0 and world.machine.mem.flags[pfn] & PG_mlocked) for pfn in pfns.tolist()]


def areas(world):
    """[first page, last page, locked?] of every VMA."""
    return [
        [
            (vma.vm_start - world.addr) // PAGE_SIZE,
            (vma.vm_end - world.addr) // PAGE_SIZE - 1,
            bool(vma.vm_flags & VM_LOCKED),
        ]
        for vma in world.process.mm.vmas
    ]


class TestMlock:
    def test_missing_pages_are_faulted_in(self):
        """One fault for each that is not there; all are locked then."""
        world = mapped_range(pages=6, filled=False)
        world.process.touch(world.addr, 4 * PAGE_SIZE)

        assert 2 == faults(world, lambda: lock(world, 0, 6))

        lru_add_drain_all(world.machine.mem)
        assert [True] * 6 == mlocked(world)
        assert 6 == world.process.mm.locked_vm == world.machine.vmstat["nr_unevictable"]

    def test_part_of_an_area(self):
        """What is locked is an area of its own, over the end of a page table too."""
        world = mapped_range(pages=6, addr=5 * PMD_SIZE - 3 * PAGE_SIZE)

        lock(world, 2, 3)

        assert [[0, 1, False], [2, 4, True], [5, 5, False]] == areas(world)
        assert [False, False, True, True, True, False] == mlocked(world)
        assert 3 == world.process.mm.locked_vm

    def test_bytes_of_a_page(self):
        """A page of which one byte is wanted is locked whole."""
        world = mapped_range(pages=3)

        world.process.mlock(world.at(1) - 1, 2)

        assert [True, True, False] == mlocked(world)

    def test_device_pages_come_back(self):
        """Each takes a fault, and two if the process must make it its own as well."""
        world = mapped_range(pages=4)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.write_protect(2, 3)

        assert 6 == faults(world, lambda: lock(world, 0, 4))

        assert [True] * 4 == mlocked(world)
        assert pte_write(world.ptes()).all()
        assert world.intact()

    def test_copy_on_write_comes_first(self):
        """What may be written is the process's own afterwards, not shared."""
        world = mapped_range(pages=2)
        child = world.fork(0, 1)
        shared = world.pfns().tolist()

        lock(world, 0, 2)

        assert not set(shared) & set(world.pfns().tolist())
        assert 0 == faults(world, world.fill)
        assert b"\1" == child.read(world.at(1), 1)

    def test_zero_page_of_read_only_memory(self):
        """Read-only memory gets the page of zeros, which nobody needs to lock."""
        world = mapped_range(pages=4, prot="r", filled=False)

        assert 4 == faults(world, lambda: lock(world, 0, 4))

        assert pte_special(world.ptes()).all()
        assert (4, 0) == (world.process.mm.locked_vm, world.machine.vmstat["nr_mlock"])

    def test_zero_page_of_writable_memory(self):
        """There it is replaced."""
        world = mapped_range(pages=2, filled=False)
        world.process.touch(world.addr, world.nbytes, write=False)

        lock(world, 0, 2)

        assert [True, True] == mlocked(world)

    def test_locked_again(self):
        """Nothing is counted twice."""
        world = mapped_range(pages=3)
        lock(world, 0, 2)

        lock(world, 0, 3)
        lock(world, 1, 1)

        assert [[0, 2, True]] == areas(world)
        assert [1, 1, 1] == world.machine.mem.mlock_count[world.pfns()].tolist()
        assert 3 == world.process.mm.locked_vm

    def test_on_fault(self):
        """Pages are locked as they come; those that are there at once."""
        world = mapped_range(pages=3, filled=False)
        world.process.touch(world.addr, PAGE_SIZE)

        assert 0 == faults(world, lambda: lock(world, 0, 3, onfault=True))
        early = mlocked(world)
        world.process.touch(world.at(1), PAGE_SIZE)

        assert [True, False, False] == early
        assert [True, True, False] == mlocked(world)
        assert world.vma.vm_flags & VM_LOCKONFAULT

    def test_on_fault_and_at_once(self):
        """The later call says what holds; what is locked stays so."""
        world = mapped_range(pages=2, filled=False)
        lock(world, 0, 2, onfault=True)

        lock(world, 0, 2)

        assert not world.vma.vm_flags & VM_LOCKONFAULT
        assert [True, True] == mlocked(world)
        assert 2 == world.process.mm.locked_vm

    def test_special_memory(self):
        """A device's registers cannot be locked, and that is no error."""
        world = mapped_range(pages=1)
        world.vma.vm_flags |= VM_IO

        lock(world, 0, 1)

        assert [[0, 0, False]] == areas(world)

    def test_migrates_nevertheless(self):
        """Being locked keeps a page from reclaim, not from moving."""
        world = mapped_range(pages=4)
        lock(world, 0, 4)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [True] * 4 == world.on_device()
        assert (0, 4) == (world.machine.vmstat["nr_mlock"], world.process.mm.locked_vm)
        assert world.intact()


class TestMunlock:
    def test_middle(self):
        """Those pages go back to reclaim's lists, the others stay."""
        world = mapped_range(pages=5)
        lock(world, 0, 5)

        unlock(world, 1, 3)

        lru_add_drain_all(world.machine.mem)
        assert [[0, 0, True], [1, 3, False], [4, 4, True]] == areas(world)
        assert [True, False, False, False, True] == mlocked(world)
        assert (2, 3) == (
            world.machine.vmstat["nr_unevictable"],
            world.machine.vmstat["nr_inactive_anon"],
        )

    def test_never_locked(self):
        """No error, and nothing changes."""
        world = mapped_range(pages=3)

        unlock(world, 0, 3)

        assert [[0, 2, False]] == areas(world)

    def test_while_on_the_device(self):
        """What comes back to memory that is locked no more is not locked."""
        world = mapped_range(pages=3)
        lock(world, 0, 3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        unlock(world, 1, 1)
        assert world.intact()

        assert [True, False, True] == mlocked(world)

    def test_area_is_one_again(self):
        """Locked and unlocked, it is as it was."""
        world = mapped_range(pages=3)
        lock(world, 1, 1)

        unlock(world, 0, 3)

        assert [[0, 2, False]] == areas(world)
        assert 0 == world.process.mm.locked_vm


class TestEnd:
    @pytest.mark.parametrize("end", ["munmap", "exit"])
    def test_locked_memory_goes(self, end):
        """Nothing of it stays behind, on any list or in any count."""
        world = mapped_range(pages=4)
        lock(world, 0, 4)

        if end == "munmap":
            world.process.munmap(world.addr, world.nbytes)
        else:
            world.process.exit()

        lru_add_drain_all(world.machine.mem)
        counts = [world.machine.vmstat[name] for name in ("nr_mlock", "nr_unevictable")]
        assert [0, 0, 0] == [*counts, world.process.mm.locked_vm]

    def test_replaced(self):
        """mmap() over locked memory takes the lock away with it."""
        world = mapped_range(pages=4)
        lock(world, 0, 4)

        world.process.mmap(2 * PAGE_SIZE, addr=world.at(1))

        assert [[0, 0, True], [1, 2, False], [3, 3, True]] == areas(world)
        assert 2 == world.process.mm.locked_vm


class TestRefused:
    def test_hole(self):
        """The areas before it are VM_LOCKED, and nothing is faulted in: recorded in r0125."""
        world = mapped_range(pages=4, filled=False)
        world.process.munmap(world.at(2), PAGE_SIZE)

        with pytest.raises(NotMapped, match=f"nothing is mapped at {world.at(2):#x}"):
            lock(world, 0, 4)

        assert [[0, 1, True], [3, 3, False]] == areas(world)
        assert not pte_present(world.ptes()).any()

    def test_unlock_hole(self):
        """The same."""
        world = mapped_range(pages=3)
        lock(world, 0, 3)
        world.process.munmap(world.at(1), PAGE_SIZE)

        with pytest.raises(NotMapped):
            unlock(world, 0, 3)

        assert [[0, 0, False], [2, 2, True]] == areas(world)

    def test_no_access(self):
        """Memory that nobody may access is locked, and cannot be faulted in."""
        world = mapped_range(pages=4, prot="-", filled=False)

        with pytest.raises(NotMapped, match="is not allowed by"):
            lock(world, 0, 4)

        assert [[0, 3, True]] == areas(world)
        world.process.mprotect(world.addr, world.nbytes, "rw")
        assert [True] * 4 == mlocked(world)

    def test_memory_is_short(self):
        """What could be had is locked."""
        world = mapped_range(pages=250, filled=False, nodes=("1MiB",))

        with pytest.raises(TryAgain, match="no frame for the page"):
            lock(world, 0, 250)

        assert 0 < world.machine.vmstat["nr_mlock"] < 250
        assert 250 == world.process.mm.locked_vm

    def test_nothing(self):
        """A range of no bytes is no error."""
        world = mapped_range(pages=1)

        world.process.mlock(0, 0)
        world.process.munlock(0, 0)
