"""The scheduler that tests install: it tries what it says, and finds who waits for whom."""

import threading

import pytest

from mm.locking import Locks, SpinLock, preempt
from tests.interleave import Stuck, explore, run_interleaved


def steps(letter, count, said):
    """A function with *count* places where another one may come in between."""

    def function():
        for _ in range(count):
            preempt("step")
            said.append(letter)

    return function


def one_run(**how):
    """The order in which two functions of two steps each get on."""
    said = []
    run_interleaved([steps("a", 2, said), steps("b", 2, said)], **how)
    return "".join(said)


class TestRunInterleaved:
    @pytest.mark.parametrize(
        ("choices", "order"),
        [([], "aabb"), ([1], "bbaa"), ([0, 1], "bbaa"), ([0, 0, 1, 0, 1], "abab")],
    )
    def test_choices(self, choices, order):
        """A choice says who goes on: 0 the one that runs, and for ever when choices run out."""
        assert order == one_run(choices=choices)

    def test_seed(self):
        """A seed gives the same order again; some seeds give others."""
        orders = [one_run(seed=seed) for seed in range(20)]

        assert orders == [one_run(seed=seed) for seed in range(20)]
        assert {"aabb", "abab"} < set(orders)

    def test_results(self):
        """What each function returned, in the order of the functions."""
        results, _ = run_interleaved([lambda: 1, lambda: 2, lambda: 3], choices=[2])

        assert [1, 2, 3] == results

    def test_error_says_how_to_run_it_again(self):
        """The first function's error comes out, with the choices that led to it."""

        def fails():
            preempt("before")
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine") as error:
            run_interleaved([fails, lambda: None], choices=[0, 1])

        assert ["to see it again: choices=[0, 1]"] == error.value.__notes__

    def test_interpreter_has_its_threads_back(self):
        """Afterwards, also after a failure, threads wait for one another as they always do."""
        with pytest.raises(ZeroDivisionError):
            run_interleaved([lambda: 1 / 0])
        lock, order = SpinLock(Locks(), "lock"), []

        def second():
            with lock:
                order.append("second")

        thread = threading.Thread(target=second)
        with lock:
            thread.start()
            order.append("first")
        thread.join()

        assert ["first", "second"] == order

    def test_strangers_pass(self):
        """A thread that is not one of the functions does not take turns."""

        def starts_another():
            thread = threading.Thread(target=preempt, args=("point",))
            thread.start()
            thread.join()

        run_interleaved([starts_another, lambda: None])


class TestStuck:
    def functions(self):
        locks = Locks()
        one, two = SpinLock(locks, "one"), SpinLock(locks, "two")

        def take(outer, inner):
            with outer, inner:
                pass

        return lambda: take(one, two), lambda: take(two, one)

    def test_all_wait(self):
        """Two locks taken in opposite orders: it says who waits for what."""
        with pytest.raises(Stuck, match="thread 0 waits for two; thread 1 waits for one"):
            run_interleaved(self.functions(), choices=[0, 0, 1])

    def test_is_found(self):
        """One preemption is enough to find it, none is too few."""
        assert 2 == explore(lambda together: together(*self.functions()), preemptions=0)
        with pytest.raises(Stuck):
            explore(lambda together: together(*self.functions()), preemptions=1)

    def test_waiting_is_no_choice(self):
        """A thread that waits is asked again only after something has happened."""
        lock = SpinLock(Locks(), "lock")

        def take():
            with lock:
                preempt("inside")

        assert 2 < explore(lambda together: together(take, take, take), preemptions=1) < 100


class TestExplore:
    def orders(self, **bounds):
        found = []

        def scenario(together):
            said = []
            together(steps("a", 2, said), steps("b", 2, said))
            found.append("".join(said))

        runs = explore(scenario, **bounds)
        assert len(found) == runs
        return set(found)

    def test_without_preemption(self):
        """Each function runs to its end, in any order."""
        assert {"aabb", "bbaa"} == self.orders(preemptions=0)

    def test_one_preemption(self):
        """Either function is cut in two once; more cuts are for higher bounds."""
        assert {"aabb", "bbaa", "abba", "baab"} == self.orders(preemptions=1)

    def test_all(self):
        """With enough preemptions every order is tried."""
        expected = {"aabb", "abab", "abba", "baab", "baba", "bbaa"}

        assert expected == self.orders(preemptions=4)

    def test_too_many(self):
        """A bound that gives too many schedules is refused, not cut short."""
        with pytest.raises(AssertionError, match="more than 5 schedules; allow fewer"):
            self.orders(preemptions=4, limit=5)

    def test_failure_says_which_schedule(self):
        """A failed assertion of the scenario comes with the choices that led to it."""

        def scenario(together):
            said = []
            together(steps("a", 1, said), steps("b", 1, said))
            assert ["a", "b"] == said

        with pytest.raises(AssertionError) as error:
            explore(scenario)

        assert "choices=" in error.value.__notes__[-1]
