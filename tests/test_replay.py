"""The replay: every byte is checked, and looking ahead changes nothing."""

from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mm
from devices.numpy_device import NumpyDevice
from hmm.offload.contents import expected, initial_words, stored_words, word_of
from hmm.offload.replay import Accesses, Report, fill, machine_for, replay
from hmm.offload.traces import Trace, load_trace
from mm import trace as events
from mm.errors import InvalidArgument


def recorded(*epochs, write=True, first=0, step=1):
    """A trace whose epochs touch the pages listed; *write* is of all events or of each."""
    sizes = [len(pages) for pages in epochs]
    page = np.array([page for pages in epochs for page in pages], dtype=np.int64)
    return Trace(
        name="made up",
        page=page,
        write=np.broadcast_to(np.array(write), page.shape).copy(),
        count=np.ones(page.size, dtype=np.uint32),
        epoch=np.repeat(np.arange(len(epochs)) * step + first, sizes),
        program="none",
        window=1,
    )


SKIPS = st.sampled_from([1, 1, 1, 2, 255, 256, 511, 512])  # from one epoch number to the next
PAGES = st.dictionaries(st.integers(0x1F8, 0x203), st.booleans(), min_size=1, max_size=6)


@st.composite
def traces(draw):
    """Up to 60 epochs that now and then lie hundreds apart, over up to 12 pages."""
    skips, epochs = zip(
        *draw(st.lists(st.tuples(SKIPS, PAGES), min_size=1, max_size=60)), strict=True
    )
    write = [writes for pages in epochs for writes in pages.values()]
    trace = recorded(*epochs, write=write)
    trace.epoch[:] = np.cumsum(skips)[trace.epoch]
    return trace


@dataclass
class FlatDevice:
    """A device without memory: it touches the process's, and remembers which pages it may.

    When there are more than *npages*, the one that came first is forgotten.
    """

    npages: int
    name: str = "flat0"
    chunk_pages: int = 16
    held: list = field(default_factory=list)
    asked: int = 0
    exchanges: int = 0
    device_faults: int = 0
    fault_batches: int = 0
    pages_to_device: int = 0
    pages_to_system: int = 0
    evicted_pages: int = 0
    bytes_to_device: int = 0
    bytes_to_system: int = 0

    @property
    def stats(self):
        return self

    def resident(self, process, addrs, write):
        self.asked += 1
        return np.isin(addrs >> 12, self.held)

    def exchange(self, process, addrs, words, write):
        assert np.unique(addrs).size == addrs.size == words.size == write.size
        self.exchanges += 1
        self._fault(sorted(set((addrs >> 12).tolist()) - set(self.held)))
        loads = [self.load(process, addr) for addr in addrs.tolist()]
        for addr, word in zip(addrs[write].tolist(), words[write], strict=True):
            self.store(process, addr, word)
        return np.array(loads, dtype=np.uint64)

    def _fault(self, missing):
        self.device_faults += len(missing)
        self.fault_batches += bool(missing)
        self.held += missing
        self.evicted_pages += max(0, len(self.held) - self.npages)
        self.held = self.held[-self.npages :]

    def load(self, process, addr):
        return int.from_bytes(process.read(addr, 8), "little")

    def store(self, process, addr, word):
        process.write(addr, word.tobytes())

    def close(self):
        self.held = []


def run(trace, gpu):
    """Replay *trace* on *gpu* in a fresh process, and look after the machine."""
    machine = machine_for(trace)
    with machine.spawn() as process:
        report = replay(trace, machine, process, gpu)
    machine.verify()
    return report


