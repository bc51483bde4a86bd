"""Attention over a packed row: group by group (what we do) against one masked call over the whole row.

python bench/attention.py --prompt 60 --response 80 --pairs 8
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.model.attention.reference import PackedMasks, packed_attention, visible
from prefopt.model.collate import pack
from prefopt.types import Group, Response


def cpu_seconds(run: Callable[[], Tensor], rounds: int) -> float:
    """Median CPU seconds of a forward and backward."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run().sum().backward()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in {
        "prompt": 60, "response": 80, "pairs": 8, "heads": 6, "head-dim": 64, "rounds": 9, "seed": 0,
        "threads": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    response = Response((5,) * (args.response + 1))
    groups = [Group(str(i), (4,) * args.prompt, (response, response)) for i in range(args.pairs)]
    layout = pack(groups)
    shape = 1, args.heads, layout.num_input_tokens, args.head_dim
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    masks, module = PackedMasks(layout), nn.Module()
    assert layout.spans is not None
    whole = torch.block_diag(*[visible(span).float() for span in layout.spans]).bool()

    def by_group() -> Tensor:
        return packed_attention(module, q, k, v, None, packed_masks=masks)[0]

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, whole).transpose(1, 2)

    gap = (by_group() - masked()).abs().max().item()
    ours, theirs = cpu_seconds(by_group, args.rounds), cpu_seconds(masked, args.rounds)
    print(
        f"{layout.num_input_tokens} tokens: by group {ours * 1e3:.1f} ms of CPU, "
        f"one masked call {theirs * 1e3:.1f} ms"
    )
    print(f"cpu_ratio={theirs / ours:.3g} largest_difference={gap:.2g}")


if __name__ == "__main__":
    main()
