"""What the structures say of themselves."""

import numpy as np
import pytest

from mm import Machine
from mm.types import (
    COLUMNS,
    VM_EXEC,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    Vma,
    linear_page_index,
    page_anon,
    vm_get_page_prot,
    vma_is_anonymous,
    vma_pages,
)
from mm.typing import PAGE_SIZE, pages
from tests.world import mapped_range

PRESENT, RW, USER, ACCESSED, PROTNONE = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 8
NX = 1 << 63
USABLE = PRESENT | USER | ACCESSED


class TestVmGetPageProt:
    @pytest.mark.parametrize(
        ("vm_flags", "bits"),
        [
            (0, PROTNONE | ACCESSED),
            (VM_READ, USABLE | NX),
            (VM_WRITE, USABLE | NX),
            (VM_READ | VM_WRITE, USABLE | NX),
            (VM_EXEC, USABLE),
            (VM_READ | VM_WRITE | VM_EXEC, USABLE),
            (VM_READ | VM_SHARED, USABLE | NX),
            (VM_READ | VM_WRITE | VM_SHARED, USABLE | NX | RW),
        ],
    )
    def test_bits(self, vm_flags, bits):
        """A private mapping starts read-only: a store must fault first."""
        prot = vm_get_page_prot(vm_flags)

        assert bits == int(prot)
        assert np.uint64 == prot.dtype


class TestVma:
    def test_pages_and_offsets(self):
        """A page is known by its offset, which a split does not change."""
        mm = Machine(("1MiB",), max_physmem="1MiB").spawn().mm
        vma = Vma(mm, 0x5000, 0x9000, VM_READ, 0x100)

        assert 4 == vma_pages(vma)
        assert [0x101, 0x103] == linear_page_index(vma, pages(0x6000, 0x8000)).tolist()
        assert vma_is_anonymous(vma)


class TestMemMap:
    def test_columns(self):
        """Each is as it is declared, and reaches to the end of physical address space."""
        mem = Machine(("1MiB",), max_physmem="3MiB").mem
        stored = {c.name: (getattr(mem, c.name).dtype, getattr(mem, c.name).size) for c in COLUMNS}

        assert {c.name: (np.dtype(c.dtype), 768) for c in COLUMNS} == stored
        assert [] == [c.name for c in COLUMNS if not c.meaning or not c.struct_page]

    def test_kinds_of_pages(self):
        """System memory, device memory, and to whom anonymous pages belong."""
        world = mapped_range(pages=2)
        world.gpu.to_device(world.process, world.at(1), PAGE_SIZE)
        mem, pfns = world.machine.mem, pages(*world.pfns(), world.machine.mem.zero_pfn)

        assert [False, True, False] == mem.is_zone_device_page(pfns).tolist()
        assert [False, True, False] == mem.is_device_private_page(pfns).tolist()
        assert [False] * 3 == mem.is_device_public_page(pfns).tolist()
        assert [True, True, False] == page_anon(mem, pfns).tolist()
        assert [0, -1, 0] == mem.page_to_nid(pfns).tolist()
