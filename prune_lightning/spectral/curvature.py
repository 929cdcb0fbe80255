r"""The directions of a weight matrix in which a loss has little curvature, by a Kronecker-factored approximation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.spectral.triplets import fp64


class LowCurvatureSpace:
    r"""The space of changes that the loss hardly sees: an orthogonal projection of matrices (CrispEdit, 2602.15823).

    For :math:`y = W a` and :math:`g = \partial L/\partial y`, the curvature of the loss is approximated by
    :math:`S \otimes A` with :math:`A = E[aa^\top]`, :math:`S = E[gg^\top]` (K-FAC). With the eigenvectors of both,

    .. math:: P(X) = U_S\,\bigl((U_S^\top X U_A) \circ M\bigr)\,U_A^\top, \qquad
              M_{ij} = [\,l_{S,i}\, l_{A,j} < \ell\,],

    where :math:`\ell` is such that the fewest pairs at or above it hold the share :math:`\gamma` of the curvature.

    Args:
        outputs: :math:`S`, symmetric, shape ``(out_features, out_features)``.
        inputs: :math:`A`, symmetric, shape ``(in_features, in_features)``.
        share: :math:`\gamma` in (0, 1).
        dtype: Dtype of the eigenvectors; fp32 at least, since coarser ones are not orthogonal.

    Attributes:
        left: :math:`U_S`.
        right: :math:`U_A`.
        mask: :math:`M`, boolean.

    Raises:
        UserError: The factors are zero or not finite.
    """

    def __init__(self, outputs: Tensor, inputs: Tensor, share: float, dtype: torch.dtype = torch.float32) -> None:
        if not (torch.isfinite(outputs).all() and torch.isfinite(inputs).all()):
            raise UserError("the statistics of the curvature are not finite; check the model and their text")
        (of_outputs, left), (of_inputs, right) = (torch.linalg.eigh(fp64(factor)) for factor in (outputs, inputs))
        curvature = torch.outer(of_outputs.clamp_min(0), of_inputs.clamp_min(0))
        ordered = curvature.flatten().sort(descending=True).values
        held = ordered.cumsum(0)
        if not held[-1] > 0:
            raise UserError("the loss does not depend on this matrix: its curvature is zero everywhere")
        last = min(len(held) - 1, int((held < share * held[-1]).sum()))
        precise = torch.promote_types(dtype, torch.float32)
        self.left, self.right = left.to(precise), right.to(precise)
        self.mask = curvature < ordered[last]

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> LowCurvatureSpace:
        """Return the space of a :meth:`state_dict`, bit for bit."""
        space = cls.__new__(cls)
        space.left, space.right, space.mask = state["left"], state["right"], state["mask"].bool()
        return space

    def state_dict(self) -> dict[str, Tensor]:
        """Return the eigenvectors and the mask."""
        return {"left": self.left, "right": self.right, "mask": self.mask}

    def to(self, device: torch.device) -> LowCurvatureSpace:
        """Return the space on a device."""
        return self.load({name: tensor.to(device) for name, tensor in self.state_dict().items()})

    @property
    def free_share(self) -> float:
        """Share of the pairs of directions that are in the space."""
        return float(self.mask.double().mean())

    def project(self, matrix: Tensor) -> Tensor:
        """Return the part of a matrix ``(out_features, in_features)`` in the space, in the matrix's dtype."""
        turned = self.left.T @ matrix.to(self.left) @ self.right
        return (self.left @ turned.mul_(self.mask) @ self.right.T).to(matrix.dtype)
