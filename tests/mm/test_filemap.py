"""The page lock."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import Machine
from mm.errors import Deadlock, KernelBug
from mm.filemap import (
    lock_new_page,
    lock_page,
    page_locked,
    trylock_page,
    unlock_page,
    wait_on_page_locked,
)
from mm.locking import NOBODY, current, preempt
from mm.page_flags import PG_dirty, PG_locked
from mm.typing import pages
from tests.interleave import Stuck, explore
from tests.world import SOMEBODY_ELSE, mapped_range

SOON = 30.0
PAGES = pages(*range(100, 110))
subsets = st.lists(st.sampled_from(PAGES.tolist()), unique=True)


def memory():
    return Machine(("1MiB",), payload=False).mem


def locked(mem):
    """The pages that are locked, and by whom."""
    assert ((mem.flags[PAGES] & PG_locked != 0) == (mem.lock_owner[PAGES] != NOBODY)).all()
    owners = mem.lock_owner[PAGES].tolist()
    return {pfn: owner for pfn, owner in zip(PAGES.tolist(), owners, strict=True) if owner}


def lock_for_another(mem, pfns):
    mem.flags[pfns] |= PG_locked
    mem.lock_owner[pfns] = SOMEBODY_ELSE


class TestTrylockPage:
    @given(theirs=subsets, wanted=subsets)
    def test_takes_what_nobody_has(self, theirs, wanted):
        """In any vector, what is free becomes ours and what is locked stays theirs."""
        mem = memory()
        lock_for_another(mem, pages(*theirs))

        got = trylock_page(mem, pages(*wanted))

        assert [pfn not in theirs for pfn in wanted] == got.tolist()
        ours = dict.fromkeys(set(wanted) - set(theirs), current())
        assert ours | dict.fromkeys(theirs, SOMEBODY_ELSE) == locked(mem)

    def test_ours_already(self):
        """It is no lock that one thread takes twice."""
        mem = memory()
        trylock_page(mem, PAGES[:3])

        assert [False, True] == trylock_page(mem, PAGES[2:4]).tolist()

    def test_other_flags_stay(self):
        """The lock is one bit."""
        mem = memory()
        mem.flags[PAGES] = PG_dirty

        trylock_page(mem, PAGES)
        unlock_page(mem, PAGES)

        assert (mem.flags[PAGES] == PG_dirty).all()


class TestLockNewPage:
    @given(fresh=subsets)
    def test_as_if_it_had_been_tried(self, fresh):
        """Pages that nobody else knows are locked without a question."""
        mem = memory()

        lock_new_page(mem, pages(*fresh))

        assert dict.fromkeys(fresh, current()) == locked(mem)
        assert [pfn in fresh for pfn in PAGES] == page_locked(mem, PAGES).tolist()


class TestUnlockPage:
    def test_only_these(self):
        """The others stay locked."""
        mem = memory()
        trylock_page(mem, PAGES)

        unlock_page(mem, PAGES[::2])

        assert dict.fromkeys(PAGES[1::2].tolist(), current()) == locked(mem)

    def test_not_locked(self):
        """The bug names the pages, and those that are locked stay so."""
        mem = memory()
        trylock_page(mem, PAGES[:2])

        with pytest.raises(KernelBug, match="unlock_page: not locked: 0x66, 0x67"):
            unlock_page(mem, PAGES[:4])

        assert {100, 101} == locked(mem).keys()


class TestLockPage:
    def test_waits_for_others(self):
        """It comes back when all are ours, however long one of them was somebody else's."""
        mem = memory()
        lock_for_another(mem, PAGES[3:5])
        timer = threading.Timer(0.02, unlock_page, (mem, PAGES[3:5]))
        timer.start()

        lock_page(mem, PAGES)
        timer.join(SOON)

        assert dict.fromkeys(PAGES.tolist(), current()) == locked(mem)

    def test_waits_for_itself(self):
        """A thread that has it gets an error that says so."""
        mem = memory()
        trylock_page(mem, PAGES[:1])

        with pytest.raises(Deadlock, match="page 0x64 is locked by the thread that waits for it"):
            lock_page(mem, PAGES[:1])

    def test_any_interleaving(self):
        """No schedule lets two threads have one page, and all get what they want."""
        mem = memory()
        holders = np.zeros(mem.limit_pfn, dtype=np.int64)

        def scenario(together):
            def use(pfns):
                lock_page(mem, pfns)
                holders[pfns] += 1
                preempt("in use")
                assert (holders[pfns] == 1).all()
                holders[pfns] -= 1
                unlock_page(mem, pfns)

            together(lambda: use(PAGES[:4]), lambda: use(PAGES[2:6]), lambda: use(PAGES[5:2:-1]))
            assert {} == locked(mem)

        assert 20 < explore(scenario, preemptions=1)

    def test_opposite_orders(self):
        """Two threads that lock two pages one by one, crosswise, are found out."""
        mem = memory()

        def scenario(together):
            def take(first, then):
                lock_page(mem, first)
                lock_page(mem, then)
                unlock_page(mem, PAGES[:2])

            together(lambda: take(PAGES[:1], PAGES[1:2]), lambda: take(PAGES[1:2], PAGES[:1]))

        with pytest.raises(Stuck, match="thread 0 waits for page 0x65; thread 1 waits for page"):
            explore(scenario)


class TestWaitOnPageLocked:
    def test_unlocked_page(self):
        """There is nothing to wait for."""
        wait_on_page_locked(memory(), 100)

    def test_no_reference_is_held(self):
        """Waiting leaves the count alone, so that the owner can still migrate the page."""
        world = mapped_range(pages=1)
        world.lock(page=0)
        pfn = world.pfns().item(0)
        mem, asked = world.machine.mem, threading.Event()

        def wait():
            asked.set()
            wait_on_page_locked(mem, pfn)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert asked.wait(SOON)
        thread.join(0.02)
        world.machine.verify()
        world.unlock(page=0)
        thread.join(SOON)

        assert not thread.is_alive()
