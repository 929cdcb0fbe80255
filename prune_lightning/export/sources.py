"""The source of an export: an edited model, with the original and the change of each edited weight."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.export.lowrank import lowest_rank
from prune_lightning.fingerprint import fingerprint, sampled_fingerprint
from prune_lightning.ledger import edited_run
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.methods.side_memory import MemoryEditor, SideMemory
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import DenseUpdate, EditRequest, LowRankUpdate


@dataclass(frozen=True)
class ExportedMatrix:
    r"""One edited weight :math:`W = W_0 + \Delta`, as ``out_features x in_features``.

    Args:
        name: Qualified name of the weight in the ``transformers`` model.
        original: :math:`W_0`.
        change: :math:`\Delta` of the live weight, in factors where they are known, dense otherwise.
        transposed: Whether the weight is stored ``in x out``.
    """

    name: str
    original: Tensor
    change: LowRankUpdate | Tensor
    transposed: bool = False

    @classmethod
    def of(cls, matrix: EditedMatrix) -> ExportedMatrix:
        """Return an edited matrix with its change: the sum of its updates minus what a restraint withholds."""
        factored = None if isinstance(matrix.withheld, DenseUpdate) else matrix.change.factored()
        change: LowRankUpdate | Tensor = matrix.delta()
        if factored is not None:
            parts = [LowRankUpdate(factored.left.vectors @ factored.core, factored.right.vectors)]
            if isinstance(matrix.withheld, LowRankUpdate):
                parts.append(LowRankUpdate(-matrix.withheld.left.double(), matrix.withheld.right.double()))
            change = LowRankUpdate.sum(parts)
        return cls(matrix.name, matrix.original(), change, matrix.transposed)

    def to(self, device: torch.device) -> ExportedMatrix:
        """Return the matrix on a device."""
        return replace(self, original=self.original.to(device), change=self.change.to(device))

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the orientation in which the model stores it."""
        return matrix.T if self.transposed else matrix

    def dense_change(self) -> Tensor:
        r"""Return :math:`\Delta` as a matrix, fp32 at least."""
        dense = self.change if isinstance(self.change, Tensor) else self.change.dense()
        return dense.to(torch.promote_types(self.original.dtype, torch.float32))

    def fingerprint(self) -> str:
        """Return the fingerprint of the original as the model stores it."""
        return fingerprint(self.stored(self.original))


@dataclass(frozen=True)
class Provenance:
    """The origin of an edited model, for its card and its metadata.

    Args:
        base_model: Folder or hub name of the base.
        revision: Its hub revision.
        method: Name of the editing method.
        restraint: Name of the restraint, ``none`` without one.
        requests: The edits that were written, in order.
    """

    base_model: str
    revision: str | None = None
    method: str = ""
    restraint: str = "none"
    requests: Sequence[EditRequest] = field(default=(), repr=False)


