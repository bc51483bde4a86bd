"""A pipeline of a million rows: groups → filter → pair → filter, then the card; beside datasets.map.

    python -m bench.pipelines                      # 1,000,000 rows, and a quarter of them, about 20 minutes
    python -m bench.pipelines --rows 100000

Rows are groups of two to four scored responses, as UltraFeedback's with all completions. Every measurement
is a process of its own, so that peak memory (VmHWM) is its own; the two sides take turns on the same file.
The plain version does the same filtering and pairing with `datasets.map` and writes JSON lines; it keeps no
manifest, lists no dropped row and cannot be resumed, and there is nothing of the card in it.
Linear: the time of all rows over that of a quarter should be about four.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

PHASES = ("build", "card", "datasets")
_QUARTER = 4
_MEASURED = """
import sys, time
from pathlib import Path
started, busy = time.perf_counter(), time.process_time()
{body}
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
print(f"MEASURED {{time.perf_counter() - started}} {{time.process_time() - busy}} {{peak}}")
"""
_COMMAND = "from prefopt.cli import main\nif main(sys.argv[1:]): sys.exit(1)"
_DATASETS = """
import bench.pipelines
bench.pipelines.with_datasets(*sys.argv[1:])
"""
_WORDS = [f"word{number}" for number in range(5_000)]


def main() -> None:
    """Prints one line a measurement, then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large run")
    parser.add_argument(
        "--rounds", type=int, default=1, help="repetitions, interleaved; medians are printed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (args.rows // _QUARTER, args.rows):
            file = Path(folder) / f"groups-{count}.jsonl"
            write_groups(file, count, args.seed)
            for _ in range(args.rounds):
                for phase in PHASES:
                    one = measure(phase, file, Path(folder) / f"out-{count}")
                    found.setdefault(f"{phase}-{count}", []).append(one)
                    print(f"{phase:9} {count:>9,} rows: {_line(one, count)}", flush=True)
                _check_equal(Path(folder) / f"out-{count}")
            file.unlink()
    print(json.dumps(summary(found, args.rows), indent=1))


def write_groups(path: Path, count: int, seed: int) -> None:
    """Groups of 2-4 responses of about 60 words, scored 1-5; a twentieth has equal responses."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(_WORDS, k=draw.randint(20, 100))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            size = draw.randint(2, 4)
            chosen = (
                [draw.choice(texts)] * size if draw.random() < 0.05 else draw.choices(texts, k=size)
            )
            completions = [
                {"response": text, "overall_score": draw.randint(1, 5)} for text in chosen
            ]
            row = {
                "instruction": f"{draw.choice(texts)[:200]} {number}",
                "completions": completions,
            }
            file.write(json.dumps(row) + "\n")


def pipeline(file: Path, output: Path) -> dict[str, Any]:
    """The pipeline as YAML holds it."""
    return {
        "output_dir": str(output),
        "shard_rows": 5_000,
        "stages": [
            {
                "stage": "rated",
                "sources": [{"path": str(file), "columns": {"prompt": "instruction"}}],
                "responses": {
                    "column": "completions",
                    "text": "response",
                    "score": "overall_score",
                },
            },
            {"stage": "filter", "id": "groups", "drop_all_equal": True, "min_responses": 2},
            {"stage": "pair", "rule": {"name": "best_worst"}},
            {"stage": "filter", "id": "pairs", "min_margin": 2.0, "drop_duplicate_sides": True},
        ],
    }


def with_datasets(file: str, output: str) -> None:
    """The same pairs by `datasets.map`, in batches, to one file of JSON lines."""
    import datasets

    datasets.disable_progress_bars()
    rows: Any = datasets.load_dataset(
        "json", data_files=file, split="train", cache_dir=str(Path(output) / "cache")
    )
    pairs = rows.map(_pair_batch, batched=True, remove_columns=rows.column_names)
    pairs = pairs.filter(lambda row: row["score_chosen"] - row["score_rejected"] >= 2)
    pairs.to_json(Path(output) / "datasets.jsonl", force_ascii=False)


def _pair_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    names = ("prompt", "chosen", "score_chosen", "rejected", "score_rejected")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for prompt, completions in zip(batch["instruction"], batch["completions"], strict=True):
        if len({each["response"] for each in completions}) == 1:
            continue
        best = max(completions, key=lambda each: each["overall_score"])
        lower = [each for each in completions if each["overall_score"] < best["overall_score"]]
        lower = [each for each in lower if each["response"] != best["response"]]
        if not lower:
            continue
        worst = min(lower, key=lambda each: each["overall_score"])
        values = (
            prompt,
            best["response"],
            best["overall_score"],
            worst["response"],
            worst["overall_score"],
        )
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found


def measure(phase: str, file: Path, output: Path) -> dict[str, float]:
    """Seconds on the wall, CPU seconds and peak MiB of one phase in a process of its own."""
    if phase == "build":
        yaml_file = output.with_suffix(".yaml")
        yaml_file.write_text(yaml.safe_dump(pipeline(file, output)), encoding="utf-8")
        _remove(output)
        arguments, body = ["data", "build", str(yaml_file)], _COMMAND
    elif phase == "card":
        arguments = ["data", "card", str(output / "pairs"), "--output", str(output / "card")]
        body = _COMMAND
    else:
        arguments, body = [str(file), str(output)], _DATASETS
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED.format(body=body), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{phase}: {done.stderr[-3000:]}")
    wall, cpu, peak = map(float, done.stdout.rsplit("MEASURED ", 1)[1].split())
    return {"wall_s": wall, "cpu_s": cpu, "peak_mib": peak}


def _check_equal(output: Path) -> None:
    """Both sides made the same pairs; a faster wrong answer would be no answer."""
    keys = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    with (output / "datasets.jsonl").open(encoding="utf-8") as theirs:
        for shard in sorted((output / "pairs").glob("*.jsonl")):
            for line in shard.open(encoding="utf-8"):
                ours, other = json.loads(line), json.loads(next(theirs))
                assert [ours[key] for key in keys] == [other[key] for key in keys]
        assert next(theirs, None) is None


def summary(found: dict[str, list[dict[str, float]]], rows: int) -> dict[str, Any]:
    """Medians, rows per second, and the ratios that the README quotes."""
    medians = {name: _median(values) for name, values in found.items()}
    large, small = (
        {phase: medians[f"{phase}-{count}"] for phase in PHASES}
        for count in (rows, rows // _QUARTER)
    )
    return {
        "rows": rows,
        "rows_per_s": {phase: round(rows / each["wall_s"]) for phase, each in large.items()},
        "peak_mib": {phase: round(each["peak_mib"]) for phase, each in large.items()},
        "time_over_quarter": {
            phase: round(large[phase]["cpu_s"] / small[phase]["cpu_s"], 2) for phase in PHASES
        },
        "build_cpu_over_datasets": round(large["build"]["cpu_s"] / large["datasets"]["cpu_s"], 2),
    }


def _median(values: list[dict[str, float]]) -> dict[str, float]:
    middle = len(values) // 2
    return {name: sorted(each[name] for each in values)[middle] for name in values[0]}


def _line(one: dict[str, float], count: int) -> str:
    return (
        f"{one['wall_s']:7.1f} s, {one['cpu_s']:7.1f} s CPU, {one['peak_mib']:6.0f} MiB, "
        f"{count / one['wall_s']:,.0f} rows/s"
    )


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
