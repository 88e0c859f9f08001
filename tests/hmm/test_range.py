"""hmm_range_fault(): what it answers, what it faults in on the way, and when it gives up.

Hypothesis draws pages, VMAs and requests across a border between page tables; the page-at-a-time
twin (tests/reference/range.py) says what must come of them. The rest is one sentence at a time.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given

from hmm import (
    HMM_PFN_ERROR,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_pfn,
    hmm_range_fault,
)
from mm import (
    PAGE_SIZE,
    BusError,
    Busy,
    InvalidArgument,
    InvalidRange,
    KernelBug,
    PermissionDenied,
    SegmentationFault,
)
from mm.errors import MmError
from mm.filemap import unlock_page
from mm.gup import make_device_exclusive_range
from mm.mmu_notifier import mmu_interval_read_begin
from mm.pgtable import pte_offset
from mm.sched import Task, running
from mm.swap import put_page
from mm.swapops import make_hwpoison_entry
from mm.types import VM_IO, VM_MIXEDMAP, VM_PFNMAP
from mm.typing import pages
from mm.vectors import has
from tests.hmm.scenes import BORDERS, FAULT, FLAGS, STORE, Case, Scene, cases
from tests.hmm.watch import Watch, hmm_range_of, look, look_until_true
from tests.interleave import explore
from tests.reference import range as twin
from tests.world import ended_worlds, mapped_range


def fault_and_compare(case: Case) -> None:
    with ended_worlds():
        scene = Scene(case)
        world = scene.world
        owners = {None: None, "numpy0": world.gpu, "numpy1": scene.theirs}
        expected = twin.Walk(
            memory=scene.memory(),
            start=world.at(case.first),
            end=world.at(case.first + len(case.words)),
            words=list(case.words),
            default=case.default,
            mask=case.mask,
            owner=case.owner or "nobody",
        )
        failure = expected.run()

        task = Task("device")
        with Watch(world.process.mm, deaf=True) as watch, running(task):
            wanted = hmm_range_of(world, watch, case.first, len(case.words))
            wanted.hmm_pfns[:] = case.words
            wanted.default_flags, wanted.pfn_flags_mask = case.default, case.mask
            wanted.dev_private_owner = owners[case.owner]
            got = ""
            try:
                look(wanted)
            except MmError as error:
                got = errno.errorcode[error.code]

        words = wanted.hmm_pfns.tolist()
        assert (failure, expected.words) == (got, [word & FLAGS for word in words])
        assert expected.memory.faults == task.min_flt
        answered = words if not failure else words[: (expected.last - wanted.start) // PAGE_SIZE]
        for i, word in enumerate(answered):
            if word & twin.VALID:
                assert scene.pfn(wanted.start + i * PAGE_SIZE) == word & ~FLAGS
        for addr, page in expected.memory.pages.items():
            if any(start <= addr < end for start, end, _ in expected.memory.vmas):
                found = scene.page(addr)
                assert (page.kind, page.write) == (found.kind, found.write)


class TestTwin:
    @given(cases())
    def test_answers_faults_and_failures_are_those_of_the_twin(self, case: Case):
        """Any pages, VMAs and requests: the same words, errno, faults and page table."""
        fault_and_compare(case)


class TestSnapshot:
    def test_pages_of_every_kind(self):
        """Rights are those of the entry; what the CPU has not got is 0."""
        world = mapped_range(pages=5, filled=False)
        world.process.touch(world.at(1), PAGE_SIZE, write=False)
        world.process.touch(world.at(2), 3 * PAGE_SIZE)
        world.write_protect(2)
        world.gpu.to_device(world.process, world.at(4), PAGE_SIZE)
        with Watch(world.process.mm) as watch:
            words = look(hmm_range_of(world, watch))
            ours = look(hmm_range_of(world, watch, dev_private_owner=world.gpu))

        assert [False, True, True, True, False] == has(words, HMM_PFN_VALID).tolist()
        assert [False, False, False, True, False] == has(words, HMM_PFN_WRITE).tolist()
        assert [True, True] == has(ours[3:], HMM_PFN_WRITE).tolist()
        assert world.pfns()[2:].tolist() == hmm_pfn_to_pfn(ours[2:]).tolist()
        assert [0, world.machine.mem.zero_pfn] == hmm_pfn_to_pfn(words[:2]).tolist()

    def test_nothing_is_faulted_in(self):
        """The page table is read and not changed, whatever the words were."""
        world = mapped_range(pages=4, filled=False)
        task = Task("device")
        with Watch(world.process.mm) as watch, running(task):
            wanted = hmm_range_of(world, watch)
            wanted.hmm_pfns[:] = STORE
            look(wanted)

        assert (0, [0] * 4, [0] * 4) == (
            task.min_flt,
            wanted.hmm_pfns.tolist(),
            world.ptes().tolist(),
        )

    def test_wide_range(self):
        """Tables, missing tables and VMAs come one after another as they lie."""
        world = mapped_range(pages=3 * 512, filled=False)
        world.process.touch(world.at(700), PAGE_SIZE)
        world.process.munmap(world.at(1000), 100 * PAGE_SIZE)
        with Watch(world.process.mm) as watch:
            words = look(hmm_range_of(world, watch))

        assert [700] == np.flatnonzero(has(words, HMM_PFN_VALID)).tolist()
        assert [*range(1000, 1100)] == np.flatnonzero(has(words, HMM_PFN_ERROR)).tolist()

    @pytest.mark.parametrize("flag", [VM_IO, VM_PFNMAP])
    def test_memory_without_pages(self, flag):
        """A driver's own mapping is an error to look at, and a failure to ask for."""
        world = mapped_range(pages=2)
        world.vma.vm_flags |= flag
        with Watch(world.process.mm) as watch:
            words = look(hmm_range_of(world, watch))
            with pytest.raises(SegmentationFault):
                look(hmm_range_of(world, watch, default_flags=FAULT))

        assert has(words, HMM_PFN_ERROR).all()

    def test_driver_mapping_of_ordinary_pages(self):
        """VM_MIXEDMAP alone is no reason to refuse."""
        world = mapped_range(pages=2)
        world.vma.vm_flags |= VM_MIXEDMAP
        with Watch(world.process.mm) as watch:
            assert has(look(hmm_range_of(world, watch)), HMM_PFN_VALID).all()


