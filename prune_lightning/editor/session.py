"""The edits of an editor: one stream, which grows and shrinks, and its ledger."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import transformers
from hydra.utils import instantiate
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console

from prune_lightning.callbacks import EditLedger, RunProgress
from prune_lightning.data.given import GivenRequests
from prune_lightning.editor.results import Edited, Refused
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger, check_base, rebuild
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import PhaseClock
from prune_lightning.requests import PLAIN, Frame
from prune_lightning.tasks.recipe import Recipe, guard_options
from prune_lightning.tasks.setup import quieten
from prune_lightning.types import EditReport, EditRequest


class _Reports(L.Callback):
    """Collects the report of each step."""

    def __init__(self) -> None:
        self.reports: list[EditReport] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the report of the step."""
        self.reports.append(pl_module.run.last_report)


class EditSession:
    """A model under edit, with its ledger.

    Each call of :meth:`write` continues the stream as a resumed run does, so that the weights are those of one run over
    all edits.

    Args:
        recipe: Method and restraint.
        language_model: The unedited model.
        folder: Folder of the ledger.
        ledger: The ledger of earlier edits.
        progress: Whether to show progress.

    Attributes:
        requests: The edits so far, refused ones included.
        stream_options: Arguments of the stream of each call.
    """

    def __init__(
        self, recipe: Recipe, language_model: LanguageModel, folder: Path, ledger: Ledger | None, progress: bool
    ) -> None:
        self.recipe, self.language_model, self.folder = recipe, language_model, folder
        self.device = language_model.device
        self.clock = PhaseClock()
        self.module: EditingModule = recipe.build(language_model, self.clock)
        self.progress, self._guards = progress, guard_options()
        self.stream_options: dict[str, Any] = {}
        self.ledger = ledger
        lines = ledger.lines if ledger else []
        self.requests = [EditRequest.from_dict(request) for line in lines for request in line["requests"]]

    def written(self) -> list[EditRequest]:
        """Return the edits that were written, without those that were refused."""
        lines = self.ledger.lines if self.ledger else []
        return [EditRequest.from_dict(request) for line in lines if line["applied"] for request in line["requests"]]

    def numbered(self, numbers: Sequence[int]) -> list[EditRequest]:
        """Return edits by their numbers, from 1.

        Raises:
            UserError: There is no such edit.
        """
        if missing := [number for number in numbers if not 1 <= number <= len(self.requests)]:
            raise UserError(f"there are no edits {missing}: {len(self.requests)} are in place")
        return [self.requests[number - 1] for number in numbers]

    def frame(self) -> Frame:
        """Return the text around a user's turn."""
        if self.requests:
            return self.requests[-1].frame
        return self.language_model.tokens.chat_frame() if self.stream_options.get("chat_template") else PLAIN

    # -- editing --------------------------------------------------------------------------------------------------
    def write(self, requests: Sequence[EditRequest]) -> Edited:
        """Write further requests."""
        start = time.perf_counter()
        reports = self._advance([*self.requests, *requests])
        written = [request for report in reports if report.applied for request in report.requests]
        refused = [
            Refused(request, report.refused or "")
            for report in reports
            if not report.applied
            for request in report.requests
        ]
        return Edited(written, refused, time.perf_counter() - start)

    def restore(self) -> None:
        """Restore the model after the edits of the ledger."""
        if self.ledger is not None and self.requests:
            check_base(self.ledger, self.module)
            restraint = self.recipe.build_restraint()
            if restraint:
                restraint.attach(self.module)
            if any(line["from_base"] for line in self.ledger.lines):
                raise UserError(
                    f"{self.folder.parent} restored the unedited model after every step: no edited model is left"
                )
            rebuild(self.module, self.ledger, restrain=restraint.restrain if restraint else None, memory=False)

    def rewrite(self, requests: Sequence[EditRequest]) -> None:
        """Make the edits these ones: keep the steps that begin alike, drop the others, and write what is missing."""
        assert self.ledger is not None
        kept = 0
        for step, line in enumerate(self.ledger.lines, start=1):
            wanted = [request.as_dict() for request in requests[: line["num_requests"]]]
            if [r.as_dict() for r in self.requests[: line["num_requests"]]] != wanted:
                break
            kept = step
        self.ledger.lines, self.ledger.finish_line = self.ledger.lines[:kept], None
        self._advance(requests)

    def _advance(self, requests: Sequence[EditRequest]) -> list[EditReport]:
        """Continue the stream up to these requests, from the ledger's last step."""
        run, reports = self.module.run, _Reports()
        run.restart()
        if not requests:
            self.requests = []
            if self.ledger:
                self.ledger.cut()
            return []
        done = self.ledger.sizes if self.ledger else []
        stream = GivenRequests(requests, done=done, **self.stream_options)
        stream.fit(self.language_model.tokens, type(self.module).unusable)
        restraint = self.recipe.build_restraint()
        base = {**self.recipe.as_base(), "data": "editor"}
        keeper = EditLedger(self.folder, base, self.ledger)
        callbacks = [*([restraint] if restraint else []), instantiate(self._guards), reports, keeper]
        try:
            with quiet(), isolate_rng(), self._shown():
                L.seed_everything(self.recipe.seed, verbose=False)
                self._trainer(callbacks).fit(self.module, datamodule=stream)
        finally:  # Lightning moves the module to the CPU
            self.module.to(self.device)
            self.ledger = keeper.ledger or self.ledger
        self.requests = list(stream.requests)
        return reports.reports

    def _trainer(self, callbacks: list[Any]) -> L.Trainer:
        on_cpu = self.device.type == "cpu"
        return L.Trainer(
            accelerator="cpu" if on_cpu else self.device.type,
            devices=1 if on_cpu else [self.device.index or 0],
            max_epochs=1,
            logger=False,
            callbacks=callbacks,
            default_root_dir=self.folder.parent,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
        )

    def _shown(self) -> AbstractContextManager[Any]:
        return RunProgress(self.clock, Console(stderr=True), transient=True) if self.progress else nullcontext()

    # -- views ----------------------------------------------------------------------------------------------------
    def view(self, edited: bool) -> AbstractContextManager[None]:
        """Inside the block the model is the edited or the unedited one."""
        return nullcontext() if edited else self.unedited()

    def unedited(self) -> AbstractContextManager[None]:
        """Inside the block the model is the unedited one; afterwards it is the edited one again, bit for bit."""
        return self.module.unedited()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide, inside the block, what libraries say about training and loading."""
    lightning, level = logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.pytorch").level
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        quieten()
        try:
            yield
        finally:
            lightning.setLevel(level)
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.logging.enable_progress_bar()
