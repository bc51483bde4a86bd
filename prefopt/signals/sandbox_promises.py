"""What the sandbox promises, and the attempts that show whether it holds: made behind the walls, each time.

An attempt that gets through changes nothing that matters: it asks for what is harmless, or of a file that is
there to be tried. Standard library only; runs in `sandbox_child.py`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from _thread import start_new_thread
from collections import namedtuple

TYPE_CHECKING = (
    False  # as `typing` has it, without the 2 ms that importing it takes of every program
)
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

PROMISES = {
    "limits": "CPU time, memory, size and number of open files are bounded, for good",
    "threads": "so many threads and no more",
    "network": "no socket, and no way round one",
    "new_processes": "no new process, and no other program in this one",
    "other_processes": "no other process is signalled, read, written, traced or set",
    "reads": "no file is read but its own and Python's; no keys, no descriptor of the parent",
    "changes": "no file but its own is made, written, moved or removed, or has its mode set; owner, "
    "times, attributes, locks and leases of none",
    "privileges": "no rights of root, no namespace, no clock, no kernel interface for administrators",
    "lifetime": "it ends with the process that started it",
}
"""Name -> what is promised. The names are what `Limits.accept_risks` takes."""

REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS, errno.EXDEV}
"""How a wall says no; any other error means that the call got behind it."""


Attempt = namedtuple("Attempt", "promise what do")
"""One thing that must not be possible; ``do()`` raises OSError where it is not."""

Tried = namedtuple("Tried", "promise what held how")
"""How an attempt ended: whether the promise held, and the error's name, or "possible"."""


def try_all(orders: dict[str, Any]) -> list[Tried]:
    """Every attempt, in the order of `PROMISES`."""
    libc = ctypes.CDLL(None, use_errno=True)
    sources = (_limits, _threads, _network, _processes, _others, _reads, _changes, _rights, _end)
    return [_try(each) for source in sources for each in source(libc, orders)]


def _try(attempt: Attempt) -> Tried:
    try:
        attempt.do()
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error))
        return Tried(attempt.promise, attempt.what, error.errno in REFUSALS, name)
    return Tried(attempt.promise, attempt.what, False, "possible")


def _c(function: Any, *arguments: object) -> int:
    found = function(*arguments)
    if found == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def _refuse_unless(met: bool, code: int = errno.EPERM) -> None:
    """For what is seen and not called: raises as a wall does where a promise is met."""
    if met:
        raise OSError(code, os.strerror(code))


def _limits(_libc: ctypes.CDLL, orders: dict[str, Any]) -> Iterator[Attempt]:
    def more_memory() -> None:
        try:
            bytearray(orders["memory_bytes"])
        except MemoryError:
            _refuse_unless(True, errno.ENOSYS)

    def larger_file() -> None:
        handle = os.open("too-large", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.pwrite(handle, b"x", orders["file_bytes"])
        except OSError as error:
            _refuse_unless(error.errno == errno.EFBIG)
        finally:
            os.close(handle)
            os.unlink("too-large")

    def raised(kind: int, most: int) -> None:
        _refuse_unless(not 0 <= resource.getrlimit(kind)[1] <= most, errno.EIO)  # is not set at all
        try:
            resource.setrlimit(kind, (most, resource.RLIM_INFINITY))
        except (ValueError, OSError):
            _refuse_unless(True)

    yield Attempt("limits", "more memory than allowed", more_memory)
    yield Attempt("limits", "a larger file than allowed", larger_file)
    for name, kind, most in (
        ("memory", resource.RLIMIT_AS, orders["memory_bytes"]),
        ("CPU time", resource.RLIMIT_CPU, orders["cpu_s"] + 1),
        ("file size", resource.RLIMIT_FSIZE, orders["file_bytes"]),
        ("open files", resource.RLIMIT_NOFILE, 64),
        ("core dumps", resource.RLIMIT_CORE, 0),
    ):
        yield Attempt(
            "limits", f"to raise the limit of {name}", lambda k=kind, m=most: raised(k, m)
        )


def _threads(_libc: ctypes.CDLL, _orders: dict[str, Any]) -> Iterator[Attempt]:
    def one_too_many() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        _refuse_unless(hard < 0, errno.EIO)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
        try:
            start_new_thread(int, ())
        except RuntimeError:
            _refuse_unless(True)
        finally:
            resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))

    yield Attempt("threads", "a thread more than allowed", one_too_many)


