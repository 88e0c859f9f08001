"""Named events: nothing while nobody listens, and structlog when somebody asks for it."""

import pytest
import structlog

from mm import InvalidArgument, trace
from mm.trace import TracePoint
from mm.typing import PAGE_SIZE
from tests.world import mapped_range


@pytest.fixture(scope="module")
def point():
    return TracePoint("test_event")


def heard_by(log):
    return lambda event, fields: log.append((event, fields))


class TestTracePoint:
    def test_nobody_listens(self, point):
        """An event that nobody wants is false, so that its fields are not even computed."""
        assert not point
        point(value=1)

    def test_listener(self, point):
        """Inside the block the listener gets name and fields; after it, nothing."""
        log = []
        with trace.listen(heard_by(log), "test_event"):
            assert point
            point(value=1)
        point(value=2)

        assert [("test_event", {"value": 1})] == log
        assert not point

    def test_listener_leaves_after_an_error(self, point):
        """Also where the block fails."""
        with pytest.raises(ZeroDivisionError), trace.listen(print, "test_event"):
            raise ZeroDivisionError

        assert not point

    def test_several_listeners(self, point):
        """Each hears of it, and leaving takes no other with it."""
        one, other, probe = [], [], lambda *_: None
        with trace.listen(heard_by(one), "test_event"):
            with trace.listen(heard_by(other), "test_event"), trace.listen(probe, "test_event"):
                point(value=1)
            point(value=2)

        assert ([1, 2], [1]) == tuple([f["value"] for _, f in log] for log in (one, other))


class TestListen:
    def test_patterns(self, point):
        """Events are chosen by name; one that two patterns match is heard once."""
        log = []
        with trace.listen(heard_by(log), "test_*", "*_event"):
            point()

        assert [("test_event", {})] == log

    def test_one_listener_twice(self, point):
        """A listener that came twice leaves once at a time."""
        log = []
        probe = heard_by(log)
        with trace.listen(probe, "test_event"):
            with trace.listen(probe, "test_event"):
                point()
            point()

        assert 3 == len(log)

    def test_every_event(self, point):
        """Without a pattern, all of them."""
        log = []
        world = mapped_range(pages=1, filled=False)

        with trace.listen(heard_by(log)):
            point()
            world.process.write(world.addr, b"x")

        assert {"test_event", "page_fault_user", "mm_page_alloc"} <= {event for event, _ in log}

    def test_no_such_event(self, point):
        """A misspelt pattern is refused, and the message says what there is."""
        with (
            pytest.raises(
                InvalidArgument, match=r"no event matches 'tset_\*'; there are .*mm_mmap"
            ),
            trace.listen(print, "test_event", "tset_*"),
        ):
            pytest.fail("the block ran")

        assert not point

    def test_names(self, point):
        """Every event that can be, sorted."""
        assert sorted(trace.names()) == trace.names()
        assert {"mm_mmap", "mm_munmap", "page_fault_user", "test_event"} <= set(trace.names())


class TestToStructlog:
    def test_every_event_is_a_log_line(self):
        """What happens can be read where the rest of a program logs."""
        world = mapped_range(pages=2, filled=False)

        with structlog.testing.capture_logs() as lines, trace.to_structlog():
            world.process.write(world.addr, b"x")
            world.gpu.to_device(world.process, world.addr, PAGE_SIZE)

        events = [line["event"] for line in lines]
        assert "page_fault_user" == events[0]
        assert "mm_migrate_vma_finalize" in events
        assert {"info"} == {line["log_level"] for line in lines}

    def test_some(self):
        """With a pattern, only those; the fields go along."""
        world = mapped_range(pages=1, filled=False)

        with structlog.testing.capture_logs() as lines, trace.to_structlog("mm_munmap"):
            world.process.write(world.addr, b"x")
            world.process.munmap(world.addr, PAGE_SIZE)

        about = {"process": "train", "start": world.addr, "end": world.addr + PAGE_SIZE}
        assert [{"event": "mm_munmap", "log_level": "info"} | about] == lines
