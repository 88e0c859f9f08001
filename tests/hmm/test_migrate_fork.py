"""Processes that fork, unmap, exit or close the device while a migration is inside the driver.

What the migration has in its hands belongs to several processes: whoever maps it in the end maps
the same page, and nothing is lost. A callback that would wait for itself is told so.
"""

from collections import Counter

import pytest

from devices import NumpyDevice
from hmm.migrate_device import (
    migrate_device_finalize,
    migrate_device_pages,
    migrate_device_range,
)
from mm import PAGE_SIZE, BusError, Busy, Deadlock, InvalidArgument
from mm.page_flags import PG_anon_exclusive
from mm.pgtable import pte_present
from mm.swapops import is_migration_entry
from tests.hmm.callbacks import migrate, raises
from tests.hmm.ranges import reasons
from tests.interleave import explore
from tests.world import in_step, mapped_range


def family(pages=3, **options):
    """A process, and its child, who has the same pages."""
    world = mapped_range(pages=pages, **options)
    return world, world.seen_by(world.process.fork())


class Forking:
    """A step of a driver that lets *parent* fork, and notes what the new child maps then."""

    def __init__(self, parent):
        self.parent = parent
        self.child = None

    def __call__(self, src, dst):
        self.child = self.parent.seen_by(self.parent.process.fork("late"))
        self.moving = is_migration_entry(self.child.ptes()).tolist()


def shared_by(*members):
    """True if all of them map the same pages, and the counts are right."""
    mem, pfns = members[0].machine.mem, members[0].pfns()
    same = all(pfns.tolist() == member.pfns().tolist() for member in members)
    counts = [len(members)] * pfns.size == mem.mapcount[pfns].tolist()
    rss = {len(pfns)} == {member.process.mm.anon_rss for member in members}
    return same and counts and rss and not (mem.flags[pfns] & PG_anon_exclusive).any()


class TestForkInside:
    @pytest.mark.parametrize("step", ["before", "after", "mapping"])
    @pytest.mark.parametrize("back", [False, True], ids=["to device", "to system"])
    def test_late_child(self, step, back):
        """Entries on their way are copied as such; all three end with the new pages."""
        parent, child = family()
        if back:
            migrate(parent)
        fork = Forking(parent)

        migrate(child, back=back, **{step: fork})

        assert [True] * 3 == fork.moving
        assert shared_by(parent, child, fork.child)
        assert [not back] * 3 == fork.child.on_device()
        assert parent.intact()
        assert child.intact()
        assert fork.child.intact()

    def test_pages_that_stay(self):
        """What the driver does not take is mapped again, by the late child too."""
        parent, child = family()
        fork, held = Forking(parent), parent.pfns().tolist()

        result = migrate(child, before=fork, after=lambda src, dst: child.hold(*held))

        assert ["BUSY"] * 3 == reasons(result)
        assert shared_by(parent, child, fork.child)
        child.let_go()
        assert fork.child.intact()

    def test_driver_that_fails(self):
        """A callback that raises loses nobody's page."""
        parent, child = family()
        fork = Forking(parent)

        with pytest.raises(OSError, match="broken"):
            migrate(child, before=fork, after=raises(OSError("broken")))

        assert shared_by(parent, child, fork.child)
        assert pte_present(fork.child.ptes()).all()
        assert fork.child.intact()

    def test_late_child_exits_at_once(self):
        """Its migration entries go, and nobody misses them."""
        parent, child = family()
        fork = Forking(parent)

        def fork_and_exit(src, dst):
            fork(src, dst)
            fork.child.process.exit()

        migrate(child, before=fork_and_exit)

        assert shared_by(parent, child)
        assert parent.intact()

    def test_pages_that_were_its_own(self):
        """What one process alone has, and forks while the device evicts it, is nobody's own."""
        world = mapped_range(pages=2)
        migrate(world)
        eviction = migrate_device_range(world.machine.mem, world.gpu.zone, world.pfns())

        late = world.seen_by(world.process.fork())
        migrate_device_pages(eviction)
        migrate_device_finalize(eviction)

        assert shared_by(world, late)
        late.process.write(late.at(0), b"L")
        assert world.intact()


