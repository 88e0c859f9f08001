"""Sizes as people write them.

Linux: memparse(), lib/cmdline.c.
"""

from __future__ import annotations

import re
from operator import index
from typing import Final, TypeAlias

from mm.errors import InvalidArgument

Size: TypeAlias = int | str

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTP])(?:iB)?|B)?\s*", re.IGNORECASE)


def memparse(size: Size) -> int:
    """Bytes in *size*: an int of bytes, or a number with K, M, G, T, P (powers of 1024).

    >>> memparse("64MiB"), memparse("1.5G"), memparse(4096)
    (67108864, 1610612736, 4096)

    Raises InvalidArgument for anything else, and for a negative or fractional count of bytes.
    Linux: memparse(), lib/cmdline.c.
    """
    if hasattr(size, "__index__") and not isinstance(size, bool):
        nbytes = index(size)  # NumPy's integers are sizes too
        if nbytes < 0:
            raise InvalidArgument(f"a size cannot be negative, got {nbytes}")
        return nbytes
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise InvalidArgument(
            f'{size!r} is no size; write bytes as an int, or "64MiB", "2G", "512K"'
        )
    number, unit = match.groups()
    whole, _, fraction = number.partition(".")
    scaled = int(whole + fraction) << _UNITS[(unit or "").upper()]
    nbytes, rest = divmod(scaled, int(10 ** len(fraction)))
    if rest:
        raise InvalidArgument(f"{size!r} is not a whole number of bytes")
    return nbytes


def format_size(nbytes: int) -> str:
    """*nbytes* in the largest unit that keeps it short, as people read it: 16384 is "16 KiB"."""
    value, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    while value >= 1024 and unit != "PiB":
        value, unit = value / 1024, next(units)
    return f"{value:.4g} {unit}"
