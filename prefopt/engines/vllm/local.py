"""vLLM in process: its scheduler and model run in the subprocess that it starts itself."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from prefopt.engines.base import Completion, PolicyFiles, Request, SamplingSpec
from prefopt.engines.checks import check_requests, check_sequences
from prefopt.engines.child import Watchdog, is_launcher_variable
from prefopt.engines.start import Started, Task, engine
from prefopt.engines.vllm.served import served_model, started
from prefopt.engines.vllm.settings import (
    engine_arguments,
    engine_environment,
    require_vllm,
    starting_text,
)
from prefopt.errors import EngineError
from prefopt.recipe.schema import VllmSection
from prefopt.report.bars import waiting

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_SETTING = " (engine.max_model_len)"
_POLL_S = 0.2
_CLOSE_S = 15.0


@engine("vllm", source="vLLM's LLM")
def start_vllm(section: VllmSection, task: Task) -> Started:
    """vLLM in this process."""
    served = served_model(section, task)
    require_vllm(section.name)
    return started(
        VllmEngine(
            engine_arguments(section, served, cuda=torch.cuda.is_available()),
            timeout_s=section.timeout_s,
            startup_timeout_s=section.startup_timeout_s,
            max_restarts=section.max_restarts,
        ),
        task,
        served,
    )


class _EngineDied(Exception):
    """vLLM's subprocess is gone."""


class VllmEngine:
    """`vllm.LLM` behind the `Engine` protocol; started on first use, or by `start`.

    Adapters are swapped by version: each gets a name, an id and a path of its own, because vLLM keeps
    computed prefixes by name and path. Full weights are reloaded in place and the prefixes forgotten.

    Args:
        arguments: of `vllm.LLM` (`prefopt.engines.vllm.settings.engine_arguments`).
        timeout_s: longest wait for one call.
        startup_timeout_s: longest wait for vLLM to start.
        max_restarts: times it is started again after its subprocess died; the policy is then loaded again
            (its files must still be there) and the call repeated.
    """

    name = "vllm"

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        timeout_s: float = 1800.0,
        startup_timeout_s: float = 900.0,
        max_restarts: int = 2,
    ) -> None:
        self.arguments = dict(arguments)
        self.timeout_s = timeout_s
        self.startup_timeout_s = startup_timeout_s
        self.restarts_left = max_restarts
        self._llm: Any = None
        self._lora: Any = None
        self._lora_ids = itertools.count(1)
        self._policy: PolicyFiles | None = None
        self._version: int | None = None
        self._children: list[Any] = []
        self._watchdog: Watchdog | None = None

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def context(self) -> int:
        """Longest prompt + response in tokens."""
        return self.arguments["max_model_len"]

    def start(self) -> None:
        """Starts vLLM if it does not run. Raises: ConfigError if it is not installed; EngineError."""
        self._call(lambda llm: None, "to start")

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[Completion]]:
        """As `Engine.generate`; vLLM batches as it sees fit."""
        check_requests(requests, spec, self.context, _SETTING)
        outputs = iter(self._call(self._generate, "to generate", list(requests), spec))
        return [[_completion(next(outputs)) for _ in request.seeds] for request in requests]

    def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[list[float]]:
        """As `Engine.score`, from the log-probs vLLM gives for a prompt."""
        check_sequences(sequences, self.context - 1, _SETTING)
        outputs = self._call(self._score, "to score", list(sequences))
        return [
            [
                float(output.prompt_logprobs[len(prompt) + i][token].logprob)
                for i, token in enumerate(response)
            ]
            for output, (prompt, response) in zip(outputs, sequences, strict=True)
        ]

    def load_policy(self, policy: PolicyFiles) -> None:
        """As `Engine.load_policy`; the files must stay until the next version is loaded."""
        self._call(self._load, f"to load policy version {policy.version}", policy)
        self._policy, self._version = policy, policy.version

    def close(self) -> None:
        llm, self._llm, self._lora = self._llm, None, None
        if llm is not None:
            closing = threading.Thread(target=llm.llm_engine.engine_core.shutdown, daemon=True)
            closing.start()
            closing.join(_CLOSE_S)
        if self._watchdog is not None:
            self._watchdog.dismiss()
            self._watchdog = None
        for child in self._children:
            child.kill()
            child.join()
        self._children = []

    def _begin(self) -> None:
        """A running vLLM with the current policy. Raises: as `_waited`."""
        if self._llm is not None:
            return
        require_vllm("vllm")
        before = set(multiprocessing.active_children())
        # vLLM's subprocess does not notice that we are gone (0.32), and would hold its GPU for ever
        self._watchdog = Watchdog()
        try:
            with waiting(starting_text(self.arguments)):
                self._llm = self._waited(self._make, self.startup_timeout_s, "to start")
        finally:
            self._children = [c for c in multiprocessing.active_children() if c not in before]
            if self._llm is None:
                self.close()
        self._watchdog.add([child.pid for child in self._children])
        if self._policy is not None:
            what = f"to load policy version {self._policy.version} again"
            self._waited(self._load, self.timeout_s, what, self._llm, self._policy)

    def _make(self) -> Any:
        assert self._watchdog is not None
        with _vllm_environment(self._watchdog.variables):
            from vllm import LLM

            return LLM(**self.arguments, use_tqdm_on_load=False)

    def _generate(self, llm: Any, requests: list[Request], spec: SamplingSpec) -> list[Any]:
        from vllm import SamplingParams

        prompts, params = [], []
        for request in requests:
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            for seed in request.seeds:
                prompts.append(prompt)
                params.append(SamplingParams(**sampling_parameters(spec, seed), detokenize=False))
        return llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora)

    def _score(
        self, llm: Any, sequences: list[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[Any]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [*prompt, *response]} for prompt, response in sequences]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        # With an adapter on, vLLM 0.32 gives a wrong number of rows to the LM head's adapter where prompts
        # that want log-probs share a batch; on CPU its engine dies of it. One at a time is right.
        at_once = 1 if self._lora is not None else max(1, len(prompts))
        outputs: list[Any] = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            outputs += llm.generate(part, params, use_tqdm=False, lora_request=self._lora)
        return outputs

    def _load(self, llm: Any, policy: PolicyFiles) -> None:
        if policy.is_adapter:
            self._load_adapter(llm, policy)
            return
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(policy.path)})
        if not llm.reset_prefix_cache():
            raise EngineError(
                f"policy version {policy.version}: vLLM kept prefixes that older weights computed"
            )

    def _load_adapter(self, llm: Any, policy: PolicyFiles) -> None:
        from vllm.lora.request import LoRARequest

        number = next(self._lora_ids)
        new = LoRARequest(f"v{policy.version}-{number}", number, str(policy.path))
        llm.llm_engine.add_lora(new)
        old, self._lora = self._lora, new
        if old is not None and old.lora_int_id in llm.llm_engine.list_loras():
            llm.llm_engine.remove_lora(old.lora_int_id)

    def _call(self, work: Callable[..., _T], what: str, *arguments: Any) -> _T:
        """What ``work(llm, *arguments)`` returns, on a new vLLM if this one dies and restarts are left."""
        while True:
            try:
                self._begin()
                return self._waited(work, self.timeout_s, what, self._llm, *arguments)
            except _EngineDied as error:
                self._restart_or_raise(what, error)

    def _restart_or_raise(self, what: str, error: _EngineDied) -> None:
        self.close()
        reason = f"vLLM's subprocess died when asked {what}: {error}"
        if self.restarts_left <= 0:
            raise EngineError(f"{reason}\nNo restart is left (engine.max_restarts)") from None
        self.restarts_left -= 1
        logger.warning("%s; starting it again (%d restarts left)", reason, self.restarts_left)

    def _waited(self, work: Callable[..., _T], timeout_s: float, what: str, *arguments: Any) -> _T:
        """What ``work`` returns, in a thread because vLLM's own waits have no end.

        Raises: EngineError past the deadline, or for what vLLM refuses; _EngineDied.
        """
        results: list[Any] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work(*arguments))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        deadline = time.monotonic() + timeout_s
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            # vLLM's client waits for ever for a subprocess that was killed (0.32)
            if any(not child.is_alive() for child in self._children):
                raise _EngineDied("its process ended")
            if thread.is_alive() and time.monotonic() > deadline:
                self.close()  # the thread may still be inside vLLM, which takes one call at a time
                raise EngineError(
                    f"waited {timeout_s:g} s for vLLM {what}. Raise engine.timeout_s (or "
                    "engine.startup_timeout_s), or set VLLM_LOGGING_LEVEL=INFO to see what it does"
                )
        if failures:
            raise _translated(failures[0], what) from failures[0]
        return results[0]