class TestSpill:
    def test_fault_takes_the_rest_of_the_table_along(self):
        """One hole at page 2 brings the device's own pages 3 to 5 back; pages 0 and 1 stay."""
        world = mapped_range(pages=6)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.process.munmap(world.at(2), PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, addr=world.at(2))
        task = Task("device")
        with Watch(world.process.mm, deaf=True) as watch, running(task):
            owned = hmm_range_of(world, watch, dev_private_owner=world.gpu, default_flags=FAULT)
            words = look(owned)

        assert [True, True, False, False, False, False] == world.on_device()
        assert has(words, HMM_PFN_VALID).all()
        assert 1 + 3 == task.min_flt

    def test_table_ends(self):
        """It stops where the next page table begins."""
        border = BORDERS["2 MiB"]
        world = mapped_range(pages=6, addr=border - 3 * PAGE_SIZE)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.process.munmap(world.at(1), PAGE_SIZE)
        world.process.mmap(PAGE_SIZE, addr=world.at(1))
        with Watch(world.process.mm, deaf=True) as watch:
            look(hmm_range_of(world, watch, dev_private_owner=world.gpu, default_flags=FAULT))

        assert [True, False, False, True, True, True] == world.on_device()

    def test_missing_table(self):
        """Where it is missing, all that it would cover of the range faults, from its start."""
        world = mapped_range(pages=8, filled=False, addr=BORDERS["1 GiB"])
        with Watch(world.process.mm) as watch:
            wanted = hmm_range_of(world, watch, first=1, count=6, pfn_flags_mask=FLAGS)
            wanted.hmm_pfns[3] = FAULT
            words = look(wanted)

        assert has(words, HMM_PFN_VALID).all()
        assert [False] + [True] * 6 + [False] == (world.ptes() != 0).tolist()

    def test_store_in_a_missing_table(self):
        """One page that asks for a store has all of them faulted for one."""
        world = mapped_range(pages=3, filled=False, addr=BORDERS["1 GiB"])
        with Watch(world.process.mm) as watch:
            wanted = hmm_range_of(world, watch, pfn_flags_mask=FLAGS)
            wanted.hmm_pfns[2] = STORE
            words = look(wanted)

        assert has(words, HMM_PFN_WRITE).all()

    def test_faults_end_at_a_lost_page(self):
        """Pages before it fault, those after it do not."""
        world = mapped_range(pages=4, filled=False)
        world.process.touch(world.at(2), PAGE_SIZE, write=False)
        world.rewrite([2], lambda ptes: make_hwpoison_entry(pages(7)))
        with Watch(world.process.mm) as watch, pytest.raises(BusError):
            look(hmm_range_of(world, watch, default_flags=FAULT))

        assert [True, True, True, False] == (world.ptes() != 0).tolist()

    def test_store_to_read_only_device_page(self):
        """The owner's page is answered for as it is, without the right that was asked for."""
        world = mapped_range(pages=1)
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)
        world.write_protect(0)
        with Watch(world.process.mm) as watch:
            owned = hmm_range_of(world, watch, dev_private_owner=world.gpu, default_flags=STORE)
            word = look(owned)

        assert ([True], [False]) == (world.on_device(), has(word, HMM_PFN_WRITE).tolist())


