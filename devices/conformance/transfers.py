"""Rules about migrations: what moves, with which contents, and what happens when a part fails."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from devices.conformance.callbacks import lock_order
from devices.conformance.copies import HOOKS, lost
from devices.conformance.rule import Device, Opener, rule
from devices.conformance.scene import Scene, expect, expect_bytes, expect_in_step
from devices.faulty import Faulty
from devices.ops import DeviceError
from devices.wrappers import Wrapper
from mm.errors import BusError, OutOfMemory
from mm.swap import get_page, put_page
from mm.types import MemoryType
from mm.typing import PAGE_SIZE, Pfns


@rule(lock_order, lost)
def willing(opener: Opener) -> str:
    """All pages that can move and fit do move, there and back, holes too."""
    scene = Scene(opener, "256KiB")
    area = scene.area(40)
    area.process.madvise(area.at(7), 3 * PAGE_SIZE, "dontneed")
    there = scene.gpu.to_device(area.process, area.addr, area.nbytes)
    expect(
        40 == there.migrated == np.count_nonzero(area.on_device(scene.gpu)),
        f"{there.migrated} of 40 pages went to the device; stayed: {dict(there.stayed)}",
    )
    back = scene.gpu.to_system(area.process, area.addr, area.nbytes)
    expect(
        back.migrated == 40 and not area.on_device(scene.gpu).any(),
        f"{back.migrated} of 40 pages came back; stayed: {dict(back.stayed)}",
    )
    return "40 pages there and back"


@rule(willing)
def sizes(opener: Opener) -> str:
    """A device has the memory that it was opened with, be it a single page, and uses all of it."""
    for npages in (1, 17, 300):
        scene = Scene(opener, npages * PAGE_SIZE)
        expect(
            npages == scene.gpu.npages,
            f"opened with {npages} pages, it says that it has {scene.gpu.npages}",
        )
        area = scene.area(npages)
        moved = scene.gpu.to_device(area.process, area.addr, area.nbytes)
        expect(npages == moved.migrated, f"a device of {npages} pages took {moved.migrated}")
    return "1, 17 and 300 pages"


@rule(willing)
def odd_ranges(opener: Opener) -> str:
    """A range moves with every page that it touches, wherever it begins and ends."""
    ranges = ((0, 1), (4095, 2), (1, 4095), (100, 3 * PAGE_SIZE), (PAGE_SIZE + 8, 9000))
    for begin, nbytes in ranges:
        scene = Scene(opener, "256KiB")
        area = scene.area(6)
        touched = np.zeros(6, dtype=np.bool_)
        touched[begin // PAGE_SIZE : (begin + nbytes - 1) // PAGE_SIZE + 1] = True
        scene.gpu.to_device(area.process, area.addr + begin, nbytes)
        here = area.on_device(scene.gpu)
        expect(
            bool((here == touched).all()),
            f"bytes {begin} to {begin + nbytes} are on {touched.sum()} pages, {here.sum()} moved",
        )
    return f"{len(ranges)} ranges"


@rule(willing, *HOOKS)
def cpu_access(opener: Opener) -> str:
    """A CPU that loads from a page on the device, or stores to it, finds what belongs there."""
    scene = Scene(opener, "256KiB")
    area = scene.area_on_device(8)
    for page in (3, 0, 7):
        found = area.process.read(area.at(page) + 100, 50)
        expect_bytes(area.contents[page, 100:150], found, f"load from page {page}")
    for page in (3, 5, 6):
        area.store(page, b"stored", PAGE_SIZE - 6)
    area.expect_cpu("after loads and stores")
    left = np.count_nonzero(area.on_device(scene.gpu))
    if scene.gpu.type is MemoryType.DEVICE_PUBLIC:
        return f"3 loads, 3 stores, {left} of 8 pages are on the device still"
    expect(left == 0, f"a CPU has read all 8 pages, and {left} are in private memory")
    return "3 loads, 3 stores, 8 pages came back"


@rule(cpu_access)
def contents(opener: Opener) -> str:
    """What a process wrote comes back, whichever pages moved together."""
    scene = Scene(opener, "4MiB")
    area, gpu = scene.area(600), scene.gpu
    for first, npages in ((3, 1), (10, 7), (500, 40), (0, 600)):
        area.process.madvise(area.at(first), PAGE_SIZE, "dontneed")
        area.contents[first] = 0
        gpu.to_device(area.process, area.at(first), npages * PAGE_SIZE)
        if first != 10:
            gpu.to_system(area.process, area.at(first), npages * PAGE_SIZE)
        area.expect_cpu(f"after {npages} pages moved there and back")
    return "2.3 MiB, equal"


@rule(cpu_access)
def holes(opener: Opener) -> str:
    """Memory that was never touched is zeros, whatever was on the device's pages before."""
    scene = Scene(opener, "64KiB")
    secret = scene.area_on_device(16)
    secret.process.munmap(secret.addr, secret.nbytes)
    fresh = scene.area(16, process=scene.machine.spawn("other"), filled=False)
    scene.gpu.to_device(fresh.process, fresh.addr, fresh.nbytes)
    fresh.expect_cpu("memory that was never touched, from the device")
    return "16 pages of zeros where others had been"


