"""Sentences for schema errors: what was set, what is required, what the key is, what to do instead."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from prefopt.errors import suggest
from prefopt.recipe.schema import PeftSection, Recipe
from prefopt.recipe.yaml_file import Document, KeyPath

# Keys people bring from other tools or from papers, with what to write here.
RENAMED = {
    "attn_implementation": "the token layout decides; see model.layout",
    "beta1": "here it is train.adam_beta1",
    "bf16": "write train.precision: bf16",
    "cpo_alpha": "here it is objective.nll_weight",
    "dataset_mixer": "list the sources under data.train",
    "dataset_name": "here it is data.train.0.path",
    "eval_every": "here it is eval.every",
    "eval_steps": "here it is eval.every",
    "evaluation_strategy": "set eval.every, in steps",
    "fp16": "write train.precision: fp16",
    "gamma_beta_ratio": "here it is objective.gamma = gamma_beta_ratio * beta",
    "gradient_accumulation_steps": "it is derived from train.global_batch_size; leave it out",
    "lease_s": "there are no leases: one command hands out the shards, on several machines through "
    "executor.name=ray; leave it out",
    "load_in_4bit": "write model.quantization: 4bit",
    "load_in_8bit": "write model.quantization: 8bit",
    "logging_steps": "here it is train.log_every",
    "lora_r": "here it is peft.r",
    "lora_target_modules": "here it is peft.target_modules",
    "loss_type": "here it is objective.name",
    "lr": "here it is train.learning_rate",
    "lr_scheduler_type": "here it is train.lr_scheduler",
    "max_length": "here it is data.max_length_tokens",
    "max_prompt_length": "here it is data.max_prompt_tokens",
    "model_name_or_path": "here it is model.path",
    "num_train_epochs": "here it is train.num_epochs",
    "optim": "here it is train.optimizer",
    "per_device_train_batch_size": "here it is train.micro_batch_size; what a recipe fixes is "
    "train.global_batch_size",
    "ref_model_name_or_path": "here it is reference.path, with reference.name: model",
    "report_to": "here it is run.trackers",
    "rpo_alpha": "here it is objective.nll_weight",
    "run_name": "here it is run.name",
    "save_steps": "here it is train.save_every",
    "save_total_limit": "here it is train.keep_checkpoints",
    "sft_weight": "here it is objective.nll_weight",
    "simpo_gamma": "here it is objective.gamma",
    "torch_dtype": "here it is model.dtype",
    "warmup_ratio": "here it is train.warmup_frac",
    "warmup_steps": "set train.warmup_frac, a share of all steps",
}

# pydantic error type -> what is required, filled from the error's context.
REQUIREMENTS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a section of keys",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "literal_error": "must be {expected}",
    "model_type": "must be a section of keys",
    "string_type": "must be text",
    "too_short": "must hold at least {min_length} item(s)",
    "tuple_type": "must be a list",
}


def show_value(value: Any) -> str:
    """A value as YAML would have it, for ``key = value``."""
    try:
        return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    except TypeError:
        return repr(value)


def explain(item: Mapping[str, Any], document: Document, known: Iterable[str] = ()) -> str:
    """One sentence or two for one pydantic error.

    Args:
        item: an entry of ``ValidationError.errors()``, its ``loc`` counted from the recipe's root.
        document: the recipe as written, for line numbers.
        known: keys valid where the error is, if the recipe schema does not know them (objectives).
    """
    path: KeyPath = tuple(item["loc"])
    key = ".".join(map(str, path))
    where = document.origin(path)
    if item["type"] == "extra_forbidden":
        return f"{where}{key}: unknown key; {_hint(path, set(known) or _known_keys(path))}"
    if item["type"] == "missing":
        doc = document_string(path)
        return f"{where}{key} is missing{': ' + doc if doc else ''}"
    value = item["input"]
    shown = "" if isinstance(value, dict | list | tuple) else f" = {show_value(value)}"
    template = REQUIREMENTS.get(item["type"])
    required = template.format(**item.get("ctx", {})) if template else _lower(item["msg"])
    return f"{where}{key}{shown}: {required}{_remedy(item)}{_what_it_is(path)}"


def document_string(path: KeyPath) -> str | None:
    """The documentation of a key of the schema, on one line; None for a key it does not have."""
    section = _section(path)
    field = section.model_fields.get(str(path[-1])) if section else None
    return " ".join(field.description.split()) if field and field.description else None


def sections(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every section of the schema as ``(dotted name, class)``; list items are written ``N``."""
    yield prefix, model
    for name, field in model.model_fields.items():
        inner = _section_class(field.annotation)
        if inner is not None:
            item = ".N" if "tuple" in str(field.annotation) else ""
            yield from sections(inner, f"{prefix}.{name}{item}".lstrip("."))


def _hint(path: KeyPath, known: set[str]) -> str:
    """What to write instead of an unknown key: a renamed one, the nearest here, or one elsewhere."""
    name = str(path[-1])
    if name in RENAMED:
        return RENAMED[name]
    if difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return suggest(name, known)
    elsewhere: dict[str, list[str]] = {}
    for dotted, section in sections():
        for field in section.model_fields:
            elsewhere.setdefault(field, []).append(f"{dotted}.{field}".lstrip("."))
    near = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.85)
    if near:
        return f"did you mean {' or '.join(elsewhere[near[0]])}?"
    return suggest(name, known)


def _remedy(item: Mapping[str, Any]) -> str:
    """What to write instead, where the value tells, ending the sentence."""
    kind, value = item["type"], item["input"]
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes."
    if kind in {"int_type", "float_type"} and isinstance(value, str) and _is_number(value):
        return ", without quotes."
    if kind == "tuple_type" and isinstance(value, str):
        return f": [{value}]."
    if kind == "model_type" and isinstance(value, str):
        return ", one a line under it, or {key: value}."
    if kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value, _choices(item), n=1, cutoff=0.6)
        return f"; did you mean {near[0]!r}?" if near else "."
    return "."


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _choices(item: Mapping[str, Any]) -> list[str]:
    expected = str(item["ctx"]["expected"]).replace(" or ", ", ")
    return [choice.strip("'") for choice in expected.split(", ")]


def _what_it_is(path: KeyPath) -> str:
    """The first sentence of the key's documentation, with a leading space, where it has one."""
    doc = document_string(path)
    if not doc:
        return ""
    sentence = doc.split(". ")[0].rstrip(".…, ")
    return f" {sentence}."


def _section(path: KeyPath) -> type[BaseModel] | None:
    """The schema class of the section that holds the last key of ``path``."""
    model: type[BaseModel] | None = Recipe
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = _section_class(field.annotation) if field else None
        if model is None:
            return None
    return model


def _section_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := _section_class(a))), None)


def _known_keys(path: KeyPath) -> set[str]:
    section = _section(path)
    return set(section.model_fields) if section and section is not PeftSection else set()


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]
