"""A device's memory: migrations by name, eviction, CPU faults, and drivers whose hooks fail.

What holds for every driver is tested on two: the NumPy device, and one that has nothing but the
four hooks and keeps its pages in a dict.
"""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import Driver, NumpyDevice, Stats
from mm import (
    PAGE_SIZE,
    Busy,
    InvalidArgument,
    InvalidRange,
    OutOfMemory,
    PageHeld,
    trace,
)
from tests.world import in_step, mapped_range

GIB = 1 << 30
GROUP = 16  # pages of a chunk of 64 KiB


class DictDevice(Driver):
    """Keeps the contents of each page in a dict: the four hooks, and nothing else."""

    def __init__(self, machine, memory="4MiB", *, name="dict0", **options):
        super().__init__(machine, memory, name=name, **options)
        self.unused = list(range(self.npages))
        self.contents = {}

    def allocate(self, npages):
        taken, self.unused = self.unused[:npages], self.unused[npages:]
        self.contents |= dict.fromkeys(taken, bytes(PAGE_SIZE))
        return np.array(taken, dtype=np.int64)

    def free(self, pages):
        for page in pages.tolist():
            del self.contents[page]  # a page that is freed twice is not here
            self.unused.append(page)

    def copy_in(self, pages, system, rows):
        for page, row in zip(pages.tolist(), rows.tolist(), strict=True):
            self.contents[page] = system[row].tobytes()

    def copy_out(self, pages, system, rows):
        for page, row in zip(pages.tolist(), rows.tolist(), strict=True):
            system[row] = np.frombuffer(self.contents[page], dtype=np.uint8)


@pytest.fixture(params=[NumpyDevice, DictDevice], ids=["numpy", "dict"])
def driver(request):
    return request.param


def to_device(world, first=0, pages=None):
    count = world.pages if pages is None else pages
    return world.gpu.to_device(world.process, world.at(first), count * PAGE_SIZE)


def to_system(world, first=0, pages=None):
    count = world.pages if pages is None else pages
    return world.gpu.to_system(world.process, world.at(first), count * PAGE_SIZE)


def groups_here(world):
    """The groups of 16 pages that are in device memory as a whole."""
    groups = np.array(world.on_device()).reshape(-1, GROUP).all(axis=1)
    return np.flatnonzero(groups).tolist()


def events(*patterns):
    """A list, and the context in which it fills with (event, fields)."""
    heard = []
    return heard, trace.listen(lambda event, fields: heard.append((event, fields)), *patterns)


