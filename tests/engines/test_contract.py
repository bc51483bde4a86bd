"""What every engine promises (`prefopt.engines.base`), held by all of them on the same tiny Llama in fp32.

Tolerances: an engine's fp32 arithmetic orders its sums otherwise than transformers' does, which moves a
token's log-prob (of order 1 to 10) by some 1e-6; 1e-4 leaves room for that, and other weights or another
temperature are off by 0.1 or more.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from prefopt.engines.base import PolicyFiles, Request, SamplingSpec
from prefopt.errors import DataError, EngineError
from tests.engines.conftest import Running
from tests.engines.policies import CONTEXT, STOP, VOCAB, sampled_logps

LOGP_ATOL = 1e-4
PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (12, 13), (30,), (7,) * 20, (14, 15, 16, 17))
SPEC = SamplingSpec(max_new_tokens=16, stop_token_ids=(STOP,))


def requests(seeds: int = 3) -> list[Request]:
    """Prompts of mixed length, several seeds each: more rows than an hf batch takes."""
    return [Request(ids, tuple(100 * i + s for s in range(seeds))) for i, ids in enumerate(PROMPTS)]


def assert_logps_are_the_truth(running: Running, spec: SamplingSpec) -> None:
    groups = running.engine.generate(requests(), spec)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            want = sampled_logps(running.truth, prompt, completion.ids, spec)
            assert completion.logps == pytest.approx(want, abs=LOGP_ATOL, rel=0)


def test_completions_come_in_the_order_of_requests_and_seeds(running: Running) -> None:
    """Each completion continues its own prompt: its log-probs are those after that prompt, and no other's."""
    groups = running.engine.generate(requests(), SPEC)
    assert [len(group) for group in groups] == [3] * len(PROMPTS)
    for i, group in enumerate(groups):
        other = PROMPTS[(i + 1) % len(PROMPTS)]
        for completion in group:
            own = sampled_logps(running.truth, PROMPTS[i], completion.ids, SPEC)
            wrong = sampled_logps(running.truth, other, completion.ids, SPEC)
            assert completion.logps == pytest.approx(own, abs=LOGP_ATOL, rel=0)
            assert completion.logps != pytest.approx(wrong, abs=LOGP_ATOL, rel=0)
    backwards = [Request(r.prompt_ids, r.seeds[::-1]) for r in requests()[::-1]]
    again = running.engine.generate(backwards, SPEC)
    assert [[c.ids for c in group[::-1]] for group in again[::-1]] == [
        [c.ids for c in group] for group in groups
    ]


def test_a_prompt_and_seed_give_the_same_completion_alone_or_in_company(running: Running) -> None:
    """Exactly the same tokens. A batch changes sums by rounding (about 1e-6), so that a seed could fall on the
    other side of a token's boundary once in about 1e5 tokens; with these seeds none of 200 does."""
    together = running.engine.generate(requests(), SPEC)
    for request, group in zip(requests(), together, strict=True):
        for seed, completion in zip(request.seeds, group, strict=True):
            [[alone]] = running.engine.generate([Request(request.prompt_ids, (seed,))], SPEC)
            assert alone.ids == completion.ids
            assert alone.logps == pytest.approx(completion.logps, abs=LOGP_ATOL, rel=0)


def test_different_seeds_give_different_completions(running: Running) -> None:
    [group] = running.engine.generate([Request(PROMPTS[0], tuple(range(12)))], SPEC)
    assert len({completion.ids for completion in group}) >= 10


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        SamplingSpec(16, temperature=0.6, stop_token_ids=(STOP,)),
        SamplingSpec(16, temperature=1.5, top_k=5),
        SamplingSpec(16, temperature=0.9, top_p=0.7),
        SamplingSpec(16, temperature=1.3, top_p=0.8, top_k=8),
        SamplingSpec(16, temperature=0.0),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "both", "greedy"],
)
def test_logps_are_those_of_the_distribution_sampled_from(
    running: Running, spec: SamplingSpec
) -> None:
    assert_logps_are_the_truth(running, spec)


