"""fork: two processes with one memory, until one of them stores."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import PAGE_SIZE
from mm.errors import Deadlock, InvalidArgument, OutOfMemory
from mm.filemap import lock_page, unlock_page
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.locking import preempt
from mm.mmu_notifier import MmuNotifier, MmuNotifyEvent, mmu_notifier_register
from mm.page_alloc import alloc_pages_bulk
from mm.page_flags import PG_anon_exclusive, PG_mlocked
from mm.pgtable import pte_present, pte_write
from mm.swap import put_page
from mm.swapops import is_device_exclusive_entry, is_write_device_private_entry
from mm.types import VM_LOCKED_MASK, VM_SOFTDIRTY
from tests.interleave import run_interleaved
from tests.world import mapped_range


def forked(**options):
    """A world, and the same range of its child."""
    world = mapped_range(**options)
    return world, world.seen_by(world.process.fork())


class TestContents:
    def test_stores_stay_at_home(self):
        """Each sees what it stores, and not what the other does; either may exit first."""
        world, child = forked(pages=3)
        world.process.write(world.at(0), b"P")
        child.process.write(world.at(1), b"C")

        assert (b"P", 1) == (world.process.read(world.at(0), 1), world.contents()[1])
        assert (0, b"C") == (child.contents()[0], child.process.read(world.at(1), 1))
        world.process.exit()
        assert [0, ord("C"), 2] == child.contents()

    def test_shared_pages(self):
        """Until then they have the same pages, that nobody may store to, and that are nobody's."""
        world, child = forked(pages=3)
        mem = world.machine.mem

        assert world.pfns().tolist() == child.pfns().tolist()
        assert not pte_write(world.ptes()).any() | pte_write(child.ptes()).any()
        assert [2] * 3 == mem.mapcount[world.pfns()].tolist()
        assert not (mem.flags[world.pfns()] & PG_anon_exclusive).any()

    def test_last_one_reuses(self):
        """A page that the other has let go of is stored to as it is, and has a new home."""
        world, child = forked(pages=2)
        before = child.pfns().tolist()
        world.process.exit()
        child.fill()

        assert before == child.pfns().tolist()
        owner = child.vma.anon_vma.number
        assert [owner] * 2 == (world.machine.mem.mapping[child.pfns()] >> 2).tolist()

    def test_untouched(self):
        """Memory without pages of its own has nothing to copy."""
        _, child = forked(pages=3, filled=False)

        assert [-1] * 3 == child.pfns().tolist()
        assert child.vma.anon_vma is None

    def test_after_exit(self):
        """Who has exited cannot fork."""
        world = mapped_range()
        world.process.exit()
        with pytest.raises(InvalidArgument, match="has exited"):
            world.process.fork()


class TestVmas:
    def test_advice(self):
        """dontfork keeps memory back, wipeonfork empties it."""
        world = mapped_range(pages=3)
        world.process.madvise(world.at(0), PAGE_SIZE, "dontfork")
        world.process.madvise(world.at(1), PAGE_SIZE, "wipeonfork")
        child = world.process.fork()

        assert child.find_vma(world.at(0)) is None
        assert [0, 2] == [child.read(world.at(page), 1)[0] for page in (1, 2)]
        assert world.intact()

    def test_locked(self):
        """The child's memory is not locked; the pages stay so for the parent."""
        world = mapped_range(pages=2)
        world.process.mlock(world.addr, world.nbytes)
        child = world.seen_by(world.process.fork())

        assert not child.vma.vm_flags & VM_LOCKED_MASK
        assert (2, 0) == (world.process.mm.locked_vm, child.process.mm.locked_vm)
        assert (world.machine.mem.flags[world.pfns()] & PG_mlocked).all()

    def test_policies_and_soft_dirty(self):
        """They are the child's too."""
        world = mapped_range(pages=2)
        world.process.set_mempolicy("preferred", [0])
        world.process.mbind(world.addr, world.nbytes, "bind", [0])
        child = world.seen_by(world.process.fork())

        assert world.process.mempolicy == child.process.mempolicy
        assert world.vma.vm_policy == child.vma.vm_policy
        assert child.vma.vm_flags & VM_SOFTDIRTY

    def test_watchers_hear_of_it(self):
        """Each private VMA that has pages loses its rights, as one range."""
        heard = []

        class Watcher(MmuNotifier):
            def invalidate_range_start(self, invalid):
                heard.append((invalid.event, invalid.start, invalid.end))

        world = mapped_range(pages=3)
        world.process.mmap(PAGE_SIZE)
        mmu_notifier_register(Watcher(), world.process.mm)
        world.process.fork()

        assert [(MmuNotifyEvent.PROTECTION_PAGE, world.vma.vm_start, world.vma.vm_end)] == heard


