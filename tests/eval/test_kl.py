"""KL and entropy against sums over every possible response of a policy with six tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from eval.base import Row
from eval.models import open_models
from eval.registry import make_task
from eval.settings import EvalSettings
from prefopt.errors import ConfigError, ModelError
from prefopt.recipe.schema import ModelSection
from tests.eval.runs import write_jsonl
from tests.unit.tiny_models import tiny_model

VOCABULARY = ("<s>", "</s>", "<unk>", "a", "b", "c")
EOS = 1
PROMPTS = ("ab", "ca", "bbc")
LONGEST = 3


@pytest.fixture(scope="module", autouse=True)
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``policy`` and ``reference``, of six tokens each; ``fresh`` and ``moved``: adapters on the reference."""
    folder = tmp_path_factory.mktemp("policies")
    found = {name: folder / name for name in ("policy", "reference", "fresh", "moved", "wide")}
    for name, seed, size in (("policy", 3, 6), ("reference", 4, 6), ("wide", 4, 8)):
        tiny_model("llama", size, seed=seed).save_pretrained(found[name])
        tokenizer().save_pretrained(found[name])
    for name, changes in (("fresh", True), ("moved", False)):
        base: Any = AutoModelForCausalLM.from_pretrained(found["reference"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=changes))
        adapted.save_pretrained(str(found[name]))
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter."""
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def evaluated(
    folder: Path, policy: Path, baseline: Path | None = None, samples: int = 1
) -> tuple[Any, list[Row]]:
    """The task and its rows."""
    data = write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    task = make_task("kl", {"data": str(data), "samples": samples, "max_new_tokens": LONGEST})
    other = None if baseline is None else ModelSection(path=str(baseline))
    settings = EvalSettings(
        model=ModelSection(path=str(policy)), baseline=other, device="cpu", batch_tokens=200
    )
    examples = task.examples()
    opened = task.open(open_models(settings))
    try:
        return task, task.rows(examples, opened)
    finally:
        task.close(opened)


@dataclass(frozen=True)
class Exact:
    """Of one prompt's responses, by summing over all of them."""

    kl: float
    variance: float
    """Of the log-ratio of a sampled response."""
    exact_variance: float
    """Of its sum of next-token KLs: the Rao-Blackwell estimate."""
    entropy: float
    """Of a whole response."""
    length: float
    likelier: float


def enumerate_responses(policy: Path, reference: Path, prompt: str) -> Exact:
    own, other = (AutoModelForCausalLM.from_pretrained(path) for path in (policy, reference))
    ids = tokenizer()(prompt)["input_ids"]
    rows = []
    for length in range(1, LONGEST + 1):
        for response in itertools.product(range(len(VOCABULARY)), repeat=length):
            ended = response[-1] == EOS
            if EOS in response[:-1] or (length < LONGEST and not ended):
                continue
            rows.append((response, *(_logps(model, ids, response) for model in (own, other))))
    p = [math.exp(own["sum"]) for _, own, _ in rows]
    assert sum(p) == pytest.approx(1, abs=1e-5)
    ratio = [own["sum"] - other["sum"] for _, own, other in rows]
    step = [
        sum((a.exp() * (a - b)).sum().item() for a, b in zip(own["all"], other["all"], strict=True))
        for _, own, other in rows
    ]
    entropy = [-sum((a.exp() * a).sum().item() for a in own["all"]) for _, own, _ in rows]
    likelier = [
        sum(a > b for a, b in zip(own["each"], other["each"], strict=True))
        for _, own, other in rows
    ]

    def mean(values: list[Any], power: int = 1) -> float:
        return sum(w * v**power for w, v in zip(p, values, strict=True))

    return Exact(
        mean(ratio),
        mean(ratio, 2) - mean(ratio) ** 2,
        mean(step, 2) - mean(step) ** 2,
        mean(entropy),
        mean([len(row[0]) for row in rows]),
        mean(likelier),
    )


