"""lm-evaluation-harness on a model with a memory, which has to know where each prompt ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prune_lightning.models.language_model import LanguageModel


def asking(kind: type, model: LanguageModel) -> type:
    """Return lm-eval's class of models, made to ask a model with a memory as this package does: one row at a time.

    The context of a request is its prompt.

    Args:
        kind: lm-eval's ``HFLM``.
        model: The model.
    """
    base: Any = kind

    class Asking(base):  # type: ignore[misc]
        """Knows the prompt of every row."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            asked = [
                (texts, *model.asked([([*context, *answer], len(context))])[0]) for texts, context, answer in requests
            ]
            rows = [(texts, list(ids[:start]), list(ids[start:])) for texts, ids, start in asked]
            self._lengths = {}
            for _, context, answer in rows:
                ids = [*context, *answer][-(self.max_length + 1) :][:-1]
                self._lengths[tuple(ids)] = len(ids) + 1 - len(answer)
            return super()._loglikelihood_tokens(rows, *args, **kwargs)

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
            with model.prompts([self._lengths[tuple(row)] for row in inps.tolist()]):
                return super()._model_call(inps, *args, **kwargs)

        def _model_generate(self, context: Tensor, max_length: int, stop: Any, **kwargs: Any) -> Tensor:
            ids, _ = model.asked([(context[0].tolist(), context.shape[1])])[0]
            longer = len(ids) - context.shape[1]
            if longer:
                kwargs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long, device=context.device)
            asked = torch.tensor([list(ids)], device=context.device)
            found = super()._model_generate(asked, max_length + longer, stop, **kwargs)
            return torch.cat([context, found[:, len(ids) :]], dim=1)

    return Asking
