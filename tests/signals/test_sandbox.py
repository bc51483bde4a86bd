"""The sandbox from inside: programs that attack what it promises, on this machine and on poorer ones."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import psutil
import pytest

from prefopt.errors import SignalError
from prefopt.signals import sandbox, sandbox_process, sandbox_promises, sandbox_syscalls
from prefopt.signals.sandbox import Limits, Outcome, Program, Promise, examine, run_program
from tests.signals.machines import on_machine

LIMITS = Limits(wall_s=20.0, cpu_s=20.0, memory_bytes=512 << 20)


def run(program: str, **limits: object) -> Outcome:
    return run_program(program, Limits(**{**vars(LIMITS), **limits}))  # type: ignore[arg-type]


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user that has nothing to do with the sandbox."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that anybody may read and write, as far as its mode goes."""
    file = tmp_path / "outside"
    file.write_text("sk-secret")
    file.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith(("pytest-", tmp_path.name)):
            folder.chmod(folder.stat().st_mode | 0o011)
    return file


# --- attacks: each must raise, and nothing may have happened --------------------------------------

PRELUDE = """
import ctypes, fcntl, os, resource, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def c(name, *args):
    found = getattr(libc, name)(*args)
    if found == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found
r, w = os.pipe()
"""

ON_PROCESSES = {
    "kill": "os.kill(PID, 9)",
    "kill everything": "os.kill(-1, 9)",
    "kill its group": "os.killpg(os.getpgid(PID), 9)",
    "a thread of it": "c('syscall', TKILL, PID, 9)",
    "a queued signal": "c('syscall', SIGQUEUE, PID, 9, struct.pack('iii', 9, 0, -1) + bytes(116))",
    "pidfd": "signal.pidfd_send_signal(os.pidfd_open(PID), 9)",
    "F_SETOWN": "fcntl.fcntl(r, fcntl.F_SETOWN, PID)",
    "F_SETOWN of a group": "fcntl.fcntl(r, fcntl.F_SETOWN, -os.getpgid(PID))",
    "F_SETOWN_EX": "fcntl.fcntl(r, 15, struct.pack('ii', 1, PID))",
    "F_SETSIG": "fcntl.fcntl(r, 10, 9)",
    "F_NOTIFY": "fcntl.fcntl(os.open('.', os.O_RDONLY), fcntl.F_NOTIFY, 1)",
    "F_SETLEASE": "fcntl.fcntl(w, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "FIOSETOWN": "fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', PID))",
    "SIOCSPGRP": "fcntl.ioctl(socket.socketpair()[0], 0x8902, struct.pack('i', PID))",
    "FIOASYNC": "fcntl.ioctl(r, 0x5452, struct.pack('i', 1))",
    "TIOCSTI": "fcntl.ioctl(0, 0x5412, b'x')",
    "TIOCSPGRP": "fcntl.ioctl(0, 0x5410, struct.pack('i', PID))",
    "timer_create": "c('timer_create', 0, struct.pack('qiii', 0, 9, 4, PID) + bytes(44), bytes(8))",
    "mq_notify": "c('syscall', MQ_OPEN, b'x', os.O_CREAT | os.O_RDWR, 0o600, None)",
    "ptrace": "c('ptrace', 16, PID, None, None)",
    "ptrace of itself": "c('ptrace', 0, 0, None, None)",
    "reading its memory": "c('process_vm_readv', PID, None, 0, None, 0, 0)",
    "writing its memory": "c('process_vm_writev', PID, None, 0, None, 0, 0)",
    "/proc/PID/mem": "open('/proc/PID/mem', 'r+b')",
    "/proc/PID/environ": "open('/proc/PID/environ')",
    "/proc/PID/cmdline": "open('/proc/PID/cmdline')",
    "/proc/PID/oom_score_adj": "open('/proc/PID/oom_score_adj', 'w')",
    "/proc/PID/root": "open('/proc/PID/root/etc/passwd')",
    "/proc/sysrq-trigger": "open('/proc/sysrq-trigger', 'w')",
    "limits": "resource.prlimit(PID, resource.RLIMIT_CPU, (0, 0))",
    "priority": "os.setpriority(os.PRIO_PROCESS, PID, 19)",
    "affinity": "os.sched_setaffinity(PID, {0})",
    "scheduler": "os.sched_setscheduler(PID, os.SCHED_IDLE, os.sched_param(0))",
    "group": "os.setpgid(PID, 0)",
    "fork": "os.fork()",
    "vfork": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "exec of a descriptor": "os.execve(os.open('/bin/sh', os.O_RDONLY), ['sh'], {})",
    "forkpty": "os.forkpty()",
    "not to die with the parent": "c('prctl', 1, 0, 0, 0, 0)",
    "to take children over": "c('prctl', 36, 1, 0, 0, 0)",
    "to be traced by anybody": "c('prctl', 0x59616d61, -1, 0, 0, 0)",
    "to be dumped": "c('prctl', 4, 1, 0, 0, 0)",
    "another session": "c('setsid')",
    "shared memory": "c('shmget', 0, 4096, 0o1600)",
    "semaphores": "c('semget', 0, 1, 0o1600)",
    "message queues": "c('msgget', 0, 0o1600)",
    "POSIX shared memory": "c('shm_open', b'/prefopt-x', os.O_CREAT | os.O_RDWR, 0o600)",
}
ON_FILES = {
    "reading": "open(P).read()",
    "reading through a link": "os.symlink(P, 'link'); open('link').read()",
    "reading through /proc": "open('/proc/self/root' + P).read()",
    "reading through a descriptor": "open('/proc/self/fd/%d' % os.open(P, os.O_PATH)).read()",
    "listing": "os.listdir(os.path.dirname(P))",
    "writing": "open(P, 'w')",
    "appending": "open(P, 'a')",
    "emptying": "os.open(P, os.O_RDONLY | os.O_TRUNC)",
    "truncating": "os.truncate(P, 0)",
    "emptying Pythons own": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "removing": "os.remove(P)",
    "renaming": "os.rename(P, P + '2')",
    "renaming into here": "os.rename(P, 'mine')",
    "replacing": "open('mine', 'w').close(); os.replace('mine', P)",
    "exchanging": "open('mine2', 'w').close(); c('renameat2', -100, b'mine2', -100, P.encode(), 2)",
    "a file beside": "open(P + '2', 'w')",
    "a directory beside": "os.mkdir(P + '2')",
    "a link beside": "os.symlink('x', P + '2')",
    "a hard link here": "os.link(P, 'hard')",
    "a fifo": "os.mkfifo(P + '2')",
    "a device": "os.mknod('device', 0o020600, os.makedev(1, 3))",
    "an unnamed file": "os.open(os.path.dirname(P), os.O_TMPFILE | os.O_RDWR)",
    "mode": "os.chmod(P, 0o777)",
    "mode by fchmodat2": "c('syscall', 452, -100, P.encode(), 0o777, 0)",
    "mode of Pythons own": "os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o644)",
    "owner": "os.chown(P, os.getuid(), -1)",
    "times": "os.utime(P)",
    "given times": "os.utime(P, (0, 0))",
    "times of Pythons own": "os.utime(os.open(os.__file__, os.O_RDONLY))",
    "attributes": "os.setxattr(P, 'user.x', b'1')",
    "attributes of a link": "os.setxattr(P, 'user.x', b'1', follow_symlinks=False)",
    "removing attributes": "os.removexattr(P, 'user.y')",
    "flock": "fcntl.flock(open(P), fcntl.LOCK_EX)",
    "flock of Pythons own": "fcntl.flock(open(os.__file__), fcntl.LOCK_SH)",
    "flock of its directory": "fcntl.flock(os.open('/usr/lib', os.O_RDONLY), fcntl.LOCK_SH)",
    "lockf": "fcntl.lockf(open(P, 'r+'), fcntl.LOCK_EX)",
    "a lock of Pythons own": "fcntl.lockf(open(os.__file__), fcntl.LOCK_EX)",
    "a lease": "fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "flags": "fcntl.ioctl(os.open(os.__file__, os.O_RDONLY), 0x40086602, bytes(8))",
    "a watch": "c('inotify_init1', 0)",
    "a handle": "c('name_to_handle_at', -100, P.encode(), bytes(136), bytes(4), 0)",
    "mounting": "c('mount', b'x', b'.', b'tmpfs', 0, None)",
    "another root": "os.chroot('.')",
    "the environment file": "open('/proc/self/environ').read()",
    "the disk": "open('/dev/vda', 'rb')",
    "syncing all": "c('syncfs', 0)",
}
ON_THE_WORLD = {
    **{
        f"a socket of family {family}": f"socket.socket({family}, {kind})"
        for family, kind in (
            (1, 1),
            (1, 2),
            (2, 1),
            (2, 2),
            (10, 1),
            (16, 3),
            (17, 3),
            (38, 5),
            (40, 1),
        )
    },
    "datagrams": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "packets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
    "connect of a pair": "socket.socketpair()[0].connect('/dev/log')",
    "sendto of a pair": "socket.socketpair()[0].sendto(b'x', '/dev/log')",
    "sendmsg of a pair": "socket.socketpair()[0].sendmsg([b'x'], [], 0, '/dev/log')",
    "bind of a pair": "socket.socketpair()[0].bind('\\0x')",
    "options of a pair": "socket.socketpair()[0].setsockopt(1, 26, bytes(16))",
    "io_uring": "c('syscall', 425, 1, bytes(120))",
    "setuid": "os.setuid(0)",
    "its own user again": "os.setresuid(os.getuid(), os.getuid(), os.getuid())",
    "groups": "os.setgroups([])",
    "a namespace": "c('unshare', 0x10000000)",
    "the network of another": "c('setns', r, 0)",
    "the clock": "__import__('time').clock_settime(0, 1)",
    "settimeofday": "c('settimeofday', struct.pack('qq', 1, 0), None)",
    "the name of the host": "socket.sethostname('x')",
    "keys": "c('syscall', KEYCTL, 0, -3, 1, 0, 0)",
    "personality": "c('personality', 0x0040000)",
    "bpf": "c('syscall', BPF, 0, bytes(64), 64)",
    "perf": "c('syscall', PERF, bytes(128), 0, -1, -1, 0)",
    "userfaultfd": "c('syscall', USERFAULT, 1)",
    "modules": "c('syscall', MODULE, b'', 0, b'')",
    "reboot": "c('reboot', 0)",
    "accounting": "c('acct', None)",
    "memory outside the limit": "os.memfd_create('x')",
    "locked memory": "c('mlockall', 1)",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more CPU time": "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "more files": "[os.dup(0) for _ in range(100)]",
    "a number not known": "c('syscall', 9999)",
    "another filter": "c('prctl', 22, 2, bytes(16), 0, 0)",
    "its own program by its process": "open('/proc/self/exe', 'rb')",
}
NUMBERS = {  # x86_64, arm64
    "TKILL": (200, 130), "SIGQUEUE": (129, 138), "MQ_OPEN": (240, 180), "KEYCTL": (250, 219), "BPF": (321, 280),
    "PERF": (298, 241), "USERFAULT": (323, 282), "MODULE": (175, 105),
}  # fmt: skip


