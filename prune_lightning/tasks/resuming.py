"""Going on with a run that was interrupted: its own command line, its ledger, its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger

_RESUME = "resume="


def full_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line of a run that is to be gone on with: what it was begun with, and what is said now.

    Args:
        arguments: The command line; without ``resume=RUN`` in it, it is returned as it is.

    Raises:
        UserError: RUN is no folder of a run.
    """
    wanted = [word.removeprefix(_RESUME) for word in arguments if word.startswith(_RESUME)]
    if not wanted or wanted[-1] in ("", "null"):
        return list(arguments)
    run = Path(wanted[-1]).expanduser().resolve()
    known = run / ".hydra" / "overrides.yaml"
    if not known.is_file():
        raise UserError(f"resume: {str(run)!r} is not the folder of a run: there is no .hydra/overrides.yaml in it")
    earlier = [str(word) for word in OmegaConf.to_object(OmegaConf.load(known))]  # type: ignore[union-attr]
    now = [word for word in arguments if not word.startswith((_RESUME, "hydra.run.dir="))]
    return (
        [word for word in earlier if not word.startswith(_RESUME)] + now + [f"{_RESUME}{run}", f"hydra.run.dir={run}"]
    )


def ledger_to_go_on_with(run: str | None, folder: Path, stream: EditStream) -> Ledger | None:
    """Return the ledger of the run, and have the stream begin behind it.

    Args:
        run: The run to go on with; ``None`` for a new one.
        folder: The run's folder.
        stream: Its stream, set up.

    Raises:
        UserError: There is no ledger, nothing is left to do, or the stream is another one.
    """
    if run is None:
        return None
    ledger = Ledger.open(folder / "ledger").verified()
    if stream.protocol.from_base:
        raise UserError(f"data.protocol={stream.protocol.value} starts every step from the unedited model: run it anew")
    written = [request for line in ledger.lines for request in line["requests"]]
    if len(written) >= len(stream.requests):
        raise UserError(f"{folder} holds all of its {len(written)} edits: there is nothing to go on with")
    for place, (earlier, request) in enumerate(zip(written, stream.requests, strict=False)):
        if (earlier["prompt"], earlier["target_new"]) != (request.prompt, request.target_new):
            raise UserError(f"the data are not the run's: edit {place + 1} was {earlier['prompt']!r}")
    stream.skip = ledger.num_edits
    return ledger
