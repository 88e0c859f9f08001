"""verify(): each rule is broken in turn, and named."""

from contextlib import contextmanager

import numpy as np
import pytest

from mm import Machine
from mm.anon_vma import anon_vma_prepare
from mm.debug import dump_page
from mm.errors import KernelBug
from mm.filemap import trylock_page, unlock_page
from mm.mempolicy import Mempolicy, Mpol
from mm.mmu_notifier import MmuNotifyEvent, mmu_notifier_range
from mm.mmzone import Lru
from mm.page_flags import (
    PG_active,
    PG_anon_exclusive,
    PG_dirty,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_reserved,
    PG_swapcache,
)
from mm.pgtable import (
    _PAGE_DEVMAP,
    _PAGE_RW,
    _PAGE_UFFD_WP,
    PMD_SIZE,
    mk_pte,
    pte_mkuffd_wp,
    pte_offset,
)
from mm.swap import lru_add_drain_all
from mm.swapops import (
    SWP_UFFD_WP,
    make_device_exclusive_entry,
    make_device_private_entry,
    make_migration_entry,
    make_pte_marker,
    swp_entry,
)
from mm.types import COLUMNS, VM_UFFD_WP, VM_WRITE, Vma, page_anon
from mm.typing import PAGE_SHIFT, PAGE_SIZE, pages
from mm.userfaultfd_k import UffdEvent, UffdMsg, UserfaultfdWaiter
from tests.hmm.watch import Watch
from tests.world import mapped_range

KINDS = ("mapped", "free", "device", "free device")
WRITABLE = np.ones(1, dtype=np.bool_)


@pytest.fixture
def world():
    """Pages 0 and 1 in system memory and on a list, 2 in device memory, 3 never touched."""
    world = mapped_range(pages=4, filled=False)
    world.process.touch(world.addr, 3 * PAGE_SIZE)
    world.gpu.to_device(world.process, world.at(2), PAGE_SIZE)
    lru_add_drain_all(world.machine.mem)
    world.machine.verify()
    return world


def page_of(world, kind):
    mem, zone = world.machine.mem, world.gpu.zone
    return {
        "mapped": world.pfns().item(0),
        "free": mem.max_pfn - 1,
        "device": world.pfns().item(2),
        "free device": zone.end_pfn - 1,
        "zero page": mem.zero_pfn,
    }[kind]


def place_of(world, page):
    return pte_offset(world.machine.mem.tables, world.process.mm.pgd, world.addrs[page : page + 1])


@contextmanager
def spoiled(column, where, value):
    """Let *column* be wrong inside the block."""
    before = column[where].copy()
    column[where] = value
    try:
        yield
    finally:
        column[where] = before


