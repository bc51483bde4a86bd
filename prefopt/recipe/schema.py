"""The recipe schema: every key of a YAML recipe, its type, bound, default and documentation.

The string under a field is its documentation and its ``--help``: there is no second list. No torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from prefopt.recipe.data_schema import (
    ColumnMap,
    ConditionSection,
    DataSection,
    SamplingSection,
    SourceSection,
)
from prefopt.recipe.section import Fraction, NonNegativeFloat, PathText, Section

__all__ = [
    "DEFAULT_MICRO_BATCH_TOKENS",
    "ColumnMap",
    "ConditionSection",
    "DataSection",
    "EngineSection",
    "EvalSection",
    "Fraction",
    "GenerationSection",
    "ModelSection",
    "NonNegativeFloat",
    "PathText",
    "PeftSection",
    "Recipe",
    "ReferenceSection",
    "RegimeSection",
    "RunSection",
    "SamplingSection",
    "Section",
    "SourceSection",
    "TrainSection",
]  # fmt: skip

DEFAULT_MICRO_BATCH_TOKENS = 16384
"""`train.micro_batch_tokens` where the recipe leaves it out, on anything but a CPU."""


class ModelSection(Section):
    """Which policy to train and how its log-probs are computed."""

    path: PathText
    """Hub id or local directory of the policy; a directory that holds a PEFT adapter is loaded with
    its base."""
    revision: str | None = None
    """Hub revision (commit, tag or branch); pin it to make a run reproducible."""
    tokenizer: PathText | None = None
    """Hub id or directory of the tokenizer; default: the model's own."""
    chat_template: PathText | None = None
    """Path of a Jinja file that replaces the tokenizer's chat template."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype the weights are loaded in; `auto` is the dtype they were saved in."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """Token layout. `packed`: each prompt once, its responses as branches, no padding. `padded`:
    the plain layout. `auto`: packed where the architecture's attention can take it, else padded,
    and says which."""
    disable_dropout: bool = True
    """Set every dropout to 0, as the papers of this family do."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub repository. Only for repositories you trust."""
    quantization: Literal["4bit", "8bit"] | None = None
    """bitsandbytes quantisation of the frozen base (QLoRA); needs CUDA and a `peft` section."""


class PeftSection(Section):
    """A PEFT adapter. Keys besides `type` and `adapter` go to that type's peft config unchanged."""

    model_config = ConfigDict(extra="allow")

    type: str = "lora"
    """peft type (`lora`, `adalora`, `loha`, `ia3`, …); variants such as DoRA are keys of the type
    (`use_dora: true`)."""
    adapter: PathText | None = None
    """Train on from this saved adapter; the reference is then this adapter, not the bare base.
    Takes no other key."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys that go to the peft config as they are."""
        return dict(self.model_extra or {})


class RegimeSection(Section):
    """Where the next batch comes from. From offline to online is one integer, `sync_every`."""

    name: Literal["offline", "rollouts"] = "offline"
    """`offline`: a fixed data set, shuffled by `train.seed` each epoch. `rollouts`: responses the policy
    samples to the prompts of the data, scored by `signals`, labelled by `credit`; the other keys are its."""
    sync_every: PositiveInt | None = 1
    """Optimizer steps between pushes of the weights to the engine. 1 is online, more is semi-online; `null`
    never pushes: everything is sampled from the initial policy (the papers' s = ∞)."""
    max_lag: Annotated[int, Field(ge=0)] = 0
    """Steps that generation may run ahead of training. 0 waits for each batch; 1 generates the next batch
    while this one is trained on (asynchronous). A sample is never older than max_lag + sync_every - 1."""
    samples_per_prompt: PositiveInt = 8
    """Responses sampled for each prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature. The log-probs in the loss are taken at it, too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1.0 samples from the policy itself."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0 takes all."""
    max_new_tokens: PositiveInt = 512
    """Longest response in tokens. One that has not ended by then is scored and trained on as it is, and
    counted (`rollout/truncated_frac`)."""
    prompts_per_step: PositiveInt | None = None
    """Prompts sampled for at each step; default: `train.global_batch_size`."""
    offline_pairs: bool = False
    """Also put `train.global_batch_size` pairs of `data.train` into every step (HyPO's mixed regime)."""
    reset_frac: Fraction = 0.0
    """Share of prompts whose rollouts start from a random prefix of the data's own response (DR-PO,
    arXiv:2404.08495); those tokens are part of the prompt, outside the loss."""
    resample_frac: NonNegativeFloat = 0.0
    """Extra prompts a step may draw to replace groups that give no label, as a share of those it starts
    with."""
    importance_cap: PositiveFloat | None = None
    """Weight each sample by min(cap, π_now / π_sampler), detached, for rollouts that are off-policy; 2.0 is
    usual. For objectives that have no importance ratio of their own."""
    drop_lag_above: Annotated[int, Field(ge=0)] | None = None
    """Drop samples older than this many steps instead of training on them (counted)."""
    max_failed_frac: Fraction = 0.2
    """Stop when more than this share of a step's groups is dropped because a signal failed."""


