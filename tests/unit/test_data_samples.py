"""Weighted samples: what is read of a row, rewards scaled, prompts conditioned, bad labels by file and line."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.data import DataBundle, load_data
from prefopt.data.render import conditioned
from prefopt.data.samples import SampleNeeds
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import ColumnMap, ConditionSection, DataSection, SourceSection
from tests.unit.tiny_tokenizers import make_tokenizer

CHAT = make_tokenizer("llama3", add_bos=True)
TEXT = make_tokenizer()
REWARD, ADVANTAGE = SampleNeeds(reward=True), SampleNeeds(advantage=True)
CONDITIONED = SampleNeeds(reward=True, condition=ConditionSection())


def sample(number: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"Question {number // 2}?\n",
        "response": f"Answer {number}.",
        "reward": float(number),
        "advantage": number - 1.5,
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, needs: SampleNeeds, *, columns: Any = None, **data: Any) -> DataBundle:
    tokenizer = data.pop("tokenizer", CHAT)
    form = "text" if tokenizer is TEXT else "chat"
    source = SourceSection(path=str(path), format=form, columns=ColumnMap(**columns or {}))
    cache = str(path.parent / "cache")
    return load_data(DataSection(train=[source], cache_dir=cache, **data), tokenizer, samples=needs)  # type: ignore[arg-type]


def test_a_sample_row_is_a_group_of_one_with_reward_and_advantage(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [sample(0), sample(1, advantage=None), sample(2)])
    train = load(path, REWARD).train
    assert train is not None
    group = train.group(0)
    assert (group.id, len(group.responses), group.pairs) == ("s.jsonl:1", 1, ())
    assert group.samples == (True,)
    assert [g.responses[0].score for g in train] == [0.0, 1.0, 2.0]
    assert [g.responses[0].advantage for g in train] == [-1.5, None, 0.5]
    assert train.rewards.tolist() == [0.0, 1.0, 2.0]
    np.testing.assert_array_equal(train.advantages, [-1.5, np.nan, 0.5])


def test_columns_map_and_what_is_not_needed_may_be_absent(tmp_path: Path) -> None:
    rows = [{"q": "Hi?\n", "a": "Yes.", "meta": {"score": 0.5}}]
    path = write(tmp_path / "s.jsonl", rows)
    columns = {"prompt": "q", "response": "a", "reward": "meta.score"}
    train = load(path, REWARD, columns=columns).train
    assert train is not None and train.group(0).responses[0].score == 0.5
    with pytest.raises(DataError, match=r"s.jsonl:1: no column 'advantage'; it has .*'?a"):
        load(path, ADVANTAGE, columns=columns)


@pytest.mark.parametrize(
    ("row", "needs", "message"),
    [
        ({"reward": None}, REWARD, "s.jsonl:2: column 'reward' is empty"),
        (
            {"reward": math.nan},
            REWARD,
            "s.jsonl:2: column 'reward' = nan: a score must be a finite",
        ),
        ({"reward": "good"}, REWARD, "s.jsonl:2: column 'reward' = 'good'"),
        ({"advantage": None}, ADVANTAGE, "s.jsonl:2: column 'advantage' is empty"),
        ({"advantage": math.inf}, ADVANTAGE, "s.jsonl:2: column 'advantage' = inf"),
        ({"ended": False}, REWARD, "s.jsonl:2: column 'ended' = false: a chat template ends"),
    ],
)
def test_a_missing_or_broken_label_names_file_and_line(
    tmp_path: Path, row: dict[str, Any], needs: SampleNeeds, message: str
) -> None:
    path = write(tmp_path / "s.jsonl", [sample(0, ended=True), sample(1, **{"ended": True, **row})])
    with pytest.raises(DataError) as caught:
        load(path, needs, columns={"ended": "ended"})
    assert message in str(caught.value)


def test_a_pair_with_two_scores_is_two_samples(tmp_path: Path) -> None:
    pair = {"prompt": "Hi?\n", "chosen": "Yes.", "rejected": "No!", "rc": 2.0, "rr": -1.0}
    path = write(tmp_path / "p.jsonl", [pair])
    scores = {"score_chosen": "rc", "score_rejected": "rr"}
    train = load(path, REWARD, columns=scores).train
    assert train is not None
    assert [g.id for g in train] == ["p.jsonl:1#chosen", "p.jsonl:1#rejected"]
    assert [g.responses[0].score for g in train] == [2.0, -1.0]
    assert list(train.group(0).prompt_ids) == list(train.group(1).prompt_ids)
    with pytest.raises(DataError, match="pairs, which have scores and no advantages"):
        load(path, ADVANTAGE, columns=scores)
    with pytest.raises(ConfigError, match="a sample needs a reward"):
        load(path, REWARD)


def test_z_scores_are_those_of_all_training_rows_over_n_minus_one(tmp_path: Path) -> None:
    rewards = [1.0, 4.0, -2.0, 0.5]
    path = write(tmp_path / "s.jsonl", [sample(i, reward=r) for i, r in enumerate(rewards)])
    bundle = load(path, REWARD, normalize_rewards="z_score")
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert bundle.train is not None
    np.testing.assert_allclose(bundle.train.rewards, [(r - mean) / std for r in rewards])
    assert bundle.scaling.describe() == {"name": "z_score", "mean": mean, "std": std}
    held_out = SourceSection(path=str(write(tmp_path / "e.jsonl", [sample(7, reward=mean + std)])))
    bundle = load(path, REWARD, normalize_rewards="z_score", eval=[held_out])
    assert bundle.eval is not None  # by the mean and deviation of the training rows
    np.testing.assert_allclose(bundle.eval.rewards, [1.0])


def test_z_scores_per_prompt_compare_only_answers_to_one_prompt(tmp_path: Path) -> None:
    """Prompts (1, 3), (5, 5) and a lone 7: ± 1/√2 where two differ, 0 where nothing differs."""
    rewards = [1.0, 3.0, 5.0, 5.0, 7.0]
    path = write(tmp_path / "s.jsonl", [sample(i, reward=r) for i, r in enumerate(rewards)])
    bundle = load(path, REWARD, normalize_rewards="z_score_per_prompt")
    assert bundle.train is not None
    half = math.sqrt(0.5)
    np.testing.assert_allclose(bundle.train.rewards, [-half, half, 0, 0, 0])
    assert bundle.scaling.describe()["without_spread"] == 2


def test_sigmoid_takes_rewards_between_zero_and_one(tmp_path: Path) -> None:
    rewards = [0, math.log(3), -800]
    path = write(tmp_path / "s.jsonl", [sample(i, reward=r) for i, r in enumerate(rewards)])
    train = load(path, REWARD, normalize_rewards="sigmoid").train
    assert train is not None
    np.testing.assert_allclose(train.rewards, [0.5, 0.75, 0.0], atol=1e-12)


def test_the_reward_is_in_the_prompt_with_two_decimals(tmp_path: Path) -> None:
    """Of a dialogue in its last turn, whose ends this chat template strips; scaled, where rewards are."""
    path = write(tmp_path / "s.jsonl", [sample(0, reward=-0.126), sample(1, reward=2.0)])
    plain, train = load(path, REWARD).train, load(path, CONDITIONED).train
    assert plain is not None and train is not None
    first = CHAT.decode(list(train.group(0).prompt_ids))
    assert "Question 0?\n <rm_score>: -0.13<|im_end|>" in first
    assert plain.group(0).responses == train.group(0).responses
    scaled = load(path, CONDITIONED, normalize_rewards="z_score").train
    assert scaled is not None
    assert " <rm_score>: 0.71<" in CHAT.decode(list(scaled.group(1).prompt_ids))


def test_rows_of_one_prompt_stay_on_one_side_whatever_reward_is_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [sample(i) for i in range(20)])
    bundle = load(path, CONDITIONED, eval_frac=0.3)
    assert bundle.train is not None and bundle.eval is not None
    assert not set(bundle.train.prompt_keys) & set(bundle.eval.prompt_keys)
    assert len(set(bundle.train.prompt_keys)) == len(bundle.train) / 2


def test_a_condition_keeps_braces_and_earlier_turns() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "{reward} {x}"}]
    found = conditioned(turns, "[{reward}] {input}!", 1.0)
    assert found == [turns[0], {"role": "user", "content": "[1.00] {reward} {x}!"}]
    assert conditioned("p", "{input}{input} {reward}", -2) == "pp -2.00"


def test_a_step_that_does_not_end_its_turn_has_no_end_token(tmp_path: Path) -> None:
    rows = [sample(0, ended=False), sample(1, ended=True)]
    path = write(tmp_path / "s.jsonl", rows)
    train = load(path, ADVANTAGE, tokenizer=TEXT, columns={"ended": "ended"}).train
    assert train is not None
    step, whole = (train.group(i).responses[0].ids for i in (0, 1))
    assert step[-1] != TEXT.eos_token_id and whole[-1] == TEXT.eos_token_id
    assert TEXT.decode(step) == "Answer 0."


def test_another_scaling_template_or_need_is_another_entry_of_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [sample(0), sample(1)])
    other = SampleNeeds(reward=True, condition=ConditionSection(template="{reward}\n{input}"))
    runs = [load(path, REWARD), load(path, CONDITIONED), load(path, other)]
    runs += [load(path, REWARD, normalize_rewards="z_score"), load(path, ADVANTAGE)]
    assert len({run.sources[0][1].directory for run in runs}) == 5
    assert load(path, REWARD).sources[0][1].directory == runs[0].sources[0][1].directory


def test_pairs_keep_the_content_hash_they_had_before_there_were_samples(tmp_path: Path) -> None:
    """Over tokens, lengths, scores, prompts and ids, so that a run of pairs can be resumed by a newer version."""
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "a\n", "chosen": "b", "rejected": "c"}])
    data = DataSection(train=[SourceSection(path=str(pairs))], cache_dir=str(tmp_path / "cache"))  # type: ignore[arg-type]
    store = load_data(data, CHAT).sources[0][1]
    names = ("tokens.i4", "lengths.i8", "scores.f8", "prompts.u8", "ids.txt")
    digests = [hashlib.sha256((store.directory / name).read_bytes()).hexdigest() for name in names]
    assert store.fingerprint == hashlib.sha256("".join(digests).encode()).hexdigest()
    path = write(tmp_path / "s.jsonl", [sample(0)])
    other = write(tmp_path / "t.jsonl", [sample(0, advantage=7.0)])
    found = [load(p, ADVANTAGE, columns={"id": "reward"}).sources[0][1] for p in (path, other)]
    assert found[0].fingerprint != found[1].fingerprint
