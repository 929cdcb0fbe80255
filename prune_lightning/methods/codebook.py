"""GRACE's codebook: keys with radii, and the value that each key stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

FILL = -1  # behind the end of a label
NONE = -1  # no entry
_APART = 1e-5  # between the two balls of a split, as published


@dataclass(frozen=True)
class Placement:
    """What a key does to a codebook.

    Args:
        kind: ``new`` entry; ``split``: a new entry and a smaller ball around the nearest one, which has another label;
            ``expand``: a larger ball around the nearest one, which has the same label; ``inside`` its ball; or
            ``replace``: another value for the same key.
        entry: Index of the entry that holds the key now.
        distance: Distance to the nearest key; ``None`` without one.
    """

    kind: str
    entry: int
    distance: float | None


@dataclass(frozen=True)
class Codebook:
    r"""Entries :math:`(k_j, v_j, \epsilon_j, y_j)`. Nothing is changed in place.

    Args:
        keys: :math:`k_j`, shape ``(m, in_features)``.
        values: :math:`v_j`, shape ``(m, out_features)``.
        radii: :math:`\epsilon_j`, shape ``(m,)``.
        labels: :math:`y_j`, the target's token ids, filled with -1, shape ``(m, longest)``.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, like: Tensor) -> Codebook:
        """Return a codebook without entries, in the dtype and on the device of ``like``, fp32 at least."""
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        labels = torch.empty(0, 0, dtype=torch.long, device=like.device)
        return cls(like.new_empty(0, inputs), like.new_empty(0, outputs), like, labels)

    def tensors(self) -> dict[str, Tensor]:
        """Return the entries as tensors by name."""
        return dict(vars(self))

    def __len__(self) -> int:
        return len(self.keys)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest entry of each query, and its distance.

        Differences are taken entry by entry: expanded squares would cancel where it matters, near a key.

        Args:
            queries: Shape ``(n, in_features)``.
        """
        distances = torch.cdist(queries.to(self.keys), self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        found = distances.min(1)
        return found.indices, found.values

    def lookup(self, queries: Tensor) -> Tensor:
        """Return the entry whose ball around the nearest key holds each query, -1 for none, shape ``(n,)``."""
        entry, distance = self.nearest(queries)
        return entry.where(distance <= self.radii[entry], NONE)

    def with_entry(
        self, key: Tensor, value: Tensor, label: Tensor, radius: float, precision: float
    ) -> tuple[Codebook, Placement]:
        r"""Return the codebook with one more edit, and what the edit did.

        With :math:`d` the distance to the nearest key :math:`k_j`: an entry of its own if :math:`d > \epsilon +
        \epsilon_j`. Otherwise, for another label, one with half the distance as radius, and :math:`k_j` keeps less than
        half. For the same label :math:`k_j` takes the value, and its ball grows to hold the key.

        The published rule loses a key that is edited again with another label: both balls shrink to nothing. Here the
        later value takes the entry over.

        Args:
            key: Shape ``(in_features,)``.
            value: Shape ``(out_features,)``.
            label: Token ids of the target, perhaps filled with -1.
            radius: :math:`\epsilon` of a new entry.
            precision: Relative error of a key: what the same prompt gives in another batch.
        """
        label = label[label != FILL]
        if not len(self):
            return self._appended(key, value, label, radius), Placement("new", 0, None)
        indices, distances = self.nearest(key[None])
        entry, distance = int(indices), float(distances)
        own, rounding = float(self.radii[entry]), precision * float(key.norm())
        if distance > radius + own:
            return self._appended(key, value, label, radius), Placement("new", len(self), distance)
        known = self.labels[entry]
        if torch.equal(known[known != FILL], label):
            kind = "expand" if distance > own else "inside"
            larger = max(own, distance + rounding) if distance > own else own
            return self._changed(entry, value, larger), Placement(kind, entry, distance)
        if distance <= rounding:
            book = self._changed(entry, value, own)
            return replace(book, labels=_filled(book.labels, label, entry)), Placement("replace", entry, distance)
        split = self._changed(entry, self.values[entry], max(0.0, distance / 2 - _APART))
        return split._appended(key, value, label, distance / 2), Placement("split", len(self), distance)

    def _appended(self, key: Tensor, value: Tensor, label: Tensor, radius: float) -> Codebook:
        more = {"keys": key, "values": value, "radii": self.radii.new_tensor(radius)}
        grown: Mapping[str, Tensor] = {
            name: torch.cat([getattr(self, name), tensor.to(self.keys)[None]]) for name, tensor in more.items()
        }
        labels = functional.pad(self.labels, (0, 0, 0, 1), value=FILL)
        return Codebook(labels=_filled(labels, label, len(self)), **grown)

    def _changed(self, entry: int, value: Tensor, radius: float) -> Codebook:
        values, radii = self.values.clone(), self.radii.clone()
        values[entry], radii[entry] = value.to(values), radius
        return replace(self, values=values, radii=radii)


def _filled(labels: Tensor, label: Tensor, entry: int) -> Tensor:
    """Return labels with one row replaced, wide enough for it."""
    labels = functional.pad(labels, (0, max(0, len(label) - labels.shape[1])), value=FILL)
    labels[entry] = FILL
    labels[entry, : len(label)] = label
    return labels
