"""The reader of YAML and of overrides: settings of any shape are config errors at worst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from data_pipelines.pipeline import parse_pipeline, presets
from data_pipelines.schedule.settings import ScheduleSettings
from eval.settings import EvalSettings, validated_settings
from prefopt.errors import ConfigError
from prefopt.recipe.load import draft_document, validated
from prefopt.recipe.yaml_file import Document, apply_overrides, read_yaml
from prefopt.recipe.yaml_values import dump_yaml
from prefopt.storage.json_text import half_surrogate
from tests.fuzz.mutations import fuzzed, mutated_bytes, mutated_value, steps

ROOT = Path(__file__).parents[2]
PATHS = sorted([*(ROOT / "recipes").rglob("*.yaml"), *presets().values()])
TEXTS = [path.read_bytes() for path in PATHS if path.stat().st_size < 1000]
VALUES = [read_yaml(path).raw for path in PATHS if path.stat().st_size < 1400]
OVERRIDES = [
    b"train.seed=1", b"data.train.0.path=x.jsonl", b"objective={name: dpo, beta: 0.1}", b"stages.0.keep=[a]",
    b"train.learning_rate=1e-6", b"model.path=null", b"peft={r: 8}",
    b"tasks.gsm8k.data=x.jsonl",
]  # fmt: skip


def validate(document: Document) -> None:
    """Everything that is known of settings without a file; each problem is a sentence that can be shown."""
    # plugins are user code, which a fuzzer must not find by chance
    raw = {key: value for key, value in document.raw.items() if key != "plugins"}
    document = Document(raw, document.origins, document.problems)
    try:
        for problem in _problems(document):
            problem.encode()
    except ConfigError as error:
        str(error).encode()


def _problems(document: Document) -> Sequence[str]:
    """Of the kind of file that it looks like."""
    raw, path = document.raw, Path("x.yaml")
    if "stages" in raw:
        parse_pipeline(document, path)
    elif "steps" in raw:
        return validated(ScheduleSettings, raw, document).problems
    elif "tasks" in raw:
        validated_settings(EvalSettings, document, path)
    else:
        return draft_document(document, path).problems
    return ()


def check_text(folder: Path, data: bytes) -> None:
    path = folder / "a.yaml"
    path.write_bytes(data)
    try:
        with steps():
            document = read_yaml(path)
            assert half_surrogate(document.raw) is None
            validate(document)
    except ConfigError as error:
        str(error).encode()


def check_value(folder: Path, value: Any) -> None:
    try:
        text = dump_yaml(value)
    except ValueError:  # a number of more digits than Python prints
        return
    check_text(folder, text.encode("utf-8", "surrogatepass"))


def check_overrides(folder: Path, case: tuple[list[bytes], dict[str, Any]]) -> None:
    del folder
    overrides, base = case
    items = [
        item.decode("utf-8", "surrogateescape") for item in overrides
    ]  # as Python decodes argv
    with steps():
        document = apply_overrides(Document(base), items)
        for problem in document.problems:
            assert problem.startswith("override ")
        validate(document)


test_texts, test_many_texts = fuzzed(mutated_bytes(TEXTS), check_text, share=0.5)
test_values, test_many_values = fuzzed(mutated_value(VALUES), check_value, share=0.25)
test_overrides, test_many_overrides = fuzzed(
    st.tuples(
        st.lists(mutated_bytes(OVERRIDES), min_size=1, max_size=2),
        st.sampled_from([VALUES[0], VALUES[-1], {}]),
    ),
    check_overrides,
    share=0.25,
)