class TestToDevice:
    def test_all(self, driver):
        """Every page of a range migrates, contents and all."""
        world = mapped_range(pages=40, driver=driver)

        result = to_device(world)

        assert (40, 40, {}) == (result.collected, result.migrated, result.stayed)
        assert [True] * 40 == world.on_device()
        assert world.intact()
        world.machine.verify()

    def test_holes(self, driver):
        """Untouched memory becomes zeros in device memory, without a byte being copied."""
        world = mapped_range(pages=4, filled=False, driver=driver)
        world.process.write(world.at(1), b"x")

        result = to_device(world)

        assert 4 == result.migrated
        assert PAGE_SIZE == world.gpu.stats.bytes_to_device
        assert [0, ord("x"), 0, 0] == world.contents()
        world.machine.verify()

    def test_again(self, driver):
        """What is in device memory already is not asked to move."""
        world = mapped_range(pages=6, driver=driver)
        to_device(world, first=2, pages=3)

        result = to_device(world)

        assert (3, 3, {"skipped": 3}) == (result.collected, result.migrated, result.stayed)
        world.machine.verify()

    def test_again_when_nearly_full(self, driver):
        """What is in device memory already is not evicted to make room for itself."""
        world = mapped_range(pages=3 * GROUP, memory="256KiB", driver=driver)
        to_device(world)

        result = to_device(world)

        assert (0, 0) == (result.migrated, world.gpu.stats.evicted_pages)
        assert [True] * world.pages == world.on_device()
        world.machine.verify()

    @given(there=st.sets(st.integers(0, 47)), first=st.integers(0, 16))
    def test_whole_where_it_fits(self, there, first):
        """A range that the device has memory for is all there, whatever was there before."""
        world = mapped_range(pages=48, memory="128KiB", chunk="64KiB")
        for page in sorted(there, key=lambda page: page * 37 % 48):
            to_device(world, page, 1)

        result = to_device(world, first, 32)

        assert {"skipped"} >= set(result.stayed)
        assert all(world.on_device()[first : first + 32])
        assert world.intact()
        world.machine.verify()

    def test_parts_of_pages(self, driver):
        """A range that begins and ends inside pages takes both whole."""
        world = mapped_range(pages=4, driver=driver)

        result = world.gpu.to_device(world.process, world.at(1) + 4095, 2)

        assert 2 == result.migrated
        assert [False, True, True, False] == world.on_device()
        world.machine.verify()

    def test_two_vmas(self, driver):
        """A range over mappings with different rights migrates as one."""
        world = mapped_range(pages=4, driver=driver)
        world.process.mmap(2 * PAGE_SIZE, "r", addr=world.at(2))

        result = to_device(world)

        assert (4, [True] * 4) == (result.migrated, world.on_device())
        assert [0, 1, 0, 0] == world.contents()
        world.machine.verify()

    def test_gap(self, driver):
        """A range with a gap is refused, and nothing of it moves."""
        world = mapped_range(pages=4, driver=driver)
        world.process.munmap(world.at(2), PAGE_SIZE)

        with pytest.raises(InvalidRange, match=f"nothing is mapped at {world.at(2):#x} of train"):
            to_device(world)

        assert [False] * 4 == world.on_device()
        world.machine.verify()

    @pytest.mark.parametrize("why", ["pinned", "locked"])
    def test_what_stays(self, driver, why):
        """A page that somebody else holds stays, and the result says why."""
        world = mapped_range(pages=4, driver=driver)
        (world.pin if why == "pinned" else world.lock)(2)

        result = to_device(world)

        assert (4, 3, {why: 1}) == (result.collected, result.migrated, result.stayed)
        assert [True, True, False, True] == world.on_device()

    def test_full_in_the_middle(self, driver):
        """Where a range is larger than the device, its end stays in system memory."""
        world = mapped_range(pages=GROUP + 4, memory="64KiB", driver=driver)

        result = to_device(world)

        assert (GROUP + 4, GROUP, {"not_chosen": 4}) == (
            result.collected,
            result.migrated,
            result.stayed,
        )
        assert [True] * GROUP + [False] * 4 == world.on_device()
        assert world.intact()
        world.machine.verify()

    def test_many_pieces(self):
        """A range of tens of megabytes may go in pieces, and is counted once."""
        world = mapped_range(pages=9_000, nodes=("64MiB",), memory="64MiB", payload=False)
        world.process.touch(world.addr, world.nbytes)
        heard, listening = events("mm_migrate_vma_finalize")

        with listening:
            result = to_device(world)

        assert (9_000, 9_000) == (result.collected, result.migrated)
        assert 9_000 == sum(fields["moved"] for _, fields in heard)
        world.machine.verify()


class TestToSystem:
    def test_some(self, driver):
        """The pages of a range come back, and no others."""
        world = mapped_range(pages=5, driver=driver)
        to_device(world)

        result = to_system(world, first=1, pages=3)

        assert (3, 3) == (result.collected, result.migrated)
        assert [True, False, False, False, True] == world.on_device()
        assert world.intact()
        world.machine.verify()

    def test_nothing_there(self, driver):
        """What is in system memory already is skipped."""
        world = mapped_range(pages=3, driver=driver)

        result = to_system(world)

        assert (0, 0, {"skipped": 3}) == (result.collected, result.migrated, result.stayed)
        world.machine.verify()

    def test_pages_of_another_device(self, driver):
        """A device brings back its own pages only."""
        world = mapped_range(pages=4, driver=driver)
        other = NumpyDevice(world.machine, "1MiB", name="other")
        other.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        to_device(world, first=2, pages=2)

        result = to_system(world)

        assert (2, {"skipped": 2}) == (result.migrated, result.stayed)
        assert [True, True, False, False] == world.on_device()
        assert world.intact()

    def test_no_system_memory(self, driver):
        """With no frame left pages stay on the device, and come once there is room."""
        world = mapped_range(pages=300, nodes=("2MiB",), driver=driver)
        to_device(world)
        hog = fill_memory(world.machine)

        full = to_system(world)
        hog.exit()
        roomy = to_system(world)

        assert (300, 0, {"not_chosen": 300}) == (full.collected, full.migrated, full.stayed)
        assert 300 == roomy.migrated
        assert world.intact()
        world.machine.verify()


