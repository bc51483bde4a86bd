"""``prefopt show RUN --rollouts``: what a run sampled at a step, side by side, with scores and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.model.load import load_tokenizer
from prefopt.recipe.schema import ModelSection
from prefopt.report.terminal import Terminal
from prefopt.rollouts.batch import RolloutBatch, RolloutGroup, merge
from prefopt.rollouts.experience import DIRECTORY, rank_directories, read_batch, read_log
from prefopt.shown import visible
from prefopt.storage.reading import reading
from prefopt.storage.run_files import read_run

MOST_CHARS = 1200
"""Characters shown of a longer prompt or response: two thirds of its beginning, one of its end."""

COLUMN_CHARS = 36
"""Narrowest column of a response; as many stand side by side as the terminal holds."""


def show_rollouts(
    run_dir: Path, step: int | None = None, n: int = 2, *, color: bool = True
) -> None:
    """Prints the first ``n`` groups that a run sampled for a step, and one line that sums the step up.

    Args:
        run_dir: a run directory with an experience log.
        step: as ``metrics.jsonl`` counts them, from 1; default: the one sampled last. In an asynchronous
            run that one may not have been trained on yet.
        n: groups to print; 0 prints the line alone.
        color: colour the labels where the terminal can; plain text otherwise.

    Raises: ConfigError if the directory holds no rollouts, or none of ``step``; DataError for a damaged log.
    """
    batch = find_batch(run_dir, step)
    tokenizer = _tokenizer(run_dir)
    # Without a colour system rich writes no bold or dim either: plain text for files and diffs.
    console = Terminal(color_system="auto" if color else None)
    for group in batch.groups[:n]:
        _print_group(console, group, batch, tokenizer)
    console.print(Text(summary(batch), "bold"), soft_wrap=True)


def find_batch(run_dir: Path, step: int | None) -> RolloutBatch:
    """The batch of ``step`` (from 1; None: the newest), all processes' shares put together.

    A step that was sampled again after a kill is shown as it was sampled last. Raises: as `show_rollouts`.
    """
    if not rank_directories(run_dir):
        hint = "" if run_dir.is_dir() else ": no such directory"
        raise ConfigError(
            f"{run_dir}{hint or f' has no {DIRECTORY}/'}: give the run.output_dir of a run with "
            "regime.name: rollouts that has sampled at least one batch"
        )
    shares: dict[int, dict[int, _Share]] = {}
    newest: dict[int, int] = {}
    for commit, rows in read_log(run_dir):
        step_shares = shares.setdefault(commit["commit"], {})
        rank = commit.pop("rank")
        step_shares[rank] = _Share(commit["lineage"], [*rows, commit])
        newest[rank] = commit["commit"]
    if not shares:
        raise ConfigError(f"{run_dir / DIRECTORY}: no batch is complete; the run was stopped early")
    wanted = newest[min(newest)] if step is None else step - 1
    if wanted not in shares:
        raise ConfigError(
            f"--step {step}: {run_dir} has rollouts of steps {min(shares) + 1} to {max(shares) + 1}"
        )
    advice = "Restore what was changed, or take another --step"
    with reading(run_dir / DIRECTORY, f"what was sampled for step {wanted + 1}", advice):
        return _merged(shares[wanted])


@dataclass(frozen=True)
class _Share:
    """What one process sampled for a step."""

    lineage: str
    rows: list[dict[str, Any]]


def _merged(shares: Mapping[int, _Share]) -> RolloutBatch:
    # A process that the run no longer has may have left a share of other settings.
    lineage = shares[min(shares)].lineage
    return merge([read_batch(share.rows) for share in shares.values() if share.lineage == lineage])


def summary(batch: RolloutBatch) -> str:
    """Step, lag, mean reward, what became of the groups, and where the time went."""
    groups = batch.groups
    responses = [c for group in groups for c in group.completions]
    rewards = [r for g in groups if g.rewards is not None for r in g.rewards[: len(g.completions)]]
    parts = [
        f"step {batch.step + 1}: {len(groups)} prompts, {len(responses)} responses",
        f"version {batch.version}, lag {batch.step - batch.version}",
    ]
    if rewards:
        parts.append(f"mean reward {sum(rewards) / len(rewards):.4g}")
    trained = sum(group.is_trained_on for group in groups)
    parts.append(f"trained on {_percent(trained, len(groups))} of the groups")
    skipped = Counter(group.skipped for group in groups if group.skipped)
    parts += [f"{count} {reason}" for reason, count in sorted(skipped.items())]
    if failed := sum(group.failed is not None for group in groups):
        parts.append(f"{failed} failed")
    cut = sum(c.stop_reason == "length" for c in responses)
    parts.append(f"truncated {_percent(cut, len(responses))}")
    seconds = [f"{name.removesuffix('_s')} {value:.2f} s" for name, value in batch.timings.items()]
    return " · ".join([*parts, ", ".join(seconds)] if seconds else parts)


def _percent(count: int, total: int) -> str:
    return f"{count / total:.0%}" if total else "none"


def _tokenizer(run_dir: Path) -> Any:
    """The run's tokenizer, or None where it is not to be had: the responses are readable without it."""
    try:
        record = read_run(run_dir)
        return load_tokenizer(ModelSection.model_validate(record["recipe"]["model"]))
    except (ValueError, DataError, ModelError):
        return None


