"""Length-controlled win rate: what a judge would have preferred had both answers been equally long.

A logistic regression of a model's preferences on length difference, instruction difficulty and the model,
fitted together with a published calibration; the length term is then taken out.
Source: Dubois et al. 2024, arXiv:2404.04475; tatsu-lab/alpaca_eval@cd543a1, ``length_controlled_v1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.sources import file_or_hub_rows, file_rows, package_file
from eval.tasks._alpaca_instructions import NUM_INSTRUCTIONS
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError, DataError

HUB = "tatsu-lab/alpaca_eval"
FILE = "df_gamed.csv"

_PARENTS = 2
"""Folders above a file's own that are searched for the calibration."""
_GAMED_WEIGHT = 0.2 / 2
"""λ over the number of gamed baselines."""
_NUM_FOLDS = 5
_C = np.logspace(-4, 4, 10)
"""Inverse strengths of the L1 penalty that cross-validation chooses from."""
_SEED = 123


@dataclass(frozen=True)
class Calibration:
    """The published judgments of two gamed baselines (told to be concise, to be verbose), and difficulties."""

    origin: str
    """The file, package or hub data set, for the notes of a result."""
    wins: np.ndarray
    """(N,) a gamed answer's probability of being preferred, in [0, 1]."""
    lengths: np.ndarray
    """(N,) standardised length differences, baseline minus gamed answer."""
    gamed_difficulty: np.ndarray
    """(N,)"""
    difficulty: np.ndarray
    """(805,) by the instruction's number, in logits: the higher, the more often the reference answer loses."""


def find_calibration(option: str, directory: str | None, files: Sequence[Path]) -> Calibration:
    """The calibration in ``directory``; else near ``files``, in an installed alpaca_eval, or on the hub.

    Args:
        option: what the user sets to give a folder, e.g. ``tasks.alpaca_eval2.calibration``; for errors.
        directory: a folder that holds df_gamed.csv, or None.
        files: what is read or run on: the calibration may lie beside them or up to two folders above.

    Raises: ConfigError naming every place that was searched; DataError for a broken file.
    """
    if directory is not None:
        path = Path(directory).expanduser() / FILE
        if not path.is_file():
            raise ConfigError(f"{option} = {directory!r}: there is no {FILE} in it")
        return _calibration(file_rows(path), str(path))
    for path in _candidates(files):
        if path.is_file():
            return _calibration(file_rows(path), str(path))
    try:
        rows = file_or_hub_rows(option, None, repo=HUB, file=FILE)
    except ConfigError as error:
        near = [str(path.parent) for path in _candidates(files)]
        raise ConfigError(
            f"{option} is missing: the length-controlled win rate needs {FILE}, and it is neither in "
            f"{', '.join([*near, 'an installed alpaca_eval'])}, nor to be had from the hub data set {HUB} "
            f"({error.problems[0]}). Fetch {FILE} from there and give its folder: {option}=DIR (eval score: "
            "--calibration DIR)"
        ) from error
    return _calibration(rows, f"hub {HUB}")


def length_controlled(
    wins: np.ndarray, lengths: np.ndarray, numbers: np.ndarray, calibration: Calibration
) -> np.ndarray:
    """Each instruction's probability that the model's answer is preferred at equal length, (R,) fp64.

        logit P(win_i) = φ tanh(d_i) + γ difficulty_i + θ,  and without the first term for the prediction

    φ and γ are fitted to the model's and (at a tenth of the weight) the gamed rows, θ to the model's alone. Soft
    labels, no intercept, L1 penalty chosen by 5-fold cross-validation with liblinear: which stops early, so that
    published numbers are its own and up to 0.1 points from the exact optimum's.

    Args:
        wins: (R,) preferences in [0, 1], 1 is the model's; rows that are NaN are predicted but not fitted.
        lengths: (R,) characters of the baseline's answer minus those of the model's; not all the same.
        numbers: (R,) the instructions' numbers.
    """
    difficulty = calibration.difficulty[numbers]
    d = lengths / lengths.std(ddof=1)
    judged = ~np.isnan(wins)
    columns = [np.tanh(d[judged]), difficulty[judged], np.ones(judged.sum())]
    gamed = [np.tanh(calibration.lengths), calibration.gamed_difficulty]
    gamed.append(np.zeros(len(calibration.wins)))
    # Folds go by position: the published fit has the gamed rows first.
    features = np.concatenate([np.stack(gamed, 1), np.stack(columns, 1)])
    targets = np.concatenate([calibration.wins, wins[judged]])
    weights = np.concatenate([np.full(len(calibration.wins), _GAMED_WEIGHT), np.ones(judged.sum())])
    _, gamma, theta = _fit(features, targets, weights)
    return _sigmoid(gamma * difficulty + theta)


