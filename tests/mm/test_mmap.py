"""Address spaces, against a dict that has an item for each mapped page."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm import (
    InvalidArgument,
    InvalidRange,
    Machine,
    OutOfMemory,
    SegmentationFault,
    trace,
)
from mm.mmap import MMAP_BASE, MMAP_MIN_ADDR, TASK_SIZE_MAX, find_vma, page_align, vmas_in
from mm.pgtable import PUD_SIZE
from mm.types import VM_EXEC, VM_READ, VM_WRITE
from mm.typing import PAGE_SIZE
from tests.interleave import explore
from tests.world import mapped_range

MIB = 1 << 20
BASE = 3 * PUD_SIZE - 8 * PAGE_SIZE  # 16 pages from here straddle tables of every level but two
PROTS = ["rw", "r", "-", "w", "x"]


def at(page):
    return BASE + page * PAGE_SIZE


def boot(**how):
    return Machine(("2MiB",), max_physmem="2MiB", debug=True, **how)


@pytest.fixture
def process():
    machine = boot()
    free = machine.nr_free_pages
    with machine.spawn("train") as process:
        yield process
        machine.verify()
    machine.verify()
    assert free == machine.nr_free_pages


def areas(process):
    """[first page, last page] of every VMA, in pages from BASE."""
    return [[(v.vm_start - BASE) // PAGE_SIZE, (v.vm_end - BASE) // PAGE_SIZE - 1] for v in
            process.mm.vmas]  # fmt: skip


def map_pages(process, *numbers, prot="rw", touch=False):
    for page in numbers:
        process.mmap(PAGE_SIZE, prot, addr=at(page))
        if touch:
            process.touch(at(page), PAGE_SIZE)


class TestFree:
    def test_top_down(self, process):
        """Areas without an address go below one another from MMAP_BASE on."""
        first, second = process.mmap(PAGE_SIZE), process.mmap(3 * PAGE_SIZE)

        assert (MMAP_BASE - PAGE_SIZE, MMAP_BASE - 4 * PAGE_SIZE) == (first, second)

    def test_highest_gap_that_fits(self, process):
        """A hole is used again by what fits into it."""
        for _ in range(4):
            process.mmap(2 * PAGE_SIZE)
        process.munmap(MMAP_BASE - 4 * PAGE_SIZE, 2 * PAGE_SIZE)

        large, small = process.mmap(3 * PAGE_SIZE), process.mmap(PAGE_SIZE)

        assert (MMAP_BASE - 11 * PAGE_SIZE, MMAP_BASE - 3 * PAGE_SIZE) == (large, small)

    def test_areas_above_are_passed_over(self, process):
        """What somebody put above MMAP_BASE takes nothing away below."""
        process.mmap(PAGE_SIZE, addr=1 << 50)
        process.mmap(2 * PAGE_SIZE, addr=MMAP_BASE - PAGE_SIZE)

        assert MMAP_BASE - 2 * PAGE_SIZE == process.mmap(PAGE_SIZE)

    def test_length_is_rounded_up(self, process):
        """Memory comes in pages."""
        addr = process.mmap(PAGE_SIZE + 1)

        process.write(addr + 2 * PAGE_SIZE - 1, b"x")
        assert process.find_vma(addr + 2 * PAGE_SIZE) is None

    @pytest.mark.parametrize("length", [MMAP_BASE - MMAP_MIN_ADDR + 1, 1 << 60, "1000P"])
    def test_no_such_gap(self, process, length):
        """More than there is address space, down to the first 64 KiB."""
        with pytest.raises(OutOfMemory, match=r"mmap: no gap of 0x.* bytes below 0x7ffff7fff000"):
            process.mmap(length)

    def test_all_of_it(self, process):
        """Address space costs nothing: one area may have the whole."""
        addr = process.mmap(MMAP_BASE - MMAP_MIN_ADDR, flags="anon|private|noreserve")
        process.write(addr, b"first")
        process.write(MMAP_BASE - 4, b"last")

        assert MMAP_MIN_ADDR == addr
        assert 2 == process.mm.anon_rss


class TestFixed:
    def test_replaces_what_was_there(self, process):
        """The new area is zeros; what it does not cover stays."""
        process.mmap(5 * PAGE_SIZE, addr=at(0))
        process.write(at(0), b"x" * 5 * PAGE_SIZE)

        process.mmap(2 * PAGE_SIZE, addr=at(2))

        firsts = [process.read(at(page), 1) for page in range(5)]
        assert [b"x", b"x", b"\0", b"\0", b"x"] == firsts
        assert 3 == process.mm.anon_rss

    @pytest.mark.parametrize("addr", [MMAP_MIN_ADDR, (1 << 47) - PAGE_SIZE, TASK_SIZE_MAX - 4096])
    def test_anywhere_in_57_bits(self, process, addr):
        """Also where mmap does not look by itself."""
        process.mmap(PAGE_SIZE, addr=addr)
        process.write(addr, b"here")

        assert b"here" == process.read(addr, 4)

    @pytest.mark.parametrize(
        ("addr", "complaint"),
        [
            (MMAP_MIN_ADDR - PAGE_SIZE, r"\[0xf000, 0x10000\) is not inside \[0x10000, 0xff"),
            (-PAGE_SIZE, r"\[-0x1000, 0x0\) is not inside"),
            (0, r"\[0x0, 0x1000\) is not inside"),
            (TASK_SIZE_MAX, r"is not inside \[0x10000, 0xfffffffffff000\)"),
            (1 << 64, "is not inside"),
        ],
    )
    def test_outside(self, process, addr, complaint):
        """The message says where it may be."""
        with pytest.raises(InvalidRange, match=complaint):
            process.mmap(PAGE_SIZE, addr=addr)

    def test_not_at_a_page(self, process):
        """An address is a multiple of the page size, and nothing is replaced otherwise."""
        map_pages(process, 0)

        with pytest.raises(InvalidArgument, match=r"addr 0x.*1 is not a multiple of 0x1000"):
            process.mmap(PAGE_SIZE, addr=at(0) + 1)

        assert [[0, 0]] == areas(process)


class TestMerge:
    def test_neighbours_become_one(self, process):
        """Areas alike that touch are one, in whatever order they came."""
        map_pages(process, 0, 2, 1)

        assert [[0, 2]] == areas(process)
        assert 3 == process.mm.total_vm

    @pytest.mark.parametrize("touched", [(), (0,), (2,), (0, 2)])
    def test_with_pages_in_them(self, process, touched):
        """Pages that were there are found after the merge."""
        map_pages(process, 0, 2)
        for page in touched:
            process.write(at(page), b"here")

        map_pages(process, 1, touch=True)

        for page in touched:
            assert b"here" == process.read(at(page), 4)

    def test_anon_vma_of_the_right_neighbour(self, process):
        """An untouched area takes over the pages of the one after it."""
        map_pages(process, 1, touch=True)
        map_pages(process, 0)

        assert [[0, 1]] == areas(process)
        assert process.mm.vmas[0].anon_vma is not None

    def test_two_that_had_pages_before_they_met(self, process):
        """Areas with pages of their own stay apart: their pages count from different trees."""
        map_pages(process, 0, 2, touch=True)

        map_pages(process, 1)

        assert 2 == len(areas(process))

    @pytest.mark.parametrize("prot", ["r", "-", "rwx"])
    def test_other_rights(self, process, prot):
        """Areas with different rights stay apart."""
        map_pages(process, 0, 2)
        map_pages(process, 1, prot=prot)

        assert [[0, 0], [1, 1], [2, 2]] == areas(process)

    def test_gap(self, process):
        """A page between them is enough."""
        map_pages(process, 0, 2)

        assert [[0, 0], [2, 2]] == areas(process)


class TestMunmap:
    @pytest.mark.parametrize(
        ("first", "count", "left"),
        [
            (0, 6, []),
            (0, 2, [[2, 5]]),
            (4, 2, [[0, 3]]),
            (2, 2, [[0, 1], [4, 5]]),
            (-3, 5, [[2, 5]]),
            (5, 5, [[0, 4]]),
            (6, 2, [[0, 5]]),
        ],
    )
    def test_part_of_an_area(self, process, first, count, left):
        """The front, the end, the middle or all of it; what nothing maps is skipped."""
        process.mmap(6 * PAGE_SIZE, addr=at(0))
        process.touch(at(0), 6 * PAGE_SIZE)

        process.munmap(at(first), count * PAGE_SIZE)

        kept = sum(last - start + 1 for start, last in left)
        assert left == areas(process)
        assert (kept, kept) == (process.mm.anon_rss, process.mm.total_vm)

    def test_several_areas(self, process):
        """One call may take parts of many."""
        for page, prot in enumerate(["rw", "r", "rw", "rwx"]):
            process.mmap(2 * PAGE_SIZE, prot, addr=at(2 * page))

        process.munmap(at(1), 6 * PAGE_SIZE)

        assert [[0, 0], [7, 7]] == areas(process)

    def test_contents_beside_it_stay(self, process):
        """Both ends of a split area keep their bytes."""
        process.mmap(5 * PAGE_SIZE, addr=at(0))
        for page in range(5):
            process.write(at(page), bytes([page]))

        process.munmap(at(2), PAGE_SIZE)

        assert [0, 1, 3, 4] == [process.read(at(page), 1)[0] for page in (0, 1, 3, 4)]
        with pytest.raises(SegmentationFault):
            process.read(at(2), 1)

    def test_page_tables_go_with_the_last_page(self, process):
        """What tables the area had are given back, those beside it stay."""
        process.mmap(16 * PAGE_SIZE, addr=at(0))
        process.touch(at(0), 16 * PAGE_SIZE)
        tables = process.mm.mem.tables
        both_sides = tables.in_use

        process.munmap(at(0), 8 * PAGE_SIZE)
        one_side = tables.in_use
        process.munmap(at(8), 8 * PAGE_SIZE)

        assert (1 + 2 + 2 + 2, 1 + 2 + 2, 1) == (both_sides, one_side, tables.in_use)

    @pytest.mark.parametrize(
        ("addr", "length", "error", "complaint"),
        [
            (BASE + 5, PAGE_SIZE, InvalidArgument, "addr 0x.* is not a multiple of 0x1000"),
            (BASE, 0, InvalidArgument, "length must be positive, got 0"),
            (-PAGE_SIZE, PAGE_SIZE, InvalidRange, r"\[-0x1000, 0x0\) is not below 0xff"),
            (TASK_SIZE_MAX, PAGE_SIZE, InvalidRange, "is not below 0xfffffffffff000"),
            (0, 1 << 60, InvalidRange, "is not below 0xfffffffffff000"),
            (BASE, -1, InvalidArgument, "a size cannot be negative"),
        ],
    )
    def test_wrong_range(self, process, addr, length, error, complaint):
        """Nothing is unmapped, and the message says why."""
        map_pages(process, 0)

        with pytest.raises(error, match=complaint):
            process.munmap(addr, length)

        assert [[0, 0]] == areas(process)

    def test_everything_at_once(self, process):
        """The whole address space is a range like any other."""
        map_pages(process, 0, 3, 5, touch=True)

        process.munmap(0, TASK_SIZE_MAX)

        assert [] == areas(process)
        assert 1 == process.mm.mem.tables.in_use


class TestLookup:
    def test_find_vma(self, process):
        """The area that holds the address, or the next above it, or none."""
        map_pages(process, 1, 3)
        starts = [vma and (vma.vm_start - BASE) // PAGE_SIZE for vma in
                  (find_vma(process.mm, at(page)) for page in range(5))]  # fmt: skip

        assert [1, 1, 3, 3, None] == starts
        assert find_vma(process.mm, at(2) - 1) is find_vma(process.mm, at(1))

    def test_find_vma_of_a_process(self, process):
        """A process says None where nothing is mapped."""
        map_pages(process, 1, 3)

        mapped = [process.find_vma(at(page)) is not None for page in range(5)]

        assert [False, True, False, True, False] == mapped

    def test_vmas_in(self, process):
        """All that touch a range, ascending."""
        map_pages(process, 1, 3, 5)

        found = vmas_in(process.mm, at(1) + 5, at(5))

        assert [at(1), at(3)] == [vma.vm_start for vma in found]

    def test_flags_and_name(self, process):
        """Letters of prot are rights of the area, and are shown."""
        addr = process.mmap(PAGE_SIZE, "rx")
        vma = process.find_vma(addr)

        assert VM_READ | VM_EXEC == vma.vm_flags & (VM_READ | VM_WRITE | VM_EXEC)
        assert f"<Vma {addr:#x}-{addr + PAGE_SIZE:#x} r-x>" == repr(vma)

    def test_page_align(self):
        """Up to whole pages."""
        assert [0, 4096, 4096, 8192] == [page_align(n) for n in (0, 1, 4096, 4097)]


class TestExit:
    def test_all_memory_is_given_back(self):
        """Whatever was mapped: frames, tables and trees are free again."""
        machine = boot()
        free = machine.nr_free_pages
        process = machine.spawn()
        map_pages(process, 0, 2, 4, 5, touch=True)
        process.munmap(at(4), PAGE_SIZE)

        process.exit()

        machine.verify()
        assert (free, 0) == (machine.nr_free_pages, machine.mem.tables.in_use)
        assert ({}, []) == (machine.mem.anon_vmas, machine.mem.mms)

    def test_others_live_on(self):
        """The same addresses of another process are other memory."""
        machine = boot()
        one, other = machine.spawn("one"), machine.spawn("other")
        for process, byte in ((one, b"1"), (other, b"2")):
            map_pages(process, 0)
            process.write(at(0), byte)

        one.exit()

        assert b"2" == other.read(at(0), 1)
        machine.verify()


class TestEvents:
    def test_map_and_unmap(self, process):
        """Who listens hears of both, with addresses."""
        heard = []

        with trace.listen(lambda event, fields: heard.append((event, fields)), "mm_m*map"):
            addr = process.mmap(PAGE_SIZE)
            process.munmap(addr, PAGE_SIZE)

        mapped = unmapped = {"process": "train", "start": addr, "end": addr + PAGE_SIZE}
        assert [("mm_mmap", mapped), ("mm_munmap", unmapped)] == heard


class TestRaces:
    """Every schedule of a few preemptions."""

    def test_read_against_munmap(self):
        """A load sees the bytes or faults; it never sees a frame that is somebody else's."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            process = world.machine.spawn("racer")
            addr = process.mmap(PAGE_SIZE)
            process.write(addr, b"mine")

            seen, _ = together(
                lambda: read_or_fault(process, addr, 4), lambda: process.munmap(addr, PAGE_SIZE)
            )

            outcomes.add(seen)
            assert [] == process.mm.vmas
            process.exit()

        outcomes = set()
        assert 20 < explore(scenario)
        assert {b"mine", "fault"} == outcomes

    def test_write_against_a_new_mapping(self):
        """A store lands in the old area or in the new one, which is zeros otherwise."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            process = world.machine.spawn("racer")
            process.mmap(PAGE_SIZE, addr=at(0))
            process.write(at(0), b"old")

            together(
                lambda: process.write(at(0), b"new"),
                lambda: process.mmap(PAGE_SIZE, addr=at(0)),
            )

            outcomes.add(process.read(at(0), 4))
            process.exit()

        outcomes = set()
        assert 5 < explore(scenario)
        assert {b"\0\0\0\0", b"new\0"} == outcomes

    def test_two_maps(self):
        """Two threads of a process get areas of their own."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            process = world.machine.spawn("racer")
            addrs = together(*[lambda: process.mmap(PAGE_SIZE)] * 2)
            assert {MMAP_BASE - PAGE_SIZE, MMAP_BASE - 2 * PAGE_SIZE} == set(addrs)
            process.exit()

        assert 5 < explore(scenario)

    def test_read_against_exit(self):
        """A load of a process that goes sees its bytes or an error, never another process's."""
        world = mapped_range(pages=1, filled=False)

        def scenario(together):
            machine = world.machine
            process = machine.spawn("goes")
            process.mmap(PAGE_SIZE, addr=at(0))
            process.write(at(0), b"mine")

            def exit_and_spawn():
                process.exit()
                successor = machine.spawn("comes")
                successor.mmap(PAGE_SIZE, addr=at(0))
                successor.write(at(0), b"hers")
                return successor

            seen, successor = together(lambda: read_or_fault(process, at(0), 4), exit_and_spawn)
            successor.exit()
            assert seen in (b"mine", "fault")

        assert 5 < explore(scenario, preemptions=1)


