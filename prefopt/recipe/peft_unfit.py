"""Adapters that need more than their layers, and so would train nothing here, or something else.

peft builds them all without a word. What each needs is done by peft's own forward, by its examples, or by a
trainer that knows of it: a pass over data, ids of tasks, an own forward, a term of the loss, a call after each
step. Everything else that peft has is run by tests/unit/test_peft_types.py: trained, saved, merged and reloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_VIRTUAL = (
    "adds virtual tokens to the prompt, which token log-probs and shared prompts do not have; use an adapter "
    "type such as 'lora'"
)

_TYPES = {
    **dict.fromkeys(
        [
            "prompt_tuning",
            "multitask_prompt_tuning",
            "p_tuning",
            "prefix_tuning",
            "cpt",
            "cartridge",
        ],
        _VIRTUAL,
    ),
    "adaption_prompt": "attends to prompts of its own inside the attention layers, which packed rows and vLLM "
    "do not have; use 'lora'",
    "adalora": "prunes its ranks between optimizer steps, which this trainer does not call for, so it would "
    "train at its initial rank; use 'lora'",
    "poly": "needs the id of a task with every row, and rows have none; use 'lora'",
    "xlora": "mixes adapters that are trained already, in a forward of its own; train one with 'lora'",
    "shadow": "runs a second model beside the first, in a forward and with a loss of its own; use 'lora'",
    "lily": "routes every token by the mean over all tokens of a forward, so log-probs would depend on which "
    "rows share one; use 'lora'",
    "pvera": "draws its weights anew in every training forward, so a text has no one log-prob; use 'vera'",
}
"""peft type -> why it is refused, and what to use."""

_DATA_PASS = (
    "needs a pass over data before training, which is not made here: it would train as plain LoRA"
)
_INITS = {
    "eva": f"{_DATA_PASS}. Use 'pissa', 'olora' or 'orthogonal'",
    "lora_ga": f"{_DATA_PASS}. Use 'pissa', 'olora' or 'orthogonal'",
    "corda": "needs a pass over data before training, which is not made here. Use 'pissa'",
    "loftq": "puts quantised weights in the base's place, which reloading the adapter does not repeat: what is "
    "saved would not be what was trained. Use 'pissa', or model.quantization with 'lora'",
}


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _has_terms(value: Any) -> bool:
    """Do KaSA's two regularisation terms weigh anything? Both do by default."""
    if value is None:
        return False
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return any(given.get(name, 1.0) for name in ("beta", "gamma"))


# (type, key) -> does this value need more than the layers, and why it is refused.
_OPTIONS: dict[tuple[str, str], tuple[Callable[[Any], bool], str]] = {
    ("lora", "alora_invocation_tokens"): (
        _is_set,
        "activated LoRA acts only after these tokens, in peft's own forward, which log-probs do not go through: "
        "nothing would be trained. Leave it out: plain LoRA acts on every token",
    ),
    ("lora", "arrow_config"): (
        _is_set,
        "routes between adapters that are trained already. Train one without it",
    ),
    ("lora", "monteclora_config"): (
        _is_set,
        "draws its weights anew in every training forward and adds a term to the loss, which this trainer does "
        "not: a text has no one log-prob. Leave it out",
    ),
    ("lora", "velora_config"): (
        _is_set,
        "compresses activations by averages over a forward, so the gradient would depend on which rows share "
        "one. Leave it out; train.gradient_checkpointing saves memory and changes nothing",
    ),
    ("lora", "kasa_config"): (
        _has_terms,
        "adds two terms to the loss, which this trainer does not. Set beta: 0 and gamma: 0 in it to train "
        "without them",
    ),
    ("lora", "use_qalora"): (
        _is_set,
        "acts on GPTQ weights only, which are not loaded here: it would train as plain LoRA. Leave it out",
    ),
    ("lora", "megatron_config"): (_is_set, "is for Megatron's layers, which are not loaded here. Leave it out"),
    ("lora", "layer_replication"): (
        _is_set,
        "stacks layers of the base several times over one set of weights, so the adapter cannot be merged, nor "
        "served by vLLM. Build the deeper model first, and set model.path to it",
    ),
    ("adamss", "use_asa"): (
        _is_set,
        "chooses its subspaces between optimizer steps, which this trainer does not call for. Set it to false",
    ),
}  # fmt: skip


def unfit(kind: str, option: Callable[[str], Any], *, new: bool) -> Iterator[tuple[str, str]]:
    """``(key, why)`` of everything about an adapter that cannot be trained rightly here.

    Args:
        kind: the peft type, in small letters.
        option: the value of a key, None where it is not set.
        new: False for a saved adapter, whose initial values no longer matter.
    """
    if kind in _TYPES:
        yield "type", _TYPES[kind]
    for (owner, key), (needs_more, why) in _OPTIONS.items():
        if kind == owner and needs_more(option(key)):
            yield key, why
    if kind == "lora" and new:
        yield from _unfit_start(option("init_lora_weights"))


def _unfit_start(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and value in _INITS:
        yield "init_lora_weights", _INITS[value]
    if str(value).startswith("pissa_niter"):
        # measured: reloading redraws the random SVD, and the logits of a tiny Llama move by 5
        yield (
            "init_lora_weights",
            "'pissa_niter_…' splits the base by a random SVD that reloading the adapter does not repeat: what "
            "is saved would not be what was trained. Use 'pissa' (exact SVD)",
        )
