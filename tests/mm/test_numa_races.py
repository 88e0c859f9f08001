"""Moves between nodes, and CPUs, devices and system calls that meet them, in every order."""

import numpy as np
import pytest

from mm import PAGE_SIZE, SegmentationFault
from mm.gup import Pin
from tests.interleave import explore
from tests.world import mapped_range

PAGES = 3


class Range:
    """PAGES fresh pages on node 0 for one schedule, each full of its number, from 1 on."""

    def __init__(self, world, process=None):
        self.world = world
        self.process = process or world.process
        self.addr = self.process.mmap(PAGES * PAGE_SIZE)
        for page in range(PAGES):
            self.process.write(self.at(page), bytes([page + 1]) * PAGE_SIZE)

    def at(self, page):
        return self.addr + page * PAGE_SIZE

    def move(self, *nodes):
        return self.process.move_pages([self.at(page) for page in range(PAGES)], nodes)

    def there(self):
        """Move all to node 1."""
        return self.move(1, 1, 1)

    def bind(self):
        """Move all to node 1, and new ones from now on."""
        self.process.mbind(self.addr, PAGES * PAGE_SIZE, "bind", [1], "move")

    def contents(self):
        """One number for each page, -1 where its bytes differ."""
        data = np.frombuffer(self.process.read(self.addr, PAGES * PAGE_SIZE), dtype=np.uint8)
        return [page[0] if (page == page[0]).all() else -1 for page in data.reshape(PAGES, -1)]

    def nodes(self):
        return self.process.move_pages([self.at(page) for page in range(PAGES)]).tolist()


def every_order(scenario, *, preemptions=1):
    """Run scenario(range, together) under every schedule, all in one world."""
    world = mapped_range(1, filled=False, nodes=("2MiB", "2MiB"), memory="64KiB")

    def one(together):
        pages = Range(world)
        scenario(pages, together)
        world.machine.verify()
        world.process.munmap(pages.addr, PAGES * PAGE_SIZE)

    assert 20 < explore(one, preemptions=preemptions)


@pytest.fixture(params=["there", "bind"])
def way(request):
    return request.param


class TestCpu:
    def test_load(self, way):
        """A CPU finds what it wrote, at the old place or the new one."""

        def scenario(pages, together):
            loaded, _ = together(lambda: pages.process.read(pages.at(1), 1), getattr(pages, way))

            assert (b"\2", [1, 2, 3], [1, 1, 1]) == (loaded, pages.contents(), pages.nodes())

        every_order(scenario)

    def test_store(self, way):
        """A store is copied, or comes after the copy."""

        def scenario(pages, together):
            together(
                lambda: pages.process.write(pages.at(1), b"\7" * PAGE_SIZE), getattr(pages, way)
            )

            assert [1, 7, 3] == pages.contents()

        every_order(scenario)

    def test_pin(self, way):
        """Who pins a page has the one that the process uses."""

        def scenario(pages, together):
            pin, _ = together(lambda: pages.process.pin(pages.at(1), 1), getattr(pages, way))

            with pin:
                assert pin.pfns.tolist() == frames(pages)[1:2]
                assert [1, 2, 3] == pages.contents()

        every_order(scenario)


def frames(pages):
    """The PFN of each page, as references see them."""
    found = []
    for page in range(PAGES):
        with pages.process.pin(pages.at(page), 1, write=False) as pin:
            assert isinstance(pin, Pin)
            found += pin.pfns.tolist()
    return found


class TestMoves:
    def test_to_and_fro(self):
        """Two that want a page on different nodes both find it intact."""

        def scenario(pages, together):
            together(pages.there, lambda: pages.move(0, 1, 0))

            assert [1, 2, 3] == pages.contents()
            assert {0, 1} >= set(pages.nodes())

        every_order(scenario)

    def test_both_to_the_same_node(self):
        """A page is moved once, or found where it should be."""

        def scenario(pages, together):
            counting = pages.world.machine.vmstat.counting("pgmigrate_success", "pgmigrate_fail")
            with counting as delta:
                together(pages.there, pages.bind)

            assert {"pgmigrate_success": PAGES, "pgmigrate_fail": 0} == delta
            assert ([1, 2, 3], [1, 1, 1]) == (pages.contents(), pages.nodes())

        every_order(scenario)

    def test_device(self, way):
        """A migration to a device beside it loses nothing."""

        def scenario(pages, together):
            together(
                lambda: pages.world.gpu.to_device(pages.process, pages.addr, PAGES * PAGE_SIZE),
                getattr(pages, way),
            )

            assert [1, 2, 3] == pages.contents()

        every_order(scenario)


class TestSystemCalls:
    def test_munmap(self, way):
        """What is unmapped meanwhile is gone, its neighbours are intact."""

        def scenario(pages, together):
            together(
                lambda: pages.process.munmap(pages.at(1), PAGE_SIZE),
                lambda: or_fault(getattr(pages, way)),
            )

            assert 2 == pages.process.mm.anon_rss
            assert [b"\1", b"\3"] == [pages.process.read(pages.at(page), 1) for page in (0, 2)]

        every_order(scenario)

    def test_exit(self):
        """A process that exits meanwhile leaves nothing behind."""

        def scenario(pages, together):
            short = Range(pages.world, pages.world.machine.spawn("short-lived"))
            mm = short.process.mm
            together(short.process.exit, lambda: move_all(short.process, mm))

            assert PAGES == pages.world.machine.vmstat["nr_anon_pages"]

        every_order(scenario)


def or_fault(call):
    """mbind() finds a hole where something was unmapped before it."""
    try:
        call()
    except SegmentationFault:
        """Then nothing has moved."""


def move_all(process, mm):
    """migrate_pages(2) of *process*, unless it has exited by then."""
    if not mm.exited:
        process.migrate_pages([0], [1])
