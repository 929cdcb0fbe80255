r"""The change as a PEFT LoRA adapter, :math:`\Delta = B A`, for ``PeftModel.from_pretrained`` on the base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import save_file

from prune_lightning.errors import UserError
from prune_lightning.export.lowrank import lowest_rank
from prune_lightning.export.sources import ExportSource

LOW_RANK_ONLY = True


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` takes."""


def write(source: ExportSource, folder: Path) -> dict[str, Any]:
    """Write the adapter and the tokenizer.

    Matrices that did not change are left out. The others have one rank, the highest of their changes, and alpha is that
    rank: the factors of lower rank are padded with zeros. Ranks and alphas by matrix are possible in PEFT, but vLLM
    ignores them, and llama.cpp divides one alpha by each matrix's own rank.

    Raises:
        UserError: Nothing has changed, or the rank is so high that the adapter would be larger than the matrices.
    """
    factors = [(matrix, lowest_rank(matrix.change)) for matrix in source.matrices]
    ranks = {matrix.name: rank for matrix, change in factors if (rank := change.left.shape[1])}
    if not ranks:
        raise UserError("no weight has changed: there is nothing to put into an adapter")
    largest = max(ranks.values())
    tensors: dict[str, torch.Tensor] = {}
    for matrix, change in factors:
        rank = change.left.shape[1]
        if not rank:
            continue
        if rank * sum(matrix.original.shape) > matrix.original.numel() and isinstance(matrix.change, torch.Tensor):
            raise UserError(
                f"the change of {matrix.name} is not of low rank ({rank} of {min(matrix.original.shape)}): as an "
                "adapter it would be larger than the matrix. Export `full` or `delta`, or an approximation of a given "
                "rank"
            )
        name = f"base_model.model.{matrix.name.removesuffix('.weight')}"
        dtype = torch.promote_types(matrix.original.dtype, torch.float32)
        # PEFT stores A as (rank, in) and B as (out, rank), also for weights that are stored transposed.
        for part, factor in (("A", change.right.T), ("B", change.left)):
            missing = [0, largest - rank] if part == "B" else [0, 0, 0, largest - rank]
            padded = torch.nn.functional.pad(factor.to("cpu", dtype), missing)
            tensors[f"{name}.lora_{part}.weight"] = padded.contiguous()
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=source.provenance.base_model,
        revision=source.provenance.revision,
        r=largest,
        lora_alpha=largest,  # so that the scaling alpha / r is 1 for every matrix
        target_modules=[name.removesuffix(".weight") for name in ranks],
        fan_in_fan_out=source.matrices[0].transposed,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    source.language_model.tokens.tokenizer.save_pretrained(folder)
    return {"rank": largest, "ranks": ranks, "note": _note(largest)}


def _note(rank: int) -> str:
    """Return what a server needs to know about an adapter of this rank."""
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return f"rank {rank}, for vLLM: --max-lora-rank {allowed}"
    return f"rank {rank} is more than the {VLLM_RANKS[-1]} that vLLM takes: use the format full there"


def load(source: ExportSource, folder: Path) -> Any:
    """Load the adapter onto a copy of the base."""
    with warnings.catch_warnings():
        # PEFT reads an attribute of the model by a name that transformers has replaced.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return PeftModel.from_pretrained(source.base_copy(), folder)
