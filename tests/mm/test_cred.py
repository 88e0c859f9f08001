"""Who may do what to whom: users, capabilities, and the limit of locked memory."""

import pytest

from mm import (
    PAGE_SIZE,
    AccessDenied,
    InvalidArgument,
    Machine,
    OutOfMemory,
    PermissionDenied,
    TryAgain,
)
from mm.cred import CAP_FULL_SET, ROOT, Cred, capable, prepare_cred, ptrace_may_access
from mm.sched import running


@pytest.fixture
def machine():
    """Two nodes."""
    machine = Machine(("4MiB", "4MiB"), swap="1MiB", max_physmem="64MiB", debug=True)
    yield machine
    machine.verify()


def filled(process, pages=2):
    """Pages that the process has stored to, on node 0."""
    addr = process.mmap(pages * PAGE_SIZE)
    process.write(addr, b"secret" + bytes(pages * PAGE_SIZE - 6))
    return addr


class TestCred:
    def test_default(self, machine):
        """Root may do everything, others nothing; what is named is had by either."""
        root, user = machine.spawn("root"), machine.spawn("user", uid=1000)
        nice = machine.spawn("nice", uid=1000, caps=["sys_nice"])

        assert (ROOT, Cred(1000, 1000, 0)) == (root.cred, user.cred)
        assert [CAP_FULL_SET, 0, 1 << 23] == [p.cred.caps for p in (root, user, nice)]
        assert 0 == machine.spawn("tame", caps=()).cred.caps

    def test_who_runs_counts(self, machine):
        """A capability is that of the task that runs; outside of all, of the machine itself."""
        with running(machine.spawn("user", uid=7)):
            assert not capable(1 << 23)
        assert capable(1 << 23)

    def test_child(self, machine):
        """A child is who its parent was."""
        parent = machine.spawn("user", uid=7, caps=["ipc_lock"])
        parent.rlimit_memlock = 3 * PAGE_SIZE
        child = parent.fork()

        assert (parent.cred, 3 * PAGE_SIZE) == (child.cred, child.rlimit_memlock)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"uid": -1}, "a user is a number"),
            ({"uid": 1 << 32}, "a user is a number"),
            ({"uid": 1, "caps": ["sys_admin"]}, "are not among ipc_lock, sys_ptrace, sys_nice"),
        ],
    )
    def test_no_such(self, machine, options, says):
        """The message says what can be."""
        with pytest.raises(InvalidArgument, match=says):
            machine.spawn("x", **options)


class TestPtrace:
    @pytest.mark.parametrize(
        ("mine", "theirs", "may"),
        [
            (prepare_cred(7), prepare_cred(7), True),
            (prepare_cred(7), prepare_cred(8), False),
            (prepare_cred(7), prepare_cred(0), False),
            (prepare_cred(0), prepare_cred(7), True),
            (prepare_cred(0, caps=()), prepare_cred(7), False),
            (prepare_cred(7, caps=["sys_ptrace"]), prepare_cred(0), True),
            (prepare_cred(7), prepare_cred(7, euid=0, caps=()), False),
            (prepare_cred(7), prepare_cred(7, caps=["ipc_lock"]), False),
            (
                prepare_cred(7, caps=["ipc_lock", "sys_nice"]),
                prepare_cred(7, caps=["sys_nice"]),
                True,
            ),
        ],
    )
    def test_table(self, machine, mine, theirs, may):
        """The same user in all respects, no capability more; or CAP_SYS_PTRACE."""
        me, them = machine.spawn("me"), machine.spawn("them")
        me.cred, them.cred = mine, theirs
        with running(me):
            assert may == ptrace_may_access(them)
            assert ptrace_may_access(me)

    def test_whose_rights_count(self, machine):
        """For a file it is the effective user, for a system call the real one."""
        me, them = machine.spawn("me"), machine.spawn("them", uid=8)
        me.cred = prepare_cred(7, euid=8, caps=())
        with running(me):
            assert (False, True) == (ptrace_may_access(them), ptrace_may_access(them, fscreds=True))


class TestOtherProcesses:
    @pytest.fixture
    def two(self, machine):
        """A user's process, and the memory of another user's."""
        other = machine.spawn("other", uid=8)
        return machine.spawn("user", uid=7), other, filled(other)

    def test_mem(self, machine, two):
        """/proc/PID/mem of others cannot be opened; root reads and writes what is there."""
        user, other, addr = two
        for call in (
            lambda: user.mem_read(addr, 6, of=other),
            lambda: user.mem_write(addr, b"x", of=other),
        ):
            with pytest.raises(AccessDenied, match="user may not look into other"):
                call()

        root = machine.spawn("root")
        assert b"secret" == root.mem_read(addr, 6, of=other)
        root.mem_write(addr, b"S", of=other)
        assert b"Secret" == other.read(addr, 6)

    def test_move_pages(self, machine, two):
        """EPERM for who may not look into a process; its own user may."""
        user, other, addr = two
        for nodes in ([1], None):
            with pytest.raises(PermissionDenied, match="other is not user's to move"):
                user.move_pages([addr], nodes, of=other)

        brother = machine.spawn("brother", uid=8)
        assert [1] == brother.move_pages([addr], [1], of=other).tolist()
        assert [1, 0] == brother.move_pages([addr, addr + PAGE_SIZE], of=other).tolist()

    def test_migrate_pages(self, machine, two):
        """The same."""
        user, other, addr = two
        with pytest.raises(PermissionDenied, match="other is not user's to move"):
            user.migrate_pages([0], [1], of=other)

        assert 0 == machine.spawn("brother", uid=8).migrate_pages([0], [1], of=other)
        assert [1, 1] == other.move_pages([addr, addr + PAGE_SIZE]).tolist()


