"""SERAC: edits in a memory, a scope classifier and a counterfactual model (Mitchell et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.editor_training import TrainedEditor
from prune_lightning.methods.scoped_memory import ScopedMemory, packed
from prune_lightning.methods.serac_networks import Entry, NetworkShapes, SERACNetworks
from prune_lightning.methods.serac_training import SERACTraining, TrainingOptions, read_prompts
from prune_lightning.methods.side_memory import MemoryEditor
from prune_lightning.methods.trained_store import TrainedStore
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Share, Whole
from prune_lightning.types import EditRequest, MemoryUpdate


class SERAC(TrainedEditor, MemoryEditor):
    r"""Store edits, and have a small model answer the prompts in their scope.

    .. math:: j = \arg\max_i s(x, x_i), \qquad p(\cdot \mid x) =
              \begin{cases} h(\cdot \mid x_j, y_j, x) & s(x, x_j) > \theta \\ f(\cdot \mid x) & \text{else} \end{cases}

    with :math:`f` the unedited model, :math:`h` the counterfactual model, and :math:`s` the scope score, see
    :class:`~.serac_networks.ScopeClassifier`. The published classifier is an encoder of its own; here it is a
    linear map of the edited model's hidden states, so that routing costs no further pass. It is decided once per prompt
    and holds for the whole answer. An edit trains nothing. A prompt that is edited again gets the later target.

    Args:
        language_model: The model.
        layers: The block whose output the classifier reads, one only.
        path: Folder of the trained networks. ``None`` for untrained ones, which answer nonsense; this gives a warning.
        threshold: :math:`\theta`.
        networks: Sizes of new networks; trained ones have their own.
        training: Options of the training, see :class:`~.serac_training.TrainingOptions`; not used for editing.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: Not one layer, or the networks are missing, damaged or of another model or layer.
    """

    store = TrainedStore("serac", "method.path", "train_serac")

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        path: str | None,
        threshold: Share = 0.5,
        networks: NetworkShapes | None = None,
        training: TrainingOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, **kwargs)
        if len(self.layers) != 1:
            raise UserError(f"SERAC's classifier reads one layer, but `layers` is {list(layers)}")
        self.threshold, self.options, self._trained = threshold, training or TrainingOptions(), path is not None
        shapes = networks or NetworkShapes()
        self.networks = SERACNetworks(language_model, shapes) if path is None else self._loaded(path)
        self.networks.requires_grad_(False).eval().to(language_model.device)

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        networks: NetworkShapes | None = None,
        **options: Any,
    ) -> Cost:
        """Return the costs: both networks, the edits as tokens and embeddings, and a pass up to the layer per edit.

        Prompts in scope also cost a pass of the counterfactual model when they are asked, which is not counted here.
        """
        shapes = networks or NetworkShapes()
        small = model.vocabulary * shapes.width + shapes.layers * 16 * shapes.width**2
        edit = 4.0 * shapes.embedding + 8.0 * (stream.prompt + stream.target + 2)
        held = {"edits": edit * stream.edits}
        return Cost(
            [],
            rank=0.0,
            memory={"networks": 4.0 * (small + 2 * model.hidden_size * shapes.embedding), **held},
            disk=held,
            per_edit={"embedding": model.forward_until(layers[0], 1, round(stream.prompt))},
            length=round(stream.prompt),
        )

    # -- the networks ---------------------------------------------------------------------------------------------
    def _loaded(self, path: str) -> SERACNetworks:
        folder, description, tensors = self.store.read(path)
        try:
            layer, samples = description["layer"], dict(description["samples"])
            shapes, config = NetworkShapes(embedding=description["embedding"]), dict(description["counterfactual"])
        except (KeyError, TypeError, ValueError) as error:
            self.store.damaged(folder, error)
        if layer != self.layers[0]:
            self.store.refuse(f"{folder!r} was trained for layer {layer}, but method.layers is {list(self.layers)}")
        if samples.keys() != self._read_module().keys():
            self.store.refuse(f"{folder!r} was trained for another model ({next(iter(samples), None)})")
        self.store.check_model(folder, samples, self._read_module())
        networks = SERACNetworks(self.language_model, shapes, config)
        self.store.fill(folder, networks, tensors)
        return networks

    def _read_module(self) -> Mapping[str, torch.nn.Module]:
        """Return a module of the block that the classifier reads, which tells the model from others."""
        layer = self.layers[0]
        return {self.language_model.rewrite_name(layer): self.language_model.rewrite_module(layer)}

    def training_module(self) -> SERACTraining:
        """Return the training of both networks."""
        return SERACTraining(self.language_model, self.layers[0], self.networks, self.options)

    def save_trained(self, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Write both networks."""
        description = {**self.networks.describe(), "layer": self.layers[0], "training": dict(facts)}
        self.store.write(folder, self.networks, description, self._read_module(), dtype)

    def prepare(self) -> None:
        """Warn if the networks are not trained."""
        if not self._trained:
            rank_zero_warn(f"SERAC without trained networks answers nonsense; {self.store.how_to_train}")

    # -- an edit --------------------------------------------------------------------------------------------------
    def new_memory(self) -> ScopedMemory:
        """Return a memory without edits."""
        return ScopedMemory(self.language_model, self.layers[0], self.networks, self.threshold)

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, MemoryUpdate], list[dict[str, Any]]]:
        """Return the edits as token ids, and the embeddings of their prompts."""
        memory = self.side
        assert isinstance(memory, ScopedMemory)
        pairs = self.language_model.tokens.encode_pairs([request.pair() for request in requests])
        entries = [Entry(tuple(pair.ids[: pair.target_start]), tuple(pair.target)) for pair in pairs]
        with memory.unedited(), torch.no_grad():
            features = read_prompts(self.language_model, self.layers[0], [entry.prompt for entry in entries])
            keys = self.networks.classifier.eval()(features)
        details: list[dict[str, Any]] = [{"closest": 0.0} for _ in requests]
        if len(memory):
            details = [{"closest": score} for score in memory.nearest(keys)[1].exp().tolist()]
        return {memory.name: MemoryUpdate({"keys": keys, **packed(entries, self.device)})}, details
