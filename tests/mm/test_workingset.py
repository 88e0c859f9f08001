"""Shadows of pages that went, and what they say when the pages come back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import Machine
from mm.gfp import GFP_KERNEL
from mm.mmzone import Lru
from mm.page_alloc import alloc_pages_bulk
from mm.page_flags import PG_active, PG_workingset
from mm.swap import put_page
from mm.typing import pages
from mm.workingset import workingset_eviction, workingset_refault

COUNTERS = ("workingset_refault", "workingset_activate", "workingset_restore")


@pytest.fixture
def mem():
    return Machine(("2MiB", "2MiB"), payload=False, max_physmem="4MiB").mem


class TestEviction:
    @given(st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=8))
    def test_each_page_is_one_older(self, kinds):
        """A shadow names the node, the age of its list, and whether the page was worth much."""
        mem = Machine(("2MiB", "2MiB"), payload=False, max_physmem="4MiB").mem
        mem.nodes[0].inactive_age, mem.nodes[1].inactive_age = 100, 200
        pfns = np.array([alloc_pages_bulk(mem, GFP_KERNEL, nid, 1).item() for nid, _ in kinds])
        for pfn, (_, worth) in zip(pfns, kinds, strict=True):
            mem.flags[pfn] |= PG_workingset if worth else np.uint64(0)

        shadows = workingset_eviction(mem, pfns)

        ages = [100, 200]
        for shadow, (nid, worth) in zip(shadows.tolist(), kinds, strict=True):
            assert (ages[nid], nid, worth) == (shadow >> 9, shadow >> 1 & 0xFF, shadow & 1)
            ages[nid] += 1
        assert ages == [node.inactive_age for node in mem.nodes]


class TestRefault:
    def comes_back_after(self, mem, others, active):
        """The flags of a page that returns when *others* have gone since, beside *active* ones."""
        mem.nodes[0].lruvec[Lru.ACTIVE_ANON].nr_pages = active
        page, rest = np.split(alloc_pages_bulk(mem, GFP_KERNEL, 0, 1 + others), [1])
        shadow = workingset_eviction(mem, page)
        workingset_eviction(mem, rest)
        workingset_refault(mem, page, shadow)
        return mem.flags.item(page.item())

    @pytest.mark.parametrize(("active", "early"), [(5, False), (6, True), (7, True)])
    def test_distance(self, mem, active, early):
        """A page is active again if an inactive list longer by the active one had kept it."""
        with mem.vmstat.counting(*COUNTERS) as delta:
            flags = self.comes_back_after(mem, others=5, active=active)

        assert early * int(PG_active) == flags
        assert [1, early, 0] == list(delta.values())

    def test_page_of_the_working_set(self, mem):
        """What was active before it went is known to be worth it."""
        (page,) = alloc_pages_bulk(mem, GFP_KERNEL, 0, 1)
        mem.flags[page] |= PG_workingset
        mem.nodes[0].lruvec[Lru.ACTIVE_ANON].nr_pages = 9
        shadow = workingset_eviction(mem, pages(page))
        mem.flags[page] = 0

        with mem.vmstat.counting(*COUNTERS) as delta:
            workingset_refault(mem, pages(page), shadow)

        assert [1, 1, 1] == list(delta.values())
        assert int(PG_active | PG_workingset) == mem.flags.item(page)

    def test_no_page(self, mem):
        """An empty vector changes nothing."""
        with mem.vmstat.counting() as delta:
            workingset_refault(mem, pages(), pages())

        assert {} == delta
        put_page(mem, pages())
