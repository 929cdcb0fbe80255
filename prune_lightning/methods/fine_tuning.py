"""Fine-tuning of down-projections: FT, FT-L and FT-M, as ROME's and EasyEdit's comparisons run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError, one_of
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.costs import training_cost
from prune_lightning.methods.target_batch import LOSSES, TargetBatch
from prune_lightning.methods.tuning_problem import UpperWeights, WeightProblem, WholeWeights
from prune_lightning.models.fast_path import agrees
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, NonNegative, Positive, Whole
from prune_lightning.types import DenseUpdate, EditRequest


class FineTuning(EditingModule):
    r"""Train the down-projections of some layers with Adam until the model generates the targets.

    The variants differ in loss and constraint; published names are not consistent:

    ========================  ===================  ==========================
    constraint \ loss         ``target``           ``prompt_last``
    ========================  ===================  ==========================
    none                      EasyEdit's FT-M      ROME's FT, EasyEdit's FT-L
    :math:`L_\infty`                               ROME's FT+L
    ========================  ===================  ==========================

    See :class:`~.target_batch.TargetBatch` for the losses. The constraint (Zhu et al. 2020,
    https://arxiv.org/abs/2012.00363) keeps :math:`\lVert W - \bar W \rVert_\infty \le \epsilon`, enforced after each
    step. In the published code :math:`\bar W` is the weight at the start of an edit, so that a stream of N edits can
    drift by :math:`N\epsilon`; ``anchor=original`` keeps the whole stream within :math:`\epsilon`.

    An edit makes at most ``steps`` passes over its requests, ``batch_size`` at a time. The change is trained in fp32 at
    least; a 16-bit model runs with the sum rounded once. Restraints that filter steps, such as ``LowCurvature``, see
    every step of Adam. Biases are not trained (the published code also trains the
    down-projection's bias if there is one). Every process of a distributed run computes the same update.

    Args:
        language_model: The model to edit.
        layers: Layers whose down-projection is trained.
        loss: ``target`` or ``prompt_last``.
        epsilon: :math:`\epsilon`; ``None`` for no constraint.
        anchor: :math:`\bar W`: ``current`` or ``original`` weights.
        steps: Passes over the requests.
        learning_rate: Adam's learning rate.
        batch_size: Requests per step of Adam.
        skip_loss: Skip the step of a batch whose loss is below this.
        stop_loss: Stop after a pass with a mean loss below this.
        end_of_text: Learn the end-of-text token after the target; with the loss ``target``.
        seed: Shuffle the requests of an edit before each pass, so that the batches differ; ``None`` for their order.
        fast: Run only what depends on the trained weights. The plain path computes the same from the whole model.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: An unknown loss or anchor, or a number out of range.
    """

    low_rank: ClassVar[bool] = False

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        loss: str,
        epsilon: Positive | None = None,
        anchor: str = "current",
        steps: Count = 25,
        learning_rate: Positive = 5e-4,
        batch_size: Count = 1,
        skip_loss: NonNegative = 1e-2,
        stop_loss: NonNegative = 1e-2,
        end_of_text: bool = False,
        seed: Whole | None = None,
        fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, **kwargs)
        one_of("method.loss", loss, LOSSES)
        one_of("method.anchor", anchor, ("current", "original"))
        if epsilon is not None and not epsilon > 0:
            raise UserError(f"method.epsilon is expected to be positive, or null for no constraint, but got {epsilon}")
        if steps < 1 or batch_size < 1 or not learning_rate > 0:
            raise UserError(
                "method.steps and method.batch_size are expected to be at least 1 and method.learning_rate to be "
                f"positive, but got {steps}, {batch_size} and {learning_rate}"
            )
        if anchor == "original" and epsilon is None:
            raise UserError("method.anchor=original needs method.epsilon, the bound that is relative to it")
        if end_of_text and loss != "target":
            raise UserError("method.end_of_text needs method.loss=target")
        self.loss, self.epsilon, self.anchor = loss, epsilon, anchor
        self.end_of_text, self.seed = end_of_text, seed
        self.steps, self.learning_rate, self.batch_size = steps, learning_rate, batch_size
        self.skip_loss, self.stop_loss, self.fast = skip_loss, stop_loss, fast
        self._checked = False

    filters_steps: ClassVar[bool] = True

    @property
    def builds_on_earlier(self) -> str | None:
        """``anchor=original``."""
        return "anchor=original counts the change by earlier edits" if self.anchor == "original" else None

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        steps: int = 25,
        batch_size: int = 1,
        **options: Any,
    ) -> Cost:
        """Return the costs; the changes are trained in fp32 at least, on top of the weights in the same precision."""
        shapes = [model.edited_shape(layer) for layer in layers]
        trained = float(sum(m * n for m, n in shapes) * max(model.weight_size, 4))
        return training_cost(
            model,
            stream,
            layers=layers,
            matrices=shapes,
            rank=None,
            trained=trained,
            steps=steps,
            batch_size=batch_size,
            at_output=len(layers) == 1,
        )

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, DenseUpdate], list[dict[str, Any]]]:
        """Return the trained change of each weight, dense."""
        matrices = dict(zip(self.layers, self.edited_matrices().values(), strict=True))
        carried = {layer: matrix.delta() for layer, matrix in matrices.items()}
        base = {layer: carried[layer] + matrix.original() for layer, matrix in matrices.items()}
        changes = {layer: torch.zeros_like(delta, requires_grad=True) for layer, delta in carried.items()}
        bounds = {layer: self._bounds(delta) for layer, delta in carried.items()} if self.epsilon else {}
        if bounds and self.run.step_filters:
            raise UserError("method.epsilon and a restraint of every step cannot both hold: set method.epsilon=null")
        optimizer = torch.optim.Adam(changes.values(), lr=self.learning_rate)
        history: list[Tensor] = []  # per pass, the loss of each request before its batch's step
        made = [0] * len(requests)
        for batches in self._passes(requests, base):
            losses = torch.zeros(len(requests), dtype=torch.float64)
            for members, batch, problem in batches:
                with torch.enable_grad():
                    each = batch.losses(problem.logits({layer: base[layer] + changes[layer] for layer in changes}))
                losses[members] = each.detach().double().cpu()
                if float(each.detach().mean()) >= self.skip_loss:
                    optimizer.zero_grad()
                    each.mean().backward()
                    self._step(optimizer, changes)
                    self._constrain(changes, bounds)
                    for member in members:
                        made[member] += 1
            history.append(losses)
            if float(losses.mean()) < self.stop_loss:
                break
        details = [
            {"steps": count, "losses": of_request}
            for count, of_request in zip(made, torch.stack(history, dim=1).tolist(), strict=True)
        ]
        return {matrices[layer].name: DenseUpdate(change.detach()) for layer, change in changes.items()}, details

    def _passes(
        self, requests: Sequence[EditRequest], base: dict[int, Tensor]
    ) -> Iterator[list[tuple[list[int], TargetBatch, WeightProblem]]]:
        """Yield the batches of every pass with the places of their requests; built once unless they are shuffled."""
        count = len(requests)
        shuffled = self.seed is not None and count > self.batch_size
        # Of its own for every edit, so that a resumed run shuffles as the straight one.
        generator = torch.Generator().manual_seed((self.seed or 0) + self.num_requests)
        batches: list[tuple[list[int], TargetBatch, WeightProblem]] = []
        for _ in range(self.steps):
            if shuffled or not batches:
                order = torch.randperm(count, generator=generator).tolist() if shuffled else list(range(count))
                chunks = [order[i : i + self.batch_size] for i in range(0, count, self.batch_size)]
                batches = []
                for members in chunks:
                    chosen = [requests[i] for i in members]
                    batch = TargetBatch(self.language_model, chosen, self.loss, self.end_of_text)
                    batches.append((members, batch, self._problem(batch, base)))
            yield batches

    def _step(self, optimizer: torch.optim.Optimizer, changes: dict[int, Tensor]) -> None:
        """Make one step of the optimizer, with what the restraints that filter steps leave of it."""
        names = dict(zip(self.layers, self.edited_matrices(), strict=True))
        for restraint in self.run.step_filters:
            for layer, change in changes.items():
                assert change.grad is not None
                change.grad = restraint.filter_gradient(names[layer], change.grad)
        optimizer.step()
        with torch.no_grad():
            for restraint in self.run.step_filters:
                for layer, change in changes.items():
                    change.copy_(restraint.filter_change(names[layer], change.detach()))

    def _bounds(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the lower and upper bound of the change, given the change that the weight already has."""
        assert self.epsilon is not None
        centre = -carried if self.anchor == "original" else torch.zeros_like(carried)
        return centre - self.epsilon, centre + self.epsilon

    @staticmethod
    @torch.no_grad()
    def _constrain(changes: dict[int, Tensor], bounds: dict[int, tuple[Tensor, Tensor]]) -> None:
        for layer, (lowest, highest) in bounds.items():
            changes[layer].clamp_(lowest, highest)

    def _problem(self, batch: TargetBatch, base: dict[int, Tensor]) -> WeightProblem:
        """Return the fast path, unless its logits differ from those of the whole model."""

        def upper() -> WeightProblem | None:
            problem = UpperWeights(self.language_model, self.layers[0], batch)
            self._checked = self._checked or self._fits(problem, batch, base)
            return problem if self._checked else None

        fast = self.language_model.fast_path.attempt("fine-tuning", upper) if self.fast else None
        return fast or WholeWeights(self.language_model, batch)

    @torch.no_grad()
    def _fits(self, problem: WeightProblem, batch: TargetBatch, base: dict[int, Tensor]) -> bool:
        """Whether both paths give the same logits for other weights than the present ones."""
        others = {layer: 1.1 * weight for layer, weight in base.items()}
        return agrees(problem.logits(others), WholeWeights(self.language_model, batch).logits(others))
