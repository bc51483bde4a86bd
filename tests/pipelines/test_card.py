"""The card of a pair set: numbers against counts by hand or published ones, verdicts from both sides."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.card.build import CardSettings, held_out_set, make_card
from data_pipelines.card.findings import Card, Check, Section
from data_pipelines.card.ngrams import log_odds
from data_pipelines.card.outputs import page
from data_pipelines.card.pairs import PairSource, PairView
from data_pipelines.card.texts import Markers
from data_pipelines.sketch import BottomSample
from prefopt.cli import main
from prefopt.errors import ConfigError, DataError
from tests.pipelines.pipelines import build, write_pipeline
from tests.unit.html_tree import Tree, assert_asks_for_nothing_and_runs_nothing
from tests.unit.tiny_tokenizers import TokenizerFactory

Pairs = Callable[..., Path]


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """``pairs(row, row, …)``: a file of pairs; a row is (prompt, chosen, rejected) or all its columns."""

    def write(*rows: tuple[str, str, str] | dict[str, Any], name: str = "pairs.jsonl") -> Path:
        named = ("prompt", "chosen", "rejected")
        lines = [
            json.dumps(dict(zip(named, row, strict=True)) if isinstance(row, tuple) else row)
            for row in rows
        ]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture(autouse=True)
def few_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    """langdetect is slow, and what it is asked here are a handful of texts."""
    monkeypatch.setattr("data_pipelines.card.build.LANGUAGE_SAMPLE", 20)


def card(path: Path, *settings: str, **asked: Any) -> Card:
    return make_card(PairSource(str(path), settings), CardSettings(**asked))


def section(found: Card, name: str) -> Section:
    return next(each for each in found.sections if each.name == name)


def check(found: Card, name: str) -> Check:
    return next(each for each in found.checks if each.name == name)


def plain(count: int, start: int = 0) -> list[tuple[str, str, str]]:
    """Pairs with nothing wrong: of equal length, each of its own words."""
    return [(f"Ask {n}?", f"Good {n:05d}.", f"Evil {n:05d}.") for n in range(start, start + count)]


# -- published sets ------------------------------------------------------------------------------------------


def test_ultrafeedback_has_four_identical_pairs_and_111_ties(shared_data: Path) -> None:
    """Of the ties one is in a row that training refuses (tests/pipelines/test_rated.py counts the same)."""
    scores = [f"columns.score_{side}=metadata.score_{side}" for side in ("chosen", "rejected")]
    found = card(shared_data / "ultrafeedback_1k" / "train.jsonl.gz", *scores)
    sizes, margins = section(found, "sizes").numbers, section(found, "margins").numbers
    assert (sizes["num_rows"], sizes["num_pairs"]) == (1000, 994)
    assert sizes["refused"] == {"identical": 4, "empty_chosen": 1, "empty_rejected": 1}
    assert section(found, "duplicates").numbers["num_equal_sides"] == 4
    assert margins["num_ties"] + margins["num_ties_refused"] == 111
    assert [check(found, name).verdict for name in ("ties", "equal sides")] == ["look", "look"]


def test_hh_is_counted_and_its_rewards_agree_as_published(shared_data: Path) -> None:
    """2,354 pairs, 2 ties, 65.85 % ranked right; six of them training refuses, four for an empty side."""
    expected = json.loads((shared_data / "hh_rlhf" / "expected.json").read_text())["helpful_base"]
    scores = [f"columns.score_{side}=reward_{side}" for side in ("chosen", "rejected")]
    found = card(shared_data / "hh_rlhf" / "lol_helpful_base_with_rewards.jsonl.gz", *scores)
    sizes, margins = section(found, "sizes").numbers, section(found, "margins").numbers
    assert sizes["num_rows"] == expected["rows"] == 2354
    assert sizes["refused"] == {"empty_rejected": 4, "identical": 2}
    assert margins["num_ties"] + margins["num_ties_refused"] == expected["ties"] == 2
    wrong = margins["num_negative"] + margins["num_ties"]
    right = margins["num_scored"] - wrong
    # what is refused counts in the published share: 4 of 6 at the most
    published = expected["reward_model_pairwise_accuracy"] * 2354
    assert right <= round(published) <= right + 4
    assert check(found, "scores against the label").verdict == "look"


def test_sharegpt_turns_are_pairs(shared_data: Path) -> None:
    found = card(shared_data / "sharegpt_demo" / "dpo_en_demo.json.gz")
    assert section(found, "sizes").numbers["num_pairs"] == 300


# -- what is measured ----------------------------------------------------------------------------------------


def test_the_longer_side_wins_by_count(pairs: Pairs) -> None:
    """Nine of ten unequal pairs; ties of length do not count; s.e. sqrt(.9 · .1 / 10) = 0.095."""
    rows = [(f"q{n}", "a longer answer.", "short.") for n in range(9)]
    rows += [("q9", "short.", "a longer answer."), ("q10", "same.", "len4.")]
    lengths = section(card(pairs(*rows)), "length_characters").numbers
    assert lengths["longer_is_chosen"] == pytest.approx(0.9)
    assert lengths["longer_is_chosen_stderr"] == pytest.approx(math.sqrt(0.009))
    assert lengths["mean_gap"] == pytest.approx(8 * 10 / 11)


@pytest.mark.parametrize(
    ("wins", "verdict"), [(520, "ok"), (700, "look"), (900, "stop"), (100, "stop")]
)
def test_length_verdicts_in_both_directions(pairs: Pairs, wins: int, verdict: str) -> None:
    long, short = "a longer answer {}.", "short {}."
    rows = [
        (f"q{n}", *(each.format(n) for each in ((long, short) if n < wins else (short, long))))
        for n in range(1000)
    ]
    assert check(card(pairs(*rows)), "does longer win?").verdict == verdict


def test_duplicates_and_contradictions_are_told_apart(pairs: Pairs) -> None:
    """Three prompts; one pair twice, one both ways round, one whose sides differ in white space alone."""
    rows = [
        ("a", "x.", "y."), ("a", "x.", "y."), ("b", "x.", "y."), ("b", "y.", "x."), ("c", "z.", " z. "),
    ]  # fmt: skip
    found = card(pairs(*rows))
    numbers = section(found, "duplicates").numbers
    assert numbers["num_distinct_prompts"] == 3 and numbers["most_pairs_of_one_prompt"] == 2
    assert numbers["num_distinct_pairs"] == 4
    assert numbers["num_contradictions"] == 1
    assert numbers["num_equal_sides"] == 1


def test_log_odds_by_hand() -> None:
    """y = 6 of 10 against 2 of 10, prior 10: a = 10 · 8/20 = 4.

    δ = log(10 / (10 + 10 - 10)) - log(6 / (10 + 10 - 6)) = log 1 - log(6/14); z = δ / sqrt(1/10 + 1/6).
    A rare n-gram is not listed, and counts among all; one n-gram alone has no odds.
    """
    found = log_odds({"a": 6, "b": 4}, {"a": 2, "b": 8}, prior=10.0)
    assert [each.text for each in found] == ["a", "b"]
    assert found[0].z == pytest.approx(math.log(14 / 6) / math.sqrt(1 / 10 + 1 / 6))
    assert found[1].z < 0
    assert log_odds({"a": 6, "b": 4}, {"a": 2, "b": 8}, prior=10.0, least=9) == found[1:]
    assert log_odds({"a": 6}, {"a": 2}, prior=10.0) == []


def test_a_phrase_of_one_side_is_named(pairs: Pairs) -> None:
    rows = [(f"q{n}", f"Certainly! It is {n}.", f"It must be {n}.") for n in range(400)]
    found = card(pairs(*rows))
    assert check(found, "give-away phrases").verdict == "look"
    texts = {each["text"] for each in section(found, "ngrams").numbers["giveaways"]}
    assert {"certainly", "must"} <= texts and "it" not in texts


def test_refusals_markup_and_cut_ends_are_counted_by_side(pairs: Pairs) -> None:
    rows = [
        *plain(6),
        ("q", "I'm sorry, but I cannot help with that.", "Sure, here it is."),
        ("r", "She said: I can't help loving him." + " And so on" * 30, "He cannot help it."),
        ("s", "<|im_start|>assistant\nYes.", "No, because the"),
    ]
    found = section(card(pairs(*rows)), "texts").numbers
    assert found["num_refusals"] == {"chosen": 2, "rejected": 0}  # the second is a known false one
    assert found["markup"] == {"<|im_start|> in chosen": 1}
    assert found["num_without_end"] == {"chosen": 1, "rejected": 1}


def test_repetition_is_of_words(pairs: Pairs) -> None:
    """A fifth of its 4-grams came before: 'on and on' does, a long list of different words does not."""
    rows = [
        ("q", "and on " * 20 + ".", " ".join(f"w{n}" for n in range(40)) + "."),
        *plain(3),
    ]
    assert section(card(pairs(*rows)), "texts").numbers["repetitive_share"] == {
        "chosen": 0.25,
        "rejected": 0.0,
    }


def test_languages_of_both_sides(pairs: Pairs) -> None:
    english = "This is plainly an English sentence about the weather of today."
    german = "Das ist ganz offensichtlich ein deutscher Satz über das Wetter von heute."
    found = card(pairs(("q", english, german), ("r", english + " Yes.", english)))
    numbers = section(found, "language").numbers
    assert numbers["languages"] == {"en": 2} and numbers["sides_differ"] == 0.5
    assert check(found, "sides in two languages").verdict == "look"


def test_overlap_with_a_held_out_set_by_kind(pairs: Pairs, tmp_path: Path) -> None:
    """The same but for white space; one word of thirty changed; a run of thirteen words in another prompt."""
    words = [f"word{n}" for n in range(120)]
    same, near, run = (" ".join(words[start : start + 40]) for start in (0, 40, 80))
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"prompt": each}) + "\n" for each in (same, near, run))
    )
    changed = near.replace("word79", "other")
    within = f"Before it stands this: {' '.join(words[85:98])} and after it that, which is new."
    rows = [(f"  {same}\n", "a.", "b."), (changed, "c.", "d."), (within, "e.", "f."), *plain(7)]
    found = card(pairs(*rows), held_out=(held_out_set(str(tmp_path / "test.jsonl")),))
    name = next(each.name for each in found.sections if each.name.startswith("leaks:"))
    assert section(found, name).numbers == {
        "num_eval": 3,
        "num_exact": 1,
        "num_near": 1,
        "num_runs": 2,  # the near one shares runs, too
    }
    assert check(found, "same prompts").verdict == "stop"


def test_signals_and_judges_are_compared_with_the_label(pairs: Pairs) -> None:
    """Signal a agrees in 2 of 3 and ties once; b never where it decides; the judge with itself once."""
    scored = [((1, 0), (0, 1), True), ((2, 0), (0, 0), False), ((1, 1), (1, 2), None)]
    rows = []
    for number, (a, b, orders) in enumerate(scored):
        info = [{"scores": {"a": a[side], "b": b[side]}, "model": "m"} for side in (0, 1)]
        row = {
            "id": f"i{number}", "prompt": "q", "chosen": f"x{number}.", "rejected": f"y{number}.",
            "info_chosen": info[0], "info_rejected": info[1],
        }  # fmt: skip
        rows.append(row | ({} if orders is None else {"orders_agree": orders}))
    found = card(pairs(*rows))
    numbers = section(found, "agreement").numbers
    assert numbers["signals"]["a"] == {"agrees": 2 / 3, "ties": 1 / 3, "num_pairs": 3}
    assert numbers["signals"]["b"] == {"agrees": 0.0, "ties": 1 / 3, "num_pairs": 3}
    assert (numbers["num_judged_both_orders"], numbers["num_orders_agree"]) == (2, 1)
    assert check(found, "judge consistency").verdict == "stop"
    assert check(found, "signals against the label").value.startswith("b ranks 0.0%")


def test_a_tokenizers_own_tokens_are_markup_whatever_they_begin_with() -> None:
    markers = Markers(["▁EOT▁"])
    markers.add(PairView("i", "q", "q", "Done.▁EOT▁", "No."))
    markers.add(PairView("j", "q", "q", "Done.", "No [INST]."))
    assert dict(markers.found) == {("▁EOT▁", "chosen"): 1, ("[INST]", "rejected"): 1}


# -- rendered ------------------------------------------------------------------------------------------------


def test_a_bos_or_an_end_within_a_text_is_refused_as_training_would(
    pairs: Pairs, tmp_path: Path, tiny_tokenizer: TokenizerFactory
) -> None:
    """One at the very start is what rendering adds, and is not doubled."""
    tiny_tokenizer(chat=None, add_bos=True).save_pretrained(tmp_path / "tokenizer")
    path = pairs(
        ("<s>What is it", "This.", "That."), ("What <s>is", "It.", "No."), ("Is", "It.</s> It.", "No."), *plain(3)
    )  # fmt: skip
    found = card(path, tokenizer=str(tmp_path / "tokenizer"))
    numbers = section(found, "template").numbers
    assert (numbers["refused"], numbers["num_double_bos"]) == ({"control_token": 2}, 0)
    assert section(found, "length_tokens").numbers["mean"]["chosen"] > 0
    found = card(path, "control_tokens=[all]", tokenizer=str(tmp_path / "tokenizer"))
    assert section(found, "template").numbers["refused"] == {"control_token": 1}
    assert check(found, "more than one BOS").verdict == "stop"


def test_rows_the_template_refuses_are_named(
    pairs: Pairs, tmp_path: Path, tiny_tokenizer: TokenizerFactory
) -> None:
    """Mistral's template takes no system message."""
    tiny_tokenizer(chat="alternating").save_pretrained(tmp_path / "tokenizer")
    user = {"role": "user", "content": "Hi"}
    system = {"role": "system", "content": "Be brief"}
    rows = [
        {"prompt": turns, "chosen": "Yes.", "rejected": "No."} for turns in ([user], [system, user])
    ]
    found = card(pairs(*rows), tokenizer=str(tmp_path / "tokenizer"))
    assert section(found, "template").numbers["refused"] == {"template_refused": 1}
    assert check(found, "rows the template refuses").verdict == "stop"


