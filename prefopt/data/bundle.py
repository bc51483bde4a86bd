"""The data of a run: sources tokenised, mixed by weight and split into a training and a held-out set."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt.data.prompts import PromptSet
from prefopt.data.render import Renderer
from prefopt.data.samples import SampleNeeds, Scaling, scaling_of
from prefopt.data.sources import source_name
from prefopt.data.tokenise import tokenise_source
from prefopt.data.tokens import TokenSet, TokenStore, count_rejects
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import DataSection, SourceSection
from prefopt.storage.cache import atomic_write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataBundle:
    """Training rows, held-out rows and prompts, whichever the run has, and what was refused on the way."""

    train: TokenSet | None
    eval: TokenSet | None
    sources: tuple[tuple[str, TokenStore], ...]
    """Path as the recipe has it, and the store, of every source of pairs or rows."""
    prompts: PromptSet | None = None
    scaling: Scaling = field(default_factory=Scaling)
    """What became of the rewards of training samples."""
    end_ids: tuple[int, ...] = ()
    """The tokens that responses to train on end with."""

    @property
    def reject_counts(self) -> dict[str, int]:
        """Refused rows of all sources by reason."""
        counts = Counter(count_rejects([store for _, store in self.sources]))
        if self.prompts is not None:
            counts.update(self.prompts.reject_counts)
        return dict(counts)

    def write_rejects(self, path: str | Path) -> None:
        """One JSON line a refused row: source, id, file, row, reason, lengths in tokens, detail."""
        written: set[Path] = set()
        with (
            atomic_write(path) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for name, store in self.sources:
                if store.directory in written:
                    continue
                written.add(store.directory)
                for line in store.rejects():
                    file.write(json.dumps({"source": name, **line}, ensure_ascii=False) + "\n")
            for line in self.prompts.rejects if self.prompts is not None else ():
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def load_data(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stage: str = "preference",
    samples: SampleNeeds | None = None,
) -> DataBundle:
    """The training and held-out sets of a recipe, tokenised or read from the cache.

    Runs before any process group exists; all processes of a launch may call it at once and get the same
    rows in the same order. Without ``data.eval``, ``eval_frac`` of the rows are held out, all rows of one
    prompt on the same side.

    Args:
        data: sources, limits, seed.
        tokenizer: with the chat template the policy is trained on.
        stage: ``sft`` reads ``chosen`` alone (groups of one response); any other stage reads pairs.
        samples: read weighted samples instead, which have what is said here.

    Raises: ConfigError for settings that contradict each other; DataError for what the files hold, or if
        no row of a source is left (with the counts by reason); ModelError for a missing chat template.
    """
    if data.eval and data.eval_frac:
        raise ConfigError(
            f"data.eval_frac = {data.eval_frac}: would be ignored, since data.eval names held-out sources; "
            "leave one of them out"
        )
    scalings = None if samples is None else scaling_of(data, samples)
    stores: dict[tuple[SourceSection, str], TokenStore] = {}

    def stores_of(role: str, sections: Sequence[SourceSection]) -> list[TokenStore]:
        how = None if samples is None or scalings is None else (samples, scalings[role])
        found = []
        for section in map(_unweighted, sections):
            key = (section, "" if how is None else how[1].digest)
            if key not in stores:
                pairs = stage != "sft" and samples is None
                stores[key] = tokenise_source(section, data, tokenizer, pairs=pairs, samples=how)
            found.append(stores[key])
        return found

    train = stores_of("train", data.train)
    if data.eval or not train:
        train_rows = [np.arange(len(store)) for store in train]
        held_out = stores_of("eval", data.eval)
        eval_rows = [np.arange(len(store)) for store in held_out]
        eval_set = _mix(data.eval, held_out, eval_rows, data.seed) if held_out else None
    else:
        train_rows, eval_rows = split_rows(train, data.eval_frac, data.seed)
        eval_set = _mix(data.train, train, eval_rows, data.seed, most=1.0)
    train_set = _mix(data.train, train, train_rows, data.seed) if train else None
    if train_set is None and data.train:
        raise DataError("data: no row is left to train on")
    if eval_set is not None and train_set is not None:
        _warn_of_leaks(train_set, eval_set)
    sources = tuple((section.path, store) for (section, _), store in stores.items())
    scaling = Scaling() if scalings is None else scalings["train"]
    return DataBundle(
        train_set, eval_set, sources, scaling=scaling, end_ids=_end_ids(train, tokenizer)
    )


def _end_ids(stores: Sequence[TokenStore], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What responses end with; of those that stop within their turn, nothing."""
    known = set(Renderer(tokenizer).controls.ends.values())
    return tuple(sorted(known & {int(token) for store in stores for token in store.last_ids}))


