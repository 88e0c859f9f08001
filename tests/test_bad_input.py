"""Bad input gets a clear error, and nothing is lost: every test ends in unharmed()."""

import errno

import numpy as np
import pytest

import devices
import hmm
from devices import NumpyDevice
from mm import (
    PAGE_SIZE,
    Deadlock,
    InvalidArgument,
    InvalidRange,
    Machine,
    OutOfRange,
    SegmentationFault,
)
from tests.world import mapped_range

ALL = 1 << 64


def unharmed(world):
    """Contents are what they were, everything fits together, and a migration still works."""
    assert [0, 1, 2, 3, 4] == world.contents()
    world.machine.verify()
    assert 5 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
    assert [0, 1, 2, 3, 4] == world.contents()


def words(count, dtype=np.uint64):
    return np.zeros(count, dtype=dtype)


class Ops:
    """Callbacks that take nothing."""

    def alloc_and_copy(self, vma, src, dst, start, end, private):
        """Leave every page where it is."""

    def finalize_and_map(self, vma, src, dst, start, end, private):
        """Nothing to map."""


class CallingDevice(NumpyDevice):
    """Calls `inside`, once, when it has copied pages in or out."""

    inside = None

    def copy_in(self, pages, system, rows):
        super().copy_in(pages, system, rows)
        self._call()

    def copy_out(self, pages, system, rows):
        super().copy_out(pages, system, rows)
        self._call()

    def _call(self):
        inside, self.inside = self.inside, None
        if inside:
            inside()


class TestMigrateVmaRange:
    @pytest.mark.parametrize(
        ("first", "last"),
        [(-1, 2), (3, 6), (-1, 6), (5, 6), (-3, -1), (0, 1 << 45), (-(1 << 45), 2)],
        ids=["before", "after", "around", "beside", "below", "far", "negative"],
    )
    def test_outside(self, first, last):
        """A range that is not inside its VMA is refused; the error names both."""
        world = mapped_range()
        vma = world.vma

        with pytest.raises(InvalidRange, match=f"not inside its VMA .{vma.vm_start:#x}") as caught:
            hmm.migrate_vma(Ops(), vma, world.at(first), world.at(last), words(5), words(5))

        assert errno.EINVAL == caught.value.errno
        assert f"[{world.at(first):#x}, {world.at(last):#x})" in str(caught.value)
        unharmed(world)

    def test_two_vmas(self):
        """A range over two VMAs is refused; the error says to take one at a time."""
        world = mapped_range(pages=6)
        world.process.mmap(PAGE_SIZE, "r", addr=world.at(5))
        world.pages = 5

        with pytest.raises(InvalidRange, match="one VMA at a time"):
            hmm.migrate_vma(Ops(), world.vma, world.at(0), world.at(6), words(6), words(6))

        unharmed(world)

    @pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 2), (3, 1)])
    def test_empty(self, first, last):
        """An empty or inverted range is refused."""
        world = mapped_range()

        with pytest.raises(InvalidRange, match="start must be below end"):
            hmm.migrate_vma(Ops(), world.vma, world.at(first), world.at(last), words(0), words(0))

        unharmed(world)

    def test_overflowing(self):
        """A range that ends beyond all addresses is refused."""
        world = mapped_range()

        with pytest.raises(InvalidRange, match="not inside its VMA"):
            hmm.migrate_vma(Ops(), world.vma, world.addr, ALL + world.addr, words(5), words(5))

        unharmed(world)


class TestVectors:
    @pytest.mark.parametrize(
        "wrong",
        [
            words(4),
            words(6),
            words(0),
            words(5, np.int64),
            words(5, np.uint32),
            words(5, np.float64),
            words((5, 1)),
            [0] * 5,
            None,
        ],
        ids=["short", "long", "empty", "int64", "uint32", "float64", "matrix", "list", "None"],
    )
    @pytest.mark.parametrize("name", ["src", "dst"])
    def test_shape_and_dtype(self, name, wrong):
        """A vector of another length or dtype is refused; the error says which and what fits."""
        world = mapped_range()
        vectors = {"src": words(5), "dst": words(5)} | {name: wrong}

        with pytest.raises(InvalidArgument, match=rf"{name} must be a NumPy array uint64\[5\]"):
            hmm.migrate_vma(Ops(), world.vma, world.at(0), world.at(5), **vectors)

        unharmed(world)

    def test_one_for_both(self):
        """The same vector cannot be src and dst."""
        world = mapped_range()
        both = words(5)

        with pytest.raises(InvalidArgument, match=r"src.*dst"):
            hmm.migrate_vma(world.gpu, world.vma, world.at(0), world.at(5), both, both)

        unharmed(world)

    @pytest.mark.parametrize("name", ["src", "dst"])
    def test_read_only(self, name):
        """A vector that cannot be written is refused before anything is touched."""
        world = mapped_range()
        vectors = {"src": words(5), "dst": words(5)}
        vectors[name].flags.writeable = False

        with pytest.raises(InvalidArgument, match=name):
            hmm.migrate_vma(Ops(), world.vma, world.at(0), world.at(5), **vectors)

        unharmed(world)

    def test_without_mmap_sem(self):
        """The stages by hand want mmap_sem held, and say so."""
        world = mapped_range()
        migrate = hmm.MigrateVma(world.vma, world.at(0), world.at(5), words(5), words(5))

        with pytest.raises(InvalidArgument, match="hold mmap_sem"):
            hmm.migrate_vma_setup(migrate)

        unharmed(world)


