"""Values that people bring from other tools, under a key that both have: names of losses, optimizers, "
"dtypes, …"""

from __future__ import annotations

import re

OBJECTIVES = {
    "alphapo": "not there; simpo instead",
    "aot": "not there; any of the pairwise losses instead, e.g. dpo",
    "aot_pair": "not there; any of the pairwise losses instead, e.g. dpo",
    "aot_unpaired": "not there; any of the pairwise losses instead, e.g. dpo",
    "apo_zero_unpaired": "not there: answers here are pairs: apo_zero",
    "bco": "not there: it is for answers that are good or bad each by itself; as pairs apo_zero, as rewards "
    "rwr",
    "bco_pair": "not there; apo_zero and apo_down move both sides apart as well",
    "best_of_n": "is filtered_nll, or stage: sft on the best of N",
    "bnpo": "not there; grpo or dr_grpo instead",
    "bradley_terry": "is stage: reward_model, without an objective",
    "cdpo": "is dpo with label_smoothing",
    "cispo": "not there; grpo or dr_grpo instead",
    "cross_entropy": "is stage: sft, without an objective",
    "dapo": "not there; grpo has its separate epsilon_high, and regime.resample_frac its dynamic sampling",
    "discopop": "not there; dpo, or a function of your own in a file under plugins",
    "exo_pair": "not there; dpo instead",
    "gae": "not there: no value model is trained; rloo and grpo do without",
    "gdpo": "not there; grpo instead",
    "gkd": "not there; stage: sft takes a teacher's answers",
    "gspo": "not there; rloo clips one ratio a response",
    "iterative_dpo": "is dpo with regime.name: rollouts and sync_every above 1",
    "kd": "not there; stage: sft takes a teacher's answers",
    "kto": "not there: it is for answers that are good or bad each by itself. As pairs: apo_zero; with a "
    "reward of 1 and 0: filtered_nll, rwr or direct_advantage",
    "kto_pair": "not there; apo_zero instead",
    "luspo": "not there; grpo or dr_grpo instead",
    "nash_md": "not there; dpo with regime.name: rollouts and a judge",
    "nca_pair": "not there; apo_zero instead",
    "odpo": "not there; columns.margin is for reward models",
    "online_dpo": "is dpo with regime.name: rollouts",
    "pairwise_ranking": "is stage: reward_model, without an objective",
    "ppo": "not there; rloo and grpo clip the same ratio without a value model",
    "pt": "not there: stage: sft trains on texts",
    "raft": "is filtered_nll",
    "rdpo": "is robust_dpo",
    "reinforce": "is rloo, with samples_per_prompt of at least 2",
    "reinforce_plus_plus": "not there; rloo instead",
    "reinforce_pp": "not there; rloo instead",
    "remax": "not there; rloo instead",
    "rest": "is filtered_nll",
    "reward": "is stage: reward_model, without an objective",
    "reward_model": "is stage: reward_model, without an objective",
    "rm": "is stage: reward_model, without an objective",
    "robust": "is robust_dpo",
    "rpo": "is dpo with nll_weight",
    "sapo": "not there; grpo or dr_grpo instead",
    "sft": "is stage: sft, without an objective",
    "sigmoid": "is dpo (TRL names the function of the loss)",
    "sigmoid_norm": "not there: DPO on means a token; simpo is that without a reference",
    "simpo_nll": "is simpo with nll_weight",
    "slic": "is hinge",
    "smaug": "is dpop",
    "spin": "is dpo with the data's own answers as chosen and samples of the policy as rejected",
    "sppo": "not there; ipo fits a squared loss to the log-ratio as well",
    "sppo_hard": "not there; ipo fits a squared loss to the log-ratio as well",
    "star": "is filtered_nll",
    "tdpo": "not there; dpo instead",
    "tpo": "not there; dpo instead",
    "unlikelihood": "not there; nll on the chosen side, or dpo",
    "vespo": "not there; grpo or dr_grpo instead",
    "wpo": "not there; what it corrects for goes away with samples of the policy itself: dpo with "
    "regime.name: "
    "rollouts",
    "xpo": "not there; dpo with regime.name: rollouts samples without its bonus",
}
"""Names of losses elsewhere -> what they are here."""

PEFT = {
    "adapter_name": "has one adapter, and no name",
    "alpha": "here it is peft.lora_alpha",
    "dropout": "here it is peft.lora_dropout",
    "lora_modules_to_save": "here it is peft.modules_to_save",
    "lora_r": "here it is peft.r",
    "lora_target_linear": "write peft.target_modules: all-linear",
    "lora_target_modules": "here it is peft.target_modules",
    "path": "here it is peft.adapter",
    "rank": "here it is peft.r",
    "targets": "here it is peft.target_modules",
}
"""Keys of the peft section, whose own are those of peft's configuration."""