def _fit(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients (3,) at the penalty with the least loss on held-out rows.

    What LogisticRegressionCV does with GroupKFold and a scorer for soft labels, without its routing of
    metadata, which has changed between versions of scikit-learn.
    """
    from sklearn.model_selection import GroupKFold

    rows = np.arange(len(targets))
    losses = np.zeros(len(_C))
    # The two copies of a row (see `_fit_at`) share a fold.
    both = np.concatenate([rows, rows])
    for train, test in GroupKFold(_NUM_FOLDS).split(both, groups=both):
        kept, held_out = train[train < len(rows)], test[test < len(rows)]
        for index, c in enumerate(_C):
            coefficients = _fit_at(c, features[kept], targets[kept], weights[kept])
            logits = features[held_out] @ coefficients
            loss = np.logaddexp(0, -logits) + (1 - targets[held_out]) * logits
            losses[index] += (weights[held_out] * loss).mean()
    return _fit_at(_C[losses.argmin()], features, targets, weights)


def _fit_at(c: float, features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """L1-penalised logistic regression on soft labels: each row once as a win and once as a loss, weighted."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=c, solver="liblinear", fit_intercept=False, random_state=_SEED, **_l1_penalty()
    )
    model.fit(
        np.concatenate([features, features]),
        np.repeat([1, 0], len(targets)),
        sample_weight=np.concatenate([targets * weights, (1 - targets) * weights]),
    )
    return model.coef_[0]


def _l1_penalty() -> dict[str, Any]:
    """scikit-learn 1.8 renamed it; drop the old name at scikit-learn >= 1.8."""
    import sklearn

    renamed = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)
    return {"l1_ratio": 1.0} if renamed else {"penalty": "l1"}


def _candidates(files: Sequence[Path]) -> Iterator[Path]:
    """Where the file may lie: by the files in hand, then in the publishing package."""
    for file in files:
        folder = file.expanduser().absolute().parent
        yield from (each / FILE for each in (folder, *folder.parents[:_PARENTS]))
    package = package_file("alpaca_eval")
    if package is not None:
        yield from sorted(package.rglob(FILE))


def _calibration(rows: Sequence[RawRow], origin: str) -> Calibration:
    names = ("index", "preference", "std_delta_len", "instruction_difficulty")
    table = np.array([[_number(row, name) for name in names] for row in rows])
    numbers = table[:, 0].astype(int) if len(rows) else np.array([], int)
    if sorted(set(numbers)) != list(range(NUM_INSTRUCTIONS)):
        raise DataError(
            f"{origin}: holds {len(set(numbers))} instructions, must hold 0 to {NUM_INSTRUCTIONS - 1} in its "
            "column index; fetch it again"
        )
    difficulty = np.empty(NUM_INSTRUCTIONS)
    difficulty[numbers] = table[:, 3]
    return Calibration(origin, table[:, 1], table[:, 2], table[:, 3], difficulty)


def _number(row: RawRow, name: str) -> float:
    try:
        return float(row.data[name])
    except KeyError:
        raise DataError(
            f"{row.where}: no column {name!r}; its columns: {', '.join(row.data)}"
        ) from None
    except (TypeError, ValueError):
        raise DataError(f"{row.where}: {name} = {row.data[name]!r}: must be a number") from None


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))  # no overflow for any logit
