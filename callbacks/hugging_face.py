"""Restraints for the Hugging Face Trainer."""

from __future__ import annotations

import inspect
import itertools
import json
import os
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from typing_extensions import override

from prune_lightning.errors import UserError, kind_of
from prune_lightning.fingerprint import fingerprint

from ._order import check_withheld_last
from .restraint import Restraint

_FILE = "restraint{}.safetensors"  # the first one without a number, the next ones with 2, 3, ...
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # set by `accelerate launch`


class RestraintCallback(TrainerCallback):
    """Runs a restraint in a ``transformers.Trainer`` after each optimizer step and saves its state in the checkpoints.

    Several of them process a step in the order of the list, and share the matrices that they have in common.

    Its metrics, ``restraint/*``, are in ``trainer.state.log_history`` and in what every reporter is given.

    Args:
        restraint: The restraint, e.g. ``PRUNE(base=1.2)``.
        resume_from: The checkpoint folder that ``train(resume_from_checkpoint=...)`` is given, if it is not
            ``output_dir/checkpoint-STEP``.

    Raises:
        UserError: The Trainer shards the weights, would replace them at the end, or resumes from a checkpoint that
            does not hold the restraint's state.

    Examples:
        ``Trainer(model, args, train_dataset=data, callbacks=[RestraintCallback(PRUNE(base=1.2))])``
    """

    def __init__(self, restraint: Restraint, resume_from: str | Path | None = None) -> None:
        if not isinstance(restraint, Restraint):
            raise UserError(f"RestraintCallback expects a restraint, e.g. PRUNE(), but got {kind_of(restraint)}")
        self.restraint = restraint
        self.resume_from = Path(resume_from) if resume_from else None
        self._before: list[Restraint] = []

    def __getattr__(self, name: str) -> Any:
        """Refuse Lightning's Trainer, which asks for hooks that a Hugging Face callback does not have."""
        if not name.startswith("__") and hasattr(L.Callback, name):
            held = vars(self).get("restraint")
            raise UserError(
                "RestraintCallback is a callback for the Hugging Face Trainer. Give Lightning's Trainer the restraint "
                f"itself: callbacks=[{type(held).__name__}(...)]"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the matrices and their originals; when training resumes, the checkpoint provides the originals."""
        if args.fsdp or args.deepspeed or any(os.environ.get(name) == "true" for name in _SHARDING):
            raise UserError("under the Hugging Face Trainer a restraint works on one device or under DDP, not sharded")
        if args.load_best_model_at_end and self.restraint.schedule == "end":
            raise UserError("load_best_model_at_end would put an unrestrained model in place of the restrained one")
        self._before = self._log_first(inspect.currentframe())
        if state.global_step:
            path = (self.resume_from or _checkpoint(args, state)) / self._file
            if not path.exists():
                raise UserError(
                    f"{path} is missing: the checkpoint was written without this restraint, or lies elsewhere "
                    "(RestraintCallback(..., resume_from=FOLDER))"
                )
            weights = self._load(path)
            self.restraint.attach(kwargs["model"], state.global_step, self._before)
            for name, matrix in self.restraint.matrices.items():
                if weights.get(name) != fingerprint(matrix.weight()):
                    self.restraint.reset()
                    raise UserError(f"{path} belongs to another checkpoint: {name} differs")
        else:
            self.restraint.attach(kwargs["model"], others=self._before)
        check_withheld_last(self.restraint, self._before)

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a restraint of gradients have them."""
        self.restraint.before_step()

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restrain if it is due."""
        self.restraint.after_step(state.global_step, last=state.global_step >= state.max_steps)

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the restraint's figures to what is logged, and to the record that the Trainer has made of it already."""
        if self.restraint.matrices:
            metrics = self.restraint.metrics
            kwargs["logs"].update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restrain the last steps if training ended early."""
        self.restraint.after_step(state.global_step, last=True)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the restraint's state next to the checkpoint."""
        if not state.is_world_process_zero:
            return
        kept = self.restraint.state_dict()
        tensors = {f"{name}//{key}": t.contiguous() for name, m in kept.pop("matrices").items() for key, t in m.items()}
        kept["weights"] = {name: fingerprint(matrix.weight()) for name, matrix in self.restraint.matrices.items()}
        save_file(tensors, _checkpoint(args, state) / self._file, metadata={"rest": json.dumps(kept)})

    @property
    def _file(self) -> str:
        return _FILE.format(f"_{len(self._before) + 1}" if self._before else "")

    def _log_first(self, frame: FrameType | None) -> list[Restraint]:
        """Move in front of the reporters: they are called in order, and the Trainer puts its own before the user's.

        The Trainer gives a callback no way to the list that it is in; it is with the handler that has called.

        Returns:
            The restraints before this one.
        """
        handler = frame.f_back.f_locals.get("self") if frame and frame.f_back else None
        if not isinstance(handler, CallbackHandler):
            return []
        leading = list(itertools.takewhile(lambda other: isinstance(other, RestraintCallback), handler.callbacks))
        if self not in leading:  # restraints keep their order among themselves
            handler.callbacks.remove(self)
            handler.callbacks.insert(len(leading), self)
        return [other.restraint for other in leading[: leading.index(self) if self in leading else len(leading)]]

    def _load(self, path: Path) -> dict[str, str]:
        matrices: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            for full in file.keys():  # noqa: SIM118 - the file is no mapping
                name, key = full.rsplit("//", 1)
                matrices.setdefault(name, {})[key] = file.get_tensor(full)
            rest = json.loads(file.metadata()["rest"])
        weights: dict[str, str] = rest.pop("weights")
        self.restraint.load_state_dict({"matrices": matrices, **rest})
        return weights


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