@contextmanager
def spoiled_attribute(thing, name, value):
    """Let *thing* have a wrong *name* inside the block."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def complaints(machine):
    """What verify() says, a line for each broken rule."""
    with pytest.raises(KernelBug) as error:
        machine.verify()
    return str(error.value).split("\n")


def named(machine):
    """The columns, counters and tables that verify() names."""
    return {line.split(":")[0] for line in complaints(machine)}


def entry_complaints(world, page, entry):
    """What verify() says while *page* has another entry."""
    with spoiled(world.machine.mem.tables.entries, place_of(world, page), entry):
        return " ".join(complaints(world.machine))


class TestColumns:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("column", [c.name for c in COLUMNS if c.name != "lru_stamp"])
    def test_every_column_of_every_kind_of_page(self, world, column, kind):
        """A wrong value is found, wherever it is, and named by its column."""
        if (column, kind) == ("private", "device"):
            return  # that is its driver's
        rows, pfn = getattr(world.machine.mem, column), page_of(world, kind)
        wrong = rows[pfn] | np.uint64(1 << 40) if column == "flags" else rows[pfn] + 1

        with spoiled(rows, pfn, wrong):
            assert column in named(world.machine)

        world.machine.verify()

    def test_lru_stamp(self, world):
        """A stamp says where on its list a page is, as long as it is on one."""
        mem = world.machine.mem

        with spoiled(mem.lru_stamp, page_of(world, "mapped"), 12345):
            assert {"lru_stamp"} == named(world.machine)
        with spoiled(mem.lru_stamp, page_of(world, "free"), 12345):
            world.machine.verify()

    @pytest.mark.parametrize("value", [13, 65, 255])
    def test_order_that_no_block_has(self, world, value):
        """However wrong the number, it is named."""
        with spoiled(world.machine.mem.free_order, page_of(world, "free"), value):
            assert "free_order" in named(world.machine)

    def test_page_is_named(self, world):
        """The line says which page, and the rule."""
        pfn = page_of(world, "mapped")

        with spoiled(world.machine.mem.refcount, pfn, 9):
            (line,) = complaints(world.machine)

        assert f"refcount: page {pfn:#x}: not its mappings, pagevecs, pins and caches" == line

    def test_many_pages(self, world):
        """Four are named, the others counted."""
        free = slice(world.machine.mem.max_pfn - 10, world.machine.mem.max_pfn)

        with spoiled(world.machine.mem.private, free, 1):
            lines = [line for line in complaints(world.machine) if line.startswith("private")]

        assert lines
        assert all(line.count("0x") == 4 and " and 6 more: " in line for line in lines)

    def test_several_rules_at_once(self, world):
        """All that is broken is told, not the first of it."""
        mem = world.machine.mem

        with spoiled(mem.index, page_of(world, "mapped"), 7), spoiled(mem.mapcount, 999, 2):
            found = named(world.machine)

        assert {"index", "mapcount"} <= found


class TestFlags:
    @pytest.mark.parametrize(
        ("kind", "change", "column", "rule"),
        [
            ("mapped", PG_locked, "lock_owner", "set and locked do not agree"),
            ("mapped", PG_reserved, "flags", "reserved is for device and zero page"),
            ("zero page", PG_reserved, "flags", "reserved is for device and zero page"),
            ("device", PG_reserved, "flags", "reserved is for device and zero page"),
            ("device", PG_lru, "flags", "device memory on an LRU list"),
            ("mapped", PG_swapcache, "private", "no such slot"),
            ("mapped", PG_lru, "flags", "mapped, but on no LRU list nor on its way"),
            ("free", PG_dirty, "flags", "not 0 on a free page"),
        ],
    )
    def test_rules(self, world, kind, change, column, rule):
        """Each bit says something that must be so."""
        flags, pfn = world.machine.mem.flags, page_of(world, kind)

        with spoiled(flags, pfn, flags[pfn] ^ change):
            lines = complaints(world.machine)

        assert f"{column}: page {pfn:#x}: {rule}" in lines

    @pytest.mark.parametrize(
        ("locked", "kind", "change", "column", "rule"),
        [
            (False, "mapped", PG_mlocked, "flags", "mlocked, but in no VM_LOCKED memory"),
            (True, "device", PG_mlocked, "flags", "mlocked, but in no VM_LOCKED memory"),
            (True, "mapped", PG_mlocked, "flags", "mlocked and unevictable do not agree"),
            (True, "mapped", PG_mlocked, "mlock_count", "more than map it of VM_LOCKED memory"),
        ],
    )
    def test_mlocked_pages(self, world, locked, kind, change, column, rule):
        """Only what VM_LOCKED memory maps is mlocked, and is where reclaim does not look."""
        if locked:
            world.process.mlock(world.addr, world.nbytes, onfault=True)
        flags, pfn = world.machine.mem.flags, page_of(world, kind)

        with spoiled(flags, pfn, flags[pfn] ^ change):
            lines = complaints(world.machine)

        assert f"{column}: page {pfn:#x}: {rule}" in lines

    def test_counted_lock(self, world):
        """No page is locked more often than it is mapped; less often it may be."""
        world.process.mlock(world.addr, world.nbytes, onfault=True)
        counts, pfn = world.machine.mem.mlock_count, page_of(world, "mapped")

        with spoiled(counts, pfn, 2):
            assert {"mlock_count"} == named(world.machine)
        with spoiled(counts, pfn, 0):
            world.machine.verify()

    def test_page_of_two_that_is_said_to_be_of_one(self, world):
        """A store would go to the page of both."""
        world.fork(0)
        flags, pfn = world.machine.mem.flags, page_of(world, "mapped")

        with spoiled(flags, pfn, flags[pfn] | PG_anon_exclusive):
            assert [f"flags: page {pfn:#x}: shared, yet exclusive"] == complaints(world.machine)

    def test_pinned_page_that_may_be_shared(self, world):
        """A store of the process would leave the device with the old bytes."""
        pin, flags = world.pin(page=0), world.machine.mem.flags

        with spoiled(flags, pin.pfns[0], flags[pin.pfns[0]] & ~PG_anon_exclusive):
            assert "pinned, yet not the process's own" in complaints(world.machine)[0]

    def test_wrong_list(self, world):
        """A page that is active by its flags is not on the inactive list."""
        flags, pfn = world.machine.mem.flags, page_of(world, "mapped")

        with spoiled(flags, pfn, flags[pfn] ^ PG_active):
            found = named(world.machine)

        assert {"nr_active_anon", "nr_inactive_anon", "lru_stamp"} == found


class TestCounters:
    @pytest.mark.parametrize(
        "name",
        [
            "nr_free_pages",
            "nr_anon_pages",
            "nr_isolated_anon",
            "nr_mlock",
            "nr_page_table_pages",
            *(f"nr_{x.name}" for x in Lru),
        ],
    )
    def test_amounts(self, world, name):
        """What a counter says is what there is."""
        name = name.lower()
        world.machine.vmstat.add(name, 1)
        found = named(world.machine)
        world.machine.vmstat.add(name, -1)

        assert {name} == found

    @pytest.mark.parametrize(("name", "says"), [("anon_rss", 4), ("total_vm", 5), ("locked_vm", 6)])
    def test_of_a_process(self, world, name, says):
        """The same of what a process counts."""
        with spoiled_attribute(world.process.mm, name, says):
            (line,) = complaints(world.machine)

        assert line.startswith(f"{name}: train says {says}")

    @pytest.mark.parametrize("lru", Lru)
    def test_of_a_list(self, world, lru):
        """Each list knows its length."""
        lists = world.machine.mem.nodes[0].lruvec

        with spoiled_attribute(lists[lru], "nr_pages", lists[lru].nr_pages + 1):
            assert {f"nr_{lru.name.lower()}"} == named(world.machine)

    def test_of_a_zone(self, world):
        """And each zone its free pages."""
        zone = world.machine.mem.nodes[0].zones[0]

        with spoiled_attribute(zone, "nr_free", zone.nr_free - 1):
            assert "nr_free is" in " ".join(complaints(world.machine))


class TestLists:
    def test_pagevec_that_lost_a_page(self):
        """A mapped page is on a list or on its way there."""
        world = mapped_range(pages=2)
        pagevec = world.machine.mem.pagevecs[0]

        with spoiled_attribute(pagevec, "size", 1):
            lines = complaints(world.machine)

        pfn = world.pfns().item(1)
        assert f"refcount: page {pfn:#x}: not its mappings, pagevecs, pins and caches" in lines
        assert f"flags: page {pfn:#x}: mapped, but on no LRU list nor on its way" in lines

    def test_list_that_lost_a_page(self, world):
        """A page with PG_lru stands in the log of its list."""
        items = world.machine.mem.nodes[0].lruvec[Lru.ACTIVE_ANON]

        with spoiled_attribute(items, "size", 0):
            assert {"lru_stamp"} == named(world.machine)

    def test_page_twice_on_a_list(self, world):
        """And only once."""
        items = world.machine.mem.nodes[0].lruvec[Lru.ACTIVE_ANON]
        items.log[items.size], items.stamps[items.size] = items.log[0], items.stamps[0]

        with spoiled_attribute(items, "size", items.size + 1):
            assert {"lru_stamp"} == named(world.machine)

    def test_pin_that_nobody_listed(self, world):
        """Every reference has an owner that is known."""
        pin = world.pin(page=0)
        world.machine.mem.pins.remove(pin)
        found = named(world.machine)
        world.machine.mem.pins.append(pin)

        assert {"refcount"} == found


class TestEntries:
    def test_swap_entry(self, world):
        """There is no swap."""
        found = entry_complaints(world, 3, swp_entry(5, pages(7)))

        assert f"page table: page {world.at(3):#x}: an entry of no kind" in found

    def test_special_page_that_is_not_the_zero_page(self, world):
        """Only the zero page has no struct page to speak of."""
        found = entry_complaints(world, 3, mk_pte(pages(99), np.uint64(0x225)))

        assert "an entry of no kind" in found

    def test_writable_entry_of_a_read_only_area(self):
        """No entry gives more than its area."""
        world = mapped_range(pages=2, prot="r", filled=False)
        world.process.read(world.addr, 1)
        (entry,) = world.machine.mem.tables.entries[place_of(world, 0)]

        found = entry_complaints(world, 0, entry | _PAGE_RW)

        assert f"page table: page {world.addr:#x}: writable in <Vma" in found

    def test_entry_that_nobody_counted(self, world):
        """An entry is a mapping of its page, a reference to it, and part of the process."""
        (entry,) = world.machine.mem.tables.entries[place_of(world, 0)]

        found = entry_complaints(world, 3, entry)

        for what in ("mapcount:", "refcount:", "anon_rss: train says 3, its page tables hold 4"):
            assert what in found
        assert f"index: page {world.pfns()[0]:#x}: not its offset in" in found

    def test_entry_that_is_gone(self, world):
        """And a page whose entry is gone is not mapped."""
        found = entry_complaints(world, 0, 0)

        for what in ("mapcount:", "refcount:", "anon_rss: train says 3, its page tables hold 2"):
            assert what in found

    def test_device_page_mapped_as_if_it_were_memory(self, world):
        """A CPU cannot reach private memory of a device."""
        found = entry_complaints(world, 2, mk_pte(world.pfns()[2:3], np.uint64(0x67)))

        assert "page table: page" in found
        assert "entry and kind of memory do not agree" in found

    def test_memory_mapped_as_a_device_page(self, world):
        """And a device has no system memory."""
        found = entry_complaints(world, 0, make_device_private_entry(world.pfns()[:1], WRITABLE))

        assert "entry and kind of memory do not agree" in found

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_mark_of_device_memory(self, kind):
        """Entries of device-public pages are marked, and no others."""
        world = mapped_range(pages=2, kind=kind)
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)
        page = int(kind == "public")
        (entry,) = world.machine.mem.tables.entries[place_of(world, page)]

        found = entry_complaints(world, page, entry ^ _PAGE_DEVMAP)

        assert f"page {world.pfns()[page]:#x}: devmap is for device-public memory" in found

    def test_exclusive_entry_that_nobody_counted(self, world):
        """It is a reference to its page, and part of the process, but no mapping."""
        found = entry_complaints(world, 3, make_device_exclusive_entry(world.pfns()[:1], WRITABLE))

        for what in ("refcount:", "anon_rss: train says 3, its page tables hold 4"):
            assert what in found
        assert f"index: page {world.pfns()[0]:#x}: not its offset in" in found
        assert "mapcount:" not in found

    def test_exclusive_entry_for_private_memory(self, world):
        """What a device has for itself is in reach of a CPU that takes it back."""
        found = entry_complaints(world, 2, make_device_exclusive_entry(world.pfns()[2:3], WRITABLE))

        assert "entry and kind of memory do not agree" in found

    def test_writable_exclusive_entry_of_a_read_only_area(self, world):
        """It gives no right that the area does not give."""
        world.make_exclusive(0)

        with spoiled_attribute(world.vma, "vm_flags", world.vma.vm_flags & ~VM_WRITE):
            found = " ".join(complaints(world.machine))

        assert f"page table: page {world.addr:#x}" in found

    def test_migration_entry_without_a_lock(self, world):
        """Who migrates a page has it locked."""
        pfn = world.pfns().item(0)
        found = entry_complaints(world, 0, make_migration_entry(pages(pfn), WRITABLE))

        assert f"flags: page {pfn:#x}: migration entries, but not locked" in found

    @pytest.mark.parametrize(
        "entry",
        [
            mk_pte(pages((1 << 40) - 1), np.uint64(0x67)),
            make_device_private_entry(pages(1 << 40), WRITABLE),
            make_migration_entry(pages(1 << 40), WRITABLE),
        ],
    )
    def test_frame_that_does_not_exist(self, world, entry):
        """A PFN beyond all memory is a complaint, not a crash."""
        found = entry_complaints(world, 3, entry)

        assert "page table: " in found
        assert "no such frame" in found

    def test_page_of_another_owner(self, world):
        """The rmap of a page leads back to the entry."""
        mapping, pfn = world.machine.mem.mapping, page_of(world, "mapped")
        other = world.machine.spawn("other")
        addr = other.mmap(PAGE_SIZE)
        anon_vma = anon_vma_prepare(other.find_vma(addr))

        with spoiled(mapping, pfn, (anon_vma.number << 2) | 1):
            found = complaints(world.machine)

        assert page_anon(world.machine.mem, pages(pfn)).all()
        assert f"mapping: page {pfn:#x}: not an anon_vma of {world.vma!r}" in found

    def test_policy_for_a_node_that_there_is_not(self, world):
        """A range wants its pages on nodes of the machine."""
        with spoiled_attribute(world.vma, "vm_policy", Mempolicy(Mpol.BIND, (0, 1))):
            (line,) = complaints(world.machine)

        assert line.startswith(f"vm_policy: {world.vma!r} of train wants")

    def test_entry_outside_every_area(self, world):
        """Nothing is mapped where no area is."""
        vma = world.vma

        with (
            spoiled_attribute(vma, "vm_end", world.at(1)),
            spoiled_attribute(world.process.mm, "total_vm", 1),
        ):
            found = complaints(world.machine)

        assert "page table: train maps 2 pages outside its VMAs" in found


class TestTables:
    def test_table_that_nobody_reaches(self, world):
        """A table in use is on a path from the top."""
        pool = world.machine.mem.tables
        row = pool.alloc(1)
        (line,) = complaints(world.machine)
        pool.release(row)

        assert f"page table: {pool.in_use + 1} tables are in use, {pool.in_use} are reached" == line

    def test_entry_in_a_free_table(self, world):
        """A free table is empty, and so is row 0, which stands for none."""
        pool = world.machine.mem.tables
        with spoiled(pool.entries, 5, 1):
            assert ["page table: a free table holds entries"] == complaints(world.machine)

    def test_table_on_two_paths(self, world):
        """Each table belongs to one process."""
        pool, mm = world.machine.mem.tables, world.process.mm
        other = world.machine.spawn("other")
        used = int(np.flatnonzero(pool.row(mm.pgd))[0])

        with spoiled(pool.row(other.mm.pgd), used, pool.row(mm.pgd)[used]):
            assert {"page table"} == named(world.machine)

    def test_row_that_does_not_exist(self, world):
        """An upper entry beyond the pool is a complaint, not a crash."""
        pool, mm = world.machine.mem.tables, world.process.mm

        with spoiled(pool.row(mm.pgd), 300, np.uint64((pool.rows + 7) << PAGE_SHIFT | 1)):
            assert "page table" in named(world.machine)


class TestAreas:
    def test_overlap(self, world):
        """Areas ascend and do not overlap."""
        mm = world.process.mm
        extra = Vma(mm, world.at(3), world.at(5), world.vma.vm_flags, world.at(3) >> PAGE_SHIFT)
        mm.vmas.append(extra)
        found = complaints(world.machine)
        mm.vmas.remove(extra)

        assert f"vma: {extra!r} of train overlaps what ends at {world.at(4):#x}" in found

    def test_empty(self, world):
        """An area has a page at least."""
        mm = world.process.mm
        extra = Vma(mm, PMD_SIZE, PMD_SIZE, world.vma.vm_flags, 0)
        mm.vmas.insert(0, extra)
        found = named(world.machine)
        mm.vmas.remove(extra)

        assert {"vma"} == found

    def test_anon_vma_that_forgot_an_area(self, world):
        """An anon_vma lists the areas that name it."""
        listed = world.vma.anon_vma.vmas
        listed.remove(world.vma)
        found = named(world.machine)
        listed.append(world.vma)

        assert {"anon_vma"} == found

    def test_child_that_its_parent_does_not_list(self, world):
        """A walk for a page of the parent would miss the child."""
        child = world.seen_by(world.process.fork())
        own = child.vma.anon_vma
        own.parent = type(own)(99, own.rwsem, [])
        found = complaints(world.machine)
        own.parent = world.vma.anon_vma

        assert [f"anon_vma: {own.number} lists [{child.vma!r}], its parent []"] == found

    def test_anon_vma_of_nobody(self, world):
        """And is gone when there are none."""
        mem = world.machine.mem
        mem.anon_vmas[99] = type(world.vma.anon_vma)(99, world.vma.anon_vma.rwsem, [])
        (line,) = complaints(world.machine)
        del mem.anon_vmas[99]

        assert "anon_vma: 99 lists [], named by []" == line

    def test_anon_vma_that_is_not_known(self, world):
        """What an area names is in the machine's list."""
        mem, anon_vma = world.machine.mem, world.vma.anon_vma
        del mem.anon_vmas[anon_vma.number]
        found = named(world.machine)
        mem.anon_vmas[anon_vma.number] = anon_vma

        assert {"anon_vma"} == found