class TestSharedPages:
    @pytest.fixture
    def family(self, machine):
        """Two processes of a user that share two pages, and a third page of the first alone."""
        parent = machine.spawn("parent", uid=7)
        addr = filled(parent, 3)
        child = parent.fork()
        parent.write(addr + 2 * PAGE_SIZE, b"own")
        child.munmap(addr + 2 * PAGE_SIZE, PAGE_SIZE)
        return parent, addr

    @pytest.mark.parametrize(
        "call",
        [
            lambda process, addr: process.move_pages([addr], [1], "moveall"),
            lambda process, addr: process.mbind(addr, PAGE_SIZE, "bind", [1], "moveall"),
        ],
        ids=["move_pages", "mbind"],
    )
    def test_moveall(self, family, call):
        """What others map too is moved with CAP_SYS_NICE alone."""
        parent, addr = family
        with pytest.raises(PermissionDenied, match="parent lacks the capability sys_nice"):
            call(parent, addr)
        assert [0] == parent.move_pages([addr]).tolist()

        parent.cred = prepare_cred(7, caps=["sys_nice"])
        call(parent, addr)
        assert [1] == parent.move_pages([addr]).tolist()

    @pytest.mark.parametrize(("caps", "nodes"), [((), [0, 0, 1]), (("sys_nice",), [1, 1, 1])])
    def test_migrate_pages(self, family, caps, nodes):
        """migrate_pages leaves them without it, and does not say so."""
        parent, addr = family
        parent.cred = prepare_cred(7, caps=caps)

        assert 0 == parent.migrate_pages([0], [1])
        assert nodes == parent.move_pages([addr + i * PAGE_SIZE for i in range(3)]).tolist()


class TestLockedMemory:
    @pytest.fixture
    def user(self, machine):
        """A process that may lock four pages."""
        user = machine.spawn("user", uid=7)
        user.rlimit_memlock = 4 * PAGE_SIZE + 1
        return user

    def test_mlock(self, user):
        """ENOMEM past the limit; what is locked already counts once."""
        addr = user.mmap(8 * PAGE_SIZE)
        user.mlock(addr, 3 * PAGE_SIZE)
        user.mlock(addr + PAGE_SIZE, 3 * PAGE_SIZE)
        with pytest.raises(OutOfMemory, match="1 pages more than the 4 that user has locked"):
            user.mlock(addr + 4 * PAGE_SIZE, 1)

        user.munlock(addr, PAGE_SIZE)
        user.mlock(addr + 4 * PAGE_SIZE, 1)
        assert 4 == user.mm.locked_vm

    def test_mmap(self, user):
        """EAGAIN there, before anything is mapped."""
        user.mmap(4 * PAGE_SIZE, flags="anon|private|locked")
        with pytest.raises(TryAgain, match="raise rlimit_memlock"):
            user.mmap(1, flags="anon|private|locked")

        assert 4 == user.mm.total_vm

    def test_mremap(self, user):
        """Locked memory grows to the limit."""
        addr = user.mmap(2 * PAGE_SIZE, flags="anon|private|locked")
        addr = user.mremap(addr, 2 * PAGE_SIZE, 4 * PAGE_SIZE)
        with pytest.raises(TryAgain, match="mremap"):
            user.mremap(addr, 4 * PAGE_SIZE, 5 * PAGE_SIZE)

        assert 4 == user.mm.locked_vm

    def test_none_at_all(self, user):
        """EPERM for who may lock nothing."""
        user.rlimit_memlock = 0
        addr = user.mmap(PAGE_SIZE)
        for call in (
            lambda: user.mlock(addr, 1),
            lambda: user.mmap(1, flags="anon|private|locked"),
        ):
            with pytest.raises(PermissionDenied, match="user may lock no memory"):
                call()

    def test_capability(self, machine):
        """CAP_IPC_LOCK, as root has it, knows no limit."""
        for process in (machine.spawn("root"), machine.spawn("user", uid=7, caps=["ipc_lock"])):
            process.rlimit_memlock = 0
            process.mlock(process.mmap("1MiB"), "1MiB")
            assert 256 == process.mm.locked_vm
            process.exit()
