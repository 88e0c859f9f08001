"""The scenarios of Linux's tools/testing/selftests/mm/hmm-tests.c that need one process.

Each runs on a private device (0, 1) and on a public one (2, 3). Buffers hold the page number in
every word, unless the scenario says otherwise.
"""

import threading

import pytest

from hmm.dmirror import (
    PROT_DEV_COHERENT_LOCAL,
    PROT_DEV_COHERENT_REMOTE,
    PROT_DEV_PRIVATE_LOCAL,
    PROT_ERROR,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    PROT_ZERO,
)
from mm.errors import Busy, InvalidArgument, MmError, NoEntry, PermissionDenied, SegmentationFault
from mm.typing import PAGE_SIZE
from tests.hmm.hmm_tests import NPAGES, NTIMES, contents, hmm_tests, same


@pytest.fixture(params=[False, True], ids=["private", "public"])
def hmm(request):
    """One kind of device after the other."""
    with hmm_tests(public=request.param) as fixture:
        yield fixture


class TestReadAndWrite:
    def test_open_close(self, hmm):
        """A file can be closed twice, and does nothing from then on."""
        hmm.zero.close()
        hmm.zero.close()

        with pytest.raises(InvalidArgument):
            hmm.zero.read(hmm.buffer(), 1)

    def test_anon_read(self, hmm):
        """The device reads what was never touched, what was read, and what was written."""
        addr = hmm.buffer()
        hmm.process.read(addr + PAGE_SIZE, 1)
        hmm.process.write(addr + 2 * PAGE_SIZE, contents(NPAGES)[2:])
        hmm.process.mprotect(addr, NPAGES * PAGE_SIZE, "r")

        answer = hmm.zero.read(addr, NPAGES)

        expected = contents(NPAGES).copy()
        expected[:2] = 0
        assert (NPAGES, 1) == (answer.cpages, answer.faults)
        assert same(expected, answer.data)

    def test_anon_read_prot(self, hmm):
        """Memory without permissions is out of the device's reach."""
        addr = hmm.filled()
        hmm.process.mprotect(addr, NPAGES * PAGE_SIZE, "-")

        with pytest.raises(SegmentationFault):
            hmm.zero.read(addr, NPAGES)

        hmm.process.mprotect(addr, NPAGES * PAGE_SIZE, "r")
        assert same(contents(NPAGES), hmm.read(addr))

    def test_anon_write(self, hmm):
        """The CPU sees what the device wrote to fresh memory."""
        addr = hmm.buffer()

        answer = hmm.zero.write(addr, NPAGES, contents(NPAGES))

        assert (NPAGES, 1) == (answer.cpages, answer.faults)
        assert same(contents(NPAGES), hmm.read(addr))

    def test_stores_outlive_reclaim(self, hmm):
        """What the device stores to a page that is clean, in the swap cache, goes to swap too."""
        addr, size = hmm.filled(2), 2 * PAGE_SIZE
        for advice in ("pageout", "willneed"):
            hmm.process.madvise(addr, size, advice)
        hmm.read(addr, 2)

        hmm.zero.write(addr, 2, contents(2, first=7))
        hmm.process.madvise(addr, size, "pageout")

        assert same(contents(2, first=7), hmm.read(addr, 2))

    def test_stores_to_what_was_given_up(self, hmm):
        """MADV_FREE lets go of what was there, not of what the device stores afterwards."""
        addr, size = hmm.filled(2), 2 * PAGE_SIZE
        hmm.process.madvise(addr, size, "free")
        hmm.zero.migrate_to_device(addr, 2)
        hmm.zero.write(addr, 2, contents(2, first=7))
        hmm.zero.migrate_to_system(addr, 2)

        hmm.process.madvise(addr, size, "pageout")

        assert same(contents(2, first=7), hmm.read(addr, 2))

    def test_anon_write_prot(self, hmm):
        """The device may read read-only memory, and write it once the process may."""
        addr = hmm.buffer(prot="r")
        assert 1 == hmm.zero.read(addr, 1).faults

        with pytest.raises(PermissionDenied):
            hmm.zero.write(addr, NPAGES, contents(NPAGES))
        assert not hmm.read(addr).any()

        hmm.process.mprotect(addr, NPAGES * PAGE_SIZE, "rw")
        hmm.zero.write(addr, NPAGES, contents(NPAGES))
        assert same(contents(NPAGES), hmm.read(addr))

    def test_anon_read_multiple(self, hmm):
        """Ten fresh buffers, one after the other."""
        for turn in range(NTIMES):
            addr = hmm.buffer()
            hmm.process.write(addr, contents(NPAGES, first=turn))

            answer = hmm.zero.read(addr, NPAGES)

            assert (1, True) == (answer.faults, same(contents(NPAGES, first=turn), answer.data))
            hmm.process.munmap(addr, NPAGES * PAGE_SIZE)

    def test_anon_teardown(self, hmm):
        """Half of the buffer goes while the device reads: it gets everything, or an error."""
        for _ in range(NTIMES):
            addr = hmm.filled()
            half = NPAGES * PAGE_SIZE // 2
            thread = threading.Thread(target=hmm.process.munmap, args=(addr + half, half))
            thread.start()
            try:
                assert same(contents(NPAGES), hmm.zero.read(addr, NPAGES).data)
            except MmError as error:
                assert isinstance(error, SegmentationFault)  # noqa: PT017
            thread.join()
            hmm.process.munmap(addr, half)

    def test_two_devices_read_the_same(self, hmm):
        """double_map: both have it, then one takes it, and the other fetches it back."""
        addr = hmm.filled(6)
        hmm.process.mprotect(addr, 6 * PAGE_SIZE, "r")
        assert same(hmm.zero.read(addr, 6).data, hmm.one.read(addr, 6).data)

        hmm.one.migrate_to_device(addr, 6)
        answer = hmm.zero.read(addr, 6)

        assert (1, True) == (answer.faults, same(contents(6), answer.data))