def attempted(attacks: dict[str, str], **names: str) -> dict[str, str]:
    """What each attack met, all in one program; "POSSIBLE" where it did not raise."""
    column = ("x86_64", "aarch64").index(os.uname().machine)
    program = PRELUDE + "".join(f"{name} = {pair[column]}\n" for name, pair in NUMBERS.items())
    for what, code in attacks.items():
        for name, value in names.items():
            code = re.sub(rf"\b{name}\b", value, code)
        program += (
            f"try:\n    {code}\nexcept (OSError, ValueError) as e: met = type(e).__name__\n"
            f"else: met = 'POSSIBLE'\nos.write(1, b'{what}|' + met.encode() + b'\\n')\n"
        )
    outcome = run(program)
    met = dict(line.split("|", 1) for line in outcome.output.splitlines() if "|" in line)
    assert list(met) == list(attacks), outcome.output[-1000:]
    return met


def test_no_process_is_signalled_traced_or_read(victim: subprocess.Popen[bytes]) -> None:
    met = attempted(ON_PROCESSES, PID=str(victim.pid))
    assert {what for what, how in met.items() if how == "POSSIBLE"} == set()
    assert victim.poll() is None


def test_the_parent_is_as_safe(tmp_path: Path) -> None:
    """It would not get to its assertion, and its limits and priority are what they were."""
    before = (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.getsid(0))
    met = attempted(ON_PROCESSES, PID=str(os.getpid()))
    assert {what for what, how in met.items() if how == "POSSIBLE"} == set()
    assert before == (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.getsid(0))


