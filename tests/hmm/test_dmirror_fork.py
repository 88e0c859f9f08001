"""The scenarios of Linux's tools/testing/selftests/mm/hmm-tests.c that fork, share or tear down.

Each runs on a private device and on a public one, as those in test_dmirror.py.
"""

import threading
from contextlib import suppress

import numpy as np
import pytest

from hmm.dmirror import PROT_DEV_COHERENT_LOCAL, PROT_DEV_PRIVATE_LOCAL, PROT_WRITE, Dmirror
from mm.errors import (
    BusError,
    Busy,
    InvalidArgument,
    MmError,
    NoEntry,
    PermissionDenied,
    SegmentationFault,
    WouldBlock,
)
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.sched import running
from mm.typing import PAGE_SIZE
from tests.hmm.hmm_tests import NPAGES, NTIMES, contents, hmm_tests, same
from tests.interleave import explore

FEW = 4
SOME = 256
LENGTH = SOME * PAGE_SIZE


@pytest.fixture(params=[False, True], ids=["private", "public"])
def hmm(request):
    """One kind of device after the other."""
    with hmm_tests(public=request.param) as fixture:
        yield fixture


@pytest.fixture
def fork(hmm):
    """A function that forks, and opens the first device for the child; both go at the end."""
    children = []

    def fork():
        child = hmm.process.fork()
        mirror = Dmirror(hmm.zero.device, child)
        children.append((child, mirror))
        return child, mirror

    yield fork
    for child, mirror in children:
        mirror.close()
        child.exit()


def plus_one(data):
    """Each word counted up."""
    return (data.view(np.uint64) + 1).view(np.uint8)


class TestWriteChild:
    @pytest.mark.parametrize("migrate", [False, True], ids=["system", "device"])
    def test_anon_write_child(self, hmm, fork, migrate):
        """The child sees the parent's data, and what its device writes the parent does not."""
        addr = hmm.filled()
        if migrate:
            hmm.zero.migrate_to_device(addr, NPAGES)
        child, mirror = fork()
        assert same(contents(NPAGES), hmm.read(addr, process=child))

        with running(child):
            answer = mirror.write(addr, NPAGES, contents(NPAGES, first=7))

        assert (NPAGES, 1) == (answer.cpages, answer.faults)
        assert same(contents(NPAGES, first=7), hmm.read(addr, process=child))
        assert same(contents(NPAGES), hmm.read(addr))

    def test_anon_write_child_unread(self, hmm, fork):
        """Where nobody has touched them since: EFAULT, as recorded, for private pages that are
        shared in the device's memory; public ones are copied as those of the system."""
        addr = hmm.filled(FEW)
        hmm.zero.migrate_to_device(addr, FEW)
        child, mirror = fork()

        with running(child):
            if hmm.public:
                mirror.write(addr, FEW, contents(FEW, first=7))
            else:
                with pytest.raises(SegmentationFault):
                    mirror.write(addr, FEW, contents(FEW, first=7))

        assert same(contents(FEW), hmm.read(addr, FEW))
        assert same(contents(FEW, first=7 * hmm.public), hmm.read(addr, FEW, child))

    def test_anon_write_child_shared(self, hmm, fork):
        """What the child's device writes to shared memory the parent sees."""
        addr = hmm.filled(flags="anon|shared")
        child, mirror = fork()

        with running(child):
            answer = mirror.write(addr, NPAGES, contents(NPAGES, first=7))

        assert 1 == answer.faults
        assert same(contents(NPAGES, first=7), hmm.read(addr))

    def test_device_of_the_parent(self, hmm, fork):
        """The parent's open file works on the parent's memory, whoever uses it."""
        addr = hmm.filled(FEW)
        child, _ = fork()

        with running(child):
            hmm.zero.write(addr, FEW, contents(FEW, first=7))

        assert same(contents(FEW, first=7), hmm.read(addr, FEW))
        assert same(contents(FEW), hmm.read(addr, FEW, child))


class TestShared:
    def test_migrate_shared(self, hmm):
        """Shared memory does not migrate."""
        addr = hmm.filled(flags="anon|shared")

        with pytest.raises(NoEntry):
            hmm.zero.migrate_to_device(addr, NPAGES)

        assert same(contents(NPAGES), hmm.read(addr))