def _print_group(
    console: Console, group: RolloutGroup, batch: RolloutBatch, tokenizer: Any
) -> None:
    fate = "trained on"
    if group.failed is not None:
        fate = f"dropped, a signal failed: {group.failed}"
    elif group.skipped is not None:
        fate = f"skipped: {group.skipped}"
    head = f"── {group.prompt_id} ── step {batch.step + 1} · version {batch.version} · {fate}"
    console.print(Text(head, "bold"), soft_wrap=True)
    prefix = f", {len(group.start.prefix)} of them rolled in" if group.start.prefix else ""
    console.print(Text(f"prompt ({len(group.prompt_ids)} tokens{prefix})", "bold dim"))
    if tokenizer is not None:
        console.print(Text(_clip(tokenizer.decode(list(group.prompt_ids))), "dim"), soft_wrap=True)
    order = sorted(range(_num_responses(group)), key=lambda index: _rank(group, index))
    width = max(1, console.width // (COLUMN_CHARS + 3))
    for start in range(0, len(order), width):
        console.print(_table(group, order[start : start + width], tokenizer))
    console.print()


def _table(group: RolloutGroup, rows: Sequence[int], tokenizer: Any) -> Table:
    """Responses side by side."""
    table = Table(box=box.ASCII, expand=True, show_lines=False)
    for index in rows:
        table.add_column(_heading(group, index), ratio=1, overflow="fold")
    table.add_row(*(Text(_clip(_text(group, index, tokenizer))) for index in rows))
    return table


def _heading(group: RolloutGroup, index: int) -> Text:
    """Number, label, reward with its parts, advantage, length and how it ended."""
    text = Text(f"#{index}")
    for label, style, side in (("chosen", "green", 0), ("rejected", "red", 1)):
        if count := sum(pair[side] == index for pair in group.pairs):
            text.append(f" {label}{f' x{count}' if count > 1 else ''}", f"bold {style}")
    if group.rewards is not None:
        text.append(f"\nreward {group.rewards[index]:.4g}")
    parts = {name: values[index] for name, values in group.parts.items()}
    if len(parts) > 1 or (parts and group.rewards != next(iter(group.parts.values()))):
        text.append(f"\n{', '.join(f'{name} {value:.4g}' for name, value in parts.items())}")
    if group.advantages is not None and index < len(group.advantages):
        text.append(f"\nadvantage {group.advantages[index]:+.4g}")
    if index < len(group.completions):
        completion = group.completions[index]
        ended = "ended" if completion.stop_reason == "eos" else "cut at the limit"
        text.append(f"\n{len(completion.ids)} tokens, {ended}")
    else:
        text.append(f"\n{len(group.offline_ids or ())} tokens, from the data")
    return text


def _num_responses(group: RolloutGroup) -> int:
    return len(group.completions) + (group.offline_ids is not None)


def _rank(group: RolloutGroup, index: int) -> tuple[bool, float]:
    """Sorts what a pair uses to the front, and the best of each kind first."""
    is_labelled = any(index in pair for pair in group.pairs)
    return not is_labelled, 0.0 if group.rewards is None else -group.rewards[index]


def _text(group: RolloutGroup, index: int, tokenizer: Any) -> str:
    if index < len(group.texts):
        return group.texts[index]
    ids = list(group.offline_ids or ())
    if tokenizer is None:
        return f"({len(ids)} tokens; the run's tokenizer is not to be had)"
    return tokenizer.decode(ids, skip_special_tokens=True)


def _clip(text: str) -> str:
    text = visible(text)  # here, because rich drops some control characters
    if len(text) <= MOST_CHARS:
        return text
    tail = MOST_CHARS // 3
    hidden = len(text) - MOST_CHARS
    return f"{text[: MOST_CHARS - tail]}\n… {hidden} more characters …\n{text[-tail:]}"