def test_files_outside_are_neither_read_nor_changed_in_any_way(outside: Path) -> None:
    os.setxattr(outside, "user.y", b"1")
    before, names = os.stat(outside), sorted(os.listdir(outside.parent))
    met = attempted(ON_FILES, P=repr(str(outside)))
    assert {what for what, how in met.items() if how == "POSSIBLE"} == set()
    after = os.stat(outside)
    assert (before.st_mode, before.st_uid, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_mode, after.st_uid, after.st_mtime_ns, after.st_ctime_ns,
    )  # fmt: skip
    assert outside.read_text() == "sk-secret" and sorted(os.listdir(outside.parent)) == names
    assert os.listxattr(outside) == ["user.y"]


def test_there_is_no_network_and_no_right_to_anything() -> None:
    met = attempted(ON_THE_WORLD)
    assert {what for what, how in met.items() if how == "POSSIBLE"} == set()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86_64 has two more tables of calls")
@pytest.mark.parametrize(
    "call",
    [
        "ctypes.CDLL(None).syscall(0x40000000 + 57)",
        "m = mmap.mmap(-1, 4096, prot=7); m.write(b'\\xb8\\x02\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    ],
)
def test_calls_of_another_table_kill_the_program(call: str) -> None:
    """x32's fork, and i386's by ``int 0x80``: other numbers, of which the list does not speak."""
    assert run(f"import ctypes, mmap\n{call}").verdict == "failed"


def test_a_file_descriptor_kills_nobody(victim: subprocess.Popen[bytes]) -> None:
    run(
        f"import fcntl, os\nr, w = os.pipe()\nfor do in (lambda: fcntl.fcntl(r, fcntl.F_SETOWN, {victim.pid}), "
        "lambda: fcntl.fcntl(r, 10, 9), lambda: fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)):\n"
        "    try: do()\n    except OSError: pass\nos.write(w, b'x')"
    )
    time.sleep(0.1)
    assert victim.poll() is None


def test_nobody_gets_a_datagram_through_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(path))
        path.chmod(0o777)
        log.setblocking(False)
        attempts = [
            f"socket.socketpair(socket.AF_UNIX, socket.{kind})[0].{send}"
            for kind in ("SOCK_DGRAM", "SOCK_STREAM", "SOCK_SEQPACKET")
            for send in (f"sendto(b'x', {str(path)!r})", f"sendmsg([b'x'], [], 0, {str(path)!r})")
        ]
        program = "".join(f"try: {each}\nexcept OSError: pass\n" for each in attempts)
        assert run(f"import socket\n{program}").passed
        with pytest.raises(BlockingIOError):
            log.recv(1)


