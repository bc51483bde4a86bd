"""``prefopt data``: build preference data, look at it, go round with training. Light until a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.cli import add_no_plugins, command_parser, guarded, parse, say_plugins_run
from prefopt.process.launch import require_one_process
from prefopt.recipe.plugin_code import without_plugins
from prefopt.shown import say

SUMMARY = "Builds preference data from prompts or rated responses, stage by stage; says what is in a pair set."

_EXAMPLES = """\
examples:
  prefopt data presets                                papers' pipelines; `prefopt data presets simpo_v02`: its YAML
  prefopt data check gsm8k_verifiable
  prefopt data build PIPELINE.yaml output_dir=data/first stages.sample.model.path=runs/sft
  prefopt data build PIPELINE.yaml --from score       redo a stage and what follows; the old ones are kept
  prefopt data build PIPELINE.yaml --workers 4        four processes make its shards
  prefopt data build PIPELINE.yaml executor.name=ray executor.address=HEAD:6379    a Ray cluster does
  prefopt data status PIPELINE.yaml                   rows in and out of each stage, by reason
  prefopt data schedule SCHEDULE.yaml                 steps in order and in loops: SFT, pairs, DPO, online DPO, …
  prefopt data round ROUNDS.yaml                      sample, score, pair, train, and again with the new policy
  prefopt data rest REST.yaml                         sample, train on what exceeds rising thresholds, again
  prefopt data stages                                 every stage; `prefopt data stages filter`: one, with its keys
  prefopt data card data/first/filter --fail-on stop  what is in a pair set, and what is wrong with it

A build that is killed goes on at its last whole shard: run the same command again."""


def main(argv: Sequence[str]) -> int:
    """Runs ``prefopt data ARGUMENTS``; the exit code is 0, 2 for a bad setting, 1 for other failures."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "build": _build,
        "check": _check,
        "status": _status,
        **{name: partial(_schedule, name) for name in ("schedule", "round", "rest")},
        "card": _card,
        "stages": _stages,
        "presets": _presets,
        "keys": _keys,
    }
    command = commands.get(argv[0]) if argv else None
    if command is not None:
        return guarded(lambda: command(argv[1:]))
    parser = command_parser("prefopt data", SUMMARY, _EXAMPLES)
    parser.add_argument(
        "command", choices=sorted(commands), metavar="COMMAND", help=", ".join(commands)
    )
    parser.parse_args(argv[:1])
    return 2


def _parser(
    name: str, summary: str, example: str, *, pipeline: bool = True
) -> argparse.ArgumentParser:
    parser = command_parser(f"prefopt data {name}", summary, f"example:\n  {example}")
    if pipeline:
        parser.add_argument(
            "pipeline", metavar="PIPELINE", type=Path, help="a YAML pipeline, or a preset"
        )
    return parser


def _build(argv: Sequence[str]) -> None:
    parser = _parser(
        "build",
        "Runs a pipeline, or goes on with it: on this machine, or on a Ray cluster (executor.name=ray).",
        "prefopt data build PIPELINE.yaml output_dir=data/first",
    )
    parser.add_argument(
        "--from", dest="start", metavar="STAGE", help="redo this stage and those after it"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="as executor.workers=N: most shards at once (default: 1)",
    )
    arguments = parse(parser, argv)
    require_one_process("prefopt data build")
    from data_pipelines.pipeline import load_pipeline
    from data_pipelines.runner import build
    from data_pipelines.show import print_record, print_use

    overrides = list(arguments.overrides)
    if arguments.workers is not None:
        if arguments.workers < 1:
            parser.error(f"--workers {arguments.workers}: must be >= 1")
        overrides.append(f"executor.workers={arguments.workers}")
    pipeline = load_pipeline(arguments.pipeline, overrides)
    build(pipeline, start=arguments.start)
    print_record(pipeline)
    print_use(pipeline)


def _check(argv: Sequence[str]) -> None:
    parser = _parser(
        "check",
        "Everything that can be known before a file is read or a model loads; all problems at once.",
        "prefopt data check PIPELINE.yaml",
    )
    add_no_plugins(parser)
    arguments = parse(parser, argv)
    from data_pipelines.pipeline import load_pipeline, preset_file
    from prefopt.recipe.load import plugins_named

    if not arguments.no_plugins:
        say_plugins_run(plugins_named(preset_file(arguments.pipeline), arguments.overrides))
    with without_plugins(active=arguments.no_plugins):
        pipeline = load_pipeline(arguments.pipeline, arguments.overrides)
    for stage in pipeline.stages:
        stage.settings.basis()
    say(f"{arguments.pipeline}: fine")


def _status(argv: Sequence[str]) -> None:
    parser = _parser(
        "status", "Rows in and out of each stage, by reason.", "prefopt data status PIPELINE.yaml"
    )
    arguments = parse(parser, argv)
    from data_pipelines.pipeline import load_pipeline
    from data_pipelines.show import print_record

    print_record(load_pipeline(arguments.pipeline, arguments.overrides))


