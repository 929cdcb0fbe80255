"""Gradient descent on some columns of a matrix beside a down-projection, in the space of the inputs it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.methods.tuning_problem import logits_of_output
from prune_lightning.models.language_model import LanguageModel

_STILL = 1e-4  # a loss that has changed by no more does not move, as published


@dataclass(frozen=True)
class Trained:
    r"""A trained change :math:`\kappa M + G^\top X` of the columns.

    Args:
        weights: :math:`G`, shape ``(tokens, out_features)``.
        inputs: :math:`X`, shape ``(tokens, columns)``.
        kept: :math:`\kappa`, what the weight decay has left of the matrix before.
        losses: Before each step.
    """

    weights: Tensor
    inputs: Tensor
    kept: float
    losses: list[float]

    def factors(self) -> dict[str, Tensor]:
        r"""Return :math:`G^\top X`: ``left`` and ``right`` as factors, or ``left`` alone where that is smaller."""
        (tokens, outputs), columns = self.weights.shape, self.inputs.shape[1]
        if tokens * (outputs + columns) < outputs * columns:
            return {"left": self.weights.T, "right": self.inputs.T}
        return {"left": self.weights.T @ self.inputs}

    def norm(self) -> float:
        r"""Return the Frobenius norm of :math:`G^\top X`."""
        gram = (self.weights @ self.weights.T).double() * (self.inputs @ self.inputs.T).double()
        return float(gram.sum().clamp_min(0).sqrt())


def marked(columns: Tensor, width: int) -> Tensor:
    """Return masks of columns, shape ``(rows, width)``."""
    mask = torch.zeros(len(columns), width, dtype=torch.bool, device=columns.device)
    return mask.scatter(1, columns.long(), True)


def train_columns(
    model: LanguageModel,
    host: nn.Module,
    layer: int,
    batch: TargetBatch,
    inputs: Tensor,
    matrix: Tensor,
    *,
    steps: int,
    learning_rate: float,
    clip: float,
    weight_decay: float,
    stop_loss: float,
    fast: bool,
) -> Trained:
    r"""Train the columns of a matrix :math:`M` whose product with the inputs is added to a module's output.

    The gradient at :math:`M` is :math:`\delta^\top X` with that at the outputs, :math:`\delta`. The inputs :math:`X`
    stay what they are, so gradient descent moves :math:`M` by :math:`G^\top X` with

    .. math:: G \leftarrow (1 - \eta\lambda)\, G - \eta \min(1, c / \|\delta^\top X\|)\, \delta

    and both :math:`(M X)` and the norm follow from :math:`X X^\top`, which is as large as the number of tokens.

    Args:
        model: The language model, without the memory.
        host: The module, in block ``layer``.
        layer: The block.
        batch: Where logits are read.
        inputs: :math:`X`: the inputs of the module at the batch's real tokens, shape ``(tokens, columns)``.
        matrix: :math:`M` before, shape ``(out_features, columns)``.
        steps: Most steps.
        learning_rate: :math:`\eta`.
        clip: :math:`c`.
        weight_decay: :math:`\lambda`.
        stop_loss: A loss of at most this that no longer moves ends the training.
        fast: See :func:`~.tuning_problem.logits_of_output`.
    """
    gram, before = inputs @ inputs.T, inputs @ matrix.T
    weights, kept = torch.zeros_like(before), 1.0
    real = batch.mask.bool()
    forward = logits_of_output(model, host, layer, batch, "the residual memory", fast)
    losses: list[float] = []
    for _ in range(steps):
        added = (kept * before + gram @ weights).requires_grad_()

        def change(output: Tensor, added: Tensor = added) -> Tensor:
            whole = torch.zeros_like(output, dtype=added.dtype).masked_scatter(real[..., None], added)
            return output + whole.to(output)

        with torch.enable_grad():
            loss = batch.losses(forward(change)).mean()
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, added)
        norm = float((gradient * (gram @ gradient)).sum().clamp_min(0).sqrt())
        left = 1 - learning_rate * weight_decay
        weights = left * weights - learning_rate * min(1.0, clip / (norm + 1e-6)) * gradient
        kept *= left
        if len(losses) > 1 and abs(losses[-2] - losses[-1]) <= _STILL and losses[-1] <= stop_loss:
            break
    return Trained(weights, inputs, kept, losses)
