"""Kinds of keys that other tools have dozens of, known by how they begin or end."""

from __future__ import annotations

import re

from prefopt.recipe.other_tools.absent import HUB, LAUNCH

FAMILIES: list[tuple[str, str]] = [
    (r"(hub|hf_hub|ms_hub|om_hub|push)_\w+|\w+_to_hub|hf_(token|use_auth_token)", HUB),
    (r"compute_environment|distributed_type|machine_rank|main_training_function|gpu(_ids|_count)?|use_mca|"
     r"use_mbridge|"
     r"megatron|use_megatron\w*|(use_)?hyper_parallel\w*|kt_\w+|use_kt|use_orig_params|reshard_after_forward|"
     r"(ddp|fsdp\d?|deepspeed|ds\d?|zero\d?|megatron|nccl|accelerator|dp|ray|torchdistx|sharding|rdzv)_\w+|"
     r"(n|num)_(gpus|nodes|machines)\w*|nnodes|world_size|node_rank|master_\w+|zero\d|fsdp\d|ddp|tpu\w*|"
     r"(sequence|context|pipeline|data|expert|tensor|ulysses|ring)\w*_(parallel|size)\w*|cp_size|sp_size|"
     r"pp_size|"
     r"\w*colocate\w*|resources_per_worker|placement_strategy|offload_\w+|\w+_offload|(no_)?use_ray", LAUNCH),
    (r"dataloader_\w+|\w*prefetch\w*|pin_memory|persistent_workers|(data_)?loader_\w+",
     "automatic: rows are tokenised once, by data.num_workers processes, and then read from a memory-mapped "
     "file. "
     "Leave it out"),
    (r"(use_)?(wandb|swanlab|trackio|mlflow|comet|tensorboard|tb|neptune|clearml|aim|otel)(_\w+)?|"
     r"track_with|logger_\w+",
     "run.trackers names who is told, run.name what they show; the environment holds their own settings"),
    (r"torch_?compile_\w+|\w*compile\w*|cuda_?graph\w*|dynamo\w*",
     "not there: ragged packed batches would be compiled again and again; vLLM's own compiling is "
     "engine.enforce_eager"),
    (r"(use_)?liger\w*|\w+_liger\w*|(use_|lora_)?\w*_?kernels?|chunked_(cross_entropy|ce|logits)\w*|"
     r"cut_cross_entropy\w*|"
     r"use_unsloth\w*|fused_\w+|use_fused\w*|tiled_mlp\w*",
     "automatic: log-probs are computed in chunks, and full logits never exist. Leave it out"),
    (r"(use_)?(flash|xformers|sdpa?|flex|eager|sage|shift|ring)_?(attn|attention)\w*|attn_\w+|attention_\w+|"
     r"flash_\w+|\w+_attention|scaling_softmax\w*",
     "the token layout decides which attention runs; see model.layout"),
    (r"sample_packing\w*|pack(ing|ed)?_\w+|\w+_packing|multipack\w*|batch_flattening|pad_\w+|padding_\w+|"
     r"padded_\w*",
     "automatic: rows are packed without padding, prompts shared, attention kept apart; see model.layout. "
     "Leave it out"),
    (r"bnb_\w+|quant\w*|\w*_quant\w*|gptq\w*|awq\w*|hqq\w*|qat\w*|double_quantization|fp8\w*|nvfp4\w*|"
     r"int8\w*|(use_)?torchao\w*|"
     r"llmcompressor|load_in_\w+",
     "not there: model.quantization: 4bit (NF4, quantised twice) or 8bit is what a frozen base can have"),
    (r"(use_)?(galore|badam|apollo|muon|dion|lisa|lomo|adam_mini|loraplus|qgalore|ademamix|shampoo|soap)\w*|"
     r"optim_\w+|"
     r"optimizer_\w+|\w*adam_\w+|\w*(embedding|layer)\w*_lr\w*|lr_groups|momentum|nesterov",
     "not there: train.optimizer is adamw or rmsprop, with one train.learning_rate"),
    (r"lr_\w+|cosine_\w+|\w+_lr|min_lr\w*|scheduler_\w+|warmup_\w+|\w+_warmup\w*|decay_\w+|\w+_decay_\w+|"
     r"jagged_\w+|eta_min",
     "not there: train.lr_scheduler falls from train.learning_rate to 0 (or is constant) after "
     "train.warmup_frac"),
    (r"image\w*|video\w*|audio\w*|\w*vision\w*|\w*multi_?modal\w*|processor\w*|freeze_mm\w*|mm_\w+|"
     r"media_\w+|pixel_\w+|crop_to\w+",
     "not there: policies here read and write text"),
    (r"teacher\w*|\w*distil\w*|gkd_\w+|kd_\w+|student\w*|\w*_teacher\w*|\w*uld_\w+|iw_opd_\w+",
     "not there: no model is taught by another's probabilities; stage: sft takes its answers"),
    (r"critic\w*|ppo_\w+|value_(head|model|loss|clip|coef\w*|checkpointer|net\w*)\w*|vf_\w+|cliprange\w*|"
     r"\w*gae\w*",
     "not there: no value model is trained; rloo and grpo do without"),
    (r"kto_\w+|\w*desirable\w*", "not there: KTO is not; as pairs use objective.name: apo_zero"),
    (r"\w*entropy\w*", "not there: no bonus or mask of entropy is part of a loss"),
    (r"sapo_\w+|vespo_\w+|cispo_\w+|gspo_\w+|dapo_\w+|luspo_\w+|fipo_\w+|dppo_\w+|\w*_tau_(pos|neg)|"
     r"tau_(pos|neg)",
     "not there: grpo clips by objective.epsilon_low and objective.epsilon_high"),
    (r"(vllm|rollout)_importance_\w+|rollout_(is|rs)\w*|\w*is_correction\w*|off_policy_\w+|use_tis|tis_\w+",
     "regime.importance_cap weighs samples by min(cap, ratio of the response); nothing else corrects for "
     "the sampler"),
    (r"reward_?model_\w+|rm_\w+|reward_\w+|remote_rm\w*|\w+_reward|verifier\w*|reward_func\w*",
     "rewards are signals: a list, each with its name and weight (`prefopt signals` has them); needs "
     "regime.name: rollouts"),
    (r"judge_\w+", "a judge is a signal {name: judge, base_url: …, model: …} under signals; `prefopt "
     "signals` has its keys"),
    (r"ref(erence)?_\w+", "of the reference there are reference.name, and with reference.name: model its "
     "reference.path"),
    (r"sgl(ang)?_\w+|lmdeploy_\w+", "not there: engine.name is hf, vllm or vllm_server"),
    (r"vllm_\w+", "write engine.name: vllm or vllm_server; vLLM's own arguments stand, as it names them, "
     "under engine.options"),
    (r"(gen|generation|generate|sampling|rollout)_\w+",
     "what is sampled is regime.temperature, top_p, top_k, max_new_tokens and samples_per_prompt, with "
     "regime.name: rollouts"),
    (r"(do_sample|num_beams|length_penalty|early_stop|no_repeat_ngram\w*|\w+_penalty|beam_\w+)",
     "not there: samples are of the policy itself; regime.temperature, top_p and top_k say how"),
    (r"tool_\w+|tools?|max_(turns|tool)\w*|agent_\w+|env(ironment)?_\w+|\w*reprompt\w*|multi_?turn_\w+|user_simulat\w*",
     "not there: responses are sampled in one turn; tools of a row reach the template by "
     "data.train.0.columns.tools"),
    (r"peft_\w+|lora_\w+|oft_\w+|vera_\w+|dora_\w+|adapter_\w+|qlora_\w+|rslora\w*|pissa_\w+|loftq_\w+|"
     r"adalora_\w+|ia3_\w+",
     "the keys of an adapter are those of peft's own configuration, under peft: peft.r, peft.lora_alpha, "
     "peft.target_modules"),
    (r"tokenizer_\w+|chat_template_\w+|default_system\w*|template_\w+|system_(prompt|message)|add_(bos|"
     r"eos)\w*|"
     r"(bos|unk|sep|mask)_token|\w+_special_tokens|tokens_\w+|resize_\w+|mean_resizing\w*|shrink_\w+|"
     r"embeddings_\w+",
     "the tokenizer and its template are taken as they were saved; model.tokenizer and model.chat_template "
     "give others"),
    (r"\w+_(key|field|column|col|column_name)|(field|column|message_field|message_property|key)_\w+|"
     r"columns_to_\w+|columns",
     "which column of a source holds what is data.train.0.columns"),
    (r"(eval|evals|evaluation|val|validation|test|do_eval|do_bench|bench|do_causal)_\w+|\w+_val|"
     r"include_tokens\w*|include_tkps",
     "what is measured while training is eval.every, eval.best and eval.generation, on data.eval or "
     "data.eval_frac"),
    (r"(save|saves|ckpt|checkpoint)_\w+|checkpoint(s|ing)?|\w+_checkpoint(s|ing)?|resume_\w+|load_(best|"
     r"checkpoint)\w*",
     "checkpoints are train.save_every and train.keep_checkpoints, always whole; train.resume goes on from "
     "one"),
    (r"(dataset|datasets|train|data|shuffle_(merged|before)|pretrain\w*|streaming|hf_dataset|corpus|"
     r"mix\w*)_\w+|\w+_(dataset|datasets|file|files)|"
     r"skip_prepare_dataset|min_sample_len|\w+_mixture|curriculum\w*",
     "sources are listed under data.train, each with its path, split, format, columns and weight"),
    (r"(log|logs|logging|print|report|monitor)_\w+|\w+_to_print|verbose|loss_watchdog\w*|debug_\w+|"
     r"profil\w+|use_metrics\w*",
     "train.log_every and run.trackers are what there is; metrics.jsonl of the run holds every number"),
    (r"export_\w+|merge_\w+|\w+_merge", "the model lies in final/ of run.output_dir; `prefopt merge` makes "
     "one of adapter and base"),
    (r"rope_\w+|yarn\w*|use_pose|pose_\w+|config_overrides?|override_\w+|model_(init_)?(config|kwargs)\w*|"
     r"init_kwargs|mixture_of_depths|"
     r"\w+_derived_model|experts_implementation|upcast_\w+",
     "not there: a model is loaded as it was saved, by model.path, revision, dtype and trust_remote_code"),
    (r"(gc|memory|max_memory|gpu_memory|low_cpu|empty_cache)_\w+|\w+_memory(_limit)?|gc_steps|"
     r"activation_\w+|layer_offloading",
     "not there; lower train.micro_batch_tokens, or set train.gradient_checkpointing, where memory is short"),
    (r"freeze_\w+|unfreeze\w*|unfrozen\w*|train_only\w*|trainable_\w+|reinit_\w+",
     "not there: full fine-tuning trains all of a model, and peft.target_modules says what an adapter acts "
     "on"),
]  # fmt: skip


def family_hint(key: str) -> str | None:
    """What to write instead of a key by its kind; None for a key of no kind that is known here."""
    return next((said for pattern, said in FAMILIES if re.fullmatch(pattern, key)), None)
