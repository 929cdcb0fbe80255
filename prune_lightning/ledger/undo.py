"""Rebuilds a run's edited model from its folder: the final one, the one after an edit, or one without some edits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from hydra.utils import instantiate
from torch import nn

from prune_lightning.errors import UserError
from prune_lightning.ledger.rebuild import Rebuilt, check_base, rebuild
from prune_lightning.ledger.replay import without
from prune_lightning.ledger.store import Ledger
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.loading import load_language_model


class Restraining(Protocol):
    """The interface of a run's restraint."""

    def attach(self, module: nn.Module) -> None:
        """Attach to the matrices of a module on its unedited model."""
        ...

    def restrain(self, matrix: Any) -> None:
        """Restrain one matrix now."""
        ...

    def after_step(self, steps: int) -> bool:
        """Restrain if it is due."""
        ...


@dataclass(frozen=True)
class EditedRun:
    """A run's model with edits in place.

    Args:
        module: The editing module; not prepared, so it cannot edit further.
        base: The ledger's description of the base, the method and the restraint.
        requests: The edits in place, in order, as plain data.
        rebuilt: How exactly the state was restored; ``None`` without some edits, since there is no recorded state to
            compare with.
    """

    module: EditingModule
    base: Mapping[str, Any]
    requests: list[dict[str, Any]]
    rebuilt: Rebuilt | None = None


def edited_run(path: str | Path, after: int | None = None, taken_back: Collection[int] = ()) -> EditedRun:
    """Rebuild a run's edited model from its ledger; classes that the ledger names are imported and built.

    Args:
        path: The run's folder.
        after: Stop after so many edits, 0 for the unedited model; ``None`` for all of them.
        taken_back: Numbers of edits to leave out, from 1; see :func:`prune_lightning.ledger.without`.

    Raises:
        UserError: No run, no ledger, another base, no such edit, one that was written together with others, a damaged
            segment, or weights that differ from those recorded by more than rounding.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"no run folder {str(folder)!r}")
    ledger = Ledger.open(folder / "ledger")
    if any(line["from_base"] for line in ledger.lines):
        raise UserError(f"{folder} restored the unedited model after every step: no edited model is left")
    count = num_steps(ledger, after)
    left_out = steps_of(ledger, taken_back, count)
    module, restraint = _build(ledger)
    check_base(ledger, module)
    if restraint:
        restraint.attach(module)
    whole, rebuilt = count == len(ledger.lines), None
    if not left_out:
        restrain = restraint.restrain if restraint else None
        rebuilt = rebuild(module, ledger, None if whole else count, restrain, memory=False)
    else:
        _replay_others(module, ledger.steps(module.device, last=count), left_out, whole, restraint)
    kept = [line for line in ledger.lines[:count] if line["applied"] and line["step"] not in left_out]
    return EditedRun(module, ledger.base, [request for line in kept for request in line["requests"]], rebuilt)


def _replay_others(
    module: EditingModule,
    records: Any,
    left_out: Collection[int],
    whole: bool,
    restraint: Restraining | None,
) -> None:
    def after_step() -> None:
        if restraint:
            restraint.after_step(module.run.num_steps)

    without(module, records, left_out, after_step, memory=False)
    if whole:
        module.run.finish()


def num_steps(ledger: Ledger, edits: int | None) -> int:
    """Return the number of steps that contain the first ``edits`` edits.

    Raises:
        UserError: There are fewer edits, or the last one was written in one step with later ones.
    """
    if edits is None:
        return len(ledger.lines)
    ends = [0, *(line["num_requests"] for line in ledger.lines)]
    if edits in ends:
        return ends.index(edits)
    if not 0 <= edits <= ends[-1]:
        raise UserError(f"after={edits}: {ledger.folder.parent} holds {ends[-1]} edits")
    before, behind = max(end for end in ends if end < edits), min(end for end in ends if end > edits)
    raise UserError(
        f"edits {before + 1} to {behind} were written in one step: give after={before} or {behind}, not {edits}"
    )


def steps_of(ledger: Ledger, edits: Collection[int], count: int) -> set[int]:
    """Return the steps, among the first ``count``, that consist of these edits.

    Raises:
        UserError: An edit is not among them, or was written in one step with edits that are not listed.
    """
    left, steps = set(edits), set()
    for line in ledger.lines[:count]:
        members = set(range(line["num_requests"] - len(line["requests"]) + 1, line["num_requests"] + 1))
        if named := members & left:
            if named != members:
                raise UserError(
                    f"edits {min(members)} to {max(members)} were written in one step: take back all of them or none"
                )
            steps.add(line["step"])
            left -= members
    if left:
        held = ledger.lines[count - 1]["num_requests"] if count else 0
        raise UserError(f"there is no edit {min(left)} to take back: there are {held}")
    return steps


def _build(ledger: Ledger) -> tuple[EditingModule, Restraining | None]:
    base = ledger.base
    if not base.keys() >= {"model", "method_options", "restraint_options"}:
        raise UserError(
            f"{ledger.folder / 'base.json'} names no model and method: the run was not started by train.py. Build its "
            "module, and restore the edits with prune_lightning.ledger.replay"
        )
    if len(base["restraints"]) > bool(base["restraint_options"]):
        raise UserError(
            f"the run was restrained by {', '.join(base['restraints'])}, not all of them its `restraint`: build its "
            "module and restraints, and restore the edits with prune_lightning.ledger.replay"
        )
    model = load_language_model(**base["model"])
    module = instantiate(base["method_options"], language_model=model, _convert_="all")
    if not isinstance(module, EditingModule):
        raise UserError(f"{ledger.folder / 'base.json'} names {type(module).__name__}, which is no editing method")
    if base["device"] == "cuda" and torch.cuda.is_available():
        module.to("cuda")
    options = base["restraint_options"]
    return module, instantiate(options) if options else None
