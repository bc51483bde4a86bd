"""Loading a policy: the right weights, under the right name, with nothing left to chance or warnings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from prefopt.data.options import template_with
from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapters import (
    add_adapter,
    load_saved_adapter,
    merged_into_base,
    peft_kind,
)
from prefopt.model.distributed import loaded_whole
from prefopt.model.hashing import fresh_adapter_hash, weights_hash
from prefopt.model.precision import half_parameters, narrowed, widen
from prefopt.model.quantization import check_quantization, quantization_options
from prefopt.model.source import (
    LOAD_ERRORS,
    Source,
    adapter_config_file,
    check_adapter_base,
    fetch,
    first_line,
    load_config,
    resolve_source,
)
from prefopt.recipe.peft_config import peft_config
from prefopt.recipe.schema import ModelSection, PeftSection
from prefopt.storage.checksums import check_weights
from prefopt.storage.model_files import ADAPTER_CONFIG, BASE_FILE

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy (or a reward model) ready for its `LogpModel` (or `ScoreModel`)."""

    model: PreTrainedModel | PeftModel
    weights_hash: str
    """Names the weights as loaded, adapter included: the key of their reference log-probs."""
    description: str
    """Which weights these are, in words, adapter included."""
    is_peft: bool
    half: Mapping[str, torch.dtype] = field(default_factory=dict)
    """What trains of weights in half precision, with the dtype it came in and is saved in."""

    @property
    def saved_dtype(self) -> str:
        """Of the weights on disk, e.g. ``bfloat16``: what an engine that reads them serves."""
        first, parameter = next(iter(_base(self.model).named_parameters()))
        return str(self.half.get(first, parameter.dtype)).removeprefix("torch.")

    def to_save(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state``, in the dtypes it came in."""
        return narrowed(state, self.half)


@dataclass(frozen=True)
class _Plan:
    """What a policy is put together from."""

    source: Source
    merged: tuple[Path, ...]
    """Adapters to merge into the base, innermost first."""
    start: Path | None
    """Saved adapter to put on top."""
    new: PeftConfig | None
    """New adapter to put on top."""

    @property
    def adapters(self) -> list[Path]:
        """The saved adapters of the policy, innermost first."""
        return [*self.merged, *([self.start] if self.start is not None else [])]

    @property
    def base(self) -> Source:
        """What the topmost adapter sits on."""
        return self.source.below(len(self.merged))

    def describe(self, stored_as: str, *, changed: bool) -> str:
        revision = f" at {self.source.revision}" if self.source.revision else ""
        parts = [f"{self.source.name}{revision} ({stored_as})"]
        parts += [f"with adapter {path} merged" for path in self.merged]
        if self.start is not None:
            parts.append(f"with adapter {self.start}")
        if self.new is not None:
            kind = peft_kind(self.new)
            effect = "as initialised" if changed else "which changes nothing yet"
            parts.append(f"with a new {kind} adapter, {effect}")
        return ", ".join(parts)


def load_tokenizer(model: ModelSection) -> Any:
    """The tokenizer of a recipe, with its chat template, and a pad token that adds no embedding row.

    An adapter directory without tokenizer files takes its base's tokenizer.
    Raises: ModelError if there is none, or the template file cannot be read.
    """
    path = model.tokenizer or _tokenizer_home(model.path, model.revision)
    revision = model.revision if path == model.path else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=model.trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load a tokenizer from {path!r}: {first_line(error)}; set model.tokenizer"
        ) from error
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"model.chat_template = {model.chat_template!r}: {error}") from error
    if model.chat_template_kwargs:
        tokenizer.chat_template = template_with(tokenizer.chat_template, model.chat_template_kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_policy(
    model: ModelSection,
    peft: PeftSection | None,
    *,
    seed: int,
    trainable: bool = True,
    masters: bool = False,
) -> LoadedPolicy:
    """The policy of a recipe: the base, with a new adapter, a saved one, or none.

    ``model.path`` may be an adapter directory. It is trained on as it is where the recipe has no ``peft``
    section; under a new adapter it is merged into its base first.

    Args:
        seed: of the new adapter's initial values. The global random state is left as it was.
        trainable: False freezes everything (a reference).
        masters: hold what trains in float32, whatever it is saved in.

    Raises: ModelError for weights that are missing, damaged, for another base or not loadable here;
        ConfigError for a ``peft`` section that its type does not take.
    """
    with contextlib.nullcontext() if trainable else loaded_whole():
        plan = _plan(model, peft, trainable)
        policy, fresh = _assemble(plan, model, seed, trainable)
    base = _base(policy)
    base.config.use_cache = False
    if model.disable_dropout:
        disable_dropout(policy)
    if not trainable:
        policy.requires_grad_(False)
        policy.eval()
    half = half_parameters(policy)
    if masters:
        widen(policy)
    dtype = str(base.dtype).removeprefix("torch.")
    key = weights_hash(
        plan.source.directory,
        plan.adapters,
        dtype=dtype,
        quantization=model.quantization,
        num_merged=len(plan.merged),
        in_memory=fresh,
    )
    text = plan.describe(model.quantization or dtype, changed=fresh is not None)
    if half and masters:
        text += f", trained in float32 and saved in {_names(half)}"
    return LoadedPolicy(policy, key, text, isinstance(policy, PeftModel), half)


def _base(policy: Any) -> Any:
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def _names(half: Mapping[str, torch.dtype]) -> str:
    return " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in half.values()}))


def load_base(
    source: Source,
    model: ModelSection,
    *,
    auto: Any = AutoModelForCausalLM,
    new: tuple[str, ...] = (),
    **more: Any,
) -> PreTrainedModel:
    """The full model of ``source``, every parameter from its files.

    Args:
        auto: transformers' class of models to load it as.
        new: beginnings of the names of parameters that need not be in the files.
        more: goes to its ``from_pretrained``.

    Raises: ModelError if files are damaged, of another architecture, or lack parameters.
    """
    options = {"dtype": model.dtype, "trust_remote_code": model.trust_remote_code, **more}
    if source.name != str(source.directory):
        options["revision"] = source.revision or "main"
    if model.quantization is not None:
        options |= quantization_options(model)
    check_weights(source.directory)
    config = load_config(source, trust_remote_code=model.trust_remote_code)
    try:
        if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
            # SDPA takes no softcap and drops it silently: logits of a tiny Gemma 2 move by 1.4
            options["attn_implementation"] = "eager"
        result: Any = auto.from_pretrained(source.name, output_loading_info=True, **options)
        loaded, info = result
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load the model {source.name!r}: {type(error).__name__}: {first_line(error)}"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(new))
    if missing:
        raise ModelError(
            f"{source.name!r} lacks {len(missing)} parameters of {type(loaded).__name__}, e.g. "
            f"{missing[:3]}: they would be random. The files are incomplete, or this is not a causal LM."
        )
    return loaded


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: modules (adapters' too), attention attributes, configuration.

    Routers that draw noise in training (PhiMoE's choice of experts, jitter) stay as in evaluation.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout(
                name, value
            ):  # LlamaAttention.attention_dropout, …: copied from the config
                setattr(module, name, 0.0)
            elif "jitter" in name and value:
                module.eval()
                module.train = _stays_in_evaluation  # type: ignore[method-assign]
    base = _base(model)
    config = vars(getattr(base, "config", None) or nn.Identity())
    own = {name: value for name, value in config.items() if _is_dropout(name, value)}
    config |= dict.fromkeys(own, 0.0)
    base.prefopt_dropout = own or getattr(base, "prefopt_dropout", {})  # saved as it came


def _stays_in_evaluation(mode: bool = True) -> None:
    """In place of a module's `train`, which its parents call; knows no module, so that a copy can keep it."""
    del mode


def enable_gradient_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Recomputes activations in the backward pass; works with frozen embeddings under an adapter.

    Raises: ModelError if the architecture does not support it.
    """
    base = _base(model)
    try:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"train.gradient_checkpointing = true: {error} Leave it out.") from error
    if isinstance(model, PeftModel):
        base.enable_input_require_grads()
    base.config.use_cache = False


def check_vocabulary(model: PreTrainedModel | PeftModel, tokenizer: Any) -> None:
    """Raises ModelError if the tokenizer can produce an id that has no embedding row."""
    num_rows = num_embeddings(model)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= num_rows:
        raise ModelError(
            f"the tokenizer's {token!r} has id {largest}, the model has {num_rows} embedding "
            "rows: they do not belong together. Set model.tokenizer to the one this model was trained with."
        )


def num_embeddings(model: PreTrainedModel | PeftModel) -> int:
    """Rows of the input embedding, under whatever peft has wrapped around it."""
    embedding: Any = model.get_input_embeddings()
    while not hasattr(embedding, "num_embeddings"):
        # `base_layer` under LoRA on it, `original_module` beside rows or a copy of it that are trained
        inner = getattr(embedding, "base_layer", None)
        embedding = inner if inner is not None else embedding.original_module
    return embedding.num_embeddings


def _plan(model: ModelSection, peft: PeftSection | None, trainable: bool) -> _Plan:
    """Decides what goes where, and refuses what cannot; loads no weights."""
    new = peft_config(peft) if peft is not None and peft.adapter is None else None
    source = resolve_source(model.path, model.revision)
    merged, start = source.adapters, None
    if peft is None and source.adapters:
        merged, start = source.adapters[:-1], source.adapters[-1]
    elif peft is not None and peft.adapter is not None:
        start = _saved_adapter(peft, peft.adapter)
        if source.adapters[-1:] == (start,):  # model.path is that very adapter
            merged = source.adapters[:-1]
    plan = _Plan(source, merged, start, new)
    check_quantization(model, trains_base=trainable and new is None and start is None)
    _refuse_merge(plan, model)
    return plan


def _saved_adapter(peft: PeftSection, path: str) -> Path:
    if peft.options:
        keys = ", ".join(sorted(peft.options))
        raise ConfigError(
            f"peft.adapter = {path!r}: a saved adapter brings its own settings; remove {keys}"
        )
    config = adapter_config_file(path, None)
    if config is None:
        raise ModelError(f"peft.adapter = {path!r}: no {ADAPTER_CONFIG} there")
    return fetch(path, None, config.name).parent


def _assemble(
    plan: _Plan, model: ModelSection, seed: int, trainable: bool
) -> tuple[Any, str | None]:
    """The policy, and the hash of a new adapter that changes it from the start."""
    policy: Any = load_base(plan.source, model)
    _check_bases(plan, model.path)
    for adapter in plan.merged:
        policy = merged_into_base(load_saved_adapter(policy, adapter, trainable=False))
    fresh = None
    if plan.start is not None:
        policy = load_saved_adapter(policy, plan.start, trainable=trainable)
    elif plan.new is not None:
        with seeded(seed):
            policy = add_adapter(policy, plan.new)
        fresh = fresh_adapter_hash(policy)
    if isinstance(policy, PeftModel):
        _record_base(policy, plan.base)
    return policy, fresh


def _check_bases(plan: _Plan, path: str) -> None:
    """Each adapter on the base it was trained on; after loading, when a hub model's files are all here."""
    for number, adapter in enumerate(plan.adapters):
        followed = adapter in plan.source.adapters  # then it is its own name that led to the base
        if not followed or (adapter / BASE_FILE).is_file():
            base = plan.source.below(number)
            check_adapter_base(adapter, base, plan.source.name if followed else path)


def _record_base(model: PeftModel, base: Source) -> None:
    """Writes into the adapter's configuration which base it is for, by a path that no cwd changes."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(base.adapters[-1]) if base.adapters else base.name
    config.revision = None if base.adapters else base.revision
    # `save_adapter` puts it beside the adapter; an attribute, because a saved configuration takes no new key
    model.prefopt_base_hash = base.content  # type: ignore[assignment]


def _refuse_merge(plan: _Plan, model: ModelSection) -> None:
    reason = "its parameters are sharded (ZeRO-3)" if is_deepspeed_zero3_enabled() else None
    reason = f"it is quantised ({model.quantization})" if model.quantization else reason
    if plan.merged and reason:
        raise ModelError(
            f"model.path = {model.path!r}: an adapter must be merged into its base before another is added, "
            f"which cannot be done while {reason}. Run `prefopt merge {plan.merged[-1]} MERGED` and set "
            "model.path = MERGED"
        )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random values of ``seed`` inside; the global random state is left as it was."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _is_dropout(name: str, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and ("dropout" in name or name.endswith("pdrop"))


def _tokenizer_home(path: str, revision: str | None) -> str:
    """``path``, or the base's name if it is an adapter without tokenizer files."""
    source = resolve_source(path, revision)
    for adapter in reversed(source.adapters):
        if any((adapter / name).is_file() for name in _TOKENIZER_FILES):
            return str(adapter)
    return source.name if source.adapters else path
