"""What model-written Python may ask of the kernel: a list of system calls, as a seccomp filter.

An allow list: what is not named is refused, so that a call which nobody thought of, or which a later kernel
adds, is refused too. The names are what CPython, NumPy, SciPy, pandas and SQLite were seen to use, without
what acts on other processes, on a network, or on a file's mode, times, owner, attributes and locks.
Numbers: linux/asm/unistd_64.h (x86_64) and asm-generic/unistd.h (arm64). Standard library only.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Audit architecture of each machine; the place in it is the column in `ALLOWED`."""

ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # open files and directories; Landlock says which
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436),
    "creat": (85, None), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "statfs": (137, 43), "fstatfs": (138, 44), "getdents64": (217, 61),
    "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "readlink": (89, None), "readlinkat": (267, 78), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fsync": (74, 82), "fdatasync": (75, 83), "sendfile": (40, 71), "copy_file_range": (326, 285),
    "fadvise64": (221, 223), "umask": (95, 166), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    # memory: RLIMIT_AS counts it
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233), "msync": (26, 227), "mincore": (27, 232), "brk": (12, 214),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441),
    "eventfd2": (290, 19), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "pause": (34, None),
    # threads, and the end of them
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "rseq": (334, 293), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "getcpu": (309, 168), "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260),
    "waitid": (247, 95),
    # its own signals
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132), "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "restart_syscall": (219, 128),
    # what time it is, and who it is
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163),
    "setrlimit": (160, 164), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "capget": (125, 90),
    "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278), "arch_prctl": (158, None),
    # the pair of connected sockets that asyncio wakes itself with
    "shutdown": (48, 210), "recvfrom": (45, 207), "getsockname": (51, 204),
    "getpeername": (52, 205), "getsockopt": (55, 209),
}  # fmt: skip
"""Name -> number on x86_64, on arm64 (None where that machine has another call for it)."""

MODES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
}  # fmt: skip
"""Allowed to a user that owns nothing else: Landlock has no right for modes, and the owner alone may set one."""

UNSUPPORTED = {"listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13)}
"""Answered as by a file system without attributes: `shutil.copy2` copies none then."""

ASKED_FIRST = {"clone3": (435, 435), "openat2": (437, 437)}
"""glibc tries these and takes the older call where they are not there; their flags are behind a pointer."""

JUDGED: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None), "openat": (257, 56), "fcntl": (72, 25), "ioctl": (16, 29),
    "clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "prctl": (157, 167), "socketpair": (53, 199), "sendto": (44, 206),
}  # fmt: skip
"""Allowed with some arguments only: `_judge`."""

LAST_NUMBER = 469
"""What is newer is answered as an older kernel does (ENOSYS), so that libraries fall back."""

# F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL, F_GETLK F_SETLK F_SETLKW (SQLite; exclusively only what is open for
# writing), F_DUPFD_CLOEXEC F_GETPIPE_SZ. Not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY: signals to others.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
# TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX TCGETS2. Not TIOCSTI, FIOSETOWN, FS_IOC_SETFLAGS, …
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)
# PR_GET_PDEATHSIG PR_SET_NAME PR_GET_NAME PR_GET_NO_NEW_PRIVS. Not PR_SET_PDEATHSIG, PR_SET_DUMPABLE, …
_PRCTL = (2, 15, 16, 39)
_THREAD_FLAGS = 0x7D0F00  # what glibc and musl start a thread with
_CLONE_THREAD = 0x10000
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
_O_TRUNC, _O_ACCMODE = 0o1000, 0o3

_LOAD, _EQUAL, _ABOVE, _AT_LEAST, _ANY_BIT, _AND, _GIVE = 0x20, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS, _ENOTSUP = (
    0x00050000 | code for code in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)
)


