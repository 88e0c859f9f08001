"""Rules about how memory, processes and devices come and go, and about what they leave."""

from __future__ import annotations

import numpy as np

from devices.conformance.access import device_access
from devices.conformance.rule import Opener, rule
from devices.conformance.scene import Scene, expect
from devices.conformance.tables import rights, stale_clear, stale_fork, stale_own
from devices.conformance.transfers import contents, cpu_access
from mm.errors import KernelBug, MmError
from mm.typing import PAGE_SIZE


@rule(device_access, rights, stale_fork, stale_clear)
def fork(opener: Opener) -> str:
    """Parent and child of a fork() share pages on the device, and each sees its own stores only."""
    scene = Scene(opener, "256KiB")
    area, gpu = scene.area_on_device(6), scene.gpu
    child = area.fork(area.process.fork("child"))
    child.store(1, b"child")
    area.store(2, b"parent")
    for one in (area, child):
        one.expect_cpu(f"{one.process.name}, after stores by CPUs")
    if gpu.memory is not None:
        for one, page in ((area, 3), (child, 4)):
            gpu.write(one.process, one.at(page), b"device")
            one.stored(page, b"device")
        for one in (area, child):
            one.expect_device(gpu, f"{one.process.name}, after stores of the device")
            one.expect_cpu(f"{one.process.name}, after stores of the device")
    child.process.exit()
    area.expect_cpu("after the child's exit")
    return "6 shared pages, stores on both sides"


@rule(contents)
def munmap(opener: Opener) -> str:
    """Memory that is unmapped while it is on the device is free there, all of it."""
    scene = Scene(opener, "64KiB")
    area, gpu = scene.area_on_device(16), scene.gpu
    area.process.munmap(area.at(3), 5 * PAGE_SIZE)
    area.process.munmap(area.at(12), PAGE_SIZE)
    expect(gpu.free_pages == 6, f"6 of 16 pages were unmapped, {gpu.free_pages} are free")
    fresh = gpu.ops.allocate(6)
    expect(fresh.size == 6, f"6 pages are free, and allocate(6) gives {fresh.size}")
    gpu.ops.free(fresh)
    return "6 of 16 pages, free again"


@rule(munmap)
def eviction(opener: Opener) -> str:
    """A full device makes room, and what it sends away is intact."""
    scene = Scene(opener, "256KiB")
    area, gpu = scene.area(160), scene.gpu
    for first in (0, 40, 80, 120, 20, 100):
        there = gpu.to_device(area.process, area.at(first), 40 * PAGE_SIZE)
        expect(there.migrated == 40, f"of 40 pages {there.migrated} found room on 64")
    here = int(np.count_nonzero(area.on_device(gpu)))
    expect(here <= 64, f"a device of 64 pages says that it has {here}")
    area.expect_cpu("after six windows of 40 pages on a device of 64")
    return "240 pages through a device of 64, all intact"


@rule(munmap)
def exit(opener: Opener) -> str:
    """A process that ends leaves nothing on the device, nor in its page tables."""
    scene = Scene(opener, "64KiB")
    area, gpu = scene.area_on_device(9), scene.gpu
    other = scene.area_on_device(4, process=scene.machine.spawn("other"))
    area.process.exit()
    expect(gpu.free_pages == 12, f"9 of 13 pages in use were freed, {gpu.free_pages} are free")
    other.expect_cpu("a process that goes on")
    other.process.exit()
    left = scene.machine.vmstat["nr_page_table_pages"]
    expect(left == 0, f"no process is left, and {left} pages of page tables are")
    return "2 processes, 13 pages"


@rule(stale_own)
def removal(opener: Opener) -> str:
    """A device that is taken away brings everything back before, and leaves its PFNs."""
    scene = Scene(opener, "64KiB")
    area, gpu = scene.area_on_device(9), scene.gpu
    other = scene.area_on_device(4, process=scene.machine.spawn("other"))
    gpu.close()
    for one in (area, other):
        one.expect_cpu(f"{one.process.name}, after close()")
    zone = scene.machine.mem.zones[gpu.zone.index]
    expect(gpu.closed and zone is None, "its PFNs are still there after close()")
    gpu.close()
    again = opener(scene.machine, "64KiB")
    moved = again.to_device(area.process, area.addr, area.nbytes)
    expect(moved.migrated == 9, f"opened again, it took {moved.migrated} of 9 pages")
    area.expect_cpu("after a second life")
    return "13 pages of 2 processes, and the device opened again"


@rule(contents)
def two_devices(opener: Opener) -> str:
    """Two devices of a machine have memory of their own."""
    scene = Scene(opener, "64KiB")
    one, two = scene.gpu, opener(scene.machine, "128KiB")
    here, there = scene.area(10), scene.area(10)
    one.to_device(here.process, here.addr, here.nbytes)
    moved = two.to_device(there.process, there.addr, there.nbytes)
    expect(moved.migrated == 10, f"a second device took {moved.migrated} of 10 pages")
    expect(one.name != two.name, f"both are called {one.name}")
    here.expect_cpu("the first device's pages")
    there.expect_cpu("the second device's pages")
    return "10 pages each"


@rule(cpu_access)
def no_contents(opener: Opener) -> str:
    """On a machine that keeps no contents a device moves pages and copies nothing."""
    scene = Scene(opener, "256KiB", payload=False)
    addr = scene.process.mmap(28 * PAGE_SIZE)
    scene.process.touch(addr, 20 * PAGE_SIZE)
    for first in (0, 14):
        try:
            moved = scene.gpu.to_device(scene.process, addr + first * PAGE_SIZE, 14 * PAGE_SIZE)
            scene.process.touch(addr + first * PAGE_SIZE, PAGE_SIZE)
        except MmError as error:
            moved, why = None, str(error)
        expect(
            moved is not None and moved.migrated == 14,
            f"{moved.migrated} of 14 pages moved" if moved else why,
        )
    return "28 pages moved without contents"


@rule(stale_own, exit)
def leaks(opener: Opener) -> str:
    """Whatever happens, all counts fit together, and in the end every page is free."""
    scene = Scene(opener, "64KiB")
    machine, gpu, process = scene.machine, scene.gpu, scene.process
    area, more = scene.area(24), scene.area(24, filled=False)
    child = None
    try:
        for step in range(6):
            if step == 2:
                child = process.fork("child")
            gpu.to_device(process, area.at(4 * step), 4 * PAGE_SIZE)
            gpu.to_device(process, more.addr, 3 * PAGE_SIZE)
            process.touch(area.at(4 * step + 1), PAGE_SIZE)
            machine.verify()
        process.munmap(more.addr, 2 * PAGE_SIZE)
        if child is not None:
            child.exit()
        gpu.close()
        process.exit()
        machine.verify()
    except KernelBug as bug:
        lines = str(bug).splitlines()
        expect(False, f"{lines[0]} ({len(lines)} rules of docs/data-model.md are broken)")
    left = scene.free_at_boot - machine.nr_free_pages
    expect(left == 0, f"{left} frames are still in use")
    free = int(np.count_nonzero(gpu.chunks.used))
    expect(free == 0, f"{free} chunks of the device are still in use")
    return "two processes and a device came and went; nothing is left"
