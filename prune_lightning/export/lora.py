r"""The change as a PEFT LoRA adapter, :math:`\Delta = B A`, for ``PeftModel.from_pretrained`` on the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import save_file

from prune_lightning.errors import UserError
from prune_lightning.export.lowrank import lowest_rank
from prune_lightning.export.sources import ExportSource

LOW_RANK_ONLY = True


def write(source: ExportSource, folder: Path) -> dict[str, Any]:
    """Write the adapter and the tokenizer.

    Each matrix has the rank of its change, and those that did not change are left out.

    Raises:
        UserError: Nothing has changed, or the rank is so high that the adapter would be larger than the matrices.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for matrix in source.matrices:
        change = lowest_rank(matrix.change)
        rank = change.left.shape[1]
        if rank * sum(matrix.original.shape) > matrix.original.numel() and isinstance(matrix.change, torch.Tensor):
            raise UserError(
                f"the change of {matrix.name} is not of low rank ({rank} of {min(matrix.original.shape)}): as an "
                "adapter it would be larger than the matrix. Export `full` or `delta`, or an approximation of a given "
                "rank"
            )
        if rank:
            module = matrix.name.removesuffix(".weight")
            dtype = torch.promote_types(matrix.original.dtype, torch.float32)
            ranks[module] = rank
            # PEFT stores A as (rank, in) and B as (out, rank), also for weights that are stored transposed.
            tensors[f"base_model.model.{module}.lora_A.weight"] = change.right.T.to("cpu", dtype).contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = change.left.to("cpu", dtype).contiguous()
    if not ranks:
        raise UserError("no weight has changed: there is nothing to put into an adapter")
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=source.provenance.base_model,
        revision=source.provenance.revision,
        r=largest,
        lora_alpha=largest,  # so that the scaling alpha / r is 1 for every matrix
        rank_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        target_modules=list(ranks),
        fan_in_fan_out=source.matrices[0].transposed,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    source.language_model.tokens.tokenizer.save_pretrained(folder)
    return {"ranks": {f"{name}.weight": rank for name, rank in ranks.items()}}


def load(source: ExportSource, folder: Path) -> Any:
    """Load the adapter onto a copy of the base."""
    return PeftModel.from_pretrained(source.base_copy(), folder)
