"""A tiny random model of every causal LM that the installed transformers has, made in place.

`tiny_models` holds the few that the other tests use, each with what its family is known for. Here a configuration
class's own fields are set small by name, and what a family needs beyond that stands in `_OWN`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.unit.tiny_models import draw_wide

WINDOW = 24
VOCABULARY = 97

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Fields by name, whichever class has them.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim"], 32),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"], 48
    ),
    **dict.fromkeys(
        ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"], 2
    ),
    **dict.fromkeys(["encoder_layers", "num_encoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_heads", "num_decoder_attention_heads"], 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 512),
    "encoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    **dict.fromkeys(["sliding_window", "attention_chunk_size", "local_attention"], WINDOW),
    **dict.fromkeys(["attention_window_size", "sliding_window_size", "window_size"], WINDOW),
    "keep_window_size": WINDOW,
    # linear attention and state spaces
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 16),
    "index_topk": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

# What a family needs on top. A callable gets the fields gathered so far.
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_PADDED = {"pad_token_id": 0}
_HYBRID = {"num_hidden_layers": 4}
_OWN: dict[str, dict[str, Any]] = {
    # latent attention: the rotary part's width is its head_dim
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ],
        _LATENT,
    ),
    **dict.fromkeys(["emu3_text_model", "modernbert-decoder", "prophetnet"], _PADDED),
    **dict.fromkeys(
        ["bamba", "granitemoehybrid"],
        _MAMBA,
    ),
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "cpmant": {"dim_ff": 48, "prompt_length": 4, "dim_head": 8},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {
        "hidden_size": 32,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    **{
        name: {**values, "is_decoder": True}
        for names, values in (
            (
                [
                    "bert",
                    "bert-generation",
                    "big_bird",
                    "electra",
                    "ernie",
                    "megatron-bert",
                    "rembert",
                    "roformer",
                ],
                {},
            ),
            (
                [
                    "camembert",
                    "data2vec-text",
                    "roberta",
                    "roberta-prelayernorm",
                    "xlm-roberta",
                    "xlm-roberta-xl",
                ],
                {"pad_token_id": 0},
            ),
        )
        for name in names
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 16],
        "attention_head_size": 8,
    },
    **dict.fromkeys(
        ["jamba", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"], _HYBRID
    ),
    "xmod": {"is_decoder": True, "pad_token_id": 0, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": {
        "is_decoder": True,
        "shape_vocab_size": 20,
        "pronunciation_vocab_size": 20,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "gemma4_text": {"pad_token_id": 0},
    "longcat_flash": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 2,
    },
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 48,
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 4,
        "index_local_blocks": 1,
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
    "falcon_h1": {
        **_MAMBA,
        "mamba_d_ssm": 64,
        "lm_head_multiplier": 0.5,
    },
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "hyperclovax": {"logits_scaling": 0.5},
    "granite": {"logits_scaling": 2.0},
    "minicpm3": {**_LATENT, "dim_model_base": 16},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
}

# Models of images and text, whose language model has a type of its own.
_TEXT_OF = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
    "emu3": "emu3_text_model",
    "got_ocr2": "qwen2",
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
    "out_hidden_size": 32,
}


@functools.cache
def _fields(config_class: type) -> frozenset[str]:
    return frozenset(
        name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})
    )


def tiny_causal_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """A configuration of that type, small in every field that is known by name."""
    config_class: Any = CONFIG_MAPPING[model_type]
    if model_type in _TEXT_OF:
        text = _small_fields(_TEXT_OF[model_type]) | settings
        return config_class(text_config=text, vision_config=_VISION)
    return config_class(**{**_small_fields(model_type), **settings})


def _small_fields(model_type: str) -> dict[str, Any]:
    fields = _fields(CONFIG_MAPPING[model_type])
    values = {name: value for name, value in _SMALL.items() if name in fields}
    values |= _OWN.get(model_type, {})
    return {k: v for k, v in values.items() if v is not None or k == "pad_token_id"}


def tiny_causal_lm(model_type: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random fp32 model of that type in eval mode; leaves the global random state as it was."""
    config = tiny_causal_config(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw_wide(model)
    return model.eval()