def _network(libc: ctypes.CDLL, _orders: dict[str, Any]) -> Iterator[Attempt]:
    families = {
        "unix": 1,
        "IPv4": 2,
        "IPv6": 10,
        "netlink": 16,
        "packet": 17,
        "crypto": 38,
        "vsock": 40,
    }
    for name, family in families.items():
        yield Attempt("network", f"a socket ({name})", lambda f=family: _c(libc.socket, f, 1, 0))
    pair = (ctypes.c_int * 2)()
    yield Attempt(
        "network", "a pair of datagram sockets", lambda: _c(libc.socketpair, 1, 2, 0, pair)
    )
    yield Attempt("network", "connect", lambda: _c(libc.connect, -1, b"\1\0/x", 4))
    yield Attempt("network", "bind", lambda: _c(libc.bind, -1, b"\1\0/x", 4))
    yield Attempt(
        "network", "sendto an address", lambda: _c(libc.sendto, -1, b"", 0, 0, b"\1\0/x", 4)
    )
    yield Attempt("network", "sendmsg", lambda: _c(libc.sendmsg, -1, None, 0))
    yield Attempt("network", "io_uring", lambda: _c(libc.syscall, 425, 1, None))


def _processes(libc: ctypes.CDLL, _orders: dict[str, Any]) -> Iterator[Attempt]:
    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def execute() -> None:
        os.execv("/nowhere/to/be/found", ["x"])

    yield Attempt("new_processes", "fork", fork)
    yield Attempt(
        "new_processes", "clone3", lambda: _c(libc.syscall, 435, None, ctypes.c_size_t(0))
    )
    yield Attempt("new_processes", "execve", execute)


def _others(libc: ctypes.CDLL, orders: dict[str, Any]) -> Iterator[Attempt]:
    parent, own = int(orders["parent"]), os.getpid()
    numbers = {"x86_64": (200, 129, 297), "aarch64": (130, 138, 240)}[os.uname().machine]
    tkill, sigqueue, tgsigqueue = numbers
    queued = struct.pack("iii", 0, 0, -1) + bytes(
        116
    )  # SI_QUEUE: the kernel's own checks let it pass
    calls: dict[str, Callable[[], object]] = {
        "kill": lambda: os.kill(parent, 0),
        "kill of all": lambda: os.kill(-1, 0),
        "kill of the own group": lambda: os.kill(0, 0),
        "tkill": lambda: _c(libc.syscall, tkill, parent, 0),
        "tgkill": lambda: _c(libc.syscall, 234 if tkill == 200 else 131, parent, parent, 0),
        "rt_sigqueueinfo": lambda: _c(libc.syscall, sigqueue, parent, 0, queued),
        "rt_tgsigqueueinfo": lambda: _c(libc.syscall, tgsigqueue, parent, parent, 0, queued),
        "pidfd_open": lambda: _c(libc.syscall, 434, parent, 0),
        "pidfd_send_signal": lambda: _c(libc.syscall, 424, -1, 0, None, 0),
        "pidfd_getfd": lambda: _c(libc.syscall, 438, -1, 0, 0),
        "ptrace": lambda: _c(libc.ptrace, 3, parent, None, None),  # PEEKUSER of what is not traced
        "process_vm_readv": lambda: _c(libc.process_vm_readv, parent, None, 0, None, 0, 0),
        "process_vm_writev": lambda: _c(libc.process_vm_writev, parent, None, 0, None, 0, 0),
        "setpriority": lambda: _c(libc.setpriority, -1, parent, 0),
        "sched_setaffinity": lambda: _c(libc.sched_setaffinity, parent, 0, None),
        "sched_setscheduler": lambda: _c(libc.sched_setscheduler, parent, -1, bytes(8)),
        "prlimit": lambda: resource.prlimit(parent, resource.RLIMIT_CPU),
        "setpgid": lambda: _c(libc.setpgid, own, -1),
        "F_SETOWN": lambda: _c(libc.fcntl, 0, 8, own),
        "F_SETOWN_EX": lambda: _c(libc.fcntl, 0, 15, struct.pack("ii", 1, own)),
        "F_SETSIG": lambda: _c(libc.fcntl, 0, 10, 0),
        "F_NOTIFY": lambda: _c(libc.fcntl, 0, 1026, 0),
        "FIOSETOWN": lambda: _c(libc.ioctl, 0, 0x8901, bytes(4)),
        "TIOCSTI": lambda: _c(libc.ioctl, 0, 0x5412, b"x"),
        "TIOCSPGRP": lambda: _c(libc.ioctl, 0, 0x5410, bytes(4)),
        "timer_create": lambda: _c(libc.timer_create, -1, None, bytes(8)),
        "shared memory": lambda: _c(libc.shmget, 0, 0, 0),
        "message queues": lambda: _c(libc.msgget, -1, 0),
    }
    for name, call in calls.items():
        yield Attempt("other_processes", name, call)
    for name in ("environ", "mem", "maps", "root/", "cwd/"):
        path = f"/proc/{parent}/{name}"
        yield Attempt("other_processes", f"the parent's {name}", lambda p=path: _read(p))
    yield Attempt(
        "other_processes",
        "the parent's memory, to write",
        lambda: _open(f"/proc/{parent}/mem", os.O_RDWR),
    )


