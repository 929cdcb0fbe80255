"""Files of hyper-parameters: `experiment=tune` writes them, `hparams=FILE` reads them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from prune_lightning.atomic_files import write_bytes
from prune_lightning.errors import UserError, near
from prune_lightning.fingerprint import sampled_fingerprint
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.requests import EditRequest
from prune_lightning.tasks.setup import choice, first_process

SECTIONS = ("method", "restraint")
_LOG = logging.getLogger(__name__)


def overrides() -> list[str]:
    """Return the overrides of the command line, without `+` and `~`."""
    return [word.lstrip("+~") for word in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every entry that is no mapping.

    >>> dict(leaves({"a": {"b": 1}, "c": [2]}))
    {'a.b': 1, 'c': [2]}
    """
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_hparams(path: Path, found: Mapping[str, Any], values: Mapping[str, Any], remark: str) -> None:
    """Write a file for ``hparams=``.

    Args:
        path: The file.
        found: How the values were found; ``model``, ``fingerprint``, ``dtype``, ``method``, ``restraint`` and the
            ``edits`` of ``pilots`` are compared with the run that reads the file.
        values: By dotted key, such as ``method.value.clamp``.
        remark: A comment for the top of the file.
    """
    nested = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(nested, key, value)
    document = {"found": dict(found), **OmegaConf.to_container(nested)}  # type: ignore[dict-item]
    comment = "".join(f"# {line}\n" for line in remark.splitlines())
    write_bytes(path, (comment + yaml.safe_dump(document, sort_keys=False)).encode())


def read_hparams(path: str) -> dict[str, Any]:
    """Read such a file.

    Raises:
        UserError: It is missing or no such file.
    """
    file = Path(path).expanduser()
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"hparams: {path!r} cannot be read: {' '.join(str(error).split())}") from error
    whole = isinstance(document, dict) and isinstance(document.get("found"), dict)
    sections = [document.get(name, {}) for name in SECTIONS] if whole else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise UserError(f"hparams: {path!r} is no file of experiment=tune: it needs `found` and `method`")
    assert isinstance(document, dict)
    return document


def apply_hparams(config: DictConfig) -> None:
    """Put the values of ``hparams=FILE`` into a configuration, in place. The command line takes precedence.

    Raises:
        UserError: The file is of another method, or has an option that the method lacks.
    """
    if config.get("hparams") is None:
        return
    document = read_hparams(config.hparams)
    for section in SECTIONS:
        values, wanted = document.get(section, {}), document["found"].get(section)
        if values and wanted != choice(section):
            if section == "method":
                raise UserError(f"hparams: {config.hparams} is of method={wanted}, but this is {choice('method')}")
            _say(f"hparams: the file is of restraint={wanted}; its values for the restraint are not used")
            continue
        options = [key for key, _ in leaves(_plain(config[section]))]
        for key, value in leaves(values):
            if key not in options:
                raise UserError(f"hparams: {section}={wanted} has no option {key!r}: {near(key, options)}")
            if not _overridden(f"{section}.{key}"):
                OmegaConf.update(config, f"{section}.{key}", value)


def _plain(section: DictConfig | None) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(section, resolve=False) if section else {}
    return found


def _overridden(key: str) -> bool:
    """Whether the command line sets a key, or a part of it, or a whole that holds it."""
    given = [word.partition("=")[0] for word in overrides() if "." in word.partition("=")[0]]
    return any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for name in given)


def compare_model(config: DictConfig, model: LanguageModel) -> None:
    """Warn if ``hparams=FILE`` was found for another model."""
    if config.get("hparams") is None:
        return
    found = read_hparams(config.hparams)["found"]
    if found.get("dtype") == str(model.model.dtype) and found.get("fingerprint") != weights_fingerprint(model):
        _say(f"hparams: {config.hparams} was found for another model, {found.get('model')}; experiment=tune finds more")


def edit_marks(requests: Iterable[EditRequest]) -> list[str]:
    """Return a short digest of the prompt of each edit, by which it is recognised in other data."""
    return [hashlib.blake2b(request.prompt.encode(), digest_size=6).hexdigest() for request in requests]


def compare_stream(config: DictConfig, requests: Sequence[EditRequest]) -> None:
    """Warn if edits of a stream are among those on which ``hparams=FILE`` was found."""
    if config.get("hparams") is None:
        return
    pilots = read_hparams(config.hparams)["found"].get("pilots") or {}
    known = set(pilots.get("edits", ()))
    if common := sum(mark in known for mark in edit_marks(requests)):
        _say(
            f"hparams: {common} of the {len(requests)} edits of this run are among those on which {config.hparams} was "
            "found, so its scores are too good: edit others, or tune again with a larger tune.skip"
        )


def weights_fingerprint(model: LanguageModel) -> str:
    """Return a fingerprint of all weights."""
    return sampled_fingerprint(dict(model.model.named_parameters()))


def source_of(config: DictConfig) -> dict[str, str] | None:
    """Return the source of the hyper-parameters for the run's summary, or ``None`` without ``hparams=FILE``."""
    if config.get("hparams") is None:
        return None
    found = read_hparams(config.hparams)["found"]
    return {"tuned": f"{config.hparams}: score {found.get('score')} on {found.get('scored_on')}"}


def _say(text: str) -> None:
    if first_process():
        _LOG.warning(text)