class TestOnTheWay:
    def test_page_that_another_device_has_for_itself(self):
        """It is nothing to look at; asked for, it is the CPU's again first."""
        world = mapped_range(pages=2)
        mem, mm = world.machine.mem, world.process.mm
        with mm.mmap_sem.read():
            taken = make_device_exclusive_range(mm, world.addrs[1:], world.gpu)
        unlock_page(mem, taken)
        put_page(mem, taken)
        with Watch(mm) as watch:
            seen = look(hmm_range_of(world, watch))
            words = look_until_true(hmm_range_of(world, watch, default_flags=STORE))

        assert [True, False] == has(seen, HMM_PFN_VALID).tolist()
        assert has(words, HMM_PFN_WRITE).all()

    def test_page_in_swap(self):
        """It is nothing to look at; asked for, it is read first."""
        world = mapped_range(pages=2, swap="1MiB")
        world.process.madvise(world.at(1), PAGE_SIZE, "pageout")
        with Watch(world.process.mm) as watch:
            seen = look(hmm_range_of(world, watch))
            words = look(hmm_range_of(world, watch, default_flags=FAULT))

        assert [True, False] == has(seen, HMM_PFN_VALID).tolist()
        assert has(words, HMM_PFN_VALID).all()
        assert world.intact()


class TestFailures:
    def test_store_to_read_only_memory(self):
        """EPERM; a load is fine."""
        world = mapped_range(pages=2, filled=False, prot="r")
        with Watch(world.process.mm) as watch:
            with pytest.raises(PermissionDenied, match="a store at"):
                look(hmm_range_of(world, watch, default_flags=STORE))
            assert has(look(hmm_range_of(world, watch, default_flags=FAULT)), HMM_PFN_VALID).all()

    def test_pages_before_the_one_that_fails(self):
        """They are faulted in and answered for; the words after them are as they were."""
        world = mapped_range(pages=4, filled=False)
        world.process.munmap(world.at(2), PAGE_SIZE)
        with Watch(world.process.mm) as watch:
            wanted = hmm_range_of(world, watch, pfn_flags_mask=FLAGS)
            wanted.hmm_pfns[:] = FAULT
            with pytest.raises(SegmentationFault) as failure:
                look(wanted)

        assert world.at(2) == failure.value.address
        assert (errno.EFAULT, [FAULT] * 2) == (failure.value.code, wanted.hmm_pfns[2:].tolist())
        assert [world.machine.mem.zero_pfn] * 2 == hmm_pfn_to_pfn(wanted.hmm_pfns[:2]).tolist()

    def test_lost_page(self):
        """EFAULT, at the page whose contents are lost."""
        world = mapped_range(pages=3, filled=False)
        world.process.touch(world.addr, world.nbytes, write=False)
        world.rewrite([1], lambda ptes: make_hwpoison_entry(pages(7)))
        with Watch(world.process.mm) as watch, pytest.raises(BusError) as failure:
            look(hmm_range_of(world, watch, default_flags=FAULT))

        assert world.at(1) == failure.value.address

    @pytest.mark.parametrize(
        ("features", "why"), [("", "no device waits"), ("sigbus", "the page at")]
    )
    def test_page_of_userland(self, features, why):
        """EFAULT, as nobody can wait here; what comes after it is not faulted in."""
        world = mapped_range(pages=4, filled=False)
        fd = world.process.userfaultfd(features)
        fd.register(world.addr, world.nbytes)
        fd.zeropage(world.addr, PAGE_SIZE)
        with Watch(world.process.mm) as watch, pytest.raises(BusError, match=why) as failure:
            look(hmm_range_of(world, watch, default_flags=FAULT))

        assert world.at(1) == failure.value.address
        fd.close()

    def test_no_memory(self):
        """EFAULT, as the kernel has no other word for it here."""
        world = mapped_range(pages=600, filled=False, nodes=("2MiB",))
        with Watch(world.process.mm, deaf=True) as watch, pytest.raises(BusError, match="no frame"):
            look(hmm_range_of(world, watch, default_flags=STORE))

    def test_process_that_has_exited(self):
        """Nothing is mapped any more; the notifier may still be removed."""
        world = mapped_range(pages=2)
        with Watch(world.process.mm) as watch:
            wanted, asked = hmm_range_of(world, watch), hmm_range_of(world, watch)
            world.process.exit()
            for each in (wanted, asked):
                each.notifier_seq = mmu_interval_read_begin(watch)
            asked.default_flags = FAULT
            with pytest.raises(SegmentationFault):
                look(asked)

            assert has(look(wanted), HMM_PFN_ERROR).all()

    def test_page_that_never_comes(self):
        """A driver that answers CPU faults and does nothing is found out."""
        world = mapped_range(pages=1)
        world.gpu.to_device(world.process, world.addr, PAGE_SIZE)
        world.gpu.page_fault = lambda vma, addrs, pfns, write: 0
        with Watch(world.process.mm) as watch, pytest.raises(KernelBug, match="in vain"):
            look(hmm_range_of(world, watch, default_flags=FAULT))
        del world.gpu.page_fault


