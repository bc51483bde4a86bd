"""Tokenised sets: what survives, what the cache may and may not reuse, mixtures and splits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.data import DataBundle, Renderer, load_data
from prefopt.data.groups import GroupList
from prefopt.data.tokens import META, TOKENS
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import ColumnMap, DataSection, SourceSection
from prefopt.types import Group, Response
from tests.unit.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("llama3", add_bos=True)


def pair(number: int, prompt: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt or f"Question {number}?\n",
        "chosen": f"Good {number}.",
        "rejected": f"Bad {number}, or so.",
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(
    cache: Path, *train: Path | SourceSection, stage: str = "preference", **data: Any
) -> DataBundle:
    """``load_data`` on files of chat rows, cached in ``cache``."""
    tokenizer = data.pop("tokenizer", TOKENIZER)
    sources = [s if isinstance(s, SourceSection) else source(s) for s in train]
    return load_data(
        DataSection(train=sources, cache_dir=str(cache), **data), tokenizer, stage=stage
    )


def source(path: Path, **settings: Any) -> SourceSection:
    return SourceSection(path=str(path), format="chat", **settings)


@pytest.fixture
def renders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows each time the renderer is asked for some."""
    calls: list[int] = []
    original = Renderer.render_batch

    def counted(self: Renderer, requests: Any) -> Any:
        calls.append(len(requests))
        return original(self, requests)

    monkeypatch.setattr(Renderer, "render_batch", counted)
    return calls


def test_groups_hold_the_renderers_ids_scores_and_an_explicit_pair(tmp_path: Path) -> None:
    rows = [pair(i, s={"good": i + 0.5}, bad=None if i else 1) for i in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    columns = ColumnMap(score_chosen="s.good", score_rejected="bad")
    train = load(tmp_path / "cache", source(path, columns=columns)).train
    for number, row in enumerate(rows):
        group = train.group(number)
        turn = [{"role": "user", "content": row["prompt"]}]
        for response, side in zip(group.responses, ("chosen", "rejected"), strict=True):
            ids = Renderer(TOKENIZER).render(turn, {"role": "assistant", "content": row[side]})
            assert (tuple(group.prompt_ids), tuple(response.ids)) == ids
        assert group.id == f"a.jsonl:{number + 1}"
        assert group.pairs == ((0, 1),)
        assert group.responses[0].score == number + 0.5
        assert group.responses[1].score == (None if number else 1.0)


def test_lengths_are_those_of_the_groups(tmp_path: Path) -> None:
    rows = [pair(i, prompt="Long " * i + "?\n") for i in range(1, 6)]
    train = load(tmp_path / "cache", write(tmp_path / "a.jsonl", rows)).train
    for i, group in enumerate(train):
        assert train.prompt_lengths[i] == len(group.prompt_ids)
        assert train.response_lengths[i].tolist() == [len(r.ids) for r in group.responses]
        assert train.num_tokens[i] == group.num_tokens
    with pytest.raises(IndexError):
        train.group(len(train))


def test_labels_are_those_of_the_groups_without_reading_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(3)])
    for stage in ("preference", "sft"):
        train = load(tmp_path / "cache", path, stage=stage).train
        for i, group in enumerate(train):
            assert (train.pairs(i), train.samples(i)) == (group.pairs, group.samples)


def test_groups_compare_and_hash_by_the_values_of_their_ids() -> None:
    """Arrays or tuples, of any width: the ids are what counts, and where they were read does not."""
    given = np.array([3, 4], np.int64)
    one = Group("g", (1, 2), (Response((3, 4), 0.5),))
    same = Group("g", np.array([1, 2], np.int32), (Response(given, 0.5),), source_row=("s", 7))
    assert one == same and hash(one) == hash(same)
    others = [
        Group("g", (1, 3), one.responses),
        Group("h", (1, 2), one.responses),
        Group("g", (1, 2), (Response((3, 4), 0.25),)),
        Group("g", (1, 2), (Response((3, 4, 5), 0.5),)),
        Group("g", (1, 2), (*one.responses, *one.responses), ((0, 1),)),
    ]
    assert len({one, same, *others}) == 6 and one not in others
    assert one != "g"


def test_token_ids_of_a_group_cannot_be_written(tmp_path: Path) -> None:
    given = np.array([3, 4], np.int32)
    group = load(tmp_path / "cache", write(tmp_path / "a.jsonl", [pair(0)])).train.group(0)
    for ids in (group.prompt_ids, Response(given).ids, Response((3, 4)).ids):
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 9
    given[0] = 9  # the caller's own array stays his


