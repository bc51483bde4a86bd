"""Sections of which a name chooses one: regimes, engines, references. A key stands in the choices that read it.

A new engine is one class here, added to `Engine`; what code asks of it beside its keys are class variables.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from prefopt.recipe.section import (
    ByName,
    Fraction,
    NoEffect,
    NonNegativeFloat,
    PathText,
    Section,
)


class RegimeSection(Section):
    """Where the next batch comes from. From offline to online is one integer, `sync_every`."""

    name: str


class OfflineSection(RegimeSection):
    """A fixed data set, shuffled by `train.seed` each epoch."""

    name: Literal["offline"] = "offline"


class RolloutsSection(RegimeSection):
    """Responses the policy samples to the prompts of the data, scored by `signals`, labelled by `credit`."""

    name: Literal["rollouts"] = "rollouts"
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


Regime = Annotated[OfflineSection | RolloutsSection, ByName()]


class EngineSection(Section):
    """What samples. Its class variables are what code asks of an engine, instead of its name."""

    holds_weights: ClassVar[bool] = False
    """It is transformers in every process of the run, on the policy's own modules: it can share the weights in
    training, reads quantised ones and takes any adapter. Others serve the main process alone, from files."""
    fixed_context: ClassVar[bool] = True
    """It is started for sequences of a greatest length, and again for longer ones."""
    package: ClassVar[str | None] = None
    """What must be installed for it, beside this project's own needs."""

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the engine's weights; `auto` is the policy's."""
    timeout_s: Annotated[PositiveFloat, NoEffect()] = 1800.0
    """Longest wait for one batch of rollouts, or for a policy to load, before the run stops."""
    startup_timeout_s: Annotated[PositiveFloat, NoEffect()] = 900.0
    """Longest wait for an engine to start."""
    max_restarts: Annotated[int, Field(ge=0), NoEffect()] = 2
    """Times an engine or server that died is started again within a run."""
    max_logp_gap: PositiveFloat | None = None
    """Largest mean |trainer - engine| log-prob, nats a token, that the probe after a push accepts. Default:
    0.002 where both compute in float32, else 0.1."""

    @property
    def starts(self) -> str | None:
        """The package without which this engine cannot be started here."""
        return self.package

    @property
    def num_gpus(self) -> int:
        """GPUs it takes where there are any."""
        return 1


class HFSection(EngineSection):
    """Hugging Face generate, in this process; in one of its own where `regime.max_lag` > 0, or where it has a
    `device` or `cpus` of its own."""

    holds_weights: ClassVar[bool] = True
    fixed_context: ClassVar[bool] = False

    name: Literal["hf"] = "hf"
    device: Annotated[str | None, NoEffect()] = None
    """Torch device of an engine in a process of its own; default: the run's."""
    cpus: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False), NoEffect("run")
    ] = ()
    """Cores that an engine in a process of its own is bound to, a thread each; default: the run's. Keep
    training off them (`taskset`): two that share a core take turns."""
    batch_size: Annotated[PositiveInt, NoEffect("run")] = 256
    """Most responses generated at once."""

    @property
    def num_gpus(self) -> int:
        return 0 if self.device == "cpu" else 1


class VllmKeys(EngineSection):
    """What vLLM is started with, in process and as a server."""

    package: ClassVar[str | None] = "vllm"

    max_model_len: PositiveInt | None = None
    """vLLM's context in tokens; default: the longest prompt + `regime.max_new_tokens`."""
    gpu_memory_utilization: Annotated[Fraction, NoEffect()] = 0.9
    """Share of the GPU's memory vLLM may take; lower it where it shares a GPU with the trainer."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs one vLLM engine is split over."""
    enforce_eager: bool = False
    """Start vLLM without compiling or capturing graphs: starts faster, generates slower."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, as vLLM names them (`max_num_seqs: 64`)."""

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel_size


class VllmSection(VllmKeys):
    """vLLM in process."""

    name: Literal["vllm"] = "vllm"


class VllmServerSection(VllmKeys):
    """vLLM's OpenAI server, started by the run or found at `urls`."""

    name: Literal["vllm_server"] = "vllm_server"
    urls: Annotated[tuple[str, ...], Field(strict=False), NoEffect()] = ()
    """Servers that run already, e.g. http://node7:8000; started by the run if left out."""
    num_servers: Annotated[PositiveInt, NoEffect()] = 1
    """Servers to start."""
    devices: Annotated[tuple[str, ...], Field(strict=False), NoEffect()] = ()
    """CUDA_VISIBLE_DEVICES of each server that is started, e.g. ["6", "7"]; default: what the run sees."""

    @property
    def starts(self) -> str | None:
        return None if self.urls else self.package

    @property
    def num_gpus(self) -> int:
        return 0 if self.urls else self.num_servers * self.tensor_parallel_size


Engine = Annotated[HFSection | VllmSection | VllmServerSection, ByName()]


class ReferenceSection(Section):
    """Which frozen weights the log-ratio is taken against."""

    follows_policy: ClassVar[bool] = False
    """It is made of policies that sampled: rollouts only."""

    name: str


class CachedReferenceSection(ReferenceSection):
    """One whose log-probs of a data set are computed before the first step, and kept."""

    cache_dir: Annotated[PathText | None, NoEffect("run")] = None
    """Store of reference log-probs, shared by runs, losses and learning rates; default: as
    `data.cache_dir`."""


class InitialReference(CachedReferenceSection):
    """The policy as loaded, adapter included."""

    name: Literal["initial"] = "initial"


class ModelReference(CachedReferenceSection):
    """The weights of `path`."""

    name: Literal["model"] = "model"
    path: PathText
    """Hub id or directory of the reference. Same tokenizer as the policy."""
    revision: str | None = None
    """Hub revision of `path`."""


class NoReference(ReferenceSection):
    """None, for objectives without one."""

    name: Literal["none"] = "none"


class BehaviorReference(ReferenceSection):
    """The policy that sampled (BPO, arXiv:2406.12168); for rollouts."""

    follows_policy: ClassVar[bool] = True

    name: Literal["behavior"] = "behavior"


class EmaReference(ReferenceSection):
    """A moving average of the policy; for rollouts."""

    follows_policy: ClassVar[bool] = True

    name: Literal["ema"] = "ema"
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """ref ← (1 - rate) · ref + rate · policy after every step."""


class SyncedReference(ReferenceSection):
    """The policy at its last `sync_every_pushes`-th push (arXiv:2506.21495); for rollouts."""

    follows_policy: ClassVar[bool] = True

    name: Literal["synced"] = "synced"
    sync_every_pushes: PositiveInt = 1
    """Pushes of the policy to the engine between updates of the reference."""


Reference = Annotated[
    InitialReference
    | ModelReference
    | NoReference
    | BehaviorReference
    | EmaReference
    | SyncedReference,
    ByName(),
]