# -- where it comes from -------------------------------------------------------------------------------------


@pytest.fixture
def built(pairs: Pairs, tmp_path: Path) -> Path:
    """The folder of a pipeline's last stage, four shards of five pairs."""
    first = {"stage": "rated", "sources": [{"path": str(pairs(*plain(20)))}]}
    stages = [first, {"stage": "filter", "max_chars": 100}]
    return build(write_pipeline(tmp_path / "p.yaml", stages, shard_rows=5)) / "filter"


def test_the_card_of_a_stage_says_what_it_was_made_of(built: Path) -> None:
    found = card(built)
    made = section(found, "provenance").numbers
    assert made["stages"]["filter"] == {"rows_in": 20, "rows_out": 20, "dropped": {}}
    assert made["made_of"]["settings"]["max_chars"] == 100
    assert check(found, "manifest").verdict == "ok"


@pytest.mark.parametrize("harm", ["edit a shard", "add a shard", "edit the record"])
def test_a_folder_that_is_not_what_its_manifest_says_is_stopped(built: Path, harm: str) -> None:
    shard, record = built / "00001.jsonl", built.parent / "manifest" / "filter" / "done.json"
    if harm == "edit a shard":
        shard.write_text(shard.read_text().replace("Evil", "Nice"))
    elif harm == "add a shard":
        (built / "00009.jsonl").write_text(shard.read_text())
    else:
        record.write_text(record.read_text().replace('"rows_in": 20', '"rows_in": 21'))
    found = check(card(built), "manifest")
    assert found.verdict == "stop"
    assert Path(found.value.split(":")[0].split(" ")[0]).name in (
        shard.name,
        "00009.jsonl",
        "done.json",
    )


