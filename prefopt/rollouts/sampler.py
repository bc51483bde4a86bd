"""One step's rollouts on one process: generate, score, label, try other prompts where nothing is learnt."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from prefopt.credit.base import GroupScores
from prefopt.engines.base import Completion, Engine, Request, SamplingSpec
from prefopt.recipe.registry import BoundCredit
from prefopt.rollouts.batch import RolloutBatch, RolloutGroup
from prefopt.rollouts.plan import PromptPlan, Start
from prefopt.signals.combine import WeightedSignals
from prefopt.types import Candidates, Prompt


@dataclass(frozen=True)
class Share:
    """Which groups of a step a process samples: every ``world_size``-th, from ``rank`` on."""

    rank: int = 0
    world_size: int = 1

    def of(self, starts: Sequence[Start]) -> list[Start]:
        return [start for start in starts if start.place % self.world_size == self.rank]


class Sampler:
    """Makes the batch of a step.

    Args:
        engine: generates; its policy version is the caller's business.
        plan: prompts and seeds.
        spec: how to sample.
        decode: token ids to texts, special tokens left out.
        credit: scores to labels.
        signals: what scores the responses; None with a credit that needs no scores.
        share: this process's part of every step.
        resample_frac: prompts drawn anew for groups without a label, at most, as a share of the step's.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        plan: PromptPlan,
        spec: SamplingSpec,
        decode: Callable[[Sequence[Sequence[int]]], list[str]],
        credit: BoundCredit,
        signals: WeightedSignals | None,
        share: Share,
        resample_frac: float = 0.0,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.spec = spec
        self.credit = credit
        self.signals = signals
        self.share = share
        self.resample_frac = resample_frac
        self._decode = decode

    def make(self, step: int, version: int) -> RolloutBatch:
        """The batch of ``step``, sampled by ``version``, which the engine must hold.

        Raises: EngineError, DataError from the engine; SignalError from a signal that cannot go on.
        """
        timings = {"generate_s": 0.0, "score_s": 0.0}
        starts = self.share.of(self.plan.starts(step))
        groups = self._groups(step, starts, timings)
        budget, attempt = int(self.resample_frac * len(starts)), 1
        missing = [group.start for group in groups if not group.is_trained_on]
        while missing and budget > 0:
            places = [start.place % self.plan.per_step for start in missing[:budget]]
            fresh = self._groups(step, self.plan.replacements(step, places, attempt), timings)
            budget, attempt = budget - len(fresh), attempt + 1
            missing = [group.start for group in fresh if not group.is_trained_on]
            groups += fresh
        reports = self.signals.report() if self.signals is not None else {}
        # What failed is counted from the groups themselves.
        reports = {k: v for k, v in reports.items() if not k.endswith("/failed_frac")}
        return RolloutBatch(step, version, tuple(groups), timings, reports)

    def close(self) -> None:
        """Closes the engine and the signals."""
        self.engine.close()
        if self.signals is not None:
            self.signals.close()

    def _groups(
        self, step: int, starts: Sequence[Start], timings: dict[str, float]
    ) -> list[RolloutGroup]:
        if not starts:
            return []
        begun = time.perf_counter()
        requests = [
            Request(self.plan.prompts[start.row].ids + start.prefix, start.seeds)
            for start in starts
        ]
        found = self.engine.generate(requests, self.spec)
        sampled = time.perf_counter()
        groups = [
            self._group(start, request.prompt_ids, tuple(completions))
            for start, request, completions in zip(starts, requests, found, strict=True)
        ]
        groups = self._scored(groups)
        groups = [self._labelled(group, step) for group in groups]
        timings["generate_s"] += sampled - begun
        timings["score_s"] += time.perf_counter() - sampled
        return groups

    def _group(
        self, start: Start, prompt_ids: tuple[int, ...], completions: tuple[Completion, ...]
    ) -> RolloutGroup:
        prompt = self.plan.prompts[start.row]
        return RolloutGroup(
            start=start,
            prompt_id=prompt.id,
            prompt_ids=prompt_ids,
            completions=completions,
            texts=tuple(self._decode([start.prefix + c.ids for c in completions])),
            offline_ids=prompt.offline_ids if self.credit.spec.needs_offline else None,
        )

    def _scored(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        if self.signals is None:
            return groups
        scored = self.signals.score([self._candidates(group) for group in groups])
        return [
            replace(group, rewards=found.rewards, parts=found.parts, failed=found.failure)
            for group, found in zip(groups, scored, strict=True)
        ]

    def _candidates(self, group: RolloutGroup) -> Candidates:
        """What signals see: whole responses, a rolled-in prefix and the data's own response included."""
        prompt: Prompt = self.plan.prompts[group.start.row]
        ids = [group.start.prefix + c.ids for c in group.completions]
        texts, truncated = list(group.texts), [c.stop_reason == "length" for c in group.completions]
        opened = [prompt.opened] * len(texts)
        if group.offline_ids is not None:
            opened.append("")  # the data's own says all that it says
            ids.append(group.offline_ids)
            texts += self._decode([group.offline_ids])
            truncated.append(False)
        return Candidates(prompt, tuple(texts), tuple(ids), tuple(truncated), tuple(opened))

    def _labelled(self, group: RolloutGroup, step: int) -> RolloutGroup:
        if group.failed is not None:
            return group
        ids = [completion.ids for completion in group.completions]
        if group.offline_ids is not None:
            ids.append(group.offline_ids)
        labels = self.credit(
            GroupScores(
                rewards=group.rewards or (0.0,) * len(ids),
                ids=tuple(ids),
                rng=random.Random(f"{self.plan.seed}:{step}:{group.start.place}"),
                offline=None if group.offline_ids is None else len(ids) - 1,
            )
        )
        return replace(
            group, pairs=labels.pairs, advantages=labels.advantages, skipped=labels.skipped
        )