def seccomp_filter(machine: str, pid: int, *, modes: bool) -> bytes:
    """The filter for process ``pid`` as classic BPF, 8 bytes an instruction, over ``struct seccomp_data``.

    Args:
        modes: whether `MODES` are allowed.
    """
    column = list(ARCHITECTURES).index(machine)
    out = _op(_LOAD, 4) + _op(_EQUAL, ARCHITECTURES[machine], 1, 0) + _op(_GIVE, _KILL)
    out += _op(_LOAD, 0)
    if machine == "x86_64":  # the x32 variants of the same calls
        out += _op(_AT_LEAST, 0x40000000, 0, 1) + _op(_GIVE, _KILL)
    out += _op(_ABOVE, LAST_NUMBER, 0, 1) + _op(_GIVE, _ENOSYS)
    allowed = {**ALLOWED, **(MODES if modes else {})}
    for first, last in _ranges(each[column] for each in allowed.values()):
        out += _op(_AT_LEAST, first, 0, 2) + _op(_ABOVE, last, 1, 0) + _op(_GIVE, _ALLOW)
    for name, numbers in JUDGED.items():
        number = numbers[column]
        if number is not None:
            judged = _judge(name, pid)
            out += _op(_EQUAL, number, 0, len(judged) // 8) + judged
    for table, answer in ((ASKED_FIRST, _ENOSYS), (UNSUPPORTED, _ENOTSUP)):
        for numbers in table.values():
            out += _op(_EQUAL, numbers[column], 0, 1) + _op(_GIVE, answer)
    return out + _op(_GIVE, _EPERM)


def _judge(name: str, pid: int) -> bytes:
    """What becomes of one of `JUDGED`, by its arguments. Every path ends."""
    match name:
        case "open" | "openat":
            # O_RDONLY|O_TRUNC empties a file that may only be read: before ABI 3 Landlock lets it pass
            flags = _argument(1 if name == "open" else 2) + _op(_AND, _O_TRUNC | _O_ACCMODE)
            return flags + _op(_EQUAL, _O_TRUNC, 0, 1) + _op(_GIVE, _EPERM) + _op(_GIVE, _ALLOW)
        case "fcntl":
            return _one_of(1, _FCNTL)
        case "ioctl":
            return _one_of(1, _IOCTL)
        case "prctl":
            return _one_of(0, _PRCTL)
        case "kill" | "tgkill":
            return _one_of(0, (pid,))
        case "prlimit64":
            return _one_of(0, (0, pid))
        case "clone":
            other = ~_THREAD_FLAGS & 0xFFFFFFFF
            refused = _op(_ANY_BIT, other, 0, 1) + _op(_GIVE, _EPERM)
            thread = _op(_ANY_BIT, _CLONE_THREAD, 0, 1) + _op(_GIVE, _ALLOW)
            return _argument(0) + refused + thread + _op(_GIVE, _EPERM)
        case "socketpair":
            # connected for good; a pair of datagram sockets could send to any socket that has an address
            family = _argument(0) + _op(_EQUAL, _AF_UNIX, 1, 0) + _op(_GIVE, _EPERM)
            return family + _argument(1) + _op(_AND, _SOCK_TYPE_MASK) + _equals(_SOCK_STREAM)
        case "sendto":  # no address: both halves of the pointer
            low = _argument(4) + _op(_EQUAL, 0, 1, 0) + _op(_GIVE, _EPERM)
            return low + _op(_LOAD, 16 + 8 * 4 + 4) + _equals(0)
    raise ValueError(name)


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _argument(place: int) -> bytes:
    """Loads the low half of an argument: what the kernel reads of an int. (Both machines are little-endian.)"""
    return _op(_LOAD, 16 + 8 * place)


def _equals(value: int) -> bytes:
    return _op(_EQUAL, value, 0, 1) + _op(_GIVE, _ALLOW) + _op(_GIVE, _EPERM)


def _one_of(place: int, values: tuple[int, ...]) -> bytes:
    tests = b"".join(_op(_EQUAL, value, 0, 1) + _op(_GIVE, _ALLOW) for value in values)
    return _argument(place) + tests + _op(_GIVE, _EPERM)


def _ranges(numbers: Iterable[int | None]) -> list[tuple[int, int]]:
    """Runs of neighbouring numbers, first and last of each."""
    found: list[tuple[int, int]] = []
    for number in sorted(n for n in numbers if n is not None):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