# -- the command ---------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["data", "card", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def test_the_page_fetches_nothing_and_shows_markup_as_text(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "<script>alert(1)</script>"
    rows = [(f"{hostile} {n}", f"{hostile} yes {n}", f"[bold]no[/bold] {n}") for n in range(30)]
    code, out, _ = run(capsys, pairs(*rows, name="<u>pairs.jsonl"), "--output", tmp_path / "card")
    tree = Tree((tmp_path / "card" / "card.html").read_text())
    assert code == 0 and "the page:" in out
    assert_asks_for_nothing_and_runs_nothing(tree)
    assert not tree.all("u") and "<u>pairs.jsonl" in tree.all("h1")[0].words
    cells = [e.words for e in tree.all("td")]
    assert any("script" in cell for cell in cells)  # as a word that gives a side away
    record = json.loads((tmp_path / "card" / "card.json").read_text())
    names = [check["name"] for each in record["sections"] for check in each["checks"]]
    assert {"does longer win?", "margins", "refusals", "language"} <= set(names)
    assert set(names) <= {e.words for e in tree.all("b") if "li" in e.parents}


def test_the_page_shows_every_check_table_and_histogram(pairs: Pairs) -> None:
    """Each check with its verdict in words; the bars of a histogram are the counts that are not 0."""
    found = card(pairs(*plain(20), ("q", "<b>", "<b>")))
    tree = Tree(page(found))
    items = [e.words for e in tree.all("li")]
    shown = {"none": "no data"}
    for each in found.checks:
        start = f"{shown.get(each.verdict, each.verdict)}{each.name}: {each.value}"
        assert any(item.replace("\n", "").startswith(start) for item in items), start
    assert found.worst() in tree.all("h1")[0].words.split()
    titles = [e.words for e in tree.all("h3")]
    assert titles == [table.title for each in found.sections for table in each.tables]
    for plot in [plot for each in found.sections for plot in each.histograms]:
        bars = [e for e in tree.figure(plot.title) if e.tag == "rect"]
        assert len(bars) == sum(count > 0 for counts in plot.series.values() for count in counts)


