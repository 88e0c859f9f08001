"""What listeners on an address space hear, and when."""

import errno
import threading

import numpy as np
import pytest

from mm.errors import Deadlock, DriverBug, InvalidArgument, KernelBug, Overflow, WouldBlock
from mm.mmap import exit_mmap
from mm.mmu_notifier import (
    ULONG_MAX,
    MmuIntervalNotifier,
    MmuNotifyEvent,
    mmu_interval_check_retry,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
    mmu_notifier_range,
    mmu_notifier_register,
    mmu_notifier_unregister,
    mmu_notifier_unregister_no_release,
)
from mm.pgtable import pte_none, pte_pfn
from mm.rmap import page_referenced
from mm.swap import lru_add_drain_all
from mm.typing import PAGE_SIZE
from tests.interleave import explore, run_interleaved
from tests.world import mapped_range

CLEAR, UNMAP, MIGRATE = MmuNotifyEvent.CLEAR, MmuNotifyEvent.UNMAP, MmuNotifyEvent.MIGRATE
RELEASE = MmuNotifyEvent.RELEASE


class Listener:
    """Notes what it hears; with a *world*, also which of its pages are mapped then."""

    def __init__(self, world=None):
        self.world = world
        self.heard = []

    def note(self, what, *about):
        mapped = () if self.world is None else ((~pte_none(self.world.ptes())).tolist(),)
        self.heard.append((what, *about, *mapped))

    def invalidate_range_start(self, invalid):
        self.note("start", invalid.event, invalid.start, invalid.end)

    def invalidate_range_end(self, invalid):
        self.note("end", invalid.event, invalid.start, invalid.end)

    def release(self, mm):
        self.note("release")


def listening(world, *args):
    listener = Listener(*args)
    mmu_notifier_register(listener, world.process.mm)
    return listener


def around(event, start, end):
    return [("start", event, start, end), ("end", event, start, end)]


class TestRange:
    def test_start_comes_before_the_change_and_end_after(self):
        """A listener that forgets at start never answers for an entry that is gone."""
        world = mapped_range(pages=2)
        listener = listening(world, world)

        world.process.munmap(world.at(1), PAGE_SIZE)

        about = (UNMAP, world.at(1), world.at(2))
        expected = [("start", *about, [True, True]), ("end", *about, [True, False])]
        assert expected == listener.heard

    def test_every_listener(self):
        """All hear of it, in the order in which they came."""
        world = mapped_range(pages=1)
        heard = []
        for name in "ab":
            listening(world).note = lambda what, *_, name=name: heard.append(what + name)

        world.process.munmap(world.addr, PAGE_SIZE)

        assert ["starta", "startb", "enda", "endb"] == heard

    def test_end_comes_after_an_error_too(self):
        """A range is never left invalid."""
        world = mapped_range(pages=1)
        listener = listening(world)

        with pytest.raises(ZeroDivisionError), mmu_notifier_range(world.process.mm, 0, 9, CLEAR):
            raise ZeroDivisionError

        assert around(CLEAR, 0, 9) == listener.heard

    def test_owner_travels_along(self):
        """A driver can tell the migrations that it asked for."""
        world = mapped_range(pages=1)
        listener, owners = listening(world), []
        listener.invalidate_range_start = lambda invalid: owners.append(invalid.owner)

        with mmu_notifier_range(world.process.mm, 0, 9, MIGRATE, owner=world.gpu):
            pass

        assert [world.gpu] == owners

    def test_listener_that_left(self):
        """It is released, and hears nothing more but the end of what it heard the start of."""
        world = mapped_range(pages=1)
        mm, listener = world.process.mm, listening(world)

        with mmu_notifier_range(mm, 0, 9, CLEAR):
            mmu_notifier_unregister(listener, mm)
        with mmu_notifier_range(mm, 0, 9, CLEAR):
            pass

        start, end = around(CLEAR, 0, 9)
        assert [start, ("release",), end] == listener.heard

    def test_other_process(self):
        """A listener hears of its own address space only."""
        world = mapped_range(pages=1)
        listener = listening(world)

        with world.machine.spawn("other") as other:
            other.touch(other.mmap(PAGE_SIZE), PAGE_SIZE)

        assert [] == listener.heard


