"""The format on disk: made, read back, and refused where it contradicts itself."""

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.blkdev import blkdev_open, blkdev_put, submit_bio_wait
from mm.blockfs_extents import Extents
from mm.blockfs_format import (
    INODE,
    NAME_MAX,
    SUPER,
    DiskInode,
    Layout,
    clear_inode,
    encode_inode,
    mkfs,
    read_inodes,
    read_super,
)
from mm.errors import Corrupted, InputOutputError, InvalidArgument
from mm.vmstat import VmStat

SIZES = ["1KiB", "2KiB", "4KiB"]


@pytest.fixture(params=SIZES)
def image(tmp_path, request):
    path = tmp_path / "disk"
    mkfs(path, "1MiB", request.param)
    return path


@pytest.fixture
def bdev(image):
    bdev = blkdev_open(image, VmStat())
    yield bdev
    blkdev_put(bdev)


def extents(count, first):
    """*count* extents of one block each, none of which touch, from block *first* of the device."""
    at = np.arange(count)
    return Extents(2 * at, first + 2 * at, np.ones(count, dtype=np.int64))


def a_file(meta, count=3):
    """A file with *count* extents, and blocks for those that the inode has no room for."""
    first = meta.layout.data
    need = meta.layout.chain_blocks(count)
    return DiskInode("file", 12345, extents(count, first + need), first + np.arange(need))


def store(bdev, meta, ino, inode, *, clean=False):
    chain = encode_inode(meta, ino, inode)
    assert not submit_bio_wait(bdev, "write", inode.chain, chain, np.arange(len(chain))).any()
    used = meta.used()
    used[inode.extents.blocks()] = used[inode.chain] = True
    meta.set_used(used)
    meta.seal(clean=clean)
    meta.commit(bdev)


def patch(path, offset, data):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


class TestMkfs:
    def test_empty(self, image, bdev):
        """Nothing is used but what says what is where."""
        meta = read_super(bdev)

        assert 1 << 20 == image.stat().st_size == meta.layout.blocks * meta.layout.block_size
        assert {} == read_inodes(bdev, meta)
        assert list(range(meta.layout.data)) == np.flatnonzero(meta.used()).tolist()

    def test_parts_do_not_overlap(self):
        """Each begins where the one before it ends, and is large enough."""
        layout = Layout(1024, 1 << 14, 100)

        assert (1, 3, 16, 23) == (layout.bitmap, layout.inode_table, layout.names, layout.data)
        assert (13 * 1024 // INODE.itemsize, 7 * 1024 // NAME_MAX) == (104, 112)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"block_size": 512},
            {"block_size": "8KiB"},
            {"size": 10_000},
            {"size": "8KiB", "inodes": 16},
            {"inodes": 0},
            {"size": "64KiB", "inodes": 4000},
        ],
    )
    def test_wrong_sizes(self, tmp_path, wrong):
        """The message says what is allowed, and no file is made."""
        with pytest.raises(InvalidArgument, match=r"must (have|be)"):
            mkfs(tmp_path / "disk", **{"size": "1MiB"} | wrong)

        assert not (tmp_path / "disk").exists()


