"""Counters by name."""

import pytest

from mm.errors import InvalidArgument
from mm.vmstat import VMSTAT_NAMES, VmStat


class TestVmStat:
    def test_mapping(self):
        """/proc/vmstat is a mapping of every counter, in its order, all 0 at first."""
        assert dict.fromkeys(VMSTAT_NAMES, 0) == dict(VmStat())
        assert len(VMSTAT_NAMES) == len(set(VMSTAT_NAMES)) == len(VmStat())

    def test_add(self):
        """Amounts rise and fall."""
        vmstat = VmStat()

        vmstat.add("nr_anon_pages", 5)
        vmstat.add("nr_anon_pages", -2)

        assert 3 == vmstat["nr_anon_pages"]

    def test_unknown_counter(self):
        """The message says where the names are."""
        with pytest.raises(InvalidArgument, match=r"no counter is named 'pgfualt'; see mm\.vmstat"):
            VmStat()["pgfualt"]

    def test_as_other_mappings(self):
        """Who does not know whether a counter exists asks as a dict is asked."""
        vmstat = VmStat()

        assert "pgfault" in vmstat
        assert "pgfualt" not in vmstat
        assert (0, None, 7) == (
            vmstat.get("pgfault"),
            vmstat.get("pgfualt"),
            vmstat.get("pgfualt", 7),
        )


class TestCounting:
    def test_only_what_changed(self):
        """A delta holds the counters that changed, in either direction."""
        vmstat = VmStat()
        vmstat.add("pgfault", 7)
        vmstat.add("pgfree", 7)

        with vmstat.counting() as delta:
            vmstat.add("pgfault", 2)
            vmstat.add("nr_free_pages", -3)

        assert {"pgfault": 2, "nr_free_pages": -3} == delta

    def test_named_counters_are_there_at_0(self):
        """Who names counters gets exactly those."""
        vmstat = VmStat()

        with vmstat.counting("pgfault", "pgfree") as delta:
            vmstat.add("pgfree", 1)
            vmstat.add("pgactivate", 1)

        assert {"pgfault": 0, "pgfree": 1} == delta

    def test_unknown_name(self):
        """A misspelt name is refused before the block runs."""
        with (
            pytest.raises(InvalidArgument, match="no counter is named 'pgfualt'"),
            VmStat().counting("pgfualt"),
        ):
            pytest.fail("the block ran")
