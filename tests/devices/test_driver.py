"""What a device does with memory of a process: loads, stores, kernels, and the faults behind them.

The oracle is a bytearray or a NumPy array that gets the same loads and stores.
"""

from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import NumpyDevice
from mm import (
    PAGE_SIZE,
    InvalidArgument,
    InvalidRange,
    OutOfMemory,
    SegmentationFault,
    trace,
)
from mm.errors import MmError
from tests.world import in_step, mapped_range

GIB = 1 << 30
WORDS = PAGE_SIZE // 8  # in a page


def small(**options):
    """40 pages over a 1 GiB border, and a device with memory for 16."""
    defaults = {"pages": 40, "memory": "64KiB", "addr": GIB - 20 * PAGE_SIZE, "filled": False}
    return mapped_range(**defaults | options)


def load(world, page=0, nbytes=1):
    """What the device loads from the beginning of *page*."""
    return world.gpu.read(world.process, world.at(page), nbytes)


def store(world, page, data):
    """Let the device store *data* at the beginning of *page*."""
    world.gpu.write(world.process, world.at(page), data)


def another(world, memory="1MiB"):
    """A second device of the same machine."""
    return NumpyDevice(world.machine, memory, name="numpy1")


def vector(*values):
    return np.array(values, dtype=np.int64)


def mask(*values):
    return np.array(values, dtype=np.bool_)


class TestAnySequence:
    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["load", "store", "CPU load", "CPU store", "to_device", "mmap"]),
                st.integers(0, 40 * PAGE_SIZE - 1),
                st.one_of(st.integers(0, 16), st.integers(1, 40 * PAGE_SIZE)),
            ),
            max_size=12,
        ),
        kind=st.sampled_from(["private", "public"]),
    )
    def test_one_memory(self, steps, kind):
        """Whoever stores, and wherever a page is, both sides load what was stored last."""
        world = small(kind=kind)
        process, gpu, model = world.process, world.gpu, bytearray(world.nbytes)
        loads = {"load": partial(gpu.read, process), "CPU load": process.read}
        stores = {"store": partial(gpu.write, process), "CPU store": process.write}
        for number, (step, offset, wanted) in enumerate(steps, 1):
            size = min(wanted, world.nbytes - offset)
            part, addr = slice(offset, offset + size), world.addr + offset
            if step in loads:
                assert model[part] == loads[step](addr, size)
            elif step in stores:
                model[part] = bytes([number]) * size
                stores[step](addr, model[part])
            elif step == "mmap":
                start = offset & ~(PAGE_SIZE - 1)
                process.mmap(PAGE_SIZE, addr=world.addr + start)
                model[start : start + PAGE_SIZE] = bytes(PAGE_SIZE)
            elif size:
                gpu.to_device(process, addr, size)
            assert in_step(gpu)
        world.machine.verify()
        assert model == gpu.read(process, world.addr, world.nbytes)
        assert model == process.read(world.addr, world.nbytes)


