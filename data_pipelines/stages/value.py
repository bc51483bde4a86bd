"""Trains V(x), the value of a prompt under a frozen policy, on that policy's own scored responses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, asked_options, prompt_text, responses_of
from data_pipelines.shards import in_shards
from data_pipelines.stages.pair import is_scored
from data_pipelines.value_rows import model_problems, require_in_range, reward_of
from prefopt.errors import DataError
from prefopt.recipe.schema import ModelSection, NoEffect
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.report.bars import Bar
from prefopt.storage.reading import digest

if TYPE_CHECKING:
    from prefopt.values.features import FrozenReference, StoredStates
    from prefopt.values.saved import HeadRecord
    from prefopt.values.training import Example, Fit, FitSettings

logger = logging.getLogger("prefopt.data")

HEAD = "head"
"""The folder of the head, beside the stage's shards."""
_RENDER_ROWS = 1000
_SHOWN_CHARS = 80
"""Of a prompt's end, in the predictions that `prefopt show` prints."""


@stage(
    "value",
    works="whole",
    reads={RowKind.GROUPS, RowKind.PAIRS, RowKind.SAMPLES},
    source="A-LoL (arXiv:2305.14718): V(x) of the reference from its own scored answers to the dev prompts",
)
class Value(StageSettings):
    """Trains a value head on the frozen hidden states of the prompts, by MSE on the responses' scores.

    Meant for `prompts` (a dev set) → `sample` (greedy, the reference) → `score` → `value`, or for rows that have
    scores already. The head and everything about it lie in OUTPUT_DIR/<id>/head: `prefopt show` prints them,
    `advantage` with `head:` takes rewards against it.

    A part of the prompts is held out of training to measure the head on; `keep` says which epoch's head stays.
    Rows pass through with the column `value`, the head's prediction; those without a scored response are dropped
    as `unscored`, prompts that cannot be read whole as `prompt_too_long` or `template_refused`.
    """

    model: ModelSection
    """The reference: the policy whose hidden states the head reads, and that sampled the responses. `path` of a
    model, an adapter, or a run directory."""
    head: Literal["attention", "mean"] = "attention"
    """`attention`: 8 heads with one learned query over the prompt's states, as in A-LoL. `mean`: their mean."""
    max_value: PositiveFloat = 1.0
    """Most a reward can be; the head predicts max_value · σ(…), and rewards outside [0, max_value] are an error.
    A-LoL: 1, or as many as the reward components that are summed."""
    normalize_rewards: Literal["none", "sigmoid"] = "none"
    """`sigmoid`: the reward is σ(score), as A-LoL takes a reward model's logit. The head remembers it, and
    `advantage` writes such rewards, so that the recipe need not normalise them again."""
    epochs: PositiveInt = 10
    """Passes over the dev set (A-LoL: 10 on HHA, 5 on its other tasks)."""
    learning_rate: PositiveFloat = 1e-5
    """Constant, AdamW without decay (A-LoL: 1e-5 on HHA, that of the language model, 2e-5, on its other tasks)."""
    batch_size: PositiveInt = 16
    """Responses of one step."""
    validation_frac: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts held out, at least 10 of them. A-LoL's code holds none out."""
    keep: Literal["validation", "train"] = "validation"
    """Which epoch's head stays: the one with the lowest MSE on held-out prompts, or on the training ones (A-LoL's
    code, where an over-fitted head looks best)."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are dropped and counted, never cut. (A-LoL cuts them on the left, to 640.)"""
    batch_tokens: PositiveInt = 16384
    """Most tokens of one forward of the reference, padding included."""
    device: Annotated[str | None, NoEffect("rows")] = None
    """Torch device; default: CUDA where there is one, else the CPU."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        found = model_problems(document, (*path, "model"), self.model, "value.model")
        if self.normalize_rewards == "sigmoid" and self.max_value != 1:
            found.append(
                f"{document.origin((*path, 'max_value'))}value.max_value = {self.max_value:g}: with "
                "normalize_rewards: sigmoid rewards end at 1; leave it out"
            )
        return found

    def basis(self) -> Mapping[str, Any]:
        from eval.models import resolve_run
        from prefopt.model.load import load_tokenizer
        from prefopt.model.source import resolve_source
        from prefopt.values.features import tokenizer_identity

        policy = resolve_run(self.model)
        return {
            "weights": resolve_source(policy.path, policy.revision).content,
            "tokenizer": tokenizer_identity(load_tokenizer(policy)),
        }

    def code(self) -> tuple[Any, ...]:
        from prefopt.values.features import FrozenReference
        from prefopt.values.heads import AttentionValueHead
        from prefopt.values.training import fit_head

        return (AttentionValueHead, FrozenReference, fit_head, reward_of)

    def gives_fields(self) -> tuple[str, ...]:
        return ("value",)

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        from eval.models import resolve_run
        from prefopt.model.frozen import default_device
        from prefopt.values.features import FrozenReference

        assert place.input is not None and place.folder is not None and place.reads is not None
        self._check_rewards(place)
        policy = resolve_run(self.model)
        reference = FrozenReference(
            policy, device=str(default_device(self.device)), batch_tokens=self.batch_tokens
        )
        dev = self._read(place, reference)
        fit, hidden_size = self._fit(place, dev, reference)
        record = self._record(place, policy, reference, dev, fit, hidden_size)
        self._save(place.folder / HEAD, dev, fit, record)
        place.report[HEAD] = _report(record)
        logger.info("%s: %s", place.id, summary(record))
        for row, became in zip(place.input.rows(), dev.became, strict=True):
            yield became if isinstance(became, Dropped) else {**row, "value": fit.values[became]}

    def _check_rewards(self, place: Place) -> None:
        """Before a model loads. Raises: DataError for rewards out of range, or none at all."""
        assert place.input is not None
        rewards = [(row["id"], r) for row in place.input.rows() for r in self._rewards(row, place)]
        require_in_range(rewards, self.max_value, place.id, self.normalize_rewards)
        if not rewards:
            raise DataError(
                f"stage {place.id!r}: no row has a scored response, so there is nothing to learn from. Put a "
                "`score` stage before it, or name the score's column in `rated`"
            )

    def _read(self, place: Place, reference: FrozenReference) -> _Dev:
        """Prompts and rewards of all rows."""
        assert place.input is not None
        dev = _Dev([], [], [], [])
        for rows in in_shards(place.input.rows(), _RENDER_ROWS):
            found = reference.prompt_ids(
                [row["prompt"] for row in rows],
                self.max_prompt_tokens,
                [asked_options(row) for row in rows],
            )
            for row, ids in zip(rows, found, strict=True):
                dev.add(row, ids, self._rewards(row, place))
        return dev

    def _rewards(self, row: Row, place: Place) -> list[float]:
        assert place.reads is not None
        scored = [each for each in responses_of(row, place.reads) if is_scored(each)]
        return [reward_of(float(each["score"]), self.normalize_rewards) for each in scored]

    def _fit(self, place: Place, dev: _Dev, reference: FrozenReference) -> tuple[Fit, int]:
        from prefopt.values.features import StoredStates, counted
        from prefopt.values.training import fit_head

        lengths = [len(ids) for ids in dev.prompts]
        states: StoredStates | None = None
        try:
            with Bar(desc=f"{place.id}: prompts read", unit="prompt", total=len(lengths)) as bar:
                batches = counted(reference.states(dev.prompts), bar)
                states = StoredStates(place.scratch / "states", lengths, batches)
            fit = fit_head(states, dev.examples, self._settings(place.seed), reference.device)
            return fit, states.hidden_size
        finally:
            if states is not None:
                states.close()

    def _settings(self, seed: int) -> FitSettings:
        from prefopt.values.training import FitSettings

        return FitSettings(
            head=self.head,
            max_value=self.max_value,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            validation_frac=self.validation_frac,
            keep=self.keep,
            seed=seed,
        )

    def _record(
        self,
        place: Place,
        policy: ModelSection,
        reference: FrozenReference,
        dev: _Dev,
        fit: Fit,
        hidden_size: int,
    ) -> HeadRecord:
        import dataclasses

        from prefopt.values.saved import HeadRecord, head_hash, reference_record

        return HeadRecord(
            reference=reference_record(policy, reference),
            settings=self._settings(place.seed),
            normalize_rewards=self.normalize_rewards,
            hidden_size=hidden_size,
            max_prompt_tokens=self.max_prompt_tokens,
            trained_on=dev.described(fit.held_out),
            epochs=[dataclasses.asdict(epoch) for epoch in fit.epochs],
            kept_epoch=fit.kept.number,
            validation={
                **dataclasses.asdict(fit.kept.validation),
                "constant_mse": fit.constant_mse,
                "num_prompts": len(fit.held_out),
            },
            content=head_hash(fit),
        )

    def _save(self, directory: Path, dev: _Dev, fit: Fit, record: HeadRecord) -> None:
        from prefopt.values.saved import save_head

        predictions = [
            {
                "id": id_,
                "prompt": dev.ends[example.prompt],
                "reward": example.reward,
                "value": fit.values[example.prompt],
                "held_out": example.prompt in fit.held_out,
            }
            for id_, example in zip(dev.ids, dev.examples, strict=True)
        ]
        save_head(directory, fit, record, predictions)


@dataclass
class _Dev:
    """The dev set as the head sees it: different prompts, and scored responses to them."""

    prompts: list[tuple[int, ...]]
    ends: list[str]
    """The end of each prompt's text, to be recognised by."""
    ids: list[str]
    """Of the row of each example."""
    examples: list[Example]

    def __post_init__(self) -> None:
        self.became: list[int | Dropped] = []
        """What became of each row: the number of its prompt, or why it is left out."""
        self._numbers: dict[tuple[int, ...], int] = {}

    def add(self, row: Row, ids: Any, rewards: Sequence[float]) -> None:
        from prefopt.data.rows import Refused
        from prefopt.values.training import Example

        if isinstance(ids, Refused):
            self.became.append(Dropped(str(ids.reason), ids.detail, row["id"]))
            return
        if not rewards:
            self.became.append(Dropped("unscored", id=row["id"]))
            return
        number = self._numbers.setdefault(ids, len(self.prompts))
        if number == len(self.prompts):
            self.prompts.append(ids)
            self.ends.append(prompt_text(row)[-_SHOWN_CHARS:])
        self.became.append(number)
        self.examples += [Example(number, reward) for reward in rewards]
        self.ids += [row["id"]] * len(rewards)

    def described(self, held_out: frozenset[int]) -> dict[str, Any]:
        rewards = [example.reward for example in self.examples]
        seen = [(id_, e.reward) for id_, e in zip(self.ids, self.examples, strict=True)]
        return {
            "prompts": len(self.prompts) - len(held_out),
            "responses": sum(example.prompt not in held_out for example in self.examples),
            "held_out": len(held_out),
            "reward_mean": sum(rewards) / len(rewards),
            "reward_min": min(rewards),
            "reward_max": max(rewards),
            "rows": digest(seen),
        }


def summary(record: HeadRecord) -> str:
    """A line: which head, how far off, and whether a constant is as good."""
    found, kept = record.validation, record.settings.keep
    r2 = "undefined (equal rewards)" if found["r2"] is None else f"{found['r2']:.3f}"
    text = (
        f"{record.settings.head} head of epoch {record.kept_epoch} of {len(record.epochs)} (lowest {kept} MSE): "
        f"MSE {found['mse']:.4g} on {found['num_prompts']} held-out prompts, R² {r2}; always predicting the "
        f"training mean: {found['constant_mse']:.4g}"
    )
    if found["mse"] >= found["constant_mse"]:
        text += ". No better than a constant: A = R - V then says no more than the reward. More epochs, a higher "
        text += "learning_rate, or more dev prompts"
    return text


def _report(record: HeadRecord) -> dict[str, Any]:
    kept = record.epochs[record.kept_epoch - 1]
    return {
        "content": record.content,
        "kept_epoch": record.kept_epoch,
        "keep": record.settings.keep,
        "train_mse": kept["train_mse"],
        **{f"validation_{key}": each for key, each in record.validation.items()},
    }