def fill_memory(machine):
    """A process that has taken all the memory that it can get."""
    hog = machine.spawn("hog")
    addr = hog.mmap("16MiB", flags="anon|private|noreserve")
    with pytest.raises(OutOfMemory):
        hog.touch(addr, "16MiB")
    return hog


class TestAnySequence:
    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["to_device", "to_system", "read", "write", "evict"]),
                st.integers(0, 39),
                st.integers(1, 40),
            ),
            max_size=12,
        )
    )
    @pytest.mark.parametrize("kind", [NumpyDevice, DictDevice], ids=["numpy", "dict"])
    def test_contents_survive(self, kind, steps):
        """However pages wander, the process reads what it wrote last."""
        world = mapped_range(
            pages=40, memory="64KiB", addr=GIB - 20 * PAGE_SIZE, filled=False, driver=kind
        )
        wrote = bytearray(world.nbytes)
        for number, (step, first, wanted) in enumerate(steps, 1):
            count = min(wanted, 40 - first)
            odd = slice(first * PAGE_SIZE + 5 * number, (first + count) * PAGE_SIZE)
            if step == "read":
                got = world.process.read(world.addr + odd.start, odd.stop - odd.start)
                assert wrote[odd] == got
            elif step == "write":
                wrote[odd] = bytes([number]) * (odd.stop - odd.start)
                world.process.write(world.addr + odd.start, wrote[odd])
            elif step == "evict":
                world.gpu.make_room(count)
            else:
                (to_device if step == "to_device" else to_system)(world, first, count)
        assert in_step(world.gpu)
        world.machine.verify()
        assert wrote == world.process.read(world.addr, world.nbytes)