class TestEvents:
    def test_first_touch(self):
        """A page that comes where nothing was invalidates nothing."""
        world = mapped_range(pages=2, filled=False)
        listener = listening(world)

        world.process.read(world.addr, 1)
        world.process.write(world.at(1), b"x")

        assert [] == listener.heard

    def test_copy_on_write(self):
        """A frame takes the place of the zero page: one range for neighbours, one for others."""
        world = mapped_range(pages=5, filled=False)
        world.process.touch(world.addr, world.nbytes, write=False)
        world.process.touch(world.at(2), PAGE_SIZE)
        listener = listening(world)

        world.process.touch(world.addr, world.nbytes)

        expected = around(CLEAR, world.addr, world.at(2)) + around(CLEAR, world.at(3), world.at(5))
        assert expected == listener.heard

    def test_migration(self):
        """A migration invalidates its range once, by its own event."""
        world = mapped_range(pages=2)
        listener = listening(world)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert around(MIGRATE, world.addr, world.at(2)) == listener.heard

    def test_exit(self):
        """The release comes first, and nothing comes after it."""
        world = mapped_range(pages=2)
        listener = listening(world, world)

        with world.process.mm.mmap_sem.write():
            exit_mmap(world.process.mm)

        assert [("release", [True, True])] == listener.heard


class Interval(MmuIntervalNotifier):
    """Notes what it hears; *answer*: what it says to that, or the exception that it raises."""

    def __init__(self, mm, start, end, *, log=None, deaf=False, answer=True):
        self.log = [] if log is None else log
        self.deaf = deaf
        self.answer = answer
        mmu_interval_notifier_insert(self, mm, start, end)

    def invalidate(self, invalid, cur_seq):
        self.log.append((self.start, invalid.event, invalid.start, invalid.end))
        if isinstance(self.answer, Exception):
            raise self.answer
        if not self.deaf:
            mmu_interval_set_seq(self, cur_seq)
        return self.answer


@pytest.fixture
def mm():
    """An address space; its interval notifiers are gone when the test ends."""
    mm = mapped_range(pages=1).process.mm
    yield mm
    for notifier in tuple(mm.interval_notifiers):
        mmu_interval_notifier_remove(notifier)


def change(mm, start, end, event=CLEAR, **options):
    with mmu_notifier_range(mm, start, end, event, **options):
        pass


class TestIntervals:
    @pytest.mark.parametrize(
        ("start", "end", "heard"),
        [(5, 10, False), (5, 11, True), (19, 30, True), (20, 30, False), (12, 13, True)],
    )
    def test_what_touches_the_interval_is_heard(self, mm, start, end, heard):
        """The ends do not belong to the ranges."""
        notifier = Interval(mm, 10, 20)

        change(mm, start, end)

        assert [(10, CLEAR, start, end)] * heard == notifier.log

    def test_order(self, mm):
        """Intervals hear of it by start, those with one start in the order in which they came."""
        log = []
        for start, end in ((30, 40), (10, 40), (20, 40), (10, 15)):
            Interval(mm, start, end, log=log)

        change(mm, 0, 99)

        assert [10, 10, 20, 30] == [start for start, *_ in log]

    def test_intervals_come_before_listeners(self, mm):
        """As in Linux, the interval notifiers of an address space are told first."""
        log = []
        Interval(mm, 0, 99, log=log)
        listener = Listener()
        listener.heard = log
        mmu_notifier_register(listener, mm)

        change(mm, 0, 9)

        assert [0, "start", "end"] == [what for what, *_ in log]
        mmu_notifier_unregister(listener, mm)

    def test_exit(self):
        """The release of everything, then its unmapping, and each once."""
        world = mapped_range(pages=2)
        world.process.mmap(PAGE_SIZE)
        notifier = Interval(world.process.mm, 0, ULONG_MAX)

        world.process.exit()

        assert [(0, event, 0, ULONG_MAX) for event in (RELEASE, UNMAP)] == notifier.log
        mmu_interval_notifier_remove(notifier)

    @pytest.mark.parametrize(("start", "end"), [(5, 5), (5, 4), (-1, 4), (5, ULONG_MAX + 2)])
    def test_no_interval(self, mm, start, end):
        """EOVERFLOW, as Linux says of an empty one too."""
        with pytest.raises(Overflow) as refused:
            Interval(mm, start, end)
        assert errno.EOVERFLOW == refused.value.errno

    def test_inserted_twice(self, mm):
        """A notifier has one interval at a time."""
        notifier = Interval(mm, 0, 9)
        with pytest.raises(InvalidArgument, match="already"):
            mmu_interval_notifier_insert(notifier, mm, 10, 19)

    def test_process_that_has_exited(self):
        """There is nothing to hear of it."""
        world = mapped_range(pages=1)
        world.process.exit()
        with pytest.raises(InvalidArgument, match="has exited"):
            Interval(world.process.mm, 0, 9)

    def test_removed(self, mm):
        """It hears nothing more, and cannot be removed again; it may be inserted again."""
        notifier = Interval(mm, 0, 9)
        mmu_interval_notifier_remove(notifier)
        change(mm, 0, 9)
        with pytest.raises(InvalidArgument, match="not inserted"):
            mmu_interval_notifier_remove(notifier)

        assert [] == notifier.log
        mmu_interval_notifier_insert(notifier, mm, 0, 9)


