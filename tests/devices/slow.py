"""A device whose copies end when a test says so, and write only then."""

from functools import partial

from devices import DmaFence, NumpyDevice
from mm.highmem import copy_highpages


class SlowDevice(NumpyDevice):
    """Copies are `under_way` until finish(); with `quick` they are done at once."""

    timeout = 0.005
    quick = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.under_way = []

    def _copy(self, op, dst, to, src, frm):
        copy = partial(copy_highpages, dst, to, src, frm)
        if self.quick:
            copy()
            return None
        fence = DmaFence(f"{self.name}: {op} of {to.size} pages")
        self.under_way.append((fence, copy))
        return fence

    def finish(self):
        """Let every copy end that is under way: only now it writes."""
        copies, self.under_way = self.under_way, []
        for fence, copy in copies:
            fence.run(copy)
