"""Files on a block device: what is stored is there, after a remount and after a crash."""

import errno
import shutil

import numpy as np
import pytest

from mm import PAGE_SIZE, Machine
from mm.blockfs_format import mkfs
from mm.errors import (
    Busy,
    Corrupted,
    Exists,
    FileTooLarge,
    InputOutputError,
    InvalidArgument,
    NoEntry,
    NoSpace,
)
from mm.page_flags import PG_dirty, PG_uptodate
from mm.typing import pages
from tests.world import mapped_range

SIZES = ["1KiB", "2KiB", "4KiB"]


@pytest.fixture
def machine():
    return mapped_range(pages=1, nodes=("16MiB",)).machine


@pytest.fixture
def mount(machine, tmp_path):
    """Mounts a disk of 1 MiB, again and again; unmounts all when the test ends."""

    def mount(block_size=None, name="disk", **options):
        return machine.mount(tmp_path / name, block_size, "1MiB", **options)

    yield mount
    for fs in tuple(machine.mem.super_blocks):
        fs.device.faults.clear()
        for file in tuple(machine.mem.files):
            file.close()
        fs.unmount()


@pytest.fixture(params=SIZES)
def fs(mount, request):
    return mount(request.param)


def noise(nbytes, seed=1):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def after_crash(fs, tmp_path):
    """All files of a copy of the image as it is now, by name."""
    shutil.copy(tmp_path / fs.device.name, tmp_path / "crashed")
    machine = Machine(("16MiB",))
    with machine.mount(tmp_path / "crashed") as copy:
        found = {}
        for name in copy.listdir():
            with copy.open(name) as file:
                found[name] = file.read(0, file.size)
    machine.verify()
    return found


class TestMount:
    def test_new_image(self, mount, machine, tmp_path):
        """Where no file is, one is made; the size of its blocks is known from then on."""
        with mount("2KiB") as fs:
            assert "<BlockFs disk, 1 MiB in blocks of 2048>" == repr(fs)
            assert [] == fs.listdir()
        assert 1 << 20 == (tmp_path / "disk").stat().st_size

        with mount() as fs:
            assert 2048 == fs.super.layout.block_size
        assert [] == machine.mem.super_blocks

    def test_other_blocks(self, mount):
        """An image has blocks of one size."""
        mount("2KiB").unmount()
        with pytest.raises(InvalidArgument, match="has blocks of 2048 bytes, not of 1024"):
            mount("1KiB")

    def test_twice(self, mount):
        """A device is mounted once."""
        fs = mount()
        with pytest.raises(Busy):
            mount()
        fs.unmount()
        mount()

    def test_garbage(self, mount, machine, tmp_path):
        """What is no file system is not mounted, and not held open."""
        (tmp_path / "disk").write_bytes(noise(1 << 20))
        with pytest.raises(InvalidArgument, match="no blockfs"):
            mount()
        assert [] == machine.mem.super_blocks
        mkfs(tmp_path / "disk", "1MiB")
        mount()

    def test_half_garbage(self, mount, tmp_path):
        """Nor what only begins like one."""
        mkfs(tmp_path / "disk", "1MiB")
        raw = bytearray((tmp_path / "disk").read_bytes())
        raw[4096:] = noise(len(raw) - 4096)
        (tmp_path / "disk").write_bytes(raw)
        with pytest.raises(Corrupted):
            mount()

    def test_device_that_cannot_be_read(self, mount, tmp_path):
        """A file of the host that became shorter is not a disk any more."""
        mkfs(tmp_path / "disk", "1MiB")
        (tmp_path / "disk").write_bytes((tmp_path / "disk").read_bytes()[:8192])
        with pytest.raises(Corrupted):
            mount()

    def test_machine_without_contents(self, tmp_path):
        """It has no bytes that it could store."""
        with pytest.raises(InvalidArgument, match="payload=True"):
            Machine(("16MiB",), payload=False).mount(tmp_path / "disk")
        assert not (tmp_path / "disk").exists()

    def test_open_file(self, fs):
        """What somebody has open keeps the file system mounted; unlinked or not."""
        file = fs.create("a")
        fs.unlink("a")
        with pytest.raises(Busy, match="still open"):
            fs.unmount()
        file.close()
        fs.unmount()
        fs.unmount()
        with pytest.raises(InvalidArgument, match="is unmounted"):
            fs.create("b")


