"""userfaultfd: what userland brings and protects, against plain models and the recorded kernel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import (
    PAGE_SIZE,
    BusError,
    Busy,
    Exists,
    InputOutputError,
    InvalidArgument,
    InvalidRange,
    NoEntry,
    NoSuchProcess,
    NotMapped,
    OutOfMemory,
    PartlyCopied,
    PermissionDenied,
    SegmentationFault,
    UffdEvent,
)
from mm.task_mmu import PM_PRESENT, PM_SOFT_DIRTY, PM_UFFD_WP
from mm.types import VM_MAYWRITE
from tests.world import mapped_range


def page(byte, count=1):
    return bytes([byte]) * PAGE_SIZE * count


def registered(mode, features="", *, pages=4, filled=False, **how):
    """A world whose range reports to the fd that comes with it."""
    world = mapped_range(pages=pages, filled=filled, **how)
    fd = world.process.userfaultfd(features)
    fd.register(world.addr, world.nbytes, mode)
    return world, fd


def bits(world, bit, process=None):
    """Which pages have *bit* in their pagemap, as 0 and 1."""
    words = (process or world.process).pagemap(world.addr, world.pages)
    return "".join(str(int(word & bit != 0)) for word in words)


def protected(world, process=None):
    return bits(world, PM_UFFD_WP, process)


def vmflags(process):
    return [mss.vmflags.split() for mss in process.smaps()]


def allow(world, fd):
    """A handler that lets stores through, and what it was told."""
    told = []

    def handler(msg):
        if msg.event == UffdEvent.PAGEFAULT:
            told.append(((msg.address - world.addr) // PAGE_SIZE, msg.write, msg.wp))
            fd.writeprotect(msg.address, PAGE_SIZE, False)

    fd.handler = handler
    return told


class TestRegister:
    @pytest.mark.parametrize(
        ("mode", "flags"), [("missing", {"um"}), ("wp", {"uw"}), ("missing|wp", {"um", "uw"})]
    )
    def test_flags(self, mode, flags):
        """smaps shows what a VMA reports, and that it does so no more."""
        world, fd = registered(mode)
        assert flags == {"um", "uw"} & set(*vmflags(world.process))

        fd.unregister(world.addr, world.nbytes)
        assert set() == {"um", "uw"} & set(*vmflags(world.process))

    def test_part_of_a_vma(self):
        """It is a VMA of its own, and joins its neighbours again when nobody has it."""
        world = mapped_range(pages=4, filled=False)
        fd = world.process.userfaultfd()

        fd.register(world.at(1), 2 * PAGE_SIZE)
        assert [False, True, False] == ["um" in flags for flags in vmflags(world.process)]
        fd.close()
        assert 1 == len(vmflags(world.process))

    def test_neighbours_of_two_fds(self):
        """They stay two VMAs."""
        world = mapped_range(pages=4, filled=False)
        for at in (0, 2):
            world.process.userfaultfd().register(world.at(at), 2 * PAGE_SIZE)

        assert 2 == len(vmflags(world.process))

    def test_another_mode(self):
        """The last one counts, unless a VMA has it already."""
        world, fd = registered("missing|wp")
        fd.register(world.addr, world.nbytes, "wp")
        assert {"um", "uw"} <= set(*vmflags(world.process))

        fd.register(world.addr, world.nbytes, "missing|wp")
        fd.unregister(world.addr, world.nbytes)
        fd.register(world.addr, world.nbytes, "missing")
        fd.register(world.addr, world.nbytes, "wp")
        assert {"uw"} == {"um", "uw"} & set(*vmflags(world.process))

    def test_across_vmas_and_holes(self):
        """Every VMA of the range is registered, whatever lies between."""
        world = mapped_range(pages=6, filled=False)
        world.process.munmap(world.at(1), PAGE_SIZE)
        world.process.mprotect(world.at(3), PAGE_SIZE, "r")

        world.process.userfaultfd().register(world.addr, world.nbytes)

        assert [True] * 4 == ["um" in flags for flags in vmflags(world.process)]

    def test_of_another_fd(self):
        """A range has one fd; another may neither take it nor let go of it."""
        world, _ = registered("missing")
        other = world.process.userfaultfd()

        with pytest.raises(Busy, match="another"):
            other.register(world.at(1), PAGE_SIZE)
        with pytest.raises(InvalidArgument, match="report here"):
            other.unregister(world.at(1), PAGE_SIZE)

    def test_what_may_never_be_written(self):
        """Userland would write it."""
        world = mapped_range(pages=1)
        world.vma.vm_flags &= ~VM_MAYWRITE

        with pytest.raises(PermissionDenied):
            world.process.userfaultfd().register(world.addr, PAGE_SIZE)

    @pytest.mark.parametrize(
        ("at", "nbytes"), [(1, PAGE_SIZE), (0, 1), (0, 0), (-(1 << 60), PAGE_SIZE), (1 << 60, 4096)]
    )
    def test_bad_ranges(self, at, nbytes):
        """Whole pages of the address space, please; every call says which are not."""
        world, fd = registered("missing|wp")
        data = np.zeros(nbytes, dtype=np.uint8)

        for call in (fd.register, fd.unregister, fd.zeropage, fd.writeprotect, fd.wake):
            with pytest.raises(InvalidRange, match=r"\[.*0x"):
                call(world.addr + at, nbytes)
        with pytest.raises(InvalidRange):
            fd.copy(world.addr + at, data)

    def test_where_nothing_is_mapped(self):
        """There is nothing to register or to let go of."""
        world, fd = registered("missing")

        for call in (fd.register, fd.unregister):
            with pytest.raises(InvalidRange, match="nothing is mapped"):
                call(world.addr - (1 << 30), PAGE_SIZE)

    def test_bad_words(self):
        """Modes and features have names."""
        world, fd = registered("missing")

        for mode in ("", "minor", "missing|", "wp|x"):
            with pytest.raises(InvalidArgument, match="mode"):
                fd.register(world.addr, PAGE_SIZE, mode)
        with pytest.raises(InvalidArgument, match=r"features 'poll' .*sigbus"):
            world.process.userfaultfd("poll")

    def test_when_all_is_over(self):
        """A closed fd, and one whose process has exited, say so."""
        world, fd = registered("missing")
        gone = world.process.userfaultfd()
        fd.close()
        with pytest.raises(InvalidArgument, match="closed"):
            fd.copy(world.addr, page(1))
        fd.close()

        world.process.exit()
        for call in (gone.register, gone.unregister, gone.zeropage, gone.writeprotect):
            with pytest.raises(NoSuchProcess):
                call(world.addr, PAGE_SIZE)
        gone.close()


class TestCopy:
    def test_many_pages(self):
        """One call fills them all; they are ordinary memory."""
        world, fd = registered("missing", pages=6)

        assert 4 * PAGE_SIZE == fd.copy(world.at(1), page(1, 2) + page(2, 2))

        assert page(1, 2) + page(2, 2) == world.process.read(world.at(1), 4 * PAGE_SIZE)
        assert "011110" == bits(world, PM_PRESENT)
        assert 4 == world.process.mm.anon_rss
        world.process.write(world.at(1), b"x")

    def test_read_only_memory(self):
        """It is filled too, and stays read-only."""
        world, fd = registered("missing", prot="r")
        fd.copy(world.addr, page(5))

        assert page(5) == world.process.read(world.addr, PAGE_SIZE)
        with pytest.raises(SegmentationFault):
            world.process.write(world.addr, b"x")

    def test_page_that_is_there(self):
        """It stays what it is."""
        world, fd = registered("missing", filled=True)

        with pytest.raises(Exists, match=f"{world.at(2):#x}"):
            fd.copy(world.at(2), page(9))
        assert world.intact()

    @pytest.mark.parametrize("fill", ["copy", "zeropage"])
    def test_up_to_a_page_that_is_there(self, fill):
        """What comes before it is filled, and the error says how much."""
        world, fd = registered("missing")
        fd.copy(world.at(2), page(7))

        with pytest.raises(PartlyCopied, match=f"{world.at(2):#x}") as error:
            fd.copy(world.addr, page(1, 4)) if fill == "copy" else fd.zeropage(world.addr, 4 << 12)
        assert 2 * PAGE_SIZE == error.value.copied
        assert "1110" == bits(world, PM_PRESENT)

    def test_out_of_frames(self):
        """What fits is there; then there is no frame."""
        world, fd = registered("missing", pages=512, nodes=("1MiB",), payload=True)

        with pytest.raises(PartlyCopied, match="no room") as error:
            fd.copy(world.addr, page(1, 512))
        copied = error.value.copied // PAGE_SIZE
        assert 0 < copied < 256
        with pytest.raises(OutOfMemory, match=f"the machine .*{world.at(copied):#x}"):
            fd.copy(world.at(copied), page(1))

    def test_control_group(self):
        """It pays for what userland brings, and says where it has no more room."""
        world, fd = registered("missing", pages=64)
        group = world.machine.cgroup("small", limit="64KiB")
        world.process.move_to(group)

        with pytest.raises(PartlyCopied, match="small") as error:
            fd.copy(world.addr, page(1, 64))
        assert 64 << 10 == error.value.copied
        world.process.move_to(None)

    def test_not_inside_one_vma(self):
        """Nor are ranges filled that nobody registered."""
        world, fd = registered("missing")
        fd.unregister(world.at(2), PAGE_SIZE)

        for first, count in ((0, 3), (2, 1), (3, 2)):
            with pytest.raises(NoEntry):
                fd.copy(world.at(first), page(1, count))

    def test_swapped_and_device_pages_are_there(self):
        """A page that is elsewhere is not missing."""
        world, fd = registered("missing", filled=True, swap="1MiB")
        world.gpu.to_device(world.process, world.at(0), PAGE_SIZE)
        world.pageout(1)

        for at in (0, 1):
            with pytest.raises(Exists):
                fd.copy(world.at(at), page(9))
        assert world.intact()

    def test_zeropage(self):
        """Zeros come without a frame, and a store gets one."""
        world, fd = registered("missing")

        assert 2 * PAGE_SIZE == fd.zeropage(world.addr, 2 * PAGE_SIZE)
        assert 0 == world.process.mm.anon_rss
        world.process.write(world.at(1), b"x")
        assert page(0) + b"x" == world.process.read(world.addr, PAGE_SIZE + 1)

    def test_protected_from_the_start(self):
        """The first store is asked for."""
        world, fd = registered("missing|wp")
        fd.copy(world.addr, page(3, 2), wp=True)
        told = allow(world, fd)

        world.process.write(world.at(1), b"x")

        assert "1000" == protected(world)
        assert [(1, True, True)] == told

    def test_protected_where_nobody_asked(self):
        """The range must be registered for it."""
        world, fd = registered("missing")

        with pytest.raises(InvalidArgument, match="wp"):
            fd.copy(world.addr, page(3), wp=True)

    def test_soft_dirty(self):
        """What userland brings counts as stored to."""
        world, fd = registered("missing", pages=2)
        world.process.clear_refs(4)
        fd.copy(world.addr, page(1))

        assert "10" == bits(world, PM_SOFT_DIRTY)

    def test_without_contents(self):
        """A machine that keeps none takes no bytes, but zeros."""
        world, fd = registered("missing", payload=False)

        with pytest.raises(InvalidArgument, match="payload"):
            fd.copy(world.addr, page(1))
        fd.zeropage(world.addr, PAGE_SIZE)


class TestMissing:
    @pytest.mark.parametrize("write", [False, True])
    def test_sigbus(self, write):
        """With the feature nobody is asked: the access fails, and counts as no fault."""
        world, _ = registered("missing", "sigbus")

        with pytest.raises(BusError, match="userland") as error:
            world.process.touch(world.at(1), PAGE_SIZE, write=write)
        assert world.at(1) == error.value.address
        assert (0, 0) == (world.process.min_flt, world.process.maj_flt)
        assert "0000" == bits(world, PM_PRESENT)

    def test_what_is_there_is_not_missing(self):
        """Present, swapped and device pages are the kernel's to serve, and read-only ones."""
        world, _ = registered("missing", "sigbus", filled=True, swap="1MiB")
        world.gpu.to_device(world.process, world.at(0), PAGE_SIZE)
        world.pageout(1)
        world.write_protect(2)

        assert world.intact()
        world.fill()

    def test_dropped_contents(self):
        """They are missing again."""
        world, _ = registered("missing", "sigbus", filled=True)
        world.process.madvise(world.at(1), PAGE_SIZE, "dontneed")

        with pytest.raises(BusError):
            world.process.read(world.addr, world.nbytes)
        assert [0] == list(world.process.read(world.addr, 1))

    def test_system_calls(self):
        """Each says in its own way that a page cannot be had."""
        world, _ = registered("missing", "sigbus")
        process, addr = world.process, world.addr

        for advice in ("populate_read", "populate_write"):
            with pytest.raises(BusError, match="userland"):
                process.madvise(addr, PAGE_SIZE, advice)
        with pytest.raises(NotMapped):
            process.mlock(addr, PAGE_SIZE)
        with pytest.raises(BusError):
            process.pin(addr, PAGE_SIZE)
        with pytest.raises(InputOutputError):
            process.mem_read(addr, 1)
        with pytest.raises(InputOutputError):
            process.mem_write(addr, b"x")
        assert [-1] == world.make_exclusive(0).tolist()
        process.munlock(addr, PAGE_SIZE)

    @pytest.mark.parametrize("features", ["", "sigbus"])
    def test_device(self, features):
        """A device cannot wait for userland: it is told that the page cannot be had."""
        world, fd = registered("missing", features)
        fd.copy(world.addr, page(8))

        with pytest.raises(BusError):
            world.gpu.read(world.process, world.addr, 2 * PAGE_SIZE)
        assert page(8) == world.gpu.read(world.process, world.addr, PAGE_SIZE)
        assert "10" == bits(world, PM_PRESENT)[2:] or [True] == world.on_device()[:1]

    def test_a_device_fills_no_hole(self):
        """It is userland's; so are pages of zeros that userland mapped (recorded: 22_uffd)."""
        world, fd = registered("missing", "sigbus")
        fd.copy(world.addr, page(8))
        fd.zeropage(world.at(1), PAGE_SIZE)

        result = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [True, False, False, False] == world.on_device()
        assert {"userfault": 3} == result.stayed

    def test_child(self):
        """It has none of it: what is missing there comes as ever."""
        world, _ = registered("missing", "sigbus")
        child = world.process.fork()

        assert page(0, 4) == child.read(world.addr, world.nbytes)
        assert set() == {"um", "uw"} & set(*vmflags(child))

    @pytest.mark.parametrize("how", ["maymove|fixed", "maymove|fixed|dontunmap"])
    def test_moved(self, how):
        """Memory that moves leaves its fd behind; what stays mapped keeps it."""
        world, _ = registered("missing", "sigbus")
        to = world.addr - (1 << 30)
        world.process.mremap(world.addr, world.nbytes, world.nbytes, how, to)

        assert page(0) == world.process.read(to, PAGE_SIZE)
        if "dontunmap" in how:
            with pytest.raises(BusError):
                world.process.read(world.addr, 1)

    def test_grown(self):
        """What an mremap adds is registered too."""
        world, _ = registered("missing", "sigbus")
        world.process.munmap(world.at(3), PAGE_SIZE)
        world.process.mremap(world.addr, 3 * PAGE_SIZE, 4 * PAGE_SIZE, "")

        with pytest.raises(BusError):
            world.process.read(world.at(3), 1)

    def test_store_prepares_for_a_page(self):
        """As in Linux it finds out late: the memory has an anon_vma by then, a load leaves none."""
        world, _ = registered("missing", "sigbus")
        for write in (False, True):
            with pytest.raises(BusError):
                world.process.touch(world.addr, 1, write=write)
            assert write == (world.vma.anon_vma is not None)


