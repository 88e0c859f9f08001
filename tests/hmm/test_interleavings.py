"""CPUs, migrations and system calls that meet, in every order that few preemptions allow.

Whoever wins, each byte is where the last store left it, and verify() holds after each schedule.
What a device's own accesses meet is in tests/devices/test_driver_races.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest

from mm import PAGE_SIZE, InvalidRange, Process
from mm.pgtable import pte_pfn
from tests.interleave import explore, run_interleaved
from tests.reference.state import decode, page_table_word
from tests.world import World, mapped_range

PAGES = 3


@dataclass
class Run:
    """A fresh range of PAGES pages at *addr*, for one schedule."""

    world: World
    process: Process
    addr: int

    def at(self, page: int) -> int:
        return self.addr + page * PAGE_SIZE

    def fill(self) -> None:
        for page in range(PAGES):
            self.process.write(self.at(page), bytes([page + 1]) * PAGE_SIZE)

    def to_device(self, first: int = 0, count: int = PAGES):
        return self.world.gpu.to_device(self.process, self.at(first), count * PAGE_SIZE)

    def to_system(self, first: int = 0, count: int = PAGES):
        return self.world.gpu.to_system(self.process, self.at(first), count * PAGE_SIZE)

    def evict(self) -> None:
        self.world.gpu.evict(np.arange(self.world.gpu.npages))

    def contents(self) -> list[int]:
        """One number for each page, -1 where its bytes differ."""
        found = []
        for page in range(PAGES):
            data = self.process.read(self.at(page), PAGE_SIZE)
            found.append(data[0] if data == data[:1] * PAGE_SIZE else -1)
        return found

    def kinds(self) -> list[str]:
        """What the entry of each page is."""
        mem, pgd = self.world.machine.mem, self.process.mm.pgd
        words = [page_table_word(mem, pgd, self.at(page)) for page in range(PAGES)]
        return [decode(word, mem.zero_pfn).kind if word else "none" for word in words]


Scenario = Callable[[Run, Callable[..., list]], None]


def every_order(scenario: Scenario, *, preemptions: int = 1, **options) -> None:
    """Run *scenario* under every schedule with at most so many preemptions, all in one world."""
    world = mapped_range(1, filled=False, nodes=("2MiB",), memory="64KiB", **options)
    world.gpu.table_of(world.process.mm)

    def one(together) -> None:
        run = Run(world, world.process, world.process.mmap(PAGES * PAGE_SIZE))
        scenario(run, together)
        world.machine.verify()
        world.process.munmap(run.addr, PAGES * PAGE_SIZE)

    explore(one, preemptions=preemptions)


class TestCpuAndEviction:
    def test_load(self):
        """A CPU that loads what is evicted finds it, before, during or after."""

        def scenario(run, together):
            run.fill()
            run.to_device()

            loaded, _ = together(lambda: run.process.read(run.at(1), 1), run.evict)

            assert (b"\2", [1, 2, 3]) == (loaded, run.contents())

        every_order(scenario)

    def test_store(self):
        """A CPU's store to what is evicted is not lost."""

        def scenario(run, together):
            run.fill()
            run.to_device()

            together(lambda: run.process.write(run.at(1), b"\7" * PAGE_SIZE), run.evict)

            assert [1, 7, 3] == run.contents()

        every_order(scenario)

    def test_two_cpus(self):
        """Two CPUs that touch one device page get one page back, with both of their stores."""

        def scenario(run, together):
            run.fill()
            run.to_device()
            half = PAGE_SIZE // 2

            together(
                lambda: run.process.write(run.at(1), b"\7" * half),
                lambda: run.process.write(run.at(1) + half, b"\7" * half),
            )

            assert [1, 7, 3] == run.contents()

        every_order(scenario)

    @pytest.mark.slow
    def test_store_beside_a_fault_with_neighbours(self):
        """A fault that brings its neighbours back loses no store to them."""

        def scenario(run, together):
            run.fill()
            run.to_device()

            together(
                lambda: run.process.read(run.at(0), 1),
                lambda: run.process.write(run.at(1), b"\7" * PAGE_SIZE),
            )

            assert [1, 7, 3] == run.contents()

        every_order(scenario, neighbours="64KiB")


