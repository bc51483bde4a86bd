"""Keys and names that people bring from other tools, and what to write here: the one list.

Looked up by the last key of a path, or by its section and itself (``train.batch_size``) where the name alone
is a key of some other section here. Each is of one of three kinds: it has another name, nothing need be set, or
it is not there, and then what to do instead.
"""

from __future__ import annotations

_COUNTS_OF_WHOLE = "losses are divided by the counts of the whole global batch"
_PACKED = "rows are packed without padding, prompts shared, attention kept apart; see model.layout"
_LAUNCH = "is of the launch: accelerate launch --config_file accelerate_configs/…"
_HUB = "not there; upload the directory final/ of the run"

RENAMED = {
    "attn_implementation": "the token layout decides; see model.layout",
    "auto_find_batch_size": "set train.micro_batch_tokens; it changes nothing but memory",
    "base_model": "here it is model.path",
    "beta1": "here it is train.adam_beta1",
    "betas": "here they are train.adam_beta1 and train.adam_beta2",
    "bf16": "write train.precision: bf16",
    "chat_template_path": "here it is model.chat_template",
    "completion_only_loss": "prompts never carry loss; which turns do is data.train.0.columns.turns",
    "cpo_alpha": "here it is objective.nll_weight",
    "cutoff_len": "here it is data.max_length_tokens; a longer row is rejected and counted, never cut",
    "data_seed": "here it is data.seed (splits) and train.seed (order)",
    "dataset": "list the sources under data.train",
    "dataset_config": "here it is data.train.0.subset",
    "dataset_mixer": "list the sources under data.train",
    "dataset_name": "here it is data.train.0.path",
    "dataset_num_proc": "here it is data.num_workers",
    "dataset_split": "here it is data.train.0.split",
    "datasets": "list the sources under data.train",
    "do_eval": "set eval.every, in steps",
    "early_stopping": "set eval.best, with patience",
    "early_stopping_patience": "here it is eval.best.patience",
    "early_stopping_threshold": "here it is eval.best.min_delta",
    "epochs": "here it is train.num_epochs",
    "eval_batch_size": "train.micro_batch_tokens bounds every forward, evaluation too; it changes no number",
    "eval_every": "here it is eval.every",
    "eval_steps": "here it is eval.every",
    "eval_strategy": "set eval.every, in steps",
    "evaluation_strategy": "set eval.every, in steps",
    "flash_attention": "the token layout decides; see model.layout",
    "fp16": "write train.precision: fp16",
    "gamma_beta_ratio": "here it is objective.gamma = gamma_beta_ratio * beta",
    "generate_during_eval": "set eval.generation",
    "gradient_clipping": "here it is train.max_grad_norm",
    "greater_is_better": "here it is eval.best.mode: max, or min",
    "kl_coef": "here it is objective.beta",
    "label_smoothing_factor": "here it is objective.label_smoothing",
    "lease_s": "there are no leases: one command hands out the shards, on several machines through "
    "executor.name=ray; leave it out",
    "load_best_model_at_end": "set eval.best; its weights are then those of final/",
    "load_in_4bit": "write model.quantization: 4bit",
    "load_in_8bit": "write model.quantization: 8bit",
    "logging_steps": "here it is train.log_every",
    "lora_r": "here it is peft.r",
    "lora_rank": "here it is peft.r",
    "lora_target": "here it is peft.target_modules",
    "lora_target_modules": "here it is peft.target_modules",
    "loss_type": "here it is objective.name",
    "lr": "here it is train.learning_rate",
    "lr_scheduler_type": "here it is train.lr_scheduler",
    "max_completion_length": "of rollouts it is regime.max_new_tokens; of rows data.max_length_tokens bounds "
    "prompt and response together",
    "max_grad_value": "here it is train.max_grad_norm",
    "max_length": "here it is data.max_length_tokens",
    "max_prompt_length": "here it is data.max_prompt_tokens",
    "max_samples": "here it is data.train.0.max_rows",
    "max_seq_length": "here it is data.max_length_tokens",
    "metric_for_best_model": "here it is eval.best.metric",
    "model_name_or_path": "here it is model.path",
    "model_revision": "here it is model.revision",
    "num_generations": "here it is regime.samples_per_prompt",
    "num_train_epochs": "here it is train.num_epochs",
    "optim": "here it is train.optimizer",
    "overwrite_output_dir": "nothing is overwritten: take another run.output_dir",
    "per_device_eval_batch_size": "train.micro_batch_tokens bounds every forward, evaluation too; it changes "
    "no number",
    "per_device_train_batch_size": "here it is train.micro_batch_size; what a recipe fixes is "
    "train.global_batch_size",
    "pref_beta": "here it is objective.beta",
    "pref_ftx": "here it is objective.nll_weight",
    "pref_loss": "here it is objective.name",
    "preprocessing_num_workers": "here it is data.num_workers",
    "pretrain": "here it is model.path",
    "ref_model": "here it is reference.path, with reference.name: model",
    "ref_model_mixup_alpha": "here it is reference.ema_rate, with reference.name: ema",
    "ref_model_name_or_path": "here it is reference.path, with reference.name: model",
    "ref_model_sync_steps": "here it is reference.sync_every_pushes, with reference.name: synced",
    "reference_free": "choose by objective.name: simpo, cpo and orpo need no reference",
    "report_to": "here it is run.trackers",
    "resume_from_checkpoint": "here it is train.resume; it is automatic",
    "reward_funcs": "here they are signals: a list, each with its name",
    "rl": "here it is objective.name",
    "rpo_alpha": "here it is objective.nll_weight",
    "run_name": "here it is run.name",
    "save_steps": "here it is train.save_every",
    "save_strategy": "set train.save_every, in steps",
    "save_total_limit": "here it is train.keep_checkpoints",
    "sequence_len": "here it is data.max_length_tokens",
    "sft_weight": "here it is objective.nll_weight",
    "simpo_gamma": "here it is objective.gamma",
    "sync_ref_model": "choose by reference.name: ema or synced, of rollouts",
    "test_split_size": "here it is data.eval_frac",
    "torch_dtype": "here it is model.dtype",
    "train.batch_size": "here it is train.global_batch_size, over all processes; what one forward holds is "
    "train.micro_batch_tokens",
    "train_batch_size": "here it is train.global_batch_size, over all processes",
    "train_on_inputs": "prompts never carry loss; which turns do is data.train.0.columns.turns",
    "use_vllm": "write engine.name: vllm, or vllm_server",
    "val_set_size": "here it is data.eval_frac",
    "val_size": "here it is data.eval_frac",
    "vllm_gpu_memory_utilization": "here it is engine.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "here it is engine.tensor_parallel_size",
    "wandb_project": "write run.trackers: [wandb]; the environment says which project",
    "warmup_ratio": "here it is train.warmup_frac",
    "warmup_steps": "set train.warmup_frac, a share of all steps",
}
"""Here it has another name; the sentence names a key that exists."""

