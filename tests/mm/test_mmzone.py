"""Stacks of PFNs."""

from hypothesis import given
from hypothesis import strategies as st

from mm.mmzone import PageStack
from mm.typing import pages

pfn_lists = st.lists(st.integers(0, 2**40), max_size=100)


class TestPageStack:
    @given(moves=st.lists(pfn_lists | st.integers(0, 150), max_size=20))
    def test_as_a_list(self, moves):
        """What is pushed comes off last in, first out, however much it is."""
        stack, model = PageStack(4), []
        for move in moves:
            if isinstance(move, list):
                stack.push(pages(*move))
                model += move
            else:
                keep = max(0, len(model) - move)
                assert model[keep:] == stack.pop(move).tolist()
                del model[keep:]
            assert model == stack.live().tolist()

    def test_what_came_off_is_a_copy(self):
        """A later push does not change it."""
        stack = PageStack()
        stack.push(pages(1, 2))
        taken = stack.pop(2)
        stack.push(pages(3, 4))

        assert [1, 2] == taken.tolist()