def test_secrets_of_the_user_and_of_the_working_directory_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = [
        tmp_path / ".ssh" / "id",
        tmp_path / ".cache" / "huggingface" / "token",
        tmp_path / ".env",
    ]
    for secret in secrets:
        secret.parent.mkdir(parents=True, exist_ok=True)
        secret.write_text("sk-secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checkout = Path(__file__).resolve().parents[2]
    paths = [
        *map(str, secrets),
        *map(os.path.relpath, secrets),
        str(checkout / "pyproject.toml"),
        "/etc/passwd",
    ]
    met = attempted({f"file {n}": f"print(open({path!r}).read())" for n, path in enumerate(paths)})
    assert set(met.values()) <= {"PermissionError", "FileNotFoundError"}


def test_what_a_setting_names_is_read_and_what_lies_beside_it_is_not(outside: Path) -> None:
    program = "print(open(P).read(), flush=True)"
    readable = str(outside)
    outcome = run(f"P = {readable!r}\n{program}", readable=(readable,))
    assert outcome.passed and "sk-secret" in outcome.output
    outcome = run(f"P = {readable!r}\n{program}", readable=(str(outside.parent / "other"),))
    assert not outcome.passed


# --- limits and the end ---------------------------------------------------------------------------


def test_three_thousand_threads_are_not_started() -> None:
    program = (
        "import threading\nthreading.stack_size(32768)\nstop, n = threading.Event(), 0\n"
        "try:\n    for n in range(3000): threading.Thread(target=stop.wait, daemon=True).start()\n"
        "except RuntimeError: pass\nstop.set(); print(n, flush=True)"
    )
    outcome = run(program, threads=100)
    assert outcome.passed and int(outcome.output) == 99  # and the first


def test_many_files_end_the_program() -> None:
    small = "import os\nfor n in range(10**6):\n    open(f'f{n}', 'w').close()"
    assert run(small, files=200).verdict == "output"
    large = "for n in range(10**6): open(f'f{n}', 'wb').write(bytes(1 << 20))"
    assert run(large, disk_bytes=20 << 20).verdict == "output"


@pytest.mark.parametrize(
    "last_words",
    [
        "import prctl_reset",  # nothing: it only goes on
        "import ctypes\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)",
        "import signal\nfor n in (1, 2, 3, 13, 15): signal.signal(n, signal.SIG_IGN)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_nothing_outlives_a_killed_trainer(last_words: str, tmp_path: Path) -> None:
    program = last_words.replace("import prctl_reset", "pass") + "\nimport time\ntime.sleep(60)"
    trainer = os.fork()
    if trainer == 0:
        sandbox_process.tempfile.tempdir = str(tmp_path)
        run(program, wall_s=60.0)
        os._exit(0)
    found = _eventually(lambda: _children(trainer))
    assert isinstance(found, list)
    time.sleep(0.3)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    assert _eventually(lambda: not any(_alive(each) for each in found))


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("import os, sys\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 65536)\n"
         "    except OSError: pass", "failed"),
        ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"may_run\": 1}\\n\\xff\\0[[[')\n"
         "    except OSError: pass", "failed"),
        ("import os\nwhile True: os.write(1, b'\\xff' * 65536)", "output"),
        ("import os\nos.closerange(0, 64)", "failed"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "failed"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
        ("import os, time\nfor _ in range(1500):\n    os.mkdir('a'); os.chdir('a')\ntime.sleep(1)", "output"),
        ("import os\nos.mkdir('shut', 0); os.mkdir('blind', 0o300); open('blind/f', 'w').close()", None),
        ("import os\nos.symlink('/', 'root'); os.symlink('loop', 'loop'); open(b'\\xff\\n', 'w').close()",
         "passed"),
        ("import os\nos.rmdir(os.getcwd())", None),
        ("raise SystemError('\\ud800')", "failed"),
        ("x = '\x00'", "failed"),
        ("def f(:", "failed"),
        ("(" * 5000, "failed"),
        ("x = " + "-" * 200_000 + "1", None),
    ],
)  # fmt: skip
def test_the_parent_survives_whatever_a_program_does(
    program: str, verdict: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = run(program, wall_s=0.7 if verdict == "timeout" else 20.0).verdict
    assert verdict is None or found == verdict
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_does_not_read_its_orders_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_process, "_CHILD", Path(__file__).with_name("deaf_child.py"))
    monkeypatch.setattr(sandbox_process, "_STARTUP_TIMEOUT_S", 0.5)
    with pytest.raises(SignalError, match="did not get ready"):
        run("#" * (1 << 22))


# --- ordinary programs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "import sqlite3\nfor mode in ('delete', 'wal'):\n    db = sqlite3.connect(mode)\n"
        "    db.execute(f'pragma journal_mode={mode}'); db.execute('create table t(x)')\n"
        "    db.execute('insert into t values (1)'); db.commit()\n"
        "    assert db.execute('select x from t').fetchall() == [(1,)]; db.close()",
        "import asyncio\nasync def f():\n    loop = asyncio.get_running_loop()\n"
        "    return await loop.run_in_executor(None, lambda: 1)\nassert asyncio.run(f()) == 1",
        "import tempfile, pathlib, shutil, os\nwith tempfile.TemporaryDirectory() as d:\n"
        "    p = pathlib.Path(d, 'a'); p.write_text('x'); p.touch(); shutil.copyfile(p, d + '/b')\n"
        "    shutil.move(d + '/b', d + '/c'); os.link(p, d + '/d'); os.symlink(p, d + '/e')\n"
        "    assert sorted(os.listdir(d)) == ['a', 'c', 'd', 'e']",
        "import zipfile, gzip, pickle, csv, json\nwith zipfile.ZipFile('z', 'w') as z: z.writestr('a', 'x')\n"
        "zipfile.ZipFile('z').extractall('out'); assert open('out/a').read() == 'x'",
        "import datetime, zoneinfo, locale, time\ntime.localtime(); datetime.datetime.now().astimezone()",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(50) as e:\n"
        "    assert sum(e.map(int, range(1000))) == 499500",
        "import signal, time, os\nhit = []\nsignal.signal(signal.SIGALRM, lambda *_: hit.append(1))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(0.05); os.kill(os.getpid(), signal.SIGALRM)\n"
        "assert hit == [1, 1]",
        "import numpy as np, mmap\nnp.save('a.npy', np.eye(3)); assert np.load('a.npy', mmap_mode='r').sum() == 3",
        "f = open('t', 'w'); f.write('abc'); f.truncate(1); f.close(); assert open('t').read() == 'a'",
        "import uuid, secrets, random, ssl, unittest, doctest, multiprocessing, subprocess, socket, ctypes",
    ],
)  # fmt: skip
def test_ordinary_programs_are_not_in_the_way_of_the_walls(program: str) -> None:
    outcome = run(program, wall_s=60.0, cpu_s=60.0, memory_bytes=1 << 30)
    assert outcome.passed, outcome.output


