"""What the policy says now: the same prompts, the same seeds, at every evaluation of a run.

Losses look healthy while a policy forgets to stop, repeats itself or grows without bound; this is where it
shows. The answers go to ``eval/generations-<step>.jsonl``, for people to read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from prefopt.data import Renderer, load_prompts
from prefopt.data.groups import GroupSource
from prefopt.data.samples import SampleNeeds
from prefopt.engines.base import Completion, Engine, Request, SamplingSpec
from prefopt.engines.hf import HFEngine
from prefopt.errors import ConfigError, EngineError, PrefoptError, TrainingError
from prefopt.model.distributed import decided_by_main, raise_together
from prefopt.model.end_tokens import end_token_ids, own_end_ids
from prefopt.model.load import LoadedPolicy
from prefopt.process.stopping import Stopped, stopping
from prefopt.recipe.schema import GenerationSection, HFSection, Recipe
from prefopt.recipe.thinking import mark_at_end
from prefopt.signals.combine import WeightedSignals, build_signals
from prefopt.signals.penalties import repeated_frac
from prefopt.storage.cache import atomic_write
from prefopt.training.checkpoint import writing
from prefopt.types import Candidates, Prompt

logger = logging.getLogger(__name__)

PREFIX = "eval/generation"
DIRECTORY = "eval"
_NGRAM = 4


@dataclass(frozen=True)
class ProbeParts:
    """What a probe works with; see `GenerationProbe`."""

    engine: Engine
    """Generates with the weights in training. On every process."""
    prompts: Sequence[Prompt]
    spec: SamplingSpec
    seed: int
    decode: Callable[[Sequence[Sequence[int]]], list[str]]
    """Token ids to texts, special tokens left out."""
    signals: WeightedSignals | None
    """What scores the answers, on the main process; None: nothing does."""
    timeout_s: float = 1800.0
    """Longest time that generating may take."""


class GenerationProbe:
    """Answers, measures, writes down; each process answers a share of the prompts.

    Args:
        parts: engine, prompts and signals.
        accelerator: for the shares.
        run_dir: answers go below its ``eval/``.
    """

    def __init__(self, parts: ProbeParts, accelerator: Accelerator, run_dir: Path) -> None:
        self.parts = parts
        self.accelerator = accelerator
        self.directory = run_dir / DIRECTORY
        self._start: dict[str, float] = {}
        self._warned = False

    def measure(self, step: int) -> dict[str, float]:
        """Metrics of the answers by name; the same on every process. A collective.

        Raises: TrainingError on every process if one cannot generate, score or write.
        """
        answers = self._everyones(self._share())
        try:
            row = decided_by_main(self.accelerator, lambda: self._measured(answers, step))
        except PrefoptError as error:
            raise TrainingError(f"evaluation at step {step}: {error}") from error
        if not self._start:
            self._start = row
        tokens, start = row[f"{PREFIX}/tokens"], self._start[f"{PREFIX}/tokens"]
        row[f"{PREFIX}/length_ratio"] = tokens / start
        self._warn_once(row, step)
        return row

    def state_dict(self) -> dict[str, float]:
        """The first measurement, which later ones are compared with; for a checkpoint."""
        return dict(self._start)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._start = dict(state)

    def close(self) -> None:
        """Frees the engine's copy and the signals. May be called twice."""
        self.parts.engine.close()
        if self.parts.signals is not None:
            self.parts.signals.close()

    def _share(self) -> list[tuple[int, Completion]] | str:
        """This process's answers with their prompts' numbers, or why there are none."""
        parts, rank = self.parts, self.accelerator.process_index
        numbers = range(rank, len(parts.prompts), self.accelerator.num_processes)
        requests = [Request(parts.prompts[n].ids, (parts.seed + n,)) for n in numbers]
        found: list[tuple[int, Completion]] | str = []
        stopped: Stopped | None = None
        try:
            with stopping.interruptible():
                groups = parts.engine.generate(requests, parts.spec) if requests else []
            found = [(number, group[0]) for number, group in zip(numbers, groups, strict=True)]
        except PrefoptError as error:  # the others wait for this process's share
            found = str(error)
        except Stopped as error:
            stopped = error
        raise_together(self.accelerator, stopped, "eval.generation")
        return found

    def _everyones(self, mine: list[tuple[int, Completion]] | str) -> list[Completion]:
        """All answers in the order of the prompts. Raises: TrainingError if a process has none."""
        shares: list[Any] = [mine]
        if self.accelerator.num_processes > 1:
            shares = gather_object(shares)
        found: dict[int, Completion] = {}
        for share in shares:
            if isinstance(share, str):
                raise TrainingError(f"eval.generation: {share}")
            found |= dict(share)
        return [found[number] for number in sorted(found)]

    def _measured(self, answers: list[Completion], step: int) -> dict[str, float]:
        texts = self.parts.decode([answer.ids for answer in answers])
        ended = [answer.stop_reason == "eos" for answer in answers]
        row = {
            f"{PREFIX}/eos_frac": _mean(ended),
            f"{PREFIX}/tokens": _mean([len(answer.ids) for answer in answers]),
            f"{PREFIX}/repetition_frac": _mean([repeated_frac(a.ids, _NGRAM) for a in answers]),
        }
        scores, rewards = self._scores(answers, texts)
        self._write(step, answers, texts, rewards)
        return row | scores

    def _scores(
        self, answers: list[Completion], texts: list[str]
    ) -> tuple[dict[str, float], list[float | None]]:
        """Mean reward and parts over the answers that could be scored, the share that could not, and rewards."""
        if self.parts.signals is None:
            return {}, [None] * len(answers)
        groups = [
            Candidates(
                prompt, (text,), (answer.ids,), (answer.stop_reason == "length",), (prompt.opened,)
            )
            for prompt, text, answer in zip(self.parts.prompts, texts, answers, strict=True)
        ]
        scored = self.parts.signals.score(groups)
        rewards = [None if each.rewards is None else each.rewards[0] for each in scored]
        found = [reward for reward in rewards if reward is not None]
        row = {f"{PREFIX}/failed_frac": 1 - len(found) / len(rewards)}
        if found:
            row[f"{PREFIX}/reward"] = _mean(found)
        for name in sorted({name for each in scored for name in each.parts}):
            seen = [each for each in scored if not each.failed and name in each.parts]
            if values := [each.parts[name][0] for each in seen]:
                row[f"{PREFIX}/reward/{name}"] = _mean(values)
        return row, rewards

    def _write(
        self, step: int, answers: list[Completion], texts: list[str], rewards: list[float | None]
    ) -> None:
        lines = [
            {
                "prompt": prompt.text,
                "answer": text,
                "tokens": len(answer.ids),
                "ended": answer.stop_reason == "eos",
                "reward": reward,
            }
            for prompt, answer, text, reward in zip(
                self.parts.prompts, answers, texts, rewards, strict=True
            )
        ]
        path = self.directory / f"generations-{step}.jsonl"
        with writing(path), atomic_write(path) as temporary:
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            temporary.write_text(content, encoding="utf-8")

    def _warn_once(self, row: Mapping[str, float], step: int) -> None:
        eos, repetition = f"{PREFIX}/eos_frac", f"{PREFIX}/repetition_frac"
        stops_less = row[eos] < 0.5 * self._start[eos]
        repeats_more = row[repetition] > max(2 * self._start[repetition], 0.1)
        if self._warned or not (stops_less or repeats_more):
            return
        self._warned = True
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d: the policy is coming apart: %.0f %% of its answers end (%.0f %% at the start), %.0f %% "
                "of their 4-grams are repeats (%.0f %%). Read %s; a lower learning rate, a larger beta or an NLL "
                "term (objective.nll_weight) are the usual remedies",
                step, 100 * row[eos], 100 * self._start[eos], 100 * row[repetition],
                100 * self._start[repetition], self.directory / f"generations-{step}.jsonl",
            )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)


