"""vLLM over HTTP: one server or several, ours or found, requests spread over them."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefopt.engines.base import Completion, PolicyFiles, Request, SamplingSpec
from prefopt.engines.checks import check_requests, check_sequences
from prefopt.engines.start import Started, Task, engine
from prefopt.engines.vllm.client import MAX_CONNECTIONS, ConnectionLost, ServerClient
from prefopt.engines.vllm.hosts import FoundHost, Host, StartedHost
from prefopt.engines.vllm.served import served_model, started
from prefopt.engines.vllm.settings import ServedModel, engine_arguments, require_vllm
from prefopt.errors import ConfigError, EngineError
from prefopt.recipe.schema import VllmServerSection

logger = logging.getLogger(__name__)

_SETTING = " (engine.max_model_len, or --max-model-len of the server)"

Ask = Callable[[ServerClient, str, float], Any]
"""One request: ``(client, name of the model to ask for, deadline) -> result``."""


@engine("vllm_server", source="vLLM's OpenAI server")
def start_servers(section: VllmServerSection, task: Task) -> Started:
    """Servers that run already, or that are started here.

    Raises: ConfigError where vLLM is not installed, or ``devices`` and ``num_servers`` disagree.
    """
    served = served_model(section, task)
    hosts: list[Host] = [
        FoundHost(url, startup_timeout_s=section.startup_timeout_s) for url in section.urls
    ]
    servers = VllmServers(
        hosts or _started_hosts(section, task, served),
        model=served.path,
        timeout_s=section.timeout_s,
        max_model_len=served.max_model_len,
        vocab_size=served.vocab_size,
    )
    return started(servers, task, served)


def _started_hosts(section: VllmServerSection, task: Task, served: ServedModel) -> list[Host]:
    require_vllm(section.name)
    arguments = engine_arguments(section, served, cuda=torch.cuda.is_available())
    return [
        StartedHost(
            arguments,
            log=task.log_dir / f"vllm-server-{number}.log",
            startup_timeout_s=section.startup_timeout_s,
            max_restarts=section.max_restarts,
            environment=environment,
        )
        for number, environment in enumerate(_device_environments(section))
    ]


def _device_environments(section: VllmServerSection) -> list[dict[str, str]]:
    if not section.devices:
        return [{} for _ in range(section.num_servers)]
    if len(section.devices) != section.num_servers:
        raise ConfigError(
            f"engine.devices = {list(section.devices)}: names the GPUs of {len(section.devices)} servers, and "
            f"engine.num_servers = {section.num_servers}. Give one entry a server, e.g. ['6', '7']"
        )
    return [{"CUDA_VISIBLE_DEVICES": devices} for devices in section.devices]


@dataclass
class _Call:
    """One `generate` or `score`, worked on by many threads."""

    deadline: float
    at_once: int
    """Most requests in flight to one server."""
    answers: list[Any]
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when a thread has failed, so that the others send nothing more."""