class TestFromTheCallback:
    """What a callback does to the process that it works for would wait for the callback."""

    @pytest.mark.parametrize("step", ["before", "after", "mapping"])
    @pytest.mark.parametrize("call", ["fork", "exit", "munmap", "mprotect", "mremap"])
    def test_same_process(self, step, call):
        """It is told so, and the pages are as they were, or moved and well."""
        world = mapped_range(pages=3)
        calls = {
            "munmap": lambda: world.process.munmap(world.addr, PAGE_SIZE),
            "mprotect": lambda: world.process.mprotect(world.addr, PAGE_SIZE, "r"),
            "mremap": lambda: world.process.mremap(world.addr, PAGE_SIZE, 2 * PAGE_SIZE),
        }

        with pytest.raises(Deadlock, match="mmap_sem of train"):
            migrate(world, **{step: lambda s, d: calls.get(call, getattr(world.process, call))()})

        assert [step == "mapping"] * 3 == world.on_device()
        assert [world.process.mm] == world.machine.mem.mms
        assert world.intact()

    @pytest.mark.parametrize("call", ["munmap", "exit", "madvise", "write"])
    @pytest.mark.parametrize("back", [False, True], ids=["to device", "to system"])
    def test_other_process(self, call, back):
        """A sharer that unmaps, exits or gives up its memory meanwhile just has it no more."""
        parent, child = family()
        if back:
            migrate(parent)
        calls = {
            "munmap": lambda: parent.process.munmap(parent.addr, parent.nbytes),
            "exit": parent.process.exit,
            "madvise": lambda: parent.process.madvise(parent.addr, parent.nbytes, "dontneed"),
        }
        if call == "write":  # would wait for the page that this thread has locked
            with pytest.raises(Deadlock, match="locked by the thread"):
                migrate(child, lambda s, d: parent.process.write(parent.addr, b"P"), back=back)
            assert parent.intact()
        else:
            migrate(child, lambda s, d: calls[call](), back=back)
            assert [1] * 3 == parent.machine.mem.mapcount[child.pfns()].tolist()
        assert child.intact()

    @pytest.mark.parametrize("step", ["before", "after", "mapping"])
    def test_device_closes(self, step):
        """A device that has pages in hand is busy; one that has none yet is gone, and says so."""
        world = mapped_range(pages=3)
        error = InvalidArgument if step == "before" else Busy

        with pytest.raises(error):
            migrate(world, **{step: lambda s, d: world.gpu.close()})

        assert (step == "before") == world.gpu.closed
        assert [step == "mapping"] * 3 == world.on_device()
        assert world.intact()

    def test_device_closes_while_pages_leave(self):
        """Those are in use as long as they have not left."""
        world = mapped_range(pages=3)
        migrate(world)

        with pytest.raises(Busy):
            migrate(world, before=lambda s, d: world.gpu.close(), back=True)

        assert [True] * 3 == world.on_device()
        assert not world.gpu.closed
        assert world.intact()


