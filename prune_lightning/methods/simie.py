"""SimIE: any editor of single facts, made lifelong by ridge regression (https://github.com/YamingGuo98/SimIE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.costs import protecting
from prune_lightning.methods.least_squares import RecursiveInverse, regression_update
from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.second_moment import Keep
from prune_lightning.types import EditRequest, LowRankUpdate, MemoryUpdate


class SimIE(EditingModule):
    r"""Edit the unedited model each time, and combine the single edits :math:`\Delta_i` by what they do to their keys:

    .. math:: \min_W \sum_i \lVert (W - W_0 - \Delta_i) K_i \rVert^2 + \lambda \lVert W - W_0 \rVert^2

    with :math:`K_i` the inputs of the matrix at all tokens of the step's prompts and targets, on the unedited model. In
    recursive form, with :math:`P_t = P_{t-1} + K_t K_t^\top` and :math:`P_0 = \lambda I`,

    .. math:: W_t = W_{t-1} + (W_0 + \Delta_t - W_{t-1})\, K_t K_t^\top P_t^{-1}.

    Only thin products are needed: the rank of an update is the number of tokens. The editor inside never sees an edited
    model, so that nothing that goes wrong in long streams can go wrong there. It is exact if no edited matrix comes
    before another one.

    What the editor remembers of earlier edits, such as AlphaEdit's past keys, is not used: the regression keeps what
    they do. A setting that asks for such a memory is refused.

    Args:
        language_model: The model to edit.
        editor: Builds the editor from ``language_model=``, and ``layers=`` if these are given.
        ridge: :math:`\lambda`.
        relative: Whether ``ridge`` is in units of the mean squared key, :math:`\operatorname{tr}(K_1 K_1^\top) / (n
            t_1)` with the :math:`t_1` tokens of the first step; otherwise it is :math:`\lambda` itself, as published.
        layers: Layers that the editor edits; ``None`` for its own choice.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: The editor changes no weights, builds on earlier edits, or has a setting that belongs to SimIE, or
            ``ridge`` is not positive.
    """

    takes_feedback: ClassVar[bool] = True

    def __init__(
        self,
        language_model: LanguageModel,
        editor: Callable[..., EditingModule],
        ridge: float = 1.0,
        relative: bool = True,
        layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        inner = editor(language_model=language_model, **({} if layers is None else {"layers": layers}))
        if not inner.in_weights:
            raise UserError(f"SimIE combines changes of weights, and {type(inner).__name__} changes none")
        if inner.builds_on_earlier:
            raise UserError(f"SimIE has each edit computed on the unedited model, but {inner.builds_on_earlier}")
        if inner.run.non_finite != "skip":
            raise UserError("the updates of SimIE's editor are not written: set non_finite in place of the editor's")
        super().__init__(language_model, inner.layers, **kwargs)
        if not ridge > 0:
            raise UserError(f"SimIE's `ridge` is expected to be positive, but got {ridge}")
        self.editor, self.ridge, self.relative = inner, ridge, relative
        self._inverses: dict[str, RecursiveInverse] = {}
        self._keys: Mapping[str, Tensor] = {}

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        editor: Any,
        layers: Sequence[int] | None = None,
        **options: Any,
    ) -> Cost:
        """Return the editor's costs and those of an inverse per matrix, which grows by all tokens of a step."""
        if not hasattr(editor.func, "cost"):
            return Cost([], unknown=True)
        own = {} if layers is None else {"layers": layers}
        found: Cost = editor.func.cost(model, stream, **{**editor.keywords, **own})
        tokens = stream.prompt + stream.target
        return replace(protecting(found, 1, ceil(tokens * stream.batch), Keep()), rank=tokens)

    def edited_modules(self) -> Mapping[str, nn.Module]:
        """Return the editor's modules."""
        return self.editor.edited_modules()

    @property
    def builds_on_earlier(self) -> str | None:
        """The method itself."""
        return "SimIE builds on the combination of earlier edits"

    def check(self) -> None:
        """Check the editor."""
        self.editor.check()

    def prepare(self) -> None:
        """Prepare the editor, which takes the weights of now as its original."""
        self.editor.edited_matrices()
        self.editor.prepare()
        self.facts = self.editor.facts

    def constants(self) -> Mapping[str, float]:
        """Return the editor's."""
        return self.editor.constants()

    def load_constants(self, constants: Mapping[str, float]) -> None:
        """Give them to the editor."""
        self.editor.load_constants(constants)

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return one update per matrix, and the details of the editor."""
        self.editor.run.move_to(self.run.num_requests, self.run.num_steps)  # whose seed may depend on the position
        with self.unedited():
            self._keys = self._read_keys(requests)
            single, details = self.editor.compute_update(requests)
        updates = {}
        for name, keys in self._keys.items():  # also of matrices that this edit alone would not have changed
            matrix, update = self.edited_matrices()[name], single.get(name)
            assert not isinstance(update, MemoryUpdate)
            wanted = -(matrix.delta().to(keys) @ keys + matrix.withheld_on(keys))
            if update is not None:
                wanted += update.times(keys)
            solved = self._inverse(name, keys).solve(keys)
            updates[name] = regression_update(wanted, keys, solved, damping=1.0)
        return updates, details

    @torch.no_grad()
    def _read_keys(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """Return the inputs of every edited matrix at all tokens, by its name, each ``(in_features, tokens)``, fp64."""
        tokens, modules = self.language_model.tokens, self.edited_modules()
        rows = [pair.ids for pair in tokens.encode_pairs([request.pair() for request in requests])]
        ids, mask = tokens.pad(rows, self.language_model.device)
        with capture(inputs=list(modules.values()), rows=len(rows)) as seen:
            self.language_model(ids, mask)
        return {name: seen.inputs[i][mask.bool()].double().T for i, name in enumerate(modules)}

    def _inverse(self, name: str, keys: Tensor) -> RecursiveInverse:
        r"""Return :math:`P^{-1}` of a matrix; of the first step :math:`P_0^{-1}`, from its keys."""
        if name in self._inverses:
            return self._inverses[name]
        unit = float(keys.square().mean()) if self.relative else 1.0
        return RecursiveInverse(torch.eye(len(keys)).to(keys) / (self.ridge * unit))

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the keys of the step."""
        return self._keys

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Add the keys of a step."""
        for name, keys in observed.items():
            self._inverses[name] = self._inverse(name, keys)
            self._inverses[name].add(keys)

    def memory(self) -> Mapping[str, Tensor]:
        """Return the inverses, by the matrix."""
        return {name: each.inverse for name, each in self._inverses.items()}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Replace the inverses."""
        self._inverses = {name: RecursiveInverse(inverse.clone()) for name, inverse in memory.items()}

    def forget(self) -> None:
        """Forget all keys."""
        self._inverses = {}

    def summary(self) -> dict[str, Any]:
        """Return the number of edits and what the editor says of itself."""
        return {**self.editor.summary(), **super().summary()}