@pytest.mark.parametrize("root", [True, False])
def test_programs_read_their_input_by_any_of_its_names(root: bool) -> None:
    source = (
        "import sys\nfor f in ('/dev/stdin', '/dev/fd/0', 0): print(open(f).read(), flush=True)"
    )
    program = Program((((source, True),),), stdin="7")
    assert on_machine(lambda: run_program(program, LIMITS).output, root=root).split() == [
        "7",
        "7",
        "7",
    ]


# --- machines -------------------------------------------------------------------------------------

NO_SECCOMP = {"network", "new_processes", "other_processes", "changes", "privileges", "lifetime"}


@pytest.mark.parametrize(
    ("root", "lacks", "broken"),
    [
        (True, (), set()),
        (True, ("unshare",), set()),
        (True, ("landlock",), {"reads", "changes"}),
        (True, ("setresuid",), {"threads"}),
        (False, (), set()),
        (False, ("unshare",), set()),
        (False, ("landlock",), {"reads", "changes"}),
        (False, ("landlock", "unshare"), {"reads", "changes", "other_processes"}),
        (False, ("seccomp",), NO_SECCOMP),
        (False, ("seccomp", "landlock", "unshare"), NO_SECCOMP | {"reads"}),
    ],
)
def test_what_a_machine_lacks_is_found_by_trying(
    root: bool, lacks: tuple[str, ...], broken: set[str]
) -> None:
    """Which promise stands on which wall, derived by hand: what is not there is called by name."""
    walls = on_machine(examine, root=root, lacks=lacks)
    assert set(walls.broken) - {"reads"} == broken - {"reads"}
    assert "reads" not in broken or "reads" in walls.broken
    missing = {name for name, what in walls.built.items() if what.startswith("not there")}
    assert missing >= set(lacks) & {"landlock", "seccomp"}