class TestSequence:
    def test_quiet(self, mm):
        """Nothing happened: what was read is true."""
        notifier = Interval(mm, 10, 20)
        seq = mmu_interval_read_begin(notifier)

        change(mm, 20, 30)

        assert not mmu_interval_read_retry(notifier, seq)
        assert not mmu_interval_check_retry(notifier, seq)

    def test_change_in_between(self, mm):
        """It is not, from the start of a change on; the next reader has a new count."""
        notifier = Interval(mm, 10, 20)
        seq = mmu_interval_read_begin(notifier)
        for _ in range(2):
            with mmu_notifier_range(mm, 15, 16, CLEAR):
                assert mmu_interval_read_retry(notifier, seq)
                assert mmu_interval_check_retry(notifier, seq)
            assert mmu_interval_read_retry(notifier, seq)
            later = mmu_interval_read_begin(notifier)
            assert later > seq
            assert not mmu_interval_read_retry(notifier, later)
            seq = later

    def test_change_that_the_driver_passes_over(self, mm):
        """Who does not set the count does not collide, nor wait: its own migrations."""
        notifier = Interval(mm, 10, 20, deaf=True)
        seq = mmu_interval_read_begin(notifier)
        with mmu_notifier_range(mm, 10, 20, MIGRATE):
            assert seq == mmu_interval_read_begin(notifier)

        assert not mmu_interval_read_retry(notifier, seq)

    def test_inserted_while_something_changes(self, mm):
        """Nobody knows what of it was heard: the reader waits for the end."""
        order = []
        with mmu_notifier_range(mm, 0, 9, CLEAR):
            notifier = Interval(mm, 50, 60)
            reader = threading.Thread(
                target=lambda: order.append(mmu_interval_read_begin(notifier) and "read")
            )
            reader.start()
            reader.join(0.05)
            order.append("end")
        reader.join()

        assert ["end", "read"] == order

    def test_counts_are_odd_for_readers_and_even_at_rest(self, mm):
        """So that a reader's count never is the one of an address space at rest."""
        notifier = Interval(mm, 0, 9)
        for _ in range(3):
            change(mm, 0, 9)
            assert (0, 1) == (mm.invalidate_seq % 2, notifier.invalidate_seq % 2)

    def test_reader_that_changes_what_it_reads(self, mm):
        """It would wait for itself, and is told so; as is who removes his notifier there."""
        notifier = Interval(mm, 0, 9)
        with mmu_notifier_range(mm, 0, 9, CLEAR):
            with pytest.raises(Deadlock, match="mmu_interval_read_begin"):
                mmu_interval_read_begin(notifier)
            with pytest.raises(Deadlock, match="mmu_interval_notifier_remove"):
                mmu_interval_notifier_remove(notifier)

    def test_reader_and_two_changes(self, mm):
        """Under every schedule a reader that is not told to retry has read all of one change."""
        state = [0, 0]

        def scenario(together):
            notifier = Interval(mm, 0, 9)
            state[:] = [0, 0]

            def write():
                for i in (0, 1):
                    with mmu_notifier_range(mm, 0, 9, CLEAR):
                        state[i] += 1
                        change(mm, 0, 1)
                        state[1 - i] += 1

            def read():
                while True:
                    seq = mmu_interval_read_begin(notifier)
                    first = state[0]
                    with mm.page_table_lock:  # lets others in between
                        second = state[1]
                    if not mmu_interval_read_retry(notifier, seq):
                        return first, second

            seen, _ = together(read, write)
            assert seen[0] == seen[1]
            mmu_interval_notifier_remove(notifier)

        explore(scenario, preemptions=2)

    def test_remove_waits_for_the_end(self, mm):
        """When remove() returns, the driver may free what invalidate() uses."""

        def scenario(together):
            notifier = Interval(mm, 0, 9)
            inside = []

            def write():
                with mmu_notifier_range(mm, 0, 9, CLEAR):
                    inside.append(notifier)
                    with mm.page_table_lock:
                        pass
                    inside.remove(notifier)

            def remove():
                mmu_interval_notifier_remove(notifier)
                return list(inside) if notifier.log else []

            left, _ = together(remove, write)
            assert [] == left

        explore(scenario, preemptions=2)


