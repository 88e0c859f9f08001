"""Rules about the two callbacks of a migration, and about the locks that a driver takes in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from devices.conformance.lock_order import LockOrder
from devices.conformance.pages import free
from devices.conformance.rule import Broken, Opener, rule
from devices.conformance.scene import Scene
from mm.errors import DriverBug
from mm.typing import PAGE_SIZE


def _migrations(opener: Opener, complaint: Callable[[str], bool]) -> str:
    """Migrations of every kind; Broken with the first broken contract that *complaint* is about."""
    scene = Scene(opener, "256KiB")
    gpu, process = scene.gpu, scene.process
    area, empty = scene.area(8), scene.area(3, filled=False)
    pin = process.pin(area.at(5), PAGE_SIZE)
    calls = (
        partial(gpu.to_device, process, area.addr, area.nbytes),
        partial(gpu.to_device, process, empty.addr, empty.nbytes),
        partial(process.touch, area.at(2), PAGE_SIZE),
        partial(gpu.make_room, gpu.npages),
        partial(gpu.to_device, process, area.at(1), 3 * PAGE_SIZE),
        partial(gpu.to_system, process, area.addr, area.nbytes),
    )
    for call in calls:
        try:
            call()
        except DriverBug as bug:
            if complaint(str(bug)):
                raise Broken(str(bug)) from bug
        except Exception:  # noqa: BLE001 - whatever else goes wrong is another rule's
            pass
    pin.release()
    return f"{len(calls)} migrations, of pages, holes and a pinned page"


@rule(free)
def alloc_and_copy(opener: Opener) -> str:
    """alloc_and_copy() only reads src, and names in dst pages of its own, locked, each once, all
    that it took."""
    return _migrations(opener, lambda bug: "finalize_and_map()" not in bug)


@rule(alloc_and_copy)
def finalize_and_map(opener: Opener) -> str:
    """finalize_and_map() changes neither src nor dst."""
    return _migrations(opener, lambda bug: "finalize_and_map()" in bug)


@rule(finalize_and_map)
def lock_order(opener: Opener) -> str:
    """A driver takes locks in the order of the kernel, and never waits for itself."""
    scene = Scene(opener, "256KiB")
    gpu, process, other = scene.gpu, scene.process, scene.machine.spawn("other")
    area, more = scene.area(8), scene.area(70, process=other)
    order = LockOrder(scene.machine.mem)
    calls = [
        partial(gpu.to_device, process, area.addr, area.nbytes),
        partial(process.touch, area.at(2), PAGE_SIZE),
        partial(gpu.to_device, other, more.addr, more.nbytes),
        partial(gpu.to_device, process, area.addr, area.nbytes),
        partial(gpu.to_system, other, more.addr, more.nbytes),
        partial(process.fork, "child"),
        partial(process.munmap, area.at(3), 2 * PAGE_SIZE),
        other.exit,
        gpu.close,
    ]
    if gpu.memory is not None:
        calls.insert(4, partial(gpu.read, process, area.addr, area.nbytes))
    for call in calls:
        with suppress(Exception), order.watched():
            call()
        if order.complaints:
            raise Broken(order.complaints[0])
    return f"locks were taken or given back {order.seen} times, in order"
