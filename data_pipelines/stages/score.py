"""Scores of responses, by the signals that online training uses."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from data_pipelines.base import Dropped, Needs, Place, Result, StageSettings
from data_pipelines.candidates import READS_IDS, candidates
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, responses_of, with_responses
from prefopt.errors import DataError, SignalError
from prefopt.recipe.entries import Entry
from prefopt.recipe.only_where import SOURCE
from prefopt.recipe.registry import BoundSignal
from prefopt.recipe.schema import Fraction, ModelSection, NoEffect, PathText
from prefopt.recipe.scored_rows import columns_named
from prefopt.recipe.yaml_file import Document, KeyPath

if TYPE_CHECKING:
    from prefopt.data.render import Renderer
    from prefopt.signals.combine import Scored, WeightedSignals

logger = logging.getLogger("prefopt.data")

_TAKEN = frozenset(
    {
        "text", "tokens", "ended", "ids", "model", "seed", "temperature", "offline", "scores", "opened",
    }
)  # fmt: skip
"""What a response's keys mean already."""
_MODELS = {"reward_model": ("path",), "implicit_reward": ("path", "reference")}
"""Keys of signals that name a model, which may be a hub id."""
_FEW_ROWS = 20
"""A share of fewer rows than this says little: one bad row of a short shard must not end a pipeline."""