class TestContents:
    def test_initial_words_differ(self):
        """No two words are alike, so a page or a word that is taken for another shows."""
        words = initial_words(np.array([0x10, 0x11, 0x7FFFF]))

        assert (3, 512) == words.shape
        assert words.size == np.unique(words).size

    def test_stored_words_differ(self):
        """What an event stores tells its page and its epoch."""
        page, epoch = np.divmod(np.arange(10_000), 100)

        assert 10_000 == np.unique(stored_words(page, epoch)).size

    def test_a_load_finds_what_was_stored_512_epochs_before(self):
        """Epochs that are 512 apart meet in a word; the load comes before the store."""
        trace = recorded([0x108], [0x108], step=512)

        loads = expected(trace).loads

        assert [initial_words(trace.footprint)[0, 0], stored_words(*_event(trace, 0))] == [*loads]

    def test_what_only_read_stores_nothing(self):
        """Events that do not write leave the memory as the host filled it."""
        trace = recorded([0x108, 0x109], [0x109], write=False)

        assert (initial_words(trace.footprint) == expected(trace).words).all()

    @given(traces())
    def test_memory_holds_the_last_store(self, trace):
        """At the end each word holds what was stored there last, or what the host wrote."""
        words = initial_words(trace.footprint)
        for event in np.flatnonzero(trace.write):
            word = int(word_of(trace.epoch)[event])
            words[trace.place[event], word] = stored_words(*_event(trace, event)).item()

        assert (words == expected(trace).words).all()


def _event(trace, number):
    return trace.page[number : number + 1], trace.epoch[number : number + 1]


class TestReplay:
    @given(traces(), st.integers(1, 12))
    def test_looking_ahead_changes_nothing(self, trace, npages):
        """Faults, batches and evictions are those of a device that gets one epoch at a time."""
        ahead, behind = FlatDevice(npages), FlatDevice(npages)

        report = run(trace, ahead)

        one_epoch_at_a_time(trace, behind)
        assert report.verified
        assert (behind.device_faults, behind.fault_batches, behind.evicted_pages) == (
            report.device_faults,
            report.fault_batches,
            report.evicted_pages,
        )

    def test_epochs_that_hit_go_together(self):
        """Where nothing faults, vectors grow to 256 epochs."""
        gpu = FlatDevice(npages=4)

        assert run(recorded(*[[0x108]] * 2000), gpu).verified

        alone, doubled, full = 2, 7, 7
        assert alone + doubled + full == gpu.exchanges

    def test_epochs_that_are_far_apart_go_alone(self):
        """Of epochs 512 apart every two meet in a word, so no vector may hold both."""
        gpu = FlatDevice(npages=4)

        assert run(recorded(*[[0x108]] * 20, step=512), gpu).verified
        assert 20 == gpu.exchanges

    def test_thrashing_asks_nothing(self):
        """Where every epoch faults, none is looked at twice."""
        gpu = FlatDevice(npages=1)

        assert run(recorded(*[[0x108], [0x109]] * 50), gpu).verified
        assert (100, 0) == (gpu.exchanges, gpu.asked)

    def test_report(self):
        """The report counts what happened, and nothing from before."""
        gpu = FlatDevice(npages=2, device_faults=70, fault_batches=7, evicted_pages=700)

        report = run(recorded([0x108, 0x109], [0x5000]), gpu)

        assert ("made up", "flat0", 3, 3, 2) == (
            report.trace,
            report.device,
            report.pages,
            report.accesses,
            report.device_memory_pages,
        )
        assert (3, 2, 1) == (report.device_faults, report.fault_batches, report.evicted_pages)
        assert "fault-driven, oldest chunk first (64 KiB)" == report.policy
        assert 3 == report.vmstat["pgfault"]
        assert [f.name for f in fields(Report)] == list(asdict(report))

    def test_progress(self):
        """Progress rises to the number of events."""
        trace, calls = recorded([0x108], [0x109, 0x10A], [0x108]), []
        machine = machine_for(trace)

        replay(trace, machine, machine.spawn(), FlatDevice(4), lambda *call: calls.append(call))

        assert [(1, 4), (3, 4), (4, 4)] == calls

    def test_memory_without_contents(self):
        """A machine that keeps no contents has nothing to verify."""
        machine = mm.Machine(nodes=("64MiB",), payload=False)

        with pytest.raises(InvalidArgument, match="boot it with payload=True"):
            replay(recorded([0x108]), machine, machine.spawn(), FlatDevice(4))