class EngineSection(Section):
    """What samples the rollouts."""

    name: Literal["hf", "vllm", "vllm_server"] = "hf"
    """`hf`: Hugging Face generate, in this process (in one of its own where `regime.max_lag` > 0, or where
    it has a `device` or `cpus` of its own). `vllm`: vLLM in process. `vllm_server`: vLLM's OpenAI server,
    started by the run or found at `urls`."""
    urls: tuple[str, ...] = Field(default=(), strict=False)
    """Servers that run already, e.g. http://node7:8000; started by the run if left out."""
    num_servers: PositiveInt = 1
    """Servers to start."""
    devices: tuple[str, ...] = Field(default=(), strict=False)
    """CUDA_VISIBLE_DEVICES of each server that is started, e.g. ["6", "7"]; default: what the run sees."""
    device: str | None = None
    """Torch device of an `hf` engine in a process of its own; default: the run's."""
    cpus: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False)
    """Cores that an `hf` engine in a process of its own is bound to, a thread each; default: the run's. Keep
    training off them (`taskset`): two that share a core take turns."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the engine's weights; `auto` is the policy's."""
    batch_size: PositiveInt = 256
    """Most responses `hf` generates at once."""
    max_model_len: PositiveInt | None = None
    """vLLM's context in tokens; default: the longest prompt + `regime.max_new_tokens`."""
    gpu_memory_utilization: Fraction = 0.9
    """Share of the GPU's memory vLLM may take; lower it where it shares a GPU with the trainer."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs one vLLM engine is split over."""
    enforce_eager: bool = False
    """Start vLLM without compiling or capturing graphs: starts faster, generates slower."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, as vLLM names them (`max_num_seqs: 64`)."""
    timeout_s: PositiveFloat = 1800.0
    """Longest wait for one batch of rollouts, or for a policy to load, before the run stops."""
    startup_timeout_s: PositiveFloat = 900.0
    """Longest wait for an engine to start."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """Times a server that died is started again within a run."""
    max_logp_gap: PositiveFloat | None = None
    """Largest mean |trainer - engine| log-prob, nats a token, that the probe after a push accepts. Default:
    0.002 where both compute in float32, else 0.1."""


class ReferenceSection(Section):
    """Which frozen weights the log-ratio is taken against."""

    name: Literal["initial", "model", "none", "behavior", "ema", "synced"] = "initial"
    """`initial`: the policy as loaded, adapter included. `model`: the weights of `path`. `none`. For
    rollouts also `behavior`: the policy that sampled (BPO, arXiv:2406.12168); `ema`: a moving average of the
    policy; `synced`: the policy at its last `sync_every_pushes`-th push (arXiv:2506.21495)."""
    path: PathText | None = None
    """Hub id or directory of the reference, with `name: model`. Same tokenizer as the policy."""
    revision: str | None = None
    """Hub revision of `path`."""
    cache_dir: PathText | None = None
    """Store of reference log-probs, shared by runs, losses and learning rates; default: as
    `data.cache_dir`."""
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """With `name: ema`: ref ← (1 - rate) · ref + rate · policy after every step."""
    sync_every_pushes: PositiveInt = 1
    """With `name: synced`: pushes of the policy to the engine between updates of the reference."""


class TrainSection(Section):
    """Optimisation: batch, schedule, precision, checkpoints."""

    learning_rate: PositiveFloat
    """Peak learning rate. Typical: 3e-7 to 1e-6 for full fine-tuning, 5e-6 to 5e-5 for LoRA."""
    global_batch_size: PositiveInt = 128
    """Pairs (rows for SFT) per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: PositiveInt | None = None
    """Most pairs in one forward of one process; default: as many as `micro_batch_tokens` holds."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward of one process (in the layout that runs). Lower it when memory is short.
    Default: 16384; on CPU as few as keep its cores busy (a smaller forward is as fast there, and leaner)."""
    num_epochs: PositiveFloat = 1.0
    """Passes over the training data."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps instead of after `num_epochs`."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    warmup_frac: Fraction = 0.1
    """Share of all steps with linear warm-up."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """`adamw` (torch, fused where the device has it); `rmsprop` is what the DPO authors used."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW first-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW second-moment decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW denominator floor; 1e-4 stabilises online DPO (arXiv:2506.21495)."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, decoupled under adamw and L2 under rmsprop; norms and biases are exempt."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm to this; `null` does not clip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Mixed precision of the forward. Weights keep `model.dtype`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    shuffle: bool = True
    """Draw a new order every epoch. `false` takes the rows as `data.train` has them, epoch after epoch: for a
    curriculum that `prefopt data` has put in order. Only for a fixed data set."""
    seed: int = 42
    """Seed of adapter initialisation, data order and dropout."""
    resume: PathText = "auto"
    """`auto`: from the newest complete checkpoint of `run.output_dir`, if any; `never`; or the path of
    a checkpoint."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints; default: one at the end (and on Ctrl-C)."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""
    log_every: PositiveInt = 1
    """Steps between rows of `metrics.jsonl`."""


class GenerationSection(Section):
    """Answers of the policy in training to the same prompts with the same seeds, at every evaluation: share
    that ends, repetition, length against the start."""

    num_prompts: PositiveInt = 32
    """Prompts answered each time: the first different ones."""
    prompts: tuple[SourceSection, ...] = Field(default=(), strict=False)
    """Sources of the prompts; default: the prompts of `data.eval` (or `data.eval_frac`)."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""
    temperature: NonNegativeFloat = 1.0
    """1 samples from the policy itself; 0 is greedy, which repeats more than the policy does."""
    score: bool = True
    """Also score the answers with the recipe's `signals`, where `prompts` are given: reward on held-out
    prompts. A reward model is then loaded a second time."""


