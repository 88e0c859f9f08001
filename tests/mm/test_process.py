"""A process: its calls, and what they refuse."""

import pytest

from devices import NumpyDevice
from mm import InvalidArgument, Machine
from mm.errors import Deadlock
from mm.types import VM_ACCOUNT, VM_SOFTDIRTY
from mm.typing import PAGE_SIZE
from tests.world import mapped_range

FAR = 1 << 40  # where nothing is


@pytest.fixture
def process():
    return mapped_range(pages=1).process


class TestMmap:
    @pytest.mark.parametrize(
        ("how", "complaint"),
        [
            ({"flags": "anon|shared|private"}, "flags 'anon|shared|private' are not one of anon"),
            ({"flags": "anon"}, "flags 'anon' are not"),
            ({"flags": "file|shared"}, r"flags 'file\|shared' do not go with file=None"),
            ({"prot": "rwz"}, "prot 'rwz' is not made of the letters r, w, x or"),
            ({"prot": ""}, "prot '' is not made of"),
            ({"length": 0}, "length must be positive, got 0"),
            ({"length": -4096}, "a size cannot be negative, got -4096"),
            ({"length": "much"}, "'much' is no size"),
        ],
    )
    def test_what_cannot_be_mapped(self, process, how, complaint):
        """The message says what was asked for and what can be."""
        before = process.mm.total_vm

        with pytest.raises(InvalidArgument, match=complaint):
            process.mmap(**{"length": PAGE_SIZE} | how)

        assert before == process.mm.total_vm

    def test_sizes_as_people_write_them(self, process):
        """Text is a size wherever a number is."""
        addr = process.mmap("1MiB")
        process.touch(addr, "64KiB")
        with process.pin(addr, "8K") as pin:
            assert 2 == pin.pfns.size
        process.munmap(addr, "1MiB")

        assert 1 == process.mm.total_vm == process.mm.anon_rss

    def test_flags_in_any_order(self, process):
        """Words between bars."""
        assert process.mmap(PAGE_SIZE, flags="private|anon")

    @pytest.mark.parametrize(("flag", "locked"), [("populate", 0), ("locked", 8)])
    @pytest.mark.parametrize(("prot", "own"), [("rw", 8), ("r", 0)])
    def test_faulted_in_at_once(self, process, flag, locked, prot, own):
        """Writable memory gets its pages, read-only memory the page of zeros; no access faults."""
        before, rss = process.min_flt, process.mm.anon_rss

        addr = process.mmap(8 * PAGE_SIZE, prot, flags=f"anon|private|{flag}")

        assert process.mincore(addr, 8 * PAGE_SIZE).all()
        assert 8 == process.min_flt - before
        process.touch(addr, 8 * PAGE_SIZE, write=False)
        assert 8 == process.min_flt - before
        assert (own, locked) == (process.mm.anon_rss - rss, process.mm.locked_vm)

    def test_more_than_there_is(self, process):
        """Memory that cannot all be faulted in is mapped nevertheless."""
        addr = process.mmap("32MiB", flags="anon|private|populate|noreserve")

        assert process.find_vma(addr) is not None
        assert 0 < process.mm.anon_rss < (32 << 20) // PAGE_SIZE

    def test_that_nobody_can_access(self, process):
        """There is nothing to fault in, and that is no error."""
        addr = process.mmap(PAGE_SIZE, "-", flags="anon|private|locked")

        assert not process.mincore(addr, PAGE_SIZE).any()

    @pytest.mark.parametrize(
        ("prot", "flags", "accounted"),
        [("rw", "", True), ("w", "", True), ("r", "", False), ("rw", "|noreserve", False)],
    )
    def test_accounted(self, process, prot, flags, accounted):
        """Who may store to private memory may need all of it, unless he says otherwise."""
        vma = process.find_vma(
            process.mmap(PAGE_SIZE, prot, flags=f"anon|private{flags}", addr=FAR)
        )

        assert accounted == bool(vma.vm_flags & VM_ACCOUNT)
        assert vma.vm_flags & VM_SOFTDIRTY