class VllmServers:
    """vLLM servers behind the `Engine` protocol; started on first use, or by `start`.

    All responses to a prompt are sampled on one server, which then computes the prompt once. A server that
    dies is started again where it is ours, given the current policy, and asked again what it had not answered.

    Args:
        hosts: where the servers run.
        model: hub id or directory that each of them must serve.
        timeout_s: longest wait for one call.
        max_model_len: longest prompt + response in tokens, where that is less than the servers allow.
        vocab_size: of the model; None accepts any token id.
    """

    name = "vllm_server"

    def __init__(
        self,
        hosts: Sequence[Host],
        *,
        model: str,
        timeout_s: float = 1800.0,
        max_model_len: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.hosts = list(hosts)
        self.model = model
        self.timeout_s = timeout_s
        self.vocab_size = vocab_size
        self.context = max_model_len
        """Longest prompt + response in tokens; known after the start at the latest."""
        # A server may have adapters of other runs, or of this run before it was resumed.
        self._prefix = f"prefopt-{uuid.uuid4().hex[:8]}"
        self._base_names: dict[Host, str] = {}
        self._adapter: str | None = None
        self._policy: PolicyFiles | None = None
        self._started = False

    @property
    def version(self) -> int | None:
        return None if self._policy is None else self._policy.version

    def start(self) -> None:
        """Starts or finds every server, and checks what it serves.

        Raises: EngineError if one does not answer in time, dies, or serves another model; ConfigError if
            vLLM is to be started and is not installed.
        """
        if self._started:
            return
        try:
            for host in self.hosts:
                host.begin()
            for host in self.hosts:
                host.wait_until_ready()
                self._greet(host)
        except BaseException:
            self.close()
            raise
        self._started = True

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[Completion]]:
        """As `Engine.generate`; vLLM batches as it sees fit."""
        self.start()
        check_requests(requests, spec, self.context, _SETTING)
        jobs = [
            (index, self._sampling(request, seed, spec))
            for index, request in enumerate(requests)
            for seed in request.seeds
        ]
        answers = iter(self._ask(jobs, MAX_CONNECTIONS))
        return [[next(answers) for _ in request.seeds] for request in requests]

    def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[list[float]]:
        """As `Engine.score`, from the log-probs vLLM gives for a prompt."""
        self.start()
        check_sequences(sequences, self.context, _SETTING)
        jobs = [
            (index, self._scoring(prompt, response))
            for index, (prompt, response) in enumerate(sequences)
        ]
        # One at a time where an adapter is on: see `VllmEngine._score`.
        return self._ask(jobs, 1 if self._adapter else MAX_CONNECTIONS)

    def load_policy(self, policy: PolicyFiles) -> None:
        """As `Engine.load_policy`; the servers must see the path, and it must stay until the next version."""
        self.start()
        deadline = time.monotonic() + self.timeout_s
        old, new = self._adapter, f"{self._prefix}-v{policy.version}" if policy.is_adapter else None
        if new is not None and new == old:
            raise EngineError(
                f"policy version {policy.version} is loaded already; versions increase"
            )
        for host in self.hosts:
            self._persist(host, lambda h: self._load(h.client, policy, new, deadline), deadline)
        self._policy, self._adapter = policy, new
        for host in self.hosts:
            self._unload(host.client, old, deadline)

    def close(self) -> None:
        started, self._started = self._started, False
        for host in self.hosts:
            if started and isinstance(host, FoundHost):  # ours take their adapters with them
                self._unload(host.client, self._adapter, time.monotonic() + 5.0)
            host.close()
        self._adapter = None if self._policy is None else self._adapter

    def _greet(self, host: Host) -> None:
        deadline = time.monotonic() + self.timeout_s
        try:
            card = host.client.model(deadline)
            if not _same_model(self.model, card.root) and not _same_model(self.model, card.id):
                raise EngineError(
                    f"engine.urls: {host.client.url} serves {card.root!r}, this recipe trains {self.model!r}. "
                    "Start it with --model of the recipe's model.path, or leave engine.urls out"
                )
            # also takes the slow first request out of the first step
            probe = SamplingSpec(max_new_tokens=1, top_k=1)
            answer = host.client.complete(card.id, (1,), probe, 0, deadline, self.vocab_size)
        except ConnectionLost as error:
            raise EngineError(f"{host.client.url} went away during the start: {error}") from error
        if abs(answer.logps[0]) > 1e-3:
            raise EngineError(
                f"engine.urls: {host.client.url} returns the model's own log-probs, not those of the "
                "distribution it samples from. Start it with --logprobs-mode processed_logprobs"
            )
        self._base_names[host] = card.id
        if card.max_model_len is not None:
            # scoring has a token generated after the last one
            room = card.max_model_len - 1
            self.context = room if self.context is None else min(room, self.context)

    def _sampling(self, request: Request, seed: int, spec: SamplingSpec) -> Ask:
        return lambda client, model, deadline: client.complete(
            model, request.prompt_ids, spec, seed, deadline, self.vocab_size
        )

    def _scoring(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> Ask:
        return lambda client, model, deadline: client.score(model, prompt, response, deadline)

    def _ask(self, jobs: list[tuple[int, Ask]], at_once: int) -> list[Any]:
        """The answers to ``(prompt number, request)`` jobs, in order; prompts take turns over the servers."""
        call = _Call(time.monotonic() + self.timeout_s, at_once, [None] * len(jobs))
        shares: list[dict[int, Ask]] = [{} for _ in self.hosts]
        for index, (prompt, ask) in enumerate(jobs):
            shares[prompt % len(shares)][index] = ask
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            futures = [
                pool.submit(self._serve, host, share, call)
                for host, share in zip(self.hosts, shares, strict=True)
            ]
            _results(futures, call)
        return call.answers

    def _serve(self, host: Host, jobs: dict[int, Ask], call: _Call) -> None:
        """Fills in the answers of one server, sending again what was lost when it went away."""
        attempt = 0
        while jobs and not call.stop.is_set():
            lost = self._round(host, jobs, call)
            if not lost:
                return
            attempt = attempt + 1 if len(lost) == len(jobs) else 0
            jobs = {index: jobs[index] for index in lost}
            self._recover(host, attempt, call.deadline, next(iter(lost.values())))

    def _round(self, host: Host, jobs: dict[int, Ask], call: _Call) -> dict[int, str]:
        """Sends every job once; returns why, for those that were lost."""
        model = self._adapter or self._base_names[host]
        lost: dict[int, str] = {}

        def send(index: int) -> None:
            if call.stop.is_set():
                return
            try:
                call.answers[index] = jobs[index](host.client, model, call.deadline)
            except ConnectionLost as error:
                lost[index] = str(error)

        with ThreadPoolExecutor(min(call.at_once, len(jobs))) as pool:
            _results([pool.submit(send, index) for index in jobs], call)
        return lost

    def _recover(self, host: Host, attempt: int, deadline: float, reason: str) -> None:
        """Has the server back, with the current policy on it. Raises: EngineError."""
        host.recover(attempt, deadline, reason)
        if self._policy is not None:
            policy, name = self._policy, self._adapter
            self._persist(host, lambda h: self._load(h.client, policy, name, deadline), deadline)

    def _persist(self, host: Host, work: Callable[[Host], None], deadline: float) -> None:
        attempt = 0
        while True:
            try:
                return work(host)
            except ConnectionLost as error:
                attempt += 1
                host.recover(attempt, deadline, str(error))

    def _load(
        self, client: ServerClient, policy: PolicyFiles, name: str | None, deadline: float
    ) -> None:
        path = str(Path(policy.path).resolve())
        try:
            if name is None:
                body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
                client.post("/collective_rpc", body, deadline)
                forgotten = client.post_object("/reset_prefix_cache", None, deadline)
                if not forgotten.get("success", True):
                    raise EngineError("the server kept prefixes that older weights computed")
            else:
                body = {"lora_name": name, "lora_path": path}
                client.post("/v1/load_lora_adapter", body, deadline)
        except EngineError as error:
            if name is not None and "has already been loaded" in str(error):
                return  # a server that was away for a moment, and did not lose it
            raise EngineError(_load_problem(client.url, policy, str(error))) from error

    def _unload(self, client: ServerClient, name: str | None, deadline: float) -> None:
        if name is None:
            return
        try:
            client.post("/v1/unload_lora_adapter", {"lora_name": name}, deadline)
        except (EngineError, ConnectionLost) as error:  # it costs memory and nothing else
            logger.info("adapter %s stays on %s: %s", name, client.url, error)


def _results(futures: Sequence[Future[None]], call: _Call) -> None:
    """Waits for all; at the first that failed tells the others to stop, and raises what it raised."""
    try:
        for future in futures:
            future.result()
    except BaseException:
        call.stop.set()
        raise


def _load_problem(url: str, policy: PolicyFiles, problem: str) -> str:
    text = f"policy version {policy.version} cannot be loaded from {policy.path}: {problem}"
    if "rank" in problem.lower():
        return f"{text}. Start the server with --max-lora-rank of at least peft.r"
    if "HTTP 404" in problem:
        needed = (
            "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            if policy.is_adapter
            else "VLLM_SERVER_DEV_MODE=1 (full fine-tuning reloads weights over /collective_rpc)"
        )
        return f"{text}. {url} must be started with {needed}, and must see that path"
    return text


def _same_model(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    return Path(ours).exists() and Path(ours).resolve() == Path(theirs).resolve()