@stage(
    "score",
    works="map",
    reads={RowKind.GROUPS, RowKind.PAIRS},
    gives="same",
    source="the signals of online training; SimPO v0.2 (arXiv:2405.14734), SeRA (arXiv:2410.09362)",
)
class Score(StageSettings):
    """Scores every response (of a pair: both sides) with signals; `prefopt signals` lists them.

    A response's `score` becomes the weighted sum, its `scores` the parts. A row that a signal fails on is
    dropped as `signal_failed`. `judge` in its pairwise mode is a full ranking: every two responses of a group
    meet in both orders, and the score is the share of games won (what LIONs asks PairRM for); it costs n(n-1)
    requests a group, where `mode: pointwise` costs n.
    """

    signals: tuple[Annotated[BoundSignal, Entry("signals")], ...] = Field(
        strict=False, min_length=1
    )
    """As a recipe's: each has a `name`, a `weight` (default 1), `only_where` (default: every row) and that
    signal's own keys. What they check against (`answer`) are columns of the row, which the first stage must keep.
    `only_where: {source: NAME}` goes by the `name` of a source of the first stage, or of `mix`. A row that no
    signal is for is dropped as `no_signal`."""
    into: str = "score"
    """Under which key of a response the sum goes. Another name than `score` leaves the scores that are there
    alone: SeRA's margins of two policies are `into: now` and `into: before`, and `order` reads `gap.now`. Parts
    then go to `scores` as `now/<part>`."""
    overwrite: bool = False
    """Replace what stands under `into`. Without it, responses that have one already are an error."""
    keep_parts: bool = True
    """Also store each signal's own unweighted score, in `scores`."""
    tokenizer: PathText | None = None
    """Model directory or run whose tokenizer makes token ids for rows that have none (pairs, rated data). Only
    for signals that read ids: implicit_reward, length_penalty, repetition_penalty."""
    chat_template: PathText | None = None
    """Path of a Jinja file that replaces that tokenizer's chat template."""
    max_failed_frac: Annotated[Fraction, NoEffect("rows")] = 0.2
    """Stop when signals fail on more than this share of the rows (of 20 at least)."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        found: list[str] = []
        if self.into in _TAKEN or not self.into.isidentifier():
            found.append(
                f"{document.origin((*path, 'into'))}score.into = {self.into!r}: must be a name of letters, digits "
                f"and _ that means nothing else in a response, as {', '.join(sorted(_TAKEN))} do"
            )
        if self.chat_template is not None and self.tokenizer is None:
            found.append(
                f"{document.origin((*path, 'chat_template'))}score.chat_template: would be ignored: it goes with "
                "score.tokenizer, which is not set"
            )
        if reads is RowKind.PAIRS and self.tokenizer is None:
            names = [entry.name for entry in self.signals if entry.name in READS_IDS]
            found += [
                f"{document.origin(path)}score.tokenizer is missing: {name} reads token ids, and pairs have text. "
                "Set it to the policy's model directory"
                for name in names
            ]
        return found

    def needs_fields(self) -> tuple[str, ...]:
        return tuple(name for name in columns_named(self.signals) if name != SOURCE)

    def basis(self) -> Mapping[str, Any]:
        found = {
            f"signals.{index}.{key}": content
            for index, entry in enumerate(self.signals)
            for key, content in _contents(entry).items()
        }
        if self.tokenizer is not None:
            from prefopt.data.render import RENDERER_VERSION
            from prefopt.data.tokenise import tokenizer_hash

            found |= {
                "tokenizer": tokenizer_hash(self._load_tokenizer()),
                "renderer": RENDERER_VERSION,
            }
        return found

    def needs(self) -> Needs:
        models = [entry.given for entry in self.signals if entry.name in _MODELS]
        on_gpu = any(given.get("device") != "cpu" for given in models)
        return Needs(stays=bool(models), num_gpus=int(on_gpu))

    def code(self) -> tuple[Any, ...]:
        from prefopt.signals.choices import extract_choice
        from prefopt.signals.math_text import rewritten
        from prefopt.signals.numbers import extract_number
        from prefopt.signals.plain_text import spelled
        from prefopt.signals.thinking import answer_of

        reading = (answer_of, spelled, extract_number, rewritten, extract_choice)
        return (candidates, *reading, *(entry.fn for entry in self.signals))

    def open(self, place: Place) -> ScoreWorker:
        """Loads the signals. Raises: SignalError, ModelError for one that cannot be set up."""
        from prefopt.signals.combine import build_signals

        renderer = None
        if self.tokenizer is not None:
            from prefopt.data.render import Renderer

            renderer = Renderer(self._load_tokenizer())
        return ScoreWorker(self, place, build_signals(self.signals), renderer)

    def _load_tokenizer(self) -> Any:
        from eval.models import resolve_run
        from prefopt.model.load import load_tokenizer

        assert self.tokenizer is not None
        section = ModelSection(path=self.tokenizer, chat_template=self.chat_template)
        return load_tokenizer(resolve_run(section))


class ScoreWorker:
    """Loaded signals; see `Score`."""

    def __init__(
        self, settings: Score, place: Place, signals: WeightedSignals, renderer: Renderer | None
    ) -> None:
        assert place.reads is not None
        self.settings = settings
        self.place = place
        self.kind: RowKind = place.reads
        self.signals = signals
        self.renderer = renderer
        self._seen = 0
        self._failed = 0
        self._first_failure = ""

    def process(self, rows: Sequence[Row]) -> Sequence[Result]:
        """Raises: DataError for scores that are there already; SignalError if too many rows fail."""
        if not self.settings.overwrite:
            for row in rows:
                self._refuse_scored(row)
        found = candidates(rows, self.kind, self.renderer)
        groups = [each for each in found if not isinstance(each, Dropped)]
        scored = iter(self.signals.score(groups))
        results = [
            each if isinstance(each, Dropped) else self._result(row, next(scored))
            for row, each in zip(rows, found, strict=True)
        ]
        self._check_failures(len(groups))
        return results

    def close(self) -> None:
        counts = {name: value for name, value in self.signals.report().items() if value}
        if self._seen and counts:
            said = ", ".join(f"{name} {value:g}" for name, value in counts.items())
            logger.info("%s: %s", self.place.id, said)
        self._seen = 0  # closed twice, it says so once
        self.signals.close()

    def _refuse_scored(self, row: Row) -> None:
        into = self.settings.into
        if any(each.get(into) is not None for each in responses_of(row, self.kind)):
            raise DataError(
                f"stage {self.place.id!r}, row {row['id']}: has a {into!r} already. Set overwrite: true to "
                "replace it, or into: to another name to keep both"
            )

    def _result(self, row: Row, scored: Scored) -> Result:
        if scored.rewards is None:
            self._failed += 1
            self._first_failure = self._first_failure or str(scored.failure)
            return Dropped("no_signal" if scored.is_unjudged else "signal_failed", scored.failure)
        into, responses = self.settings.into, []
        for index, response in enumerate(responses_of(row, self.kind)):
            changed = {**response, into: scored.rewards[index]}
            if self.settings.keep_parts:
                parts = {self._part(name): values[index] for name, values in scored.parts.items()}
                changed["scores"] = {**self._others(response), **parts}
            responses.append(changed)
        return with_responses(row, self.kind, responses)

    def _others(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """The parts that stay: an earlier score by a signal that is not for this row any more does not."""
        ours = {self._part(part.name) for part in self.signals.parts}
        kept = response.get("scores") or {}
        return {name: value for name, value in kept.items() if name not in ours}

    def _part(self, name: str) -> str:
        return name if self.settings.into == "score" else f"{self.settings.into}/{name}"

    def _check_failures(self, num_rows: int) -> None:
        self._seen += num_rows
        most = self.settings.max_failed_frac
        if self._failed > most * max(self._seen, _FEW_ROWS):
            raise SignalError(
                f"stage {self.place.id!r}: signals failed on {self._failed} of {self._seen} rows, more than "
                f"max_failed_frac = {most:g}; first: {self._first_failure}. The shards made so far are kept: put "
                "right what is wrong, and run the same command again"
            )


def _contents(entry: BoundSignal) -> dict[str, str]:
    """Hashes of the models and files that a signal's keys name, by key."""
    from prefopt.errors import ModelError
    from prefopt.model.source import resolve_source

    found: dict[str, str] = {}
    for key, value in entry.given.items():
        if not isinstance(value, str) or key == "name":
            continue
        path, known = Path(value).expanduser(), key in _MODELS.get(entry.name, ())
        if path.is_file():
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif known or path.is_dir():
            try:
                found[key] = resolve_source(value, entry.params.get("revision")).content
            except ModelError:
                if known:
                    raise
                # a directory that holds something else: what it is, only its signal knows
    return found