def _schedule(name: str, argv: Sequence[str]) -> None:
    from data_pipelines.schedule.presets import FILES

    file = FILES[name]
    parser = _parser(name, file.summary, file.example, pipeline=False)
    parser.add_argument("schedule", metavar=name.upper(), type=Path, help="a YAML file")
    for flag, says in (
        ("--keys", "print the file's keys, and stop"),
        ("--check", "say what is wrong with it, and stop"),
        (
            "--dry-run",
            "as --check, and print every command in order, were each turn of a loop a gain",
        ),
        ("--status", "what is done so far, and what came of it"),
    ):
        parser.add_argument(flag, action="store_true", help=says)
    if "--keys" in argv:
        say(file.keys_page())
        return
    arguments = parse(parser, argv)
    require_one_process(f"prefopt data {name}")
    from data_pipelines.schedule.commands import check_schedule, done_so_far, run_schedule
    from data_pipelines.schedule.show import commands_page, print_walk, write_record

    schedule = file.load(arguments.schedule, arguments.overrides)
    if arguments.status:
        print_walk(done_so_far(schedule))
    elif arguments.check or arguments.dry_run:
        tasks = check_schedule(schedule)
        say(f"{arguments.schedule}: fine")
        if arguments.dry_run:
            say(commands_page(tasks))
    else:
        walk = run_schedule(schedule)
        write_record(walk)
        print_walk(walk)


def _card(argv: Sequence[str]) -> None:
    parser = _parser(
        "card",
        "What is in a pair set, and what is wrong with it: a page and JSON, a verdict (ok, look, stop) a check. "
        "PAIRS is a stage's folder, a file, directory, glob or hub data set; its keys are those of data.train.N.",
        "prefopt data card pairs.jsonl columns.score_chosen=margin.a columns.score_rejected=margin.b \\\n"
        "      --held-out gsm8k --held-out test.jsonl --tokenizer Qwen/Qwen2.5-1.5B-Instruct --fail-on stop",
        pipeline=False,
    )
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for card.html and card.json")
    parser.add_argument(
        "--held-out", action="append", default=[], metavar="SET",
        help="look for its prompts among the pairs: a task of `prefopt eval`, or a file or data set with prompts "
        "(several times for several)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="check template, BOS, end tokens and lengths in tokens with it"
    )  # fmt: skip
    parser.add_argument("--chat-template", metavar="FILE", help="in place of the tokenizer's own")
    parser.add_argument(
        "--fail-on", choices=("look", "stop"), help="exit with 1 from this verdict on, for use in CI"
    )  # fmt: skip
    arguments = parse(parser, argv)
    if arguments.chat_template and not arguments.tokenizer:
        parser.error("--chat-template: nothing is rendered without --tokenizer")
    from data_pipelines.card.build import CardSettings, held_out_set, make_card
    from data_pipelines.card.findings import SEVERITY
    from data_pipelines.card.outputs import PAGE_FILE, default_folder, print_card, write_card
    from data_pipelines.card.pairs import PairSource
    from prefopt.errors import DataError

    source = PairSource(arguments.pairs, tuple(arguments.overrides))
    folder = arguments.output or default_folder(source)
    settings = CardSettings(
        tuple(map(held_out_set, arguments.held_out)), arguments.tokenizer, arguments.chat_template
    )
    card = make_card(source, settings)
    write_card(card, folder)
    print_card(card)
    say(f"the page: {folder / PAGE_FILE}")
    if arguments.fail_on and SEVERITY[card.worst()] >= SEVERITY[arguments.fail_on]:
        raise DataError(
            f"{arguments.pairs}: the card says {card.worst()} (--fail-on {arguments.fail_on})"
        )


def _stages(argv: Sequence[str]) -> None:
    parser = _parser(
        "stages", "Every stage, or one with its keys.", "prefopt data stages filter", pipeline=False
    )
    parser.add_argument("stage", nargs="?", metavar="STAGE")
    from data_pipelines.show import stage_page, stages_page

    name: Any = parser.parse_args(argv).stage
    say(stage_page(name) if name else stages_page())


def _presets(argv: Sequence[str]) -> None:
    parser = _parser(
        "presets",
        "Papers' pipelines; `prefopt data build NAME` runs one, its YAML says what it follows and needs.",
        "prefopt data build simpo_v02 output_dir=data/mine",
        pipeline=False,
    )
    parser.add_argument("preset", nargs="?", metavar="NAME", help="print this one's YAML")
    from data_pipelines.show import preset_page, presets_page

    name: Any = parser.parse_args(argv).preset
    say(preset_page(name) if name else presets_page())


def _keys(argv: Sequence[str]) -> None:
    parser = _parser(
        "keys",
        "The keys of a pipeline beside its stages' own.",
        "prefopt data keys",
        pipeline=False,
    )
    parser.parse_args(argv)
    from data_pipelines.pipeline import PipelineSettings
    from prefopt.recipe.help_pages import schema_page

    say(schema_page(PipelineSettings))
