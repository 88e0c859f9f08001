"""References and LRU lists, against a model that has a Python list for each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm import Machine
from mm.errors import KernelBug
from mm.gfp import GFP_KERNEL
from mm.mmzone import Lru
from mm.page_alloc import alloc_pages_bulk
from mm.page_flags import PG_active, PG_lru, PG_mlocked, PG_swapbacked, PG_unevictable
from mm.swap import (
    deactivate_page,
    get_page,
    isolate_lru_page,
    isolate_lru_pages,
    lru_add_drain,
    lru_add_drain_all,
    lru_cache_add,
    lru_pages,
    mark_page_lazyfree,
    move_pages_to_lru,
    page_lru,
    put_page,
    putback_lru_page,
)
from mm.typing import pages
from mm.unevictable import munlock_page
from tests.world import mapped_range

KINDS = {
    Lru.INACTIVE_ANON: PG_swapbacked,
    Lru.ACTIVE_ANON: PG_swapbacked | PG_active,
    Lru.INACTIVE_FILE: np.uint64(0),
    Lru.ACTIVE_FILE: PG_active,
    Lru.UNEVICTABLE: PG_mlocked,
}


def boot(nodes=("2MiB",)):
    return Machine(nodes, payload=False, debug=True)


def frames(machine, count, lru=Lru.INACTIVE_ANON, nid=0):
    """Pages of nobody, with a reference and the flags that send them to *lru*."""
    pfns = alloc_pages_bulk(machine.mem, GFP_KERNEL, nid, count)
    machine.mem.flags[pfns] |= KINDS[lru]
    return pfns


def listed(machine, lru=Lru.INACTIVE_ANON, nid=0):
    return lru_pages(machine.mem, machine.mem.nodes[nid].lruvec[lru]).tolist()


def free(mem, pfns):
    """Give *pfns* back; nobody keeps them in memory any more."""
    mlocked = pfns[(mem.flags[pfns] & PG_mlocked) != 0]
    mem.vmstat.add("nr_mlock", mlocked.size)  # which nobody has counted
    munlock_page(mem, mlocked)
    put_page(mem, pfns)


def drop(machine, pfns):
    """Give *pfns* back; all is well after that."""
    free(machine.mem, pfns)
    lru_add_drain_all(machine.mem)
    machine.verify()


class TestGetPut:
    @settings(max_examples=20)
    @given(counts=st.lists(st.integers(0, 3), min_size=5, max_size=5))
    def test_repeated_pages_count_each_time(self, counts):
        """A page that is named twice has two references more, and loses two again."""
        machine = boot()
        pfns = frames(machine, 5)
        named = np.repeat(pfns, counts)

        get_page(machine.mem, named)
        assert [1 + count for count in counts] == machine.mem.refcount[pfns].tolist()
        put_page(machine.mem, named)

        assert [1] * 5 == machine.mem.refcount[pfns].tolist()
        drop(machine, pfns)

    def test_last_reference_frees(self):
        """A page goes when nobody holds it, in any order and however often it is named."""
        machine = boot()
        free = machine.nr_free_pages
        pfns = frames(machine, 3)
        get_page(machine.mem, pfns[1:])

        put_page(machine.mem, pfns[[2, 0, 1, 2]])
        assert free - 1 == machine.nr_free_pages
        put_page(machine.mem, pfns[1:2])

        assert free == machine.nr_free_pages
        machine.verify()

    def test_reference_that_was_never_taken(self):
        """The bug names the page."""
        machine = boot()
        pfns = frames(machine, 2)
        put_page(machine.mem, pfns[:1])

        with pytest.raises(KernelBug, match=f"no reference left on {pfns[0]:#x}"):
            put_page(machine.mem, pfns[:1])

    def test_listed_page_leaves_its_list(self):
        """A page may be freed while it is on a list."""
        machine = boot()
        pfns = frames(machine, 30)
        lru_cache_add(machine.mem, pfns)

        with machine.vmstat.counting("nr_inactive_anon") as delta:
            put_page(machine.mem, pfns[10:20])

        assert [*pfns[:10], *pfns[20:]] == listed(machine)
        assert {"nr_inactive_anon": -10} == delta
        drop(machine, np.delete(pfns, slice(10, 20)))

    def test_system_and_device_pages_together(self):
        """One vector may hold both kinds: each goes back to where it came from."""
        world = mapped_range(pages=4)
        world.gpu.to_device(world.process, world.addr, 2 * 4096)
        pfns = world.pfns()
        get_page(world.machine.mem, pfns)
        held = world.machine.mem.refcount[pfns].tolist()

        put_page(world.machine.mem, pfns)

        assert [3, 3, 2, 2] == held

    def test_no_page(self):
        """An empty vector is fine."""
        machine = boot()
        get_page(machine.mem, pages())
        put_page(machine.mem, pages())


class TestPagevec:
    @pytest.mark.parametrize(
        ("count", "handed_over"), [(1, 0), (14, 0), (15, 15), (16, 15), (29, 15), (40, 30)]
    )
    def test_fifteen_at_a_time(self, count, handed_over):
        """Pages wait for 15 to be together; the rest of a longer vector waits on."""
        machine = boot()
        pfns = frames(machine, count)

        with machine.vmstat.counting("nr_inactive_anon") as delta:
            lru_cache_add(machine.mem, pfns)

        assert pfns[:handed_over].tolist() == listed(machine)
        assert {"nr_inactive_anon": handed_over} == delta
        drop(machine, pfns)

    def test_fifteenth_page_takes_the_others_along(self):
        """It does not matter in how many calls they came."""
        machine = boot()
        pfns = frames(machine, 15)
        for pfn in pfns[:14]:
            lru_cache_add(machine.mem, pages(pfn))
        assert [] == listed(machine)

        lru_cache_add(machine.mem, pfns[14:])

        assert pfns.tolist() == listed(machine)
        drop(machine, pfns)

    def test_pagevec_holds_a_reference(self):
        """A page that waits cannot be freed; it is when it gets to its list."""
        machine = boot()
        free = machine.nr_free_pages
        pfns = frames(machine, 3)
        lru_cache_add(machine.mem, pfns)

        put_page(machine.mem, pfns)
        assert [1, 1, 1] == machine.mem.refcount[pfns].tolist()
        machine.verify()
        lru_add_drain(machine.mem)

        assert free == machine.nr_free_pages
        assert [] == listed(machine)

    def test_drain_is_of_one_cpu(self):
        """lru_add_drain() leaves what other CPUs hold, lru_add_drain_all() does not."""
        machine = boot()
        pfns = frames(machine, 6)
        for cpu in (0, 1):
            lru_cache_add(machine.mem, pfns[cpu::2], cpu)

        lru_add_drain(machine.mem, 1)
        assert pfns[1::2].tolist() == listed(machine)
        lru_add_drain_all(machine.mem)

        assert [*pfns[1::2], *pfns[::2]] == listed(machine)
        drop(machine, pfns)


class TestPageLru:
    @pytest.mark.parametrize(("lru", "flags"), KINDS.items())
    def test_by_flags(self, lru, flags):
        """Swapbacked and active choose the list; unevictable, as what is mlocked is, beats them."""
        listed = PG_unevictable if flags & PG_mlocked else flags
        assert lru == page_lru(int(listed | PG_lru))
        assert Lru.UNEVICTABLE == page_lru(int(flags | PG_unevictable))

    def test_each_kind_on_its_list(self):
        """A mixed vector is sorted onto the lists, and counted there."""
        machine = boot()
        pfns = np.concatenate([frames(machine, 3, lru) for lru in Lru])
        shuffled = np.random.default_rng(0).permutation(pfns)

        with machine.vmstat.counting() as delta:
            lru_cache_add(machine.mem, shuffled)

        assert {f"nr_{lru.name.lower()}": 3 for lru in Lru} == delta
        for i, lru in enumerate(Lru):
            assert [p for p in shuffled if p in pfns[3 * i : 3 * i + 3]] == listed(machine, lru)
        drop(machine, pfns)

    def test_each_node_has_its_own(self):
        """Pages go to the lists of the node that they are memory of."""
        machine = boot(("2MiB", "2MiB"))
        near, far = (frames(machine, 15, nid=nid) for nid in (0, 1))

        lru_cache_add(machine.mem, np.stack([far, near], axis=1).ravel())

        assert near.tolist() == listed(machine, nid=0)
        assert far.tolist() == listed(machine, nid=1)
        assert 30 == machine.vmstat["nr_inactive_anon"]
        drop(machine, np.concatenate([near, far]))


class TestIsolate:
    def test_mask_flag_and_reference(self):
        """What was on a list is off it, with a reference; what was on none is as it was."""
        machine = boot()
        pfns = frames(machine, 20)
        lru_cache_add(machine.mem, pfns)

        isolated = isolate_lru_page(machine.mem, pfns[10:])

        assert [True] * 5 + [False] * 5 == isolated.tolist()
        assert [2] * 5 + [2] * 5 == machine.mem.refcount[pfns[10:]].tolist()
        assert pfns[:10].tolist() == listed(machine)
        assert 10 == machine.vmstat["nr_inactive_anon"]
        put_page(machine.mem, pfns[10:15])
        drop(machine, pfns)

    def test_only_one_can(self):
        """A page that somebody has isolated is on no list for others."""
        machine = boot()
        pfns = frames(machine, 15)
        lru_cache_add(machine.mem, pfns)

        both = [isolate_lru_page(machine.mem, pfns).all() for _ in range(2)]

        assert [True, False] == both
        put_page(machine.mem, pfns)
        drop(machine, pfns)

    def test_putback_makes_it_the_youngest(self):
        """A page comes back by way of the pagevec, without the reference, behind all others."""
        machine = boot()
        pfns = frames(machine, 15)
        lru_cache_add(machine.mem, pfns)
        isolate_lru_page(machine.mem, pfns[:5])

        putback_lru_page(machine.mem, pfns[:5])
        assert pfns[5:].tolist() == listed(machine)
        lru_add_drain(machine.mem)

        assert [*pfns[5:], *pfns[:5]] == listed(machine)
        assert [1] * 15 == machine.mem.refcount[pfns].tolist()
        drop(machine, pfns)

    def test_list_may_change_meanwhile(self):
        """An isolated page goes back to the list that its flags say then."""
        machine = boot()
        pfns = frames(machine, 15)
        lru_cache_add(machine.mem, pfns)
        isolate_lru_page(machine.mem, pfns)

        machine.mem.flags[pfns[::2]] |= PG_active
        putback_lru_page(machine.mem, pfns)

        assert pfns[::2].tolist() == listed(machine, Lru.ACTIVE_ANON)
        assert pfns[1::2].tolist() == listed(machine)
        drop(machine, pfns)

    def test_list_does_not_grow_with_its_past(self):
        """Pages that come and go a thousand times leave no trail behind."""
        machine = boot()
        pfns = frames(machine, 45)
        lru_cache_add(machine.mem, pfns)
        for _ in range(1000):
            isolate_lru_page(machine.mem, pfns[:30])
            putback_lru_page(machine.mem, pfns[:30])

        assert [*pfns[30:], *pfns[:30]] == listed(machine)
        assert machine.mem.nodes[0].lruvec[Lru.INACTIVE_ANON].log.size < 1000
        drop(machine, pfns)


class TestIsolateLruPages:
    def test_oldest_first(self):
        """They are held, and on no list; the younger ones stay."""
        machine = boot()
        pfns = frames(machine, 30)
        lru_cache_add(machine.mem, pfns)
        lru = machine.mem.nodes[0].lruvec[Lru.INACTIVE_ANON]

        assert pfns[:7].tolist() == isolate_lru_pages(machine.mem, lru, 7).tolist()

        assert pfns[7:].tolist() == listed(machine)
        assert [2] * 7 == machine.mem.refcount[pfns[:7]].tolist()
        putback_lru_page(machine.mem, pfns[:7])
        lru_add_drain(machine.mem)
        assert [*pfns[7:].tolist(), *pfns[:7].tolist()] == listed(machine)
        drop(machine, pfns)

    def test_gaps_are_passed_over(self):
        """What has left the list in between does not count."""
        machine = boot()
        pfns = frames(machine, 30)
        lru_cache_add(machine.mem, pfns)
        isolate_lru_page(machine.mem, pfns[1:20])
        lru = machine.mem.nodes[0].lruvec[Lru.INACTIVE_ANON]

        taken = isolate_lru_pages(machine.mem, lru, 3)

        assert [0, 20, 21] == [pfns.tolist().index(pfn) for pfn in taken]
        assert 0 == isolate_lru_pages(machine.mem, lru, 100)[8:].size
        move_pages_to_lru(machine.mem, pfns)
        drop(machine, pfns)

    def test_page_that_is_about_to_be_freed(self):
        """Its last reference is gone: whoever dropped it will take it off the list."""
        machine = boot()
        pfns = frames(machine, 3)
        lru_cache_add(machine.mem, pfns)
        lru_add_drain(machine.mem)
        machine.mem.refcount[pfns[1]] = 0
        lru = machine.mem.nodes[0].lruvec[Lru.INACTIVE_ANON]

        assert pfns[[0, 2]].tolist() == isolate_lru_pages(machine.mem, lru, 3).tolist()

        machine.mem.refcount[pfns[1]] = 1
        move_pages_to_lru(machine.mem, pfns[[0, 2]])
        drop(machine, pfns)


class TestAdvice:
    def test_cold_pages_become_inactive(self):
        """The young end of the inactive list is their new place; the others stay theirs."""
        machine = boot()
        active, inactive = frames(machine, 5, Lru.ACTIVE_ANON), frames(machine, 5)
        lru_cache_add(machine.mem, np.concatenate((active, inactive)))

        with machine.vmstat.counting("pgdeactivate") as delta:
            deactivate_page(machine.mem, np.concatenate((inactive, active[1:3])))

        assert {"pgdeactivate": 2} == delta
        assert active[[0, 3, 4]].tolist() == listed(machine, Lru.ACTIVE_ANON)
        assert [*inactive.tolist(), *active[1:3].tolist()] == listed(machine)
        drop(machine, np.concatenate((active, inactive)))

    def test_pages_of_files_are_not_given_up(self):
        """MADV_FREE is about anonymous memory, on a list, and evictable."""
        machine = boot()
        pfns = frames(machine, 4)
        lru_cache_add(machine.mem, pfns)
        lru_add_drain(machine.mem)
        machine.mem.mapping[pfns[1:]] = 5  # anonymous
        machine.mem.flags[pfns[2]] |= PG_unevictable

        with machine.vmstat.counting("pglazyfree") as delta:
            mark_page_lazyfree(machine.mem, pfns)
            lru_add_drain(machine.mem)

        assert {"pglazyfree": 2} == delta
        assert pfns[[1, 3]].tolist() == listed(machine, Lru.INACTIVE_FILE)
        machine.mem.flags[pfns[2]] &= ~PG_unevictable
        machine.mem.mapping[pfns] = 0
        drop(machine, pfns)


class AnySequence(RuleBasedStateMachine):
    """Whatever is added, isolated, put back and freed: the lists are those of the model."""

    def __init__(self):
        super().__init__()
        self.machine = boot(("1MiB", "1MiB"))
        self.mem = self.machine.mem
        self.kind = {}  # page to the list that it belongs on; all pages that are ours
        self.pagevec = []
        self.lists = {(nid, lru): [] for nid in (0, 1) for lru in Lru}
        self.isolated = []

    def hand_over(self, count):
        for pfn in self.pagevec[:count]:
            self.lists[self.mem.page_to_nid(pages(pfn)).item(), self.kind[pfn]].append(pfn)
        del self.pagevec[:count]

    def add(self, pfns):
        self.pagevec += pfns
        self.hand_over(len(self.pagevec) // 15 * 15)

    def on_lists(self):
        return [pfn for pfns in self.lists.values() for pfn in pfns]

    @rule(count=st.integers(1, 20), nid=st.integers(0, 1), lru=st.sampled_from(Lru))
    def fresh(self, count, nid, lru):
        pfns = frames(self.machine, count, lru, nid)
        self.kind |= dict.fromkeys(pfns.tolist(), lru)

        lru_cache_add(self.mem, pfns)

        self.add(pfns.tolist())

    @precondition(lambda self: self.kind)
    @rule(random=st.randoms(use_true_random=False), share=st.sampled_from([0.1, 0.5, 1]))
    def isolate(self, random, share):
        wanted = random.sample(sorted(self.kind), max(1, int(len(self.kind) * share)))
        on_lists = set(self.on_lists())

        mask = isolate_lru_page(self.mem, pages(*wanted))

        assert [pfn in on_lists for pfn in wanted] == mask.tolist()
        taken = [pfn for pfn in wanted if pfn in on_lists]
        self.isolated += taken
        for pfns in self.lists.values():
            pfns[:] = [pfn for pfn in pfns if pfn not in taken]

    @precondition(lambda self: self.isolated)
    @rule(count=st.integers(1, 40))
    def put_back(self, count):
        going, self.isolated = self.isolated[:count], self.isolated[count:]

        putback_lru_page(self.mem, pages(*going))

        self.add(going)

    @rule()
    def drain(self):
        lru_add_drain(self.mem)

        self.hand_over(len(self.pagevec))

    @precondition(lambda self: self.on_lists())
    @rule(random=st.randoms(use_true_random=False))
    def free(self, random):
        going = random.sample(sorted(self.on_lists()), min(7, len(self.on_lists())))

        free(self.mem, pages(*going))

        for pfns in self.lists.values():
            pfns[:] = [pfn for pfn in pfns if pfn not in going]
        for pfn in going:
            del self.kind[pfn]

    @invariant()
    def as_in_the_model(self):
        for (nid, lru), pfns in self.lists.items():
            assert pfns == listed(self.machine, lru, nid)
            assert len(pfns) == self.mem.nodes[nid].lruvec[lru].nr_pages
        for lru in Lru:
            counted = sum(len(self.lists[nid, lru]) for nid in (0, 1))
            assert counted == self.machine.vmstat[f"nr_{lru.name.lower()}"]

    def teardown(self):
        free(self.mem, pages(*self.isolated))
        drop(self.machine, pages(*self.kind))
        assert self.machine.nr_free_pages == 512 - 2  # all but PFN 0 and the zero page


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=15, stateful_step_count=20)
