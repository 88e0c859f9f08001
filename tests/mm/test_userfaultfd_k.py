"""Waiting for userland: handlers, threads that read, threads that do not, and events."""

import threading

import numpy as np
import pytest

from mm import (
    PAGE_SIZE,
    BusError,
    SegmentationFault,
    TimedOut,
    TryAgain,
    UffdEvent,
    WouldBlock,
)
from mm.userfaultfd_k import UffdFeature
from tests.interleave import run_interleaved
from tests.world import mapped_range

SOON = 60.0


def page(byte, count=1):
    return bytes([byte]) * PAGE_SIZE * count


def registered(mode="missing", features="", *, pages=4, **how):
    """A world whose range reports to the fd that comes with it."""
    world = mapped_range(pages=pages, filled=False, **how)
    fd = world.process.userfaultfd(features)
    fd.register(world.addr, world.nbytes, mode)
    return world, fd


class Thread(threading.Thread):
    """A thread whose error, or answer, comes out of join()."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self.function, self.args, self.answer, self.error = function, args, None, None
        self.start()

    def run(self):
        try:
            self.answer = self.function(*self.args)
        except BaseException as error:  # noqa: BLE001 - raised by join()
            self.error = error

    def join(self):
        super().join(SOON)
        assert not self.is_alive(), "a thread hangs"
        if self.error is not None:
            raise self.error
        return self.answer


def served(world, fd, byte=7):
    """A thread that answers each fault until the fd is closed; it gives what it was told."""

    def serve():
        told = []
        for msg in fd:
            told.append((msg.address - world.addr) // PAGE_SIZE)
            if msg.wp:
                fd.writeprotect(msg.address, PAGE_SIZE, False)
            else:
                fd.copy(msg.address, page(byte))
        return told

    return Thread(serve)


class TestHandler:
    def test_holds_no_lock(self):
        """It may map, unmap and fork the process that faults."""
        world, fd = registered()
        process = world.process

        def handler(msg):
            process.munmap(process.mmap(PAGE_SIZE), PAGE_SIZE)
            process.fork().exit()
            fd.copy(msg.address, page(3))

        fd.handler = handler
        assert page(3) == process.read(world.addr, PAGE_SIZE)

    def test_ahead_of_the_faults(self):
        """What it brings besides is not asked for."""
        world, fd = registered(pages=64)
        asked = []

        def handler(msg):
            asked.append(msg.address)
            fd.copy(msg.address, page(1, 16))

        fd.handler = handler
        assert page(1, 64) == world.process.read(world.addr, world.nbytes)
        assert world.addrs[::16].tolist() == asked

    def test_stores_before_the_fault_are_done(self):
        """As an instruction at a time would have it."""
        world, fd = registered()
        fd.copy(world.addr, page(1, 2))
        seen = []

        def handler(msg):
            seen.append(world.process.read(world.addr, 2 * PAGE_SIZE))
            fd.zeropage(msg.address, PAGE_SIZE)

        fd.handler = handler
        world.process.write(world.addr, page(9, 3))

        assert [page(9, 2)] == seen

    def test_its_errors_come_out(self):
        """The access fails with them, and nobody waits any more."""
        world, fd = registered()

        def handler(msg):
            raise ValueError("no such block")

        fd.handler = handler
        with pytest.raises(ValueError, match="no such block"):
            world.process.read(world.addr, 1)
        world.machine.verify()

    @pytest.mark.parametrize("end", ["unregister", "close", "wake"])
    def test_other_answers(self, end):
        """The fault is the kernel's again; or comes back, as woken is not served."""
        world, fd = registered()
        asked = []

        def handler(msg):
            asked.append(msg)
            if end == "unregister":
                fd.unregister(world.addr, world.nbytes)
            elif end == "close":
                fd.close()
            elif len(asked) < 3:
                fd.wake(msg.address, PAGE_SIZE)
            else:
                fd.copy(msg.address, page(0))

        fd.handler = handler
        assert page(0) == world.process.read(world.addr, PAGE_SIZE)
        assert (3 if end == "wake" else 1) == len(asked)

    def test_segmentation_fault_comes_first(self):
        """Memory that may not be accessed is not asked for."""
        world, fd = registered(prot="r")
        fd.handler = lambda msg: pytest.fail("asked")

        with pytest.raises(SegmentationFault):
            world.process.write(world.addr, b"x")

    def test_array(self):
        """An array in memory that userland brings, page after page."""
        world = mapped_range(pages=1)
        array = world.process.array((2048,), dtype="int64")
        with world.process.userfaultfd() as fd:
            fd.register(array.addr, array.nbytes)
            fd.handler = lambda msg: fd.copy(
                msg.address, np.arange(512) + (msg.address - array.addr) // 8
            )
            assert np.arange(2048).tolist() == np.asarray(array[:]).tolist()

    def test_pins_and_populate(self):
        """Whoever faults pages in, and may wait, does."""
        world, fd = registered("missing", pages=8)
        fd.handler = lambda msg: fd.copy(msg.address, page(5))
        process = world.process

        with process.pin(world.addr, 2 * PAGE_SIZE):
            pass
        process.madvise(world.at(2), 2 * PAGE_SIZE, "populate_read")
        process.madvise(world.at(4), PAGE_SIZE, "populate_write")
        process.mlock(world.at(5), 3 * PAGE_SIZE)

        assert page(5, 8) == process.read(world.addr, world.nbytes)
        process.munlock(world.at(5), 3 * PAGE_SIZE)

    def test_counts_as_a_major_fault(self):
        """As every fault that is tried again."""
        world, fd = registered()
        fd.handler = lambda msg: fd.copy(msg.address, page(5))
        with world.machine.vmstat.counting() as delta:
            world.process.read(world.addr, 2 * PAGE_SIZE)

        assert (0, 2) == (world.process.min_flt, world.process.maj_flt)
        assert 2 == delta["pgfault"]


