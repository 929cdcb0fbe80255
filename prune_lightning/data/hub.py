"""Records of a data set on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prune_lightning.errors import UserError, one_of
from prune_lightning.models.loading import hub_is_offline
from prune_lightning.records import Row

PREFIX = "hub://"
_OPTIONS = ("config", "files", "split", "revision")


def hub_rows(path: str, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the records of a data set, numbered from 1.

    Args:
        path: ``hub://OWNER/NAME``.
        options: ``config`` (name of a configuration), ``files`` (files of the repository, in place of the
            configuration's), ``split`` and ``revision``; each can be left out. Without ``split`` there has to be one.

    Raises:
        UserError: ``datasets`` is not installed, the data set cannot be loaded, or it has several splits.
    """
    for key in options:
        one_of("key of data.hub", key, _OPTIONS)
    name = path.removeprefix(PREFIX)
    try:
        from datasets import DatasetDict, load_dataset
    except ImportError as error:
        raise UserError(
            f"data.path={path} needs `datasets`: pip install 'prune-lightning[hub]', or give data.path=FILE"
        ) from error
    if hub_is_offline() and not Path(name).exists():
        raise UserError(f"data.path={path}: the hub is switched off (HF_HUB_OFFLINE); give data.path=FILE")
    chosen = {key: options.get(key) for key in ("split", "revision")}
    try:
        found = load_dataset(name, options.get("config"), data_files=options.get("files"), **chosen)
    except Exception as error:  # the library and the network raise many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"data.path={path} cannot be loaded: {reason}; or give data.path=FILE") from error
    if isinstance(found, DatasetDict):
        splits = list(found)
        if len(splits) != 1:
            raise UserError(f"data.path={path} has the splits {', '.join(splits)}: choose one with data.hub.split=NAME")
        found = found[splits[0]]
    for number, row in enumerate(found, start=1):
        yield number, dict(row)