def sampling_parameters(spec: SamplingSpec, seed: int) -> dict[str, Any]:
    """vLLM's sampling parameters, by names that its API and its server share."""
    return {
        "max_tokens": spec.max_new_tokens,  # 16 where it is left out
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k,
        "seed": seed % 2**63,
        "logprobs": 0,  # of the sampled token, and of no others
        "stop_token_ids": list(spec.stop_token_ids),
        "ignore_eos": True,  # only what the spec names ends a response
    }


def _completion(output: Any) -> Completion:
    result = output.outputs[0]
    ids = tuple(int(token) for token in result.token_ids)
    logps = tuple(
        float(entry[token].logprob) for entry, token in zip(result.logprobs, ids, strict=True)
    )
    return Completion(ids, logps, "eos" if result.finish_reason == "stop" else "length")


def _translated(error: BaseException, what: str) -> BaseException:
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return _EngineDied(str(error))
    if isinstance(error, EngineError | KeyboardInterrupt):
        return error
    return EngineError(f"vLLM failed {what}: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _vllm_environment(more: Mapping[str, str]) -> Iterator[None]:
    """vLLM reads its settings from the environment, and its subprocess inherits it: a clean one, for a while."""
    before = dict(os.environ)
    for name in filter(is_launcher_variable, before):
        del os.environ[name]
    os.environ.update({**engine_environment(quiet=True), **more})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