class TestRead:
    def test_migrates(self):
        """The pages that the device loads from are in its memory then, and no others."""
        world = mapped_range()

        got = world.gpu.read(world.process, world.at(2) - 1, 2)

        assert bytes([1, 2]) == got
        assert [False, True, True, False, False] == world.on_device()
        world.machine.verify()

    def test_untouched(self):
        """Memory that nobody has touched holds zeros, for the device too."""
        world = mapped_range(filled=False)

        assert bytes(world.nbytes) == load(world, nbytes=world.nbytes)

        assert [True] * 5 == world.on_device()
        assert 0 == world.gpu.stats.bytes_to_device
        world.machine.verify()

    def test_blocks(self):
        """A load over several 2 MiB blocks, at odd ends, is one load."""
        world = mapped_range(pages=1_100, memory="8MiB", addr=GIB - 30 * PAGE_SIZE)
        wrote = np.repeat(np.arange(1_100) % 251, PAGE_SIZE).astype(np.uint8).tobytes()

        got = world.gpu.read(world.process, world.addr + 77, world.nbytes - 99)

        assert wrote[77:-22] == got
        assert [True] * 1_100 == world.on_device()
        world.machine.verify()

    def test_larger_than_the_device(self):
        """A load of more than the device holds goes through it a piece at a time."""
        world = mapped_range(pages=100, memory="64KiB")

        got = np.frombuffer(load(world, nbytes=world.nbytes), dtype=np.uint8)

        assert np.array_equal(np.repeat(np.arange(100), PAGE_SIZE), got)
        assert sum(world.on_device()) <= 16
        assert [*range(100)] == world.contents()
        world.machine.verify()

    def test_every_other_page_there(self):
        """A full device loads a range of which it holds every other page."""
        world = mapped_range(pages=32, memory="64KiB")
        for page in range(0, 32, 2):
            load(world, page)

        got = load(world, nbytes=world.nbytes)

        assert bytes(range(32)) == got[::PAGE_SIZE]
        world.machine.verify()

    def test_read_only(self):
        """A mapping without w can be loaded from."""
        world = mapped_range(prot="r", filled=False)

        assert bytes(10) == load(world, nbytes=10)

        assert in_step(world.gpu)
        world.machine.verify()

    @pytest.mark.parametrize("addr", [0, 1, 0x5001])
    def test_nothing(self, addr):
        """A load of no bytes touches no page, wherever it is."""
        world = mapped_range()

        assert b"" == world.gpu.read(world.process, addr, 0)

        assert 0 == world.gpu.stats.device_faults

    def test_two_mappings(self):
        """A load goes on over the border between mappings with different rights."""
        world = mapped_range(pages=4)
        world.process.mmap(2 * PAGE_SIZE, "r", addr=world.at(2))

        assert bytes([0, 1, 0, 0]) == load(world, nbytes=world.nbytes)[::PAGE_SIZE]

        world.machine.verify()


class TestReadInto:
    def test_buffer_is_filled(self):
        """Any buffer that may be written, with the same bytes as read() returns."""
        world = mapped_range(pages=3)
        for buffer in (
            bytearray(5000),
            np.zeros(5000, dtype=np.uint8),
            memoryview(bytearray(5000)),
        ):
            world.gpu.readinto(world.process, world.addr + 3000, buffer)
            assert bytes(buffer) == world.gpu.read(world.process, world.addr + 3000, 5000)

    def test_buffer_that_may_not_be_written(self):
        """bytes have their value for good."""
        world = mapped_range(pages=1)
        with pytest.raises(InvalidArgument, match="read-only"):
            world.gpu.readinto(world.process, world.addr, bytes(10))


class TestWrite:
    def test_cpu_sees_it(self):
        """What the device stores is what the CPU loads, with the rest of the page around it."""
        world = mapped_range()

        world.gpu.write(world.process, world.at(3) - 2, b"new!")

        assert [False, False, True, True, False] == world.on_device()
        assert b"\2new!\3" == world.process.read(world.at(3) - 3, 6)
        world.machine.verify()

    def test_arrays(self):
        """Anything with a buffer can be stored."""
        world = mapped_range()

        store(world, 1, np.arange(3, dtype=np.uint16))

        assert b"\0\0\1\0\2\0\1" == world.process.read(world.at(1), 7)

    def test_larger_than_the_device(self):
        """A store of more than the device holds reaches every page."""
        world = small()
        data = np.random.default_rng(1).bytes(world.nbytes - 100)

        world.gpu.write(world.process, world.addr + 50, data)

        assert bytes(50) + data + bytes(50) == world.process.read(world.addr, world.nbytes)
        world.machine.verify()

    @pytest.mark.parametrize("cpu_first", [False, True])
    def test_untouched(self, cpu_first):
        """A store to memory that only zeros stand behind leaves the zero page as it is."""
        world = mapped_range(filled=False)
        if cpu_first:
            world.process.read(world.addr, world.nbytes)

        store(world, 1, b"x")

        assert [0, ord("x"), 0, 0, 0] == world.contents()
        assert not world.machine.mem.payload[world.machine.mem.zero_pfn].any()
        world.machine.verify()


