"""What /proc shows: pagemap words, sizes of mappings, and what clear_refs forgets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import PAGE_SIZE, InvalidArgument, InvalidRange
from mm.mmu_notifier import (
    MmuNotifyEvent,
    mmu_notifier_register,
    mmu_notifier_unregister_no_release,
)
from mm.page_flags import PG_dirty, PG_referenced, PG_swapbacked
from mm.pgtable import pte_present, pte_soft_dirty, pte_write
from mm.swapops import SWP_DEVICE_READ, SWP_DEVICE_WRITE, is_write_device_private_entry
from mm.task_mmu import ClearRefs, MemSizeStats, entry_pfns
from mm.types import (
    VM_ACCOUNT,
    VM_HUGEPAGE,
    VM_LOCKED,
    VM_LOCKONFAULT,
    VM_MERGEABLE,
    VM_MIXEDMAP,
    VM_READ,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
)
from tests.world import mapped_range

SD, EXCLUSIVE, FILE, SWAP, PRESENT = (1 << bit for bit in (55, 56, 61, 62, 63))
FRAME = (1 << 55) - 1


def words(world, before=0, after=0):
    """The pagemap of the range, and of some pages *before* and *after* it."""
    return world.process.pagemap(world.at(-before), before + world.pages + after).tolist()


def soft_dirty(world):
    """Which pages of the range are soft-dirty."""
    return [bool(word & SD) for word in words(world)]


class TestPagemap:
    def test_present(self):
        """A present page shows its PFN, that nobody else maps it, and that it was stored to."""
        world = mapped_range(pages=2)

        assert [PRESENT | EXCLUSIVE | SD | pfn for pfn in world.pfns().tolist()] == words(world)

    def test_zero_page(self):
        """The zero page has a PFN too, and is nobody's."""
        world = mapped_range(pages=1, filled=False)
        world.process.read(world.addr, 1)

        assert [PRESENT | SD | world.machine.mem.zero_pfn] == words(world)

    def test_holes(self):
        """A hole in a new mapping is soft-dirty, outside any there is nothing."""
        world = mapped_range(pages=2, filled=False)

        assert [0, SD, SD, 0, 0] == words(world, before=1, after=2)

    def test_device_page(self):
        """A page in device memory shows as swapped, with the type and offset of its entry."""
        world = mapped_range(pages=2)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.write_protect(1)
        types = (SWP_DEVICE_WRITE, SWP_DEVICE_READ)
        frames = [pfn << 5 | kind for pfn, kind in zip(world.pfns().tolist(), types, strict=True)]

        assert [SWAP | SD | frame for frame in frames] == words(world)

    def test_shared(self):
        """A page that two processes map is not exclusive."""
        world = mapped_range(pages=2)
        world.fork(0)

        assert [0, EXCLUSIVE] == [word & EXCLUSIVE for word in words(world)]

    def test_prot_none(self):
        """What the process may not touch is present all the same."""
        world = mapped_range(pages=1)
        world.protect("-")

        assert [PRESENT] == [word & PRESENT for word in words(world)]

    def test_file_page(self):
        """A page that is not anonymous says so."""
        world = mapped_range(pages=2)
        mapping = world.machine.mem.mapping
        pfn = world.pfns().item(0)
        kept, mapping[pfn] = mapping.item(pfn), 4
        shown = [word & FILE for word in words(world)]
        mapping[pfn] = kept

        assert [FILE, 0] == shown

    @pytest.mark.parametrize(
        ("addr", "npages"), [(1, 1), (-PAGE_SIZE, 1), (0, -1), (1 << 56, 1), (0, 1 << 60)]
    )
    def test_wrong_range(self, addr, npages):
        """Addresses are of whole pages that a process can have."""
        world = mapped_range()
        with pytest.raises(InvalidRange, match="is not made of pages below"):
            world.process.pagemap(addr, npages)

    @given(st.lists(st.sampled_from("rwdDn"), min_size=1, max_size=12), st.integers(0, 2))
    def test_any_mix(self, kinds, before):
        """Each word says what became of its page, whatever its neighbours are."""
        world = mapped_range(pages=len(kinds), filled=False)
        for page, kind in enumerate(kinds):
            if kind in "wD":
                world.process.write(world.at(page), b"x")
            elif kind == "r":
                world.process.read(world.at(page), 1)
        for page, kind in enumerate(kinds):
            if kind in "dD":
                world.gpu.to_device(world.process, world.at(page), PAGE_SIZE)
        zero = world.machine.mem.zero_pfn
        expected = [0] * before
        for kind, pfn in zip(kinds, world.pfns().tolist(), strict=True):
            present = PRESENT | (EXCLUSIVE | pfn if kind == "w" else zero)
            away = SWAP | pfn << 5 | SWP_DEVICE_WRITE
            expected.append(SD | {"n": 0, "r": present, "w": present}.get(kind, away))

        assert expected == words(world, before)