class TestWriteProtect:
    def test_sigbus(self):
        """Loads go through, stores do not, until they are let through; then without a fault."""
        world, fd = registered("wp", "sigbus", filled=True)
        fd.writeprotect(world.at(1), 2 * PAGE_SIZE)
        assert world.intact()
        faults = world.process.min_flt

        with pytest.raises(BusError) as error:
            world.fill()
        assert world.at(1) == error.value.address
        fd.writeprotect(world.at(1), 2 * PAGE_SIZE, False)
        world.fill()
        assert faults == world.process.min_flt

    @pytest.mark.parametrize(("features", "kept"), [("", "1001"), ("wp_unpopulated", "1111")])
    def test_holes(self, features, kept):
        """What has no page is protected where the fd says so, by markers; the zero page always."""
        world, fd = registered("wp", features)
        world.process.write(world.addr, b"x")
        world.process.read(world.at(3), 1)

        fd.writeprotect(world.addr, world.nbytes)

        assert kept == protected(world)
        assert [True, False, False, True] == world.process.mincore(
            world.addr, world.nbytes
        ).tolist()

    @pytest.mark.parametrize("write", [False, True])
    def test_markers(self, write):
        """The first page comes protected; a store is asked for after that."""
        world, fd = registered("wp", "wp_unpopulated")
        fd.writeprotect(world.addr, world.nbytes)
        told = allow(world, fd)

        world.process.touch(world.at(1), 2 * PAGE_SIZE, write=write)

        assert ("1001" if write else "1111") == protected(world)
        assert ([(1, True, True), (2, True, True)] if write else []) == told

    def test_markers_go(self):
        """With dropped contents, and when stores are let through."""
        world, fd = registered("wp", "wp_unpopulated")
        fd.writeprotect(world.addr, world.nbytes)

        world.process.madvise(world.addr, PAGE_SIZE, "dontneed")
        fd.writeprotect(world.at(1), PAGE_SIZE, False)

        assert "0011" == protected(world)

    def test_markers_of_missing_pages(self):
        """Userland brings the page: a copy takes the marker's place, zeros do not."""
        world, fd = registered("missing|wp", "sigbus|wp_unpopulated")
        fd.writeprotect(world.addr, world.nbytes)

        with pytest.raises(BusError):
            world.process.read(world.addr, 1)
        with pytest.raises(Exists):
            fd.zeropage(world.at(1), PAGE_SIZE)
        fd.copy(world.addr, page(1))
        assert "0111" == protected(world)

    def test_stale_marker(self):
        """One that no fd has a use for any more is an ordinary hole."""
        world, fd = registered("wp", "wp_unpopulated")
        fd.writeprotect(world.addr, world.nbytes)
        fd.register(world.addr, world.nbytes, "missing")
        fd.unregister(world.addr, world.nbytes)
        assert "1111" == protected(world)

        world.fill()
        assert "0000" == protected(world)
        assert world.intact()

    def test_stale_bit(self):
        """A store goes through and leaves it; nothing is protected by it afterwards."""
        world, fd = registered("wp", filled=True)
        fd.writeprotect(world.addr, world.nbytes)
        fd.register(world.addr, world.nbytes, "missing")

        world.fill()
        fd.register(world.addr, world.nbytes, "wp")

        world.fill()
        assert "0000" == protected(world)

    def test_async(self):
        """A store is noted: it loses the protection, and nobody is asked."""
        world, fd = registered("wp", "wp_async", filled=True)
        fd.writeprotect(world.addr, world.nbytes)

        world.process.write(world.at(2), b"x")

        assert "1101" == protected(world)

    def test_not_registered(self):
        """Up to there it is done."""
        world, fd = registered("wp", filled=True)
        fd.unregister(world.at(2), PAGE_SIZE)

        with pytest.raises(NoEntry):
            fd.writeprotect(world.addr, world.nbytes)
        with pytest.raises(NoEntry, match="nothing is mapped"):
            fd.writeprotect(world.addr - (1 << 30), PAGE_SIZE)
        assert "1100" == protected(world)

    @pytest.mark.parametrize("end", ["unregister", "close"])
    def test_end(self, end):
        """Nothing stays protected."""
        world, fd = registered("wp", "sigbus|wp_unpopulated", filled=True)
        world.process.madvise(world.addr, PAGE_SIZE, "dontneed")
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)
        fd.writeprotect(world.addr, world.nbytes)

        fd.unregister(world.addr, world.nbytes) if end == "unregister" else fd.close()

        assert "0000" == protected(world)
        world.fill()
        assert world.intact()

    @pytest.mark.parametrize("event", [False, True])
    def test_child(self, event):
        """It has the protection only with an fd of its own; the parent keeps it either way."""
        world, fd = registered("wp", "wp_unpopulated" + "|event_fork" * event, pages=6)
        world.process.write(world.addr, page(1, 4))
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)
        world.pin(2)
        fd.writeprotect(world.addr, 5 * PAGE_SIZE)

        child = world.process.fork()
        assert "111110" == protected(world)
        assert ("111110" if event else "000000") == protected(world, child)
        if event:
            (msg,) = fd.read()
            told = allow(world, msg.fd)
        child.write(world.addr, page(2, 6))
        assert not event or [(at, True, True) for at in range(5)] == told

    @pytest.mark.parametrize("event", [False, True])
    def test_moved(self, event):
        """Protection goes with the memory if the fd does, and is gone if not."""
        world, fd = registered("wp", "sigbus|wp_unpopulated" + "|event_remap" * event)
        world.process.write(world.addr, page(1, 3))
        fd.writeprotect(world.addr, world.nbytes)
        to = world.process.mmap(world.nbytes)
        world.process.mremap(world.addr, world.nbytes, world.nbytes, "maymove|fixed", to)
        world.addr = to

        assert ("1111" if event else "0000") == protected(world)
        if not event:
            world.fill()
            assert set() == {"um", "uw"} & set(*vmflags(world.process))

    def test_whole_page_tables_move(self):
        """Without the fd, and without the bits in them."""
        world, fd = registered("wp", pages=1024, addr=1 << 32)
        world.process.write(world.addr, page(1, 1024))
        fd.writeprotect(world.addr, world.nbytes)
        to = 1 << 33
        world.process.mremap(world.addr, world.nbytes, world.nbytes, "maymove|fixed", to)
        world.addr = to

        assert "0" * 1024 == protected(world)

    def test_swapped(self):
        """A store to a protected page in swap brings it, and is asked for."""
        world, fd = registered("wp", filled=True, swap="1MiB")
        fd.writeprotect(world.addr, 2 * PAGE_SIZE)
        world.pageout()
        assert "1100" == protected(world)
        told = allow(world, fd)

        world.fill()

        assert [(0, True, True), (1, True, True)] == told
        assert world.intact()

    def test_device_exclusive(self):
        """A device cannot take what it may not store to; what it has keeps its protection."""
        world, fd = registered("wp", "sigbus", filled=True)
        taken = world.make_exclusive(0, 1)
        fd.writeprotect(world.addr, 3 * PAGE_SIZE)

        assert [-1] == world.make_exclusive(2).tolist()
        assert (taken >= 0).all()
        assert world.intact()
        assert "1110" == protected(world)

    def test_pins(self):
        """One for reading leaves the protection, one for writing asks."""
        world, fd = registered("wp", filled=True)
        fd.writeprotect(world.addr, world.nbytes)
        told = allow(world, fd)

        world.process.pin(world.addr, PAGE_SIZE, write=False).release()
        world.process.pin(world.at(2), 2 * PAGE_SIZE).release()

        assert [(2, True, True), (3, True, True)] == told
        assert "1100" == protected(world)

    def test_pin_of_a_shared_page(self):
        """A pin for reading gives the process a copy, protected as the page was."""
        world, fd = registered("wp", filled=True)
        child = world.process.fork()
        fd.writeprotect(world.addr, world.nbytes)
        before = world.pfns()

        world.process.pin(world.at(1), PAGE_SIZE, write=False).release()

        assert [False, True, False, False] == (before != world.pfns()).tolist()
        assert "1111" == protected(world)
        child.exit()

    def test_debugger(self):
        """It stores to what is read-only, but not behind userland's back."""
        world, fd = registered("wp", "sigbus", filled=True)
        world.process.mprotect(world.addr, world.nbytes, "r")
        fd.writeprotect(world.addr, PAGE_SIZE)

        with pytest.raises(InputOutputError):
            world.process.mem_write(world.addr, b"x")
        assert 1 == world.process.mem_write(world.at(1), b"x")

    def test_device_stores(self):
        """A device cannot store to a protected page, wherever it is."""
        world, fd = registered("wp", "sigbus", filled=True)
        fd.writeprotect(world.addr, 2 * PAGE_SIZE)
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)

        for at in (0, 1):
            with pytest.raises(BusError):
                world.gpu.write(world.process, world.at(at), page(9))
        world.gpu.write(world.process, world.at(2), page(2))
        assert world.intact()