def build_probe(
    recipe: Recipe,
    policy: LoadedPolicy,
    tokenizer: Any,
    held_out: GroupSource | None,
    accelerator: Accelerator,
) -> GenerationProbe | None:
    """The probe, or None where the recipe asks for none. Called when the policy is on its device.

    Raises: ConfigError for a policy whose parameters are sharded; DataError for prompts that cannot be read.
    """
    section = recipe.eval.generation
    if section is None:
        return None
    engine = _engine(recipe, policy, tokenizer)
    prompts = _prompts(recipe, section, tokenizer, held_out)
    signals = None
    if section.prompts and section.score and recipe.signals and accelerator.is_main_process:
        signals = build_signals(recipe.signals)

    def decode(sequences: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode([list(ids) for ids in sequences], skip_special_tokens=True)

    spec = SamplingSpec(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        stop_token_ids=end_token_ids(tokenizer, own_end_ids(policy.model)),
    )
    parts = ProbeParts(
        engine, prompts, spec, recipe.train.seed, decode, signals, recipe.sampled_by.timeout_s
    )
    return GenerationProbe(parts, accelerator, Path(recipe.run.output_dir))


def _engine(recipe: Recipe, policy: LoadedPolicy, tokenizer: Any) -> HFEngine:
    engine = recipe.sampled_by
    batch_size = engine.batch_size if isinstance(engine, HFSection) else HFSection().batch_size
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision)
    try:
        # It shares every weight: no copy, nothing to push, and a module of its own, so that whatever
        # generating sets (eval mode, ordinary attention, a cache) never reaches the one in training.
        return HFEngine.sharing(
            policy.model,
            share_trainable=True,
            pad_id=tokenizer.pad_token_id or 0,
            batch_size=batch_size,
            dtype=dtype,
            timeout_s=engine.timeout_s,
        )
    except EngineError as error:
        raise ConfigError(
            "eval.generation: the policy's parameters are sharded over processes (ZeRO-3, FSDP), and generating "
            "would gather every layer for every token. Leave it out, and evaluate checkpoints beside the run: "
            "prefopt eval RUN --checkpoints; or train with ddp, zero1 or zero2"
        ) from error


def _prompts(
    recipe: Recipe, section: GenerationSection, tokenizer: Any, held_out: GroupSource | None
) -> list[Prompt]:
    """The first ``num_prompts`` different ones."""
    if section.prompts:
        objective = recipe.objective  # SFT has none
        needs = frozenset() if objective is None else objective.needs
        found = load_prompts(
            section.prompts,
            recipe.data,
            Renderer(tokenizer),
            max_new_tokens=section.max_new_tokens,
            signals=recipe.signals if section.score else (),
            condition=SampleNeeds.of(needs, recipe.data).condition,
        ).prompts
        return list(found[: section.num_prompts])
    assert held_out is not None  # the check has seen to it
    prompts: dict[tuple[int, ...], Prompt] = {}
    for index in range(len(held_out)):
        if len(prompts) == section.num_prompts:
            break
        group = held_out.group(index)
        ids = tuple(map(int, group.prompt_ids))
        text = tokenizer.decode(list(ids))
        prompts.setdefault(ids, Prompt(group.id, ids, text, opened=mark_at_end(text)))
    return list(prompts.values())