def test_every_value_of_a_list_of_groups_is_in_its_fingerprint() -> None:
    def fingerprint(token: int = 5, prompt: int = 2, score: float = 1.0, pairs: Any = ()) -> str:
        response = Response((*range(2000), token), score)
        return GroupList([Group("g", (prompt,), (response, response), pairs)]).fingerprint

    found = [fingerprint(), fingerprint(6), fingerprint(5, 3), fingerprint(score=2.0)]
    assert len({*found, fingerprint(pairs=((0, 1),))}) == 5
    assert fingerprint() == found[0]


def test_sft_rows_are_groups_of_one_without_pairs(tmp_path: Path) -> None:
    train = load(tmp_path / "cache", write(tmp_path / "a.jsonl", [pair(0)]), stage="sft").train
    group = train.group(0)
    assert (len(group.responses), group.pairs, train.response_lengths.shape) == (1, (), (1, 1))


def test_rows_that_are_too_long_are_counted_listed_and_never_cut(tmp_path: Path) -> None:
    """The limit is on prompt + the longer response: exactly at it a row stays, one below it goes."""
    rows = [pair(0), pair(1, prompt="Why " * 40), {**pair(2), "rejected": "so " * 40}]
    path = write(tmp_path / "a.jsonl", rows)
    whole = load(tmp_path / "cache", path).train
    longest = [int(whole.prompt_lengths[i] + whole.response_lengths[i].max()) for i in range(3)]
    assert longest[2] > longest[0]
    settings = {"max_prompt_tokens": int(whole.prompt_lengths[[0, 2]].max())}
    bundle = load(tmp_path / "cache", path, max_length_tokens=longest[2], **settings)
    assert bundle.reject_counts == {"prompt_too_long": 1}
    assert list(bundle.train) == [whole.group(0), whole.group(2)]
    bundle = load(tmp_path / "cache", path, max_length_tokens=longest[2] - 1, **settings)
    assert bundle.reject_counts == {"prompt_too_long": 1, "too_long": 1}
    bundle.write_rejects(tmp_path / "rejects.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").open()]
    assert lines[1] == {
        "source": str(path),
        "id": "a.jsonl:3",
        "file": "a.jsonl",
        "row": 3,
        "reason": "too_long",
        "lengths": {
            "prompt": whole.prompt_lengths[2],
            "chosen": whole.response_lengths[2, 0],
            "rejected": whole.response_lengths[2, 1],
        },
    }


def test_responses_that_render_alike_are_identical_though_their_text_differs(
    tmp_path: Path,
) -> None:
    """The template strips contents, as Llama 3's does."""
    rows = [pair(0), {**pair(1), "chosen": "Same.", "rejected": " Same.\n"}]
    bundle = load(tmp_path / "cache", write(tmp_path / "a.jsonl", rows))
    assert bundle.reject_counts == {"identical": 1}


def test_when_no_row_survives_the_error_counts_the_reasons(tmp_path: Path) -> None:
    rows = [{**pair(i), "rejected": ""} for i in range(2)] + [pair(9, prompt="Why " * 50)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"empty_rejected 2, too_long 1.*a\.jsonl:1"):
        load(tmp_path / "cache", path, max_length_tokens=30)
    assert not [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        load(tmp_path / "cache", write(tmp_path / "a.jsonl", []))


# --- cache ---------------------------------------------------------------------------------------------


def test_a_second_call_tokenises_nothing_and_gives_the_same_data(
    tmp_path: Path, renders: list[int]
) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(5)])
    first = load(tmp_path / "cache", path).train
    assert renders == [5]
    moved = path.rename(tmp_path / "elsewhere.jsonl").rename(tmp_path / "a.jsonl")
    second = load(tmp_path / "cache", source(moved, weight=2.0), eval_frac=0.2).train
    assert renders == [5], "weights and splits are no part of what is tokenised"
    assert (
        first.fingerprint == load(tmp_path / "cache", path).train.fingerprint != second.fingerprint
    )