@pytest.mark.parametrize("root", [True, False])
def test_a_container_with_dockers_default_rights_holds_all_and_runs_programs(root: bool) -> None:
    """No CAP_DAC_READ_SEARCH, no CAP_SYS_ADMIN, no user namespaces: the commonest place of all."""

    def tried() -> tuple[tuple[str, ...], str]:
        outcome = run(
            "import json, sqlite3, decimal, numpy\nopen('x', 'w').close()", wall_s=60.0, cpu_s=60.0
        )
        return examine().broken, outcome.output + outcome.verdict

    assert on_machine(tried, root=root, docker=True, lacks=("unshare",)) == ((), "passed")


def _told() -> str:
    try:
        run_program("print('it ran')", LIMITS)
    except SignalError as error:
        return str(error)
    return "nothing"


def test_a_machine_that_holds_less_refuses_and_says_what_is_missing() -> None:
    told = on_machine(_told, lacks=("landlock",))
    for words in (
        "model-written code is not run",
        "reads",
        "changes",
        "landlock (not there",
        "prefopt doctor",
    ):
        assert words in told
    assert "accept_risks: [reads, changes]" in told


def _accepted(accept: tuple[Promise, ...], program: str) -> tuple[str, str, list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("prefopt.signals.sandbox").addHandler(handler)
    try:
        outcome = run(program, accept_risks=accept)
        outcome = run(program, accept_risks=accept)
    except SignalError as error:
        return "refused", str(error), said
    return outcome.verdict, outcome.output, said


def test_a_risk_is_accepted_by_its_name_and_the_rest_still_holds(outside: Path) -> None:
    program = (
        f"import os\nassert open({str(outside)!r}).read()\n"
        "try: open(f'/proc/{os.getppid()}/environ').read()\nexcept PermissionError: pass\nelse: os._exit(1)"
    )
    lacks = ("landlock",)
    verdict, output, said = on_machine(
        lambda: _accepted(("reads", "changes"), program), lacks=lacks
    )
    assert verdict == "passed", output
    assert len(said) == 1 and "reads, changes" in said[0]  # once, not for every program
    verdict, output, _ = on_machine(lambda: _accepted(("reads",), program), lacks=lacks)
    assert verdict == "refused" and "changes (" in output and "reads, accepted" in output
    verdict, output, said = on_machine(lambda: _accepted(("reads", "changes"), "pass"))
    assert (verdict, said) == ("passed", [])  # nothing to warn of where all holds


def test_every_promise_has_its_name_its_words_and_an_attempt() -> None:
    words = sandbox.__doc__ or ""
    assert get_args(Promise) == tuple(sandbox_promises.PROMISES)
    assert all(f"``{name}``" in words for name in sandbox_promises.PROMISES)
    assert {each.promise for each in examine().attempts} == set(sandbox_promises.PROMISES)


@pytest.mark.parametrize(("column", "header"), [(0, "x86_64"), (1, "arm64")])
def test_numbers_of_system_calls_are_those_of_the_kernels_headers(column: int, header: str) -> None:
    paths = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "arm64": "/usr/include/asm-generic/unistd.h",  # arm64's own file includes it
    }
    if not Path(paths[header]).exists():
        pytest.skip(f"{paths[header]} is not here (linux-libc-dev)")
    text = Path(paths[header]).read_text()
    numbers = {
        name: int(n) for name, n in re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.M)
    }
    numbers["newfstatat"] = numbers.get("newfstatat", numbers.get("fstatat", -1))
    tables = (
        sandbox_syscalls.ALLOWED, sandbox_syscalls.JUDGED, sandbox_syscalls.MODES,
        sandbox_syscalls.UNSUPPORTED, sandbox_syscalls.ASKED_FIRST,
    )  # fmt: skip
    ours = {name: pair[column] for table in tables for name, pair in table.items()}
    known = {name: n for name, n in ours.items() if n is not None and name != "fchmodat2"}
    assert known == {name: numbers.get(name) for name in known}
    assert len(known) > 100


def _eventually(found: Callable[[], object], within_s: float = 10.0) -> object:
    end = time.monotonic() + within_s
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def _children(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [child for child in found if "sandbox_child" in " ".join(child.cmdline())]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
