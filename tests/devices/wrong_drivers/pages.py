"""Drivers that hand out the wrong pages."""

import numpy as np

from devices import NumpyDevice
from mm import OutOfMemory


class GivesPagesInUse(NumpyDevice):
    """Does not remember what it gave."""

    breaks, evidence = "allocate", "page 0 was given twice"

    def allocate(self, npages):
        return np.arange(min(npages, self.npages))


class GivesOneMore(NumpyDevice):
    """Counts from 0 to n."""

    breaks, evidence = "allocate", "asked for 5 pages, it gave 6"

    def allocate(self, npages):
        return super().allocate(npages + 1)


class GivesPfns(NumpyDevice):
    """Takes PFNs for numbers of its own."""

    breaks, evidence = "allocate", "page .* is none of its 64"

    def allocate(self, npages):
        return super().allocate(npages) + self.zone.start_pfn

    def free(self, pages):
        super().free(pages - self.zone.start_pfn)


class GivesAList(NumpyDevice):
    """Speaks another language."""

    breaks, evidence = "allocate", r"answered \[0, 1, 2, 3, 4\], no vector of int64"

    def allocate(self, npages):
        return super().allocate(npages).tolist()


class RaisesWhenFull(NumpyDevice):
    """Takes a full device for an error."""

    breaks, evidence = "full", "OutOfMemory: 12 pages wanted, 9 free"

    def allocate(self, npages):
        if npages > self._free.size:
            raise OutOfMemory(f"{npages} pages wanted, {self._free.size} free")
        return super().allocate(npages)


class GivesAllOrNothing(NumpyDevice):
    """Gives nothing where it cannot give everything."""

    breaks, evidence = "full", "asked for 12 with 9 free, it gave 0"

    def allocate(self, npages):
        return super().allocate(npages if npages <= self._free.size else 0)


class NeverFrees(NumpyDevice):
    """Forgets to take pages back."""

    breaks, evidence = "free", "after all 16 were freed it gave 0"

    def free(self, pages):
        """Nothing."""


class FreesTwice(NumpyDevice):
    """Takes a page back twice where it comes alone."""

    breaks, evidence = "free", "it gave 16, 1[0-5] different ones"

    def free(self, pages):
        super().free(pages)
        if pages.size == 1:
            super().free(pages)
