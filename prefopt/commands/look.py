"""What `prefopt check` sees of local inputs: the first rows of files, the chat template, the adapter's targets.

No weights are read; torch is imported only where a target is not found by the names in the weights' index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from prefopt.data.formats import Reading, canonical, prompt_reading, prompt_row, resolve
from prefopt.data.options import broken, template_variables
from prefopt.data.readers import RawRow
from prefopt.data.rows import column
from prefopt.data.sources import first_rows, open_source, source_name
from prefopt.errors import ConfigError, DataError, PrefoptError, suggest
from prefopt.recipe.checks import examine
from prefopt.recipe.checks.files import read_adapter_config
from prefopt.recipe.checks.rules import PROBE_PROMPTS, named_sources
from prefopt.recipe.local_paths import is_local, is_local_data
from prefopt.recipe.schema import ModelReference, Recipe, SourceSection
from prefopt.recipe.scored_rows import columns_read, part_names, unjudged
from prefopt.storage.json_text import parse_json

NUM_ROWS = 8
"""Rows looked at of each source: what is wrong with a column map is wrong with the first."""

_TOKENIZER_CONFIG, _INDEX = "tokenizer_config.json", "model.safetensors.index.json"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def examine_and_look(
    path: str, overrides: Sequence[str] = (), *, num_processes: int | None, assume_cuda: bool
) -> list[str]:
    """Notes about a recipe that is sound by the rules and by what is on this machine.

    Raises: ConfigError with every problem that the rules find, or, of a recipe that passes them, its inputs.
    """
    recipe, notes = examine(path, overrides, num_processes=num_processes, assume_cuda=assume_cuda)
    problems, not_seen = look(recipe)
    if problems:
        raise ConfigError(problems, source=path)
    return [*notes, *not_seen]


def look(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Problems of a checked recipe with what is on this machine, each with its key; and what was not looked at."""
    problems, chats, notes = [], [], []
    scored = _Scored(recipe)
    for key, source in named_sources(recipe):
        if not is_local_data(source.path):
            continue
        try:
            reading = _read_first(recipe, key, source, scored)
        except PrefoptError as error:
            problems.append(f"{key}: {error}")
            continue
        except ModuleNotFoundError as error:
            notes.append(f"not checked, because {error.name} is not installed: the rows of {key}")
            continue
        if reading.format != "text":
            chats.append(key)
    notes += scored.notes()
    problems += [*_missing_template(recipe, chats), *_missing_targets(recipe)]
    problems += [*_broken_template(recipe, chats), *_missing_shards(recipe), *_ids_beyond(recipe)]
    return problems, notes


class _Scored:
    """Which of the first rows of the prompts are scored, and by which signals."""

    def __init__(self, recipe: Recipe) -> None:
        self.signals = recipe.signals
        self._used: set[int] = set()
        self._missed: dict[str, tuple[int, int, str]] = {}
        self._sources: list[str] = []

    def add(self, key: str, source: SourceSection, rows: Sequence[RawRow]) -> None:
        """Raises: DataError for a row without a column that a signal for it reads."""
        name = source_name(source)
        self._sources.append(name)
        for row in rows:
            self._used |= {i for i, s in enumerate(self.signals) if s.rows.include(row.data, name)}
            why = unjudged(self.signals, row.data, name)
            if why is not None:
                count, _, first = self._missed.get(key, (0, 0, f"{row.where}: {why}"))
                self._missed[key] = (count + 1, len(rows), first)
            for column_name in columns_read(self.signals, row.data, name):
                column(row, column_name)

    def notes(self) -> Iterator[str]:
        for key, (count, total, first) in self._missed.items():
            yield (
                f"{key}: no signal is for {count} of its first {total} rows: such rows are left out and counted "
                f"(no_signal). {first}"
            )
        for index, name in enumerate(part_names(self.signals)) if self._sources else ():
            if index not in self._used:
                yield (
                    f"signals.{index}.only_where ({name}): holds for none of the first rows of "
                    f"{', '.join(self._sources)}. If that is a slip, the signal scores nothing"
                )