class TestExit:
    def test_later_calls(self, process):
        """A process that has exited can do nothing more, and says so; exit itself is fine."""
        process.exit()
        process.exit()

        calls = (
            lambda: process.mmap(PAGE_SIZE),
            lambda: process.munmap(0, PAGE_SIZE),
            lambda: process.read(0, 1),
            lambda: process.write(0, b"x"),
            lambda: process.touch(0, 1),
            lambda: process.pin(0, 1),
            lambda: process.array(5),
            lambda: process.mprotect(0, PAGE_SIZE, "r"),
            lambda: process.mremap(0, PAGE_SIZE, PAGE_SIZE),
            lambda: process.madvise(0, PAGE_SIZE, "random"),
            lambda: process.mlock(0, PAGE_SIZE),
            lambda: process.munlock(0, PAGE_SIZE),
            lambda: process.mincore(0, PAGE_SIZE),
        )
        for call in calls:
            with pytest.raises(InvalidArgument, match="process train has exited"):
                call()

    def test_array_of_a_process_that_has_exited(self, process):
        """Its arrays are gone with it."""
        array = process.array(5, "i4")
        array[:] = 1
        process.exit()

        with pytest.raises(OSError, match="train"):
            array[0]
        with pytest.raises(OSError, match="train"):
            array[0] = 1

    def test_with(self):
        """A `with` block ends the process, also where it fails."""
        machine = Machine(("1MiB",), max_physmem="1MiB")
        process = machine.spawn()
        process.touch(process.mmap(PAGE_SIZE), PAGE_SIZE)

        with pytest.raises(ZeroDivisionError), process:
            raise ZeroDivisionError

        assert process.mm.exited
        assert [] == machine.mem.mms

    def test_shown(self, process):
        """By name, and whether it is over."""
        assert "<Process train>" == repr(process)
        process.exit()
        assert "<Process train, exited>" == repr(process)


class TestCallbacks:
    """A driver that calls back into the process it works for."""

    def in_fault(self, call):
        """What *call*(world) comes to while the process waits for page 1 from the device."""
        world, outcomes = mapped_range(pages=3), []

        class CallsBack(NumpyDevice):
            def copy_out(self, pages, system, rows):
                if not outcomes:
                    outcomes.append(outcome_of(call, world))
                return super().copy_out(pages, system, rows)

        CallsBack(world.machine, "64KiB").to_device(world.process, world.addr, 2 * PAGE_SIZE)
        first = world.process.read(world.at(1), 1)

        assert b"\1" == first
        return outcomes[0]

    def test_touching_the_page_that_moves(self):
        """It would wait for itself, and is told so; the access goes on."""
        outcome = self.in_fault(lambda world: world.process.read(world.at(1), 1))

        assert isinstance(outcome, Deadlock)

    @pytest.mark.parametrize(
        "call", ["exit", "mmap", "munmap", "mprotect", "mremap", "mlock", "munlock"]
    )
    def test_changing_the_address_space(self, call):
        """mmap_sem is held for read: no callback may map, unmap or exit."""
        args = {
            "exit": (),
            "mmap": (PAGE_SIZE,),
            "mprotect": (0x10000, PAGE_SIZE, "r"),
            "mremap": (0x10000, PAGE_SIZE, PAGE_SIZE),
        }.get(call, (0x10000, PAGE_SIZE))

        outcome = self.in_fault(lambda world: getattr(world.process, call)(*args))

        assert isinstance(outcome, Deadlock)

    def test_reading_another_page(self):
        """A page of the process that does not move can be read."""
        assert b"\2" == self.in_fault(lambda world: world.process.read(world.at(2), 1))

    def test_touching_fresh_memory(self):
        """And other memory can be faulted in: it is no page that the driver has mislaid."""

        def write_and_read(world):
            other = world.machine.spawn("other")
            addr = other.mmap(PAGE_SIZE)
            other.write(addr, b"fresh")
            return other.read(addr, 5)

        assert b"fresh" == self.in_fault(write_and_read)


def outcome_of(call, world):
    try:
        return call(world)
    except Deadlock as error:
        return error


class TestCpu:
    def test_faults_are_served_by_its_own_cpu(self):
        """A process puts its pages in the pagevec of the CPU that it runs on."""
        machine = Machine(("1MiB",), cpus=3, max_physmem="1MiB")
        process = machine.spawn(cpu=2)

        process.touch(process.mmap(PAGE_SIZE), PAGE_SIZE)

        assert [0, 0, 1] == [pagevec.size for pagevec in machine.mem.pagevecs]
