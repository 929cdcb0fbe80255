"""The protocols of an edit stream."""

from __future__ import annotations

from enum import StrEnum


class EditProtocol(StrEnum):
    """Which edits a step writes, and on which model.

    ``single``: each edit on the unedited model. ``batch``: each batch on the unedited model. ``sequential``: one edit
    after another on the same model. ``sequential_batched``: one batch after another on the same model.
    """

    SINGLE = "single"
    BATCH = "batch"
    SEQUENTIAL = "sequential"
    SEQUENTIAL_BATCHED = "sequential_batched"

    @property
    def from_base(self) -> bool:
        """Whether every step starts from the unedited model."""
        return self in (EditProtocol.SINGLE, EditProtocol.BATCH)

    @property
    def one_by_one(self) -> bool:
        """Whether a step holds exactly one request."""
        return self in (EditProtocol.SINGLE, EditProtocol.SEQUENTIAL)