class TestArguments:
    @pytest.fixture
    def wanted(self):
        world = mapped_range(pages=2)
        with Watch(world.process.mm, world.addr, world.at(2)) as watch:
            yield hmm_range_of(world, watch)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("start", 0x1001),
            ("end", 0),
            ("hmm_pfns", np.zeros(3, dtype=np.uint64)),
            ("hmm_pfns", np.zeros(2, dtype=np.int64)),
            ("hmm_pfns", [0, 0]),
        ],
    )
    def test_wrong_field(self, wanted, field, value):
        """A range that is none, and a vector that does not fit it, are refused."""
        setattr(wanted, field, value)
        with pytest.raises(InvalidArgument):
            look(wanted)

    def test_vector_that_may_not_be_written(self, wanted):
        """The answer has to go somewhere."""
        wanted.hmm_pfns.flags.writeable = False
        with pytest.raises(InvalidArgument, match="writable"):
            look(wanted)

    def test_range_that_nobody_watches(self, wanted):
        """A change outside the notifier's interval would not be heard of."""
        wanted.start -= PAGE_SIZE
        wanted.hmm_pfns = np.zeros(3, dtype=np.uint64)
        with pytest.raises(InvalidRange, match="not inside what the notifier watches"):
            look(wanted)

    def test_lock_is_not_held(self, wanted):
        """Without mmap_sem VMAs may go away under the walk."""
        with pytest.raises(InvalidArgument, match="mmap_sem"):
            hmm_range_fault(wanted)

    def test_notifier_that_is_removed(self):
        """Its count says nothing any more."""
        world = mapped_range(pages=1)
        with Watch(world.process.mm) as watch:
            wanted = hmm_range_of(world, watch)
        with pytest.raises(InvalidArgument, match="not inserted"):
            look(wanted)