class TestReader:
    def test_serves_an_array(self):
        """A thread brings every page that another one reads."""
        world, fd = registered(pages=600)
        thread = served(world, fd)

        assert page(7, 600) == world.process.read(world.addr, world.nbytes)
        fd.close()
        assert list(range(600)) == thread.join()

    def test_serves_several_threads(self):
        """Each page is asked for by somebody, and all go on."""
        world, fd = registered("missing|wp", pages=64)
        thread = served(world, fd)
        stores = [Thread(world.process.write, world.at(at), page(at)) for at in range(64)]
        for store in stores:
            store.join()
        fd.writeprotect(world.addr, world.nbytes)
        loads = [Thread(world.process.write, world.at(at), page(at + 1)) for at in range(64)]
        for load in loads:
            load.join()
        fd.close()

        assert set(range(64)) == set(thread.join())
        assert [at + 1 for at in range(64)] == world.contents()

    def test_message(self):
        """What faulted, how, and who it was."""
        world, fd = registered("missing|wp", "thread_id")
        thread = Thread(world.process.write, world.at(1) + 5, b"x")
        (msg,) = fd.read()
        fd.copy(world.at(1), page(2), wp=True)
        (again,) = fd.read()
        fd.writeprotect(world.at(1), PAGE_SIZE, False)
        thread.join()

        assert (UffdEvent.PAGEFAULT, world.at(1), True, False) == (
            msg.event,
            msg.address,
            msg.write,
            msg.wp,
        )
        assert again == msg._replace(wp=True)
        assert msg.thread > 0

    def test_without_waking(self):
        """Pages can be brought before those that wait hear of it."""
        world, fd = registered()
        thread = Thread(world.process.read, world.addr, 1)
        fd.read()
        fd.copy(world.addr, page(4), wake=False)
        assert thread.is_alive()

        fd.wake()
        assert b"\x04" == thread.join()

    def test_wakes_those_of_its_range(self):
        """Others wait on."""
        world, fd = registered()
        threads = [Thread(world.process.read, world.at(at), 1) for at in (0, 2)]
        messages = []
        while len(messages) < 2:
            messages += fd.read()
        fd.copy(world.at(2), page(4))

        assert b"\x04" == threads[1].join()
        assert threads[0].is_alive()
        fd.copy(world.at(0), page(5))
        assert b"\x05" == threads[0].join()

    @pytest.mark.parametrize("end", ["close", "unregister", "munmap", "exit"])
    def test_end_of_waiting(self, end):
        """Who waits when userland lets go is served by the kernel, or finds nothing."""
        world, fd = registered()
        thread = Thread(world.process.read, world.addr, 1)
        fd.read()
        if end == "close":
            fd.close()
        elif end == "unregister":
            fd.unregister(world.addr, world.nbytes)
        elif end == "munmap":
            world.process.munmap(world.addr, world.nbytes)
            fd.wake()
        else:
            world.process.exit()

        if end in ("munmap", "exit"):
            with pytest.raises(SegmentationFault):
                thread.join()
        else:
            assert b"\0" == thread.join()

    def test_end_of_reading(self):
        """A reader of a closed fd, or of a process that exited, has nothing more to do."""
        world, fd = registered()
        other = world.process.userfaultfd()
        readers = [Thread(list, fd), Thread(list, other)]
        fd.close()
        world.process.exit()

        assert [[], []] == [reader.join() for reader in readers]
        assert [] == fd.read()

    def test_nothing_to_read(self):
        """Who does not want to wait is told."""
        _, fd = registered()
        with pytest.raises(WouldBlock):
            fd.read(block=False)

    @pytest.mark.parametrize("handler", [False, True])
    def test_nobody_answers(self, handler):
        """The access fails, says where, and what could be done; what came before it is done."""
        world, fd = registered()
        fd.copy(world.addr, page(1))
        fd.timeout = 0.01
        fd.handler = (lambda msg: None) if handler else None

        with pytest.raises(TimedOut, match=f"0.01 s.*{world.at(1):#x}; read"):
            world.process.write(world.addr, page(9, 2))
        assert page(9) == world.process.read(world.addr, PAGE_SIZE)
        world.machine.verify()

    def test_store_that_nobody_allows(self):
        """The same of a protected page."""
        world, fd = registered("wp")
        fd.timeout = 0.01
        world.process.write(world.addr, page(1))
        fd.writeprotect(world.addr, PAGE_SIZE)

        with pytest.raises(TimedOut, match=f"store to {world.addr:#x}"):
            world.process.write(world.addr, b"x")


