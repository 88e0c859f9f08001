"""Whether page tables, VMAs and notifiers fit together: the part of mm/debug.py about those."""

from __future__ import annotations

import numpy as np

from mm.census import Census, Complaints, complain, used_entries
from mm.mmu_notifier import EXTRAS
from mm.page_cache import page_in_cache
from mm.page_flags import PG_swapbacked
from mm.pagewalk import walk_page_range
from mm.pgtable import (
    PTRS_PER_PTE,
    pte_devmap,
    pte_pfn,
    pte_present,
    pte_special,
    pte_uffd_wp,
    pte_write,
)
from mm.swapops import (
    is_device_exclusive_entry,
    is_device_private_entry,
    is_hwpoison_entry,
    is_migration_entry,
    is_pte_marker,
    is_swap_entry,
    is_write_device_exclusive_entry,
    is_write_device_private_entry,
    pte_swp_exclusive,
    pte_swp_uffd_wp,
    swp_offset,
    swp_type,
)
from mm.types import VM_LOCKED, VM_UFFD_FLAGS, VM_UFFD_WP, VM_WRITE, MemMap, Vma, vma_pages
from mm.typing import PAGE_SHIFT, Addresses, Mask, Ptes
from mm.vectors import some


def check_entries(mem: MemMap, census: Census) -> Complaints:
    """Every entry maps a page that may be there, with rights that the VMA gives."""
    for mm in mem.mms:
        anon = filed = shmem = swapents = 0
        for vma, addrs, ptes in used_entries(mm):
            present, special = pte_present(ptes), pte_special(ptes)
            private, moving = is_device_private_entry(ptes), is_migration_entry(ptes)
            poisoned, taken = is_hwpoison_entry(ptes), is_device_exclusive_entry(ptes)
            swapped, slots = is_swap_entry(ptes), swp_offset(ptes)
            there = np.where(present, pte_pfn(ptes), slots)
            there = there[(present & ~special) | private | moving | taken]
            there = there[(there >= 0) & (there < mem.limit_pfn)]
            cached = page_in_cache(mem, there)
            swapbacked = cached & ((mem.flags[there] & PG_swapbacked) != 0)
            anon += int(np.count_nonzero(~cached))
            filed += int(np.count_nonzero(cached & ~swapbacked))
            shmem += int(np.count_nonzero(swapbacked))
            swapents += int(np.count_nonzero(swapped))
            marked = is_pte_marker(ptes)
            odd = ~(present | private | moving | poisoned | taken | swapped | marked)
            odd |= present & special & (pte_pfn(ptes) != mem.zero_pfn)
            odd |= swapped & ((swp_type(ptes) != 0) | (slots == 0) | (slots >= mem.swap.max))
            yield from complain("page table", addrs, odd, f"an entry of no kind in {vma!r}")
            writable = (present & pte_write(ptes)) | is_write_device_private_entry(ptes)
            writable |= is_write_device_exclusive_entry(ptes)
            if not vma.vm_flags & VM_WRITE:
                yield from complain("page table", addrs, writable, f"writable in {vma!r}")
            guarded = marked | np.where(present, pte_uffd_wp(ptes), pte_swp_uffd_wp(ptes))
            if not mm.uffd_wp:
                rule = f"uffd-wp, which {mm.name} has never had, in {vma!r}"
                yield from complain("page table", addrs, guarded, rule)
            if vma.vm_flags & VM_UFFD_WP:
                rule = f"writable though it is uffd-wp in {vma!r}"
                yield from complain("page table", addrs, guarded & writable, rule)
            lost = moving & ((swp_offset(ptes) < 0) | (swp_offset(ptes) >= mem.limit_pfn))
            yield from complain("page table", addrs, lost, f"no such frame in {vma!r}")
            own = swapped & pte_swp_exclusive(ptes) & ~odd
            own[own] = census.swapped[slots[own]] != 1
            yield from complain("page table", addrs, own, f"others hold the slot too, {vma!r}")
            yield from _check_owner(mem, vma, addrs, ptes, present & ~special, private | taken)
        held = {"anon_rss": anon, "file_rss": filed, "shmem_rss": shmem, "swapents": swapents}
        for name, count in held.items():
            if getattr(mm, name) != count:
                yield f"{name}: {mm.name} says {getattr(mm, name)}, its page tables hold {count}"


