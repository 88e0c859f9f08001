"""What becomes of one page that somebody wants to hold, to be read beside mm/gup.py.

A page is followed and faulted in, again and again, until it can be held: what the kernel's loop
does for one page after another, over four booleans and a word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Spot:
    """A page of a private mapping: none, zero, mapped (in system memory) or device.

    own: no other process maps it; new: it has taken the place of what was there at first.
    """

    kind: str
    write: bool = False
    dirty: bool = False
    soft_dirty: bool = False
    own: bool = False
    new: bool = False


@dataclass(frozen=True)
class Area:
    """The mapping: which rights it gives, and whether nobody watches its soft-dirty bits."""

    read: bool
    write: bool
    unwatched: bool = False


@dataclass(frozen=True)
class Wish:
    """How a page is to be held."""

    write: bool
    pin: bool
    longterm: bool = False
    force: bool = False


def allowed(area: Area, wish: Wish) -> bool:
    """May the mapping be used so at all?"""
    return wish.force or (area.write if wish.write else area.read)


def get_page(spot: Spot, area: Area, wish: Wish) -> tuple[Spot, int]:
    """The page as it is once it is held, and how many faults that took."""
    faults = 0
    while (need := look(spot, area, wish)) != "nothing":
        spot = fault(spot, area, need)
        faults += 1
        assert faults < 10
    return spot, faults


def look(spot: Spot, area: Area, wish: Wish) -> str:
    """Which fault must come first: read, write, unshare, or nothing."""
    if spot.kind in ("none", "device"):
        return "write" if wish.write else "read"
    if spot.write:
        return "nothing"
    if wish.write:
        forced = wish.force and not area.write and spot.kind == "mapped" and spot.own
        return "nothing" if forced and (area.unwatched or spot.soft_dirty) else "write"
    if wish.pin and not spot.own and (spot.kind == "mapped" or wish.longterm):
        return "unshare"
    return "nothing"


def fault(spot: Spot, area: Area, need: str) -> Spot:
    """What one fault makes of the page."""
    if spot.kind == "none" and need == "read":
        return Spot("zero", new=True)
    if spot.kind == "none":
        stored = area.write
        return Spot("mapped", write=stored, dirty=stored, soft_dirty=stored, own=True, new=True)
    if spot.kind == "device":
        return replace(spot, kind="mapped", write=spot.write and area.write, dirty=False, new=True)
    if spot.own and need == "unshare":
        return spot
    copied = not spot.own
    if need == "unshare":
        return Spot("mapped", soft_dirty=spot.soft_dirty, own=True, new=True)
    return Spot(
        "mapped", write=area.write, dirty=True, soft_dirty=True, own=True, new=spot.new or copied
    )