class TestOutOfReach:
    def test_unmapped(self):
        """A load where nothing is mapped is a SegmentationFault that names device and address."""
        world = mapped_range()

        with pytest.raises(SegmentationFault, match="numpy0: nothing is mapped") as caught:
            world.gpu.read(world.process, world.addr - PAGE_SIZE + 8, 8)

        assert world.addr - PAGE_SIZE == caught.value.address
        assert [0, 1, 2, 3, 4] == world.contents()
        world.machine.verify()

    @pytest.mark.parametrize("beyond", [1 << 57, -(1 << 57), 1 << 60])
    @pytest.mark.parametrize("call", ["read", "write", "exchange"])
    def test_no_address(self, call, beyond):
        """What no page table can hold is out of reach, though its low bits mean a page."""
        world = mapped_range()
        store(world, 1, b"mine")
        addr = world.at(1) + beyond
        calls = {
            "read": lambda: world.gpu.read(world.process, addr, 4),
            "write": lambda: world.gpu.write(world.process, addr, b"evil"),
            "exchange": lambda: world.gpu.exchange(
                world.process, vector(addr), np.ones(1, dtype=np.uint64), mask(True)
            ),
        }

        with pytest.raises((SegmentationFault, InvalidRange)):
            calls[call]()

        assert b"mine" == world.process.read(world.at(1), 4)
        world.machine.verify()

    def test_negative_size(self):
        """A load of less than nothing is refused as the CPU's is."""
        world = mapped_range()

        with pytest.raises(InvalidRange):
            world.gpu.read(world.process, world.addr, -1)

        world.machine.verify()

    def test_store_to_read_only(self):
        """A store to a mapping without w is refused, and moves nothing."""
        world = mapped_range(prot="r", filled=False)

        with pytest.raises(SegmentationFault, match=r"numpy0: a store at .* r--"):
            store(world, 1, b"x")

        assert [False] * 5 == world.on_device()
        assert [0] * 5 == world.contents()
        world.machine.verify()

    def test_store_after_loads(self):
        """A page that the device may load from still takes no store."""
        world = mapped_range(prot="r", filled=False)
        load(world, nbytes=world.nbytes)

        with pytest.raises(SegmentationFault, match="a store"):
            store(world, 1, b"x")

        assert bytes(world.nbytes) == load(world, nbytes=world.nbytes)
        world.machine.verify()

    def test_no_rights_at_all(self):
        """Memory mapped without any right is not even read."""
        world = mapped_range(prot="-", filled=False)

        with pytest.raises(SegmentationFault, match=r"numpy0: a load at .* ---"):
            load(world)

        world.machine.verify()

    def test_names_the_page(self):
        """Of a batch with loads and stores the error names the page that it is about."""
        world = mapped_range(prot="r", filled=False)
        stores = mask(False, False, False, True, False)

        with pytest.raises(SegmentationFault) as caught:
            world.gpu.exchange(world.process, world.addrs, np.zeros(5, dtype=np.uint64), stores)

        assert world.at(3) == caught.value.address

    def test_exited_process(self):
        """Memory of a process that is gone is out of reach, and asking leaves nothing behind."""
        world = mapped_range()
        array = world.process.array(8)
        load(world)
        world.process.exit()

        for call in (
            lambda: load(world),
            lambda: store(world, 0, b"x"),
            lambda: world.gpu.run(np.negative, array),
            lambda: world.gpu.to_device(world.process, world.addr, 1),
        ):
            with pytest.raises(MmError):
                call()

        assert [] == world.machine.mem.device_pgds
        assert 0 == world.machine.vmstat["nr_page_table_pages"]
        world.machine.verify()