class TestMigrate:
    def test_migrate(self, hmm):
        """All of the buffer migrates, with its contents."""
        answer = hmm.zero.migrate_to_device(hmm.filled(), NPAGES)

        assert NPAGES == answer.cpages
        assert same(contents(NPAGES), answer.data)

    def test_migrate_fault(self, hmm):
        """The CPU touches the first half, and all of it migrates again."""
        addr = hmm.filled()
        hmm.zero.migrate_to_device(addr, NPAGES)
        assert same(contents(NPAGES // 2), hmm.read(addr, NPAGES // 2))

        answer = hmm.zero.migrate_to_device(addr, NPAGES)

        assert (NPAGES, True) == (answer.cpages, same(contents(NPAGES), answer.data))

    def test_migrate_release(self, hmm):
        """What the device gives back on release is all there."""
        addr = hmm.filled()
        hmm.zero.migrate_to_device(addr, NPAGES)

        hmm.zero.release()

        assert 0 == hmm.faults(hmm.process.touch, addr, NPAGES * PAGE_SIZE)
        assert same(contents(NPAGES), hmm.read(addr))

    def test_migrate_multiple(self, hmm):
        """Ten times there and back."""
        for turn in range(NTIMES):
            addr = hmm.buffer()
            hmm.process.write(addr, contents(NPAGES, first=turn))
            hmm.zero.migrate_to_device(addr, NPAGES)

            assert NPAGES == hmm.zero.migrate_to_system(addr, NPAGES).cpages
            assert same(contents(NPAGES, first=turn), hmm.read(addr))
            hmm.process.munmap(addr, NPAGES * PAGE_SIZE)

    def test_fail_alloc(self, hmm):
        """One page that finds no device memory stays; the rest migrates."""
        addr = hmm.filled(8)
        hmm.zero.device.fail_next_alloc = True

        with pytest.raises(NoEntry):
            hmm.zero.migrate_to_device(addr, 8)

        assert 7 == hmm.zero.migrate_to_system(addr, 8).cpages
        assert same(contents(8), hmm.read(addr, 8))

    def test_migrate_mixed(self, hmm):
        """A range with a page that may not be read, or a hole, is refused; the rest is not."""
        addr = hmm.filled(6)
        hmm.process.mprotect(addr, PAGE_SIZE, "-")
        hmm.process.munmap(addr + PAGE_SIZE, PAGE_SIZE)
        hmm.process.mprotect(addr + 2 * PAGE_SIZE, 2 * PAGE_SIZE, "r")
        for first in (0, 1):
            with pytest.raises(InvalidArgument):
                hmm.zero.migrate_to_device(addr + first * PAGE_SIZE, 6 - first)

        answer = hmm.one.migrate_to_device(addr + 2 * PAGE_SIZE, 4)

        assert (4, True) == (answer.cpages, same(contents(4, first=2), answer.data))

    def test_migrate_from_the_other_device(self, hmm):
        """What another device has is not taken from it."""
        addr = hmm.filled(1)
        hmm.one.migrate_to_device(addr, 1)

        with pytest.raises(NoEntry):
            hmm.zero.migrate_to_device(addr, 1)

    @pytest.mark.parametrize("offset", [0, 128, 256], ids=lambda offset: f"{offset * 4}K")
    def test_migrate_partial_unmap_fault(self, hmm, offset):
        """1 MiB of 2 MiB on the device is unmapped; the CPU reads the rest."""
        addr = hmm.filled(512)
        hmm.zero.migrate_to_device(addr, 512)

        hmm.process.munmap(addr + offset * PAGE_SIZE, 256 * PAGE_SIZE)

        for first, count in ((0, offset), (offset + 256, 256 - offset)):
            if count:
                rest = hmm.read(addr + first * PAGE_SIZE, count)
                assert same(contents(count, first=first), rest)

    @pytest.mark.parametrize("flags", ["maymove|fixed", "maymove|fixed|dontunmap"])
    @pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
    @pytest.mark.parametrize("offset", [0, 128, 256], ids=lambda offset: f"{offset * 4}K")
    def test_migrate_remap_fault(self, hmm, flags, before, offset):
        """2 MiB that move to another address and to the device, in either order."""
        addr, size = hmm.filled(512), 512 * PAGE_SIZE
        target = hmm.buffer(1024) + offset * PAGE_SIZE
        if not before:
            hmm.zero.migrate_to_device(addr, 512)

        hmm.process.mremap(addr, size, size, flags, new_addr=target)
        if before:
            hmm.zero.migrate_to_device(target, 512)

        assert same(contents(512), hmm.read(target, 512))


class TestSnapshot:
    def test_snapshot(self, hmm):
        """What the CPU's page table says, a byte a page, and what each device has."""
        addr = hmm.buffer(7)
        hmm.process.mprotect(addr, PAGE_SIZE, "-")
        hmm.process.munmap(addr + PAGE_SIZE, PAGE_SIZE)
        hmm.process.read(addr + 2 * PAGE_SIZE, 1)
        hmm.process.write(addr + 3 * PAGE_SIZE, contents(4, first=3))
        hmm.process.mprotect(addr + 3 * PAGE_SIZE, PAGE_SIZE, "r")
        hmm.zero.migrate_to_device(addr + 5 * PAGE_SIZE, 1)
        hmm.one.migrate_to_device(addr + 6 * PAGE_SIZE, 1)

        perm = hmm.zero.snapshot(addr, 7).perm

        here = PROT_DEV_COHERENT_LOCAL if hmm.public else PROT_DEV_PRIVATE_LOCAL
        there = PROT_DEV_COHERENT_REMOTE | PROT_WRITE if hmm.public else PROT_NONE
        assert [
            PROT_ERROR,
            PROT_ERROR,
            PROT_ZERO | PROT_READ,
            PROT_READ,
            PROT_WRITE,
            here | PROT_WRITE,
            there,
        ] == perm.tolist()


class TestExclusive:
    def test_exclusive(self, hmm):
        """The device has pages for itself until the CPU counts them up."""
        addr = hmm.filled()
        hmm.zero.exclusive(addr, NPAGES)
        with pytest.raises(PermissionDenied):
            hmm.zero.check_exclusive(addr, NPAGES)

        hmm.process.write(addr, contents(NPAGES, first=1))

        hmm.zero.check_exclusive(addr, NPAGES)
        assert same(contents(NPAGES, first=1), hmm.read(addr))

    def test_exclusive_mprotect(self, hmm):
        """A device that has read-only pages for itself may not store to them either."""
        addr = hmm.filled(4)
        hmm.zero.exclusive(addr, 4)
        hmm.process.mprotect(addr, 4 * PAGE_SIZE, "r")

        with pytest.raises(PermissionDenied):
            hmm.zero.write(addr, 4, contents(4))

    def test_hole_cannot_be_had(self, hmm):
        """Memory that is not mapped is refused, and nothing stays locked."""
        with pytest.raises((Busy, SegmentationFault)):
            hmm.zero.exclusive(0x10000000, 2)


class TestGup:
    @pytest.mark.parametrize("longterm", [False, True], ids=["plain", "longterm"])
    def test_hmm_gup(self, hmm, longterm):
        """Pinned pages leave private memory always, public memory where the pin is for long."""
        addr = hmm.filled(4)
        hmm.zero.migrate_to_device(addr, 4)

        with hmm.process.pin(addr, 4 * PAGE_SIZE, longterm=longterm):
            perm = set(hmm.zero.snapshot(addr, 4).perm.tolist())

        stays = hmm.public and not longterm
        assert {PROT_WRITE | (PROT_DEV_COHERENT_LOCAL if stays else 0)} == perm
        assert same(contents(4), hmm.read(addr, 4))
