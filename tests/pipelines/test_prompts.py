"""The `prompts` stage: every prompt is kept or counted under its first reason, and what it keeps is right."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.contamination import Contamination, Decontamination
from tests.eval.runs import write_jsonl
from tests.pipelines.pipelines import build, counts, output, refused, rows, write_pipeline
from tests.unit.tiny_tokenizers import make_tokenizer


def prompts(tmp_path: Path, texts: list[Any], **keys: Any) -> Path:
    """A pipeline over a file of these prompts; texts, or whole rows."""
    lines = [text if isinstance(text, Mapping) else {"prompt": text} for text in texts]
    file = write_jsonl(tmp_path / "prompts.jsonl", lines)
    stage = {"stage": "prompts", "sources": [{"path": str(file)}], **keys}
    return write_pipeline(tmp_path / "p.yaml", [stage], shard_rows=3, seed=keys.pop("seed", 0))


def kept(tmp_path: Path, texts: list[Any], **keys: Any) -> tuple[list[Any], dict[str, int]]:
    folder = build(prompts(tmp_path, texts, **keys))
    return [row["prompt"] for row in rows(folder / "prompts")], counts(folder, "prompts")["dropped"]


def test_duplicates_are_found_but_for_white_space_and_the_first_stays(tmp_path: Path) -> None:
    found = kept(tmp_path, ["one two", "three", " one\ttwo ", "One two", ""])
    assert found == (["one two", "three", "One two"], {"duplicate": 1, "empty_prompt": 1})


def test_duplicates_stay_where_they_are_wanted(tmp_path: Path) -> None:
    assert kept(tmp_path, ["a", "a"], drop_duplicates=False) == (["a", "a"], {})


def test_limits_in_characters(tmp_path: Path) -> None:
    found = kept(tmp_path, ["ab", "abc", "abcde", "abcdef"], min_chars=3, max_chars=5)
    assert found == (["abc", "abcde"], {"chars_below": 1, "chars_above": 1})


def test_limits_in_tokens_count_the_chat_template(tmp_path: Path) -> None:
    """A turn of one word against its own rendering: exactly that many tokens pass."""
    from prefopt.data.render import Renderer

    tokenizer = make_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    turns = [[{"role": "user", "content": text}] for text in ("word", "word word word")]
    short, long = (len(Renderer(tokenizer).prompt_ids(turn)) for turn in turns)
    assert short < long
    lines = [{"prompt": turn} for turn in turns]
    keys = {"tokenizer": str(tmp_path / "tokenizer"), "max_tokens": long - 1}
    assert kept(tmp_path, lines, **keys) == ([turns[0]], {"tokens_above": 1})


def test_languages_are_counted_by_name(tmp_path: Path) -> None:
    texts = [
        "Could you please explain to me how the tides of the sea work?",
        "Kannst du mir bitte erklären, wie die Gezeiten des Meeres entstehen?",
        "1234 5678",
    ]
    found = kept(tmp_path, texts, languages=["en"])
    assert found == (texts[:1], {"language:de": 1, "language:none": 1})


def test_columns_are_kept_by_name_and_a_missing_one_says_which_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "p", "answer": 4, "meta": {"level": 2}, "other": 1}]
    folder = build(prompts(tmp_path, lines, keep=["answer", "meta.level"]))
    assert rows(folder / "prompts") == [
        {"id": "prompts.jsonl:1", "prompt": "p", "answer": 4, "meta.level": 2}
    ]
    path = prompts(tmp_path, lines, keep=["answr"])
    said = refused(capsys, path, f"output_dir={tmp_path / 'other'}", code=1)
    assert "prompts.jsonl:1: no column 'answr'; it has answer" in said
    assert "'chosen' is a column that stages write" in refused(
        capsys, prompts(tmp_path, lines, keep=["chosen"])
    )


def test_a_dialogue_is_a_prompt_without_the_last_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found, _ = kept(
        tmp_path, [{"messages": [*turns, {"role": "user", "content": "q2"}]}, {"messages": turns}]
    )
    assert found == [[*turns, {"role": "user", "content": "q2"}], turns[:1]]


def test_shuffling_is_a_permutation_by_seed_and_max_prompts_takes_its_start(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(40)]
    first, _ = kept(tmp_path, texts, shuffle=True)
    assert sorted(first) == sorted(texts) and first != texts
    build(prompts(tmp_path, texts, shuffle=True), f"output_dir={tmp_path / 'again'}")
    assert [row["prompt"] for row in rows(tmp_path / "again" / "prompts")] == first
    build(
        prompts(tmp_path, texts, shuffle=True),
        f"output_dir={tmp_path / 'few'}",
        "stages.0.max_prompts=7",
    )
    assert [row["prompt"] for row in rows(tmp_path / "few" / "prompts")] == first[:7]
    assert counts(tmp_path / "few", "prompts")["dropped"] == {"beyond_max_prompts": 33}
    build(prompts(tmp_path, texts, shuffle=True), f"output_dir={tmp_path / 'seed'}", "seed=1")
    assert [row["prompt"] for row in rows(tmp_path / "seed" / "prompts")] != first


def test_parts_are_disjoint_and_together_all(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(90)]
    parts = []
    for number in (1, 2, 3):
        path = prompts(tmp_path, texts, part={"number": number, "of": 3})
        build(path, f"output_dir={tmp_path / str(number)}")
        parts.append([row["prompt"] for row in rows(tmp_path / str(number) / "prompts")])
    assert sorted(text for part in parts for text in part) == sorted(texts)
    assert all(15 < len(part) < 45 for part in parts)


def test_ids_name_source_file_and_row(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}1", "key": f"k{name}"}])
    sources = [
        {"path": str(tmp_path / "a.jsonl")},
        {"path": str(tmp_path / "b.jsonl"), "columns": {"id": "key"}},
    ]
    path = write_pipeline(tmp_path / "p.yaml", [{"stage": "prompts", "sources": sources}])
    assert [row["id"] for row in rows(build(path) / "prompts")] == ["0/a.jsonl:1", "1/kb"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b"\n', "prompts.jsonl:2: broken JSON"),
        (b'{"prompt": "caf\xe9"}\n', "prompts.jsonl:1: not UTF-8"),
        (b'{"question": "a"}\n', "no column 'prompt'; it has question"),
        (b"", "holds no rows"),
    ],
)
def test_broken_files_are_named_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    path = prompts(tmp_path, ["x"])
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert says in refused(capsys, path, code=1)
    assert not (output(path) / "manifest" / "prompts" / "done.json").exists()


def test_a_changed_file_is_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompts(tmp_path, ["a", "b"])
    build(path)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "c"}])
    said = refused(capsys, path)
    assert (
        "stage 'prompts' was made differently: depends.sources.0 was" in said
        and "prompts.jsonl:" in said
    )


# -- decontamination -----------------------------------------------------------------------------------------


def eval_file(tmp_path: Path, texts: list[str]) -> dict[str, Any]:
    return {"path": str(write_jsonl(tmp_path / "eval.jsonl", [{"prompt": text} for text in texts]))}


def test_a_run_of_thirteen_words_contaminates_and_twelve_do_not(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(30)]
    found = Contamination(Decontamination(against=[eval_file(tmp_path, [" ".join(words)])]))
    name = str(tmp_path / "eval.jsonl")
    assert found.found("before " + " ".join(words[5:18]) + " after") == name
    assert (
        found.found(", ".join(word.upper() for word in words[5:18])) == name
    )  # case and commas do not count
    assert found.found("before " + " ".join(words[5:17]) + " after w17") is None


def test_a_short_example_contaminates_its_equal_only(tmp_path: Path) -> None:
    found = Contamination(Decontamination(against=[eval_file(tmp_path, ["What is 2 + 2?"])]))
    assert found.found("what is 2+2") is not None
    assert found.found("what is 2 + 2, and why?") is None


def test_an_instruction_that_a_set_repeats_is_no_question(tmp_path: Path) -> None:
    """Twenty examples behind one instruction of 14 words: prompts with that instruction stay."""
    instruction = "solve the following problem step by step and write the final answer after hashes"
    examples = [f"{instruction} {' '.join(f'q{n}x{i}' for i in range(15))}" for n in range(20)]
    found = Contamination(Decontamination(against=[eval_file(tmp_path, examples)]))
    assert found.found(f"{instruction} something new") is None
    assert found.found(" ".join(f"q3x{i}" for i in range(13))) is not None


def test_gsm8k_test_questions_are_found_by_the_tasks_name(
    tmp_path: Path, shared_data: Path
) -> None:
    """Every one of the 1,319 test questions; of the training questions the few that share their words."""
    test, train = (shared_data / "gsm8k" / f"{name}.jsonl.gz" for name in ("test", "train"))
    stage = {
        "stage": "prompts",
        "sources": [
            {"path": str(file), "columns": {"prompt": "question"}} for file in (test, train)
        ],
        "decontaminate": {"against": [{"task": "gsm8k", "options": {"data": str(test)}}]},
    }
    folder = build(write_pipeline(tmp_path / "p.yaml", [stage]))
    lines = (folder / "manifest" / "prompts" / "dropped.jsonl").read_text().splitlines()
    dropped = [json.loads(line)["id"] for line in lines]
    assert sum(id_.startswith("0/") for id_ in dropped) == 1319
    shared = _sharing(train, test)
    assert {int(id_.rsplit(":", 1)[1]) for id_ in dropped if id_.startswith("1/")} == shared
    assert 0 < len(shared) < 20


def _sharing(train: Path, test: Path) -> set[int]:
    """Lines of ``train`` with 13 words in a row of a line of ``test``, by sets of tuples."""
    import re

    def runs(path: Path) -> list[set[tuple[str, ...]]]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["question"] for line in file]
        tokens = [re.findall(r"\w+", text.lower()) for text in texts]
        return [{tuple(t[i : i + 13]) for i in range(max(1, len(t) - 12))} for t in tokens]

    known = set().union(*runs(test))
    return {number for number, found in enumerate(runs(train), 1) if found & known}


def test_an_unknown_eval_set_suggests_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, prompts(tmp_path, ["a"], decontaminate={"against": ["gms8k"]}))
    assert "no task of `prefopt eval`; did you mean 'gsm8k'?" in said
    said = refused(capsys, prompts(tmp_path, ["a"], decontaminate={"against": [{"column": "x"}]}))
    assert "name a task or a path" in said


# --- text as it is -------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_counted_and_a_number_that_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = prompts(tmp_path, ["a", "b", "c"], keep=["quality"])
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a", "quality": 1}\n{"prompt": "b \\ud83d", "quality": 1}\n{"prompt": "c", "quality": "x"}\n'
    )
    folder = build(pipeline)
    assert [row["prompt"] for row in rows(folder / "prompts")] == ["a", "c"]
    assert counts(folder, "prompts")["dropped"] == {"broken_text": 1}
    (line,) = (folder / "manifest" / "prompts" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "prompts.jsonl:2"
    file.write_text('{"prompt": "a", "quality": 1.0}\n{"prompt": "b", "quality": NaN}\n')
    said = refused(capsys, pipeline, "--from", "prompts", code=1)
    assert "prompts.jsonl:2: column quality is nan, and a pipeline's rows are JSON" in said


def test_a_benchmark_row_that_cannot_be_read_is_no_row_that_is_not_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two \\udc00"}\n')
    against = [{"path": str(tmp_path / "test.jsonl")}]
    pipeline = prompts(tmp_path, ["a"], decontaminate={"against": against})
    said = refused(capsys, pipeline, code=1)
    assert "test.jsonl:2: column 'prompt' holds half of a surrogate pair" in said
