"""Cutting and joining VMAs, against what Linux 6.12 shows in smaps and a dict of pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import Machine
from mm.anon_vma import anon_vma_clone
from mm.mempolicy import Mempolicy, Mpol
from mm.mmap import find_vma
from mm.pgtable import PUD_SIZE
from mm.types import (
    VM_DONTCOPY,
    VM_IO,
    VM_RAND_READ,
    VM_READ,
    VM_SOFTDIRTY,
    VM_WRITE,
    vm_get_page_prot,
)
from mm.typing import PAGE_SHIFT, PAGE_SIZE
from mm.vma import VmaMerge, split_vma, vma_merge, vma_modify_flags, vma_modify_policy, vmg_of
from tests.world import mapped_range

BASE = 3 * PUD_SIZE - 6 * PAGE_SIZE  # pages from here straddle tables of every level but two
PAGES = 12
BIND = Mempolicy(Mpol.BIND, (0,))


def at(page):
    return BASE + page * PAGE_SIZE


@pytest.fixture
def process():
    """Twelve pages of one VMA, never touched."""
    machine = Machine(("2MiB",), max_physmem="2MiB", debug=True)
    with machine.spawn() as process:
        process.mmap(PAGES * PAGE_SIZE, addr=at(0))
        yield process
        machine.verify()
    machine.verify()


def areas(process):
    """[first page, last page] of every VMA, in pages from BASE."""
    return [
        [(vma.vm_start - BASE) // PAGE_SIZE, (vma.vm_end - BASE) // PAGE_SIZE - 1]
        for vma in process.mm.vmas
    ]


def touch(process, *numbers):
    for page in numbers:
        process.touch(at(page), PAGE_SIZE)


def set_flags(process, first, end, change):
    """Let pages [first, end), of one VMA, have flags *change*d."""
    with process.mm.mmap_sem.write():
        vma = find_vma(process.mm, at(first))
        return vma_modify_flags(vma, at(first), at(end), change(vma.vm_flags))


def mark(process, first, end):
    """Let a range differ from the rest by a bit that has no other meaning yet."""
    return set_flags(process, first, end, lambda flags: flags | VM_RAND_READ)


def unmark(process, first, end):
    return set_flags(process, first, end, lambda flags: flags & ~VM_RAND_READ)


class TestSplit:
    @pytest.mark.parametrize(
        ("first", "end", "left"),
        [
            (0, 12, [[0, 11]]),
            (0, 4, [[0, 3], [4, 11]]),
            (8, 12, [[0, 7], [8, 11]]),
            (4, 8, [[0, 3], [4, 7], [8, 11]]),
        ],
    )
    def test_range_that_differs(self, process, first, end, left):
        """What is to differ is cut out of what stays."""
        changed = mark(process, first, end)

        assert left == areas(process)
        assert (at(first), at(end)) == (changed.vm_start, changed.vm_end)
        assert [vma is changed for vma in process.mm.vmas] == [
            bool(vma.vm_flags & VM_RAND_READ) for vma in process.mm.vmas
        ]

    def test_both_parts_know_the_pages(self, process):
        """Page offsets go on, file and policy are the same, and the rmap finds both."""
        touch(process, 2, 9)
        vma = process.mm.vmas[0]
        vma.vm_policy = BIND

        rest = split_vma(vma, at(5))

        assert vma.vm_pgoff + 5 == rest.vm_pgoff == at(5) >> PAGE_SHIFT
        assert (vma.vm_flags, vma.vm_policy) == (rest.vm_flags, rest.vm_policy)
        assert vma.anon_vma is rest.anon_vma is not None

    def test_page_prot_follows_the_flags(self, process):
        """Who changes flags need not think of what fresh entries look like."""
        vma = set_flags(process, 2, 4, lambda flags: flags & ~(VM_READ | VM_WRITE))

        assert vm_get_page_prot(vma.vm_flags) == vma.vm_page_prot
        assert vma.vm_page_prot != process.mm.vmas[0].vm_page_prot


class TestMerge:
    @pytest.mark.parametrize(
        ("marked", "again", "left"),
        [
            ((0, 4), (4, 8), [[0, 7], [8, 11]]),  # goes over to the one before it
            ((8, 12), (4, 8), [[0, 3], [4, 11]]),  # to the one after it
            ((4, 8), (0, 4), [[0, 7], [8, 11]]),  # all of it
            ((4, 8), (8, 12), [[0, 3], [4, 11]]),
            ((4, 6), (8, 10), [[0, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),  # to nobody
        ],
    )
    def test_range_that_becomes_like_its_neighbour(self, process, marked, again, left):
        """It is part of the neighbour from then on."""
        mark(process, *marked)
        mark(process, *again)

        assert left == areas(process)

    def test_gap_between_two(self, process):
        """What joins both is gone, and so is the second of them."""
        mark(process, 4, 8)
        first = process.mm.vmas[0]

        assert first is unmark(process, 4, 8)

        assert [[0, 11]] == areas(process)

    @pytest.mark.parametrize("touched", [(0,), (5,), (9,), (0, 5), (5, 9), (0, 5, 9)])
    def test_pages_are_found_afterwards(self, process, touched):
        """Cut and joined again, pages that were there before keep their contents and owner."""
        for page in touched:
            process.write(at(page), bytes([page + 1]))

        mark(process, 4, 8)
        unmark(process, 4, 8)

        assert [[0, 11]] == areas(process)
        assert [page + 1 for page in touched] == [process.read(at(page), 1)[0] for page in touched]

    def test_soft_dirty_is_no_difference(self, process):
        """Areas of which one was mapped since clear_refs join; the one that changes decides."""
        mark(process, 4, 8)
        process.mm.vmas[1].vm_flags &= ~VM_SOFTDIRTY

        joined = unmark(process, 4, 8)

        assert [[0, 11]] == areas(process)
        assert not joined.vm_flags & VM_SOFTDIRTY

    def test_special_areas_stay_alone(self, process):
        """What maps a device's registers joins nothing."""
        set_flags(process, 0, 4, lambda flags: flags | VM_IO)
        set_flags(process, 4, 8, lambda flags: flags | VM_IO)

        assert [[0, 3], [4, 7], [8, 11]] == areas(process)

    def test_policies(self, process):
        """Memory with a policy of its own is an area of its own, until both are equal."""
        with process.mm.mmap_sem.write():
            vma_modify_policy(process.mm.vmas[0], at(4), at(8), BIND)
            cut = areas(process)
            vma_modify_policy(process.mm.vmas[1], at(4), at(8), None)

        assert ([[0, 3], [4, 7], [8, 11]], [[0, 11]]) == (cut, areas(process))