class TestNames:
    def test_create_open_unlink(self, fs):
        """A file is found by its name until that is taken away."""
        with fs.create("a") as file:
            file.write(0, b"first")
        with pytest.raises(Exists):
            fs.create("a")
        with fs.open("a") as file:
            assert b"first" == file.read(0, 99)
        fs.create("b").close()
        assert ["a", "b"] == fs.listdir()

        fs.unlink("a")
        assert ["b"] == fs.listdir()
        for call in (fs.open, fs.unlink):
            with pytest.raises(NoEntry, match="no file 'a'"):
                call("a")

    @pytest.mark.parametrize("name", ["", "a/b", "a\0", "x" * 65, "ä" * 33])
    def test_no_name(self, fs, name):
        """A name has 1 to 64 bytes."""
        with pytest.raises(InvalidArgument, match="is no name"):
            fs.create(name)

    def test_unlinked_while_open(self, fs, machine):
        """Its bytes are there as long as it is open; then its blocks are free."""
        room = fs.free_bytes
        file = fs.create("a")
        data = noise(50_000)
        file.write(0, data)
        file.fsync()
        fs.unlink("a")
        assert data == file.read(0, 99_999)
        assert room > fs.free_bytes
        file.close()
        assert room == fs.free_bytes
        assert 0 == machine.vmstat["nr_file_pages"]

    def test_no_inode(self, mount, tmp_path):
        """There is room for as many files as the image was made for."""
        mkfs(tmp_path / "disk", "1MiB", inodes=2)
        fs = mount()
        fs.create("a").close()
        fs.create("b").close()
        with pytest.raises(NoSpace):
            fs.create("c")


class TestReadAndWrite:
    def test_bytes(self, fs, machine):
        """What is written is read, and the rest is zeros up to the end of the file."""
        with fs.create("a") as file:
            assert 3 == file.write(5_000, b"abc")
            assert 5_003 == file.size
            assert bytes(5_000) + b"abc" == file.read(0, 10_000)
            assert b"" == file.read(6_000, 10)
            machine.verify()

    def test_remount(self, fs, mount):
        """All of it is there after a remount, with sizes that are no multiple of anything."""
        data = {f"file {n}": noise(n * 7_777 + n, n) for n in range(7)}
        for name, content in data.items():
            with fs.create(name) as file:
                file.write(0, content)
        fs.unmount()

        fs = mount()
        for name, content in data.items():
            with fs.open(name) as file:
                assert content == file.read(0, 99_999)

    def test_holes(self, fs):
        """A hole takes no room, and reads as zeros; what is written to it does not change that."""
        room = fs.free_bytes
        with fs.create("a") as file:
            file.truncate("900KiB")
            assert bytes(100_000) == file.read(50_000, 100_000)
            assert room == fs.free_bytes
            file.write(500_000, b"x")
            assert room - fs.super.layout.block_size == fs.free_bytes
            assert bytes(100) + b"x" + bytes(100) == file.read(499_900, 201)

    def test_cached(self, fs, mount, machine):
        """What is in memory is not read again; what is not is read in few calls."""
        with fs.create("a") as file:
            file.write(0, noise(300_000))
        fs.unmount()
        fs = mount()
        with fs.open("a") as file:
            before = fs.device.ios["read"]
            with machine.vmstat.counting("pgpgin") as delta:
                file.read(0, 300_000)
            assert 292 < delta["pgpgin"] <= 300
            assert fs.device.ios["read"] - before <= 4
            with machine.vmstat.counting("pgpgin") as delta:
                file.read(0, 300_000)
            assert {"pgpgin": 0} == delta

    def test_closed_and_opened(self, fs, machine):
        """Closing forgets nothing, and stores nothing."""
        with fs.create("a") as file:
            file.write(0, b"abc")
        with machine.vmstat.counting("pgpgout", "pgpgin") as delta, fs.open("a") as file:
            assert b"abc" == file.read(0, 3)
        assert {"pgpgout": 0, "pgpgin": 0} == delta

    def test_too_large(self, fs):
        """A file ends where block numbers do."""
        with fs.create("a") as file:
            most = fs.super.layout.max_bytes
            for grow in (lambda: file.truncate(most + 1), lambda: file.write(most, b"x")):
                with pytest.raises(FileTooLarge):
                    grow()
            file.truncate(most)
            assert b"\0" == file.read(most - 1, 5)


