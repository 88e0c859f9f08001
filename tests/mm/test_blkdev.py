"""A block device, against the bytes of the host's file."""

import errno
import os
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.blkdev import (
    Bio,
    blkdev_open,
    blkdev_put,
    submit_bio,
    submit_bio_wait,
)
from mm.errors import AccessDenied, Busy, InvalidArgument, NoEntry
from mm.vmstat import VmStat

BLOCKS = 64
FINE, EIO, ENOSPC = 0, -errno.EIO, -errno.ENOSPC


@pytest.fixture
def image(tmp_path):
    """A file of 64 blocks of 1 KiB, each filled with its number."""
    path = tmp_path / "disk"
    path.write_bytes(numbered(range(BLOCKS)).tobytes())
    return path


@pytest.fixture
def bdev(image):
    bdev = blkdev_open(image, VmStat())
    yield bdev
    if bdev.fd >= 0:
        blkdev_put(bdev)


def raising(error, *_):
    raise error


def numbered(blocks, size=1024):
    """Contents of *blocks*: uint8[n, size], each its number."""
    return np.repeat(np.array(list(blocks), dtype=np.uint8)[:, None], size, axis=1)


def read(bdev, blocks, rows=None, size=1024):
    """Status of each block, and the memory that they were read into."""
    memory = np.full((BLOCKS, size), 0xEE, dtype=np.uint8)
    rows = np.arange(len(blocks)) if rows is None else np.array(rows)
    status = submit_bio_wait(bdev, "read", np.array(blocks), memory, rows)
    return status.tolist(), memory


def write(bdev, blocks, data, rows=None):
    rows = np.arange(len(blocks)) if rows is None else np.array(rows)
    return submit_bio_wait(bdev, "write", np.array(blocks), data, rows).tolist()


class TestOpen:
    def test_size(self, bdev):
        """The device is as large as the file."""
        assert BLOCKS * 1024 == bdev.nbytes
        assert "<BlockDevice disk, 128 sectors>" == repr(bdev)

    @pytest.mark.parametrize("name", ["", "nothing"])
    def test_no_file(self, tmp_path, name):
        """A folder is no disk, nor is nothing."""
        with pytest.raises(NoEntry, match="no file that could hold a disk"):
            blkdev_open(tmp_path / name, VmStat())

    def test_in_use(self, bdev, image):
        """A device has one user at a time."""
        with pytest.raises(Busy, match="in use"):
            blkdev_open(image, VmStat())

    def test_not_allowed(self, tmp_path, monkeypatch):
        """What the host does not let us write is no device of ours."""
        (tmp_path / "disk").write_bytes(bytes(1024))
        refuse = partial(raising, PermissionError(errno.EACCES, "no"))
        monkeypatch.setattr("os.open", refuse)
        with pytest.raises(AccessDenied, match="cannot be opened: no"):
            blkdev_open(tmp_path / "disk", VmStat())


