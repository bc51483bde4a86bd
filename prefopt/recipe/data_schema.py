"""The recipe's ``data`` section: sources, columns, and how the rows of weighted samples are read and drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
)

from prefopt.recipe.section import Newer, NoEffect, PathText, Section


class ColumnMap(Section):
    """Which column of a data file holds what; name only what differs from the defaults."""

    prompt: str | None = "prompt"
    """Prompt column (text or chat messages); `null` where the prompt is the common start of both sides.
    Where the default is absent, `conversations` is taken, else the prompt is the common start."""
    chosen: str = "chosen"
    """Preferred response: text, one message, or a whole dialogue. SFT rows may have it all in
    `conversations` or `messages` instead."""
    rejected: str | None = "rejected"
    """Dispreferred response, same shapes as `chosen`; `null` for SFT rows."""
    turns: Annotated[Literal["last", "all"], Newer()] = "last"
    """Which turns of the assistant carry loss. `all`, for `stage: sft` on dialogues: every turn that answers
    something, up to the token that ends it, and the turns between are context; the prompt is what comes before the
    first. A row whose chat template renders an earlier turn otherwise than a last one (Qwen3 drops its thinking)
    is rejected and counted."""
    score_chosen: str | None = None
    """Column with the score of `chosen`; a dot descends (`metadata.score_chosen`)."""
    score_rejected: str | None = None
    """Column with the score of `rejected`."""
    margin: Annotated[str | None, Newer()] = None
    """Column that says by how much `chosen` is better, for `stage: reward_model`: the m of Llama 2's loss
    -log σ(r_w - r_l - m). In the place of the two scores, whose difference it is."""
    response: str = "response"
    """Response of a sample row, for objectives on rewards or advantages; same shapes as `chosen`. Where a source
    has no such column but chosen and rejected with their scores, each pair is read as two samples."""
    reward: str = "reward"
    """Column with the reward of `response`."""
    advantage: str = "advantage"
    """Column with the advantage of `response`."""
    ended: str | None = None
    """Column that is false where `response` does not end its turn (a step of a solution): no end token follows it
    then. Plain text only. Default: every response ends."""
    system: str | None = None
    """Column with a system message put before the prompt."""
    id: str | None = None
    """Column that identifies the row in logs and rejects; default: file name and row number."""
    tools: Annotated[str | None, Newer()] = "tools"
    """Column with the tools that the chat template is given: a list of JSON schemas, or the JSON text of one.
    Where the default is absent there are none; `null` leaves the column out. A row whose template does not render
    them is rejected and counted (`not_rendered`)."""
    documents: Annotated[str | None, Newer()] = "documents"
    """Column with the documents that the chat template is given, likewise."""
    chat_template_kwargs: Annotated[str | None, Newer()] = "chat_template_kwargs"
    """Column with keywords of the chat template (an object, or its JSON text), e.g. `enable_thinking`; a row's own
    win over `model.chat_template_kwargs`."""
    ignored: Annotated[tuple[str, ...], Newer()] = Field(default=(), strict=False)
    """Columns of images, audio or video that say nothing about the answer. Without this they stop the run: a
    policy of text cannot see them."""


class SourceSection(Section):
    """One data source of a mixture."""

    path: PathText
    """Local file, directory or glob (json, jsonl, parquet, csv; .gz too), or a hub data set id."""
    split: str | None = None
    """Split of a hub data set, e.g. `train_prefs`. Not for local files."""
    subset: str | None = None
    """Configuration name of a hub data set. Not for local files."""
    revision: str | None = None
    """Revision of a hub data set. Not for local files."""
    format: Literal["auto", "text", "chat", "hh", "sharegpt"] = "auto"
    """How a row is read. `text`: plain strings, no template. `chat`: message lists, or strings that
    become one turn each. `hh`: "Human:/Assistant:" transcripts. `sharegpt`: from/value turns.
    `auto`: message lists are chat, from/value turns sharegpt, transcripts without a prompt column
    hh, other strings text, as the first row of the source shows."""
    columns: ColumnMap = ColumnMap()
    """Column map."""
    name: Annotated[str | None, NoEffect("run"), Newer()] = None
    """What the source is called: a signal with `only_where: {source: NAME}` scores its rows, and metrics of a
    held-out one are `eval/<name>/…` where there are several. Default: the file's name without its ending, or the
    last part of the hub id. In a pipeline's first stage, where it is given, rows get it as `source`."""
    weight: PositiveFloat = 1.0
    """Times an epoch passes over this source: 0.25 draws a quarter of its rows, 2 takes each twice."""
    max_rows: PositiveInt | None = None
    """Read only the first rows of the source."""
    drop_ties: bool = False
    """Reject rows whose two scores are equal (counted as `tie`); needs both score columns."""
    template_omits: Annotated[Literal["nothing", "history", "anything"], Newer()] = "nothing"
    """What the chat template may leave out of what a row says. `nothing`: a row whose thought, tool call, tools or
    system message is not rendered is rejected and counted (`not_rendered`). `history`: earlier turns of the
    assistant may lose text, as Qwen3's template drops their thoughts. `anything`: all of it is meant."""
    control_tokens: Annotated[tuple[str, ...], Newer()] = Field(default=(), strict=False)
    """Control tokens (`</s>`, `<|im_end|>`, …) that may stand in texts and are read as such: their names, or
    `[all]` for text that a template has rendered already. A row with another is rejected and counted
    (`control_token`)."""