def _reads(_libc: ctypes.CDLL, orders: dict[str, Any]) -> Iterator[Attempt]:
    given = {
        "HOME", "TMPDIR", "LANG", "LC_CTYPE", "PYTHONHASHSEED", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX",
    }  # fmt: skip

    def inherited() -> None:
        kept = {0, 1, 2, *orders["kept"]}
        for handle in range(256):
            if handle not in kept:
                try:
                    os.fstat(handle)
                except OSError:
                    continue
                return
        _refuse_unless(True)

    outside, parent = orders["outside"], orders["parent"]
    yield Attempt("reads", "the parent's command line", lambda: _read(f"/proc/{parent}/cmdline"))
    yield Attempt("reads", "the parent's list of open files", lambda: _read(f"/proc/{parent}/fd/"))
    yield Attempt("reads", "a file outside", lambda: _read(outside))
    yield Attempt("reads", "the directory it lies in", lambda: _read(os.path.dirname(outside)))
    yield Attempt("reads", "what is in /", lambda: _read("/"))
    yield Attempt("reads", "/proc/self/environ", lambda: _read("/proc/self/environ"))
    yield Attempt(
        "reads", "variables of the environment", lambda: _refuse_unless(set(os.environ) <= given)
    )
    yield Attempt("reads", "descriptors of the parent", inherited)


def _changes(libc: ctypes.CDLL, orders: dict[str, Any]) -> Iterator[Attempt]:
    file = orders["outside"]
    beside = f"{file}-2"
    name, path, own = beside.encode(), file.encode(), os.getcwd()

    def library_mode() -> None:
        handle = os.open(os.__file__, os.O_RDONLY)
        try:
            os.fchmod(handle, os.fstat(handle).st_mode & 0o7777)  # to what it is
        finally:
            os.close(handle)

    calls: dict[str, Callable[[], object]] = {
        "open to write": lambda: _open(file, os.O_WRONLY),
        "open to append": lambda: _open(file, os.O_WRONLY | os.O_APPEND),
        "open to empty": lambda: _open(file, os.O_RDONLY | os.O_TRUNC),
        "truncate": lambda: os.truncate(file, 0),
        "a new file": lambda: _open(beside, os.O_WRONLY | os.O_CREAT),
        "a new directory": lambda: os.mkdir(beside),
        "a symbolic link": lambda: os.symlink("x", beside),
        "a hard link": lambda: os.link(file, os.path.join(own, "linked")),
        "a fifo": lambda: os.mkfifo(beside),
        "a device": lambda: os.mknod(os.path.join(own, "device"), 0o020600, os.makedev(1, 3)),
        "rename": lambda: os.rename(file, beside),
        "unlink": lambda: os.unlink(file),
        "chmod": lambda: os.chmod(file, 0o666),
        "chmod of an open file": library_mode,
        "fchmodat2": lambda: _c(libc.syscall, 452, -100, path, 0o666, 0),
        "chown": lambda: os.chown(file, -1, -1),
        "times": lambda: os.utime(file),
        "attributes": lambda: os.setxattr(file, "user.x", b"1"),
        "attributes of a link": lambda: os.setxattr(file, "user.x", b"1", follow_symlinks=False),
        "removing an attribute": lambda: os.removexattr(file, "user.x"),
        "flags": lambda: _c(libc.ioctl, 0, 0x40086602, bytes(8)),
        "flock": lambda: _c(libc.flock, 0, 4 | 8),
        "a lock of a file description": lambda: _c(libc.fcntl, 0, 37, bytes(32)),
        "a lease": lambda: _c(libc.fcntl, 0, 1024, 2),
        "a watch (inotify)": lambda: _c(libc.inotify_init1, 0),
        "a watch (fanotify)": lambda: _c(libc.fanotify_init, 0, 0),
        "a file by its handle": lambda: _c(libc.name_to_handle_at, -100, name, None, None, 0),
    }
    for what, call in calls.items():
        yield Attempt("changes", what, call)


