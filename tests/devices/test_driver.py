"""What a device does with memory of a process: loads, stores, kernels, and the faults behind them.

The oracle is a bytearray or a NumPy array that gets the same loads and stores.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import Driver, NumpyDevice
from mm import (
    PAGE_SIZE,
    BusError,
    InvalidArgument,
    InvalidRange,
    MmError,
    OutOfMemory,
    SegmentationFault,
    trace,
)
from mm.array import ProcessArray
from mm.mmap import TASK_SIZE_MAX
from tests.interleave import explore
from tests.world import in_step, mapped_range

GIB = 1 << 30
MIB = 1 << 20
HALF_WORDS = 20 * PAGE_SIZE // 8


def small(**options):
    """40 pages over a 1 GiB border, and a device with memory for 16."""
    return mapped_range(
        **{"pages": 40, "memory": "64KiB", "addr": GIB - 20 * PAGE_SIZE, "filled": False} | options
    )


def load(world, page=0, nbytes=PAGE_SIZE):
    """What the device loads from *page* of the range."""
    return world.gpu.read(world.process, world.at(page), nbytes)


def store(world, page, data):
    world.gpu.write(world.process, world.at(page), data)


def second(world, memory="1MiB"):
    return NumpyDevice(world.machine, memory, name="numpy1")


class TestAnySequence:
    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["read", "write", "cpu read", "cpu write", "to_device", "munmap"]),
                st.integers(0, 40 * PAGE_SIZE - 1),
                st.one_of(st.integers(0, 16), st.integers(1, 40 * PAGE_SIZE)),
            ),
            max_size=12,
        )
    )
    def test_cpu_and_device_see_one_memory(self, steps):
        """Whoever stores, and wherever a page is, both sides load what was stored last."""
        world = small()
        process, gpu, model = world.process, world.gpu, bytearray(world.nbytes)
        for number, (step, offset, wanted) in enumerate(steps, 1):
            part = slice(offset, min(offset + wanted, world.nbytes))
            addr, size = world.addr + offset, part.stop - part.start
            if step.endswith("read"):
                assert model[part] == (gpu if step == "read" else process).read(
                    *([process] if step == "read" else []), addr, size
                )
            elif step.endswith("write"):
                model[part] = bytes([number]) * size
                (gpu.write if step == "write" else lambda _, *a: process.write(*a))(
                    process, addr, model[part]
                )
            elif step == "to_device" and size:
                gpu.to_device(process, addr, size)
            elif step == "munmap":
                page = offset // PAGE_SIZE
                process.mmap(PAGE_SIZE, addr=world.at(page))
                model[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
            assert in_step(gpu)
        world.machine.verify()
        assert model == gpu.read(process, world.addr, world.nbytes)
        assert model == process.read(world.addr, world.nbytes)
