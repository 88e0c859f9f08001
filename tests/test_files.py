"""Files on a disk, against bytearrays: whatever is done to them, every byte is as it was stored."""

import random
import shutil
import threading
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mm import PAGE_SIZE, Machine
from mm.errors import BusError, InputOutputError, NoSpace
from mm.mmap import exit_mmap
from mm.swap import lru_add_drain_all
from mm.vmscan import reclaim_pages, try_to_free_pages
from mm.writeback import WritebackControl, write_cache_pages
from tests.world import mapped_range

FILES = "ab"
MOST = 20  # pages that a file has at most
OFFSETS = st.integers(0, MOST * PAGE_SIZE - 1)
SIZES = st.integers(1, 3 * PAGE_SIZE) | st.integers(1, 12 * PAGE_SIZE)


class Files(RuleBasedStateMachine):
    """Two files, each mapped by two processes on two nodes, on one disk that is mounted anew."""

    @initialize(block_size=st.sampled_from([1024, 2048, 4096]), short=st.booleans())
    def boot(self, block_size, short):
        Files.serial += 1
        self.path = Files.folder / f"disk{Files.serial}"
        nodes = ("1MiB", "1MiB") if short else ("16MiB", "16MiB")
        self.world = mapped_range(pages=1, nodes=nodes, memory="256KiB")
        self.machine, self.mem = self.world.machine, self.world.machine.mem
        self.processes = [self.world.process, self.machine.spawn("other")]
        self.twins = {name: bytearray() for name in FILES}
        self.stored = {}  # what a crash leaves
        self.serial_of_bytes = 0
        self.fs = self.machine.mount(self.path, block_size, "1MiB")
        self.files = {name: self.fs.create(name) for name in FILES}
        self.map_all()

    def map_all(self):
        length = MOST * PAGE_SIZE
        self.addrs = {
            (who, name): process.mmap(length, file=self.files[name])
            for who, process in enumerate(self.processes)
            for name in FILES
        }

    def unmap_all(self):
        for (who, _), addr in self.addrs.items():
            self.processes[who].munmap(addr, MOST * PAGE_SIZE)

    def fresh(self, nbytes):
        self.serial_of_bytes += 1
        numbers = np.arange(nbytes, dtype=np.uint32) * 7 + self.serial_of_bytes * 13 + 1
        return numbers.astype(np.uint8).tobytes()

    def pfns(self, name):
        entries = self.files[name].f_mapping.i_pages.load(np.arange(MOST))
        return entries[entries > 0]

    @rule(name=st.sampled_from(FILES), pos=OFFSETS, nbytes=SIZES)
    def write(self, name, pos, nbytes):
        data = self.fresh(min(nbytes, MOST * PAGE_SIZE - pos))
        assert len(data) == self.files[name].write(pos, data)
        twin = self.twins[name]
        twin.extend(bytes(max(pos + len(data) - len(twin), 0)))
        twin[pos : pos + len(data)] = data

    @rule(name=st.sampled_from(FILES), pos=OFFSETS, nbytes=SIZES)
    def read(self, name, pos, nbytes):
        assert bytes(self.twins[name][pos : pos + nbytes]) == self.files[name].read(pos, nbytes)

    @rule(name=st.sampled_from(FILES), who=st.integers(0, 1), pos=OFFSETS, nbytes=SIZES)
    def load(self, name, who, pos, nbytes):
        addr, twin = self.addrs[who, name], self.twins[name]
        there = max(min(nbytes, len(twin) - pos), 0)
        if there:
            assert bytes(twin[pos : pos + there]) == self.processes[who].read(addr + pos, there)

    @rule(name=st.sampled_from(FILES), who=st.integers(0, 1), pos=OFFSETS, nbytes=SIZES)
    def store(self, name, who, pos, nbytes):
        addr, twin = self.addrs[who, name], self.twins[name]
        there = max(min(nbytes, len(twin) - pos), 0)
        if there:
            data = self.fresh(there)
            self.processes[who].write(addr + pos, data)
            twin[pos : pos + there] = data

    @rule(name=st.sampled_from(FILES), who=st.integers(0, 1))
    def beyond_the_end(self, name, who):
        end = -(-len(self.twins[name]) // PAGE_SIZE) * PAGE_SIZE
        if end < MOST * PAGE_SIZE:
            with pytest.raises(BusError):
                self.processes[who].write(self.addrs[who, name] + end, b"x")

    @rule(name=st.sampled_from(FILES), size=st.integers(0, MOST * PAGE_SIZE))
    def truncate(self, name, size):
        self.files[name].truncate(size)
        twin = self.twins[name]
        twin.extend(bytes(max(size - len(twin), 0)))
        del twin[size:]

    @rule(name=st.sampled_from(FILES))
    def fsync(self, name):
        self.files[name].fsync()
        self.stored[name] = bytes(self.twins[name])
        assert self.stored[name] == self.after_crash()[name]

    @rule()
    def sync(self):
        self.machine.sync()
        self.stored = {name: bytes(twin) for name, twin in self.twins.items()}
        assert self.stored == self.after_crash()

    @rule(name=st.sampled_from(FILES), nth=st.integers(1, 4))
    def failed_fsync(self, name, nth):
        """What fails to be written may be lost, but that is told; what is stored again is not.

        A commit may have written the other file too.
        """
        self.fs.device.fail("write", nth=nth)
        told = []
        for file in (self.files[name], *self.files.values()):
            try:
                file.fsync()
            except InputOutputError as error:
                told.append(error)
            self.fs.device.faults.clear()
        if told:
            for again in FILES:
                self.files[again].truncate(0)
                self.files[again].write(0, bytes(self.twins[again]))
        self.sync()

    @rule(name=st.sampled_from(FILES))
    def reclaim(self, name):
        lru_add_drain_all(self.mem)
        reclaim_pages(self.mem, self.pfns(name))

    @rule(wanted=st.integers(1, 60))
    def short_memory(self, wanted):
        try_to_free_pages(self.mem, [0, 1], wanted)

    @rule()
    def drop_caches(self):
        self.machine.drop_caches()

    @rule(name=st.sampled_from(FILES), who=st.integers(0, 1), nid=st.integers(0, 1))
    def move(self, name, who, nid):
        addrs = self.addrs[who, name] + np.arange(MOST) * PAGE_SIZE
        self.processes[who].move_pages(addrs, [nid] * MOST)

    @rule()
    def write_back_slowly(self):
        """Pages are under way while other things happen to them."""
        with self.fs.device.hold():
            for file in self.files.values():
                flush(file.f_mapping)
            self.drop_caches()
            for name in FILES:
                self.reclaim(name)
                if self.twins[name]:
                    self.store(name, 1, len(self.twins[name]) // 2, 9000)
            self.machine.verify()

    @rule(crash=st.booleans())
    def remount(self, crash):
        self.unmap_all()
        for file in self.files.values():
            file.close()
        if crash and set(FILES) == set(self.stored):
            copy = self.path.read_bytes()
            self.fs.unmount()
            self.path.write_bytes(copy)
            self.fs = self.machine.mount(self.path)
            self.files = {name: self.fs.open(name) for name in FILES}
            for name, file in self.files.items():
                self.twins[name] = bytearray(file.read(0, file.size))
            for name in set(self.fs.listdir()) - set(FILES):
                self.fs.unlink(name)  # it filled the disk when that crashed
        else:
            self.fs.unmount()
            self.fs = self.machine.mount(self.path)
            self.files = {name: self.fs.open(name) for name in FILES}
        self.stored = {name: bytes(twin) for name, twin in self.twins.items()}
        self.map_all()

    @rule(name=st.sampled_from(FILES))
    def recreate(self, name):
        """A file is unlinked, and its bytes go when the last mapping does; another has the name."""
        old = self.files[name]
        self.fs.unlink(name)
        assert bytes(self.twins[name]) == old.read(0, old.size)
        self.unmap_all()
        old.close()
        self.files[name], self.twins[name] = self.fs.create(name), bytearray()
        self.stored.pop(name, None)
        self.map_all()

    @rule()
    def fill_the_disk(self):
        with self.fs.create("full") as file:
            file.write(0, bytes(self.fs.free_bytes))
            with pytest.raises(NoSpace):
                file.write(1 << 20, bytes(PAGE_SIZE))
        self.fs.unlink("full")

    @invariant()
    def sound(self):
        if hasattr(self, "fs"):
            self.machine.verify()

    def after_crash(self):
        """All files of the image as it is now, read by another machine."""
        copy = self.path.with_suffix(".copy")
        shutil.copy(self.path, copy)
        with Machine(("1MiB",)).mount(copy) as fs:
            found = {}
            for name in fs.listdir():
                with fs.open(name) as file:
                    found[name] = file.read(0, file.size)
        return found

    def teardown(self):
        if hasattr(self, "fs"):
            self.unmap_all()
            for file in self.files.values():
                file.close()
            self.fs.unmount()


def flush(mapping):
    """What the flusher does."""
    write_cache_pages(mapping, WritebackControl())


class TestThreads:
    def test_all_at_once(self, tmp_path):
        """Threads that write, map, cut, store and reclaim the same files leave a sound machine."""
        machine = mapped_range(pages=1, nodes=("4MiB", "4MiB"), memory="256KiB").machine
        length, errors = MOST * PAGE_SIZE, []
        with machine.mount(tmp_path / "disk", "1KiB", "1MiB") as fs:
            files = [fs.create(name) for name in FILES]
            threads = [
                threading.Thread(target=use_files, args=(machine, files, seed, errors))
                for seed in range(3)
            ]
            for file in files:
                file.truncate(length)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [] == errors
            machine.verify()
            for mm in tuple(machine.mem.mms):
                with mm.mmap_sem.write():
                    exit_mmap(mm)
            for file in files:
                file.close()
        with machine.mount(tmp_path / "disk") as fs:
            assert list(FILES) == fs.listdir()


def use_files(machine, files, seed, errors):
    """Do this and that to *files*, two hundred times; what is raised goes to *errors*."""
    draw = random.Random(seed)
    process, length = machine.spawn(f"thread {seed}"), MOST * PAGE_SIZE
    addrs = [process.mmap(length, file=file) for file in files]
    pages = np.arange(MOST) * PAGE_SIZE
    try:
        for _ in range(200):
            which, nbytes = draw.randrange(2), draw.randrange(9000)
            pos = draw.randrange(length // 2)
            calls = (
                partial(files[which].write, pos, bytes(nbytes)),
                partial(files[which].read, pos, nbytes),
                partial(files[which].truncate, pos + nbytes),
                files[which].fsync,
                machine.sync,
                machine.drop_caches,
                partial(process.read, addrs[which] + pos, nbytes),
                partial(process.write, addrs[which] + pos, bytes(nbytes)),
                partial(try_to_free_pages, machine.mem, [0, 1], 50),
                partial(process.move_pages, addrs[which] + pages, [0, 1] * 10),
            )
            with suppress(BusError):  # beyond the end, where another thread has put it
                draw.choice(calls)()
    except BaseException as error:  # noqa: BLE001 - the test raises it
        errors.append(error)


class TestFiles(Files.TestCase):
    settings = settings(max_examples=20, stateful_step_count=20)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        Files.folder, Files.serial = tmp_path, 0