class TestNotifiers:
    @pytest.fixture
    def watch(self, world):
        with Watch(world.process.mm, 16, 32) as watch:
            yield watch

    def test_invalidation_that_never_ended(self, world):
        """Between two calls nothing is being invalidated."""
        mm = world.process.mm
        with mmu_notifier_range(mm, 0, 9, MmuNotifyEvent.CLEAR):
            assert ["invalidating"] == [*named(world.machine)]

    def test_count_of_the_address_space(self, world):
        """It is even then."""
        world.process.mm.invalidate_seq += 1
        assert ["invalidate_seq"] == [*named(world.machine)]
        world.process.mm.invalidate_seq += 1

    @pytest.mark.parametrize("wrong", [2, 1_000_001])
    def test_count_of_a_notifier(self, world, watch, wrong):
        """It is odd, and not from the future."""
        before, watch.invalidate_seq = watch.invalidate_seq, wrong
        assert ["invalidate_seq"] == [*named(world.machine)]
        watch.invalidate_seq = before

    def test_order_of_notifiers(self, world, watch):
        """They ascend."""
        with Watch(world.process.mm, 48, 64):
            watch.start = 50
            found = named(world.machine)
            watch.start = 16

        assert {"interval_notifiers"} == set(found)

    def test_extras_of_listeners(self, world):
        """Who listens, and to what besides, is noted at registration."""
        world.process.mm.notifier_extras["change_pte"] = [world]
        found = named(world.machine)
        world.process.mm.notifier_extras.clear()

        assert {"notifier_extras"} == set(found)

    def test_notifier_of_somebody_else(self, world, watch):
        """A notifier is in the list of the address space that it watches."""
        watch.mm = None
        found = named(world.machine)
        watch.mm = world.process.mm

        assert {"interval_notifiers"} == set(found)


