"""The process in which math-verify runs: ``python -m prefopt.signals.math_worker``.

math-verify stops itself with ``signal.alarm``, which works in a main thread only, and sympy can spend
minutes or gigabytes inside one big-integer operation, where no signal handler runs. Here it has a main
thread, and limits that the kernel enforces; the parent kills it at the deadline.

A line in is ``[gold, response, timeout_s]``; a line out is 1.0, 0.0, "timeout", or null for a gold answer
that cannot be parsed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import sys
from collections.abc import Callable

MEMORY_LIMIT_BYTES = 4 * 2**30


def main() -> None:
    """Answers lines until standard input closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        verifier = _load()
    except ImportError as error:
        answers.write(
            json.dumps(f"math needs math-verify: pip install math-verify ({error})") + "\n"
        )
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    answers.write('"ready"\n')
    for line in sys.stdin:
        gold, response, timeout_s = json.loads(line)
        _limit_cpu(2 * timeout_s)
        answers.write(json.dumps(verifier(gold, response, timeout_s)) + "\n")


def _limit_cpu(seconds: float) -> None:
    """The kernel ends this process if the parent is gone and cannot."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


class _Timeouts(logging.Handler):
    """Remembers that math-verify ran out of time: it returns as if nothing matched, and only logs it."""

    seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen |= record.getMessage().startswith("Timeout during")


def _load() -> Callable[[str, str, float], float | str | None]:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    from prefopt.signals.exact import compare_exactly
    from prefopt.signals.math_text import rewritten, with_values, without_bases

    compare_exactly()

    timeouts = _Timeouts()
    log = logging.getLogger("math_verify")
    log.addHandler(timeouts)
    log.propagate = False  # the parent counts

    def verifier(gold: str, response: str, timeout_s: float) -> float | str | None:
        limit = max(1, int(timeout_s))
        timeouts.seen = False
        try:
            gold = as_latex(rewritten(gold))
            if not parse(gold, parsing_timeout=limit):
                return None
            found = parse(rewritten(response), parsing_timeout=limit)
            said = str(found[-1]) if found else ""
            if (
                with_values(said) != said
            ):  # it names its base; a bare numeral is one of the gold's base
                gold, said = with_values(gold), with_values(said)
                found = parse(as_latex(said), parsing_timeout=limit)
            wanted = parse(without_bases(gold), parsing_timeout=limit)
            right = verify(wanted, found, timeout_seconds=limit)
        except (MemoryError, RecursionError):
            return 0.0
        except TimeoutException:
            return "timeout"
        return "timeout" if timeouts.seen and not right else float(right)

    return verifier


def as_latex(gold: str) -> str:
    """A gold answer in a LaTeX environment, which math-verify looks for; one that has one is left alone."""
    if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", gold):  # an escaped dollar is a currency
        return gold
    return f"\\boxed{{{gold}}}"


if __name__ == "__main__":
    main()
