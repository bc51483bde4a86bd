"""The ``prefopt`` command and what ``recipes/*.py`` call. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from prefopt import __version__
from prefopt.errors import ConfigError
from prefopt.process.guarded import guarded
from prefopt.process.launch import check_launched
from prefopt.process.ranks import joined
from prefopt.recipe.plugin_code import OPTION, without_plugins
from prefopt.recipe.scripts import require_script
from prefopt.shown import say

_OVERRIDES = (
    "section.key=value, e.g. train.learning_rate=8e-7 data.train.0.path=pairs.jsonl peft=null"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for a bad recipe, 1 for other failures."""
    given = list(sys.argv[1:] if argv is None else argv)
    siblings = _siblings()
    if given and given[0] in siblings:
        return siblings[given[0]].load().main(given[1:])
    arguments = parse(_parser(), given)
    return guarded(lambda: arguments.run(arguments))


def _siblings() -> dict[str, EntryPoint]:
    """Commands of packages beside this one, which it never imports: each is a module with `main` and `SUMMARY`.

    Declared as entry points of the group ``prefopt.commands``; `prefopt eval` is one.
    """
    return {point.name: point for point in entry_points(group="prefopt.commands")}


def recipe_main(trains: str, argv: Sequence[str] | None = None) -> int:
    """What ``recipes/<name>.py`` runs, on every rank of a launch: RECIPE.yaml and overrides.

    Args:
        trains: the objective or stage this script is for; "preference" takes any objective without a
            script of its own, "online_dpo" any recipe with ``regime.name: rollouts``.
        argv: arguments, default ``sys.argv[1:]``.

    Returns: the exit code. A recipe that trains something else is refused, naming its script.
    """
    parser = argparse.ArgumentParser(
        description=f"Trains a {trains} recipe. Usually through: accelerate launch --config_file "
        f"accelerate_configs/zero3.yaml recipes/{trains}.py RECIPE.yaml [section.key=value ...]"
    )
    # `deepspeed` and `torch.distributed.launch` add it to the line, and say the same in LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    _add_recipe(parser)
    arguments = parse(parser, argv)
    return guarded(lambda: _train(arguments, trains))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefopt",
        description="Preference optimisation for language models, from YAML recipes.",
        epilog="Start with: prefopt check recipes/simpo/llama3-8b-instruct.yaml",
    )
    parser.add_argument("--version", action="version", version=f"prefopt {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(commands)
    _add_show(commands)
    _add_train(commands)
    _add_merge(commands)
    _add_keys(commands)
    _add_registries(commands)
    _add_doctor(commands)
    for name, point in sorted(_siblings().items()):
        commands.add_parser(name, help=point.load().SUMMARY)
    return parser


def command_parser(prog: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of one command of a package beside this one; `parse` takes ``key=value`` anywhere in its line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=prog, description=summary, epilog=epilog, formatter_class=layout
    )
    parser.set_defaults(overrides=[])
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As ``parse_args``, with overrides also after options: argparse takes only the first run of them."""
    arguments, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") or "=" not in item for item in rest) or (
        rest and not hasattr(arguments, "overrides")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], object],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    """A subcommand whose help says what it does and shows one call."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML recipe; `prefopt keys` lists its keys"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "check",
        _check,
        "Everything that can be known before a model loads or a GPU is touched; all errors at once.",
        "prefopt check recipes/simpo/llama3-8b-instruct.yaml train.learning_rate=8e-7 --num-processes 8",
    )
    _add_recipe(parser)
    parser.add_argument(
        "--num-processes",
        type=_count,
        metavar="N",
        help="check that the batch divides over N processes",
    )
    parser.add_argument(
        "--assume-cuda", action="store_true", help="check for a machine with CUDA, not for this one"
    )
    add_no_plugins(parser)