class TestProtocol:
    def test_change_since_the_count_was_read(self):
        """EBUSY before anything is looked at; the next try sees the change."""
        world = mapped_range(pages=2)
        with Watch(world.process.mm) as watch:
            wanted = hmm_range_of(world, watch)
            world.process.munmap(world.addr, PAGE_SIZE)
            with pytest.raises(Busy):
                look(wanted)

            words = look_until_true(wanted)

        assert [True, False] == has(words, HMM_PFN_ERROR).tolist()

    def test_own_fault_invalidates(self):
        """A store that replaces the zero page is a change too, and costs one more try."""
        world = mapped_range(pages=1, filled=False)
        world.process.touch(world.addr, PAGE_SIZE, write=False)
        with Watch(world.process.mm) as watch:
            wanted = hmm_range_of(world, watch, default_flags=STORE)
            with pytest.raises(Busy):
                look(wanted)

            assert has(look_until_true(wanted), HMM_PFN_WRITE).all()

    def test_page_under_migration_is_waited_for(self):
        """Whoever comes first: the device sees the page before or after it moved."""
        world = mapped_range(pages=1, filled=False, nodes=("2MiB",), memory="64KiB")

        def scenario(together):
            addr = world.process.mmap(PAGE_SIZE)
            world.process.touch(addr, PAGE_SIZE)
            with Watch(world.process.mm) as watch:
                words = np.zeros(1, dtype=np.uint64)
                wanted = HmmRange(watch, 0, addr, addr + PAGE_SIZE, words, STORE)
                together(
                    lambda: look_until_true(wanted),
                    lambda: world.gpu.to_device(world.process, addr, PAGE_SIZE),
                )
                assert has(words, HMM_PFN_WRITE).all()
            world.machine.verify()
            world.process.munmap(addr, PAGE_SIZE)

        explore(scenario, preemptions=2)

    def test_unmapping_meets_the_device(self):
        """What the device maps is never a page that the process has unmapped already."""
        world = mapped_range(pages=1, filled=False, nodes=("2MiB",), memory="64KiB")
        pool, mm = world.machine.mem.tables, world.process.mm

        def scenario(together):
            addr = world.process.mmap(2 * PAGE_SIZE)
            world.process.touch(addr, 2 * PAGE_SIZE)
            mapped = {}

            class Device(Watch):
                def invalidate(self, invalid, cur_seq):
                    with world.machine.mem.locks.atomic:
                        mapped.clear()
                        return super().invalidate(invalid, cur_seq)

            with Device(mm) as watch:

                def device():
                    words = np.zeros(1, dtype=np.uint64)
                    wanted = HmmRange(watch, 0, addr, addr + PAGE_SIZE, words, 0)
                    while True:
                        wanted.notifier_seq = mmu_interval_read_begin(watch)
                        try:
                            look(wanted)
                        except Busy:
                            continue
                        with world.machine.mem.locks.atomic:
                            if watch.invalidate_seq == wanted.notifier_seq:
                                mapped[addr] = int(words[0])
                                return

                together(device, lambda: world.process.munmap(addr, PAGE_SIZE))
                if mapped:
                    entry = pool.entries[pte_offset(pool, mm.pgd, pages(addr))]
                    assert (mapped[addr] == int(HMM_PFN_ERROR)) == (entry[0] == 0)
            world.process.munmap(addr, 2 * PAGE_SIZE)

        explore(scenario, preemptions=2)
