"""Machines that this one is not: a forked process that lacks what a kernel, a container or a user may lack.

Nothing is mocked: the calls are refused by a seccomp filter of this process, and inherited by what it starts.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import platform
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# name: (x86_64, arm64)
_NUMBERS = {
    "landlock": ((444, 444), (445, 445), (446, 446)),
    "unshare": ((272, 97),),
    "setresuid": ((117, 147),),
    "seccomp": ((317, 277),),
}
_ENOSYS, _EPERM, _EINVAL = 38, 1, 22
LACKS = {
    "landlock": _ENOSYS,  # a kernel before 5.13, or one that does not start it
    "unshare": _EPERM,  # a container, a hardened distribution
    "setresuid": _EPERM,  # root without CAP_SETUID
    "seccomp": _ENOSYS,  # an emulated machine; prctl says EINVAL there
}


def on_machine(
    function: Callable[[], Any],
    *,
    lacks: tuple[str, ...] = (),
    root: bool | None = None,
    docker: bool = False,
) -> Any:
    """What ``function`` returns in a fork of this process where some calls are not to be had.

    Args:
        lacks: names of `LACKS`.
        root: as root (skipped where these tests have no such rights), or as a user; None: as it is.
        docker: with the capabilities alone that Docker leaves to root.
    """
    is_root = os.geteuid() == 0
    if root and not is_root:
        pytest.skip("needs root's rights")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if root is False and is_root:
                _become_user()
            if docker and os.geteuid() == 0:
                _drop_capabilities()
            _refuse(lacks)
            answer = (True, function())
        except _NotHere as error:
            answer = (None, str(error))
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    fine, answer = pickle.loads(said)
    if fine is None:
        pytest.skip(f"needs {answer}")
    assert fine, answer
    return answer


def _become_user() -> None:
    """A user without any right; this environment's Python may lie where only root looks, so that is opened."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0 or libc.mount(None, b"/", None, 1 << 14 | 1 << 18, None) != 0:
        raise _NotHere("a mount namespace, to become a user whom Python is open to")
    needed = {sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[2])}
    shut = {path for each in needed for path in Path(each).parents if not path.stat().st_mode & 1}
    handles = {each: os.open(each, os.O_PATH) for each in needed}
    for path in sorted(shut)[:1]:
        assert libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, b"mode=755") == 0
        for each, handle in handles.items():
            if Path(each).is_relative_to(path):
                os.makedirs(each)
                source = f"/proc/self/fd/{handle}".encode()
                assert libc.mount(source, each.encode(), None, 0x1000 | 0x4000, None) == 0
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    assert libc.prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE: as a user's process is


def _drop_capabilities() -> None:
    """Leaves CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT
    MKNOD AUDIT_WRITE SETFCAP, for this process and for what it executes."""
    libc = ctypes.CDLL(None, use_errno=True)
    left = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
    for number in set(range(41)) - left:
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
    mask = sum(1 << number for number in left)
    data = struct.pack("6I", mask, mask, 0, 0, 0, 0)
    assert libc.capset(struct.pack("Ii", 0x20080522, 0), data) == 0


class _NotHere(Exception):
    """This machine cannot be made into the one that is asked for."""


def _refuse(names: tuple[str, ...]) -> None:
    machine = platform.machine()
    column = ("x86_64", "aarch64").index(machine)
    denied = [(pair[column], LACKS[name]) for name in names for pair in _NUMBERS[name]]

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    out = op(0x20, 0)
    for number, code in denied:
        out += op(0x15, number, 0, 1) + op(0x06, 0x00050000 | code)
    if "seccomp" in names:  # prctl(PR_SET_SECCOMP)
        out += op(0x15, (157, 167)[column], 0, 3) + op(0x20, 16)
        out += op(0x15, 22, 0, 1) + op(0x06, 0x00050000 | _EINVAL)
    filter_ = ctypes.create_string_buffer(out + op(0x06, 0x7FFF0000))
    libc = ctypes.CDLL(None, use_errno=True)
    program = struct.pack("HxxxxxxP", (len(filter_) - 1) // 8, ctypes.addressof(filter_))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
