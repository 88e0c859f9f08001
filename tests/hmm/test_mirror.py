"""Mirrors hear what to forget, of changes and of the end."""

from __future__ import annotations

import errno

import pytest

from hmm import (
    HmmMirror,
    HmmUpdate,
    hmm_mirror_register,
    hmm_mirror_unregister,
)
from mm import (
    PAGE_SIZE,
    Deadlock,
    DriverBug,
    InvalidArgument,
    WouldBlock,
)
from tests.hmm.watch import MirrorOps, change, mirror_of
from tests.world import mapped_range


@pytest.fixture
def world():
    """Three pages, and a mirror of their process as `world.mirror`."""
    world = mapped_range(pages=3)
    world.mirror = mirror_of(world.process.mm)
    yield world
    hmm_mirror_unregister(world.mirror)


class TestMirrors:
    def test_change(self, world):
        """A mirror hears of a change once, when it begins."""
        world.process.munmap(world.at(1), PAGE_SIZE)

        assert [HmmUpdate(world.at(1), world.at(2))] == world.mirror.ops.heard

    def test_two_mirrors_of_a_process(self, world):
        """Both hear; when one is gone the other hears on."""
        other = mirror_of(world.process.mm)
        change(world.process.mm, 0, 9)
        hmm_mirror_unregister(world.mirror)
        change(world.process.mm, 10, 19)

        assert [HmmUpdate(0, 9)] == world.mirror.ops.heard
        assert [HmmUpdate(0, 9), HmmUpdate(10, 19)] == other.ops.heard
        hmm_mirror_unregister(other)

    def test_last_mirror(self, world):
        """Nothing is left of HMM in an address space without mirrors, until there is one again."""
        mm = world.process.mm
        hmm_mirror_unregister(world.mirror)
        assert (None, []) == (mm.hmm, mm.notifiers)

        hmm_mirror_unregister(world.mirror)
        again = mirror_of(mm)
        change(mm, 0, 9)

        assert [HmmUpdate(0, 9)] == again.ops.heard
        hmm_mirror_unregister(again)

    def test_exit(self, world):
        """Every mirror is released, in its turn no mirror of anything."""
        other = mirror_of(world.process.mm)

        world.process.exit()

        assert ["release"] == world.mirror.ops.heard == other.ops.heard
        assert world.mirror.hmm is other.hmm is None

    def test_release_that_raises(self, world):
        """The others are released, and the process is gone."""
        other = mirror_of(world.process.mm)
        other.ops.release = lambda mirror: 1 / 0
        with pytest.raises(ZeroDivisionError):
            world.process.exit()

        assert ["release"] == world.mirror.ops.heard

    def test_release_that_unregisters(self, world):
        """A driver may drop its mirror there, and other mirrors of the process."""
        other = mirror_of(world.process.mm)
        other.ops.release = lambda mirror: [hmm_mirror_unregister(m) for m in (other, world.mirror)]

        world.process.exit()

        assert [] == world.mirror.ops.heard

    def test_sync_that_unregisters(self, world):
        """It would wait for itself, and is told so."""
        world.mirror.ops.sync_cpu_device_pagetables = lambda mirror, update: hmm_mirror_unregister(
            mirror
        )
        with pytest.raises(Deadlock, match="mirrors_sem"):
            change(world.process.mm, 0, 9)

    def test_registering_a_mirror_twice(self, world):
        """One mirror, one address space."""
        mm = world.machine.spawn("other").mm
        with mm.mmap_sem.write(), pytest.raises(InvalidArgument, match="already"):
            hmm_mirror_register(world.mirror, mm)

    def test_registering_without_the_lock(self, world):
        """mmap_sem is held for write; reading is not enough."""
        mirror, mm = HmmMirror(MirrorOps()), world.process.mm
        with pytest.raises(InvalidArgument, match="for write"):
            hmm_mirror_register(mirror, mm)
        with mm.mmap_sem.read(), pytest.raises(InvalidArgument, match="for write"):
            hmm_mirror_register(mirror, mm)

    def test_process_that_has_exited(self, world):
        """There is nothing to mirror."""
        world.process.exit()
        mm = world.process.mm
        with mm.mmap_sem.write(), pytest.raises(InvalidArgument, match="has exited"):
            hmm_mirror_register(HmmMirror(MirrorOps()), mm)


class TestAnswers:
    def test_would_block(self, world):
        """-EAGAIN ends a change that may not wait."""
        world.mirror.ops.answer = -errno.EAGAIN
        with pytest.raises(WouldBlock):
            change(world.process.mm, 0, 9, blockable=False)

        assert [HmmUpdate(0, 9, blockable=False)] == world.mirror.ops.heard

    @pytest.mark.parametrize(
        ("answer", "blockable"), [(-errno.EAGAIN, True), (-errno.EINVAL, False), (1, True)]
    )
    def test_answer_that_is_none(self, world, answer, blockable):
        """Any other is a mistake of the driver's, and so is that one where it may wait."""
        world.mirror.ops.answer = answer
        with pytest.raises(DriverBug, match="sync_cpu_device_pagetables"):
            change(world.process.mm, 0, 9, blockable=blockable)

    def test_sync_that_raises(self, world):
        """munmap() fails and changes nothing; once the driver is well again it works."""
        world.mirror.ops.answer = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError):
            world.process.munmap(world.addr, world.nbytes)
        assert world.intact()
        world.mirror.ops.answer = 0

        world.process.munmap(world.addr, world.nbytes)
