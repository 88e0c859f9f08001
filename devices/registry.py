"""devices.open(): a device by the name of its driver."""

from __future__ import annotations

from typing import cast

from devices.driver import Driver
from devices.memory import DeviceMemory
from hmm.registry import load_driver
from mm.errors import InvalidArgument
from mm.machine import Machine
from mm.memparse import Size
from mm.typing import PAGE_SIZE


def open_device(
    name: str,
    machine: Machine,
    memory: Size = "64MiB",
    kind: str = "private",
    *,
    chunk: Size | None = None,
    neighbours: Size = PAGE_SIZE,
) -> Driver:
    """Plug a device in: *name* is that of an installed driver, *memory* the device's size.

    kind: "private", memory that only the device can touch, or "public", memory that the CPU
    reaches too. chunk: what a full device evicts at a time, 64 KiB to 2 MiB. neighbours: how much
    to bring back around a page that a CPU touches. Raises InvalidArgument for an unknown name,
    kind or size, OutOfRange for a device that physical address space has no room for.
    """
    driver = cast(type[Driver], load_driver(name))
    kinds = getattr(driver, "kinds", DeviceMemory.kinds)
    if kind not in kinds:
        has = " or ".join(f'"{one}"' for one in kinds)
        raise InvalidArgument(f"{name}: kind={kind!r}: memory of this device is {has}")
    options = {} if kind == "private" else {"kind": kind}
    return driver(machine, memory, chunk=chunk, neighbours=neighbours, **options)