@pytest.fixture(params=["memfd", "1KiB", "4KiB"])
def file(hmm, request, tmp_path):
    """A file of 256 pages, page i of which holds i: in memory, or on a disk of such blocks."""
    if request.param == "memfd":
        with hmm.machine.memfd_create("data") as file:
            file.write(0, contents(SOME).tobytes())
            yield file
            hmm.process.exit()
        return
    with (
        hmm.machine.mount(tmp_path / "disk", request.param, "2MiB") as fs,
        fs.create("data") as file,
    ):
        file.write(0, contents(SOME).tobytes())
        file.fsync()
        yield file
        hmm.process.exit()


class TestFiles:
    def test_file_read(self, hmm, file):
        """The device reads what is in the file, also what memory has forgotten."""
        addr = hmm.process.mmap(LENGTH, file=file)
        hmm.machine.drop_caches()

        answer = hmm.zero.read(addr, SOME)

        assert (SOME, 1) == (answer.cpages, answer.faults)
        assert same(contents(SOME), answer.data)

    def test_file_write(self, hmm, file):
        """What the device writes is in the mapping, in the file, and where that is stored."""
        addr = hmm.process.mmap(LENGTH, file=file)

        answer = hmm.zero.write(addr, SOME, contents(SOME, first=7))

        assert (SOME, 1) == (answer.cpages, answer.faults)
        assert same(contents(SOME, first=7), hmm.read(addr, SOME))
        assert contents(SOME, first=7).tobytes() == file.read(0, LENGTH)
        hmm.process.munmap(addr, LENGTH)
        file.fsync()
        hmm.machine.drop_caches()
        assert contents(SOME, first=7).tobytes() == file.read(0, LENGTH)

    def test_file_write_of_a_child(self, hmm, file, fork):
        """A child's device writes to the file, or to copies where the mapping is private."""
        shared = hmm.process.mmap(FEW * PAGE_SIZE, file=file)
        private = hmm.process.mmap(FEW * PAGE_SIZE, flags="file|private", file=file)
        child, mirror = fork()

        with running(child):
            mirror.write(shared, FEW, contents(FEW, first=7))
            mirror.write(private, FEW, contents(FEW, first=9))

        assert contents(FEW, first=7).tobytes() == file.read(0, FEW * PAGE_SIZE)
        assert same(contents(FEW, first=7), hmm.read(private, FEW))
        assert same(contents(FEW, first=9), hmm.read(private, FEW, child))

    def test_migrate_shared_file(self, hmm, file):
        """Pages of files do not migrate, whether they are mapped, in memory, or neither."""
        addr = hmm.process.mmap(LENGTH, file=file)
        hmm.machine.drop_caches()
        hmm.read(addr, FEW)

        with pytest.raises(NoEntry):
            hmm.zero.migrate_to_device(addr, SOME)

        assert same(contents(SOME), hmm.read(addr, SOME))

    def test_migrate_private_file(self, hmm, file, fork):
        """As recorded, copies of a file's pages migrate, and those of the file stay."""
        addr = hmm.process.mmap(FEW * PAGE_SIZE, flags="file|private", file=file)
        hmm.process.write(addr, contents(2, first=7))
        hmm.read(addr, FEW)
        with pytest.raises(NoEntry):
            hmm.zero.migrate_to_device(addr, FEW)
        child, _ = fork()

        file.write(0, contents(FEW, first=5).tobytes())

        assert 2 == hmm.zero.migrate_to_system(addr, FEW).cpages
        expected = np.concatenate((contents(2, first=7), contents(2, first=7)))
        for process in (hmm.process, child):
            assert same(expected, hmm.read(addr, FEW, process))

    @pytest.mark.parametrize("way", ["read", "write", "migrate_to_device", "exclusive", "snapshot"])
    @pytest.mark.parametrize("flags", ["file|shared", "file|private"])
    def test_file_teardown(self, hmm, file, way, flags):
        """The file is cut in two while the device works: it gets everything, or an error."""
        for turn in range(2):
            file.write(0, contents(SOME).tobytes())
            addr, half = hmm.process.mmap(LENGTH, flags=flags, file=file), 128 * PAGE_SIZE
            hmm.read(addr, turn * 100)
            thread = threading.Thread(target=file.truncate, args=(half,))
            thread.start()
            try:
                more = (contents(SOME, first=7),) if way == "write" else ()
                assert SOME == getattr(hmm.zero, way)(addr, SOME, *more).cpages
            except MmError as error:
                expected = (BusError, InvalidArgument, NoEntry, Busy)
                assert isinstance(error, expected)  # noqa: PT017
            thread.join()
            with pytest.raises(BusError):
                hmm.process.read(addr + half, 1)
            with pytest.raises(BusError):
                hmm.zero.read(addr, SOME)
            if way != "write":
                assert same(contents(128), hmm.read(addr, 128))
            hmm.process.munmap(addr, LENGTH)