class TestRaces:
    def test_answered_before_it_was_asked(self):
        """Wherever the answer comes, the fault does not wait for another."""
        seen = set()
        for seed in range(40):
            world, fd = registered(pages=1)

            def answer(fd=fd, world=world):
                fd.copy(world.addr, page(3))

            results, _ = run_interleaved(
                [lambda world=world: world.process.read(world.addr, 1), answer], seed=seed
            )
            seen.add(results[0])

        assert {b"\x03"} == seen

    def test_closed_meanwhile(self):
        """The kernel serves it then."""
        for seed in range(40):
            world, fd = registered(pages=1)
            results, _ = run_interleaved(
                [lambda world=world: world.process.read(world.addr, 1), fd.close], seed=seed
            )
            assert b"\0" == results[0]

    def test_protected_meanwhile(self):
        """Two stores and a protection: each store is allowed or came first."""
        for seed in range(40):
            world, fd = registered("wp", pages=1)
            world.process.write(world.addr, page(1))
            fd.handler = lambda msg, fd=fd: fd.writeprotect(msg.address, PAGE_SIZE, False)
            run_interleaved(
                [
                    lambda world=world: world.process.write(world.addr, b"a"),
                    lambda world=world: world.process.write(world.addr + 1, b"b"),
                    lambda world=world, fd=fd: fd.writeprotect(world.addr, PAGE_SIZE),
                ],
                seed=seed,
            )
            assert b"ab\x01" == world.process.read(world.addr, 3)


