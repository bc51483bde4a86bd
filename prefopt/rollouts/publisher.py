"""Puts versions of the policy on disk, where engines and a resumed run find them."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator

from prefopt.engines.base import PolicyFiles
from prefopt.errors import ModelError
from prefopt.model.adapters import save_adapter, save_final
from prefopt.model.distributed import gathered_state, together, told_by_main
from prefopt.model.load import LoadedPolicy
from prefopt.model.logps import LogpModel
from prefopt.storage.checksums import check_weights, write_sums
from prefopt.training.checkpoint import writing

logger = logging.getLogger(__name__)

DIRECTORY = "policies"
_NAME = re.compile(r"step-(\d+)-[0-9a-f]+")
_PREFIX = "model."  # LogpModel holds the policy under this name


class PolicyPublisher:
    """Writes ``policies/step-<version>-<start>``: a PEFT adapter, or the whole model with tokenizer.

    ``<start>`` is drawn anew each time the run is started: engines cache by path, so the weights of a
    resumed run must not come under a path that its earlier life has used.

    Args:
        model: the prepared (wrapped) `LogpModel`.
        policy: the same policy, as loaded.
        tokenizer: saved with a whole model.
        run_dir: the run directory, on storage that every engine can read.
    """

    def __init__(
        self,
        model: Any,
        policy: LoadedPolicy,
        tokenizer: Any,
        accelerator: Accelerator,
        run_dir: Path,
    ) -> None:
        self.directory = run_dir.absolute() / DIRECTORY
        self.policy = policy
        self.tokenizer = tokenizer
        self.accelerator = accelerator
        self._engine = cast(LogpModel, accelerator.unwrap_model(model))
        (self._start,) = told_by_main(accelerator, os.urandom(4).hex())

    def write(self, version: int) -> PolicyFiles:
        """The policy of this moment on disk. A collective. Raises: TrainingError if it cannot be written."""
        path = self.directory / f"step-{version:08d}-{self._start}"
        is_peft = self.policy.is_peft
        named = self._engine.named_parameters()
        names = {name for name, p in named if p.requires_grad or not is_peft}
        state = gathered_state(self.accelerator, self._engine, names)
        with together(self.accelerator, f"the push of policy version {version}"):
            if self.accelerator.is_main_process:
                assert state is not None
                state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
                state = self.policy.to_save(state)
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._save(path, state)
        return PolicyFiles(version, path, is_peft)

    def find(self, version: int) -> PolicyFiles | None:
        """A version that an earlier start of this run wrote, the newest intact one if several did."""
        found = [path for path in self._all() if _version(path) == version]
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                check_weights(path)
            except ModelError as error:
                logger.warning("not sampled from: %s", error)
            else:
                return PolicyFiles(version, path, self.policy.is_peft)
        return None

    def prune(self, oldest: int) -> None:
        """Deletes versions before ``oldest``: no step to come samples with them."""
        if self.accelerator.is_main_process:
            for path in self._all():
                if _version(path) < oldest:
                    shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]

    def _save(self, path: Path, state: dict[str, Any]) -> None:
        # Written beside its name and renamed: a version is there whole or not at all.
        temporary = path.with_name(f".{path.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        if self.policy.is_peft:
            save_adapter(cast(Any, self.policy.model), temporary, state_dict=state)
            write_sums(temporary)
        else:
            save_final(self.policy.model, self.tokenizer, temporary, state_dict=state)
        temporary.rename(path)


def _version(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # `_all` lists no others
    return int(match[1])
