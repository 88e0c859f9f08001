"""Memory that is too small for what processes store in it: every byte is as it was stored."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mm import PAGE_SIZE, Machine
from mm.pgtable import pte_offset, pte_pfn, pte_present
from mm.swap import lru_add_drain_all
from mm.vmscan import reclaim_pages, try_to_free_pages
from tests.world import mapped_range

PAGES = 400  # of two processes together, beside 1 MiB of memory, which is 255 frames
SPANS = st.tuples(st.integers(0, PAGES // 2 - 1), st.integers(1, 120))


class TinyMemory(RuleBasedStateMachine):
    """Two processes and plain arrays: what is stored in one is stored in the other."""

    @initialize(swap=st.sampled_from(["2MiB", "4MiB"]), errors=st.booleans())
    def boot(self, swap, errors):
        self.world = mapped_range(
            PAGES // 2, filled=False, nodes=("1MiB",), memory="256KiB", swap=swap
        )
        self.machine = self.world.machine
        other = self.machine.spawn("other")
        self.areas = [(self.world.process, self.world.addr), (other, other.mmap(PAGES // 2 * 4096))]
        self.twins = [np.zeros((PAGES // 2, PAGE_SIZE), dtype=np.uint8) for _ in self.areas]
        if errors:
            self.machine.mem.swap.write_errors |= {3, 4, 5, 77}
        self.stored = 0

    @rule(who=st.integers(0, 1), span=SPANS)
    def store(self, who, span):
        first, count = span
        process, addr = self.areas[who]
        self.stored += 1
        data = self.twins[who][first : first + count]
        data[:] = np.arange(data.size, dtype=np.uint32).reshape(data.shape) * 7 + self.stored
        process.write(addr + first * PAGE_SIZE, data.tobytes())

    @rule(who=st.integers(0, 1), span=SPANS)
    def load(self, who, span):
        first, count = span
        process, addr = self.areas[who]
        expected = self.twins[who][first : first + count]
        assert expected.tobytes() == process.read(addr + first * PAGE_SIZE, expected.size)

    @rule(who=st.integers(0, 1), span=SPANS)
    def page_out(self, who, span):
        reclaim_pages(self.machine.mem, self.present(who, span))

    @rule(who=st.integers(0, 1), span=SPANS)
    def give_back(self, who, span):
        process, addr = self.areas[who]
        first, count = span[0], min(span[1], PAGES // 2 - span[0])
        start = addr + first * PAGE_SIZE
        process.munmap(start, count * PAGE_SIZE)
        process.mmap(count * PAGE_SIZE, addr=start)
        self.twins[who][first : first + count] = 0

    @rule(wanted=st.integers(1, 100))
    def reclaim(self, wanted):
        try_to_free_pages(self.machine.mem, [0], wanted)

    @rule(span=SPANS)
    def to_device(self, span):
        first, count = span[0], min(span[1], PAGES // 2 - span[0])
        gpu, process = self.world.gpu, self.world.process
        gpu.to_device(process, self.world.at(first), count * PAGE_SIZE)

    @rule(span=SPANS)
    def device_stores(self, span):
        first, count = span[0], min(span[1], 40, PAGES // 2 - span[0])
        self.stored += 1
        data = self.twins[0][first : first + count]
        data[:] = self.stored % 256
        self.world.gpu.write(self.world.process, self.world.at(first), data.tobytes())

    def present(self, who, span):
        process, addr = self.areas[who]
        mem = self.machine.mem
        addrs = addr + np.arange(span[0], min(span[0] + span[1], PAGES // 2)) * PAGE_SIZE
        ptes = mem.tables.entries[pte_offset(mem.tables, process.mm.pgd, addrs)]
        pfns = pte_pfn(ptes[pte_present(ptes)])
        return pfns[pfns != mem.zero_pfn]

    @invariant()
    def all_is_well(self):
        self.machine.verify()


TestTinyMemory = TinyMemory.TestCase
TestTinyMemory.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.fixture
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switch_often")
class TestThreads:
    def test_processes_that_push_one_another_out(self):
        """Four of them use three times the memory there is; each finds its bytes."""
        machine = Machine(("1MiB",), "8MiB", debug=True, max_physmem="1MiB")
        free, errors = machine.nr_free_pages, []

        def work(number):
            try:
                with machine.spawn(f"process {number}") as process:
                    addr = process.mmap(200 * PAGE_SIZE)
                    for turn in range(4):
                        byte = bytes([number * 10 + turn])
                        process.write(addr, byte * 200 * PAGE_SIZE)
                        assert byte * 200 * PAGE_SIZE == process.read(addr, 200 * PAGE_SIZE)
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert [] == errors
        assert not any(thread.is_alive() for thread in threads)
        machine.verify()
        lru_add_drain_all(machine.mem)
        try_to_free_pages(machine.mem, [0], 1 << 20)  # pages that were locked when they were zapped
        assert free == machine.nr_free_pages
        assert 0 == machine.mem.swap.inuse_pages