def _rights(libc: ctypes.CDLL, _orders: dict[str, Any]) -> Iterator[Attempt]:
    def no_capabilities() -> None:
        data = ctypes.create_string_buffer(24)
        _c(libc.capget, struct.pack("Ii", 0x20080522, 0), data)
        effective, permitted, inherited, *upper = struct.unpack("6I", data.raw)
        # CAP_DAC_OVERRIDE or CAP_DAC_READ_SEARCH may be left: see `sandbox_walls._identity`
        _refuse_unless(not any(((effective | permitted) & ~6, inherited, *upper)))

    personality, keyctl, bpf, userfault, perf = (
        (135, 250, 321, 323, 298) if os.uname().machine == "x86_64" else (92, 219, 280, 282, 241)
    )
    calls: dict[str, Callable[[], object]] = {
        "capabilities": no_capabilities,
        "setuid": lambda: _c(libc.setuid, os.getuid()),
        "setgid": lambda: _c(libc.setgid, os.getgid()),
        "capset": lambda: _c(libc.capset, struct.pack("Ii", 0x20080522, 0), bytes(24)),
        "a namespace": lambda: _c(libc.unshare, 0),
        "setns": lambda: _c(libc.setns, -1, 0),
        "mount": lambda: _c(libc.mount, None, None, None, 0, None),
        "chroot": lambda: _c(libc.chroot, b"/nowhere/to/be/found"),
        "the clock": lambda: _c(libc.clock_settime, -1, bytes(16)),
        "the host's name": lambda: _c(libc.sethostname, None, -1),
        "keys of the kernel": lambda: _c(libc.syscall, keyctl, -1, 0, 0, 0, 0),
        "personality": lambda: _c(libc.syscall, personality, 0xFFFFFFFF),
        "bpf": lambda: _c(libc.syscall, bpf, -1, None, 0),
        "userfaultfd": lambda: _c(libc.syscall, userfault, -1),
        "perf_event_open": lambda: _c(libc.syscall, perf, None, 0, 0, -1, 0),
        "memory without a limit": lambda: _c(libc.memfd_create, b"x", -1),
    }
    for name, call in calls.items():
        yield Attempt("privileges", name, call)


def _end(libc: ctypes.CDLL, orders: dict[str, Any]) -> Iterator[Attempt]:
    def bound() -> None:
        last = ctypes.c_int(0)
        _c(libc.prctl, 2, ctypes.byref(last), 0, 0, 0)  # PR_GET_PDEATHSIG
        _refuse_unless(last.value == signal.SIGKILL and os.getppid() == orders["parent"])

    yield Attempt("lifetime", "to be on its own", bound)
    yield Attempt(
        "lifetime", "PR_SET_PDEATHSIG", lambda: _c(libc.prctl, 1, signal.SIGKILL, 0, 0, 0)
    )
    yield Attempt("lifetime", "PR_SET_CHILD_SUBREAPER", lambda: _c(libc.prctl, 36, 0, 0, 0, 0))


def _open(path: str, flags: int) -> None:
    os.close(os.open(path, flags | os.O_CLOEXEC, 0o600))


def _read(path: str) -> None:
    """Opens a file, or lists a directory, as far as it is there."""
    if path.endswith("/") or os.path.isdir(path):
        os.listdir(path)
    else:
        _open(path, os.O_RDONLY)
