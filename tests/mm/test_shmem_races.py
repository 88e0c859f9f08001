"""Threads that share a file, under every schedule that preempts one of them once."""

from contextlib import suppress

import pytest

from mm import PAGE_SIZE, BusError
from mm.mbind import kernel_migrate_pages
from tests.files import disk_file, mapped_file
from tests.interleave import explore
from tests.world import mapped_range


class TestFaults:
    @pytest.mark.parametrize("flags", ["file|shared", "file|private"])
    def test_of_two_on_one_hole(self, flags):
        """One page comes to be; both stores of a shared mapping are in it."""

        def scenario(together):
            world = mapped_file(pages=1, filled=False)
            one, two = world._mapped_by("one", flags), world._mapped_by("two", flags)

            together(
                lambda: one.process.write(one.addr, b"a"),
                lambda: two.process.write(two.addr + 1, b"b"),
            )

            shared = flags == "file|shared"
            assert (b"ab" if shared else b"a\0") == one.process.read(one.addr, 2)
            assert (b"ab" if shared else b"\0b") == two.process.read(two.addr, 2)
            assert 1 == world.machine.vmstat["nr_shmem"]

        assert 10 < explore(scenario, preemptions=1)

    def test_and_truncation(self):
        """A store before it is lost, one after it gets SIGBUS; nothing is left of the page."""

        def scenario(together):
            world = mapped_file(pages=2)
            private = world.private()

            def store(view):
                with suppress(BusError):
                    view.process.write(view.at(1), b"late")

            together(
                lambda: store(world), lambda: store(private), lambda: world.file.truncate(PAGE_SIZE)
            )

            assert [1, 0] == [world.machine.vmstat["nr_shmem"], private.process.mm.anon_rss]
            for view in (world, private):
                with pytest.raises(BusError):
                    view.process.read(view.at(1), 1)

        assert 10 < explore(scenario, preemptions=1)

    def test_and_reclaim(self):
        """What is stored while the page goes to swap is not lost."""

        def scenario(together):
            world = mapped_file(pages=1, swap="64KiB")
            world.process.write(world.addr, b"old")
            other = world.shared()

            together(
                world.evict,
                lambda: world.process.write(world.addr, b"new"),
                lambda: other.process.read(other.addr, 3),
            )

            assert b"new" == other.process.read(other.addr, 3)

        assert 10 < explore(scenario, preemptions=1)

    @pytest.mark.slow
    def test_of_two_on_a_page_in_swap(self):
        """It comes back once."""

        def scenario(together):
            world = mapped_file(pages=2, swap="64KiB")
            other = world.shared()
            world.evict()

            together(world.contents, other.contents, lambda: world.file.read(0, 10))

            assert world.intact()
            assert 0 == world.machine.mem.swap.inuse_pages

        assert 10 < explore(scenario, preemptions=1)

    def test_and_migration(self):
        """Stores reach the page, wherever it is by then."""

        def scenario(together):
            world = mapped_file(pages=1, nodes=("4MiB", "4MiB"))
            other = world.shared()
            other.contents()

            together(
                lambda: kernel_migrate_pages(world.process.mm, [0], [1]),
                lambda: (
                    other.process.write(other.addr, b"other"),
                    world.file.write(PAGE_SIZE - 4, b"file"),
                ),
            )

            assert b"other" == world.file.read(0, 5)
            assert b"file" == world.process.read(world.addr + PAGE_SIZE - 4, 4)

        assert 10 < explore(scenario, preemptions=1)

    @pytest.mark.slow
    def test_and_a_device(self):
        """A device that wants pages of a file gets none, and disturbs nobody."""

        def scenario(together):
            world = mapped_file(pages=2)

            together(
                lambda: world.gpu.to_device(world.process, world.addr, world.nbytes),
                lambda: world.process.write(world.addr, b"cpu"),
                lambda: world.file.truncate(PAGE_SIZE),
            )

            assert b"cpu" == world.file.read(0, 3)
            assert [False, False] == world.on_device()

        assert 10 < explore(scenario, preemptions=1)


class TestFiles:
    def test_write_and_hole(self):
        """One after the other: never a part of a write in a page that was punched out."""

        def scenario(together):
            world = mapped_file(pages=2)

            together(
                lambda: world.file.write(0, b"x" * 2 * PAGE_SIZE),
                lambda: world.file.fallocate("punch_hole|keep_size", 0, 2 * PAGE_SIZE),
            )

            assert len(set(world.file.read(0, 2 * PAGE_SIZE))) == 1

        assert 4 < explore(scenario, preemptions=1)

    def test_unmap_and_truncate(self):
        """A VMA may go while pages are taken out of it."""

        def scenario(together):
            world = mapped_file(pages=2)
            other = world.shared()
            other.contents()

            together(
                lambda: world.file.truncate(0),
                lambda: other.process.munmap(other.addr, other.nbytes),
                world.process.exit,
            )

            assert 0 == world.machine.vmstat["nr_shmem"]

        assert 10 < explore(scenario, preemptions=1)

    def test_last_who_closes(self):
        """Whoever it is, the file is gone then."""

        def scenario(together):
            world = mapped_file(pages=1)
            mem = world.machine.mem

            together(world.file.close, world.process.exit)

            assert ([], {}, 0) == (mem.files, mem.mappings, mem.vmstat["nr_shmem"])

        assert 2 < explore(scenario, preemptions=1)

    def test_fork_and_truncate(self):
        """The child has nothing of what is cut off either."""

        def scenario(together):
            world = mapped_file(pages=2)
            private = world.private()
            private.process.write(private.at(1), b"mine")
            children = []

            together(
                lambda: children.append(private.process.fork()),
                lambda: world.file.truncate(PAGE_SIZE),
            )

            assert 0 == private.process.mm.anon_rss == children[0].mm.anon_rss

        assert 10 < explore(scenario, preemptions=1)

    def test_read_of_a_disk(self):
        """Two that miss the same pages have them read once."""

        def scenario(together):
            world = mapped_range(pages=1)
            data = bytes(i % 251 for i in range(9000))
            file, disk = disk_file(world.machine, data)

            found = together(lambda: file.read(0, 9000), lambda: file.read(4000, 9000))

            assert [data, data[4000:]] == found
            assert [0, 1, 2] == sorted(page for pages in disk.reads for page in pages)

        assert 4 < explore(scenario, preemptions=1)
