"""Zones, the buddy allocator against one that knows single pages only, and check_zone()."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm import trace
from mm.errors import InvalidArgument, KernelBug, OutOfMemory
from mm.gfp import GFP_ATOMIC, GFP_KERNEL, Gfp
from mm.mm_init import build_nodes
from mm.mmzone import DMA32_END, DMA_END, MAX_ORDER
from mm.page_alloc import (
    MAX_RECLAIM_RETRIES,
    PCP_BATCH,
    PCP_HIGH,
    alloc_pages,
    alloc_pages_bulk,
    check_zone,
    drain_all_pages,
    free_blocks,
    free_pages,
    free_pages_bulk,
    is_free_buddy_page,
    nr_free_pages,
    system_zones,
)
from mm.page_flags import PG_dirty, PG_locked, PG_uptodate
from mm.types import MemMap, MemoryType
from mm.typing import pages

MIXED = DMA_END + 1500, 2000  # pages: DMA, DMA32 and a second node, with unaligned borders


def memory(*nodes, payload=False, debug=True):
    """A machine with nodes of so many pages, two CPUs, and nothing but the allocator."""
    mem = MemMap(sum(nodes), sum(nodes), tables=8, payload=payload, cpus=2)
    mem.debug = debug
    build_nodes(mem, nodes)
    return mem


def put(mem, pfns, cpu=0):
    """Drop the only reference to *pfns*."""
    mem.refcount[pfns] = 0
    free_pages_bulk(mem, pfns, cpu)


def verify(mem):
    assert [] == [complaint for zone in system_zones(mem) for complaint in check_zone(mem, zone)]
    assert nr_free_pages(mem) == mem.vmstat["nr_free_pages"]


def all_blocks(mem):
    """(PFN, order) of every free block, once the per-CPU lists are empty."""
    drain_all_pages(mem)
    blocks = [free_blocks(mem, zone) for zone in system_zones(mem)]
    return [(p, o) for pfns, orders in blocks for p, o in zip(pfns, orders, strict=True)]


def buddy_blocks(free, zone):
    """What the free pages of *zone* merge into, page by page: the oracle."""
    blocks = set()
    for page in sorted(free & set(range(zone.start_pfn, zone.end_pfn))):
        pfn, order = page, 0
        while order < MAX_ORDER - 1 and (pfn ^ 1 << order, order) in blocks:
            blocks.remove((pfn ^ 1 << order, order))
            pfn &= ~(1 << order)
            order += 1
        blocks.add((pfn, order))
    return sorted(blocks)


def runs(pfns):
    return np.count_nonzero(np.diff(pfns) != 1) + 1


class AnySequence(RuleBasedStateMachine):
    """Whatever is allocated and freed, the free pages are those that nobody holds."""

    def __init__(self):
        super().__init__()
        self.mem = memory(1501, 1000)
        self.at_boot = all_blocks(self.mem)
        self.held = set()  # single pages
        self.blocks = {}  # first page to order

    def occupied(self):
        in_blocks = {p + i for p, order in self.blocks.items() for i in range(1 << order)}
        return self.held | in_blocks

    @rule(
        count=st.integers(0, 40) | st.integers(0, 2500),
        nid=st.integers(0, 1),
        cpu=st.integers(0, 1),
        gfp=st.sampled_from([GFP_KERNEL, GFP_ATOMIC, Gfp.THISNODE, Gfp.DMA]),
    )
    def bulk(self, count, nid, cpu, gfp):
        got = alloc_pages_bulk(self.mem, gfp, nid, count, cpu)

        assert (np.diff(got) > 0).all()
        assert got.size <= count
        assert self.occupied().isdisjoint(got.tolist())
        self.held |= set(got.tolist())

    @rule(order=st.integers(0, MAX_ORDER - 1), nid=st.integers(0, 1))
    def block(self, order, nid):
        try:
            pfn = alloc_pages(self.mem, GFP_KERNEL, order, nid)
        except OutOfMemory:
            return
        assert pfn % (1 << order) == 0
        assert self.occupied().isdisjoint(range(pfn, pfn + (1 << order)))
        self.blocks[pfn] = order

    @precondition(lambda self: self.held)
    @rule(share=st.sampled_from([0.01, 0.5, 1]), cpu=st.integers(0, 1), random=st.randoms())
    def free(self, share, cpu, random):
        going = random.sample(sorted(self.held), max(1, int(len(self.held) * share)))
        put(self.mem, pages(*going), cpu)
        self.held -= set(going)

    @precondition(lambda self: self.blocks)
    @rule(random=st.randoms())
    def free_block(self, random):
        pfn = random.choice(sorted(self.blocks))
        free_pages(self.mem, pfn, self.blocks.pop(pfn))

    @rule()
    def drain(self):
        drain_all_pages(self.mem)

        free = set(range(1, self.mem.max_pfn)) - self.occupied()
        expected = [b for zone in system_zones(self.mem) for b in buddy_blocks(free, zone)]
        assert expected == all_blocks(self.mem)

    @invariant()
    def lists_are_sound(self):
        verify(self.mem)
        assert nr_free_pages(self.mem) == self.mem.max_pfn - 1 - len(self.occupied())

    def teardown(self):
        put(self.mem, pages(*self.held))
        for pfn, order in self.blocks.items():
            free_pages(self.mem, pfn, order)
        assert self.at_boot == all_blocks(self.mem)
        verify(self.mem)


AnySequence.TestCase.settings = settings(stateful_step_count=15, deadline=None)
TestAnySequence = AnySequence.TestCase


def borders(mem):
    return [[(z.name, z.start_pfn, z.end_pfn) for z in node.zones] for node in mem.nodes]


class TestBuildNodes:
    def test_zones_of_a_large_machine(self):
        """16 MiB and 4 GiB part the zones; PFN 0 belongs to none."""
        end = DMA32_END + 5000

        mem = memory(end)

        assert [
            [("DMA", 1, DMA_END), ("DMA32", DMA_END, DMA32_END), ("Normal", DMA32_END, end)]
        ] == borders(mem)
        assert [0, 1, 1, 2, 2, 3] == mem.zone[[0, 1, 4095, 4096, DMA32_END - 1, -1]].tolist()
        assert end - 1 == nr_free_pages(mem) == mem.vmstat["nr_free_pages"]

    def test_zones_of_two_nodes(self):
        """Nodes follow each other, and each has the zones that its addresses lie in."""
        mem = memory(1000, 5000)

        assert [
            [("DMA", 1, 1000)],
            [("DMA", 1000, DMA_END), ("DMA32", DMA_END, 6000)],
        ] == borders(mem)
        assert [0, 1, 1] == mem.page_to_nid(pages(999, 1000, 5999)).tolist()
        assert {MemoryType.SYSTEM} == set(mem.memory_type[1:4].tolist())

    def test_zonelist_goes_down_then_to_the_neighbours(self):
        """A node looks in its highest zone first, and in the nearest other node next."""
        mem = memory(5000, 100, 100)

        lists = [[(z.nid, z.name) for z in node.zonelist] for node in mem.nodes]

        own = [(0, "DMA32"), (0, "DMA")]
        assert [
            [*own, (1, "DMA32"), (2, "DMA32")],
            [(1, "DMA32"), *own, (2, "DMA32")],
            [(2, "DMA32"), (1, "DMA32"), *own],
        ] == lists

    def test_all_frames_are_in_the_largest_blocks(self):
        """At boot the lists hold every frame, and no block could be larger."""
        mem = memory(1001, 1047)

        blocks = [free_blocks(mem, node.zones[0]) for node in mem.nodes]

        assert list(range(9)) == blocks[0][1][:9].tolist()  # 1, 2, 4 .. 256
        assert [1000, 1047] == [int((1 << orders).sum()) for _, orders in blocks]
        assert [] == check_zone(mem, mem.nodes[0].zones[0]) + check_zone(mem, mem.nodes[1].zones[0])

    def test_watermarks(self):
        """A 1 GiB machine keeps 4 MiB free, each zone its share."""
        mem = memory(1 << 18)

        dma, dma32 = mem.nodes[0].zones

        assert (15, 19, 23) == dma.watermark
        assert (1007, 1265, 1523) == dma32.watermark
        assert {"DMA32": 1008, "Normal": 1008} == dma.lowmem_reserve
        assert {"Normal": 0} == dma32.lowmem_reserve

    @pytest.mark.parametrize("size", [64, 256, 1024])
    def test_tiny_machine_is_usable(self, size):
        """Reserves leave three quarters of even the smallest machine."""
        assert alloc_pages_bulk(memory(size), GFP_KERNEL, 0, size).size >= size * 3 // 4 - 1

    @pytest.mark.parametrize("nodes", [(), (1024, 0), (512, 256), (-1024, 2048)])
    def test_sizes_that_do_not_add_up(self, nodes):
        """Nodes fill system memory exactly; the message says how much that is."""
        mem = MemMap(1024, 1024, tables=8, payload=False, cpus=1)

        with pytest.raises(InvalidArgument, match=r"\[0x0, 0x400\); give sizes"):
            build_nodes(mem, nodes)


class TestAllocPagesBulk:
    def test_pages_are_one_run_with_one_reference(self):
        """A fresh machine hands out ascending neighbours, each held once."""
        mem = memory(8192)

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 3000)

        assert (1, 3000) == (runs(got), got.size)
        assert (mem.refcount[got] == 1).all()
        verify(mem)

    def test_few_pages_are_neighbours_too(self):
        """Pages that come through the per-CPU list one by one follow each other."""
        mem = memory(8192)

        got = [alloc_pages_bulk(mem, GFP_KERNEL, 0, 1).item() for _ in range(PCP_BATCH)]

        assert list(range(got[0], got[0] + PCP_BATCH)) == got

    def test_one_run_is_preferred_to_fragments(self):
        """Free single pages are left alone while some block holds all that is wanted."""
        mem = memory(8192)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 2000)
        put(mem, held[::2])

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 700)

        assert 1 == runs(got)
        verify(mem)

    def test_smallest_block_that_suffices_is_split(self):
        """A hole of 64 pages serves 50, and no larger block is broken."""
        mem = memory(8192)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 2000)
        hole = held[held % 64 == 0][3] + np.arange(64)
        put(mem, hole)

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 50)

        assert hole[:50].tolist() == got.tolist()

    def test_fragments_are_gathered_when_nothing_else_is_left(self):
        """Every page above the watermark can be had, from however small a block."""
        mem = memory(8192)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 8192)
        put(mem, held[::2])

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 3000)

        assert 3000 == got.size
        assert 0 == np.intersect1d(got, held[1::2]).size
        verify(mem)

    def test_stops_at_the_watermark(self):
        """An ordinary request leaves the zone its min pages."""
        mem = memory(4096)
        (zone,) = system_zones(mem)

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)

        assert zone.managed_pages - zone.watermark[0] == got.size
        assert 0 == alloc_pages_bulk(mem, GFP_KERNEL, 0, 1).size

    def test_atomic_request_dips_below_the_watermark(self):
        """Who cannot wait may use five eighths of what others must leave."""
        mem = memory(4096)
        (zone,) = system_zones(mem)
        alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)

        high = alloc_pages_bulk(mem, Gfp.HIGH, 0, 5000)
        atomic = alloc_pages_bulk(mem, GFP_ATOMIC, 0, 5000)

        low = zone.watermark[0]
        assert low // 2 == high.size
        assert (low - low // 2) // 4 == atomic.size

    def test_lower_zone_keeps_its_reserve(self):
        """Only a request for ZONE_DMA gets what that zone reserves from those above."""
        mem = memory(DMA_END * 16)
        dma = mem.nodes[0].zones[0]
        alloc_pages_bulk(mem, GFP_KERNEL, 0, DMA_END * 16)
        assert dma.watermark[0] + dma.lowmem_reserve["DMA32"] == dma.nr_free

        alloc_pages_bulk(mem, Gfp.DMA, 0, DMA_END)

        assert dma.watermark[0] == dma.nr_free

    @pytest.mark.parametrize(("gfp", "limit"), [(Gfp.DMA, DMA_END), (Gfp.DMA32, DMA32_END)])
    def test_zone_modifier_bounds_the_address(self, gfp, limit):
        """DMA and DMA32 give no frame that such a device could not reach."""
        mem = memory(DMA32_END + 4096)
        above = alloc_pages_bulk(mem, GFP_KERNEL, 0, 100)

        below = alloc_pages_bulk(mem, gfp, 0, 100)

        assert (above >= DMA32_END).all()
        assert (below < limit).all()

    def test_other_node_helps_out(self):
        """What the own node lacks comes from another, unless THISNODE says otherwise."""
        mem = memory(*MIXED)
        here = alloc_pages_bulk(mem, GFP_KERNEL | Gfp.THISNODE, 1, 5000)
        assert {1} == set(mem.page_to_nid(here).tolist())

        there = alloc_pages_bulk(mem, GFP_KERNEL, 1, 500)

        assert {0} == set(mem.page_to_nid(there).tolist())
        assert 0 == alloc_pages_bulk(mem, Gfp.THISNODE, 1, 1).size

    @pytest.mark.parametrize(("nid", "nodes"), [(0, {1}), (1, {1}), (0, {0, 1}), (1, [0])])
    def test_nodes_of_a_policy(self, nid, nodes):
        """Where they are given no other node helps out, however much it has."""
        mem = memory(*MIXED)

        pfns = alloc_pages_bulk(mem, GFP_KERNEL, nid, 20_000, nodes=nodes)

        assert set(nodes) == set(mem.page_to_nid(pfns).tolist())
        assert 0 == alloc_pages_bulk(mem, GFP_KERNEL, nid, 1, nodes=()).size

    def test_reclaim_on_a_node_of_the_policy(self):
        """Direct reclaim is asked where its pages can be used."""
        mem = memory(*MIXED)
        alloc_pages_bulk(mem, GFP_KERNEL, 1, 20_000, nodes={1})
        asked = []
        for node in mem.nodes:
            node.reclaim = lambda gfp, wanted, nid=node.nid: asked.append(nid) or 0

        alloc_pages_bulk(mem, GFP_KERNEL, 0, 1, nodes={1})

        assert [1] == asked

    @pytest.mark.parametrize("step", [1, 2])
    def test_zero_wipes_the_contents(self, step):
        """ZERO leaves nothing of what was there, in one run or in fragments."""
        mem = memory(600, payload=True)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 500)
        mem.payload[:] = 7
        put(mem, held[::step])

        got = alloc_pages_bulk(mem, GFP_KERNEL | Gfp.ZERO, 0, 250)

        assert 250 == got.size
        assert not mem.payload[got].any()
        assert mem.payload[np.setdiff1d(held, got)].all()

    def test_pages_on_another_cpus_list_are_found(self):
        """A request that falls short empties the per-CPU lists before it gives up."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)
        put(mem, held[:20], cpu=1)

        assert 15 == alloc_pages_bulk(mem, GFP_KERNEL, 0, 15, cpu=0).size
        assert 5 == alloc_pages_bulk(mem, GFP_KERNEL, 0, 100, cpu=0).size

    def test_reclaim_is_asked_while_it_helps(self):
        """Direct reclaim hears what is wanted, and what it frees is taken, as long as it does."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)
        asked, yields = [], [held[:60], held[60:70], held[:0]]

        def reclaim(nids, wanted):
            asked.append((nids, wanted))
            freed = yields[len(asked) - 1]
            put(mem, freed)
            return freed.size

        mem.nodes[0].reclaim = reclaim

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 100)

        assert [([0], 100)] * 3 == asked
        assert 70 == got.size

    def test_reclaim_in_vain_is_given_up(self):
        """Frames that are freed where the request may not look do not keep it busy for ever."""
        mem = memory(4096)
        alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)
        asked = []
        mem.nodes[0].reclaim = lambda *args: asked.append(args) or 1

        assert 0 == alloc_pages_bulk(mem, GFP_KERNEL, 0, 1).size
        assert MAX_RECLAIM_RETRIES == len(asked)

    def test_kswapd_is_woken_when_every_zone_is_low(self):
        """Not before: what is above the low watermark somewhere is taken from there."""
        mem = memory(DMA_END, DMA_END)
        woken = []
        for node in mem.nodes:
            node.kswapd = lambda nid=node.nid: woken.append(nid) or 0
        zones = system_zones(mem)
        spare = sum(zone.nr_free - zone.watermark[1] for zone in zones)

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, spare - zones[1].lowmem_reserve.get("DMA", 0))
        assert [] == woken
        more = alloc_pages_bulk(mem, GFP_KERNEL, 0, 1)

        assert [0, 1] == woken
        assert 1 == more.size
        assert [zone.watermark[1] for zone in zones] != [zone.nr_free for zone in zones]
        put(mem, np.concatenate((got, more)))

    def test_reclaim_is_for_those_who_may_wait(self):
        """A request without DIRECT_RECLAIM fails at once."""
        mem = memory(4096)
        alloc_pages_bulk(mem, GFP_ATOMIC, 0, 5000)
        mem.nodes[0].reclaim = lambda nids, wanted: pytest.fail("reclaimed")

        assert 0 == alloc_pages_bulk(mem, GFP_ATOMIC, 0, 100).size

    def test_unknown_node_is_refused(self):
        """The message says which nodes there are."""
        with pytest.raises(InvalidArgument, match=r"no node 2, only 0\.\.1"):
            alloc_pages_bulk(memory(*MIXED), GFP_KERNEL, 2, 1)

    def test_page_in_use_is_not_handed_out(self):
        """A free page that somebody writes to is a bug, not an allocation."""
        mem = memory(4096)
        mem.refcount[:] = 1

        with pytest.raises(KernelBug, match=r"allocated, but in use .* pfn 0x"):
            alloc_pages_bulk(mem, GFP_KERNEL, 0, 1)

    def test_counters_and_events(self):
        """Allocation and freeing are counted by zone and told to whoever listens."""
        mem = memory(*MIXED)
        heard = []

        with mem.vmstat.counting() as delta, trace.listen(lambda e, _: heard.append(e), "mm_page*"):
            held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)
            put(mem, held[:100])

        dma = np.count_nonzero(held < DMA_END)
        expected = {"pgalloc_dma": dma, "pgalloc_dma32": 5000 - dma, "pgfree": 100}
        expected |= {"numa_hit": 5000, "numa_local": 5000}
        assert expected | {"nr_free_pages": -4900} == delta
        assert ["mm_page_alloc", "mm_page_free"] == heard


class TestAllocPages:
    @pytest.mark.parametrize("order", range(MAX_ORDER))
    def test_block_is_aligned_and_its_head_is_held(self, order):
        """Only the first page of a block has a reference, and the block starts at its size."""
        mem = memory(8192)

        pfn = alloc_pages(mem, GFP_KERNEL, order, 0)

        assert 0 == pfn % (1 << order)
        assert [1] + [0] * ((1 << order) - 1) == mem.refcount[pfn : pfn + (1 << order)].tolist()
        verify(mem)

    def test_no_block_of_that_order(self):
        """Fragmented memory has pages, but no block; the message shows what there is."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)
        put(mem, held[(held % 4 == 0) | (held % 4 == 1)])

        with pytest.raises(OutOfMemory) as error:
            alloc_pages(mem, GFP_KERNEL, 7, 0)

        assert "wanted a block of order 7 (0x80 pages) on node 0 with gfp 0x20;" in str(error.value)
        assert "free are node 0 DMA [0x1, 0x1000): 2*4kB " in str(error.value)
        assert "*8kB" in str(error.value)
        assert "ask for a lower order" in str(error.value)

    def test_order_beyond_the_largest_block(self):
        """Orders are 0 to 10."""
        with pytest.raises(InvalidArgument, match=r"order 11 is not in 0\.\.10"):
            alloc_pages(memory(4096), GFP_KERNEL, 11, 0)


