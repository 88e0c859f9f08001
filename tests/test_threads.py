"""Threads of the interpreter, which may switch anywhere, and whole ways that threads take at once.

What can be found at preemption points alone is found there (tests/interleave.py), for a schedule
can be repeated; here is what lies between them.
"""

import sys
import threading

import pytest

from mm import InvalidRange
from mm.gfp import GFP_KERNEL
from mm.page_alloc import alloc_pages_bulk
from mm.swap import get_page, put_page
from mm.typing import PAGE_SIZE
from tests.interleave import explore
from tests.world import mapped_range

SOON = 60.0


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*functions):
    """Run *functions* in threads; raises an error of one, rather not that others broke off."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def use_memory(process, byte, rounds):
    """Map, write, read, pin and unmap, over and over."""
    for _ in range(rounds):
        addr = process.mmap(20 * PAGE_SIZE)
        process.write(addr + 100, bytes([byte]) * 30_000)
        with process.pin(addr, 2 * PAGE_SIZE):
            assert bytes([byte]) * 30_000 == process.read(addr + 100, 30_000)
        process.munmap(addr, 20 * PAGE_SIZE)


class TestMemory:
    def test_processes_of_their_own(self):
        """Processes on different CPUs share frames, page tables and counters, and nothing else."""
        world = mapped_range(pages=1, cpus=4)

        def task(cpu):
            with world.machine.spawn(f"task{cpu}", cpu) as process:
                use_memory(process, cpu + 1, rounds=60)

        at_once(*(lambda cpu=cpu: task(cpu) for cpu in range(4)))

    def test_threads_of_one_process(self):
        """Threads that map and unmap beside one another keep to their own bytes."""
        world = mapped_range(pages=1)

        at_once(*(lambda n=n: use_memory(world.process, n, rounds=40) for n in (1, 2, 3, 4)))

        assert 1 == world.process.mm.anon_rss

    def test_last_reference(self):
        """However many drop their references at once, one of them drops the last."""
        world = mapped_range(pages=1, cpus=4)
        mem = world.machine.mem
        together = threading.Barrier(4, timeout=SOON)
        held = []

        def drop(cpu):
            for _ in range(400):
                if cpu == 0:
                    held[:] = [alloc_pages_bulk(mem, GFP_KERNEL, 0, 20)]
                    get_page(mem, held[0].repeat(3))
                together.wait()
                put_page(mem, held[0], cpu)
                together.wait()

        def drop_or_break_off(cpu):
            try:
                drop(cpu)
            except BaseException:
                together.abort()
                raise

        at_once(*(lambda cpu=cpu: drop_or_break_off(cpu) for cpu in range(4)))


class TestDevice:
    def test_memory_that_migrates_while_it_is_used(self):
        """Each word is what its thread wrote last, wherever the page is just then."""
        world = mapped_range(pages=40, filled=False, memory="256KiB")

        def migrate():
            for _ in range(30):
                world.gpu.to_device(world.process, world.addr, world.nbytes)
                world.gpu.to_system(world.process, world.addr, world.nbytes)

        def use(thread):
            for i in range(100):
                addr, word = world.at(i % 40) + 8 * thread, (7 * i + thread).to_bytes(8, "little")
                world.process.write(addr, word)
                assert word == world.process.read(addr, 8)
                if i % 10 == 0:
                    assert word == world.gpu.read(world.process, addr, 8)

        at_once(migrate, lambda: use(0), lambda: use(1))

    def test_memory_that_changes_nodes_while_it_is_used(self):
        """The same where pages go between nodes, while others go to a device and back."""
        world = mapped_range(pages=40, filled=False, nodes=("8MiB", "8MiB"), memory="256KiB")

        def move():
            for node in range(60):
                world.process.move_pages(world.addrs, node % 2)

        def migrate():
            for _ in range(20):
                world.gpu.to_device(world.process, world.addr, world.nbytes)
                world.gpu.to_system(world.process, world.addr, world.nbytes)

        def use(thread):
            for i in range(100):
                addr, word = world.at(i % 40) + 8 * thread, (7 * i + thread).to_bytes(8, "little")
                world.process.write(addr, word)
                assert word == world.process.read(addr, 8)

        at_once(move, migrate, lambda: use(0), lambda: use(1))

    def test_others_may_allocate_during_a_migration(self):
        """What another process takes meanwhile is no page that the driver has mislaid."""
        world = mapped_range(pages=2)

        def scenario(together):
            other = world.machine.spawn("other")
            addr = other.mmap(PAGE_SIZE)
            together(
                lambda: world.gpu.to_device(world.process, world.addr, world.nbytes),
                lambda: other.write(addr, b"x"),
            )
            assert [True, True] == world.on_device()
            world.gpu.to_system(world.process, world.addr, world.nbytes)
            other.exit()

        assert 20 < explore(scenario, preemptions=1)

    def test_access_against_migration(self):
        """In every schedule a load sees the page's bytes, on its way there or back."""
        world = mapped_range(pages=1)

        def scenario(together):
            _, seen = together(
                lambda: world.gpu.to_device(world.process, world.addr, PAGE_SIZE),
                lambda: world.process.read(world.addr, 4),
            )
            assert bytes(4) == seen
            world.gpu.to_system(world.process, world.addr, PAGE_SIZE)

        assert 20 < explore(scenario, preemptions=1)

    def test_munmap_against_migration(self):
        """A range that goes while it migrates leaves nothing behind on either side."""
        world = mapped_range(pages=1)

        def scenario(together):
            process = world.machine.spawn("racer")
            addr = process.mmap(2 * PAGE_SIZE)
            process.write(addr, b"x" * 2 * PAGE_SIZE)
            together(
                lambda: migrate_or_not(world.gpu, process, addr),
                lambda: process.munmap(addr, 2 * PAGE_SIZE),
            )
            assert world.gpu.npages == world.gpu.chunks.free_pages
            process.exit()

        assert 20 < explore(scenario, preemptions=1)

    def test_two_migrations_of_a_page(self):
        """One thread moves it and the other finds it moved, or locked, and goes on."""
        world = mapped_range(pages=2)

        def scenario(together):
            move = [lambda: world.gpu.to_device(world.process, world.addr, world.nbytes)] * 2
            together(*move)
            world.gpu.to_system(world.process, world.addr, world.nbytes)
            assert [0, 1] == world.contents()

        assert 20 < explore(scenario, preemptions=1)


def migrate_or_not(gpu, process, addr):
    try:
        gpu.to_device(process, addr, 2 * PAGE_SIZE)
    except InvalidRange:
        assert process.find_vma(addr) is None
