"""Rules about copies that are under way: the fences of copy_in() and copy_out()."""

from __future__ import annotations

import numpy as np

from devices.conformance.copies import copy_source, shuffled
from devices.conformance.pages import allocated
from devices.conformance.rule import Broken, Opener, rule
from devices.conformance.scene import Scene, expect, expect_bytes, pattern
from devices.dma_fence import DmaFence
from mm.errors import TimedOut
from mm.typing import Mask

NPAGES = 2048  # of a copy that drivers leave to an engine


def _scene(opener: Opener) -> Scene:
    """A machine with room for large copies."""
    return Scene(opener, "12MiB", nodes=("32MiB",))


def _wait(answer: Mask | DmaFence | None, timeout: float) -> str:
    """Wait for a copy; what it was."""
    if not isinstance(answer, DmaFence):
        return "done at once"
    try:
        answer.wait(timeout)
    except TimedOut as error:
        raise Broken(str(error.strerror)) from error
    expect(answer.is_signaled(), f"wait() has returned, and {answer!r} has not signaled")
    return "under way"


@rule(copy_source)
def completion(opener: Opener) -> str:
    """A copy that is under way ends, and its fence says so."""
    scene = _scene(opener)
    ops, gpu = scene.gpu.ops, scene.gpu
    rows, pages = np.sort(scene.area(NPAGES).pfns()), np.sort(allocated(gpu, NPAGES))
    there = _wait(ops.copy_in(pages, scene.payload, rows), gpu.timeout)
    back = _wait(ops.copy_out(pages, scene.payload, rows), gpu.timeout)
    return f"{NPAGES} pages: copy_in() was {there}, copy_out() {back}"


@rule(completion)
def not_early(opener: Opener) -> str:
    """A fence does not signal before its copy is done with both sides."""
    scene = _scene(opener)
    ops, gpu, payload = scene.gpu.ops, scene.gpu, scene.payload
    rows, pages = np.sort(scene.area(NPAGES).pfns()), np.sort(allocated(gpu, NPAGES))
    expected = payload[rows]
    _wait(ops.copy_in(pages, payload, rows), gpu.timeout)
    payload[rows] = 0  # they are the process's again
    _wait(ops.copy_out(pages, payload, rows), gpu.timeout)
    expect_bytes(expected, payload[rows], "frames, when the copy out had signaled")
    return f"{NPAGES} pages there and back, the frames wiped in between, equal"


@rule(not_early)
def together(opener: Opener) -> str:
    """Copies that are under way at once do not disturb one another, however they are waited for."""
    scene = _scene(opener)
    ops, gpu, payload = scene.gpu.ops, scene.gpu, scene.payload
    count = NPAGES // 2
    pages = np.sort(allocated(gpu, 2 * count)).reshape(2, count)
    frames = np.sort(scene.area(3 * count, filled=True).pfns()).reshape(3, count)
    contents = [pattern(count, 100 + i) for i in range(2)]
    for rows, bytes_ in zip(frames, contents, strict=False):
        payload[rows] = bytes_
    order = shuffled(np.arange(count), 5)

    begun = [ops.copy_in(pages[i], payload, frames[i]) for i in range(2)]
    for answer in reversed(begun):
        _wait(answer, gpu.timeout)
    both = [
        ops.copy_out(pages[0][order], payload, frames[2][order]),
        ops.copy_in(pages[1], payload, frames[0]),
    ]
    for answer in reversed(both):
        _wait(answer, gpu.timeout)
    expect_bytes(contents[0], payload[frames[2]], "pages copied out while others came in")
    _wait(ops.copy_out(pages[1], payload, frames[2]), gpu.timeout)
    expect_bytes(contents[0], payload[frames[2]], "pages that came in while others were copied out")
    return f"4 copies of {count} pages, two at a time, equal"
