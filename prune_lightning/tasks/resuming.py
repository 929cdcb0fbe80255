"""Resuming an interrupted run: its ledger, its metrics."""

from __future__ import annotations

from pathlib import Path

from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger


def ledger_to_resume(run: str | None, folder: Path) -> Ledger | None:
    """Return the ledger of a run up to its last intact step.

    Args:
        run: The run to resume; ``None`` for a new one.
        folder: The run's folder.

    Raises:
        UserError: There is no ledger.
    """
    return None if run is None else Ledger.open(folder / "ledger").verified()


def check_stream(ledger: Ledger, stream: EditStream) -> None:
    """Check that a stream is the one of the run to resume.

    Args:
        ledger: The run's ledger.
        stream: The stream, set up.

    Raises:
        UserError: It is another stream, or the run is complete.
    """
    folder = ledger.folder.parent
    if stream.protocol.from_base:
        raise UserError(f"data.protocol={stream.protocol.value} starts each step from the unedited model: run it again")
    written = [request for line in ledger.lines for request in line["requests"]]
    if len(written) > len(stream.requests) or (len(written) == len(stream.requests) and ledger.finish_line):
        raise UserError(f"{folder} holds all of its {len(written)} edits: there is nothing to resume")
    for place, (earlier, request) in enumerate(zip(written, stream.requests, strict=False)):
        if (earlier["prompt"], earlier["target_new"]) != (request.prompt, request.target_new):
            raise UserError(f"the data are not the run's: edit {place + 1} was {earlier['prompt']!r}")
