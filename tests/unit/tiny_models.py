"""Small models of every supported architecture, made in place: no download, fp32, milliseconds to run.

Each exercises what its family is known for, so that a layout or a hash that is right for Llama alone
fails here: grouped-query attention, head_dim != hidden / heads, tied and untied embeddings, sliding
windows shorter than a test sequence, attention and final logit softcapping, embedding scaling,
partial rotary embeddings, projection biases, QK norms, a state-space model.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

WINDOW = 8
"""Sliding window of the architectures that have one, in tokens: shorter than any sensible test sequence."""

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention"]

# name -> (configuration class, settings on top of _COMMON). None drops a common setting the class lacks.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 16, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": (
        "MistralConfig",
        {"sliding_window": WINDOW, "head_dim": 16, "tie_word_embeddings": False},
    ),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING * 2,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,  # neither head_dim nor hidden / heads: a wrong scale shows
            "attn_logit_softcapping": 2.0,  # low enough to bend the scores of a random model
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING * 2,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi": (
        "PhiConfig",
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW, "tie_word_embeddings": False}),
    "mamba": (
        "MambaConfig",
        {
            "state_size": 8,
            "time_step_rank": 4,
            **dict.fromkeys(
                (
                    "intermediate_size",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "max_position_embeddings",
                )
            ),
        },
    ),
}

ARCHITECTURES = tuple(_ARCHITECTURES)
ATTENTION_ARCHITECTURES = tuple(name for name in _ARCHITECTURES if name != "mamba")


def tiny_config(arch: str, vocab_size: int = 97, **settings: Any) -> transformers.PretrainedConfig:
    """The configuration of ``tiny_model(arch, …)``; ``settings`` override anything."""
    class_name, own = _ARCHITECTURES[arch]
    values = {**_COMMON, **own}
    values = {
        key: value for key, value in values.items() if key == "pad_token_id" or value is not None
    }
    return getattr(transformers, class_name)(**{**values, "vocab_size": vocab_size, **settings})


def tiny_model(
    arch: str, vocab_size: int = 97, *, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A random fp32 causal LM in eval mode, the same for the same ``seed``; leaves the global RNG as it was.

    Weights are drawn wide enough (std 0.2, norms and biases jittered) that attention is far from
    uniform: with the usual 0.02 a wrong mask moves logits by less than a tolerance.
    """
    config = tiny_config(arch, vocab_size, **settings)
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    kwargs = {} if arch == "mamba" else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs)
        draw_wide(model)
    return model.eval()


@torch.no_grad()
def draw_wide(model: torch.nn.Module) -> None:
    """Draws the weights anew, as `tiny_model` says."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith(("A_log", "conv1d.weight")):
            parameter.normal_(std=0.2)
        elif name.endswith(("norm.weight", "bias")) and "dt_proj" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
