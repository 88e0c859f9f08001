"""Every call that changes an address space, in any order, against a dict that has each page."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm import InvalidArgument, NotMapped, OutOfMemory, SegmentationFault
from mm.page_flags import PG_mlocked
from mm.pgtable import PUD_SIZE, pte_offset, pte_pfn, pte_present, pte_special
from mm.types import VM_EXEC, VM_LOCKED, VM_RAND_READ, VM_READ, VM_WRITE
from mm.typing import PAGE_SIZE, pages
from tests.world import ended_worlds, mapped_range

BASE = 3 * PUD_SIZE - 8 * PAGE_SIZE  # pages from here straddle tables of every level but two
PAGES = 20
PROTS = ["rw", "r", "-", "w", "rwx"]
RIGHTS = {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC}

numbers, counts = st.integers(0, PAGES - 1), st.integers(1, 8)


@dataclass(frozen=True)
class Page:
    """What the model knows of one page."""

    prot: str
    byte: int = 0
    locked: bool = False
    random: bool = False

    def allows(self, *, write):
        return "w" in self.prot if write else self.prot != "-"


def at(page):
    return BASE + page * PAGE_SIZE


class AnyCall(RuleBasedStateMachine):
    """One process, with a device that some of its pages are on."""

    def __init__(self):
        super().__init__()
        self.ended = ended_worlds()
        self.ended.__enter__()
        self.world = mapped_range(pages=1, filled=False, swap="1MiB")
        self.process = self.world.process
        self.process.munmap(self.world.addr, PAGE_SIZE)
        self.model = {}  # number of a page to what it is
        self.paged = False  # something may have been in swap

    def before_hole(self, first, count):
        """The pages of a range up to the first that is not mapped, and whether there is one."""
        wanted = range(first, first + count)
        mapped = [page for page in wanted if page in self.model]
        until = next((page for page in wanted if page not in self.model), None)
        return [page for page in mapped if until is None or page < until], until is not None

    def change(self, numbers, **what):
        self.model |= {page: replace(self.model[page], **what) for page in numbers}

    def expect(self, error, call):
        if error is None:
            return call()
        with pytest.raises(error):
            call()
        return None

    # Calls ---------------------------------------------------------------------------------------

    @rule(first=numbers, count=counts, prot=st.sampled_from(PROTS), locked=st.booleans())
    def mmap(self, first, count, prot, locked):
        flags = "anon|private|locked" if locked else "anon|private"
        self.process.mmap(count * PAGE_SIZE, prot, flags, addr=at(first))

        self.model |= dict.fromkeys(range(first, first + count), Page(prot, locked=locked))

    @rule(first=numbers, count=counts)
    def munmap(self, first, count):
        self.process.munmap(at(first), count * PAGE_SIZE)

        for page in range(first, first + count):
            self.model.pop(page, None)

    @rule(first=numbers, count=counts, prot=st.sampled_from(PROTS))
    def mprotect(self, first, count, prot):
        reached, hole = self.before_hole(first, count)

        self.expect(
            NotMapped if hole else None,
            lambda: self.process.mprotect(at(first), count * PAGE_SIZE, prot),
        )

        self.change(reached, prot=prot)

    @rule(first=numbers, count=counts, onfault=st.booleans())
    def mlock(self, first, count, onfault):
        reached, hole = self.before_hole(first, count)
        unreachable = not onfault and any(self.model[page].prot == "-" for page in reached)

        self.expect(
            NotMapped if hole or unreachable else None,
            lambda: self.process.mlock(at(first), count * PAGE_SIZE, onfault=onfault),
        )

        self.change(reached, locked=True)

    @rule(first=numbers, count=counts)
    def munlock(self, first, count):
        reached, hole = self.before_hole(first, count)

        self.expect(
            NotMapped if hole else None,
            lambda: self.process.munlock(at(first), count * PAGE_SIZE),
        )

        self.change(reached, locked=False)

    @rule(first=numbers, count=counts, on=st.booleans())
    def advise(self, first, count, on):
        mapped = [page for page in range(first, first + count) if page in self.model]

        self.expect(
            NotMapped if len(mapped) < count else None,
            lambda: self.process.madvise(
                at(first), count * PAGE_SIZE, "random" if on else "normal"
            ),
        )

        self.change(mapped, random=on)

    @rule(first=numbers, count=counts, advice=st.sampled_from(["dontneed", "dontneed_locked"]))
    def drop(self, first, count, advice):
        mapped = [page for page in range(first, first + count) if page in self.model]
        locked = [page for page in mapped if self.model[page].locked and advice == "dontneed"]
        gone = [page for page in mapped if not locked or page < locked[0]]
        error = NotMapped if len(mapped) < count else None

        self.expect(
            InvalidArgument if locked else error,
            lambda: self.process.madvise(at(first), count * PAGE_SIZE, advice),
        )

        self.change(gone, byte=0)

    @rule(first=numbers, count=counts, advice=st.sampled_from(["cold", "pageout", "willneed"]))
    def page(self, first, count, advice):
        mapped = [page for page in range(first, first + count) if page in self.model]
        locked = advice != "willneed" and any(self.model[page].locked for page in mapped)
        error = NotMapped if len(mapped) < count else None

        self.expect(
            InvalidArgument if locked else error,
            lambda: self.process.madvise(at(first), count * PAGE_SIZE, advice),
        )

        self.paged |= advice == "pageout"

    @rule(first=numbers, count=counts, write=st.booleans())
    def populate(self, first, count, write):
        reached, hole = self.before_hole(first, count)
        need = "w" if write else "r"
        refused = any(need not in self.model[page].prot for page in reached)
        advice = "populate_write" if write else "populate_read"

        self.expect(
            InvalidArgument if refused else NotMapped if hole else None,
            lambda: self.process.madvise(at(first), count * PAGE_SIZE, advice),
        )

    def area_from(self, first):
        """How many pages the VMA at page *first* has from there on, 0 where there is none."""
        vma = self.process.find_vma(at(first))
        return (vma.vm_end - at(first)) // PAGE_SIZE if vma else 0

    @precondition(lambda self: self.model)
    @rule(first=numbers, count=counts, to=numbers, size=counts, keep=st.booleans())
    def move(self, first, count, to, size, keep):
        inside = min(count, self.area_from(first))
        new_size = inside if keep else size
        if not inside or (first < to + new_size and to < first + inside):
            return
        flags = "maymove|fixed|dontunmap" if keep else "maymove|fixed"

        self.process.mremap(at(first), inside * PAGE_SIZE, new_size * PAGE_SIZE, flags, at(to))

        moved = [self.model.pop(first + i) for i in range(inside)]
        fresh = replace(moved[-1], byte=0)
        if keep:
            left = [replace(page, byte=0, locked=False) for page in moved]
            self.model |= {first + i: page for i, page in enumerate(left)}
        moved = (moved + [fresh] * new_size)[:new_size]
        self.model |= {to + i: page for i, page in enumerate(moved)}

    @precondition(lambda self: self.model)
    @rule(first=numbers, more=counts)
    def grow(self, first, more):
        count = self.area_from(first)
        if not count:
            return
        end = first + count
        room = not any(page in self.model for page in range(end, end + more))
        sizes = count * PAGE_SIZE, (count + more) * PAGE_SIZE

        self.expect(
            None if room else OutOfMemory, lambda: self.process.mremap(at(first), *sizes, "")
        )

        if room:
            fresh = replace(self.model[end - 1], byte=0)
            self.model |= dict.fromkeys(range(end, end + more), fresh)

    @precondition(lambda self: self.model)
    @rule(first=numbers, count=counts, less=counts)
    def shrink(self, first, count, less):
        if first not in self.model or less >= count:
            return
        self.process.mremap(at(first), count * PAGE_SIZE, (count - less) * PAGE_SIZE, "")

        for page in range(first + count - less, first + count):
            self.model.pop(page, None)

    # Accesses ------------------------------------------------------------------------------------

    @rule(page=numbers, byte=st.integers(1, 255))
    def write(self, page, byte):
        allowed = page in self.model and self.model[page].allows(write=True)

        self.expect(
            None if allowed else SegmentationFault,
            lambda: self.process.write(at(page) + 7, bytes([byte])),
        )

        if allowed:
            self.change([page], byte=byte)

    @rule(page=numbers)
    def read(self, page):
        allowed = page in self.model and self.model[page].allows(write=False)

        seen = self.expect(
            None if allowed else SegmentationFault, lambda: self.process.read(at(page) + 7, 1)
        )

        if allowed:
            assert self.model[page].byte == seen[0]

    @rule(first=numbers, count=counts, to_device=st.booleans())
    def migrate(self, first, count, to_device):
        inside = min(count, self.area_from(first))
        gpu = self.world.gpu
        if inside:
            (gpu.to_device if to_device else gpu.to_system)(
                self.process, at(first), inside * PAGE_SIZE
            )

    # What must hold ------------------------------------------------------------------------------

    @invariant()
    def well(self):
        self.world.machine.verify()

    @invariant()
    def areas_are_those_of_the_model(self):
        assert len(self.model) == self.process.mm.total_vm
        assert sum(page.locked for page in self.model.values()) == self.process.mm.locked_vm
        for number, page in self.model.items():
            flags = self.process.find_vma(at(number)).vm_flags
            assert {r for r, bit in RIGHTS.items() if flags & bit} == set(page.prot) - {"-"}
            assert (page.locked, page.random) == (
                bool(flags & VM_LOCKED),
                bool(flags & VM_RAND_READ),
            )

    @invariant()
    def pages_of_locked_memory_are_locked(self):
        """Nobody shares them, so that none is lost count of; but what is read from swap is not."""
        mem, mm = self.world.machine.mem, self.process.mm
        for number, page in self.model.items():
            pte = mem.tables.entries[pte_offset(mem.tables, mm.pgd, pages(at(number)))]
            if (pte_present(pte) & ~pte_special(pte)).all():
                mlocked = bool((mem.flags[pte_pfn(pte)] & PG_mlocked).all())
                assert page.locked == mlocked or (self.paged and page.locked)

    def teardown(self):
        for number, page in self.model.items():
            self.process.mprotect(at(number), PAGE_SIZE, "rw")
            assert page.byte == self.process.read(at(number) + 7, 1)[0]
        self.ended.__exit__(None, None, None)


TestAnyCall = AnyCall.TestCase
TestAnyCall.settings = settings(max_examples=25, stateful_step_count=30)