class TestCpuAndMigration:
    def test_load(self):
        """A CPU that loads what migrates waits at most, and finds it."""

        def scenario(run, together):
            run.fill()

            loaded, _ = together(lambda: run.process.read(run.at(1), 1), run.to_device)

            assert (b"\2", [1, 2, 3]) == (loaded, run.contents())

        every_order(scenario)

    def test_store(self):
        """A CPU's store goes to the page before it is copied or to where it comes back."""

        def scenario(run, together):
            run.fill()

            together(lambda: run.process.write(run.at(1), b"\7" * PAGE_SIZE), run.to_device)

            assert [1, 7, 3] == run.contents()

        every_order(scenario)

    def test_store_into_a_hole_that_is_being_filled(self):
        """A CPU's first store to a page that the device is about to populate is not lost."""

        def scenario(run, together):
            together(lambda: run.process.write(run.at(1), b"\7" * PAGE_SIZE), run.to_device)

            assert [0, 7, 0] == run.contents()

        every_order(scenario)

    def test_load_from_a_hole_that_is_being_filled(self):
        """A CPU's first load from such a page finds zeros."""

        def scenario(run, together):
            loaded, _ = together(lambda: run.process.read(run.at(1), 1), run.to_device)

            assert (b"\0", [0, 0, 0]) == (loaded, run.contents())

        every_order(scenario)

    @pytest.mark.parametrize("way", ["to_device", "to_system", "evict"])
    def test_pin(self, way):
        """Who pins a page has the page that the process uses, and it stays."""

        def scenario(run, together):
            run.fill()
            if way != "to_device":
                run.to_device()

            pin, _ = together(lambda: run.process.pin(run.at(1), 1), getattr(run, way))

            with pin:
                word = page_table_word(pin.mem, run.process.mm.pgd, run.at(1))
                assert pin.pfns.tolist() == pte_pfn(np.array([word], np.uint64)).tolist()
                assert 1 == run.to_device().stayed["pinned"]
                assert [1, 2, 3] == run.contents()

        every_order(scenario)


class TestTwoMigrations:
    def test_overlapping_ranges(self):
        """Of two migrations to a device each page goes with one, or stays for both."""

        def scenario(run, together):
            run.fill()

            first, second = together(lambda: run.to_device(0, 2), lambda: run.to_device(1, 2))

            assert first.migrated + second.migrated == run.kinds().count("device")
            assert [1, 2, 3] == run.contents()

        every_order(scenario)

    def test_holes(self):
        """A hole is filled once."""

        def scenario(run, together):
            first, second = together(lambda: run.to_device(0, 2), lambda: run.to_device(1, 2))

            assert first.migrated + second.migrated == run.kinds().count("device")
            assert [0, 0, 0] == run.contents()

        every_order(scenario)

    def test_there_and_back(self):
        """One to the device and one from it pass each other."""

        def scenario(run, together):
            run.fill()
            run.to_device(0, 2)

            together(lambda: run.to_system(0, 3), lambda: run.to_device(0, 3))

            assert [1, 2, 3] == run.contents()

        every_order(scenario)

    def test_eviction_twice(self):
        """Two threads that evict everything bring each page back once."""

        def scenario(run, together):
            run.fill()
            run.to_device()
            evicted = run.world.gpu.stats.pages_to_system

            together(run.evict, run.evict)

            assert evicted + PAGES == run.world.gpu.stats.pages_to_system
            assert (["present"] * PAGES, [1, 2, 3]) == (run.kinds(), run.contents())

        every_order(scenario)


class TestSystemCalls:
    @pytest.mark.parametrize("way", ["to_device", "evict"])
    def test_munmap_waits_for_the_migration(self, way):
        """Memory is unmapped before or after it moves, never in between; its neighbours live."""

        def scenario(run, together):
            run.fill()
            if way == "evict":
                run.to_device()

            together(
                lambda: run.process.munmap(run.at(1), PAGE_SIZE),
                lambda: or_nothing_there(getattr(run, way)),
            )

            assert (None, 2) == (run.process.find_vma(run.at(1)), run.process.mm.anon_rss)
            assert [run.process.read(run.at(page), 1) for page in (0, 2)] == [b"\1", b"\3"]

        every_order(scenario)

    @pytest.mark.parametrize("way", ["to_device", "evict"])
    def test_exit_waits_for_the_migration(self, way):
        """A process that exits meanwhile gives everything back."""

        def scenario(run, together):
            process = run.world.machine.spawn("short-lived")
            short = Run(run.world, process, process.mmap(PAGES * PAGE_SIZE))
            short.fill()
            if way == "evict":
                short.to_device()

            together(process.exit, lambda: or_nothing_there(getattr(short, way)))

            assert run.world.gpu.npages == run.world.gpu.chunks.free_pages
            assert 0 == run.world.machine.vmstat["nr_anon_pages"]

        every_order(scenario)

    def test_mmap_beside_it(self):
        """A migration of one area and mmap() of the next do not disturb each other."""

        def scenario(run, together):
            run.fill()

            together(
                lambda: run.process.mmap(PAGE_SIZE, addr=run.addr - PAGE_SIZE),
                run.to_device,
            )

            assert bytes(PAGE_SIZE) == run.process.read(run.addr - PAGE_SIZE, PAGE_SIZE)
            assert [1, 2, 3] == run.contents()

        every_order(scenario)


def or_nothing_there(way: Callable[[], object]) -> None:
    """Call *way*, which may find that its range is not mapped any more."""
    with suppress(InvalidRange):
        way()


class TestMany:
    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(300))
    def test_five_threads(self, seed):
        """CPU stores, migrations both ways and an eviction of the same pages, by chance."""
        world = mapped_range(PAGES, filled=False, nodes=("2MiB",), memory="64KiB")
        run = Run(world, world.process, world.addr)
        run.fill()

        run_interleaved(
            [
                lambda: run.process.write(run.at(0), b"\5" * PAGE_SIZE),
                lambda: run.process.write(run.at(2), b"\7" * PAGE_SIZE),
                run.to_device,
                run.to_system,
                run.evict,
            ],
            seed=seed,
        )

        assert [5, 2, 7] == run.contents()
