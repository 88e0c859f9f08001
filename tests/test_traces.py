"""Traces: what a file must hold, and what is said about one that does not."""

import re
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmm.offload.traces import PACKAGED, InvalidTrace, load_trace, packaged_traces
from mm.errors import InvalidArgument


def columns(**changed):
    """Three epochs over two pages, sound unless *changed*; a column that is None is left out."""
    sound = {
        "page": np.array([0x108, 0x109, 0x108, 0x109], dtype=np.uint64),
        "write": np.array([True, False, False, True]),
        "count": np.array([1500, 500, 2000, 2000], dtype=np.uint32),
        "epoch": np.array([0, 0, 2, 3], dtype=np.uint32),
        "program": np.array("a loop"),
        "window": np.array(2000),
    }
    return {name: column for name, column in (sound | changed).items() if column is not None}


@pytest.fixture
def save(tmp_path):
    """A function that writes a trace file of columns(**changed) and gives its path."""

    def write(**changed):
        np.savez(tmp_path / "loop.npz", **columns(**changed))
        return tmp_path / "loop.npz"

    return write


def refusal(path):
    """What load_trace says about *path*, after checking that it says so in one line."""
    with pytest.raises(InvalidTrace) as refused:
        load_trace(path)
    assert isinstance(refused.value, InvalidArgument)
    assert "\n" not in refused.value.strerror
    return refused.value.strerror


class TestTrace:
    def test_reads_the_columns(self, save):
        """Columns come as they were recorded, numbers as int64."""
        trace = load_trace(save())

        assert ("loop", "a loop", 2000, 4) == (
            trace.name,
            trace.program,
            trace.window,
            trace.events,
        )
        assert [0x108, 0x109, 0x108, 0x109] == trace.page.tolist()
        assert [0, 0, 2, 3] == trace.epoch.tolist()
        assert np.int64 == trace.page.dtype == trace.epoch.dtype

    def test_footprint(self, save):
        """The footprint lists each page once, ascending; a place finds an event's page in it."""
        trace = load_trace(save(page=np.array([9, 7, 9, 300], dtype=np.uint64) * 16))

        assert [7 * 16, 9 * 16, 300 * 16] == trace.footprint.tolist()
        assert trace.page.tolist() == trace.footprint[trace.place].tolist()

    def test_epochs_begin_where_the_number_changes(self, save):
        """An epoch number without events has no place among the epochs."""
        assert [0, 2, 3, 4] == load_trace(save()).epoch_start.tolist()

    def test_one_event(self, save):
        """One touch of one page is a trace."""
        trace = load_trace(save(**{name: columns()[name][:1] for name in list(columns())[:4]}))

        assert [0, 1] == trace.epoch_start.tolist()


class TestNames:
    @pytest.mark.parametrize("name", ["sqlite", "sqlite.npz", PACKAGED / "sqlite.npz"])
    def test_packaged(self, name):
        """A packaged trace goes by its name, with or without suffix, from any directory."""
        trace = load_trace(name)

        assert ("sqlite", 881_257, 467) == (trace.name, trace.events, trace.footprint.size)

    def test_samples(self):
        """The traces beside the samples pass every check."""
        trace = load_trace(PACKAGED.parents[2] / "samples/data/sort.npz")

        assert (739_012, 1_110) == (trace.events, trace.footprint.size)

    def test_a_file_goes_before_a_packaged_name(self, save, monkeypatch):
        """A file that bears the name of a packaged trace is the one that is read."""
        path = save()
        path.rename(path.with_name("sqlite.npz"))
        monkeypatch.chdir(path.parent)

        assert 4 == load_trace("sqlite.npz").events

    @pytest.mark.parametrize("name", ["nowhere.npz", "nowhere/sqlite.npz", "sqlit"])
    def test_missing(self, name):
        """A trace that is not there is named, and so are those that are."""
        with pytest.raises(FileNotFoundError, match=rf"{name}.*one of: sqlite"):
            load_trace(name)

        assert ["sqlite"] == packaged_traces()

    def test_directory(self, tmp_path):
        """A directory is no trace."""
        assert "is not a file" in refusal(tmp_path)


