"""Which VMAs share an anon_vma."""

from __future__ import annotations

import pytest

from mm.anon_vma import anon_vma_prepare
from mm.mempolicy import Mempolicy, Mpol
from mm.pgtable import PMD_SIZE
from mm.typing import PAGE_SIZE
from tests.world import mapped_range


def map_at(process, addr, prot="rw"):
    process.mmap(PAGE_SIZE, prot, addr=addr)
    return process.find_vma(addr)


class TestAnonVmaPrepare:
    @pytest.mark.parametrize("prot", ["rwx", "w"])
    def test_shared_with_a_neighbour(self, prot):
        """Areas that could merge, but for their rights, share one."""
        world = mapped_range(pages=3, filled=False)
        for page in (0, 2):
            world.process.mprotect(world.at(page), PAGE_SIZE, prot)
        world.process.touch(world.at(1), PAGE_SIZE)
        below, middle, above = world.process.mm.vmas

        shared = {anon_vma_prepare(vma) for vma in (below, above)}

        assert {middle.anon_vma} == shared

    def test_own_where_the_neighbour_is_another_kind(self):
        """Code and data do not share."""
        world = mapped_range(pages=1, addr=PMD_SIZE)
        above = map_at(world.process, PMD_SIZE + PAGE_SIZE, "rx")

        assert world.vma.anon_vma is not anon_vma_prepare(above)

    def test_own_where_the_neighbour_has_another_policy(self):
        """Areas whose pages come from other nodes do not become one."""
        world = mapped_range(pages=1, addr=PMD_SIZE)
        above = map_at(world.process, PMD_SIZE + PAGE_SIZE, "r")
        above.vm_policy = Mempolicy(Mpol.BIND, (0,))

        assert world.vma.anon_vma is not anon_vma_prepare(above)

    def test_own_where_there_is_no_neighbour(self):
        """A gap of one page is enough, and so is another process."""
        world = mapped_range(pages=1, addr=PMD_SIZE)
        far = map_at(world.process, PMD_SIZE + 2 * PAGE_SIZE)
        other = map_at(world.machine.spawn(), PMD_SIZE + PAGE_SIZE)

        assert 3 == len({world.vma.anon_vma, anon_vma_prepare(far), anon_vma_prepare(other)})

    def test_once(self):
        """The second call finds what the first made."""
        world = mapped_range(pages=1, filled=False)

        assert anon_vma_prepare(world.vma) is anon_vma_prepare(world.vma)
