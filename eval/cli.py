"""``prefopt eval``: evaluate models, score published files, compare results. Light until a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.cli import command_parser, guarded, parse
from prefopt.errors import ConfigError
from prefopt.process.launch import require_one_process
from prefopt.shown import say

SUMMARY = (
    "Evaluates checkpoints the way papers report them; scores published files; compares results."
)

_EXAMPLES = """\
examples:
  prefopt eval runs/simpo --tasks ifeval,gsm8k --output results/simpo engine.name=vllm
  prefopt eval runs/simpo --tasks alpaca_eval2 --output results/simpo \\
      judge.base_url=http://localhost:8000/v1 judge.model=judge --dry-run
  prefopt eval runs/simpo --baseline runs/sft --tasks win_rate,kl --output results/simpo \\
      tasks.win_rate.data=prompts.jsonl tasks.kl.data=prompts.jsonl judge.base_url=… judge.model=…
  prefopt eval list                                tasks; `prefopt eval list gsm8k`: one, with its options
  prefopt eval keys                                every section.key that can be set
  prefopt eval score alpaca_eval2 annotations.jsonl --calibration DIR --json
  prefopt eval compare results/sft results/simpo --output comparison

An evaluation that is killed goes on where it was: run the same command again."""


def main(argv: Sequence[str]) -> int:
    """Runs ``prefopt eval ARGUMENTS``; the exit code is 0, 2 for a bad setting, 1 for other failures."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "list": _list,
        "keys": _keys,
        "score": _score,
        "compare": _compare,
    }
    command = commands.get(argv[0]) if argv else None
    if command is not None:
        return guarded(lambda: command(argv[1:]))
    return guarded(lambda: _run(argv))


def _parser(name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return command_parser(f"prefopt eval {name}".strip(), summary, example)


def _run(argv: Sequence[str]) -> None:
    arguments = parse(_run_parser(), argv)
    require_one_process("prefopt eval")
    from eval.settings import load_settings

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    settings = load_settings(
        arguments.config,
        arguments.overrides,
        model=arguments.model,
        baseline=arguments.baseline,
        limit=arguments.limit,
        seed=arguments.seed,
    )
    if arguments.dry_run:
        from eval.runner import dry_run

        _print_plan(dry_run(settings, names), as_json=arguments.json)
        return
    if arguments.output is None:
        raise ConfigError(
            "--output is missing: the directory for answers, judgments and results.json"
        )
    if arguments.checkpoints:
        from eval.checkpoints import evaluate_checkpoints

        evaluate_checkpoints(settings, names, arguments.output)
        return
    from eval.runner import evaluate
    from eval.show import print_results

    print_results(evaluate(settings, names, arguments.output), as_json=arguments.json)


def _run_parser() -> argparse.ArgumentParser:
    parser = _parser("", SUMMARY, _EXAMPLES)
    parser.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="model or adapter (directory or hub id), or a run directory",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="A,B",
        help="`prefopt eval list`; lm_eval:NAME for any other",
    )
    parser.add_argument(
        "--baseline",
        metavar="OTHER",
        help="model or run to compare with: answers for pairwise judges, reference of implicit rewards and KL",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="answers, judgments, rows and results.json"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with the same section.key"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N examples of each task"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling (default: 0)")
    parser.add_argument(
        "--checkpoints", action="store_true", help="every checkpoint of the run, each in DIR/step-N"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say how much would be generated and asked, and stop"
    )
    parser.add_argument("--json", action="store_true", help="results as JSON on standard output")
    return parser


def _list(argv: Sequence[str]) -> None:
    parser = _parser(
        "list", "Every task, or one with its options.", "example:\n  prefopt eval list ifeval"
    )
    parser.add_argument("task", nargs="?", metavar="TASK")
    from eval.pages import task_page, tasks_page

    arguments = parser.parse_args(argv)
    say(task_page(arguments.task) if arguments.task else tasks_page())


def _keys(argv: Sequence[str]) -> None:
    parser = _parser(
        "keys",
        "Every section.key=value that `prefopt eval` takes beside a task's own options.",
        "example:\n  prefopt eval keys judge",
    )
    parser.add_argument("section", nargs="?", metavar="SECTION")
    from eval.pages import settings_page

    say(settings_page(parser.parse_args(argv).section))


def _score(argv: Sequence[str]) -> None:
    parser = _parser(
        "score",
        "The benchmark's numbers from published annotation, judgment or response files; nothing is generated.",
        "example:\n  prefopt eval score arena_hard battles.jsonl.gz --json",
    )
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="folder with the benchmark's calibration files (alpaca_eval2)",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="the benchmark's own examples, where FILE lacks them"
    )
    parser.add_argument("--model", metavar="NAME", help="only this model of a file with several")
    parser.add_argument("--json", action="store_true", help="the result object on standard output")
    arguments = parse(parser, argv)
    from eval.score import print_score, score_file
    from eval.settings import score_options

    given = {"calibration": arguments.calibration, "data": arguments.data}
    options = score_options(arguments.task, given, arguments.overrides)
    result = score_file(arguments.task, arguments.file, options, model=arguments.model)
    print_score(result, as_json=arguments.json)


def _compare(argv: Sequence[str]) -> None:
    parser = _parser(
        "compare",
        "Paired differences of two or more results, as a table and, with --output, as one HTML page and JSON.",
        "example:\n  prefopt eval compare results/sft results/dpo results/simpo --output comparison",
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="DIR", help="outputs of `prefopt eval`"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write comparison.html and comparison.json"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare although versions, templates or decoding differ; marked",
    )
    parser.add_argument(
        "--reward",
        metavar="TASK.METRIC",
        help="reward of the reward-versus-KL frontier (default: signals.reward, else win_rate)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)"
    )
    parser.add_argument(
        "--json", action="store_true", help="JSON on standard output in place of a table"
    )
    arguments = parser.parse_args(argv)
    from eval.comparison.compare import compare, comparison_json, print_comparison
    from eval.comparison.page import page
    from prefopt.report.pages import write_text

    found = compare(
        arguments.results, force=arguments.force, seed=arguments.seed, reward=arguments.reward
    )
    if arguments.json:
        say(json.dumps(comparison_json(found), indent=1, ensure_ascii=False))
    else:
        print_comparison(found)
    if arguments.output is not None:
        text = json.dumps(comparison_json(found), indent=1, ensure_ascii=False)
        write_text(arguments.output / "comparison.json", f"{text}\n")
        write_text(arguments.output / "comparison.html", page(found))
        say(f"wrote {arguments.output / 'comparison.html'}", file=sys.stderr)


def _print_plan(lines: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        say(json.dumps(list(lines), indent=1))
        return
    for line in lines:
        parts = [
            f"{value:,} {name.replace('_', ' ')}" for name, value in line.items() if name != "task"
        ]
        say(f"{line['task']}: {', '.join(parts)}")