class ConditionSection(Section):
    """A reward in the prompt: a row's own while training, the target when the policy answers."""

    template: str = "{input} <rm_score>: {reward} "
    """The prompt (of a dialogue, its last turn) and the reward with two decimals, as OpenRLHF@95ac56d has it.
    Where the format is text, let it end with a line break: a tokenizer joins a space to the word after it."""
    target: FiniteFloat = 5.0
    """The reward asked for, in the units of the (normalised) rewards: standard deviations in the paper's code."""


class SamplingSection(Section):
    """Which rows of weighted samples a step of a fixed data set draws."""

    name: Literal["uniform", "positive", "advantage", "reward"] = "uniform"
    """`uniform`: every row once an epoch. `positive`: rows whose response the objective makes likelier, by an
    advantage above 0 (A-LoL's good_random) or a reward that reaches the threshold of `filtered_nll`. `advantage`:
    with probability in proportion to max(A, 0), A-LoL's priority. `reward`: to max(R, 0), as its R-LoL, wBC and
    GOLD."""
    replacement: bool = True
    """`true`: every draw on its own, as A-LoL's code does (arXiv:2305.14718, LoL-RL@9f8d816, which means to draw
    without and does not). `false`: no row twice in a step, and with `positive` in an epoch."""
    scale_steps: bool = True
    """An epoch is as many rows as can be drawn, and `train.max_steps` is taken times their share: A-LoL's steps
    times the positive share. `false`: as many as there are rows."""


class DataSection(Section):
    """Preference pairs (or SFT rows, or weighted samples) to train and evaluate on."""

    train: tuple[SourceSection, ...] = Field(default=(), strict=False)
    """Sources of the training mixture: pairs; rows with `stage: sft`; samples (a prompt, a response, its reward or
    advantage) where the objective weighs those."""
    prompts: tuple[SourceSection, ...] = Field(default=(), strict=False)
    """Sources of prompts for rollouts; only their prompt is needed, other columns are what `signals` check
    against. Default: the prompts of `train`."""
    eval: tuple[SourceSection, ...] = Field(default=(), strict=False)
    """Sources of the held-out set."""
    eval_frac: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training rows held out by `seed` when `eval` is not given."""
    max_length_tokens: PositiveInt = 2048
    """Longest prompt + response, in tokens. A longer row is rejected and counted, never cut."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt, in tokens; longer rows are rejected and counted. Default: only the total is
    bounded."""
    seed: int = 0
    """Seed of the train/eval split and of mixture draws."""
    normalize_rewards: Literal["none", "sigmoid", "z_score", "z_score_per_prompt"] = "none"
    """What becomes of the rewards of sample rows before anything reads them. `sigmoid`: into (0, 1), as A-LoL
    takes a reward model's. `z_score`: minus the mean, over the standard deviation, of all rows of `train`
    (arXiv:2308.12050); `z_score_per_prompt`: of the rows of one prompt. Advantages stay as they are."""
    sampling: SamplingSection = SamplingSection()
    """Which sample rows a step draws."""
    condition: ConditionSection | None = None
    """How a reward is written into a prompt, for `reward_conditioned`."""
    cache_dir: Annotated[PathText | None, NoEffect("run")] = None
    """Where tokenised data is cached; default: `$PREFOPT_CACHE` or `~/.cache/prefopt`."""
    num_workers: Annotated[PositiveInt, NoEffect("run")] = 1
    """Processes that tokenise."""

    @property
    def has_margins(self) -> bool:
        """Does a source say by how much its chosen responses are better?"""
        return any(source.columns.margin is not None for source in (*self.train, *self.eval))