class TestFreePagesBulk:
    def test_free_pages_are_blank(self):
        """A free page keeps no flag, owner or offset of its last user."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 100)
        mem.flags[held] = PG_uptodate | PG_dirty
        mem.index[held] = mem.private[held] = 5

        put(mem, held)

        verify(mem)

    def test_debug_fills_freed_frames_with_junk(self):
        """Who reads freed memory while debugging sees 0xaa; others lose no time."""
        for debug, expected in ((True, 0xAA), (False, 7)):
            mem = memory(600, payload=True, debug=debug)
            held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 300)
            mem.payload[:] = 7

            put(mem, held[::3])

            assert (mem.payload[held[::3]] == expected).all()
            assert (mem.payload[held[1::3]] == 7).all()

    def test_any_order_merges(self):
        """Pages freed in random order become the blocks they came from."""
        mem = memory(*MIXED)
        at_boot = all_blocks(mem)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)

        put(mem, np.random.default_rng(0).permutation(held))

        assert at_boot == all_blocks(mem)

    def test_blocks_end_where_zones_do(self):
        """Free buddies on two sides of a border stay apart."""
        mem = memory(1001, 1047)
        for zone in system_zones(mem):
            zone.watermark = (0, 0, 0)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 4000)
        assert 2047 == held.size

        put(mem, held)

        assert [(1000, 0), (1001, 0)] == [b for b in all_blocks(mem) if b[0] in (1000, 1001)]
        verify(mem)

    def test_few_pages_stay_with_the_cpu(self):
        """The page freed last is the first that its CPU gets again."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 100)

        put(mem, held[40:41], cpu=1)

        assert held[40] == alloc_pages_bulk(mem, GFP_KERNEL, 0, 1, cpu=1)[0]

    def test_long_per_cpu_list_gives_a_batch_back(self):
        """No per-CPU list keeps more than its high mark."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 1000)

        for pfn in held[:500]:
            put(mem, pages(pfn))

        (zone,) = system_zones(mem)
        assert PCP_HIGH - PCP_BATCH < zone.pcp[0].size <= PCP_HIGH
        verify(mem)

    @pytest.mark.parametrize(
        ("column", "value"),
        [("refcount", 1), ("mapcount", 1), ("mapping", 5), ("flags", int(PG_locked))],
    )
    def test_page_in_use_is_refused(self, column, value):
        """A page that anybody still refers to is named, and nothing is freed."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 100)
        mem.refcount[held] = 0
        getattr(mem, column)[held[7]] = value

        with pytest.raises(KernelBug, match=rf"freed, but in use .*: pfn {held[7]:#x};"):
            free_pages_bulk(mem, held)

        assert mem.max_pfn - 1 - 100 == nr_free_pages(mem)

    @pytest.mark.parametrize("count", [1, 31, 32, 3000])
    def test_double_free_is_refused(self, count):
        """A page on a per-CPU list, in a small block or deep in a large one is free already."""
        mem = memory(8192)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, count)
        put(mem, held)

        with pytest.raises(KernelBug, match=rf"free already: pfn .*{held[-1]:#x}"):
            free_pages_bulk(mem, held[-1:])
        verify(mem)

    def test_double_free_is_seen_without_debug_too(self):
        """The first page of a free block is known at a glance."""
        mem = memory(8192, debug=False)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 64)
        put(mem, held[:1])
        drain_all_pages(mem)
        mem.refcount[held] = 0

        with pytest.raises(KernelBug, match=f"free already: pfn {held[0]:#x}; .* free_order 1"):
            free_pages_bulk(mem, held)

    def test_page_twice_in_one_call_is_refused(self):
        """Each page is freed once."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 20)
        mem.refcount[held] = 0

        with pytest.raises(KernelBug, match=f"twice in one call: pfn {held[3]:#x};"):
            free_pages_bulk(mem, np.append(held, held[3]))

    @pytest.mark.parametrize("pfn", [-1, 0, 4096])
    def test_what_is_no_system_memory_is_refused(self, pfn):
        """The hole at PFN 0 and device memory are not the allocator's."""
        with pytest.raises(KernelBug, match=f"no system memory: pfn {pfn:#x}"):
            free_pages_bulk(memory(4096), pages(pfn))

    def test_message_names_eight_pages(self):
        """A long list of bad pages is cut."""
        with pytest.raises(KernelBug, match=r"0x1008 and 92 more"):
            free_pages_bulk(memory(4096), np.arange(4097, 4197))

    def test_no_page(self):
        """An empty vector is fine."""
        mem = memory(4096)
        free_pages_bulk(mem, pages())
        verify(mem)