class TestUnmap:
    def test_munmap(self):
        """What the process unmaps the device cannot reach any more; the rest it can."""
        world = mapped_range()
        load(world, nbytes=world.nbytes)

        world.process.munmap(world.at(1), 2 * PAGE_SIZE)

        assert [True, False, False, True, True] == world.gpu.resident(
            world.process, world.addrs, np.zeros(5, dtype=np.bool_)
        ).tolist()
        with pytest.raises(SegmentationFault, match=f"numpy0: .* mapped at {world.at(1):#x}"):
            load(world, 1)
        assert b"\3" == load(world, 3)
        world.machine.verify()

    def test_mapped_again(self):
        """New memory in the old place is new for the device as well."""
        world = mapped_range()
        load(world, nbytes=world.nbytes)

        world.process.mmap(PAGE_SIZE, addr=world.at(2))

        assert bytes([0, 1, 0, 3, 4]) == load(world, nbytes=world.nbytes)[::PAGE_SIZE]
        world.machine.verify()

    def test_exit(self):
        """A process that exits takes the device's page tables for it along."""
        world = mapped_range()
        load(world, nbytes=world.nbytes)
        assert len(world.machine.mem.device_pgds) == 1

        world.process.exit()

        assert [] == world.machine.mem.device_pgds
        assert 0 == world.machine.vmstat["nr_page_table_pages"]
        assert world.gpu.npages == world.gpu.chunks.free_pages
        world.machine.verify()

    def test_other_processes_go_on(self):
        """The exit of one process leaves the device's view of another as it is."""
        world = mapped_range()
        other = world.machine.spawn("other")
        addr = other.mmap(PAGE_SIZE)
        for process, start in ((world.process, world.addr), (other, addr)):
            world.gpu.write(process, start, process.name.encode())

        other.exit()

        assert b"train" == load(world, nbytes=5)
        world.gpu.write(world.machine.spawn("third"), world.addr, b"")
        world.machine.verify()


class TestEviction:
    def test_use_makes_no_younger(self):
        """A full device evicts what it took first, though it has used it since."""
        world = mapped_range(pages=48, memory="128KiB", chunk="64KiB")
        load(world, nbytes=32 * PAGE_SIZE)
        load(world, nbytes=16 * PAGE_SIZE)

        load(world, 32)

        assert [False] * 16 + [True] * 17 + [False] * 15 == world.on_device()
        world.machine.verify()

    def test_device_comes_back_for_it(self):
        """An evicted page is a device fault like any other."""
        world = mapped_range(pages=17, memory="64KiB")
        load(world, nbytes=16 * PAGE_SIZE)
        store(world, 3, b"x")
        load(world, 16)

        assert b"x\3" == load(world, 3, 2)

        assert 16 <= world.gpu.stats.evicted_pages
        world.machine.verify()


class TestExchange:
    @given(
        batches=st.lists(
            st.dictionaries(st.integers(0, 40 * WORDS - 1), st.booleans(), min_size=1, max_size=60),
            max_size=4,
        )
    )
    def test_loads_before_stores(self, batches):
        """A batch loads what earlier batches stored, then stores where it was told to."""
        world = small()
        model = np.zeros(40 * WORDS, dtype=np.uint64)
        for number, batch in enumerate(batches, 1):
            places = vector(*batch)
            words = places.view(np.uint64) * np.uint64(1_000) + np.uint64(number)
            write = mask(*batch.values())

            got = world.gpu.exchange(world.process, world.addr + 8 * places, words, write)

            assert np.array_equal(model[places], got)
            model[places[write]] = words[write]
        raw = world.process.read(world.addr, world.nbytes)
        assert np.array_equal(model, np.frombuffer(raw, dtype=np.uint64))
        world.machine.verify()

    def test_one_batch_of_faults(self):
        """The pages that a batch lacks are served together, each of them once."""
        world = mapped_range(pages=600)
        addrs = np.concatenate((world.addrs, world.addrs + 8))[::-1]

        world.gpu.exchange(
            world.process, addrs, np.zeros(1_200, dtype=np.uint64), mask(*[False] * 1_200)
        )

        assert (1, 600) == (world.gpu.stats.fault_batches, world.gpu.stats.device_faults)
        world.machine.verify()

    def test_more_pages_than_memory(self):
        """A batch over more pages than the device has is served in turns."""
        world = mapped_range(pages=50, memory="64KiB")
        words = np.arange(50, dtype=np.uint64)

        got = world.gpu.exchange(world.process, world.addrs, words, mask(*[True] * 50))

        assert np.array_equal(np.arange(50), got & np.uint64(0xFF))
        assert [*range(50)] == world.contents()
        assert b"\0" == world.process.read(world.at(7) + 1, 1)
        world.machine.verify()

    def test_nothing(self):
        """An empty batch does nothing."""
        world = mapped_range()
        none = np.empty(0, dtype=np.int64)

        got = world.gpu.exchange(world.process, none, none.view(np.uint64), none.astype(np.bool_))

        assert 0 == got.size == world.gpu.stats.device_faults

    def test_pages_where_they_are(self):
        """A batch reaches pages in device memory and pages that cannot move, alike."""
        world = mapped_range()
        world.pin(1)
        words = np.arange(10, 15, dtype=np.uint64)

        world.gpu.exchange(world.process, world.addrs, words, mask(*[True] * 5))

        assert [True, False, True, True, True] == world.on_device()
        assert [10, 11, 12, 13, 14] == world.contents()
        world.machine.verify()