@dataclass(frozen=True)
class ExportSource:
    """An edited model with everything needed to write it in any format.

    Args:
        language_model: The model; its weights are the edited ones.
        matrices: The edited weights.
        provenance: Their origin.
        in_weights: Whether these weights are all that the edits changed.
        memory: The memory beside the weights if it can be merged into them; see :meth:`merged`.
    """

    language_model: LanguageModel
    matrices: Sequence[ExportedMatrix]
    provenance: Provenance
    in_weights: bool = True
    memory: SideMemory | None = None

    @classmethod
    def from_module(cls, module: EditingModule, provenance: Provenance) -> ExportSource:
        """Return a source from the matrices of an editing module."""
        matrices = [ExportedMatrix.of(matrix) for matrix in module.edited_matrices().values()]
        memory = module.side if isinstance(module, MemoryEditor) and module.mergeable else None
        return cls(module.language_model, matrices, provenance, module.in_weights, memory)

    def base_fingerprint(self) -> str:
        """Return the fingerprint of the unedited model, which also identifies its cached statistics."""
        originals = {matrix.name: matrix.stored(matrix.original) for matrix in self.matrices}
        return sampled_fingerprint({**dict(self.language_model.model.named_parameters()), **originals})

    def truncated(self, rank: int) -> ExportSource:
        """Return the source with changes of at most this rank, optimal in the Frobenius norm."""
        return replace(self, matrices=[replace(m, change=lowest_rank(m.change, rank)) for m in self.matrices])

    @contextmanager
    def in_place(self, changed: bool) -> Iterator[None]:
        """Set the live weights, inside the block, to the originals or the originals plus these changes.

        They are restored bit for bit afterwards.

        Args:
            changed: Whether to add the changes.
        """
        parameters = {matrix.name: self.language_model.model.get_parameter(matrix.name) for matrix in self.matrices}
        saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            with torch.no_grad():
                for matrix in self.matrices:
                    delta = matrix.dense_change() if changed else 0.0
                    parameters[matrix.name].copy_(matrix.stored(matrix.original + delta))
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])

    @contextmanager
    def merged(self) -> Iterator[ExportSource]:
        """Inside the block the memory is merged into the weights, and the model answers every prompt with them.

        Afterwards the model is as before, bit for bit.
        """
        assert self.memory is not None
        matrices = []
        for name, change in self.memory.merged().items():
            module = self.language_model.model.get_submodule(name.removesuffix(".weight"))
            transposed, weight = stores_transposed(module), module.weight.detach().clone()
            matrices.append(ExportedMatrix(name, weight.T if transposed else weight, change, transposed))
        whole = replace(self, matrices=matrices, in_weights=True, memory=None)
        with self.memory.unedited(), whole.in_place(changed=True):
            yield whole

    def base_copy(self) -> Any:
        """Return a copy of the ``transformers`` model with its original weights."""
        with self.in_place(changed=False):
            return copy.deepcopy(self.language_model.model)

    def weights_metadata(self) -> Mapping[str, Any]:
        """Return the properties that a base's weight must have, per edited weight."""
        return {
            matrix.name: {
                "fingerprint": matrix.fingerprint(),
                "shape": list(matrix.stored(matrix.original).shape),
                "dtype": str(matrix.original.dtype).removeprefix("torch."),
                "transposed": matrix.transposed,
            }
            for matrix in self.matrices
        }


def check_in_weights(in_weights: bool, mergeable: bool, merged: bool, method: str, format_name: str) -> None:
    """Refuse to export edits that are not in the weights, unless they are to be merged into them.

    Args:
        in_weights: Whether the edits are in the weights.
        mergeable: Whether the method's memory can be merged into them.
        merged: Whether this is asked for.
        method: Name of the method.
        format_name: Name of the format.

    Raises:
        UserError: They are in a memory, which no format of other programs holds; or there is no memory to merge.
    """
    if merged and not mergeable:
        raise UserError(f"{method} has nothing that can be merged into the weights: leave `merged` out")
    if not in_weights and not merged:
        way = (
            ", or export one merged copy, which answers every prompt, also unrelated ones: export_merged=true, "
            "--merged, or merged=True in Python"
        )
        raise UserError(
            f"export={format_name}: {method} keeps its edits in a memory beside the weights, which this format cannot "
            "hold. Load the edited model with prune_lightning.Editor.open(FOLDER); a run's folder will do"
            + (way if mergeable else "")
        )


def load_run(path: str | Path, after: int | None = None, without: Collection[int] = ()) -> ExportSource:
    """Return a run's edited model, rebuilt from its ledger.

    Args:
        path: The run's folder.
        after: Number of edits after which to take the model; ``None`` for the end.
        without: Numbers of edits to undo, from 1.

    Raises:
        UserError: See :func:`prune_lightning.ledger.edited_run`.
    """
    run = edited_run(path, after, without)
    model, requests = run.base["model"], tuple(EditRequest.from_dict(request) for request in run.requests)
    provenance = Provenance(model["path"], model["revision"], run.base["method"], run.base["restraint"], requests)
    return ExportSource.from_module(run.module, provenance)