class TestEviction:
    def test_oldest_first(self, driver):
        """A full device evicts the chunk that it took first."""
        world = mapped_range(pages=6 * GROUP, memory="256KiB", chunk="64KiB", driver=driver)
        for group in (2, 0, 1, 3):
            to_device(world, group * GROUP, GROUP)

        to_device(world, 4 * GROUP, GROUP)

        assert [0, 1, 3, 4] == groups_here(world)
        assert world.intact()
        world.machine.verify()

    @given(wanted=st.lists(st.integers(0, 4), max_size=12))
    def test_in_order_of_allocation(self, wanted):
        """Whatever is asked for, what is there are the chunks that were taken last."""
        world = mapped_range(pages=5 * GROUP, memory="192KiB", chunk="64KiB")
        queue = []
        for group in wanted:
            if group not in queue:
                queue = [*queue[-2:], group]
                to_device(world, group * GROUP, GROUP)
        assert sorted(queue) == groups_here(world)
        assert world.intact()
        world.machine.verify()

    @pytest.mark.parametrize(("chunk", "evicted"), [("64KiB", 16), ("256KiB", 64), ("2MiB", 512)])
    def test_a_chunk_at_a_time(self, driver, chunk, evicted):
        """For a single page of room a whole chunk leaves."""
        world = mapped_range(pages=1025, memory="4MiB", chunk=chunk, driver=driver, payload=False)
        world.process.touch(world.addr, world.nbytes)
        to_device(world, pages=1024)

        to_device(world, first=1024, pages=1)

        assert evicted == world.gpu.stats.evicted_pages
        assert [False] * evicted + [True] * (1025 - evicted) == world.on_device()
        world.machine.verify()

    def test_goes_through_migrate_vma(self, driver):
        """The device's figures, the events of migrate_vma and vmstat say the same."""
        world = mapped_range(pages=6 * GROUP, memory="256KiB", chunk="64KiB", driver=driver)
        to_device(world, pages=4 * GROUP)
        heard, listening = events("mm_migrate_vma_finalize")

        with listening, world.machine.vmstat.counting("pgalloc_dma", "pgfree") as delta:
            world.gpu.make_room(2 * GROUP)

        stats = world.gpu.stats
        assert (2 * GROUP, 2 * GROUP) == (stats.evicted_pages, stats.pages_to_system)
        assert 2 * GROUP == sum(fields["moved"] for _, fields in heard)
        assert {"pgalloc_dma": 2 * GROUP, "pgfree": 0} == delta
        world.machine.verify()

    def test_room_that_is_there(self, driver):
        """Nothing leaves while there is room."""
        world = mapped_range(pages=GROUP, memory="128KiB", driver=driver)
        to_device(world)

        world.gpu.make_room(GROUP)

        assert [True] * GROUP == world.on_device()
        assert 0 == world.gpu.stats.evicted_pages

    def test_more_than_there_is(self, driver):
        """Room for more than the device holds is all of it."""
        world = mapped_range(pages=GROUP, memory="128KiB", driver=driver)
        to_device(world)

        world.gpu.make_room(1_000)

        assert [False] * GROUP == world.on_device()
        assert world.intact()

    def test_two_processes(self, driver):
        """A chunk leaves with the pages of all processes that share it."""
        world = mapped_range(pages=8, memory="64KiB", driver=driver)
        to_device(world)
        other = world.machine.spawn("other")
        addr = other.mmap(8 * PAGE_SIZE)
        other.write(addr, b"other")
        world.gpu.to_device(other, addr, 8 * PAGE_SIZE)

        result = world.gpu.evict(np.arange(16))

        assert (16, 16) == (result.collected, result.migrated)
        assert b"other" == other.read(addr, 5)
        assert world.intact()
        world.machine.verify()

    def test_far_apart(self, driver):
        """A chunk leaves though its pages lie gigabytes apart."""
        world = mapped_range(pages=2, memory="64KiB", driver=driver)
        far = world.process.mmap(PAGE_SIZE, addr=3 * GIB)
        world.process.write(far, b"far")
        for addr in (far, world.at(1), world.at(0)):
            world.gpu.to_device(world.process, addr, PAGE_SIZE)

        result = world.gpu.evict(np.arange(3))

        assert 3 == result.migrated
        assert b"far" == world.process.read(far, 3)
        assert [False, False] == world.on_device()
        world.machine.verify()

    def test_held_page(self, driver):
        """A page that the driver holds stays; the next chunk leaves in its place."""
        world = mapped_range(pages=3 * GROUP, memory="128KiB", chunk="64KiB", driver=driver)
        to_device(world, pages=2 * GROUP)
        held = world.hold(world.pfns().item(3))

        result = to_device(world, first=2 * GROUP, pages=GROUP)

        assert GROUP == result.migrated
        assert [2] == groups_here(world)
        assert [3] == [page for page in range(2 * GROUP) if world.on_device()[page]]
        held.release()
        assert world.intact()

    def test_no_system_memory(self, driver):
        """What cannot leave stays; what should come stays where it is."""
        world = mapped_range(pages=300, nodes=("2MiB",), memory="1MiB", driver=driver)
        to_device(world, pages=256)
        hog = fill_memory(world.machine)

        result = to_device(world, first=256, pages=44)

        assert {"not_chosen": 44} == result.stayed
        assert [True] * 256 + [False] * 44 == world.on_device()
        hog.exit()
        assert world.intact()
        world.machine.verify()