class EvalSection(Section):
    """What is measured on held-out data while training."""

    every: PositiveInt | None = None
    """Steps between evaluations; default: before the first step and after the last."""
    generation: GenerationSection | None = None
    """Leave out to generate nothing."""


class RunSection(Section):
    """Where the run lives and who is told."""

    output_dir: PathText
    """Run directory: run.json, metrics.jsonl, rejects.jsonl, checkpoints/ and final/."""
    name: str | None = None
    """Name shown by trackers; default: the directory's name."""
    trackers: tuple[str, ...] = Field(default=(), strict=False)
    """Trackers of accelerate to log to: tensorboard, wandb, mlflow, comet_ml, aim, clearml, …"""


class Recipe(Section):
    """A whole run. `objective` takes a `name` and that objective's hyper-parameters."""

    stage: Literal["preference", "sft", "reward_model"] = "preference"
    """What is trained: a policy on preferences (or samples), a policy by SFT, or a reward model on pairs."""
    model: ModelSection
    peft: PeftSection | None = None
    """Leave out for full fine-tuning."""
    data: DataSection
    objective: dict[str, Any] | None = None
    """`name` and hyper-parameters, e.g. `{name: simpo, beta: 2.0, gamma: 1.0}`."""
    regime: RegimeSection = RegimeSection()
    engine: EngineSection | None = None
    """Default: `hf`. Only for rollouts."""
    signals: tuple[dict[str, Any], ...] = Field(default=(), strict=False)
    """Each has a `name`, a `weight` (default 1) and that signal's own keys; the reward is the weighted sum.
    `prefopt signals` lists them. Only for rollouts."""
    credit: dict[str, Any] | None = None
    """`name` and keys of the rule that turns scores into pairs or advantages; default: what goes with the
    objective. `prefopt credits` lists them. Only for rollouts."""
    reference: ReferenceSection | None = None
    """Default: `initial` where the objective needs a reference."""
    train: TrainSection
    eval: EvalSection = EvalSection()
    run: RunSection
    plugins: tuple[str, ...] = Field(default=(), strict=False)
    """Python files (relative to the recipe) imported first: where your own objectives live."""

    @property
    def has_rollouts(self) -> bool:
        """Does the run sample from the policy while it trains?"""
        return self.regime.name == "rollouts"

    @property
    def hf_engine_has_process(self) -> bool:
        """Does an `hf` engine run beside training, with weights that are pushed to it?"""
        engine = self.engine or EngineSection()
        apart = self.regime.max_lag > 0 or engine.device is not None or bool(engine.cpus)
        return engine.name == "hf" and apart

    @property
    def reference_name(self) -> str:
        """The reference in force: what the recipe says, else `initial` (skipped where unneeded)."""
        return self.reference.name if self.reference else "initial"