class TestFault:
    def test_prefetch(self):
        """A fault brings pages in before they are used."""
        world = mapped_range()

        world.gpu.fault(world.process, world.addrs[1:4], mask(False, True, False))

        stores = np.ones(5, dtype=np.bool_)
        assert [False, True, True, True, False] == world.on_device()
        assert world.on_device() == world.gpu.resident(world.process, world.addrs, stores).tolist()
        world.machine.verify()

    def test_larger_than_the_device(self):
        """Of a batch larger than the device's memory, the first pages come."""
        world = mapped_range(pages=20, memory="64KiB")

        world.gpu.fault(world.process, world.addrs, mask(*[False] * 20))

        assert [True] * 16 + [False] * 4 == world.on_device()
        world.machine.verify()

    def test_event(self):
        """Each batch is an event with its addresses."""
        world = mapped_range()
        heard = []

        with trace.listen(lambda event, fields: heard.append(fields), "gpu_fault"):
            store(world, 3, b"x")

        assert 1 == len(heard)
        assert ("numpy0", "train") == (heard[0]["device"], heard[0]["process"])
        assert ([world.at(3)], [True]) == (heard[0]["addrs"].tolist(), heard[0]["write"].tolist())

    def test_hit_is_no_fault(self):
        """What is in device memory costs no fault."""
        world = mapped_range()
        load(world, nbytes=world.nbytes)
        before = asdict(world.gpu.stats)

        load(world, nbytes=world.nbytes)

        assert before == asdict(world.gpu.stats)

    def test_table_lost(self):
        """What lies in device memory, but not in the device's page table, is only looked up."""
        world = mapped_range()
        load(world, nbytes=world.nbytes)
        world.gpu.table_of(world.process.mm).unmap(world.addrs)

        assert b"\2" == load(world, 2)

        assert 5 == world.gpu.stats.pages_to_device
        assert in_step(world.gpu)

    def test_write_protected(self):
        """A device store to a page that became read-only is served, and seen by the CPU."""
        world = mapped_range()
        load(world, nbytes=world.nbytes)
        world.write_protect(1, 2)

        store(world, 1, b"x")

        assert [0, ord("x"), 2, 3, 4] == world.contents()
        assert in_step(world.gpu)
        world.machine.verify()


class TestRemote:
    @pytest.mark.parametrize("why", ["pin", "lock", "isolate"])
    def test_page_that_cannot_move(self, why):
        """A page that somebody else holds is reached where it is."""
        world = mapped_range()
        getattr(world, why)(2)

        got = load(world, nbytes=world.nbytes)

        assert bytes(range(5)) == got[::PAGE_SIZE]
        assert [True, True, False, True, True] == world.on_device()
        assert in_step(world.gpu)

    def test_store_is_seen_at_once(self):
        """A store to a pinned page is there for the CPU without a fault."""
        world = mapped_range()
        world.pin(2)

        store(world, 2, b"new")
        with world.machine.vmstat.counting("pgfault") as delta:
            got = world.process.read(world.at(2), 4)

        assert b"new\2" == got
        assert {"pgfault": 0} == delta
        world.machine.verify()

    def test_cpu_store_is_seen_at_once(self):
        """What a CPU stores to a pinned page is there for the device without a fault."""
        world = mapped_range()
        world.pin(2)
        load(world, 2)
        before = world.gpu.stats.device_faults

        world.process.write(world.at(2), b"new")

        assert b"new\2" == load(world, 2, 4)
        assert before == world.gpu.stats.device_faults

    def test_unpinned(self):
        """A page that nobody holds any more can come, and the device finds it in its memory."""
        world = mapped_range()
        pin = world.pin(2)
        store(world, 2, b"x")
        pin.release()

        result = world.gpu.to_device(world.process, world.at(2), 1)

        assert 1 == result.migrated
        assert b"x\2" == load(world, 2, 2)
        assert in_step(world.gpu)
        world.machine.verify()

    def test_untouched_page_of_a_device_without_room(self):
        """Untouched memory is zeros for a device that has no room, and a store gets a frame."""
        world = full_device()
        assert b"\0" == world.gpu.read(world.process, world.at(3), 1)

        world.gpu.write(world.process, world.at(3) + 1, b"x")

        assert b"\0x" == world.process.read(world.at(3), 2)
        assert [0] * 3 == [world.process.read(world.at(page), 1)[0] for page in (1, 2, 4)]
        assert not world.machine.mem.payload[world.machine.mem.zero_pfn].any()
        assert in_step(world.gpu)

    def test_cpu_store_to_the_zero_page(self):
        """A device that looks at the zero page sees the frame that a CPU's store puts there."""
        world = full_device()
        load(world, 3)

        world.process.write(world.at(3), b"x")

        assert b"x" == load(world, 3)
        assert in_step(world.gpu)

    def test_no_memory_anywhere(self):
        """With no room on the device and no frame left, a device fault is OutOfMemory."""
        world = full_device(nodes=("1MiB",), pages=300)
        with pytest.raises(OutOfMemory, match="train"):
            world.process.touch(world.at(1), 299 * PAGE_SIZE)

        with pytest.raises(OutOfMemory, match=f"numpy0: no frame.*{world.at(299):#x}"):
            store(world, 299, b"x")

        assert b"held" == load(world, 0, 4)
        assert in_step(world.gpu)
        world.process.munmap(world.at(1), PAGE_SIZE)  # room for the held page to come back


