"""Rules about paths: what must exist, what must be writable, and what only the hub can tell."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.errors import ModelError
from prefopt.recipe.checks.rules import Finding, Surroundings, named_sources, rule
from prefopt.recipe.local_paths import is_local, is_local_data
from prefopt.recipe.run_directory import FINAL
from prefopt.recipe.schema import ModelReference, Recipe
from prefopt.storage import model_files as storage
from prefopt.storage.run_files import METRICS_FILE, RUN_FILE

# What training tools call the directories of a run: no hub repository is called so.
_OF_A_RUN = re.compile(r"final|best|last|(step|checkpoint|epoch)-\d+")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?")


_BASE = "base_model_name_or_path"


def read_adapter_config(directory: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a directory, None if it has none or it is not JSON."""
    try:
        found = storage.read_adapter_config(directory)
    except ModelError:
        return None
    base = found.get(_BASE)
    if isinstance(base, str):  # half of a surrogate pair names no file, and cannot be shown
        found[_BASE] = base.encode("utf-8", "backslashreplace").decode("utf-8")
    return found


@rule("data", "eval")
def data_files_exist(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    for key, source in named_sources(recipe):
        if is_local_data(source.path) and not _matches(source.path):
            yield Finding(f"{key}.path", _missing("file", source.path))


@rule("model", "peft", "reference", "data", "eval", "signals")
def hub_is_not_asked(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    """One note for all: a check works offline, so what is on the hub is taken on trust."""
    models = [recipe.model.path, recipe.model.tokenizer, recipe.peft and recipe.peft.adapter]
    models += [recipe.reference.path] if isinstance(recipe.reference, ModelReference) else []
    models += [signal.params.get("path") for signal in recipe.signals]
    names = [name for name in models if name and not is_local(name)]
    names += [source.path for _, source in named_sources(recipe) if not is_local_data(source.path)]
    if names:
        yield Finding(
            "", f"not checked, on the hub: {', '.join(dict.fromkeys(names))}", is_note=True
        )


@rule("model")
def model_directories_are_models(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    model = recipe.model
    yield from _model_findings("model.path", model.path)
    if is_local(model.path) and model.revision is not None:
        yield Finding(
            "model.revision", f"would be ignored: {model.path} is a local directory. Leave it out"
        )
    tokenizer = model.tokenizer
    if tokenizer and not is_local(tokenizer):
        yield from mistaken_for_hub("model.tokenizer", tokenizer)
    elif tokenizer and not Path(tokenizer).expanduser().is_dir():
        yield Finding("model.tokenizer", _missing("directory", tokenizer))
    if model.chat_template is not None and not Path(model.chat_template).expanduser().is_file():
        yield Finding(
            "model.chat_template", _missing("file", model.chat_template) + "; it takes a Jinja file"
        )


@rule("reference")
def reference_directory_is_a_model(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if isinstance(recipe.reference, ModelReference):
        yield from _model_findings("reference.path", recipe.reference.path)


@rule("train")
def checkpoint_exists(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    resume = recipe.train.resume
    if resume not in {"auto", "never"} and not Path(resume).expanduser().is_dir():
        yield Finding(
            "train.resume",
            "no such checkpoint directory; use 'auto' (newest in run.output_dir), 'never', or the "
            "path of one under checkpoints/",
        )


@rule("run")
def output_directory_is_writable(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    directory = Path(recipe.run.output_dir).expanduser()
    if directory.exists() and not directory.is_dir():
        yield Finding("run.output_dir", "is a file; the run needs a directory of its own")
        return
    if directory.is_symlink() and not directory.exists():
        yield Finding(
            "run.output_dir", f"is a link to {os.readlink(directory)}, which is not there; make it"
        )
        return
    if variable := _VARIABLE.search(recipe.run.output_dir):
        yield Finding("run.output_dir", f"a directory would be called {_unfilled(variable[0])}")
    yield from _in_the_way(directory)
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not existing.is_dir():
        yield Finding("run.output_dir", f"cannot be made: {existing} is a file")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "run.output_dir",
            f"cannot be written: no permission in {existing}. Choose another place",
        )


def _in_the_way(directory: Path) -> Iterator[Finding]:
    """What stands under a name that the run writes to, and is of another kind."""
    wanted = {FINAL: "directory", "checkpoints": "directory"}
    wanted |= dict.fromkeys((RUN_FILE, METRICS_FILE, "rejects.jsonl"), "file")
    for name, kind in wanted.items():
        path = directory / name
        if path.exists() and path.is_dir() != (kind == "directory"):
            yield Finding(
                "run.output_dir",
                f"{path} stands where the run writes a {kind}, and is none. Move it away, or choose another place",
            )


def _model_findings(key: str, path: str) -> Iterator[Finding]:
    if not is_local(path):
        yield from mistaken_for_hub(key, path)
        return
    directory = Path(path).expanduser()
    if not directory.is_dir():
        yield Finding(key, _missing("directory", path))
    elif not (directory / "config.json").is_file():
        config = read_adapter_config(directory)
        if config is None and (directory / FINAL / "config.json").is_file():
            yield Finding(key, f"is the directory of a run; its result is {directory / FINAL}")
            return
        if config is None and (directory / FINAL / storage.ADAPTER_CONFIG).is_file():
            yield Finding(
                key, f"is the directory of a run; its result is the adapter {directory / FINAL}"
            )
            return
        if config is None:
            yield Finding(
                key,
                "is not a model: the directory has neither config.json nor a readable "
                "adapter_config.json. Give a directory saved by save_pretrained, or a hub id",
            )
            return
        base = config.get("base_model_name_or_path")
        yield Finding(key, f"an adapter; its base is {base}", is_note=True)
        if base and is_local(base) and not Path(base).expanduser().is_dir():
            yield Finding(
                key,
                f"is an adapter whose base {base} is not on this machine; correct "
                "base_model_name_or_path in its adapter_config.json",
            )


def mistaken_for_hub(key: str, path: str) -> Iterator[Finding]:
    """A path that could be a hub id and is meant to be local: it is not asked for on the hub in vain."""
    head, _, last = path.rpartition("/")
    beside = [each.name for each in Path(head).iterdir()] if head and Path(head).is_dir() else []
    near = difflib.get_close_matches(last, beside, n=1)
    if near or _OF_A_RUN.fullmatch(last):
        hint = f"did you mean {head}/{near[0]}? " if near else ""
        yield Finding(
            key,
            f"looks like a local directory, and there is none (looked in {Path.cwd()}). {hint}A local path "
            "may begin with ./, a hub id is owner/name",
        )


def _matches(path: str) -> bool:
    pattern = str(Path(path).expanduser())
    return Path(pattern).exists() or bool(glob.glob(pattern, recursive=True))


def _missing(kind: str, path: str) -> str:
    """``no such file``, with the nearest name beside it and where a relative path was looked for."""
    full = Path(path).expanduser()
    if kind == "file" and full.is_dir():
        return "is a directory, and a file is needed"
    if kind == "directory" and full.is_file():
        return "is a file, and a directory is needed: name the one that holds it"
    if (variable := _VARIABLE.search(path)) is not None:
        return f"no such {kind}: it is looked for under {_unfilled(variable[0])}"
    names = os.listdir(full.parent) if full.parent.is_dir() else []
    near = difflib.get_close_matches(full.name, names, n=1)
    hint = f"; did you mean {full.parent / near[0]}?" if near else ""
    place = "" if full.is_absolute() else f" (looked in {Path.cwd()})"
    return f"no such {kind}{place}{hint}"


def _unfilled(variable: str) -> str:
    return (
        f"{variable}: variables are not filled in within a recipe. Write the path out, or give it on the command "
        "line, where the shell does"
    )