class TestAnonVmas:
    def test_generations(self):
        """A grandchild's pages are found from each generation; its own are only there."""
        world, child = forked(pages=1)
        grandchild = child.seen_by(child.process.fork())
        chains = [[a.number for a in w.vma.anon_vma_chain] for w in (world, child, grandchild)]

        assert chains[1] == chains[0] + chains[1][1:]
        assert chains[2] == chains[1] + chains[2][2:]
        assert [1, 2, 3] == [len(chain) for chain in chains]

    def test_left_behind(self):
        """A family whose parents exit and whose children fork keeps its list short."""
        _, last = forked(pages=1)
        for _ in range(8):
            last, gone = last.seen_by(last.process.fork()), last
            gone.process.exit()

        assert len(last.vma.anon_vma_chain) <= 3


class TestElsewhere:
    def test_pinned(self):
        """What is pinned is copied at once, and stays the parent's to store to."""
        world = mapped_range(pages=3)
        world.pin(1)
        child = world.seen_by(world.process.fork())

        assert [True, False, True] == (world.pfns() == child.pfns()).tolist()
        assert [False, True, False] == pte_write(world.ptes()).tolist()
        assert [0, 1, 2] == child.contents()

    def test_no_room_for_copies(self):
        """Then there is no child, and the parent has what it had."""
        world = mapped_range(pages=2048, nodes=("16MiB",))
        world.pins.append(world.process.pin(world.addr, world.nbytes))
        before = world.process.mmap("7MiB")
        world.process.touch(before, "7MiB")
        with pytest.raises(OutOfMemory, match="pinned"):
            world.process.fork()

        assert [world.process.mm] == world.machine.mem.mms
        assert world.intact()

    def test_on_a_device(self):
        """Pages in device memory are shared there; who touches one brings it back for both."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        child = world.seen_by(world.process.fork())
        assert not is_write_device_private_entry(np.concatenate((world.ptes(), child.ptes()))).any()
        child.process.read(world.at(1), 1)

        assert world.pfns().tolist() == child.pfns().tolist()
        assert pte_present(world.ptes())[1]
        assert world.intact()
        assert child.intact()

    def test_exclusive(self):
        """A device that has a page for itself loses it."""
        world = mapped_range(pages=2)
        world.make_exclusive(0, 1)
        child = world.seen_by(world.process.fork())

        assert pte_present(np.concatenate((world.ptes(), child.ptes()))).all()
        assert world.pfns().tolist() == child.pfns().tolist()

    def test_in_swap(self):
        """Both hold the slot, and it is nobody's own."""
        world = mapped_range(pages=3, swap="1MiB")
        world.pageout()
        child = world.seen_by(world.process.fork())

        assert world.slots().tolist() == child.slots().tolist()
        assert 3 == child.process.mm.swapents
        child.process.write(world.at(0), b"C")
        assert world.intact()

    def test_exclusive_page_that_is_locked(self):
        """The fork waits for whoever has locked it, as a fault would; nothing is lost."""
        world = mapped_range(pages=2)
        pfns = world.make_exclusive(0, 1)
        mem = world.machine.mem

        def hold():
            lock_page(mem, pfns)
            preempt("working on the page")
            unlock_page(mem, pfns)

        for seed in range(10):
            (_, child), _ = run_interleaved([hold, world.process.fork], seed=seed)
            with child:
                assert world.pfns().tolist() == world.seen_by(child).pfns().tolist()
            world.make_exclusive(0, 1)

    def test_exclusive_page_that_we_have_locked(self):
        """Who holds the lock itself is told so; the parent is as it was, and there is no child."""
        world = mapped_range(pages=2)
        pfns = world.make_exclusive(0, 1)
        lock_page(world.machine.mem, pfns)

        with pytest.raises(Deadlock, match="locked by the thread"):
            world.process.fork()

        unlock_page(world.machine.mem, pfns)
        assert [world.process.mm] == world.machine.mem.mms
        assert is_device_exclusive_entry(world.ptes()).all()
        assert world.intact()