class TestFsync:
    def test_crash(self, fs, tmp_path):
        """After a crash a file is as it was when it was fsynced."""
        data = noise(70_000)
        with fs.create("a") as one, fs.create("b") as other:
            one.write(0, data)
            one.fsync()
            one.write(10, b"changed")
            other.write(0, data)
            assert {"a": data, "b": b""} == after_crash(fs, tmp_path) | {"b": b""}
            other.fsync()
            one.fsync()
            assert data[:10] + b"changed" + data[17:] == after_crash(fs, tmp_path)["a"]
            assert data == after_crash(fs, tmp_path)["b"]

    def test_truncate_and_unlink(self, fs, tmp_path):
        """What was cut off or unlinked is gone once that is stored, and not before."""
        with fs.create("a") as file:
            file.write(0, noise(20_000))
            fs.create("b").close()
            fs.sync()
            file.truncate(3_333)
            fs.unlink("b")
            assert [20_000, 0] == [len(data) for data in after_crash(fs, tmp_path).values()]
            file.fsync()
            assert {"a": noise(20_000)[:3_333]} == after_crash(fs, tmp_path)

    def test_blocks_of_another(self, fs, tmp_path):
        """A file that was unlinked lives on after a crash, whoever has got room since."""
        with fs.create("old") as old:
            old.write(0, noise(700_000))
        fs.sync()
        fs.unlink("old")
        with fs.create("new") as new:
            new.write(0, noise(200_000, 2))
            assert {"old": noise(700_000)} == after_crash(fs, tmp_path)
            new.write(200_000, noise(500_000, 3))  # needs blocks of the old one
            assert {"new"} == set(after_crash(fs, tmp_path))
            new.fsync()
        assert {"new": noise(200_000, 2) + noise(500_000, 3)} == after_crash(fs, tmp_path)


