"""MEND: model editor networks with gradient decomposition (Mitchell et al., ICLR 2022, arXiv:2110.11309)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from prune_lightning.costs import Cost, Shapes, StreamShape, Work
from prune_lightning.errors import UserError, near
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.editor_training import TrainedEditor
from prune_lightning.methods.mend_gradients import LabelledRows, edit_gradients
from prune_lightning.methods.mend_network import MENDNetwork, NetworkShape
from prune_lightning.methods.mend_store import STORE, load_network, save_network
from prune_lightning.methods.mend_training import MENDTraining, TrainingOptions
from prune_lightning.models.family import matrix_shapes
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Whole
from prune_lightning.types import EditRequest, LowRankUpdate


class MEND(TrainedEditor, EditingModule):
    r"""One gradient step per edit, its gradient transformed by a network that was trained for the model.

    .. math:: \Delta W_\ell = \alpha_\ell \sum_t \tilde\delta_t \tilde u_t^\top, \qquad
              [\tilde u_t; \tilde\delta_t] = g_\ell(u_t, \delta_t), \qquad
              \delta_t = \frac{\partial}{\partial y_t} \frac1T \sum_j -\log p(t_j)

    with :math:`u_t` the input of the matrix at token :math:`t` and :math:`y_t` its output, under the present weights.
    The tokens are those up to the target's last one, and their number is the rank of an update. A batch of requests
    gives one update from the mean over all target tokens, so each of ``B`` edits has ``1/B`` of its single weight; the
    network should be trained with the same number (``editor_data.edits_per_update``).

    Args:
        language_model: The model to edit.
        layers: Blocks whose MLP is edited, ascending.
        hypernetwork: Folder of the trained network. ``None`` for an untrained one, whose update is a plain normalised
            gradient step; this gives a warning.
        weights: Linear modules of the MLP that are edited, named as in the family's ``mlp_weights``; ``None`` for all.
        network: Size and initial values of the network for training, or of the untrained one.
        update_scale: Factor of every update.
        restart_norm_stats: Reset the trained running moments and estimate them from the edits, as published wrappers do
            that never leave training mode. Only for reproducing their figures.
        training: Options of meta-training, see :class:`~.mend_training.TrainingOptions`; not used for editing.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: The network is missing, damaged or of another model, or a name is not in the family's
            ``mlp_weights``.
    """

    store = STORE

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[Whole],
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
        """Return the costs: memory for the network, and per edit a pass of the model and back, and one of the network.

        A trained network is assumed to have the size given by ``network``.
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

    def training_module(self) -> MENDTraining:
        """Return the meta-training of the network."""
        return MENDTraining(self.language_model, self.edited_modules(), self.layers[0], self.network, self.options)

    def save_trained(self, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Write the network."""
        save_network(folder, self.network, self.edited_modules(), facts, dtype)

    def prepare(self) -> None:
        """Warn if the network is not trained."""
        if not self._trained:
            rank_zero_warn(f"MEND without a trained network is a plain gradient step; {STORE.how_to_train}")

    def forget(self) -> None:
        """Reset the running moments if they are estimated from the edits."""
        self._start_moments()

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the running moments including these requests, if they are estimated from the edits."""
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

    @property
    def builds_on_earlier(self) -> str | None:
        """``restart_norm_stats``."""
        return "restart_norm_stats=true builds on the moments over earlier edits" if self.restart_norm_stats else None

    def _start_moments(self) -> None:
        if self.restart_norm_stats:
            self.network.reset_moments()

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return the transformed gradient of each matrix in factored form, and the batch's loss before the edit."""
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
