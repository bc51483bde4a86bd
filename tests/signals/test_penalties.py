"""Penalties, by hand."""

from __future__ import annotations

import pytest

from prefopt.recipe.registry import get_signal
from prefopt.signals.penalties import repeated_frac
from tests.signals.cases import candidates


def test_length_penalty_is_linear_beyond_the_free_tokens_up_to_its_cap() -> None:
    """2 a token beyond 3: 3 → 0, 5 → -4, 20 → -34 without a cap, -10 with one of 10."""
    group = candidates("", "", "", ids=[(1,) * 3, (1,) * 5, (1,) * 20])
    factory = get_signal("length_penalty").fn
    assert factory(per_token=2.0, free_tokens=3).score([group]) == [[0, -4, -34]]
    assert factory(per_token=2.0, free_tokens=3, max_penalty=10.0).score([group]) == [[0, -4, -10]]


def test_repetition_penalty_is_the_share_of_bigrams_seen_before() -> None:
    """1 2 1 2 1 has the bigrams 12 21 12 21: half are repeats."""
    assert repeated_frac((1, 2, 1, 2, 1), 2) == 0.5
    assert repeated_frac((1, 2, 3, 4), 2) == 0
    assert repeated_frac((1,), 2) == 0
    group = candidates("", ids=[(1, 2, 1, 2, 1)])
    assert get_signal("repetition_penalty").fn(ngram=2).score([group]) == [[-0.5]]
    assert get_signal("repetition_penalty").fn(ngram=2, free_frac=0.125).score([group]) == [
        [-0.375]
    ]


def test_truncation_penalty_falls_on_responses_without_an_end() -> None:
    group = candidates("a", "b", truncated=(True, False))
    assert get_signal("truncation_penalty").fn(penalty=2.5).score([group]) == [[-2.5, 0.0]]


@pytest.mark.parametrize("value", [-1.0, 0.25])
def test_truncation_value_marks_what_it_replaces(value: float) -> None:
    signal = get_signal("truncation_value").fn(value=value)
    group = candidates("a", "b", truncated=(True, False))
    assert signal.score([group])[0][0] == value
    assert signal.replaces(group) == (True, False)