class TestDeviceRange:
    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    @pytest.mark.parametrize(
        ("first", "nbytes"),
        [(-1, PAGE_SIZE), (4, 2 * PAGE_SIZE), (0, ALL), (1 << 45, 1), (-(1 << 45), 1)],
        ids=["before", "after", "overflowing", "far", "negative"],
    )
    def test_outside(self, way, first, nbytes):
        """A range that is not all mapped is refused; the error names the first gap."""
        world = mapped_range()

        with pytest.raises(InvalidRange, match=r"nothing is mapped at -?0x[0-9a-f]+ of train"):
            getattr(world.gpu, way)(world.process, world.at(first), nbytes)

        unharmed(world)

    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    def test_empty(self, way):
        """A range of no bytes is refused."""
        world = mapped_range()

        with pytest.raises(InvalidRange, match="0 bytes"):
            getattr(world.gpu, way)(world.process, world.addr, 0)

        unharmed(world)


class TestProcessRange:
    @pytest.mark.parametrize(
        ("addr", "nbytes"),
        [(0x1000, -1), (-PAGE_SIZE, 8), (1 << 57, 8), (ALL, 8), (0x1000, 1 << 57)],
        ids=["negative size", "negative", "beyond", "overflow", "too long"],
    )
    @pytest.mark.parametrize("call", ["read", "touch", "pin"])
    def test_no_addresses(self, call, addr, nbytes):
        """What is no range of addresses is refused; the error names the limits."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match=r"not inside|cannot be negative"):
            getattr(world.process, call)(addr, nbytes)

        unharmed(world)

    @pytest.mark.parametrize("addr", [-PAGE_SIZE, 1 << 57, ALL])
    def test_store_to_no_address(self, addr):
        """The same for a store."""
        world = mapped_range()

        with pytest.raises(InvalidRange, match="not inside"):
            world.process.write(addr, b"x")

        unharmed(world)

    @pytest.mark.parametrize(
        "addr", [-PAGE_SIZE, 0, PAGE_SIZE, 1 << 56, 1 << 57, 12_345_678], ids=hex
    )
    def test_mmap(self, addr):
        """mmap to an address that cannot be is refused, and what is there stays."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match=r"not inside|not a multiple"):
            world.process.mmap(PAGE_SIZE, addr=addr)

        unharmed(world)

    @pytest.mark.parametrize("length", [0, "0", 1 << 47, ALL])
    def test_mmap_length(self, length):
        """mmap of nothing, or of more than there is, is refused."""
        world = mapped_range()

        with pytest.raises(OSError, match="mmap: "):
            world.process.mmap(length)

        unharmed(world)

    @pytest.mark.parametrize(
        ("addr", "length"), [(1, 1), (0x5000, 0), (-PAGE_SIZE, 1), (1 << 57, 1), (0, ALL)]
    )
    def test_munmap(self, addr, length):
        """munmap of what cannot be mapped is refused."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match="munmap: "):
            world.process.munmap(addr, length)

        unharmed(world)


NO_SIZES = ["", "lots", "-1", "0x1000", -1, 1.5, True, None, b"4096", "1.3B"]
NO_SIZE = r"is no size; write bytes as an int, or|cannot be negative|not a whole number of bytes"


class TestSizes:
    @pytest.mark.parametrize("size", ["lots", -1, 1.5, None])
    @pytest.mark.parametrize(
        "call", ["mmap", "munmap", "touch", "pin", "to_device", "to_system", "open", "neighbours"]
    )
    def test_no_size(self, call, size):
        """What is no size is refused; the error says how sizes are written."""
        world = mapped_range()
        process, gpu, machine, addr = world.process, world.gpu, world.machine, world.addr
        calls = {
            "mmap": lambda: process.mmap(size),
            "munmap": lambda: process.munmap(addr, size),
            "touch": lambda: process.touch(addr, size),
            "pin": lambda: process.pin(addr, size),
            "to_device": lambda: gpu.to_device(process, addr, size),
            "to_system": lambda: gpu.to_system(process, addr, size),
            "open": lambda: devices.open("numpy", machine, memory=size),
            "neighbours": lambda: devices.open("numpy", machine, "1MiB", neighbours=size),
        }

        with pytest.raises(InvalidArgument, match=NO_SIZE):
            calls[call]()

        unharmed(world)

    @pytest.mark.parametrize("size", NO_SIZES)
    def test_machine(self, size):
        """The same where a machine boots."""
        with pytest.raises(InvalidArgument, match=NO_SIZE):
            Machine((size,))

    @pytest.mark.parametrize("shape", [0, (3, 0), -1, (2, -2)])
    def test_array(self, shape):
        """An array of no elements, or fewer, is refused."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match="no memory holds shape"):
            world.process.array(shape)

        unharmed(world)


