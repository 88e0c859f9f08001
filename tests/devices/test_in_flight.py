"""Copies that end late, or after nobody waits for them any more: they write into nobody's memory.

`SlowDevice` has its copies write when the test says so, and not before.
"""

import threading
import time

import pytest

import devices.memory
from devices import DeviceError, Faulty, Wrapper, migrate_between
from mm import PAGE_SIZE, Busy, DriverBug
from mm.errors import TimedOut
from tests.devices.slow import SlowDevice
from tests.world import mapped_range

PAGES = 6
SOON = 30.0
NEW = bytes(range(200, 200 + PAGES))


def slow_world(way="to_device", *, driver=SlowDevice, pages=PAGES, **options):
    """A range on the side from which it goes *way*, and a device that is slow from now on."""
    world = mapped_range(pages, driver=driver, **options)
    if way != "to_device":
        world.gpu.quick = True
        world.gpu.to_device(world.process, world.addr, world.nbytes)
        world.gpu.quick = False
    return world


def move(world, way):
    """Migrate the range *way*."""
    if way == "evict":
        world.gpu.make_room(world.gpu.npages)
    else:
        getattr(world.gpu, way)(world.process, world.addr, world.nbytes)


def goes_on(world):
    """The device works again, the process stores anew and uses all memory; True if it finds it."""
    world.gpu.quick = True
    new = b"".join(bytes([byte]) * PAGE_SIZE for byte in NEW[: world.pages])
    world.process.write(world.addr, new)
    for way in ("to_device", "to_system", "to_device"):
        move(world, way)
        world.machine.verify()
    world.gpu.finish()
    return world.process.read(world.addr, world.nbytes) == new


@pytest.mark.parametrize("kind", ["private", "public"])
class TestTooLate:
    @pytest.mark.parametrize("way", ["to_device", "to_system", "evict"])
    def test_late_writes(self, way, kind):
        """What a copy writes after its timeout is seen by nobody, whoever uses memory meanwhile."""
        world = slow_world(way, kind=kind)

        with pytest.raises(TimedOut, match=r"numpy0: copy_.* of 6 pages is not done"):
            move(world, way)

        assert [way != "to_device"] * PAGES == world.on_device()
        world.machine.verify()
        assert goes_on(world)

    def test_pages_are_not_reused(self, kind):
        """The device's pages of a copy that hangs are not given until it ends, and then are."""
        world = slow_world(kind=kind, memory="40KiB")
        with pytest.raises(TimedOut):
            move(world, "to_device")
        world.gpu.quick = True

        assert 10 - PAGES == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
        world.gpu.finish()

        assert 2 == world.gpu.to_device(world.process, world.addr, world.nbytes).migrated
        assert world.intact()

    def test_frames_are_not_reused(self, kind):
        """Nor are the system's, though all others are in use."""
        world = slow_world("to_system", kind=kind, nodes=("2MiB",))
        with pytest.raises(TimedOut):
            move(world, "to_system")
        free = world.machine.nr_free_pages
        other = world.process.mmap((free - 60) * PAGE_SIZE)
        zeros = bytes((free - 60) * PAGE_SIZE)
        world.process.write(other, zeros)

        world.gpu.finish()

        assert zeros == world.process.read(other, len(zeros))
        world.gpu.quick = True
        move(world, "to_system")
        assert world.intact()

    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    def test_process_ends(self, way, kind):
        """A process may end before its copy does; who has its memory then is not disturbed."""
        world = slow_world(way, kind=kind)
        with pytest.raises(TimedOut):
            move(world, way)

        world.process.exit()

        world.process = world.machine.spawn("next")
        world.process.mmap(world.nbytes, addr=world.addr)
        assert goes_on(world)

    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    def test_close(self, way, kind):
        """A device stays as long as a copy of it may write, and says which."""
        world = slow_world(way, kind=kind)
        with pytest.raises(TimedOut):
            move(world, way)
        world.gpu.quick = True

        with pytest.raises(Busy, match=r"numpy0: 1 copies are under way still, .* copy_.* of 6"):
            world.gpu.close()

        world.gpu.finish()
        world.gpu.close()
        assert [] == world.machine.mem.pins
        assert world.intact()

    @pytest.mark.parametrize("how", ["torn", "fail", "late", "delay"])
    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    def test_inside_a_faulty_one(self, way, how, kind):
        """What `Faulty` adds to a copy that hangs does not let go of its pages before it ends."""
        world = slow_world(way, kind=kind)
        gpu = Faulty(world.gpu, copy={"fail_at": 1, "how": how, "delay": 0})
        with pytest.raises(TimedOut):
            move(world, way)
        gpu.let_go()

        assert 1 == len(world.machine.mem.pins)
        assert goes_on(world)


class TestFault:
    def test_late_writes(self):
        """A CPU that touches a page whose copy hangs hears of it, and may try again."""
        world = slow_world("to_system")
        with pytest.raises(TimedOut, match="numpy0: copy_out of 6 pages is not done"):
            world.process.read(world.addr, world.nbytes)

        assert [True] * PAGES == world.on_device()
        assert goes_on(world)


