"""devices.open(): a device by the name of its driver."""

from __future__ import annotations

from typing import cast

from devices.driver import Driver
from hmm.registry import load_driver
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

    name: also module:Class or file.py:Class, and with options as "numpy?kind=public"
    (hmm/registry.py). kind: "private", memory that only the device can touch, or "public", memory
    that the CPU reaches too. chunk: what a full device evicts at a time, 64 KiB to 2 MiB.
    neighbours: how much to bring back around a page that a CPU touches. Raises InvalidArgument for
    an unknown name, kind or size, OutOfRange for a device that physical address space has no room
    for.
    """
    driver = load_driver(name)
    options = {} if kind == "private" else {"kind": kind}
    return cast(Driver, driver(machine, memory, chunk=chunk, neighbours=neighbours, **options))