class TestDamage:
    @pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.99])
    def test_truncated(self, save, share):
        """A file that breaks off anywhere is damaged."""
        path = save()
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

        assert "cannot be read as an .npz file" in refusal(path)

    def test_text(self, tmp_path):
        """A text file is damaged too, for all we know."""
        path = tmp_path / "notes.npz"
        path.write_text("page,write\n264,1\n")

        assert "cannot be read as an .npz file" in refusal(path)

    def test_npy(self, tmp_path):
        """One array without a name is no file of columns."""
        np.save(tmp_path / "page.npy", columns()["page"])

        assert "is one array" in refusal(tmp_path / "page.npy")

    def test_pickled(self, save):
        """A column of objects is refused unread: unpickling one runs code."""
        path = save(page=np.array([0x108, "code"] * 2, dtype=object))

        assert "Object arrays cannot be loaded" in refusal(path)

    def test_member_that_is_no_array(self, save):
        """A zip member may be anything; a column may not."""
        path = save(page=None)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("page.npy", "264 265")

        assert "column 'page' is no array, and must be uint64[events]" in refusal(path)

    @given(at=st.integers(0, 1 << 30), byte=st.integers(0, 255))
    def test_one_byte_changed(self, tmp_path_factory, at, byte):
        """Whatever byte of a file is changed, it is read or refused, and nothing else happens."""
        path = tmp_path_factory.mktemp("damage") / "loop.npz"
        np.savez_compressed(path, **columns())
        damaged = bytearray(path.read_bytes())
        damaged[at % len(damaged)] = byte
        path.write_bytes(damaged)

        try:
            trace = load_trace(path)
        except InvalidTrace:
            return
        assert 4 == trace.events


class TestColumns:
    @pytest.mark.parametrize("name", list(columns()))
    def test_missing(self, save, name):
        """A missing column is named, beside those that a trace has."""
        said = refusal(save(**{name: None}))

        assert f"has no {name}; a trace has page, write, count, epoch, program, window" in said

    @pytest.mark.parametrize(
        ("name", "column", "says"),
        [
            ("page", np.zeros(4, np.int64), "'page' is int64[4], and must be uint64[events]"),
            ("page", np.zeros((2, 2), np.uint64), "'page' is uint64[2, 2], and must be uint64"),
            ("page", np.uint64(8), "'page' is uint64[], and must be uint64[events]"),
            ("write", np.zeros(4, np.uint8), "'write' is uint8[4], and must be bool[events]"),
            ("count", np.zeros(4, np.float64), "'count' is float64[4], and must be uint32"),
            ("epoch", np.zeros(4, np.int32), "'epoch' is int32[4], and must be uint32[events]"),
            ("write", np.zeros(3, np.bool_), "'write' has 3 rows, 'page' has 4; they must agree"),
            ("program", np.array(["a", "b"]), "'program' is <U1[2], and must be one string"),
            ("program", np.array(7), "'program' is int64[], and must be one string"),
            ("window", np.array(2e3), "'window' is float64[], and must be one integer"),
            ("window", np.array([2000]), "'window' is int64[1], and must be one integer"),
            ("window", np.array(0), "'window' is 0, and must be at least 1"),
        ],
    )
    def test_wrong(self, save, name, column, says):
        """What a column is, and what it must be."""
        assert says in refusal(save(**{name: column}))

    def test_empty(self, save):
        """A trace without events replays nothing."""
        path = save(**{name: columns()[name][:0] for name in list(columns())[:4]})

        assert "holds no events" in refusal(path)


class TestEvents:
    def test_epochs_that_decrease(self, save):
        """Time goes one way."""
        said = refusal(save(epoch=np.array([0, 3, 2, 3], dtype=np.uint32)))

        assert "epoch 2 of event 2 comes after epoch 3; sort the events by epoch" in said

    @pytest.mark.parametrize("page", [0, 0xF, 1 << 35, 0x7FFF_F000_0000, (1 << 64) - 1])
    def test_page_that_nobody_can_map(self, save, page):
        """Page numbers lie in 47 bits of address space, above its first 64 KiB."""
        said = refusal(save(page=np.array([0x108, 0x109, page, 0x109], dtype=np.uint64)))

        assert f"event 2 touches page {page:#x}, not one of the pages 0x10 to 0x7ffffffff" in said

    def test_page_at_either_end(self, save):
        """The first and the last page that a program can map are pages like others."""
        ends = [0x10, (1 << 35) - 1] * 2

        assert ends == load_trace(save(page=np.array(ends, dtype=np.uint64))).page.tolist()

    def test_page_twice_in_an_epoch(self, save):
        """An epoch lists a page once, which is what lets a replay take many epochs at once."""
        said = refusal(save(page=np.array([0x108, 0x108, 0x109, 0x109], dtype=np.uint64)))

        assert re.search("epoch 0 lists page 0x108 twice; fold", said)

    def test_no_access(self, save):
        """An event stands for at least one access."""
        said = refusal(save(count=np.array([1, 1, 0, 1], dtype=np.uint32)))

        assert "event 2 counts no access" in said
