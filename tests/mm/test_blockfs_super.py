"""Which block is whose, and what a commit makes of that on the device."""

import shutil

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mm.blkdev import blkdev_open, blkdev_put
from mm.blockfs_format import mkfs, read_super
from mm.blockfs_super import BlockSuper
from mm.errors import InputOutputError, NoSpace
from mm.fs import FileOperations, Inode, InodeOperations, iput
from mm.page_cache import set_page_dirty_nobuffers
from mm.types import AddressSpaceOperations
from tests.world import mapped_range


def new_inode(mem):
    """An inode without pages, whose mapping a commit may look at."""
    iops = InodeOperations(setattr=lambda inode, size: None, evict_inode=lambda inode: None)
    aops = AddressSpaceOperations(set_page_dirty=set_page_dirty_nobuffers)
    return Inode(mem, iops, FileOperations(), aops)


class Image:
    """A mounted image, and its twin after a crash."""

    def __init__(self, mem, path, size="256KiB", block_size=1024, inodes=16):
        mkfs(path, size, block_size, inodes)
        self.mem, self.path, self.inode = mem, path, new_inode(mem)
        self.super = self.open(path)

    def open(self, path):
        bdev = blkdev_open(path, self.mem.vmstat)
        return BlockSuper(self.mem, bdev, read_super(bdev))

    def crashed(self):
        """What a mount would find if everything ended now: names, sizes, blocks."""
        copy = self.path.with_suffix(".copy")
        shutil.copy(self.path, copy)
        found = self.open(copy)
        blkdev_put(found.s_bdev)
        return {f.name: (f.size, dict_of(f.extents)) for f in found.files.values()}

    def fill(self, ino, *blocks):
        """Give *blocks* of a file room; how many got it."""
        blocks = np.array(blocks, dtype=np.int64)
        found, _ = self.super.map_blocks(ino, self.inode.i_mapping, blocks, create=True)
        return np.count_nonzero(found >= 0)

    def close(self):
        blkdev_put(self.super.s_bdev)
        iput(self.inode)


def dict_of(extents):
    at = np.arange(extents.end)
    return {a: b for a, b in zip(at.tolist(), extents.lookup(at).tolist(), strict=True) if b >= 0}


@pytest.fixture
def image(tmp_path):
    image = Image(mapped_range(pages=1).machine.mem, tmp_path / "disk")
    yield image
    image.super.s_bdev.faults.clear()
    image.close()


class TestMapBlocks:
    def test_holes(self, image):
        """Nothing is found where nothing was made."""
        ino = image.super.new_file("f")
        blocks = np.array([0, 5])
        found, new = image.super.map_blocks(ino, image.inode.i_mapping, blocks, create=False)

        assert ([-1, -1], [False, False]) == (found.tolist(), new.tolist())

    def test_blocks_follow_one_another(self, image):
        """A file grows where it ends, and what is new is said to be so."""
        ino = image.super.new_file("f")
        image.fill(ino, 0, 1, 2)
        blocks = np.array([4, 2, 3])
        found, new = image.super.map_blocks(ino, image.inode.i_mapping, blocks, create=True)

        first = image.super.layout.data
        assert [first + 4, first + 2, first + 3] == found.tolist()
        assert [True, False, True] == new.tolist()
        assert 1 == image.super.files[ino].extents.size

    def test_full(self, image):
        """The first holes get what there is."""
        ino = image.super.new_file("f")
        room = image.super.nr_free

        assert room - 3 == image.fill(ino, *range(room - 3))
        assert 3 == image.fill(ino, *range(room - 3, room + 5))
        assert list(range(room)) == list(dict_of(image.super.files[ino].extents))
        assert 0 == image.super.nr_free

    def test_no_room_for_the_extents(self, image):
        """Blocks that could not be found again are not given."""
        ino, other = image.super.new_file("f"), image.super.new_file("g")
        image.fill(ino, *range(0, 16, 2))  # eight extents: all that the inode has room for
        image.fill(other, *range(image.super.nr_free - 1))

        assert 0 == image.fill(ino, 20)
        assert (8, 1) == (image.super.files[ino].extents.size, image.super.nr_free)
        assert 1 == image.fill(other, 500)

    def test_many_extents(self, image):
        """They are found again."""
        ino = image.super.new_file("f")
        image.fill(ino, *range(0, 200, 2))
        image.super.set_size(ino, 200_000)
        image.super.commit()

        assert 100 == image.super.files[ino].extents.size
        assert 2 == image.super.files[ino].chain.size
        assert {"f": (200_000, dict_of(image.super.files[ino].extents))} == image.crashed()