class TestFreePages:
    def test_last_reference_frees_the_block(self):
        """A block with two holders outlives the first."""
        mem = memory(4096)
        at_boot = all_blocks(mem)
        pfn = alloc_pages(mem, GFP_KERNEL, 5, 0)
        mem.refcount[pfn] += 1

        free_pages(mem, pfn, 5)
        assert at_boot != all_blocks(mem)
        free_pages(mem, pfn, 5)

        assert at_boot == all_blocks(mem)
        with pytest.raises(KernelBug, match=f"nobody holds it: pfn {pfn:#x}"):
            free_pages(mem, pfn, 5)

    def test_block_may_go_page_by_page(self):
        """What came as a block can be freed as single pages."""
        mem = memory(4096)
        at_boot = all_blocks(mem)
        pfn = alloc_pages(mem, GFP_KERNEL, 3, 0)

        put(mem, np.arange(pfn, pfn + 8))

        assert at_boot == all_blocks(mem)

    @pytest.mark.parametrize(("pfn", "order"), [(8, 4), (16, 11), (16, -1), (0, 0), (4096, 0)])
    def test_no_such_block(self, pfn, order):
        """A block starts at a multiple of its size, in system memory."""
        with pytest.raises(KernelBug, match="no block of order"):
            free_pages(memory(4096), pfn, order)


