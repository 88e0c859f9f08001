"""Ranges of addresses, as devices are asked to move them: cut at VMA borders, or as masks."""

from __future__ import annotations

import numpy as np

from mm.errors import InvalidRange
from mm.mmap import find_vma
from mm.types import MmStruct, Vma
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Mask


def page_mask(addrs: Addresses, start: int, end: int) -> Mask | None:
    """Which pages of [*start*, *end*) are at *addrs* (ascending); None if all of them."""
    npages = (end - start) >> PAGE_SHIFT
    if addrs.size == npages:
        return None
    mask = np.zeros(npages, dtype=np.bool_)
    mask[(addrs - start) >> PAGE_SHIFT] = True
    return mask


def vma_spans(mm: MmStruct, addr: int, nbytes: int) -> list[tuple[Vma, int, int]]:
    """[*addr*, *addr* + *nbytes*), rounded to whole pages, cut at VMA borders."""
    start, end = addr & ~(PAGE_SIZE - 1), (addr + nbytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
    if nbytes <= 0:
        raise InvalidRange(f"a range of {nbytes} bytes at {addr:#x} holds no page")
    spans = []
    at = start
    while at < end:
        vma = find_vma(mm, at)
        if vma is None or vma.vm_start > at:
            raise InvalidRange(f"[{start:#x}, {end:#x}): nothing is mapped at {at:#x} of {mm.name}")
        spans.append((vma, at, min(end, vma.vm_end)))
        at = vma.vm_end
    return spans