class TestDevice:
    @pytest.mark.parametrize("memory", ["240MiB", "1TiB", "8000PiB", 1 << 70])
    def test_larger_than_the_address_space(self, memory):
        """A device that has no place is refused; the error says how much there is, and a way."""
        world = mapped_range()

        with pytest.raises(
            OutOfRange, match=r"MiB are free there; .*larger max_physmem="
        ) as caught:
            devices.open("numpy", world.machine, memory=memory)

        assert errno.ERANGE == caught.value.errno
        unharmed(world)

    @pytest.mark.parametrize("memory", [0, "0", 4095])
    def test_without_memory(self, memory):
        """A device of less than a page is refused."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match="less than a page"):
            devices.open("numpy", world.machine, memory=memory)

        unharmed(world)

    def test_unknown(self):
        """For a device that does not exist the error lists those that do."""
        world = mapped_range()

        with pytest.raises(InvalidArgument, match=r"no device 'abacus'; installed: .*numpy"):
            devices.open("abacus", world.machine)

        unharmed(world)

    def test_out_of_memory_in_the_middle(self):
        """Where device memory runs out the rest of the range stays in system memory."""
        world = mapped_range()
        tiny = NumpyDevice(world.machine, "12KiB", name="tiny")

        result = tiny.to_device(world.process, world.addr, world.nbytes)

        assert (3, {"not_chosen": 2}) == (result.migrated, result.stayed)
        assert [True, True, True, False, False] == world.on_device()
        unharmed(world)


class Raises(Ops):
    """Takes every page in alloc_and_copy(), as *gpu* does, and raises in the callback *where*."""

    def __init__(self, gpu, where, error):
        self.gpu, self.where, self.error = gpu, where, error

    def alloc_and_copy(self, vma, src, dst, start, end, private):
        self.gpu.alloc_and_copy(vma, src, dst, start, end, private)
        if self.where == "alloc_and_copy":
            raise self.error

    def finalize_and_map(self, vma, src, dst, start, end, private):
        if self.where == "finalize_and_map":
            raise self.error
        self.gpu.finalize_and_map(vma, src, dst, start, end, private)


WAYS = {
    "to_device": lambda world: world.gpu.to_device(world.process, world.addr, world.nbytes),
    "to_system": lambda world: world.gpu.to_system(world.process, world.addr, world.nbytes),
    "CPU fault": lambda world: world.process.read(world.addr, world.nbytes),
}


class TestCallbackThatRaises:
    @pytest.mark.parametrize(
        "error", [RuntimeError("link down"), KeyboardInterrupt(), MemoryError()]
    )
    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    @pytest.mark.parametrize("where", ["alloc_and_copy", "finalize_and_map"])
    def test_error_goes_on(self, where, way, error):
        """Every page is put back or arrives, unlocked, and the caller gets the error itself."""
        world = mapped_range()
        if way == "to_system":
            world.gpu.to_device(world.process, world.addr, world.nbytes)
        direction = devices.memory.Direction[way.upper()]
        ops = Raises(world.gpu, where, error)

        with pytest.raises(type(error)) as caught:
            hmm.migrate_vma(ops, world.vma, world.at(0), world.at(5), words(5), words(5), direction)

        assert error is caught.value
        arrived = where == "finalize_and_map"
        assert [arrived == (way == "to_device")] * 5 == world.on_device()
        unharmed(world)

    @pytest.mark.parametrize("hook", ["copy_in", "copy_out"])
    def test_hook(self, hook):
        """The same for what a driver's copy raises."""
        world = mapped_range(driver=CallingDevice)
        if hook == "copy_out":
            world.gpu.to_device(world.process, world.addr, world.nbytes)

        def fail():
            raise RuntimeError("link down")

        world.gpu.inside = fail
        calls = {"copy_in": WAYS["to_device"], "copy_out": WAYS["CPU fault"]}

        with pytest.raises(RuntimeError, match="link down"):
            calls[hook](world)

        assert [hook == "copy_out"] * 5 == world.on_device()
        unharmed(world)


