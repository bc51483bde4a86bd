"""What every engine checks before it works or sends anything. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.engines.base import Request, SamplingSpec
from prefopt.errors import DataError


def check_requests(
    requests: Sequence[Request], spec: SamplingSpec, context: int | None, setting: str = ""
) -> None:
    """Raises DataError unless every prompt has a token and room for ``max_new_tokens`` more.

    Args:
        context: longest prompt + response in tokens, or None.
        setting: which key sets it, e.g. `` (engine.max_model_len)``; default: the model's own.
    """
    for index, request in enumerate(requests):
        length = len(request.prompt_ids)
        if not length:
            raise DataError(
                f"prompt {index} of {len(requests)} is empty: there is nothing to continue"
            )
        if context is not None and length + spec.max_new_tokens > context:
            raise DataError(
                f"prompt {index} of {len(requests)} has {length} tokens; with regime.max_new_tokens = "
                f"{spec.max_new_tokens} that is {length + spec.max_new_tokens}, and the context holds "
                f"{context}{setting or ' (max_position_embeddings of the model)'}. Lower "
                "data.max_prompt_tokens or regime.max_new_tokens"
            )


def check_sequences(
    sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    context: int | None,
    setting: str = "",
) -> None:
    """Raises DataError unless every prompt has a token and prompt + response fit the context."""
    for index, (prompt, response) in enumerate(sequences):
        if not prompt:
            raise DataError(
                f"sequence {index} to score has no prompt: its first token has no log-prob"
            )
        if context is not None and len(prompt) + len(response) > context:
            raise DataError(
                f"sequence {index} to score has {len(prompt)} + {len(response)} tokens, and the context holds "
                f"{context}{setting or ' (max_position_embeddings of the model)'}"
            )
