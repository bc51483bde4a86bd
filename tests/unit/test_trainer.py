"""The trainer against a plain loop, and against itself split, killed and broken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prefopt.data.groups import GroupList
from prefopt.errors import ConfigError, TrainingError
from prefopt.model.micro_batches import SplitLimits, split_micro_batches
from prefopt.model.sweep import layout_fn
from prefopt.recipe.run_directory import find_checkpoint
from prefopt.training.metrics import read_metrics
from prefopt.training.optimizer import learning_rate
from prefopt.types import Group, Response
from tests.unit.memory_trainer import (
    lora_llama,
    make_trainer,
    random_pairs,
    trained_weights,
)

DPO = {"name": "dpo", "beta": 0.1}
SIMPO = {"name": "simpo", "beta": 2.0, "gamma": 1.0, "nll_weight": 0.5}


def losses(run_dir: Path) -> list[float]:
    return [
        row["loss/total"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in row
    ]


def sequence_logps(model: torch.nn.Module, group: Group, response: Response) -> torch.Tensor:
    """(T,) log-probs from full logits of one unpadded sequence."""
    ids = torch.tensor([[*group.prompt_ids, *response.ids]], dtype=torch.long)
    logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response.ids).long()[:, None])[:, 0]


def test_dpo_steps_equal_a_plain_loop(tmp_path: Path) -> None:
    """Five AdamW steps of DPO: our trainer against twenty lines of torch over the same rows."""
    source = GroupList(random_pairs(20))
    trainer = make_trainer(tmp_path, source, objective=DPO, max_steps=5, micro_batch_size=3)
    rows = [trainer.regime.rows(step) for step in range(5)]
    trainer.train()

    model, frozen = lora_llama(), lora_llama()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    expected = []
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trainer.settings, step, 5)
        total = torch.zeros(())
        for row in rows[step]:
            pair = source.group(row)
            ratios = []
            for response in pair.responses:
                with torch.no_grad():
                    reference = sequence_logps(frozen, pair, response).sum()
                ratios.append(sequence_logps(model, pair, response).sum() - reference)
            total = total - F.logsigmoid(0.1 * (ratios[0] - ratios[1])) / len(rows[step])
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(total.item())
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    ours = trained_weights(trainer)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[f"model.{name}"], parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "split", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 40}]
)
def test_any_split_of_a_global_batch_gives_the_same_run(
    tmp_path: Path, split: dict[str, int]
) -> None:
    """21 rows in batches of 8: the last window is short, and the NLL term counts tokens, not pairs."""
    source = GroupList(random_pairs(21))
    whole = make_trainer(tmp_path / "whole", source, objective=SIMPO, num_epochs=2)
    whole.train()
    parts = make_trainer(tmp_path / "parts", source, objective=SIMPO, num_epochs=2, **split)
    assert len(parts.regime.window(0).micro_batches) > len(whole.regime.window(0).micro_batches)
    parts.train()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "whole")) == 6


def test_every_row_is_seen_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    source = GroupList(random_pairs(21))
    regime = make_trainer(tmp_path, source, objective=SIMPO, num_epochs=2).regime
    first = [row for step in range(3) for row in regime.rows(step)]
    second = [row for step in range(3, 6) for row in regime.rows(step)]
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second


def test_resumed_run_ends_bit_for_bit_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    """With dropout on, so that a lost random state would show."""
    source = GroupList(random_pairs(24))

    def fresh(name: str) -> object:
        model = lora_llama()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        for layer in model.modules():
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout = torch.nn.ModuleDict({"default": torch.nn.Dropout(0.1)})
        torch.manual_seed(5)
        settings = {"num_epochs": 2, "save_every": 1, "keep_checkpoints": 9}
        return make_trainer(tmp_path / name, source, objective=SIMPO, model=model, **settings)

    straight = fresh("straight")
    straight.train()
    broken = fresh("broken")
    broken.train()
    for step in (1, 4):
        again = fresh("broken")
        again.train(tmp_path / "broken" / "checkpoints" / f"step-{step}")
        assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
        for name, weight in trained_weights(straight).items():
            assert torch.equal(weight, trained_weights(again)[name]), name


def test_policy_that_is_not_its_reference_is_refused(tmp_path: Path) -> None:
    source = GroupList(random_pairs(8))
    trainer = make_trainer(tmp_path, source, objective=DPO)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    with pytest.raises(TrainingError, match="not its own reference at step 0"):
        trainer.train()


def test_non_finite_loss_stops_and_names_the_pair(tmp_path: Path) -> None:
    source = GroupList(random_pairs(8))
    trainer = make_trainer(tmp_path, source, objective=SIMPO)
    forward = trainer.model.forward
    poisoned = "pair-3"

    def poison(layout: object) -> torch.Tensor:
        logps = forward(layout).clone()
        groups = trainer.regime.window(0).micro_batches[0].groups
        row = 2 * [group.id for group in groups].index(poisoned)
        logps[row] = torch.nan
        return logps

    trainer.model.forward = poison
    before = trained_weights(trainer)
    with pytest.raises(
        TrainingError, match=r"step 1: the loss of 1 pairs is not finite.*pair-3 \(loss nan\)"
    ):
        trainer.train()
    assert all(
        torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items()
    )


def test_metrics_count_what_they_say(tmp_path: Path) -> None:
    """One window of four pairs: means over pairs and tokens by hand."""
    pairs = random_pairs(4)
    trainer = make_trainer(
        tmp_path, GroupList(pairs), objective=SIMPO, max_steps=1, eval_source=GroupList(pairs)
    )
    trainer.train()
    start, row = read_metrics(tmp_path / "metrics.jsonl")
    model = lora_llama()
    chosen = [sequence_logps(model, p, p.responses[0]) for p in pairs]
    rejected = [sequence_logps(model, p, p.responses[1]) for p in pairs]
    assert row["logps/chosen"] == pytest.approx(sum(c.sum().item() for c in chosen) / 4, rel=1e-5)
    tokens = sum(len(c) for c in chosen)
    assert row["logps/chosen_per_token"] == pytest.approx(
        sum(c.sum().item() for c in chosen) / tokens, rel=1e-5
    )
    wins = sum((c.mean() > r.mean()).item() for c, r in zip(chosen, rejected, strict=True))
    assert row["rewards/accuracy"] == start["eval/rewards/accuracy"] == wins / 4
    prompts = sum(len(p.prompt_ids) for p in pairs)
    full = [len(p.prompt_ids) + len(r.ids) for p in pairs for r in p.responses]
    assert row["tokens/computed"] == prompts + tokens + sum(len(r) for r in rejected) - 8
    assert row["tokens/prompt_shared_frac"] == pytest.approx(prompts / sum(full))
    assert row["tokens/padding_avoided_frac"] == pytest.approx(1 - sum(full) / (8 * max(full)))
    assert row["step"] == 1 and row["memory/peak_gib"] > 0 and row["tokens/per_s"] > 0


def test_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GroupList(random_pairs(24))
    trainer = make_trainer(tmp_path, source, objective=SIMPO, save_every=1)
    save_state, calls = trainer.accelerator.save_state, []

    def full(output_dir: str, **options: object) -> None:
        calls.append(output_dir)
        if len(calls) == 2:
            Path(output_dir, "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_state(output_dir, **options)

    monkeypatch.setattr(trainer.accelerator, "save_state", full)
    with pytest.raises(
        TrainingError, match=r"step 2 could not be written.*No space left.*step-1 is intact"
    ):
        trainer.train()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "checkpoints" / "step-1"


def test_half_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "tmp-step-5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-4").mkdir()
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(ConfigError, match="not a complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "step-4"))


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GroupList(random_pairs(24)), objective=SIMPO, save_every=1)
    trainer.train()
    other = make_trainer(tmp_path, GroupList(random_pairs(24, seed=1)), objective=SIMPO)
    with pytest.raises(ConfigError, match="other data"):
        other.train(find_checkpoint(tmp_path, "auto"))


def test_sigterm_saves_and_stops_after_the_step(tmp_path: Path) -> None:
    import os
    import signal

    trainer = make_trainer(tmp_path, GroupList(random_pairs(24)), objective=SIMPO)
    step = trainer._step

    def interrupted(window: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        step(window)

    trainer._step = interrupted
    result = trainer.train()
    assert not result.finished and result.step == 1
    state = json.loads((tmp_path / "checkpoints" / "step-1" / "prefopt.json").read_text())
    assert state["regime"]["step"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch_tokens": 8}, "the longest pair has"),
        ({"world_size": 3}, r"does not divide over 3 processes.*use 6 or 9"),
        ({"world_size": 9}, "9 processes share a global batch of 8 pairs"),
    ],
)
def test_impossible_splits_are_refused(
    tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    from prefopt.model.micro_batches import SplitLimits
    from prefopt.training.regimes import OfflineRegime

    limits = SplitLimits(settings.pop("micro_batch_tokens", 4096))
    with pytest.raises(ConfigError, match=message):
        OfflineRegime(
            GroupList(random_pairs(24)), global_batch_size=8, limits=limits, seed=0, **settings
        )


def test_without_shuffling_every_epoch_takes_the_rows_as_they_are() -> None:
    from prefopt.model.micro_batches import SplitLimits
    from prefopt.training.regimes import OfflineRegime

    source = GroupList(random_pairs(20))
    regime = OfflineRegime(
        source, global_batch_size=8, limits=SplitLimits(4096), seed=0, shuffle=False, num_epochs=2
    )
    assert [regime.rows(step) for step in range(3)] == [
        [*range(8)], [*range(8, 16)], [*range(16, 20)]
    ]  # fmt: skip
    assert regime.rows(3) == regime.rows(0)
    shuffled = OfflineRegime(source, global_batch_size=8, limits=SplitLimits(4096), seed=0)
    assert shuffled.order_hash != regime.order_hash and shuffled.rows(0) != regime.rows(0)


def test_ranks_share_a_window_evenly_and_lose_no_row() -> None:
    from prefopt.model.micro_batches import SplitLimits
    from prefopt.training.regimes import OfflineRegime

    source = GroupList(random_pairs(22))
    regimes = [
        OfflineRegime(
            source, global_batch_size=8, limits=SplitLimits(30), seed=0, world_size=2, rank=rank
        )
        for rank in range(2)
    ]
    for step in range(3):
        windows = [regime.window(step) for regime in regimes]
        assert len({len(window.micro_batches) for window in windows}) == 1
        seen = [g.id for w in windows for b in w.micro_batches if b.counts for g in b.groups]
        assert sorted(seen) == sorted(source.group(row).id for row in regimes[0].rows(step))
        assert windows[0].num_pairs == len(seen)
    assert dataclasses.asdict(windows[0])["num_pairs"] == 6


def test_a_rank_reads_the_tokens_of_its_own_rows_alone() -> None:
    """Counts of the whole window are known from lengths, and are those of the groups themselves."""
    from prefopt.training.windows import make_window

    class Counted(GroupList):
        def group(self, index: int) -> Group:
            read.append(index)
            return super().group(index)

    pairs, rows = random_pairs(12), [3, 7, 1, 11, 3, 0, 5, 2]
    samples = [dataclasses.replace(pair, pairs=()) for pair in pairs[:4]]
    groups = samples + pairs[4:]
    source = Counted(groups)
    seen = []
    for rank in range(3):
        read: list[int] = []
        window = make_window(
            source, rows, SplitLimits(4096), step=0, epoch=1.0, rank=rank, world_size=3
        )
        assert len(read) in (2, 3) and all(batch.counts for batch in window.micro_batches)
        seen += read
        kept = [groups[row] for row in rows]
        alone = [r for g in kept if not g.pairs for r in g.responses]
        assert window.num_pairs == sum(len(g.pairs) for g in kept) == 3
        assert window.num_chosen_tokens == sum(len(g.responses[0].ids) for g in kept if g.pairs)
        assert window.num_samples == len(alone) == 10
        assert window.num_sample_tokens == sum(len(r.ids) for r in alone)
    assert sorted(seen) == sorted(rows)


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row_once_within_their_limits(packed: bool) -> None:
    """Against the layouts themselves: what is counted is what a forward would compute."""
    source = GroupList(random_pairs(200))
    limits = SplitLimits(150, max_groups=5, packed=packed)
    batches = split_micro_batches(source, range(200), limits)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    lay_out = layout_fn(packed=packed)
    sizes = [lay_out([source.group(row) for row in batch]).num_input_tokens for batch in batches]
    assert max(sizes) <= 150 and max(map(len, batches)) <= 5
    assert len(batches) < 200 / 2  # and they are not all alone


def test_learning_rates_are_those_of_transformers() -> None:
    from transformers import get_scheduler

    from prefopt.recipe.schema import TrainSection

    for name in ("cosine", "linear", "constant"):
        train = TrainSection(learning_rate=1e-3, lr_scheduler=name, warmup_frac=0.1)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        theirs_name = "constant_with_warmup" if name == "constant" else name
        scheduler = get_scheduler(theirs_name, optimizer, num_warmup_steps=3, num_training_steps=25)
        for step in range(25):
            assert learning_rate(train, step, 25) == pytest.approx(
                scheduler.get_last_lr()[0], abs=1e-12
            )
            optimizer.step()
            scheduler.step()