PAGES = 5
OPERATIONS = ("write", "read", "protect", "allow", "to_device", "to_system", "pageout")
OTHERS = ("mprotect", "move", "fork", "dontneed", "exclusive")
steps = st.lists(
    st.tuples(st.sampled_from(OPERATIONS + OTHERS), st.integers(0, PAGES - 1)), max_size=25
)


class Model:
    """Pages as a list of dicts would have them: is there one, is it protected, what is in it."""

    def __init__(self, unpopulated):
        self.unpopulated = unpopulated
        self.kind = ["none"] * PAGES  # zero, page
        self.wp = [False] * PAGES
        self.byte = [0] * PAGES
        self.told = []

    def write(self, at, byte):
        if self.wp[at]:
            self.told.append((at, True, True))
        self.kind[at], self.wp[at], self.byte[at] = "page", False, byte

    def read(self, at):
        if self.kind[at] == "none":
            self.kind[at] = "zero"

    def protect(self, at):
        self.wp[at] |= self.unpopulated or self.kind[at] != "none"

    def to_device(self, at):
        if self.kind[at] == "zero" or (self.kind[at] == "none" and not self.wp[at]):
            self.kind[at], self.wp[at] = "page", False  # as recorded: the zero page loses its bit

    def dontneed(self, at):
        self.kind[at], self.wp[at], self.byte[at] = "none", False, 0


