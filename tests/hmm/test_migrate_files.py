"""Files that change while a migration of what maps them is inside the driver.

Pages of a file do not migrate, but they are locked and unmapped until that is found out; what was
copied from a private mapping does, and belongs to the file's fate all the same. Each kind of file,
in memory and on a disk, as test_migrate_fork.py does with anonymous memory.
"""

import pytest

from mm import PAGE_SIZE, BusError, Deadlock
from tests.files import Shared, mapped_file
from tests.hmm.callbacks import migrate, raises
from tests.interleave import explore
from tests.world import mapped_range, track

PAGES = 3
SIZE = PAGES * PAGE_SIZE


@pytest.fixture(params=["memfd", "1KiB", "4KiB"])
def world(request, tmp_path):
    """A process that maps a file of three pages, shared, each filled with its number."""
    if request.param == "memfd":
        return mapped_file(PAGES)
    bare = mapped_range(1, filled=False)
    file = bare.machine.mount(tmp_path / "disk", request.param, "1MiB").create("file")
    file.truncate(SIZE)
    addr = bare.process.mmap(SIZE, file=file)
    world = Shared(bare.machine, bare.process, bare.gpu, addr, PAGES, bare.free_at_boot, file=file)
    track(world)
    world.fill()
    file.fsync()
    return world


@pytest.fixture
def copies(world):
    """A process whose private mapping has copies of all three pages."""
    copies = world.private()
    copies.fill()
    return copies


def lost(world):
    """True if the process gets SIGBUS for each page."""
    for addr in world.addrs.tolist():
        with pytest.raises(BusError):
            world.process.read(addr, 1)
    return True


STEPS = pytest.mark.parametrize("step", ["before", "after", "mapping"])
BACK = pytest.mark.parametrize("back", [False, True], ids=["to device", "to system"])


class TestCopies:
    """What a driver has in hand of a private mapping."""

    @STEPS
    @BACK
    def test_file_is_cut(self, copies, step, back):
        """They are gone with the page of the file, wherever they would have been."""
        if back:
            migrate(copies)

        migrate(copies, back=back, **{step: lambda s, d: copies.file.truncate(0)})

        assert lost(copies)
        assert 0 == copies.process.mm.anon_rss
        copies.file.truncate(SIZE)
        assert bytes(SIZE) == copies.process.read(copies.addr, SIZE)

    @STEPS
    def test_late_child_of_a_file_that_is_cut(self, copies, step):
        """A child that was forked meanwhile loses them too."""
        child, late = copies.seen_by(copies.process.fork()), []

        def fork_and_cut(src, dst):
            late.append(copies.seen_by(copies.process.fork("late")))
            copies.file.truncate(PAGE_SIZE)

        migrate(child, **{step: fork_and_cut})

        for seen in (copies, child, *late):
            assert copies.written()[0].tobytes() == seen.process.read(seen.at(0), PAGE_SIZE)
            with pytest.raises(BusError):
                seen.process.read(seen.at(1), 1)

    @STEPS
    def test_hole_is_punched(self, copies, step):
        """Copies stay, and so does their migration."""
        if not copies.file.f_op.fallocate:
            pytest.skip("no holes in files on a disk")
        hole = lambda s, d: copies.file.fallocate("punch_hole|keep_size", 0, SIZE)  # noqa: E731

        migrate(copies, **{step: hole})

        assert [True] * PAGES == copies.on_device()
        assert copies.intact()
        assert bytes(SIZE) == copies.file.read(0, SIZE)

    @STEPS
    def test_file_is_stored_to_and_forgotten(self, copies, step):
        """What the file has from now on is not what the copies have."""

        def use(src, dst):
            copies.file.write(0, b"\xee" * SIZE)
            copies.file.fsync()
            copies.evict()
            copies.machine.drop_caches()

        migrate(copies, **{step: use})

        assert copies.intact()
        assert b"\xee" * SIZE == copies.file.read(0, SIZE)

    def test_driver_that_fails(self, copies):
        """A file that is cut before its driver gives up leaves nothing behind."""

        def cut_and_fail(src, dst):
            copies.file.truncate(0)
            raises(OSError("broken"))(src, dst)

        with pytest.raises(OSError, match="broken"):
            migrate(copies, after=cut_and_fail)

        assert lost(copies)


