"""How an allocation may look for a frame. Linux: include/linux/gfp.h."""

from __future__ import annotations

from enum import IntFlag


class Gfp(IntFlag):
    """Modifiers of an allocation; names and meaning as in Linux, numbers our own."""

    DMA = 1 << 0  # only frames below 16 MiB
    DMA32 = 1 << 1  # only frames below 4 GiB
    MOVABLE = 1 << 2  # the owner can find every mapping, so the page may be migrated
    HIGH = 1 << 3  # may use half of the reserve below the min watermark
    ATOMIC = 1 << 4  # cannot wait: may use a further quarter of it
    DIRECT_RECLAIM = 1 << 5  # may reclaim pages itself
    ZERO = 1 << 6  # contents are zeroed
    THISNODE = 1 << 7  # no other node will do


GFP_KERNEL = Gfp.DIRECT_RECLAIM
GFP_ATOMIC = Gfp.HIGH | Gfp.ATOMIC
GFP_USER = Gfp.DIRECT_RECLAIM
GFP_HIGHUSER_MOVABLE = Gfp.MOVABLE | Gfp.DIRECT_RECLAIM
GFP_READAHEAD = Gfp.MOVABLE  # Linux: readahead_gfp_mask()
