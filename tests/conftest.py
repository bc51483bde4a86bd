"""What every test directory shares: the real test data, a tokenizer made in place, and who runs what first."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

# Tiny matrices: a second thread only waits for the first, and several test processes share the cores.
# Set before anything imports torch; launched processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What DeepSpeed compiles names this environment's folders: in the cache of the user, which is torch's default, two
# checkouts would compile it anew at each turn, a minute of two cores.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

from tests.unit.tiny_tokenizers import TokenizerFactory, make_tokenizer

TESTS = Path(__file__).resolve().parent

# Files that take twenty seconds and more, the longest first: no worker is left alone with one at the end, and
# `make test-changed` leaves them out.
LONG = (
    "distributed/test_rollouts_vllm.py",
    "engines/test_contract.py",
    "engines/test_vllm.py",
    "distributed/test_parity.py",
    "rollouts/test_interrupted_rollouts.py",
    "engines/test_process.py",
    "recipes/test_real_pairs.py",
    "pipelines/test_ray.py",
    "parity/test_trl_steps.py",
    "pipelines/test_runner.py",
)

# Tests of one running engine, which is started once; the parameter of their fixture is part of their name.
ENGINE = re.compile(r"tests/engines/.*\[(hf|hf_process|vllm|vllm_server)\b")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes a whole file, or all tests of one engine: fixtures are made once."""
    from xdist.scheduler import LoadFileScheduling

    # Not by pytest-xdist's own `xdist_group` marks: 3.8 cannot pass them on under pytest 9.
    class FileOrEngine(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            engine = ENGINE.match(nodeid)
            return engine[1] if engine else super()._split_scope(nodeid)

    return FileOrEngine(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On workers, the longest first; stable, so that pytest's order within a file stays."""
    if hasattr(config, "workerinput"):
        places = {TESTS / name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data: ``$PREFOPT_TEST_DATA``, else ``../shared/data`` beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PREFOPT_TEST_DATA") or default)
    if folder.is_dir():
        return folder
    reason = f"no test data in {folder}; set PREFOPT_TEST_DATA"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> TokenizerFactory:
    """``tiny_tokenizer(chat="chatml", add_bos=True, …)``: `tests.unit.tiny_tokenizers.make_tokenizer`."""
    return make_tokenizer
