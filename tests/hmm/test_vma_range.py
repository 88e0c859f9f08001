"""Ranges of v4.20: what is there to map, what is faulted in, and whether it is still true."""

from __future__ import annotations

import errno
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import NumpyDevice
from hmm import (
    HmmPfnFlags,
    HmmPfnValues,
    HmmVmaRange,
    hmm_mirror_unregister,
    hmm_vma_fault,
    hmm_vma_get_pfns,
    hmm_vma_range_done,
)
from mm import (
    PAGE_SIZE,
    BusError,
    Busy,
    Deadlock,
    InvalidArgument,
    InvalidRange,
    PermissionDenied,
    WouldBlock,
)
from mm.errors import MmError
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.sched import Task, running
from mm.swapops import make_hwpoison_entry
from mm.types import VM_HUGETLB, VM_IO, VM_MIXEDMAP, VM_PFNMAP, VmFault
from mm.typing import pages
from tests.hmm.scenes import Case, Scene, cases
from tests.hmm.watch import MirrorOps, change, mirror_of
from tests.interleave import explore
from tests.reference import range as twin
from tests.world import ended_worlds, mapped_range

FLAGS = HmmPfnFlags(valid=1, write=2, device_private=4)
VALUES = HmmPfnValues(error=8, none=16, special=24)
SHIFT = 5
FAULT, STORE, RECALL = 1, 3, 5
OTHER_WORDS = (HmmPfnFlags(1 << 63, 1 << 0, 1 << 5), HmmPfnValues(1 << 60, 0, 1 << 61), 6)


@pytest.fixture
def world():
    """Three pages, and a mirror of their process as `world.mirror`."""
    world = mapped_range(pages=3)
    world.mirror = mirror_of(world.process.mm)
    yield world
    hmm_mirror_unregister(world.mirror)


def range_of(world, first=0, count=None, *, asked=0, words=(FLAGS, VALUES, SHIFT)):
    count = world.pages - first if count is None else count
    pfns = np.full(count, asked, dtype=np.uint64)
    vma = world.process.find_vma(world.at(first))
    return HmmVmaRange(vma, world.at(first), world.at(first + count), pfns, *words)


def get_pfns(wanted):
    with wanted.vma.vm_mm.mmap_sem.read():
        hmm_vma_get_pfns(wanted)
    return wanted.pfns.tolist()


def fault(wanted, *, block=True):
    with wanted.vma.vm_mm.mmap_sem.read():
        hmm_vma_fault(wanted, block)
    return wanted.pfns.tolist()


class TestGetPfns:
    def test_pages_of_every_kind(self):
        """In the device's own words; device pages are named, whoever has them."""
        world = mapped_range(pages=6, filled=False)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)
        world.process.touch(world.at(2), 3 * PAGE_SIZE)
        world.gpu.to_device(world.process, world.at(4), PAGE_SIZE)
        world.write_protect(2)
        world.process.touch(world.at(5), PAGE_SIZE, write=False)
        world.rewrite([5], lambda ptes: make_hwpoison_entry(pages(7)))
        mirror = mirror_of(world.process.mm)
        pfns, zero = world.pfns().tolist(), world.machine.mem.zero_pfn

        wanted = range_of(world)

        expected = [
            VALUES.none,
            zero << SHIFT | 1,
            pfns[2] << SHIFT | 1,
            pfns[3] << SHIFT | 3,
            pfns[4] << SHIFT | 7,
            VALUES.error,
        ]
        assert expected == get_pfns(wanted)
        assert hmm_vma_range_done(wanted)
        hmm_mirror_unregister(mirror)

    def test_nothing_is_faulted_in(self, world):
        """Requests are for hmm_vma_fault()."""
        world.process.munmap(world.addr, world.nbytes)
        world.process.mmap(world.nbytes, addr=world.addr)
        wanted = range_of(world, asked=STORE)

        assert [VALUES.none] * 3 == get_pfns(wanted)
        assert [0, 0, 0] == world.ptes().tolist()
        hmm_vma_range_done(wanted)