class TestPagesOfTheFile:
    """What a driver has in hand of a shared mapping, and will not get."""

    @STEPS
    @pytest.mark.parametrize("call", ["truncate", "write", "store"])
    def test_calls_that_would_wait(self, world, step, call):
        """A callback that would wait for the pages it has is told so; none is lost."""
        other = world.shared()
        calls = {
            "truncate": lambda: world.file.truncate(0),
            "write": lambda: world.file.write(0, b"new"),
            "store": lambda: other.process.write(other.addr, b"new"),
        }

        with pytest.raises(Deadlock, match="locked by the thread"):
            migrate(world, **{step: lambda s, d: calls[call]()})

        assert [False] * PAGES == world.on_device()
        assert SIZE == world.file.size
        assert world.intact()
        assert other.intact()

    @STEPS
    @pytest.mark.parametrize("call", ["munmap", "exit", "fork", "evict", "drop_caches"])
    def test_calls_that_go_on(self, world, step, call):
        """Others that map the file come and go, and reclaim leaves what is locked alone."""
        other, late = world.shared(), []
        assert other.intact()
        calls = {
            "munmap": lambda: other.process.munmap(other.addr, SIZE),
            "exit": other.process.exit,
            "fork": lambda: late.append(other.seen_by(other.process.fork())),
            "evict": world.evict,
            "drop_caches": world.machine.drop_caches,
        }

        migrate(world, **{step: lambda s, d: calls[call]()})

        assert [False] * PAGES == world.on_device()
        assert all(seen.intact() for seen in (world, *late))
        mapped = {"munmap": 1, "exit": 1, "fork": 3}.get(call, 2)
        assert [mapped] * PAGES == world.machine.mem.mapcount[world.pfns()].tolist()


class TestFromAnotherThread:
    """All orders that one preemption allows, in a world that is made once."""

    @pytest.mark.parametrize(
        ("flags", "way"),
        [
            ("file|shared", "to_device"),
            ("file|private", "to_device"),
            ("file|private", "to_system"),
            ("file|private", "evict"),
        ],
    )
    @pytest.mark.parametrize("call", ["truncate", "munmap", "exit", "fork"])
    @pytest.mark.parametrize("kind", ["memfd", "disk"])
    def test_call_and_migration(self, tmp_path, flags, way, call, kind):
        """Whoever comes first: those who still map the file find its bytes, and nothing leaks."""
        world = mapped_range(pages=1, filled=False, nodes=("2MiB",), memory="64KiB")
        machine, gpu, size = world.machine, world.gpu, 2 * PAGE_SIZE
        fs = machine.mount(tmp_path / "disk", "1KiB", "1MiB")
        free = machine.nr_free_pages

        def scenario(together):
            file = machine.memfd_create("a") if kind == "memfd" else fs.create("a")
            file.write(0, b"f" * size)
            process = machine.spawn("maps")
            addr = process.mmap(size, flags=flags, file=file)
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
                "truncate": lambda: file.truncate(PAGE_SIZE),
                "munmap": lambda: process.munmap(addr, size),
                "exit": process.exit,
                "fork": lambda: process.fork("late"),
            }

            _, answer = together(moves[way], calls[call])

            machine.verify()
            late = answer if call == "fork" else sharer
            for each in (sharer, late):
                assert b"x" * PAGE_SIZE == each.read(addr, PAGE_SIZE)
                if call == "truncate":
                    with pytest.raises(BusError):
                        each.read(addr + PAGE_SIZE, 1)
                else:
                    assert b"x" * PAGE_SIZE == each.read(addr + PAGE_SIZE, PAGE_SIZE)
            assert (b"f" if flags == "file|private" else b"x") == file.read(0, 1)
            for each in (process, sharer, late):
                each.exit()
            file.close()
            if kind == "disk":
                fs.unlink("a")
            assert free == machine.nr_free_pages

        assert explore(scenario, preemptions=1) > 10
