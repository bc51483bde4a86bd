"""Is a checkpoint what was written? Its processes share the work, each over the files it reads itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from prefopt.errors import ModelError, PrefoptError, TrainingError
from prefopt.model.distributed import told_by_main
from prefopt.storage.checksums import damaged, file_names, shares, sums_of
from prefopt.storage.reading import SEAL, load_json, reading, sealed, unsealed
from prefopt.storage.run_files import STATE_FILE

_FILES = "files"
"""Key of the checksums in a checkpoint's state."""
_ADVICE = "Restore it, or rename that checkpoint: the same command then takes the one before"


def write_state(path: Path, state: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    """Writes a checkpoint's state, sealed, with the checksums of all else. Raises: OSError."""
    with (path / STATE_FILE).open("w", encoding="utf-8") as file:
        json.dump(sealed({**state, _FILES: sums}), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path, error: type[PrefoptError] = TrainingError) -> dict[str, Any]:
    """What a checkpoint's state says: its step, the position of the regime, open metrics, checksums.

    Raises: ``error`` if it is not what was written.
    """
    file = path / STATE_FILE
    keys = {"step": int, "num_processes": int, "regime": dict, "metrics": dict}
    with reading(file, "the state of a checkpoint", _ADVICE, error):
        state = load_json(file, keys)
        # Versions before had neither seal nor checksums.
        return unsealed(state) if SEAL in state or _FILES in state else state


def checkpoint_sums(accelerator: Accelerator, root: Path) -> dict[str, str]:
    """Checksums of all files of a checkpoint, on every process. A collective. Raises: OSError."""
    (names,) = told_by_main(accelerator, file_names(root))
    sizes = {name: (root / name).stat().st_size for name in names}
    found = sums_of(root, _share(accelerator, sizes))
    return dict(sorted(_gathered(accelerator, list(found.items()))))


def checkpoint_damage(accelerator: Accelerator, path: Path) -> list[str] | None:
    """What is wrong with a checkpoint, the same on every process; None if it has no checksums. A collective."""
    problem, sums = None, None
    try:
        sums = read_state(path).get(_FILES)
    except TrainingError as error:
        problem = str(error).removesuffix(f". {_ADVICE}")
    problem, sums = told_by_main(accelerator, problem, sums)  # all go the way that one process sees
    if problem is not None or sums is None:
        return None if problem is None else [problem]
    mine = _share(accelerator, {name: int(each.partition("-")[0]) for name, each in sums.items()})
    return sorted(_gathered(accelerator, damaged(path, sums, mine)))


def require_intact(path: Path) -> None:
    """Returns if a checkpoint is what was written, as far as it has checksums; by this process alone.

    Raises: ModelError naming the first files that are not.
    """
    problems = damaged(path, read_state(path, ModelError).get(_FILES) or {})
    if problems:
        raise ModelError(
            f"the checkpoint {path} is damaged ({'; '.join(problems[:3])}). Restore it, or take another one"
        )


def _share(accelerator: Accelerator, sizes: Mapping[str, int]) -> list[str]:
    return shares(sizes, accelerator.num_processes)[accelerator.process_index]


def _gathered(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    return gather_object(items) if accelerator.num_processes > 1 else items
