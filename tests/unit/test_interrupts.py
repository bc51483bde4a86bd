"""How often several processes ask each other for signals between two forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefopt.process.stopping import Stopped, stopping
from prefopt.training import interrupts
from prefopt.training.interrupts import Interrupts


class Two:
    """This process, and a slower one."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, slower: float) -> None:
        self.slower, self.asked = slower, 0

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.cat([mine, mine * torch.tensor([[0.0, self.slower]])])


def asked_in(calls: int, forward_s: float, slower: float, monkeypatch: pytest.MonkeyPatch) -> int:
    clock = [0.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    both: Any = Two(slower)
    mine = Interrupts(both)
    for _ in range(calls):
        clock[0] += forward_s
        mine.check_between_forwards()
    return both.asked


@pytest.mark.parametrize(
    ("forward_s", "slower", "every"),
    [
        (0.01, 1.0, 17),  # fast: all but one of 17 are skipped
        (1.0, 1.0, 6),  # five are skipped, which take 5 s
        (1.0, 2.5, 3),  # by the slower one's clock
        (9.0, 1.0, 1),
    ],
)
def test_they_ask_each_other_every_few_seconds(
    forward_s: float, slower: float, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked_in(1 + 10 * every, forward_s, slower, monkeypatch) == 11


def test_a_signal_to_the_other_process_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    both: Any = Two(1.0)
    monkeypatch.setattr(both, "gather", lambda mine: torch.cat([mine, torch.tensor([[15.0, 1.0]])]))
    with pytest.raises(Stopped) as caught:
        Interrupts(both).check_between_forwards()
    assert caught.value.number == 15


def test_one_process_hears_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: Any = Two(1.0)
    alone.num_processes = 1
    mine = Interrupts(alone)
    for _ in range(3):
        mine.check_between_forwards()
    monkeypatch.setattr(stopping, "number", 10)
    with pytest.raises(Stopped):
        mine.check_between_forwards()
    assert alone.asked == 0
