"""Putting adapters on a model, saving what was trained, reading it back to prove it, and merging."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from prefopt.errors import ConfigError, ModelError, TrainingError
from prefopt.model.adapter_names import check_names, check_patterns
from prefopt.model.distributed import loaded_whole
from prefopt.model.end_tokens import write_end_tokens
from prefopt.recipe.peft_unfit import unfit
from prefopt.storage.cache import atomic_directory
from prefopt.storage.checksums import check_weights, write_sums
from prefopt.storage.model_files import ADAPTER_CONFIG, BASE_FILE, shard_names

log = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
SAVE_ERRORS = (
    OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AttributeError,
)  # fmt: skip
"""What transformers, peft and safetensors raise for what they cannot write."""

ADAPTER_FILE = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """``model`` under a new adapter. Raises: ConfigError where the two do not fit."""
    check_names(model, config)
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, LookupError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"peft (type {peft_kind(config)!r}) on {type(model).__name__}: {error}"
        ) from error
    assert isinstance(adapted, PeftModel)
    _name_feedforward(config)
    _check_saved_configuration(config)
    _check_bias(adapted, config)
    check_patterns(adapted, config)
    return adapted


def _name_feedforward(config: PeftConfig) -> None:
    """Names IA3's feed-forward modules as its targets are named by now, which is what peft reads back.

    Of targets found by ``all-linear`` peft keeps whole names, and each feed-forward module must be one of them.
    """
    if not isinstance(config, IA3Config):
        return
    if not all(
        isinstance(each, set) for each in (config.target_modules, config.feedforward_modules)
    ):
        return  # a pattern; peft makes sets of lists
    targets, named = set(config.target_modules or ()), set(config.feedforward_modules or ())
    if named <= targets:
        return
    found = {name: {target for target in targets if target.endswith(name)} for name in named}
    if all(found.values()):  # else `_check_saved_configuration` refuses it
        config.feedforward_modules = sorted(set().union(*found.values()))


def _check_bias(model: PeftModel, config: PeftConfig) -> None:
    """Raises ConfigError for biases that are to be trained, of modules that have none: peft trains the rest."""
    asked = getattr(config, "bias", "none")
    trained = (name for name, p in model.named_parameters() if p.requires_grad)
    if asked not in ("none", False, None) and not any("bias" in name for name in trained):
        raise ConfigError(
            f"peft.bias = {asked!r}: no module that it would train has a bias, so it would change nothing. "
            "Leave it out"
        )


def _check_saved_configuration(config: PeftConfig) -> None:
    """Raises ConfigError if what peft writes of a configuration, its targets chosen by now, does not read back."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            config.save_pretrained(directory)
            PeftConfig.from_pretrained(directory)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ConfigError(
                f"peft (type {peft_kind(config)!r}): the adapter could be trained, and not be loaded again: "
                f"{error}"
            ) from error


