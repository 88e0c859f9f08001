"""What devices do, by the ioctls of the reference driver (hmm/dmirror.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from hmm.dmirror import Dmirror, DmirrorAnswer
from hmm.script.actor import MAX_PAGES, Actor
from hmm.script.answers import contents, error_name, pages_of_words, runs
from hmm.script.language import Choice
from hmm.script.operations import Answer, Refused, operation
from mm.errors import MmError
from mm.typing import PAGE_SHIFT

_MISALIGNED: Final = 8  # bytes that the option `unaligned` adds to the address

# The ioctls that take a range: what does it, and what the driver copies out.
_IOCTLS: Final = {
    "dread": (Dmirror.read, ("cpages", "faults", "data")),
    "migrate_to_dev": (Dmirror.migrate_to_device, ("cpages", "data")),
    "migrate_to_sys": (Dmirror.migrate_to_system, ("cpages",)),
    "snapshot": (Dmirror.snapshot, ("cpages", "perm")),
    "exclusive": (Dmirror.exclusive, ("cpages", "data")),
    "check_exclusive": (Dmirror.check_exclusive, ()),
}


def ioctl(actor: Actor, call: Callable[[], DmirrorAnswer | None], shown: tuple[str, ...]) -> Answer:
    """Let the driver do *call*, and show those fields of its answer, and the faults it took."""
    minor = actor.process.min_flt
    answer: Answer = {"ret": 0}
    try:
        answer |= _copied_out(call(), shown)
    except MmError as error:
        answer["ret"] = error_name(error)
    return answer | {"minflt": actor.process.min_flt - minor}


def _copied_out(got: DmirrorAnswer | None, shown: tuple[str, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in shown:
        value = getattr(got, name)
        if name == "data":
            fields |= contents(value)
        elif name == "perm":
            fields["perm"] = runs(f"{perm:02x}" for perm in value.tolist())
        else:
            fields[name] = value
    return fields


def _place(actor: Actor, name: str, first: int, n: int, unaligned: bool) -> int:
    """The address that the driver is given. Raises Refused."""
    addr = actor.pages(name, first).addr
    if n > actor.host.machine.mem.max_pfn:
        raise Refused("ENOMEM")  # for the buffer that the driver copies through
    return addr + _MISALIGNED * unaligned


def _range_ioctl(
    method: Callable[[Dmirror, int, int], DmirrorAnswer | None],
    shown: tuple[str, ...],
    actor: Actor,
    name: str,
    first: int,
    n: int,
    choice: Choice,
    *,
    unaligned: bool = False,
) -> Answer:
    addr = _place(actor, name, first, n, unaligned)
    mirror = actor.mirror(choice)
    return ioctl(actor, lambda: method(mirror, addr, n), shown)


for _name, (_method, _shown) in _IOCTLS.items():
    operation(f"{_name} NAME first n @ [unaligned]")(partial(_range_ioctl, _method, _shown))


@operation("dwrite NAME first n V @ [unaligned]")
def dwrite(
    actor: Actor,
    name: str,
    first: int,
    n: int,
    value: int,
    choice: Choice,
    *,
    unaligned: bool = False,
) -> Answer:
    """The device stores V + i in every word of page i."""
    addr = _place(actor, name, first, n, unaligned)
    mirror = actor.mirror(choice)
    data = pages_of_words(value, max(n, 0))
    return ioctl(actor, lambda: mirror.write(addr, n, data), ("cpages", "faults"))


@operation("drelease @")
def drelease(actor: Actor, choice: Choice) -> Answer:
    """The device gives its memory back."""
    return ioctl(actor, actor.mirror(choice).release, ())


@operation("dopen @")
def dopen(actor: Actor, choice: Choice) -> Answer:
    """Open the device, where that is not done."""
    actor.mirror(choice._replace(inherited=False))
    return {"ret": 0}


@operation("dclose @")
def dclose(actor: Actor, choice: Choice) -> Answer:
    """Close it; the last to close its file lets it evict all that it has, of any process."""
    if choice.device not in actor.mirrors:
        raise Refused("EBADF")
    actor.put(actor.mirrors.pop(choice.device))
    return {"ret": 0}


@operation("bench NAME first n reps @", counted=False)
def bench(actor: Actor, name: str, first: int, n: int, reps: int, choice: Choice) -> Answer:
    """Time migrations of the range to the device and back."""
    pages = actor.pages(name, first, n)
    mirror = actor.mirror(choice)
    there = back = 0.0
    migrated = 0
    for _ in range(reps):
        actor.process.touch(pages.addr, pages.nbytes)
        start = time.perf_counter()
        for chunk in range(0, n, MAX_PAGES):
            count = min(n - chunk, MAX_PAGES)
            got = mirror.migrate_to_device(pages.addr + (chunk << PAGE_SHIFT), count)
            migrated += got.cpages
        middle = time.perf_counter()
        for chunk in range(0, n, MAX_PAGES):
            count = min(n - chunk, MAX_PAGES)
            mirror.migrate_to_system(pages.addr + (chunk << PAGE_SHIFT), count)
        there, back = there + middle - start, back + time.perf_counter() - middle
    total = n * reps
    return {
        "ret": 0,
        "pages": total,
        "migrated": migrated,
        "to_dev_s": round(there, 6),
        "to_sys_s": round(back, 6),
        "to_dev_pps": round(total / there) if there else 0,
        "to_sys_pps": round(total / back) if back else 0,
    }
