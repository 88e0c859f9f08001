"""What the scenarios of hmm-tests.c stand on: a process with two devices of one kind open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hmm.dmirror import Dmirror
from hmm.dmirror_device import DmirrorDevice
from mm.machine import Machine
from mm.process import Process
from mm.sched import running
from mm.typing import PAGE_SIZE, Payload

NPAGES = 1024  # HMM_BUFFER_SIZE: 4 MiB
NTIMES = 10


class Fixture:
    """A process that has two devices of one kind open."""

    def __init__(self, *, public: bool) -> None:
        self.machine = Machine(("64MiB", "64MiB"), swap="16MiB", max_physmem="1GiB")
        self.public = public
        self.process = self.machine.spawn("hmm-tests")
        devices = [DmirrorDevice(self.machine, n, public=public) for n in (0, 1)]
        self.zero, self.one = [Dmirror(device, self.process) for device in devices]

    def buffer(self, npages: int = NPAGES, prot: str = "rw", flags: str = "anon|private") -> int:
        """A mapping of *npages*."""
        return self.process.mmap(npages * PAGE_SIZE, prot, flags)

    def filled(self, npages: int = NPAGES, flags: str = "anon|private") -> int:
        """A mapping in which the CPU has written page i with i."""
        addr = self.buffer(npages, flags=flags)
        self.process.write(addr, contents(npages))
        return addr

    def read(self, addr: int, npages: int = NPAGES, process: Process | None = None) -> Payload:
        """What the CPU sees, uint8[npages, 4096], as *process* or the first one."""
        raw = (process or self.process).read(addr, npages * PAGE_SIZE)
        return np.frombuffer(raw, dtype=np.uint8).reshape(npages, PAGE_SIZE)

    def faults(self, access: Callable[..., object], *args: Any) -> int:
        """Faults of the CPU that *access* takes."""
        before = self.process.min_flt
        access(*args)
        return self.process.min_flt - before


def contents(npages: int, first: int = 0) -> Payload:
    """Page i holds first + i in each of its words."""
    words = np.repeat(np.arange(first, first + npages, dtype=np.uint64), 512)
    return words.view(np.uint8).reshape(npages, PAGE_SIZE)


def same(one: Payload, other: Payload) -> bool:
    return np.array_equal(one, other)


@contextmanager
def hmm_tests(*, public: bool) -> Iterator[Fixture]:
    """One kind of device; everything is closed, and whole, afterwards."""
    fixture = Fixture(public=public)
    with running(fixture.process):
        yield fixture
        fixture.machine.verify()
    fixture.zero.close()
    fixture.one.close()
    fixture.process.exit()