class TestCpuFault:
    @pytest.mark.parametrize("store", [False, True], ids=["load", "store"])
    def test_the_faulting_page_alone(self, driver, store):
        """The page that a CPU touches comes back, and no other."""
        world = mapped_range(driver=driver)
        to_device(world)

        with world.machine.vmstat.counting("device_private_faults") as delta:
            world.process.touch(world.at(2) + 100, 1, write=store)

        assert {"device_private_faults": 1} == delta
        assert [True, True, False, True, True] == world.on_device()
        assert world.intact()
        world.machine.verify()

    def test_store(self, driver):
        """A store lands in the contents that come back."""
        world = mapped_range(driver=driver)
        to_device(world)

        world.process.write(world.at(2) + 1, b"new")

        assert bytes([2]) + b"new" + bytes([2]) == world.process.read(world.at(2), 5)

    def test_several(self, driver):
        """An access over several pages brings them in one go."""
        world = mapped_range(pages=8, driver=driver)
        to_device(world)
        heard, listening = events("mm_migrate_vma_finalize")

        with listening:
            world.process.read(world.at(3) - 1, PAGE_SIZE + 2)

        assert [True] * 2 + [False] * 3 + [True] * 3 == world.on_device()
        assert [3] == [fields["moved"] for _, fields in heard]
        world.machine.verify()

    def test_read_only(self, driver):
        """A page of a read-only mapping comes back read-only."""
        world = mapped_range(prot="r", filled=False, driver=driver)
        to_device(world)

        assert [0] * 5 == world.contents()

        assert [False] * 5 == world.on_device()
        world.machine.verify()

    def test_no_system_memory(self, driver):
        """With no frame left the CPU gets OutOfMemory, and the page stays on the device."""
        world = mapped_range(pages=300, nodes=("2MiB",), driver=driver)
        to_device(world)
        hog = fill_memory(world.machine)

        with pytest.raises(OutOfMemory, match=f"no frame for the page at {world.at(7):#x}"):
            world.process.read(world.at(7), 1)

        assert [True] * 300 == world.on_device()
        hog.exit()
        assert world.intact()
        world.machine.verify()