@rule(contents)
def partial(opener: Opener) -> str:
    """When the device gives fewer pages than are asked for, the others stay as they are."""
    scene = Scene(opener, "256KiB")
    area = scene.area(20)
    with Faulty(scene.gpu, allocate={"fail_at": 1, "how": "half"}):
        moved = scene.gpu.to_device(area.process, area.addr, area.nbytes)
    here = area.on_device(scene.gpu)
    expect(
        10 == moved.migrated == np.count_nonzero(here),
        f"10 of 20 pages found room, {moved.migrated} migrated, {np.count_nonzero(here)} are there",
    )
    area.expect_cpu("after half of it went to the device")
    return "10 of 20 pages, the others stayed"


@rule(contents)
def no_frames(opener: Opener) -> str:
    """When the system has no frame for a page that shall come back, it stays on the device."""
    scene = Scene(opener, "256KiB", nodes=("2MiB",))
    area, hog = scene.area_on_device(32), scene.machine.spawn("hog")
    taken = hog.mmap("4MiB", flags="anon|private|noreserve")
    with suppress(OutOfMemory):
        hog.touch(taken, "4MiB")
    back = scene.gpu.to_system(area.process, area.addr, area.nbytes)
    expect(back.migrated < 32, "there was a frame for each page")
    with suppress(OutOfMemory, BusError):
        area.process.touch(area.addr, area.nbytes)
    left = np.count_nonzero(area.on_device(scene.gpu))
    hog.exit()
    area.expect_cpu("after the system had no frame for it")
    return f"{left} of 32 pages stayed until there were frames"


@rule(contents)
def failing_copy(opener: Opener) -> str:
    """A copy that fails is reported to the caller; every page is then where it was, intact."""
    for op in ("copy_in", "copy_out"):
        for how in ("raise", "torn"):
            scene = Scene(opener, "256KiB")
            area, gpu = scene.area(9), scene.gpu
            back = op == "copy_out"
            if back:
                gpu.to_device(area.process, area.addr, area.nbytes)
            try:
                with Faulty(gpu, copy={"fail_at": 1, "how": how}):
                    move = gpu.to_system if back else gpu.to_device
                    move(area.process, area.addr, area.nbytes)
            except DeviceError:
                reported = True
            else:
                reported = False
            expect(reported, f"{op} failed ({how}), and nobody heard of it")
            expect(
                bool((area.on_device(gpu) == back).all()),
                f"{op} failed ({how}), and {np.count_nonzero(area.on_device(gpu) != back)} of 9 "
                f"pages are elsewhere than before",
            )
            area.expect_cpu(f"after a failed {op} ({how})")
    return "4 failed copies, all pages where they were"


@rule(contents)
def lost_pages(opener: Opener) -> str:
    """Memory that the device lost answers with BusError, and never with other bytes."""
    scene = Scene(opener, "256KiB")
    area, gone = scene.area_on_device(6), []
    with Faulty(scene.gpu, copy_out={"fail_at": 1, "how": "lose"}):
        scene.gpu.to_system(area.process, area.at(2), 2 * PAGE_SIZE)
    for page in range(6):
        try:
            found = area.process.read(area.at(page), PAGE_SIZE)
        except BusError:
            gone.append(page)
        else:
            expect(page not in (2, 3), f"page {page} is lost, and a CPU reads {found[:4].hex()}...")
            expect_bytes(area.contents[page], found, f"page {page}, beside lost ones")
    expect(gone == [2, 3], f"pages 2 and 3 are lost, {gone} answer with BusError")
    return "2 of 6 pages lost, and they alone"


@rule(contents)
def late_refusal(opener: Opener) -> str:
    """A page that is refused after it was copied stays, and the device does not map the copy."""
    scene = Scene(opener, "256KiB")
    area, gpu = scene.area(6), scene.gpu
    with _HoldsRows(gpu, 3) as holder:
        moved = gpu.to_device(area.process, area.addr, area.nbytes)
    try:
        expect(moved.migrated == 3, f"3 of 6 pages were held, {moved.migrated} moved")
        expect_in_step(gpu, "after half of the pages were refused late")
    finally:
        put_page(scene.machine.mem, holder.held)
    area.expect_cpu("after half of the pages were refused late")
    return "3 of 6 pages stayed"


class _HoldsRows(Wrapper):
    """Takes a reference to the first frames that are copied in, as direct I/O may at any time."""

    def __init__(self, device: Device, count: int) -> None:
        super().__init__(device)
        self.count = count
        self.held: Pfns = np.empty(0, dtype=np.int64)

    def call(self, op: str, *args: Any) -> Any:
        result = super().call(op, *args)
        if op == "copy_in" and not self.held.size:
            self.held = args[2][: self.count]
            get_page(self.device.mem, self.held)
        return result
