"""Our trainer against trl.DPOTrainer: same model, rows, LoRA and loss, one run, interleaved.

    python bench/offline_step.py                                  # UltraFeedback-like lengths
    python bench/offline_step.py --prompt-median 400 --response-median 40

Every measurement is a fresh process (peak memory is per process), the two trainers taking turns; medians
over the rounds. CPU time counts all threads, so that a busy machine does not change the ratio much. The
first step warms up and is not timed. Our time includes the reference forward of the timed rows, as TRL's
does; the *_precomputed* ratio leaves it out on both sides. TRL runs with its defaults (gradient
checkpointing on) except bf16, which is off on both sides; ratios without checkpointing are printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BETA, LEARNING_RATE = 0.1, 1e-4
KINDS = ("ours", "ours_precomputed", "trl", "trl_precomputed", "trl_no_checkpointing")


def make_rows(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Random-token pairs, lengths log-normal around the medians, one warm-up step and ``steps`` more."""
    rng = np.random.default_rng(args.seed)

    def draw(median: int) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(median), args.sigma), 4, args.max_length // 2))
        return rng.integers(3, args.vocab, length).tolist()

    names = ("prompt_ids", args.prompt_median), ("chosen_ids", args.response_median)
    names += (("rejected_ids", args.response_median),)
    count = args.pairs * (args.steps + 1)
    return [{name: draw(median) for name, median in names} for _ in range(count)]


def make_model(args: argparse.Namespace) -> Any:
    """A random Llama with a fresh LoRA on every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


class Stopwatch:
    """CPU and wall seconds from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    @property
    def elapsed(self) -> tuple[float, float]:
        (cpu, wall), (cpu_end, wall_end) = self.marks[0], self.marks[-1]
        return cpu_end - cpu, wall_end - wall


def run_ours(args: argparse.Namespace, directory: Path, *, precomputed: bool) -> dict[str, Any]:
    """Times `PreferenceTrainer` on the rows; the reference forward of the timed rows is added."""
    from accelerate import Accelerator

    from prefopt.data.groups import GroupList
    from prefopt.model.load import LoadedPolicy
    from prefopt.recipe import Recipe
    from prefopt.training.metrics import read_metrics
    from prefopt.types import Group, Response
    from prefopt.wiring import build_trainer

    groups = [
        Group(str(i), tuple(row["prompt_ids"]),
              (Response(tuple(row["chosen_ids"])), Response(tuple(row["rejected_ids"]))), ((0, 1),))
        for i, row in enumerate(make_rows(args))
    ]  # fmt: skip
    recipe = Recipe.model_validate({
        "model": {"path": "in-memory"},
        "data": {"train": [{"path": "in-memory"}], "cache_dir": str(directory / "cache")},
        "objective": {"name": "dpo", "beta": BETA},
        "train": {"learning_rate": LEARNING_RATE, "lr_scheduler": "constant", "warmup_frac": 0.0,
                  "global_batch_size": args.pairs, "max_steps": args.steps + 1},
        "run": {"output_dir": str(directory)},
    })  # fmt: skip
    policy = LoadedPolicy(make_model(args), "bench", "random Llama with a fresh LoRA", True)
    started = time.process_time(), time.perf_counter()
    trainer = build_trainer(recipe, GroupList(groups), None, policy, Accelerator(cpu=True))
    # Building is the reference pass over all rows (and a probe of milliseconds): count the timed share.
    share = args.steps / (args.steps + 1)
    now = time.process_time(), time.perf_counter()
    reference = [(end - start) * share for end, start in zip(now, started, strict=True)]
    trainer.regime.rows = lambda step: list(range(step * args.pairs, (step + 1) * args.pairs))
    watch, after = Stopwatch(), trainer._after_step

    def after_step(step: int, bar: Any) -> None:
        after(step, bar)
        watch.mark()

    trainer._after_step = after_step
    trainer.train()
    cpu, wall = watch.elapsed
    extra = (0.0, 0.0) if precomputed else reference
    losses = [r["loss/total"] for r in read_metrics(directory / "metrics.jsonl")]
    return {"cpu": cpu + extra[0], "wall": wall + extra[1], "losses": losses}


def run_trl(
    args: argparse.Namespace, directory: Path, *, precomputed: bool, checkpointing: bool
) -> dict[str, Any]:
    """Times trl.DPOTrainer on the same rows in the same order."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # rows are token ids already

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    watch = Stopwatch()

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.mark()

    vocabulary = {f"t{i}": i for i in range(args.vocab)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t3")),
        bos_token="t1", eos_token="t2", pad_token="t0",
    )  # fmt: skip
    config = DPOConfig(
        output_dir=str(directory), per_device_train_batch_size=args.pairs, max_steps=args.steps + 1,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, beta=BETA,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, max_length=None,
        gradient_checkpointing=checkpointing, precompute_ref_log_probs=precomputed, disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(
        model=make_model(args), args=config, train_dataset=Dataset.from_list(make_rows(args)),
        processing_class=tokenizer, callbacks=[Marks()],
    )  # fmt: skip
    trainer.train()
    cpu, wall = watch.elapsed
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"cpu": cpu, "wall": wall, "losses": losses}


def worker(args: argparse.Namespace) -> None:
    """One measurement in this process; prints one JSON line."""
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        if args.worker.startswith("ours"):
            result = run_ours(args, Path(name), precomputed=args.worker.endswith("precomputed"))
        else:
            result = run_trl(
                args, Path(name), precomputed=args.worker.endswith("_precomputed"),
                checkpointing=not args.worker.endswith("no_checkpointing"),
            )  # fmt: skip
    result["rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps(result))


def measure(kind: str) -> dict[str, Any]:
    """Runs this script as a worker with the same flags."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the table of medians and the line of ratios; stops if the losses are not the same."""

    def median(kind: str, key: str) -> float:
        return statistics.median(result[key] for result in results[kind])

    print(f"{'':24}{'CPU s':>10}{'wall s':>10}{'peak MiB':>10}")
    for kind in KINDS:
        values = [median(kind, key) for key in ("cpu", "wall", "rss_mib")]
        print(f"{kind:24}{values[0]:10.2f}{values[1]:10.2f}{values[2]:10.0f}")
    ours, theirs = results["ours"][0]["losses"], results["trl"][0]["losses"]
    gap = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    if gap > 1e-3:  # TRL rounds what it logs to four digits
        raise SystemExit(f"not the same training: losses {ours} against {theirs}")
    ratios = {
        "cpu_ratio": median("trl", "cpu") / median("ours", "cpu"),
        "wall_ratio": median("trl", "wall") / median("ours", "wall"),
        "memory_ratio": median("ours", "rss_mib") / median("trl", "rss_mib"),
        "cpu_ratio_precomputed": median("trl_precomputed", "cpu")
        / median("ours_precomputed", "cpu"),
        "cpu_ratio_no_checkpointing": median("trl_no_checkpointing", "cpu") / median("ours", "cpu"),
        "memory_ratio_no_checkpointing": median("ours", "rss_mib")
        / median("trl_no_checkpointing", "rss_mib"),
        "loss_gap": gap,
    }
    print(" ".join(f"{name}={value:.3g}" for name, value in ratios.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in {
        "prompt-median": 60, "response-median": 80, "max-length": 2048, "vocab": 8000, "hidden": 384,
        "layers": 6, "pairs": 8, "steps": 4, "rounds": 3, "threads": 1, "seed": 0,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--sigma", type=float, default=0.6, help="of the log-normal lengths; default 0.6"
    )
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind in KINDS:
            results[kind].append(measure(kind))
    report(results)


if __name__ == "__main__":
    main()