def save_final(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter (PEFT) or the whole model, with its tokenizer, and checks it; on one process only.

    The directory appears when it is complete and checked; one that was there before is replaced then.

    Args:
        model: not wrapped by DDP, DeepSpeed or FSDP.
        state_dict: gathered tensors, named as in ``model``, where the model's own are sharded (ZeRO-3, FSDP).

    Raises: TrainingError if it cannot be written, or reads back as something else.
    """
    with staged(Path(directory)) as staging:
        if isinstance(model, PeftModel):
            save_adapter(model, staging, state_dict=state_dict)
            write_end_tokens(model, staging)
        else:
            save_full(model, staging, state_dict)
        tokenizer.save_pretrained(staging)
        write_sums(staging)


def save_adapter(
    model: PeftModel, directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the adapter ``default`` into ``directory`` and checks it against the tensors in memory.

    Raises: TrainingError if what is on disk is not what was trained; OSError if it cannot be written.
    """
    target = Path(directory)
    # peft asks for the adapter's frozen tensors too (VeRA's projections, …), which training does not gather
    complete = {**model.state_dict(), **(state_dict or {})}
    options: dict[str, Any] = {"adapter_name": "default", "save_embedding_layers": False}
    expected = get_peft_model_state_dict(model, state_dict=complete, **options)
    _refuse_empty(expected)
    model.save_pretrained(
        str(target),
        state_dict=complete,
        selected_adapters=["default"],
        save_embedding_layers=False,  # rows are never added; "auto" would ask the hub about the base
    )
    (target / "README.md").unlink(missing_ok=True)  # peft's model card, a form nobody has filled in
    base_hash = getattr(model, "prefopt_base_hash", None)
    if base_hash is not None:
        record = {"base": model.peft_config["default"].base_model_name_or_path, "hash": base_hash}
        (target / BASE_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
    _compare(target, model, expected)


def peft_kind(config: PeftConfig) -> str:
    """The type of an adapter as a recipe writes it."""
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def merged_into_base(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter added to its weights; ``model`` is used up.

    Raises: ModelError for an adapter type that cannot be merged, or a merge that gives non-finite weights.
    """
    _untie_adapted(model)
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        kind = peft_kind(model.peft_config["default"])
        raise ModelError(
            f"this adapter (type {kind!r}) cannot be merged into its base: {error}"
        ) from error
    return merged


def _untie_adapted(model: PeftModel) -> None:
    """Gives the head weights of its own where it shares the input embedding's and one of the two is adapted.

    Under an adapter they are read apart, each with its own change; merged into one tensor, each change would reach
    both. peft sees to the configuration (``tie_word_embeddings``).
    """
    base: Any = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if not any(hasattr(end, "base_layer") for end in ends):
        return
    first, head = (getattr(end, "base_layer", end) for end in ends)
    if getattr(head, "weight", None) is first.weight:
        head.weight = nn.Parameter(first.weight.detach().clone(), requires_grad=False)


def saved_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a saved adapter or model, one at a time.

    Raises: OSError or SafetensorError if a file is missing or damaged.
    """
    for path in _tensor_files(directory):
        if path.suffix == ".bin":
            yield from torch.load(path, map_location="cpu", weights_only=True).items()
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                yield name, file.get_tensor(name)


def _tensor_files(directory: Path) -> list[Path]:
    if (directory / ADAPTER_CONFIG).is_file():
        old = directory / "adapter_model.bin"  # as peft wrote them until 2023; still on the hub
        new = directory / ADAPTER_FILE
        return [old if old.is_file() and not new.is_file() else new]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / shard for shard in shard_names(index)]
    return [directory / "model.safetensors"]


def save_full(
    model: PreTrainedModel, directory: Path, state_dict: Mapping[str, Tensor] | None
) -> None:
    state = dict(state_dict) if state_dict is not None else None
    _refuse_empty(state if state is not None else dict(model.named_parameters()))
    with _as_it_came(model):
        if state is not None:  # buffers a state of parameters lacks; sharded tensors it replaces
            state = {**dict(_persistent_buffers(model)), **state}
        with _generation_settings_aside(model):
            model.save_pretrained(directory, state_dict=state)
        write_generation_config(model, directory)
        if state_dict is not None:
            _record_dtype(directory, model, state_dict)
    own = state_dict if state_dict is not None else dict(model.named_parameters())
    _compare(directory, model, own)


@contextlib.contextmanager
def _as_it_came(model: Any) -> Iterator[None]:
    """The configuration without what training set in it: no dropout, and no cache, with which one generates."""
    settings = vars(model.config)
    came = {**getattr(model, "prefopt_dropout", {}), "use_cache": True}
    now = {name: settings[name] for name in came if name in settings}
    settings.update({name: came[name] for name in now})
    try:
        yield
    finally:
        settings.update(now)


def write_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Writes how the model generates, as it says, where it generates at all.

    Published models contradict themselves there (``do_sample: false`` beside a temperature). transformers loads
    such a file and refuses to write it: a run would lose its result over a setting it has not touched.
    """
    if model.can_generate():
        settings: Any = model.generation_config
        settings.to_json_file(directory / GENERATION_FILE, keys_to_pop=["compile_config"])


@contextlib.contextmanager
def _generation_settings_aside(model: Any) -> Iterator[None]:
    kept = getattr(model, "generation_config", None)
    if kept is not None:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        if kept is not None:
            model.generation_config = kept


def _record_dtype(directory: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """In config.json the dtype of what was written; transformers writes that of the model in memory."""
    dtypes = (state[name].dtype for name, _ in model.named_parameters() if name in state)
    saved = str(next(dtypes, model.dtype)).removeprefix("torch.")
    if saved == str(model.dtype).removeprefix("torch."):
        return
    own = model.config.dtype
    try:
        model.config.dtype = saved
        model.config.save_pretrained(directory)
    finally:
        model.config.dtype = own


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in names)


def _refuse_empty(state: Mapping[str, Tensor]) -> None:
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty or not state:
        raise TrainingError(
            f"{len(empty)} of {len(state)} tensors to save are empty (e.g. {empty[:2]}): they were not "
            "gathered from the other processes (ZeRO-3, FSDP). Please report this: no setting causes it."
        )


def _compare(directory: Path, model: Any, state: Mapping[str, Tensor]) -> None:
    """Raises TrainingError unless every tensor of ``state`` is in ``directory`` by its name, bit for bit."""
    waiting = dict(state)
    try:
        for name, saved in saved_tensors(directory):
            if name in waiting:
                _same(directory, name, saved, waiting.pop(name))
        if waiting and isinstance(model, PreTrainedModel):
            waiting = _compare_reloaded(directory, model, waiting)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainingError(f"{directory} cannot be read back: {error}") from error
    if waiting:
        raise TrainingError(
            f"{directory} lacks {len(waiting)} of {len(state)} trained tensors, e.g. {sorted(waiting)[:3]}"
        )


def _same(directory: Path, name: str, saved: Tensor, own: Tensor) -> None:
    if saved.shape != own.shape:
        raise TrainingError(
            f"{directory}: {name} has shape {tuple(saved.shape)} on disk and {tuple(own.shape)} in memory"
        )
    own = own.detach().to("cpu", saved.dtype).contiguous()
    # as bits: NaN equals itself, -0 differs from 0
    if not torch.equal(saved.reshape(-1).view(torch.uint8), own.reshape(-1).view(torch.uint8)):
        raise TrainingError(f"{directory}: the values of {name} on disk are not those in memory")


def _compare_reloaded(
    directory: Path, model: PreTrainedModel, waiting: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Loads the model: for architectures whose files name tensors otherwise than memory (fused experts)."""
    # Not Auto, which asks about code of the model's own; under FSDP2 a class derived from it.
    kind: Any = next(each for each in type(model).__mro__ if not each.__name__.startswith("FSDP"))
    with loaded_whole():
        loaded = kind.from_pretrained(directory, dtype="auto")
    for name, saved in loaded.state_dict().items():
        if name in waiting:
            _same(directory, name, saved, waiting.pop(name))
    return waiting


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yields an empty directory that takes ``directory``'s place when the block ends without an error."""
    try:
        with atomic_directory(directory) as staging:
            yield staging
    except SAVE_ERRORS as error:
        raise TrainingError(
            f"cannot write {directory}: {error}. What was there before is untouched; make room or choose "
            "another output directory, and start again: a run goes on from its last checkpoint."
        ) from error


def check_loaded_adapter(model: PeftModel, directory: Path) -> None:
    """Raises ModelError unless ``model`` holds every tensor of a saved adapter, and no others.

    peft loads what fits and only warns about the rest, which would then be trained from random values.
    """
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    try:
        saved = dict(saved_tensors(directory))
        odd = sorted(saved.keys() ^ own.keys())
        if odd:
            raise ModelError(
                f"the adapter {directory} does not fit the base: {len(odd)} tensors have no counterpart, "
                f"e.g. {odd[:2]}"
            )
        for name, tensor in saved.items():
            _same(directory, name, tensor, own[name])
    except TrainingError as error:
        raise ModelError(f"the adapter was not loaded as it was saved: {error}") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the adapter {directory}: {error}") from error


def load_saved_adapter(base: PreTrainedModel, directory: Path, *, trainable: bool) -> PeftModel:
    """The base with a saved adapter on it, every tensor accounted for.

    Raises: ModelError if the adapter is damaged, or its shapes or names are those of another base.
    """
    check_weights(directory)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Found missing adapter keys"
            )  # an error below
            model = PeftModel.from_pretrained(base, str(directory), is_trainable=trainable)
    except RuntimeError as error:
        raise ModelError(
            f"an adapter for another base: the tensors of {directory} do not fit "
            f"{base.config._name_or_path}: {str(error).strip()[:400]}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load the adapter {directory}: {error}") from error
    check_loaded_adapter(model, directory)
    config = model.peft_config["default"]
    for key, why in unfit(peft_kind(config), lambda name: getattr(config, name, None), new=False):
        raise ModelError(
            f"the adapter {directory} has {key} = {getattr(config, key, peft_kind(config))!r}: {why}"
        )
    return model