class TestUserfaultfds:
    @pytest.fixture
    def fd(self, world):
        fd = world.process.userfaultfd()
        fd.register(world.addr, 3 * PAGE_SIZE, "wp")
        yield fd
        fd.close()

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda vma, fd: setattr(vma, "vm_userfaultfd_ctx", None),
            lambda vma, fd: setattr(vma, "vm_flags", vma.vm_flags & ~VM_UFFD_WP),
            lambda vma, fd: setattr(vma, "vm_userfaultfd_ctx", object()),
        ],
        ids=["no_fd", "no_flag", "unknown_fd"],
    )
    def test_area(self, world, fd, spoil):
        """It has a flag exactly if it has an fd, and that is known."""
        vma = world.vma
        vm_flags = vma.vm_flags
        spoil(vma, fd)
        assert ["vm_userfaultfd_ctx"] == [*named(world.machine)]
        vma.vm_flags, vma.vm_userfaultfd_ctx = vm_flags, fd

    def test_fd_of_another_process(self, world, fd):
        """An fd is listed where it belongs."""
        other = world.machine.spawn("other")
        other.mm.userfaultfds.append(fd)
        assert ["userfaultfds"] == [*named(world.machine)]
        other.mm.userfaultfds.remove(fd)

    @pytest.mark.parametrize("queue", ["fault_pending", "faults"])
    def test_somebody_who_does_not_wait(self, world, fd, queue):
        """Between two calls nobody waits."""
        getattr(fd, queue).append(UserfaultfdWaiter(UffdMsg(UffdEvent.PAGEFAULT, world.addr)))
        assert ["userfaultfds"] == [*named(world.machine)]
        getattr(fd, queue).clear()

    def test_events(self, world, fd):
        """Each is told, and counted until it is read."""
        world.process.mm.uffd_events.append((fd, UffdMsg(UffdEvent.UNMAP)))
        assert ["uffd_events"] == [*named(world.machine)]
        world.process.mm.uffd_events.clear()

        fd.mmap_changing += 1
        assert ["mmap_changing"] == [*named(world.machine)]
        fd.mmap_changing -= 1

    @pytest.mark.parametrize("at", [0, 2])
    def test_writable_and_protected(self, world, fd, at):
        """Where stores are asked for, none goes through unasked."""
        bit = _PAGE_UFFD_WP if at == 0 else SWP_UFFD_WP
        world.rewrite([at], lambda ptes: ptes | bit)
        assert {"page table"} == set(named(world.machine))
        world.rewrite([at], lambda ptes: ptes & ~bit)

    @pytest.mark.parametrize("marker", [False, True])
    def test_protected_where_nobody_asked(self, world, marker):
        """An address space that never had it has no such entries."""
        pool = world.machine.mem.tables
        at = pte_offset(pool, world.process.mm.pgd, world.addrs[3:] if marker else world.addrs[:1])
        before = pool.entries[at]
        pool.entries[at] = make_pte_marker(1) if marker else pte_mkuffd_wp(before)
        assert ["page table"] == [*named(world.machine)]
        pool.entries[at] = before


