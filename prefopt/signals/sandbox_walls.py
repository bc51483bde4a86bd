"""The walls around model-written Python: every one this machine has, built by the process that goes behind them.

Nothing here decides whether they are enough: `sandbox_promises` tries that. Standard library only; runs in
`sandbox_child.py`, in a process that has imported nothing else of this package.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys

from prefopt.signals.sandbox_syscalls import ARCHITECTURES, seccomp_filter

TYPE_CHECKING = (
    False  # as `typing` has it, without the 2 ms that importing it takes of every program
)
if TYPE_CHECKING:
    from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_CAPGET, _CAPSET = {"x86_64": (125, 126), "aarch64": (90, 91)}.get(os.uname().machine, (0, 0))
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2
# CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID: to give a program an identity of its own, to end it and
# to clean up after it. Our parent has what we have.
_NEEDED_CAPS = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7

# linux/landlock.h
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REFER, _TRUNCATE, _IOCTL_DEV = (
    1 << bit for bit in (0, 1, 2, 3, 13, 14, 15)
)
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_REGULAR = sum(1 << bit for bit in (4, 5, 7, 8, 12))  # remove, make: directories, files, symlinks

_PYTHON_NEEDS = (
    "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/lib", "/lib64", "/usr/share",
    "/usr/local/share", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types",
    "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip


def isolate(orders: dict[str, Any]) -> dict[str, str]:
    """Gives up everything that a program does not need.

    Args:
        orders: ``parent`` (process number), ``outside`` (a file beside the working directory that must not be
            reached), ``kept`` (descriptors), ``readable``, and the limits.

    Returns: what was built, by the name of each wall; "not there: …" where this machine has no such wall.
    Raises: RuntimeError where the machine is none that we know the system calls of.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        raise RuntimeError(
            f"needs Linux on x86_64 or arm64 (seccomp); this is {sys.platform} on {machine}"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    below = 2
    for kept in (*sorted(orders["kept"]), 1 << 16):
        os.closerange(below + 1, kept)
        below = kept
    readable = readable_paths(orders["readable"])
    built: dict[str, str] = {}
    own_count, modes = _identity(libc, orders, readable, built)
    limit(orders, own_count)
    # For /dev/stdin, which is a link in its own /proc; another's is behind Landlock, and behind another user.
    _call(libc.prctl, _PR_SET_DUMPABLE, 1, 0, 0, 0)
    # After the identity, a change of which would undo it.
    _call(libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != orders["parent"]:
        os._exit(1)  # it was killed before we asked to go with it
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for name, build in (
        ("landlock", lambda: f"ABI {_landlock(libc, readable)}"),
        ("seccomp", lambda: f"{_seccomp(libc, machine, modes)} instructions"),
    ):
        try:
            built[name] = build()
        except OSError as error:
            built[name] = f"not there: {error.strerror}"
    return built


def limit(orders: dict[str, Any], own_count: bool) -> None:
    """Sets resource limits, hard ones: nobody in here can raise them again.

    Args:
        own_count: whether the kernel counts this program's threads alone, and not all of the user's.
    """
    cpu, threads = orders["cpu_s"], orders["threads"]
    if not own_count:  # more than all that run here: a bound still, though a wider one
        with open("/proc/loadavg") as loads:
            threads += int(loads.read().split()[3].split("/")[1])
    for kind, soft, hard in (
        (resource.RLIMIT_AS, orders["memory_bytes"], orders["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_FSIZE, orders["file_bytes"], orders["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, threads, threads),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    # too large a file is an OSError, as in a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def readable_paths(more: list[str]) -> list[str]:
    """What Python reads to import its libraries, and what the settings name; what is not there is left out."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    below = tuple(os.path.join(os.path.realpath(prefix), "") for prefix in prefixes)
    libraries = [
        os.path.join(prefix, name) for prefix in below for name in ("lib", "lib64", "share")
    ]
    # wherever the packages are; but no checkout that an editable install points at: keys lie in such folders
    libraries += [path for path in sys.path if path.endswith(("/site-packages", "/dist-packages"))]
    found = [os.path.dirname(os.__file__), *libraries, *_PYTHON_NEEDS, *more]
    return [path for path in dict.fromkeys(found) if os.path.exists(path)]


# --- who it is -----------------------------------------------------------------------------------


def _identity(
    libc: ctypes.CDLL, orders: dict[str, Any], readable: list[str], built: dict[str, str]
) -> tuple[bool, bool]:
    """Becomes nobody in particular: with root's rights a user of its own, else one in a namespace of its own.

    Returns: whether the kernel counts the threads of this program alone; whether all files but its own are
        another's, so that it may change modes.
    """
    spaces = _CLONE_NEWNET | _CLONE_NEWIPC
    user = _other_user(libc, orders["outside"])
    if user is None:
        spaces |= _CLONE_NEWUSER
    apart = libc.unshare(spaces) == 0
    built["namespaces"] = ("" if apart else "not there: ") + (
        "network, ipc" if user is not None else "user, network, ipc"
    )
    if user is None:
        built["user"] = "that of the parent"
        _set_capabilities(libc, 0)
        # before 5.14, a namespace had no count of its own
        return apart and _kernel() >= (5, 14), False
    # Root's Python often lies where only root may look (/root/.pyenv). Landlock bounds what this reads; containers
    # often lack the first of the two rights.
    had = _capabilities(libc)
    looks = had & _DAC_READ_SEARCH or had & _DAC_OVERRIDE
    _set_capabilities(libc, 0, looks)
    hidden = [path for path in (*readable, os.getcwd()) if not os.access(path, os.R_OK)]
    _set_capabilities(libc, looks if hidden else 0)
    built["user"] = f"one of its own ({user})" + (
        ", which may look into directories" if hidden else ""
    )
    return True, True


def _other_user(libc: ctypes.CDLL, outside: str) -> int | None:
    """Becomes a user that nobody is, who owns the working directory; None without the rights to.

    The capabilities are kept for what must come after.
    """
    had = _capabilities(libc)
    user = _free_user() if had & _NEEDED_CAPS == _NEEDED_CAPS else None
    if user is None:
        return None
    _call(libc.prctl, _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:  # not this number, or not under this container's rules
        return None
    _set_capabilities(libc, had)
    os.chmod(os.path.dirname(outside), 0o711)
    os.chown(os.getcwd(), user, user)
    return user


def _free_user() -> int | None:
    """A user number that nobody has, the same as a group; None where there is none to be had."""
    spans = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as lines:
            each = [tuple(map(int, line.split())) for line in lines]
        first, _, count = max(each, key=lambda span: span[2])
        spans.append((first, first + count))
    first, end = max(span[0] for span in spans), min(span[1] for span in spans)
    # between the container ranges and the end of what is valid, systemd's table says, there is nobody
    low, high = 0x70000000, 0x7FFEFFFF
    if end <= high:
        low, high = first + (end - first) * 3 // 4, end - 2
    if high - low < 1000:
        return None
    return low + int.from_bytes(os.urandom(8), "little") % (high - low)


def _capabilities(libc: ctypes.CDLL) -> int:
    """Effective ones, as a mask of the first 32."""
    data = ctypes.create_string_buffer(24)
    _call(libc.syscall, _CAPGET, struct.pack("Ii", 0x20080522, 0), data)
    return struct.unpack("6I", data.raw)[0]


def _set_capabilities(libc: ctypes.CDLL, effective: int, permitted: int | None = None) -> None:
    wanted = struct.pack("6I", effective, effective if permitted is None else permitted, 0, 0, 0, 0)
    _call(libc.syscall, _CAPSET, struct.pack("Ii", 0x20080522, 0), wanted)


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


# --- what it reaches -----------------------------------------------------------------------------


def _landlock(libc: ctypes.CDLL, readable: list[str]) -> int:
    """Files may be changed below the working directory only, and read there and where Python reads.

    Returns: the ABI. Raises: OSError on a kernel without Landlock.
    """
    create, add_rule, restrict = 444, 445, 446
    abi = _call(libc.syscall, create, None, ctypes.c_size_t(0), 1)
    write = _WRITE_FILE | (_TRUNCATE if abi >= 3 else 0)
    own = _READ_FILE | _READ_DIR | _REGULAR | write | (_REFER if abi >= 2 else 0)
    handled = own | _EXECUTE | _REMOVE_AND_MAKE | (_IOCTL_DEV if abi >= 5 else 0)
    network = 0b11 if abi >= 4 else 0  # bind, connect
    scoped = 0b11 if abi >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("QQQ", handled, network, scoped)
    attributes = attributes[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _call(libc.syscall, create, attributes, ctypes.c_size_t(len(attributes)), 0)
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    for path, allowed in (*rules, (os.getcwd(), own), ("/dev/null", _READ_FILE | write)):
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (
            PermissionError
        ):  # below a directory that this user may not enter: without a rule it is as shut
            continue
        if not os.path.isdir(path):
            allowed &= _READ_FILE | write
        _call(libc.syscall, add_rule, ruleset, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
    _call(libc.syscall, restrict, ruleset, 0)
    os.close(ruleset)
    return abi


def _seccomp(libc: ctypes.CDLL, machine: str, modes: bool) -> int:
    """Returns: how many instructions the filter has. Raises: OSError on a kernel without seccomp."""
    filter_ = ctypes.create_string_buffer(seccomp_filter(machine, os.getpid(), modes=modes))
    size = (len(filter_) - 1) // 8
    program = struct.pack("HxxxxxxP", size, ctypes.addressof(filter_))
    _call(libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)
    return size


def _call(function: Any, *arguments: object) -> int:
    """Raises: OSError where the C function says so."""
    found = function(*arguments)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found
