"""A base quantised by bitsandbytes (QLoRA): when it can be, and with which settings."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from prefopt.errors import ModelError
from prefopt.recipe.schema import ModelSection


def check_quantization(model: ModelSection, *, trains_base: bool) -> None:
    """Raises ModelError if the base cannot be quantised here, or would be what trains."""
    if model.quantization is None:
        return
    setting = f"model.quantization = {model.quantization}"
    if trains_base:
        raise ModelError(
            f"{setting}: quantised weights are frozen; add a peft section to train an adapter"
        )
    if not torch.cuda.is_available():
        raise ModelError(
            f"{setting}: needs a CUDA GPU (bitsandbytes), and none is visible. Leave it out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{setting}: needs bitsandbytes. pip install 'prefopt[quantization]'")


def quantization_options(model: ModelSection) -> dict[str, Any]:
    """bitsandbytes settings as the QLoRA paper has them: nf4, double quantisation."""
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if model.quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
