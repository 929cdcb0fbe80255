"""MEND: model editor networks with gradient decomposition (Mitchell et al., ICLR 2022, arXiv:2110.11309)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from prune_lightning.costs import Cost, Shapes, StreamShape, Work
from prune_lightning.errors import UserError, near
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.mend_gradients import LabelledRows, edit_gradients
from prune_lightning.methods.mend_network import MENDNetwork, NetworkShape
from prune_lightning.methods.mend_store import HOW_TO_TRAIN, load_network, matrix_shapes
from prune_lightning.methods.mend_training import TrainingOptions
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest, LowRankUpdate


class MEND(EditingModule):
    r"""One gradient step per edit, its gradient transformed by a network that was trained for the model.

    .. math:: \Delta W_\ell = \alpha_\ell \sum_t \tilde\delta_t \tilde u_t^\top, \qquad
              [\tilde u_t; \tilde\delta_t] = g_\ell(u_t, \delta_t), \qquad
              \delta_t = \frac{\partial}{\partial y_t} \frac1T \sum_j -\log p(t_j)

    with :math:`u_t` what enters the matrix at token :math:`t` and :math:`y_t` what leaves it, under the present
    weights. The tokens are those up to the target's last one, so the rank of an update is their number. A batch of
    requests gives one update from the mean over all target tokens: each edit of ``B`` weighs ``1/B`` of what it weighs
    alone, and the network should have been trained with as many (``editor_data.edits_per_update``).

    Args:
        language_model: The model to edit.
        layers: Blocks whose MLP is edited, ascending.
        hypernetwork: Folder of the trained network. ``None`` takes the untrained one, whose update is a plain
            normalised gradient step; a warning says so.
        weights: Linear modules of the MLP that are edited, named as in the family's ``mlp_weights``; ``None`` for all.
        network: Size and start of a network that is to be trained, or of the untrained one.
        update_scale: Factor of every update.
        restart_norm_stats: Forget the trained running moments and estimate them from the edits instead, as the
            published wrappers do that never leave training mode. To reproduce their figures only.
        training: Options of meta-training, see :class:`~.mend_training.TrainingOptions`; not used for editing.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: The network is missing, damaged or another model's, or a name is not one of the family's.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[int],
        hypernetwork: str | None,
        weights: Sequence[str] | None = None,
        network: NetworkShape | None = None,
        update_scale: float = 1.0,
        restart_norm_stats: bool = False,
        training: TrainingOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, **kwargs)
        self.weights = tuple(language_model.family.mlp_weights if weights is None else weights)
        for name in self.weights:
            if name not in language_model.family.mlp_weights:
                raise UserError(f"unknown method.weights {name!r}: {near(name, language_model.family.mlp_weights)}")
        self.update_scale, self.restart_norm_stats, self.options = (
            update_scale,
            restart_norm_stats,
            training or TrainingOptions(),
        )
        if hypernetwork is None:
            self.network = MENDNetwork(matrix_shapes(self.edited_modules()), network or NetworkShape())
        else:
            self.network = load_network(hypernetwork, self.edited_modules())
        self._trained = hypernetwork is not None
        self.network.requires_grad_(False)
        self._start_moments()

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        weights: Sequence[str] | None = None,
        network: NetworkShape | None = None,
        **options: Any,
    ) -> Cost:
        """Return the costs: the network stays, and an edit is a pass through the model and back, and one through it.

        A trained network is taken to have the size that ``network`` says.
        """
        shapes = {
            f"{layer}.{name}": shape
            for layer in layers
            for name, shape in model.mlp_shapes(layer).items()
            if weights is None or name in weights
        }
        with torch.device("meta"):
            size = sum(p.numel() for p in MENDNetwork(shapes, network or NetworkShape()).parameters())
        tokens, target = round(stream.prompt + stream.target - 1), round(stream.target)
        gradient = model.step(layers[0], 1, tokens, target) + model.forward_until(layers[0], 1, tokens)
        transformed = Work(2.0 * size * tokens, 4.0 * size, 20 * len(shapes))
        return Cost(
            list(shapes.values()),
            rank=tokens,
            memory={"network": 4.0 * size},
            peaks={"gradients": gradient.saved * stream.batch},
            per_edit={"gradients": gradient, "network": transformed},
            length=tokens,
        )

    def edited_modules(self) -> Mapping[str, nn.Module]:
        """Return the chosen linear modules of the layers' MLPs by the name of their weight."""
        model, wanted = self.language_model, [f".{name}.weight" for name in self.weights]
        found = {name: module for layer in self.layers for name, module in model.mlp_linears(layer).items()}
        return {name: module for name, module in found.items() if name.endswith(tuple(wanted))}

    def prepare(self) -> None:
        """Say so if the network is not a trained one."""
        if not self._trained:
            rank_zero_warn(f"MEND without a trained network is a plain gradient step; {HOW_TO_TRAIN}")

    def forget(self) -> None:
        """Start the running moments anew, if they are estimated from the edits."""
        self._start_moments()

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the running moments with these requests, if they are estimated from the edits."""
        return self._moments

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Use these moments from now on."""
        self.network.load_state_dict(dict(observed), strict=False)

    def memory(self) -> Mapping[str, Tensor]:
        """Return the running moments, if they are estimated from the edits."""
        return {name: b.clone() for name, b in self.network.named_buffers()} if self.restart_norm_stats else {}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Use these moments from now on."""
        self.remember(memory)

    def _start_moments(self) -> None:
        if self.restart_norm_stats:
            self.network.reset_moments()

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return the transformed gradient of each matrix in factored form, and the batch's loss before."""
        rows = LabelledRows(self.language_model, [request.pair() for request in requests])
        gradients, loss = edit_gradients(self.language_model, self.edited_modules(), rows)
        self.network.train(self.restart_norm_stats)
        updates, before = {}, self.memory()
        with torch.no_grad():
            for name, found in gradients.items():
                inputs, deltas = self.network(name, found.inputs[found.kept], found.gradients[found.kept])
                updates[name] = LowRankUpdate(self.update_scale * deltas.double().T, inputs.double().T)
        self._moments = self.memory()
        self.remember(before)  # until the update is written
        return updates, [{"loss": float(loss)} for _ in requests]
