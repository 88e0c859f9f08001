"""How much address space a process may ask for."""

import pytest

from mm import PAGE_SIZE, Machine, OutOfMemory
from mm.types import VM_ACCOUNT
from tests.world import mapped_range


@pytest.fixture
def process():
    """A process on a machine of 16 MiB and 8 MiB of swap."""
    machine = Machine(("16MiB",), swap="8MiB", max_physmem="64MiB")
    with machine.spawn("greedy") as process:
        yield process
        machine.verify()


class TestMemory:
    @pytest.mark.parametrize(("size", "fits"), [("23MiB", True), ("25MiB", False)])
    def test_mmap(self, process, size, fits):
        """A mapping that memory and swap together cannot hold is refused; others are not."""
        if fits:
            assert process.mmap(size)
            assert process.mmap(size)
        else:
            with pytest.raises(OutOfMemory, match="25 MiB are more than the machine can hold"):
                process.mmap(size)

    @pytest.mark.parametrize(("prot", "flags"), [("r", ""), ("-", ""), ("rw", "|noreserve")])
    def test_what_is_not_accounted_for(self, process, prot, flags):
        """Memory that nobody can write to, or that is not reserved, has any size."""
        addr = process.mmap("1TiB", prot, "anon|private" + flags)

        assert not process.find_vma(addr).vm_flags & VM_ACCOUNT

    def test_replaced_mapping_stays(self, process):
        """A refused mapping leaves what it would have replaced."""
        addr = process.mmap(PAGE_SIZE)
        process.write(addr, b"x")
        with pytest.raises(OutOfMemory):
            process.mmap("1TiB", addr=addr)

        assert b"x" == process.read(addr, 1)

    def test_mprotect(self, process):
        """Memory that becomes writable is accounted for then."""
        addr = process.mmap("1TiB", "r")
        with pytest.raises(OutOfMemory, match="mprotect"):
            process.mprotect(addr, "1TiB", "rw")

        process.mprotect(addr, "1MiB", "rw")
        assert process.find_vma(addr).vm_flags & VM_ACCOUNT

    def test_mremap(self, process):
        """Growing is, by what it grows."""
        addr = process.mmap("20MiB")
        with pytest.raises(OutOfMemory, match="mremap"):
            process.mremap(addr, "20MiB", "1GiB")

        assert process.mremap(addr, "20MiB", "40MiB")

    def test_fork(self, process):
        """A child is refused where one mapping alone has grown past all memory."""
        addr = process.mmap("20MiB")
        process.mremap(addr, "20MiB", "40MiB")
        with pytest.raises(OutOfMemory, match="fork"):
            process.fork()

        assert [process.mm] == process.mm.mem.mms


class TestMapCount:
    def limited(self, pages, limit):
        world = mapped_range(pages=pages)
        world.machine.mem.max_map_count = limit
        return world

    def test_mmap(self):
        """As in Linux, one more than the limit can be had by mmap alone."""
        process = self.limited(1, 2).process
        for prot in ("r", "-"):
            process.mmap(PAGE_SIZE, prot)
        with pytest.raises(OutOfMemory, match="train has 3 VMAs, and may have 2"):
            process.mmap(PAGE_SIZE, "x")

    @pytest.mark.parametrize("call", ["munmap", "mprotect", "mlock", "madvise"])
    def test_cut(self, call):
        """No VMA is cut into more than there may be, and everything stays as it was."""
        world = self.limited(5, 1)
        more = {"mprotect": ("r",), "madvise": ("dontdump",)}.get(call, ())
        with pytest.raises(OutOfMemory, match="may have 1"):
            getattr(world.process, call)(world.at(2), PAGE_SIZE, *more)

        assert 1 == len(world.process.mm.vmas)
        assert world.intact()

    def test_end_can_go(self):
        """munmap of an end makes no VMA."""
        world = self.limited(5, 1)
        world.process.munmap(world.at(4), PAGE_SIZE)

        assert 4 * PAGE_SIZE == world.vma.vm_end - world.vma.vm_start

    def test_mremap(self):
        """Moving keeps three in reserve."""
        world = self.limited(5, 4)
        with pytest.raises(OutOfMemory, match="mremap"):
            world.process.mremap(
                world.addr, world.nbytes, world.nbytes, "maymove|fixed", 0x7000_0000_0000
            )

        assert world.intact()