AUTOMATIC = {
    "average_tokens_across_devices": _COUNTS_OF_WHOLE,
    "dataloader_drop_last": "no row is dropped: an epoch's last batch is smaller, and divided by its own counts",
    "dataloader_num_workers": "rows are tokenised once and then read from a memory-mapped file",
    "eval_on_start": "the start is always evaluated",
    "eval_packing": "evaluation runs in the layout of training",
    "gradient_accumulation_steps": "it is derived from train.global_batch_size",
    "group_by_length": "a forward is filled by tokens, and the packed layout has no padding",
    "ignore_data_skip": "a resumed run goes on at the very row",
    "include_num_input_tokens_seen": "tokens/seen is always logged",
    "packing": _PACKED,
    "pad_to_multiple_of": "the packed layout has no padding",
    "pad_token": "padding is masked, whatever the token",
    "padding_free": "rows are packed without padding; see model.layout",
    "precompute_ref_batch_size": "train.micro_batch_tokens bounds the reference's forwards as well",
    "precompute_ref_log_probs": "of a fixed data set they always are, once, and later runs find them",
    "remove_unused_columns": "a column that nothing reads is let be",
    "sample_packing": _PACKED,
    "streaming": "rows are read one by one into a memory-mapped file, so data need not fit into memory",
    "truncation_mode": "nothing is cut: a row above data.max_length_tokens is rejected and counted",
    "use_liger_kernel": "log-probs are computed in chunks, and full logits never exist",
}
"""Nothing to set: what happens anyway."""

