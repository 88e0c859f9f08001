"""A device whose copies and faults charge simulated time to a clock.

    gpu = Timed(NumpyDevice(machine, "64MiB"), "pcie3-x16")
    gpu.to_device(process, addr, nbytes)
    gpu.stats.simulated_us

Nothing takes longer than before: what is simulated is only what it would take. Copies that are
under way at once overlap in simulated time as the link allows, and the host's own work takes none
but what the profile says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from devices.dma_fence import DmaFence
from devices.driver import Driver
from devices.timing import TO_DEVICE, TO_SYSTEM, Profile, Timeline, load_profile
from devices.wrappers import Wrapper

_WAYS: Final = {"copy_in": TO_DEVICE, "copy_out": TO_SYSTEM}


class Timed(Wrapper):
    """Charges what copies and faults cost on the hardware of *profile* to `stats.simulated_us`.

    profile: a name or a file (devices/timing.py), or a `Profile`. A copy counts as one transfer,
    wherever its pages lie. Raises InvalidArgument for a profile that there is not.
    """

    def __init__(self, device: Driver | Wrapper, profile: Profile | str | Path) -> None:
        found = profile if isinstance(profile, Profile) else load_profile(profile)
        self.timeline = Timeline(found)
        super().__init__(device)
        self._batches = self.device.stats.fault_batches
        self._shown = 0.0

    @property
    def profile(self) -> Profile:
        """The hardware that is simulated."""
        return self.timeline.profile

    def call(self, op: str, *args: Any) -> Any:
        """Pass it on, and charge for it."""
        self._charge_batches()
        result = super().call(op, *args)
        if op in _WAYS:
            npages = args[0].size
            if op == "copy_in":
                self.timeline.work(npages * self.profile.page_us)
            end = self.timeline.copy(_WAYS[op], npages)
            if isinstance(result, DmaFence):
                result.watch(lambda *_: self._arrive(end))
            else:
                self._arrive(end)
        return result

    def _charge_batches(self) -> None:
        """Faults come to the driver, not to its table of functions: count those since last time."""
        batches = self.device.stats.fault_batches
        self.timeline.work((batches - self._batches) * self.profile.batch_us)
        self._batches = batches
        self._show()

    def _arrive(self, end: float) -> None:
        """Somebody has waited for the copy that is done at *end*."""
        self.timeline.wait(end)
        self._show()

    def _show(self) -> None:
        """What has been charged is in the device's figures, beside that of other wrappers."""
        self.device.stats.simulated_us += self.timeline.now - self._shown
        self._shown = self.timeline.now
