"""The engines under test, each started once, on a policy made in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import nn

from prefopt.engines.start import InTraining, Task, start_engine
from prefopt.model.load import load_policy
from prefopt.recipe.schema import (
    EngineSection,
    HFSection,
    ModelSection,
    VllmSection,
    VllmServerSection,
)
from tests.engines.policies import CONTEXT, Policies, write_policies
from tests.engines.processes import descendants, is_gone, wait_until

ENGINES = ("hf", "hf_process", "vllm", "vllm_server")
# Small and quick to start: no compilation, few sequences at once.
_VLLM: dict[str, Any] = {
    "enforce_eager": True,
    "options": {"max_num_seqs": 32, "kv_cache_memory_bytes": 2**28},
}
SECTIONS: dict[str, tuple[type[EngineSection], dict[str, Any]]] = {
    "hf": (HFSection, {"batch_size": 7}),
    "vllm": (VllmSection, _VLLM),
    "vllm_server": (VllmServerSection, _VLLM),
}


@dataclass
class Running:
    """An engine, and the model whose weights it must be using."""

    engine: Any
    kind: str
    policies: Policies
    directory: Path
    is_adapter: bool
    truth: nn.Module
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count())

    def push(self, parity: int | None = None) -> int:
        """Loads the next version (the next whose number is even or odd); returns its number."""
        version = next(v for v in self._versions if parity is None or v % 2 == parity)
        files, truth = self.policies.files(
            version, is_adapter=self.is_adapter, directory=self.directory
        )
        self.engine.load_policy(files)
        self.truth = truth
        return version


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return write_policies(tmp_path_factory.mktemp("policies"))


def engine_section(kind: str, **settings: Any) -> EngineSection:
    cls, keys = SECTIONS[kind.removesuffix("_process")]
    return cls(**{"timeout_s": 600.0, "startup_timeout_s": 800.0, **keys, **settings})


def make_engine(
    kind: str, policies: Policies, directory: Path, *, is_adapter: bool, **settings: Any
) -> Any:
    """An engine as a run builds it. An adapter policy starts as the first adapter."""
    path = policies.adapters[0] if is_adapter else policies.base
    model = ModelSection(path=str(path))
    policy = load_policy(model, None, seed=0)
    training = InTraining(policy, None, seed=0, separate_process=kind == "hf_process")
    task = Task(model, 0, CONTEXT, "cpu", directory / "logs", training)
    return start_engine(engine_section(kind, **settings), task).engine


@pytest.fixture(scope="package", params=ENGINES)
def running(
    request: pytest.FixtureRequest, policies: Policies, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """An engine that serves adapters."""
    directory = tmp_path_factory.mktemp(request.param)
    before = descendants()
    engine = make_engine(request.param, policies, directory, is_adapter=True)
    truth = policies.truth(policies.base)
    result = Running(engine, request.param, policies, directory, True, truth)
    result.push(0)
    yield result
    mine = [process for process in descendants() if process not in before]
    engine.close()
    engine.close()
    # No test can say so: only now is the engine closed. resource_tracker is Python's own and outlives all.
    left = [p for p in mine if not wait_until(lambda p=p: is_gone(p.pid) or _is_tracker(p))]
    assert not left, f"{request.param} left processes behind: {left}"


# One server more; a run pushes whole weights to one in tests/distributed/test_rollouts_vllm.py.
@pytest.fixture(params=[*ENGINES[:-1], pytest.param(ENGINES[-1], marks=pytest.mark.slow)])
def running_full(
    request: pytest.FixtureRequest, policies: Policies, tmp_path: Path
) -> Iterator[Running]:
    """An engine for full fine-tuning."""
    engine = make_engine(request.param, policies, tmp_path, is_adapter=False)
    truth = policies.truth(policies.base)
    yield Running(engine, request.param, policies, tmp_path, False, truth)
    engine.close()


def _is_tracker(process: psutil.Process) -> bool:
    return "resource_tracker" in " ".join(process.cmdline())