@pytest.mark.parametrize("direct", [True, False])
class TestPeers:
    def between(self, direct):
        """A range on the first of two devices; by way of a buffer where that is wrapped."""
        world = slow_world("to_system")
        world.other = SlowDevice(world.machine, "1MiB", name="other")
        if not direct:
            Wrapper(world.gpu)
        return world, lambda: migrate_between(
            world.gpu, world.other, world.process, world.addr, world.nbytes
        )

    def test_late_writes(self, direct):
        """A copy between devices that hangs leaves pages where they are, and disturbs nobody."""
        world, between = self.between(direct)
        world.gpu.quick = not direct
        op = "copy_peer" if direct else "copy_in"

        with pytest.raises(TimedOut, match=f"{op} of 6 pages"):
            between()

        assert PAGES == world.other.npages - world.other.free_pages
        world.gpu.quick = world.other.quick = True
        assert PAGES == between().migrated
        world.gpu.finish()
        world.other.finish()
        assert world.intact()

    def test_source_hangs(self, direct):
        """So does one whose source hangs."""
        world, between = self.between(direct)
        with pytest.raises(TimedOut):
            between()

        world.gpu.quick = world.other.quick = True
        world.gpu.finish()

        assert PAGES == between().migrated
        assert world.intact()


@pytest.fixture
def _small_pieces(monkeypatch):
    monkeypatch.setattr(devices.memory, "TRANSFER_PAGES", 2)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("way", ["to_device", "to_system"])
class TestPieces:
    @pytest.mark.parametrize(
        "plan", [("fail", "hang"), ("hang", "fail"), ("hang", "hang"), ("", "hang"), ("hang", "")]
    )
    def test_two_under_way(self, way, plan):
        """Whatever becomes of two copies that are under way at once, both are accounted for."""
        world = slow_world(way)
        planned = _Planned(world.gpu, plan)

        with pytest.raises((DeviceError, TimedOut)):
            move(world, way)

        planned.take_off()
        world.machine.verify()
        moved = [(way == "to_device") == there for there in world.on_device()]
        assert [not how for how in plan for _ in range(2)] == moved[:4]
        assert plan.count("hang") == len(world.gpu.stranded)
        assert goes_on(world)


class _Planned(Wrapper):
    """Lets copies end as planned when they begin; those for which there is no plan do."""

    def __init__(self, device, plan):
        super().__init__(device)
        self.plan = list(plan)

    def call(self, op, *args):
        answer = super().call(op, *args)
        if op.startswith("copy_"):
            how = self.plan.pop(0) if self.plan else ""
            if how == "fail":
                self.device.under_way.pop()
                answer.signal(error=DeviceError("bus error"))
            elif not how:
                fence, copy = self.device.under_way.pop()
                fence.run(copy)
        return answer


class TestMeanwhile:
    """What others do while a copy is under way: each in a thread of its own."""

    def together(self, world, other, way="to_device"):
        """Begin to migrate, then begin *other*, then let copies end; what *other* raised."""
        world.gpu.timeout, raised = SOON, []

        def guarded():
            try:
                other()
            except (Busy, DeviceError) as error:
                raised.append(error)

        first = threading.Thread(target=move, args=(world, way))
        second = threading.Thread(target=guarded)
        first.start()
        self.until(lambda: world.gpu.under_way)
        second.start()
        second.join(0.02)
        self.waited = second.is_alive()
        while first.is_alive() or second.is_alive():
            world.gpu.finish()
            time.sleep(0.001)
        return raised

    def until(self, ready):
        end = time.monotonic() + SOON
        while not ready() and time.monotonic() < end:
            time.sleep(0.001)

    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    @pytest.mark.parametrize("call", ["munmap", "mprotect", "fork", "exit"])
    def test_waits(self, way, call):
        """Who changes the address space waits for the copy, and then has all of it."""
        world = slow_world(way)
        process = world.process
        other = {
            "munmap": lambda: process.munmap(world.at(1), 3 * PAGE_SIZE),
            "mprotect": lambda: process.mprotect(world.at(1), 3 * PAGE_SIZE, "r"),
            "fork": lambda: process.fork("child"),
            "exit": process.exit,
        }[call]

        self.together(world, other, way)

        assert self.waited
        world.machine.verify()
        left = {"munmap": 3, "exit": 0}.get(call, PAGES) * (way == "to_device")
        assert left == world.gpu.npages - world.gpu.free_pages
        world.gpu.quick = True
        if call in ("mprotect", "fork"):
            assert world.intact()

    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    def test_dontneed(self, way):
        """Memory that is thrown away meanwhile is zeros afterwards, and the rest is intact."""
        world = slow_world(way)

        self.together(world, lambda: world.process.madvise(world.at(2), PAGE_SIZE, "dontneed"), way)

        world.gpu.quick = True
        assert [0, 1, 0, 3, 4, 5] == world.contents()

    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    def test_close(self, way):
        """A device that is closed meanwhile stays, or goes when all is back; nothing is lost."""
        world = slow_world(way)

        raised = self.together(world, world.gpu.close, way)

        world.gpu.quick = True
        assert world.gpu.closed != bool(raised)
        assert world.intact()
        world.gpu.close()

    def test_store(self):
        """A CPU that stores waits, and its bytes are not overwritten."""
        world = slow_world()

        self.together(world, lambda: world.process.write(world.at(3), b"new"))

        world.gpu.quick = True
        assert b"new" == world.process.read(world.at(3), 3)


class _SpoilsSrc(SlowDevice):
    """Begins to copy, and breaks its contract."""

    spoils = True

    def alloc_and_copy(self, vma, src, dst, start, end, private):
        copied = super().alloc_and_copy(vma, src, dst, start, end, private)
        src[:] = 0 if self.spoils else src
        return copied


class TestBrokenContract:
    def test_under_way(self):
        """Where a driver breaks its contract with a copy under way, that copy ends first."""
        world = slow_world(driver=_SpoilsSrc)
        with pytest.raises(TimedOut, match="copy_in of 6 pages") as raised:
            move(world, "to_device")

        assert isinstance(raised.value.__context__, DriverBug)
        world.gpu.spoils = False
        assert goes_on(world)
