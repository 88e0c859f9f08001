"""Long ranges that migrate in pieces, two of which are under way at a time."""

import numpy as np
import pytest

import devices.memory
from devices import DeviceError, Faulty
from devices.dma_fence import DmaFence
from devices.wrappers import Wrapper
from hmm.migrate_pieces import migrate_vma_pieces
from mm import PAGE_SIZE
from mm.errors import TimedOut
from tests.interleave import run_interleaved
from tests.world import mapped_range

PIECE = 4


class Unhurried(Wrapper):
    """Copies when somebody waits, and notes when copies begin and end."""

    def __init__(self, device):
        super().__init__(device)
        self.seen = []

    def call(self, op, *args):
        if not op.startswith("copy_"):
            return super().call(op, *args)
        number = sum(what == "begin" for what, _ in self.seen)
        self.seen.append(("begin", number))
        return _Copy(self, number, lambda: super(Unhurried, self).call(op, *args))


class _Copy(DmaFence):
    def __init__(self, device, number, work):
        super().__init__(f"copy {number}")
        self.device, self.number, self.work = device, number, work

    def _sleep(self, timeout):
        self.device.seen.append(("end", self.number))
        self.run(self.work)
        return True


@pytest.fixture
def _small_pieces(monkeypatch):
    monkeypatch.setattr(devices.memory, "TRANSFER_PAGES", PIECE)


@pytest.mark.usefixtures("_small_pieces")
class TestPieces:
    def test_overlap(self):
        """A piece begins while the device copies the one before."""
        world = mapped_range(pages=3 * PIECE)
        gpu = Unhurried(world.gpu)

        moved = gpu.to_device(world.process, world.addr, world.nbytes)

        assert 3 * PIECE == moved.migrated == moved.collected
        assert [
            ("begin", 0),
            ("begin", 1),
            ("end", 0),
            ("begin", 2),
            ("end", 1),
            ("end", 2),
        ] == gpu.seen
        assert world.intact()

    @pytest.mark.parametrize("kind", ["private", "public"])
    def test_engines(self, kind, monkeypatch):
        """Contents come through the engines, there and back, whatever stays behind."""
        monkeypatch.setattr("devices.numpy_device.ENGINE_PAGES", 2)
        world = mapped_range(pages=50, kind=kind)
        world.pin(9)
        world.process.madvise(world.at(30), 5 * PAGE_SIZE, "dontneed")

        there = world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert (49, {"pinned": 1}) == (there.migrated, there.stayed)
        world.machine.verify()
        world.gpu.to_system(world.process, world.addr, world.nbytes)

        assert [False] * 50 == world.on_device()
        expected = [0 if 30 <= page < 35 else page for page in range(50)]
        assert expected == world.contents()

    @pytest.mark.parametrize("way", ["to_device", "to_system"])
    @pytest.mark.parametrize("how", ["raise", "torn", "fail", "hang"])
    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_failures(self, way, how, number):
        """What had begun is ended, what failed is put back, and nothing is lost."""
        world = mapped_range(pages=3 * PIECE)
        world.gpu.timeout = 0.01
        if way == "to_system":
            world.gpu.to_device(world.process, world.addr, world.nbytes)
        gpu = Faulty(world.gpu, copy={"fail_at": number, "how": how})

        with pytest.raises((DeviceError, TimedOut), match=f"copy_.* {number} of 4 pages"):
            getattr(gpu, way)(world.process, world.addr, world.nbytes)

        failed = [(way == "to_device") != there for there in world.on_device()]
        assert failed[(number - 1) * PIECE : number * PIECE] == [True] * PIECE
        assert not any(failed[: (number - 1) * PIECE])
        world.machine.verify()
        assert world.intact()
        gpu.let_go()
        assert world.gpu.npages == world.gpu.free_pages

    def test_two_failures(self):
        """Both pieces that are under way may fail; the first is not forgotten."""
        world = mapped_range(pages=2 * PIECE)
        gpu = Faulty(world.gpu, copy={"fail_at": (1, 2), "how": "fail"})

        with pytest.raises(DeviceError, match="copy_in 2 of 4 pages") as raised:
            gpu.to_device(world.process, world.addr, world.nbytes)

        assert "copy_in 1 of 4 pages" in str(raised.value.__context__)
        assert world.intact()

    def test_full_device(self):
        """When the device has no page left, the later pieces stay."""
        world = mapped_range(pages=3 * PIECE, memory="24KiB")

        moved = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert (6, {"not_chosen": 6}) == (moved.migrated, moved.stayed)
        assert world.intact()

    def test_wanted(self):
        """Pages that nobody wants stay in every piece."""
        world = mapped_range(pages=9)
        wanted = np.arange(9) % 2 == 0
        bounds = [world.at(page) for page in (0, 4, 8, 9)]

        with world.process.mm.mmap_sem.read():
            pieces = migrate_vma_pieces(
                world.gpu,
                world.vma,
                bounds,
                devices.memory.Direction.TO_DEVICE,
                pgmap_owner=world.gpu.owner,
                wanted=wanted,
            )

        assert [2, 2, 1] == [piece.cpages for piece in pieces]
        assert wanted.tolist() == world.on_device()

    def test_in_turns(self, monkeypatch):
        """Under a scheduler engines copy at once, and a schedule can be repeated."""
        monkeypatch.setattr("devices.numpy_device.ENGINE_PAGES", 2)
        world = mapped_range(pages=3 * PIECE)
        calls = (
            lambda: world.gpu.to_device(world.process, world.addr, world.nbytes),
            lambda: world.process.write(world.at(5), b"\x55" * PAGE_SIZE),
        )
        _, steps = run_interleaved(calls, seed=7)

        assert steps
        assert b"\x55" * PAGE_SIZE == world.process.read(world.at(5), PAGE_SIZE)
        assert 0 == world.gpu._engines.threads