def _count(text: str) -> int:
    """A number of processes, from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "show",
        _show,
        "The first examples of a recipe as tokens, with roles, loss mask, lengths and rejects; what a run has "
        "sampled, scored and labelled; or how far off a value head is.",
        "prefopt show recipes/dpo/zephyr-7b-full.yaml -n 1\n  prefopt show runs/online --rollouts --step 10\n"
        "  prefopt show data/dev/value/head -n 5",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE_OR_DIR",
        help="a YAML recipe, a value head's folder, or with --rollouts a run directory",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    parser.add_argument(
        "-n", type=int, default=2, metavar="N", help="examples or prompts to show (default: 2)"
    )
    parser.add_argument(
        "--rollouts", action="store_true", help="responses of a run with scores and labels"
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="step as metrics.jsonl counts them (default: the newest)",
    )
    parser.add_argument("--no-color", action="store_true", help="plain text, for files and diffs")
    add_no_plugins(parser)


def add_no_plugins(parser: argparse.ArgumentParser) -> None:
    """The option of a command that reads a recipe or pipeline without doing what it says."""
    parser.add_argument(
        OPTION,
        action="store_true",
        help="do not run the plugins: they are a program, and it may be a stranger's. Names that only they define "
        "are then unknown",
    )


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "Trains a recipe in this process. For several processes: accelerate launch recipes/simpo.py.",
        "prefopt train recipes/simpo/llama3-8b-instruct.yaml run.output_dir=runs/first",
    )
    _add_recipe(parser)


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "merge",
        _merge,
        "Writes the model that a saved adapter and its base make together.",
        "prefopt merge runs/first --output models/first",
    )
    parser.add_argument(
        "source", metavar="ADAPTER_OR_RUN", type=Path, help="adapter or run directory"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="where to write it"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the model code of the adapter's base (default: as the run did, where a run is given)",
    )


def _add_keys(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "keys",
        _keys,
        "Every key of a recipe: type, default, and what it does.",
        "prefopt keys train",
    )
    parser.add_argument(
        "section", nargs="?", metavar="SECTION", help="only this section, e.g. train"
    )


# Command, recipe section, what its page lists, an entry for the example.
_REGISTRY_PAGES = (
    ("objectives", "objective", "objective: hyper-parameters with defaults, what it needs", "simpo"),
    ("credits", "credit", "rule from scores to pairs or advantages: its keys, what it gives", "best_worst"),
    ("signals", "signals", "signal that scores rollouts: its keys, the columns it reads", "math"),
)  # fmt: skip


def _add_registries(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for command, section, lists, entry in _REGISTRY_PAGES:
        parser = _command(
            commands,
            command,
            _registry,
            f"Every {lists}, and its source.",
            f"prefopt {command} {entry}",
        )
        parser.set_defaults(section=section)
        parser.add_argument("name", nargs="?", metavar="NAME", help="only this one, in full")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "doctor",
        _doctor,
        "What the sandbox of model-written code holds on this machine, each item tried; exit code 1 if signals "
        "that run code would refuse.",
        "prefopt doctor",
    )
    parser.add_argument("--json", action="store_true", help="every attempt with what it met")


def say_plugins_run(plugins: Sequence[str]) -> None:
    """Says, before it happens, that code which a recipe or pipeline names is run to check it."""
    if plugins:
        say(f"runs the code of {', '.join(plugins)}; for a file of somebody else: {OPTION}")


def _check(arguments: argparse.Namespace) -> None:
    from prefopt.commands.look import examine_and_look
    from prefopt.recipe.load import plugins_named

    if not arguments.no_plugins:
        say_plugins_run(plugins_named(arguments.recipe, arguments.overrides))
    with without_plugins(active=arguments.no_plugins):
        notes = examine_and_look(
            arguments.recipe,
            arguments.overrides,
            num_processes=arguments.num_processes,
            assume_cuda=arguments.assume_cuda,
        )
    say(f"{arguments.recipe}: fine")
    for note in notes:
        say(f"  note: {note}")


def _show(arguments: argparse.Namespace) -> None:
    color = not arguments.no_color
    if arguments.rollouts:
        from prefopt.commands.show_rollouts import show_rollouts

        _refuse_overrides(arguments)
        show_rollouts(Path(arguments.recipe), arguments.step, arguments.n, color=color)
        return
    if arguments.step is not None:
        raise ConfigError(
            f"--step {arguments.step}: is a step of a run; add --rollouts and name the run's directory"
        )
    if Path(arguments.recipe).is_dir():
        from prefopt.commands.show_value import show_directory

        _refuse_overrides(arguments)
        show_directory(Path(arguments.recipe), arguments.n, color=color)
        return
    from prefopt.commands.show import show
    from prefopt.recipe.checks import examine

    with without_plugins(active=arguments.no_plugins):
        recipe, _ = examine(arguments.recipe, arguments.overrides, assume_cuda=True, to_train=False)
    show(recipe, arguments.n, color=color)


def _refuse_overrides(arguments: argparse.Namespace) -> None:
    if arguments.overrides:
        raise ConfigError(
            f"{arguments.overrides[0]}: would be ignored: what a directory holds is shown as it is. Leave it out"
        )


def _train(arguments: argparse.Namespace, trains: str | None = None) -> None:
    with joined():
        _train_recipe(arguments, trains)


def _train_recipe(arguments: argparse.Namespace, trains: str | None) -> None:
    from prefopt.recipe.checks import examine

    launch = check_launched()  # first: what a recipe needs depends on it
    recipe, notes = examine(arguments.recipe, arguments.overrides, num_processes=launch.world_size)
    if trains is not None:
        require_script(arguments.recipe, recipe, trains)
    if launch.is_main:
        for note in notes:
            say(f"note: {note}", file=sys.stderr)
    from prefopt.wiring import train

    train(recipe)


def _merge(arguments: argparse.Namespace) -> None:
    from prefopt.model.merge import merge_adapter

    merge_adapter(arguments.source, arguments.output, trust_remote_code=arguments.trust_remote_code)
    say(f"wrote {arguments.output}")


def _doctor(arguments: argparse.Namespace) -> None:
    from prefopt.commands.doctor import show_doctor

    show_doctor(as_json=arguments.json)


def _keys(arguments: argparse.Namespace) -> None:
    from prefopt.recipe.help_pages import keys_page

    say(keys_page(arguments.section))


def _registry(arguments: argparse.Namespace) -> None:
    from prefopt.recipe.help_pages import registry_page

    say(registry_page(arguments.section, arguments.name))


if __name__ == "__main__":
    sys.exit(main())
