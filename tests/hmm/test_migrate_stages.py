"""Each stage of migrate_vma() against its page-at-a-time twin (tests/reference/migrate.py).

Hypothesis draws what stands behind each page of a range, what befalls it while it is migrated,
and what the driver answers. After each stage the vectors and every row, entry and lock of the
machine must be what the twin says, and at the end the CPU must find every byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from devices import NumpyDevice
from hmm import MigrateVma, MigrateVmaSelect, Stayed
from hmm import migrate as stages
from hmm.migrate_pfn import MIGRATE_PFN_ERROR
from mm import PAGE_SIZE, BusError
from mm.types import VM_WRITE
from tests.hmm.callbacks import device_page, frame, hand_over
from tests.reference import migrate as twins
from tests.reference.state import differences, look
from tests.world import ended_worlds, mapped_range

BORDERS = {"2 MiB": 0x7F00_0060_0000, "1 GiB": 0x7F00_4000_0000}
CPU_WROTE = 0xEE  # a store that races with the migration


@dataclass(frozen=True)
class Spot:
    """One page of the range: what it is, what happens to it, what the driver answers for it."""

    home: str = "system"  # hole, zero, system, exclusive, or the memory of a device, below
    cpu: int = 0  # that touched it, in whose pagevec it may wait
    readonly: bool = False  # its entry, in a writable VMA
    clean: bool = False  # its entry has lost dirty and soft-dirty bits
    pinned: str = ""  # before which stage somebody takes a reference
    locked: str = ""  # another thread holds the page lock: "always", or "collect" alone
    isolated: bool = False  # another thread has it off the LRU
    raced: str = ""  # how the CPU touches a hole while the driver works: "read", "write"
    wanted: bool = True
    answer: str = "mine"  # mine, my public, system, nothing, lost, lost but given


ALL = MigrateVmaSelect(7)
DEVICES = ["mine", "theirs", "my public", "their public"]
SPOTS = st.builds(
    Spot,
    home=st.sampled_from(["hole", "zero", *["system"] * 4, "exclusive", *DEVICES]),
    cpu=st.integers(0, 1),
    readonly=st.booleans(),
    clean=st.booleans(),
    pinned=st.sampled_from(["", "", "", "", "collect", "prepare", "unmap", "pages"]),
    locked=st.sampled_from(["", "", "", "collect", "always"]),
    isolated=st.sampled_from([False] * 5 + [True]),
    raced=st.sampled_from(["", "", "read", "write"]),
    wanted=st.sampled_from([True] * 5 + [False]),
    answer=st.sampled_from(
        ["mine"] * 4 + ["system"] * 2 + ["my public", "nothing", "lost", "lost but given"]
    ),
)


@dataclass(frozen=True)
class Case:
    """A range of *pages* pages with *spots* in it; the rest of it are holes."""

    pages: int
    spots: dict[int, Spot]
    border: str = "2 MiB"
    below: int = 0  # pages of the range below the border
    margin: int = 1  # pages of the VMA before and after the range
    readonly: bool = False  # the VMA
    select: MigrateVmaSelect = ALL
    owner: str | None = None
    rest: str = "nothing"  # the driver's answer for pages that are no spot

    def spot(self, page: int) -> Spot:
        return self.spots.get(page, Spot("hole", answer=self.rest))


@st.composite
def cases(draw: st.DrawFn, most: int = 12) -> Case:
    """Ranges of up to *most* pages, most of them across a border between page tables."""
    spots = draw(st.lists(SPOTS, min_size=1, max_size=12))
    pages = draw(st.integers(len(spots), max(most, len(spots))))
    places = draw(st.permutations(range(pages))) if pages == len(spots) else None
    if places is None:
        where = st.integers(0, pages - 1)
        places = draw(
            st.lists(where, min_size=len(spots), max_size=len(spots), unique=True),
        )
    return Case(
        pages=pages,
        spots=dict(zip(places, spots, strict=False)),
        border=draw(st.sampled_from(sorted(BORDERS))),
        below=draw(st.integers(0, pages)),
        margin=draw(st.integers(0, 2)),
        readonly=draw(st.sampled_from([False, False, True])),
        select=draw(st.sampled_from([MigrateVmaSelect(bits) for bits in (1, 2, 4, 7, 7)])),
        owner=draw(st.sampled_from([None, None, "mine", "theirs"])),
        rest=draw(st.sampled_from(["nothing", "mine"])),
    )


class Scene:
    """The world of a case, its migration, and what its pages hold."""

    def __init__(self, case: Case) -> None:
        self.case = case
        margin = case.margin * PAGE_SIZE
        self.start = BORDERS[case.border] - case.below * PAGE_SIZE
        self.world = mapped_range(
            case.pages + 2 * case.margin, filled=False, memory="8MiB", addr=self.start - margin
        )
        self.mem = self.world.machine.mem
        machine = self.world.machine
        self.devices = {"mine": self.world.gpu}
        for home in DEVICES[1:]:
            kind = "public" if home.endswith("public") else "private"
            self.devices[home] = NumpyDevice(machine, "512KiB", kind, name=home)
        for home in ("my public", "their public"):
            private = self.devices["mine" if home.startswith("my") else "theirs"]
            self.devices[home].owner = private
        self.bytes = [0] * case.pages
        self._populate()
        owners = {None: None, "mine": self.devices["mine"], "theirs": self.devices["theirs"]}
        src, dst = np.zeros((2, case.pages), dtype=np.uint64)
        self.migrate = MigrateVma(
            self.world.vma,
            self.start,
            self.start + case.pages * PAGE_SIZE,
            src,
            dst,
            case.select,
            owners[case.owner],
            np.array([case.spot(page).wanted for page in range(case.pages)]),
        )

    # Before.

    def _populate(self) -> None:
        world, case = self.world, self.case
        order = sorted(case.spots.items(), key=lambda item: not item[1].isolated)
        for page, spot in order:
            at = self.address(page)
            world.process.cpu = spot.cpu
            if spot.home == "zero":
                world.process.touch(at, PAGE_SIZE, write=False)
            elif spot.home != "hole":
                self.bytes[page] = page % 200 + 1
                world.process.write(at, bytes([self.bytes[page]]) * PAGE_SIZE)
            if spot.home in self.devices:
                self.devices[spot.home].to_device(world.process, at, PAGE_SIZE)
            elif spot.home == "exclusive":
                world.make_exclusive(case.margin + page)
            elif spot.home == "system" and spot.isolated:
                world.isolate(case.margin + page)
        world.process.cpu = 0
        readonly = [page for page, spot in case.spots.items() if spot.readonly or case.readonly]
        world.write_protect(*(case.margin + page for page in readonly))
        world.clear_refs(*(case.margin + page for page, spot in case.spots.items() if spot.clean))
        if case.readonly:
            world.vma.vm_flags &= ~VM_WRITE
        for page, spot in case.spots.items():
            if spot.locked and spot.home not in ("hole", "zero"):
                world.lock(case.margin + page)

    def address(self, page: int) -> int:
        return self.start + page * PAGE_SIZE

    # The stages, and what happens between them.

    def run(self, stage: str) -> None:
        """Run *stage* and hold it against its twin."""
        self._befall(stage.removeprefix("migrate_vma_"))
        expected = getattr(twins, stage)(look(self.migrate))

        getattr(stages, stage)(self.migrate)

        assert [] == differences(expected, look(self.migrate))

    def _befall(self, stage: str) -> None:
        """Pins that come and locks that go just before *stage*."""
        for page, spot in self.case.spots.items():
            if spot.home in ("hole", "zero"):
                continue
            word, where = int(self.migrate.src[page]), self.case.margin + page
            pfn = word >> 6 if word & twins.VALID else self.world.pfns().item(where)
            if spot.pinned == stage:
                self.world.hold(pfn)
            if spot.locked == "collect" and stage == "prepare" and pfn in self.world.locked:
                self.world.unlock(where)

    def drive(self) -> None:
        """The driver's turn: answer, page by page, for what can move."""
        for page in range(self.case.pages):
            spot, word = self.case.spot(page), int(self.migrate.src[page])
            if spot.answer not in ("nothing", "lost"):
                self._give(page, spot.answer)
            if spot.answer.startswith("lost"):
                self.migrate.dst[page] |= MIGRATE_PFN_ERROR
            if spot.raced and not word & twins.VALID and word & twins.MIGRATE:
                self._race(page, spot.raced)

    def _give(self, page: int, memory: str) -> None:
        word = int(self.migrate.src[page])
        if memory == "system":
            pfn = frame(self.world)
        else:
            pfn = device_page(self.devices["my public" if memory == "my public" else "mine"])
        self.row(pfn)[:] = self.row(word >> 6) if word & twins.VALID else 0
        hand_over(self.world, self.migrate.dst, page, pfn)

    def row(self, pfn: int) -> np.ndarray:
        """The bytes of a page, wherever it is."""
        for device in self.devices.values():
            if device.zone.start_pfn <= pfn < device.zone.end_pfn:
                return device.memory[pfn - device.zone.start_pfn]
        return self.mem.payload[pfn]

    def _race(self, page: int, access: str) -> None:
        if access == "write" and not self.case.readonly:
            self.world.process.write(self.address(page), bytes([CPU_WROTE]) * PAGE_SIZE)
            self.bytes[page] = CPU_WROTE
        else:
            self.world.process.touch(self.address(page), PAGE_SIZE, write=False)

    # Afterwards.

    def expected(self) -> list[int | str]:
        """What each page of the range holds, or "lost"."""
        lost = self.migrate.stayed == Stayed.LOST
        return ["lost" if gone else byte for gone, byte in zip(lost, self.bytes, strict=True)]

    def contents(self) -> list[int | str]:
        """The same, as the CPU finds it once nobody pins, locks or isolates a page."""
        self.world.let_go()
        found: list[int | str] = []
        for page in range(self.case.pages):
            try:
                data = self.world.process.read(self.address(page), PAGE_SIZE)
                found.append(data[0] if data == data[:1] * PAGE_SIZE else "mixed")
            except BusError:
                found.append("lost")
        return found


def migrate_and_compare(case: Case) -> None:
    with ended_worlds():
        scene = Scene(case)
        with scene.migrate.vma.vm_mm.mmap_sem.read():
            scene.run("migrate_vma_collect")
            scene.run("migrate_vma_prepare")
            scene.run("migrate_vma_unmap")
            scene.drive()
            scene.run("migrate_vma_pages")
            scene.run("migrate_vma_finalize")
        assert scene.expected() == scene.contents()


class TestStages:
    @given(cases())
    def test_each_stage_does_what_its_twin_says(self, case: Case):
        """Any mix of pages, troubles and answers, in a range across a page-table border."""
        migrate_and_compare(case)

    @settings(  # shrinking takes minutes
        max_examples=settings().max_examples // 6, phases=[Phase.reuse, Phase.generate]
    )
    @given(cases(most=1_600))
    def test_wide_ranges_with_missing_tables(self, case: Case):
        """The same where whole page tables of the range are missing or almost empty."""
        migrate_and_compare(case)
