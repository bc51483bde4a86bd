"""Model-written code in the sandbox: what it may do, and what it must not be able to do."""

from __future__ import annotations

import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from prefopt.recipe.registry import get_signal
from prefopt.signals.sandbox import Limits, Outcome, run_program
from tests.signals.cases import candidates, scores

LIMITS = Limits(wall_s=5.0, cpu_s=5.0, memory_bytes=512 << 20)


def run(program: str, **limits: float) -> Outcome:
    return run_program(program, Limits(**{**vars(LIMITS), **limits}))


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()",
        "import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1",
        "import numpy\nassert numpy.eye(50).dot(numpy.eye(50)).sum() == 50",
        "open('notes.txt', 'w').write('x'); assert open('notes.txt').read() == 'x'",
        "if __name__ == '__main__':\n    ran = True\nassert ran",
    ],
)
def test_ordinary_programs_pass(program: str) -> None:
    outcome = run(program, wall_s=60.0, cpu_s=60)  # importing numpy takes as long as it takes
    assert outcome.passed, outcome.output


@pytest.mark.parametrize(
    "leave",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"],
)
def test_a_program_that_leaves_before_its_tests_has_not_passed(leave: str) -> None:
    assert run(f"{leave}\nassert False").verdict == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(10**6)",
        "import signal\nfor n in (2, 10, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(10**6)",
    ],
)
def test_an_endless_program_is_stopped(program: str) -> None:
    assert not run(program, wall_s=0.5, cpu_s=1).passed  # that it returns is the claim
    assert _leftovers() == []


def test_cpu_time_over_many_threads_counts_as_a_timeout() -> None:
    program = (
        "import hashlib, threading\ndef f():\n    while True: hashlib.sha256(bytes(10**7))\n"
        "for _ in range(4): threading.Thread(target=f).start()\nthreading.Event().wait()"
    )
    assert run(program, wall_s=20.0, cpu_s=1).verdict == "timeout"


def test_a_fork_bomb_never_starts() -> None:
    outcome = run("import os\nwhile True:\n    os.fork()")
    assert outcome.verdict == "failed" and "PermissionError" in outcome.output
    assert _leftovers() == []


def test_a_thread_bomb_ends_at_the_memory_limit() -> None:
    program = (
        "import threading, time\n"
        "for _ in range(10**5): threading.Thread(target=time.sleep, args=(99,)).start()"
    )
    assert run(program).verdict in ("failed", "timeout")
    assert _leftovers() == []


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.kill(0, 9)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    ],
)
def test_other_processes_cannot_be_touched(attack: str) -> None:
    """The parent is this very test run: it would not get to its assertion."""
    outcome = run(f"import os, resource, signal\n{attack}")
    assert outcome.verdict == "failed" and "PermissionError" in outcome.output


@pytest.mark.parametrize(
    "connect",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT/', timeout=2)",
        "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0, 'PermissionError'",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
    ],
)
def test_there_is_no_network_not_even_through_ctypes(connect: str) -> None:
    reached = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        outcome = run(connect.replace("PORT", str(server.server_port)))
        server.shutdown()
        thread.join()
    assert outcome.verdict == "failed" and not reached
    assert "PermissionError" in outcome.output or "not permitted" in outcome.output


def test_memory_beyond_the_limit_is_an_error_inside() -> None:
    outcome = run("x = bytearray(1 << 30)")
    assert outcome.verdict == "failed" and "MemoryError" in outcome.output


def test_a_file_beyond_the_limit_is_an_error_inside() -> None:
    outcome = run("open('big', 'wb').write(bytes(1 << 21))")
    assert outcome.verdict == "failed" and "File too large" in outcome.output


def test_output_beyond_the_limit_ends_the_program() -> None:
    outcome = run("while True: print('x' * 1000)")
    assert outcome.verdict == "output" and len(outcome.output) == LIMITS.output_bytes


def test_keys_of_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret")
    outcome = run("import os; print(dict(os.environ)); assert not os.environ.get('JUDGE_API_KEY')")
    assert outcome.passed and "sk-secret" not in outcome.output


def test_files_elsewhere_cannot_be_changed_where_the_kernel_has_landlock(tmp_path: Path) -> None:
    if not _has_landlock():
        pytest.skip("this kernel has no Landlock")
    victim = tmp_path / "weights.bin"
    victim.write_bytes(b"precious")
    for attack in ("open(p, 'w')", "os.remove(p)", "os.rename(p, p + '2')", "os.truncate(p, 0)"):
        outcome = run(f"import os\np = {str(victim)!r}\n{attack}")
        assert outcome.verdict == "failed" and "PermissionError" in outcome.output, attack
    assert victim.read_bytes() == b"precious"


def test_the_working_directory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("import os; os.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0o500)").passed
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_the_interpreter_is_a_failure() -> None:
    assert run("import ctypes; ctypes.string_at(0)").verdict == "failed"
    assert run("import os; os.abort()").verdict == "failed"


def test_humaneval_solutions_pass_and_broken_ones_fail(shared_data: Path) -> None:
    with gzip.open(shared_data / "misc" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file][::8]
    signal = get_signal("python_tests").fn(prefix="prompt", timeout_s=60.0)
    groups = []
    for task in tasks:
        fields = {**task, "tests": f"{task['test']}\ncheck({task['entry_point']})"}
        right = f"Sure:\n```python\n{task['prompt']}{task['canonical_solution']}```\nDone."
        wrong = f"```python\n{task['prompt']}    return None\n```"
        groups.append(candidates(right, wrong, fields=fields))
    assert signal.score(groups) == [[1.0, 0.0]] * len(tasks)
    assert signal.report() == {"passed": 21, "failed": 21, "timeout": 0, "output": 0}


def test_tests_may_be_a_list_of_statements() -> None:
    signal = get_signal("python_tests").fn()
    tests = ["assert f(1) == 2", "assert f(2) == 3"]
    texts = ("```\ndef f(x): return x + 1\n```", "def f(x): return 2", "no code here")
    assert scores(signal, *texts, tests=tests) == [1, 0, 0]


def _leftovers() -> list[psutil.Process]:
    """Sandbox processes that this process still has."""
    children = psutil.Process(os.getpid()).children(recursive=True)
    return [child for child in children if "sandbox_child" in " ".join(child.cmdline())]


def _has_landlock() -> bool:
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 1