class TestStaleItems:
    def test_lists_do_not_grow_with_their_past(self):
        """Merging leaves stale items behind, which are shed before a list grows."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 3000)
        for _ in range(50):
            put(mem, held[::2])
            put(mem, held[1::2])
            held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 3000)

        (zone,) = system_zones(mem)
        assert sum(area.items.size for area in zone.free_area) < 4 * 4096
        verify(mem)

    def test_block_listed_twice_is_handed_out_once(self):
        """A block that was merged away and came back has two items and one owner."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 5000)
        pair = held[100:102] if held[100] % 2 == 0 else held[101:103]
        for _ in range(5):
            free_page_and_drain(mem, pair[0])
            free_page_and_drain(mem, pair[1])
            assert pair.tolist() == alloc_pages_bulk(mem, GFP_KERNEL, 0, 2).tolist()
        free_page_and_drain(mem, pair[0])

        got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 40)

        assert [pair[0]] == got.tolist()
        verify(mem)


def free_page_and_drain(mem, pfn):
    put(mem, pages(pfn))
    drain_all_pages(mem)


class TestIsFreeBuddyPage:
    def test_pages_in_blocks_and_on_per_cpu_lists(self):
        """A page is free wherever in a block it lies, and on a per-CPU list."""
        mem = memory(4096)
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 100)
        free_in_block = np.flatnonzero(mem.free_order)[-1] + 3
        put(mem, held[5:6])

        mask = is_free_buddy_page(mem, np.sort(pages(held[4], held[5], free_in_block)))

        expected = {held[4].item(): False, held[5].item(): True, free_in_block.item(): True}
        assert [expected[pfn] for pfn in sorted(expected)] == mask.tolist()


