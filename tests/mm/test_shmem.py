"""Shared anonymous memory and memfd: in memory, in swap, or nowhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import PAGE_SIZE, BusError, Machine
from mm.errors import InvalidArgument, NotSupported
from mm.page_flags import PG_dirty, PG_swapbacked
from mm.sched import running
from mm.swap import lru_add_drain_all
from mm.swapops import is_swap_entry
from mm.types import page_mapping
from tests.files import disk_file, mapped_file
from tests.world import mapped_range


class TestSharedAnonymous:
    def test_child_shares_it(self):
        """What one stores the other reads, whichever touched the page first."""
        world = mapped_range(pages=1)
        addr = world.process.mmap(2 * PAGE_SIZE, flags="anon|shared")
        world.process.write(addr, b"parent")
        child = world.process.fork()

        child.write(addr + PAGE_SIZE, b"child")

        assert b"parent" == child.read(addr, 6)
        assert b"child" == world.process.read(addr + PAGE_SIZE, 5)
        assert 2 == world.machine.vmstat["nr_shmem"]

    def test_gone_with_the_last_who_maps_it(self):
        """Its file has no other users."""
        world = mapped_range(pages=1)
        addr = world.process.mmap(2 * PAGE_SIZE, flags="anon|shared|populate")
        child = world.process.fork()
        free = world.machine.nr_free_pages

        world.process.munmap(addr, 2 * PAGE_SIZE)
        assert b"\0" == child.read(addr, 1)
        child.exit()

        assert {} == world.machine.mem.mappings
        assert free + 2 <= world.machine.nr_free_pages

    def test_two_are_two(self):
        """Each has a file of its own, so that neighbours do not merge."""
        world = mapped_range(pages=1)
        first = world.process.mmap(PAGE_SIZE, flags="anon|shared")
        second = world.process.mmap(PAGE_SIZE, flags="anon|shared", addr=first - PAGE_SIZE)

        world.process.write(second, b"x" * 2 * PAGE_SIZE)

        assert 3 == len(world.process.mm.vmas)
        assert [0, 0] == [page_index(world, addr) for addr in (first, second)]


def page_index(world, addr):
    pfn = int(world.process.pagemap(addr, 1).item()) & ((1 << 55) - 1)
    return world.machine.mem.index.item(pfn)


class TestMemfd:
    def test_read_and_write(self):
        """Bytes come back from where they were written, zeros from elsewhere."""
        with Machine(("16MiB",)).memfd_create() as file:
            assert 10 == file.write(PAGE_SIZE - 5, b"0123456789")

            assert PAGE_SIZE + 5 == file.size
            assert b"\0" * (PAGE_SIZE - 5) + b"0123456789" == file.read(0, 1 << 20)
            assert b"567" == file.read(PAGE_SIZE, 3)
            assert b"" == file.read(file.size, 9)

    def test_hole_is_read_without_a_page(self):
        """Only what is written or mapped takes memory."""
        machine = Machine(("16MiB",))
        with machine.memfd_create() as file:
            file.truncate("4MiB")

            assert bytes(4 << 20) == file.read(0, 4 << 20)
            assert 0 == machine.vmstat["nr_shmem"]

    def test_name(self):
        """It is for people, and short."""
        machine = Machine(("16MiB",))
        with machine.memfd_create("cache") as file:
            assert "<File memfd:cache, 0x0 bytes>" == repr(file)
        with pytest.raises(InvalidArgument, match="more than 249 bytes"):
            machine.memfd_create("x" * 250)

    def test_mapping_and_file_are_one(self):
        """A store is read from the file, a write to the file is loaded; no page is there twice."""
        world = mapped_file(pages=3)

        world.file.write(PAGE_SIZE, b"file")
        world.process.write(world.at(2), b"cpu")

        assert b"file" == world.process.read(world.at(1), 4)
        assert b"cpu" == world.file.read(2 * PAGE_SIZE, 3)
        assert world.pfns().tolist() == world.cache().tolist()

    def test_columns(self):
        """A page knows its file and place; the cache and each mapping hold a reference."""
        world = mapped_file(pages=2)
        other = world.shared()
        other.contents()
        mem, pfns = world.machine.mem, world.pfns()

        assert world.file.f_mapping is page_mapping(mem, pfns.item(0))
        assert [0, 1] == mem.index[pfns].tolist()
        assert [2, 2] == mem.mapcount[pfns].tolist()
        assert (mem.flags[pfns] & PG_swapbacked != 0).all()
        assert (2, 2) == (mem.vmstat["nr_mapped"], world.process.mm.shmem_rss)


class TestTruncate:
    def test_cut_off_under_a_mapping(self):
        """An access beyond the new end gets SIGBUS; the rest of the last page reads as zeros."""
        world = mapped_file(pages=4)

        world.file.truncate(PAGE_SIZE + 100)

        assert world.written()[1, :100].tobytes() + bytes(PAGE_SIZE - 100) == (
            world.process.read(world.at(1), PAGE_SIZE)
        )
        for access in (world.process.read, lambda addr, n: world.process.write(addr, b"x" * n)):
            with pytest.raises(BusError, match="beyond the end of the file"):
                access(world.at(2), 1)
        assert 2 == world.machine.vmstat["nr_shmem"] == world.process.mm.shmem_rss

    def test_private_copies_go_too(self):
        """Beyond the end there is nothing, whosever it was."""
        world = mapped_file(pages=3)
        private = world.private()
        private.process.write(private.at(2), b"mine")

        world.file.truncate(PAGE_SIZE)

        with pytest.raises(BusError):
            private.process.read(private.at(2), 4)
        assert 0 == private.process.mm.anon_rss

    def test_longer_again(self):
        """What comes back is zeros."""
        world = mapped_file(pages=2)

        world.file.truncate(10)
        world.file.truncate(2 * PAGE_SIZE)

        assert bytes(2 * PAGE_SIZE - 10) == world.process.read(world.addr + 10, 2 * PAGE_SIZE - 10)

    def test_pages_in_swap(self):
        """Their slots are free."""
        world = mapped_file(pages=3, swap="64KiB")
        world.evict()
        assert 3 == world.machine.mem.swap.inuse_pages

        world.file.truncate(0)

        assert 0 == world.machine.mem.swap.inuse_pages


class TestFallocate:
    def test_punch_hole(self):
        """Whole pages go, parts of pages are zeroed, private copies stay."""
        world = mapped_file(pages=4)
        private = world.private()
        private.process.write(private.at(2), b"mine")

        world.file.fallocate("punch_hole|keep_size", PAGE_SIZE // 2, 3 * PAGE_SIZE)

        expected = world.written().copy()
        expected.reshape(-1)[PAGE_SIZE // 2 : 7 * PAGE_SIZE // 2] = 0
        assert expected.tobytes() == world.file.read(0, world.nbytes)
        assert [True, False, False, True] == (world.cache() > 0).tolist()
        assert b"mine" == private.process.read(private.at(2), 4)
        assert world.nbytes == world.file.size

    def test_allocate(self):
        """The pages are there, and reclaim does not take them for holes."""
        world = mapped_file(pages=2, filled=False)

        world.file.fallocate("", 0, 3 * PAGE_SIZE)

        assert 3 * PAGE_SIZE == world.file.size
        assert (world.cache() > 0).all()
        assert (world.machine.mem.flags[world.cache()] & PG_dirty != 0).all()

    def test_keep_size(self):
        """The file is no longer than before."""
        world = mapped_file(pages=1)

        world.file.fallocate("keep_size", 0, 3 * PAGE_SIZE)

        assert PAGE_SIZE == world.file.size

    @pytest.mark.parametrize("mode", ["punch_hole", "collapse", 8])
    def test_unknown(self, mode):
        """It says what it cannot."""
        with pytest.raises(NotSupported):
            mapped_file(pages=1).file.fallocate(mode, 0, PAGE_SIZE)


class TestSwap:
    def test_out_and_in(self):
        """A page goes to a slot, which the cache names, and comes back dirty; the slot is free."""
        world = mapped_file(pages=4, swap="64KiB")
        with world.machine.vmstat.counting("pswpout", "pswpin", "nr_shmem") as delta:
            assert 4 == world.evict()
            assert (world.cache() < 0).all()
            assert world.intact()

        assert {"pswpout": 3, "pswpin": 3, "nr_shmem": 0} == delta
        assert 0 == world.machine.mem.swap.inuse_pages
        assert (world.machine.mem.flags[world.pfns()[1:]] & PG_dirty != 0).all()

    def test_nobody_keeps_entries(self):
        """The page tables of those who mapped it are empty: the offset is all they need."""
        world = mapped_file(pages=2, swap="64KiB")
        child = world.seen_by(world.process.fork())
        child.contents()

        world.evict()

        assert not world.ptes().any()
        assert not child.ptes().any()
        assert 0 == world.process.mm.swapents == world.process.mm.shmem_rss
        assert world.intact()
        assert child.intact()

    def test_major_fault(self):
        """Who has to wait for swap takes one; who comes second finds the page."""
        world = mapped_file(pages=2, swap="64KiB")
        other = world.shared()
        world.evict()

        world.process.read(world.at(1), 1)
        other.process.read(other.at(1), 1)

        assert (1, 0) == (world.process.maj_flt, other.process.maj_flt)
        assert 1 == other.process.min_flt

    def test_zeros_are_dropped(self):
        """A page that nobody stored to needs no slot: a hole reads the same."""
        world = mapped_file(pages=3, swap="64KiB", filled=False)
        world.process.touch(world.addr, world.nbytes, write=False)

        assert 3 == world.evict()

        assert [0, 0, 0] == world.cache().tolist()
        assert 0 == world.machine.mem.swap.inuse_pages

    def test_no_slot_is_free(self):
        """The page stays, with all its bytes."""
        world = mapped_file(pages=4)

        assert 0 == world.evict()

        assert world.intact()

    def test_write_that_fails(self):
        """The page stays in the swap cache, dirty."""
        world = mapped_file(pages=2, swap="64KiB")
        world.machine.mem.swap.write_errors.update(range(16))

        assert 0 == world.evict()

        world.machine.mem.swap.write_errors.clear()
        assert world.intact()

    def test_slot_that_cannot_be_read(self):
        """SIGBUS, again and again, until it can."""
        world = mapped_file(pages=2, swap="64KiB")
        world.evict()
        world.machine.mem.swap.read_errors.update(range(16))

        for _ in range(2):
            with pytest.raises(BusError):
                world.process.read(world.at(1), 1)

        world.machine.mem.swap.read_errors.clear()
        assert world.intact()

    def test_file_reads_and_writes(self):
        """They bring pages back as mappings do."""
        world = mapped_file(pages=4, swap="64KiB")
        world.evict()

        assert world.written()[1:3].tobytes() == world.file.read(PAGE_SIZE, 2 * PAGE_SIZE)
        world.file.write(3 * PAGE_SIZE, b"new")

        assert b"new\3" == world.process.read(world.at(3), 4)

    def test_willneed(self):
        """MADV_WILLNEED reads ahead into the swap cache; the fault is minor then."""
        world = mapped_file(pages=2, swap="64KiB")
        world.evict()

        world.process.madvise(world.addr, world.nbytes, "willneed")

        assert [True, True] == world.process.mincore(world.addr, world.nbytes).tolist()
        before = world.process.maj_flt
        assert world.intact()
        assert before == world.process.maj_flt

    def test_under_pressure(self):
        """Far more than memory holds can be shared, as far as swap goes."""
        world = mapped_file(pages=3000, nodes=("8MiB",), swap="16MiB")

        assert world.intact()
        assert world.machine.vmstat["pswpin"] > 500


class TestPrivateMapping:
    def test_sees_the_file_until_it_stores(self):
        """A page that was copied stands still; the others change with the file."""
        world = mapped_file(pages=2)
        private = world.private()
        private.process.write(private.at(0), b"mine")

        world.file.write(0, b"file")
        world.file.write(PAGE_SIZE, b"file")

        assert b"mine" == private.process.read(private.at(0), 4)
        assert b"file" == private.process.read(private.at(1), 4)
        assert b"file" == world.process.read(world.at(0), 4)
        mm = private.process.mm
        assert (1, 1, 0) == (mm.anon_rss, mm.shmem_rss, mm.file_rss)

    def test_store_after_load(self):
        """The page that was mapped is copied, and stays in the file."""
        world = mapped_file(pages=1)
        private = world.private()
        private.contents()

        with world.machine.vmstat.counting("cow_faults") as delta:
            private.process.write(private.addr, b"mine")

        assert {"cow_faults": 1} == delta
        assert (1, 0) == (private.process.mm.anon_rss, private.process.mm.shmem_rss)
        assert world.intact()

    def test_fork(self):
        """The child has the copies of its parent, and the pages of the file."""
        world = mapped_file(pages=2)
        private = world.private()
        private.process.write(private.at(0), b"mine")
        private.contents()
        child = private.seen_by(private.process.fork())

        private.process.write(private.at(0), b"ours")

        assert b"mine" == child.process.read(child.at(0), 4)
        assert b"\1" == child.process.read(child.at(1), 1)
        assert (1, 1) == (child.process.mm.anon_rss, child.process.mm.shmem_rss)

    def test_copy_in_swap(self):
        """It has a slot of its own, which its page table names."""
        world = mapped_file(pages=2, swap="64KiB")
        private = world.private()
        private.process.write(private.at(1), b"mine")
        private.pageout()

        assert [False, True] == is_swap_entry(private.ptes()).tolist()
        assert b"mine" == private.process.read(private.at(1), 4)
        assert world.intact()


class TestPolicy:
    @pytest.mark.parametrize("policy", [("bind", [1]), ("preferred", [1]), ("interleave", [0, 1])])
    def test_is_the_files(self, policy):
        """Who maps the file decides where its pages come from, whoever touches them."""
        world = mapped_file(pages=4, filled=False, nodes=("8MiB", "8MiB"))
        other = world.shared()
        world.process.mbind(world.at(1), 2 * PAGE_SIZE, *policy)

        other.fill()

        nids = [0, 1, 1, 0] if len(policy[1]) == 1 else [0, 1, 0, 0]
        assert nids == world.machine.mem.page_to_nid(world.cache()).tolist()

    def test_given_back(self):
        """The default takes it away from a part."""
        world = mapped_file(pages=4, filled=False, nodes=("8MiB", "8MiB"))
        world.process.mbind(world.addr, world.nbytes, "bind", [1])
        world.process.mbind(world.at(1), 2 * PAGE_SIZE, "default")

        world.fill()

        assert [1, 0, 0, 1] == world.machine.mem.page_to_nid(world.cache()).tolist()


class TestMigration:
    def test_between_nodes(self):
        """The new page takes the place in the cache, for all who map it."""
        world = mapped_file(pages=3, nodes=("8MiB", "8MiB"))
        other = world.shared()
        other.contents()
        before = world.pfns()

        assert [1] * 3 == world.process.move_pages(world.addrs, 1, "moveall").tolist()

        assert world.intact()
        assert other.intact()
        assert world.pfns().tolist() == other.pfns().tolist() == world.cache().tolist()
        assert not set(before.tolist()) & set(world.pfns().tolist())

    def test_not_to_a_device(self):
        """The page is unmapped and refused; nothing is lost."""
        world = mapped_file(pages=3)
        before = world.pfns().tolist()

        result = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (3, 0) == (result.collected, result.migrated)
        assert {"refused": 3} == result.stayed
        assert before == world.pfns().tolist()
        assert world.intact()

    def test_private_copies_do(self):
        """They are anonymous memory like any other; holes of the file are passed over."""
        world = mapped_file(pages=3)
        private = world.private()
        private.process.write(private.at(1), b"mine")

        result = world.gpu.to_device(private.process, private.addr, private.nbytes)

        assert 1 == result.migrated
        assert [False, True, False] == private.on_device()
        assert b"mine" == private.process.read(private.at(1), 4)

    def test_device_reads_and_writes(self):
        """It maps the pages of the file as they are in system memory."""
        world = mapped_file(pages=2)

        world.gpu.write(world.process, world.at(1), b"device")

        assert b"device" == world.file.read(PAGE_SIZE, 6)
        assert world.written()[0].tobytes() == world.gpu.read(world.process, world.addr, PAGE_SIZE)


class TestControlGroup:
    def test_who_touches_first_pays(self):
        """And nobody else, until the page is gone."""
        world = mapped_file(pages=4, filled=False)
        cgroup = world.machine.cgroup("train")
        other = world.shared()
        world.process.move_to(cgroup)

        other.fill()
        assert 0 == cgroup.usage
        world.file.truncate(0)
        world.file.truncate(world.nbytes)
        world.fill()
        other.contents()

        assert 4 * PAGE_SIZE == cgroup.usage
        world.file.truncate(0)
        lru_add_drain_all(world.machine.mem)
        assert 0 == cgroup.usage

    def test_limit(self):
        """What is too much goes to swap, and comes back by turns."""
        world = mapped_file(pages=300, filled=False, swap="4MiB")
        cgroup = world.machine.cgroup("train", limit="512KiB")
        world.process.move_to(cgroup)

        world.fill()

        assert cgroup.usage <= 512 << 10
        assert world.intact()

    def test_reads_of_a_file(self):
        """A process pays for what it has read into the cache."""
        world = mapped_range(pages=1)
        cgroup = world.machine.cgroup("train")
        world.process.move_to(cgroup)
        file, _ = disk_file(world.machine, bytes(5000))
        before = cgroup.usage

        with running(world.process):
            file.read(0, 5000)

        assert 2 * PAGE_SIZE == cgroup.usage - before


# Against a model of bytes ------------------------------------------------------------------------

NR = 6
page_numbers = st.integers(0, NR - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("shared"), page_numbers, st.integers(1, 255)),
        st.tuples(st.just("private"), page_numbers, st.integers(1, 255)),
        st.tuples(st.just("child"), page_numbers, st.integers(1, 255)),
        st.tuples(st.just("file"), page_numbers, st.integers(1, 255)),
        st.tuples(st.just("truncate"), st.integers(0, NR * PAGE_SIZE), st.just(0)),
        st.tuples(st.just("punch"), page_numbers, st.integers(1, 2 * PAGE_SIZE)),
        st.tuples(st.just("migrate"), page_numbers, st.just(0)),
        st.tuples(st.just("swap"), page_numbers, st.just(0)),
        st.tuples(st.just("look"), page_numbers, st.just(0)),
        st.tuples(st.just("fork"), page_numbers, st.just(0)),
    ),
    max_size=14,
)


class Model:
    """Bytes of a file, and of those who copied pages of it."""

    def __init__(self):
        self.data = np.zeros(NR * PAGE_SIZE, dtype=np.uint8)
        self.size = NR * PAGE_SIZE
        self.copies = {"private": {}, "child": {}}

    def page(self, who, page):
        """What *who* sees of *page*, None for SIGBUS."""
        copy = self.copies.get(who, {}).get(page)
        if copy is not None:
            return copy
        if page * PAGE_SIZE >= self.size:
            return None
        return self.data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    def store(self, who, page, value):
        """True if *who* may store to *page*, and has."""
        seen = self.page(who, page)
        if seen is None:
            return False
        if who in self.copies:
            self.copies[who][page] = seen = seen.copy()
        seen[7] = value
        return True

    def truncate(self, size):
        self.size, self.data[size:] = size, 0
        end = -(-size // PAGE_SIZE)
        for copies in self.copies.values():
            for page in [page for page in copies if page >= end]:
                del copies[page]


class TestAgainstAModel:
    @given(steps)
    @settings(max_examples=30)
    def test_every_byte(self, steps):
        """Whatever is stored, cut off, copied, swapped or moved, all read what they should."""
        world = mapped_file(pages=NR, swap="256KiB", filled=False)
        seen = {"shared": world, "private": world.private("private")}
        seen["child"] = seen["private"].seen_by(seen["private"].process.fork())
        model = Model()
        for step, place, value in steps:
            perform(world, seen, model, (step, place, value))
        for who, view in seen.items():
            for page in range(NR):
                assert_same(view, model.page(who, page), page)
        assert model.data[: model.size].tobytes() == world.file.read(0, NR * PAGE_SIZE)


def perform(world, seen, model, step):
    kind, place, value = step
    if kind in seen:
        if model.store(kind, place, value):
            seen[kind].process.write(seen[kind].at(place) + 7, bytes([value]))
        else:
            with pytest.raises(BusError):
                seen[kind].process.write(seen[kind].at(place) + 7, bytes([value]))
    elif kind == "file":
        at = place * PAGE_SIZE + 9
        world.file.write(at, bytes([value]))
        model.size = max(model.size, at + 1)
        model.data[at] = value
    elif kind == "truncate":
        world.file.truncate(place)
        model.truncate(place)
    elif kind == "punch":
        world.file.fallocate("punch_hole|keep_size", place * PAGE_SIZE + 100, value)
        model.data[place * PAGE_SIZE + 100 : place * PAGE_SIZE + 100 + value] = 0
    elif kind == "migrate":
        for view in seen.values():
            world.gpu.to_device(view.process, view.addr, view.nbytes)
    elif kind == "swap":
        world.evict()
        seen["private"].pageout()
    elif kind == "look":
        for who, view in seen.items():
            assert_same(view, model.page(who, place), place)
    elif kind == "fork":
        seen["child"].process.exit()
        seen["child"] = seen["private"].seen_by(seen["private"].process.fork())
        model.copies["child"] = {p: copy.copy() for p, copy in model.copies["private"].items()}


def assert_same(view, expected, page):
    if expected is None:
        with pytest.raises(BusError):
            view.process.read(view.at(page), 1)
    else:
        assert expected.tobytes() == view.process.read(view.at(page), PAGE_SIZE)
