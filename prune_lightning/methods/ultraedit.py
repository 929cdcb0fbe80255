"""UltraEdit: training-, subject- and memory-free lifelong editing (Gu et al., 2025, https://arxiv.org/abs/2505.14679)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from prune_lightning.costs import FP64, Cost, Shapes, StreamShape, Work
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.least_squares import regression_update
from prune_lightning.methods.mend_gradients import LabelledRows, edit_gradients
from prune_lightning.methods.standardisation import RunningCovariance, RunningMoments
from prune_lightning.models.family import matrix_shapes
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.tokenization import EncodedPair
from prune_lightning.types import DenseUpdate, EditRequest, MatrixUpdate

TokenRows: TypeAlias = tuple[Tensor, Tensor]
"""Inputs of a matrix and gradients of its outputs at some tokens, one row per token, fp64."""


class UltraEdit(EditingModule):
    r"""Map the inputs of a matrix at the answer's tokens to its standardised gradients there, by ridge regression.

    .. math:: \Delta = V K^\top (K K^\top + \alpha I)^{-1} = V (K^\top K + \alpha I)^{-1} K^\top, \qquad
              v_t = -\eta \,\lVert \hat k_t \rVert^2\, \hat g_t

    with :math:`k_t` the input at the position that predicts the target's token :math:`t`, :math:`g_t` the gradient of
    the loss by the output there, and the hats standardised with the mean and the deviation of every feature over the
    whole stream. Matrices of equal shape share these moments. The loss is the mean over the target tokens of a
    micro-batch, after the requests were sorted by length, longest first. The second form is solved, whose size is the
    number of target tokens. One forward and backward pass serves all matrices. No subject is needed, and no value is
    optimised; apart from the moments, nothing is kept.

    With ``whiten`` the gradients are multiplied by the inverse root of their covariance in place of the division by
    their deviations (StableEdit).

    Args:
        language_model: The model to edit.
        layers: Blocks whose down-projection is edited. Not used if ``modules`` is given.
        modules: Linear modules of MLPs, as ``LAYER.NAME`` with the names of the family's ``mlp_weights``, e.g.
            ``["11.gate_proj", "18.up_proj"]``.
        rate: :math:`\eta`.
        ridge: :math:`\alpha`.
        micro_batch: Requests per loss.
        whiten: Whiten the gradients once more rows than features were seen.
        inflated_variance: Compute variances as the public code does; see :class:`~.standardisation.RunningMoments`.
        epsilon: Added to the deviations.
        token_budget: Padded tokens per pass of the model; complete micro-batches share a pass.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: A number out of range, ``whiten`` with ``inflated_variance``, or a module that is not ``LAYER.NAME``.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[int],
        modules: Sequence[str] | None = None,
        rate: float = 1e-6,
        ridge: float = 1.0,
        micro_batch: int = 10,
        whiten: bool = False,
        inflated_variance: bool = False,
        epsilon: float = torch.finfo(torch.float32).eps,
        token_budget: int = 8192,
        **kwargs: Any,
    ) -> None:
        names = None if modules is None else [_layer_and_name(module) for module in modules]
        super().__init__(language_model, layers if names is None else sorted({layer for layer, _ in names}), **kwargs)
        if not (rate > 0 and ridge > 0 and micro_batch >= 1):
            raise UserError(
                "UltraEdit expects a positive `rate` and `ridge`, and a `micro_batch` of at least 1, but got "
                f"{rate}, {ridge} and {micro_batch}"
            )
        if whiten and inflated_variance:
            raise UserError("method.whiten is StableEdit's, whose variances are not inflated: set one of the two")
        self.rate, self.ridge, self.micro_batch, self.token_budget = rate, ridge, micro_batch, token_budget
        self._names = names
        self._shapes = matrix_shapes(self.edited_modules())
        self.moments = nn.ModuleDict()
        for m, n in sorted(set(self._shapes.values())):
            halves = [RunningMoments(features, epsilon, inflated_variance) for features in (n, m)]
            self.moments[_key(m, n)] = nn.ModuleList(
                [halves[0], RunningCovariance(m, epsilon) if whiten else halves[1]]
            )
        self._observed: Mapping[str, Tensor] = {}

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        modules: Sequence[str] | None = None,
        whiten: bool = False,
        token_budget: int = 8192,
        **options: Any,
    ) -> Cost:
        """Return the costs: a pass of the model and back, and a system of the size of the step's target tokens."""
        down = [(layer, model.edited_shape(layer)) for layer in layers]
        named = [_layer_and_name(module) for module in modules or ()]
        placed = [(layer, model.mlp_shapes(layer)[name]) for layer, name in named] or down
        lowest, shapes = min(layer for layer, _ in placed), [shape for _, shape in placed]
        length, target = round(stream.prompt + stream.target - 1), round(stream.target)
        rows, tokens = max(1, min(stream.batch, token_budget // length)), stream.batch * target
        passes = model.step(lowest, rows, length, rows * target) + model.forward_until(lowest, rows, length)
        flops = sum(4.0 * tokens**2 * (m + n) + tokens**3 / 3 for m, n in shapes)
        kept = sum(m + n + (m * m if whiten else 0) for m, n in set(shapes))
        return Cost(
            shapes,
            rank=target,
            memory={"moments": 2.0 * FP64 * kept},
            peaks={"gradients": passes.saved},
            per_edit={
                "gradients": passes / rows,
                "solving": Work(0.0, 0.0, 20 * len(shapes), flops64=flops) / stream.batch,
            },
            length=length,
        )

    def edited_modules(self) -> Mapping[str, nn.Module]:
        """Return the chosen linear modules by the name of their weight."""
        if self._names is None:
            return super().edited_modules()
        found: dict[str, nn.Module] = {}
        for layer, name in self._names:
            of_layer = self.language_model.mlp_linears(layer)
            chosen = {path: module for path, module in of_layer.items() if path.endswith(f".{name}.weight")}
            if not chosen:
                known = ", ".join(f"{layer}.{path.split('.')[-2]}" for path in of_layer)
                raise UserError(f"method.modules: the model has no {layer}.{name}; there are {known}")
            found |= chosen
        return found

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, MatrixUpdate], list[dict[str, Any]]]:
        """Return the update of each matrix, and the loss of each request's micro-batch before the edit."""
        before, tokens = self.memory(), self.language_model.tokens
        pairs = tokens.encode_pairs([request.pair() for request in requests])
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].ids))
        seen: dict[str, list[TokenRows]] = {name: [] for name in self._shapes}
        losses: list[float] = []
        for rows, loss, count in self._micro_batches([pairs[i] for i in order]):
            losses += [loss] * count
            for name, (keys, gradients) in rows.items():
                seen[name].append((keys, gradients))
                of_keys, of_gradients = self._moments(name)
                of_keys.update(keys)
                of_gradients.update(gradients)
        updates = {}
        for name, parts in seen.items():
            keys, gradients = (torch.cat(rows) for rows in zip(*parts, strict=True))
            updates[name] = self._solve(name, keys, gradients)
        self._observed = self.memory()
        self.load_memory(before)  # until the update is written
        return updates, [{"loss": loss} for _, loss in sorted(zip(order, losses, strict=True))]

    @property
    def builds_on_earlier(self) -> str | None:
        """The method itself."""
        return "UltraEdit builds on the moments over earlier edits"

    def _micro_batches(self, pairs: Sequence[EncodedPair]) -> Iterator[tuple[dict[str, TokenRows], float, int]]:
        """Yield the rows of each matrix, the loss, and the number of requests of each micro-batch."""
        size = self.micro_batch
        while pairs:  # complete micro-batches share a pass of the model
            groups = min(self.token_budget // (len(pairs[0].ids) * size), len(pairs) // size)
            now, pairs = pairs[: max(1, groups) * size], pairs[max(1, groups) * size :]
            rows = LabelledRows(self.language_model, now)
            found, losses = edit_gradients(self.language_model, self.edited_modules(), rows, max(1, groups))
            place, group = rows.row * rows.ids.shape[1] + rows.position, rows.row // size
            for number, loss in enumerate(losses.tolist()):
                here = place[group == number]
                of = {
                    name: (each.inputs.flatten(0, 1)[here].double(), each.gradients.flatten(0, 1)[here].double())
                    for name, each in found.items()
                }
                yield of, loss, min(size, len(now))

    def _moments(self, name: str) -> tuple[RunningMoments, RunningMoments]:
        """Return the moments of keys and gradients of a matrix's shape."""
        of_keys, of_gradients = cast(nn.ModuleList, self.moments[_key(*self._shapes[name])])
        return cast(RunningMoments, of_keys), cast(RunningMoments, of_gradients)

    def _solve(self, name: str, keys: Tensor, gradients: Tensor) -> MatrixUpdate:
        """Return the update of one matrix from its rows at all target tokens."""
        of_keys, of_gradients = self._moments(name)
        if of_keys.count < 2:
            rank_zero_warn(
                "UltraEdit standardises over the target tokens seen so far. It has seen a single one, so this edit "
                "changes nothing; use a larger data.batch_size"
            )
        values = -self.rate * of_keys(keys).square().sum(1, keepdim=True) * of_gradients(gradients)
        update = regression_update(values.T, keys.T, keys.T, damping=self.ridge)
        (m, n), rank = update.shape, len(keys)
        return DenseUpdate(update.dense()) if rank * (m + n) > m * n else update

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the moments including these requests."""
        return self._observed

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Use these moments from now on."""
        self.moments.load_state_dict(dict(observed))

    def memory(self) -> Mapping[str, Tensor]:
        """Return a copy of the moments."""
        return {name: buffer.clone() for name, buffer in self.moments.named_buffers()}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Use these moments from now on."""
        self.remember(memory)

    def forget(self) -> None:
        """Reset the moments."""
        for module in self.moments.modules():
            if isinstance(module, RunningMoments):
                module.reset()


def _key(rows: int, columns: int) -> str:
    return f"{columns}_to_{rows}"


def _layer_and_name(module: str) -> tuple[int, str]:
    layer, _, name = str(module).partition(".")
    if not layer.isdigit() or not name:
        raise UserError(f"method.modules is expected to list LAYER.NAME, e.g. 11.gate_proj, but got {module!r}")
    return int(layer), name
