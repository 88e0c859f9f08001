"""Device memory as pages: where it lies, whose it is, and when it is free."""

import numpy as np
import pytest

from mm import Machine
from mm.errors import Busy, KernelBug, OutOfRange
from mm.memremap import devm_memremap_pages, devm_memunmap_pages, free_zone_device_page
from mm.page_flags import PG_reserved, PG_uptodate
from mm.swap import get_page, put_page
from mm.types import COLUMNS, MemoryType, VmFault
from mm.typing import pages
from tests.world import mapped_range

SYSTEM = 256  # pages
LIMIT = 1024


class Borrowed:
    """The least that a driver can be: it notes which pages it gets back."""

    def __init__(self, name="borrowed", kind=MemoryType.DEVICE_PRIVATE):
        self.name = name
        self.type = kind
        self.owner = self
        self.freed = []

    def page_fault(self, vma, addrs, pfns, *, write):
        return VmFault.SIGBUS

    def page_free(self, pfns):
        self.freed.append(pfns.tolist())


@pytest.fixture
def mem():
    return Machine(("1MiB",), payload=False, max_physmem="4MiB").mem


def span(zone):
    return zone.start_pfn, zone.end_pfn


class TestDevmMemremapPages:
    def test_highest_hole(self, mem):
        """Devices lie below one another from the end of physical address space downward."""
        zones = [devm_memremap_pages(mem, Borrowed(), n) for n in (100, 50, 1)]

        assert [(924, 1024), (874, 924), (873, 874)] == [span(zone) for zone in zones]

    def test_hole_that_a_device_left(self, mem):
        """A new device goes to the highest hole that it fits in."""
        zones = [devm_memremap_pages(mem, Borrowed(), 100) for _ in range(3)]
        devm_memunmap_pages(mem, zones[1])

        small, large = (devm_memremap_pages(mem, Borrowed(), n) for n in (60, 101))

        assert (864, 924) == span(small)
        assert (724 - 101, 724) == span(large)

    def test_last_page(self, mem):
        """A device may fill all that the system leaves, and not a page more."""
        with pytest.raises(OutOfRange, match=r"3\.004 MiB does not fit .* 3 MiB are free"):
            devm_memremap_pages(mem, Borrowed(), LIMIT - SYSTEM + 1)

        assert (SYSTEM, LIMIT) == span(devm_memremap_pages(mem, Borrowed(), LIMIT - SYSTEM))

    def test_free_page_has_one_reference(self, mem):
        """A new device page is reserved, free at one reference, and knows its driver."""
        driver = Borrowed()

        zone = devm_memremap_pages(mem, driver, 3)

        pfns = np.arange(*span(zone))
        assert [1] * 3 == mem.refcount[pfns].tolist()
        assert (mem.flags[pfns] == PG_reserved).all()
        assert mem.is_zone_device_page(pfns).all()
        assert driver is mem.pagemap_of(zone.start_pfn)
        assert mem.pagemap_of(SYSTEM - 1) is None

    @pytest.mark.parametrize("kind", [MemoryType.DEVICE_PRIVATE, MemoryType.DEVICE_PUBLIC])
    def test_kind_of_memory(self, mem, kind):
        """Private and public memory are told apart, and both from the system's."""
        zone = devm_memremap_pages(mem, Borrowed(kind=kind), 1)
        pfns = pages(SYSTEM - 1, zone.start_pfn)

        private = kind is MemoryType.DEVICE_PRIVATE
        assert [False, private] == mem.is_device_private_page(pfns).tolist()
        assert [False, not private] == mem.is_device_public_page(pfns).tolist()

    def test_255_zones(self, mem):
        """What the column `zone` cannot count is refused; a zone that went makes room."""
        zones = [devm_memremap_pages(mem, Borrowed(), 1) for _ in range(254)]
        with pytest.raises(OutOfRange, match="at most 255 zones; close another device"):
            devm_memremap_pages(mem, Borrowed(), 1)

        devm_memunmap_pages(mem, zones[7])

        assert zones[7].index == devm_memremap_pages(mem, Borrowed(), 1).index


