"""The protocols of an edit stream."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from prune_lightning.errors import UserError, one_of
from prune_lightning.types import EditRequest


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


def protocol_named(name: str, batch_size: int) -> EditProtocol:
    """Return a protocol by its name.

    Args:
        name: Its value, such as ``sequential``.
        batch_size: Requests per step.

    Raises:
        UserError: There is no such protocol, or it does not allow the batch size.
    """
    one_of("data.protocol", name, [choice.value for choice in EditProtocol])
    protocol = EditProtocol(name)
    if protocol.one_by_one and batch_size != 1:
        raise UserError(
            f"data.protocol={name} writes one edit at a time, but data.batch_size is {batch_size}; "
            "use data.protocol=sequential_batched (or batch)"
        )
    return protocol


def superseded(requests: Sequence[EditRequest], ends: Sequence[int]) -> dict[int, int]:
    """Return, by a request's index, the edit count at which a later one gives its prompt another target.

    Args:
        requests: All requests, in order.
        ends: The edit count at which each step ends.
    """
    found: dict[int, int] = {}
    latest: dict[tuple[str, str], int] = {}
    for place, request in enumerate(requests):
        key = request.subject.lower(), request.pair().context
        if key in latest and requests[latest[key]].target_new != request.target_new:
            found[latest[key]] = next(end for end in ends if end > place)
        latest[key] = place
    return found