class TestRefusals:
    def test_nonblockable_range(self, mm):
        """EAGAIN: nothing is changed, and the range is over."""
        ready, busy = Interval(mm, 0, 9), Interval(mm, 5, 9, answer=False)
        with pytest.raises(WouldBlock) as refused:
            change(mm, 0, 9, UNMAP, blockable=False)

        assert errno.EAGAIN == refused.value.errno
        assert ([], 0) == (mm.invalidating, mm.invalidate_seq % 2)
        assert 1 == len(ready.log) == len(busy.log)

    def test_refusal_where_it_may_wait(self, mm):
        """That is the driver's mistake; the change does not happen."""
        Interval(mm, 0, 9, answer=False)
        with pytest.raises(DriverBug, match="refused"):
            change(mm, 0, 9)

        assert [] == mm.invalidating

    def test_callback_that_raises(self):
        """munmap() fails and changes nothing; once the callback is well again it works."""
        world = mapped_range(pages=2)
        notifier = Interval(world.process.mm, 0, ULONG_MAX, answer=ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            world.process.munmap(world.addr, world.nbytes)
        notifier.answer = True

        assert world.intact()
        world.process.munmap(world.addr, world.nbytes)
        mmu_interval_notifier_remove(notifier)

    def test_listeners_that_heard_the_start_hear_the_end(self, mm):
        """So that whoever counts starts and ends is not left with an open one."""
        first, second, third = Listener(), Listener(), Listener()
        second.invalidate_range_start = lambda invalid: 1 / 0
        for listener in (first, second, third):
            mmu_notifier_register(listener, mm)

        with pytest.raises(ZeroDivisionError):
            change(mm, 0, 9)

        assert (around(CLEAR, 0, 9), [], []) == (first.heard, second.heard, third.heard)
        mm.notifiers.clear()

    def test_end_that_raises(self, mm):
        """The others hear the end too."""
        first, second = Listener(), Listener()
        first.invalidate_range_end = lambda invalid: 1 / 0
        for listener in (first, second):
            mmu_notifier_register(listener, mm)

        with pytest.raises(ZeroDivisionError):
            change(mm, 0, 9)

        assert around(CLEAR, 0, 9) == second.heard
        mm.notifiers.clear()

    def test_exit_goes_on(self):
        """Listeners that raise keep no memory alive, and keep nobody else from hearing."""
        world = mapped_range(pages=2)
        mm = world.process.mm
        bad, good = (Interval(mm, 0, 99, answer=answer) for answer in (OSError("bad"), True))
        last, rude = listening(world), listening(world)
        rude.release = lambda mm: 1 / 0

        with pytest.raises(OSError, match="bad"):
            world.process.exit()

        assert [("release",)] == last.heard
        assert [RELEASE] == [event for _, event, *_ in good.log]
        for notifier in (bad, good):
            mmu_interval_notifier_remove(notifier)


class TestSchedules:
    def test_changes_that_overlap(self, mm):
        """While any of them lasts a reader waits; its count is that of the last."""
        notifier = Interval(mm, 0, 9)

        def work():
            change(mm, 0, 5)
            change(mm, 4, 9)

        for seed in range(20):
            (seq, *_), _ = run_interleaved(
                [lambda: mmu_interval_read_begin(notifier), work, work], seed=seed
            )
            assert seq <= mm.invalidate_seq
        assert not mmu_interval_read_retry(notifier, mmu_interval_read_begin(notifier))


class Extra(Listener):
    """Has all that a listener may have; *used*: the addresses that its device has used."""

    def __init__(self, *used):
        super().__init__()
        self.used = set(used)

    def invalidate_range(self, mm, start, end):
        self.note("flush", start, end)

    def change_pte(self, mm, addrs, ptes):
        self.note("change", addrs.tolist(), pte_pfn(ptes).tolist())

    def clear_flush_young(self, mm, addrs):
        young = np.isin(addrs, list(self.used))
        self.used -= set(addrs.tolist())
        return young


class TestNesting:
    def test_end_without_start(self, mm):
        """Nobody can end what he never started, or has ended."""
        with pytest.raises(KernelBug, match="never started"):
            mmu_notifier_range(mm, 0, 9, CLEAR).__exit__()
        done = mmu_notifier_range(mm, 0, 9, CLEAR)
        with done:
            pass
        with pytest.raises(KernelBug, match="ended before"):
            done.__exit__()

    def test_ends_that_cross(self, mm):
        """Ranges of one thread end in the reverse of the order in which they started."""
        outer, inner = (mmu_notifier_range(mm, start, 9, CLEAR) for start in (0, 5))
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(KernelBug, match=r"\[0x0, 0x9\) of train ends before \[0x5, 0x9\)"):
            outer.__exit__()

        inner.__exit__()
        outer.__exit__()
        assert ([], 0) == (mm.invalidating, mm.invalidate_seq % 2)

    def test_threads_may_cross(self, mm):
        """Those of several threads end as they like."""
        first = mmu_notifier_range(mm, 0, 5, CLEAR)
        first.__enter__()
        other = threading.Thread(target=lambda: mmu_notifier_range(mm, 4, 9, CLEAR).__enter__())
        other.start()
        other.join()
        first.__exit__()

        (left,) = mm.invalidating
        assert (4, 9) == (left.start, left.end)
        mm.invalidating.clear()


class TestComingAndGoing:
    def test_twice(self, mm):
        """A listener hears of each change once."""
        listener = Listener()
        mmu_notifier_register(listener, mm)
        with pytest.raises(InvalidArgument, match="already"):
            mmu_notifier_register(listener, mm)
        mmu_notifier_unregister(listener, mm)

    def test_to_a_process_that_has_exited(self):
        """Nobody can listen to it."""
        world = mapped_range(pages=1)
        world.process.exit()
        with pytest.raises(InvalidArgument, match="has exited"):
            mmu_notifier_register(Listener(), world.process.mm)

    def test_released_once(self):
        """By unregister or by the exit, whichever comes first, though it unregisters in between."""
        world = mapped_range(pages=1)
        mm, early, late = world.process.mm, listening(world), listening(world)
        leaves = listening(world)
        leaves.release = lambda mm: (leaves.note("release"), mmu_notifier_unregister(leaves, mm))
        mmu_notifier_unregister(early, mm)
        mmu_notifier_unregister(early, mm)

        world.process.exit()
        mmu_notifier_unregister(late, mm)

        assert [[("release",)]] * 3 == [each.heard for each in (early, late, leaves)]

    def test_no_release(self, mm):
        """Who gives his table up himself need not be told."""
        listener = Listener()
        mmu_notifier_register(listener, mm)
        mmu_notifier_unregister_no_release(listener, mm)

        assert ([], []) == (listener.heard, mm.notifiers)

    def test_register_in_a_callback(self, mm):
        """It hears of the next change, not the end of this one."""
        first, second = Listener(), Listener()
        first.invalidate_range_start = lambda invalid: (
            mmu_notifier_register(second, mm) if not second.heard else None
        )
        mmu_notifier_register(first, mm)
        change(mm, 0, 9)
        first.invalidate_range_start = lambda invalid: None

        change(mm, 10, 19)

        assert around(CLEAR, 10, 19) == second.heard
        for listener in (first, second):
            mmu_notifier_unregister(listener, mm)

    def test_unregister_others_in_a_callback(self, mm):
        """Those who are taken away hear the end of what has started for them."""
        first, second = Listener(), Listener()
        for listener in (first, second):
            mmu_notifier_register(listener, mm)
        first.invalidate_range_start = lambda invalid: mmu_notifier_unregister(second, mm)
        change(mm, 0, 9)

        start, end = around(CLEAR, 0, 9)
        assert [("release",), start, end] == second.heard
        mmu_notifier_unregister(first, mm)

    def test_one_that_would_block(self, mm):
        """EAGAIN, as the oom reaper gets it; those who were told first hear the end."""
        first, second = Listener(), Listener()

        def would_block(invalid):
            assert not invalid.blockable
            raise WouldBlock("its lock is taken")

        second.invalidate_range_start = would_block
        for listener in (first, second):
            mmu_notifier_register(listener, mm)
        with pytest.raises(WouldBlock):
            change(mm, 0, 9, UNMAP, blockable=False)

        assert (around(UNMAP, 0, 9), []) == (first.heard, second.heard)
        for listener in (first, second):
            mmu_notifier_unregister(listener, mm)


class TestExtras:
    @pytest.fixture
    def world(self):
        """A process with three pages, and room to reclaim them."""
        world = mapped_range(pages=3, swap="1MiB")
        world.clear_refs(0, 1, 2)
        return world

    def listen(self, world, *pages):
        extra = Extra(*(world.at(page) for page in pages))
        mmu_notifier_register(extra, world.process.mm)
        return extra

    def test_nobody_has_them(self, world):
        """An address space asks only where somebody listens who has what is asked."""
        mm = world.process.mm
        extra = self.listen(world)
        assert {"invalidate_range", "change_pte", "clear_flush_young"} == mm.notifier_extras.keys()
        mmu_notifier_unregister(extra, mm)

        listening(world)
        assert {} == mm.notifier_extras

    def test_flush_comes_before_the_end(self, world):
        """Whoever shares the CPU's page table hears of changed entries before the pages may go."""
        extra = self.listen(world)

        world.process.munmap(world.at(1), PAGE_SIZE)

        start, end = around(UNMAP, world.at(1), world.at(2))
        assert [start, ("flush", world.at(1), world.at(2)), end] == extra.heard

    def test_copy_on_write(self, world):
        """It hears of the flush once, and then what the entry becomes."""
        world.process.fork()
        extra = self.listen(world)

        world.process.write(world.at(1), b"x")

        start, end = around(CLEAR, world.at(1), world.at(2))
        flush = ("flush", world.at(1), world.at(2))
        become = ("change", [world.at(1)], [world.pfns().item(1)])
        assert [start, flush, become, end] == extra.heard

    def test_zero_pages_that_a_device_replaces(self):
        """Those are changed entries; holes are not, and a flush is for each stretch."""
        world = mapped_range(pages=5, filled=False)
        for page in (0, 1, 3):
            world.process.read(world.at(page), 1)
        extra = self.listen(world)

        world.gpu.to_device(world.process, world.addr, world.nbytes)

        flushes = [about for about in extra.heard if about[0] == "flush"]
        stretches = [("flush", world.at(0), world.at(2)), ("flush", world.at(3), world.at(4))]
        assert [("flush", world.at(0), world.at(5)), *stretches] == flushes
        ((_, changed, _),) = [about for about in extra.heard if about[0] == "change"]
        assert [world.at(page) for page in (0, 1, 3)] == changed

    def test_page_that_a_device_uses(self, world):
        """Reclaim takes a page for used that only a device uses, and asks once for each use."""
        extra, mem = self.listen(world, 1), world.machine.mem
        lru_add_drain_all(mem)
        pfns = world.pfns()

        first, second = (page_referenced(mem, pfns).tolist() for _ in range(2))

        assert [False, True, False] == first
        assert [False] * 3 == second
        assert [] == extra.heard