ABSENT = {
    "activation_offloading": "not there; train.gradient_checkpointing, or DeepSpeed's offload "
    "(accelerate_configs/zero2_offload.yaml)",
    "center_rewards_coefficient": "not there; columns.margin is the one addition to Bradley-Terry",
    "ddp_find_unused_parameters": "not there; DDP looks for weights that no text reaches in every run",
    "deepspeed": _LAUNCH,
    "discopop_tau": "not there; an objective of your own is a function in a file under plugins",
    "f_divergence_type": "not there: references are compared by the reverse KL; an objective of your own is a "
    "function in a file under plugins",
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "hub_model_id": _HUB,
    "loss_weights": "not there: a run has one objective; many of them add NLL by objective.nll_weight, and a "
    "mix of your own is a function in a file under plugins",
    "model_init_kwargs": "not there: model.path, revision, dtype and trust_remote_code are what loading takes",
    "neftune_noise_alpha": "not there: embeddings get no noise, and log-probs are those of the policy itself",
    "num_processes": _LAUNCH,
    "push_to_hub": _HUB,
    "torch_compile": "not there: ragged packed batches would be compiled again and again",
    "use_weighting": "not there; what it corrects for goes away with samples of the policy itself: "
    "regime.name: rollouts",
}
"""Not there, and what instead."""

OBJECTIVES = {
    "aot": "not there; any of the pairwise losses instead, e.g. dpo",
    "bco": "not there: it is for answers that are good or bad each by itself; as pairs apo_zero, as rewards rwr",
    "bco_pair": "not there; apo_zero and apo_down move both sides apart as well",
    "cdpo": "is dpo with label_smoothing",
    "discopop": "not there; dpo, or a function of your own in a file under plugins",
    "exo_pair": "not there; dpo instead",
    "kto": "not there: it is for answers that are good or bad each by itself. As pairs: apo_zero; with a reward "
    "of 1 and 0: filtered_nll, rwr or direct_advantage",
    "kto_pair": "not there; apo_zero instead",
    "nca_pair": "not there; apo_zero instead",
    "odpo": "not there; columns.margin is for reward models",
    "online_dpo": "is dpo with regime.name: rollouts",
    "ppo": "not there; rloo and grpo clip the same ratio without a value model",
    "rdpo": "is robust_dpo",
    "reinforce": "is rloo, with samples_per_prompt of at least 2",
    "reward": "is stage: reward_model, without an objective",
    "robust": "is robust_dpo",
    "rpo": "is dpo with nll_weight",
    "sft": "is stage: sft, without an objective",
    "sigmoid": "is dpo (TRL names the function of the loss)",
    "sigmoid_norm": "not there: DPO on means a token; simpo is that without a reference",
    "slic": "is hinge",
    "sppo_hard": "not there; ipo fits a squared loss to the log-ratio as well",
    "wpo": "not there; what it corrects for goes away with samples of the policy itself: dpo with "
    "regime.name: rollouts",
    "xpo": "not there; dpo with regime.name: rollouts samples without its bonus",
}
"""Names of losses elsewhere."""

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


def hint_for(section: str, key: str) -> str | None:
    """What to write instead of ``key`` in ``section``; None for a key of no tool that is known here."""
    for name in (f"{section}.{key}", key):
        if name in RENAMED:
            return RENAMED[name]
        if name in AUTOMATIC:
            return f"automatic: {AUTOMATIC[name]}. Leave it out"
        if name in ABSENT:
            return ABSENT[name]
    return None
