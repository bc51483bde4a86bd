"""A command from its first moment to its exit code."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator

from prefopt.errors import ConfigError, InUseError, PrefoptError
from prefopt.process.launch import speaks
from prefopt.process.stopping import Stopped, said_of, stopping
from prefopt.shown import ShownFormatter, say


def guarded(command: Callable[[], object]) -> int:
    """Runs a command; a known error becomes its message and an exit code, a signal 128 + its number."""
    if not sys.stderr.isatty():
        # Bars of the libraries, which read this when tqdm is imported; ours are `prefopt.report.bars`.
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal or pipe that is not UTF-8 gets what it lacks as an escape, as stderr has it, not an exception.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stopping.handled(), _logs_on_stderr():
            command()
    except ConfigError as error:
        if speaks():  # every rank finds the same
            _say(f"{error}")
        return 2
    except InUseError as error:
        if speaks():
            _say(f"{error}")
        return 1
    except PrefoptError as error:
        rank = os.environ.get("RANK")
        _say(f"[rank {rank}] {error}" if rank else f"{error}")
        return 1
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            _say(said_of(stopped.number))
        return stopped.code
    except KeyboardInterrupt:  # a library's own, or where signals are not ours to handle
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _nobody_reads_stdout():  # a tracker's, an engine's: the command failed
            raise
        return 0  # `prefopt keys | head`
    finally:
        _flush_stdout()
    return 0


def _nobody_reads_stdout() -> bool:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or no file
        poll = select.poll()
        poll.register(
            sys.stdout.fileno(), 0
        )  # no event but those that are always told: error and hang-up
        return bool(poll.poll(0))
    return False


def _flush_stdout() -> None:
    """Whatever the ending: a failed flush as Python ends is a message on stderr, and exit code 120."""
    if sys.stdout is None or sys.stdout.closed:  # `prefopt keys >&-`
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    say(text, file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def _logs_on_stderr() -> Iterator[None]:
    """Shows our own log lines, from rank 0 below warnings; other libraries keep their settings."""
    logger, handler = logging.getLogger("prefopt"), logging.StreamHandler()
    handler.setFormatter(ShownFormatter("%(message)s"))
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