class TestFault:
    @given(cases(), st.sampled_from([(FLAGS, VALUES, SHIFT), OTHER_WORDS]), st.booleans())
    def test_answers_faults_and_failures_are_those_of_the_twin(self, case: Case, words, recall):
        """Any pages and requests in one VMA: the same words, errno, faults and page table."""
        fault_and_compare(case, words, recall=recall)

    def test_recalled_page(self, world):
        """A device page comes back where the device asks for it, and only there."""
        world.gpu.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        wanted = range_of(world, count=2)
        wanted.pfns[:] = FAULT, RECALL

        words = fault(wanted)

        assert [True, False, False] == world.on_device()
        assert [7, 3] == [word & 7 for word in words]
        assert not hmm_vma_range_done(wanted)  # the page moved

    def test_page_that_another_faults_touched_keeps_its_request(self):
        """The store that the second page asks for is not lost in the load of the first."""
        world = mapped_range(pages=2, filled=False)
        mirror = mirror_of(world.process.mm)
        wanted = range_of(world)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)  # so that there is a table
        wanted.pfns[:] = FAULT, STORE

        assert [1, 3] == [word & 7 for word in fault(wanted)]
        hmm_vma_range_done(wanted)
        hmm_mirror_unregister(mirror)

    def test_lost_page(self, world):
        """EFAULT: it alone is an error, what comes after it is not known."""
        world.process.munmap(world.addr, world.nbytes)
        world.process.mmap(world.nbytes, addr=world.addr)
        world.process.touch(world.addr, world.nbytes, write=False)
        world.rewrite([1], lambda ptes: make_hwpoison_entry(pages(7)))
        wanted = range_of(world, asked=FAULT)
        with pytest.raises(BusError):
            fault(wanted)

        assert [VALUES.error, VALUES.none] == wanted.pfns.tolist()[1:]
        assert not hmm_vma_range_done(wanted)

    def test_page_of_userland(self, world):
        """EBUSY: in v4.20 the fault is to be tried again."""
        fd = world.process.userfaultfd()
        fd.register(world.addr, world.nbytes)
        world.process.madvise(world.addr, world.nbytes, "dontneed")
        with pytest.raises(Busy):
            fault(range_of(world, asked=FAULT))
        fd.close()

    def test_store_to_read_only_memory(self):
        """EPERM, and nothing is copied behind the VMA's back."""
        world = mapped_range(pages=1, filled=False, prot="r")
        mirror = mirror_of(world.process.mm)
        with pytest.raises(PermissionDenied):
            fault(range_of(world, asked=STORE))

        assert [0] == world.ptes().tolist()
        hmm_mirror_unregister(mirror)

    def test_fault_that_has_to_be_tried_again(self, world):
        """EBUSY, where the handler says so."""
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)
        world.gpu.page_fault = lambda vma, addrs, pfns, write: VmFault.RETRY
        with pytest.raises(Busy, match="tried again"):
            fault(range_of(world, asked=RECALL))
        del world.gpu.page_fault

    def test_no_waiting(self, world):
        """EAGAIN where a device page would have to be waited for; mmap_sem is still held."""
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)
        world.lock(0)
        wanted = range_of(world, asked=RECALL)
        with world.process.mm.mmap_sem.read():
            with pytest.raises(WouldBlock):
                hmm_vma_fault(wanted, block=False)
            assert world.process.mm.mmap_sem.held()
        world.unlock(0)

        wanted = range_of(world, asked=RECALL)
        assert 3 == fault(wanted, block=False)[0] & 7
        hmm_vma_range_done(wanted)

    @pytest.mark.parametrize("block", [True, False])
    def test_page_under_migration(self, block):
        """Whoever comes first: a device that may wait gets its page, one that may not EAGAIN."""
        world = mapped_range(pages=1, filled=False, nodes=("2MiB",), memory="64KiB")
        mirror = mirror_of(world.process.mm)

        def scenario(together):
            addr = world.process.mmap(PAGE_SIZE)
            world.process.touch(addr, PAGE_SIZE)
            words = np.full(1, STORE | RECALL, dtype=np.uint64)
            wanted = HmmVmaRange(
                world.process.find_vma(addr), addr, addr + PAGE_SIZE, words, FLAGS, VALUES, SHIFT
            )

            def device():
                try:
                    fault(wanted, block=block)
                except WouldBlock:
                    assert not block
                    return VALUES.none
                kept = words.item(0)
                return kept if hmm_vma_range_done(wanted) else VALUES.none

            word, _ = together(device, lambda: world.gpu.to_device(world.process, addr, PAGE_SIZE))
            assert word in (VALUES.none, words.item(0))
            world.process.munmap(addr, PAGE_SIZE)

        explore(scenario, preemptions=2)
        hmm_mirror_unregister(mirror)