class TestInodes:
    @pytest.mark.parametrize("count", [0, 1, 8, 9, 93, 94, 200])
    def test_any_number_of_extents(self, bdev, count):
        """They come back, however many blocks they need."""
        meta = read_super(bdev)
        inode = a_file(meta, min(count, (meta.layout.blocks - meta.layout.data - 4) // 2))
        store(bdev, meta, 3, inode)

        (ino, found), *others = read_inodes(bdev, read_super(bdev)).items()

        assert (3, []) == (ino, others)
        assert ("file", 12345) == (found.name, found.size)
        assert inode.chain.tolist() == found.chain.tolist()
        for name in ("logical", "start", "count"):
            assert getattr(inode.extents, name).tolist() == getattr(found.extents, name).tolist()

    def test_cleared(self, bdev):
        """An inode that is free leaves nothing."""
        meta = read_super(bdev)
        store(bdev, meta, 3, a_file(meta))
        clear_inode(meta, 3)
        meta.commit(bdev)

        assert {} == read_inodes(bdev, read_super(bdev))

    def test_only_what_changed_is_written(self, bdev):
        """A second commit writes nothing, one after a change a single block of each part."""
        meta = read_super(bdev)
        store(bdev, meta, 3, a_file(meta))
        before = bdev.vmstat["pgpgout"]
        meta.commit(bdev)
        assert before == bdev.vmstat["pgpgout"]

        meta.inodes[3]["size"] = 1
        meta.commit(bdev)
        assert before + meta.layout.block_size // 1024 == bdev.vmstat["pgpgout"]

    def test_failed_commit(self, bdev):
        """What could not be written is written by the next."""
        meta = read_super(bdev)
        fault = bdev.fail("write")
        with pytest.raises(InputOutputError, match="of its metadata cannot be written"):
            store(bdev, meta, 3, a_file(meta, 0))
        bdev.faults.remove(fault)
        meta.commit(bdev)

        assert [3] == list(read_inodes(bdev, read_super(bdev)))


class TestRefusal:
    def spoil(self, bdev, meta, change):
        """A file system with one file, of which *change*(meta) has spoiled something."""
        store(bdev, meta, 3, a_file(meta, 30), clean=True)
        change(meta)
        meta.commit(bdev)
        return read_super(bdev)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("size", 1 << 60),
            ("nlink", 7),
            ("nr_extents", 1 << 31),
            ("nr_extents", 900),
            ("chain", 0),
            ("chain", 1 << 30),
            ("chain", 1),
        ],
    )
    def test_inode(self, bdev, field, value):
        """What no file can have is not believed."""

        def change(meta):
            meta.inodes[3][field] = value

        meta = self.spoil(bdev, read_super(bdev), change)
        with pytest.raises(Corrupted) as caught:
            read_inodes(bdev, meta)
        assert 117 == caught.value.errno

    @pytest.mark.parametrize(
        ("field", "value"),
        [("logical", 0), ("start", 0), ("start", 1 << 31), ("count", 0), ("count", 99)],
    )
    def test_extent(self, bdev, field, value):
        """Nor what no extent can be."""

        def change(meta):
            meta.inodes[3]["extents"][2][field] = value

        meta = self.spoil(bdev, read_super(bdev), change)
        with pytest.raises(Corrupted):
            read_inodes(bdev, meta)

    @pytest.mark.parametrize("name", [b"", b"a\0b", b"\xff\xfe"])
    def test_name(self, bdev, name):
        """Nor a name that nobody could have given."""

        def change(meta):
            meta.names[3] = np.frombuffer(name.ljust(NAME_MAX, b"\0"), np.uint8)

        meta = self.spoil(bdev, read_super(bdev), change)
        with pytest.raises(Corrupted):
            read_inodes(bdev, meta)

    def test_two_names_alike(self, bdev):
        """A name means one file."""
        meta = read_super(bdev)
        store(bdev, meta, 3, DiskInode("twin", 0, Extents.none(), np.arange(0)))
        store(bdev, meta, 4, DiskInode("twin", 0, Extents.none(), np.arange(0)))

        with pytest.raises(Corrupted, match="'twin'"):
            read_inodes(bdev, read_super(bdev))

    def test_block_of_two(self, bdev):
        """A block belongs to one file."""
        meta = read_super(bdev)
        store(bdev, meta, 3, a_file(meta))
        store(bdev, meta, 4, DiskInode("other", 0, extents(1, meta.layout.data), np.arange(0)))

        with pytest.raises(Corrupted, match="two owners"):
            read_inodes(bdev, read_super(bdev))

    @pytest.mark.parametrize("clean", [True, False])
    def test_bitmap(self, bdev, clean):
        """It agrees with the inodes; after a crash it is made anew."""
        meta = read_super(bdev)
        store(bdev, meta, 3, a_file(meta), clean=clean)
        right = meta.used()
        meta.set_used(np.ones(meta.layout.blocks, dtype=bool))
        meta.commit(bdev)

        meta = read_super(bdev)
        if clean:
            with pytest.raises(Corrupted, match="bitmap"):
                read_inodes(bdev, meta)
        else:
            read_inodes(bdev, meta)
            assert right.tolist() == meta.used().tolist()

    @pytest.mark.parametrize("offset", range(0, SUPER.itemsize, 4))
    def test_superblock(self, image, offset):
        """Any word of it that has changed is seen."""
        patch(image, offset, b"\xa5\x5a\xa5\x5a")
        bdev = blkdev_open(image, VmStat())

        with pytest.raises((Corrupted, InvalidArgument)):
            read_super(bdev)
        blkdev_put(bdev)

    @pytest.mark.parametrize("nbytes", [0, 100, 1024, 5000, 100_000])
    def test_image_that_was_cut(self, image, nbytes):
        """A file that has lost its end is no file system."""
        image.write_bytes(image.read_bytes()[:nbytes])
        bdev = blkdev_open(image, VmStat())

        with pytest.raises((Corrupted, InvalidArgument)):
            read_super(bdev)
        blkdev_put(bdev)

    def test_device_that_cannot_be_read(self, bdev):
        """EIO is EIO."""
        bdev.fail("read", sectors=[3])

        with pytest.raises(InputOutputError) as caught:
            read_super(bdev)
        assert errno.EIO == caught.value.errno

    @settings(max_examples=200)
    @given(data=st.data())
    def test_garbage(self, tmp_path_factory, data):
        """Whatever stands in the tables, a mount ends: with an error, or with what is sound."""
        path = tmp_path_factory.mktemp("garbage") / "disk"
        mkfs(path, "64KiB", "1KiB", inodes=16)
        bdev = blkdev_open(path, VmStat())
        meta = read_super(bdev)
        store(bdev, meta, 3, a_file(meta, 12))
        meta.inodes[5] = meta.inodes[3]
        words = meta.raw[meta.layout.bitmap :].reshape(-1).view(np.uint32)
        for _ in range(data.draw(st.integers(1, 20))):
            at = data.draw(st.integers(0, words.size - 1) | st.integers(200, 420))
            words[at] = data.draw(st.integers(0, 70) | st.integers(0, (1 << 32) - 1))
        meta.commit(bdev)

        try:
            files = read_inodes(bdev, read_super(bdev))
        except Corrupted:
            return
        finally:
            blkdev_put(bdev)
        taken = np.concatenate([np.arange(0), *(f.extents.blocks() for f in files.values())])
        assert np.unique(taken).size == taken.size