def split_rows(
    stores: Sequence[TokenStore], eval_frac: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """``(train, eval)`` row numbers for each store; rows with one prompt are never on both sides.

    Prompts are ordered by a hash of (seed, prompt) and held out from the top until ``eval_frac`` of the
    rows are: the choice hardly moves when rows are added, and not at all when sources change places.

    Raises: ConfigError if one side would be empty.
    """
    keys = np.concatenate([store.prompt_keys for store in stores])
    prompts, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    held = np.zeros(len(prompts), bool)
    if eval_frac > 0:
        order = sorted(range(len(prompts)), key=lambda i: _draw(seed, int(prompts[i])))
        before = np.concatenate([[0], counts[order].cumsum()[:-1]])
        held[
            [i for i, so_far in zip(order, before, strict=True) if so_far < eval_frac * len(keys)]
        ] = True
        if held.all():
            raise ConfigError(
                f"data.eval_frac = {eval_frac}: would hold out every one of {len(prompts)} distinct prompts; "
                "lower it, or name data.eval"
            )
    sides = np.split(held[place], np.cumsum([len(store) for store in stores])[:-1])
    return [np.flatnonzero(~side) for side in sides], [np.flatnonzero(side) for side in sides]


def draw_rows(rows: np.ndarray, weight: float, seed: Sequence[int]) -> np.ndarray:
    """``rows`` taken ``weight`` times: whole passes, then a draw without replacement for the fraction."""
    passes, frac = divmod(weight, 1.0)
    drawn = np.random.default_rng(list(seed)).permutation(len(rows))[: round(frac * len(rows))]
    return np.concatenate([rows] * int(passes) + [rows[np.sort(drawn)]])


def _mix(
    sections: Sequence[SourceSection],
    stores: Sequence[TokenStore],
    rows: Sequence[np.ndarray],
    seed: int,
    most: float | None = None,
) -> TokenSet | None:
    """The sources' rows by weight (at most ``most``), source by source; None if there are none."""
    drawn = []
    for place, (section, available) in enumerate(zip(sections, rows, strict=True)):
        weight = section.weight if most is None else min(section.weight, most)
        drawn.append(draw_rows(available, weight, (seed, place)))
        if most is None and len(available) and not len(drawn[-1]):
            raise ConfigError(
                f"data: {section.path}: weight = {section.weight}: draws none of its {len(available)} rows; "
                "raise it or leave the source out"
            )
    return TokenSet(stores, drawn, source_names(sections)) if sum(map(len, drawn)) else None


def source_names(sections: Sequence[SourceSection]) -> list[str]:
    """What metrics call each source: its ``name``, else its file's or data set's; numbered where two are alike."""
    names = [*map(source_name, sections)]
    alike, seen = Counter(names), Counter[str]()
    for place, name in enumerate(names):
        seen[name] += 1
        if alike[name] > 1:
            names[place] = f"{name}-{seen[name]}"
    return names


def _unweighted(section: SourceSection) -> SourceSection:
    """What is tokenised does not depend on how often it is taken, nor on what it is called."""
    return section.model_copy(update={"weight": 1.0, "name": None})


def _draw(seed: int, prompt_key: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{prompt_key}".encode(), digest_size=16).digest()


def _warn_of_leaks(train: TokenSet, held_out: TokenSet) -> None:
    leaked = np.isin(held_out.prompt_keys, train.prompt_keys)
    if leaked.any():
        log.warning(
            "%d of %d held-out rows have a prompt that is also trained on; eval numbers will flatter",
            int(leaked.sum()), len(held_out),
        )  # fmt: skip
