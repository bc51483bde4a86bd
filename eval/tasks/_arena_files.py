"""What Arena-Hard publishes: answers, judgments with their games, battles. Keyed by question, never by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.sources import columns, require
from eval.style import published_counts
from prefopt.data.readers import RawRow
from prefopt.errors import DataError

_WINNERS = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie"}
_GAMES_A_QUESTION = 2


@dataclass(frozen=True)
class StoredAnswer:
    """One answer of an answer file."""

    text: str | None
    """None: the file has null."""
    token_len: int | None = None
    """As the file counted it."""
    counts: tuple[int, int, int] | None = None
    """Headers, list items, bold spans, as the file counted them."""


@dataclass(frozen=True)
class Tally:
    """How the games over one question ended, weighted battles."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    games: tuple[str | None, ...] | None = None
    """The judge's label of each game, in order; None without one. None for a battle file, which has none."""
    category: str | None = None
    disagreements: int = 0
    """Games whose stored label is not the one that is read in its text."""

    @property
    def battles(self) -> int:
        return self.wins + self.losses + self.ties


@dataclass(frozen=True)
class LabelRules:
    """How an edition reads a judge's text and counts its label."""

    labels: Callable[[str], Sequence[str]]
    """Every label in a judgment."""
    verdict: Callable[[str], str | None]
    """The label that counts; None if none does."""
    outcomes: Mapping[str, tuple[str, int]]
    """label -> (``A``, ``B`` or ``=``, battles it counts as). Any other label is none."""
    both_games: bool
    """A question counts only if both of its games have a label."""


def question_key(row: RawRow) -> str:
    return str(require(row, "question_id", "uid"))


def stored_answers(rows: Iterable[RawRow]) -> dict[str, dict[str, StoredAnswer]]:
    """Answers by model and question, of either edition's shape.

    Raises: DataError naming file and line: no question or answer column, or a second answer (both lines).
    """
    found: dict[str, dict[str, StoredAnswer]] = {}
    where: dict[tuple[str, str], str] = {}
    for row in rows:
        model, key = str(require(row, "model_id", "model")), question_key(row)
        _refuse_second(where, (model, key), row, "answer")
        found.setdefault(model, {})[key] = _answer(row)
    return found


def tallies(
    rows: Sequence[RawRow], rules: LabelRules, baseline_model: str
) -> dict[str, dict[str, Tally]]:
    """Tallies by model and question of a judgment file (``games``) or a battle file (``winner``).

    Raises: DataError naming file and line.
    """
    if not rows:
        return {}
    if "games" in rows[0].data:
        return _read_judgments(rows, rules)
    if "winner" in rows[0].data:
        return _read_battles(rows, baseline_model)
    raise DataError(
        f"{rows[0].where}: neither judgments (a column 'games') nor battles (a column 'winner'); its columns: "
        f"{columns(rows[0])}"
    )


def count_labels(labels: Sequence[str | None], rules: LabelRules, **more: Any) -> Tally:
    """The tally of the games of one question: in game 1 the baseline is assistant A, in game 2 the model."""
    outcomes = [rules.outcomes.get(label or "") for label in labels]
    counts: Counter[str] = Counter()
    if not rules.both_games or (None not in outcomes and len(outcomes) == _GAMES_A_QUESTION):
        for model_is, outcome in zip("BA", outcomes, strict=False):
            if outcome is not None:
                winner, weight = outcome
                counts["tie" if winner == "=" else "won" if winner == model_is else "lost"] += (
                    weight
                )
    return Tally(counts["won"], counts["lost"], counts["tie"], tuple(labels), **more)


def _read_judgments(rows: Sequence[RawRow], rules: LabelRules) -> dict[str, dict[str, Tally]]:
    found: dict[str, dict[str, Tally]] = {}
    where: dict[tuple[str, str], str] = {}
    for row in rows:
        model, key = str(row.data.get("model") or ""), question_key(row)
        _refuse_second(where, (model, key), row, "judgment")
        games = _games(row)
        stored = [_label(game, rules) for game in games]
        odd = sum(
            label != rules.verdict(text)
            for game, label in zip(games, stored, strict=True)
            if (text := _judgment_text(game)) is not None
        )
        category = row.data.get("category")
        found.setdefault(model, {})[key] = count_labels(
            stored, rules, category=str(category) if category else None, disagreements=odd
        )
    return found


def _games(row: RawRow) -> list[Mapping[str, Any] | None]:
    """Both games; None for one that is missing or null."""
    games = row.data.get("games")
    if not isinstance(games, list) or len(games) > _GAMES_A_QUESTION:
        raise DataError(
            f"{row.where}: games must be a list of {_GAMES_A_QUESTION}: each question is judged once in each order"
        )
    odd = [game for game in games if game is not None and not isinstance(game, Mapping)]
    if odd:
        raise DataError(f"{row.where}: a game is {odd[0]!r}, not an object with score and judgment")
    return [*games, *[None] * (_GAMES_A_QUESTION - len(games))]