class TestProtectionStays:
    @pytest.mark.parametrize("features", ["event_remap", "event_remap|wp_unpopulated"])
    @given(steps=steps)
    def test_against_a_model(self, features, steps):
        """Whatever becomes of a page, exactly the stores to protected ones are asked for."""
        world, fd = registered("wp", features, pages=PAGES, swap="1MiB")
        model, told = Model("unpopulated" in features), allow(world, fd)
        for number, (name, at) in enumerate(steps):
            act(world, fd, model, name, at, number % 250 + 1)

            assert "".join(str(int(wp)) for wp in model.wp) == protected(world), name
        assert model.told == told
        assert model.byte == world.contents()
        fd.close()


def act(world, fd, model, name, at, byte):
    """Do *name* to page *at*, and to the model."""
    process, addr = world.process, world.at(at)
    if name == "write":
        process.write(addr, page(byte))
        model.write(at, byte)
    elif name == "read":
        assert page(model.byte[at]) == process.read(addr, PAGE_SIZE)
        model.read(at)
    elif name in ("protect", "allow"):
        fd.writeprotect(addr, PAGE_SIZE, name == "protect")
        if name == "protect":
            model.protect(at)
        else:
            model.wp[at] = False
    elif name == "to_device":
        world.gpu.to_device(process, addr, PAGE_SIZE)
        model.to_device(at)
    elif name == "dontneed":
        process.madvise(addr, PAGE_SIZE, "dontneed")
        model.dontneed(at)
    elif name == "exclusive":
        world.make_exclusive(at)
        if not model.wp[at] and model.kind[at] != "page":
            model.kind[at] = "page"
        elif model.wp[at] and model.kind[at] == "none":
            model.kind[at] = "page"  # it came for the store, which was refused
    else:
        rest(world, name, at)