class TestCow:
    def test_hmm_cow_in_device(self, hmm, fork):
        """A parent that stores to what it shares with a child has system memory then."""
        addr = hmm.filled(FEW)
        hmm.zero.migrate_to_device(addr, FEW)
        child, mirror = fork()
        here = PROT_DEV_COHERENT_LOCAL if hmm.public else PROT_DEV_PRIVATE_LOCAL
        assert {here | 1} == set(hmm.zero.snapshot(addr, FEW).perm.tolist())

        hmm.process.write(addr, contents(FEW, first=7))

        assert [PROT_WRITE] * FEW == hmm.zero.snapshot(addr, FEW).perm.tolist()
        assert same(contents(FEW), hmm.read(addr, FEW, child))
        assert same(contents(FEW), mirror.read(addr, FEW).data)

    def test_exclusive_cow(self, hmm, fork):
        """A fork ends what a device has for itself; each counts up its own copy."""
        addr = hmm.filled()
        hmm.zero.exclusive(addr, NPAGES)
        child, _ = fork()
        hmm.zero.check_exclusive(addr, NPAGES)

        for process in (child, hmm.process):
            process.write(addr, plus_one(hmm.read(addr, process=process)))

        for process in (child, hmm.process):
            assert same(contents(NPAGES, first=1), hmm.read(addr, process=process))

    def test_exclusive_of_both(self, hmm, fork):
        """Parent and child have copies of their own for their devices."""
        addr = hmm.filled(FEW)
        child, mirror = fork()
        hmm.zero.exclusive(addr, FEW)
        with running(child):
            mirror.exclusive(addr, FEW)
            mirror.write(addr, FEW, contents(FEW, first=7))

        with pytest.raises(PermissionDenied):
            hmm.zero.check_exclusive(addr, FEW)
        assert same(contents(FEW), hmm.read(addr, FEW))
        assert same(contents(FEW, first=7), hmm.read(addr, FEW, child))


class TestTeardown:
    @pytest.mark.parametrize("way", ["read", "write", "migrate_to_device", "exclusive", "snapshot"])
    def test_anon_teardown(self, hmm, way):
        """Half of the buffer goes while the device works: it gets everything, or an error."""
        for _ in range(NTIMES):
            addr = hmm.filled(256)
            half = 128 * PAGE_SIZE
            thread = threading.Thread(target=hmm.process.munmap, args=(addr + half, half))
            thread.start()
            try:
                more = (contents(256, first=7),) if way == "write" else ()
                answer = getattr(hmm.zero, way)(addr, 256, *more)
                assert 256 == answer.cpages
            except MmError as error:
                expected = (SegmentationFault, InvalidArgument, NoEntry, Busy)
                assert isinstance(error, expected)  # noqa: PT017
            thread.join()
            if way != "write":
                assert same(contents(128), hmm.read(addr, 128))
            hmm.process.munmap(addr, half)

    @pytest.mark.parametrize("way", ["read", "write", "migrate_to_device"])
    def test_child_exits(self, hmm, way):
        """A child that exits while its device works loses nobody's pages."""
        addr = hmm.filled(256)
        for _ in range(NTIMES):
            child = hmm.process.fork()
            mirror = Dmirror(hmm.zero.device, child)
            thread = threading.Thread(target=child.exit)
            thread.start()
            try:
                more = (contents(256, first=7),) if way == "write" else ()
                getattr(mirror, way)(addr, 256, *more)
            except MmError as error:
                expected = (SegmentationFault, InvalidArgument, NoEntry, Busy)
                assert isinstance(error, expected)  # noqa: PT017
            thread.join()
            mirror.close()
            assert same(contents(256), hmm.read(addr, 256))
            hmm.machine.verify()

    @pytest.mark.parametrize("who", ["parent", "child"])
    def test_migrate_release(self, hmm, fork, who):
        """What a device gives back all have again without a fault, whoever asks it to."""
        addr = hmm.filled()
        hmm.zero.migrate_to_device(addr, NPAGES)
        child, mirror = fork()

        (hmm.zero if who == "parent" else mirror).release()

        for process in (hmm.process, child):
            before = process.min_flt
            assert same(contents(NPAGES), hmm.read(addr, process=process))
            assert before == process.min_flt

    @pytest.mark.parametrize("offset", [0, 128, 256], ids=lambda offset: f"{offset * 4}K")
    @pytest.mark.parametrize("who", ["parent", "child"])
    def test_migrate_partial_unmap_fault(self, hmm, fork, offset, who):
        """One of two unmaps 1 MiB of 2 MiB on the device; the other reads all, it the rest."""
        addr = hmm.filled(512)
        hmm.zero.migrate_to_device(addr, 512)
        child, _ = fork()
        one, other = (hmm.process, child) if who == "parent" else (child, hmm.process)

        one.munmap(addr + offset * PAGE_SIZE, 256 * PAGE_SIZE)

        for first, count in ((0, offset), (offset + 256, 256 - offset)):
            rest = hmm.read(addr + first * PAGE_SIZE, count, one)
            assert same(contents(count, first=first), rest)
        assert same(contents(512), hmm.read(addr, 512, other))

    def test_given_up_while_it_migrates(self, hmm):
        """What goes while it is in the driver is in no mirror, whatever comes first."""
        public = hmm.public

        def scenario(together):
            with hmm_tests(public=public) as own:
                addr = own.filled(2)
                give_up = lambda: own.process.madvise(addr, 2 * PAGE_SIZE, "dontneed")  # noqa: E731

                def take():
                    with suppress(NoEntry):
                        own.zero.migrate_to_device(addr, 2)

                together(take, give_up)

                assert same(contents(2) * 0, own.zero.read(addr, 2).data)
                assert same(contents(2) * 0, own.read(addr, 2))

        assert explore(scenario, preemptions=1) > 10

    def test_file_closes_at_the_exit_of_a_child(self, hmm):
        """As recorded, a child's file that closes evicts the device's pages of all processes."""
        addr = hmm.filled(FEW)
        hmm.zero.migrate_to_device(addr, FEW)
        child = hmm.process.fork()
        mirror = Dmirror(hmm.zero.device, child)

        child.exit()
        mirror.close()

        reads = lambda: hmm.process.touch(addr, FEW * PAGE_SIZE, write=False)  # noqa: E731
        assert 0 == hmm.faults(reads)
        assert same(contents(FEW), hmm.read(addr, FEW))


