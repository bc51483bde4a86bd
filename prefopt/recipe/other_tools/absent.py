"""What other tools have and this one has not, and what to do instead."""

from __future__ import annotations

HUB = "not there; upload the directory final/ of the run"
LAUNCH = "is of the launch: accelerate launch --config_file accelerate_configs/…"

ABSENT = {
    "_component_": "not there: a section takes its keys, and objectives, signals and engines go by name",
    "_target_": "not there: a section takes its keys, and objectives, signals and engines go by name",
    "accelerator_config": LAUNCH,
    "activation_offloading": "not there; train.gradient_checkpointing, or DeepSpeed's offload "
    "(accelerate_configs/zero2_offload.yaml)",
    "add_tokens": "not there: no token is added; add it to the tokenizer and the model first, and set "
    "model.path to them",
    "alpha": "is AlphaPO's in TRL's CPOConfig, and not there; objective.alpha is that of ld_dpo, "
    "peft.lora_alpha that of LoRA",
    "callbacks": "not there; metrics.jsonl is written as a run goes",
    "cast_lm_head_to_fp32": "not there: log-probs are always taken in float32",
    "center_rewards_coefficient": "not there; columns.margin is the one addition to Bradley-Terry",
    "class_path": "not there: a section takes its keys, and objectives, signals and engines go by name",
    "compile": "not there: ragged packed batches would be compiled again and again",
    "compute_metrics": "not there: `prefopt eval` has tasks, and one of your own is a file",
    "critic": "not there: no value model is trained; rloo and grpo do without",
    "ddp_find_unused_parameters": "not there; DDP looks for weights that no text reaches in every run",
    "debug": "not there: `prefopt check` and `prefopt show` say what a recipe does before it runs",
    "deepspeed": LAUNCH,
    "delta": "not there: grpo clips by objective.epsilon_low and objective.epsilon_high",
    "desirable_weight": "not there: KTO is not; as pairs use objective.name: apo_zero",
    ".device": "is of the launch: accelerate_configs/cpu.yaml, or CUDA_VISIBLE_DEVICES",
    "disable_flash_attn": "not there; see model.layout",
    "discopop_tau": "not there; an objective of your own is a function in a file under plugins",
    "do_predict": "not there: `prefopt eval` evaluates what is saved",
    "do_train": "not there: `prefopt train` trains",
    "enable_jit_checkpoint": "not there: on SIGTERM and Ctrl-C a checkpoint is saved anyway",
    "environment_factory": "not there: responses are sampled in one turn",
    "f_alpha_divergence_coef": "not there: references are compared by the reverse KL",
    "f_divergence_type": "not there: references are compared by the reverse KL; an objective of your own is a "
    "function in a file under plugins",
    "fsdp": LAUNCH,
    "fsdp_config": LAUNCH,
    "full_determinism": "not there: the same seeds give the same order and samples; kernels of a GPU may "
    "still "
    "differ in the last bit",
    "gae_lambda": "not there: no value model is trained; a response has one advantage",
    "gradient_checkpointing_kwargs": "not there: train.gradient_checkpointing is true or false, and never "
    "reentrant",
    "hub_model_id": HUB,
    "ignore_bias_buffers": "not there; nothing that trains here needs it",
    "lambd": "not there: no value model is trained; a response has one advantage",
    "lmbda": "not there: no model is taught by another's probabilities; stage: sft takes its answers",
    "loss_weights": "not there: a run has one objective; many of them add NLL by objective.nll_weight, and a "
    "mix of your own is a function in a file under plugins",
    "max_tool_calling_iterations": "not there: responses are sampled in one turn",
    "min_p": "not there: samples are drawn by regime.top_p and regime.top_k",
    "model_init_kwargs": "not there: model.path, revision, dtype and trust_remote_code are what loading takes",
    "multi_objective_aggregation": "not there: the reward is the weighted sum of the signals, and credit.name "
    "scales it",
    "neftune_noise_alpha": "not there: embeddings get no noise, and log-probs are those of the policy itself",
    "new_special_tokens": "not there: no token is added; add it to the tokenizer and the model first, and set "
    "model.path to them",
    "no_cuda": "is of the launch: accelerate launch --config_file accelerate_configs/cpu.yaml",
    "num_generations_eval": "not there: eval.generation answers each prompt once",
    "num_iterations": "not there: each sample is trained on once; regime.sync_every and max_lag say how old "
    "it "
    "may be",
    "num_ppo_epochs": "not there: each sample is trained on once; regime.sync_every and max_lag say how old "
    "it "
    "may be",
    "num_processes": LAUNCH,
    "off_policy_mask_threshold": "not there; regime.importance_cap weighs and regime.drop_lag_above drops "
    "what "
    "is off-policy",
    "optimizer_in_bwd": "not there; train.gradient_checkpointing, or DeepSpeed's offload "
    "(accelerate_configs/zero2_offload.yaml)",
    "parallelism_config": LAUNCH,
    "ppo_epochs": "not there: each sample is trained on once; regime.sync_every and max_lag say how old it "
    "may "
    "be",
    "profiler": "not there: time/… of metrics.jsonl says where a step's time goes",
    "push_to_hub": HUB,
    "relora": "not there; use peft.type: lora",
    "repetition_penalty": "not there: samples are of the policy itself; a signal repetition_penalty scores "
    "repetition",
    "reward_clip_range": "not there: rewards are taken as the signals give them",
    "rope_scaling": "not there: write it into the model's own config.json",
    "seq_kd": "not there: no model is taught by another's probabilities; stage: sft takes its answers",
    "special_tokens": "not there: no token is added; add it to the tokenizer and the model first, and set "
    "model.path to them",
    "stop": "not there: a response ends with its turn, or at regime.max_new_tokens",
    "stop_strings": "not there: a response ends with its turn, or at regime.max_new_tokens",
    "stop_token_ids": "not there: a response ends with its turn, or at regime.max_new_tokens",
    "strict": "not there: an unknown key is always an error",
    "tf32": "not there: float32 products are computed in float32, which is torch's default",
    "tokens": "not there: no token is added; add it to the tokenizer and the model first, and set model.path "
    "to them",
    "torch_compile": "not there: ragged packed batches would be compiled again and again",
    "torch_empty_cache_steps": "not there; lower train.micro_batch_tokens where memory is short",
    "train_from_scratch": "not there: a policy is loaded from model.path",
    "undesirable_weight": "not there: KTO is not; as pairs use objective.name: apo_zero",
    "use_bias_correction_kl": "not there: the KL term of grpo is as arXiv:2402.03300 has it",
    "use_cpu": "is of the launch: accelerate launch --config_file accelerate_configs/cpu.yaml",
    "use_cpu_offload": "is of the launch: accelerate launch --config_file "
    "accelerate_configs/zero3_offload.yaml",
    "use_weighting": "not there; what it corrects for goes away with samples of the policy itself: "
    "regime.name: rollouts",
    "vf_coef": "not there: no value model is trained; rloo and grpo do without",
}
"""Key elsewhere -> that it is not there, and what instead."""