def rest(world, name, at):
    """What changes nothing of what the model knows."""
    process = world.process
    if name == "to_system":
        world.gpu.to_system(process, world.at(at), PAGE_SIZE)
    elif name == "pageout":
        process.madvise(world.at(at), PAGE_SIZE, "pageout")
    elif name == "mprotect":
        process.mprotect(world.at(at), PAGE_SIZE, "r")
        process.mprotect(world.at(at), PAGE_SIZE, "rw")
    elif name == "fork":
        with process.fork() as child:
            assert "0" * PAGES == protected(world, child)
            child.touch(world.addr, world.nbytes)
    elif name == "move":
        to = process.mmap(world.nbytes)
        process.mremap(world.addr, world.nbytes, world.nbytes, "maymove|fixed", to)
        world.addr = to


class TestPlaces:
    @pytest.mark.parametrize("write", [False, True])
    @pytest.mark.parametrize("fill", ["copy", "zeropage"])
    def test_scattered(self, write, fill):
        """An access to several pages asks for those that are missing, one after the other."""
        world, fd = registered("missing", pages=6)
        fd.copy(world.at(2), page(2, 2))
        asked = []

        def handler(msg):
            asked.append(((msg.address - world.addr) // PAGE_SIZE, msg.write, msg.wp))
            if fill == "copy":
                fd.copy(msg.address, page(7))
            else:
                fd.zeropage(msg.address, PAGE_SIZE)

        fd.handler = handler
        world.process.touch(world.addr, world.nbytes, write=write)

        assert [(at, write, False) for at in (0, 1, 4, 5)] == asked
        byte = 7 if fill == "copy" else 0
        assert [byte, byte, 2, 2, byte, byte] == world.contents()
