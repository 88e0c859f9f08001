"""Rules about the device's page table: it shows nothing that the CPU's does not."""

from __future__ import annotations

from devices.conformance.rule import Device, Opener, rule
from devices.conformance.scene import Area, Scene, expect, expect_in_step
from devices.conformance.transfers import contents
from mm.filemap import unlock_page
from mm.gup import make_device_exclusive_range
from mm.sched import running
from mm.swap import put_page
from mm.typing import PAGE_SIZE


def _mapped(scene: Scene, npages: int = 8) -> Area:
    """Memory of which the device maps every page: most of its own, the third in system memory."""
    area = scene.area(npages)
    pin = area.process.pin(area.at(2), PAGE_SIZE)
    if scene.gpu.memory is not None:
        scene.gpu.read(area.process, area.addr, area.nbytes)
    else:
        scene.gpu.to_device(area.process, area.addr, area.nbytes)
    pin.release()
    expect_in_step(scene.gpu, "before anything changed")
    return area


def _entries(gpu: Device) -> str:
    count = sum(t.mapped()[0].size for mm, t in gpu.tables.items() if not mm.exited)
    return f"{count} entries left, none of them stale"


@rule(contents)
def stale_own(opener: Opener) -> str:
    """After its own migrations the device reaches nothing where it was before."""
    scene = Scene(opener, "256KiB")
    area, gpu = _mapped(scene), scene.gpu
    gpu.to_system(area.process, area.addr, 5 * PAGE_SIZE)
    expect_in_step(gpu, "to_system()")
    area.process.touch(area.at(6), PAGE_SIZE)
    expect_in_step(gpu, "a CPU's fault")
    gpu.to_device(area.process, area.addr, area.nbytes)
    gpu.make_room(gpu.npages)
    expect_in_step(gpu, "eviction")
    return _entries(gpu)


@rule(contents)
def rights(opener: Opener) -> str:
    """The device may store to no page that the process may not store to."""
    scene = Scene(opener, "256KiB")
    area, gpu = scene.area(8), scene.gpu
    child = area.process.fork("child")
    gpu.to_device(area.process, area.addr, 4 * PAGE_SIZE)
    expect_in_step(gpu, "pages that are shared with a child went to the device")
    area.process.mprotect(area.at(4), 4 * PAGE_SIZE, "r")
    gpu.to_device(area.process, area.at(4), 4 * PAGE_SIZE)
    expect_in_step(gpu, "pages that are read-only went to the device")
    child.exit()
    return "8 pages that may not be stored to"


@rule(contents)
def stale_unmap(opener: Opener) -> str:
    """The device forgets memory that is unmapped or moved."""
    scene = Scene(opener, "256KiB")
    area, gpu = _mapped(scene), scene.gpu
    area.process.munmap(area.at(1), 3 * PAGE_SIZE)
    expect_in_step(gpu, "munmap()")
    there = scene.process.mmap(PAGE_SIZE)
    area.process.mremap(area.at(5), PAGE_SIZE, PAGE_SIZE, "maymove|fixed", there)
    expect_in_step(gpu, "mremap()")
    return _entries(gpu)


@rule(contents)
def stale_protect(opener: Opener) -> str:
    """The device loses rights that mprotect() takes."""
    scene = Scene(opener, "256KiB")
    area, gpu = _mapped(scene), scene.gpu
    area.process.mprotect(area.at(1), 3 * PAGE_SIZE, "r")
    expect_in_step(gpu, 'mprotect("r")')
    area.process.mprotect(area.at(2), 4 * PAGE_SIZE, "-")
    expect_in_step(gpu, 'mprotect("-")')
    return _entries(gpu)


@rule(contents)
def stale_clear(opener: Opener) -> str:
    """The device forgets pages that are thrown away or replaced."""
    scene = Scene(opener, "256KiB")
    area, gpu = _mapped(scene), scene.gpu
    area.process.madvise(area.at(1), 3 * PAGE_SIZE, "dontneed")
    expect_in_step(gpu, 'madvise("dontneed")')
    area.process.madvise(area.at(5), PAGE_SIZE, "dontneed")
    area.process.write(area.at(5), b"new")
    expect_in_step(gpu, "a page that came anew")
    return _entries(gpu)


@rule(rights)
def stale_fork(opener: Opener) -> str:
    """The device may no longer store to what fork() made read-only."""
    scene = Scene(opener, "256KiB")
    area, gpu = _mapped(scene), scene.gpu
    child = area.process.fork("child")
    expect_in_step(gpu, "fork()")
    child.exit()
    return _entries(gpu)


@rule(contents)
def stale_soft_dirty(opener: Opener) -> str:
    """The device may no longer store to what clear_refs made read-only to see the next store."""
    scene = Scene(opener, "256KiB")
    area, gpu = _mapped(scene), scene.gpu
    area.process.clear_refs(4)
    expect_in_step(gpu, "clear_refs")
    return _entries(gpu)


@rule(contents)
def stale_exclusive(opener: Opener) -> str:
    """The device forgets pages that another one takes for atomic operations of its own."""
    scene = Scene(opener, "256KiB")
    area, gpu, mem = _mapped(scene), scene.gpu, scene.machine.mem
    with running(area.process), area.process.mm.mmap_sem.read():
        pfns = make_device_exclusive_range(area.process.mm, area.addrs[1:4], object())
    pfns = pfns[pfns >= 0]
    unlock_page(mem, pfns)
    put_page(mem, pfns)
    expect_in_step(gpu, "make_device_exclusive_range()")
    return _entries(gpu)


@rule(contents)
def stale_migrate(opener: Opener) -> str:
    """The device forgets pages that another device takes."""
    scene = Scene(opener, "256KiB")
    gpu, other = scene.gpu, opener(scene.machine, "256KiB")
    area = scene.area(8)
    pin = area.process.pin(area.addr, area.nbytes)
    if gpu.memory is not None:
        gpu.read(area.process, area.addr, area.nbytes)
    pin.release()
    moved = other.to_device(area.process, area.addr, area.nbytes)
    expect(moved.migrated == 8, f"a second device took {moved.migrated} of 8 pages")
    expect_in_step(gpu, "migration by another device")
    return _entries(gpu)
