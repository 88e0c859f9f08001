"""Drivers that copy wrongly."""

import numpy as np

from devices import NumpyDevice


class LosesTheLastByte(NumpyDevice):
    """Copies 4095 bytes of a page."""

    breaks, evidence = "copy-one", "page 0, byte 4095 is 0x.. where 0x.. belongs; 1 of 4096"

    def copy_out(self, pages, system, rows):
        system[rows, :-1] = self.memory[pages, :-1]


class CopiesOneBlock(NumpyDevice):
    """Copies 2 MiB and no more."""

    breaks, evidence = "copy-run", "page 512, byte"

    def copy_in(self, pages, system, rows):
        super().copy_in(pages[:512], system, rows[:512])


class CopiesOneTooMany(NumpyDevice):
    """Copies the page after the last one as well."""

    breaks, evidence = "copy-bystanders", "device pages beside a copy in: page 5, byte"

    def copy_in(self, pages, system, rows):
        super().copy_in(pages, system, rows)
        if pages[-1] + 1 < self.npages:
            self.memory[pages[-1] + 1] = system[rows[-1]]


class WritesBesideARow(NumpyDevice):
    """Tears the frame before the first one."""

    breaks, evidence = "copy-bystanders", "frames beside a copy out: page 5, byte 4095"

    def copy_out(self, pages, system, rows):
        system[rows[0] - 1, -1] ^= 1
        super().copy_out(pages, system, rows)


class TakesRowsForARun(NumpyDevice):
    """Thinks that frames are in a row."""

    breaks, evidence = "copy-scattered", "90 pages in any order: page .*, byte"

    def copy_in(self, pages, system, rows):
        self.memory[pages] = system[rows.min() : rows.min() + rows.size]


class SortsPages(NumpyDevice):
    """Copies in the order that suits the device."""

    breaks, evidence = "copy-scattered", "90 pages in any order"

    def copy_out(self, pages, system, rows):
        system[rows] = self.memory[np.sort(pages)]


class MovesInsteadOfCopying(NumpyDevice):
    """Wipes a page that has been copied out; but it may not leave."""

    breaks, evidence = "copy-source", "pages that were copied out before: page 0, byte . is 0x00"

    def copy_out(self, pages, system, rows):
        super().copy_out(pages, system, rows)
        self.memory[pages] = 0


class ConvertsInPlace(NumpyDevice):
    """Turns the bytes of system memory round where they are."""

    breaks, evidence = "copy-source", "frames that were copied in"

    def copy_in(self, pages, system, rows):
        system[rows] = system[rows, ::-1]
        super().copy_in(pages, system, rows)

    def copy_out(self, pages, system, rows):
        system[rows] = self.memory[pages, ::-1]


class LosesForNoReason(NumpyDevice):
    """Reports a page as lost which is not."""

    breaks, evidence = "lost", "1 of 5 pages are lost, without a cause"
    engines = 0

    def copy_out(self, pages, system, rows):
        super().copy_out(pages, system, rows)
        return np.arange(pages.size) == 4


class AnswersWithNumbers(NumpyDevice):
    """Names the lost pages, in place of a mask."""

    breaks, evidence = "lost", "neither None nor bool.5."
    engines = 0

    def copy_out(self, pages, system, rows):
        super().copy_out(pages, system, rows)
        return np.empty(0, dtype=np.int64)


class ClearsNothing(NumpyDevice):
    """Leaves what was on a page."""

    breaks, evidence = "clear", "pages, some of them cleared: page .* is 0x.. where 0x00 belongs"

    def clear(self, pages):
        """Nothing."""


class ClearsARange(NumpyDevice):
    """Clears everything between the first page and the last."""

    breaks, evidence = "clear", "pages, some of them cleared: page .* is 0x00 where 0x.. belongs"

    def clear(self, pages):
        self.memory[pages.min() : pages.max() + 1] = 0