class TestAccessFromCallback:
    @pytest.mark.parametrize("way", list(WAYS))
    @pytest.mark.parametrize("access", ["read", "write", "pin", "device write"])
    def test_page_under_migration(self, way, access):
        """A callback that touches a page under migration gets an error, and does not hang."""
        world = mapped_range(driver=CallingDevice)
        if way != "to_device":
            world.gpu.to_device(world.process, world.addr, world.nbytes)
        accesses = {
            "read": lambda: world.process.read(world.at(2), 1),
            "write": lambda: world.process.write(world.at(2), b"x"),
            "pin": lambda: world.pin(2),
            "device write": lambda: world.gpu.write(world.process, world.at(2), b"x"),
        }
        world.gpu.inside = accesses[access]

        with pytest.raises(Deadlock, match="callback may not touch memory that it is migrating"):
            WAYS[way](world)

        assert [way != "to_device"] * 5 == world.on_device()
        unharmed(world)

    @pytest.mark.parametrize("call", ["mmap", "munmap", "exit"])
    def test_address_space(self, call):
        """A callback that changes the address space that it works for gets an error too."""
        world = mapped_range(driver=CallingDevice)
        calls = {
            "mmap": lambda: world.process.mmap(PAGE_SIZE),
            "munmap": lambda: world.process.munmap(world.at(4), PAGE_SIZE),
            "exit": world.process.exit,
        }
        world.gpu.inside = calls[call]

        with pytest.raises(Deadlock, match="mmap_sem of train"):
            world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [False] * 5 == world.on_device()
        unharmed(world)

    def test_other_memory(self):
        """Memory that is not under migration may be touched from a callback."""
        world = mapped_range(driver=CallingDevice)
        seen = []
        world.gpu.inside = lambda: seen.append(world.process.read(world.at(4), 1))

        world.gpu.to_device(world.process, world.addr, 4 * PAGE_SIZE)

        assert [b"\4"] == seen
        assert [True] * 4 + [False] == world.on_device()
        world.machine.verify()


class TestAccess:
    @pytest.mark.parametrize("access", ["read", "write", "touch", "pin"])
    def test_unmapped(self, access):
        """An access where nothing is mapped is a SegmentationFault that names the address."""
        world = mapped_range()
        addr = world.addr - 8

        with pytest.raises(SegmentationFault, match="where nothing is mapped") as caught:
            getattr(world.process, access)(addr, b"abcd" if access == "write" else 4)

        assert world.addr - PAGE_SIZE == caught.value.address
        unharmed(world)

    @pytest.mark.parametrize("access", ["write", "touch", "pin"])
    def test_read_only(self, access):
        """A store to read-only memory is a SegmentationFault that names the mapping."""
        world = mapped_range(pages=6)
        world.process.mmap(PAGE_SIZE, "r", addr=world.at(5))
        world.pages, addr = 5, world.at(5)

        with pytest.raises(SegmentationFault, match=r"not allowed by <Vma .* r-->"):
            getattr(world.process, access)(addr, b"x" if access == "write" else 1)

        assert b"\0" == world.process.read(addr, 1)
        unharmed(world)

    def test_part_of_the_way(self):
        """A store that runs off the end of a mapping has stored what came before."""
        world = mapped_range()

        with pytest.raises(SegmentationFault) as caught:
            world.process.write(world.at(4) + 4_000, bytes([4]) * 200)

        assert world.at(5) == caught.value.address
        unharmed(world)

    @pytest.mark.parametrize("access", ["read", "write", "touch", "mmap", "array"])
    def test_process_that_has_exited(self, access):
        """A process that is gone says so."""
        world = mapped_range()
        gone = world.machine.spawn("gone")
        gone.exit()
        arguments = {"write": (0x5000, b"x"), "mmap": (1,), "array": (1,)}.get(access, (0x5000, 1))

        with pytest.raises(InvalidArgument, match="process gone has exited"):
            getattr(gone, access)(*arguments)

        unharmed(world)