class TestAnonVma:
    """Whose pages an area may take in: recorded in smaps after mprotect."""

    def cut(self, process, *touched):
        """Three areas alike but for a mark in the middle; then some of them get pages."""
        mark(process, 4, 8)
        touch(process, *touched)
        anon_vmas = [vma.anon_vma for vma in process.mm.vmas]
        return [[0, 3], [4, 7], [8, 11]], anon_vmas

    @pytest.mark.parametrize("touched", [(), (0,), (9,)])
    def test_range_without_pages(self, process, touched):
        """It joins whatever there is."""
        self.cut(process, *touched)

        unmark(process, 4, 8)

        assert [[0, 11]] == areas(process)

    def test_range_with_pages_between_areas_without(self, process):
        """It joins none of them: an area without an anon_vma takes in nothing that has one."""
        apart, _ = self.cut(process, 5)

        unmark(process, 4, 8)

        assert apart == areas(process)

    def test_two_that_had_pages_before(self, process):
        """Areas with pages of different trees do not meet; the range goes to the first."""
        self.cut(process, 0, 9)

        unmark(process, 4, 8)

        assert [[0, 7], [8, 11]] == areas(process)

    def test_cut_with_pages(self, process):
        """Parts of what was one have one tree, and join whatever they hold."""
        touch(process, 5)
        mark(process, 4, 8)
        touch(process, 0, 9)

        unmark(process, 4, 8)

        assert [[0, 11]] == areas(process)

    def test_pages_of_two_trees(self):
        """An area that has pages of a parent as well as its own, as after a fork, stays alone."""
        world = mapped_range(pages=2)
        elsewhere = world.process.mmap(PAGE_SIZE, addr=at(0))
        world.process.touch(elsewhere, PAGE_SIZE)
        anon_vma_clone(world.vma, find_vma(world.process.mm, elsewhere))

        world.process.mmap(PAGE_SIZE, addr=world.at(-1))

        assert world.addr == world.vma.vm_start


class TestNew:
    def test_free_range_between_two(self, process):
        """New memory that both neighbours go on in makes one of three."""
        process.munmap(at(4), 4 * PAGE_SIZE)
        mm, first = process.mm, process.mm.vmas[0]
        vmg = VmaMerge(mm, at(4), at(8), at(4) >> PAGE_SHIFT, first.vm_flags)

        with mm.mmap_sem.write():
            merged = vma_merge(vmg)
            mm.total_vm += 4

        assert first is merged
        assert [[0, 11]] == areas(process)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"vm_flags": VM_READ},
            {"vm_file": "a file"},
            {"vm_policy": BIND},
            {"pgoff": 7},
        ],
    )
    def test_what_keeps_it_apart(self, process, wrong):
        """Flags, file, policy and page offset must all go on."""
        process.munmap(at(4), 8 * PAGE_SIZE)
        vmg = vmg_of(process.mm.vmas[0], at(4), at(8))
        for name, value in wrong.items():
            setattr(vmg, name, value)

        with process.mm.mmap_sem.write():
            assert vma_merge(vmg) is None

        assert [[0, 3]] == areas(process)

    def test_no_neighbour_touches_it(self, process):
        """A gap of one page is enough."""
        process.munmap(at(4), 8 * PAGE_SIZE)
        vmg = vmg_of(process.mm.vmas[0], at(5), at(8))

        assert vma_merge(vmg) is None


_BITS = VM_RAND_READ | VM_DONTCOPY
bits = st.sampled_from([VM_RAND_READ, VM_DONTCOPY])
changes = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES), bits, st.booleans())


class TestAgainstPages:
    @given(changes=st.lists(changes, max_size=12))
    def test_untouched_memory(self, changes):
        """The areas are the longest runs of pages alike, whatever came before."""
        machine = Machine(("1MiB",), max_physmem="1MiB", payload=False)
        process = machine.spawn()
        process.mmap(PAGES * PAGE_SIZE, addr=at(0))
        model = [0] * PAGES

        for first, count, bit, on in changes:
            for page in range(first, min(first + count, PAGES)):
                before, model[page] = model[page], model[page] & ~bit | on * bit
                if before != model[page]:
                    set_flags(process, page, page + 1, lambda f, p=page: f & ~_BITS | model[p])

        runs = [page for page in range(PAGES) if page == 0 or model[page] != model[page - 1]]
        assert runs == [first for first, _ in areas(process)]
        for page, flags in enumerate(model):
            assert flags == process.find_vma(at(page)).vm_flags & _BITS
        process.exit()
        machine.verify()