class TestHealthy:
    def test_every_state_that_is_well(self, world):
        """Locked, pinned, zero-page, device and waiting pages are all as they should be."""
        world.process.read(world.at(3), 1)
        world.pin(page=0)
        trylock_page(world.machine.mem, world.pfns()[:1])
        world.machine.verify()
        unlock_page(world.machine.mem, world.pfns()[:1])

        with world.machine.spawn() as other:
            other.touch(other.mmap("128KiB", "w"), "128KiB")
            other.touch(other.mmap("128KiB", "r"), "128KiB", write=False)
            other.mmap("1GiB", "-")
            world.machine.verify()

    def test_empty_machine(self):
        """Nothing is wrong where nothing has happened."""
        Machine(("3MiB", "5MiB"), max_physmem="8MiB").verify()


class TestDumpPage:
    def test_line(self, world):
        """All that is known of a page in a line."""
        pfn = page_of(world, "mapped")
        anon = (world.vma.anon_vma.number << 2) | 1

        assert (
            f"page {pfn:#x}: DMA refcount 1 mapcount 1 mapping {anon:#x} "
            f"index {world.addr >> PAGE_SHIFT:#x} "
            f"flags uptodate|lru|active|anon_exclusive|swapbacked"
        ) == dump_page(world.machine.mem, pfn)

    def test_hole(self, world):
        """Where no frame is, the line says so."""
        assert dump_page(world.machine.mem, 0).startswith("page 0x0: hole refcount 0 ")
        assert dump_page(world.machine.mem, 0).endswith(" flags none")