def test_greedy_takes_the_likeliest_token_whatever_the_seed(running: Running) -> None:
    spec = SamplingSpec(8, temperature=0.0)
    [group] = running.engine.generate([Request(PROMPTS[0], (1, 2))], spec)
    ids = list(PROMPTS[0])
    for _ in range(8):
        with torch.no_grad():
            logits = running.truth(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
    assert group[0].ids == group[1].ids == tuple(ids[len(PROMPTS[0]) :])


def test_a_response_ends_with_the_stop_token_or_at_the_limit(running: Running) -> None:
    stops = (STOP, 20, 21, 22, 23, 24, 25, 26)
    spec = SamplingSpec(10, stop_token_ids=stops)
    groups = running.engine.generate(requests(8), spec)
    completions = [completion for group in groups for completion in group]
    assert {completion.stop_reason for completion in completions} == {"eos", "length"}
    for completion in completions:
        assert len(completion.ids) == len(completion.logps)
        assert not set(completion.ids[:-1]) & set(stops)
        if completion.stop_reason == "eos":
            assert completion.ids[-1] in stops
        else:
            assert len(completion.ids) == 10 and completion.ids[-1] not in stops


def test_only_the_stop_tokens_of_the_call_end_a_response(running: Running) -> None:
    """Not the eos of the model's own configuration, which is STOP."""
    groups = running.engine.generate(requests(8), SamplingSpec(16))
    completions = [completion for group in groups for completion in group]
    assert all(c.stop_reason == "length" and len(c.ids) == 16 for c in completions)
    assert any(STOP in c.ids for c in completions)


def test_token_frequencies_are_those_of_the_model(running: Running) -> None:
    """1500 draws of one token at temperature 1.3, fixed seeds; Pearson's chi-square below its 0.999 quantile.

    Tokens expected fewer than 5 times are pooled. Quantile by Wilson and Hilferty's cube approximation.
    """
    num_draws = 1500
    spec = SamplingSpec(1, temperature=1.3)
    [group] = running.engine.generate([Request(PROMPTS[1], tuple(range(num_draws)))], spec)
    with torch.no_grad():
        logits = running.truth(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    expected = (logits / 1.3).softmax(-1) * num_draws
    found = Counter(completion.ids[0] for completion in group)
    rare = [t for t in range(VOCAB) if expected[t] < 5]
    cells = [(found[t], expected[t].item()) for t in range(VOCAB) if t not in rare]
    cells.append((sum(found[t] for t in rare), sum(expected[t].item() for t in rare)))
    chi_square = sum((f - e) ** 2 / e for f, e in cells)
    freedom = len(cells) - 1
    assert freedom >= 8
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < quantile


def test_score_gives_the_logps_at_temperature_1(running: Running) -> None:
    sequences = [
        (PROMPTS[0], (3, 4, STOP)),
        (PROMPTS[2], tuple(range(40))),
        (PROMPTS[3], (9,)),
        # as long as the context allows
        (PROMPTS[1], tuple(i % VOCAB for i in range(CONTEXT - len(PROMPTS[1])))),
    ] * 3
    scores = running.engine.score(sequences)
    for (prompt, response), found in zip(sequences, scores, strict=True):
        want = sampled_logps(running.truth, prompt, response, SamplingSpec(1))
        assert found == pytest.approx(want, abs=LOGP_ATOL, rel=0)


def test_a_hot_swapped_adapter_is_the_one_that_samples(running: Running) -> None:
    """Also back to earlier weights under a new version and path, with prompts whose prefixes are cached."""
    for parity in (1, 0, 1, 0):
        version = running.push(parity)
        assert running.engine.version == version
        assert_logps_are_the_truth(running, SPEC)


def test_pushed_full_weights_are_those_that_sample(running_full: Running) -> None:
    assert running_full.engine.version is None
    assert_logps_are_the_truth(running_full, SPEC)
    for parity in (1, 0, 1):
        version = running_full.push(parity)
        assert running_full.engine.version == version
        assert_logps_are_the_truth(running_full, SPEC)


def test_a_policy_that_is_not_there_is_an_error_and_the_old_one_stays(
    running: Running, tmp_path: Path
) -> None:
    before = running.engine.version
    with pytest.raises(EngineError, match="nowhere"):
        running.engine.load_policy(PolicyFiles(10_000, tmp_path / "nowhere", is_adapter=True))
    assert running.engine.version == before
    assert_logps_are_the_truth(running, SPEC)


def test_a_prompt_too_long_is_refused_before_anything_is_sampled(running: Running) -> None:
    limit = 128 if running.kind.startswith("hf") else CONTEXT + 1
    long = Request(tuple(i % VOCAB for i in range(limit)), (0,))
    with pytest.raises(DataError, match=rf"{limit} tokens.*max_new_tokens = 16"):
        running.engine.generate([requests()[0], long], SPEC)
    with pytest.raises(DataError, match="empty"):
        running.engine.generate([Request((), (0,))], SPEC)


def test_nothing_asked_is_nothing_answered(running: Running) -> None:
    assert running.engine.generate([], SPEC) == []
    assert running.engine.generate([Request(PROMPTS[0], ())], SPEC) == [[]]
    assert running.engine.score([]) == []
