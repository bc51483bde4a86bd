"""The table of objectives: names, suggestions, and the schema that a signature is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Annotated

import pytest
from pydantic import Field, PositiveFloat, ValidationError

from prefopt.credit.base import GroupScores, Labels
from prefopt.errors import ConfigError
from prefopt.recipe.entries import parameters
from prefopt.recipe.registry import (
    CREDITS,
    OBJECTIVES,
    REGISTRIES,
    Need,
    credit,
    get_credit,
    get_objective,
    needs_with,
    objective,
    objective_names,
    signal,
)
from prefopt.types import ObjectiveOutput, ResponseLogps

UpToThree = Annotated[float, Field(le=3)]


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it; the built-in entries, imported once, stay."""
    for entries in REGISTRIES.values():
        for name in entries.table:
            entries.get(name)
        monkeypatch.setattr(entries, "_specs", dict(entries._specs))


def _margin(lp: ResponseLogps, *, beta: PositiveFloat, scale: UpToThree = 1.0) -> ObjectiveOutput:
    return ObjectiveOutput(beta * scale * lp.policy.sum(-1)[lp.pairs[:, 0]])


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("dop", "dpo"), ("simpoo", "simpo"), ("ipo_men", "ipo_mean"), ("apozero", "apo_zero")],
)
def test_an_unknown_name_suggests_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"objective.name = '{typo}': unknown; did you mean '{meant}'"
    ):
        get_objective(typo)


def test_a_name_near_nothing_lists_what_is_known_without_a_guess() -> None:
    with pytest.raises(ConfigError) as error:
        get_objective("zzzzzz")
    assert "did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in OBJECTIVES)


@pytest.mark.parametrize(
    ("section", "typo", "meant"),
    [
        ("credit", "best_wurst", "best_worst"),
        ("credit", "grup_mean", "group_mean"),
        ("signals", "mth", "math"),
        ("signals", "judgge", "judge"),
    ],
)
def test_credits_and_signals_suggest_as_objectives_do(section: str, typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{typo}': unknown; did you mean '{meant}'"):
        REGISTRIES[section].get(typo)


@pytest.mark.parametrize("name", sorted(CREDITS))
def test_every_credit_of_the_table_is_a_function_of_that_name_and_needs_no_torch(name: str) -> None:
    spec = get_credit(name)
    assert (spec.name, spec.fn.__name__, spec.fn.__module__) == (name, name, CREDITS[name])
    program = (
        f"import sys, {CREDITS[name]}; "
        f"sys.exit(bool({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_credit_of_an_objective_gives_the_labels_it_needs(name: str) -> None:
    spec = get_objective(name)
    labels = {Need.PAIRS, Need.ADVANTAGES} & spec.needs
    if spec.credit is not None and Need.SAMPLES in spec.needs:
        labels -= {Need.PAIRS}  # hypo's pairs are the data set's
    if spec.credit is not None:
        assert get_credit(spec.credit).gives == labels
    elif Need.CONDITION in spec.needs:
        assert not labels  # never on rollouts
    else:
        assert labels == {Need.PAIRS}


@pytest.mark.parametrize(
    ("params", "needed"), [({}, False), ({"beta": 0.0}, False), ({"beta": 0.1}, True)]
)
def test_a_weight_switches_its_need_on(params: dict[str, float], needed: bool) -> None:
    assert (Need.REFERENCE in needs_with(get_objective("grpo"), params)) == needed


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_line_of_the_table_leads_to_a_function_of_that_name(name: str) -> None:
    spec = get_objective(name)
    assert (spec.name, spec.fn.__name__, spec.fn.__module__) == (name, name, OBJECTIVES[name])


def test_a_second_function_cannot_take_a_name() -> None:
    get_objective("dpo")
    with pytest.raises(ValueError, match=r"'dpo' is already defined in prefopt\.objectives\.dpo"):
        objective("dpo", source="mine")(_margin)
    assert get_objective("dpo").fn is not _margin


def test_a_reloaded_module_may_register_again() -> None:
    """A notebook reloads the file it is editing; the new function is the one in force."""
    before = get_objective("dpo").fn
    importlib.reload(importlib.import_module(OBJECTIVES["dpo"]))
    assert get_objective("dpo").fn is not before


def test_an_objective_of_your_own_is_known_by_name_with_its_signature_as_schema() -> None:
    assert objective("my_margin", needs={Need.PAIRS}, source="mine")(_margin) is _margin
    assert "my_margin" in objective_names()
    spec = get_objective("my_margin")
    assert spec.needs == {Need.PAIRS}
    assert spec.fields == {"beta": (PositiveFloat, ...), "scale": (UpToThree, 1.0)}
    assert parameters(get_objective("my_margin"))(beta=1).model_dump() == {
        "beta": 1.0,
        "scale": 1.0,
    }
    for bad in ({}, {"beta": 0}, {"beta": 1, "scale": 4}, {"beta": 1, "gama": 1}, {"beta": "1"}):
        with pytest.raises(ValidationError):
            parameters(get_objective("my_margin")).model_validate(bad)


def test_credits_and_signals_of_your_own_are_known_by_name() -> None:
    def keep(scores: GroupScores, *, share: UpToThree = 0.5) -> Labels:
        return Labels()

    def brevity(*, weight_column: str = "weight") -> None: ...

    assert credit("keep", gives={Need.PAIRS}, source="mine", needs_offline=True)(keep) is keep
    assert signal("brevity", source="mine", needs_fields=("weight_column",))(brevity) is brevity
    kept, brief = REGISTRIES["credit"].get("keep"), REGISTRIES["signals"].get("brevity")
    assert (kept.gives, kept.needs_offline) == ({Need.PAIRS}, True)
    assert kept.fields == {"share": (UpToThree, 0.5)}
    assert (brief.needs_fields, brief.fields) == (
        ("weight_column",),
        {"weight_column": (str, "weight")},
    )
    with pytest.raises(ValueError, match=r"'keep' is already defined in tests\.unit"):
        credit("keep", gives=set(), source="another")(_margin)


def test_names_are_known_without_torch() -> None:
    """`prefopt --help` and a misspelt name must not wait for torch to load."""
    program = (
        "import sys; from prefopt.recipe.registry import objective_names; "
        "assert 'dpo' in objective_names(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