def read_or_fault(process, addr, nbytes):
    try:
        return process.read(addr, nbytes)
    except (SegmentationFault, InvalidArgument):
        return "fault"


def attempt(access):
    """What *access* gives, and the page where it faulted, None if it did not."""
    try:
        return access(), None
    except SegmentationFault as error:
        return None, error.address & -PAGE_SIZE


class AnySequence(RuleBasedStateMachine):
    """Processes that map, unmap, store, load and exit; the model is a dict of pages for each."""

    def __init__(self):
        super().__init__()
        self.machine = boot()
        self.free = self.machine.nr_free_pages
        self.processes = [self.machine.spawn(f"p{i}") for i in range(2)]
        self.models = [{}, {}]  # page address to (prot, contents)

    who = st.integers(0, 1)
    page = st.integers(0, 15)
    count = st.integers(1, 6)

    def map(self, who, addr, count, prot):
        fresh = {addr + i * PAGE_SIZE: (prot, bytearray(PAGE_SIZE)) for i in range(count)}
        self.models[who] |= fresh

    def highest_gap(self, who, count):
        """Where mmap should put *count* pages, found page by page."""
        addr, free = MMAP_BASE, 0
        while free < count:
            addr -= PAGE_SIZE
            free = 0 if addr in self.models[who] else free + 1
        return addr

    def pieces(self, who, addr, nbytes, *, write):
        """The pages of a range that the process may access before the first that it may not.

        As (contents, slice of them) for each page, and the address of the page that it may not.
        """
        found, end = [], addr + nbytes
        while addr < end:
            page, offset = addr & -PAGE_SIZE, addr % PAGE_SIZE
            prot, contents = self.models[who].get(page, ("-", None))
            if prot == "-" or (write and "w" not in prot):
                return found, page
            found.append((contents, slice(offset, min(PAGE_SIZE, end - page))))
            addr = page + PAGE_SIZE
        return found, None

    @rule(who=who, page=page, count=count, prot=st.sampled_from(PROTS))
    def mmap_fixed(self, who, page, count, prot):
        addr = self.processes[who].mmap(count * PAGE_SIZE, prot, addr=at(page))

        assert at(page) == addr
        self.map(who, addr, count, prot)

    @rule(who=who, count=count, prot=st.sampled_from(PROTS))
    def mmap_free(self, who, count, prot):
        addr = self.processes[who].mmap(count * PAGE_SIZE - 5, prot)

        assert self.highest_gap(who, count) == addr
        self.map(who, addr, count, prot)

    @rule(who=who, page=page, count=count)
    def munmap(self, who, page, count):
        self.processes[who].munmap(at(page), count * PAGE_SIZE)

        for i in range(count):
            self.models[who].pop(at(page + i), None)

    @precondition(lambda self: any(self.models))
    @rule(who=who, pick=st.integers(0, 1000), count=count)
    def munmap_what_is_there(self, who, pick, count):
        mapped = sorted(self.models[who]) or [at(0)]
        addr = mapped[pick % len(mapped)]

        self.processes[who].munmap(addr, count * PAGE_SIZE)

        for i in range(count):
            self.models[who].pop(addr + i * PAGE_SIZE, None)

    @rule(
        who=who,
        page=page,
        offset=st.integers(0, PAGE_SIZE - 1),
        nbytes=st.integers(1, 2 * PAGE_SIZE),
        byte=st.integers(1, 255),
    )
    def write(self, who, page, offset, nbytes, byte):
        pieces, bad = self.pieces(who, at(page) + offset, nbytes, write=True)
        data = bytes([byte]) * nbytes

        _, faulted = attempt(lambda: self.processes[who].write(at(page) + offset, data))

        assert bad == faulted
        for contents, here in pieces:
            contents[here] = bytes([byte]) * (here.stop - here.start)

    @rule(who=who, page=page, offset=st.integers(0, PAGE_SIZE - 1), nbytes=st.integers(1, 9000))
    def read(self, who, page, offset, nbytes):
        pieces, bad = self.pieces(who, at(page) + offset, nbytes, write=False)

        seen, faulted = attempt(lambda: self.processes[who].read(at(page) + offset, nbytes))

        assert bad == faulted
        if bad is None:
            assert b"".join(contents[here] for contents, here in pieces) == seen

    @rule(who=who)
    def exit(self, who):
        self.processes[who].exit()
        self.processes[who] = self.machine.spawn(f"p{who}")
        self.models[who] = {}

    @invariant()
    def well(self):
        self.machine.verify()

    @invariant()
    def areas_are_those_of_the_model(self):
        letters = {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC}
        for process, model in zip(self.processes, self.models, strict=True):
            assert len(model) == process.mm.total_vm
            for addr, (prot, _) in model.items():
                vma = process.find_vma(addr)
                rights = {c for c, flag in letters.items() if vma.vm_flags & flag}
                assert set(prot) - {"-"} == rights

    def teardown(self):
        for process in self.processes:
            process.exit()
        self.machine.verify()
        assert self.free == self.machine.nr_free_pages
        assert 0 == self.machine.mem.tables.in_use


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=15, stateful_step_count=20)