class TestTruncate:
    @pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 4095, 4096, 4097, 9_999])
    def test_cut_and_grown(self, fs, machine, size, mount):
        """What was cut off is zeros when the file grows again, in memory and on the device."""
        data = noise(10_000)
        with fs.create("a") as file:
            file.write(0, data)
            file.fsync()
            file.truncate(size)
            file.truncate(12_000)
            expected = data[:size] + bytes(12_000 - size)
            assert expected == file.read(0, 12_000)
            machine.verify()
        fs.unmount()
        fs = mount()
        with fs.open("a") as file:
            assert expected == file.read(0, 12_000)

    def test_not_in_memory(self, fs, mount):
        """The block that the end is in is read, for the device to have zeros in it."""
        with fs.create("a") as file:
            file.write(0, noise(10_000))
        fs.unmount()
        with (fs := mount()).open("a") as file:
            file.truncate(5_555)
            file.truncate(6_000)
        fs.unmount()
        with mount().open("a") as file:
            assert noise(10_000)[:5_555] + bytes(445) == file.read(0, 9_999)

    def test_cannot_be_read(self, fs, mount):
        """Then the file stays as it is."""
        with fs.create("a") as file:
            file.write(0, noise(10_000))
        fs.unmount()
        fs = mount()
        with fs.open("a") as file:
            fs.device.fail("read")
            with pytest.raises(InputOutputError):
                file.truncate(5_555)
            fs.device.faults.clear()
            assert noise(10_000) == file.read(0, 10_000)

    def test_gives_room(self, fs):
        """Its blocks are free at the next commit, or when somebody needs them."""
        room = fs.free_bytes
        with fs.create("a") as file, fs.create("b") as other:
            file.write(0, bytes(room // 2))
            other.write(0, b"x")
            file.truncate(0)
            size = other.write(0, noise(room))
            size += other.write(size, noise(room)[size:])
            assert room == size
            with pytest.raises(NoSpace):
                other.write(room, b"x")


class TestFull:
    def test_write(self, fs, mount):
        """The first bytes are stored; the next write says that there is no room."""
        room = fs.free_bytes // PAGE_SIZE * PAGE_SIZE  # a page has room, or has not
        with fs.create("a") as file, fs.create("b") as other:
            other.write(0, noise(fs.free_bytes - room))
            assert room == file.write(0, noise(room + 5_000))
            assert (room, 0) == (file.size, fs.free_bytes)
            with pytest.raises(NoSpace) as caught:
                file.write(room, b"x")
            assert errno.ENOSPC == caught.value.errno
            assert noise(room + 5_000)[:room] == file.read(0, room + 9)
            file.write(100, b"in the middle there is room")
            file.fsync()
        fs.unmount()
        with mount().open("a") as file:
            assert room == file.size
            assert b"there is room" == file.read(114, 13)

    def test_hole_in_the_middle(self, fs):
        """What could not be written is a hole still."""
        with fs.create("a") as file, fs.create("b") as other:
            file.truncate(40_000)
            other.write(0, noise(fs.free_bytes - 4_096))
            assert 4_096 == file.write(8_192, noise(20_000))
            assert noise(20_000)[:4_096] + bytes(20_000) == file.read(8_192, 24_096)


class TestErrors:
    def test_read(self, fs, mount):
        """A read gives what comes before, then EIO; it works again when the device does."""
        with fs.create("a") as file:
            file.write(0, noise(40_000))
        fs.unmount()
        fs = mount()
        with fs.open("a") as file:
            (where,) = fs.super.files[file.f_inode.i_ino].extents.lookup(
                pages(20_000 // fs.super.layout.block_size)
            )
            per_block = fs.super.layout.block_size // 512
            fs.device.fail("read", sectors=range(where * per_block, (where + 1) * per_block))

            assert noise(40_000)[:16_384] == file.read(0, 40_000)
            with pytest.raises(InputOutputError) as caught:
                file.read(20_000, 10)
            assert errno.EIO == caught.value.errno
            assert noise(40_000)[24_576:] == file.read(24_576, 40_000)
            fs.device.faults.clear()
            assert noise(40_000) == file.read(0, 40_000)

    def test_partial_write(self, fs, mount):
        """Bytes cannot be put in the middle of a block that cannot be read."""
        with fs.create("a") as file:
            file.write(0, noise(10_000))
        fs.unmount()
        fs = mount()
        with fs.open("a") as file:
            fs.device.fail("read")
            with pytest.raises(InputOutputError):
                file.write(10, b"x")
            assert 4096 == file.write(0, bytes(4096))
            fs.device.faults.clear()
            assert bytes(4096) + noise(10_000)[4096:] == file.read(0, 10_000)

    def test_fsync(self, fs, machine, tmp_path):
        """Each who has the file open hears of it once; the page is clean, and has what it had."""
        one, other = fs.create("a"), fs.open("a")
        one.write(0, noise(5_000))
        one.fsync()
        one.write(0, b"lost")
        fs.device.fail("write")
        for file in (one, other):
            with pytest.raises(InputOutputError):
                file.fsync()
        fs.device.faults.clear()
        for file in (one, other, fs.open("a")):
            file.fsync()
        (pfn, _) = one.f_mapping.i_pages.load(pages(0, 1))
        assert PG_uptodate == machine.mem.flags[pfn] & (PG_uptodate | PG_dirty)
        assert b"lost" == one.read(0, 4)
        assert noise(5_000) == after_crash(fs, tmp_path)["a"]
        machine.verify()

    def test_full_device(self, fs):
        """A device that has no room left says so."""
        with fs.create("a") as file:
            file.write(0, noise(5_000))
            fs.device.fail("write", error=errno.ENOSPC)
            with pytest.raises(NoSpace):
                file.fsync()
            fs.device.faults.clear()

    def test_metadata(self, fs, tmp_path):
        """What says where the file is cannot be written: fsync fails, and the next one does it."""
        with fs.create("a") as file:
            file.write(0, b"abc")
            first = fs.super.layout.data * fs.super.layout.block_size // 512
            fs.device.fail("write", sectors=range(first))
            with pytest.raises(InputOutputError, match="metadata"):
                file.fsync()
            assert {} == after_crash(fs, tmp_path)
            fs.device.faults.clear()
            file.fsync()
            assert {"a": b"abc"} == after_crash(fs, tmp_path)

    def test_unmount(self, fs, machine):
        """It is unmounted all the same, and says that something was lost."""
        with fs.create("a") as file:
            file.write(0, b"abc")
        fs.device.fail("write")
        with pytest.raises(InputOutputError):
            fs.unmount()
        assert [] == machine.mem.super_blocks
        assert 0 == machine.vmstat["nr_file_pages"]

    def test_page_size(self):
        """Pages are of four blocks of 1 KiB, in these tests."""
        assert 4096 == PAGE_SIZE
