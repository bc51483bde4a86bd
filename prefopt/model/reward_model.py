"""Loading what becomes a reward model: a language model's body, a new scalar head, perhaps an adapter."""

from __future__ import annotations

from peft import PeftModel, TaskType
from transformers import AutoModelForSequenceClassification

from prefopt.errors import ModelError
from prefopt.model.adapters import add_adapter, load_saved_adapter
from prefopt.model.hashing import weights_hash
from prefopt.model.load import LoadedPolicy, disable_dropout, load_base, seeded
from prefopt.model.precision import half_parameters, widen
from prefopt.model.source import Source, load_config, resolve_source
from prefopt.recipe.peft_config import peft_config
from prefopt.recipe.schema import ModelSection, PeftSection

# What may be missing from a language model's files: the head this stage trains from scratch.
_HEADS = ("score.", "classifier.", "classification_head.")


def load_reward_model(
    model: ModelSection,
    peft: PeftSection | None,
    *,
    seed: int,
    pad_token_id: int | None,
    masters: bool = False,
) -> LoadedPolicy:
    """A sequence classifier with one output, which is read at the last token that is not padding.

    The head is always trained in full, beside the adapter where there is one, and saved with it.

    Args:
        model: where the body comes from; an adapter directory is refused, because its head would be new.
        peft: the adapter to train, or None for full fine-tuning.
        seed: of the head's and the adapter's initial values; the global random state is left as it was.
        pad_token_id: tells the head where a padded row ends.
        masters: hold what trains in float32, whatever it is saved in.

    Raises: ModelError if it cannot be loaded or lacks weights; ConfigError for a bad ``peft`` section.
    """
    source = resolve_source(model.path, model.revision)
    if source.adapters:
        raise ModelError(
            f"model.path = {model.path!r} is an adapter: a reward model starts from a full model. Run "
            f"`prefopt merge {model.path} MERGED` and set model.path = MERGED"
        )
    _refuse_classifier(source, model)
    auto = AutoModelForSequenceClassification
    with seeded(seed):
        result = load_base(source, model, auto=auto, new=_HEADS, num_labels=1)
        result.config.get_text_config().pad_token_id = pad_token_id
        result.config.use_cache = False
        dtype = str(result.dtype).removeprefix("torch.")
        if peft is not None:
            # This task type makes peft leave the head out of the adapter and train and save it in full.
            options = {**peft.options, "task_type": TaskType.SEQ_CLS.value}
            result = add_adapter(result, peft_config(PeftSection(type=peft.type, **options)))
    if model.disable_dropout:
        disable_dropout(result)
    half = half_parameters(result)
    if masters:
        widen(result)
    return LoadedPolicy(
        model=result,
        weights_hash=weights_hash(source.directory, dtype=dtype),
        description=f"{source.name} ({dtype}), with a head for scores",
        is_peft=isinstance(result, PeftModel),
        half=half,
    )


def load_saved_reward_model(
    source: Source, model: ModelSection, pad_token_id: int | None
) -> PeftModel:
    """A reward model's adapter, frozen, on its base; the head is in the adapter.

    Raises: ModelError for one on another adapter, or that does not fit.
    """
    if len(source.adapters) != 1:
        raise ModelError(
            f"{source.adapters[-1]} is a reward model's adapter on another adapter: merge that one first, and "
            "train the reward model on the result"
        )
    auto = AutoModelForSequenceClassification
    base = load_base(source, model, auto=auto, new=_HEADS, num_labels=1)
    base.config.get_text_config().pad_token_id = pad_token_id
    result = load_saved_adapter(base, source.adapters[0], trainable=False)
    disable_dropout(result)
    result.eval()
    return result


def _refuse_classifier(source: Source, model: ModelSection) -> None:
    """Raises ModelError for a classifier of several labels, whose head is no score; a language model has none."""
    config = load_config(source, trust_remote_code=model.trust_remote_code)
    kinds = [str(kind) for kind in config.architectures or ()]
    if config.num_labels != 1 and any("SequenceClassification" in kind for kind in kinds):
        raise ModelError(
            f"model.path = {model.path!r}: a {kinds[0]} with {config.num_labels} labels, and a reward model has "
            "one: its score. Start from one with num_labels: 1, or from a language model, which gets a new head"
        )
