"""Which entries hold which pages."""

import numpy as np
import pytest

from mm.page_vma_mapped import page_vma_mapped_walk
from mm.pgtable import PMD_SIZE, mk_pte, pte_offset
from mm.swapops import make_device_private_entry, make_hwpoison_entry, make_migration_entry
from mm.typing import PAGE_SIZE, pages
from tests.world import mapped_range

PFN = 77
YES = np.ones(1, dtype=np.bool_)


@pytest.fixture
def world():
    return mapped_range(pages=4)


class TestPageVmaMappedWalk:
    @pytest.mark.parametrize(
        ("entry", "as_mapping", "as_migration"),
        [
            (mk_pte(pages(PFN), np.uint64(0x67)), True, False),
            (mk_pte(pages(PFN), np.uint64(0x100)), True, False),  # PROT_NONE
            (make_device_private_entry(pages(PFN), YES), True, False),
            (make_device_private_entry(pages(PFN), ~YES), True, False),
            (make_migration_entry(pages(PFN), YES), False, True),
            (make_migration_entry(pages(PFN), ~YES), False, True),
            (make_hwpoison_entry(pages(PFN)), False, False),
            (np.zeros(1, dtype=np.uint64), False, False),
        ],
    )
    def test_kinds_of_entry(self, world, entry, as_mapping, as_migration):
        """Present and device-private entries map a page; migration entries are asked for."""
        ptes, at = world.machine.mem.tables.entries, place(world, 0)
        before = ptes[at].copy()
        ptes[at] = entry

        mapped = walk(world, PFN, world.addr)
        moving = walk(world, PFN, world.addr, migration=True)
        others = [walk(world, PFN + 1, world.addr, migration=flag) for flag in (False, True)]
        ptes[at] = before

        assert (as_mapping, as_migration, [False, False]) == (mapped, moving, others)

    def test_place_of_each_entry(self, world):
        """The answer says where to write, for pages in any order."""
        order = [2, 0, 3, 1]

        at, mapped = page_vma_mapped_walk(world.vma, world.pfns()[order], world.addrs[order])

        assert [place(world, page).item() for page in order] == at.tolist()
        assert [True] * 4 == mapped.tolist()

    def test_mixed_vector(self, world):
        """Pages in system memory and in device memory are told apart from those elsewhere."""
        world.gpu.to_device(world.process, world.addr, 2 * PAGE_SIZE)
        pfns = world.pfns()
        pfns[[1, 3]] += 1

        _, mapped = page_vma_mapped_walk(world.vma, pfns, world.addrs)

        assert [True, False, True, False] == mapped.tolist()

    def test_no_table(self):
        """Where no table is, nothing is mapped."""
        world = mapped_range(pages=1, addr=PMD_SIZE, filled=False)

        assert not walk(world, 0, world.addr)
        assert not walk(world, 0, world.addr, migration=True)


def place(world, page):
    return pte_offset(world.machine.mem.tables, world.process.mm.pgd, pages(world.at(page)))


def walk(world, pfn, addr, **how):
    return page_vma_mapped_walk(world.vma, pages(pfn), pages(addr), **how)[1].item()
