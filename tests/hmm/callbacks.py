"""Callbacks of a driver that does what its device does, with something odd before or after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from devices import Driver
from devices.memory import Direction
from hmm import MigrateVma, MigrateVmaSelect, migrate_vma
from hmm.migrate_pfn import MIGRATE_PFN_LOCKED, MigratePfns, migrate_pfn, migrate_pfn_to_pfn
from mm.filemap import lock_page, unlock_page
from mm.gfp import GFP_HIGHUSER_MOVABLE
from mm.page_alloc import alloc_pages_bulk
from mm.swap import get_page, put_page
from mm.types import Vma
from tests.world import World

Step = Callable[[MigratePfns, MigratePfns], object]


def nothing(src: MigratePfns, dst: MigratePfns) -> None:
    """What most drivers add to their callbacks."""


@dataclass
class Callbacks:
    """Those of the device of *world*, in *direction*; each of the others gets (src, dst).

    before, after: run around the device's alloc_and_copy(); mapping: in finalize_and_map(),
    before the device's own. direction: None where the device takes no part. calls: the callbacks
    that were called, with their arguments.
    """

    world: World
    before: Step = nothing
    after: Step = nothing
    mapping: Step = nothing
    direction: Direction | None = Direction.TO_DEVICE
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def alloc_and_copy(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> None:
        self.calls.append(("alloc_and_copy", vma, start, end, private))
        self.before(src, dst)
        if self.direction is not None:
            self.world.gpu.alloc_and_copy(vma, src, dst, start, end, self.direction)
        self.after(src, dst)

    def finalize_and_map(
        self, vma: Vma, src: MigratePfns, dst: MigratePfns, start: int, end: int, private: Any
    ) -> None:
        self.calls.append(("finalize_and_map", vma, start, end, private))
        self.mapping(src, dst)
        if self.direction is not None:
            self.world.gpu.finalize_and_map(vma, src, dst, start, end, self.direction)

    @property
    def names(self) -> list[str]:
        """The callbacks that were called, in order."""
        return [call[0] for call in self.calls]


def migrate(
    world: World,
    before: Step = nothing,
    after: Step = nothing,
    mapping: Step = nothing,
    *,
    back: bool = False,
    **options: Any,
) -> MigrateVma:
    """migrate_vma() over the range of *world* to its device, or *back*, with odd callbacks."""
    direction = Direction.TO_SYSTEM if back else Direction.TO_DEVICE
    select = MigrateVmaSelect.DEVICE_PRIVATE if back else MigrateVmaSelect.SYSTEM
    ops = Callbacks(world, before, after, mapping, direction)
    return migrate_with(ops, **{"select": select} | options)


def look_on(world: World, step: Step = nothing, **options: Any) -> MigrateVma:
    """migrate_vma() by a driver that only looks, and takes no page."""
    options = {"pgmap_owner": None} | options
    return migrate_with(Callbacks(world, step, direction=None), **options)


def migrate_with(ops: Callbacks, **options: Any) -> MigrateVma:
    """migrate_vma() over the range of its world with *ops*; the driver names itself as owner."""
    world = ops.world
    src, dst = np.zeros((2, world.pages), dtype=np.uint64)
    options = {"pgmap_owner": world.gpu.owner, "private": "private"} | options
    start, end = world.addr, world.addr + world.nbytes
    return migrate_vma(ops, world.vma, start, end, src, dst, **options)


def raises(error: BaseException) -> Step:
    """A step that fails with *error*."""

    def fail(src: MigratePfns, dst: MigratePfns) -> None:
        raise error

    return fail


def frame(world: World) -> int:
    """A frame of system memory with one reference."""
    return alloc_pages_bulk(world.machine.mem, GFP_HIGHUSER_MOVABLE, 0, 1).item()


def device_page(device: Driver) -> int:
    """A page of *device*, in use, with one reference more than a free one."""
    page = device.allocate(1)
    device.chunks.take(page)
    get_page(device.mem, device.zone.start_pfn + page)
    return device.zone.start_pfn + page.item()


def hand_over(world: World, dst: MigratePfns, i: int, pfn: int) -> None:
    """Lock *pfn*, which the driver has for itself, and name it as the destination of entry *i*."""
    lock_page(world.machine.mem, np.array([pfn]))
    dst[i] = migrate_pfn(np.array([pfn]))[0] | MIGRATE_PFN_LOCKED


def instead(world: World, answers: dict[int, int]) -> Step:
    """A step after the device's own: give these destinations back, and answer so instead."""

    def answer(src: MigratePfns, dst: MigratePfns) -> None:
        for i, word in answers.items():
            pfn = migrate_pfn_to_pfn(dst[i : i + 1])
            unlock_page(world.machine.mem, pfn)
            put_page(world.machine.mem, pfn)
            dst[i] = word

    return answer