CHANGES: dict[str, dict[str, Any]] = {
    "limit": {"max_length_tokens": 99},
    "prompt limit": {"max_prompt_tokens": 99},
    "stage": {"stage": "sft"},
    "chat template": {"tokenizer": make_tokenizer("chatml", add_bos=True)},
    "bos": {"tokenizer": make_tokenizer("llama3")},
    "vocabulary": {"tokenizer": make_tokenizer("llama3", add_bos=True, vocab_size=300)},
    "eos": {"tokenizer": make_tokenizer("llama3", add_bos=True, eos_token="<|im_end|>")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_tokens_is_part_of_the_cache_key(
    tmp_path: Path, renders: list[int], change: str
) -> None:
    path = write(tmp_path / "a.jsonl", [pair(0)])
    load(tmp_path / "cache", path)
    load(tmp_path / "cache", path, **dict(CHANGES[change]))
    assert renders == [1, 1]


def test_changed_rows_and_changed_columns_are_tokenised_anew(
    tmp_path: Path, renders: list[int]
) -> None:
    path = write(tmp_path / "a.jsonl", [pair(0)])
    load(tmp_path / "cache", path)
    load(tmp_path / "cache", source(path, columns=ColumnMap(chosen="rejected", rejected="chosen")))
    load(tmp_path / "cache", source(path, max_rows=1))
    times = os.stat(path)
    write(path, [{**pair(0), "chosen": "Evil 0."}])  # as long as before
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    load(tmp_path / "cache", path)
    assert renders == [1, 1, 1, 1]


def test_using_a_tokenizer_with_padding_does_not_change_its_key(
    tmp_path: Path, renders: list[int]
) -> None:
    path = write(tmp_path / "a.jsonl", [pair(0)])
    tokenizer = make_tokenizer("llama3", add_bos=True)
    load(tmp_path / "cache", path, tokenizer=tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    load(tmp_path / "cache", path, tokenizer=tokenizer)
    assert renders == [1]


def damage_token(store: Path) -> None:
    content = bytearray((store / TOKENS).read_bytes())
    content[5] ^= 1
    (store / TOKENS).write_bytes(content)


DAMAGE = {
    "a flipped bit": damage_token,
    "a cut file": lambda store: os.truncate(store / TOKENS, 8),
    "a missing file": lambda store: (store / TOKENS).unlink(),
    "no record": lambda store: (store / META).unlink(),
    "half a record": lambda store: os.truncate(store / META, 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_entry_is_made_anew(
    tmp_path: Path, renders: list[int], damage: str
) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(4)])
    before = [*load(tmp_path / "cache", path).train]
    (store,) = (p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir())
    DAMAGE[damage](store)
    assert [*load(tmp_path / "cache", path).train] == before
    assert [*load(tmp_path / "cache", path).train] == before
    assert renders == [4, 4]


def test_a_cache_that_cannot_be_written_says_which_setting_moves_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(0)])
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        load(tmp_path / "cache", path)


_RACER = """
import sys
from pathlib import Path
import prefopt.data.tokenise as tokenise
from tests.unit.test_data_tokens import load, TOKENIZER
write = tokenise._write_store
def slow(*args):
    import time
    print("built", flush=True)
    time.sleep(0.5)
    write(*args)
tokenise._write_store = slow
folder = Path(sys.argv[1])
print(load(folder / "cache", folder / "a.jsonl").train.fingerprint)
"""


def test_processes_that_start_together_build_once_and_read_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    command = [sys.executable, "-c", _RACER, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    said = [racer.communicate(timeout=120)[0].split() for racer in racers]
    assert sum(words.count("built") for words in said) == 1
    assert (
        said[0][-1]
        == said[1][-1]
        == load(tmp_path / "cache", tmp_path / "a.jsonl").train.fingerprint
    )


def test_worker_processes_give_the_data_of_one_process(tmp_path: Path) -> None:
    rows = [pair(i) if i % 7 else {**pair(i), "chosen": ""} for i in range(600)]  # three chunks
    path = write(tmp_path / "a.jsonl", rows)
    one = load(tmp_path / "one", path)
    two = load(tmp_path / "two", path, num_workers=2)
    assert two.train.fingerprint == one.train.fingerprint
    assert two.reject_counts == one.reject_counts == {"empty_chosen": 86}


def test_an_error_in_a_worker_process_keeps_file_and_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(0), {**pair(1), "chosen": 3}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'chosen'"):
        load(tmp_path / "cache", path, num_workers=2)


# --- mixtures and splits -------------------------------------------------------------------------------


def drawn(cache: Path, weight: float, path: Path, **data: Any) -> Counter[str]:
    """How often each row of ``path`` occurs in the training set."""
    return Counter(group.id for group in load(cache, source(path, weight=weight), **data).train)


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    return write(tmp_path / "twenty.jsonl", [pair(i) for i in range(20)])


@pytest.mark.parametrize(
    ("weight", "times"), [(0.25, {1: 5}), (1.0, {1: 20}), (2.0, {2: 20}), (1.5, {1: 10, 2: 10})]
)
def test_a_weight_is_how_often_an_epoch_passes_over_a_source(
    tmp_path: Path, twenty: Path, weight: float, times: dict[int, int]
) -> None:
    assert Counter(drawn(tmp_path / "c", weight, twenty).values()) == times


def test_a_draw_repeats_for_a_seed_and_differs_between_seeds(tmp_path: Path, twenty: Path) -> None:
    first, again, other = (drawn(tmp_path / "c", 0.5, twenty, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_mixture_holds_every_source_and_rejects_of_both(tmp_path: Path, twenty: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [pair(30), {**pair(31), "chosen": ""}])
    bundle = load(tmp_path / "c", twenty, source(bad, weight=3.0))
    ids = Counter(group.id.split(":")[0] for group in bundle.train)
    assert ids == {"twenty.jsonl": 20, "bad.jsonl": 3}
    assert bundle.reject_counts == {"empty_chosen": 1}


def test_a_weight_that_draws_nothing_is_an_error(tmp_path: Path, twenty: Path) -> None:
    with pytest.raises(ConfigError, match=r"weight = 0\.01: draws none of its 20 rows"):
        drawn(tmp_path / "c", 0.01, twenty)


def test_no_prompt_is_on_both_sides_of_a_split_though_sources_share_prompts(tmp_path: Path) -> None:
    """40 prompts, each in two files and three times in one of them."""
    prompts = [f"Shared question {i}?\n" for i in range(40)]
    rows = [pair(i, prompt=prompt) for i, prompt in enumerate(prompts)]
    more = [pair(100 + i, prompt=prompt) for i, prompt in enumerate(prompts * 3)]
    files = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", more)
    bundle = load(tmp_path / "c", *files, eval_frac=0.25)
    assert bundle.eval is not None
    train, held = ({tuple(g.prompt_ids) for g in side} for side in (bundle.train, bundle.eval))
    assert not train & held
    assert (len(train), len(held)) == (30, 10)
    assert (len(bundle.train), len(bundle.eval)) == (120, 40)


def test_a_split_repeats_for_a_seed_and_differs_between_seeds(tmp_path: Path, twenty: Path) -> None:
    def held(seed: int) -> list[str]:
        bundle = load(tmp_path / "c", twenty, eval_frac=0.3, seed=seed)
        assert bundle.eval is not None
        assert len(bundle.train) + len(bundle.eval) == 20
        return [group.id for group in bundle.eval]

    assert held(1) == held(1) != held(2)
    assert len(held(1)) == 6


def test_a_prompt_stays_on_its_side_when_rows_change_places(tmp_path: Path, twenty: Path) -> None:
    lines = twenty.read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(lines)))
    sides = []
    for path in (twenty, turned):
        bundle = load(tmp_path / "c", path, eval_frac=0.3)
        assert bundle.eval is not None
        sides.append({tuple(group.prompt_ids) for group in bundle.eval})
    assert sides[0] == sides[1]


def test_held_out_rows_are_not_repeated_by_weight(tmp_path: Path, twenty: Path) -> None:
    bundle = load(tmp_path / "c", source(twenty, weight=3.0), eval_frac=0.2)
    assert bundle.eval is not None
    assert Counter(Counter(g.id for g in bundle.eval).values()) == {1: 4}
    assert len(bundle.train) == 48


def test_eval_sources_beside_an_eval_frac_are_an_error(tmp_path: Path, twenty: Path) -> None:
    with pytest.raises(ConfigError, match="eval_frac"):
        load(tmp_path / "c", twenty, eval=(source(twenty),), eval_frac=0.1)


def test_an_eval_source_that_shares_prompts_with_training_is_warned_about(
    tmp_path: Path, twenty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write(tmp_path / "eval.jsonl", [pair(3), pair(77)])
    bundle = load(tmp_path / "c", twenty, eval=(source(other),))
    assert bundle.eval is not None
    assert len(bundle.eval) == 2
    assert "1 of 2 held-out rows have a prompt that is also trained on" in caplog.text


def test_holding_out_the_only_prompt_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i, prompt="The only one?\n") for i in range(4)])
    with pytest.raises(ConfigError, match="every one of 1 distinct prompts"):
        load(tmp_path / "c", path, eval_frac=0.1)


def test_taking_rows_of_a_set_keeps_its_order(tmp_path: Path, twenty: Path) -> None:
    train = load(tmp_path / "c", twenty, source(twenty, weight=0.5)).train
    some = train.take(np.array([25, 3, 19]))
    assert [*some] == [train.group(3), train.group(19), train.group(25)]