class TestNonblockable:
    def test_busy_mirror(self, hmm):
        """An invalidation that may not wait is refused while the driver is at its table."""
        addr = hmm.filled(FEW)
        hmm.zero.read(addr, FEW)
        reap = mmu_notifier_range(
            hmm.process.mm, addr, addr + PAGE_SIZE, MmuNotifyEvent.UNMAP, blockable=False
        )

        with hmm.zero.mutex, pytest.raises(WouldBlock), reap:
            pytest.fail("the mirror did not refuse")
        assert 0 == hmm.zero.read(addr, FEW).faults

        with reap:
            pass
        assert 1 == hmm.zero.read(addr, FEW).faults


class TestRemap:
    @pytest.mark.parametrize("flags", ["maymove|fixed", "maymove|fixed|dontunmap"])
    @pytest.mark.parametrize("when", ["before the fork", "after the fork"])
    def test_migrate_remap_fault(self, hmm, fork, flags, when):
        """Memory on the device moves to another address in one process, and stays in the other."""
        addr, size = hmm.filled(FEW), FEW * PAGE_SIZE
        target = hmm.buffer(FEW)
        hmm.zero.migrate_to_device(addr, FEW)
        if when == "before the fork":
            hmm.process.mremap(addr, size, size, flags, new_addr=target)
        child, _ = fork()
        if when == "after the fork":
            hmm.process.mremap(addr, size, size, flags, new_addr=target)

        there = target if when == "before the fork" else addr
        assert same(contents(FEW), hmm.read(there, FEW, child))
        hmm.process.write(target, contents(FEW, first=7))
        assert same(contents(FEW), hmm.read(there, FEW, child))
        assert same(contents(FEW, first=7), hmm.read(target, FEW))


class TestDoubleMap:
    def test_two_processes_and_two_devices(self, hmm, fork):
        """Both processes read through devices; one takes the pages, and all read on."""
        addr = hmm.filled(6)
        child, mirror = fork()
        for reader in (hmm.zero, hmm.one, mirror):
            assert same(contents(6), reader.read(addr, 6).data)

        hmm.one.migrate_to_device(addr, 6)

        for reader in (mirror, hmm.zero, hmm.one):
            assert same(contents(6), reader.read(addr, 6).data)
        assert same(contents(6), hmm.read(addr, 6, child))