def _logps(model: Any, prompt: list[int], response: tuple[int, ...]) -> dict[str, Any]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    each = [logps[place, token].item() for place, token in enumerate(response)]
    return {"all": logps, "each": each, "sum": sum(each)}


def test_estimates_lie_within_four_standard_errors_of_the_exact_kl_and_entropy(
    tmp_path: Path, policies: dict[str, Path]
) -> None:
    samples = 400
    task, rows = evaluated(tmp_path, policies["policy"], policies["reference"], samples)
    found = task.summarise(rows)
    exact = [
        enumerate_responses(policies["policy"], policies["reference"], prompt) for prompt in PROMPTS
    ]
    count = len(PROMPTS)
    kl = sum(each.kl for each in exact) / count
    error = math.sqrt(sum(each.variance for each in exact) / samples) / count
    assert kl > 20 * error  # or the next line would show nothing
    assert abs(found.metrics["kl"].value - kl) < 4 * error
    sharper = math.sqrt(sum(each.exact_variance for each in exact) / samples) / count
    assert sharper < error / 2
    assert abs(found.metrics["kl_rao_blackwell"].value - kl) < 4 * sharper
    assert found.metrics["kl_k3"].value == pytest.approx(kl, rel=0.2)
    length = sum(each.length for each in exact) / count
    assert found.metrics["length"].value == pytest.approx(length, rel=0.03)
    entropy = sum(each.entropy for each in exact) / count / length
    assert found.metrics["entropy"].value == pytest.approx(entropy, rel=0.03)
    likelier = 100 * sum(each.likelier for each in exact) / count / length
    assert found.metrics["likelier_tokens"].value == pytest.approx(likelier, rel=0.05)
    assert found.metrics["kl_token"].value == pytest.approx(
        found.metrics["kl"].value / found.metrics["length"].value
    )
    assert found.counts["n_responses"] == samples * count


@pytest.mark.parametrize("by", ["adapter", "baseline"])
def test_a_policy_that_is_its_reference_has_a_kl_of_exactly_zero(
    tmp_path: Path, policies: dict[str, Path], by: str
) -> None:
    sides = {"adapter": ("fresh", None), "baseline": ("policy", policies["policy"])}
    policy, baseline = sides[by]
    task, rows = evaluated(tmp_path, policies[policy], baseline, samples=4)
    metrics = task.summarise(rows).metrics
    for name in ("kl", "kl_k3", "kl_rao_blackwell", "kl_token", "likelier_tokens"):
        assert metrics[name].value == 0.0, name
    assert metrics["entropy"].value > 0.1


def test_the_base_under_an_adapter_is_the_reference_that_a_baseline_would_be(
    tmp_path: Path, policies: dict[str, Path]
) -> None:
    _, alone = evaluated(tmp_path, policies["moved"], samples=4)
    _, beside = evaluated(tmp_path, policies["moved"], policies["reference"], samples=4)
    for one, other in zip(alone, beside, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-6)
        assert abs(one.values["kl"] or 0.0) > 1e-3


def test_a_full_model_without_a_baseline_is_refused(
    tmp_path: Path, policies: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match="--baseline is missing"):
        evaluated(tmp_path, policies["policy"])


def test_vocabularies_of_other_sizes_are_refused(tmp_path: Path, policies: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="6 output rows and its reference 8"):
        evaluated(tmp_path, policies["policy"], policies["wide"])


def test_a_prompt_without_room_is_counted_and_not_cut(
    tmp_path: Path, policies: dict[str, Path]
) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "ab"}, {"prompt": "a" * 600}])
    task = make_task("kl", {"data": str(data), "max_new_tokens": LONGEST})
    section = ModelSection(path=str(policies["moved"]))
    examples = task.examples()
    opened = task.open(open_models(EvalSettings(model=section, device="cpu")))
    try:
        summary = task.summarise(task.rows(examples, opened))
    finally:
        task.close(opened)
    assert summary.counts["num_prompt_too_long"] == 1 and summary.counts["n_responses"] == 1
