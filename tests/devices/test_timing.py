"""The link model against the tables that it was made from, and what any profile must keep."""

import tomllib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import NumpyDevice, Timed
from devices.calibrate import calibrate
from devices.timing import (
    TO_DEVICE,
    TO_SYSTEM,
    Profile,
    Timeline,
    Transfers,
    load_profile,
    profiles,
)
from mm import PAGE_SIZE, InvalidArgument
from tests.devices.test_check import Blind
from tests.hmm.test_migrate_pieces import Unhurried
from tests.world import mapped_range

KIB = 1024

# cudaMemcpy() to a GTX 1080 Ti, KiB and us; fault service by KiB migrated, and its transfers
MEMCPY = {4: 1.184, 8: 1.568, 16: 2.368, 32: 3.969, 64: 7.2, 128: 12.673, 256: 23.233, 512: 44.418}
UVM = {4: 1.76, 60: 5.8, 124: 11.2, 252: 21.8, 508: 43.3, 1020: 86.4}
FAULTS = {64: 24.1, 128: 31.6, 256: 50.1, 512: 83.9, 1024: 156.9}


def near(expected, within):
    return pytest.approx(expected, rel=within)


class TestTables:
    @pytest.mark.parametrize(("kib", "us"), MEMCPY.items())
    def test_transfers(self, kib, us):
        """The transfers of the table take what the table says."""
        assert near(us, 1e-9) == load_profile("pcie3-x16").to_device.us_of(kib * KIB)

    @pytest.mark.parametrize(("kib", "us"), UVM.items())
    def test_transfers_in_between(self, kib, us):
        """What UVM's own transfers took is within a third for a page, 18 % for others."""
        expected = near(us, 0.34 if kib == 4 else 0.18)

        assert expected == load_profile("pcie3-x16").to_device.us_of(kib * KIB)

    @pytest.mark.parametrize(("kib", "us"), FAULTS.items())
    def test_fault_service(self, kib, us):
        """Fault service is within 5 % of what was measured."""
        assert near(us, 0.05) == load_profile("pcie3-x16").fault_us(kib * KIB // PAGE_SIZE)

    def test_beyond_the_table(self):
        """Larger transfers go at the rate of the largest, within 1 % of 12.3 GB/s for 256 MiB."""
        us = load_profile("pcie3-x16").to_device.us_of(256 << 20)

        assert near(256 * KIB * 0.0832, 0.01) == us

    @pytest.mark.parametrize(("direction", "rate"), [(TO_DEVICE, 375e3), (TO_SYSTEM, 297e3)])
    def test_coherent_link(self, direction, rate):
        """GH200 reaches its measured rates, in bytes per microsecond, within 1 %."""
        pages = (1 << 30) // PAGE_SIZE

        assert near(rate, 0.01) == (1 << 30) / load_profile("gh200").copy_us(direction, pages)


POINTS = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 50)), min_size=2, max_size=8).map(
    lambda steps: np.cumsum(steps, axis=0) + np.array([0, 0.01])
)
TRANSFERS = POINTS.map(lambda p: Transfers(tuple(p[:, 0].tolist()), tuple(p[:, 1].tolist())))
PROFILES = st.builds(
    Profile,
    st.just("drawn"),
    TRANSFERS,
    TRANSFERS,
    st.booleans(),
    st.integers(1, 4),
    st.floats(0, 20),
    st.floats(0, 1),
)
COPIES = st.lists(st.tuples(st.sampled_from([TO_DEVICE, TO_SYSTEM]), st.integers(1, 300)))


class TestTransfers:
    @given(transfers=TRANSFERS, sizes=st.lists(st.integers(0, 1 << 20), min_size=2))
    def test_monotonic(self, transfers, sizes):
        """More bytes never take less time; none take none."""
        times = [transfers.us_of(size) for size in sorted(sizes)]

        assert times == sorted(times)
        assert times[0] >= 0 == transfers.us_of(0)


