"""The A-LoL family on HH's helpful dialogues with the authors' rewards: a small model, start to end, on a CPU.

    python -m bench.hh_alol --data DIR          # DIR holds lol_helpful_base_with_rewards.jsonl.gz and
                                                # lol_sampled_dev_with_rewards.jsonl.gz (LoL-RL@9f8d8166)

A Llama of two layers made in place is trained on the chosen sides (the reference), a value head on the dev
sample's rewards, and each objective on the rows weighed against it. Reported: share of negative advantages, error
of the head, and of samples for held-out prompts the reward, distinct-1/2/3, length. The reward is that of a reward
model of the same size, trained in place on the training pairs: the authors' own is not at hand, and a policy
should not be judged by the rewards it was trained on anyway. Such a model writes no English worth reading; what is
shown is the whole way on real rewards, and which way the numbers move. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path
from typing import Any

import yaml

FILES = ("lol_helpful_base_with_rewards.jsonl.gz", "lol_sampled_dev_with_rewards.jsonl.gz")
NUM_HELD_OUT, NUM_ASKED = 200, 60
BY_ADVANTAGE = {"a_lol": {}, "a_lol_ref_free": {}, "a_lol_seq": {}, "a_lol_kl": {"beta": 0.05}}
BY_REWARD = {"wbc": {}, "r_lol": {}, "filtered_nll": {"threshold": -1e9}}
"""The last one keeps everything: NLL."""
SHOWN = ("reward", "distinct_1", "distinct_2", "distinct_3", "length_words", "eos_rate")
_COLUMNS = {"score_chosen": "reward_chosen", "score_rejected": "reward_rejected"}
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    """Prints a table and writes ``results.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-hh-alol"))
    parser.add_argument(
        "--steps", type=int, default=100, help="of each objective, before the share drawn"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench = Bench(args.output, args.steps, args.seed)
    if not (args.output / "base").is_dir():
        bench.write_data(args.data)
    found: dict[str, Any] = {"head": bench.make_reference_and_head(), "policies": {}}
    found["policies"]["reference"] = bench.measure("reference")
    for name, values in (BY_REWARD | BY_ADVANTAGE).items():
        bench.train(name, values)
        found["policies"][name] = bench.measure(name)
        print(f"{name}: {found['policies'][name]}", flush=True)
    (args.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


class Bench:
    """The steps, each a `prefopt` command in this process."""

    def __init__(self, root: Path, steps: int, seed: int) -> None:
        self.root, self.steps, self.seed = root, steps, seed

    def write_data(self, folder: Path) -> None:
        """Training pairs, held-out prompts, the dev sample, and a model with random weights."""
        pairs, dev = (read(folder / name) for name in FILES)
        self.root.mkdir(parents=True, exist_ok=True)
        write(self.root / "train.jsonl", pairs[:-NUM_HELD_OUT])
        prompts = [{"prompt": row["prompt"]} for row in pairs[-NUM_HELD_OUT:]]
        write(self.root / "held_out.jsonl", prompts)
        write(self.root / "dev.jsonl", dev)
        write_model(self.root / "base", pairs, self.seed)

    def make_reference_and_head(self) -> dict[str, Any]:
        """The reference, the reward model, the value head, the weighed rows; what their records say."""
        self.train("reference", {"threshold": -1e9}, model="base", name="filtered_nll", epochs=2)
        source = self.source("train") | {"columns": _COLUMNS}
        recipe = self.recipe("reward_model", "reference/final", [source], 1e-3)
        recipe["train"]["num_epochs"] = 2
        self.run("reward_model", {**recipe, "stage": "reward_model"})
        policy = {"path": str(self.root / "reference" / "final")}
        value = {
            "stage": "value",
            "model": policy,
            "normalize_rewards": "sigmoid",
            "learning_rate": 1e-3,
        }
        advantage = {"stage": "advantage", "head": str(self.root / "dev" / "value" / "head")}
        reports = {}
        for file, stage in (("dev", value), ("train", advantage)):
            rated = {"stage": "rated", "sources": [self.source(file) | {"columns": _COLUMNS}]}
            folder = self.root / ("dev" if file == "dev" else "weighed")
            path = self.write(folder.name, {"output_dir": str(folder), "stages": [rated, stage]})
            prefopt("data", "build", path)
            record = folder / "manifest" / stage["stage"] / "done.json"
            reports[stage["stage"]] = json.loads(record.read_text())["report"]
        return reports

    def train(
        self,
        output: str,
        values: dict[str, Any],
        *,
        model: str = "reference/final",
        name: str | None = None,
        epochs: int | None = None,
    ) -> None:
        """Trains one objective, on chosen sides for the reference, else on the weighed rows."""
        if epochs is not None:
            source = self.source("train") | {
                "columns": {"response": "chosen", "reward": "reward_chosen"}
            }
        else:
            source = {"path": str(self.root / "weighed" / "advantage"), "format": "chat"}
        # Small random weights took 3e-3; afterwards a tenth, as far as 100 steps go.
        recipe = self.recipe(output, model, [source], 3e-3 if epochs else 3e-4)
        if epochs is None:
            recipe["train"]["max_steps"] = self.steps
        else:
            recipe["train"]["num_epochs"] = epochs
        if output in BY_ADVANTAGE:
            recipe["data"]["sampling"] = {"name": "advantage"}
        recipe["objective"] = {"name": name or output, **values}
        self.run(output, recipe)

    def recipe(
        self, output: str, model: str, sources: list[Any], learning_rate: float
    ) -> dict[str, Any]:
        return {
            "model": {"path": str(self.root / model)},
            "data": {
                "train": sources,
                "max_length_tokens": 512,
                "cache_dir": str(self.root / "cache"),
            },
            "train": {
                "learning_rate": learning_rate,
                "global_batch_size": 16,
                "seed": self.seed,
                "warmup_frac": 0.1,
                "log_every": 20,
            },
            "run": {"output_dir": str(self.root / output)},
        }

    def measure(self, name: str) -> dict[str, float]:
        """Two samples for each held-out prompt at temperature 1: their reward, variety and length."""
        held_out = self.root / "held_out.jsonl"
        signals = [{"name": "reward_model", "path": str(self.root / "reward_model" / "final")}]
        output = self.root / "results" / name
        prefopt(
            *("eval", self.root / name, "--tasks", "signals,diversity", "--output", output),
            *(f"tasks.signals.data={held_out}", "tasks.signals.format=chat"),
            f"tasks.signals.signals={json.dumps(signals)}",
            *(f"tasks.diversity.data={held_out}", "tasks.diversity.format=chat"),
            "tasks.diversity.samples=2",
            *("decoding.max_new_tokens=48", "decoding.temperature=1.0", f"limit={NUM_ASKED}"),
        )  # fmt: skip
        tasks = json.loads((output / "results.json").read_text())["tasks"]
        metrics = tasks["diversity"]["metrics"] | tasks["signals"]["metrics"]
        found = {key: metrics[key]["value"] for key in SHOWN}
        return found | {"reward_stderr": metrics["reward"]["stderr"]}

    def source(self, file: str) -> dict[str, Any]:
        return {"path": str(self.root / f"{file}.jsonl"), "format": "chat"}

    def run(self, name: str, recipe: dict[str, Any]) -> None:
        if not (self.root / name / "final").is_dir():
            prefopt("train", self.write(name, recipe))

    def write(self, name: str, content: dict[str, Any]) -> Path:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path


def prefopt(*arguments: object) -> None:
    """Runs ``prefopt ARGUMENTS`` in this process. Raises: SystemExit if it fails."""
    from prefopt.cli import main as command

    if code := command([str(argument) for argument in arguments]):
        raise SystemExit(code)


def write_model(directory: Path, pairs: list[dict[str, Any]], seed: int) -> None:
    """A Llama of two layers with random weights, and a chat tokenizer trained on the dialogues."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (row[side] for row in pairs for side in ("chosen", "rejected"))
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = _CHATML
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """Markdown: a line a policy, then the head's."""
    lines = [f"| | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    for name, each in found["policies"].items():
        cells = [f"{each['reward']:.3f} ± {each['reward_stderr']:.3f}"]
        cells += [f"{each[key]:.1f}" for key in SHOWN[1:]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head, advantages = found["head"]["value"]["head"], found["head"]["advantage"]["advantages"]
    negative = 100 * advantages["negative_frac"]
    lines.append(
        f"negative advantages {negative:.1f} % of {advantages['responses']:,}; value error (MSE) "
        f"{head['validation_mse']:.4f} on {head['validation_num_prompts']} held-out prompts, a constant's "
        f"{head['validation_constant_mse']:.4f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
