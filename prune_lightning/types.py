"""The words that every layer of the framework shares: edit requests and weight updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prune_lightning.errors import UserError


@dataclass(frozen=True)
class Probe:
    """A prompt outside the edit whose ``answer`` the edit must leave alone (or, for portability, must bring).

    Args:
        prompt: Text up to the answer, without trailing blanks.
        answer: The expected continuation, without a leading blank; ``None`` if only stability is asked.
        kind: What the probe tests, e.g. ``neighborhood`` or ``unrelated``.
        aliases: Further answers that are right when the model answers freely.
    """

    prompt: str
    answer: str | None = None
    kind: str = "neighborhood"
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditRequest:
    """One fact to rewrite, with what is needed to judge the rewrite.

    Targets carry no leading blank; whoever scores or edits adds it.

    Args:
        case_id: Identifier of the record in its source.
        subject: The entity, a literal part of ``prompt``.
        prompt: Text up to the target.
        target_new: What the model shall say.
        target_old: What it said before, if known; the comparison scores need it.
        paraphrases: Other prompts that shall yield ``target_new``.
        locality: Probes that shall not change.
        portability: Consequences of the edit, where the record has them.
        generation_prompts: Beginnings of texts about the subject; their continuations show whether the model still
            writes fluently.
        references: Texts about the new target, which such continuations should resemble.

    Raises:
        UserError: An empty prompt or target, or a subject that is not in its prompt.
    """

    case_id: int | str
    subject: str
    prompt: str
    target_new: str
    target_old: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = field(default=(), repr=False)
    generation_prompts: tuple[str, ...] = field(default=(), repr=False)
    references: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"`{name}` is expected to be a non-empty text, but got {value!r}")
        if isinstance(self.case_id, bool) or not isinstance(self.case_id, (int, str)):
            raise UserError(f"`case_id` is expected to be a whole number or a text, but got {self.case_id!r}")
        answers = (self.target_old, *(probe.answer for probe in (*self.locality, *self.portability)))
        if not all(text is None or (isinstance(text, str) and text.strip()) for text in answers):
            raise UserError("the old target and the answers of probes are expected to be non-empty texts, or absent")
        texts = (*self.paraphrases, *self.generation_prompts, *self.references)
        texts += tuple(probe.prompt for probe in (*self.locality, *self.portability))
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError("paraphrases, prompts and references are expected to be non-empty texts")
        if self.subject not in self.prompt:
            raise UserError(f"the subject {self.subject!r} is not in its prompt {self.prompt!r}")

    def as_dict(self) -> dict[str, Any]:
        """Return the request as plain JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> EditRequest:
        """Return the request that :meth:`as_dict` took apart, whether or not it was JSON in between."""
        lists = ("paraphrases", "generation_prompts", "references")
        probes = {
            name: tuple(Probe(**{**probe, "aliases": tuple(probe["aliases"])}) for probe in plain[name])
            for name in ("locality", "portability")
        }
        return cls(**{**plain, **{name: tuple(plain[name]) for name in lists}, **probes})


class EditBatch:
    """The requests of one training step.

    No dataclass: a Trainer's ``precision`` looks into those for tensors to convert, and stops at frozen ones.

    Args:
        requests: The facts that are written together. None where a resumed stream has nothing left to write.
        from_base: The unedited model is put back after the step (the protocols ``single`` and ``batch``).
    """

    def __init__(self, requests: tuple[EditRequest, ...], from_base: bool = False) -> None:
        self.requests, self.from_base = requests, from_base


@dataclass(frozen=True)
class MetaExample:
    """What an editor is trained on: edits that make one update, and what the edited model shall say and leave alone.

    Args:
        edits: ``(prompt, new target)`` of each edit.
        rephrased: As many ``(other prompt, new target)``.
        locality: Texts whose predictions shall stay.
    """

    edits: tuple[tuple[str, str], ...]
    rephrased: tuple[tuple[str, str], ...]
    locality: tuple[str, ...]


@dataclass(frozen=True)
class LowRankUpdate:
    r"""A change of one weight matrix in factored form, :math:`\Delta = A B^\top`.

    The orientation is the mathematical one, ``out_features x in_features``, however the layer stores its weight.

    Args:
        left: :math:`A`, shape ``(out_features, rank)``.
        right: :math:`B`, shape ``(in_features, rank)``.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def sum(cls, updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
        """Return the sum of updates of one matrix: their factors side by side."""
        return cls(torch.cat([u.left for u in updates], dim=1), torch.cat([u.right for u in updates], dim=1))

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.left.shape[0], self.right.shape[0]

    def dense(self) -> Tensor:
        """Return the update as a matrix ``(out_features, in_features)``."""
        return self.left @ self.right.T

    def add_to(self, matrix: Tensor) -> None:
        """Add the update in place, in the precision of ``matrix``."""
        matrix.addmm_(self.left.to(matrix), self.right.to(matrix).T)

    def norm(self) -> float:
        r"""Return the Frobenius norm, from the two Gram matrices: :math:`\mathrm{tr}(A^\top A\,B^\top B)^{1/2}`."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0).sqrt())

    def is_finite(self) -> bool:
        """Whether no entry of the factors is NaN or infinite."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())


@dataclass(frozen=True)
class DenseUpdate:
    r"""A change of one weight matrix that has no factors worth keeping, such as that of fine-tuning.

    Args:
        matrix: :math:`\Delta`, shape ``(out_features, in_features)`` however the layer stores its weight.
    """

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Tensor:
        """Return the update as a matrix ``(out_features, in_features)``."""
        return self.matrix

    def add_to(self, matrix: Tensor) -> None:
        """Add the update in place, in the precision of ``matrix``."""
        matrix.add_(self.matrix.to(matrix))

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(self.matrix.double().norm())

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return bool(torch.isfinite(self.matrix).all())


MatrixUpdate: TypeAlias = LowRankUpdate | DenseUpdate


def norm_of_all(updates: Mapping[str, MatrixUpdate]) -> float:
    """Return the Frobenius norm of a step's update over all its matrices."""
    return sum(update.norm() ** 2 for update in updates.values()) ** 0.5


@dataclass(frozen=True)
class EditStep:
    """What a method computed for the requests of one step.

    Args:
        requests: The requests.
        updates: The update of each edited weight, by name.
        details: Per request what the method reports, e.g. the steps of its value optimisation.
    """

    requests: tuple[EditRequest, ...]
    updates: Mapping[str, MatrixUpdate]
    details: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EditReport:
    """What one edit step did; one entry per request in each list.

    Args:
        requests: The requests of the step.
        update_norm: Frobenius norm of the step's update over all matrices.
        seconds: Wall time of the step.
        details: Per request what the method has to tell, e.g. the steps of its value optimisation.
        applied: Whether the update is in the weights.
        refused: Why it is not; ``None`` if it is.
    """

    requests: tuple[EditRequest, ...]
    update_norm: float
    seconds: float
    details: tuple[Mapping[str, Any], ...] = ()
    applied: bool = True
    refused: str | None = None