class TestProfiles:
    @given(profile=PROFILES)
    def test_file(self, tmp_path_factory, profile):
        """A profile that is written to a file is read as it was, to six digits."""
        path = tmp_path_factory.mktemp("profile") / "drawn.toml"
        path.write_text(profile.toml())
        table = tomllib.loads(profile.toml())

        assert profile.duplex == table["duplex"]
        found = load_profile(path)
        assert near(profile.to_system.us, 1e-5) == found.to_system.us
        assert (profile.engines, near(profile.page_us, 1e-5)) == (found.engines, found.page_us)

    def test_those_that_come_along(self):
        """They load, under their names."""
        assert ["gh200", "pcie3-x16"] == profiles()
        assert {"NVLink-C2C, GH200", "PCIe 3 x16, GTX 1080 Ti"} == {
            load_profile(name).name for name in profiles()
        }

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda text: "name = ", "Invalid value"),
            (lambda text: text.replace("[to_system]", "[back]"), "to_system"),
            (lambda text: text.replace("kib = [4, ", "kib = [9, "), "ascend"),
            (lambda text: text.replace("us = [1.184, ", "us = ["), "same length"),
            (lambda text: text.replace("engines = 2", "engines = 0"), "at least 1"),
        ],
    )
    def test_wrong_file(self, tmp_path, change, says):
        """A file that is no profile is refused, and the message says why."""
        path = tmp_path / "bad.toml"
        path.write_text(change(load_profile("pcie3-x16").toml()))

        with pytest.raises(InvalidArgument, match=says):
            load_profile(path)

    def test_unknown(self):
        """A name that is none is told what there is."""
        with pytest.raises(InvalidArgument, match="there are gh200, pcie3-x16, and any file"):
            load_profile("isa")


class TestTimeline:
    @given(profile=PROFILES, copies=COPIES)
    def test_bounds(self, profile, copies):
        """Copies that begin at once are done when the longest lane is, or their sum."""
        timeline = Timeline(profile)
        ends = [timeline.copy(direction, npages) for direction, npages in copies]
        lanes = {TO_DEVICE: 0.0, TO_SYSTEM: 0.0}
        for direction, npages in copies:
            lanes[direction] += profile.copy_us(direction, npages)

        last = max(ends, default=0.0)
        at_once = profile.duplex and profile.engines > 1
        assert near(max(lanes.values()) if at_once else sum(lanes.values()), 1e-6) == last

    def test_duplex(self):
        """In both directions at once a duplex link carries twice as much."""
        for duplex, factor in ((True, 1), (False, 2)):
            line = Transfers((4, 8), (10, 20))
            timeline = Timeline(Profile("x", line, line, duplex))
            timeline.wait(timeline.copy(TO_DEVICE, 1))
            ends = [timeline.copy(TO_SYSTEM, 1), timeline.copy(TO_DEVICE, 1)]

            assert near(10 + 10 * factor, 1e-9) == max(ends)


class TestTimed:
    def world(self, profile="pcie3-x16"):
        world = mapped_range(pages=16)
        return world, Timed(world.gpu, profile)

    def test_migration(self):
        """Copies charge their time; allocating and holes charge none."""
        world, gpu = self.world()
        hardware = gpu.profile
        gpu.to_device(world.process, world.addr, world.nbytes)
        there = gpu.stats.simulated_us
        gpu.to_system(world.process, world.addr, world.nbytes)

        assert near(7.2 + 16 * hardware.page_us, 1e-6) == there
        assert near(there + 7.2, 1e-6) == gpu.stats.simulated_us
        gpu.to_device(world.process, world.process.mmap(PAGE_SIZE), PAGE_SIZE)
        assert near(there + 7.2, 1e-6) == gpu.stats.simulated_us

    def test_faults(self):
        """A batch of faults costs what the profile says of one."""
        world, gpu = self.world()

        gpu.read(world.process, world.addr, world.nbytes)

        assert near(gpu.profile.fault_us(16), 1e-6) == gpu.stats.simulated_us

    def test_under_way(self, monkeypatch):
        """Copies that are under way at once charge for the link, not one after the other twice."""
        monkeypatch.setattr("devices.memory.TRANSFER_PAGES", 8)
        line = Transfers((4, 8), (10, 20))
        world, _ = self.world(), None
        gpu = Timed(Unhurried(world[0].gpu), Profile("x", line, line))

        gpu.to_device(world[0].process, world[0].addr, world[0].nbytes)

        assert near(160, 1e-6) == gpu.timeline.now
        assert world[0].intact()

    def test_calibrate(self):
        """A device at hand has a profile, which ascends and can be read again."""
        profile = calibrate(NumpyDevice, "numpy", "256KiB", rounds=2)

        assert (4, 8, 16, 32, 64, 128, 256) == profile.to_device.kib
        assert sorted(profile.to_system.us) == list(profile.to_system.us)
        assert profile.batch_us > 0
        assert "numpy" == tomllib.loads(profile.toml())["name"]

    def test_calibrate_without_engines(self):
        """So has one that copies at once; copies of a few pages say nothing."""
        assert 1 == calibrate(Blind, "blind", "256KiB", rounds=1).engines
        with pytest.raises(InvalidArgument, match="or more"):
            calibrate(Blind, "blind", "64KiB")
