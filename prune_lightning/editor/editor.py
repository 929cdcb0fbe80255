"""Edits a model from Python, on the engine of `train.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_lightning.editor.asking import Asking
from prune_lightning.editor.facts import Facts, requests_of
from prune_lightning.editor.history import History
from prune_lightning.editor.models import HeldModel, recipe_for
from prune_lightning.editor.results import Edited
from prune_lightning.editor.saving import save_record
from prune_lightning.editor.session import EditSession, as_numbers
from prune_lightning.editor.surroundings import quiet
from prune_lightning.errors import UserError
from prune_lightning.export.exporting import ExportReport, export
from prune_lightning.export.sources import ExportSource, Provenance
from prune_lightning.ledger import Ledger
from prune_lightning.tasks.recipe import Recipe
from prune_lightning.types import EditRequest

LEDGER = "ledger"


class Editor(Asking):
    """Edits facts in a language model, one after another.

    Args:
        model: A hub name, a folder, a GGUF file, the name of a shipped preset such as ``bundled``, or a loaded
            ``transformers`` model. A loaded model is edited in place and restored by :meth:`close`.
        method: Name of an editing method, see ``configs/method``.
        restraint: Name of a restraint, see ``configs/restraint``; ``none`` for none.
        tokenizer: The tokenizer of a loaded model.
        folder: Folder for the ledger of the edits, which :meth:`open` reads; a temporary one by default.
        batch_size: Number of facts that are written together.
        chat_template: Whether each prompt is a user's turn in the tokenizer's chat template.
        options: Settings that take precedence, nested as in the configuration:
            ``{"method": {"layers": [5]}, "restraint": {"base": 10}}``.
        device: Device of a model that is loaded here; the accelerator by default, if there is one.
        seed: The seed.
        progress: Whether to show progress.

    Raises:
        UserError: An unknown name or option, or the model cannot be loaded or edited.

    Examples:
        >>> from prune_lightning import Editor
        >>> editor = Editor("bundled", method="rome", restraint="prune", progress=False)
        >>> fact = {"subject": "Lorvain", "prompt": "The capital of Lorvain is", "target_new": "Tessel"}
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        method: str = "memit",
        restraint: str = "prune",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        folder: str | Path | None = None,
        batch_size: int = 1,
        chat_template: bool = False,
        options: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        recipe = recipe_for(model, method, restraint, {"seed": seed, **(options or {})}, device)
        held = HeldModel(recipe, None if isinstance(model, (str, Path)) else model, tokenizer, device)
        self._begin(recipe, held, folder, progress, batch_size=batch_size, chat_template=chat_template)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: PreTrainedModel | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> Editor:
        """Open the edited model of a folder: of :meth:`save`, of an editor's ``folder``, or of a run of ``train.py``.

        Args:
            folder: The folder; further edits are written there.
            model: The unedited model, if it is in memory; loaded from the path in the ledger by default.
            tokenizer: The tokenizer of ``model``.
            device: See :class:`Editor`.
            progress: See :class:`Editor`.

        Raises:
            UserError: There is no ledger, or it belongs to another model.
        """
        folder = Path(folder).expanduser().absolute()
        ledger = Ledger.open(folder / LEDGER).verified()
        editor = cls.__new__(cls)
        recipe = Recipe.recorded(ledger)
        stream = {name: ledger.base[name] for name in ("batch_size", "chat_template") if name in ledger.base}
        editor._begin(recipe, HeldModel(recipe, model, tokenizer, device), folder, progress, ledger, **stream)
        return editor

    def _begin(
        self,
        recipe: Recipe,
        held: HeldModel,
        folder: str | Path | None,
        progress: bool,
        ledger: Ledger | None = None,
        **stream: Any,
    ) -> None:
        """Begin on a model, which is given back if something is wrong; ``stream`` goes to the session."""
        self.recipe, self._held = recipe, held
        self._temporary = tempfile.TemporaryDirectory(prefix="prune-lightning-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder or "").expanduser().absolute()
        self._saved, self._closed = False, False
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"{folder} is a file: give a folder for the edits")
            self._session = EditSession(recipe, held.language_model, self.folder / LEDGER, ledger, progress, **stream)
            self._session.restore()
            self._history = History(self._session)
        except BaseException:
            held.give_back()
            raise

    # -- editing --------------------------------------------------------------------------------------------------
    def edit(self, facts: Facts) -> Edited:
        """Write facts into the model, after all earlier ones.

        Args:
            facts: One fact, several, or a file; see :data:`~prune_lightning.editor.facts.Facts`.

        Raises:
            UserError: A fact cannot be used; then none is written. Or the record cannot be written, e.g. since the disk
                is full: then the facts before that stay, as after an interrupt.
        """
        session = self._open()
        return session.write(requests_of(facts, first_id=len(session.requests)))

    def undo(self, count: int = 1, *, edits: int | Sequence[int] = ()) -> list[EditRequest]:
        """Take back edits. The model is then as if they had never been written.

        The last edits are removed from the record. If others follow, those are written again.

        Args:
            count: How many of the last edits to take back.
            edits: Number of the edit to take back instead, or numbers of several, from 1.

        Returns:
            The edits that were taken back.

        Raises:
            UserError: There is no such edit.
        """
        session = self._open()
        total = len(session.requests)
        numbers = as_numbers(edits)
        if not numbers and (not isinstance(count, int) or not 1 <= count <= total):
            raise UserError(f"cannot take back {count!r} of {total} edits")
        numbers = numbers or range(total - count + 1, total + 1)
        taken = session.numbered(sorted(set(numbers)))
        session.rewrite([r for number, r in enumerate(session.requests, start=1) if number not in numbers])
        return taken

    @property
    def edits(self) -> tuple[EditRequest, ...]:
        """The edits in place, in order."""
        return tuple(self._open().requests)

    def __len__(self) -> int:
        """Return the number of edits in place."""
        return len(self._open().requests)

    @property
    def history(self) -> History:
        """The model after earlier edits, and the spectrum of its change."""
        self._open()
        return self._history

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """Inside the block the model is the unedited one, which is yielded."""
        session = self._open()
        with session.unedited():
            yield session.language_model.model

    # -- keeping --------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, overwrite: bool = False) -> ExportReport:
        """Write the edited model for ``from_pretrained``, and the record of the edits for :meth:`open`.

        A model that was given to the editor then stays edited after :meth:`close`. Of a method that keeps its edits
        beside the weights only the record is written.

        Args:
            folder: The folder.
            overwrite: Whether to replace an earlier one.

        Raises:
            UserError: The folder exists, or the written model differs from the live one.
        """
        if self._open().module.in_weights:
            report = self._export("full", folder, overwrite, record=self.folder / LEDGER)
        else:
            report = save_record(self.folder / LEDGER, folder, self.recipe.model["path"], overwrite)
        self._saved = True
        return report

    def export(self, format: str, folder: str | Path, overwrite: bool = False, merged: bool = False) -> ExportReport:
        """Write the edited model in a format for other programs, load it again, and compare.

        Args:
            format: ``full``, ``lora``, ``delta`` or another format; see docs/export.md.
            folder: The folder.
            overwrite: Whether to replace an earlier export.
            merged: Merge a memory beside the weights (WISE) into them; it then answers every prompt.

        Raises:
            UserError: An unknown format, the folder exists, or the written model differs from the live one.
        """
        return self._export(format, folder, overwrite, merged)

    def _export(
        self, format: str, folder: str | Path, overwrite: bool, merged: bool = False, record: Path | None = None
    ) -> ExportReport:
        session, recipe = self._open(), self.recipe
        if not session.requests:
            raise UserError("there are no edits to export: write some first")
        names = recipe.model["path"], recipe.model["revision"], recipe.method, recipe.restraint
        source = ExportSource.from_module(session.module, Provenance(*names, tuple(session.written())))
        with quiet():
            return export(source, folder, format, overwrite=overwrite, merged=merged, record=record)

    # -- the end --------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Give a loaded model back as it was, unless it was saved, and delete the temporary folder."""
        if self._closed:
            return
        if not self._saved:
            self._session.module.run.restart()
        self._held.give_back()
        if self._temporary:
            self._temporary.cleanup()
        self._closed = True

    def _open(self) -> EditSession:
        if self._closed:
            raise UserError("this editor is closed")
        return self._session

    def __enter__(self) -> Editor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        """Return one line."""
        state = "closed" if self._closed else f"edits={len(self)}"
        recipe = self.recipe
        return f"Editor({recipe.model['path']!r}, method={recipe.method!r}, restraint={recipe.restraint!r}, {state})"