def _read_first(recipe: Recipe, key: str, source: SourceSection, scored: _Scored) -> Reading:
    """Reads the first rows as the run will. Raises: DataError, ConfigError for what they lack."""
    rows = list(first_rows(open_source(source), min(source.max_rows or NUM_ROWS, NUM_ROWS)))
    if not rows:
        raise DataError(f"{source.path} holds no rows")
    return _prompts(recipe, key, source, rows, scored) or _responses(recipe, source, rows)


def _prompts(
    recipe: Recipe, key: str, source: SourceSection, rows: list[RawRow], scored: _Scored
) -> Reading | None:
    """Of a source of prompts: their reading, and that what the signals read is there."""
    of_probe = key.startswith(PROBE_PROMPTS)
    regime = recipe.rollouts
    as_prompts = regime is not None and not recipe.data.prompts and key.startswith("data.train")
    if not (of_probe or key.startswith("data.prompts") or as_prompts):
        return None
    reading = prompt_reading(source, rows[0])
    for row in rows:
        prompt_row(row, reading)
        for name in _id_column(source):
            column(row, name)
    if not of_probe:
        scored.add(key, source, rows)
    return None if regime is not None and as_prompts and regime.offline_pairs else reading


def _responses(recipe: Recipe, source: SourceSection, rows: list[RawRow]) -> Reading:
    """Of a source of pairs, SFT rows or samples."""
    objective = recipe.objective
    if objective is None or not objective.reads_samples:
        readings = (resolve(source, rows[0], pairs=recipe.stage != "sft"),)
    else:
        from prefopt.data.samples import SampleNeeds, resolve_samples  # imports transformers

        needs = SampleNeeds.of(objective.needs, recipe.data)
        readings = resolve_samples(source, rows[0], needs)
    for row in rows:
        for reading in readings:
            canonical(row, reading)
        for name in _id_column(source):
            column(row, name)
    return readings[0]


def _id_column(source: SourceSection) -> tuple[str, ...]:
    return () if source.columns.id is None else (source.columns.id,)


def _missing_template(recipe: Recipe, chats: list[str]) -> Iterator[str]:
    model = recipe.model
    home = _home(model.tokenizer or model.path, lambda at: (at / _TOKENIZER_CONFIG).is_file())
    if not chats or model.chat_template is not None or home is None:
        return
    config = _json(home / _TOKENIZER_CONFIG)
    if config.get("chat_template") or any((home / name).exists() for name in _TEMPLATE_FILES):
        return
    yield (
        f"model.chat_template: {', '.join(chats)} holds chat messages, and the tokenizer in {home} has no chat "
        "template to render them with. Set it to a Jinja file, or format: text if the rows are plain strings"
    )


def _broken_template(recipe: Recipe, chats: list[str]) -> Iterator[str]:
    """A chat template that messages would meet and that is no Jinja."""
    model = recipe.model
    if not chats:
        return
    if model.chat_template is not None:
        texts = [_text(Path(model.chat_template).expanduser())]
    else:
        home = _home(model.tokenizer or model.path, lambda at: (at / _TOKENIZER_CONFIG).is_file())
        own = "" if home is None else _json(home / _TOKENIZER_CONFIG).get("chat_template")
        texts = ["" if home is None else _text(home / _TEMPLATE_FILES[0]), own]
    for text in texts:
        try:
            template_variables(text if isinstance(text, str) else "")
        except TemplateSyntaxError as error:
            yield f"model.chat_template: {broken(error)}"


def _missing_shards(recipe: Recipe) -> Iterator[str]:
    """Files of weights that an index names and that are not there: a download that was cut off."""
    for key, home in _models(recipe):
        shards = set(_weight_map(home).values())
        missing = sorted(name for name in shards if not (home / name).is_file())
        if missing and not (home / "model.safetensors").is_file():
            yield (
                f"{key}: {home} lacks {len(missing)} of the {len(shards)} files that its index "
                f"names, e.g. {missing[0]}: the download or the copy was cut off. Fetch it again"
            )


