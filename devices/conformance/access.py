"""Rules about accesses: those of the device to memory, wherever it is."""

from __future__ import annotations

import numpy as np

from devices.conformance.rule import Opener, rule
from devices.conformance.scene import Scene, expect, expect_bytes
from devices.conformance.tables import stale_own
from mm.typing import PAGE_SIZE


@rule(stale_own)
def device_access(opener: Opener) -> str:
    """The device loads and stores what belongs there, at any address, wherever the pages are."""
    scene = Scene(opener, "256KiB")
    gpu, area = scene.computing(), scene.area(12)
    gpu.to_device(area.process, area.at(4), 4 * PAGE_SIZE)
    pin = area.process.pin(area.at(9), PAGE_SIZE)
    for begin, nbytes in ((1, 7), (PAGE_SIZE - 3, 6), (3 * PAGE_SIZE + 5, 9000)):
        found = gpu.read(area.process, area.addr + begin, nbytes)
        want = area.contents.reshape(-1)[begin : begin + nbytes]
        expect_bytes(want, found, f"device load of {nbytes} bytes at {begin}")
    for page, byte in ((0, 9), (5, PAGE_SIZE - 4), (9, 0), (11, 1)):
        gpu.write(area.process, area.at(page) + byte, b"new")
        area.stored(page, b"new", byte)
    area.expect_device(gpu, "after its own stores")
    area.expect_cpu("after stores of the device")
    pin.release()
    return "3 odd loads, 4 stores, one to a pinned page; seen by both"


@rule(device_access)
def exchange(opener: Opener) -> str:
    """Words all over memory can be loaded and stored at once."""
    scene = Scene(opener, "64KiB")
    gpu, area = scene.computing(), scene.area(40)
    flat = area.contents.reshape(-1).view(np.uint64)
    which = np.random.default_rng(5).permutation(flat.size)[:300]
    words, write = np.arange(300, dtype=np.uint64), np.arange(300) % 3 == 0
    loaded = gpu.exchange(area.process, area.addr + 8 * which, words, write)
    wrong = int(np.count_nonzero(loaded != flat[which]))
    expect(not wrong, f"{wrong} of 300 words that were loaded are not what was there")
    flat[which[write]] = words[write]
    area.expect_cpu("after an exchange of words")
    return "300 words of 40 pages, a third of them stored, with memory for 16"


@rule(device_access)
def run(opener: Opener) -> str:
    """A kernel computes on arrays in device memory."""
    scene = Scene(opener, "256KiB")
    gpu = scene.computing()
    a, b = (scene.process.array(3000, dtype="int64") for _ in range(2))
    a[:], b[:] = np.arange(3000), 7
    gpu.run(lambda x, y: x * 2 + y, a, b, out=b)
    wrong = int(np.count_nonzero(b[:] != np.arange(3000) * 2 + 7))
    expect(not wrong, f"{wrong} of 3000 results are wrong")
    expect(bool(a[2999] == 2999), "an argument changed")
    return "3000 results over 12 pages"
