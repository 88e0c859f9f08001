"""Errors of writeback: everyone who was there hears of each, once."""

import errno

from hypothesis import given
from hypothesis import strategies as st

from mm.errseq import errseq_check, errseq_check_and_advance, errseq_sample, errseq_set

EIO, ENOSPC = -errno.EIO, -errno.ENOSPC


class TestErrseq:
    def test_nothing(self):
        """No error, no report."""
        assert 0 == errseq_set(0, 0) == errseq_sample(0) == errseq_check(0, 0)
        assert (0, 0) == errseq_check_and_advance(0, 0)

    def test_once_for_each(self):
        """Two who have sampled it hear of an error once each."""
        one = other = errseq_sample(0)
        word = errseq_set(0, EIO)

        err, word = errseq_check_and_advance(word, one)
        one = word
        assert (EIO, 0) == (err, errseq_check(word, one))
        err, word = errseq_check_and_advance(word, other)
        assert EIO == err

    def test_unseen_error_is_for_who_comes_later(self):
        """And is no news to them once somebody has seen it."""
        word = errseq_set(0, EIO)
        assert EIO == errseq_check(word, errseq_sample(word))

        _, word = errseq_check_and_advance(word, 0)
        assert 0 == errseq_check(word, errseq_sample(word))

    def test_same_error_again(self):
        """One that was seen and comes again is news."""
        _, word = errseq_check_and_advance(errseq_set(0, EIO), 0)
        since = errseq_sample(word)
        word = errseq_set(word, EIO)

        assert EIO == errseq_check(word, since)

    @given(
        steps=st.lists(st.sampled_from([EIO, ENOSPC]) | st.tuples(st.integers(0, 3), st.booleans()))
    )
    def test_twin(self, steps):
        """Each of four hears the last error since they asked, or opened the file."""
        word, since, news, unseen = 0, [0] * 4, [0] * 4, 0
        for step in steps:
            if isinstance(step, int):
                word, news, unseen = errseq_set(word, step), [step] * 4, step
                continue
            who, opens = step
            if opens:
                since[who], news[who] = errseq_sample(word), unseen
            else:
                err, word_now = errseq_check_and_advance(word, since[who])
                since[who] = word = word_now
                assert news[who] == err
                news[who], unseen = 0, 0 if err else unseen