def test_the_same_rows_give_the_same_bytes(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pairs(*plain(50))
    for name in ("one", "two"):
        assert run(capsys, path, "--output", tmp_path / name)[0] == 0
    for file in ("card.html", "card.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_fail_on_ends_with_the_verdict(pairs: Pairs, capsys: pytest.CaptureFixture[str]) -> None:
    """A tie is `look`: it fails a card that must be ok, not one that must be no `stop`."""
    scored = [
        {"prompt": p, "chosen": c, "rejected": r, "score_chosen": 2, "score_rejected": 1}
        for p, c, r in plain(30)
    ]
    path = pairs(*scored, {**scored[0], "prompt": "tie", "score_rejected": 2})
    output = ["--output", path.parent / "card"]
    assert run(capsys, path, *output)[0] == 0
    assert run(capsys, path, *output, "--fail-on", "stop")[0] == 0
    code, _, err = run(capsys, path, *output, "--fail-on", "look")
    assert code == 1 and "the card says look (--fail-on look)" in err


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\nnot json\n', [], "bad.jsonl:2"),
        ('{"prompt": "a", "chosen": "b"}\n', [], "no column 'rejected'"),
        ("", [], "no rows"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', [], "not one pair that can be trained on (1 ident"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', ["colums.prompt=x"], "did you mean 'columns'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', ["--held-out", "gsm8"], "did you mean 'gsm8k'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "s": "x"}\n', ["columns.score_chosen=s"], "bad.jsonl:1"),
    ],
)  # fmt: skip
def test_what_is_no_pair_set_says_so(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    arguments: Sequence[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # where a card without --output would go
    (tmp_path / "bad.jsonl").write_text(text)
    code, _, err = run(capsys, tmp_path / "bad.jsonl", *arguments)
    assert code in (1, 2) and message in err
    assert not (tmp_path / "cards").exists()


def test_a_glob_never_reads_its_own_card(
    pairs: Pairs, built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no folder is named, cards go where no data source looks: twice the same card."""
    for path in (built, pairs(*plain(5), name="alone.jsonl")):
        monkeypatch.chdir(path.parent)
        for _ in range(2):
            assert run(capsys, path)[0] == 0
    assert (built.parent / "card" / "filter" / "card.json").exists()
    record = json.loads((built.parent / "card" / "filter" / "card.json").read_text())
    assert record["sections"][0]["numbers"]["num_pairs"] == 20
    assert Path("cards/alone/card.json").exists()


def test_a_sample_does_not_depend_on_the_order() -> None:
    one, other = BottomSample[int](3), BottomSample[int](3)
    for key in range(10):
        one.add(key * 7 % 10, key)
        other.add((9 - key) * 7 % 10, 9 - key)
    assert list(one) == list(other) == [0, 3, 6]  # keys 0, 1, 2


def test_settings_that_are_none_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        PairSource("x.jsonl", ("colums.a=1", "formt=hh")).section()
    assert "columns" in str(caught.value) and "format" in str(caught.value)


def test_the_line_of_a_bad_row_is_named(pairs: Pairs) -> None:
    path = pairs(("a", "b.", "c."), {"prompt": "d", "chosen": 3, "rejected": "e"})
    with pytest.raises(DataError, match=r"pairs\.jsonl:2"):
        card(path)


@pytest.mark.parametrize(
    "names", [("chosen_score", "rejected_score"), ("reward_chosen", "reward_rejected")]
)
def test_a_card_finds_the_scores_that_pair_accuracy_finds(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    scores = [(3, 1), (2, 2), (None, 2), ([1.0], 4)]
    texts = {"prompt": "What?", "rejected": "No."}
    rows = [
        {**texts, "chosen": f"Yes {n}.", **dict(zip(names, each, strict=True))}
        for n, each in enumerate(scores)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    views = [each for each in PairSource(str(path)).pairs() if isinstance(each, PairView)]
    assert [view.margin for view in views] == [2, 0, None, -3]
