"""The recipe schema: every key of a YAML recipe, its type, bound, default and documentation.

The string under a field is its documentation and its ``--help``: there is no second list. No torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
)

from prefopt.recipe.choices import (
    CachedReferenceSection,
    Engine,
    EngineSection,
    HFSection,
    ModelReference,
    OfflineSection,
    Reference,
    ReferenceSection,
    Regime,
    RegimeSection,
    RolloutsSection,
    VllmKeys,
    VllmSection,
    VllmServerSection,
)
from prefopt.recipe.data_schema import (
    ColumnMap,
    ConditionSection,
    DataSection,
    SamplingSection,
    SourceSection,
)
from prefopt.recipe.entries import Entry, bind
from prefopt.recipe.registry import BoundCredit, BoundObjective, BoundSignal
from prefopt.recipe.section import Fraction, Newer, NoEffect, NonNegativeFloat, PathText, Section

__all__ = [
    "DEFAULT_MICRO_BATCH_TOKENS",
    "BestSection",
    "CachedReferenceSection",
    "ColumnMap",
    "ConditionSection",
    "DataSection",
    "Engine",
    "EngineSection",
    "EvalSection",
    "Fraction",
    "GenerationSection",
    "HFSection",
    "ModelReference",
    "ModelSection",
    "NoEffect",
    "NonNegativeFloat",
    "OfflineSection",
    "PathText",
    "PeftSection",
    "Recipe",
    "Reference",
    "ReferenceSection",
    "Regime",
    "RegimeSection",
    "RolloutsSection",
    "RunSection",
    "SamplingSection",
    "Section",
    "SourceSection",
    "TrainSection",
    "VllmKeys",
    "VllmSection",
    "VllmServerSection",
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
    chat_template_kwargs: Annotated[dict[str, Any], Newer()] = Field(default_factory=dict)
    """Keywords that the chat template is rendered with, e.g. `{enable_thinking: false}`. They are written into the
    template as its defaults, and so into the saved tokenizer: the policy is served as it was trained. One that the
    template does not read is an error."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype the weights are loaded in; `auto` is the dtype they were saved in. What trains of half-precision
    weights is kept in float32 and saved in the dtype it was loaded in (DeepSpeed and FSDP keep such masters
    themselves)."""
    layout: Annotated[Literal["auto", "packed", "padded"], NoEffect("run")] = "auto"
    """Token layout. `packed`: each prompt once, its responses as branches, no padding. `padded`:
    the plain layout. `auto`: packed where the architecture's attention can take it, else padded,
    and says which."""
    disable_dropout: bool = True
    """Set every dropout to 0, as the papers of this family do, and keep routers from drawing noise."""
    router_aux_loss_coef: Annotated[NonNegativeFloat | None, Newer()] = None
    """Weight of a mixture of experts' balancing loss in every stage; 0 is none. Default: as the model's
    configuration asks, which is none unless it says `output_router_logits: true`."""
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


class TrainSection(Section):
    """Optimisation: batch, schedule, precision, checkpoints."""

    learning_rate: PositiveFloat
    """Peak learning rate. Typical: 3e-7 to 1e-6 for full fine-tuning, 5e-6 to 5e-5 for LoRA."""
    global_batch_size: PositiveInt = 128
    """Pairs (rows for SFT) per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: Annotated[PositiveInt | None, NoEffect("run")] = None
    """Most pairs in one forward of one process; default: as many as `micro_batch_tokens` holds."""
    micro_batch_tokens: Annotated[PositiveInt | None, NoEffect("run")] = None
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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the forward computes in. `auto`: in the dtype of the weights as loaded, bf16 for bfloat16 weights,
    fp16 for float16, fp32 for float32. `fp32`: without autocast."""
    gradient_checkpointing: Annotated[bool, NoEffect("run")] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    shuffle: bool = True
    """Draw a new order every epoch. `false` takes the rows as `data.train` has them, epoch after epoch: for a
    curriculum that `prefopt data` has put in order. Only for a fixed data set."""
    seed: int = 42
    """Seed of adapter initialisation, data order and dropout."""
    resume: Annotated[PathText, NoEffect()] = "auto"
    """`auto`: from the newest complete checkpoint of `run.output_dir`, if any; `never`; or the path of
    a checkpoint."""
    accept_changes: Annotated[bool, NoEffect()] = False
    """Go on with other settings than the weights so far were made with. Without it such a start is refused,
    setting by setting; with it `history` in run.json says what changed, and at which step."""
    save_every: Annotated[PositiveInt | None, NoEffect()] = None
    """Steps between checkpoints; default: one at the end (and on Ctrl-C)."""
    keep_checkpoints: Annotated[PositiveInt, NoEffect()] = 2
    """Newest checkpoints to keep."""
    log_every: Annotated[PositiveInt, NoEffect()] = 1
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


class BestSection(Section):
    """Keeps the best checkpoint beside the newest, by one metric, and stops where it gets no better."""

    metric: str
    """Any name of `metrics.jsonl`: `eval/loss/total`, `eval/rewards/accuracy`, `eval/generation/reward`, of
    one source `eval/<source>/loss/total`, or of training, such as `rollout/reward`."""
    mode: Literal["min", "max"]
    """Whether a smaller (`min`) or a larger (`max`) value is better."""
    min_delta: NonNegativeFloat = 0.0
    """A value is better only by more than this."""
    patience: PositiveInt | None = None
    """Stop training after this many values in a row that were no better. Default: train to the last step."""
    final: Literal["best", "last"] = "best"
    """Whose weights `final/` holds: of the best step, or of the last. The start of the run is no candidate."""


class EvalSection(Section):
    """What is measured on held-out data while training."""

    every: PositiveInt | None = None
    """Steps between evaluations; default: before the first step and after the last."""
    best: Annotated[BestSection | None, Newer()] = None
    """Leave out to train to the last step and keep its weights."""
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
    stuck_after_s: PositiveFloat = 600.0
    """Of several processes: longest time in which none gets on (a forward, an update; sampling and saving may take
    longer) before the run ends and names the one that the others wait for. NCCL's own limit is the same."""