class TestCommit:
    def test_nothing_before(self, image):
        """What was not committed is not there after a crash."""
        image.super.new_file("f")
        assert {} == image.crashed()

        image.super.commit()
        assert {"f": (0, {})} == image.crashed()

    def test_freed_blocks_wait(self, image):
        """Until the device knows that a file has lost them, they are nobody's."""
        ino = image.super.new_file("f")
        room = image.super.nr_free
        image.fill(ino, *range(room))
        image.super.commit()
        image.super.truncate(ino, room - 5)

        assert 5 == image.super.nr_free
        assert 0 == image.fill(ino, room)
        image.super.commit()
        assert 5 == image.fill(ino, *range(room, room + 9))

    def test_failure(self, image):
        """What could not be written is written by the next commit; freed blocks wait till then."""
        ino = image.super.new_file("f")
        image.fill(ino, *range(0, 40, 2))
        image.super.commit()
        before = image.crashed()
        image.super.truncate(ino, 30)
        fault = image.super.s_bdev.fail("write")
        with pytest.raises(InputOutputError):
            image.super.commit()
        assert before == image.crashed()

        image.super.s_bdev.faults.remove(fault)
        image.super.commit()
        assert 15 == len(image.crashed()["f"][1])
        assert [] == image.super.freed

    def test_clean(self, image):
        """Only an image that was unmounted is believed to the last bit."""
        image.super.commit(clean=True)
        assert 1 == read_super(image.super.s_bdev).super["clean"].item()
        image.super.commit()
        assert 0 == read_super(image.super.s_bdev).super["clean"].item()


class TestFiles:
    def test_no_inode(self, image):
        """There are as many files as the image was made for."""
        for number in range(16):
            image.super.new_file(str(number))
        with pytest.raises(NoSpace, match="all 16 inodes are used"):
            image.super.new_file("one more")

    def test_unlinked(self, image):
        """A file without a name is not found after a crash; its blocks are free when it goes."""
        ino = image.super.new_file("f")
        image.fill(ino, 1, 2)
        image.super.commit()
        room = image.super.nr_free
        image.super.unlink("f")
        image.super.commit()
        assert {} == image.crashed()
        assert room == image.super.nr_free

        image.super.free_file(ino)
        image.super.commit()
        assert room + 2 == image.super.nr_free


class Blocks(RuleBasedStateMachine):
    """Files that grow, shrink and go: a block has one owner, in memory and after any crash."""

    @initialize(tmp=st.just(None))
    def boot(self, tmp):
        world = mapped_range(pages=1)
        Blocks.serial += 1
        self.image = Image(world.machine.mem, Blocks.folder / f"disk{Blocks.serial}", "64KiB")
        self.names, self.committed = {}, {}

    @rule(name=st.sampled_from("abcd"))
    def create(self, name):
        if name not in self.names:
            self.names[name] = self.image.super.new_file(name)

    @rule(name=st.sampled_from("abcd"), first=st.integers(0, 60), step=st.integers(1, 3))
    def grow(self, name, first, step):
        if name in self.names:
            self.image.fill(self.names[name], *range(first, first + 12 * step, step))
            self.image.super.set_size(self.names[name], first)

    @rule(name=st.sampled_from("abcd"), first=st.integers(0, 80))
    def shrink(self, name, first):
        if name in self.names:
            self.image.super.truncate(self.names[name], first)

    @rule(name=st.sampled_from("abcd"))
    def remove(self, name):
        if name in self.names:
            self.image.super.unlink(name)
            self.image.super.free_file(self.names.pop(name))

    @rule(fails=st.integers(0, 3))
    def commit(self, fails):
        if fails:
            self.image.super.s_bdev.fail("write", nth=fails)
        try:
            self.image.super.commit()
            self.committed = self.now()
        except InputOutputError:
            self.image.super.s_bdev.faults.clear()
            self.image.super.commit()
            self.committed = self.now()
        self.image.super.s_bdev.faults.clear()

    @invariant()
    def a_crash_shows_the_last_commit(self):
        assert self.committed == self.image.crashed()

    @invariant()
    def blocks_have_one_owner(self):
        files, sb = self.image.super.files.values(), self.image.super
        taken = [np.arange(sb.layout.data), *sb.freed]
        taken += [part for f in files for part in (f.extents.blocks(), f.chain)]
        taken = np.concatenate(taken)
        assert np.unique(taken).size == taken.size == np.count_nonzero(sb.used)

    def now(self):
        files = self.image.super.files.values()
        return {f.name: (f.size, dict_of(f.extents)) for f in files}

    def teardown(self):
        if hasattr(self, "image"):
            self.image.close()


class TestBlocks(Blocks.TestCase):
    settings = settings(max_examples=30, stateful_step_count=25)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        Blocks.folder, Blocks.serial = tmp_path, 0
