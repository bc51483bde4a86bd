"""What the ranks of a launch tell each other beside the collectives, so that none waits for one that has failed.

A rank that sits in a collective cannot be raised into, and a rank that has failed never joins it. So each has a
thread with a connection of its own to the launch's key-value store (torch's TCPStore, at MASTER_ADDR): it says
once a second where its rank is, and looks for the reason that another has left. With one, it ends its process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from prefopt.errors import PrefoptError, in_words
from prefopt.process import ending
from prefopt.process.progress import progress
from prefopt.process.stopping import Stopped, said_of, stopping
from prefopt.process.verdicts import Beat, Seen, stuck, verdict

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_JUDGE_EVERY = 5
_CONNECT_S = 600.0
# A rank that meets the same error by itself says so in its own words within this time.
_OWN_WORDS_S = 4.0
_HEARD_S = 15.0
_SAVING_S = 600.0
# A rank whose peer has gone learns within this time whether that one left a reason.
_SILENT_S = 5.0
_STACK_AFTER_S = 5.0
_LIBRARIES = ("<", *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
# gloo, NCCL and the store have no error of their own for a peer that went away.
_LOST = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "remote process exited",
    "timed out",
    "nccl",
    "socket",
)


@dataclass(frozen=True)
class Failure:
    """Why the run ends, as the rank says that failed first."""

    rank: int
    local_rank: int
    host: str
    pid: int
    code: int
    why: str
    doing: str
    culprits: tuple[int, ...] = ()
    """Ranks that are stuck, if that is why."""

    def __str__(self) -> str:
        if self.culprits:
            return self.why
        return f"rank {self.rank} ({self.host}, process {self.pid}) ended while {self.doing}: {self.why}"


class Ranks(threading.Thread):
    """This rank's side of the channel; `joined` runs it.

    Args:
        environment: what the launcher said of this process and of where the store is.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(name="ranks", daemon=True)
        self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.local_rank = int(environment.get("LOCAL_RANK", "0"))
        self._address = environment.get("MASTER_ADDR", "127.0.0.1")
        self._port = int(environment["MASTER_PORT"])
        agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._is_host = self.rank == 0 and not agents
        self._prefix = f"prefopt/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._error_file = environment.get("TORCHELASTIC_ERROR_FILE")
        self._store: Any = None
        self._tried = threading.Event()
        self._over = threading.Event()
        self._failing = False
        """The main thread is here with an error of its own, which it will say itself."""
        self._number = 0
        self._main = threading.main_thread().ident
        self._seen: dict[int, tuple[int, float]] = {}

    def run(self) -> None:
        try:
            self._store = self._connect()
        except (
            Exception
        ) as error:  # torch names no class for it; without the channel the run still runs
            logger.warning(
                "rank %d has no channel beside the collectives (%s): should another rank fail, it learns of it "
                "from the launcher, or from a collective that times out", self.rank, str(error).splitlines()[0],
            )  # fmt: skip
            return
        finally:
            self._tried.set()
        pause_s = 0.0  # the first beat at once: a rank that is killed a moment later has then said who it is
        while not self._over.wait(pause_s):
            pause_s = _POLL_S
            try:
                self._beat()
                self._look()
            except (RuntimeError, OSError) as error:
                if not self._over.wait(_OWN_WORDS_S) and not self._over.wait(self._saving_s()):
                    self._end_without_store(error)

    def _saving_s(self) -> float:
        """A launcher that is told to stop may take its store with it, and leave the ranks to save."""
        return 0.0 if stopping.number is None else _SAVING_S

    def _end_without_store(self, error: Exception) -> None:
        ending.before_end.clear()
        why = (
            f"the launch's store at {self._address} does not answer ({str(error).splitlines()[0]})"
        )
        text = f"[rank {self.rank}] {why}: rank 0 or the launcher is gone. {progress.stands}"
        ending.end_process(1, text if self.local_rank == min(1, self.rank) else "")

    def failed(self, error: BaseException) -> Failure | None:
        """Leaves the reason for the others and waits until they have it.

        Returns: another's, if this error only says that another rank has gone.
        """
        self._failing = True
        if not self._tried.wait(_HEARD_S) or self._store is None:
            return None
        if _is_lost_peer(error) and (other := self._who_went()) is not None:
            return other
        code = error.code if isinstance(error, Stopped) else 1
        why = said_of(error.number) if isinstance(error, Stopped) else in_words(error)
        self._leave(code, why)
        return None

    def finished(self) -> None:
        """This rank is done; the one that hosts the store stays until all are."""
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):
            self._beat(done=True)
            self._store.add(self._key("done"), 1)
        self._wait_for("done", self.world_size)

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def leave(self, code: int, why: str) -> None:
        """As `failed`, for a process that is being ended (`ending.before_end`); waits for nobody."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._post(self._failure(code, why))

    def _connect(self) -> Any:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        # A store that torch's own initialisation finds there again: one server a process and port.
        return TCPStore(
            self._address,
            self._port,
            is_master=self._is_host,
            multi_tenant=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_CONNECT_S),
        )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _failure(self, code: int, why: str) -> Failure:
        return Failure(
            self.rank, self.local_rank, socket.gethostname(), os.getpid(), code, why, str(progress)
        )

    def _post(self, failure: Failure) -> bool:
        """Leaves it as the reason of the whole launch; False if another has been faster."""
        mine = json.dumps(asdict(failure))
        return bytes(self._store.compare_set(self._key("failure"), "", mine)).decode() == mine

    def _leave(self, code: int, why: str) -> None:
        with contextlib.suppress(RuntimeError):
            if self._post(self._failure(code, why)):
                self._tell_launcher(why)
            self._store.add(self._key("heard"), 1)
            self._wait_for("heard", self.world_size)

    def _wait_for(self, name: str, count: int, at_most_s: float = _HEARD_S) -> None:
        """Returns when ``count`` ranks have said ``name``, or after a while."""
        if name == "done" and not self._is_host:
            return
        deadline = time.monotonic() + at_most_s
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self._store.add(self._key(name), 0) >= count:
                    return
                time.sleep(0.05)

    def _beat(self, *, done: bool = False) -> None:
        self._number += 1
        idle = progress.idle_s
        where, waits = _main_thread(self._main) if idle > _STACK_AFTER_S else ("", False)
        beat = Beat(
            self.rank, socket.gethostname(), os.getpid(), self.local_rank, self._number, progress.place,
            str(progress), idle, progress.limit_s, where, waits, done,
        )  # fmt: skip
        self._store.set(self._key(f"beat/{self.rank}"), json.dumps(asdict(beat)))
        if progress.limit_s is not None and not done:
            # For C code that never lets go of the interpreter: then this thread does not run either.
            faulthandler.dump_traceback_later(progress.limit_s + _HEARD_S, exit=True)

    def _look(self) -> None:
        failure = self._found()
        if failure is None and self._number % _JUDGE_EVERY == 0 and self._judges():
            failure = self._judged()
        if failure is None or self._over.wait(_OWN_WORDS_S if not failure.culprits else 0.0):
            return
        if not self._failing:
            self._end(failure)

    def _found(self) -> Failure | None:
        key = self._key("failure")
        if not self._store.check([key]):
            return None
        found = json.loads(self._store.get(key))
        return Failure(**{**found, "culprits": tuple(found["culprits"])})

    def _judges(self) -> bool:
        """Is it for this rank to look at the others' beats? The lowest rank's whose beats are heard."""
        return not any(
            seen.silent_s < _SILENT_S for seen in self._beats() if seen.beat.rank < self.rank
        )

    def _judged(self) -> Failure | None:
        beats = self._beats()
        culprits = stuck(beats)
        if not culprits or len(beats) < self.world_size:
            return None
        first = culprits[0].beat
        failure = Failure(
            first.rank, first.local_rank, first.host, first.pid, 1, verdict(culprits, beats), first.what,
            tuple(each.beat.rank for each in culprits),
        )  # fmt: skip
        self._post(failure)
        return self._found()

    def _beats(self) -> list[Seen]:
        """The last beat of every rank that has said anything."""
        now, found = time.monotonic(), []
        for rank in range(self.world_size):
            key = self._key(f"beat/{rank}")
            if not self._store.check([key]):
                continue
            beat = Beat(**json.loads(self._store.get(key)))
            number, since = self._seen.get(rank, (-1, now))
            if number != beat.number:
                self._seen[rank] = number, since = beat.number, now
            found.append(Seen(beat, now - since))
        return found

    def _who_went(self) -> Failure | None:
        """The reason another left; else the ranks that have fallen silent, as the reason."""
        deadline = time.monotonic() + _SILENT_S + 2 * _POLL_S
        try:
            while time.monotonic() < deadline:
                if (found := self._found()) is not None:
                    return found
                silent = [s for s in self._beats() if s.silent_s > _SILENT_S and not s.beat.done]
                if silent:
                    beat = max(silent, key=lambda seen: seen.silent_s).beat
                    why = (
                        "it is gone without a word: killed (by the system, where memory is out: see `dmesg`), "
                        "or its machine is down"
                    )
                    gone = Failure(
                        beat.rank, beat.local_rank, beat.host, beat.pid, 1, why, beat.what
                    )
                    self._post(gone)
                    return self._found()
                time.sleep(0.2)
        except RuntimeError:
            pass
        return None

    def _end(self, failure: Failure) -> None:
        """Ends this process for another's failure; one rank of each machine says why."""
        if self.rank in failure.culprits:
            os.write(2, f"\n[rank {self.rank}] its stack:\n".encode())
            faulthandler.dump_traceback(2, all_threads=True)
            self._tell_launcher(str(failure))
        with contextlib.suppress(RuntimeError):
            self._store.add(self._key("heard"), 1)
        if failure.culprits and self.rank not in failure.culprits:
            time.sleep(2 * _POLL_S)  # their stacks first: the reason is the last thing said
        if self._is_host:
            self._wait_for("heard", self.world_size, at_most_s=_OWN_WORDS_S)
        self.say_and_end(failure)

    def say_and_end(self, failure: Failure) -> None:
        """Ends this process; the reason is said by the first rank of the machine that did not fail itself."""
        speaker = 0 if failure.local_rank != 0 or failure.host != socket.gethostname() else 1
        ending.before_end.clear()
        text = (
            f"[rank {self.rank}] {failure}. {progress.stands}" if self.local_rank == speaker else ""
        )
        ending.end_process(failure.code, text)

    def _tell_launcher(self, why: str) -> None:
        """Writes the file from which torch's launcher shows the root cause when it ends."""
        if self._error_file:
            now = str(int(time.time()))
            message = {
                "message": {"message": why, "extraInfo": {"py_callstack": "", "timestamp": now}}
            }
            with (
                contextlib.suppress(OSError),
                open(self._error_file, "w", encoding="utf-8") as file,
            ):
                json.dump(message, file)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Ranks of a launch learn of each other's end inside; nothing to do for a single process, or within itself.

    An exception that leaves it is the reason the others end with. One that only says that another rank has gone
    does not leave it: the process ends with the other's reason.
    """
    if _joined or int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_PORT" not in os.environ:
        yield
        return
    import torch.distributed  # noqa: F401  (here: two threads that import it at once see halves of it)

    ranks = Ranks(os.environ)
    _joined.append(ranks)
    ranks.start()
    ending.before_end.append(ranks.leave)
    try:
        yield
    except BaseException as error:
        other = ranks.failed(error)
        if other is not None:
            ranks.say_and_end(other)
        raise
    else:
        ranks.finished()
    finally:
        ranks.close()
        _joined.clear()
        ending.before_end.clear()


_joined: list[Ranks] = []


def _is_lost_peer(error: BaseException) -> bool:
    """Does it only say that another process is not there any more?"""
    if isinstance(error, PrefoptError | Stopped) or not isinstance(error, RuntimeError | OSError):
        return False
    text = str(error).lower()
    return any(word in text for word in _LOST)


def _main_thread(ident: int | None) -> tuple[str, bool]:
    """The main thread's innermost line outside of libraries, and whether it may be waiting for others."""
    frame: FrameType | None = sys._current_frames().get(ident or 0)
    where, waits = "", False
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or "/torch/distributed/" in file or "/torch/autograd/" in file
        if not where and not file.startswith(_LIBRARIES):
            where = f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return where, waits