def _check_owner(
    mem: MemMap, vma: Vma, addrs: Addresses, ptes: Ptes, normal: Mask, away: Mask
) -> Complaints:
    """The page behind each entry is of the right kind, and its rmap leads back here."""
    pfns = np.concatenate((pte_pfn(ptes[normal]), swp_offset(ptes[away])))
    places = np.concatenate((addrs[normal], addrs[away]))
    private, devmap = is_device_private_entry(ptes), pte_devmap(ptes) & normal
    device = np.concatenate((private[normal], private[away]))
    marked, mapped = (np.concatenate((bits[normal], bits[away])) for bits in (devmap, normal))
    outside = (pfns < 0) | (pfns >= mem.limit_pfn)
    yield from complain("page table", pfns, outside, "no such frame")
    pfns, places, device = pfns[~outside], places[~outside], device[~outside]
    marked, mapped = marked[~outside], mapped[~outside]
    wrong = mem.is_device_private_page(pfns) != device
    yield from complain("page table", pfns, wrong, "entry and kind of memory do not agree")
    wrong = marked != (mapped & mem.is_device_public_page(pfns))
    yield from complain("page table", pfns, wrong, "devmap is for device-public memory")
    index = ((places - vma.vm_start) >> PAGE_SHIFT) + vma.vm_pgoff
    yield from complain("index", pfns, mem.index[pfns] != index, f"not its offset in {vma!r}")
    owners = [(a.number << 2) | 1 for a in vma.anon_vma_chain]
    rule = "not an anon_vma of"
    if vma.vm_file is not None:
        owners.append(vma.vm_file.f_mapping.number << 2)
        rule = "not the file or an anon_vma of"
    yield from complain("mapping", pfns, ~np.isin(mem.mapping[pfns], owners), f"{rule} {vma!r}")


def check_anon_vmas(mem: MemMap, census: Census) -> Complaints:
    """Each anon_vma lists exactly the VMAs that name it, of address spaces that live.

    What one lists its parent lists too.
    """
    named: dict[int, list[Vma]] = {number: [] for number in mem.anon_vmas}
    for mm in mem.mms:
        for vma in mm.vmas:
            for anon_vma in vma.anon_vma_chain:
                named.setdefault(anon_vma.number, []).append(vma)
    for number, vmas in named.items():
        listed = mem.anon_vmas[number].vmas if number in mem.anon_vmas else []
        if {id(v) for v in listed} != {id(v) for v in vmas} or not vmas:
            yield f"anon_vma: {number} lists {listed}, named by {vmas}"
        elif (parent := mem.anon_vmas[number].parent) and not set(vmas) <= set(parent.vmas):
            yield f"anon_vma: {number} lists {listed}, its parent {parent.vmas}"


def check_vmas(mem: MemMap, census: Census) -> Complaints:
    """VMAs ascend without overlap, on nodes that there are; nothing is mapped outside them."""
    nodes = {node.nid for node in mem.nodes}
    for mm in mem.mms:
        total, locked, end = 0, 0, 0
        for vma in mm.vmas:
            if vma.vm_policy is not None and not nodes.issuperset(vma.vm_policy.nodes):
                yield f"vm_policy: {vma!r} of {mm.name} wants {vma.vm_policy}"
            if not end <= vma.vm_start < vma.vm_end:
                yield f"vma: {vma!r} of {mm.name} overlaps what ends at {end:#x}"
            total += vma_pages(vma)
            locked += vma_pages(vma) if vma.vm_flags & VM_LOCKED else 0
            end = vma.vm_end
        if total != mm.total_vm:
            yield f"total_vm: {mm.name} says {mm.total_vm}, its VMAs span {total} pages"
        if locked != mm.locked_vm:
            yield f"locked_vm: {mm.name} says {mm.locked_vm}, {locked} pages are VM_LOCKED"
        inside = sum(ptes.size for _, _, ptes in used_entries(mm))
        runs = walk_page_range(mem.tables, mm.pgd, 0, 1 << 57, holes=False)
        everywhere = sum(int(np.count_nonzero(run.ptes)) for run in runs)
        if inside != everywhere:
            yield f"page table: {mm.name} maps {everywhere - inside} pages outside its VMAs"