def fault_and_compare(case: Case, words, *, recall: bool) -> None:
    """hmm_vma_fault() on the first VMA of *case* that is readable, and its twin."""
    with ended_worlds():
        scene = Scene(case)
        world, (flags, values, shift) = scene.world, words
        vma = world.process.find_vma(world.at(case.first))
        if vma is None or not scene.memory().vmas or "r" not in letters(scene, vma):
            return
        mirror = mirror_of(world.process.mm)
        start = world.at(case.first)
        end = min(vma.vm_end, start + len(case.words) * PAGE_SIZE)
        asked = [twin_request(word, recall) for word in case.words[: (end - start) // PAGE_SIZE]]
        expected = twin.MirrorWalk(
            scene.memory(), start, end, list(asked), default=0, mask=-1, owner=""
        )
        failure = expected.run()

        def spoken(word: int, pfn: int) -> int:
            """A word of the twin, about *pfn*, as the device would say it."""
            if not word & twin.VALID:
                return values.error if word & twin.ERROR else values.none
            spelt = flags.valid | pfn << shift
            spelt |= flags.write if word & twin.WRITE else 0
            return spelt | (flags.device_private if word & twin.DEVICE else 0)

        pfns = np.array([request(word, flags) for word in asked], dtype=np.uint64)
        wanted = HmmVmaRange(vma, start, end, pfns, *words)
        task = Task("device")
        got = ""
        with running(task):
            try:
                fault(wanted)
            except MmError as error:
                got = errno.errorcode[error.code]
        moved = not wanted.valid
        hmm_vma_range_done(wanted)
        hmm_mirror_unregister(mirror)

        assert (failure, expected.memory.faults) == (got, task.min_flt)
        for i, (word, found) in enumerate(zip(expected.words, pfns.tolist(), strict=True)):
            addr = start + i * PAGE_SIZE
            pfn = scene.pfn(addr) if word & twin.VALID else 0
            assert spoken(word, pfn) == found or (moved and not found)
        for addr, page in expected.memory.pages.items():
            if vma.vm_start <= addr < vma.vm_end:
                assert (page.kind, page.write) == (scene.page(addr).kind, scene.page(addr).write)


def letters(scene, vma):
    return next(prot for first, _, prot in scene.memory().vmas if first == vma.vm_start)


def twin_request(word: int, recall: bool) -> int:
    return word | (twin.DEVICE if recall and word & twin.REQ_WRITE else 0)


def request(word: int, flags: HmmPfnFlags) -> int:
    bits = (
        (twin.VALID, flags.valid),
        (twin.WRITE, flags.write),
        (twin.DEVICE, flags.device_private),
    )
    return sum(ours for theirs, ours in bits if word & theirs)


class TestTracking:
    def test_change_between_get_and_done(self, world):
        """The range is not valid, and the pages that changed read 0."""
        wanted = range_of(world)
        words = get_pfns(wanted)
        world.process.munmap(world.at(1), PAGE_SIZE)

        assert not hmm_vma_range_done(wanted)
        assert [words[0], 0, words[2]] == wanted.pfns.tolist()

    def test_change_beside_it(self, world):
        """One that ends where the range begins, or begins where it ends, does it nothing."""
        wanted = range_of(world, first=1, count=1)
        get_pfns(wanted)
        change(world.process.mm, world.at(0), world.at(1))
        change(world.process.mm, world.at(2), world.at(3))

        assert hmm_vma_range_done(wanted)

    def test_change_under_way(self, world):
        """Nothing is read while it changes: whoever may wait does, whoever may not gets EAGAIN."""
        mm, order = world.process.mm, []

        def read():
            with pytest.raises(WouldBlock):
                fault(range_of(world), block=False)
            wanted = range_of(world)
            get_pfns(wanted)
            order.append(hmm_vma_range_done(wanted))

        with mmu_notifier_range(mm, world.addr, world.at(1), MmuNotifyEvent.CLEAR):
            reader = threading.Thread(target=read)
            reader.start()
            reader.join(0.05)
            order.append("end")
        reader.join()

        assert ["end", True] == order

    def test_own_change_under_way(self, world):
        """It would wait for itself, and is told so."""
        with (
            mmu_notifier_range(world.process.mm, world.addr, world.at(1), MmuNotifyEvent.CLEAR),
            pytest.raises(Deadlock),
        ):
            get_pfns(range_of(world))

    def test_done_twice(self, world):
        """Only the first call says whether it is valid."""
        wanted = range_of(world)
        get_pfns(wanted)

        assert [True, False] == [hmm_vma_range_done(wanted) for _ in range(2)]

    def test_begun_twice(self, world):
        """A range is done with before it is used again."""
        wanted = range_of(world)
        get_pfns(wanted)
        with pytest.raises(InvalidArgument, match="hmm_vma_range_done"):
            get_pfns(wanted)
        hmm_vma_range_done(wanted)

        get_pfns(wanted)
        assert hmm_vma_range_done(wanted)

    def test_mirror_that_goes(self, world):
        """Without a mirror nobody hears of changes: the range is not valid."""
        wanted = range_of(world)
        get_pfns(wanted)
        hmm_mirror_unregister(world.mirror)

        assert (False, False) == (wanted.valid, hmm_vma_range_done(wanted))

    def test_process_that_goes(self, world):
        """Nor when the process is gone."""
        wanted = range_of(world)
        get_pfns(wanted)
        world.process.exit()

        assert (False, False) == (wanted.valid, hmm_vma_range_done(wanted))

    def test_every_schedule(self):
        """What the device maps after done() is what the CPU's table says, whoever was first."""
        world = mapped_range(pages=1, filled=False, nodes=("2MiB",), memory="64KiB")
        device, mapped = MirrorOps(), {}
        lock = world.machine.mem.locks.atomic

        def forget(mirror, update):
            with lock:
                mapped.clear()
            return 0

        device.sync_cpu_device_pagetables = forget
        mirror = mirror_of(world.process.mm, device)

        def scenario(together):
            addr = world.process.mmap(PAGE_SIZE)
            world.process.touch(addr, PAGE_SIZE)
            vma = world.process.find_vma(addr)
            words = np.zeros(1, dtype=np.uint64)
            wanted = HmmVmaRange(vma, addr, addr + PAGE_SIZE, words, FLAGS, VALUES, SHIFT)
            mapped.clear()

            def work():
                while True:
                    try:
                        get_pfns(wanted)
                    except InvalidRange:
                        return  # unmapped
                    with lock:
                        if hmm_vma_range_done(wanted):
                            if words.item(0) & FLAGS.valid:
                                mapped[addr] = words.item(0) >> SHIFT
                            return

            together(work, lambda: world.gpu.to_device(world.process, addr, PAGE_SIZE))
            assert mapped in ({}, {addr: world.gpu.zone.start_pfn})
            world.process.munmap(addr, PAGE_SIZE)

        explore(scenario, preemptions=2)
        hmm_mirror_unregister(mirror)


class TestArguments:
    @pytest.mark.parametrize(
        ("first", "count"),
        [(-1, 2), (0, 4), (3, 1), (0, 0)],
        ids=["below", "above", "after", "none"],
    )
    @pytest.mark.parametrize("call", [get_pfns, fault])
    def test_range_outside_its_vma(self, world, call, first, count):
        """EINVAL, also for a range that a second VMA covers, and for one that is empty."""
        vma, pfns = world.vma, np.zeros(count, dtype=np.uint64)
        start = world.at(first)
        wanted = HmmVmaRange(vma, start, start + count * PAGE_SIZE, pfns, FLAGS, VALUES, SHIFT)
        with pytest.raises(InvalidRange):
            call(wanted)

    @pytest.mark.parametrize("call", [get_pfns, fault])
    @pytest.mark.parametrize("flag", [VM_IO, VM_PFNMAP, VM_MIXEDMAP, VM_HUGETLB])
    def test_memory_that_cannot_be_mirrored(self, world, call, flag):
        """EINVAL, and every page is special."""
        world.vma.vm_flags |= flag
        wanted = range_of(world)
        with pytest.raises(InvalidArgument, match="hugetlb"):
            call(wanted)

        assert [VALUES.special] * 3 == wanted.pfns.tolist()
        world.vma.vm_flags &= ~flag

    @pytest.mark.parametrize("call", [get_pfns, fault])
    def test_memory_that_may_not_be_read(self, call):
        """EPERM, and no page is there."""
        world = mapped_range(pages=2, filled=False, prot="-")
        mirror = mirror_of(world.process.mm)
        wanted = range_of(world, asked=FAULT)
        with pytest.raises(PermissionDenied):
            call(wanted)

        assert [VALUES.none] * 2 == wanted.pfns.tolist()
        hmm_mirror_unregister(mirror)

    @pytest.mark.parametrize("call", [get_pfns, fault])
    def test_no_mirror(self, call):
        """EINVAL: nobody would hear of changes."""
        world = mapped_range(pages=1)
        with pytest.raises(InvalidArgument, match="register a mirror"):
            call(range_of(world))

    @pytest.mark.parametrize("call", [get_pfns, fault])
    def test_process_that_has_exited(self, world, call):
        """EINVAL, though the driver still has the VMA in hand."""
        wanted = range_of(world)
        world.process.exit()
        with pytest.raises(InvalidArgument):
            call(wanted)

    def test_lock_is_not_held(self, world):
        """mmap_sem is held for read."""
        with pytest.raises(InvalidArgument, match="mmap_sem"):
            hmm_vma_get_pfns(range_of(world))

    def test_vector_that_does_not_fit(self, world):
        """One word for each page."""
        wanted = range_of(world)
        wanted.pfns = np.zeros(2, dtype=np.uint64)
        with pytest.raises(InvalidArgument, match=r"uint64\[3\]"):
            get_pfns(wanted)

    def test_two_devices(self, world):
        """Pages of another device are named like the mirror's own, as v4.20 knows no owner."""
        other = NumpyDevice(world.machine, "512KiB", name="numpy1")
        other.to_device(world.process, world.at(1), PAGE_SIZE)
        wanted = range_of(world)

        assert [3, 7, 3] == [word & 7 for word in get_pfns(wanted)]
        hmm_vma_range_done(wanted)
