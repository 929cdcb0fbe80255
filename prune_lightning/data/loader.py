"""The loader of an edit stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from prune_lightning.types import EditBatch


class EditLoader(DataLoader[Any]):
    """Yields batches of edits in order, and continues at the same position after a checkpoint is loaded.

    Args:
        batches: The steps.
    """

    def __init__(self, batches: Sequence[EditBatch]) -> None:
        super().__init__(batches, batch_size=None)  # type: ignore[arg-type]
        self._batches = batches
        self._next = 0

    def __iter__(self) -> Iterator[EditBatch]:  # type: ignore[override]
        while self._next < len(self._batches):
            self._next += 1
            yield self._batches[self._next - 1]
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position."""
        self._next = state["next"]