class Recipe(Section):
    """A whole run. `objective` takes a `name` and that objective's hyper-parameters."""

    stage: Literal["preference", "sft", "reward_model"] = "preference"
    """What is trained: a policy on preferences (or samples), a policy by SFT, or a reward model on pairs."""
    model: ModelSection
    peft: PeftSection | None = None
    """Leave out for full fine-tuning."""
    data: DataSection
    objective: Annotated[BoundObjective, Entry("objective")] | None = None
    """`name` and hyper-parameters, e.g. `{name: simpo, beta: 2.0, gamma: 1.0}`."""
    regime: Regime = OfflineSection()
    engine: Engine | None = None
    """Default: `hf`. Only for rollouts."""
    signals: tuple[Annotated[BoundSignal, Entry("signals")], ...] = Field(default=(), strict=False)
    """Each has a `name`, a `weight` (default 1), `only_where` (a column, or values of columns: the rows it is for;
    default: all) and that signal's own keys; the reward is the weighted sum.
    `prefopt signals` lists them. Only for rollouts."""
    credit: Annotated[BoundCredit, Entry("credit")] | None = None
    """`name` and keys of the rule that turns scores into pairs or advantages; default: what goes with the
    objective. `prefopt credits` lists them. Only for rollouts."""
    reference: Reference | None = None
    """Default: `initial` where the objective needs a reference."""
    train: TrainSection
    eval: EvalSection = EvalSection()
    run: Annotated[RunSection, NoEffect()]
    plugins: tuple[str, ...] = Field(default=(), strict=False)
    """Python files (relative to the recipe) imported first: where your own objectives live."""

    @property
    def rollouts(self) -> RolloutsSection | None:
        """The regime of a run that samples from the policy while it trains; None for a fixed data set."""
        return self.regime if isinstance(self.regime, RolloutsSection) else None

    @property
    def has_rollouts(self) -> bool:
        """Does the run sample from the policy while it trains?"""
        return self.rollouts is not None

    @property
    def credit_in_force(self) -> BoundCredit | None:
        """The rule from scores to labels: the recipe's, else what goes with the objective; None without one."""
        if self.credit is not None or self.objective is None:
            return self.credit
        return bind("credit", {"name": self.objective.spec.credit or "best_worst"})

    @property
    def sampled_by(self) -> EngineSection:
        """The engine in force: what the recipe says, else `hf`."""
        return self.engine or HFSection()

    @property
    def engine_has_process(self) -> bool:
        """Does an engine run beside training that could run in its process?"""
        engine = self.sampled_by
        if self.rollouts is None or not isinstance(engine, HFSection):
            return False
        return self.rollouts.max_lag > 0 or engine.device is not None or bool(engine.cpus)

    @property
    def longest_wait_s(self) -> float:
        """How long processes may wait while one starts an engine or samples; 0 without rollouts."""
        if self.rollouts is None:
            return 0.0
        engine = self.sampled_by
        jobs = 2 * (self.rollouts.max_lag + 2)  # a push and a batch each
        return engine.startup_timeout_s + jobs * engine.timeout_s

    @property
    def reference_name(self) -> str:
        """The reference in force: what the recipe says, else `initial` (skipped where unneeded)."""
        return self.reference.name if self.reference else "initial"
