"""Rules about contents: copy_in(), copy_out() and clear(), called by themselves."""

from __future__ import annotations

import numpy as np

from devices.conformance.pages import allocated, free
from devices.conformance.rule import Broken, Opener, rule
from devices.conformance.scene import Scene, expect, expect_bytes, numbers
from mm.typing import Indices, Pfns


def shuffled(values: Indices, seed: int) -> Indices:
    """*values* in another order."""
    return np.random.default_rng(seed).permutation(values)


def there_and_back(scene: Scene, pages: Indices, rows: Pfns, back: Pfns, what: str) -> None:
    """Copy frames *rows* to *pages*, and those to frames *back*; the same must be in them."""
    expected = scene.payload[rows]
    scene.copy_in(pages, rows)
    scene.copy_out(pages, back)
    expect_bytes(expected, scene.payload[back], what)


@rule(free)
def copy_one(opener: Opener) -> str:
    """A page comes back as it was, every byte."""
    scene = Scene(opener, "256KiB")
    rows, back = scene.area(4).pfns(), scene.area(4).pfns()
    pages = allocated(scene.gpu, 4)
    for i in (2, 0, 3, 1):
        there_and_back(scene, pages[i : i + 1], rows[i : i + 1], back[i : i + 1], "one page")
    return "4 pages one by one, equal"


@rule(copy_one)
def copy_run(opener: Opener) -> str:
    """So do many pages in a row."""
    scene = Scene(opener, "4MiB")
    rows, back = np.sort(scene.area(700).pfns()), np.sort(scene.area(700).pfns())
    pages = np.sort(allocated(scene.gpu, 700))
    there_and_back(scene, pages, rows, back, "700 pages in a row")
    return "2.7 MiB in one copy, equal"


@rule(copy_one)
def copy_bystanders(opener: Opener) -> str:
    """A copy changes the pages that it is for, and none beside them."""
    scene = Scene(opener, "256KiB")
    payload = scene.payload
    rows, two, back = (np.sort(scene.area(n).pfns()) for n in (9, 2, 9))
    apart = np.sort(scene.area(18).pfns())[::2]  # what goes wrong beside one of them is not seen
    pages, one = np.sort(allocated(scene.gpu, 9)), np.arange(9).reshape(9, 1)
    expected, untouched = payload[rows], payload[back]
    expected[3:5] = payload[two]

    for i in one:
        scene.copy_in(pages[i], rows[i])
    scene.copy_in(pages[3:5], two)
    for i in one[:6]:
        scene.copy_out(pages[i], apart[i])
    expect_bytes(expected[:6], payload[apart[:6]], "device pages beside a copy in")

    scene.copy_out(pages[6:8], back[6:8])
    untouched[6:8] = expected[6:8]
    expect_bytes(untouched, payload[back], "frames beside a copy out")
    return "4 pages and 7 frames beside 2, untouched"


@rule(copy_run, copy_bystanders)
def copy_scattered(opener: Opener) -> str:
    """Pages and frames may be in any order: rows[i] goes with pages[i]."""
    scene = Scene(opener, "1MiB")
    rows, back = shuffled(scene.area(90).pfns(), 1), shuffled(scene.area(90).pfns(), 2)
    pages = shuffled(allocated(scene.gpu, 90), 3)
    there_and_back(scene, pages, rows, back, "90 pages in any order")
    return "90 pages in any order, equal"


@rule(copy_scattered)
def copy_source(opener: Opener) -> str:
    """A copy leaves its source as it was: a page that is not moved after all is still there."""
    scene = Scene(opener, "256KiB")
    area = scene.area(6)
    rows, back = area.pfns(), scene.area(6).pfns()
    pages = allocated(scene.gpu, 6)
    there_and_back(scene, pages, rows, back, "first copy")
    expect_bytes(area.contents, scene.payload[rows], "frames that were copied in")
    scene.copy_out(pages, back[::-1])
    expect_bytes(area.contents[::-1], scene.payload[back], "pages that were copied out before")
    return "6 pages, copied out twice, equal"


@rule(copy_scattered)
def lost(opener: Opener) -> str:
    """copy_out() answers None, or a mask of the pages that are lost; none is without a cause."""
    scene = Scene(opener, "256KiB")
    rows, pages = scene.area(5).pfns(), allocated(scene.gpu, 5)
    scene.copy_in(pages, rows)
    answer: object = scene.copy_out(pages, rows)
    if answer is None:
        return "nothing is reported"
    if not isinstance(answer, np.ndarray) or answer.dtype != np.bool_ or answer.shape != (5,):
        raise Broken(f"copy_out() of 5 pages answered {answer!r}, neither None nor bool[5]")
    expect(not answer.any(), f"{np.count_nonzero(answer)} of 5 pages are lost, without a cause")
    return "none of 5 pages"


@rule(copy_scattered)
def clear(opener: Opener) -> str:
    """clear(), if there is one, makes zeros of the pages that it is for and of no others."""
    scene = Scene(opener, "256KiB")
    rows, back = scene.area(9).pfns(), scene.area(9).pfns()
    pages = shuffled(allocated(scene.gpu, 9), 4)
    expected = scene.payload[rows]
    scene.copy_in(pages, rows)
    if scene.gpu.ops.clear is None:
        return "there is none; the zero page is copied"
    for some in (numbers(4), numbers(8, 1, 2)):
        scene.gpu.ops.clear(pages[some])
        expected[some] = 0
    scene.copy_out(pages, back)
    expect_bytes(expected, scene.payload[back], "pages, some of them cleared")
    return "4 of 9 pages are zeros"


HOOKS = (copy_source, lost, clear)
