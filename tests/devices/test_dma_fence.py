"""Fences of copies that are under way, and the threads that do the copies."""

import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from devices.dma_fence import DmaFence, DmaFenceArray, answer_of
from devices.engines import CopyEngines
from mm.errors import TimedOut
from mm.locking import install_scheduler
from tests.interleave import TakingTurns

SOON = 30.0


class TestDmaFence:
    def test_answer(self):
        """Who waits gets the answer of the copy; who has one already gets that."""
        fence, lost = DmaFence("a copy"), np.array([True, False])
        fence.signal(lost)

        assert fence.is_signaled()
        assert [True, False] == answer_of(fence, 0).tolist()
        assert lost is answer_of(lost, 0)
        assert answer_of(None, 0) is None

    def test_error(self):
        """What made the copy fail is raised to who waits, whenever."""
        fence = DmaFence("a copy")
        fence.run(lambda: 1 / 0)

        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                fence.wait(0)

    def test_once(self):
        """What it said first holds: an error is not forgotten."""
        fence = DmaFence("a copy")
        fence.signal(error=KeyError("x"))

        fence.signal()

        with pytest.raises(KeyError):
            fence.wait(0)

    def test_never(self):
        """A copy that does not end is a timeout that names it."""
        with pytest.raises(TimedOut, match=r"gpu0: copy_in of 7 pages is not done after 0.01 s"):
            DmaFence("gpu0: copy_in of 7 pages").wait(0.01)

    def test_wakes(self):
        """Who waits is woken up when it signals."""
        fence = DmaFence("a copy")
        threading.Timer(0.02, fence.signal).start()
        begin = time.monotonic()

        fence.wait(SOON)

        assert time.monotonic() - begin < SOON / 2

    def test_watchers(self):
        """Each watcher hears once what came of it, by way of who waits."""
        seen, error = [], KeyError("x")
        for why in (None, error):
            fence = DmaFence("a copy")
            fence.watch(lambda *answer: seen.append(answer))
            fence.signal(error=why)
            for _ in range(2):
                with suppress(KeyError):
                    fence.wait(0)

        assert [(None, None), (None, error)] == seen


class TestDmaFenceArray:
    def test_last_part(self):
        """It signals when every part has, in whatever order."""
        parts = [DmaFence("a part") for _ in range(3)]
        whole, seen = DmaFenceArray("a copy", parts), []
        for i in (2, 0, 1):
            seen.append(whole.is_signaled())
            threading.Timer(0.01 * i, parts[i].signal).start()

        assert whole.wait(SOON) is None
        assert ([False] * 3, True) == (seen, whole.is_signaled())

    def test_error(self):
        """What made any part fail is raised, when the others are done."""
        parts = [DmaFence("a part") for _ in range(2)]
        parts[0].run(lambda: 1 / 0)
        whole = DmaFenceArray("a copy", parts)

        with pytest.raises(TimedOut, match="a copy is not done"):
            whole.wait(0.01)
        parts[1].signal()
        with pytest.raises(ZeroDivisionError):
            whole.wait(0)


class TestCopyEngines:
    def test_copies_at_once(self):
        """As many copies are under way as there are engines, and the others in order."""
        engines, order = CopyEngines("gpu0", 2), []
        meeting, gate = threading.Barrier(3), threading.Event()

        def first():
            meeting.wait(SOON)
            gate.wait(SOON)

        fences = [engines.submit(first, "one"), engines.submit(first, "two")]
        fences += [engines.submit(lambda i=i: order.append(i), str(i)) for i in range(3)]
        meeting.wait(SOON)
        assert not any(fence.is_signaled() for fence in fences)
        gate.set()
        for fence in fences:
            fence.wait(SOON)

        assert [0, 1, 2] == sorted(order)
        assert 2 == engines.threads

    def test_who_waits_copies(self):
        """A copy that no engine has begun is done by the thread that waits for it."""
        engines, gate, copied_by = CopyEngines("gpu0", 1), threading.Event(), []
        busy = engines.submit(lambda: gate.wait(SOON) and None, "one")
        fence = engines.submit(lambda: copied_by.append(threading.get_ident()), "two")

        assert fence.wait(SOON) is None

        assert [threading.get_ident()] == copied_by
        assert not busy.is_signaled()
        gate.set()
        busy.wait(SOON)

    def test_errors(self):
        """A copy that fails says so, and its engine goes on."""
        engines = CopyEngines("gpu0", 1)
        bad, good = engines.submit(lambda: 1 / 0, "bad"), engines.submit(lambda: None, "good")

        with pytest.raises(ZeroDivisionError):
            bad.wait(SOON)
        assert good.wait(SOON) is None

    def test_threads_end(self, monkeypatch):
        """Engines that have nothing to do end, and begin again when they have."""
        monkeypatch.setattr("devices.engines.IDLE_SECONDS", 0.01)
        engines = CopyEngines("gpu0", 2)
        engines.submit(lambda: None, "a copy").wait(SOON)
        end = time.monotonic() + SOON
        while engines.threads and time.monotonic() < end:
            time.sleep(0.01)
        assert 0 == engines.threads

        engines.submit(lambda: None, "a copy").wait(SOON)

    @pytest.mark.parametrize("engines", [1, 2])
    def test_no_thread(self, monkeypatch, engines):
        """Where the host has no thread left, engines that run take the copy, or who waits."""
        gpu, gate = CopyEngines("gpu0", 2), threading.Event()
        busy = [gpu.submit(lambda: gate.wait(SOON) and None, "a copy") for _ in range(engines - 1)]

        def refuse(function, name):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("devices.engines.kthread_run", refuse)
        fence = gpu.submit(lambda: None, "another")
        gate.set()

        for one in (fence, *busy):
            assert one.wait(SOON) is None

    def test_in_turns(self):
        """Where threads take turns a copy is done before submit() returns."""
        engines = CopyEngines("gpu0", 2)
        install_scheduler(TakingTurns([], lambda options: 0))
        try:
            fence = engines.submit(lambda: None, "a copy")
        finally:
            install_scheduler(None)

        assert fence.is_signaled()
        assert 0 == engines.threads
