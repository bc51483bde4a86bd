"""Single files of hub repositories that are archives of results, not data sets that `datasets` could load."""

from __future__ import annotations

from pathlib import Path

from eval.sources import benchmark_rows, file_rows
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError


def file_or_hub_rows(option: str, path: str | None, *, repo: str, file: str) -> list[RawRow]:
    """The rows of ``path``, else of one file of the hub data set ``repo``.

    Args:
        option: what the user sets to give a file, e.g. ``tasks.arena_hard.data``; named in errors.
        path: local file, directory or glob, or None.
        repo: id of the hub data set.
        file: path in it.

    Raises: ConfigError if the hub's file is not to be had; DataError for a broken file, naming file and line.
    """
    if path is not None:
        return benchmark_rows(option, path, hub=None)
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(repo, file, repo_type="dataset")
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError
        raise ConfigError(
            f"{file} of the hub data set {repo} is not to be had ({error}). Give a file: {option}=PATH"
        ) from error
    return file_rows(Path(found))
