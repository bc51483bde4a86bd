"""``prefopt show HEAD_DIR``: what a value head was trained on, how far off it is, predictions beside rewards."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prefopt.errors import ConfigError
from prefopt.report.terminal import Terminal
from prefopt.values.saved import HeadRecord, is_head, read_head, read_predictions

_BINS = 5
_BAR = 40
"""Characters for the whole range of the reward."""


def show_directory(directory: Path, n: int = 2, *, color: bool = True) -> None:
    """`show_value` of a directory that a user has named. Raises: ConfigError for one that holds something else."""
    if not is_head(directory):
        raise ConfigError(
            f"{directory} is a directory, and holds no value head. What a run sampled: prefopt show {directory} "
            "--rollouts. A value head: prefopt show OUTPUT_DIR/value/head. The examples of a recipe: prefopt "
            "show RECIPE.yaml"
        )
    show_value(directory, n, color=color)


def show_value(directory: Path, n: int = 2, *, color: bool = True) -> None:
    """Prints a saved value head: its model, its data, its error an epoch, and predictions against rewards.

    The held-out prompts are cut into parts by prediction, lowest first; in a head that knows something their mean
    rewards rise. Then the ``n`` held-out prompts on which it is farthest off.

    Args:
        directory: of the head.
        n: prompts to print.
        color: bold where the terminal can; plain text otherwise.

    Raises: ModelError if there is no head, or its predictions cannot be read.
    """
    console = Terminal(no_color=not color, soft_wrap=True)
    record = read_head(directory)
    _print_summary(console, record)
    console.print(_epochs(record))
    most = record.settings.max_value
    held_out = [row for row in read_predictions(directory, most) if row["held_out"]]
    console.print(_calibration(held_out, most))
    for row in sorted(held_out, key=lambda row: -abs(row["reward"] - row["value"]))[:n]:
        console.print(
            f"{row['id']}: reward {row['reward']:.3f}, value {row['value']:.3f}  …{row['prompt']!r}",
            markup=False,
        )


def _print_summary(console: Console, record: HeadRecord) -> None:
    reference, data, settings = record.reference, record.trained_on, record.settings
    reward = (
        ""
        if record.normalize_rewards == "none"
        else f"; the reward is {record.normalize_rewards}(score)"
    )
    console.print(
        f"value head: {settings.head}, V(x) = {settings.max_value:g} · σ(…){reward}\n"
        f"reads:      {reference.description}, weights {reference.weights[:12]}, at {reference.path}\n"
        f"trained on: {data['responses']} responses to {data['prompts']} prompts, {data['held_out']} prompts held "
        f"out; rewards {data['reward_min']:.3f} to {data['reward_max']:.3f}, mean {data['reward_mean']:.3f}\n"
        f"settings:   {settings.epochs} epochs, learning rate {settings.learning_rate:g}, batch "
        f"{settings.batch_size}, seed {settings.seed}",
        markup=False,
    )
    found = record.validation
    console.print(
        f"held out:   MSE {found['mse']:.4g}, R² {_number(found['r2'])}; always the training mean: MSE "
        f"{found['constant_mse']:.4g}",
        markup=False,
    )


def _epochs(record: HeadRecord) -> Table:
    table = Table(title=f"errors by epoch; kept: lowest {record.settings.keep} MSE")
    for name in ("epoch", "train MSE", "held-out MSE", "held-out R²", ""):
        table.add_column(name, justify="right" if name else "left")
    for epoch in record.epochs:
        validation = epoch["validation"]
        table.add_row(
            str(epoch["number"]),
            f"{epoch['train_mse']:.5f}",
            f"{validation['mse']:.5f}",
            _number(validation["r2"]),
            "kept" if epoch["number"] == record.kept_epoch else "",
        )
    return table


def _calibration(rows: Sequence[Mapping[str, Any]], max_value: float) -> Table:
    """Held-out responses in parts of equal size by prediction; ``│`` marks the prediction on the reward's bar."""
    table = Table(title="held-out responses by prediction: ▇ mean reward, │ mean value")
    for name in ("responses", "value", "reward", f"0 to {max_value:g}"):
        table.add_column(name, justify="left" if name.startswith("0 ") else "right")
    ordered = sorted(rows, key=lambda row: row["value"])
    num_bins = min(_BINS, len(ordered))
    for number in range(num_bins):
        start = number * len(ordered) // num_bins
        part = ordered[start : (number + 1) * len(ordered) // num_bins]
        value = statistics.fmean(row["value"] for row in part)
        reward = statistics.fmean(row["reward"] for row in part)
        bar = list("▇" * round(_BAR * reward / max_value))
        bar += " " * (_BAR + 1 - len(bar))
        bar[round(_BAR * value / max_value)] = "│"
        table.add_row(str(len(part)), f"{value:.3f}", f"{reward:.3f}", "".join(bar).rstrip())
    return table


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