class TestDevmMemunmapPages:
    def test_nothing_is_left(self, mem):
        """The rows are as if there had never been a device."""
        zone = devm_memremap_pages(mem, Borrowed(), 5)
        pfns = np.arange(*span(zone))
        mem.flags[pfns] |= PG_uptodate

        devm_memunmap_pages(mem, zone)

        assert not any(getattr(mem, column.name)[pfns].any() for column in COLUMNS)
        assert not mem.is_device_private_page(pfns).any()
        assert mem.pagemap_of(pfns[0]) is None

    def test_page_in_use(self, mem):
        """A device that lends a page cannot go; the message names the first, nothing changes."""
        zone = devm_memremap_pages(mem, Borrowed(), 5)
        used = pages(zone.start_pfn + 2, zone.start_pfn + 4)
        get_page(mem, used)

        with pytest.raises(Busy, match=f"2 device pages are in use, the first is PFN {used[0]:#x}"):
            devm_memunmap_pages(mem, zone)

        assert [1, 1, 2, 1, 2] == mem.refcount[slice(*span(zone))].tolist()
        put_page(mem, used)
        devm_memunmap_pages(mem, zone)


class TestFreeZoneDevicePage:
    def test_each_driver_gets_its_own(self, mem):
        """Pages of several devices that go at once are sorted to their drivers."""
        drivers = Borrowed(), Borrowed()
        starts = [devm_memremap_pages(mem, driver, 4).start_pfn for driver in drivers]
        held = pages(starts[1], starts[1] + 3, starts[0] + 2)
        get_page(mem, held)

        put_page(mem, held[[2, 0, 1]])

        assert [[[held[2]]], [held[:2].tolist()]] == [driver.freed for driver in drivers]

    def test_only_the_last_user_frees(self, mem):
        """The driver hears of a page when the count falls back to one."""
        driver = Borrowed()
        pfn = pages(devm_memremap_pages(mem, driver, 4).start_pfn)
        get_page(mem, pages(*pfn, *pfn))

        put_page(mem, pfn)
        assert [] == driver.freed
        put_page(mem, pfn)

        assert [pfn.tolist()] == driver.freed

    def test_page_comes_back_blank(self, mem):
        """The driver does not see whose page it was."""
        driver = Borrowed()
        pfn = devm_memremap_pages(mem, driver, 4).start_pfn
        get_page(mem, pages(pfn))
        mem.mapping[pfn] = mem.index[pfn] = mem.private[pfn] = 5
        mem.flags[pfn] |= PG_uptodate

        put_page(mem, pages(pfn))

        assert (0, 0, 0) == (mem.mapping[pfn], mem.index[pfn], mem.private[pfn])
        assert PG_reserved == mem.flags[pfn]

    def test_reference_that_was_never_taken(self, mem):
        """One reference less than a free page has is a bug."""
        pfn = devm_memremap_pages(mem, Borrowed(), 4).start_pfn

        with pytest.raises(KernelBug, match=f"no reference left on {pfn:#x}"):
            put_page(mem, pages(pfn))

    def test_mapped_page(self, mem):
        """A page that tables still map is not the driver's yet."""
        driver = Borrowed()
        pfn = devm_memremap_pages(mem, driver, 4).start_pfn
        mem.mapcount[pfn] = 1

        with pytest.raises(KernelBug, match=f"device page {pfn:#x} is freed while page tables map"):
            free_zone_device_page(mem, pages(pfn))

        assert [] == driver.freed


class TestWholeWay:
    def test_device_page_has_a_reference_for_its_mapping(self):
        """Free pages have one reference, mapped ones two; munmap brings them back to one."""
        world = mapped_range(pages=3)
        world.gpu.to_device(world.process, world.addr, 2 * 4096)
        zone = world.gpu.zone

        used = world.machine.mem.refcount[slice(*span(zone))]
        assert [2, 2, 1] == used[:3].tolist()
        world.process.munmap(world.addr, world.nbytes)

        assert (used == 1).all()
