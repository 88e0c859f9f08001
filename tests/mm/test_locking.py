"""Locks among real threads, and among threads that take turns."""

import gc
import threading

import pytest

from mm.errors import Deadlock
from mm.locking import (
    NOBODY,
    Locks,
    RwSemaphore,
    SpinLock,
    current,
    kthread_run,
    preempt,
    read_poll_timeout,
    taking_turns,
    wait_event_timeout,
)
from tests.interleave import Stuck, explore

SOON = 30.0  # seconds after which a thread that should have come is lost


def in_thread(function):
    """Start *function*; join with `.join(SOON)`."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def result_of(function):
    """What *function* returns in a thread of its own."""
    results = []
    in_thread(lambda: results.append(function())).join(SOON)
    return results[0]


def waits_until(holder, waiter):
    """Order of events where *waiter* is a lock that another thread wants while *holder* is held."""
    said, ready = [], threading.Event()

    def second():
        ready.set()
        with waiter():
            said.append("second")

    with holder():
        thread = in_thread(second)
        assert ready.wait(SOON)
        thread.join(0.02)
        said.append("first")
    thread.join(SOON)
    return said


class TestCurrent:
    def test_small_and_distinct(self):
        """Threads that live at once have different numbers from 1 to 65535."""
        numbers, together = [], threading.Barrier(10)

        def note():
            together.wait(SOON)
            numbers.append(current())
            together.wait(SOON)

        threads = [in_thread(note) for _ in range(10)]
        for thread in threads:
            thread.join(SOON)

        assert 10 == len(set(numbers))
        assert current() not in numbers
        assert NOBODY < min(numbers) <= max(numbers) < 1 << 16

    def test_same_in_one_thread(self):
        """A thread keeps its number."""
        assert current() == current()

    def test_numbers_come_back(self):
        """A thread that is gone leaves its number to others: thousands do not use them up."""
        numbers = set()
        for _ in range(200):
            numbers.add(result_of(current))
            gc.collect(0)

        assert len(numbers) < 100


class TestSpinLock:
    def test_one_at_a_time(self):
        """Who comes second waits for the first."""
        lock = SpinLock(Locks(), "page table")

        assert ["first", "second"] == waits_until(lambda: lock, lambda: lock)
        assert NOBODY == lock.holder

    def test_again(self):
        """A thread that holds it would wait for itself, and is told so."""
        lock = SpinLock(Locks(), "page table")

        with lock, pytest.raises(Deadlock, match="page table is taken again by the thread"), lock:
            pass

        assert NOBODY == lock.holder

    def test_free_after_an_error(self):
        """An error inside gives the lock back."""
        lock = SpinLock(Locks(), "page table")

        with pytest.raises(ZeroDivisionError), lock:
            raise ZeroDivisionError

        assert NOBODY == lock.holder

    def test_any_interleaving(self):
        """No schedule lets two threads in at once."""

        def scenario(together):
            lock, count = SpinLock(Locks(), "lock"), [0]

            def increment():
                with lock:
                    before = count[0]
                    preempt("between load and store")
                    count[0] = before + 1

            together(increment, increment)
            assert [2] == count

        assert 20 < explore(scenario)


class TestRwSemaphore:
    def test_readers_share(self):
        """Any number of readers, in any number of threads."""
        sem = RwSemaphore(Locks(), "mmap_sem")

        def read():
            with sem.read():
                return sem.held()

        with sem.read(), sem.read():
            assert result_of(read)
        assert not sem.held()

    def test_writer_waits_for_readers(self):
        """A writer comes in when the last reader has left."""
        sem = RwSemaphore(Locks(), "mmap_sem")

        assert ["first", "second"] == waits_until(sem.read, sem.write)

    def test_reader_waits_for_the_writer(self):
        """Nobody reads while it is written."""
        sem = RwSemaphore(Locks(), "mmap_sem")

        assert ["first", "second"] == waits_until(sem.write, sem.read)

    def test_held_is_of_this_thread(self):
        """What another thread holds, this one does not."""
        sem = RwSemaphore(Locks(), "mmap_sem")

        with sem.write():
            assert sem.held()
            assert not result_of(sem.held)
        assert not sem.held()

    @pytest.mark.parametrize(
        ("outer", "inner"), [("read", "write"), ("write", "read"), ("write", "write")]
    )
    def test_wait_for_oneself(self, outer, inner):
        """A callback that maps or unmaps the process it works for gets an error, not a hang."""
        sem = RwSemaphore(Locks(), "mmap_sem of train")

        with (
            getattr(sem, outer)(),
            pytest.raises(Deadlock, match="mmap_sem of train is wanted by the thread that holds"),
            getattr(sem, inner)(),
        ):
            pass

        assert not sem.held()

    def test_reader_that_reads_again_keeps_it(self):
        """The inner of two read sections does not end the outer one."""
        sem = RwSemaphore(Locks(), "mmap_sem")

        with sem.read():
            with sem.read():
                pass
            assert sem.held()
            with pytest.raises(Deadlock), sem.write():
                pass

    def test_any_interleaving(self):
        """In every schedule a reader sees what a writer wrote wholly or not at all."""

        def scenario(together):
            sem, pair = RwSemaphore(Locks(), "mmap_sem"), [0, 0]

            def write():
                with sem.write():
                    pair[0] += 1
                    preempt("half")
                    pair[1] += 1

            def read():
                with sem.read():
                    first = pair[0]
                    preempt("half")
                    assert first == pair[1]

            together(write, read, write)
            assert [2, 2] == pair

        assert 20 < explore(scenario, preemptions=1)

    def test_two_upgrades(self):
        """Readers of one that want to write another, crosswise, wait for ever: it is found."""
        locks = Locks()
        one, two = RwSemaphore(locks, "one"), RwSemaphore(locks, "two")

        def take(mine, other):
            with mine.read(), other.write():
                pass

        with pytest.raises(Stuck, match="thread 0 waits for two"):
            explore(lambda together: together(lambda: take(one, two), lambda: take(two, one)))


class TestLocks:
    def test_wait_until(self):
        """A waiter looks again after each wake_up(), and goes on when it sees what it wants."""
        locks, count, seen = Locks(), [0], []
        thread = in_thread(lambda: (locks.wait_until(lambda: count[0] > 1, "two"), seen.append(1)))

        for _ in range(2):
            with locks.atomic:
                count[0] += 1
                locks.wake_up()
        thread.join(SOON)

        assert [1] == seen

    def test_nothing_to_wait_for(self):
        """What holds already is not waited for."""
        assert Locks().wait_until(lambda: True, "nothing")

    def test_wait_with_a_limit(self):
        """Who waits for so long only hears how it stands at last, and waits no more."""
        locks = Locks()
        assert not locks.wait_until(lambda: False, "nothing", 0.01)
        assert 0 == locks.waiting


class TestWaitEventTimeout:
    def test_nobody_does_it(self):
        """In the end the answer is no."""
        assert not wait_event_timeout(lambda: False)
        assert wait_event_timeout(lambda: True)

    def test_what_another_thread_does(self):
        """Once it is done the answer is yes."""
        done, begun, stop = [], threading.Event(), threading.Event()

        def other():
            current()  # it has come here
            begun.set()
            stop.wait(SOON)
            done.append(True)

        thread = in_thread(other)
        assert begun.wait(SOON)
        assert not wait_event_timeout(lambda: bool(done))
        stop.set()
        thread.join(SOON)
        assert wait_event_timeout(lambda: bool(done))

    def test_threads_that_take_turns(self):
        """Another one may go first at every look."""
        said = []

        def scenario(together):
            done = []
            first, _ = together(
                lambda: wait_event_timeout(lambda: bool(done)), lambda: done.append(True)
            )
            said.append(first)

        explore(scenario)

        assert True in said


class TestThreads:
    def test_poll(self):
        """What wakes nobody up is looked at until it is there, or time is up."""
        looks = iter([False, False, True])

        assert read_poll_timeout(lambda: next(looks), 30.0)
        assert not read_poll_timeout(lambda: False, 0.005)

    def test_kthread(self):
        """A kernel thread runs beside the one that made it."""
        done = threading.Event()
        kthread_run(done.set, "kthread")

        assert done.wait(30.0)
        assert not taking_turns()
