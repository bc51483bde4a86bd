"""What may be compared: refusals that name both values, forced marks, differences that are only said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.comparison.compare import compare, comparison_json, print_comparison
from prefopt.errors import ConfigError
from tests.eval.result_dirs import A, B, scored

TEMPLATE = {"name": "ours", "origin": "prefopt", "sha256": "1" * 64}
JUDGE = {"model": "judge-a", "sampling": {"temperature": 0.0}}
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "version": ({"version": "1"}, {"version": "2"}, "1 (a)", "2 (b)"),
    "examples": ({}, {"data_hash": "f" * 64}, "d" * 16, "f" * 16),
    "decoding": ({}, {"decoding_hash": "0" * 64}, "e" * 16, "0" * 16),
    "template": (
        {"template": TEMPLATE},
        {"template": TEMPLATE | {"sha256": "2" * 64}},
        "1" * 16,
        "2" * 16,
    ),
    "judge": ({"judge": JUDGE}, {"judge": JUDGE | {"model": "judge-b"}}, "judge-a", "judge-b"),
    "sampling": (
        {"judge": JUDGE},
        {"judge": JUDGE | {"sampling": {"temperature": 1.0}}},
        '{"temperature": 0.0}',
        '{"temperature": 1.0}',
    ),
    "baseline": ({"baseline": "published"}, {"baseline": "model 9"}, "published", "model 9"),
    # `by: auto` took both: the one had a base under its adapter, the other was a full model
    "measure": (
        {"details": {"by": "implicit_reward"}},
        {"details": {"by": "mean_logp"}},
        "implicit_reward (a)",
        "mean_logp (b)",
    ),
    "options": ({"options": {"k": 1}}, {"options": {"k": 5}}, "1 (a)", "5 (b)"),
    "configuration": ({"config_hash": "x"}, {"config_hash": "y"}, "x (a)", "y (b)"),
    "limit": (
        {"data_hash": None},
        {"data_hash": None, "head": {"limit": 5}},
        "none (a)",
        "5 (b)",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_other_measurements_are_refused_naming_both_values_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    mine, other, first, second = DIFFERENCES[what]
    outputs = [scored(tmp_path / "a", A, **mine), scored(tmp_path / "b", B, **other)]
    with pytest.raises(ConfigError) as refused:
        compare(outputs, force=False)
    (problem,) = refused.value.problems
    assert problem.startswith("quiz: ") and first in problem and second in problem
    assert "--force" in problem

    forced = compare(outputs, force=True)
    result = comparison_json(forced)
    assert result["forced"] and result["tasks"]["quiz"]["forced"]
    assert first in result["forced_differences"][0] and second in result["forced_differences"][0]
    print_comparison(forced)
    output = capsys.readouterr().out
    assert "FORCED" in output and "(forced)" in output and first in output


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", A, judge=JUDGE)
    b = scored(tmp_path / "b", B, version="2", decoding_hash="9" * 64)
    with pytest.raises(ConfigError) as refused:
        compare([a, b, scored(tmp_path / "c", B, judge=JUDGE)], force=False)
    assert len(refused.value.problems) == 4  # version, decoding, judge, its sampling
    assert "1 (a, c), 2 (b)" in refused.value.problems[0]


def test_force_marks_nothing_where_nothing_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare([scored(tmp_path / "a", A), scored(tmp_path / "b", B)], force=True)
    print_comparison(found)
    assert not comparison_json(found)["forced"]
    assert "forced" not in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    "other",
    [
        {"head": {"engine": {"name": "vllm", "dtype": "bfloat16", "options": {}}}},
        {"chat_template_hash": "b" * 64},
        {"head": {"seed": 7}},
    ],
)
def test_what_should_hardly_move_a_number_is_said_and_not_refused(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    found = compare([scored(tmp_path / "a", A), scored(tmp_path / "b", B, **other)], force=False)
    assert found.remarks and not found.forced


def test_an_option_left_out_is_one_at_its_default(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", A, task="humaneval")
    b = scored(tmp_path / "b", B, task="humaneval", options={"k": [1], "num_workers": 9})
    assert not compare([a, b], force=False).forced
    c = scored(tmp_path / "c", B, task="humaneval", options={"timeout_s": 9.0})
    with pytest.raises(
        ConfigError, match=r"tasks\.humaneval\.timeout_s differs: 3\.0 \(a\), 9\.0 \(c\)"
    ):
        compare([a, c], force=False)


def test_kl_measured_from_other_bases_is_said(tmp_path: Path) -> None:
    outputs = [
        scored(
            tmp_path / name,
            values,
            kind="model",
            head={"model": {"path": name, "base": base, "adapters": [name]}},
        )
        for name, values, base in (("a", A, "llama"), ("b", B, "qwen"))
    ]
    (remark,) = compare(outputs, force=False).remarks
    assert remark == "quiz: the base under the adapter differs: llama (a), qwen (b)"


def test_files_may_lie_elsewhere_and_a_limit_may_be_above_what_there_is(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", A, options={"data": "/one/x.jsonl", "words": "/one/words.txt"})
    b = scored(
        tmp_path / "b",
        B,
        options={"data": "elsewhere.jsonl", "words": "/two/words.txt"},
        head={"limit": 1000},
    )
    assert not compare([a, b], force=False).forced