def check_userfaultfds(mem: MemMap, census: Census) -> Complaints:
    """Nobody waits for userland; a VMA reports to an open fd of its address space, or to none."""
    for mm in mem.mms:
        if mm.uffd_events:
            yield f"uffd_events: nobody tells the userfaultfds of {mm.name} {mm.uffd_events}"
        for ctx in mm.userfaultfds:
            if ctx.mm is not mm or ctx.released:
                yield f"userfaultfds: {ctx!r} is not at home in {mm.name}"
            if waiting := ctx.fault_pending + ctx.faults:
                yield f"userfaultfds: {ctx!r} has {waiting[0].msg}, for which nobody waits"
            if ctx.mmap_changing != len(ctx.events):
                unread = len(ctx.events)
                yield f"mmap_changing: {ctx!r} says {ctx.mmap_changing}, {unread} are unread"
        for vma in mm.vmas:
            ctx, armed = vma.vm_userfaultfd_ctx, vma.vm_flags & VM_UFFD_FLAGS
            if (ctx is None) == bool(armed) or ctx not in (None, *mm.userfaultfds):
                yield f"vm_userfaultfd_ctx: {vma!r} of {mm.name} has {ctx!r} and flags {armed:#x}"


def check_notifiers(mem: MemMap, census: Census) -> Complaints:
    """Nothing is being invalidated; interval notifiers ascend, with counts that differ from it.

    Listeners with EXTRAS, and no others, are asked for those.
    """
    for mm in mem.mms:
        if mm.invalidating:
            yield f"invalidating: {mm.name} is between start and end of {mm.invalidating[0]}"
        elif mm.invalidate_seq & 1:
            yield f"invalidate_seq: {mm.name} says {mm.invalidate_seq}, and nothing is invalidated"
        for name in EXTRAS:
            having = [notifier for notifier in mm.notifiers if hasattr(notifier, name)]
            if having != mm.notifier_extras.get(name, []):
                yield f"notifier_extras: {mm.name} asks {mm.notifier_extras} for {name}"
        starts = [notifier.start for notifier in mm.interval_notifiers]
        if starts != sorted(starts):
            yield f"interval_notifiers: those of {mm.name} do not ascend"
        for notifier in mm.interval_notifiers:
            seq = notifier.invalidate_seq
            if notifier.mm is not mm or not notifier.start < notifier.end:
                yield f"interval_notifiers: {notifier!r} is not at home in {mm.name}"
            if not seq & 1 or seq > mm.invalidate_seq:
                yield f"invalidate_seq: {notifier!r} says {seq}, {mm.name} {mm.invalidate_seq}"


def check_tables(mem: MemMap) -> Complaints:
    """Each table in use is reached once; each free one is empty."""
    pool = mem.tables
    tables = pool.entries[: pool.fresh * PTRS_PER_PTE].reshape(-1, PTRS_PER_PTE)
    level = np.array([mm.pgd for mm in mem.mms] + mem.device_pgds, dtype=np.int64)
    reached = [level]
    for _ in range(4):
        entries = tables[level]
        level = pte_pfn(entries[entries != 0])
        if some(level >= pool.fresh):
            yield f"page table: an entry names table {level.max():#x}, which there is not"
            return
        reached.append(level)
    rows = np.concatenate(reached)
    idle = np.setdiff1d(np.arange(pool.fresh), rows)
    if np.unique(rows).size != rows.size or rows.size != pool.in_use:
        yield f"page table: {pool.in_use} tables are in use, {rows.size} are reached"
    if tables[idle].any():
        yield "page table: a free table holds entries"
    if mem.vmstat["nr_page_table_pages"] != pool.in_use:
        yield f"nr_page_table_pages: says {mem.vmstat['nr_page_table_pages']}, not {pool.in_use}"