@pytest.mark.parametrize("kind", ["private", "public"])
@pytest.mark.parametrize("step", ["before", "after", "mapping"])
class TestGivenUp:
    """What needs mmap_sem no more than the migration does: the device must not map what is gone."""

    @pytest.mark.parametrize("filled", [True, False], ids=["pages", "holes"])
    def test_dontneed(self, kind, step, filled):
        """What the process gives up meanwhile the device does not reach, nor whoever gets it."""
        world = mapped_range(pages=3, kind=kind, filled=filled)
        give_up = lambda s, d: world.process.madvise(world.at(1), PAGE_SIZE, "dontneed")  # noqa: E731

        migrate(world, **{step: give_up})

        assert in_step(world.gpu)
        assert [0, 0, 2 * filled] == world.contents()
        assert b"\0" == world.gpu.read(world.process, world.at(1), 1)

    def test_dontneed_and_used_again(self, kind, step):
        """Neither does it take the old page for the one that has come since."""
        world = mapped_range(pages=3, kind=kind)

        def give_up(src, dst):
            world.process.madvise(world.at(1), PAGE_SIZE, "dontneed")
            world.process.write(world.at(1), b"new")

        migrate(world, **{step: give_up})

        assert in_step(world.gpu)
        assert b"new" == world.gpu.read(world.process, world.at(1), 3)

    def test_write_protected(self, kind, step):
        """A store by the device is userland's to allow as one by the CPU is."""
        world = mapped_range(pages=3, kind=kind)
        fd = world.process.userfaultfd("sigbus")
        fd.register(world.addr, world.nbytes, "wp")

        migrate(world, **{step: lambda s, d: fd.writeprotect(world.at(1), PAGE_SIZE)})

        assert in_step(world.gpu)
        with pytest.raises(BusError):
            world.gpu.write(world.process, world.at(1), b"x")
        assert world.intact()


class TestFromAnotherThread:
    """All orders that one preemption allows, in a world that is made once."""

    @pytest.mark.parametrize("way", ["to_device", "to_system", "evict"])
    @pytest.mark.parametrize("call", ["fork", "exit", "munmap"])
    def test_call_and_migration(self, way, call):
        """Whoever comes first: sharers keep their pages, and nothing leaks."""
        world = mapped_range(pages=1, filled=False, nodes=("2MiB",), memory="64KiB")
        gpu, size = world.gpu, 2 * PAGE_SIZE
        free = world.machine.nr_free_pages

        def scenario(together):
            process = world.machine.spawn("forks")
            addr = process.mmap(size)
            process.write(addr, b"x" * size)
            sharer = process.fork("sharer")
            if way != "to_device":
                gpu.to_device(process, addr, size)
            moves = {
                "to_device": lambda: gpu.to_device(sharer, addr, size),
                "to_system": lambda: gpu.to_system(sharer, addr, size),
                "evict": lambda: gpu.make_room(gpu.npages),
            }
            calls = {
                "fork": lambda: process.fork("late"),
                "exit": process.exit,
                "munmap": lambda: process.munmap(addr, size),
            }
            _, late = together(moves[way], calls[call])
            world.machine.verify()

            for each in (sharer, late or sharer):
                assert b"x" * size == each.read(addr, size)
            for each in (process, sharer, late or sharer):
                each.exit()
            assert free == world.machine.nr_free_pages

        assert explore(scenario, preemptions=1) > 10

    @pytest.mark.parametrize("way", ["to_device", "to_system", "read", "write"])
    def test_close_and_device(self, way):
        """A device that closes: what it does meanwhile succeeds, or it is closed or busy."""
        world = mapped_range(pages=1, filled=False, nodes=("2MiB",), memory="64KiB")
        process, ended = world.process, Counter()

        def scenario(together):
            gpu = NumpyDevice(world.machine, "64KiB", name="brief")
            addr = process.mmap(PAGE_SIZE)
            process.write(addr, b"x")
            if way == "to_system":
                gpu.to_device(process, addr, PAGE_SIZE)
            access = {
                "read": lambda: gpu.read(process, addr, 1),
                "write": lambda: gpu.write(process, addr, b"y"),
            }.get(way, lambda: getattr(gpu, way)(process, addr, PAGE_SIZE))

            def told(call):
                def ends():
                    try:
                        call()
                    except (InvalidArgument, Busy) as error:
                        return type(error).__name__
                    return "done"

                return ends

            ended[tuple(together(told(access), told(gpu.close)))] += 1
            gpu.close()
            assert process.read(addr, 1) in ((b"x", b"y") if way == "write" else (b"x",))
            process.munmap(addr, PAGE_SIZE)
            world.machine.verify()

        explore(scenario, preemptions=1)
        assert ended["done", "done"]
