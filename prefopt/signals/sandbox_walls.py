"""The walls around model-written Python: limits and isolation of the process that asks; standard library only.

Loaded by `sandbox_child.py` from its own folder, in a process that does not know this package.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_THREAD = (
    0x08000000,
    0x10000000,
    0x40000000,
    0x10000,
)

# Audit architecture, then syscall numbers. What is not listed is allowed: a list of what Python may do
# differs by version and by library; what must not happen is short.
_ARCHITECTURES = {
    "x86_64": 0xC000003E,
    "aarch64": 0xC00000B7,
}
_DENIED = {  # name: (x86_64, aarch64)
    # processes: a fork bomb cannot begin, nothing outlives the kill
    "fork": (57, None), "vfork": (58, None),
    # network, and ways around a denied socket()
    "socket": (41, 198), "io_uring_setup": (425, 425), "pidfd_getfd": (438, 438),
    # other processes
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    # memory that RLIMIT_AS does not see, or that outlives the process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219),
    # kernel surface no unit test needs
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442),
}  # fmt: skip
_OWN_PID_ONLY = {"kill": (62, 129), "tgkill": (234, 131)}
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)


def limit(orders: dict[str, int]) -> None:
    """Sets resource limits, hard ones: nobody in here can raise them again."""
    cpu = orders["cpu_s"]
    for kind, soft, hard in (
        (resource.RLIMIT_AS, orders["memory_bytes"], orders["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_FSIZE, orders["file_bytes"], orders["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # too large a file is an OSError, as in a full disk


def isolate() -> None:
    """Gives up network, files outside the working directory, and other processes.

    Required: a seccomp filter, which needs no privilege. Where the kernel permits, on top of it: a network
    namespace of its own, and Landlock, without which files are protected by their permissions alone.
    Raises: RuntimeError or OSError without seccomp.
    """
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        raise RuntimeError(
            f"needs Linux on x86_64 or arm64 (seccomp); this is {sys.platform} on {platform.machine()}"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a killed trainer takes us along
    libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC)  # may be forbidden
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _landlock(libc)
    _seccomp(libc, platform.machine())


def verify() -> None:
    """Tries what must be impossible by now. Raises: RuntimeError if it is not."""
    for name, attempt in (
        ("a socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
        ("a signal to the parent", lambda: os.kill(os.getppid(), 0)),
        ("a new process", _fork),
    ):
        try:
            attempt()
        except PermissionError:
            continue
        except OSError as error:
            raise RuntimeError(
                f"{name} failed for another reason than isolation: {error}"
            ) from error
        raise RuntimeError(f"{name} was possible")


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _call(function: object, *arguments: object) -> int:
    found = function(*arguments)  # type: ignore[operator]
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def _landlock(libc: ctypes.CDLL) -> None:
    """Files may be changed below the working directory only; does nothing on a kernel without Landlock."""
    create, add_rule, restrict = 444, 445, 446
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    # bits of linux/landlock.h: write_file, remove_dir/file, make_*; refer since 2, truncate since 3
    access = (1 << 1) | sum(1 << bit for bit in range(4, 13))
    access |= (version >= 2) << 13 | (version >= 3) << 14
    attributes = struct.pack("Q", access)
    ruleset = _call(libc.syscall, create, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path, allowed in ((os.getcwd(), access), ("/dev/null", 1 << 1)):
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call(libc.syscall, add_rule, ruleset, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
    _call(libc.syscall, restrict, ruleset, 0)
    os.close(ruleset)


def _seccomp(libc: ctypes.CDLL, machine: str) -> None:
    filter_ = ctypes.create_string_buffer(_bpf(machine, os.getpid()))
    size = (len(filter_) - 1) // 8
    program = struct.pack("HxxxxxxP", size, ctypes.addressof(filter_))
    _call(libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


def _bpf(machine: str, pid: int) -> bytes:
    """The filter as classic BPF: 8 bytes an instruction, over ``struct seccomp_data``."""
    column = list(_ARCHITECTURES).index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    eperm, enosys = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number, architecture, argument = 0, 4, 16

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    out = op(load, architecture) + op(equal, _ARCHITECTURES[machine], 1, 0) + op(give, kill)
    out += op(load, number)
    if machine == "x86_64":  # the x32 variants of the same calls
        out += op(at_least, 0x40000000, 0, 1) + op(give, kill)
    # glibc asks clone3 first and takes clone when it is not there; clone's flags are in a register
    out += op(equal, _CLONE3[column], 0, 1) + op(give, enosys)
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            out += op(equal, numbers[column], 0, 1) + op(give, eperm)
    out += op(equal, _CLONE[column], 0, 4) + op(load, argument)
    out += op(any_bit, _CLONE_THREAD, 0, 1) + op(give, allow) + op(give, eperm)
    for numbers in _OWN_PID_ONLY.values():
        out += op(equal, numbers[column], 0, 4) + op(load, argument)
        out += op(equal, pid, 0, 1) + op(give, allow) + op(give, eperm)
    out += op(equal, _PRLIMIT[column], 0, 4) + op(load, argument)  # 0 is the caller itself
    out += op(equal, 0, 0, 1) + op(give, allow) + op(give, eperm)
    return out + op(give, allow)