def full_device(**options):
    """A device whose only page is page 0 of the range, which cannot leave; the rest is holes."""
    world = mapped_range(**{"memory": "4KiB", "filled": False} | options)
    store(world, 0, b"held")
    world.hold(world.pfns().item(0))
    return world


class TestTwoDevices:
    def test_one_reaches_what_the_other_has(self):
        """A device that touches a page of another gets its contents."""
        world = mapped_range()
        store(world, 2, b"from numpy0")
        other = another(world)

        got = other.read(world.process, world.at(2), 12)

        assert b"from numpy0\2" == got
        assert in_step(world.gpu)
        assert in_step(other)
        world.machine.verify()

    def test_taking_turns(self):
        """Two devices and a CPU that store to one page in turn lose nothing."""
        world = mapped_range(pages=1)
        other = another(world)

        for turn in range(0, 24, 3):
            world.gpu.write(world.process, world.addr + turn, bytes([turn]))
            other.write(world.process, world.addr + turn + 1, bytes([turn + 1]))
            world.process.write(world.addr + turn + 2, bytes([turn + 2]))
            assert in_step(world.gpu)
            assert in_step(other)

        for side in (partial(world.gpu.read, world.process), world.process.read):
            assert bytes(range(24)) == side(world.addr, 24)
        assert bytes(range(24)) == other.read(world.process, world.addr, 24)
        world.machine.verify()

    def test_page_taken_away(self):
        """What another device takes is forgotten, though it was reached where it was."""
        world = mapped_range()
        pin = world.pin(2)
        load(world, 2)
        pin.release()
        other = another(world)

        other.to_device(world.process, world.addr, world.nbytes)

        assert in_step(world.gpu)
        other.write(world.process, world.at(2), b"new")
        assert b"new\2" == load(world, 2, 4)
        world.machine.verify()

    def test_half_each(self):
        """A load over pages of two devices and of the system is one load."""
        world = mapped_range(pages=9)
        other = another(world)
        other.to_device(world.process, world.at(3), 3 * PAGE_SIZE)
        world.gpu.to_device(world.process, world.at(6), 3 * PAGE_SIZE)

        assert bytes(range(9)) == load(world, nbytes=world.nbytes)[::PAGE_SIZE]

        world.machine.verify()

    def test_one_closes(self):
        """A device that closes leaves the other's pages alone."""
        world = mapped_range()
        other = another(world)
        other.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)

        world.gpu.close()

        assert [True, True, False, False, False] == world.on_device()
        assert b"\1" == other.read(world.process, world.at(1), 1)
        assert [0, 1, 2, 3, 4] == world.contents()
        world.machine.verify()