class TestCheckZone:
    """Each rule of the free lists is broken in turn."""

    def complaints(self, spoil):
        mem = memory(4000, 96, debug=False)
        free_pages_bulk(mem, self.held(mem)[:3])
        zone = mem.nodes[0].zones[0]
        assert [] == check_zone(mem, zone)
        spoil(mem, zone)
        return " ".join(check_zone(mem, zone))

    def held(self, mem):
        held = alloc_pages_bulk(mem, GFP_KERNEL, 0, 101)
        mem.refcount[held[:3]] = 0
        return held

    @pytest.mark.parametrize(
        ("order", "pfn", "complaint"),
        [
            (12, 1024, "free block of no order: pfn 0x400"),
            (3, 1025, "free block is not aligned: pfn 0x401"),
            (11, 3072, "free block ends outside the zone: pfn 0xc00"),
            (2, 3000, "free block overlaps the next one: pfn 0x800"),
            (2, 3000, "free block is on no list: pfn 0xbb8"),
            (2, 3000, "nr_free is 3898, but 3900 pages are in blocks"),
        ],
    )
    def test_blocks(self, order, pfn, complaint):
        """Blocks are aligned, apart, inside their zone, listed and counted."""

        def spoil(mem, zone):
            mem.free_order[pfn] = order

        assert complaint in self.complaints(spoil)

    def test_buddies_merge(self):
        """Two free halves are one block."""

        def spoil(mem, zone):
            mem.free_order[[2048, 2048 + 512]] = 10

        assert "free block has a free buddy: pfn 0x800, 0xa00" in self.complaints(spoil)

    def test_zone_of_a_block(self):
        """A block lies in the zone that its column says."""

        def spoil(mem, zone):
            mem.zone[2048] = 2

        assert "free block says another zone: pfn 0x800" in self.complaints(spoil)

    @pytest.mark.parametrize("column", ["refcount", "mapcount", "mapping", "index", "private"])
    def test_row_of_a_free_page(self, column):
        """Free pages are blank, deep in a block and on a per-CPU list."""

        def spoil(mem, zone):
            getattr(mem, column)[[2048 + 77, zone.pcp[0].live()[0]]] = 1

        found = self.complaints(spoil)
        assert f"free page has a {column}: pfn 0x" in found
        assert "0x84d" in found
        assert 2 == found.count(" 0x") + found.count(", 0x") - found.count(", 0x")

    def test_per_cpu_lists(self):
        """A per-CPU list holds pages of its zone, each once and in no block."""

        def spoil(mem, zone):
            zone.pcp[1].push(np.append(zone.pcp[0].live()[:1], [2049, 4050]))

        found = self.complaints(spoil)
        assert "per-CPU list holds a page outside the zone: pfn 0xfd2" in found
        assert "page is twice on per-CPU lists: pfn 0x" in found
        assert "page is on a per-CPU list and in a free block: pfn 0x801" in found