class TestEvents:
    def test_nobody_asked(self):
        """Without the features there are none."""
        world, fd = registered(pages=8)
        child = world.process.fork()
        world.process.madvise(world.addr, PAGE_SIZE, "dontneed")
        world.process.mremap(world.addr, PAGE_SIZE, PAGE_SIZE, "maymove|fixed", 1 << 32)
        world.process.munmap(world.at(1), PAGE_SIZE)

        with pytest.raises(WouldBlock):
            fd.read(block=False)
        child.exit()

    @pytest.mark.parametrize("handler", [False, True])
    def test_fork(self, handler):
        """The child's memory has an fd of its own, for whoever serves the parent's."""
        world, fd = registered("missing", "event_fork")
        told = []
        fd.handler = told.append if handler else None
        child = world.process.fork()
        (msg,) = told if handler else fd.read()

        assert (UffdEvent.FORK, UffdFeature.EVENT_FORK) == (msg.event, msg.fd.features)
        msg.fd.handler = lambda fault: msg.fd.copy(fault.address, page(6))
        assert page(6) == child.read(world.addr, PAGE_SIZE)
        child.exit()

    def test_fork_that_nobody_hears_of(self):
        """When the parent's fd is closed, the child's goes too."""
        world, fd = registered("missing", "event_fork")
        child = world.process.fork()
        fd.close()

        assert page(0) == child.read(world.addr, PAGE_SIZE)
        assert [] == child.mm.userfaultfds

    def test_fork_that_fails(self):
        """There is no event, and nothing is left."""
        world, fd = registered("missing", "event_fork", nodes=("1MiB",), pages=120)
        fd.copy(world.addr, page(1, 120))
        pin = world.process.pin(world.addr, world.nbytes)
        with pytest.raises(OSError, match="fork"):
            world.process.fork()
        pin.release()

        world.machine.verify()
        with pytest.raises(WouldBlock):
            fd.read(block=False)
        assert fd.copy is not None
        assert 0 == fd.mmap_changing

    def test_remap(self):
        """Memory that moves reports on from where it is."""
        world, fd = registered("missing", "event_remap|event_unmap")
        to = 1 << 32
        world.process.mremap(world.addr, world.nbytes, world.nbytes, "maymove|fixed", to)
        moved, gone = fd.read()

        assert (UffdEvent.REMAP, world.addr, world.addr + world.nbytes, to) == moved[:4]
        assert (UffdEvent.UNMAP, world.addr, world.addr + world.nbytes) == gone[:3]
        fd.handler = lambda msg: fd.copy(msg.address, page(2))
        assert page(2) == world.process.read(to, PAGE_SIZE)

    def test_unmap(self):
        """Whoever's memory a call unmaps hears of it once, all that the call said."""
        world, fd = registered("missing", "event_unmap", pages=6)
        fd.unregister(world.at(1), PAGE_SIZE)
        process = world.process

        process.munmap(world.addr, 4 * PAGE_SIZE)
        process.mmap(PAGE_SIZE, addr=world.at(4))
        process.mmap(PAGE_SIZE, addr=world.at(0))

        found = [(msg.event, msg.address, msg.end) for msg in fd.read()]
        assert [
            (UffdEvent.UNMAP, world.addr, world.at(4)),
            (UffdEvent.UNMAP, world.at(4), world.at(5)),
        ] == found

    @pytest.mark.parametrize("advice", ["dontneed", "free", "dontneed_locked"])
    def test_remove(self, advice):
        """Before contents go, userland hears of each piece of its memory."""
        world, fd = registered("missing", "event_remove", pages=6)
        fd.unregister(world.at(2), PAGE_SIZE)
        fd.copy(world.at(4), page(5))
        seen = []

        def handler(msg):
            seen.append((msg.event, msg.address, msg.end))
            assert b"\x05" == world.process.read(world.at(4), 1)

        fd.handler = handler
        world.process.madvise(world.at(1), 4 * PAGE_SIZE, advice)

        assert [
            (UffdEvent.REMOVE, world.at(1), world.at(2)),
            (UffdEvent.REMOVE, world.at(3), world.at(5)),
        ] == seen

    def test_unread_event_stops_copies(self):
        """Until userland knows what has become of its memory, it can bring nothing."""
        world, fd = registered("missing|wp", "event_unmap")
        world.process.munmap(world.addr, PAGE_SIZE)

        for call in (fd.zeropage, fd.writeprotect):
            with pytest.raises(TryAgain, match="read"):
                call(world.at(1), PAGE_SIZE)
        fd.read()
        fd.zeropage(world.at(1), PAGE_SIZE)

    def test_reader_is_waited_for(self):
        """Whoever changes memory goes on when a thread that serves it has heard."""
        world, fd = registered("missing", "event_unmap")
        heard = []

        def serve():
            for msg in fd:
                heard.append(msg.event)

        thread = Thread(serve)
        while fd.reader == 0:
            pass
        world.process.munmap(world.addr, PAGE_SIZE)
        assert 0 == fd.mmap_changing
        fd.close()
        thread.join()

        assert [UffdEvent.UNMAP] == heard

    def test_faults_are_read_before_events(self):
        """As in Linux."""
        world, fd = registered("missing", "event_unmap")
        thread = Thread(world.process.read, world.at(1), 1)
        while not fd.fault_pending:
            pass
        world.process.munmap(world.addr, PAGE_SIZE)

        assert [UffdEvent.PAGEFAULT, UffdEvent.UNMAP] == [msg.event for msg in fd.read()]
        fd.zeropage(world.at(1), PAGE_SIZE)
        assert b"\0" == thread.join()


class TestSigbus:
    def test_overrides_a_handler(self):
        """The feature asks nobody, whoever is there."""
        world, fd = registered("missing", "sigbus")
        fd.handler = lambda msg: pytest.fail("asked")

        with pytest.raises(BusError):
            world.process.read(world.addr, 1)
