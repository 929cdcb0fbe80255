"""Writes one JSON line per edit, as soon as it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from prune_lightning.evaluation.counterfact import prompts_by_kind
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.jsonable import jsonable
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditBatch, EditRequest


class EditLog(L.Callback):
    """Logs every request with its success just before and just after the edit, its update's norm, and the seconds.

    List it after the restraint, so that "after" is the restrained model.

    Args:
        path: The JSONL file; written anew.

    Attributes:
        seconds: Sum of the edits' seconds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.seconds = 0.0
        self._before: list[dict[str, Any]] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the file."""
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the requests before they are written."""
        assert isinstance(pl_module, EditingModule)
        with pl_module.evaluation_view():
            self._before = _success(pl_module.language_model, batch.requests)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the requests again and write their lines."""
        assert isinstance(pl_module, EditingModule)
        report = pl_module.last_report
        assert report is not None
        with pl_module.evaluation_view():
            after = _success(pl_module.language_model, batch.requests)
        self.seconds += report.seconds
        first = pl_module.num_edits - len(batch.requests) + 1
        lines = [
            {
                "num_edits": first + i,
                "request": request.as_dict(),
                "before": self._before[i],
                "after": after[i],
                "applied": report.applied,
                "update_norm": report.update_norm if report.applied else None,
                **report.details[i],
                "seconds": report.seconds,
            }
            for i, request in enumerate(batch.requests)
        ]
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(jsonable(line), ensure_ascii=False) + "\n" for line in lines)
        for logger in trainer.loggers:
            logger.log_metrics(
                {"edit/update_norm": report.update_norm, "edit/seconds": report.seconds}, step=pl_module.num_edits
            )


def _success(model: LanguageModel, requests: tuple[EditRequest, ...]) -> list[dict[str, Any]]:
    """Return per request whether the new target is preferred to the old one (if known) and whether it is said."""
    triples = [prompts_by_kind(request, "efficacy")[0] for request in requests]
    wanted = score_pairs(model, [(prompt, new) for prompt, new, _ in triples])
    known = [(i, (prompt, old)) for i, (prompt, _, old) in enumerate(triples) if old is not None]
    preferred: list[bool | None] = [None] * len(requests)
    if known:
        others = score_pairs(model, [pair for _, pair in known])
        for (i, _), nll in zip(known, others.nll, strict=True):
            preferred[i] = bool(torch.isfinite(nll) & (wanted.nll[i] < nll))
    return [{"score": preferred[i], "accuracy": bool(wanted.hit[i])} for i in range(len(requests))]
