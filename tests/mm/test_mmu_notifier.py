"""What listeners on an address space hear, and when."""

import pytest

from mm.mmap import exit_mmap
from mm.mmu_notifier import (
    MmuNotifyEvent,
    mmu_notifier_range,
    mmu_notifier_register,
    mmu_notifier_unregister,
)
from mm.pgtable import pte_none
from mm.typing import PAGE_SIZE
from tests.world import mapped_range

CLEAR, UNMAP, MIGRATE = MmuNotifyEvent.CLEAR, MmuNotifyEvent.UNMAP, MmuNotifyEvent.MIGRATE


class Listener:
    """Notes what it hears; with a *world*, also which of its pages are mapped then."""

    def __init__(self, world=None):
        self.world = world
        self.heard = []

    def note(self, what, *about):
        mapped = () if self.world is None else ((~pte_none(self.world.ptes())).tolist(),)
        self.heard.append((what, *about, *mapped))

    def invalidate_range_start(self, invalid):
        self.note("start", invalid.event, invalid.start, invalid.end)

    def invalidate_range_end(self, invalid):
        self.note("end", invalid.event, invalid.start, invalid.end)

    def release(self, mm):
        self.note("release")


def listening(world, *args):
    listener = Listener(*args)
    mmu_notifier_register(listener, world.process.mm)
    return listener


def around(event, start, end):
    return [("start", event, start, end), ("end", event, start, end)]


class TestRange:
    def test_start_comes_before_the_change_and_end_after(self):
        """A listener that forgets at start never answers for an entry that is gone."""
        world = mapped_range(pages=2)
        listener = listening(world, world)

        world.process.munmap(world.at(1), PAGE_SIZE)

        about = (UNMAP, world.at(1), world.at(2))
        expected = [("start", *about, [True, True]), ("end", *about, [True, False])]
        assert expected == listener.heard

    def test_every_listener(self):
        """All hear of it, in the order in which they came."""
        world = mapped_range(pages=1)
        heard = []
        for name in "ab":
            listening(world).note = lambda what, *_, name=name: heard.append(what + name)

        world.process.munmap(world.addr, PAGE_SIZE)

        assert ["starta", "startb", "enda", "endb"] == heard

    def test_end_comes_after_an_error_too(self):
        """A range is never left invalid."""
        world = mapped_range(pages=1)
        listener = listening(world)

        with pytest.raises(ZeroDivisionError), mmu_notifier_range(world.process.mm, 0, 9, CLEAR):
            raise ZeroDivisionError

        assert around(CLEAR, 0, 9) == listener.heard

    def test_owner_travels_along(self):
        """A driver can tell the migrations that it asked for."""
        world = mapped_range(pages=1)
        listener, owners = listening(world), []
        listener.invalidate_range_start = lambda invalid: owners.append(invalid.owner)

        with mmu_notifier_range(world.process.mm, 0, 9, MIGRATE, owner=world.gpu):
            pass

        assert [world.gpu] == owners

    def test_listener_that_left(self):
        """It hears nothing more; who left while a range was open hears its end."""
        world = mapped_range(pages=1)
        mm, listener = world.process.mm, listening(world)

        with mmu_notifier_range(mm, 0, 9, CLEAR):
            mmu_notifier_unregister(listener, mm)
        with mmu_notifier_range(mm, 0, 9, CLEAR):
            pass

        assert around(CLEAR, 0, 9) == listener.heard

    def test_other_process(self):
        """A listener hears of its own address space only."""
        world = mapped_range(pages=1)
        listener = listening(world)

        with world.machine.spawn("other") as other:
            other.touch(other.mmap(PAGE_SIZE), PAGE_SIZE)

        assert [] == listener.heard


class TestEvents:
    def test_first_touch(self):
        """A page that comes where nothing was invalidates nothing."""
        world = mapped_range(pages=2, filled=False)
        listener = listening(world)

        world.process.read(world.addr, 1)
        world.process.write(world.at(1), b"x")

        assert [] == listener.heard

    def test_copy_on_write(self):
        """A frame takes the place of the zero page: one range for neighbours, one for others."""
        world = mapped_range(pages=5, filled=False)
        world.process.touch(world.addr, world.nbytes, write=False)
        world.process.touch(world.at(2), PAGE_SIZE)
        listener = listening(world)

        world.process.touch(world.addr, world.nbytes)

        expected = around(CLEAR, world.addr, world.at(2)) + around(CLEAR, world.at(3), world.at(5))
        assert expected == listener.heard

    def test_migration(self):
        """A migration invalidates its range once, by its own event."""
        world = mapped_range(pages=2)
        listener = listening(world)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert around(MIGRATE, world.addr, world.at(2)) == listener.heard

    def test_exit(self):
        """The release comes first, and nothing comes after it."""
        world = mapped_range(pages=2)
        listener = listening(world, world)

        with world.process.mm.mmap_sem.write():
            exit_mmap(world.process.mm)

        assert [("release", [True, True])] == listener.heard