class TestShortOfMemory:
    """The parent keeps what it had, and what the child had got so far is given back."""

    @pytest.mark.parametrize("left", range(8))
    def test_page_tables(self, left):
        """As many tables as are left, for a child that needs eight beside its top."""
        world = mapped_range(pages=1)
        for gib in (1, 2, 3):
            addr = world.process.mmap(2 * PAGE_SIZE, addr=gib << 30)
            world.process.write(addr, b"far")
        pool = world.machine.mem.tables
        hogged = pool.alloc(pool.rows - 1 - pool.in_use - left - 1)

        with pytest.raises(OutOfMemory, match="page-table pages"):
            world.process.fork()

        pool.release(hogged)
        assert [world.process.mm] == world.machine.mem.mms
        assert world.intact()
        world.machine.verify()
        assert b"far" == world.process.fork().read(3 << 30, 3)

    def test_no_table_for_the_top(self):
        """A child that has not even that is none."""
        world = mapped_range(pages=1)
        pool = world.machine.mem.tables
        hogged = pool.alloc(pool.rows - 1 - pool.in_use)

        with pytest.raises(OutOfMemory, match="page-table pages"):
            world.process.fork()

        pool.release(hogged)
        assert world.intact()

    @pytest.mark.parametrize("pinned", [1, 3])
    def test_frames_for_pinned_pages(self, pinned):
        """Copies of pinned pages find no frame, when others have been shared already."""
        world = mapped_range(pages=1100, nodes=("8MiB",))
        world.pins.append(world.process.pin(world.at(1100 - pinned), pinned * PAGE_SIZE))
        world.isolated.extend(hog(world.machine.mem))

        with pytest.raises(OutOfMemory, match="pinned, and 0 frames are free"):
            world.process.fork()

        put_page(world.machine.mem, np.array(world.isolated))
        world.isolated.clear()
        assert [world.process.mm] == world.machine.mem.mms
        assert world.intact()


def hog(mem):
    """All frames that there are."""
    return alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE, 0, mem.max_pfn).tolist()


class TestGenerations:
    @pytest.mark.parametrize("order", list(permutations(range(3))))
    @pytest.mark.parametrize("where", ["memory", "device", "swap"])
    def test_exits(self, order, where):
        """Three generations exit in any order: the last one has all, and can have it alone."""
        world = mapped_range(pages=3, swap="1MiB")
        child = world.seen_by(world.process.fork())
        child.process.write(child.at(1), b"C")
        grandchild = child.seen_by(child.process.fork())
        grandchild.process.write(grandchild.at(2), b"G")
        members = [world, child, grandchild]
        expected = [[0, 1, 2], [0, ord("C"), 2], [0, ord("C"), ord("G")]]
        for member in members:
            if where == "device":
                world.gpu.to_device(member.process, member.addr, member.nbytes)
            elif where == "swap":
                member.pageout()

        for left, who in enumerate(order, 1):
            world.machine.verify()
            if left == 3:
                assert expected[who] == members[who].contents()
                members[who].fill()
                assert members[who].intact()
                assert (world.machine.mem.flags[members[who].pfns()] & PG_anon_exclusive).all()
            members[who].process.exit()

    def test_many_with_one_device(self):
        """Sixteen processes share pages on a device; one CPU access brings a page back for all."""
        world = mapped_range(pages=4)
        family = [world.seen_by(world.process.fork()) for _ in range(15)]
        world.gpu.to_device(family[7].process, world.addr, world.nbytes)
        assert {(True,) * 4} == {tuple(member.on_device()) for member in family}
        mem = world.machine.mem
        assert (
            [16] * 4
            == mem.mapcount[world.pfns()].tolist()
            == (mem.refcount[world.pfns()] - 1).tolist()
        )

        family[3].process.write(family[3].at(1), b"3")

        assert [True, False, True, True] == world.on_device()
        assert 15 == mem.mapcount[world.pfns()[1]]
        for member in family:
            wanted = [0, ord("3") if member is family[3] else 1, 2, 3]
            assert wanted == member.contents()

    def test_device_stores_of_each(self):
        """What the device stores for one of them no other sees."""
        world = mapped_range(pages=2)
        family = [world.seen_by(world.process.fork()) for _ in range(4)]
        for number, member in enumerate(family, 100):
            world.gpu.write(member.process, member.at(1), bytes([number]))

        assert world.intact()
        assert [[0, n] for n in range(100, 104)] == [member.contents() for member in family]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "fork", "exit", "device", "system", "pageout"]),
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    max_size=25,
)


class TestFamily:
    @given(STEPS)
    def test_against_dicts(self, steps):
        """Whatever a family does, each member reads what it, or its ancestors before, stored."""
        world = mapped_range(pages=6, swap="1MiB")
        family = [(world, dict(enumerate(world.contents())))]
        for value, (what, number, page) in enumerate(steps, 100):
            who = number % len(family)
            member, known = family[who]
            if what == "write":
                member.process.write(member.at(page), bytes([value]))
                known[page] = value
            elif what == "fork" and len(family) < 4:
                family.append((member.seen_by(member.process.fork()), known.copy()))
            elif what == "exit" and len(family) > 1:
                del family[who]
                member.process.exit()
                continue
            elif what == "device":
                world.gpu.to_device(member.process, member.addr, member.nbytes)
            elif what == "system":
                world.gpu.to_system(member.process, member.addr, member.nbytes)
            elif what == "pageout":
                member.pageout(page)
            assert known[page] == member.process.read(member.at(page), 1)[0]
            world.machine.verify()
        for member, known in family:
            assert list(known.values()) == member.contents()
