"""Resuming an interrupted run: its ledger, its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from prune_lightning.data.protocol import EditProtocol
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger
from prune_lightning.tasks.arguments import AUTO
from prune_lightning.tasks.recipe import Recipe

_HOW = {"cache", "shipped", "token_budget", "graph"}  # settings of how something is computed, not of what


class NothingToResume(UserError):
    """A run is complete."""


def settle_resume(config: DictConfig, folder: Path) -> bool:
    """Replace ``resume=auto`` by the run's folder if an earlier job left edits there, else by a new run.

    A job that ended between its last edit and its summary is run again, and so is one whose steps each start from the
    unedited model.

    Returns:
        Whether ``resume`` was ``auto``, so that a complete run is to be skipped.
    """
    if config.resume != AUTO:
        return False
    begun = (folder / "ledger" / "base.json").is_file()
    from_base = config.data.get("protocol") in [protocol.value for protocol in EditProtocol if protocol.from_base]
    unfinished = begun and not (folder / "summary.json").is_file()
    lost = unfinished and (from_base or Ledger.open(folder / "ledger").finish_line is not None)
    config.resume = str(folder) if begun and not lost else None
    return True


def ledger_to_resume(run: str | None, folder: Path) -> Ledger | None:
    """Return the ledger of a run up to its last intact step.

    Args:
        run: The run to resume; ``None`` for a new one.
        folder: The run's folder.

    Raises:
        UserError: There is no ledger.
    """
    return None if run is None else Ledger.open(folder / "ledger").verified()


def check_recipe(ledger: Ledger, recipe: Recipe) -> None:
    """Check that method, restraint and their settings are those of the run to resume.

    Args:
        ledger: The run's ledger.
        recipe: What the configuration asks for.

    Raises:
        UserError: A setting differs.
    """
    recorded, asked = _settings(ledger.base), _settings(recipe.as_base())
    for name, value in asked.items():
        if name in recorded and recorded[name] != value:
            raise UserError(
                f"the run in {ledger.folder.parent} was made with {name}={recorded[name]}, not {value}: resume it with "
                "its own settings, or choose another folder by hydra.run.dir=..."
            )


def _settings(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says of method, restraint and seed, by the names of the configuration."""
    found = {name: base.get(name) for name in ("method", "restraint", "seed")}
    return found | {
        key: value
        for group in ("method", "restraint")
        for key, value in flat_settings(group, base.get(f"{group}_options"))
    }


def flat_settings(prefix: str, options: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each setting, but for those of how something is computed."""
    for name, value in (options or {}).items():
        if name in _HOW:
            continue
        if isinstance(value, Mapping):
            yield from flat_settings(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


def check_stream(ledger: Ledger, stream: EditStream) -> None:
    """Check that a stream is the one of the run to resume.

    Args:
        ledger: The run's ledger.
        stream: The stream, set up.

    Raises:
        UserError: It is another stream.
        NothingToResume: The run is complete.
    """
    folder = ledger.folder.parent
    from_base = stream.protocol.from_base
    written = [request for line in ledger.lines for request in line["requests"]]
    ended = ledger.finish_line or (from_base and (folder / "summary.json").is_file())
    if len(written) > len(stream.requests) or (len(written) == len(stream.requests) and ended):
        raise NothingToResume(
            f"{folder} holds all of its {len(written)} edits: there is nothing to resume; a larger data.num_edits "
            "extends it"
        )
    if from_base:
        raise UserError(f"data.protocol={stream.protocol.value} starts each step from the unedited model: run it again")
    for place, (earlier, request) in enumerate(zip(written, stream.requests, strict=False)):
        if (earlier["prompt"], earlier["target_new"]) != (request.prompt, request.target_new):
            raise UserError(f"the data are not the run's: edit {place + 1} was {earlier['prompt']!r}")
