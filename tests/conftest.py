"""Fixtures every test directory shares: the real test data, and a tokenizer made in place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny matrices: a second thread only waits for the first, and several test processes share the cores.
# Set before anything imports torch; launched processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.unit.tiny_tokenizers import TokenizerFactory, make_tokenizer


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
