"""Our restraints under the Hugging Face Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from prune_lightning.errors import UserError

from .restraint import Restraint

_FILE = "restraint.safetensors"


class RestraintCallback(TrainerCallback):
    """Runs a restraint in a ``transformers.Trainer``, after each optimizer step; its state is in the checkpoints.

    Args:
        restraint: The restraint, e.g. ``PRUNE(base=1.2)``.

    Raises:
        UserError: The Trainer shards the weights.

    Example:
        ``Trainer(model, args, train_dataset=data, callbacks=[RestraintCallback(PRUNE(base=1.2))])``
    """

    def __init__(self, restraint: Restraint) -> None:
        self.restraint = restraint

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take hold of the matrices and their originals, those of the checkpoint when training resumes."""
        if args.fsdp or args.deepspeed:
            raise UserError("under the Hugging Face Trainer a restraint works on one device or under DDP, not sharded")
        if state.global_step:
            path = self._folder(args, state) / _FILE
            if not path.exists():
                raise UserError(f"{path} is missing: the checkpoint was written without this restraint")
            self._load(path)
        self.restraint.attach(kwargs["model"], state.global_step)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restrain if the schedule says so."""
        self.restraint.after_step(state.global_step, last=state.global_step >= state.max_steps)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restrain what the last steps left, where training ended early."""
        self.restraint.after_step(state.global_step, last=True)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the restraint's state beside the checkpoint."""
        if not state.is_world_process_zero:
            return
        kept = self.restraint.state_dict()
        tensors = {f"{name}//{key}": t.contiguous() for name, m in kept.pop("matrices").items() for key, t in m.items()}
        save_file(tensors, self._folder(args, state) / _FILE, metadata={"rest": json.dumps(kept)})

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

    def _load(self, path: Path) -> None:
        matrices: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            for full in file.keys():  # noqa: SIM118 - the file is no mapping
                name, key = full.rsplit("//", 1)
                matrices.setdefault(name, {})[key] = file.get_tensor(full)
            self.restraint.load_state_dict({"matrices": matrices, **json.loads(file.metadata()["rest"])})