def _ids_beyond(recipe: Recipe) -> Iterator[str]:
    """Token ids of the recipe's tokenizer that a model has no embedding row for."""
    model = recipe.model
    file = _home(model.tokenizer or model.path, lambda at: (at / "tokenizer.json").is_file())
    ids = _token_ids(file / "tokenizer.json") if file is not None else {}
    if not ids:
        return
    token, largest = max(ids.items(), key=lambda item: item[1])
    for key, home in _models(recipe):
        config = _json(home / "config.json")
        text = config.get("text_config")
        rows = config.get("vocab_size") or (
            text.get("vocab_size") if isinstance(text, dict) else None
        )
        if isinstance(rows, int) and largest >= rows:
            yield (
                f"{key}: the model has {rows} embedding rows (vocab_size), and the tokenizer in {file} gives "
                f"{token!r} the id {largest}: they do not belong together. Set model.tokenizer to the one this "
                "model was trained with"
            )


def _token_ids(file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file)).get_vocab()
    except (
        Exception
    ):  # tokenizers raises nothing narrower; loading says what is wrong with the file
        return {}


def _models(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The recipe's models that are on this machine, adapters by their base."""
    paths = [("model.path", recipe.model.path)]
    if isinstance(recipe.reference, ModelReference):
        paths.append(("reference.path", recipe.reference.path))
    for key, path in paths:
        home = _home(path, lambda at: (at / "config.json").is_file())
        if home is not None:
            yield key, home


def _missing_targets(recipe: Recipe) -> Iterator[str]:
    """Modules that the adapter is to be put on and that the model does not have."""
    home = _home(recipe.model.path, lambda at: (at / "config.json").is_file())
    if recipe.peft is None or home is None:
        return
    for key in ("target_modules", "modules_to_save"):
        wanted = recipe.peft.options.get(key)
        if wanted is None or wanted == "all-linear":
            continue
        if _not_found(wanted, _names_in_weights(home)):
            names = _names_of_modules(home, recipe.model.trust_remote_code)
            for target in _not_found(wanted, names) if names else ():
                yield f"peft.{key}: {_explained(wanted, target, names)}"


def _not_found(wanted: Any, names: set[str]) -> list[str]:
    """As peft matches: a text is a regular expression of whole names, an item of a list the end of one."""
    if isinstance(wanted, str):
        try:
            found = any(re.fullmatch(wanted, name) for name in names)
        except re.error:
            found = False
        return [] if found else [wanted]
    ends = [name for name in wanted if isinstance(name, str)]
    return [end for end in ends if not any(n == end or n.endswith(f".{end}") for n in names)]


def _explained(wanted: Any, target: str, names: set[str]) -> str:
    last = {name.rpartition(".")[2] for name in names if not name.endswith(tuple("0123456789"))}
    parts = [part.strip() for part in target.split(",")]
    if isinstance(wanted, str) and set(parts) <= last:
        return (
            f"{target!r} is a text, which peft takes as a regular expression of whole names, and no module is "
            f"called so. Write a list: [{', '.join(parts)}]"
        )
    return f"no module of the model is called {target!r}; {suggest(target, last)}"


def _names_in_weights(home: Path) -> set[str]:
    """Module names by the names of their weights, which an index or a file's header tells at once."""
    index = home / _INDEX
    if index.is_file():
        tensors = list(_weight_map(home))
    else:
        tensors = [name for file in home.glob("*.safetensors") for name in _header(file)]
    return {name.rpartition(".")[0] for name in tensors}


def _header(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError):  # loading says what is wrong with it
        return []


def _names_of_modules(home: Path, trust_remote_code: bool) -> set[str]:
    """Every module of the model, built without memory; none where it cannot be built so."""
    try:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(home, trust_remote_code=trust_remote_code)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError):
        return set()
    return {name for name, _ in model.named_modules() if name}


def _home(path: str, holds: Callable[[Path], bool]) -> Path | None:
    """The directory of a local model; of an adapter without these files, that of its base; None on the hub."""
    for _ in range(8):  # an adapter on an adapter; a circle is for loading to tell
        if not is_local(path):
            return None
        directory = Path(path).expanduser()
        if holds(directory):
            return directory
        path = str((read_adapter_config(directory) or {}).get("base_model_name_or_path") or "")
        if not path:
            return None
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, ValueError):  # loading says what is wrong with it
        return ""


def _weight_map(home: Path) -> dict[str, str]:
    """Tensor -> file, of an index; empty for another shape, of which loading says what is wrong."""
    found = _json(home / _INDEX).get("weight_map")
    found = found if isinstance(found, dict) else {}
    return {name: file for name, file in found.items() if isinstance(file, str)}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
