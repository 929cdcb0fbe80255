"""Drift: how far a model has moved from the unedited one on a fixed text, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.evaluation.measurement import Cases, EditedWeight, Measured, Measurement, Stream
from prune_lightning.metrics import Divergence
from prune_lightning.metrics.drift import kl_divergence, seen_change
from prune_lightning.models.hooks import capture, edit_input
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.records import read_text


class Drift(Measurement):
    r"""Divergence of a model's predictions from the unedited model's, and the change that its edited matrices see.

    - ``kl``: mean over the text's tokens of :math:`\mathrm{KL}(p_0 \,\|\, p)`, in nats.
    - ``agreement``: share of the tokens after which both models' first choice is the same.
    - ``change/{weight}``: :math:`\sqrt{\mathrm{tr}(\Delta C \Delta^\top) / \mathrm{tr}(W_0 C W_0^\top)}` of an edited
      matrix, with the second moment :math:`C` of its inputs on the text in the unedited model; ``change`` is the
      largest.

    The first measurement is the reference. Of the unedited model, the inputs of its LM head and of the edited matrices
    are kept, not its probabilities: one pass of the edited model runs the head on both, so that scales and caps behind
    the head apply to both. The text is cut into rows of one length, so nothing is padded and the batches are always the
    same. Every process measures the whole text.

    Args:
        text: A text file; ``None`` for the general text that is shipped.
        max_tokens: Use the beginning of the text up to this many tokens; ``None`` for all of it.
        length: Tokens per row.
        token_budget: Tokens per forward pass, which bounds the memory of the logits.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.

    Raises:
        UserError: The file cannot be read or is too short, or the method edits the LM head.
    """

    name = "drift"
    title = "drift from the unedited model"
    labels: ClassVar[Mapping[str, str]] = {
        "kl": "KL divergence (nats per token)",
        "agreement": "same first choice",
        "change": "change seen by the text, largest",
        "change/": "change seen by the text",
        "num_nonfinite": "tokens that are not finite",
    }
    short: ClassVar[Sequence[str]] = ("kl", "agreement")
    lower: ClassVar[frozenset[str]] = frozenset({"kl", "change", "change/"})

    def __init__(
        self,
        text: str | None = None,
        max_tokens: int | None = 1024,
        length: int = 128,
        token_budget: int = 256,
        enabled: bool = True,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(enabled, counts)
        self.source = text or "the general text of this package"
        self.text = (_text(text) if enabled else "").strip()
        self.max_tokens, self.length, self.token_budget = max_tokens, length, token_budget
        self._matrices: Mapping[str, EditedWeight] = {}
        self._rows: Tensor | None = None
        self._hidden: list[Tensor] = []
        self._keys: dict[str, Tensor] = {}

    def prepare(self, stream: Stream) -> None:
        """Remember the matrices under edit."""
        self._matrices = stream.matrices

    def facts(self) -> Mapping[str, Any]:
        """Return the text and its number of tokens."""
        return {"text": self.source, "tokens": 0 if self._rows is None else self._rows.numel()}

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return the one job."""
        return {"drift": partial(self._measure, model)}

    @torch.no_grad()
    def _measure(self, model: LanguageModel) -> Measured:
        if self._rows is None:
            self._rows = self._encoded(model).to(model.device)
            self._check(model)
        metric = Divergence(sync_on_compute=False).to(model.device)
        rows: list[dict[str, Any]] = []
        with model.frozen_mode():
            for number, ids in enumerate(self._rows.split(max(1, self.token_budget // self._rows.shape[1]))):
                for reference, logits in self._logits(model, number, ids):
                    kl = kl_divergence(reference, logits)
                    same = reference.argmax(-1) == logits.argmax(-1)
                    metric.update(kl, same)
                    agreement = float((same & kl.isfinite()).double().mean())
                    rows.append({"case": len(rows), "kl": float(kl.double().mean()), "agreement": agreement})
        return Measured({name: float(value) for name, value in metric.compute().items()} | self._changes(), rows)

    def _encoded(self, model: LanguageModel) -> Tensor:
        """Return the text in rows of one length, each after the model's special tokens."""
        ids, whole = (model.tokens.encode(self.text, special_tokens=special) for special in (False, True))
        start, ids = whole[: len(whole) - len(ids)], ids[: self.max_tokens]
        size = min(self.length, model.tokens.max_length) - len(start)
        size = min(size, len(ids))
        if size < 2:
            raise UserError(f"evaluation.drift: {self.source} has only {len(ids)} tokens")
        return torch.tensor([[*start, *ids[i : i + size]] for i in range(0, len(ids) - size + 1, size)])

    def _check(self, model: LanguageModel) -> None:
        head = model.model.get_output_embeddings()
        for name, matrix in self._matrices.items():
            if matrix.parameter is head.weight:
                raise UserError(
                    f"evaluation.drift does not measure edits of the LM head, but {name} is under edit: set "
                    "evaluation.drift.enabled=false"
                )

    def _logits(self, model: LanguageModel, number: int, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, for each row of a batch, the unedited model's logits and the model's, ``(length, vocabulary)``."""
        first = number == len(self._hidden)
        modules = [model.model.get_submodule(name.removesuffix(".weight")) for name in self._matrices] if first else []

        def both(hidden: Tensor) -> Tensor:
            now = hidden.flatten(0, 1)
            if first:
                self._hidden.append(now.clone())
            return torch.cat([now, self._hidden[number]]).unsqueeze(1)

        # A memory that gives logits of its own gives those of the model as it is, which come first.
        places = torch.ones_like(ids).nonzero(as_tuple=True)
        with (
            model.reader.only_at(*places),
            edit_input(model.model.get_output_embeddings(), both),
            capture(inputs=modules, stop=False, rows=len(ids)) as seen,
        ):
            logits = model(ids, torch.ones_like(ids)).squeeze(1)
        for i, name in enumerate(self._matrices if first else ()):
            keys = seen.inputs[i].flatten(0, -2)
            self._keys[name] = torch.cat([self._keys[name], keys]) if name in self._keys else keys.clone()
        now, reference = logits.chunk(2)
        return list(zip(reference.split(ids.shape[1]), now.split(ids.shape[1]), strict=True))

    def _changes(self) -> dict[str, float]:
        changes = {
            f"change/{name}": float(seen_change(self._keys[name], matrix.delta(), matrix.original()))
            for name, matrix in self._matrices.items()
        }
        # NaN first, since `max` would pass over it.
        largest = max(changes.values(), key=lambda change: (change != change, change), default=None)
        return changes if largest is None else {"change": largest, **changes}


def _text(path: str | None) -> str:
    if path is not None:
        return read_text(Path(path).expanduser())
    return resources.files("prune_lightning.bundled").joinpath("general.txt").read_text("utf-8")