def _label(game: Mapping[str, Any] | None, rules: LabelRules) -> str | None:
    if game is None:
        return None
    if "score" in game:
        return None if game["score"] is None else str(game["score"])
    text = _judgment_text(game)
    return None if text is None else rules.verdict(text)


def _judgment_text(game: Mapping[str, Any] | None) -> str | None:
    """A text (v0.1), or an object with the text in ``answer`` (v2)."""
    found = game.get("judgment") if game is not None else None
    if isinstance(found, Mapping):
        found = found.get("answer")
    return found if isinstance(found, str) else None


@dataclass
class _Battles:
    """Battles over one question while a file is read."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)


def _read_battles(rows: Sequence[RawRow], baseline: str) -> dict[str, dict[str, Tally]]:
    """Battle files repeat the row of a game as often as it counts, so a repeated row is no duplicate."""
    found: dict[str, dict[str, _Battles]] = {}
    for row in rows:
        sides = {"a": str(require(row, "model_a")), "b": str(require(row, "model_b"))}
        if list(sides.values()).count(baseline) != 1:
            raise DataError(
                f"{row.where}: {sides['a']!r} against {sides['b']!r}: one of the two must be the baseline "
                f"{baseline!r}. For arena_hard, baseline_model=NAME sets another"
            )
        winner = _WINNERS.get(str(row.data.get("winner")))
        if winner is None:
            raise DataError(
                f"{row.where}: winner = {row.data.get('winner')!r}: must be one of {', '.join(_WINNERS)}"
            )
        ours = "b" if sides["a"] == baseline else "a"
        result = "tie" if winner == "tie" else "won" if winner == ours else "lost"
        each = found.setdefault(sides[ours], {}).setdefault(question_key(row), _Battles())
        each.counts[result] += 1
        each.lines.append(row.where)
    return {
        model: {key: _battle_tally(key, each) for key, each in questions.items()}
        for model, questions in found.items()
    }


def _battle_tally(key: str, battles: _Battles) -> Tally:
    """Two games at most: each is a tie, or 1 or 3 battles that one side won. Anything else was written twice."""
    counts = battles.counts
    tally = Tally(counts["won"], counts["lost"], counts["tie"])
    if (tally.wins, tally.losses, tally.ties) not in _TWO_GAMES:
        raise DataError(
            f"{battles.lines[0]}: question {key!r} has {tally.wins} wins, {tally.losses} losses and {tally.ties} "
            f"ties of one model (lines {', '.join(line.rsplit(':', 1)[-1] for line in battles.lines)}): no two "
            "games give that (a game is one tie, or 1 or 3 battles for one side). It is in there twice: keep one"
        )
    return tally


_ONE_GAME = [(0, 0, 0), (1, 0, 0), (3, 0, 0), (0, 1, 0), (0, 3, 0), (0, 0, 1)]
_TWO_GAMES = {
    (one[0] + two[0], one[1] + two[1], one[2] + two[2]) for one in _ONE_GAME for two in _ONE_GAME
}


def _answer(row: RawRow) -> StoredAnswer:
    data = row.data
    if "choices" in data:
        try:
            turn = data["choices"][0]["turns"][0]
            text, inner = turn["content"], turn
        except (LookupError, TypeError) as error:
            raise DataError(
                f"{row.where}: choices: must hold choices[0].turns[0].content ({error!r})"
            ) from error
    elif "messages" in data:
        try:
            content = data["messages"][-1]["content"]
        except (LookupError, TypeError) as error:
            raise DataError(
                f"{row.where}: messages: the last one must hold the answer ({error!r})"
            ) from error
        text, inner = content.get("answer") if isinstance(content, Mapping) else content, {}
    else:
        raise DataError(
            f"{row.where}: no answer: neither 'choices' nor 'messages'; its columns: {columns(row)}"
        )
    metadata = {**inner, **(data.get("conv_metadata") or data.get("metadata") or {})}
    length = metadata.get("token_len")
    return StoredAnswer(
        None if text is None else str(text),
        None if length is None else int(length),
        published_counts(metadata),
    )


def _refuse_second(
    where: dict[tuple[str, str], str], key: tuple[str, str], row: RawRow, what: str
) -> None:
    if key in where:
        model, question = key
        raise DataError(
            f"{row.where}: a second {what} of {model or 'the model'} on question {question!r}; the first is at "
            f"{where[key]}. Keep one of them"
        )
    where[key] = row.where
