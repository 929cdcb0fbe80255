"""The edits of an editor: one stream, which grows and shrinks, and its ledger."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console

from prune_lightning.atomic_files import replaced_folder
from prune_lightning.callbacks import EditLedger, RunProgress
from prune_lightning.data.given import GivenRequests
from prune_lightning.editor.results import Edited, Refused
from prune_lightning.editor.surroundings import interruptible, quiet
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger, check_base, rebuild
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import PhaseClock
from prune_lightning.requests import PLAIN, Frame
from prune_lightning.tasks.recipe import Recipe, guard_options
from prune_lightning.types import EditReport, EditRequest


class _Reports(L.Callback):
    """Collects the report of each step."""

    def __init__(self) -> None:
        self.reports: list[EditReport] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the report of the step."""
        self.reports.append(pl_module.run.last_report)


class _InPlace(SingleDeviceStrategy):
    """Leaves the module on its device at the end. Lightning moves it to the CPU, and back would take as long again."""

    def teardown(self) -> None:
        """Free the rest."""
        module, self._lightning_module = self._lightning_module, None
        super().teardown()
        self._lightning_module = module


class EditSession:
    """A model under edit, with its ledger.

    Each call of :meth:`write` continues the stream as a resumed run does, so that the weights are those of one run over
    all edits. After an error or an interrupt, the model is the one after the edits of the ledger.

    Args:
        recipe: Method and restraint.
        language_model: The unedited model.
        folder: Folder of the ledger.
        ledger: The ledger of earlier edits.
        progress: Whether to show progress.
        batch_size: Requests per step.
        chat_template: Whether each prompt is a user's turn in the tokenizer's chat template.

    Attributes:
        requests: The edits so far, refused ones included.
    """

    def __init__(
        self,
        recipe: Recipe,
        language_model: LanguageModel,
        folder: Path,
        ledger: Ledger | None,
        progress: bool,
        batch_size: int = 1,
        chat_template: bool = False,
    ) -> None:
        self.recipe, self.language_model, self.folder = recipe, language_model, folder
        self.device = language_model.device
        self.clock = PhaseClock()
        self.module: EditingModule = recipe.build(language_model, self.clock)
        self.progress, self._guards = progress, guard_options()
        self._batch_size, self._chat_template = batch_size, chat_template
        self.ledger = ledger
        self.requests = self._recorded()

    def _recorded(self, refused: bool = True) -> list[EditRequest]:
        """Return the edits of the ledger."""
        lines = [line for line in (self.ledger.lines if self.ledger else []) if refused or line["applied"]]
        return [EditRequest.from_dict(request) for line in lines for request in line["requests"]]

    def written(self) -> list[EditRequest]:
        """Return the edits that were written, without those that were refused."""
        return self._recorded(refused=False)

    def numbered(self, numbers: int | Sequence[int]) -> list[EditRequest]:
        """Return edits by their numbers, from 1.

        Raises:
            UserError: There is no such edit.
        """
        wanted, there = as_numbers(numbers), range(1, len(self.requests) + 1)
        if missing := [number for number in wanted if number not in there]:
            raise UserError(f"there are no edits {missing}: {len(there)} are in place")
        return [self.requests[number - 1] for number in wanted]

    def frame(self) -> Frame:
        """Return the text around a user's turn."""
        if self.requests:
            return self.requests[-1].frame
        return self.language_model.tokens.chat_frame() if self._chat_template else PLAIN

    # -- editing --------------------------------------------------------------------------------------------------
    def write(self, requests: Sequence[EditRequest]) -> Edited:
        """Write further requests.

        Raises:
            UserError: One does not fit the model; then none is written.
        """
        start = time.perf_counter()
        new = GivenRequests(requests, chat_template=any(self.frame()))
        new.fit(self.language_model.tokens, type(self.module).unusable)
        with self._recovering():
            reports = self._advance([*self.requests, *new.requests])
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
        """Make the edits these ones: keep the steps that begin alike, drop the others, and write what is missing.

        What is missing is written into a copy of the ledger, which then replaces it, so that no edit is lost on the
        way.
        """
        ledger = self.ledger
        assert ledger is not None
        kept = 0
        for step, line in enumerate(ledger.lines, start=1):
            wanted = [request.as_dict() for request in requests[: line["num_requests"]]]
            if [r.as_dict() for r in self.requests[: line["num_requests"]]] != wanted:
                break
            kept = step
        with self._recovering():
            if sum(ledger.sizes[:kept]) == len(requests):
                ledger.lines, ledger.finish_line = ledger.lines[:kept], None
                self._advance(requests)
                return
            try:
                with replaced_folder(self.folder) as copy:
                    shutil.copytree(self.folder, copy, dirs_exist_ok=True)
                    self.ledger = Ledger.open(copy)
                    self.ledger.lines, self.ledger.finish_line = self.ledger.lines[:kept], None
                    self._advance(requests)
                ledger = Ledger.open(self.folder)
            finally:
                self.ledger = ledger

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """After an error or an interrupt inside the block, restore the model after the edits of the ledger."""
        try:
            yield
        except BaseException:
            self.requests = self._recorded()
            try:
                self._advance(self.requests)
            except Exception:  # the ledger cannot be written, but read
                self.module.run.restart()
                self.restore()
            raise

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
        protocol = "sequential" if self._batch_size == 1 else "sequential_batched"
        stream = GivenRequests(requests, protocol=protocol, batch_size=self._batch_size, done=done)
        restraint = self.recipe.build_restraint()
        how = {"batch_size": self._batch_size, "chat_template": self._chat_template}
        keeper = EditLedger(self.folder, {**self.recipe.as_base(), "data": "editor", **how}, self.ledger)
        callbacks = [*([restraint] if restraint else []), instantiate(self._guards), reports, keeper]
        try:
            with quiet(), isolate_rng(), self._shown(), interruptible():
                L.seed_everything(self.recipe.seed, verbose=False)
                self._trainer(callbacks).fit(self.module, datamodule=stream)
        finally:
            self.ledger = keeper.ledger or self.ledger
        self.requests = list(stream.requests)
        return reports.reports

    def _trainer(self, callbacks: list[Any]) -> L.Trainer:
        on_cpu = self.device.type == "cpu"
        return L.Trainer(
            accelerator="cpu" if on_cpu else self.device.type,
            devices=1 if on_cpu else [self.device.index or 0],
            strategy=_InPlace(self.device),
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


def as_numbers(numbers: int | Sequence[int]) -> Sequence[int]:
    """Return one number, or several, as several."""
    return [numbers] if isinstance(numbers, int) else numbers