class TestTransfer:
    def test_run_of_blocks_is_one_system_call(self, bdev):
        """Blocks that follow one another move at once, also to scattered memory."""
        rows = [9, 3, 4, 20]
        status, memory = read(bdev, [5, 6, 7, 8], rows)

        assert [FINE] * 4 == status
        assert (numbered([5, 6, 7, 8]) == memory[rows]).all()
        assert {"read": 1, "write": 0} == bdev.ios
        assert 4 == bdev.vmstat["pgpgin"]

    def test_many_stretches_of_memory(self, bdev):
        """The host takes 1024 stretches in one call."""
        memory = np.zeros((2 * BLOCKS * 1024 // 512, 512), dtype=np.uint8)
        blocks = np.arange(BLOCKS * 2)
        status = submit_bio_wait(bdev, "read", blocks, memory, blocks[::-1] * 2)

        assert not status.any()
        assert (memory[::2][::-1] == np.repeat(numbered(range(BLOCKS), 512), 2, axis=0)).all()
        assert 1 == bdev.ios["read"]

    def test_write(self, bdev, image):
        """What was written is in the file."""
        assert [FINE] * 3 == write(bdev, [40, 2, 41], numbered([1, 2, 3]))

        found = np.frombuffer(image.read_bytes(), dtype=np.uint8).reshape(-1, 1024)
        assert [1, 2, 3] == found[[40, 2, 41], 7].tolist()
        assert 2 == bdev.ios["write"]
        assert 3 == bdev.vmstat["pgpgout"]

    @given(order=st.permutations(range(BLOCKS)), count=st.integers(1, BLOCKS))
    def test_any_order(self, tmp_path_factory, order, count):
        """Blocks in any order come back from where they were written to."""
        path = tmp_path_factory.mktemp("disk") / "disk"
        path.write_bytes(bytes(BLOCKS * 1024))
        bdev = blkdev_open(path, VmStat())
        write(bdev, order[:count], numbered(range(BLOCKS)))

        status, memory = read(bdev, sorted(order[:count]))

        assert not any(status)
        twin = dict(zip(order[:count], range(count), strict=True))
        assert [twin[block] for block in sorted(twin)] == memory[:count, 0].tolist()
        blkdev_put(bdev)

    def test_nothing(self, bdev):
        """A bio without blocks ends at once."""
        heard = []
        none = np.zeros(0, dtype=np.int64)
        submit_bio(bdev, Bio("read", none, numbered([0]), none, heard.append))

        assert [0] == [status.size for status in heard]


class TestFailures:
    def test_past_the_end(self, bdev):
        """What lies past the end fails, what is before it does not."""
        assert [FINE, FINE, EIO, EIO] == read(bdev, [62, 63, 64, 65])[0]
        assert [EIO] == read(bdev, [-1])[0]

    def test_file_that_became_shorter(self, bdev, image):
        """Reads of what the host has lost fail."""
        os.truncate(image, 10 * 1024 + 100)

        status, memory = read(bdev, [8, 9, 10, 11])

        assert [FINE, FINE, EIO, EIO] == status
        assert (numbered([8, 9]) == memory[:2]).all()

    def test_sectors(self, bdev):
        """Blocks fail that hold a sector which does; the others are read."""
        bdev.fail("read", sectors=range(12, 15))  # of two to a block

        status, memory = read(bdev, [4, 5, 6, 7, 8])

        assert [FINE, FINE, EIO, EIO, FINE] == status
        assert [4, 5, 0xEE, 0xEE, 8] == memory[:5, 0].tolist()
        assert [FINE] == write(bdev, [6], numbered([1]))

    def test_nth_block(self, bdev):
        """Only that one, counted over all calls since it was armed."""
        bdev.fail("write", nth=3)

        assert [FINE, FINE] == write(bdev, [1, 2], numbered([1, 2]))
        assert [EIO, FINE] == write(bdev, [1, 2], numbered([1, 2]))
        assert [FINE, FINE, FINE] == write(bdev, [1, 2, 3], numbered([1, 2, 3]))

    def test_full_device(self, bdev):
        """A failure may be of another kind, and ends when it is taken away."""
        fault = bdev.fail("write", error=errno.ENOSPC)
        assert [ENOSPC] == write(bdev, [1], numbered([1]))

        bdev.faults.remove(fault)
        assert [FINE] == write(bdev, [1], numbered([1]))

    def test_error_of_the_host(self, bdev, image):
        """What the host fails is EIO."""
        os.close(bdev.fd)
        bdev.fd = os.open(image, os.O_RDONLY)

        assert [EIO, EIO] == write(bdev, [1, 2], numbered([1, 2]))

    @pytest.mark.parametrize(
        "wrong", [{"op": "erase"}, {"op": "read", "nth": 0}, {"op": "read", "error": -5}]
    )
    def test_wrong_arming(self, bdev, wrong):
        """And the message says what is allowed."""
        with pytest.raises(InvalidArgument, match='op is "read" or "write"'):
            bdev.fail(**wrong)


class TestHold:
    def submit(self, bdev, op, block, heard):
        end_io = lambda status: heard.append((block, status.tolist()))  # noqa: E731
        submit_bio(bdev, Bio(op, np.array([block]), numbered([7]), np.array([0]), end_io))

    def test_writes_wait(self, bdev, image):
        """They are done in the order in which they were submitted, when the test says so."""
        heard = []
        with bdev.hold():
            for block in (3, 1, 2):
                self.submit(bdev, "write", block, heard)
            assert [] == heard
            assert 1 == image.read_bytes()[1024]

            assert 1 == bdev.complete(1)
            assert [(3, [FINE])] == heard
        assert [(3, [FINE]), (1, [FINE]), (2, [FINE])] == heard
        assert 7 == image.read_bytes()[1024]

    def test_reads_do_not(self, bdev):
        """They have no page that a test could watch being written."""
        heard = []
        with bdev.hold():
            self.submit(bdev, "read", 3, heard)
            assert [(3, [FINE])] == heard

    def test_close(self, bdev, image):
        """What waits when the device goes is done."""
        heard = []
        bdev.holding = True
        self.submit(bdev, "write", 3, heard)
        blkdev_put(bdev)

        assert [(3, [FINE])] == heard
