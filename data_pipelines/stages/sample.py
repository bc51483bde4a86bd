"""Responses of a policy to prompts: through the engines and the renderer that online training uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt

from data_pipelines.base import Dropped, Needs, Place, Result, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, asked_options
from eval.base import Answer, Decoding
from prefopt.errors import ConfigError, ModelError
from prefopt.recipe.schema import (
    ConditionSection,
    Engine,
    HFSection,
    ModelSection,
    NonNegativeFloat,
)
from prefopt.recipe.section import Newer
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.storage.packed import pack_ids

if TYPE_CHECKING:
    from eval.engines import Generator
    from prefopt.engines.base import Request

logger = logging.getLogger("prefopt.data")

_IGNORED = {"model": ("layout", "disable_dropout"), "engine": ("max_logp_gap", "cpus")}
"""Keys of the shared sections that only training reads."""


@stage(
    "sample",
    works="map",
    reads={RowKind.PROMPTS, RowKind.GROUPS},
    gives=RowKind.GROUPS,
    source="SimPO v0.2's generation (arXiv:2405.14734); several models: Arena Learning (arXiv:2407.10627)",
)
class Sample(StageSettings):
    """Samples responses to each prompt: one for every seed, temperature and sample number.

    A second `sample` stage (another `id`, another `model`) appends its responses to those that are there. A
    prompt that leaves less than `max_new_tokens` of room, or that the chat template refuses, is dropped and
    counted, never cut. What is sampled depends on the pipeline's seed, the stage's id, the row's id and these
    settings; not on shards or workers.

    Each response has `text`, `tokens` (its end token included), `ended` (false: cut by `max_new_tokens`), `model`,
    `seed`, `temperature` and `ids`; the row gets `prompt_ids`. Ids are those of one tokenizer: where a stage's
    model reads the prompt as other ids than the stage before, both are left out.
    """

    model: ModelSection
    """What answers: `path` of a model, an adapter, or a run directory (its final policy)."""
    engine: Engine = HFSection()
    """As a recipe's `engine`. One call samples a whole shard: `shard_rows` x responses must fit `timeout_s`."""
    name: str | None = None
    """What the responses' `model` says; default: the last part of `model.path`."""
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (0,)
    """One response for each of them (SimPO v0.2: 13, 21, 42, 79, 100)."""
    samples_per_seed: PositiveInt = 1
    """Responses for each seed; `{seeds: [0], samples_per_seed: 8}` is eight samples."""
    temperatures: Annotated[tuple[NonNegativeFloat, ...], Field(strict=False, min_length=1)] = (
        0.8,
    )
    """Every seed is sampled at each of them; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling; 1.0 takes all tokens."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0 takes all."""
    max_new_tokens: PositiveInt = 4096
    """Longest response in tokens (SimPO v0.2: 4096; LIONs: 512)."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt in tokens. With `max_new_tokens` it is the context that vLLM is started with."""
    control_tokens: Annotated[tuple[str, ...], Newer()] = Field(default=(), strict=False)
    """Control tokens that may stand in prompts, as a recipe's `data.prompts.control_tokens`: names, or `[all]` for
    text that a template has rendered already. Other prompts with one are dropped (`control_token`)."""
    condition: ConditionSection | None = None
    """Ask for a reward: for a policy of `reward_conditioned`, whose run says the template and, in `run.json`, the
    range of rewards it has seen. The row keeps its own prompt."""
    drop_identical: bool = True
    """Drop prompts whose responses, earlier stages' included, all have the same text (SimPO v0.2). One response
    alone is kept."""
    drop_unended: bool = False
    """Leave out responses that were cut by `max_new_tokens`; a prompt with none left is dropped."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        def at(key: str) -> str:
            return document.origin((*path, *key.split("."))) + f"sample.{key}"

        return [*self._ignored(at), *self._equal_draws(at)]

    def _ignored(self, at: Callable[[str], str]) -> Iterator[str]:
        for section, keys in _IGNORED.items():
            for key in keys:
                if key in getattr(self, section).model_fields_set:
                    yield f"{at(f'{section}.{key}')}: would be ignored: sampling does not read it; leave it out"
        quantization, engine = self.model.quantization, self.engine
        if quantization is not None and not engine.holds_weights:
            yield (
                f"{at('model.quantization')} = {quantization}: only the hf engine reads it, and engine.name = "
                f"{engine.name}; vLLM has its own, under engine.options"
            )

    def _equal_draws(self, at: Callable[[str], str]) -> Iterator[str]:
        for key in ("seeds", "temperatures"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                yield (
                    f"{at(key)} = {list(values)}: holds one twice, and equal ones give equal responses; for more "
                    "of them raise samples_per_seed"
                )
        wanted = len(self.seeds) * self.samples_per_seed
        if 0 in self.temperatures and wanted > 1:
            yield (
                f"{at('temperatures')}: 0 is greedy, so all {wanted} responses of a prompt are equal. Ask for one "
                "seed and sample, or raise it"
            )

    def basis(self) -> Mapping[str, Any]:
        from eval.models import resolve_run
        from prefopt.data.render import RENDERER_VERSION
        from prefopt.data.tokenise import tokenizer_hash
        from prefopt.model.load import load_tokenizer
        from prefopt.model.source import resolve_source

        policy = resolve_run(self.model)
        source = resolve_source(policy.path, policy.revision)
        return {
            "weights": source.content,
            "tokenizer": tokenizer_hash(load_tokenizer(policy)),
            "renderer": RENDERER_VERSION,
        }

    def needs(self) -> Needs:
        return Needs(stays=True, num_gpus=self.engine.num_gpus)

    def open(self, place: Place) -> SampleWorker:
        """Starts the engine. Raises: ModelError, EngineError; ConfigError if its context is too short."""
        from eval.engines import Generator
        from eval.models import condition_problems, resolve_run
        from prefopt.model.frozen import default_device

        policy = resolve_run(self.model)
        for problem in condition_problems(policy.path, self.condition):
            logger.warning("stage %r: %s", place.id, problem)
        device = str(default_device())
        generator = Generator(policy, self.engine, device=device, log_dir=place.log_dir)
        controls = generator.renderer.controls
        controls.require_known(self.control_tokens, f"stage {place.id!r}: ")
        generator.start(self.max_prompt_tokens + self.max_new_tokens)
        context = generator.context
        if context is not None and context <= self.max_new_tokens:
            generator.close()
            raise ConfigError(
                f"stage {place.id!r}: max_new_tokens = {self.max_new_tokens}: prompt and response together must "
                f"fit the context of {self.model.path!r}, {context} tokens. Lower it"
            )
        return SampleWorker(self, place, generator)

    @property
    def model_name(self) -> str:
        """What the responses say sampled them."""
        parts = [part for part in Path(self.model.path).parts if part != "final"]
        return self.name or parts[-1]


@dataclass(frozen=True)
class _Draw:
    """One response wanted of each prompt."""

    seed: int
    number: int
    temperature: float


class SampleWorker:
    """A started engine; see `Sample`.

    Args:
        settings: of the stage.
        place: of the stage.
        generator: the policy, started.
    """

    def __init__(self, settings: Sample, place: Place, generator: Generator) -> None:
        self.settings = settings
        self.place = place
        self.generator = generator
        longest = settings.max_prompt_tokens
        if generator.context is not None:
            longest = min(longest, generator.context - settings.max_new_tokens)
        self.max_prompt_tokens = longest

    def process(self, rows: Sequence[Row]) -> Sequence[Result]:
        """Raises: EngineError; ModelError for messages without a chat template."""
        prompts = self._prompts(rows)
        found: dict[int, list[dict[str, Any]]] = {
            index: [] for index, ids in enumerate(prompts) if isinstance(ids, tuple)
        }
        for temperature in self.settings.temperatures:
            for chat in (False, True):
                batch = [i for i in found if chat != isinstance(rows[i]["prompt"], str)]
                draws = self._draws(temperature)
                requests = [self._request(rows[i], prompts[i], draws) for i in batch]
                if requests:
                    spec = self.generator.spec(self._decoding(temperature))
                    groups = self.generator.sample(requests, spec)
                    for index, group in zip(batch, groups, strict=True):
                        found[index] += self._responses(group, draws)
        return [
            ids if isinstance(ids, Dropped) else self._group(row, ids, found[index])
            for index, (row, ids) in enumerate(zip(rows, prompts, strict=True))
        ]

    def close(self) -> None:
        self.generator.close()

    def _prompts(self, rows: Sequence[Row]) -> list[Any]:
        """The ids of each prompt, or why it is not asked."""
        from prefopt.data.render import Request as ToRender
        from prefopt.data.rows import Refused

        try:
            kept = self.settings.control_tokens
            allowed = "all" if "all" in kept else kept
            rendered = self.generator.renderer.render_batch(
                [
                    ToRender(self._asked(row["prompt"]), (), options=asked_options(row, allowed))
                    for row in rows
                ]
            )
        except ModelError as error:
            raise ModelError(
                f"stage {self.place.id!r}: {self.settings.model.path!r} has no chat template, and the prompts are "
                "chat messages. Take an instruction-tuned model, name a Jinja file (model.chat_template), or "
                "make the prompts text"
            ) from error
        return [
            Dropped(str(each.reason), each.detail)
            if isinstance(each, Refused)
            else self._checked(each.prompt_ids)
            for each in rendered
        ]

    def _asked(self, prompt: Any) -> Any:
        from prefopt.data.render import conditioned

        condition = self.settings.condition
        if condition is None:
            return prompt
        return conditioned(prompt, condition.template, condition.target)

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...] | Dropped:
        if not ids:
            return Dropped("empty_prompt")
        if len(ids) > self.max_prompt_tokens:
            return Dropped(
                "prompt_too_long", f"{len(ids)} tokens, at most {self.max_prompt_tokens}"
            )
        return ids

    def _draws(self, temperature: float) -> list[_Draw]:
        settings = self.settings
        return [
            _Draw(seed, number, temperature)
            for seed in settings.seeds
            for number in range(settings.samples_per_seed)
        ]

    def _request(self, row: Row, ids: tuple[int, ...], draws: Sequence[_Draw]) -> Request:
        from prefopt.engines.base import Request

        # 62 bits: engines take signed 64-bit seeds
        keys = [f"{row['id']}\0{draw.seed}\0{draw.temperature!r}\0{draw.number}" for draw in draws]
        return Request(ids, tuple(self.place.rng(key).getrandbits(62) for key in keys))

    def _decoding(self, temperature: float) -> Decoding:
        settings = self.settings
        return Decoding(settings.max_new_tokens, temperature, settings.top_p, settings.top_k)

    def _responses(self, group: Sequence[Answer], draws: Sequence[_Draw]) -> list[dict[str, Any]]:
        return [
            {
                "text": answer.text,
                "tokens": answer.num_tokens,
                "ended": answer.ended,
                "model": self.settings.model_name,
                "seed": draw.seed,
                "temperature": draw.temperature,
                "ids": pack_ids(answer.ids or ()),
                **({"opened": answer.opened} if answer.opened else {}),
            }
            for answer, draw in zip(group, draws, strict=True)
        ]

    def _group(self, row: Row, ids: tuple[int, ...], sampled: Sequence[dict[str, Any]]) -> Result:
        """The row with its responses, those of earlier stages first; Dropped where none is worth keeping."""
        if self.settings.drop_unended:
            sampled = [each for each in sampled if each["ended"]]
        responses = [*row.get("responses", ()), *sampled]
        if not responses:
            return Dropped("none_ended")
        if (
            self.settings.drop_identical
            and len(responses) > 1
            and len({each["text"] for each in responses}) == 1
        ):
            return Dropped("all_identical", f"{len(responses)} responses")
        packed = pack_ids(ids)
        # Ids with a reward in them are not those of the row's prompt, which is what signals score after.
        if self.settings.condition is None and row.get("prompt_ids", packed) == packed:
            return {**row, "prompt_ids": packed, "responses": responses}
        # ids of two tokenizers in one group would be scored as if they were of one
        bare = [{k: v for k, v in each.items() if k != "ids"} for each in responses]
        return {**{k: v for k, v in row.items() if k != "prompt_ids"}, "responses": bare}