class TestEntryPfns:
    def test_each_kind(self):
        """A mapped page, one in device memory, the zero page and a hole."""
        world = mapped_range(pages=4, filled=False)
        world.process.write(world.at(0), bytes(2 * PAGE_SIZE))
        world.process.read(world.at(2), 1)
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)

        assert [*world.pfns()[:2].tolist(), -1, -1] == entry_pfns(world.ptes()).tolist()


class TestSmaps:
    def sizes(self, world, index=0):
        """What of the record is not 0, in pages."""
        (mss,) = world.process.smaps()[index : index + 1]
        names = set(MemSizeStats.__dataclass_fields__) - {"start", "end", "perms", "vmflags"}
        found = {name: getattr(mss, name) for name in sorted(names)}
        return {name: size / PAGE_SIZE for name, size in found.items() if size}

    def test_present(self):
        """Pages of one process are private; stores make them dirty."""
        world = mapped_range(pages=3, filled=False)
        world.process.write(world.addr, bytes(2 * PAGE_SIZE))
        world.process.read(world.at(2), 1)

        assert {"anonymous": 2, "private_dirty": 2, "pss": 2, "resident": 2} == self.sizes(world)

    def test_device_pages(self):
        """Pages in device memory count as resident and as the process's own."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        sizes = self.sizes(world)

        assert (3, 3, 3) == (sizes["resident"], sizes["pss"], sizes["anonymous"])
        assert 3 == sizes.get("private_clean", 0) + sizes["private_dirty"]

    def test_shared(self):
        """A page is divided among those who map it."""
        world = mapped_range(pages=2)
        world.fork(0, 1)

        assert {"anonymous": 2, "pss": 1, "resident": 2, "shared_dirty": 2} == self.sizes(world)

    def test_thirds(self):
        """Shares are summed with binary places, and what is left below a byte is dropped."""
        world = mapped_range(pages=3)
        world.fork(0, 1, 2)
        world.fork(0, 1, 2)

        assert 3 * (PAGE_SIZE * 4096 // 3) // 4096 == world.process.smaps()[0].pss == 4095

    def test_locked(self):
        """What is locked counts once more."""
        world = mapped_range(pages=2)
        world.vma.vm_flags |= VM_LOCKED
        sizes = self.sizes(world)
        world.vma.vm_flags &= ~VM_LOCKED

        assert 2 == sizes["pss_locked"]

    def test_lazyfree(self):
        """An anonymous page that lost its home in swap and was not stored to since."""
        world = mapped_range(pages=3)
        mem, pfns = world.machine.mem, world.pfns()
        world.clear_refs(0, 1)
        mem.flags[pfns] &= ~(PG_swapbacked | PG_dirty)
        sizes = self.sizes(world)
        mem.flags[pfns] |= PG_swapbacked

        assert (2, 2, 1) == (sizes["lazyfree"], sizes["private_clean"], sizes["private_dirty"])

    def test_each_vma(self):
        """One record for each, with its place and rights."""
        world = mapped_range(pages=3, prot="r", filled=False)
        world.process.munmap(world.at(1), PAGE_SIZE)

        assert [
            (world.addr, world.at(1), "r--p", "rd mr mw me sd"),
            (world.at(2), world.at(3), "r--p", "rd mr mw me sd"),
        ] == [(m.start, m.end, m.perms, m.vmflags) for m in world.process.smaps()]

    @pytest.mark.parametrize(
        ("bits", "perms", "letters"),
        [
            (VM_READ | VM_WRITE | VM_ACCOUNT, "rw-p", "rd wr ac"),
            (VM_READ | VM_WRITE | VM_SHARED, "rw-s", "rd wr sh"),
            (VM_LOCKED | VM_LOCKONFAULT, "---p", "lo lf"),
            (VM_SOFTDIRTY | VM_MIXEDMAP | VM_HUGEPAGE | VM_MERGEABLE, "---p", "sd mm hg mg"),
        ],
    )
    def test_flags(self, bits, perms, letters):
        """VmFlags come in the order of their bits."""
        world = mapped_range(pages=1, filled=False)
        kept, world.vma.vm_flags = world.vma.vm_flags, bits
        (mss,) = world.process.smaps()
        world.vma.vm_flags = kept

        assert (perms, letters) == (mss.perms, mss.vmflags)


class TestSoftDirty:
    def test_new_mapping(self):
        """All of a new mapping is soft-dirty, until somebody clears it."""
        world = mapped_range(pages=3, filled=False)

        assert [True] * 3 == soft_dirty(world)
        world.process.clear_refs(4)
        assert [False] * 3 == soft_dirty(world)

    def test_store_after_it(self):
        """The next store takes one fault and leaves its mark; a load leaves none."""
        world = mapped_range(pages=3)
        world.process.clear_refs(4)
        before = world.process.min_flt

        world.process.write(world.at(1), b"x")
        world.process.read(world.at(2), 1)

        assert [False, True, False] == soft_dirty(world)
        assert 1 == world.process.min_flt - before
        world.machine.verify()

    def test_first_touch(self):
        """A page that appears by a store is marked, one that appears by a load is not."""
        world = mapped_range(pages=2, filled=False)
        world.process.clear_refs(4)
        world.process.write(world.at(0), b"x")
        world.process.read(world.at(1), 1)

        assert [True, False] == soft_dirty(world)

    def test_device_pages(self):
        """They forget too, and keep the right to store, which is the device's."""
        world = mapped_range(pages=2)
        world.gpu.to_device(world.process, world.addr, world.nbytes)

        world.process.clear_refs(4)

        assert [False, False] == soft_dirty(world)
        assert is_write_device_private_entry(world.ptes()).all()

    def test_store_to_a_page_that_came_back(self):
        """Its entry is writable, so hardware stores without a fault, and without a mark."""
        world = mapped_range(pages=1)
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.process.clear_refs(4)
        world.process.read(world.addr, 1)

        world.process.write(world.addr, b"x")

        assert [False] == soft_dirty(world)

    def test_migration_keeps_it(self):
        """To the device and back, a page stays what it was."""
        world = mapped_range(pages=2)
        world.process.clear_refs(4)
        world.process.write(world.at(1), b"x")

        world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert [False, True] == soft_dirty(world)
        world.gpu.to_system(world.process, world.addr, world.nbytes)
        assert [False, True] == soft_dirty(world)

    def test_pinned_page_stays_writable(self):
        """Who has pinned a page stores to it without a fault: it can not be watched."""
        world = mapped_range(pages=2)
        world.pin(0)

        world.process.clear_refs(4)

        assert [True, False] == soft_dirty(world)
        assert [True, False] == pte_write(world.ptes()).tolist()

    def test_merged_mappings(self):
        """A new mapping that continues an old one makes all of it soft-dirty."""
        world = mapped_range(pages=1)
        world.process.clear_refs(4)
        world.process.mmap(PAGE_SIZE, addr=world.at(1))

        assert 1 == len(world.process.mm.vmas)
        assert [True] == soft_dirty(world)

    def test_listeners_hear(self):
        """Whoever keeps a copy of the page table forgets the rights in it."""
        world = mapped_range(pages=1)
        heard = []

        class Listener:
            def invalidate_range_start(self, invalid):
                heard.append(invalid)

            def invalidate_range_end(self, invalid):
                heard.append(invalid)

        listener = Listener()
        mmu_notifier_register(listener, world.process.mm)
        world.process.clear_refs(4)
        mmu_notifier_unregister_no_release(listener, world.process.mm)

        assert [MmuNotifyEvent.SOFT_DIRTY] * 2 == [invalid.event for invalid in heard]
        assert heard[0].start <= world.addr
        assert world.addr + world.nbytes <= heard[0].end


class TestAccessed:
    @pytest.mark.parametrize(
        ("what", "forgotten"),
        [(ClearRefs.ALL, True), (ClearRefs.ANON, True), (ClearRefs.MAPPED, False)],
    )
    def test_forgets(self, what, forgotten):
        """That pages were used is forgotten, of all mappings or of one kind."""
        world = mapped_range(pages=2)
        mem, pfns = world.machine.mem, world.pfns()
        mem.flags[pfns] |= PG_referenced

        world.process.clear_refs(what)

        assert [not forgotten] * 2 == ((world.ptes() & 0x20) != 0).tolist()
        assert [not forgotten] * 2 == ((mem.flags[pfns] & PG_referenced) != 0).tolist()
        assert pte_present(world.ptes()).all()
        assert pte_soft_dirty(world.ptes()).all()
        mem.flags[pfns] &= ~PG_referenced

    @pytest.mark.parametrize("what", [0, 5, -1])
    def test_wrong_kind(self, what):
        """There are four kinds."""
        world = mapped_range()
        with pytest.raises(InvalidArgument, match="is not 1, 2, 3 or 4"):
            world.process.clear_refs(what)
