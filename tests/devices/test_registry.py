"""devices.open(): a device by its driver's name, or by where the driver is."""

import sys

import numpy as np
import pytest

import devices
from devices import NumpyDevice
from devices.chunks import Chunks
from hmm.registry import UnusableDriver, load_driver
from mm import PAGE_SIZE, InvalidArgument, Machine
from tests.world import mapped_range


def machine():
    return Machine(("4MiB",), max_physmem="256MiB")


class TestOpen:
    def test_numpy(self):
        """ "numpy" opens a NumpyDevice with as much memory as was asked for."""
        gpu = devices.open("numpy", machine(), memory="3MiB")

        assert NumpyDevice is type(gpu)
        assert 768 == gpu.npages
        assert (768, PAGE_SIZE) == gpu.memory.shape

    def test_default_size(self):
        """Unless one says otherwise, a device has 64 MiB and fetches single pages back."""
        gpu = devices.open("numpy", machine())

        assert 64 << 20 == gpu.npages * PAGE_SIZE
        assert 1 == gpu.neighbour_pages

    @pytest.mark.parametrize("size", [123_456, "120.5625KiB"])
    def test_part_of_a_page(self, size):
        """A device has whole pages only."""
        assert 30 == devices.open("numpy", machine(), memory=size).npages

    def test_options(self):
        """chunk= and neighbours= reach the driver."""
        gpu = devices.open("numpy", machine(), memory="1MiB", chunk="128KiB", neighbours="64KiB")

        assert 32 == gpu.chunk_pages
        assert 16 == gpu.neighbour_pages

    @pytest.mark.parametrize(
        ("memory", "chunk"),
        [("4KiB", 64 << 10), ("1MiB", 64 << 10), ("2MiB", 128 << 10), ("64MiB", 2 << 20)],
    )
    def test_default_chunk(self, memory, chunk):
        """A chunk is about a sixteenth of the device, within its limits."""
        gpu = devices.open("numpy", machine(), memory=memory)

        assert chunk == gpu.chunk_pages * PAGE_SIZE
        assert Chunks is type(gpu.chunks)

    def test_two(self):
        """Two devices of one machine have PFNs of their own."""
        here = machine()

        one, two = (devices.open("numpy", here, memory="1MiB") for _ in range(2))

        assert one.zone.start_pfn == two.zone.end_pfn
        here.verify()

    def test_place_of_a_closed_device(self):
        """What a closed device leaves is used again, and says nothing of what was there."""
        world = mapped_range(memory="1MiB")
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.gpu.close()

        gpu = devices.open("numpy", world.machine, memory="1MiB")

        assert world.gpu.zone.start_pfn == gpu.zone.start_pfn
        assert not np.count_nonzero(gpu.memory)
        assert [0, 1, 2, 3, 4] == world.contents()
        world.machine.verify()

    def test_announced(self):
        """The driver "numpy" is announced by this distribution."""
        assert load_driver("numpy") is NumpyDevice


MINE = """
from dataclasses import dataclass
from devices import NumpyDevice

class Mine(NumpyDevice):
    kinds = ("private",)

class Drawer:
    @dataclass
    class Device(NumpyDevice):
        pass

def make(machine, memory, *, chunk=None, neighbours=4096, colour="grey"):
    device = NumpyDevice(machine, memory, chunk=chunk, neighbours=neighbours)
    device.colour = colour
    return device
"""


@pytest.fixture
def mine(tmp_path):
    """The path of a file with drivers."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


class TestByPlace:
    def test_file(self, mine):
        """A class in a file, wherever the file is."""
        gpu = devices.open(f"{mine}:Mine", machine(), memory="1MiB")

        assert ("mine0", 256) == (gpu.name.replace("numpy", "mine"), gpu.npages)
        assert "Mine" == type(gpu).__name__

    def test_function(self, mine):
        """A function that opens devices will do, with options of its own."""
        assert "grey" == devices.open(f"{mine}:make", machine()).colour
        assert "blue" == devices.open(f"{mine}:make?colour=blue", machine()).colour

    def test_part_of_another(self, mine):
        """A name may have dots."""
        assert "Device" == load_driver(f"{mine}:Drawer.Device").__name__

    def test_module(self):
        """A class in a module."""
        assert load_driver("devices.numpy_device:NumpyDevice") is NumpyDevice

    def test_options(self):
        """Options come after a question mark, with & between them."""
        gpu = devices.open("numpy?kind=public&name=mine", machine(), memory="1MiB")

        assert "mine" == gpu.name
        assert gpu.memory.base is not None
        assert gpu.machine.mem.is_device_public_page(np.array([gpu.zone.start_pfn])).all()

    def test_edited_file(self, mine):
        """A file that has changed is read again."""
        load_driver(f"{mine}:Mine")
        mine.write_text(MINE.replace("Mine(", "Yours("))

        assert "Yours" == load_driver(f"{mine}:Yours").__name__

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("nowhere.py:Mine", "there is no file nowhere.py"),
            ("{mine}:Yours", "has no 'Yours'; its classes are Drawer, Mine"),
            ("{mine}:", "has no ''; its classes are"),
            ("json:dumps.nothing", "json has no 'dumps.nothing'"),
            ("{mine}:make?size=3", "unexpected keyword argument 'size'"),
            ("numpy?memory=3MiB", "multiple values for argument 'memory'"),
        ],
    )
    def test_not_there(self, mine, name, says):
        """What is not there is named, with what is."""
        with pytest.raises(InvalidArgument, match=says):
            load_driver(name.format(mine=mine))

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("import sys; sys.exit(3)", "SystemExit: 3"),
            ("def f(:", "SyntaxError"),
        ],
    )
    def test_unusable(self, mine, source, says):
        """A file that fails to run is named, with what went wrong."""
        mine.write_text(source)

        with pytest.raises(UnusableDriver, match=f"mine.py.*cannot be imported: {says}"):
            load_driver(f"{mine}:Mine")

    def test_leaves_sys_path_alone(self, mine):
        """A file's folder does not become a place to import from."""
        before = list(sys.path)

        load_driver(f"{mine}:Mine")

        assert before == sys.path


class TestWrongCall:
    def test_unknown_name(self):
        """A name that no driver has is answered with those that exist."""
        with pytest.raises(InvalidArgument, match=r"no device 'fpga'.*installed: .*numpy"):
            devices.open("fpga", machine())

    @pytest.mark.parametrize("kind", ["coherent", ""])
    def test_kind(self, kind):
        """A kind of memory that the device cannot have is answered with those that it can."""
        with pytest.raises(InvalidArgument, match=f'{kind!r}.*"private" or "public"'):
            devices.open("numpy", machine(), kind=kind)