def one_epoch_at_a_time(trace, gpu):
    """The accesses of *trace* without looking ahead; what `replay` must be equal to."""
    accesses = Accesses.of(trace)
    with machine_for(trace).spawn() as process:
        fill(trace, process)
        for first, stop in pairwise(trace.epoch_start.tolist()):
            accesses.exchange(gpu, process, first, stop)


class TestFill:
    def test_maps_whole_blocks(self):
        """The 2 MiB blocks that a page was touched in are mapped, neighbours as one."""
        trace = recorded([0x201, 0x5FF, 0x20000])
        process = machine_for(trace).spawn()

        fill(trace, process)

        spans = [(vma.vm_start >> 21, vma.vm_end >> 21) for vma in process.mm.vmas]
        assert [(1, 3), (0x100, 0x101)] == spans

    def test_nothing_is_mapped_in_the_first_64_kib(self):
        """Linux lets nobody map the beginning of the address space."""
        trace = recorded([0x10, 0x1FF])
        process = machine_for(trace).spawn()

        fill(trace, process)

        assert [(0x10000, 0x200000)] == [(v.vm_start, v.vm_end) for v in process.mm.vmas]

    def test_touches_the_footprint_alone(self):
        """Pages beside those of the trace stay holes."""
        trace = recorded([0x201, 0x202, 0x300])
        machine = machine_for(trace)

        with machine.vmstat.counting("pgfault") as delta:
            fill(trace, machine.spawn())

        assert {"pgfault": 3} == delta


class LosesStore(FlatDevice):
    """A device that forgets its third store."""

    stores: int = 0

    def store(self, process, addr, word):
        self.stores += 1
        if self.stores != 3:
            super().store(process, addr, word)


class FlipsBit(FlatDevice):
    """A device whose load of one word comes with a bit changed."""

    def load(self, process, addr):
        return super().load(process, addr) ^ (addr == 0x109008)


class TestVerified:
    def test_a_lost_store(self):
        """One word that is lost is found when the CPU reads back, and said to be there."""
        trace, told = recorded([0x108, 0x109], [0x108, 0x109]), []

        with events.listen(lambda _, values: told.append(values), "replay_differs"):
            report = run(trace, LosesStore(4))

        assert not report.verified
        assert [("memory", 1, "0x108", 1)] == [
            (values["what"], values["count"], values["page"], values["at"]) for values in told
        ]

    def test_a_wrong_load(self):
        """One bit of one word that the device loads is enough, though memory ends up right."""
        trace, told = recorded([0x108, 0x109], [0x108, 0x109]), []

        with events.listen(lambda _, values: told.append(values), "replay_differs"):
            report = run(trace, FlipsBit(4))

        assert not report.verified
        assert ["load"] == [values["what"] for values in told]
        assert 1 == int(told[0]["found"], 16) ^ int(told[0]["expected"], 16)

    def test_nobody_listens(self):
        """The verdict does not depend on who hears of the reason."""
        assert not run(recorded([0x108], [0x109, 0x10A]), LosesStore(4)).verified


class TestNumpyDevice:
    @given(traces(), st.sampled_from(["4KiB", "8KiB", "32KiB", "2MiB"]))
    def test_every_byte_comes_back(self, trace, memory):
        """However small the device, what it loaded and what it left are right."""
        machine = machine_for(trace)
        gpu = NumpyDevice(machine, memory=memory)

        with machine.spawn() as process:
            report = replay(trace, machine, process, gpu)

        assert report.verified
        gpu.close()
        machine.verify()

    @pytest.mark.parametrize("chunk", [None, "64KiB", "2MiB"])
    def test_sqlite(self, chunk):
        """The packaged trace moves back and forth on half of its footprint, and is unharmed."""
        trace = load_trace("sqlite")
        machine = machine_for(trace)
        gpu = NumpyDevice(machine, memory=234 * 4096, chunk=chunk)

        report = replay(trace, machine, machine.spawn(), gpu)

        assert report.verified
        assert report.evicted_pages > 0
        machine.verify()