_EIGHT_BIT = "not there: states of the optimizer are float32; write adamw"
_NOT_THERE = "not there; write adamw"
_FINAL_LR = "not there: write cosine, which ends at 0"
_STEPS = "give a number of steps, or leave it out"
_NO_STAGE = "is no stage here: {}"
_BFLOAT16, _FLOAT16, _FLOAT32 = "write bfloat16", "write float16", "write float32"
_BF16, _FP16, _FP32 = "write bf16", "write fp16", "write fp32"
_NF4 = "write 4bit, which is NF4 quantised twice"

# Of each key, in order: what a value looks like, and what to write. In small letters, matched whole.
_VALUES: dict[str, list[tuple[str, str]]] = {
    "optimizer": [
        (r"adamw?|adamw?_(torch|hf|apex|apex_fused)\w*(?<!bit)|fused_adamw?|torch\.optim\.\w*adamw?",
         "write adamw"),
        (r"rmsprop\w*", "write rmsprop"),
        (r".*(8bit|4bit|bnb|paged).*", _EIGHT_BIT),
        (r".+", _NOT_THERE),
    ],
    "lr_scheduler": [
        (r"cosine\w*(min_lr|annealing)\w*", _FINAL_LR),
        (r"constant_with_warmup", "write constant, with train.warmup_frac"),
        (r"(linear|cosine)_(with_)?(warmup|decay)", "write its first word; train.warmup_frac is the warm-up"),
        (r"cosine\w+", "not there: write cosine, which falls once"),
        (r"polynomial\w*", "not there: write linear, which is its power 1"),
        (r"inverse_sqrt|warmup_stable_decay|wsd|reduce_lr_on_plateau|greedy|one_?cycle|rex|.*restarts.*",
         "not there: write cosine, linear or constant"),
    ],
    "dtype": [
        (r"(torch\.)?(bf16|bfloat16)\W?\w*", _BFLOAT16),
        (r"(torch\.)?(fp16|float16|f16|half)\W?\w*", _FLOAT16),
        (r"(torch\.)?(fp32|float32|f32|float|full|32)\W?\w*", _FLOAT32),
    ],
    "precision": [
        (r"(torch\.)?(bf16|bfloat16)\W?\w*", _BF16),
        (r"(torch\.)?(fp16|float16|f16|half|16)\W?\w*", _FP16),
        (r"(torch\.)?(fp32|float32|f32|float|full|32|no|none|false)\W?\w*", _FP32),
        (r"true", "write bf16, or fp16"),
        (r"fp8\w*", "not there: write bf16"),
    ],
    "quantization": [
        (r"true|bnb|bitsandbytes|qlora", "write 4bit, or 8bit"),
        (r"false|no|none", "leave it out"),
        (r"4|int4|nf4|fp4|4-bit|4 bit|bnb_4bit|bnb-4bit", _NF4),
        (r"8|int8|8-bit|8 bit|bnb_8bit|llm_int8", "write 8bit"),
        (r"gptq|awq|hqq|eetq|aqlm|fp8|mxfp4|torchao", "not there: write 4bit or 8bit, of weights that are "
        "not quantised yet"),
    ],
    "layout": [
        (r"flash_.*|sdpa|eager|flex.*|xformers", "is an attention of transformers; leave it out, and packed "
        "or padded "
         "is chosen by what the architecture can take"),
        (r"packing|true", "write packed"),
        (r"false|none", "write padded"),
    ],
    "stage": [
        (r"rm|reward|rewards?_?model(ing)?", "write reward_model"),
        (r"pt|pretrain(ing)?", _NO_STAGE.format("write sft, on rows with a prompt and a response")),
        (r"ppo|grpo|rloo|online_dpo|rl|rlhf", _NO_STAGE.format("leave it out; choose by objective.name, "
        "with regime.name: rollouts")),
    ],
    "regime.name": [
        (r"online|on_?policy|on-policy|async\w*|semi_?online|semi-online|rollout", "write rollouts; "
        "sync_every and max_lag say how "
         "online it is"),
        (r"off_?policy|off-policy|static|dataset|fixed", "write offline"),
    ],
    "engine.name": [
        (r"sglang|lmdeploy|tgi|trt.*|tensorrt.*|llama.?cpp|ollama", "not there: write vllm, vllm_server or "
        "hf"),
        (r"transformers|huggingface|generate|native", "write hf"),
        (r"server|vllm_?http|openai|remote", "write vllm_server, with engine.urls"),
        (r"colocate", "write vllm"),
    ],
    "reference.name": [
        (r"policy|base|sft|init|self|auto|frozen", "write initial"),
        (r"null|free|false", "write none; simpo, cpo and orpo need none anyway"),
        (r"sync|target|periodic", "write synced"),
        (r"moving|polyak|average", "write ema"),
        (r"old|sampler|rollout|actor", "write behavior"),
    ],
    "credit.name": [
        (r"grpo|group|gae", "write group_mean_std"),
        (r"dr_?grpo|no_std\w*|mean", "write group_mean"),
        (r"rloo|loo", "write leave_one_out"),
        (r"best_?(vs|of)?_?worst|max_?min", "write best_worst"),
        (r"reinforce\w*|remax\w*|opo|gpg", "not there: write leave_one_out"),
    ],
    "signals.name": [
        (r"accuracy\w*|math_?verify|math_\w*|prime_math|reasoning_accuracy\w*", "write math"),
        (r"gsm8k\w*", "write final_number"),
        (r"format\w*|think_format\w*", "not there: write regex, with a pattern"),
        (r"code\w*|unit_?tests?|humaneval|execution|prime_code", "write python_tests"),
        (r"rm|reward|orm|classifier|sequence_classification", "write reward_model"),
        (r"llm|llm_?(as_?a_?)?judge|gpt\w*|openai|pairrm|pair_?judge\w*|\w*judge", "write judge"),
        (r"length\w*|cosine_length\w*|soft_overlong\w*|get_soft_overlong\w*|overlong\w*",
         "write length_penalty"),
        (r"repetition\w*|get_repetition\w*", "write repetition_penalty"),
        (r"ifeval\w*|instruction\w*", "write constraints"),
        (r"prm|process_\w*", "not there: a response has one score; write reward_model"),
    ],
    "format": [
        (r"chatml|openai|messages?|conversational|chat_?template\w*|preference|prompt_completion",
         "write chat"),
        (r"conversations?|vicuna", "write sharegpt"),
        (r"anthropic|hh_?rlhf|hh-rlhf", "write hh"),
        (r"alpaca\w*|completion|instruction|raw|plain|string|intel|zephyr|ultra\w*|.*\.\w+",
         "not there: leave it out, and name "
         "the columns under columns"),
        (r"json\w*|parquet|csv|arrow", "is a kind of file, which its suffix says; leave it out"),
    ],
    "peft.type": [
        (r"q-?lora|4bit|8bit", "write lora, and model.quantization: 4bit"),
        (r"dora|q-?dora|rslora|pissa|olora", "write lora, and under peft use_dora: true, use_rslora: true "
        "or init_lora_weights: pissa"),
        (r"full|none|null|false|no|freeze", "leave the section out, and the whole model is trained"),
        (r"lora\+|loraplus|lora_plus|galore|lisa|relora|true|peft|adapter", "write lora"),
    ],
    "resume": [(r"true|latest|last|yes", "write auto"), (r"false|no|none|null", "write never")],
    "trackers": [(r"none|no|false|null", "leave it out, or write []"), (r"all|true", "name them: [wandb]"), (
     r"tb", "write [tensorboard]")],
    "save_every": [(r"epoch|steps?|no|never|best|end|true|false", _STEPS)],
    "every": [(r"epoch|steps?|no|never|end|true|false", _STEPS)],
    "max_steps": [(r"-1|0|false|none", "leave it out for all of num_epochs")],
    "max_grad_norm": [(r"0|0\.0|-1|-1\.0|false|none", "write null for no clipping")],
    "top_k": [(r"-1|false|none", "write 0 for all tokens")],
    "max_rows": [(r"-1|0|false|none", "leave it out for all rows")],
    "gradient_checkpointing": [(r"unsloth|offload\w*|full|selective|true|yes|on", "write true"), (
     r"false|no|none|off", "write false")],
    "trust_remote_code": [(r"true|yes|on", "write true"), (r"false|no|off", "write false")],
}  # fmt: skip
"""By the last key of a path, or its last two where the last is ``name`` or ``type``. A pattern of all "
 "comes last."""


def value_hint(section: str, key: str, value: object) -> str | None:
    """What to write instead of ``value`` at ``section.key``; None for a value of no tool that is known here.

    Args:
        section: the first key of the path, empty for a key of the recipe itself.
        value: as it was written.
    """
    if section == "objective" and key == "name" and isinstance(value, list | tuple):
        return _of_several(value)
    if isinstance(value, list | tuple | dict):
        return None
    written = " ".join(str(value).lower().split())
    loss = written.replace("-", "_")
    if section == "objective" and key == "name":
        return OBJECTIVES.get(loss)
    name = f"{section}.{key}" if key in ("name", "type") else key
    for pattern, said in _VALUES.get(name, ()):
        if re.fullmatch(pattern, written):
            return said
    if not section and key == "stage" and loss in OBJECTIVES:
        return f"of objectives {loss} {OBJECTIVES[loss]}"
    return None


def _of_several(names: list[object] | tuple[object, ...]) -> str:
    said = [f"; {name} {hint}" for name in names if (hint := value_hint("objective", "name", name))]
    return f"one name: a run has one objective, and NLL beside it is nll_weight{''.join(said)}"
