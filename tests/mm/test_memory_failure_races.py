"""Frames that fail or go out of use while others store, migrate, fork and reclaim: every order."""

from contextlib import suppress

import pytest

from mm import PAGE_SIZE, BusError
from mm.page_flags import PG_hwpoison
from mm.swap import lru_add_drain_all
from tests.interleave import explore
from tests.world import mapped_range

PAGES = 2


def fork_and_exit(world):
    world.process.fork().exit()


def pin_and_release(world):
    with suppress(BusError):
        world.process.pin(world.addr, world.nbytes).release()


def store(world):
    with suppress(BusError):
        world.process.write(world.addr, world.written())


OTHERS = {
    "store": store,
    "to_device": lambda world: world.gpu.to_device(world.process, world.addr, world.nbytes),
    "pageout": lambda world: world.pageout(),
    "advice": lambda world: world.process.madvise(world.addr, world.nbytes, "pageout"),
    "fork": fork_and_exit,
    "pin": pin_and_release,
    "exclusive": lambda world: world.make_exclusive(0, 1),
    "dontneed": lambda world: world.process.madvise(world.addr, PAGE_SIZE, "dontneed"),
    "move_pages": lambda world: world.process.move_pages(world.addrs, 1),
    "the same": lambda world: world.machine.memory_failure(world.frames),
    "soft_offline": lambda world: world.machine.soft_offline_page(world.frames),
}


def every_order(call, other, where):
    """Let *call*, which answers for each page, meet *other* under every schedule, in one world.

    Each has a range of its own, mapped and also in the swap cache if *where* says so. Whatever the
    order, a page holds what it did or is lost, and an answer of 0 means that the frame is out of
    use.
    """
    world = mapped_range(PAGES, nodes=("4MiB", "4MiB"), memory="64KiB", swap="1MiB")
    mem = world.machine.mem

    def scenario(together):
        world.addr = world.process.mmap(world.nbytes)
        world.fill()
        child = world.process.fork("child") if where == "swap cache" else None
        if child is not None:
            world.pageout()
            world.process.touch(world.addr, world.nbytes, write=False)
        lru_add_drain_all(mem)
        world.frames = world.pfns()

        status, _ = together(lambda: call(world), lambda: OTHERS[other](world))

        assert ((mem.flags[world.frames] & PG_hwpoison) != 0)[status == 0].all()
        for page in range(PAGES):
            with suppress(BusError):
                found = world.process.read(world.at(page), 1)[0]
                assert found == page or (other == "dontneed" and not found)
        world.machine.verify()
        world.process.munmap(world.addr, world.nbytes)
        if child is not None:
            child.exit()

    assert 4 < explore(scenario, preemptions=1)


@pytest.mark.parametrize("where", ["memory", pytest.param("swap cache", marks=pytest.mark.slow)])
class TestEveryOrder:
    @pytest.mark.parametrize("other", OTHERS)
    def test_memory_failure(self, where, other):
        """Contents are lost while somebody uses the pages."""
        every_order(lambda world: world.machine.memory_failure(world.frames), other, where)

    @pytest.mark.parametrize("other", [name for name in OTHERS if name != "the same"])
    def test_soft_offline(self, where, other):
        """Contents move to other frames while somebody uses the pages."""
        every_order(lambda world: world.machine.soft_offline_page(world.frames), other, where)