class TestNodes:
    """Where a page comes back to is asked anew: its old node is forgotten."""

    def away(self, driver, **how):
        """Pages that were on node 1, in device memory."""
        world = mapped_range(nodes=("16MiB", "16MiB"), driver=driver, **how)
        world.process.move_pages(world.addrs, 1)
        to_device(world)
        return world

    @pytest.mark.parametrize("cpu", [0, 1])
    def test_node_of_the_cpu_that_faults(self, driver, cpu):
        """Without a policy it is where the CPU is that touches the page."""
        world = self.away(driver)
        world.process.cpu = cpu

        assert world.intact()

        assert [cpu] * 5 == world.process.move_pages(world.addrs).tolist()

    def test_policy_of_the_range(self, driver):
        """Each page goes where its range wants it."""
        world = self.away(driver, pages=6)
        world.process.mbind(world.addr, 2 * PAGE_SIZE, "bind", [1])
        world.process.mbind(world.at(4), 2 * PAGE_SIZE, "interleave", [0, 1])

        assert world.intact()

        turns = [(world.at(page) // PAGE_SIZE) % 2 for page in (4, 5)]
        assert [1, 1, 0, 0, *turns] == world.process.move_pages(world.addrs).tolist()

    def test_policy_of_the_task_that_asks(self, driver):
        """to_system() is the process's own call, so its policy holds."""
        world = self.away(driver)
        world.process.set_mempolicy("bind", [1])

        to_system(world)

        assert [1] * 5 == world.process.move_pages(world.addrs).tolist()
        assert world.intact()

    def test_node_without_room(self, driver):
        """A fault whose nodes are full finds no memory, and the page stays on the device."""
        world = mapped_range(pages=1, nodes=("16MiB", "1MiB"), driver=driver)
        to_device(world)
        world.process.mbind(world.addr, PAGE_SIZE, "bind", [1])
        hog = world.machine.spawn("hog", cpu=1)
        hog.set_mempolicy("bind", [1])
        with pytest.raises(OutOfMemory):
            hog.touch(hog.mmap("1MiB"), "1MiB")

        with pytest.raises(OutOfMemory):
            world.contents()
        assert [True] == world.on_device()

        hog.exit()
        assert world.intact()


class TestNeighbours:
    def test_aligned_block(self, driver):
        """neighbours= brings the aligned block around the page that a CPU touches."""
        world = mapped_range(pages=48, addr=GIB, neighbours="64KiB", driver=driver)
        to_device(world)

        world.process.read(world.at(21), 1)

        assert [True] * 16 + [False] * 16 + [True] * 16 == world.on_device()
        assert world.intact()
        world.machine.verify()

    def test_faulting_page_first(self, driver):
        """The page that a CPU waits for comes before its neighbours."""
        world = mapped_range(pages=16, addr=GIB, neighbours="64KiB", driver=driver)
        to_device(world)
        heard, listening = events("mm_migrate_vma_finalize")

        with listening:
            world.process.read(world.at(9), 1)

        moved = [(fields["start"], fields["end"], fields["moved"]) for _, fields in heard]
        assert [(world.at(9), world.at(10), 1), (world.at(0), world.at(16), 15)] == moved

    def test_not_beyond_the_mapping(self, driver):
        """The block ends where the mapping does."""
        world = mapped_range(pages=6, addr=GIB + 13 * PAGE_SIZE, neighbours="64KiB", driver=driver)
        to_device(world)

        world.process.read(world.at(0), 1)

        assert [False] * 3 + [True] * 3 == world.on_device()
        world.machine.verify()

    def test_no_frame_for_them(self, driver):
        """Where memory suffices for the page alone, the neighbours stay and nobody minds."""
        world = mapped_range(pages=300, nodes=("2MiB",), neighbours="2MiB", driver=driver)
        to_device(world)
        hog = fill_memory(world.machine)
        hog.munmap(hog.mm.vmas[0].vm_start, 4 * PAGE_SIZE)

        assert 7 == world.process.read(world.at(7), 1)[0]

        assert not world.on_device()[7]
        assert sum(world.on_device()) > 290
        hog.exit()
        assert world.intact()


class TestFree:
    @pytest.mark.parametrize("how", ["munmap", "exit", "to_system", "evict"])
    def test_memory_returns(self, driver, how):
        """When the last user of device memory is gone the device has all of it again."""
        world = mapped_range(pages=40, driver=driver)
        to_device(world)
        gone = {
            "munmap": lambda: world.process.munmap(world.addr, world.nbytes),
            "exit": world.process.exit,
            "to_system": lambda: to_system(world),
            "evict": lambda: world.gpu.make_room(world.gpu.npages),
        }

        gone[how]()

        assert world.gpu.npages == world.gpu.chunks.free_pages
        assert world.gpu.npages == world.gpu.allocate(world.gpu.npages + 1).size

    def test_held_page(self, driver):
        """A page that the driver holds is free only when it lets go."""
        world = mapped_range(pages=4, driver=driver)
        to_device(world)
        held = world.hold(world.pfns().item(1))
        world.process.munmap(world.addr, world.nbytes)
        before = world.gpu.chunks.free_pages

        held.release()

        assert (world.gpu.npages - 1, world.gpu.npages) == (before, world.gpu.chunks.free_pages)
        world.machine.verify()


class TestHeld:
    @pytest.mark.parametrize("who", ["read", "pin", "mem_read", "device"])
    def test_nobody_else_gets_it(self, driver, who):
        """Whoever wants a page that cannot leave is told why, and can have it later."""
        world = mapped_range(pages=4, driver=driver)
        to_device(world)
        held = world.hold(world.pfns().item(2))
        other = NumpyDevice(world.machine, "64KiB", name="other")
        access = partial(other.read, world.process)
        if who != "device":
            access = getattr(world.process, who)

        with pytest.raises(PageHeld, match=f"{held.pfns[0]:#x} cannot leave.*holds 1 references"):
            access(world.at(2), 1)

        assert world.on_device()[2]
        held.release()
        got = access(world.at(2), 1)
        if who == "pin":
            got.release()
        assert world.intact()


class TestStores:
    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_what_was_given_up(self, kind):
        """MADV_FREE lets go of what was there, not of what the device stores afterwards."""
        world = mapped_range(pages=4, swap="1MiB", kind=kind)
        world.process.madvise(world.addr, world.nbytes, "free")
        to_device(world)
        world.gpu.write(world.process, world.addr, bytes([9]) * world.nbytes)
        to_system(world)

        world.pageout()

        assert [9] * 4 == world.contents()


class TestClose:
    def test_brings_all_back(self, driver):
        """A device that closes gives back what it holds, and its page tables."""
        world = mapped_range(pages=40, driver=driver)
        to_device(world)

        world.gpu.close()

        assert [False] * 40 == world.on_device()
        assert world.intact()
        assert [] == world.machine.mem.device_pgds
        world.machine.verify()

    def test_held_page(self, driver):
        """A device with a page that somebody holds stays open, and nothing is lost."""
        world = mapped_range(pages=4, driver=driver)
        to_device(world)
        held = world.hold(world.pfns().item(2))

        with pytest.raises(Busy, match=f"1 device pages are in use.*{held.pfns[0]:#x}"):
            world.gpu.close()

        assert [False, False, True, False] == world.on_device()
        world.machine.verify()
        held.release()
        assert world.intact()
        assert 4 == to_device(world).migrated

    def test_no_system_memory(self, driver):
        """A device whose pages find no frame stays open, and nothing is lost."""
        world = mapped_range(pages=300, nodes=("2MiB",), driver=driver)
        to_device(world)
        hog = fill_memory(world.machine)

        with pytest.raises(Busy, match="300 device pages are in use"):
            world.gpu.close()

        hog.exit()
        assert world.intact()
        world.machine.verify()

    def test_twice(self, driver):
        """A second close does nothing."""
        world = mapped_range(driver=driver)
        world.gpu.close()

        world.gpu.close()

        world.machine.verify()

    def test_afterwards(self, driver):
        """A closed device takes no page, and says that it is closed."""
        world = mapped_range(driver=driver)
        to_device(world)
        world.gpu.close()

        with pytest.raises(InvalidArgument, match="closed"):
            to_device(world)

        assert world.intact()
        world.machine.verify()


class TestWithoutContents:
    def test_pages_move(self, driver):
        """On a machine that keeps no contents pages move all the same, and no byte is copied."""
        world = mapped_range(pages=40, payload=False, driver=driver)
        world.process.touch(world.addr, world.nbytes)

        there = to_device(world)
        back = to_system(world, pages=10)

        stats = world.gpu.stats
        assert (40, 10) == (there.migrated, back.migrated)
        assert (40, 10) == (stats.pages_to_device, stats.pages_to_system)
        assert (0, 0) == (stats.bytes_to_device, stats.bytes_to_system)
        world.machine.verify()

    def test_cpu_fault(self, driver):
        """A CPU that touches a page brings it back there too."""
        world = mapped_range(pages=3, payload=False, driver=driver)
        to_device(world)

        world.process.touch(world.at(1), 1)

        assert [True, False, True] == world.on_device()
        world.machine.verify()

    def test_no_contents_to_read(self):
        """There is nothing that the device could load."""
        world = mapped_range(payload=False)

        with pytest.raises(InvalidArgument, match="keeps no contents"):
            world.gpu.read(world.process, world.addr, 1)

        world.machine.verify()


class TestStats:
    def test_there_and_back(self, driver):
        """Pages and bytes are counted both ways."""
        world = mapped_range(pages=6, driver=driver)

        to_device(world)
        to_system(world, pages=2)

        assert (
            Stats(
                pages_to_device=6,
                pages_to_system=2,
                bytes_to_device=6 * PAGE_SIZE,
                bytes_to_system=2 * PAGE_SIZE,
            )
            == world.gpu.stats
        )


class TestOptions:
    @pytest.mark.parametrize("chunk", ["32KiB", "4MiB", "96KiB", 0])
    def test_chunk(self, driver, chunk):
        """A chunk that is no power of two from 64 KiB to 2 MiB is refused, with the limits."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match="power of two from 64 KiB to 2 MiB"):
            driver(world.machine, "1MiB", chunk=chunk)

        world.machine.verify()
